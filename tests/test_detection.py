"""Background, noise and detection: exactly SEP's own results, and none of its traps."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import source_extractor
from common import SHAPE, SKY, Run
from contract import SEP_FIELDS
from same_as_sep import (
    DEFAULT_KERNEL,
    assert_same,
    assert_subtracted,
    direct,
)
from sky import blobs, galaxies, random_sources, simulate, stars, vstack
from source_extractor import (
    BackgroundSettings,
    ExtractionSettings,
    Method,
    subtract_background,
)

FLUXES = ["thresh", "cflux", "flux", "cpeak", "peak"]


@pytest.fixture(scope="module")
def field():
    """Return a float32 image of crowded stars and galaxies on a gradient, noise 2 and Poisson."""
    sources = random_sources((150, 200), 120, seed=3, flux=(100, 2e4))
    image, _ = simulate((150, 200), sources, seed=4, level=50, gradient=(20, 10), noise=2, gain=2)
    return image


@pytest.fixture(scope="module")
def holes():
    """Return a mask for `field`: a corner, a bad column, and pixels here and there."""
    mask = np.random.default_rng(5).random((150, 200)) < 0.01
    mask[2:20, :30] = True
    mask[:2] = False  # where SEP itself errs
    mask[:, 111] = True
    return mask


@pytest.fixture
def large_limits():
    """Give direct calls of SEP all the room they want."""
    kept = sep.get_extract_pixstack(), sep.get_sub_object_limit()

    def enlarge():
        sep.set_extract_pixstack(2_000_000)
        sep.set_sub_object_limit(16_000)

    yield enlarge
    sep.set_extract_pixstack(kept[0])
    sep.set_sub_object_limit(kept[1])


def table(result):
    """Return SEP's fields from the catalogue of a successful run."""
    assert result.code == 0, result.err
    return result.catalog[SEP_FIELDS]


# ---------------------------------------------------------------------------------------------
# The same as SEP
# ---------------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": ("", {}),
    "high threshold": ("--thresh 4", {"thresh": 4.0}),
    "rms map, matched": ("--err-option array_rms", {"noise": "array_rms"}),
    "rms map, conv": (
        "--err-option array_rms --filter-type conv",
        {"noise": "array_rms", "filter_type": "conv"},
    ),
    "rms map, no filter": (
        "--err-option array_rms --filter-case none",
        {"noise": "array_rms", "filter_kernel": None},
    ),
    "absolute threshold": (
        "--err-option none --thresh 5.5",
        {"noise": "none", "thresh": 5.5},
    ),
    "one noise, conv": ("--filter-type conv", {"filter_type": "conv"}),
    "no filter": ("--filter-case none", {"filter_kernel": None}),
    "minarea": ("--minarea 25", {"minarea": 25}),
    "one pixel": ("--minarea 1 --thresh 2", {"minarea": 1, "thresh": 2.0}),
    "gain": ("--gain 2", {"gain": 2.0}),
    "gain, rms map": ("--gain 2 --err-option array_rms", {"gain": 2.0, "noise": "array_rms"}),
    "few deblending levels": ("--deblend-nthresh 2", {"deblend_nthresh": 2}),
    "no deblending": ("--deblend-nthresh 1", {"deblend_nthresh": 1}),
    "many deblending levels": (
        "--deblend-nthresh 64 --deblend-cont 0",
        {"deblend_nthresh": 64, "deblend_cont": 0.0},
    ),
    "contrast": ("--deblend-cont 1", {"deblend_cont": 1.0}),
    "no cleaning": ("--no-clean", {"clean": False}),
    "strong cleaning": ("--clean-param 0.2", {"clean_param": 0.2}),
    "mesh": (
        "--bw 40 --bh 25 --fw 5 --fh 1 --fthresh 0.3",
        {"mesh": {"bw": 40, "bh": 25, "fw": 5, "fh": 1, "fthresh": 0.3}},
    ),
    "box larger than the image": ("--bw 512 --bh 300", {"mesh": {"bw": 512, "bh": 300}}),
}


@pytest.mark.parametrize(("options", "keywords"), OPTIONS.values(), ids=OPTIONS)
def test_products_are_those_of_sep(run, write, tmp_path, field, options, keywords):
    subtracted, expected = tmp_path / "subtracted.fits", direct(field, **keywords)
    assert_same(run(write(field), *options.split(), "--subtracted", subtracted), expected)
    assert_subtracted(subtracted, field, expected)


def test_products_of_the_test_sky_are_those_of_sep(nine):
    image = fits.getdata(SKY).astype(np.float32)
    expected = direct(image)
    assert_same(Run(0, "", "", nine), expected)
    assert_subtracted(nine / "subtracted.fits", image, expected)


@pytest.mark.parametrize("option", ["float_globalrms", "array_rms", "none"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_products_are_those_of_sep(run, write, field, holes, option, dtype):
    image = field.astype(dtype)
    paths = write(image), "--mask", write(holes.astype(np.uint8), "mask.fits")
    result = run(*paths, "--err-option", option, "--thresh", 4, "--bridge", 0)
    assert_same(result, direct(image, mask=holes, noise=option, thresh=4.0))


KERNELS = {
    "flat": np.ones((5, 5)),
    "asymmetric": np.arange(1.0, 16).reshape(3, 5),
    "with negative lobes": np.pad(2 * np.ones((3, 3)), 2, constant_values=-0.2),
    "one row": np.array([[1.0, 3, 1]]),
    "one column": np.array([[1.0], [3], [1]]),
    "one pixel": np.array([[2.0]]),
    "larger than the image": np.exp(-np.hypot(*np.mgrid[-35:36, -45:46]) / 2),
}


@pytest.mark.parametrize("noise", ["float_globalrms", "array_rms"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernel_from_a_file_filters_as_in_sep(run, write, tmp_path, field, kernel, noise):
    np.savetxt(tmp_path / "kernel.txt", kernel)
    options = "--filter-case", "file", "--filter-file", tmp_path / "kernel.txt", "--thresh", 3
    corner = np.ascontiguousarray(field[:60, :80])
    expected = direct(corner, filter_kernel=kernel.astype(np.float32), noise=noise, thresh=3.0)
    assert_same(run(write(corner), *options, "--err-option", noise), expected)


@pytest.mark.parametrize("case", ["gaussian", "tophat"])
@pytest.mark.parametrize("fwhm", [0.01, 0.5, 1, 1.5, 2, 3, 4.7, 8])
def test_made_kernel_filters_as_in_sep(run, write, field, case, fwhm):
    kernel = source_extractor.make_kernel(case, fwhm, None)
    expected = direct(field, filter_kernel=kernel)
    assert_same(run(write(field), "--filter-case", case, "--filter-fwhm", fwhm), expected)


@pytest.mark.parametrize("options", ["", "--no-clean --minarea 1", "--err-option array_rms"])
def test_map_has_as_many_pixels_of_each_label_as_the_catalogue_says(run, write, field, options):
    result = run(write(field), *options.split())
    catalog = result.catalog
    np.testing.assert_array_equal(catalog.id, np.arange(1, len(catalog) + 1))
    counts = np.bincount(result.image("segmentation").ravel(), minlength=len(catalog) + 1)
    np.testing.assert_array_equal(counts[1:], catalog.npix)
    peak = result.image("segmentation")[catalog.ypeak, catalog.xpeak]
    np.testing.assert_array_equal(peak, catalog.id)


# ---------------------------------------------------------------------------------------------
# What would kill SEP, or be taken for something else
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bw", "bh"])
@pytest.mark.parametrize("size", [10**6, 2**31 - 1])
def test_boxes_of_any_size_beyond_the_image_are_one_box(run, write, stars, name, size):
    assert_same(run(write(stars), f"--{name}", size), direct(stars, mesh={name: 160}))


INTEGERS = ["u1", "i1", "i2", "u2", "i4", "u4", "i8"]


@pytest.mark.parametrize("dtype", [*INTEGERS, ">f4", ">f8", "f2"])
def test_any_pixel_type_gives_the_products_of_the_same_floats(run, tmp_path, stars, dtype):
    if dtype in INTEGERS:  # of a noise that is large in integers: a small one needs a dither
        level = 0 if dtype == "i1" else 110
        stars = np.rint(blobs(stars.shape, (40, 30), (120, 100), level=level, noise=12.0))
    stored = stars.astype(dtype)
    tifffile.imwrite(tmp_path / "image.tiff", stored, byteorder=">" if ">" in dtype else "<")
    exact = np.float64 if dtype in ("i4", "u4", "i8", ">f8") else np.float32
    assert_same(run(tmp_path / "image.tiff"), direct(stored.astype(exact)))


@pytest.mark.parametrize(
    ("bad", "option"),
    [(np.nan, "float_globalrms"), (np.inf, "array_rms"), (-np.inf, "none"), (np.nan, "array_rms")],
)
def test_pixels_that_are_not_finite_are_masked_by_themselves(run, write, stars, bad, option):
    image = stars.copy()
    hole = np.zeros(stars.shape, bool)
    hole[28:32, 38:43] = hole[60, 80] = True
    image[hole] = bad
    expected = direct(stars, mask=hole, noise=option, thresh=4.0)
    options = ("--err-option", option, "--thresh", 4, "--bridge", 0)
    assert_same(run(write(image), *options), expected)


@pytest.mark.parametrize("border", [1, 3, 20])
def test_border_of_nan_does_not_change_the_sources_inside(run, write, stars, border):
    framed = np.pad(stars, border, constant_values=np.nan)
    mesh = "--bw", 400, "--bh", 400
    inside = table(run(write(stars), *mesh))
    found = table(run(write(framed, "framed.fits"), *mesh))
    np.testing.assert_array_equal(found.npix, inside.npix)
    np.testing.assert_allclose(found.x, inside.x + border, rtol=1e-6)
    np.testing.assert_allclose(found.y, inside.y + border, rtol=1e-6)
    np.testing.assert_allclose(found.flux, inside.flux, rtol=1e-4)


@pytest.mark.parametrize(("bad", "width"), [(1e6, 3), (1e6, 7), (np.nan, 7)])
@pytest.mark.parametrize("option", ["float_globalrms", "array_rms", "none"])
def test_masked_pixels_in_the_first_rows_are_not_detected(
    run, write, tmp_path, stars, bad, option, width
):
    np.savetxt(tmp_path / "kernel.txt", np.ones((width, width)))
    filtering = "--filter-case", "file", "--filter-file", tmp_path / "kernel.txt"
    mask = np.zeros(stars.shape, bool)
    mask[0, 60:63] = mask[1, 100] = mask[2, 130] = True
    image = np.where(mask, np.float32(bad), stars)
    options = (*filtering, "--err-option", option, "--thresh", 5, "--bw", 400, "--bh", 400)
    upright, flipped = (
        table(run(write(i, f"i{n}.fits"), "--mask", write(m, f"m{n}.fits"), *options))
        for n, (i, m) in enumerate(
            [(image, mask.astype("u1")), (image[::-1], mask[::-1].astype("u1"))]
        )
    )
    assert len(upright) == 6
    upright, flipped = upright.sort_values("x"), flipped.sort_values("x")
    np.testing.assert_array_equal(upright.npix, flipped.npix)
    np.testing.assert_allclose(upright.x, flipped.x, rtol=1e-5)
    np.testing.assert_allclose(upright.y, len(stars) - 1 - flipped.y, rtol=1e-5)


def test_masked_pixels_in_the_first_rows_keep_their_value_in_the_subtracted_image(
    run, write, tmp_path, stars
):
    image = stars.copy()
    image[0, 60] = 1e4
    path = tmp_path / "subtracted.fits"
    result = run(write(image), "--mask-box", 60, 60, 0, 0, "--bridge", 0, "--subtracted", path)
    assert len(table(result)) == 6
    left = fits.getdata(path)
    np.testing.assert_allclose(left, image - result.image("background"), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Nothing to measure, nothing to find
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["", "--err-option array_rms", "--err-option none", "--background-passes 2"]
)
@pytest.mark.parametrize(("value", "dtype"), [(0, "f4"), (7.3, "f4"), (-1e20, "f8"), (9, "i2")])
def test_constant_image_has_no_noise_and_no_sources(run, write, options, value, dtype):
    image = np.full((40, 50), value, dtype)
    result = run(write(image), *options.split())
    assert table(result).empty
    assert "warning" in result.err
    assert not result.image("segmentation").any()
    assert not result.image("rms").any()
    np.testing.assert_allclose(result.image("background"), image, rtol=1e-7)


def test_constant_image_is_reported_once_and_without_sep_s_made_up_noise(run, write):
    result = run(write(np.full(SHAPE, 7, np.float32)), "--background-passes", 2)
    assert result.err.count("constant") == 1
    assert re.search(r"^background +7, rms 0$", result.out, re.MULTILINE)


@pytest.mark.parametrize("option", ["float_globalrms", "array_rms"])
def test_sources_without_noise_ask_for_another_threshold(run, write, option):
    image = np.zeros(SHAPE, np.float32)
    image[50:54, 70:75] = 9
    result = run(write(image), "--err-option", option)
    result.assert_refused("image.fits", "--err-option none")


def test_sources_without_noise_are_found_over_an_absolute_threshold(run, write):
    image = np.zeros(SHAPE, np.float32)
    image[50:54, 70:75] = 9
    found = table(run(write(image), "--err-option", "none", "--filter-case", "none"))
    assert found[["npix", "flux", "xmin", "ymax"]].to_numpy().tolist() == [[20, 180, 70, 53]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_wings_of_noiseless_sources_are_no_scale(run, write, dtype):
    centres = (50, 50), (60, 140), (150, 150)
    image = blobs((200, 200), *centres, level=0, noise=0, peak=100).astype(dtype)
    found = run(write(image), "--err-option", "none", "--thresh", 1).catalog
    assert sorted(zip(found["xpeak"], found["ypeak"], strict=True)) == sorted(centres)


@pytest.mark.parametrize(("rows", "good"), [(59, True), (61, False)])
def test_some_box_needs_half_of_its_pixels_for_a_background(run, write, stars, rows, good):
    mesh = "--bw", 160, "--bh", 120
    result = run(write(stars), *mesh, "--mask-box", 0, 159, 0, rows)
    if good:
        mask = np.zeros(SHAPE, bool)
        mask[: rows + 1] = True
        expected = sep.Background(stars, mask=mask, bw=160, bh=120)
        np.testing.assert_array_equal(result.image("background"), expected.back())
        assert table(result).ymin.min() >= 59
        assert len(table(result)) == 3
    else:
        result.assert_refused("image.fits", "--bw", "--bh")


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 2), (5, 2)])
@pytest.mark.parametrize("options", ["", "--err-option array_rms --background-passes 2"])
@pytest.mark.parametrize("size", [3, 33])
def test_images_smaller_than_the_kernel_are_worked_on(run, write, tmp_path, shape, options, size):
    image = np.random.default_rng(1).normal(10, 1, shape).astype(np.float32)
    np.savetxt(tmp_path / "kernel.txt", np.ones((size, size)))
    filtering = "--filter-case", "file", "--filter-file", tmp_path / "kernel.txt"
    result = run(write(image), *filtering, *options.split(), "--minarea", 1)
    assert result.code == 0
    for product in ("background", "rms", "segmentation"):
        assert result.image(product).shape == shape
        assert np.isfinite(result.image(product)).all()


def test_bright_pixel_of_a_single_row_is_found(run, write):
    image = np.random.default_rng(1).normal(10, 1, (1, 60)).astype(np.float32)
    image[0, 33] = 100
    options = "--minarea", 1, "--filter-case", "none", "--thresh", 5
    found = table(run(write(image), *options))
    assert found[["xpeak", "ypeak", "npix"]].to_numpy().tolist() == [[33, 0, 1]]


# ---------------------------------------------------------------------------------------------
# SEP's internal limits
# ---------------------------------------------------------------------------------------------


def test_more_pixels_than_sep_s_buffer_are_extracted(run, write, large_limits):
    image = np.random.default_rng(2).normal(0, 1, (520, 1280)).astype(np.float32)
    image[:, 640:] += 20
    options = "--err-option none --thresh 2 --bw 1280 --bh 520 --deblend-nthresh 1 -v"
    result = run(write(image), *options.split())
    assert "grown" in result.out
    large_limits()
    mesh = {"bw": 1280, "bh": 520}
    expected = direct(image, noise="none", thresh=2.0, mesh=mesh, deblend_nthresh=1)
    assert_same(result, expected)
    assert expected[2]["npix"].max() > 300_000


def crowd(side, pitch, border):
    """Return an image of `side` x `side` equal stars on a common plateau, in an empty sky."""
    phase = np.arange(side * pitch) % pitch - pitch // 2
    profile = np.exp(-(phase**2) / 2)
    image = np.pad(10 + 50 * np.outer(profile, profile), border)
    return (image + np.random.default_rng(0).normal(0, 0.1, image.shape)).astype(np.float32)


CROWD_OPTIONS = (
    "--err-option none --thresh 5 --filter-case none --deblend-cont 0 --bw 1000 --bh 1000"
)


def test_more_sub_objects_than_sep_s_limit_are_deblended(run, write, large_limits):
    image = crowd(34, 6, 64)
    result = run(write(image), *CROWD_OPTIONS.split(), "-v")
    assert re.search("sub-objects.*grown to 4096", result.out)
    large_limits()
    expected = direct(
        image, noise="none", thresh=5.0, filter_kernel=None, deblend_cont=0.0,
        mesh={"bw": 1000, "bh": 1000},
    )  # fmt: skip
    assert_same(result, expected)
    assert len(expected[2]) == 34**2


# ---------------------------------------------------------------------------------------------
# Scales and pedestals that float32 can't take
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["float_globalrms", "array_rms", "none", "file"])
@pytest.mark.parametrize(
    ("factor", "pedestal", "dtype"),
    [
        (1e-20, 0, np.float32),
        (1e20, 0, np.float32),
        (1e150, 0, np.float64),
        (1, 1e7, np.float64),
        (1e-20, -1e7, np.float64),
    ],
)
def test_scale_and_pedestal_do_not_matter(run, write, stars, option, factor, pedestal, dtype):
    def products(image, name, unit):
        options = ["--err-option", option, "--thresh", 4 * unit if option == "none" else 4]
        options += ["--gain", 2 / unit, "--fthresh", 0.2 * unit, "--bw", 40, "--bh", 40]
        if option == "file":
            noise = np.full(stars.shape, 1.2 * unit).astype(dtype)
            options += ["--err-file", write(noise, f"noise-{name}")]
        result = run(write(image, name), *options)
        return table(result), result.image("background"), result.image("rms")

    plain, level, noise = products(stars.astype(dtype), "plain.fits", 1)
    image = ((stars.astype(np.float64) + pedestal) * factor).astype(dtype)
    found, scaled_level, scaled_noise = products(image, "scaled.fits", factor)
    assert len(plain) == 6
    np.testing.assert_array_equal(found.npix, plain.npix)
    for name in SEP_FIELDS:
        scaled = plain[name] * (factor if name in FLUXES else 1)
        np.testing.assert_allclose(found[name], scaled, rtol=2e-3, atol=1e-5, err_msg=name)
    assert scaled_level.dtype.newbyteorder("=") == dtype
    np.testing.assert_allclose(scaled_noise / factor, noise, rtol=1e-3)
    np.testing.assert_allclose(scaled_level / factor - pedestal, level, atol=1e-2)


# ---------------------------------------------------------------------------------------------
# Background in two passes
# ---------------------------------------------------------------------------------------------


def test_second_pass_takes_a_big_galaxy_and_a_bright_star_out_of_the_background(run, write):
    sources = vstack(
        [galaxies(100, 140, 5e5, a=40, b=30, theta=0.4), stars(205, 50, 5e5, fwhm=5, beta=3)]
    )
    sky = {"level": 100, "gradient": (0.2, 0)}
    path = write(simulate((256, 256), sources, seed=6, noise=1, **sky)[0])
    truth, _ = simulate((256, 256), sources[:0], noise=0, **sky)
    mesh = "--bw", 32, "--bh", 32
    once = run(path, *mesh).image("background")
    twice = run(path, *mesh, "--background-passes", 2).image("background")
    assert np.ptp(twice) < np.ptp(once) / 5
    assert np.abs(twice - truth).max() < np.abs(once - truth).max() / 5
    assert np.std(twice - truth) < np.std(once - truth) / 5


def test_second_pass_of_empty_sky_changes_nothing(run, write):
    path = write(np.random.default_rng(3).normal(5, 1, SHAPE).astype(np.float32))
    options = "--thresh", 5
    once = run(path, *options).image("background")
    np.testing.assert_array_equal(
        run(path, *options, "--background-passes", 2).image("background"), once
    )


def test_second_pass_with_sources_everywhere_keeps_the_first(run, write):
    y, x = np.indices((64, 64))
    image = np.random.default_rng(3).normal(5, 1, (64, 64))
    image += 1000 * np.exp(-((x - 32) ** 2 + (y - 32) ** 2) / 300)
    path = write(image.astype(np.float32))
    once = run(path).image("background")
    result = run(path, "--background-passes", 2)
    np.testing.assert_array_equal(result.image("background"), once)
    assert "warning: sources fill every background box" in result.err
    assert result.code == 0


def test_second_pass_respects_the_mask(run, write, stars):
    image = stars.copy()
    image[40:90, 60:110] += 1000
    box = "--mask-box", 60, 109, 40, 89
    result = run(write(image), *box, "--background-passes", 2)
    assert np.abs(result.image("background") - 100).max() < 1


@pytest.mark.parametrize("passes", [1, 2])
def test_every_pass_masks_what_has_no_noise(stars, passes):
    noise, block = np.ones(SHAPE, np.float32), np.s_[40:90, 60:110]
    noise[block] = 0
    method = Method(DEFAULT_KERNEL, "file", passes, BackgroundSettings(), ExtractionSettings())
    image = stars, np.zeros(SHAPE, bool), noise, method
    mask = subtract_background(*image, saturation=math.nan, threads=1).mask
    assert mask[block].all()
    assert np.count_nonzero(mask) == mask[block].size


# ---------------------------------------------------------------------------------------------
# How deep a noise image goes with a matched filter
# ---------------------------------------------------------------------------------------------

DEEPER = re.compile(r"warning: .* goes ([\d.]+) times deeper.*, and ([\d.]+) as ")


@pytest.mark.parametrize(
    "kernel", [DEFAULT_KERNEL, np.ones((3, 3)), np.array([[0, 1, 0], [1, -2, 1], [0, 3, 0]])]
)
def test_matched_filter_says_truly_how_much_deeper_it_goes(run, write, tmp_path, kernel):
    noise = np.random.default_rng(8).normal(0, 1, (160, 160)).astype(np.float32)
    np.savetxt(tmp_path / "kernel.txt", kernel)
    path = write(noise)
    options = "--filter-case file --minarea 1 --deblend-nthresh 1 --no-clean --bw 400 --bh 400"
    options = (*options.split(), "--filter-file", tmp_path / "kernel.txt")

    def detected(option, thresh):
        result = run(path, *options, "--err-option", option, "--thresh", thresh)
        assert result.code == 0
        return DEEPER.search(result.err), np.count_nonzero(result.image("segmentation"))

    silent, shallow = detected("float_globalrms", 0.75)
    warned, deep = detected("array_rms", 0.75)
    deeper, thresh = map(float, warned.groups())
    _, equal = detected("array_rms", thresh)
    assert silent is None
    assert deeper == pytest.approx(np.abs(kernel).sum() / np.sqrt((kernel**2).sum()), abs=0.005)
    assert thresh == pytest.approx(0.75 * deeper, rel=0.01)
    assert deep > 2 * shallow
    assert equal == pytest.approx(shallow, rel=0.1)


def test_default_kernel_goes_2_67_times_deeper(run, write, stars):
    result = run(write(stars), "--err-option", "array_rms")
    assert DEEPER.search(result.err).group(1) == "2.67"


@pytest.mark.parametrize(
    "options", ["--err-option array_rms --filter-type conv", "--err-option none", ""]
)
def test_other_filtering_goes_no_deeper_and_says_nothing(run, write, stars, options):
    assert run(write(stars), *options.split()).err == ""


# ---------------------------------------------------------------------------------------------
# Any settings, any image
# ---------------------------------------------------------------------------------------------

SETTINGS = {
    "--bw": st.integers(8, 100),
    "--bh": st.integers(8, 100),
    "--fw": st.integers(0, 49).map(lambda n: 2 * n + 1),
    "--fh": st.integers(0, 49).map(lambda n: 2 * n + 1),
    "--fthresh": st.floats(0, 1e300),
    "--background-passes": st.sampled_from([1, 2]),
    "--thresh": st.one_of(st.floats(0.1, 10), st.floats(5e-324, 1e308)),
    "--err-option": st.sampled_from(["float_globalrms", "array_rms", "none"]),
    "--gain": st.floats(5e-324, 1e308),
    "--minarea": st.one_of(st.integers(1, 20), st.integers(1, 2**31 - 1)),
    "--filter-case": st.sampled_from(["none", "default", "gaussian", "tophat"]),
    "--filter-fwhm": st.floats(5e-324, 50),
    "--filter-type": st.sampled_from(["matched", "conv"]),
    "--deblend-nthresh": st.integers(1, 64),
    "--deblend-cont": st.floats(0, 1),
    "--clean-param": st.floats(5e-324, 1e308),
}
BOUNDED = settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_sound(result):
    """Demand an end in good order, and a map that agrees with the catalogue."""
    assert result.code in (0, 1)
    assert "Traceback" not in result.err
    if result.code == 1:
        assert re.search("every pixel is masked|no background box|no noise|no unit", result.err)
        return
    catalog, labels = result.catalog, result.image("segmentation")
    counts = np.bincount(labels.ravel(), minlength=len(catalog) + 1)
    np.testing.assert_array_equal(counts[1:], catalog.npix)
    assert np.isfinite(result.image("background")).all()


@BOUNDED
@given(options=st.fixed_dictionaries({}, optional=SETTINGS), clean=st.booleans())
def test_any_settings_within_bounds_end_in_good_order(run, tmp_path, options, clean):
    image, _ = simulate((40, 50), random_sources((40, 50), 12, seed=9), seed=10)
    image[:3, :4] = np.nan
    tifffile.imwrite(tmp_path / "image.tiff", image)
    pairs = [f"{name}={value}" for name, value in options.items()]
    assert_sound(run(tmp_path / "image.tiff", *pairs, "--clean" if clean else "--no-clean"))


@BOUNDED
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    scale=st.floats(-300, 298),
    pedestal=st.floats(-1e9, 1e9),
    masked=st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    levels=st.sampled_from([1, 2, 5, 1000]),
    option=st.sampled_from(["float_globalrms", "array_rms", "none"]),
    seed=st.integers(0, 99),
)
def test_any_image_ends_in_good_order(
    run, tmp_path, shape, scale, pedestal, masked, levels, option, seed
):
    rng = np.random.default_rng(seed)
    image = (np.rint(rng.standard_cauchy(shape) * levels) / levels + pedestal) * 10**scale
    image[rng.random(shape) < masked] = np.nan
    tifffile.imwrite(tmp_path / "image.tiff", image)
    assert_sound(run(tmp_path / "image.tiff", "--err-option", option, "--minarea", 1))


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e300, -1e300])
def test_a_value_too_large_to_sum_is_masked(run, write, stars, value):
    dtype = np.float32 if abs(value) < 1e39 else np.float64
    image = stars.astype(dtype)
    box = ("--mask-box", 100, 100, 50, 50)
    expected = run(write(image, "good.fits"), *box).catalog
    image[50, 100] = value
    result = run(write(image, "bad.fits"))
    assert (result.code, result.err) == (0, "")
    pd.testing.assert_frame_equal(result.catalog, expected)
