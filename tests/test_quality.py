"""What a pixel is worth: quality bits, blank values, saturation."""

import re

import numpy as np
import pytest
import tifffile
from astropy.io import fits

from common import BLOCK, SHAPE, block, rows_at
from contract import one_line
from same_as_sep import assert_same, direct
from sky import light, random_sources, simulate, stars

# Bits


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *(("u1", "fits.gz"), ("i1", "fits"), ("i2", "compressed"), ("u2", "fits")),
        *(("i4", "tiff"), ("u4", "compressed"), ("i8", "fits"), ("u8", "fits"), ("u8", "tiff")),
    ],
)
def test_any_bit_of_an_integer_of_any_type_masks(run, image, stars, tmp_path, dtype, form):
    path = tmp_path / f"mask.{form}"
    for bit in (0, 8 * np.dtype(dtype).itemsize - 1):
        values = block(2 | 1 << bit, dtype.replace("i", "u"), rest=2).view(dtype)
        if form == "tiff":
            tifffile.imwrite(path, values, photometric="minisblack")
        elif form == "compressed":
            fits.CompImageHDU(values).writeto(path, overwrite=True)
        else:
            fits.writeto(path, values, overwrite=True)
        result = run(image, "--mask", path, "--mask-bits", 1 << bit)
        assert_same(result, direct(stars, mask=block()))


@pytest.mark.parametrize(
    ("bits", "masked"), [([1], 1), ([4], 0), ([4, 1], 1), ([5], 1), ([2], 2), ([1 << 40], 0)]
)
def test_values_and_their_sum_are_the_same(run, image, write, bits, masked):
    mask = write(block(3, "i2", rest=2), "mask.fits")
    result = run(image, "--mask", mask, "--mask-bits", *bits)
    if masked == 2:
        result.assert_refused("every pixel is masked")
    else:
        assert f"masked        {100 * masked * block().mean():.2f} %" in result.out


def test_bits_are_above_0_and_need_a_mask_of_integers_and_no_threshold(run, image, write):
    mask = write(np.ones(SHAPE, "f4"), "mask.fits")
    result = run(image, "--mask", mask, "--mask-bits", 1)
    result.assert_refused("mask.fits", "--mask-bits needs integers")
    for bits in ("1", *(f"{bit} --mask m.fits" for bit in ("", 0, -1, 2**64, "1 --maskthresh 0"))):
        result = run(image, "--mask-bits", *bits.split())
        assert result.code == 2
        assert "--mask-bits" in result.err


def test_a_mask_that_hides_the_sources_is_blamed(run, image, write, stars):
    detected = write(np.where(stars > 106, 32, 0).astype("i2"), "mask.fits")
    result = run(image, "--mask", detected, "--thresh", 6, "--bridge", 0)
    assert len(result.catalog) == 0
    said = r"no sources found: .*; ([\d.]+) % of the pixels are masked"
    (part,) = re.fullmatch(one_line("warning", said), result.err).groups()
    assert float(part) == pytest.approx(100 * np.mean(stars > 106), abs=0.06)


# Blank values and padding

SIDE = 480
FIELD = (SIDE, SIDE)


@pytest.fixture(scope="module")
def mosaic():
    """Return an image, and where a turned square of data ends in it."""
    sources = random_sources(FIELD, 60, seed=1, flux=(300.0, 20000.0))
    image, _ = simulate(FIELD, sources, seed=1, level=100.0, noise=2.0)
    y, x = np.indices(FIELD) - SIDE / 2
    return image, np.maximum(np.abs(0.8 * x + 0.6 * y), np.abs(0.8 * y - 0.6 * x)) > 0.36 * SIDE


@pytest.mark.parametrize("value", [0, -32768, 1e30])
def test_padding_costs_a_warning_with_its_value_and_as_blank_is_like_nan(run, write, mosaic, value):
    image, outside = mosaic
    padded = write(np.where(outside, value, image).astype("f4"), "padded.fits")
    said = r"(\d+) % of the pixels are exactly (\S+): .* use --blank (\S+)"
    ((part, told, again),) = re.findall(said, run(padded).err)
    assert int(part) == round(100 * outside.mean())
    assert float(told) == float(again) == value
    mask = write((np.random.default_rng(1).random(image.shape) < 0.1).astype("u1"), "mask.fits")
    assert f"are exactly {told}" in run(padded, "--mask", mask).err
    nan = run(write(np.where(outside, np.nan, image).astype("f4"))).catalog
    result = run(padded, "--blank", -5, "--blank", value)
    assert result.catalog.equals(nan)
    assert "exactly" not in result.err


@pytest.mark.parametrize("blank", [0, 65535])
def test_blank_is_compared_with_scaled_values_or_those_of_a_tiff_in_which_0_is_white(
    run, tmp_path, stars, blank
):
    stored = np.rint(20 * stars).astype("u2")  # a noise that SEP gets right in whole numbers
    stored[BLOCK] = 0
    if blank:
        tifffile.imwrite(tmp_path / "image", blank - stored, photometric="miniswhite")
    else:
        fits.writeto(tmp_path / "image", stored)  # stored as -32768, with BZERO
    result = run(tmp_path / "image", "--blank", blank)
    assert_same(result, direct(stored.astype("f4"), mask=block()))


def test_blank_is_found_however_scaling_rounds(run, tmp_path, stars):
    hdu = fits.PrimaryHDU(np.where(block(), -32768, np.rint(20 * stars)).astype("i2"))
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.3525, 41.067
    hdu.writeto(tmp_path / "image.fits")
    result = run(tmp_path / "image.fits", "--blank", -11509.653)
    assert f"({block().sum()} pixels have no finite value)" in result.out


@pytest.mark.parametrize("name", ["counts", "few counts", "constant", "noiseless", "core", "sky"])
def test_what_is_no_padding_costs_no_warning(run, write, name):
    rng = np.random.default_rng(1)
    core = rng.normal(100, 2, FIELD)
    core[150:300, 150:300] = 65535
    image = {
        "counts": rng.poisson(0.01, FIELD),
        "few counts": rng.poisson(0.0003, FIELD),
        "constant": np.full(FIELD, 7),
        "noiseless": light(FIELD, random_sources(FIELD, 60, seed=1)),
        "core": core,
        "sky": np.rint(rng.normal(100, 0.4, FIELD)),
    }[name]
    result = run(write(image.astype("f4")), "--err-option", "none", "--thresh", 50)
    assert result.code == 0
    assert "exactly" not in result.err


def test_a_background_that_is_cut_off_at_0_is_no_padding(run, write):
    y, x = np.indices(FIELD) - SIDE / 2
    body = 120 * np.exp(-(x**2 + y**2) / (2 * 110**2))
    noise = np.random.default_rng(1).normal(0, 3, body.shape)
    cut = np.maximum(np.rint(body + noise - 30), 0).astype("f4")
    assert (cut == 0).mean() > 0.5
    options = ("--err-option", "none", "--thresh", 20)
    assert "exactly" not in run(write(cut), *options).err
    padded = np.where(cut > 0, cut + 130, 0).astype("f4")  # of the same outline
    assert "are exactly 0.0" in run(write(padded, "padded.fits"), *options).err


# Saturation


PLACES = [30.0, 80.0, 130.0], [60.0, 60.0, 60.0]


@pytest.fixture(scope="module")
def saturated():
    """Return stars of which the second is cut off at 900."""
    sources = stars(*PLACES, [5000.0, 20000.0, 6000.0])
    return np.minimum(simulate(SHAPE, sources, seed=1, level=100.0)[0], 900)


def flags(result):
    return list(rows_at(result.catalog, *PLACES).flag)


def test_saturated_stars_are_flagged_by_the_option_or_the_header(run, write, saturated):
    plain, headed = write(saturated), write(saturated, "headed.fits", SATURATE=900.0)
    for path, options, expected, told in (
        (plain, (), 0, None),
        (plain, ("--saturation", 900), 4, "900"),
        (plain, ("--saturation", 900.5), 0, "900.5"),
        (headed, (), 4, "900"),
        (headed, ("--saturation", 5000), 0, "5000"),
        (plain, ("--measure-image", headed), 4, "900"),
    ):
        result = run(path, *options, "--thresh", 5)
        assert flags(result) == [0, expected, 0]
        said = re.findall(r"^saturation +(.*)$", result.out, re.MULTILINE)
        assert said == ([told] if told else [])


@pytest.mark.parametrize("value", [0, -1.0, 1e30, "high", "nan", True, None])
def test_a_saturate_that_is_no_level_is_left_out(run, write, saturated, value):
    path = write(saturated, SATURATE=value)
    if value == "nan":  # as a number, which astropy would not write
        path.write_bytes(path.read_bytes().replace(b"'nan     '", b"       nan"))
    result = run(path, "--thresh", 5)
    assert result.code == 0
    assert flags(result) == [0, 0, 0]
    assert "saturation" not in result.out
