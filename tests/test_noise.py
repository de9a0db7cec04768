"""Errors, depth and purity hold where the noise of neighbouring pixels is correlated."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import sep
from astropy.io import fits
from numpy.testing import assert_allclose, assert_array_equal
from pandas.testing import assert_frame_equal

import sky
import source_extractor
from common import SKY, field_of
from sky import stacked_noise, unit_noise
from source_extractor import are_strong, count_false, count_sources, find_sources, measure_noise
from truth import INDEPENDENT, nearest, spread

SIGMA = 10.0


def uneven(shape, rng):
    """Return a stack whose noise rises from left to right by a factor of 3."""
    return stacked_noise(shape, rng) * np.linspace(0.5, 1.5, shape[1])


NOISES = {
    "white": unit_noise,
    **{f"FWHM {fwhm}": partial(unit_noise, fwhm=fwhm) for fwhm in (1.5, 2, 3)},
    "stack": stacked_noise,
    "uneven": uneven,
}


def sources(shape, seed):
    """Return isolated Moffat stars and exponential galaxies."""
    x, y = sky.grid_positions(shape, 45, seed=seed)
    rng = np.random.default_rng(seed + 50)
    flux = SIGMA * 10 ** rng.uniform(1.7, 3.5, len(x))
    stars = sky.stars(x[::2], y[::2], flux[::2], fwhm=3.0, beta=3.5)
    b, theta = 3 * rng.uniform(0.35, 1, len(x[1::2])), rng.uniform(-1.5, 1.5, len(x[1::2]))
    galaxies = sky.galaxies(x[1::2], y[1::2], 2 * flux[1::2], a=3.0, b=b, theta=theta)
    return sky.vstack([stars, galaxies])


def pulls(run, write, kind, *options, seed=1):
    """Return the errors of each source found, over the errors given, and its S/N."""
    shape = (900, 900)
    truth = sources(shape, seed)
    light = sky.light(shape, truth)
    noise = SIGMA * NOISES[kind](shape, np.random.default_rng(seed))
    image = write((100 + light + noise).astype(np.float32), f"{kind} {seed}.fits")
    found = run(image, "--aperture-diameters", 4, 10, *options).catalog
    index, distance = nearest(found, truth)
    found, there = found[distance < 2], truth[index[distance < 2]]
    x, y, a, b, theta, kron = found[["x", "y", "a", "b", "theta", "kron_radius"]].to_numpy().T
    true = sep.sum_ellipse(light, x, y, a, b, theta, kron, subpix=1)[0]
    result = {"snr": true / found["fluxerr_auto"]}
    result["auto"] = (found["flux_auto"] - true) / found["fluxerr_auto"]
    for width in (4, 10):
        true = sep.sum_circle(light, x, y, width / 2, subpix=0)[0]
        name = f"aper_{width}"
        result[name] = (found[f"flux_{name}"] - true) / found[f"fluxerr_{name}"]
    for n in "xy":
        off = found[f"{n}win"] - np.array(there[n])
        # The error ellipse is nearly round.
        result[f"{n}win"] = off / np.sqrt((found["errawin"] ** 2 + found["errbwin"] ** 2) / 2)
        result[n] = (found[n] - np.array(there[n])) / np.sqrt(found[f"err{n}2"])
    return {name: np.asarray(values) for name, values in result.items()}


BINS = [(4, 12), (12, 50), (50, 500)]


@pytest.mark.parametrize("kind", NOISES)
def test_errors_hold_whatever_the_noise(run, write, kind):
    parts = [pulls(run, write, kind, seed=seed) for seed in range(1, 7)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for low, high in BINS:
        chosen = (found["snr"] > low) & (found["snr"] <= high)
        assert chosen.sum() > 60
        for name in ("auto", "aper_4", "aper_10", "xwin", "ywin"):
            values = found[name][chosen]
            assert 0.75 < spread(values) < 1.3, (name, low)
            assert abs(np.nanmedian(values)) < 0.55, (name, low)


def test_errors_of_the_barycentre_are_off_as_in_white_noise(run, write):
    widths = {}
    for kind in ("white", "FWHM 2", "stack"):
        found = pulls(run, write, kind)
        chosen = found["snr"] > 20
        widths[kind] = np.mean([spread(found[name][chosen]) for name in "xy"])
    assert widths["FWHM 2"] == pytest.approx(widths["white"], rel=0.15)
    assert widths["stack"] == pytest.approx(widths["white"], rel=0.15)


def test_errors_of_independent_pixels_are_too_small_in_correlated_noise(run, write):
    found = pulls(run, write, "FWHM 3", *INDEPENDENT)
    assert spread(found["auto"]) > 3


def noise_of(field):
    """Return the noise of a field, and the number of its sources that are counted as noise."""
    found = find_sources(field)
    strong = are_strong(field, found)
    noise = measure_noise(field, found.segmentation, strong)
    return noise, count_false(field, found, strong, noise).number


def test_ratios_are_those_of_the_autocorrelation():
    for fwhm in (0, 1.5, 2, 3):
        image = SIGMA * unit_noise((900, 900), np.random.default_rng(3), fwhm)
        field = field_of(image.astype(np.float32))
        noise, _ = noise_of(field)
        for radius in (2, 3, 5):
            # The variance of a sum is the sum of the autocorrelation between all pairs of pixels.
            disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
            y, x = np.nonzero(disc)
            distance2 = np.subtract.outer(x, x) ** 2 + np.subtract.outer(y, y) ** 2
            sigma = max(fwhm, 0.1) / 2.3548
            exact = np.sqrt(np.exp(-distance2 / (4 * sigma**2)).sum() / len(x))
            assert noise.ratio(len(x)) == pytest.approx(exact, rel=0.06)
        if not fwhm:
            assert_array_equal(noise.ratios, 1)


def test_beyond_the_largest_disc_the_ratio_goes_on_at_most_as_an_error_of_the_background():
    areas = np.array([1.0, 10, 20, 40])
    noise = replace(source_extractor.INDEPENDENT, areas=areas, ratios=np.array([1.0, 1, 3, 9]))
    assert noise.ratio(160) == pytest.approx(18)
    assert noise.ratio(0.1) == 1
    flat = replace(source_extractor.INDEPENDENT, areas=areas, ratios=np.array([1.0, 2, 2, 1]))
    assert flat.ratio(1e6) == 1


def test_only_the_part_of_the_sky_is_scaled(run, write):
    """The photons of bright sources are independent."""
    noise = 3 * unit_noise((400, 400), np.random.default_rng(5), 3)
    x, y = sky.grid_positions((400, 400), 80, seed=5)
    image = write((100 + noise + sky.light((400, 400), sky.stars(x, y, 1e6))).astype(np.float32))
    errors = {}
    for kind in ("measured", "none"):
        for gain in ((), ("--gain", 0.01)):
            options = "--noise-correlation", kind, *gain
            catalog = run(image, *options).catalog
            errors[kind, bool(gain)] = catalog[catalog["flux_auto"] > 5e5].reset_index()
    for name in ("fluxerr_auto", "errx2", "errawin"):
        sky_only, with_photons = (
            np.median(errors["measured", gain][name] / errors["none", gain][name])
            for gain in (False, True)
        )
        assert sky_only > 2
        assert with_photons == pytest.approx(1, abs=0.05)


def test_a_measure_image_has_its_own_noise(run, write):
    x, y = sky.grid_positions((400, 400), 50, seed=6)
    light = sky.light((400, 400), sky.stars(x, y, 5000.0))
    rng = np.random.default_rng(6)
    one, other = (
        write((light + SIGMA * unit_noise(light.shape, rng, fwhm)).astype(np.float32), name)
        for fwhm, name in ((0, "white.fits"), (3, "smooth.fits"))
    )
    ratios = []
    for image, measured in ((one, other), (other, one)):
        pair = image, "--measure-image", measured
        ours, plain = (
            run(*pair, "--noise-correlation", kind).catalog for kind in ("measured", "none")
        )
        ratios.append(np.median(ours["fluxerr_auto"] / plain["fluxerr_auto"]))
        ratios.append(np.median(ours["errx2"] / plain["errx2"]))
    flux, position, plain_flux, correlated_position = ratios
    assert flux > 2.5
    assert position == 1
    assert plain_flux == 1
    assert correlated_position > 5


def test_a_measure_image_has_its_own_noise_without_the_sources_that_are_known(run, write):
    """Sources that are faint in the measure image, but not in the other, aren't sky."""
    x, y = sky.grid_positions((400, 400), 25, seed=7)
    light = sky.light((400, 400), sky.stars(x, y, 10_000.0))
    noise = SIGMA * np.random.default_rng(7).normal(size=light.shape)
    bright, faint = (
        write((scale * light + noise).astype(np.float32), f"{scale}.fits") for scale in (1, 0.02)
    )
    errors = run(bright, "--measure-image", faint).catalog["fluxerr_auto"]
    plain = run(bright, "--measure-image", faint, *INDEPENDENT).catalog["fluxerr_auto"]
    assert np.median(errors / plain) == pytest.approx(1, abs=0.1)


def test_the_ratio_does_not_fall_where_there_is_room_for_few_discs():
    ratios = []
    for seed in range(10):
        image = SIGMA * unit_noise((100, 100), np.random.default_rng(seed), 4)
        noise, _ = noise_of(field_of(image.astype(np.float32)))
        ratios.append(noise.ratio(np.array([30, 100, 300, 1000])))
    # A Gaussian of FWHM 4 has 4 pi sigma^2 = 36 pixels that share their noise.
    assert_allclose(np.median(ratios, axis=0)[1:], 6, rtol=0.3)
    assert np.min(ratios) > 2.5


def test_a_tiny_image_has_too_little_sky():
    image = SIGMA * np.random.default_rng(1).normal(size=(16, 16))
    noise, false = noise_of(field_of(image.astype(np.float32)))
    assert_array_equal(noise.ratios, 1)
    assert np.isnan([noise.sigma, false]).all()


def test_errors_of_positions_are_positive_where_a_mask_cuts_a_bright_source(run, write):
    """The flux that is left is less than the photons of the whole."""
    shape = (300, 300)
    x, y = sky.grid_positions(shape, 60, seed=1)
    light = sky.light(shape, sky.stars(x, y, 2e4))
    image = 100 + light + 2 * unit_noise(shape, np.random.default_rng(3), 3)
    cut = np.zeros(shape, np.uint8)
    for column, row in np.rint([x, y]).astype(int).T:
        cut[row : row + 9, column - 9 : column + 10] = 1
    pair = write(image.astype(np.float32)), "--mask", write(cut, "mask.fits")
    ours, plain = (
        run(*pair, "--gain", 0.05, "--noise-correlation", kind).catalog
        for kind in ("measured", "none")
    )
    assert (ours["errx2"] >= plain["errx2"]).all()
    assert (ours["erry2"] >= plain["erry2"]).all()


def test_a_noise_image_that_is_far_off_costs_a_warning(run, write):
    image = write((SIGMA * np.random.default_rng(4).normal(size=(300, 300))).astype(np.float32))
    for noise, warned in ((SIGMA / 2, "2"), (SIGMA**2, "0.1"), (1.2 * SIGMA, None)):
        noise_image = write(np.full((300, 300), noise, np.float32), f"{noise}.fits")
        err = run(image, "--err-option", "file", "--err-file", noise_image, "--thresh", 4).err
        told = re.search(r"the noise of the sky is (\S+) times that of the noise image", err)
        assert (told and told[1]) == warned


def test_the_ratios_are_in_the_history_and_the_same_for_any_number_of_processes(run):
    lines = []
    for threads in (1, 2):
        result = run(SKY, "--threads", threads, "--catalog-fits", "c.fits")
        history = list(fits.getheader(result.directory / "background.fits")["HISTORY"])
        lines.append([line for line in history if line.startswith("noise_ratio at radius")])
        table = list(fits.getheader("c.fits", 1)["HISTORY"])
        assert [line for line in table if line.startswith("noise_ratio")] == lines[-1]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 5
    none = run(SKY, *INDEPENDENT)
    assert "noise_ratio" not in str(fits.getheader(none.directory / "rms.fits")["HISTORY"])


@pytest.fixture(autouse=True)
def in_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Depth


@pytest.mark.parametrize("options", ["", "--err-option array_rms", "--err-option none --thresh 15"])
def test_the_advised_threshold_is_four_sigma_of_the_filtered_image(run, write, options):
    image = SIGMA * unit_noise((600, 600), np.random.default_rng(8), 2)
    path = write(image.astype(np.float32))
    pattern = r"detection +(\S+) sigma of the filtered image; --thresh (\S+) is 4 sigma"
    _, thresh = re.search(pattern, run(path, *options.split()).out).groups()
    again = re.search(pattern, run(path, *options.split(), "--thresh", thresh).out)
    assert float(again[1]) == pytest.approx(4, abs=0.02)
    # The exact noise of the image smoothed with 1 2 1 / 2 4 2 / 1 2 1.
    if options == "--err-option none --thresh 15":
        padded = np.pad(image, 1)
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        filtered = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
        assert float(thresh) == pytest.approx(4 * filtered.std(), rel=0.03)


def test_seeing_and_depth_are_those_of_the_stars(run, write):
    x, y = sky.grid_positions((600, 600), 60, seed=9)
    light = sky.light((600, 600), sky.stars(x, y, 5e4, fwhm=4.0))
    image = light + np.random.default_rng(9).normal(50, SIGMA, light.shape)
    out = run(write(image.astype(np.float32)), "--zeropoint", 25).out
    fwhm, half_light, number = re.search(
        r"seeing +FWHM (\S+), half-light radius (\S+) pixels: medians of (\d+) compact", out
    ).groups()
    assert float(fwhm) == pytest.approx(4, rel=0.1)
    assert float(half_light) == pytest.approx(2, rel=0.1)
    assert int(number) == len(x)
    width, flux, magnitude = map(
        float,
        re.search(r"in a circle (\S+) pixels wide: flux (\S+), magnitude (\S+)", out).groups(),
    )
    assert width == pytest.approx(2 * float(fwhm), abs=0.1)
    assert flux == pytest.approx(5 * SIGMA * np.sqrt(np.pi * (width / 2) ** 2), rel=0.05)
    assert magnitude == pytest.approx(25 - 2.5 * np.log10(flux), abs=0.01)


# Purity


@pytest.mark.parametrize("kind", ["white", "FWHM 2", "stack"])
def test_false_sources_are_counted_in_pure_noise(kind):
    found = told = 0
    for seed in range(10):
        image = SIGMA * NOISES[kind]((700, 700), np.random.default_rng(seed))
        field = field_of(image.astype(np.float32))
        sigma = noise_of(field)[0].sigma
        field = field_of(image.astype(np.float32), thresh=2.6 * sigma)
        found += len(find_sources(field).objects)
        told += noise_of(field)[1]
    assert found > 200
    assert 1 / 1.5 < told / found < 1.5


def test_large_images_are_searched_in_strips(monkeypatch):
    image = SIGMA * unit_noise((2000, 400), np.random.default_rng(2), 2)
    image = (image * np.linspace(0.5, 1.5, 2000)[:, np.newaxis]).astype(np.float32)
    field = field_of(image, thresh=1.2)
    whole = count_sources(field, -1)
    monkeypatch.setattr(source_extractor, "STRIP_PIXELS", 20_000)
    parts = count_sources(field, -1)
    assert whole > 500
    assert parts != whole
    assert parts == pytest.approx(whole, rel=0.15)


def test_sources_of_noise_cost_a_warning_and_a_note_on_the_picture(run, write):
    image = (SIGMA * unit_noise((400, 400), np.random.default_rng(4), 3)).astype(np.float32)
    result = run(write(image))
    number = len(result.catalog)
    warned = re.search(r"about (\d+) of (\d+) sources are noise", result.err)
    assert int(warned[2]) == number
    assert int(warned[1]) > 0.8 * number
    assert f"purity        about {warned[1]} of {number} sources are noise" in result.out
    x, y = sky.grid_positions(image.shape, 50, seed=4)
    stars = sky.light(image.shape, sky.stars(x, y, 30_000.0))
    clean = run(write((image + stars).astype(np.float32), "stars.fits"), "--thresh", 4.5)
    assert "noise:" not in clean.err
    assert f"purity        about 0 of {len(clean.catalog)} sources" in clean.out


def test_purity_is_unknown_where_the_sky_is_skewed(run, write):
    photons = np.random.default_rng(7).poisson(2.0, (401, 401)).astype(np.float32)
    rows = photons[1:] + photons[:-1]
    result = run(write(rows[:, 1:] + rows[:, :-1]))
    assert len(result.catalog) > 50
    unknown = "unknown: the negative of the image has .*, but the sky is skewed to bright values"
    assert re.search(unknown, result.out)
    assert f"some of the {len(result.catalog)} sources may be noise" in result.err


def test_purity_is_unknown_where_sources_have_dark_rings(run, write):
    """As where their light was taken for background."""
    image = SIGMA * np.random.default_rng(7).normal(size=(600, 600))
    x, y = sky.grid_positions(image.shape, 100, seed=7)
    image += sky.light(image.shape, sky.stars(x, y, 20_000.0, fwhm=4))
    image -= sky.light(image.shape, sky.stars(x + 12, y, 3000.0, fwhm=4))
    result = run(write(image.astype(np.float32)), "--thresh", 1.8)
    told = re.search(r"negative of the image has (\d+), more than uniform noise makes", result.out)
    assert int(told[1]) == pytest.approx(len(x), rel=0.25)
    assert f"some of the {len(x)} sources may be noise: the {told[0]}" in result.err


@pytest.mark.parametrize("step", [3, 4])
def test_noise_that_differs_between_parts_costs_a_warning(run, write, step):
    image = SIGMA * np.random.default_rng(2).normal(size=(1000, 1000))
    image[:, 500:] *= step
    result = run(write(image.astype(np.float32)), "--thresh", 1.2)
    told = re.search(r"of the (\d+) sources may be noise: the negative .* has (\d+)", result.err)
    assert int(told[1]) == len(result.catalog) > 50
    assert int(told[2]) == pytest.approx(len(result.catalog), rel=0.3)
    assert "purity        unknown: the negative of the image has" in result.out


def test_noisy_rows_of_a_large_image_are_found(run, write):
    """Whether they are at its edge or in between."""
    for number, rows in enumerate((np.s_[450:700], np.s_[:200])):
        image = SIGMA * np.random.default_rng(5).normal(size=(2400, 2400))
        image[rows] *= 2
        result = run(write(image.astype(np.float32), f"{number}.fits"))
        told = re.search(r"sources may be noise: the negative .* has (\d+)", result.err)
        assert int(told[1]) == pytest.approx(len(result.catalog), rel=0.5)


def test_noise_is_counted_where_sources_leave_room_for_it(run, write):
    """Merged with sources, noise isn't found in the image, but it is in the negative."""
    shape = (1000, 1000)
    noise = unit_noise(shape, np.random.default_rng(8), 2)
    x, y = np.random.default_rng(9).uniform(5, 995, (2, 3000))
    image = noise + sky.light(shape, sky.stars(x, y, 250.0))
    field = field_of(image.astype(np.float32), thresh=1.6)
    objects = find_sources(field).objects
    away = nearest(objects, {"x": x, "y": y})[1] > 3
    assert noise_of(field)[1] == pytest.approx(away.sum(), rel=0.35)


def test_a_background_that_varies_within_its_boxes_costs_a_warning(run, write):
    """Its RMS is then too large, and so are all errors."""
    image = np.random.default_rng(1).normal(size=(500, 500)) + 0.1 * np.arange(500)
    told = re.search(r"empty sky is only (\S+) times the RMS", run(write(image.astype("f4"))).err)
    assert float(told[1]) == pytest.approx(1 / np.sqrt(1 + 0.1**2 * 64**2 / 12), rel=0.05)
    assert "times the RMS" not in run("image.fits", "--bw", 16, "--bh", 16).err


def test_chance_does_not_make_a_small_image_skewed(run, write):
    told = 0
    for seed in range(10):
        image = SIGMA * unit_noise((100, 100), np.random.default_rng(seed), 4)
        told += "sources are noise" in run(write(image.astype(np.float32), f"{seed}.fits")).err
    assert told >= 9


def test_a_sky_without_noise_is_no_error(run, write):
    shape = (300, 300)
    x, y = sky.grid_positions(shape, 60, seed=1)
    image = write(sky.light(shape, sky.stars(x, y, 1000.0)).astype(np.float32))
    result = run(image, "--err-option", "none", "--thresh", 5, "--gain", 1)
    assert result.code == 0
    assert len(result.catalog) == len(x)


def test_pixels_of_mostly_one_value_have_no_sigma(run, write):
    image = np.random.default_rng(1).poisson(0.01, (500, 500)).astype(np.float32)
    result = run(write(image))
    assert "detection" not in result.out
    assert result.catalog["detection_snr"].isna().all()
    assert "purity        unknown: there is too little empty sky, or no noise" in result.out


# Detection S/N


@pytest.mark.parametrize(
    "options",
    ["", "--err-option array_rms --filter-type conv", "--err-option array_rms --thresh 4"],
)
def test_detection_snr_is_over_the_measured_noise(run, write, options):
    x, y = sky.grid_positions((600, 600), 60, seed=3)
    light = sky.light((600, 600), sky.stars(x, y, 3000.0, fwhm=4.0))
    image = light + SIGMA * unit_noise(light.shape, np.random.default_rng(3), 2)
    result = run(write(image.astype(np.float32)), *options.split())
    threshold = float(re.search(r"detection +(\S+) sigma", result.out)[1])
    assert result.catalog["detection_snr"].min() >= 0.99 * threshold
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    view = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1), (3, 3))
    blank = np.lib.stride_tricks.sliding_window_view(np.pad(image - light, 1), (3, 3))
    filtered, noise = (np.einsum("yxij,ij->yx", each, kernel) for each in (view, blank))
    catalog = result.catalog
    expected = filtered[catalog["ycpeak"], catalog["xcpeak"]] / noise.std()
    bright = expected > 10
    assert bright.sum() > 50
    assert_allclose(catalog["detection_snr"][bright], expected[bright], rtol=0.1)


def test_without_empty_sky_the_noise_is_not_measured(run, write):
    y, x = np.indices((200, 200))
    crowd = 60 * np.exp(-((x % 7 - 3) ** 2 + (y % 7 - 3) ** 2) / 4.5)
    noise = np.random.default_rng(1).normal(size=x.shape)
    result = run(write((crowd + noise).astype(np.float32)))
    assert len(result.catalog) > 500
    assert "noise         not measured: there is too little empty sky" in result.out
    assert "purity        unknown: there is too little empty sky, or no noise" in result.out
    assert result.catalog["detection_snr"].isna().all()
    assert (result.catalog["fluxerr_auto"] > 0).all()


# Automatic threshold


def stars_in(size, fwhm, seed=1):
    """Return an image of stars, most of them faint, in noise of this FWHM, and their places."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(3, size - 4, (2, size**2 // 1200))
    flux = 5.3 * max(fwhm, 1) * (3 + 3 * rng.pareto(1.2, len(x)))  # S/N of about 3 and more
    light = sky.light((size, size), sky.stars(x, y, flux, fwhm=3.5))
    return light + unit_noise(light.shape, rng, fwhm), {"x": x, "y": y}


@pytest.mark.parametrize("fwhm", [0, 2, 3])
def test_the_automatic_threshold_has_the_purity(run, write, fwhm):
    image, stars = stars_in(1024, fwhm)
    path, depths = write(image.astype(np.float32)), []
    for purity in (0.9, 0.97, 0.99):
        result = run(path, "--auto", "--purity", purity)
        real = nearest(result.catalog, stars)[1] < 3.5
        assert real.mean() == pytest.approx(purity, abs=0.045)
        depths.append(float(re.search(r"detection +(\S+) sigma", result.out)[1]))
    assert 2.3 < depths[0] < depths[1] < depths[2] < 4.3


def test_a_run_can_be_repeated_with_the_threshold_it_names(run, write):
    image, _ = stars_in(512, 2)
    path = write((1e4 * image).astype(np.float32))
    noise = write(np.full(image.shape, 1e4, np.float32), "noise.fits")
    file = "--err-option", "file", "--err-file", noise
    for options in ((), ("--err-option", "none"), file):
        chosen = run(path, "--thresh", "auto", *options)
        thresh = re.search(r"auto +--thresh (\S+) for", chosen.out)[1]
        number = run(path, "--thresh", thresh, *options)
        assert len(chosen.catalog) > 50
        assert_frame_equal(number.catalog, chosen.catalog)
        # The first of two passes has a threshold of its own.
        twice = run(path, "--auto", *options)
        thresh = re.search(r"auto +--thresh (\S+) for", twice.out)[1]
        number = run(path, "--auto", "--thresh", thresh, *options)
        assert len(number.catalog) == pytest.approx(len(twice.catalog), rel=0.03)


def test_pure_noise_has_no_sources_at_an_automatic_threshold(run, write):
    image = unit_noise((600, 600), np.random.default_rng(3), 2)
    result = run(write(image.astype(np.float32)), "--auto")
    assert "4.2 sigma, the highest that is tried" in result.out
    assert len(result.catalog) <= 2


def test_automatic_settings_give_way_to_those_that_are_given(run):
    given = {"background_passes": "2", "filter_case": "'gaussian'", "thresh": "'auto'"}
    for options, contrast in (((), "0.0001"), (("--deblend-cont", 0.005), "0.005")):
        rms = run(SKY, "--auto", *options).directory / "rms.fits"
        lines = [line.split(" = ") for line in fits.getheader(rms)["HISTORY"] if " = " in line]
        assert (given | {"deblend_cont": contrast}).items() <= dict(lines).items()


def test_the_automatic_threshold_is_that_of_the_sky_among_many_stars(run, write):
    """Not that of their light, which hides most of the sky."""
    rng = np.random.default_rng(4)
    x, y = rng.uniform(0, 399, (2, 1800))
    light = sky.light((400, 400), sky.stars(x, y, 10 ** rng.uniform(1.5, 3.5, 1800)))
    image = write((light + rng.normal(size=light.shape)).astype(np.float32))
    result = run(image, "--auto", "--background-passes", 1)
    assert 2 < float(re.search(r"detection +(\S+) sigma", result.out)[1]) < 4.5
    assert "purity" in str(fits.getheader(result.directory / "rms.fits")["HISTORY"])


def test_without_noise_no_threshold_can_be_chosen(run, write):
    assert run(write(np.full((100, 100), 7, np.float32)), "--auto").code == 0
    image = np.zeros((100, 100), np.float32)
    image[40:50, 40:50] = 5
    result = run(write(image, "square.fits"), "--auto")
    assert result.code == 1
    assert "the sky has no noise: give a number instead of --thresh auto" in result.err
