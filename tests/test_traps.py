"""docs/sep.md is true of SEP: each test calls it as a row of the page says that one should not."""

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import sep

import source_extractor

PAGE = (Path(__file__).parent.parent / "docs" / "sep.md").read_text()

pytestmark = pytest.mark.skipif(
    f"SEP {sep.__version__}" not in PAGE, reason="the page tells of another version of SEP"
)

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.count("|") == 5 and not line.startswith(("|---", "| given "))
]

# Rows that no test tries: that would read another's memory, or need a clock.
UNTRIED = ("`fw` or `fh` of -3", "many objects", "many levels", "several threads")

# What ends the interpreter, by the row that it belongs to.
FATAL = {
    "`bw` or `bh` of 0": ["sep.Background(image, bw=-5)"],
    "`deblend_nthresh` of 0": [
        "sep.extract(image, 3, deblend_nthresh=-1)",
        "sep.extract(image, 3, deblend_nthresh=10**6)",
    ],
    "a kernel of shape (0, 0)": [
        "sep.extract(image, 3, filter_kernel=np.zeros((0, 0), np.float32))"
    ],
    "`set_extract_pixstack(0)`": ["sep.set_extract_pixstack(0), sep.extract(image, 3)"],
    "`set_sub_object_limit(-1)`": ["sep.set_sub_object_limit(-1), sep.extract(image, 3)"],
    "a map without labels": [
        "sep.extract(image, 3, segmentation_map=np.zeros(image.shape, np.int32))"
    ],
}

TRIED = [*FATAL]


def trap(given):
    """Mark a test as that of the row which begins with these words."""
    TRIED.append(given)
    return lambda test: test


def test_the_functions_that_work_around_the_traps_exist():
    named = [name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[3])]
    assert len(named) >= len(ROWS) - 5
    for name in named:
        assert attrgetter(name)(source_extractor)


def test_every_row_of_the_traps_is_tried_or_known_not_to_be():
    for row in ROWS:
        assert sum(row[0].startswith(words) for words in (*TRIED, *UNTRIED)) == 1, row[0]
    assert len({*TRIED, *UNTRIED}) == len(ROWS)


STARS = (30.3, 40.2), (80.0, 60.0), (90.0, 20.0)
KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=np.float32)


def star(shape, x, y, height, sigma=2.0):
    rows, columns = np.indices(shape)
    return height * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))


@pytest.fixture
def white():
    """Return noise of sigma 1."""
    return np.random.default_rng(1).normal(0, 1, (500, 500)).astype(np.float32)


@pytest.fixture
def image(white):
    """Return three stars on noise of sigma 1, the brightest in the middle."""
    light = sum(star((100, 120), x, y, h) for (x, y), h in zip(STARS, (40, 60, 30), strict=True))
    return white[:100, :120] + light.astype(np.float32)


@pytest.fixture
def limits():
    """Put SEP's limits back at the end."""
    before = sep.get_extract_pixstack(), sep.get_sub_object_limit()
    yield
    sep.set_extract_pixstack(before[0])
    sep.set_sub_object_limit(before[1])


def peak_of(objects, x):
    """Return the object whose x is nearest."""
    return objects[np.argmin(np.abs(objects["x"] - x))]


def end_of(call, image, directory):
    """Return the exit code of an interpreter that makes a call."""
    np.save(directory / "image.npy", image)
    lines = (
        "import resource, numpy as np, sep",
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
        "image = np.load('image.npy')",
        call,
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode


@pytest.mark.parametrize("call", [call for calls in FATAL.values() for call in calls])
def test_sep_ends_the_interpreter(call, image, tmp_path):
    assert end_of(call, image, tmp_path) < 0


def test_sep_bears_the_most_levels_that_the_tool_takes(image, tmp_path):
    assert end_of("sep.extract(image, 3, deblend_nthresh=64)", image, tmp_path) == 0


@trap("image or mask of int8")
@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "u4", "i8", "u8", "f2", ">f4"])
def test_sep_refuses_types(image, dtype):
    other = np.clip(image, 0, 100).astype(dtype)
    for call in (sep.Background, lambda data: sep.extract(data, 3)):
        with pytest.raises(ValueError, match=r"dtype|byte order"):
            call(other)
    with pytest.raises(ValueError, match=r"dtype|byte order"):
        sep.Background(image, mask=other)


def test_sep_refuses_layouts(image):
    for other in (image[:, ::2], image.T):
        with pytest.raises(ValueError, match="not C-contiguous"):
            sep.extract(other, 3)
    with pytest.raises(ValueError, match="reshape"):
        sep.Background(np.ma.masked_greater(image, 3))


@trap("int32 image")
@pytest.mark.parametrize("level", [1000, -1000])
def test_sep_rounds_the_background_of_int32(white, level):
    counts = np.rint(level + 10 * white).astype(np.int32)
    whole, exact = sep.Background(counts), sep.Background(counts.astype(np.float64))
    assert whole.back().dtype == whole.rms().dtype == np.int32
    np.testing.assert_array_equal(whole.back(), np.trunc(exact.back() + 0.5))
    np.testing.assert_array_equal(whole.rms(), np.trunc(exact.rms() + 0.5))
    wrong = whole.back() != np.rint(exact.back())
    assert (wrong.mean() > 0.9) == (level < 0)


@trap("uint8 or boolean image")
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_sep_has_no_background_of_bytes(image, dtype):
    background = sep.Background(np.clip(image, 0, 255).astype(dtype))
    with pytest.raises(Exception, match="dtype not recognized"):
        background.back()
    assert background.back(dtype=np.float32).any()


@trap("NaN among the pixels")
def test_sep_takes_nan_in_silence(image):
    clean = peak_of(sep.extract(image, 3), 30)
    image[40, 31] = np.nan
    spoilt = peak_of(sep.extract(image, 3), 30)
    assert spoilt["flag"] == clean["flag"] == 0
    assert spoilt["flux"] < 0.8 * clean["flux"]
    flux, _, flag = sep.sum_circle(image, [30], [40], 5)
    assert np.isnan(flux)
    assert flag == 0


@trap("infinity among the pixels")
def test_sep_takes_infinity_in_silence(image):
    image[40, 31] = np.inf
    assert not np.isfinite(sep.Background(image).back()).any()
    spoilt = sep.extract(image, 3)
    assert np.inf in spoilt["flux"]
    assert not spoilt["flag"].any()


@trap("NaN in a floating-point mask")
def test_sep_reads_nan_in_a_mask_two_ways(image):
    mask = np.zeros_like(image)
    mask[30:50, 20:40] = np.nan
    assert len(sep.extract(image, 3, mask=mask)) == 3
    assert len(sep.extract(image, 3, mask=np.isnan(mask))) == 2
    masks = {"none": None, "float": mask, "boolean": np.isnan(mask)}
    levels = {n: sep.Background(image, mask=m, bw=40, bh=50).back() for n, m in masks.items()}
    np.testing.assert_array_equal(levels["float"], levels["boolean"])
    assert (levels["float"] != levels["none"]).any()


@trap("values near the end of float32")
def test_sep_overflows(image):
    image[60, 80] = 1e38
    spoilt = peak_of(sep.extract(image, 3), 80)
    assert spoilt["x2"] == np.inf
    assert np.isnan(spoilt["a"])
    assert np.isnan(spoilt["cxx"])


@trap("values around 1e-20")
def test_sep_loses_tiny_noise(image):
    tiny = image * np.float32(1e-20)
    assert len(sep.extract(tiny, 3, err=1e-20)) == 3
    assert len(sep.extract(tiny, 3, err=np.full_like(tiny, 1e-20))) == 0


@trap("a pedestal of ten million")
def test_sep_loses_noise_on_a_pedestal(image):
    true = sep.Background(image.astype(np.float64)).globalrms
    assert sep.Background(image.astype(np.float64) + 1e7).globalrms < 0.95 * true


@trap("everything masked")
@pytest.mark.parametrize("masked", [1.0, 0.6])
def test_sep_invents_a_background_where_too_much_is_masked(white, masked):
    mask = np.random.default_rng(2).uniform(size=white.shape) < masked
    background = sep.Background(white + 50, mask=mask)
    assert (background.globalback, background.globalrms) == (0, 1)
    assert not background.back().any()
    assert (background.rms() == 1).all()


@trap("a constant image")
def test_sep_invents_noise_of_a_constant_image():
    background = sep.Background(np.full((100, 120), 7, np.float32))
    assert (background.globalback, background.globalrms) == (7, 1)
    assert not background.rms().any()


@trap("`fw` or `fh` of 0 or even")
@pytest.mark.parametrize(("given", "taken"), [(0, 1), (2, 3), (4, 5)])
def test_sep_takes_another_median_filter(white, given, taken):
    maps = [sep.Background(white, bw=20, bh=20, fw=n, fh=n).back() for n in (given, taken, 7)]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[0] != maps[2]).any()


@trap("boxes of 10⁹ x 10⁹")
def test_sep_makes_room_for_whole_boxes(image):
    mask = image > 50
    with pytest.raises(MemoryError):
        sep.Background(image, mask=mask, bw=10**9, bh=10**9)
    assert sep.Background(image, mask=mask, bw=120, bh=100).globalrms > 0


def counts_of(rate):
    return np.random.default_rng(1).poisson(rate, (500, 500)).astype(np.float32)


@trap("integers, or multiples of another quantum")
@pytest.mark.parametrize("quantum", [1, 0.25])
def test_sep_has_the_wrong_level_of_whole_numbers(white, quantum):
    sky = np.float32(100.3) + 2 * white
    whole, exact = (sep.Background(quantum * i).back().mean() for i in (np.rint(sky), sky))
    assert exact / quantum == pytest.approx(100.3, abs=0.01)
    assert whole / quantum == pytest.approx(99.6, abs=0.05)
    assert sep.Background(counts_of(10.6)).back().mean() - 10.6 == pytest.approx(-1.3, abs=0.1)


@trap("photon counts")
@pytest.mark.parametrize("rate", [2.5, 10.6, 50])
def test_sep_has_the_mode_of_photons(white, rate):
    spread = np.random.default_rng(2).uniform(-0.5, 0.5, white.shape).astype(np.float32)
    level = sep.Background(counts_of(rate) + spread).back().mean()
    assert level - rate == pytest.approx(-0.4, abs=0.1)


@trap("fewer than one photon")
@pytest.mark.parametrize("rate", [0.03, 0.1, 0.3, 0.6])
def test_sep_finds_sources_in_sparse_photons(rate):
    background = sep.Background(counts := counts_of(rate))
    light, noise = counts - background.back(), background.globalrms
    assert len(sep.extract(light, 1.5, err=noise, filter_kernel=KERNEL)) > 200


@trap("a source that fills boxes")
@pytest.mark.parametrize(("sigma", "kept"), [(20, 0.97), (40, 0.78), (100, 0.13)])
def test_sep_takes_a_large_source_for_the_background(white, sigma, kept):
    light = star(white.shape, 250, 250, 10, sigma)
    background = sep.Background((white + light).astype(np.float32))
    inside = light > 0.1
    assert (light + white - background.back())[inside].sum() / light[inside].sum() == (
        pytest.approx(kept, abs=0.02)
    )


@trap("quiet boxes beside noisy ones")
def test_sep_has_rms_below_zero(white):
    white[:, :125] = 0
    assert sep.Background(white, bw=32, bh=32, fw=1, fh=1).rms().min() < 0


@trap("a kernel that is not C-contiguous")
def test_sep_loses_a_transposition(image):
    kernel = np.arange(9, dtype=np.float32).reshape(3, 3)
    fluxes = [
        sep.extract(image, 3, filter_kernel=k)["cflux"] for k in (kernel, kernel.T, kernel.T.copy())
    ]
    np.testing.assert_array_equal(fluxes[0], fluxes[1])
    assert (fluxes[0] != fluxes[2]).all()


@trap("a kernel with NaN")
@pytest.mark.parametrize("value", [np.nan, 0])
def test_sep_finds_nothing_with_a_useless_kernel(image, value):
    assert len(sep.extract(image, 3, filter_kernel=KERNEL)) == 3
    assert len(sep.extract(image, 3, filter_kernel=KERNEL * np.float32(value))) == 0


@trap("a kernel with an even number")
@pytest.mark.parametrize(("size", "shift"), [(2, 0.5), (3, 0), (4, 0.5)])
def test_sep_shifts_by_an_even_kernel(image, size, shift):
    objects = sep.extract(image, 3, filter_kernel=np.ones((size, size), np.float32))
    for x, y in STARS:
        found = peak_of(objects, x)
        assert found["x"] - x == pytest.approx(shift, abs=0.1)
        assert found["y"] - y == pytest.approx(shift, abs=0.1)


@trap("bright pixels masked in the first rows")
def test_sep_filters_the_first_rows_without_the_mask(white):
    mask = np.zeros(white.shape, bool)
    mask[0, 20:30] = True
    white[mask] = 1000
    (found,) = sep.extract(white, 5, mask=mask)
    assert found["peak"] == 1000
    white[mask] = 0
    assert len(sep.extract(white, 5, mask=mask)) == 0


@trap("more than 300000 pixels")
def test_sep_runs_out_of_pixels(limits):
    bright = np.full((550, 550), 10, np.float32)
    sep.set_extract_pixstack(300_000)
    with pytest.raises(Exception, match="internal pixel buffer full"):
        sep.extract(bright, 3, deblend_nthresh=1)
    sep.set_extract_pixstack(bright.size + 2)
    assert len(sep.extract(bright, 3, deblend_nthresh=1)) == 1


@trap("a source of many peaks")
def test_sep_runs_out_of_sub_objects(limits):
    peaks = np.full((100, 100), 10, np.float32)
    peaks[::3, ::3] = 60
    options = {"minarea": 1, "deblend_cont": 0, "clean": False, "filter_kernel": None}
    sep.set_sub_object_limit(1024)
    with pytest.raises(Exception, match="object deblending overflow"):
        sep.extract(peaks, 3, **options)
    sep.set_sub_object_limit(32767)
    assert len(sep.extract(peaks, 3, **options)) == 34**2


@trap("noise as a scalar")
def test_sep_ignores_the_filter_type_with_a_scalar(white):
    matched, conv = (sep.extract(white, 0.8, err=1.0, filter_type=t) for t in ("matched", "conv"))
    assert len(conv) > 10
    np.testing.assert_array_equal(matched, conv)


@trap("noise as an array, `matched`")
def test_sep_goes_deeper_with_a_matched_filter(image, white):
    ones = np.ones_like(white)
    assert len(sep.extract(white, 1.5, err=1.0)) == 0
    assert len(sep.extract(white, 1.5, err=ones, filter_type="conv")) == 0
    assert len(sep.extract(white, 1.5, err=ones)) > 100
    depth = KERNEL.sum() / np.sqrt(np.square(KERNEL).sum())
    assert depth == pytest.approx(2.67, abs=0.005)
    deep = sep.extract(image, 1.5 * float(depth), err=np.ones_like(image))
    np.testing.assert_array_equal(deep["npix"], sep.extract(image, 1.5, err=1.0)["npix"])


@trap("noise of 0 or less")
def test_sep_takes_noise_that_is_none(image):
    ones, signs, gap = np.ones((3, *image.shape), np.float32)
    signs[30:50, 20:40] = -1
    squared, positive = sep.extract(image, 3, err=signs), sep.extract(image, 3, err=ones)
    np.testing.assert_array_equal(squared["npix"], positive["npix"])
    gap[30:50, 20:40] = 0
    sizes = [
        peak_of(sep.extract(image, 3, err=e, filter_type="conv"), 30)["npix"] for e in (ones, gap)
    ]
    assert sizes[1] > 2 * sizes[0]


@trap("`clean=True` with noise as an array")
def test_sep_cleans_real_stars_away():
    field = np.random.default_rng(1).normal(0, 1, (600, 600))
    at = [(x, y) for x in range(20, 600, 40) for y in range(20, 600, 40)]
    reach, (rows, columns) = 20, np.mgrid[-20:20, -20:20]
    for x, y in at:
        stamp = field[y - reach : y + reach, x - reach : x + reach]
        stamp += 200 * np.exp(-(columns**2 + rows**2) / 8)
        if 20 < x < 580 and 20 < y < 580:
            stamp += 5 * np.exp(-((columns - 14) ** 2 + rows**2) / 8)
    field = field.astype(np.float32)
    noise = np.ones_like(field)
    for thresh, err, clean, stars in (
        (4, noise, False, 394),
        (4, noise, True, 225),
        (1.5, 1.0, True, 394),
    ):
        assert len(sep.extract(field, thresh, err=err, clean=clean)) == stars


@trap("a mask, and a filter")
def test_sep_grows_over_masked_pixels(image):
    mask = np.zeros(image.shape, bool)
    mask[60, 78:83] = True
    objects, labels = sep.extract(image, 3, mask=mask, segmentation_map=True)
    assert labels[mask].all()
    assert peak_of(objects, 80)["npix"] == np.sum(labels == labels[60, 80])


@trap("`clean=True`, an object of `minarea` pixels")
def test_sep_cleans_by_how_the_image_lies(white):
    options = {"err": 1.0, "filter_kernel": None, "deblend_nthresh": 1}
    there, back = (sep.extract(i, 0.8, **options) for i in (white, white.T.copy()))
    uncleaned = [len(sep.extract(i, 0.8, clean=False, **options)) for i in (white, white.T.copy())]
    assert uncleaned[0] == uncleaned[1]
    places = {*zip(there["xpeak"], there["ypeak"], strict=True)}
    assert places != {*zip(back["ypeak"], back["xpeak"], strict=True)}


@trap("`theta` a hair above")
def test_sep_refuses_an_angle_of_its_own():
    line = np.zeros((40, 40), np.float32)
    line[5:30, 20] = 100
    shapes = [
        sep.extract(line, 1, filter_kernel=None)[name] for name in ("x", "y", "a", "b", "theta")
    ]
    assert 0 < shapes[4][0] - np.pi / 2 < 1e-7
    with pytest.raises(Exception, match="invalid aperture parameters"):
        sep.sum_ellipse(line, *shapes, 3)
    shapes[4] = np.array([np.pi / 2])
    assert sep.sum_ellipse(line, *shapes, 3)[0] > 0


@trap("`a` less than `b`")
@pytest.mark.parametrize(("a", "b"), [(2, 3), (np.nan, 2)])
def test_sep_refuses_all_for_one_shape(image, a, b):
    assert (sep.sum_ellipse(image, [30, 80], [40, 60], [3, 3], [2, 2], [0, 0], 2.5)[0] > 0).all()
    with pytest.raises(Exception, match="invalid aperture parameters"):
        sep.sum_ellipse(image, [30, 80], [40, 60], [3, a], [2, b], [0, 0], 2.5)


@trap("radius 0")
def test_sep_takes_a_radius_of_zero(image):
    flux, _, flag = sep.sum_circle(image, [30, 30.3], [40, 40.2], 0)
    assert flux[0] == pytest.approx(image[40, 30])
    assert flux[1] == 0
    assert not flag.any()


@pytest.fixture
def pair(image):
    """Return two stars that overlap, their map, and the label of the left one."""
    image += star(image.shape, 38, 40, 50).astype(np.float32)
    objects, labels = sep.extract(image, 3, segmentation_map=True)
    left = int(np.argmin(np.hypot(objects["x"] - 30.3, objects["y"] - 40.2)))
    return image, labels, left + 1


@trap("`mask=` beside `segmap=`")
def test_sep_scales_up_for_neighbours_with_a_mask(pair):
    image, labels, label = pair
    others = {"segmap": labels, "seg_id": [label]}
    flux = sep.sum_circle(image, [30.3], [40.2], 8, **others)[0]
    nothing = np.zeros(image.shape, bool)
    assert sep.sum_circle(image, [30.3], [40.2], 8, mask=nothing, **others)[0] > 1.1 * flux


@trap("labels from 2²⁴")
def test_sep_confuses_large_labels(image):
    def measure(left, right):
        labels = np.where(np.arange(image.shape[1]) < 33, left, right).astype(np.int32)
        labels = np.broadcast_to(labels, image.shape).copy()
        return sep.sum_circle(image, [30], [40], 8, segmap=labels, seg_id=[left])

    assert measure(2**24, 2**24 + 1)[0] == sep.sum_circle(image, [30], [40], 8)[0]
    assert measure(1, 2)[0] == measure(2**24, 2**30)[0] < 0.95 * measure(2**24, 2**24 + 1)[0]


@trap("an aperture in which `segmap`")
def test_sep_sums_nothing_in_silence(image):
    others = {"segmap": np.full(image.shape, 7, np.int32), "seg_id": [1]}
    flux, error, flag = sep.sum_circle(image, [30], [40], 5, err=1.0, **others)
    assert (flux, error, flag) == (0, 0, sep.APER_HASMASKED)


@trap("`flux_radius` where")
def test_sep_gives_the_limit_for_a_radius(image):
    flux = sep.sum_circle(image, [30.3], [40.2], 10)[0]
    radius, flag = sep.flux_radius(image, [30.3], [40.2], [12], 0.5, normflux=3 * flux)
    assert (radius, flag) == (12, 0)


@trap("`kron_radius` over noise")
def test_sep_has_kron_radii_beyond_their_ellipse(white):
    x, y = np.random.default_rng(2).uniform(20, 480, (2, 300))
    shape = np.full(300, 2.0)
    radius, _ = sep.kron_radius(white, x, y, shape, shape, np.zeros(300), 6.0)
    assert radius.max() > 12


@trap("`winpos` beside")
def test_sep_runs_to_a_brighter_neighbour(image):
    assert sep.winpos(image, [30.3], [40.2], [2.5])[0] == pytest.approx(30.3, abs=0.1)
    image += star(image.shape, 38, 40, 400).astype(np.float32)
    x, _, flag = sep.winpos(image, [30.3], [40.2], [2.5])
    assert x == pytest.approx(38, abs=0.1)
    assert flag == 0


@trap("a blend, elsewhere")
def test_sep_deals_out_pixels_by_lots_of_each_call():
    shape = 80, 70
    blend = star(shape, 30, 40, 400) + star(shape, 38, 40, 300)
    image = np.tile(blend, (2, 1)).astype(np.float32)
    both = [sep.extract(part, 0.5, segmentation_map=True)[1] for part in (image, image[:80])]
    first, second = np.split(both[0], 2)
    assert first.max() == 2
    assert (first == both[1]).all()
    assert (first > 0).tolist() == (second > 0).tolist()
    assert (first != second - 2 * (second > 0)).any()
