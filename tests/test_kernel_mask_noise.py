"""Mask, boxes, noise image and kernel: what they read, what they change, what they refuse."""

import math

import numpy as np
import pytest
import tifffile
from astropy.io import fits

from common import BLOCK, SHAPE, block
from same_as_sep import DEFAULT_KERNEL, assert_same, direct
from source_extractor import make_kernel
from truth import INDEPENDENT

FILE = "--err-option", "file", "--err-file"

ALWAYS = INDEPENDENT


@pytest.fixture
def put(tmp_path):
    """Return a function that stores an array as FITS or TIFF, or a text, and returns the path."""

    def put_content(content, form="fits"):
        path = tmp_path / "dataset_2.dat"
        if isinstance(content, str):
            path.write_text(content, "latin-1")
        elif form == "fits":
            fits.writeto(path, content, overwrite=True)
        else:
            tifffile.imwrite(path, content, photometric="minisblack")
        return path

    return put_content


# Mask


@pytest.mark.parametrize(
    ("form", "dtype", "value", "threshold"),
    [
        *(("fits", dtype, 1, 0) for dtype in ("u1", "u2", "i8", "f8")),
        *(("tiff", dtype, 1, 0) for dtype in ("?", "i1", "f2")),
        ("tiff", "f4", np.nan, 1e6),
    ],
)
def test_a_mask_of_any_type_has_the_effect_of_a_boolean_one(
    run, image, stars, put, form, dtype, value, threshold
):
    result = run(image, "--mask", put(block(value, dtype), form), "--maskthresh", threshold)
    assert_same(result, direct(stars, mask=block()))
    assert f"{100 * block().mean():.2f} %" in result.out


@pytest.mark.parametrize(("threshold", "masked"), [(0, 3), (1, 2), (1.5, 2), (-1, 4), (-2.5, None)])
def test_mask_pixels_greater_than_maskthresh_are_masked(run, image, put, threshold, masked):
    mask = np.full(SHAPE, -2, np.int16)
    mask[:40, :40].flat = np.resize([0, 1, 2, 5], 1600)
    result = run(image, "--mask", put(mask), f"--maskthresh={threshold}")
    if masked is None:
        result.assert_refused("image.fits", "every pixel is masked")
    else:
        assert f"{100 * 400 * masked / mask.size:.2f} %" in result.out


def test_mask_joins_what_is_not_finite_and_the_boxes(run, write, stars, put):
    stars[0, :8] = np.nan
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, 4:12] = 1
    result = run(write(stars), "--mask", put(mask), "--mask-box", 10, 15, 0, 0)
    assert f"{100 * 16 / stars.size:.2f} % (8 pixels" in result.out


def test_hdus_of_mask_and_noise_are_chosen_by_name(run, image, stars, tmp_path):
    path, sigma = tmp_path / "others.dat", np.ones(SHAPE, np.float32)
    planes = {"A": block(0, "u1"), "DQ": block(1, "u1"), "BIG": 1e6 * sigma, "ERR": sigma}
    hdus = [fits.ImageHDU(plane, name=name) for name, plane in planes.items()]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    assert len(run(image, "--mask", path).catalog) == 6
    masked = run(image, "--mask", path, "--mask-hdu", "DQ")
    assert_same(masked, direct(stars, mask=block()))
    assert len(run(image, *FILE, path, "--err-hdu", "BIG").catalog) == 0
    assert len(run(image, *FILE, path, "--err-hdu", "ERR").catalog) >= 6


def test_a_stack_of_masks_gives_the_plane_of_the_image_and_one_mask_serves_all(
    run, write, image, stars, put
):
    cube = write(np.stack([stars, stars]), "cube.fits")
    masks = np.stack([np.zeros(SHAPE, np.uint8), block(1, np.uint8)])
    stack = put(masks)
    run(image, "--mask", stack).assert_refused(stack.name, "2 planes", "give a file with one plane")
    assert [len(run(cube, "--plane", k, "--mask", stack).catalog) for k in (0, 1)] == [6, 5]
    assert len(run(cube, "--plane", 1, "--mask", put(masks[1])).catalog) == 5


@pytest.mark.parametrize(
    ("option", "form", "shape"),
    [
        (("--mask",), "tiff", (160, 120)),
        (("--mask",), "fits", (1, 160)),
        (FILE, "fits", (120, 161)),
    ],
)
def test_a_mask_or_noise_of_another_shape_is_refused_with_both(
    run, image, put, option, form, shape
):
    path = put(np.ones(shape, np.uint8), form)
    run(image, *option, path).assert_refused(
        path.name, f"{shape[1]} x {shape[0]} pixels (columns x rows)", "the image has 160 x 120"
    )


# Boxes


@pytest.mark.parametrize(
    ("boxes", "where"),
    [
        ([(0, 0, 0, 0)], [np.s_[:1, :1]]),
        ([(150, 1000, 100, 5000)], [np.s_[100:, 150:]]),
        ([(0, 9, 0, 9), (5, 20, 5, 6)], [np.s_[:10, :10], np.s_[5:7, 5:21]]),
    ],
)
def test_boxes_mask_their_ends_too_and_end_at_the_edge(run, image, stars, boxes, where):
    mask = np.zeros(SHAPE, bool)
    for part in where:
        mask[part] = True
    options = sum((("--mask-box", *box) for box in boxes), ())
    result = run(image, *options, "--bridge", 0)
    assert_same(result, direct(stars, mask=mask))
    assert f"{100 * mask.mean():.2f} %" in result.out


def test_boxes_outside_the_image_and_over_all_of_it_are_refused(run, image):
    for box in ("160 170 0 5", "0 5 120 121"):
        said = f"the mask box {box} (XMIN XMAX YMIN YMAX) lies outside this image of 160 columns"
        run(image, "--mask-box", *box.split()).assert_refused("image.fits", f"{said} and 120 rows")
    run(image, "--mask-box", 0, 159, 0, 119).assert_refused("image.fits", "every pixel is masked")


# Noise


@pytest.mark.parametrize(
    ("kind", "form", "dtype", "filter_type"),
    [
        ("stddev", "fits", "f4", "matched"),
        ("stddev", "tiff", "f8", "conv"),
        ("stddev", "fits", "u2", "matched"),
        ("variance", "tiff", "f8", "matched"),
        ("variance", "fits", "f4", "conv"),
        ("weight", "fits", "f4", "matched"),
        ("weight", "tiff", "f8", "conv"),
    ],
)
def test_the_kinds_of_noise_image_are_equivalent(
    run, write, put, crowded, kind, form, dtype, filter_type
):
    noise = np.linspace(2, 8, crowded.size, dtype=np.float32).reshape(crowded.shape)
    if dtype == "u2":
        noise = np.rint(noise)
    stored = (noise.astype("f8") ** {"stddev": 1, "variance": 2, "weight": -2}[kind]).astype(dtype)
    options = (*FILE, put(stored, form), "--err-type", kind, "--filter-type", filter_type)
    result = run(write(crowded), *options)
    expected = direct(crowded, noise=noise, filter_type=filter_type)
    objects = expected[2]
    assert len(objects) > 20
    if kind == "stddev":
        assert_same(result, expected, filtered=filter_type == "conv")
    np.testing.assert_array_equal(result.catalog["npix"], objects["npix"])
    for name, rtol in (("x", 1e-6), ("flux", 1e-6), ("errx2", 1e-5)):
        np.testing.assert_allclose(result.catalog[name], objects[name], rtol=rtol)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        *(("stddev", bad) for bad in (0, -1, np.nan, np.inf)),
        *(("variance", 0), ("variance", -1), ("variance", -np.inf)),
        *(("weight", bad) for bad in (0, -1, np.nan, np.inf)),
    ],
)
def test_a_bad_noise_value_masks_the_pixel(run, image, stars, put, kind, bad):
    result = run(image, *FILE, put(block(bad, "f4", rest=1)), "--err-type", kind)
    assert_same(result, direct(stars, mask=block(), noise=block(1e30, "f4", rest=1)))
    assert not result.image("segmentation")[BLOCK].any()


@pytest.mark.parametrize(("kind", "value"), [("stddev", 0), ("variance", -3), ("weight", np.nan)])
def test_noise_without_a_usable_value_is_refused(run, image, put, kind, value):
    path = put(np.full(SHAPE, value, np.float32))
    run(image, *FILE, path, "--err-type", kind).assert_refused(path.name, kind)


@pytest.mark.parametrize(("scale", "sigma"), [(1e-20, 1e25), (1e20, 1e-30)])
def test_noise_that_vanishes_beside_the_image_is_refused(run, write, stars, put, scale, sigma):
    image = write((stars * scale).astype(np.float32))
    run(image, *FILE, put(np.full(SHAPE, sigma, np.float32))).assert_refused(image.name, "unit")


# Kernel


def made_kernel(case, fwhm):
    """Return a kernel, once it is known to be fit for SEP, and the distance of its pixels."""
    kernel = make_kernel(case, fwhm, None)
    assert kernel.dtype == np.float32
    assert kernel.flags.c_contiguous
    assert kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1
    middle = len(kernel) // 2
    assert kernel.max() == kernel[middle, middle] > 0
    for turned in (kernel.T, kernel[::-1], kernel[:, ::-1]):
        np.testing.assert_allclose(kernel, turned, rtol=1e-6)
    offsets = np.arange(len(kernel)) - middle
    return kernel, np.hypot(offsets, offsets[:, np.newaxis])


def test_the_default_kernel_none_and_the_narrowest():
    assert make_kernel("none", 2, None) is None
    np.testing.assert_array_equal(make_kernel("default", 2, None), DEFAULT_KERNEL)
    for case in ("gaussian", "tophat"):
        made_kernel(case, 0.01)


@pytest.mark.parametrize("fwhm", [0.8, 1.5, 3.3, 50])
def test_the_gaussian_is_that_of_its_fwhm_averaged_over_pixels(fwhm):
    kernel, _ = made_kernel("gaussian", fwhm)
    side, scale = len(kernel), 2 * math.sqrt(math.log(2)) / fwhm
    edges = [math.erf(scale * (n - side / 2)) for n in range(side + 1)]
    profile = np.diff(edges) * math.sqrt(math.pi) / 2 / scale
    assert side >= 2 * fwhm
    np.testing.assert_allclose(kernel, np.outer(profile, profile), atol=3e-3)
    assert kernel.sum() == pytest.approx(math.pi * fwhm**2 / 4 / math.log(2), rel=0.01)


@pytest.mark.parametrize("diameter", [1, 1.5, 2, 4.6, 50])
def test_the_tophat_has_the_area_of_its_circle(diameter):
    kernel, distance = made_kernel("tophat", diameter)
    assert kernel.sum() == pytest.approx(math.pi * diameter**2 / 4, rel=0.04)
    assert kernel.max() <= 1
    assert (kernel[distance < diameter / 2 - 0.71] == 1).all()
    assert (kernel[distance > diameter / 2 + 0.71] == 0).all()


LOPSIDED = [[0, 1, 2, 0, 0], [1, 3.5, 4, 1, 0], [0, 1, 1e-3, 0, -0.5]]
ROWS = "0 1 2 0 0\n1 3.5 4 1 0\n0 1 1e-3 0 -.5\n"
KERNEL_FILES = {
    "numpy": "# made by numpy\n" + ROWS,
    "conv": "CONV NORM\n# 5x3 lopsided kernel\n" + ROWS,
    "conv not normalized, of Windows": "CONV NONORM\r\n" + ROWS.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("text", KERNEL_FILES.values(), ids=KERNEL_FILES)
def test_a_kernel_file_filters_the_detection(run, image, stars, put, text):
    result = run(image, "--filter-case", "file", "--filter-file", put(text))
    assert_same(result, direct(stars, filter_kernel=np.array(LOPSIDED, np.float32)))


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
        ("1 2 1\n2 1e60 2\n1 2 1\n", "finite"),
        ("0 0 0\n0 0 0\n0 0 0\n", "zero"),
        ("1 2 1\n2 4\n1 2 1\n", "equal length"),
        ("1 2 1\ntwo\n", "numbers"),
        ("CONV NORM\n# nothing\n", ""),
        ("", ""),
        ("".join(map(chr, range(256))), "numbers"),
    ],
    ids=repr,
)
def test_a_kernel_file_that_cannot_be_used_is_refused(run, image, put, content, word):
    path = put(content)
    run(image, "--filter-case", "file", "--filter-file", path).assert_refused(path.name, word)


def test_a_directory_a_missing_file_and_an_image_are_no_kernels(run, image, tmp_path):
    other = tmp_path / "other.fits"
    other.write_bytes(image.read_bytes())
    for path in (tmp_path, tmp_path / "missing.conv", other):
        run(image, "--filter-case", "file", "--filter-file", path).assert_refused(path.name)
