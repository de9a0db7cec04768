"""The traps of SEP that docs/sep.md lists: what SEP itself does where this tool avoids it."""

import subprocess
import sys

import numpy as np
import pytest
import sep
from numpy.testing import assert_array_equal

from sky import blobs

pytestmark = [
    pytest.mark.sep,
    pytest.mark.skipif(sep.__version__ != "1.4.1", reason="the page is about SEP 1.4.1"),
]

STARS = (30.3, 40.2), (80.0, 60.0), (90.0, 20.0)
SHAPE = 100, 120


def star(shape, x, y, height, sigma=2.0):
    return blobs(shape, (x, y), level=0, noise=0, peak=height, a=sigma, b=sigma)


def nearest_in_x(objects, x):
    return objects[np.argmin(np.abs(objects["x"] - x))]


def box(inside=1, outside=0):
    """Return an image of `outside`, with `inside` in a box around the first star."""
    image = np.full(SHAPE, outside, np.float32)
    image[30:50, 20:40] = inside
    return image


@pytest.fixture
def white():
    """Return noise of sigma 1."""
    return np.random.default_rng(1).normal(0, 1, (500, 500)).astype(np.float32)


@pytest.fixture
def image(white):
    """Return three stars on noise of sigma 1, the brightest in the middle."""
    light = sum(star(SHAPE, x, y, h) for (x, y), h in zip(STARS, (40, 60, 30), strict=True))
    return white[:100, :120] + light.astype(np.float32)


@pytest.mark.parametrize(
    ("call", "fatal"),
    [
        ("sep.Background(image, bw=-5)", True),
        ("sep.extract(image, 3, deblend_nthresh=64)", False),
        ("sep.extract(image, 3, deblend_nthresh=-1)", True),
        ("sep.extract(image, 3, deblend_nthresh=10**6)", True),
        ("sep.extract(image, 3, filter_kernel=np.zeros((0, 0), np.float32))", True),
        ("sep.set_extract_pixstack(0), sep.extract(image, 3)", True),
        ("sep.set_sub_object_limit(-1), sep.extract(image, 3)", True),
        ("sep.extract(image, 3, segmentation_map=np.zeros(image.shape, np.int32))", True),
    ],
)
def test_some_calls_end_the_interpreter(call, fatal, image, tmp_path):
    np.save(tmp_path / "image.npy", image)
    no_dump = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    code = f"{no_dump}; import numpy as np, sep; image = np.load('image.npy'); {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert (done.returncode < 0) == fatal


def upright_line():
    line = np.zeros((40, 40), np.float32)
    line[5:30, 20] = 100
    (found,) = sep.extract(line, 1, filter_kernel=None)
    assert 0 < found["theta"] - np.pi / 2 < 1e-7
    *shape, theta = ([found[name]] for name in ("x", "y", "a", "b", "theta"))
    assert sep.sum_ellipse(line, *shape, [np.pi / 2], 3)[0] > 0
    sep.sum_ellipse(line, *shape, theta, 3)


def one_bad_shape(a, b):
    sep.sum_ellipse(np.ones(SHAPE), [30, 80], [40, 60], [3, a], [2, b], [0, 0], 2.5)


@pytest.mark.parametrize(
    "call", [upright_line, lambda: one_bad_shape(2, 3), lambda: one_bad_shape(np.nan, 2)]
)
def test_shapes_that_sep_does_not_expect_raise(call):
    with pytest.raises(Exception, match="invalid aperture parameters"):
        call()


# Arrays


def test_nan_and_infinity_spoil_results_without_a_flag(image):
    clean = nearest_in_x(sep.extract(image, 3), 30)
    image[40, 31] = np.nan
    spoilt = nearest_in_x(sep.extract(image, 3), 30)
    assert spoilt["flag"] == clean["flag"] == 0
    assert spoilt["flux"] < 0.8 * clean["flux"]
    flux, _, flag = sep.sum_circle(image, [30], [40], 5)
    assert np.isnan(flux)
    assert flag == 0
    image[40, 31] = np.inf
    assert not np.isfinite(sep.Background(image).back()).any()


def test_nan_in_a_mask_is_masked_for_the_background_only(image):
    masks = box(np.nan), box() > 0
    assert [len(sep.extract(image, 3, mask=mask)) for mask in masks] == [3, 2]
    assert_array_equal(*(sep.Background(image, mask=m, bw=40, bh=50).back() for m in masks))


def test_numbers_overflow_vanish_or_are_rounded(image):
    tiny = image * np.float32(1e-20)
    assert len(sep.extract(tiny, 3, err=1e-20)) == 3
    assert len(sep.extract(tiny, 3, err=np.full_like(tiny, 1e-20))) == 0
    wide = image.astype(np.float64)
    assert sep.Background(wide + 1e7).globalrms < 0.95 * sep.Background(wide).globalrms
    image[60, 80] = 1e38
    assert np.isnan(nearest_in_x(sep.extract(image, 3), 80)["a"])


# Background


@pytest.mark.parametrize(
    ("sky", "masked", "level", "global_rms", "rms"),
    [(50, 1.0, 0, 1, 1), (50, 0.6, 0, 1, 1), (7, 0.0, 7, 1, 0)],
)
def test_without_enough_pixels_or_noise_the_noise_is_1(white, sky, masked, level, global_rms, rms):
    mask = np.random.default_rng(2).uniform(size=white.shape) < masked
    background = sep.Background(sky + white * (masked > 0), mask=mask)
    assert (background.globalback, background.globalrms) == (level, global_rms)
    assert (background.back() == level).all()
    assert (background.rms() == rms).all()


def test_the_level_of_counts_is_wrong_and_sparse_ones_hold_sources(white):
    rng = np.random.default_rng(1)
    sky, spread = 100.3 + 2 * white, rng.uniform(-0.5, 0.5, white.shape)
    few, many, sparse = (rng.poisson(rate, white.shape) for rate in (10.6, 50, 0.1))
    for image, level, error in (
        *((sky, 100.3, 0.01), (np.rint(sky), 99.6, 0.05)),
        *((few, 9.3, 0.1), (many + spread, 49.6, 0.1)),
    ):
        background = sep.Background(image.astype(np.float32))
        assert background.back().mean() == pytest.approx(level, abs=error)
    background = sep.Background(sparse.astype(np.float32))
    residual = (sparse - background.back()).astype(np.float32)
    assert len(sep.extract(residual, 1.5, err=background.globalrms)) > 200


def test_rms_may_be_below_zero(white):
    white[:, :125] = 0
    assert sep.Background(white, bw=32, bh=32, fw=1, fh=1).rms().min() < 0


# Detection


def test_a_kernel_loses_its_transposition_and_an_even_one_shifts_sources(image):
    kernel = np.arange(9, dtype=np.float32).reshape(3, 3)
    given, turned, copied = (
        sep.extract(image, 3, filter_kernel=k)["cflux"] for k in (kernel, kernel.T, kernel.T.copy())
    )
    assert_array_equal(given, turned)
    assert (given != copied).all()
    for size, shift in ((2, 0.5), (3, 0)):
        objects = sep.extract(image, 3, filter_kernel=np.ones((size, size), np.float32))
        for x, y in STARS:
            found = nearest_in_x(objects, x)
            assert (found["x"] - x, found["y"] - y) == pytest.approx((shift, shift), abs=0.1)


def test_masked_pixels_are_detected_in_the_first_rows_and_objects_grow_over_them(white, image):
    mask = np.zeros(white.shape, bool)
    mask[0, 20:30] = True
    white[mask] = 1000
    (found,) = sep.extract(white, 5, mask=mask)
    assert found["peak"] == 1000
    white[mask] = 0
    assert len(sep.extract(white, 5, mask=mask)) == 0
    mask = np.zeros(SHAPE, bool)
    mask[60, 78:83] = True
    objects, labels = sep.extract(image, 3, mask=mask, segmentation_map=True)
    assert labels[mask].all()
    assert nearest_in_x(objects, 80)["npix"] == np.sum(labels == labels[60, 80])


def test_noise_of_0_or_less_is_taken(image):
    ones, signs, gap = np.ones_like(image), box(-1, 1), box(0, 1)
    assert_array_equal(*(sep.extract(image, 3, err=err)["npix"] for err in (signs, ones)))
    found = (sep.extract(image, 3, err=err, filter_type="conv") for err in (ones, gap))
    all_good, with_gap = (nearest_in_x(objects, 30)["npix"] for objects in found)
    assert with_gap > 2 * all_good


def test_real_stars_are_cleaned_away_with_noise_as_an_array():
    stamp = star((40, 40), 20, 20, 200)
    field = np.random.default_rng(1).normal(0, 1, (600, 600)) + np.tile(stamp, (15, 15))
    field[40:560, 40:560] += np.tile(star((40, 40), 34, 20, 5), (13, 13))
    field = field.astype(np.float32)
    ones = np.ones_like(field)
    for thresh, err, clean, count in ((4, ones, 0, 394), (4, ones, 1, 225), (1.5, 1.0, 1, 394)):
        assert len(sep.extract(field, thresh, err=err, clean=clean)) == count


def test_faint_pixels_of_a_blend_are_assigned_at_random_in_each_call():
    shape = 80, 70
    blend = star(shape, 30, 40, 400) + star(shape, 38, 40, 300)
    image = np.tile(blend, (2, 1)).astype(np.float32)
    both, alone = (sep.extract(part, 0.5, segmentation_map=True)[1] for part in (image, image[:80]))
    first, second = np.split(both, 2)
    assert first.max() == 2
    assert (first == alone).all()
    assert (first > 0).tolist() == (second > 0).tolist()
    assert (first != second - 2 * (second > 0)).any()


# Apertures and positions


def test_a_mask_beside_labels_scales_sums_up_and_large_labels_are_confused(image):
    def flux(left, right, **mask):
        labels = np.tile(np.where(np.arange(120) < 33, left, right).astype(np.int32), (100, 1))
        return sep.sum_circle(image, [30], [40], 8, segmap=labels, seg_id=[left], **mask)[0]

    assert flux(1, 2, mask=np.zeros(SHAPE, bool)) > 1.1 * flux(1, 2)
    assert flux(2**24, 2**24 + 1) == sep.sum_circle(image, [30], [40], 8)[0]
    assert flux(1, 2) == flux(2**24, 2**30) < 0.95 * flux(2**24, 2**24 + 1)


def test_fluxes_and_radii_that_are_not_known_have_a_value(image, white):
    others = {"segmap": np.full(image.shape, 7, np.int32), "seg_id": [1]}
    flux, error, flag = sep.sum_circle(image, [30], [40], 5, err=1.0, **others)
    assert (flux, error, flag) == (0, 0, sep.APER_HASMASKED)
    flux = sep.sum_circle(image, [30.3], [40.2], 10)[0]
    radius, flag = sep.flux_radius(image, [30.3], [40.2], [12], 0.5, normflux=3 * flux)
    assert (radius, flag) == (12, 0)
    x, y = np.random.default_rng(2).uniform(20, 480, (2, 300))
    radius, _ = sep.kron_radius(white, x, y, *np.full((2, 300), 2.0), np.zeros(300), 6.0)
    assert radius.max() > 12  # its ellipse ends at 6


def test_windowed_positions_move_to_a_brighter_neighbour(image):
    assert sep.winpos(image, [30.3], [40.2], [2.5])[0] == pytest.approx(30.3, abs=0.1)
    image += star(image.shape, 38, 40, 400).astype(np.float32)
    x, _, flag = sep.winpos(image, [30.3], [40.2], [2.5])
    assert x == pytest.approx(38, abs=0.1)
    assert flag == 0
