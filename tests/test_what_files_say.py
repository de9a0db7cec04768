"""What headers say of the pixels, and what a noise map means: the right numbers, or a warning."""

import re

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from numpy.testing import assert_allclose

import sky
from common import BLOCK, NX, NY, SHAPE, rows_at
from headers import cards
from source_extractor import read_image

FILE = "--err-option", "file", "--err-file"
NO_SOURCES = "no sources found"


def warned(result, *patterns):
    """Demand success, and that each warning matches one pattern, in any order."""
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert len(lines) == len(patterns), lines
    for pattern in patterns:
        assert any(re.fullmatch(rf".*: warning: .*{pattern}.*", line) for line in lines), lines


# Noise maps


def grid(noise, *, seed=1, shape=(300, 300)):
    """Return an image with noise of these standard deviations, without sources, and 36 stars."""
    x, y = sky.grid_positions(shape, 50, seed=seed)
    image, truth = sky.simulate(shape, sky.stars(x, y, 3000.0), level=200.0)
    blank = np.random.default_rng(seed).normal(200, noise, shape)
    return blank.astype(np.float32), (image + blank - 200).astype(np.float32), truth


STEPS = {
    "border": lambda y, x: np.minimum(np.minimum(x, y), 299 - np.maximum(x, y)) < 20,
    "cross": lambda y, x: (x // 10 == 14) | (y // 10 == 14),
    "pixels": lambda y, x: np.random.default_rng(2).random(x.shape) < 0.003,
}


@pytest.mark.parametrize("ratio", [10, 100, 3000])
@pytest.mark.parametrize("step", STEPS)
def test_noise_is_filtered_with_the_image(run, write, step, ratio):
    bad = STEPS[step](*np.indices((300, 300)))
    noise = np.where(bad, 4.0 * ratio, 4.0)
    blank, image, truth = grid(noise)
    options = *FILE, write(noise, "noise.fits"), "--filter-type", "conv", "--thresh", 3
    assert len(run(write(blank, "blank.fits"), *options).catalog) == 0
    catalog = run(write(image), *options).catalog
    clear = truth[~bad[np.rint(truth["y"]).astype(int), np.rint(truth["x"]).astype(int)]]
    found = rows_at(catalog, clear["x"], clear["y"])
    assert np.median(found["flux_auto"] / clear["flux"]) == pytest.approx(1, abs=0.03)
    assert len(catalog) <= 36


@pytest.mark.parametrize("filter_type", ["matched", "conv"])
def test_errors_of_positions_are_finite_beside_a_mask(run, write, put_noise, stars, filter_type):
    mask = np.zeros(SHAPE, np.uint8)
    mask[25:35, 40:44] = 1
    options = *FILE, put_noise(np.ones(SHAPE)), "--thresh", 4, "--filter-type", filter_type
    result = run(write(stars), *options, "--mask", write(mask, "mask.fits"))
    cut = rows_at(result.catalog, [40], [30])
    assert cut["flag"][0] & 512
    assert np.isfinite(result.catalog[["errx2", "erry2", "errxy"]]).all(axis=None)
    assert (result.catalog["errx2"] < 0.1).all()


def test_a_uniform_noise_array_means_what_a_number_means(run, write, put_noise, stars):
    mask = np.zeros(SHAPE, np.uint8)
    mask[35:60, 36:39] = 1
    options = "--thresh", 2, "--mask", write(mask, "mask.fits"), "--filter-type", "conv"
    results = [
        run(write(stars - 100, f"{n}.fits"), *options, *more)
        for n, more in enumerate((("--err-option", "none"), (*FILE, put_noise(np.ones(SHAPE)))))
    ]
    for name in ("npix", "x", "flux", "thresh", "fluxerr_auto"):
        assert_allclose(results[0].catalog[name], results[1].catalog[name], rtol=0.03)


@pytest.mark.parametrize("kind", ["stddev", "variance", "weight"])
def test_pixels_that_weigh_next_to_nothing_are_left_out_of_the_background(
    run, write, put_noise, kind
):
    distance = np.hypot(*(np.indices((300, 300)) - 80))
    bad = distance < 60
    noise = np.where(bad, 1e6, 4.0)
    _, image, truth = grid(noise)
    stored = noise ** {"stddev": 1, "variance": 2, "weight": -2}[kind]
    result = run(write(image), *FILE, put_noise(stored), "--err-type", kind, "--thresh", 8)
    assert_allclose(result.image("background")[~bad], 200, atol=1)
    assert_allclose(result.image("rms")[~bad], 4, rtol=0.2)
    assert f"; {100 * bad.mean():.1f} % of the pixels, of low weight, are left out" in result.out
    clear = truth[np.hypot(truth["x"] - 80, truth["y"] - 80) > 75]
    found = rows_at(result.catalog, clear["x"], clear["y"])
    assert np.median(found["flux_auto"] / clear["flux"]) == pytest.approx(1, abs=0.03)


def test_a_map_of_another_kind_costs_a_warning(run, write, put_noise):
    slope = np.broadcast_to(np.linspace(3, 6, 512), (512, 512))
    image = np.random.default_rng(4).normal(100, slope).astype(np.float32)
    path, options = write(image), ("--filter-type", "conv", "--thresh", 8, "--err-type")
    even = 4 + np.random.default_rng(5).normal(0, 0.05, slope.shape)
    for stored, kind, wrong in (
        (slope**-2.0, "stddev", True),
        (slope**-2.0, "variance", True),
        (slope, "weight", True),
        (slope**-2.0, "weight", False),
        (slope, "stddev", False),
        (even, "stddev", False),
        (even[::-1] ** -2.0, "stddev", False),
    ):
        result = run(path, *FILE, put_noise(stored), *options, kind)
        text = "the noise image is low where the image is noisy: is --err-type right"
        assert (text in result.err) == wrong


@pytest.fixture
def put_noise(tmp_path):
    """Return a function that writes a noise image, and returns its path."""

    def put(noise):
        fits.writeto(tmp_path / "noise.fits", noise, overwrite=True)
        return tmp_path / "noise.fits"

    return put


# What an extension inherits

PRIMARY = cards() | {"SATURATE": 130.0, "BUNIT": "adu"}


@pytest.mark.parametrize("kind", [fits.ImageHDU, fits.CompImageHDU])
@pytest.mark.parametrize(
    ("own", "inherits"),
    [
        ({"INHERIT": True}, True),
        ({"INHERIT": True, "SATURATE": 1e5, "BUNIT": "nJy"}, True),
        ({"INHERIT": False}, False),
        ({}, False),
    ],
)
def test_what_an_extension_lacks_is_inherited_if_it_says_so(tmp_path, stars, kind, own, inherits):
    path, header = tmp_path / "mef.fits", fits.Header(own)
    primary = fits.PrimaryHDU(header=fits.Header(PRIMARY | {"EXTNAME": "NONE", "BLANK": 3}))
    fits.HDUList([primary, kind(stars, header, name="SCI")]).writeto(path)
    origin, pixels = read_image(path)
    expected = (PRIMARY if inherits else {}) | own
    assert_allclose(origin.saturation, expected.get("SATURATE", np.nan))
    assert origin.unit == expected.get("BUNIT")
    assert (origin.wcs is not None) == inherits
    if kind is fits.ImageHDU:
        np.testing.assert_array_equal(pixels, stars)


def test_long_histories_are_inherited_in_no_time(run, tmp_path, stars):
    primary, image = fits.PrimaryHDU(), fits.ImageHDU(stars, fits.Header({"INHERIT": True}))
    for n in range(4000):
        primary.header.add_history(f"step {n}")
        image.header.add_history(f"step {n}")
    fits.HDUList([primary, image]).writeto(tmp_path / "long.fits")
    warned(run(tmp_path / "long.fits"))


def test_sky_coordinates_are_inherited_as_a_whole_or_not(tmp_path, stars):
    path, own = tmp_path / "mef.fits", cards() | {"CD1_1": -2e-4, "CD2_2": 2e-4}
    more = {"CD1_2": 1e-4, "CD2_1": 1e-4, "PC1_1": 3.0, "A_ORDER": 2, "A_2_0": 1e-3}
    own = {key: card for key, card in own.items() if key not in more} | {"INHERIT": True}
    primary = fits.PrimaryHDU(header=fits.Header(PRIMARY | more))
    fits.HDUList([primary, fits.ImageHDU(stars, fits.Header(own))]).writeto(path)
    origin, _ = read_image(path)
    assert_allclose(origin.wcs.pixel_scale_matrix, np.diag([-2e-4, 2e-4]))
    assert origin.wcs.sip is None
    fits.delval(path, "CTYPE1", 1)
    fits.delval(path, "CTYPE2", 1)
    assert read_image(path)[0].wcs is None


# Pixels that aren't linear


def compressed(image, soften=12.0, offset=80.0):
    """Return an image as Pan-STARRS stores it, and the cards that say so."""
    stored = 2.5 * np.log10(np.e) * np.arcsinh((image.astype(float) - offset) / (2 * soften))
    return stored.astype(np.float32), {"BSOFTEN": soften, "BOFFSET": offset}


LINEARISED = "pixels converted to linear values, by BSOFTEN and BOFFSET"


def test_compressed_pixels_are_linearised(run, write, stars):
    stored, header = compressed(stars)
    stored[BLOCK] = -9
    asinh, wrong = write(stored, **header), write(stored, "wrong.fits", BSOFTEN="?", BOFFSET=1.0)
    options = "--blank", -9, "--saturation", 138, "--thresh", 5
    result, plain = run(asinh, *options), stars.copy()
    warned(result, f"image.fits.*{LINEARISED}")
    plain[BLOCK] = np.nan
    expected = run(write(plain, "plain.fits"), *options)
    assert sum(expected.catalog["flag"] & 4 > 0) > 0
    for name in ("x", "flux_auto", "fluxerr_auto", "flag", "background"):
        assert_allclose(result.catalog[name], expected.catalog[name], rtol=1e-3)
    warned(run(wrong, "--thresh", 1000), NO_SOURCES)
    measured = run(write(plain, "again.fits"), *options, "--measure-image", asinh)
    assert_allclose(measured.catalog["flux_auto"], expected.catalog["flux_auto"], rtol=1e-3)


def test_linear_pixels_with_old_cards_stay_as_they_are(write, stars, told):
    _, pixels = read_image(write(stars, BSOFTEN=95.4, BOFFSET=2.2))
    np.testing.assert_array_equal(pixels, stars)
    assert "BSOFTEN and BOFFSET ignored, as its pixels look linear" in told[0]


def test_padding_of_compressed_pixels_is_named_as_stored(run, write, stars):
    stored, header = compressed(stars)
    stored[:, :40] = 0
    path = write(stored, **header)
    assert "use --blank the value in the file" in run(path, "--thresh", 5).err
    assert "padding" not in run(path, "--thresh", 5, "--blank", 0).err


def test_a_compressed_noise_image_is_linearised(run, write, image):
    noise = np.linspace(0.5, 1.5, NX * NY).reshape(SHAPE)
    stored, header = compressed(noise, 0.5, 0.1)
    options = "--thresh", 5, "--filter-type", "conv", *FILE
    plain = run(image, *options, write(noise, "plain.fits"))
    result = run(image, *options, write(stored, "asinh.fits", **header))
    errors = result.catalog["fluxerr_auto"]
    assert_allclose(errors, plain.catalog["fluxerr_auto"], rtol=1e-3)
    warned(result, f"asinh.fits.*{LINEARISED}")


@pytest.mark.parametrize(
    "unit", ["mag", "mmag", "mag/arcsec2", "log(counts)", "dex", "magnitude", "dBm"]
)
def test_a_logarithmic_unit_costs_a_warning(run, write, stars, unit):
    warned(run(write(stars, BUNIT=unit)), f"the unit {re.escape(unit)} is logarithmic")


@pytest.mark.parametrize(
    "unit", ["adu", "imag", "magnetons", "nanomaggy", "1/mag", "10**-20 erg/s"]
)
def test_no_other_unit_does(run, write, stars, unit):
    warned(run(write(stars, BUNIT=unit)))


def test_imagej_calibrates_values_by_a_straight_line(tmp_path, told):
    path = tmp_path / "signed.tif"
    stored = np.arange(30, dtype=np.uint16).reshape(5, 6) + 32760
    for function, slope, expected in (
        (0, 1.0, stored - 32768.0),
        (0, 0.5, 0.5 * stored - 32768.0),
        (21, 1.0, stored),
    ):
        metadata = {"c0": -32768.0, "c1": slope, "cf": function, "vunit": "Gray Value"}
        tifffile.imwrite(path, stored, imagej=True, metadata=metadata)
        _, pixels = read_image(path)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.dtype == np.float32
        assert len(told) == (function != 0)
    assert "calibration of pixel values is ignored" in told[0]


@pytest.mark.parametrize(
    ("role", "value", "count"),
    [("scale", 2.5, 1), ("offset", 7, 1), ("scale", 1, 0), ("text", 2, 0)],
)
def test_a_calibration_by_gdal_costs_a_warning(tmp_path, told, stars, role, value, count):
    item = f'<GDALMetadata><Item name="X" sample="0" role="{role}">{value}</Item></GDALMetadata>'
    tag = (42112, "s", 0, item, True)
    tifffile.imwrite(tmp_path / "gdal.tif", stars, extratags=[tag])
    read_image(tmp_path / "gdal.tif")
    assert len(told) == count


def test_the_square_roots_of_a_gel_scanner_are_squared(tmp_path):
    path, stored = tmp_path / "scan.gel", np.arange(30, dtype=np.uint16).reshape(5, 6)
    tags = [(33445, "I", 1, 2, True), (33446, "2I", 1, (1, 4), True)]
    tifffile.imwrite(path, stored, metadata=None, extratags=tags)
    _, pixels = read_image(path)
    np.testing.assert_array_equal(pixels, stored.astype(float) ** 2 / 4)


# Overscan

OVERSCAN = "pixels are outside DATASEC or TRIMSEC"


@pytest.mark.parametrize(
    ("header", "strip", "level", "noise", "outcome"),
    [
        ({"DATASEC": "[1:160,1:120]"}, 16, 30, 1, "masked"),
        ({"TRIMSEC": "[ 1:160, 1:120 ]"}, 16, 100, 0.2, "masked"),
        ({"DATASEC": "[1:160,1:120]", "BIASSEC": "[161:176,1:120]"}, 16, 100, 1, "masked"),
        ({"DATASEC": "[1:160,1:120]"}, 16, 100, 1, None),
        ({"DATASEC": "[1:160,1:120]", "BIASSEC": "[11:26,1:120]"}, 16, 100, 1, None),
        ({"DATASEC": "[1:160,1:120]"}, 60, 30, 1, "differ from the rest"),
        ({"DATASEC": "[1:160,1:120]", "BIASSEC": "[161:220,1:120]"}, 60, 100, 1, None),
        ({"DATASEC": "[25:2072,1:4096]", "BIASSEC": "[2073:2100,1:4096]"}, 16, 30, 1, None),
        ({"DATASEC": "[1:160,1:120]", "RESAMPT1": "LANCZOS3"}, 16, 30, 1, None),
        ({"DATASEC": "[1:160,1:120]", "LTV1": -24.0}, 16, 30, 1, None),
        ({"DATASEC": "[1:160,1:120]", "LTV1": 0.0, "HISTORY": "trimmed mean"}, 16, 30, 1, "masked"),
        ({"DATASEC": "[1:160,1:120]", "NCOMBINE": 9}, 16, 100, 3, None),
        ({"DATASEC": "[1:160,1:120]", "HISTORY": "made by SWarp"}, 16, 30, 1, None),
        ({"DATASEC": "none", "TRIMSEC": 5}, 16, 30, 1, None),
    ],
)
def test_overscan_is_masked_where_it_surely_is_some(
    run, write, stars, header, strip, level, noise, outcome
):
    bias = np.random.default_rng(8).normal(level, noise, (NY, strip)).astype(np.float32)
    result = run(write(np.hstack([stars, bias]), **header), "--thresh", 6, "--bw", 32, "--bh", 32)
    assert (OVERSCAN in result.err) == bool(outcome)
    if outcome:
        assert f"{100 * strip / (NX + strip):.1f} % of the {OVERSCAN}" in result.err
        assert outcome in result.err
    if outcome == "masked":
        assert f"({NY * strip} pixels have no finite value)" in result.out
        assert_allclose(result.image("background"), 100, atol=1)


def test_prescan_and_overscan_rows_are_masked_in_the_measure_image_too(run, write, image, stars):
    whole = np.full((NY, NX), 10, np.float32) + np.random.default_rng(1).normal(size=SHAPE)
    whole[4:-6] = stars[4:-6]
    path = write(whole, "g.fits", DATASEC=f"[1:{NX},5:{NY - 6}]", BIASSEC=f"[1:{NX},{NY - 5}:{NY}]")
    result = run(image, "--measure-image", path, "--thresh", 5)
    warned(result, rf"g\.fits.*8\.3 % of the {OVERSCAN}: masked as overscan")
    assert "measured on   g.fits" in result.out


# Colour frames


def test_a_raw_colour_frame_costs_a_warning_until_only_green_is_left(run, write, stars, tmp_path):
    y, x = np.indices(SHAPE)
    level = np.select([(y % 2 == 0) & (x % 2 == 0), (y + x) % 2 == 1], [300, 800], 500)
    raw = (level + stars - 100).astype(np.float32)
    path, pattern = write(raw, BAYERPAT="RGGB"), r"a raw colour image \(RGGB\)"
    warned(run(path, "--thresh", 5), pattern, NO_SOURCES)
    mask = write(((y + x) % 2 == 0).astype(np.uint8), "mask.fits")
    result = run(path, "--thresh", 5, "--mask", mask)
    warned(result)
    assert len(result.catalog) == 6
    cube = write(np.stack([raw, raw]), "cube.fits", BAYERPAT="RGGB")
    assert "colour image" not in run(cube, "--plane", 0).err
    tifffile.imwrite(tmp_path / "raw.tif", raw, photometric="CFA", extratags=CFA_TAGS)
    for name, value in enumerate(["NONE", "N/A", "Mono", "TRUE"]):
        other = write(raw, f"{name}.fits", BAYERPAT=value)
        assert "colour image" not in run(other, "--thresh", 5).err
    assert r"raw colour image (CFA)" in run(tmp_path / "raw.tif", "--thresh", 5).err


CFA_TAGS = [(33421, "H", 2, (2, 2), True), (33422, "B", 4, b"\0\1\1\2", True)]


# Several images in a file


@pytest.fixture
def ccds(tmp_path):
    """Return a file of three images of levels 0, 1, 2, two of one name, with a table between."""
    path, names = tmp_path / "ccds.fits", ["CCD", "CCD", "OTHER"]
    noise = np.random.default_rng(9).normal(0, 1, SHAPE).astype(np.float32)
    images = [fits.ImageHDU(noise + 100 * n, name=name) for n, name in enumerate(names)]
    table = fits.BinTableHDU.from_columns([fits.Column("CCD", "E", array=[1.0])], name="CCD")
    fits.HDUList([fits.PrimaryHDU(), images[0], table, *images[1:]]).writeto(path)
    return path


@pytest.mark.parametrize(
    ("hdu", "level", "count"),
    [
        *((None, 0, 3), ("CCD", 0, 2), ("ccd,1", 0, 0), ("CCD,3", 100, 0), ("OTHER", 200, 0)),
        *(("other,1", 200, 0), ("3", 100, 0), ("4", 200, 0)),
    ],
)
def test_images_of_one_name_are_counted_and_the_first_is_told(ccds, told, hdu, level, count):
    _, pixels = read_image(ccds, hdu)
    assert np.median(pixels) == pytest.approx(level, abs=1)
    expected = f"ccds.fits[1] CCD: the first of {count} images is used; choose another with the"
    assert [text[: len(expected)] for text in told] == [expected][: bool(count)]


@pytest.mark.parametrize(("hdu", "problem"), [("CCD,2", "no image"), ("CCD,4", "no such")])
def test_an_occurrence_that_holds_no_image_is_refused(run, ccds, hdu, problem):
    run(ccds, "--hdu", hdu).assert_refused(problem, hdu, "2 CCD: table", "4 OTHER: 160 x 120")


def test_a_number_is_an_index_even_if_it_is_a_name(tmp_path, told, stars):
    hdus = [fits.ImageHDU(stars + n, name=str(3 - n)) for n in (1, 2)]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(tmp_path / "two.fits")
    for hdu in (1, 2):
        np.testing.assert_array_equal(read_image(tmp_path / "two.fits", str(hdu))[1], stars + hdu)
    assert told == []


def test_extver_goes_before_occurrence(tmp_path, stars):
    hdus = [fits.ImageHDU(stars + n, name="SCI", ver=n) for n in (2, 1)]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(tmp_path / "two.fits")
    for hdu, more in (("SCI,1", 1), ("SCI,2", 2)):
        np.testing.assert_array_equal(read_image(tmp_path / "two.fits", hdu)[1], stars + more)


def test_which_image_of_a_file_is_mask_or_noise_is_told(run, ccds):
    image = ccds, "--hdu", 1
    first = re.escape("ccds.fits[1] CCD, the image itself: the first of 3 images")
    warned(run(*image, "--mask", ccds, "--maskthresh", 50), first, NO_SOURCES)
    noise = *FILE, ccds, "--filter-type", "conv"
    warned(run(*image, *noise), first, NO_SOURCES)
    unit = "the noise of the sky is 0.0051 times that of the noise image"
    warned(run(*image, *noise, "--err-hdu", "OTHER"), unit, NO_SOURCES)
    other = run(ccds, "--hdu", 4, "--mask", ccds, "--maskthresh", 50)
    warned(other, re.escape("ccds.fits[1] CCD: the first of 3 images"), NO_SOURCES)


# Two matrices on one sky


def test_a_matrix_of_an_alternate_wcs_is_no_conflict(run, write, stars):
    matrix = {"CD1_1": -1e-4, "CD2_2": 1e-4}
    plain = {key: value for key, value in cards().items() if not key.startswith("CD")}
    plain |= {"PC1_1": 0.8, "PC1_2": 0.6, "PC2_1": -0.6, "PC2_2": 0.8, "CDELT1": -1e-4}
    plain["CDELT2"] = 1e-4
    alternate = {f"{key}A": value for key, value in (plain | matrix).items() if key[:2] != "PC"}
    alternate.pop("CDELT1A"), alternate.pop("CDELT2A")
    result = run(write(stars, **plain, **alternate))
    warned(result)
    alone = run(write(stars, "alone.fits", **plain))
    assert_allclose(result.catalog[["ra", "dec"]], alone.catalog[["ra", "dec"]], rtol=1e-12)


@pytest.mark.parametrize("differ", [True, False])
def test_of_cd_and_pc_the_former_is_taken_and_a_difference_told(run, write, stars, differ):
    cd = {"CD1_1": -1e-4, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 1e-4}
    pc = {"PC1_1": 1.0, "PC1_2": 0.0, "PC2_1": 0.0, "PC2_2": 1.01 if differ else 1.0}
    plain = {key: value for key, value in cards().items() if not re.match("CD|PC", key)}
    both = plain | cd | pc | {"CDELT1": -1e-4, "CDELT2": 1e-4}
    result, alone = run(write(stars, **both)), run(write(stars, "cd.fits", **plain | cd))
    assert_allclose(result.catalog[["ra", "dec"]], alone.catalog[["ra", "dec"]], rtol=1e-12)
    # 1.01 times from the centre to the edge, seen in the pixels of the other matrix
    shift = max(abs(both["CRPIX2"] - 1), abs(NY - both["CRPIX2"])) * (1 - 1 / 1.01)
    told = f"CD and PC: CD is used, PC ignored; they differ by up to {shift:.3g}"
    warned(result, *[re.escape(told)][:differ])


# Dark objects


@pytest.mark.parametrize(
    ("sign", "number", "dark"), [(-1, 30, True), (1, 30, False), (-1, 1, False), (0, 1, False)]
)
def test_dark_objects_cost_a_warning(run, write, sign, number, dark):
    x, y = sky.grid_positions((300, 300), 50, seed=3)
    light = sky.light((300, 300), sky.stars(x[:number], y[:number], 8000.0))
    image = 1000 + sign * light + np.random.default_rng(6).normal(0, 10, light.shape)
    result = run(write(image.astype(np.float32)), "--thresh", 4)
    assert ("below the background by more than the threshold" in result.err) == dark
    assert ("invert the image" in result.err) == dark
