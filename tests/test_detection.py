"""Background, noise and detection: exactly SEP's own results, and none of its traps."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits
from numpy.testing import assert_allclose, assert_array_equal

from common import SHAPE, SKY
from contract import SEP_FIELDS
from same_as_sep import CUT, DEFAULT_KERNEL, assert_same, assert_subtracted, direct
from sky import blobs, galaxies, random_sources, simulate, stars, vstack
from source_extractor import make_kernel
from truth import INDEPENDENT

ALWAYS = INDEPENDENT


@pytest.fixture(scope="module")
def field():
    """Return a float32 image of crowded stars and galaxies on a gradient, noise 2 and Poisson."""
    sources = random_sources((150, 200), 120, seed=3, flux=(100, 2e4))
    image, _ = simulate((150, 200), sources, seed=4, level=50, gradient=(20, 10), noise=2, gain=2)
    return image


@pytest.fixture
def with_kernel(tmp_path):
    """Return a function that writes a kernel to a file, and returns the options to filter by it."""

    def write_kernel(kernel):
        np.savetxt(tmp_path / "kernel.txt", kernel)
        return "--filter-case", "file", "--filter-file", tmp_path / "kernel.txt"

    return write_kernel


def table(result):
    """Return SEP's fields from the catalogue of a successful run."""
    assert result.code == 0, result.err
    return result.catalog[SEP_FIELDS]


# The same as SEP

OPTIONS = {
    "--err-option array_rms": {"noise": "array_rms"},
    "--err-option array_rms --filter-type conv": {"noise": "array_rms", "filter_type": "conv"},
    "--err-option array_rms --filter-case none": {"noise": "array_rms", "filter_kernel": None},
    "--err-option none --thresh 5.5": {"noise": "none", "thresh": 5.5},
    "--filter-type conv": {"filter_type": "conv"},
    "--filter-case none": {"filter_kernel": None},
    "--filter-case tophat --filter-fwhm 4.7": {"filter_kernel": make_kernel("tophat", 4.7, None)},
    "--minarea 25": {"minarea": 25},
    "--minarea 1 --thresh 2": {"minarea": 1, "thresh": 2.0},
    "--gain 2 --err-option array_rms": {"gain": 2.0, "noise": "array_rms"},
    "--deblend-nthresh 1": {"deblend_nthresh": 1},
    "--deblend-nthresh 64 --deblend-cont 0": {"deblend_nthresh": 64, "deblend_cont": 0.0},
    "--deblend-cont 1": {"deblend_cont": 1.0},
    "--no-clean": {"clean": False},
    "--clean-param 0.2": {"clean_param": 0.2},
    "--bw 40 --bh 25 --fw 5 --fh 1 --fthresh 0.3": {
        "mesh": {"bw": 40, "bh": 25, "fw": 5, "fh": 1, "fthresh": 0.3}
    },
    f"--bw 512 --bh {2**31 - 1}": {"mesh": {"bw": 200, "bh": 150}},
}


@pytest.mark.parametrize(("options", "keywords"), OPTIONS.items())
def test_products_are_those_of_sep(run, write, tmp_path, field, options, keywords):
    subtracted, expected = tmp_path / "subtracted.fits", direct(field, **keywords)
    result = run(write(field), *options.split(), "--subtracted", subtracted)
    assert_same(result, expected, filtered=options == "--err-option array_rms --filter-type conv")
    assert_subtracted(subtracted, field, expected)


def test_products_of_the_test_sky_are_those_of_sep(run, tmp_path):
    image = fits.getdata(SKY).astype(np.float32)
    result = run(SKY, "--subtracted", tmp_path / "subtracted.fits")
    expected = direct(image)
    assert_same(result, expected)
    assert_subtracted(tmp_path / "subtracted.fits", image, expected)
    catalog, labels = result.catalog, result.image("segmentation")
    assert_array_equal(catalog.id, np.arange(1, len(catalog) + 1))
    assert_array_equal(np.bincount(labels.ravel())[1:], catalog.npix)
    assert_array_equal(labels[catalog.ypeak, catalog.xpeak], catalog.id)


@pytest.mark.parametrize(
    ("option", "bad", "dtype"),
    [("float_globalrms", np.nan, "f8"), ("array_rms", np.inf, "f4"), ("none", -np.inf, "f4")],
)
def test_pixels_masked_by_a_file_or_not_finite_are_left_out_as_in_sep(
    run, write, field, option, bad, dtype
):
    holes = np.random.default_rng(5).random(field.shape) < 0.01
    holes[2:20, :30] = True
    holes[:2] = False  # where SEP itself errs
    holes[:, 111] = True
    image, mask = field.astype(dtype), holes & (np.indices(holes.shape)[1] % 8 < 4)
    image[holes & ~mask] = bad
    paths = write(image), "--mask", write(mask.astype(np.uint8), "mask.fits")
    result = run(*paths, "--err-option", option, "--thresh", 4, "--bridge", 0)
    assert_same(result, direct(field.astype(dtype), mask=holes, noise=option, thresh=4.0))
    assert not result.image("segmentation")[holes].any()
    assert {*(result.catalog["flag"] & CUT)} == {0, CUT}


KERNELS = {
    "asymmetric": np.arange(1.0, 16).reshape(3, 5),
    "with negative lobes": np.pad(2 * np.ones((3, 3)), 2, constant_values=-0.2),
    "one row": np.array([[1.0, 3, 1]]),
    "one column": np.array([[1.0], [3], [1]]),
    "one pixel": np.array([[2.0]]),
    "larger than the image": np.exp(-np.hypot(*np.mgrid[-35:36, -45:46]) / 2),
}


@pytest.mark.parametrize("noise", ["float_globalrms", "array_rms"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernel_from_a_file_filters_as_in_sep(run, write, with_kernel, field, kernel, noise):
    corner = np.ascontiguousarray(field[:60, :80])
    expected = direct(corner, filter_kernel=kernel.astype(np.float32), noise=noise, thresh=3.0)
    options = *with_kernel(kernel), "--thresh", 3, "--err-option", noise
    assert_same(run(write(corner), *options), expected)


# What SEP would refuse, or take for something else


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "u4", "i8", ">f4", ">f8", "f2"])
def test_any_pixel_type_gives_the_products_of_the_same_floats(run, tmp_path, stars, dtype):
    if np.dtype(dtype).kind in "iu":  # of a noise that is large in integers: else SEP errs
        level = 0 if dtype == "i1" else 110
        stars = np.rint(blobs(stars.shape, (40, 30), (120, 100), level=level, noise=12.0))
    stored = stars.astype(dtype)
    tifffile.imwrite(tmp_path / "image.tiff", stored, byteorder=">" if ">" in dtype else "<")
    exact = np.float64 if dtype in ("u4", "i8", ">f8") else np.float32
    assert_same(run(tmp_path / "image.tiff"), direct(stored.astype(exact)))


@pytest.mark.parametrize(
    ("bad", "width", "option"),
    [(1e6, 3, "float_globalrms"), (1e6, 7, "array_rms"), (np.nan, 7, "none")],
)
def test_masked_pixels_in_the_first_rows_are_not_detected(
    run, write, with_kernel, stars, bad, width, option
):
    mask = np.zeros(stars.shape, "u1")
    mask[0, 60:63] = mask[1, 100] = mask[2, 130] = 1
    image = np.where(mask, np.float32(bad), stars)
    options = "--err-option", option, "--thresh", 5, "--bw", 400, "--bh", 400
    options += with_kernel(np.ones((width, width)))
    upright, flipped = (
        table(run(write(i, f"i{n}.fits"), "--mask", write(m, f"m{n}.fits"), *options))
        for n, (i, m) in enumerate([(image, mask), (image[::-1], mask[::-1])])
    )
    assert len(upright) == 6
    upright, flipped = upright.sort_values("x"), flipped.sort_values("x")
    assert_array_equal(upright.npix, flipped.npix)
    assert_allclose(upright.x, flipped.x, rtol=1e-5)
    assert_allclose(upright.y, len(stars) - 1 - flipped.y, rtol=1e-5)


def test_masked_pixels_in_the_first_rows_keep_their_value_in_the_subtracted_image(
    run, write, tmp_path, stars
):
    stars[0, 60] = 1e4
    path = tmp_path / "subtracted.fits"
    result = run(write(stars), "--mask-box", 60, 60, 0, 0, "--bridge", 0, "--subtracted", path)
    assert len(table(result)) == 6
    expected = stars - result.image("background")
    assert_allclose(fits.getdata(path), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [3.4e38, -1e300])
def test_a_value_too_large_to_sum_is_masked(run, write, stars, value):
    image = stars.astype(np.float32 if abs(value) < 1e39 else np.float64)
    expected = run(write(image, "good.fits"), "--mask-box", 100, 100, 50, 50).catalog
    image[50, 100] = value
    result = run(write(image, "bad.fits"))
    assert (result.code, result.err) == (0, "")
    pd.testing.assert_frame_equal(result.catalog, expected)


# Nothing to measure, nothing to find


@pytest.mark.parametrize(
    ("value", "dtype", "options"),
    [
        (7.3, "f4", ""),
        (0, "f4", "--err-option array_rms"),
        (-1e20, "f8", "--err-option none"),
        (9, "i2", "--background-passes 2"),
    ],
)
def test_constant_image_has_no_noise_and_no_sources(run, write, value, dtype, options):
    image = np.full((40, 50), value, dtype)
    result = run(write(image), *options.split())
    assert table(result).empty
    told = "no sources found" if "none" in options else "constant"
    assert result.err.count(told) == result.err.count("warning") == 1
    assert re.search(rf"^background +{re.escape(f'{value:g}')}, rms 0$", result.out, re.MULTILINE)
    assert not result.image("segmentation").any()
    assert not result.image("rms").any()
    assert_allclose(result.image("background"), image, rtol=1e-7)


def test_sources_without_noise_need_an_absolute_threshold(run, write):
    image = np.zeros(SHAPE, np.float32)
    image[50:54, 70:75] = 9
    path = write(image)
    for option in ("float_globalrms", "array_rms"):
        run(path, "--err-option", option).assert_refused("image.fits", "--err-option none")
    found = table(run(path, "--err-option", "none", "--filter-case", "none"))
    assert found[["npix", "flux", "xmin", "ymax"]].to_numpy().tolist() == [[20, 180, 70, 53]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_wings_of_noiseless_sources_are_no_scale(run, write, dtype):
    centres = (50, 50), (60, 140), (150, 150)
    image = blobs((200, 200), *centres, level=0, noise=0, peak=100).astype(dtype)
    found = run(write(image), "--err-option", "none", "--thresh", 1).catalog
    assert sorted(zip(found["xpeak"], found["ypeak"], strict=True)) == sorted(centres)


@pytest.mark.parametrize(("rows", "good"), [(59, True), (61, False)])
def test_some_box_needs_half_of_its_pixels_for_a_background(run, write, stars, rows, good):
    result = run(write(stars), "--bw", 160, "--bh", 120, "--mask-box", 0, 159, 0, rows)
    if good:
        mask = np.zeros(SHAPE, bool)
        mask[: rows + 1] = True
        expected = sep.Background(stars, mask=mask, bw=160, bh=120)
        assert_array_equal(result.image("background"), expected.back())
        assert table(result).ymin.min() >= 59
        assert len(table(result)) == 3
    else:
        result.assert_refused("image.fits", "--bw", "--bh")


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (5, 2)])
@pytest.mark.parametrize(
    ("options", "size"), [("", 3), ("--err-option array_rms --background-passes 2", 33)]
)
def test_images_smaller_than_the_kernel_are_worked_on(
    run, write, with_kernel, shape, options, size
):
    image = np.random.default_rng(1).normal(10, 1, shape).astype(np.float32)
    filtering = with_kernel(np.ones((size, size)))
    result = run(write(image), *filtering, *options.split(), "--minarea", 1)
    assert result.code == 0
    for product in ("background", "rms", "segmentation"):
        assert np.isfinite(result.image(product)).all()
        assert result.image(product).shape == shape


def test_bright_pixel_of_a_single_row_is_found(run, write):
    image = np.random.default_rng(1).normal(10, 1, (1, 60)).astype(np.float32)
    image[0, 33] = 100
    found = table(run(write(image), "--minarea", 1, "--filter-case", "none", "--thresh", 5))
    assert found[["xpeak", "ypeak", "npix"]].to_numpy().tolist() == [[33, 0, 1]]


# SEP's internal limits


def test_more_pixels_than_seps_buffer_are_extracted(run, write):
    image = np.random.default_rng(2).normal(0, 1, (520, 1280)).astype(np.float32)
    image[:, 640:] += 20
    options = "--err-option none --thresh 2 --bw 1280 --bh 520 --deblend-nthresh 1 -v"
    result = run(write(image), *options.split())
    assert "raised SEP's limits" in result.out
    sep.set_extract_pixstack(2_000_000)
    mesh = {"bw": 1280, "bh": 520}
    expected = direct(image, noise="none", thresh=2.0, mesh=mesh, deblend_nthresh=1)
    assert_same(result, expected)
    assert expected[2]["npix"].max() > 300_000


def test_more_sub_objects_than_seps_limit_are_deblended(run, write):
    phase = np.arange(34 * 6) % 6 - 3
    profile = np.exp(-(phase**2) / 2)
    image = np.pad(10 + 50 * np.outer(profile, profile), 64)  # stars on a plateau
    image = (image + np.random.default_rng(0).normal(0, 0.1, image.shape)).astype(np.float32)
    options = "--err-option none --thresh 5 --filter-case none --deblend-cont 0 --deblend-nthresh 4"
    result = run(write(image), *options.split(), "--bw", 1000, "--bh", 1000, "-v")
    assert re.search("limits to 4096 sub-objects", result.out)
    sep.set_sub_object_limit(16_000)
    keywords = {"noise": "none", "thresh": 5.0, "filter_kernel": None, "deblend_cont": 0.0}
    mesh = {"bw": 1000, "bh": 1000}
    expected = direct(image, mesh=mesh, deblend_nthresh=4, **keywords)
    assert_same(result, expected)
    assert len(expected[2]) == 34**2


# Scales and pedestals that float32 can't take

LEVELS = ["thresh", "cflux", "flux", "cpeak", "peak"]
FLUXES = ["flux_auto", "fluxerr_auto", "flux_aper_6", "fluxerr_aper_6", "rms"]
FREE_OF_SCALE = ["kron_radius", "snr", "flux_radius", "xwin", "ywin", "flag_auto"]


@pytest.mark.parametrize(
    ("option", "factor", "pedestal", "dtype"),
    [
        ("float_globalrms", 1e-20, 0, np.float32),
        ("float_globalrms", 1, 1e7, np.float64),
        ("array_rms", 1e20, 0, np.float32),
        ("array_rms", 1e-20, -1e7, np.float64),
        ("none", 1e150, 0, np.float64),
        ("file", 1e20, 0, np.float32),
        ("file", 1, 1e7, np.float64),
    ],
)
def test_scale_and_pedestal_do_not_matter(run, write, stars, option, factor, pedestal, dtype):
    def products(pedestal, unit, name):
        options = ["--err-option", option, "--thresh", 4 * unit if option == "none" else 4]
        options += ["--gain", 2 / unit, "--fthresh", 0.2 * unit, "--bw", 40, "--bh", 40]
        if option == "file":
            noise = np.full(SHAPE, 1.2 * unit).astype(dtype)
            options += ["--err-file", write(noise, f"noise-{name}")]
        image = ((stars.astype(np.float64) + pedestal) * unit).astype(dtype)
        result = run(write(image, name), *options, "--aperture-diameters", 6)
        return result.catalog, result.image("background"), result.image("rms")

    plain, level, noise = products(0, 1, "plain.fits")
    found, scaled_level, scaled_noise = products(pedestal, factor, "scaled.fits")
    assert len(plain) == 6
    assert_array_equal(found.npix, plain.npix)
    for name in SEP_FIELDS:
        scaled = plain[name] * (factor if name in LEVELS else 1)
        assert_allclose(found[name], scaled, rtol=2e-3, atol=1e-5, err_msg=name)
    rtol = 2e-3 if pedestal else 1e-3
    assert_allclose(found[FLUXES] / factor, plain[FLUXES], rtol=rtol)
    assert_allclose(found[FREE_OF_SCALE], plain[FREE_OF_SCALE], rtol=rtol)
    assert_allclose(found["background"] / factor - pedestal, plain["background"], atol=0.05)
    shift = -2.5 * math.log10(factor)
    assert_allclose(found["mag_auto"] - plain["mag_auto"], shift, atol=rtol)
    assert_allclose(scaled_noise / factor, noise, rtol=1e-3)
    assert_allclose(scaled_level / factor - pedestal, level, atol=1e-2)


# Background in two passes


def test_second_pass_takes_a_big_galaxy_and_a_bright_star_out_of_the_background(run, write):
    sources = vstack(
        [galaxies(100, 140, 5e5, a=40, b=30, theta=0.4), stars(205, 50, 5e5, fwhm=5, beta=3)]
    )
    sky = {"level": 100, "gradient": (0.2, 0)}
    path = write(simulate((256, 256), sources, seed=6, noise=1, **sky)[0])
    truth, _ = simulate((256, 256), sources[:0], noise=0, **sky)
    once, twice = (
        run(path, "--bw", 32, "--bh", 32, "--background-passes", n).image("background")
        for n in (1, 2)
    )
    assert np.ptp(twice) < np.ptp(once) / 5
    assert np.abs(twice - truth).max() < np.abs(once - truth).max() / 5
    assert np.std(twice - truth) < np.std(once - truth) / 5


@pytest.mark.parametrize("full", [False, True])
def test_second_pass_changes_nothing_in_empty_sky_or_with_sources_everywhere(run, write, full):
    side = 150**0.5
    path = write(blobs((64, 64), *[(32, 32)] * full, level=5, peak=1000, a=side, b=side))
    once, twice = (run(path, "--thresh", 5, "--background-passes", n) for n in (1, 2))
    assert_array_equal(twice.image("background"), once.image("background"))
    assert ("warning: sources fill every background box" in twice.err) == full
    assert twice.code == 0


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("way", ["mask", "noise"])
def test_every_pass_leaves_out_what_is_masked_or_has_no_noise(run, write, stars, way, passes):
    block = np.s_[40:90, 60:110]
    stars[block] += 1000
    noise = np.ones_like(stars)
    noise[block] = 0
    options = {
        "mask": ("--mask-box", 60, 109, 40, 89),
        "noise": ("--err-option", "file", "--err-file", write(noise, "noise.fits")),
    }[way]
    result = run(write(stars), *options, "--background-passes", passes)
    assert np.abs(result.image("background") - 100).max() < 1
    assert f"{100 * 2500 / stars.size:.2f} %" in result.out


# How deep a noise image goes with a matched filter

DEEPER = re.compile(r"warning: .* goes ([\d.]+) times deeper.*, use --thresh ([\d.]+), or")


@pytest.mark.parametrize("kernel", [DEFAULT_KERNEL, np.array([[0, 1, 0], [1, -2, 1], [0, 3, 0]])])
def test_matched_filter_says_truly_how_much_deeper_it_goes(run, write, with_kernel, kernel):
    path = write(np.random.default_rng(8).normal(0, 1, (160, 160)).astype(np.float32))
    options = "--minarea", 1, "--deblend-nthresh", 1, "--no-clean", "--bw", 400, "--bh", 400

    def detected(option, thresh):
        noise = "--err-option", option, "--thresh", thresh
        result = run(path, *options, *with_kernel(kernel), *noise)
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


@pytest.mark.parametrize(
    "options", ["--err-option array_rms --filter-type conv", "--err-option none", ""]
)
def test_other_filtering_goes_no_deeper_and_says_nothing(run, write, stars, options):
    assert run(write(stars), *options.split()).err == ""


# Any image


@pytest.mark.parametrize("seed", range(20))
def test_any_image_ends_in_good_order(run, tmp_path, seed):
    rng = np.random.default_rng(seed)
    shape, levels = rng.integers(1, 20, 2), (1, 2, 5, 1000)[seed % 4]
    image = np.rint(rng.standard_cauchy(shape) * levels) / levels
    image = (image + rng.uniform(-1e9, 1e9)) * 10 ** rng.uniform(-300, 298)
    image[rng.random(shape) < (0, 0.1, 0.5, 0.9, 1)[seed % 5]] = np.nan
    tifffile.imwrite(tmp_path / "image.tiff", image)
    option = ("float_globalrms", "array_rms", "none")[seed % 3]
    result = run(tmp_path / "image.tiff", "--err-option", option, "--minarea", 1)
    if result.code == 1:
        refusals = "every pixel is masked|every background box|no noise|noise is unknown"
        assert re.search(refusals, result.err)
    else:
        assert result.code == 0
        labels, npix = result.image("segmentation"), result.catalog.npix
        assert_array_equal(np.bincount(labels.ravel(), minlength=len(npix) + 1)[1:], npix)
        assert np.isfinite(result.image("background")).all()
