"""One source and the others: what is beside it, under the mask or out of order spoils no number."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sep
from numpy.testing import assert_allclose, assert_array_equal

import source_extractor
from common import field_of, rows_at
from sky import simulate, vstack
from sky import stars as star_table

SETTINGS = source_extractor.PhotometrySettings(aperture_diameters=(6.0,))
PHOTOMETRY = ["kron_radius", "flux_auto", "fluxerr_auto", "flux_radius", "xwin", "ywin"]


@pytest.fixture(scope="module")
def found(crowded):
    """Return the crowded sky as a Field, what was detected in it, and its measurements."""
    field = field_of(crowded)
    objects, labels = source_extractor.find_sources(field)
    reference = measure(field, objects, labels)
    return SimpleNamespace(field=field, objects=objects, labels=labels, reference=reference)


def measure(field, objects, labels):
    found = source_extractor.Detections(objects, labels)
    return pd.DataFrame(source_extractor.measure(field, field, found, SETTINGS))


def measure_other(found, **arrays):
    """Measure with other arrays in the Field."""
    return measure(replace(found.field, **arrays), found.objects, found.labels)


def measure_reshaped(found, **shape):
    """Measure with other values of one of the objects; demand that the others stay the same."""
    objects = found.objects.copy()
    for name, value in shape.items():
        objects[name][3] = value
    measured = measure(found.field, objects, found.labels)
    assert_same_rows(measured, found.reference, measured.index != 3)
    return measured


def masked(found, mask, under=0):
    """Return arrays for the Field: a mask, and the image with a value under it."""
    residual = np.where(mask, np.float32(under), found.field.residual)
    return {"mask": mask, "excluded": mask, "residual": residual}


def box_of(found):
    mask = np.zeros(found.labels.shape, bool)
    mask[50:70, 60:120] = True
    return mask


def assert_same_rows(one, other, rows):
    pd.testing.assert_frame_equal(one[rows], other[rows], check_exact=True)


@pytest.mark.parametrize(
    "shape",
    [
        *({"a": np.nan, "b": np.nan}, {"theta": np.nan}, {"x": np.nan}, {"a": np.inf}),
        *({"b": 0.0}, {"b": -1.0}, {"x": -500.0}, {"x": 1e300}),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_measured_is_nan_and_spoils_no_other(found, shape):
    measured = measure_reshaped(found, **shape)
    assert measured.loc[3, PHOTOMETRY].isna().all()
    assert measured["flag_auto"][3] & sep.APER_ALLMASKED


def test_a_source_of_odd_shape_spoils_no_other(found):
    for side in (1e4, 1e-3):
        measure_reshaped(found, a=side, b=side)
    measure_reshaped(found, x=-0.4, y=179.4)  # in the corner of the image


@pytest.mark.parametrize(
    ("shape", "meant"),
    [
        ({"a": 1.0, "b": 3.0, "theta": 0.2}, {"a": 3.0, "b": 1.0, "theta": 0.2}),
        ({"theta": 0.5 + np.pi}, {"theta": 0.5}),
        ({"theta": float(np.float32(np.pi / 2))}, {"theta": np.pi / 2}),
    ],
    ids=["axes swapped", "half a turn", "slightly over pi/2"],
)
def test_odd_shapes_are_measured_as_what_they_mean(found, shape, meant):
    one, other = (measure_reshaped(found, **values) for values in (shape, meant))
    assert np.isfinite(one["flux_auto"][3])
    assert_allclose(one.loc[3], other.loc[3], rtol=1e-6)


def test_a_negative_source_spoils_no_other(found):
    residual = np.where(found.labels == 4, -found.field.residual, found.field.residual)
    measured = measure_other(found, residual=residual)
    assert measured["flux_auto"][3] < 0
    assert measured.loc[3, ["flux_radius", "xwin", "ywin"]].isna().all()
    assert measured["flag_auto"][3] & sep.APER_NONPOSITIVE
    assert_same_rows(measured, found.reference, measured.index != 3)


def test_a_fully_masked_source_is_nan_and_no_other_far_from_it_changes(found):
    y, x = np.indices(found.labels.shape)
    star = found.objects[3]
    near = np.hypot(x - star["x"], y - star["y"]) < 6 * star["a"] + 1
    far = np.hypot(found.objects["x"] - star["x"], found.objects["y"] - star["y"]) > 80
    assert far.sum() > 20
    measured = measure_other(found, **masked(found, near, np.nan))
    assert measured.loc[3, PHOTOMETRY].isna().all()
    assert measured["flag_auto"][3] & sep.APER_ALLMASKED
    assert_same_rows(measured, found.reference, far)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e6])
def test_what_is_under_the_mask_does_not_matter(found, value):
    one, other = (measure_other(found, **masked(found, box_of(found), v)) for v in (0, value))
    assert (one["flux_auto"] != found.reference["flux_auto"]).any()
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_neighbours_do_not_matter_however_bright(found):
    neighbours = (found.labels > 0) & (found.labels != 4)
    residual = np.where(neighbours, np.float32(1e5), found.field.residual)
    measured = measure_other(found, residual=residual)
    assert_same_rows(measured, found.reference, measured.index == 3)


def test_one_noise_is_the_same_everywhere_and_nothing_under_the_mask(found):
    mask, noise = box_of(found), found.field.background.globalrms
    everywhere = measure_other(found, noise=np.full(mask.shape, noise))
    pd.testing.assert_frame_equal(everywhere, found.reference)
    with_gap = measure_other(found, mask=mask, noise=np.where(mask, np.nan, noise))
    labels, residual = found.labels.copy(), found.field.residual.copy()
    pd.testing.assert_frame_equal(with_gap, measure_other(found, mask=mask))
    assert_array_equal(found.labels, labels)  # measuring changes no array
    assert_array_equal(found.field.residual, residual)


@pytest.mark.parametrize("options", [[], ["--err-option", "array_rms", "--thresh", 4]])
def test_a_mask_that_masks_nothing_changes_nothing(run, write, crowded, options):
    image = write(crowded)
    written = []
    for more in ([], ["--mask", write(np.zeros(crowded.shape, np.uint8), "mask.fits")]):
        result = run(image, "--aperture-diameters", 5, *options, *more)
        written.append((result.directory / "catalog.tsv").read_bytes())
    assert written[0] == written[1]


def test_memory_stays_in_proportion_to_the_image(found):
    side = 300
    y, x = np.indices((side, side))
    disc, neighbour = (np.hypot(x - x0, y - 150) < r for x0, r in ((150, 148), (200, 4)))
    residual, labels = (disc * 10 + neighbour * 50).astype("f4"), disc + neighbour.astype("i4")
    objects = found.objects[:2].copy()
    shape = {"x": (150, 200), "y": 150, "a": (74, 2), "b": (74, 2), "theta": 0}
    for name, values in shape.items():
        objects[name] = values
    mask, background = np.zeros((side, side), bool), sep.Background(residual)
    field = replace(found.field, residual=residual, mask=mask, background=background)
    tracemalloc.start()
    try:
        measured = measure(field, objects, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert measured["flux_auto"].notna().all()
    assert peak < 30 * side**2


def test_a_faint_neighbour_does_not_change_the_centroid_at_the_edge(run, write):
    star, found = star_table(1.2, 50.0, 5e4), []
    both = vstack([star, star_table(1.2, 59.5, 100.0)])
    for name, sources in (("alone.fits", star), ("both.fits", both)):
        image, _ = simulate((100, 100), sources, seed=1, level=100.0, noise=1.0)
        found.append(rows_at(run(write(image, name)).catalog, [1.2], [50.0]))
    assert_allclose(*(rows[["xwin", "ywin"]] for rows in found), rtol=0, atol=0.02)


def test_sources_at_the_edge_are_flagged_and_no_others(run, write):
    shape = (120, 120)
    x, y = np.array([1.0, 60, 118, 60, 60]), np.array([60, 1.0, 60, 118, 60])
    image, _ = simulate(shape, star_table(x, y, 5000.0), seed=3, level=10.0, noise=1.0)
    catalog = rows_at(run(write(image)).catalog, x, y)
    assert list(catalog["flag_auto"] & sep.APER_TRUNC) == [sep.APER_TRUNC] * 4 + [0]
    assert catalog["flux_auto"].notna().all()
