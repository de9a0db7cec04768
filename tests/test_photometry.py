"""Photometry: every number recomputed from the other products, from `sep`, or from the truth."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits
from astropy.io.votable.ucd import check_ucd
from astropy.table import Table
from numpy.testing import assert_allclose, assert_array_equal

import source_extractor
from sky import galaxies, grid_positions, random_sources, simulate, tan_wcs, vstack
from sky import stars as star_table

DATA = Path(__file__).parent.parent / "test-data"

CONTRACT = (
    "id thresh npix tnpix xmin xmax ymin ymax x y x2 y2 xy errx2 erry2 errxy a b theta cxx cyy cxy "
    "cflux flux cpeak peak xcpeak ycpeak xpeak ypeak flag",
    "ra dec elongation fwhm background rms kron_radius flux_auto fluxerr_auto mag_auto magerr_auto "
    "snr flux_radius xwin ywin flag_auto",
)
DETECTION, MEASUREMENT = (names.split() for names in CONTRACT)
DIAMETERS = (5, 7.5, 16)

TRUNCATED, HAS_MASKED, ALL_MASKED, NONPOSITIVE = 16, 32, 64, 128


def extract(*arguments):
    """Run the tool in silence and return its catalogue."""
    arguments = [str(argument) for argument in arguments]
    assert source_extractor.main(["-q", *arguments]) == 0
    directory = Path(arguments[arguments.index("-o") + 1])
    return pd.read_csv(directory / "catalog.tsv", sep="\t")


def nearest(catalog, x, y):
    """Return the row of the catalogue nearest to each position."""
    distance = np.hypot(
        np.subtract.outer(x, catalog["x"].to_numpy()), np.subtract.outer(y, catalog["y"].to_numpy())
    )
    assert distance.min(axis=1).max() < 2
    return catalog.iloc[distance.argmin(axis=1)].reset_index(drop=True)


# ---------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------


def fits_with_wcs(path, image):
    fits.writeto(path, image, tan_wcs(image.shape).to_header())


def fits_without_wcs(path, image):
    fits.writeto(path, image)


def noise_alone(path, image):
    fits.writeto(path, image[:40, 50:110] * 0 + np.float32(3))


@pytest.mark.parametrize(
    ("write_input", "options"),
    [
        (fits_with_wcs, []),
        (fits_without_wcs, []),
        (tifffile.imwrite, []),
        (fits_without_wcs, ["--thresh", 1000]),
        (noise_alone, []),
        (fits_without_wcs, ["--err-option", "none", "--thresh", 5]),
        (fits_without_wcs, ["--err-option", "array_rms", "--gain", 2, "--zeropoint", 25]),
    ],
    ids=["wcs", "no-wcs", "tiff", "no-sources", "constant", "absolute", "array"],
)
def test_the_columns_are_the_same_whatever_the_input(run, tmp_path, stars, write_input, options):
    write_input(tmp_path / "image", stars)
    assert list(run(tmp_path / "image", *options).catalog) == DETECTION + MEASUREMENT


@pytest.mark.parametrize("thresh", [1.5, 1000], ids=["sources", "no-sources"])
@pytest.mark.parametrize(
    "diameters", [["5"], ["7.5", "5"], ["0.25", "1000", "12.3456789"]], ids=len
)
def test_each_aperture_adds_four_columns_in_the_order_given(run, write, stars, diameters, thresh):
    result = run(write(stars), "--aperture-diameters", *diameters, "--thresh", thresh)
    assert list(result.catalog)[len(DETECTION + MEASUREMENT) :] == [
        f"{quantity}_aper_{diameter}"
        for diameter in diameters
        for quantity in ("flux", "fluxerr", "mag", "magerr")
    ]


def test_a_diameter_given_twice_is_refused(run, write, stars):
    result = run(write(stars), "--aperture-diameters", 5, 8, 5.0)
    assert result.code == 2
    assert "--aperture-diameters" in result.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--aperture-diameters", value) for value in ("0", "-1", "nan", "inf", "1e300", "wide")],
        *[("--kron-factor", value) for value in ("0", "-1", "nan", "inf")],
        *[("--kron-min-radius", value) for value in ("0", "-1", "nan", "inf")],
        *[("--zeropoint", value) for value in ("nan", "inf", "AB")],
    ],
)
def test_numbers_that_mean_nothing_are_wrong_usage(run, write, stars, option, value):
    result = run(write(stars), f"{option}={value}")
    assert result.code == 2
    assert option in result.err
    assert len(result.err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Definitions: sums over the subtracted image, by numpy
# ---------------------------------------------------------------------------------------------

ZEROPOINT = 22.5
NOISE_OPTIONS = {
    "global": [],
    "array": ["--err-option", "array_rms", "--thresh", 4],
    "file": ["--err-option", "file", "--thresh", 4],
}


def crowded_sky():
    """Return an image (180, 220) of stars and galaxies, some of which overlap, on a slope."""
    shape = (180, 220)
    sources = random_sources(shape, 60, seed=4, flux=(300.0, 20000.0), slope=0.6)
    image, _ = simulate(shape, sources, seed=5, level=100.0, gradient=(5.0, 3.0), noise=2.0)
    return image


@pytest.fixture(scope="module", params=NOISE_OPTIONS)
def measured(request, tmp_path_factory):
    """Return the products of the crowded sky for each kind of noise, and the noise of a pixel."""
    directory = tmp_path_factory.mktemp(request.param)
    image = crowded_sky()
    fits.writeto(directory / "image.fits", image)
    given = np.linspace(1.5, 2.5, image.size, dtype=np.float32).reshape(image.shape)
    fits.writeto(directory / "noise.fits", given)
    file = ["--err-file", directory / "noise.fits"] if request.param == "file" else []
    catalog = extract(
        *(directory / "image.fits", "-o", directory, "--subtracted", directory / "sub.fits"),
        *("--zeropoint", ZEROPOINT, "--aperture-diameters", *DIAMETERS),
        *NOISE_OPTIONS[request.param],
        *file,
    )
    residual, segmentation, rms = (
        fits.getdata(directory / f"{name}.fits") for name in ("sub", "segmentation", "rms")
    )
    level = sep.Background(image)
    noise = {"global": np.full(image.shape, level.globalrms), "array": rms, "file": given}
    return SimpleNamespace(
        catalog=catalog,
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


def circle(source, diameter, shape, subpixels=5):
    """Return the part of each pixel in a circle, counted on a grid of subpixels."""
    offsets = (np.arange(subpixels) + 0.5) / subpixels - 0.5
    rows, columns = (
        np.flatnonzero(np.abs(np.arange(size) - centre) < diameter / 2 + 1)
        for size, centre in zip(shape, (source.y, source.x), strict=True)
    )
    dy, dx = np.add.outer(rows - source.y, offsets), np.add.outer(columns - source.x, offsets)
    weight = np.zeros(shape)
    inside = np.add.outer(dy**2, dx**2) < diameter**2 / 4
    weight[np.ix_(rows, columns)] = inside.mean(axis=(1, 3))
    return weight


def own_or_sky(segmentation, source):
    return (segmentation == 0) | (segmentation == source.id)


def test_sizes_are_functions_of_a_and_b(measured):
    a, b = measured.catalog["a"], measured.catalog["b"]
    assert_allclose(measured.catalog["elongation"], a / b)
    assert_allclose(measured.catalog["fwhm"], 2 * np.sqrt(np.log(2) * (a**2 + b**2)))


@pytest.mark.parametrize("kind", ["auto", *(f"aper_{diameter:g}" for diameter in DIAMETERS)])
def test_magnitudes_are_functions_of_the_fluxes(measured, kind):
    flux, error = measured.catalog[f"flux_{kind}"], measured.catalog[f"fluxerr_{kind}"]
    bright = flux > 0
    assert bright.sum() > 20
    mag, magerr = (measured.catalog[f"{name}_{kind}"] for name in ("mag", "magerr"))
    assert_allclose(10 ** (0.4 * (ZEROPOINT - mag[bright])), flux[bright])
    assert_allclose(magerr[bright], 2.5 / math.log(10) * (error / flux)[bright])
    assert mag[~bright].isna().all()
    assert magerr[~bright].isna().all()


def test_snr_is_flux_over_error(measured):
    catalog = measured.catalog
    assert_allclose(catalog["snr"], catalog["flux_auto"] / catalog["fluxerr_auto"])


def test_background_and_rms_are_those_at_the_nearest_pixel(measured):
    rows, columns = (np.rint(measured.catalog[name]).astype(int) for name in ("y", "x"))
    assert_allclose(measured.catalog["background"], measured.level[rows, columns], rtol=1e-6)
    assert_allclose(measured.catalog["rms"], measured.rms[rows, columns], rtol=1e-6)


def test_the_kron_radius_is_the_first_moment_within_6_without_neighbours(measured):
    expected = []
    for source in measured.catalog.itertuples():
        r = elliptical_radius(source, measured.residual.shape)
        inside = (r <= 6) & own_or_sky(measured.segmentation, source)
        light = measured.residual[inside]
        moment = np.sum(r[inside] * light) / np.sum(light)
        expected.append(max(2.5 * moment, 3.5) if moment > 0 else 3.5)
    assert max(expected) > 3.6
    assert_allclose(measured.catalog["kron_radius"], expected, rtol=1e-5)


def test_auto_sums_the_pixels_in_the_kron_ellipse_without_neighbours(measured):
    crowded = 0
    for source in measured.catalog.itertuples():
        within = elliptical_radius(source, measured.residual.shape) < source.kron_radius
        inside = within & own_or_sky(measured.segmentation, source)
        crowded += (inside != within).any()
        assert_allclose(source.flux_auto, measured.residual[inside].sum(), rtol=1e-5, atol=1e-2)
        assert_allclose(source.fluxerr_auto, np.sqrt(np.sum(measured.noise[inside] ** 2)))
    assert crowded > 10


@pytest.mark.parametrize("diameter", DIAMETERS)
def test_apertures_sum_the_pixels_in_the_circle_without_neighbours(measured, diameter):
    for source in measured.catalog.itertuples():
        weight = circle(source, diameter, measured.residual.shape)
        weight *= own_or_sky(measured.segmentation, source)
        flux = np.sum(weight * measured.residual)
        error = np.sqrt(np.sum(weight * measured.noise**2))
        row = measured.catalog.loc[source.Index]
        assert_allclose(row[f"flux_aper_{diameter:g}"], flux, rtol=1e-5, atol=1e-2)
        assert_allclose(row[f"fluxerr_aper_{diameter:g}"], error)


def test_half_of_auto_falls_within_flux_radius(measured):
    sized = measured.catalog[measured.catalog["flux_radius"].notna()]
    assert len(sized) > 20
    for source in sized.itertuples():
        weight = circle(source, 2 * source.flux_radius, measured.residual.shape)
        weight *= own_or_sky(measured.segmentation, source)
        assert np.sum(weight * measured.residual) == pytest.approx(source.flux_auto / 2, rel=0.05)


def test_auto_is_seps_with_sextractors_recipe(measured):
    shape = [measured.catalog[name].to_numpy() for name in ("x", "y", "a", "b", "theta")]
    shape[4] = np.clip(shape[4], -np.pi / 2, np.pi / 2)
    residual = np.ascontiguousarray(measured.residual, np.float32)
    segmentation = measured.segmentation.astype(np.int32)
    others = {"segmap": segmentation, "seg_id": measured.catalog["id"].to_numpy(np.int32)}
    kron, kron_flag = sep.kron_radius(residual, *shape, 6.0, **others)
    kron = np.maximum(2.5 * kron, 3.5)
    flux, error, flag = sep.sum_ellipse(
        residual, *shape, kron, err=measured.noise, subpix=1, **others
    )
    assert_allclose(measured.catalog["kron_radius"], kron, rtol=1e-6)
    assert_allclose(measured.catalog["flux_auto"], flux, rtol=1e-6, atol=1e-3)
    assert_allclose(measured.catalog["fluxerr_auto"], error, rtol=1e-6)
    of_the_larger_reach = sep.APER_TRUNC | sep.APER_HASMASKED
    flag |= kron_flag & ~of_the_larger_reach
    assert_array_equal(measured.catalog["flag_auto"], flag)


def test_the_zeropoint_shifts_all_magnitudes_and_nothing_else(run, write, stars):
    image = write(stars)
    plain = run(image, "--aperture-diameters", 6).catalog
    shifted = run(image, "--aperture-diameters", 6, "--zeropoint", -3.25).catalog
    magnitudes = ["mag_auto", "mag_aper_6"]
    assert_allclose(shifted[magnitudes] - plain[magnitudes], -3.25)
    pd.testing.assert_frame_equal(
        plain.drop(columns=magnitudes), shifted.drop(columns=magnitudes), check_exact=True
    )


@pytest.mark.parametrize(("factor", "least"), [(2.0, 1.0), (1.0, 5.0), (2.5, 3.1)])
def test_kron_options_are_factor_and_least_radius(run, write, stars, factor, least):
    image = write(stars)
    options = ("--kron-factor", 1, "--kron-min-radius", 1e-3)
    first_moment = run(image, *options).catalog["kron_radius"]
    result = run(image, "--kron-factor", factor, "--kron-min-radius", least)
    assert_allclose(
        result.catalog["kron_radius"], np.maximum(factor * first_moment, least), rtol=1e-12
    )


@pytest.mark.parametrize("gain", [0.5, 4.0])
@pytest.mark.parametrize("noise", ["float_globalrms", "array_rms"])
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
    options = ("--err-option", "file", "--err-type", "weight", "--thresh", 5)
    options += ("--err-file", write(weight, "weight.fits"), "--aperture-diameters", 12)
    clean = run(write(stars), *options).catalog
    source = next(nearest(clean, [80], [60]).itertuples())
    assert source.flag_auto & HAS_MASKED
    assert 10 < source.fluxerr_auto < 15
    assert_array_equal(run(write(hot, "hot.fits"), *options).catalog, clean)


@pytest.mark.parametrize("measured_on", ["itself", "a copy"])
def test_errors_are_finite_beside_pixels_without_a_measured_noise(run, write, measured_on):
    shape = (256, 256)
    x, y = [98.0, 132.0, 200.0], [60.0, 60.0, 200.0]
    image, _ = simulate(shape, star_table(x, y, 5e4), noise=0.0)
    image[:, 130:] += np.random.default_rng(7).normal(0, 1, (256, 126))
    path = write(image)
    options = ("--err-option", "array_rms", "--thresh", 5, "--aperture-diameters", 10)
    if measured_on == "a copy":
        options += ("--measure-image", path)
    result = run(path, *options)
    assert (result.image("rms")[60, 90:98] <= 0).any()
    catalog = nearest(result.catalog, x, y)
    assert np.isfinite(catalog[["fluxerr_auto", "fluxerr_aper_10", "magerr_auto"]]).all(axis=None)
    assert (catalog["fluxerr_aper_10"] < math.sqrt(79) * 1.2).all()


# ---------------------------------------------------------------------------------------------
# Against the truth
# ---------------------------------------------------------------------------------------------

FWHM = 3.0


@pytest.fixture(scope="module")
def isolated(tmp_path_factory):
    """Return truth and catalogue, row by row, of 400 Gaussian stars in white noise."""
    directory = tmp_path_factory.mktemp("isolated")
    shape = (660, 660)
    x, y = grid_positions(shape, 33, seed=1)
    flux = np.geomspace(100, 3000, len(x))
    image, truth = simulate(shape, star_table(x, y, flux, fwhm=FWHM), seed=2, level=50, noise=1)
    fits.writeto(directory / "image.fits", image)
    catalog = extract(directory / "image.fits", "-o", directory, "--thresh", 2)
    return truth.to_pandas(), nearest(catalog, x, y)


def test_errors_are_those_of_the_fluxes(isolated):
    truth, found = isolated
    pull = (found["flux_auto"] - truth["flux"]) / found["fluxerr_auto"]
    assert 0.8 < pull.std() < 1.25
    assert abs(pull.median()) < 0.4


def test_auto_misses_little_of_the_light(isolated):
    truth, found = isolated
    ratio = (found["flux_auto"] / truth["flux"])[truth["flux"] > 1000]
    assert 0.98 < ratio.median() < 1.005


def test_flux_radius_is_the_half_light_radius(isolated):
    truth, found = isolated
    true = truth["r50"] * math.sqrt(1 + 0.46 / FWHM**2)
    ratio = (found["flux_radius"] / true)[truth["flux"] > 1000]
    assert ratio.median() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.05


def test_windowed_centroids_are_better_than_barycentres(isolated):
    truth, found = isolated
    windowed = np.hypot(found["xwin"] - truth["x"], found["ywin"] - truth["y"])
    barycentre = np.hypot(found["x"] - truth["x"], found["y"] - truth["y"])
    assert found["xwin"].notna().all()
    assert windowed.median() < 0.85 * barycentre.median()
    assert (windowed[truth["flux"] > 1000]).median() < 0.04


def test_isolated_sources_have_no_flag(isolated):
    _, found = isolated
    assert (found["flag_auto"] == 0).all()


def test_windowed_centroids_do_not_run_away_to_a_bright_neighbour(run, write):
    shape = (160, 160)
    x, y = grid_positions(shape, 40, seed=3)
    bright, faint = star_table(x, y, 2e4), star_table(x + 4.8, y + 3.6, 1500.0)
    image, _ = simulate(shape, vstack([bright, faint]), seed=4, level=100.0, noise=1.0)
    options = ("--thresh", 5, "--deblend-cont", 1e-4, "--filter-case", "none")
    catalog = run(write(image), *options).catalog
    found = nearest(catalog, faint["x"].data, faint["y"].data)
    sigma = 2 / 2.35 * found["flux_radius"].to_numpy()
    plain_x, plain_y, _ = sep.winpos(image - 100, found["x"], found["y"], sigma)
    assert np.median(np.hypot(plain_x - faint["x"], plain_y - faint["y"])) > 3
    assert np.hypot(found["xwin"] - faint["x"], found["ywin"] - faint["y"]).max() < 0.5
    assert found["xwin"].notna().all()


def test_a_galaxys_shape_is_measured_along_its_axis(run, write):
    theta = np.array([0.3, -1.2, 1.5, 0.9])
    sources = galaxies([40, 120, 40, 120], [40, 40, 120, 120], 2e4, a=5, b=2, theta=theta)
    image, _ = simulate((160, 160), sources, seed=2, level=10.0, noise=1.0)
    found = nearest(run(write(image)).catalog, sources["x"].data, sources["y"].data)
    turn = (found["theta"] - theta + np.pi / 2) % np.pi - np.pi / 2
    assert np.abs(turn).max() < 0.05
    assert (found["elongation"] > 1.5).all()
    assert_allclose(found["flux_auto"], 2e4, rtol=0.1)


# ---------------------------------------------------------------------------------------------
# One source and the others
# ---------------------------------------------------------------------------------------------

SETTINGS = source_extractor.PhotometrySettings(aperture_diameters=(6.0,))
PHOTOMETRY = ["kron_radius", "flux_auto", "fluxerr_auto", "flux_radius", "xwin", "ywin"]
PHOTOMETRY += ["flux_aper_6", "fluxerr_aper_6"]


def measure(field, objects, segmentation, settings=SETTINGS):
    return source_extractor.measure(field, field, objects, segmentation, settings)


@pytest.fixture(scope="module")
def found():
    """Return the crowded sky as a Field, and what was detected in it."""
    image = crowded_sky()
    method = source_extractor.Method(
        source_extractor.make_kernel("default", None, None),
        "float_globalrms",
        1,
        source_extractor.BackgroundSettings(),
        source_extractor.ExtractionSettings(),
    )
    mask = np.zeros(image.shape, bool)
    field = source_extractor.subtract_background(image, mask, None, method)
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
    assert measured["flag_auto"][3] & ALL_MASKED


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
    assert measured["flag_auto"][3] & NONPOSITIVE
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
    assert measured["flag_auto"][3] & ALL_MASKED
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
def test_a_mask_that_masks_nothing_changes_nothing(run, write, tmp_path, options):
    image = write(crowded_sky())
    written = []
    for more in ([], ["--mask", write(np.zeros((180, 220), np.uint8), "mask.fits")]):
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
    field = replace(found.field, residual=residual, mask=np.zeros((side, side), bool))
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
        nearest(run(write(image, name)).catalog, [1.2], [50.0]).iloc[0]
        for image, name in ((alone, "alone.fits"), (both, "both.fits"))
    )
    assert other["xwin"] == pytest.approx(one["xwin"], abs=0.02)
    assert other["ywin"] == pytest.approx(one["ywin"], abs=0.02)


def test_sources_at_the_edge_are_flagged_and_no_others(run, write):
    shape = (120, 120)
    x, y = np.array([1.0, 60, 118, 60, 60]), np.array([60, 1.0, 60, 118, 60])
    image, _ = simulate(shape, star_table(x, y, 5000.0), seed=3, level=10.0, noise=1.0)
    catalog = nearest(run(write(image)).catalog, x, y)
    assert list(catalog["flag_auto"] & TRUNCATED) == [TRUNCATED] * 4 + [0]
    assert catalog["flux_auto"].notna().all()


# ---------------------------------------------------------------------------------------------
# Extreme values
# ---------------------------------------------------------------------------------------------

SCALED = ["flux_auto", "fluxerr_auto", "flux_aper_6", "fluxerr_aper_6", "rms"]
UNSCALED = ["kron_radius", "snr", "flux_radius", "xwin", "ywin", "flag_auto"]


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-20, np.float32), (1e-20, np.float64), (1e20, np.float32)]
)
@pytest.mark.parametrize("option", ["float_globalrms", "array_rms"])
def test_photometry_scales_with_the_image(run, write, stars, scale, dtype, option):
    options = ("--err-option", option, "--thresh", 5, "--aperture-diameters", 6)
    plain = run(write(stars), *options, "--gain", 2).catalog
    image = write((stars.astype(float) * scale).astype(dtype), "scaled.fits")
    scaled = run(image, *options, "--gain", 2 / scale).catalog
    assert len(plain) == 6
    assert_allclose(scaled[SCALED] / scale, plain[SCALED], rtol=1e-3)
    assert_allclose(scaled[UNSCALED], plain[UNSCALED], rtol=1e-3)
    shift = -2.5 * math.log10(scale)
    assert_allclose(scaled["mag_auto"] - plain["mag_auto"], shift, atol=1e-3)


def test_a_pedestal_of_1e7_sigma_changes_no_measurement(run, write, stars):
    options = ("--thresh", 5, "--aperture-diameters", 6)
    plain = run(write(stars), *options).catalog
    high = run(write(stars.astype(float) + 1e7, "high.fits"), *options).catalog
    assert_allclose(high[SCALED + UNSCALED], plain[SCALED + UNSCALED], rtol=2e-3)
    assert_allclose(high["background"] - 1e7, plain["background"], atol=0.05)


def test_an_aperture_wider_than_the_image_sums_all_of_it(run, write, stars, tmp_path):
    diameter = 10_000
    subtracted = tmp_path / "subtracted.fits"
    options = ("--thresh", 5, "--subtracted", subtracted, "--aperture-diameters", diameter)
    result = run(write(stars), *options)
    residual, segmentation = fits.getdata(subtracted).astype(float), result.image("segmentation")
    sums = [
        residual[(segmentation == 0) | (segmentation == label)].sum()
        for label in result.catalog["id"]
    ]
    assert_allclose(result.catalog[f"flux_aper_{diameter:g}"], sums, rtol=1e-4)


# ---------------------------------------------------------------------------------------------
# Measuring on another image
# ---------------------------------------------------------------------------------------------


def read_text(result):
    return (result.directory / "catalog.tsv").read_text()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--err-option", "array_rms", "--thresh", 5],
        ["--gain", 2, "--aperture-diameters", 5],
        ["--background-passes", 2],
        ["--mask-box", 70, 84, 50, 64],
    ],
    ids=["plain", "array", "gain", "passes", "mask"],
)
def test_measuring_on_a_copy_changes_nothing(run, write, stars, options):
    image = write(stars)
    alone = read_text(run(image, *options))
    assert read_text(run(image, *options, "--measure-image", write(stars, "copy.fits"))) == alone


def test_detection_comes_from_the_image_and_photometry_from_the_other(run, write, stars):
    image = write(stars)
    alone = run(image, "--aperture-diameters", 6).catalog
    bright = write(2 * stars + 1000, "bright.fits")
    result = run(image, "--aperture-diameters", 6, "--measure-image", bright)
    assert_array_equal(result.catalog[DETECTION], alone[DETECTION])
    double = ["flux_auto", "fluxerr_auto", "flux_aper_6", "fluxerr_aper_6", "rms"]
    assert_allclose(result.catalog[double], 2 * alone[double], rtol=1e-3)
    same = ["kron_radius", "snr", "flux_radius", "xwin", "ywin"]
    assert_allclose(result.catalog[same], alone[same], rtol=1e-3)
    assert_allclose(result.catalog["background"], 2 * alone["background"] + 1000, atol=0.05)


def test_the_kron_ellipse_is_that_of_the_detection_image(run, write, stars):
    image = write(stars)
    blank = np.random.default_rng(8).normal(50, 2, stars.shape).astype(np.float32)
    alone = run(image).catalog
    catalog = run(image, "--measure-image", write(blank, "blank.fits")).catalog
    assert_array_equal(catalog["kron_radius"], alone["kron_radius"])
    assert_allclose(catalog["fluxerr_auto"], 2 * alone["fluxerr_auto"], rtol=0.05)
    assert (catalog["snr"].abs() < 5).all()


def test_maps_are_those_of_the_detection_image(run, write, stars):
    image = write(stars)
    names = ("background", "rms", "segmentation")
    alone = [run(image).image(name) for name in names]
    result = run(image, "--measure-image", write(3 * stars, "other.fits"))
    for name, expected in zip(names, alone, strict=True):
        assert_array_equal(result.image(name), expected)


def test_planes_and_hdus_of_the_measured_image_are_chosen_on_their_own(run, data):
    stack = data / "stack.fits"
    options = ("--hdu", "SCI", "--plane", 0, "--measure-image", stack, "--measure-hdu", "SCI")
    single, empty, double = (run(stack, *options, "--measure-plane", n).catalog for n in range(3))
    assert_array_equal(single[DETECTION], double[DETECTION])
    assert (double["flux_auto"] / single["flux_auto"]).median() == pytest.approx(2, rel=0.05)
    assert np.abs(empty["snr"]).max() < 5


def test_a_tiff_can_be_measured(run, write, stars, tmp_path):
    tifffile.imwrite(tmp_path / "other.tiff", stars)
    image = write(stars)
    alone = read_text(run(image))
    assert read_text(run(image, "--measure-image", tmp_path / "other.tiff")) == alone


def test_a_negative_flux_has_no_magnitude_and_a_negative_snr(run, write, stars):
    catalog = run(write(stars), "--measure-image", write(200 - stars, "dark.fits")).catalog
    assert (catalog["flux_auto"] < 0).all()
    assert (catalog["snr"] < 0).all()
    unknown = ["mag_auto", "magerr_auto", "flux_radius", "xwin", "ywin"]
    assert catalog[unknown].isna().all(axis=None)


def test_missing_pixels_of_the_measured_image_cost_only_themselves(run, write, stars):
    other = stars.copy()
    other[59:61, 83:86] = np.nan
    other[22:39, 32:49] = np.nan
    image = write(stars)
    alone = run(image).catalog
    catalog = run(image, "--measure-image", write(other, "other.fits")).catalog
    assert_array_equal(catalog[DETECTION], alone[DETECTION])
    part, lost, whole = nearest(catalog, [80, 40, 120], [60, 30, 100]).itertuples()
    assert part.flag_auto & HAS_MASKED
    assert 0.5 < part.flux_auto / whole.flux_auto < 1
    assert np.isfinite([part.fluxerr_auto, part.mag_auto, part.flux_radius, part.xwin]).all()
    assert lost.flag_auto & ALL_MASKED
    assert np.isnan([lost.flux_auto, lost.fluxerr_auto, lost.mag_auto, lost.snr, lost.xwin]).all()
    assert whole.flag_auto == 0
    assert whole.flux_auto == pytest.approx(1005, rel=0.05)


def test_another_shape_is_refused_with_both(run, write, stars):
    result = run(write(stars), "--measure-image", write(stars[:, :150], "narrow.fits"))
    result.assert_refused("narrow.fits", "(120, 160)", "(120, 150)")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_measured_image_without_values_is_refused_by_its_name(run, write, stars, value):
    other = write(np.full_like(stars, value), "other.fits")
    run(write(stars), "--measure-image", other).assert_refused("other.fits")


@pytest.mark.parametrize("option", ["--measure-hdu", "--measure-plane"])
@pytest.mark.parametrize("value", [0, 1])
def test_parts_of_a_measured_image_need_one(run, write, stars, option, value):
    result = run(write(stars), option, value)
    assert result.code == 2
    assert f"{option} needs --measure-image" in result.err


def test_a_constant_image_can_be_measured(run, write, stars):
    other = write(np.full_like(stars, 7), "flat.fits")
    result = run(write(stars), "--measure-image", other)
    assert result.code == 0
    assert len(result.catalog) == 6
    assert (result.catalog["flux_auto"] == 0).all()
    assert result.catalog[["mag_auto", "snr"]].isna().all(axis=None)


# ---------------------------------------------------------------------------------------------
# FITS catalogue
# ---------------------------------------------------------------------------------------------

UNITS = {
    "ra": "deg",
    "dec": "deg",
    "elongation": None,
    "fwhm": "pix",
    "background": "nJy",
    "rms": "nJy",
    "kron_radius": None,
    "flux_auto": "nJy",
    "fluxerr_auto": "nJy",
    "mag_auto": "mag",
    "magerr_auto": "mag",
    "snr": None,
    "flux_radius": "pix",
    "xwin": "pix",
    "ywin": "pix",
    "flag_auto": None,
    "flux_aper_5": "nJy",
    "fluxerr_aper_5": "nJy",
    "mag_aper_7.5": "mag",
    "magerr_aper_7.5": "mag",
}


@pytest.fixture(scope="module")
def both_catalogs(tmp_path_factory):
    """Return the text catalogue of the test sky, in nJy, and the path of the FITS one."""
    directory = tmp_path_factory.mktemp("catalogs")
    with fits.open(DATA / "sky.fits") as hdus:
        hdus[0].header["BUNIT"] = "nJy"
        hdus.writeto(directory / "image.fits")
    path = directory / "catalog.fits"
    options = ("-o", directory, "--catalog-fits", path, "--aperture-diameters", 5, 7.5)
    return extract(directory / "image.fits", *options), path


def test_the_fits_catalogue_holds_the_same_numbers(both_catalogs):
    catalog, path = both_catalogs
    table = Table.read(path)
    assert table.colnames == list(catalog)
    for name in table.colnames:
        assert_array_equal(np.asarray(table[name]), catalog[name], name)


@pytest.mark.parametrize("name", UNITS)
def test_measurements_have_units(both_catalogs, name):
    unit = Table.read(both_catalogs[1])[name].unit
    assert (unit and unit.to_string()) == UNITS[name]


def test_every_column_has_a_description_of_its_own(both_catalogs):
    descriptions = [column.description for column in Table.read(both_catalogs[1]).itercols()]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions)


def test_every_column_has_a_ucd_of_the_ivoa(both_catalogs):
    header = fits.getheader(both_catalogs[1], 1)
    for number in range(1, header["TFIELDS"] + 1):
        ucd = header[f"TUCD{number}"]
        assert check_ucd(ucd, check_controlled_vocabulary=True), header[f"TTYPE{number}"]


def test_an_absolute_threshold_is_for_the_detection_image_alone(run, write):
    image, options = (
        crowded_sky(),
        ("--err-option", "none", "--thresh", 5, "--background-passes", 2),
    )
    detection = write(image, "detection.fits")
    one, hundred = (
        run(detection, *options, "--measure-image", write(image * factor, f"{factor}.fits")).catalog
        for factor in (1, 100)
    )
    assert_allclose(hundred["flux_auto"], 100 * one["flux_auto"], rtol=1e-3, atol=1)


def test_measured_columns_have_the_unit_of_the_measured_image(run, write, stars, tmp_path):
    detection = write(stars, "detection.fits", BUNIT="adu")
    other = write(stars, "other.fits", BUNIT="nJy")
    run(detection, "--measure-image", other, "--catalog-fits", tmp_path / "catalog.fits")
    table = Table.read(tmp_path / "catalog.fits")
    assert str(table["flux"].unit) == "adu"
    assert str(table["flux_auto"].unit) == str(table["background"].unit) == "nJy"
