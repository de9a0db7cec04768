"""Mask, boxes, noise image and kernel: what they read, what they change, what they refuse."""

import io
import math

import numpy as np
import pytest
import tifffile
from astropy.io import fits

from common import NX, SHAPE
from same_as_sep import DEFAULT_KERNEL, assert_same, direct
from source_extractor import make_kernel

BLOCK = np.s_[85:116, 10:56]  # holds the star at (30, 95), and no other


@pytest.fixture
def put(tmp_path):
    """Return a function that stores an array as FITS or TIFF, or a text, and returns the path."""

    def put_content(content, form="fits"):
        path = tmp_path / "dataset_2.dat"
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif form == "fits":
            fits.PrimaryHDU(content).writeto(path, overwrite=True)
        else:
            tifffile.imwrite(path, content, photometric="minisblack")
        return path

    return put_content


@pytest.fixture
def image(write, stars):
    return write(stars)


def block(value, dtype, rest=0):
    """Return an image of the type that is `value` in the block and `rest` outside."""
    mask = np.full(SHAPE, rest, dtype)
    mask[BLOCK] = value
    return mask


# Mask


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *(("fits", dtype) for dtype in ("u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8")),
        *(("tiff", dtype) for dtype in ("?", "u1", "i1", "u2", "i2", "i4", "u4", "f2", "f4", "f8")),
    ],
)
def test_a_mask_of_any_type_has_the_effect_of_a_boolean_one(run, image, stars, put, form, dtype):
    result = run(image, "--mask", put(block(1, dtype), form))
    assert_same(result, direct(stars, mask=block(True, bool)))
    assert f"{100 * block(True, bool).mean():.2f} %" in result.out
    assert not result.image("segmentation")[BLOCK].any()


@pytest.mark.parametrize(
    ("threshold", "masked"),
    [(0, {1, 2, 5}), (1, {2, 5}), (1.5, {2, 5}), (4.999, {5}), (-1, {0, 1, 2, 5}), (-2.5, None)],
)
def test_mask_pixels_greater_than_maskthresh_are_masked(run, image, put, threshold, masked):
    mask = np.full(SHAPE, -2, np.int16)
    mask[:40, :40].flat = np.resize([0, 1, 2, 5], 1600)
    result = run(image, "--mask", put(mask), f"--maskthresh={threshold}")
    if masked is None:
        result.assert_refused("image.fits", "every pixel is masked")
    else:
        assert f"{100 * 400 * len(masked) / mask.size:.2f} %" in result.out


@pytest.mark.parametrize("form", ["fits", "tiff"])
@pytest.mark.parametrize("threshold", [0, 1e6])
def test_nan_in_a_mask_is_masked_whatever_the_threshold(run, image, stars, put, form, threshold):
    result = run(image, "--mask", put(block(np.nan, "f4"), form), "--maskthresh", threshold)
    assert_same(result, direct(stars, mask=block(True, bool)))


def test_mask_joins_what_is_not_finite_and_the_boxes(run, write, stars, put):
    stars[0, :8] = np.nan
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, 4:12] = 1
    result = run(write(stars), "--mask", put(mask), "--mask-box", 10, 15, 0, 0)
    assert f"{100 * 16 / stars.size:.2f} % (8 pixels" in result.out


def test_mask_hdu_is_chosen_by_name(run, image, stars, tmp_path):
    path = tmp_path / "masks.dat"
    none, dq = (
        fits.ImageHDU(block(value, "u1"), name=name) for value, name in ((0, "A"), (1, "DQ"))
    )
    fits.HDUList([fits.PrimaryHDU(), none, dq]).writeto(path)
    assert len(run(image, "--mask", path).catalog) == 6
    result = run(image, "--mask", path, "--mask-hdu", "DQ")
    assert_same(result, direct(stars, mask=block(True, bool)))


def test_a_stack_of_masks_gives_the_plane_of_the_image_and_one_mask_serves_all(
    run, write, stars, put
):
    cube = write(np.stack([stars, stars]), "cube.fits")
    masks = np.stack([np.zeros(SHAPE, np.uint8), block(1, np.uint8)])
    assert [len(run(cube, "--plane", k, "--mask", put(masks)).catalog) for k in (0, 1)] == [6, 5]
    assert len(run(cube, "--plane", 1, "--mask", put(masks[1])).catalog) == 5


@pytest.mark.parametrize("form", ["fits", "tiff"])
@pytest.mark.parametrize("shape", [(160, 120), (120, 159), (1, 160)])
def test_a_mask_of_another_shape_is_refused_with_both_shapes(run, image, put, form, shape):
    path = put(np.zeros(shape, np.uint8), form)
    run(image, "--mask", path).assert_refused(path.name, shape, SHAPE)


# Boxes


@pytest.mark.parametrize(
    ("boxes", "where"),
    [
        ([(10, 55, 85, 115)], [BLOCK]),
        ([(0, 0, 0, 0)], [np.s_[:1, :1]]),
        ([(159, 159, 119, 119)], [np.s_[119:, 159:]]),
        ([(150, 1000, 100, 5000)], [np.s_[100:, 150:]]),
        ([(0, 9, 0, 9), (5, 20, 5, 6)], [np.s_[:10, :10], np.s_[5:7, 5:21]]),
    ],
)
def test_boxes_mask_their_ends_too_and_end_at_the_edge(run, image, stars, boxes, where):
    mask = np.zeros(SHAPE, bool)
    for part in where:
        mask[part] = True
    options = [word for box in boxes for word in ("--mask-box", *box)]
    result = run(image, *options, "--bridge", 0)
    assert_same(result, direct(stars, mask=mask))
    assert f"{100 * mask.mean():.2f} %" in result.out


@pytest.mark.parametrize("box", [(160, 170, 0, 5), (0, 5, 120, 121), (500, 600, 500, 600)])
def test_a_box_outside_the_image_is_refused(run, image, box):
    said = f"the mask box {' '.join(map(str, box))} (XMIN XMAX YMIN YMAX) lies outside this image"
    result = run(image, "--mask-box", *box)
    result.assert_refused("image.fits", f"{said} of 160 columns and 120 rows")


def test_a_stack_of_masks_for_a_lone_image_is_refused_with_what_to_do(run, image, put):
    masks = put(np.zeros((3, *SHAPE), np.uint8))
    run(image, "--mask", masks).assert_refused(masks.name, "3 planes", "give one")


def test_a_box_over_the_whole_image_is_refused(run, image):
    run(image, "--mask-box", 0, 159, 0, 119).assert_refused("image.fits", "every pixel is masked")


# Noise

FILE = ("--err-option", "file", "--err-file")


@pytest.fixture
def sigma():
    """Return noise that rises from left to right, from 0.8 to 1.2."""
    return np.tile(np.linspace(0.8, 1.2, NX, dtype=np.float32), (SHAPE[0], 1))


@pytest.mark.parametrize("filter_type", ["matched", "conv"])
@pytest.mark.parametrize(("form", "dtype"), [("fits", "f4"), ("tiff", "f8")])
@pytest.mark.parametrize("kind", ["stddev", "variance", "weight"])
def test_the_kinds_of_noise_image_are_equivalent(
    run, write, put, crowded, kind, form, dtype, filter_type
):
    noise = np.linspace(2, 8, crowded.size, dtype=np.float32).reshape(crowded.shape)
    stored = noise.astype(dtype) ** {"stddev": 1, "variance": 2, "weight": -2}[kind]
    options = (*FILE, put(stored, form), "--err-type", kind, "--filter-type", filter_type)
    result = run(write(crowded), *options)
    expected = direct(crowded, noise=noise, filter_type=filter_type)
    objects = expected[2]
    assert result.code == 0
    assert len(objects) > 20
    if kind == "stddev":
        assert_same(result, expected)
    np.testing.assert_array_equal(result.catalog["npix"], objects["npix"])
    np.testing.assert_allclose(result.catalog["x"], objects["x"], rtol=1e-6)
    np.testing.assert_allclose(result.catalog["flux"], objects["flux"], rtol=1e-6)
    np.testing.assert_allclose(result.catalog["errx2"], objects["errx2"], rtol=1e-5)


def test_noise_as_integers_is_read(run, image, stars, put):
    result = run(image, *FILE, put(np.full(SHAPE, 2, np.uint16)))
    assert_same(result, direct(stars, noise=np.full(SHAPE, 2, np.float32)))


def test_noise_hdu_is_chosen_by_name(run, image, tmp_path, sigma):
    path = tmp_path / "noise.dat"
    hdus = [fits.ImageHDU(1e6 * sigma, name="BIG"), fits.ImageHDU(sigma, name="ERR")]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    assert len(run(image, *FILE, path).catalog) == 0
    assert len(run(image, *FILE, path, "--err-hdu", "ERR").catalog) >= 6


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["stddev", "variance", "weight"])
def test_a_bad_noise_value_masks_the_pixel(run, image, stars, put, kind, bad):
    result = run(image, *FILE, put(block(bad, "f4", rest=1)), "--err-type", kind)
    assert result.code == 0
    assert not result.image("segmentation")[BLOCK].any()
    masked = block(True, bool)
    noise = np.where(masked, 1e30, 1).astype(np.float32)
    assert_same(result, direct(stars, mask=masked, noise=noise))


@pytest.mark.parametrize("kind", ["stddev", "variance", "weight"])
@pytest.mark.parametrize("value", [0, -3, np.nan])
def test_noise_without_a_usable_value_is_refused(run, image, put, kind, value):
    path = put(np.full(SHAPE, value, np.float32))
    run(image, *FILE, path, "--err-type", kind).assert_refused(path.name, kind)


@pytest.mark.parametrize(("scale", "sigma"), [(1e-20, 1e25), (1e20, 1e-30)])
def test_noise_that_vanishes_beside_the_image_is_refused(run, write, stars, put, scale, sigma):
    image = write((stars * scale).astype(np.float32))
    run(image, *FILE, put(np.full(SHAPE, sigma, np.float32))).assert_refused(image.name, "unit")


def test_noise_of_another_shape_is_refused_with_both_shapes(run, image, put):
    path = put(np.ones((120, 161), np.float32))
    run(image, *FILE, path).assert_refused(path.name, (120, 161), SHAPE)


# Kernel


def test_the_default_kernel_and_none():
    assert make_kernel("none", 2, None) is None
    np.testing.assert_array_equal(make_kernel("default", 2, None), DEFAULT_KERNEL)


def gaussian_in_pixels(fwhm, side):
    """Return the mean over each pixel of a Gaussian of peak 1, from the error function."""
    scale = 2 * math.sqrt(math.log(2)) / fwhm
    edges = [math.erf(scale * (n - side / 2)) for n in range(side + 1)]
    profile = np.diff(edges) * math.sqrt(math.pi) / 2 / scale
    return np.outer(profile, profile)


@pytest.mark.parametrize("fwhm", [0.8, 1, 1.5, 2, 3.3, 7, 50])
def test_the_gaussian_is_that_of_its_fwhm_averaged_over_pixels(fwhm):
    kernel = make_kernel("gaussian", fwhm, None)
    side = len(kernel)
    assert kernel.shape == (side, side)
    assert side % 2 == 1
    assert side >= 2 * fwhm
    np.testing.assert_allclose(kernel, gaussian_in_pixels(fwhm, side), atol=3e-3)
    assert kernel.sum() == pytest.approx(math.pi * fwhm**2 / 4 / math.log(2), rel=0.01)


def test_a_wide_gaussian_falls_to_half_at_half_its_fwhm():
    kernel = make_kernel("gaussian", 20, None)
    middle = len(kernel) // 2
    assert kernel[middle, middle + 10] / kernel[middle, middle] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("diameter", [1, 1.5, 2, 3, 4.6, 9, 50])
def test_the_tophat_has_the_area_of_its_circle(diameter):
    kernel = make_kernel("tophat", diameter, None)
    assert kernel.sum() == pytest.approx(math.pi * diameter**2 / 4, rel=0.04)
    assert kernel.max() <= 1
    middle = len(kernel) // 2
    offsets = np.arange(len(kernel)) - middle
    distance = np.hypot(offsets, offsets[:, np.newaxis])
    assert (kernel[distance < diameter / 2 - 0.71] == 1).all()
    assert (kernel[distance > diameter / 2 + 0.71] == 0).all()


@pytest.mark.parametrize("case", ["gaussian", "tophat"])
@pytest.mark.parametrize("fwhm", [0.01, 0.3, 1, 1.9, 2, 4.5, 50])
def test_kernels_are_symmetric_odd_and_fit_for_sep(case, fwhm):
    kernel = make_kernel(case, fwhm, None)
    assert kernel.dtype == np.float32
    assert kernel.flags.c_contiguous
    assert kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1
    assert kernel.max() == kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] > 0
    for turned in (kernel.T, kernel[::-1], kernel[:, ::-1]):
        np.testing.assert_allclose(kernel, turned, rtol=1e-6)


LOPSIDED = np.array([[0, 1, 2, 0, 0], [1, 3.5, 4, 1, 0], [0, 1, 1e-3, 0, -0.5]])


def savetxt(kernel):
    buffer = io.StringIO()
    np.savetxt(buffer, kernel, header="made by numpy")
    return buffer.getvalue()


def conv(kernel, norm="NORM"):
    rows = "\n".join(" ".join(map(str, row)) for row in kernel)
    return f"CONV {norm}\n# 5x3 lopsided kernel\n{rows}\n"


@pytest.mark.parametrize(
    "text",
    [
        savetxt(LOPSIDED),
        conv(LOPSIDED),
        conv(LOPSIDED, "NONORM"),
        conv(LOPSIDED).replace("\n", "\r\n"),
        "\n".join(" ".join(map(str, row)) for row in LOPSIDED),
    ],
    ids=["savetxt", "conv", "conv not normalized", "conv of Windows", "bare"],
)
def test_a_kernel_file_filters_the_detection(run, image, stars, put, text):
    result = run(image, "--filter-case", "file", "--filter-file", put(text))
    assert_same(result, direct(stars, filter_kernel=LOPSIDED.astype(np.float32)))


def test_the_conv_file_of_the_test_data_is_sextractors_gaussian_of_three_pixels(data):
    kernel = make_kernel("file", 2, data / "kernel.conv")
    offsets = np.arange(-2, 3)
    squared = offsets**2 + offsets[:, np.newaxis] ** 2
    np.testing.assert_allclose(kernel, np.exp2(-squared * (2 / 3.0) ** 2), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("1 2\n2 1\n", "odd"),
        ("1 2 1 0\n2 4 2 0\n1 2 1 0\n", "odd"),
        ("1 2 1\n2 nan 2\n1 2 1\n", "finite"),
        ("1 2 1\n2 inf 2\n1 2 1\n", "finite"),
        ("1 2 1\n2 1e60 2\n1 2 1\n", "finite"),
        ("0 0 0\n0 0 0\n0 0 0\n", "zero"),
        ("1 2 1\n2 4\n1 2 1\n", "equal length"),
        ("1 2 1\ntwo\n", "numbers"),
        ("CONV\n", ""),
        ("CONV NORM\n# nothing\n", ""),
        ("", ""),
        ("\n\n", ""),
        ("# nothing\n", ""),
        (bytes(range(256)), "numbers"),
        (b"\0" * 64, "numbers"),
    ],
    ids=repr,
)
def test_a_kernel_file_that_cannot_be_used_is_refused(run, image, put, content, word):
    path = put(content)
    run(image, "--filter-case", "file", "--filter-file", path).assert_refused(path.name, word)


def test_a_kernel_file_that_is_missing_or_a_directory_is_refused(run, image, tmp_path):
    run(image, "--filter-case", "file", "--filter-file", tmp_path).assert_refused(tmp_path.name)
    missing = tmp_path / "missing.conv"
    run(image, "--filter-case", "file", "--filter-file", missing).assert_refused(missing.name)


def test_the_image_given_as_kernel_is_refused(run, image, tmp_path):
    other = tmp_path / "other.fits"
    other.write_bytes(image.read_bytes())
    run(image, "--filter-case", "file", "--filter-file", other).assert_refused(other.name)
