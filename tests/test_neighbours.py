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


def measure(field, objects, segmentation, settings=SETTINGS):
    found = source_extractor.Detections(objects, segmentation)
    return pd.DataFrame(source_extractor.measure(field, field, found, settings))


@pytest.fixture(scope="module")
def found(crowded):
    """Return the crowded sky as a Field, and what was detected in it."""
    field = field_of(crowded)
    detections = source_extractor.find_sources(field)
    return SimpleNamespace(
        field=field,
        objects=detections.objects,
        segmentation=detections.segmentation,
        reference=measure(field, detections.objects, detections.segmentation),
    )


def assert_same_rows(one, other, rows):
    pd.testing.assert_frame_equal(one[rows], other[rows], check_exact=True)


BAD_SHAPES = {
    "a nan": {"a": np.nan},
    "a and b nan": {"a": np.nan, "b": np.nan},
    "theta nan": {"theta": np.nan},
    "x nan": {"x": np.nan},
    "a infinite": {"a": np.inf},
    "b zero": {"b": 0.0},
    "b negative": {"b": -1.0},
    "outside": {"x": -500.0},
    "far outside": {"x": 1e300},
}


ODD_SHAPES = {
    "a less than b": {"a": 1.0, "b": 3.0},
    "theta of float32 over pi/2": {"theta": float(np.float32(np.pi / 2))},
    "theta 3": {"theta": 3.0},
    "huge": {"a": 1e4, "b": 1e4},
    "tiny": {"a": 1e-3, "b": 1e-3},
    "in the corner": {"x": 0.0, "y": 0.0},
    "a hair outside": {"x": -0.4, "y": 179.4},
}


def measure_beside(found, shape):
    """Measure with one object of another shape; demand that the others come out the same."""
    objects = found.objects.copy()
    for name, value in shape.items():
        objects[name][3] = value
    measured = measure(found.field, objects, found.segmentation)
    assert_same_rows(measured, found.reference, measured.index != 3)
    return measured


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_a_source_that_cannot_be_measured_is_nan_and_spoils_no_other(found, shape):
    measured = measure_beside(found, BAD_SHAPES[shape])
    assert measured.loc[3, PHOTOMETRY].isna().all()
    assert measured["flag_auto"][3] & sep.APER_ALLMASKED


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_source_of_odd_shape_spoils_no_other(found, shape):
    measure_beside(found, ODD_SHAPES[shape])


@pytest.mark.parametrize(
    ("change", "of"),
    [
        ({"a": 1.0, "b": 3.0, "theta": 0.2}, {"a": 3.0, "b": 1.0, "theta": 0.2}),
        ({"theta": 0.5 + np.pi}, {"theta": 0.5}),
        ({"theta": float(np.float32(np.pi / 2))}, {"theta": np.pi / 2}),
    ],
    ids=["axes swapped", "half a turn", "a hair over pi/2"],
)
def test_odd_shapes_are_measured_as_what_they_mean(found, change, of):
    rows = []
    for values in (change, of):
        objects = found.objects.copy()
        for name, value in values.items():
            objects[name][3] = value
        rows.append(measure(found.field, objects, found.segmentation).loc[3])
    assert np.isfinite(rows[0]["flux_auto"])
    assert_allclose(rows[0], rows[1], rtol=1e-6)


def test_a_negative_source_spoils_no_other(found):
    own = found.segmentation == 4
    residual = np.where(own, -found.field.residual, found.field.residual)
    measured = measure(replace(found.field, residual=residual), found.objects, found.segmentation)
    assert measured["flux_auto"][3] < 0
    assert measured.loc[3, ["flux_radius", "xwin", "ywin"]].isna().all()
    assert measured["flag_auto"][3] & sep.APER_NONPOSITIVE
    assert_same_rows(measured, found.reference, measured.index != 3)


def test_a_fully_masked_source_is_nan(found):
    y, x = np.indices(found.segmentation.shape)
    star = found.objects[3]
    near = np.hypot(x - star["x"], y - star["y"]) < 6 * star["a"] + 1
    field = replace(
        found.field, mask=near, residual=np.where(near, np.float32(np.nan), found.field.residual)
    )
    measured = measure(field, found.objects, found.segmentation)
    assert measured.loc[3, PHOTOMETRY].isna().all()
    assert measured["flag_auto"][3] & sep.APER_ALLMASKED
    far = np.hypot(found.objects["x"] - star["x"], found.objects["y"] - star["y"]) > 100
    assert far.sum() > 5
    assert_same_rows(measured, found.reference, far)


def test_a_masked_pixel_far_away_changes_no_number(found):
    mask, residual = found.field.mask.copy(), found.field.residual.copy()
    mask[0, 0], residual[0, 0] = True, np.nan
    field = replace(found.field, mask=mask, residual=residual)
    far = np.hypot(found.objects["x"], found.objects["y"]) > 60
    assert far.sum() > 20
    assert_same_rows(measure(field, found.objects, found.segmentation), found.reference, far)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e6, 1e6])
def test_what_is_under_the_mask_does_not_matter(found, value):
    mask = np.zeros(found.segmentation.shape, bool)
    mask[50:70, 60:120] = True
    zero, other = (
        replace(
            found.field, mask=mask, residual=np.where(mask, np.float32(v), found.field.residual)
        )
        for v in (0, value)
    )
    one = measure(zero, found.objects, found.segmentation)
    assert (one["flux_auto"] != found.reference["flux_auto"]).any()
    pd.testing.assert_frame_equal(
        one, measure(other, found.objects, found.segmentation), check_exact=True
    )


def test_neighbours_do_not_matter_however_bright(found):
    label = 4
    neighbours = (found.segmentation > 0) & (found.segmentation != label)
    residual = np.where(neighbours, np.float32(1e5), found.field.residual)
    field = replace(found.field, residual=residual)
    measured = measure(field, found.objects, found.segmentation)
    rows = measured.index == label - 1
    assert_same_rows(measured, found.reference, rows)


def test_measuring_leaves_the_map_and_the_image_as_they_were(found):
    mask = np.zeros(found.segmentation.shape, bool)
    mask[20:90, 20:90] = True
    segmentation, residual = found.segmentation.copy(), found.field.residual.copy()
    measure(replace(found.field, mask=mask), found.objects, found.segmentation)
    assert_array_equal(found.segmentation, segmentation)
    assert_array_equal(found.field.residual, residual)


def test_no_object_gives_no_row(found):
    measured = measure(found.field, found.objects[:0], np.zeros_like(found.segmentation))
    assert len(measured) == 0
    assert list(measured) == list(found.reference)


def test_one_noise_and_the_same_noise_everywhere_are_the_same(found):
    rms = found.field.background.globalrms
    field = replace(found.field, noise=np.full(found.segmentation.shape, rms))
    measured = measure(field, found.objects, found.segmentation)
    pd.testing.assert_frame_equal(measured, found.reference)


def test_noise_that_is_nan_under_the_mask_does_not_matter(found):
    mask = np.zeros(found.segmentation.shape, bool)
    mask[50:70, 60:120] = True
    field = replace(found.field, mask=mask)
    noise = np.where(mask, np.nan, found.field.background.globalrms)
    pd.testing.assert_frame_equal(
        measure(replace(field, noise=noise), found.objects, found.segmentation),
        measure(field, found.objects, found.segmentation),
    )


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
    disc = np.hypot(x - 150, y - 150) < 148
    neighbour = np.hypot(x - 200, y - 150) < 4
    residual = (disc * 10 + neighbour * 50).astype(np.float32)
    segmentation = (disc + neighbour.astype(np.int32)).astype(np.int32)
    objects = found.objects[:2].copy()
    for name, values in {
        "x": (150, 200),
        "y": (150, 150),
        "a": (74, 2),
        "b": (74, 2),
        "theta": (0, 0),
    }.items():
        objects[name] = values
    mask, background = np.zeros((side, side), bool), sep.Background(residual)
    field = replace(found.field, residual=residual, mask=mask, background=background)
    tracemalloc.start()
    try:
        measured = measure(field, objects, segmentation)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert measured["flux_auto"].notna().all()
    assert peak < 30 * side**2


def test_a_faint_neighbour_does_not_change_the_centroid_at_the_edge(run, write):
    shape = (100, 100)
    star = star_table(1.2, 50.0, 5e4)
    alone, _ = simulate(shape, star, seed=1, level=100.0, noise=1.0)
    both, _ = simulate(
        shape, vstack([star, star_table(1.2, 59.5, 100.0)]), seed=1, level=100.0, noise=1.0
    )
    one, other = (
        rows_at(run(write(image, name)).catalog, [1.2], [50.0]).iloc[0]
        for image, name in ((alone, "alone.fits"), (both, "both.fits"))
    )
    assert other["xwin"] == pytest.approx(one["xwin"], abs=0.02)
    assert other["ywin"] == pytest.approx(one["ywin"], abs=0.02)


def test_sources_at_the_edge_are_flagged_and_no_others(run, write):
    shape = (120, 120)
    x, y = np.array([1.0, 60, 118, 60, 60]), np.array([60, 1.0, 60, 118, 60])
    image, _ = simulate(shape, star_table(x, y, 5000.0), seed=3, level=10.0, noise=1.0)
    catalog = rows_at(run(write(image)).catalog, x, y)
    assert list(catalog["flag_auto"] & sep.APER_TRUNC) == [sep.APER_TRUNC] * 4 + [0]
    assert catalog["flux_auto"].notna().all()
