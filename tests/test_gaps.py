"""Narrow gaps: which masks are bridged, with what values, and what the catalogue says of it."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from astropy.io import fits

import source_extractor
from common import rows_at
from sky import galaxies, grid_positions, simulate, stars, vstack
from source_extractor import bridge
from truth import INDEPENDENT

SHAPE = (240, 240)
X, Y = grid_positions(SHAPE, 40, seed=3)
BRIDGED = 256

ALWAYS = INDEPENDENT


def field(fwhm=3.0):
    """Return stars 40 pixels apart on a level of 100."""
    return simulate(SHAPE, stars(X, Y, 30000.0, fwhm=fwhm), seed=2, level=100.0)[0]


def gaps(kind, width):
    """Return a mask with a gap through the middle of each star."""
    mask, steps = np.zeros(SHAPE, bool), np.arange(-8, 9)
    for x, y in zip(np.rint(X).astype(int), np.rint(Y).astype(int), strict=True):
        rows, columns = (slice(c - width // 2, c - width // 2 + width) for c in (y, x))
        if kind == "diagonal":
            mask[y + steps, x + steps] = True
        else:
            mask[slice(None) if kind == "column" else rows, columns] = True
            mask[rows] |= kind == "crossing"
    return mask


def assert_right(found):
    """Demand one row a star, with the flux of one without gaps within 2 %, and its position."""
    catalog = rows_at(found.catalog, X, Y)
    assert len(found.catalog) == len(X)
    assert np.hypot(catalog.xwin - X, catalog.ywin - Y).max() < 0.1
    assert np.hypot(catalog.x - X, catalog.y - Y).max() < 0.1
    np.testing.assert_allclose(catalog.flux_auto, 30000, rtol=0.02)
    assert (catalog.flag == BRIDGED).all()
    return catalog


@pytest.mark.parametrize("way", ["nan", "mask", "array_rms", "file", "two passes"])
def test_a_bad_column_does_not_split_stars_whatever_masks_it(run, write, way):
    image, mask = field(), gaps("column", 1)
    image[mask] = 7e4 if way in ("mask", "file") else np.nan
    noise = np.where(mask, 0, 1).astype(np.float32)
    options = {
        "nan": (),
        "mask": ("--mask", write(mask.astype(np.uint8), "mask.fits")),
        "file": ("--err-option", "file", "--err-file", write(noise, "noise.fits")),
        "array_rms": ("--err-option", "array_rms"),
        "two passes": ("--background-passes", 2),
    }[way]
    path = write(image)
    unbridged = run(path, "--thresh", 5, *options, "--bridge", 0).catalog
    assert unbridged.flux_auto.median() < 0.8 * 30000
    assert (assert_right(run(path, "--thresh", 5, *options)).flag_auto == 0).all()


@pytest.mark.parametrize(
    ("kind", "width", "fwhm"),
    [
        *(("column", 3, 3.0), ("cluster", 1, 3.0), ("cluster", 2, 4.0), ("cluster", 3, 3.0)),
        *(("crossing", 1, 4.0), ("diagonal", 1, 3.0), ("diagonal", 1, 6.0)),
    ],
)
def test_flux_and_position_across_gaps_are_right(run, write, kind, width, fwhm):
    image = field(fwhm)
    image[gaps(kind, width)] = np.nan
    assert_right(run(write(image), "--thresh", 5))


# Where the gap is in a source

ACROSS = {
    **{f"star of {fwhm}": partial(stars, fwhm=float(fwhm)) for fwhm in (3, 4, 10)},
    "galaxy": partial(galaxies, a=2.0, b=1.0, theta=0.8),
    "large galaxy": partial(galaxies, a=6.0, b=3.0, theta=2.5),
    "winged star": partial(stars, fwhm=4.0, beta=3.0),
    "two stars": lambda x, y, flux: vstack([stars(x + d, y, flux) for d in (0, 8)]),
}


def compare(run, write, name, width, flux, number, turned=False):
    """Measure sources from 3 pixels left to 3 right of gaps, and the same without the gaps.

    Return the ratios of the fluxes (in circles for two stars), and the shifts of the positions.
    """
    distance = np.arange(-3, 3.1, 0.5)
    column = 40 * np.arange(number) + 20
    x = (column - (width % 2 == 0) / 2 + distance[:, None]).ravel()
    y = np.repeat(40 * np.arange(len(distance)) + 20.3, number)
    shape = 40 * len(distance), 40 * number
    whole, _ = simulate(shape, ACROSS[name](x, y, flux), seed=2, level=100.0, noise=1.0)
    image = whole.copy()
    for c in column:
        image[:, c - width // 2 : c - width // 2 + width] = np.nan
    if turned:
        image, whole, x, y = image.T, whole.T, y, x
    catalog, truth = (
        rows_at(run(write(i, n), "--thresh", 5, "--aperture-diameters", 8).catalog, x, y)
        for i, n in ((image, "image.fits"), (whole, "whole.fits"))
    )
    moved = np.hypot(catalog.xwin - truth.xwin, catalog.ywin - truth.ywin)
    measured = "flux_aper_8" if name == "two stars" else "flux_auto"
    return catalog[measured] / truth[measured], moved


@pytest.mark.parametrize(
    ("name", "width", "flux", "turned", "tolerance", "shift"),
    [
        *(("star of 3", width, 1e5, True, 0.02, 0.1) for width in (1, 2, 3)),
        *(("two stars", width, 1e5, False, 0.02, 0.1) for width in (1, 3)),
        *(("star of 4", 3, 1e5, False, 0.02, 0.1), ("star of 10", 3, 1e5, False, 0.02, 0.1)),
        *(("galaxy", 2, 1e6, False, 0.02, 0.1), ("galaxy", 3, 1e6, False, 0.04, 0.1)),
        *(("large galaxy", 2, 1e6, False, 0.02, 0.1), ("large galaxy", 3, 1e6, False, 0.03, 0.12)),
        *(("winged star", 2, 1e6, False, 0.03, 0.1), ("winged star", 3, 1e6, False, 0.06, 0.2)),
    ],
)
def test_a_source_is_right_wherever_the_gap_is(
    run, write, name, width, flux, turned, tolerance, shift
):
    ratio, moved = compare(run, write, name, width, flux, 1, turned)
    np.testing.assert_allclose(ratio, 1, rtol=tolerance)
    assert moved.max() < shift


@pytest.mark.parametrize(
    ("name", "width", "sky_pixels"),
    [("star of 3", 2, 4.5), ("star of 4", 3, 6.0), ("star of 10", 3, 15.0), ("galaxy", 2, 6.4)],
)
def test_noise_does_not_bias_the_flux(run, write, name, width, sky_pixels):
    """At S/N 100; `sky_pixels` is the root of the number of pixels whose noise counts."""
    ratio, moved = compare(run, write, name, width, 100 * sky_pixels, 8)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert np.sqrt((moved**2).mean()) < 0.2


def test_only_objects_on_a_gap_are_flagged_and_the_background_has_no_bridges(run, write, tmp_path):
    image, column, subtracted = field(), round(X[0]), tmp_path / "subtracted.fits"
    image[:, column - 1 : column + 2] = np.nan
    path = write(image)
    found = run(path, "--thresh", 5, "--subtracted", subtracted)
    flags = rows_at(found.catalog, X, Y).flag
    np.testing.assert_array_equal(flags, np.where(np.abs(X - column) < 6, BRIDGED, 0))
    assert np.isfinite(fits.getdata(subtracted)).all()
    background = found.image("background")
    np.testing.assert_array_equal(background, run(path, "--bridge", 0).image("background"))


def test_a_gap_in_the_image_to_measure_is_bridged_and_flagged_too(run, write):
    other = np.where(gaps("column", 1), np.nan, field())
    assert_right(run(write(field()), "--thresh", 5, "--measure-image", write(other, "other.fits")))


def test_gaps_in_the_sky_make_no_sources_and_hot_rims_no_peak_between_them(run, write):
    sky = np.random.default_rng(5).normal(100, 1, (300, 300)).astype(np.float32)
    rims = sky.copy()
    sky[:, 20::20] = sky[:, 41::20] = np.nan
    assert len(run(write(sky), "--thresh", 2).catalog) == 0
    rims[90:96, 99] = rims[90:96, 103] = 300
    rims[:, 100:103] = np.nan
    assert run(write(rims, "rims.fits"), "--thresh", 5).catalog.peak.max() < 6 * 200


# Which masks are narrow


def bridged(excluded, widest=3, image=None, noise=1.0):
    """Return what is bridged of a mask, and the image, which is a slope unless it is given."""
    image = np.add(*np.indices(excluded.shape)).astype(np.float32) if image is None else image
    image[excluded] = np.nan
    before = excluded.copy()
    mask = bridge(image, noise, excluded, 1e9, widest)
    np.testing.assert_array_equal(excluded, before)
    assert np.isfinite(image[~mask]).all()
    assert np.isnan(image[mask]).all()
    return excluded & ~mask, image


def mask_of(*parts):
    mask = np.zeros((40, 50), bool)
    for part in parts:
        mask[part] = True
    return mask


COLUMN = np.s_[:, 20]
ROWS, COLUMNS = np.indices((40, 50))
NARROW = {
    "cluster": mask_of(np.s_[5:8, 5:8]),
    "column": mask_of(np.s_[:, 20:23]),
    "row": mask_of(np.s_[11:14]),
    "short column": mask_of(np.s_[10:30, 20]),
    "wide crossing": mask_of(np.s_[:, 20:23], np.s_[11:14]),
    "dead end": mask_of(COLUMN, np.s_[15, 20:]),
    "diagonal": (ROWS + COLUMNS == 49) & (ROWS > 0) & (COLUMNS > 0),
}
WIDE = {
    "box": mask_of(np.s_[5:9, 5:9]),
    **{f"disc of {r}": np.hypot(ROWS - 20, COLUMNS - 20) < r for r in (2.9, 5, 10.5)},
    "border": mask_of(np.s_[:, :2], np.s_[:2], np.s_[:, -2:], np.s_[-3:]),
    "corner": mask_of(np.s_[0, 0], np.s_[-1, -1]),
    "all": np.ones((40, 50), bool),
}


@pytest.mark.parametrize("mask", NARROW.values(), ids=NARROW)
def test_narrow_masks_are_bridged_on_a_slope_exactly(mask):
    found, image = bridged(mask.copy())
    expected = mask.copy()
    expected[[0, -1]] &= found[[0, -1]]  # the ends of a diagonal
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(image[found], (ROWS + COLUMNS)[found], rtol=1e-6)


@pytest.mark.parametrize("mask", WIDE.values(), ids=WIDE)
def test_wide_masks_stay_whole(mask):
    assert not bridged(mask.copy())[0].any()


@pytest.mark.parametrize("widest", [0, 1, 3, 5])
def test_the_option_says_how_wide_a_gap_may_be(widest):
    for width in range(1, 8):
        found, _ = bridged(mask_of(np.s_[:, 20 : 20 + width]), widest)
        assert found.any() == (width <= widest)


def test_a_bad_column_ends_at_a_wide_mask_and_the_shorter_direction_counts():
    found, _ = bridged(mask_of(COLUMN, np.s_[10:20, 15:25]))
    np.testing.assert_array_equal(found, mask_of(np.s_[:9, 20], np.s_[21:, 20]))
    image = np.tile(np.arange(50.0) ** 2, (40, 1)).astype(np.float32)
    _, image = bridged(mask_of(np.s_[10, 20:23]), image=image)
    np.testing.assert_allclose(image[10, 20:23], np.arange(20.0, 23) ** 2)


def test_the_noise_of_a_bridged_pixel_is_interpolated():
    noise = np.tile(np.linspace(1, 2, 50), (40, 1)).astype(np.float32)
    mask = mask_of(np.s_[:, 20:23], np.s_[5:30, 30:40])
    expected = np.where(mask & (np.arange(50) > 25), 1e30, noise)
    noise[mask] = 1e30
    bridged(mask, noise=noise)
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


def test_nothing_beyond_the_edge_is_taken_for_data():
    """A star on a gap beside the first column is right from the pixels that there are."""
    x, y = np.arange(30.0), np.arange(40.0)[:, None]
    star = 1e4 * np.exp(-4 * np.log(2) * ((x - 2) ** 2 + (y - 20) ** 2) / 16).astype(np.float32)
    mask = np.zeros(star.shape, bool)
    mask[:, 1:3] = True
    image = np.where(mask, np.nan, star)
    assert not bridge(image, 1.0, mask, 1.0, 3).any()
    np.testing.assert_allclose(image[mask].sum(), star[mask].sum(), rtol=0.02)


# In chunks of rows


def holes():
    """Return a mask of single pixels, most of them narrow gaps that cross, and of wide ones."""
    mask = np.random.default_rng(4).random(SHAPE) < 0.3
    mask[50:70, 60:90] = mask[:, :2] = mask[100:103, 30:200] = True
    return mask


@pytest.mark.parametrize(("portion", "widest"), [(50, 3), (7000, 5)])
def test_portions_change_nothing_but_roundings(monkeypatch, portion, widest):
    mask, bridges = holes(), []
    for pixels in (portion, mask.size):
        monkeypatch.setattr(source_extractor, "CHUNK", pixels)
        image, noise = field() - 100, np.where(mask, 1e30, 1 + np.indices(SHAPE)[1] / 100)
        image[mask] = np.nan
        bridges.append((bridge(image, noise, mask, 1.0, widest), image, noise))
    (left, image, noise), (whole_left, whole_image, whole_noise) = bridges
    assert 0 < np.count_nonzero(left) < np.count_nonzero(mask)
    np.testing.assert_array_equal(left, whole_left)
    np.testing.assert_allclose(image, whole_image, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(noise, whole_noise, rtol=1e-9)


def test_bridges_take_the_memory_of_a_few_masks(monkeypatch):
    monkeypatch.setattr(source_extractor, "CHUNK", 1000)
    image, mask = field() - 100, holes()
    tracemalloc.start()
    try:
        bridge(image, 1.0, mask, 1.0, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * mask.size + 500 * source_extractor.CHUNK
