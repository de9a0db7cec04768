"""Counts: the level of integers with little noise, and photons too sparse for any."""

import re

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from contract import one_line
from same_as_sep import assert_same, direct
from sky import grid_positions, simulate
from sky import stars as star_table
from truth import INDEPENDENT, match

SHAPE = (512, 512)

ALWAYS = INDEPENDENT


def gaussian(level, noise):
    return np.rint(np.random.default_rng(5).normal(level, noise, SHAPE))


def photons(rate):
    return np.random.default_rng(5).poisson(rate, SHAPE)


# The level


@pytest.mark.parametrize(
    ("level", "noise"),
    [(100.5, 1), (100.3, 2), (100.8, 4), *((rate, None) for rate in (0.5, 1, 2.7, 10.6))],
)
def test_the_level_of_counts_is_right_to_a_tenth(run, write, level, noise):
    image = gaussian(level, noise) if noise else photons(level)
    result = run(write(image.astype(np.int16)))
    assert result.code == 0
    assert result.image("background").mean() == pytest.approx(level, abs=0.13)
    if level >= 1:
        assert "have the value" not in result.err


@pytest.mark.parametrize(("scale", "zero", "dtype"), [(0.1, 500, "f4"), (40, -7, "f8")])
def test_any_quantum_will_do(run, write, scale, zero, dtype):
    image = (gaussian(100.5, 2) * scale + zero).astype(dtype)
    level = (run(write(image)).image("background").mean() - zero) / scale
    assert level == pytest.approx(100.5, abs=0.1)


def test_fluxes_of_stars_on_counts_are_right(run, write):
    sources = star_table(*grid_positions((660, 660), 33, seed=1), 300.0)
    image, _ = simulate((660, 660), sources, seed=2, level=100.5, noise=2.0)
    catalog = run(write(np.rint(image).astype(np.int16)), "--aperture-diameters", 20).catalog
    pull = (catalog["flux_aper_20"] - 300) / catalog["fluxerr_aper_20"]
    assert abs(pull.median()) < 1


def test_the_same_counts_give_the_same_products(run, write):
    image = write(photons(2.5).astype(np.int16))
    assert_array_equal(*(run(image).image("background") for _ in range(2)))


@pytest.mark.parametrize(
    "image", [gaussian(100.5, 14), gaussian(100.5, 2) + 0.01 * gaussian(0, 20)]
)
def test_much_noise_or_no_quantum_leaves_all_to_sep(run, write, image):
    image = image.astype(np.float32)
    assert_same(run(write(image)), direct(image))


# Sparse photons

ADVICE = r"[\d.]+ % of the pixels have the value \S+, .*absolute threshold \((.*?)\).*\((.*?)\)"


@pytest.mark.parametrize(("rate", "quantum"), [(0.01, 1), (0.1, 2.5), (0.6, 1)])
@pytest.mark.parametrize("flux", [0, 60])
def test_the_advice_finds_the_sources_and_no_others(run, write, tmp_path, rate, flux, quantum):
    shape = (600, 600)
    x, y = grid_positions(shape, 50, seed=1)
    light, _ = simulate(shape, star_table(x, y, max(flux, 1e-3)), level=rate, noise=0.0)
    image = np.random.default_rng(8).poisson(light).astype(np.float32) * np.float32(quantum)
    result = run(write(image))
    threshold, smoothing = re.search(one_line("warning", ADVICE), result.err).groups()
    catalog = run(tmp_path / "image.fits", *threshold.split(), *smoothing.split()).catalog
    if flux == 0:
        assert len(catalog) == 0
    else:
        found, _ = match(catalog, {"x": x, "y": y}, 3)
        assert len(found) >= 0.97 * len(x)
        assert len(catalog) - len(found) <= 0.01 * len(catalog)


@pytest.mark.parametrize(
    ("noise", "quantum", "level"), [(0.7, 1, 2), (0.4, 1, 100), (0.6, 16, 1008)]
)
def test_a_clean_frame_costs_no_warning_however_many_pixels_are_alike(
    run, write, noise, quantum, level
):
    x, y = grid_positions(SHAPE, 50, seed=1)
    sources = star_table(x, y, 100.0 * quantum)
    image, _ = simulate(SHAPE, sources, seed=2, level=level, noise=noise * quantum)
    image = np.clip(np.rint(image / quantum), 0, 255) * quantum
    assert np.unique(image, return_counts=True)[1].max() > 0.4 * image.size
    result = run(write(image.astype(np.int16)), "--thresh", 4)
    assert result.err == ""
    assert len(result.catalog) == len(match(result.catalog, {"x": x, "y": y}, 1)[0]) == len(x)
    rounded = np.sqrt(noise**2 + 1 / 6)  # once in the image, once as it is spread out
    assert np.median(result.image("rms")) / quantum == pytest.approx(rounded, abs=0.05)


def test_pixels_that_hold_no_data_are_to_be_masked(run, write):
    image = np.random.default_rng(1).normal(100, 5, SHAPE).astype(np.float32)
    image[:, :230] = 0
    path, mask = write(image), write((image != 0).astype(np.uint8), "mask.fits")
    padded, masked = run(path).err, run(path, "--mask-box", 0, 229, 0, 511).err
    assert re.search(one_line("warning", r"45 % of the pixels are exactly 0.0: .*"), padded)
    assert "have the value" not in padded + masked
    constant = one_line("warning", "the image is constant: no sources")
    assert re.search(constant, run(path, "--mask", mask).err)


def test_an_image_of_two_values_ends_in_good_order(run, write):
    y, x = np.indices((64, 64))
    for name, image in (("disc.fits", np.hypot(y - 32, x - 32) < 21), ("half.fits", y < 32)):
        result = run(write(image.astype(np.uint8), name), "--bw", 32, "--bh", 32)
        assert result.code == 0 or re.search(one_line("error", ".*no noise.*"), result.err)


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.7])
def test_the_level_of_sparse_photons_is_right_beside_sources(run, write, rate):
    x, y = grid_positions((500, 500), 50, seed=1)
    light, _ = simulate((500, 500), star_table(x, y, 200.0), level=rate, noise=0.0)
    image = np.random.default_rng(2).poisson(light).astype(np.int16)
    result = run(write(image), "--err-option", "none", "--thresh", 1)
    assert result.image("background").mean() == pytest.approx(rate, abs=0.12)
