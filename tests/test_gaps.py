"""Narrow gaps: which masks are bridged, with what values, and what the catalogue says of it."""

import numpy as np
import pytest
from astropy.io import fits

from common import rows_at
from sky import grid_positions, simulate, stars
from source_extractor import bridge

SHAPE = (240, 240)
X, Y = grid_positions(SHAPE, 40, seed=3)
BRIDGED = 256


def field(fwhm=3.0, flux=30000.0, noise=1.0):
    """Return stars 40 pixels apart on a level of 100."""
    sources = stars(X, Y, flux, fwhm=fwhm)
    return simulate(SHAPE, sources, seed=2, level=100.0, noise=noise)[0]


def gaps(kind, width):
    """Return a mask with a gap through the middle of each star."""
    mask = np.zeros(SHAPE, bool)
    for x, y in zip(np.rint(X).astype(int), np.rint(Y).astype(int), strict=True):
        rows, columns = (slice(c - width // 2, c - width // 2 + width) for c in (y, x))
        match kind:
            case "column":
                mask[:, columns] = True
            case "row":
                mask[rows] = True
            case "crossing":
                mask[rows] = mask[:, columns] = True
            case "cluster":
                mask[rows, columns] = True
            case "diagonal":
                for k in range(-8, 9):
                    mask[y + k, x + k] = True
    return mask


CASES = [
    *(("column", width) for width in (1, 2, 3)),
    *(("row", width) for width in (1, 2, 3)),
    *(("cluster", width) for width in (1, 2, 3)),
    *(("crossing", 1), ("diagonal", 1)),
]


def assert_right(found, fwhm_flux, flux_auto):
    """Demand one row a star, with the flux of one without gaps within 2 %, and its position."""
    catalog = rows_at(found.catalog, X, Y)
    assert len(found.catalog) == len(X)
    assert np.hypot(catalog.xwin - X, catalog.ywin - Y).max() < 0.1
    assert np.hypot(catalog.x - X, catalog.y - Y).max() < 0.1
    np.testing.assert_allclose(catalog.flux_auto, flux_auto, rtol=fwhm_flux)
    return catalog


@pytest.mark.parametrize("way", ["nan", "mask", "array_rms", "file", "two passes"])
def test_a_bad_column_does_not_split_stars_whatever_masks_it(run, write, way):
    image, mask = field(), gaps("column", 1)
    spoilt = np.where(mask, 7e4, image).astype(np.float32)
    noise = np.where(mask, 0, 1).astype(np.float32)
    paths = {
        "mask": ("--mask", write(mask.astype(np.uint8), "mask.fits")),
        "file": ("--err-option", "file", "--err-file", write(noise, "noise.fits")),
        "array_rms": ("--err-option", "array_rms"),
        "two passes": ("--background-passes", 2),
    }
    if way not in ("mask", "file"):
        spoilt[mask] = np.nan
    common = ("--thresh", 5, *paths.get(way, ()))
    unbridged = run(write(spoilt), *common, "--bridge", 0).catalog
    assert unbridged.flux_auto.median() < 0.8 * 30000
    result = run(write(spoilt, "again.fits"), *common)
    catalog = assert_right(result, 0.02, 30000)
    assert (catalog.flag == BRIDGED).all()
    assert (catalog.flag_auto == 0).all()


@pytest.mark.parametrize("fwhm", [3.0, 4.0, 6.0])
@pytest.mark.parametrize(("kind", "width"), CASES)
def test_flux_and_position_across_gaps_are_right(run, write, kind, width, fwhm):
    image = field(fwhm)
    image[gaps(kind, width)] = np.nan
    catalog = assert_right(run(write(image), "--thresh", 5), 0.02, 30000)
    assert (catalog.flag == BRIDGED).all()


def test_only_objects_on_a_gap_are_flagged(run, write):
    image = field()
    column = round(X[0])
    image[:, column] = np.nan
    catalog = rows_at(run(write(image), "--thresh", 5).catalog, X, Y)
    np.testing.assert_array_equal(catalog.flag, np.where(np.abs(X - column) < 5, BRIDGED, 0))


def test_a_gap_in_the_image_to_measure_is_bridged_and_flagged_too(run, write):
    image, other = field(), field()
    other[gaps("column", 1)] = np.nan
    result = run(write(image), "--thresh", 5, "--measure-image", write(other, "other.fits"))
    catalog = assert_right(result, 0.02, 30000)
    assert (catalog.flag == BRIDGED).all()


def test_gaps_in_the_sky_make_no_sources(run, write):
    sky = np.random.default_rng(5).normal(100, 1, (300, 300)).astype(np.float32)
    sky[:, 20::20] = np.nan
    sky[:, 41::20] = np.nan
    assert len(run(write(sky), "--thresh", 2).catalog) == 0


def test_the_background_does_not_see_bridged_pixels(run, write):
    image, mask = field(), gaps("column", 3)
    image[mask] = np.nan
    with_bridges = run(write(image)).image("background")
    without = run(write(image, "again.fits"), "--bridge", 0).image("background")
    np.testing.assert_array_equal(with_bridges, without)


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


def shape_of(*parts):
    mask = np.zeros((40, 50), bool)
    for part in parts:
        mask[part] = True
    return mask


COLUMN, ROW = np.s_[:, 20], np.s_[15, :]
NARROW = {
    "pixel": shape_of(np.s_[5, 5]),
    "cluster": shape_of(np.s_[5:8, 5:8]),
    "column": shape_of(np.s_[:, 20:23]),
    "row": shape_of(np.s_[11:14]),
    "short column": shape_of(np.s_[10:30, 20]),
    "crossing": shape_of(COLUMN, ROW),
    "wide crossing": shape_of(np.s_[:, 20:23], np.s_[11:14]),
    "dead end": shape_of(COLUMN, np.s_[15, 20:]),
    "diagonal": np.eye(40, 50, dtype=bool)[:, ::-1] & (np.indices((40, 50)).min(axis=0) > 0),
}
disc = np.hypot(*(np.indices((40, 50)) - 20))
WIDE = {
    "box": shape_of(np.s_[5:9, 5:9]),
    **{f"disc of {radius}": disc < radius for radius in (2.9, 5, 8.1, 10.5, 15)},
    "border": shape_of(np.s_[:, :2], np.s_[:2], np.s_[:, -2:], np.s_[-3:]),
    "corner": shape_of(np.s_[0, 0], np.s_[-1, -1]),
    "all": np.ones((40, 50), bool),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_masks_are_bridged_on_a_slope_exactly(name):
    mask = NARROW[name].copy()
    inside = mask.copy()
    found, image = bridged(mask)
    inside[[0, -1]] &= found[[0, -1]]  # the ends of a diagonal
    np.testing.assert_array_equal(found, inside)
    slope = np.add(*np.indices(mask.shape))
    np.testing.assert_allclose(image[found], slope[found], rtol=1e-6)


@pytest.mark.parametrize("name", WIDE)
def test_wide_masks_stay_whole(name):
    assert not bridged(WIDE[name].copy())[0].any()


@pytest.mark.parametrize(
    ("widest", "widths"), [(0, []), (1, [1]), (3, [1, 2, 3]), (5, range(1, 6))]
)
def test_the_option_says_how_wide_a_gap_may_be(widest, widths):
    for width in range(1, 8):
        found, _ = bridged(shape_of(np.s_[:, 20 : 20 + width]), widest)
        assert found.any() == (width in widths)


def test_a_bad_column_ends_at_a_wide_mask():
    mask = shape_of(COLUMN, np.s_[10:20, 15:25])
    found, _ = bridged(mask)
    expected = shape_of(COLUMN)
    expected[9:21] = False
    np.testing.assert_array_equal(found, expected)


def test_the_shorter_direction_counts():
    image = np.tile(np.arange(50.0) ** 2, (40, 1)).astype(np.float32)
    mask = shape_of(np.s_[10, 20:23])
    _, image = bridged(mask, image=image)
    np.testing.assert_allclose(image[10, 20:23], np.arange(20.0, 23) ** 2)


def test_the_noise_of_a_bridged_pixel_is_interpolated():
    noise = np.tile(np.linspace(1, 2, 50), (40, 1)).astype(np.float32)
    mask = shape_of(np.s_[:, 20:23], np.s_[5:30, 30:40])
    expected = np.where(mask & (np.arange(50) > 25), 1e30, noise)
    noise[mask] = 1e30
    bridged(mask, noise=noise)
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


def test_no_peak_is_invented_between_hot_rims(run, write):
    sky = np.random.default_rng(5).normal(100, 1, (200, 200)).astype(np.float32)
    sky[90:96, 99] = sky[90:96, 103] = 300
    sky[:, 100:103] = np.nan
    catalog = run(write(sky), "--thresh", 5).catalog
    assert catalog.peak.max() < 6 * 200


def test_bridged_pixels_are_under_the_veil_and_in_the_subtracted_image(run, write, tmp_path):
    image = field()
    image[gaps("column", 3)] = np.nan
    path = tmp_path / "subtracted.fits"
    run(write(image), "--subtracted", path)
    assert np.isfinite(fits.getdata(path)).all()
