"""Photometry: every number recomputed from the other products, from `sep`, or from the truth."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sep
from astropy.io import fits
from numpy.testing import assert_allclose, assert_array_equal

from common import extract, read_catalog, rows_at
from sky import grid_positions, simulate, vstack
from sky import stars as star_table
from truth import INDEPENDENT, nearest

# Definitions: sums over the subtracted image, by numpy

DIAMETERS = (5, 7.5, 16)
ZEROPOINT = 22.5
NOISE_OPTIONS = {
    "global": [],
    "array": ["--err-option", "array_rms", "--thresh", 4],
    "file": ["--err-option", "file", "--thresh", 4],
}

ALWAYS = INDEPENDENT


@pytest.fixture(scope="module", params=NOISE_OPTIONS)
def measured(request, tmp_path_factory, crowded):
    """Return the products of the crowded sky for each kind of noise, and the noise of a pixel."""
    directory = tmp_path_factory.mktemp(request.param)
    image, file, subtracted = (directory / f"{name}.fits" for name in ("image", "noise", "sub"))
    given = np.linspace(1.5, 2.5, crowded.size, dtype=np.float32).reshape(crowded.shape)
    fits.writeto(image, crowded)
    fits.writeto(file, given)
    extract(
        *(image, "-o", directory, "--subtracted", subtracted),
        *("--catalog-fits", directory / "catalog.fits"),
        *INDEPENDENT,
        *("--zeropoint", ZEROPOINT, "--aperture-diameters", *DIAMETERS),
        *NOISE_OPTIONS[request.param],
        *("--err-file", file) * (request.param == "file"),
    )
    residual, segmentation, rms = (
        fits.getdata(directory / f"{name}.fits") for name in ("sub", "segmentation", "rms")
    )
    level = sep.Background(crowded)
    noise = {"global": np.full(crowded.shape, level.globalrms), "array": rms, "file": given}
    return SimpleNamespace(
        catalog=read_catalog(directory),
        residual=residual.astype(float),
        segmentation=segmentation,
        rms=rms,
        level=level.back(),
        noise=noise[request.param].astype(float),
    )


def elliptical_radius(source, shape):
    """Return the distance of each pixel from a source, in units of its (a, b)."""
    y, x = np.indices(shape)
    dx, dy = x - source.x, y - source.y
    along = dx * np.cos(source.theta) + dy * np.sin(source.theta)
    across = dy * np.cos(source.theta) - dx * np.sin(source.theta)
    return np.hypot(along / source.a, across / source.b)


def circle(source, diameter, measured):
    """Return the part of each pixel in a circle, without neighbours: exact, by `disc_below`."""
    ny, nx = measured.residual.shape
    x, y = np.arange(nx + 1) - 0.5 - source.x, np.arange(ny + 1) - 0.5 - source.y
    corners = disc_below(x, y[:, np.newaxis], diameter / 2)
    return np.diff(np.diff(corners, axis=0), axis=1) * own_or_sky(measured.segmentation, source)


def disc_below(x, y, r):
    """Return the area of the part of a disc about 0 that has abscissae < x and ordinates < y."""
    x, y = np.clip(x, -r, r), np.clip(y, -r, r)
    c = np.sqrt(r**2 - y**2)  # the line of height y is a chord from -c to c

    def under_arc(x):
        return (x * np.sqrt(r**2 - x**2) + r**2 * np.arcsin(x / r)) / 2

    middle = np.clip(x, -c, c)
    area = under_arc(middle) - under_arc(-c) + y * (middle + c)
    sides = under_arc(np.minimum(x, -c)) - under_arc(-r) + under_arc(np.maximum(x, c))
    return area + np.where(y > 0, 2 * (sides - under_arc(c)), 0)


def own_or_sky(segmentation, source):
    return (segmentation == 0) | (segmentation == source.id)


def test_sizes_snr_background_and_rms_are_functions_of_the_other_columns_and_maps(measured):
    catalog = measured.catalog
    a, b = catalog["a"], catalog["b"]
    assert_allclose(catalog["elongation"], a / b)
    assert_allclose(catalog["fwhm"], 2 * np.sqrt(np.log(2) * (a**2 + b**2)))
    assert_allclose(catalog["snr"], catalog["flux_auto"] / catalog["fluxerr_auto"])
    at = tuple(np.rint(catalog[name]).astype(int) for name in ("y", "x"))  # the nearest pixel
    assert_allclose(catalog["background"], measured.level[at], rtol=1e-6)
    assert_allclose(catalog["rms"], measured.rms[at], rtol=1e-6)


@pytest.mark.parametrize("kind", ["auto", "aper_7.5"])
def test_magnitudes_are_functions_of_the_fluxes(measured, kind):
    flux, error, mag, magerr = (
        measured.catalog[f"{name}_{kind}"] for name in ("flux", "fluxerr", "mag", "magerr")
    )
    bright = flux > 0
    assert bright.sum() > 20
    assert_allclose(10 ** (0.4 * (ZEROPOINT - mag[bright])), flux[bright])
    assert_allclose(magerr[bright], 2.5 / math.log(10) * (error / flux)[bright])
    assert mag[~bright].isna().all()
    assert magerr[~bright].isna().all()


def test_auto_sums_the_pixels_in_the_kron_ellipse_without_neighbours(measured):
    crowded, radii = 0, []
    for source in measured.catalog.itertuples():
        r = elliptical_radius(source, measured.residual.shape)
        own = own_or_sky(measured.segmentation, source)
        near, inside = (r <= 6) & own, (r < source.kron_radius) & own
        crowded += (inside != (r < source.kron_radius)).any()
        light = measured.residual[near]
        moment = np.sum(r[near] * light) / np.sum(light)
        radii.append(max(2.5 * moment, 3.5) if moment > 0 else 3.5)
        assert_allclose(source.flux_auto, measured.residual[inside].sum(), rtol=1e-5, atol=1e-2)
        assert_allclose(source.fluxerr_auto, np.sqrt(np.sum(measured.noise[inside] ** 2)))
    assert_allclose(measured.catalog["kron_radius"], radii, rtol=1e-5)
    assert max(radii) > 3.6
    assert crowded > 10


@pytest.mark.parametrize("diameter", DIAMETERS)
def test_apertures_sum_the_pixels_in_the_circle_without_neighbours(measured, diameter):
    sums = []
    for source in measured.catalog.itertuples():
        weight = circle(source, diameter, measured)
        sums.append((np.sum(weight * measured.residual), np.sum(weight * measured.noise**2)))
    flux, variance = np.transpose(sums)
    assert_allclose(measured.catalog[f"flux_aper_{diameter:g}"], flux, rtol=1e-5, atol=1e-2)
    assert_allclose(measured.catalog[f"fluxerr_aper_{diameter:g}"], np.sqrt(variance))


def test_half_of_auto_falls_within_flux_radius(measured):
    sized = measured.catalog[measured.catalog["flux_radius"].notna()]
    assert len(sized) > 20
    for source in sized.itertuples():
        weight = circle(source, 2 * source.flux_radius, measured)
        assert np.sum(weight * measured.residual) == pytest.approx(source.flux_auto / 2, rel=0.05)


def error_ellipse(residual, noise, own, x, y, sigma, gain=np.inf):
    """Return axes and angle of the error ellipse of a windowed centroid, as SExtractor's manual."""
    rows, columns = np.indices(residual.shape)
    dx, dy = columns - x, rows - y
    r = np.hypot(dx, dy)
    weight = np.where(own & (r < 4 * sigma), np.exp(-(r**2) / (2 * sigma**2)), 0)
    variance = weight**2 * (noise**2 + np.maximum(residual, 0) / gain)
    xx, yy, xy = (
        4 * np.sum(variance * moment) / np.sum(weight * residual) ** 2
        for moment in (dx**2, dy**2, dx * dy)
    )
    (minor, major), axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    return math.sqrt(major), math.sqrt(minor), math.atan(axes[1, 1] / axes[0, 1])


def test_position_errors_are_sextractors_without_neighbours(measured):
    known = measured.catalog[measured.catalog["xwin"].notna()]
    assert len(known) > 20
    for source in known.itertuples():
        a, b, theta = error_ellipse(
            *(measured.residual, measured.noise, own_or_sky(measured.segmentation, source)),
            *(source.xwin, source.ywin, 2 / 2.35 * max(source.flux_radius, 0.5)),
        )
        assert (source.errawin, source.errbwin) == pytest.approx((a, b), rel=1e-5)
        if a > 1.01 * b:
            turned = source.errthetawin - theta
            assert math.remainder(turned, math.pi) == pytest.approx(0, abs=1e-3)
    lost = measured.catalog[measured.catalog["xwin"].isna()]
    assert lost[["errawin", "errbwin", "errthetawin"]].isna().all(axis=None)


def test_position_errors_leave_out_masked_pixels_and_what_is_beyond_the_edge(run, write, stars):
    stars[:, 82:84] = np.nan
    image, gain = np.ascontiguousarray(stars[59:]), 3.0
    subtracted = write(image).with_name("subtracted.fits")
    options = "--subtracted", subtracted, "--gain", gain, "--bridge", 0
    result = run(write(image, "cut.fits"), *options)
    source = rows_at(result.catalog, [80], [2]).iloc[0]
    residual, known = np.nan_to_num(fits.getdata(subtracted).astype(float)), np.isfinite(image)
    own = known & own_or_sky(result.image("segmentation"), source)
    noise = sep.Background(image, mask=~known).globalrms
    sigma = 2 / 2.35 * source.flux_radius
    a, b, _ = error_ellipse(residual, noise, own, source.xwin, source.ywin, sigma, gain)
    assert (source.errawin, source.errbwin) == pytest.approx((a, b), rel=1e-5)
    assert a > 1.05 * b


def test_auto_is_seps_with_sextractors_recipe(measured):
    catalog = measured.catalog
    shape = [catalog[name].to_numpy() for name in ("x", "y", "a", "b", "theta")]
    shape[4] = np.clip(shape[4], -np.pi / 2, np.pi / 2)
    residual, labels = measured.residual.astype("f4"), measured.segmentation.astype("i4")
    others = {"segmap": labels, "seg_id": catalog["id"].to_numpy(np.int32)}
    kron, kron_flag = sep.kron_radius(residual, *shape, 6.0, **others)
    kron = np.maximum(2.5 * kron, 3.5)
    ellipses = {"err": measured.noise, "subpix": 1, **others}
    flux, error, flag = sep.sum_ellipse(residual, *shape, kron, **ellipses)
    assert_allclose(catalog["kron_radius"], kron, rtol=1e-6)
    assert_allclose(catalog["flux_auto"], flux, rtol=1e-6, atol=1e-3)
    assert_allclose(catalog["fluxerr_auto"], error, rtol=1e-6)
    of_the_larger_reach = sep.APER_TRUNC | sep.APER_HASMASKED
    assert_array_equal(catalog["flag_auto"], flag | (kron_flag & ~of_the_larger_reach))


# Options


def test_the_zeropoint_shifts_all_magnitudes_and_nothing_else(run, write, stars):
    options = write(stars), "--aperture-diameters", 6
    plain, shifted = (run(*options, *more).catalog for more in ((), ("--zeropoint", -3.25)))
    magnitudes = ["mag_auto", "mag_aper_6"]
    assert_allclose(shifted[magnitudes] - plain[magnitudes], -3.25)
    pd.testing.assert_frame_equal(
        plain.drop(columns=magnitudes), shifted.drop(columns=magnitudes), check_exact=True
    )


@pytest.mark.parametrize(("factor", "least"), [(2.0, 1.0), (1.0, 5.0)])
def test_kron_options_are_factor_and_least_radius(run, write, stars, factor, least):
    image = write(stars)

    def radius(factor, least):
        result = run(image, "--kron-factor", factor, "--kron-min-radius", least)
        return result.catalog["kron_radius"]

    expected = np.maximum(factor * radius(1, 1e-3), least)
    assert_allclose(radius(factor, least), expected, rtol=1e-12)


@pytest.mark.parametrize(("gain", "noise"), [(0.5, "float_globalrms"), (4.0, "array_rms")])
def test_gain_adds_the_poisson_noise_of_the_source(run, write, stars, gain, noise):
    image = write(stars)
    options = ("--err-option", noise, "--thresh", 5, "--aperture-diameters", 6)
    dark, bright = (run(image, *options, *more).catalog for more in ([], ["--gain", gain]))
    for kind in ("auto", "aper_6"):
        added = bright[f"fluxerr_{kind}"] ** 2 - dark[f"fluxerr_{kind}"] ** 2
        assert_allclose(added, dark[f"flux_{kind}"] / gain, rtol=1e-6)
        assert_array_equal(bright[f"flux_{kind}"], dark[f"flux_{kind}"])


def test_pixels_without_noise_are_left_out_of_the_fluxes(run, write, stars):
    weight = np.ones_like(stars)
    weight[58:60, 84:86] = 0
    hot = stars.copy()
    hot[58:60, 84:86] += 500
    options = ("--err-option", "file", "--err-type", "weight", "--thresh", 5, "--bridge", 0)
    options += ("--err-file", write(weight, "weight.fits"), "--aperture-diameters", 12)
    clean = run(write(stars), *options).catalog
    source = next(rows_at(clean, [80], [60]).itertuples())
    assert source.flag_auto & sep.APER_HASMASKED
    assert 10 < source.fluxerr_auto < 15
    assert_array_equal(run(write(hot, "hot.fits"), *options).catalog, clean)


@pytest.mark.parametrize("measured_on", ["itself", "a copy"])
def test_errors_are_finite_beside_pixels_without_a_measured_noise(run, write, measured_on):
    x, y = [98.0, 132.0, 200.0], [60.0, 60.0, 200.0]
    image, _ = simulate((256, 256), star_table(x, y, 5e4), noise=0.0)
    image[:, 130:] += np.random.default_rng(7).normal(0, 1, (256, 126))
    path = write(image)
    options = ("--err-option", "array_rms", "--thresh", 5, "--aperture-diameters", 10)
    result = run(path, *options, *("--measure-image", path) * (measured_on == "a copy"))
    assert (result.image("rms")[60, 90:98] <= 0).any()
    catalog = rows_at(result.catalog, x, y)
    assert np.isfinite(catalog[["fluxerr_auto", "fluxerr_aper_10", "magerr_auto"]]).all(axis=None)
    assert (catalog["fluxerr_aper_10"] < math.sqrt(79) * 1.2).all()


# Against the truth

FWHM = 3.0


def test_fluxes_radii_and_centroids_are_the_true_ones_within_their_errors(run, write):
    shape = (660, 660)
    x, y = grid_positions(shape, 33, seed=1)
    sources = star_table(x, y, np.geomspace(100, 3000, len(x)), fwhm=FWHM)
    image, truth = simulate(shape, sources, seed=2, level=50, noise=1)
    found, truth = rows_at(run(write(image), "--thresh", 2).catalog, x, y), truth.to_pandas()
    assert (found["flag_auto"] == 0).all()
    pull = (found["flux_auto"] - truth["flux"]) / found["fluxerr_auto"]
    assert 0.8 < pull.std() < 1.25
    assert abs(pull.median()) < 0.4
    bright = truth["flux"] > 1000
    assert 0.98 < (found["flux_auto"] / truth["flux"])[bright].median() < 1.005
    true = truth["r50"] * math.sqrt(1 + 0.46 / FWHM**2)
    ratio = (found["flux_radius"] / true)[bright]
    assert ratio.median() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.05
    barycentre = np.hypot(found["x"] - x, found["y"] - y)
    windowed = np.hypot(found["xwin"] - x, found["ywin"] - y)
    assert windowed.notna().all()
    assert windowed.median() < 0.85 * barycentre.median()
    assert windowed[bright].median() < 0.04


@pytest.mark.parametrize(("noise", "gain"), [("float_globalrms", None), ("array_rms", 2.0)])
def test_position_errors_are_those_of_the_windowed_centroids(run, write, noise, gain):
    shape = (990, 990)
    x, y = grid_positions(shape, 33, seed=1)
    sources = star_table(x, y, np.geomspace(100, 3000, len(x)), fwhm=FWHM)
    image, _ = simulate(shape, sources, seed=2, level=50, noise=1, gain=gain)
    options = ("--err-option", noise, "--thresh", 5, *(("--gain", gain) if gain else ()))
    catalog = run(write(image), *options).catalog
    catalog = catalog[catalog["snr"] > 10].reset_index(drop=True)
    index, _ = nearest(catalog, {"x": x, "y": y})
    dx, dy = catalog["xwin"] - x[index], catalog["ywin"] - y[index]
    cos, sin = np.cos(catalog["errthetawin"]), np.sin(catalog["errthetawin"])
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    assert len(catalog) > 300
    assert 0.9 < (along / catalog["errawin"]).std() < 1.1
    assert 0.9 < (across / catalog["errbwin"]).std() < 1.1


def test_windowed_centroids_do_not_run_away_to_a_bright_neighbour(run, write):
    shape = (160, 160)
    x, y = grid_positions(shape, 40, seed=3)
    bright, faint = star_table(x, y, 2e4), star_table(x + 4.8, y + 3.6, 1500.0)
    image, _ = simulate(shape, vstack([bright, faint]), seed=4, level=100.0, noise=1.0)
    options = ("--thresh", 5, "--deblend-cont", 1e-4, "--filter-case", "none")
    catalog = run(write(image), *options).catalog
    found = rows_at(catalog, faint["x"].data, faint["y"].data)
    sigma = 2 / 2.35 * found["flux_radius"].to_numpy()
    plain_x, plain_y, _ = sep.winpos(image - 100, found["x"], found["y"], sigma)
    assert np.median(np.hypot(plain_x - faint["x"], plain_y - faint["y"])) > 3
    assert np.hypot(found["xwin"] - faint["x"], found["ywin"] - faint["y"]).max() < 0.5
    assert found["xwin"].notna().all()


def test_an_aperture_wider_than_the_image_sums_all_of_it(run, write, stars, tmp_path):
    subtracted = tmp_path / "subtracted.fits"
    options = "--thresh", 5, "--subtracted", subtracted, "--aperture-diameters", 10_000
    result = run(write(stars), *options)
    residual, segmentation = fits.getdata(subtracted).astype(float), result.image("segmentation")
    sums = [residual[own_or_sky(segmentation, s)].sum() for s in result.catalog.itertuples()]
    assert_allclose(result.catalog["flux_aper_10000"], sums, rtol=1e-4)
