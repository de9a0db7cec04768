"""What cleaning drops and keeps, and what becomes of objects that reach over the mask."""

import time

import numpy as np
import pytest
import sep
from numpy.testing import assert_allclose

import source_extractor
from common import DATA, field_of, rows_at
from same_as_sep import CUT, DEFAULT_KERNEL, clean_plainly, correlate, margins
from sky import grid_positions, light, stars, vstack
from source_extractor import close_pairs, filter_pixels, find_sources, make_kernel, read_image
from truth import nearest

FWHM = 3.0
NOISE_AREA = FWHM * np.sqrt(np.pi / np.log(4))  # a star's S/N is its flux over so many noises


def white(shape, seed):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def crowded(count, seed, side=400, widest=9.4):
    """Return stars of many fluxes and widths in noise of sigma 1."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(20, side - 20, (2, count))
    flux, fwhm = 10 ** rng.uniform(1, 4, count), rng.uniform(2.8, widest, count)
    return white((side, side), seed) + light((side, side), stars(x, y, flux, fwhm=fwhm))


def deep_field():
    """Return the deep field, its counts spread over their quantum, so that SEP gets its level."""
    _, counts = read_image(DATA / "hubble_deep_field.tiff", None, 0)
    return counts + np.random.default_rng(10).uniform(-0.5, 0.5, counts.shape).astype(np.float32)


@pytest.mark.parametrize("gap", [12, 24])
@pytest.mark.parametrize("fwhm", [None, 3])
def test_faint_stars_beside_bright_ones_are_found_with_a_noise_image(gap, fwhm):
    kernel = make_kernel("gaussian", fwhm, None) if fwhm else DEFAULT_KERNEL
    depth = float(np.abs(kernel).sum() / np.sqrt(np.square(kernel).sum()))
    shape = (950, 950)
    x, y = grid_positions(shape, 50)
    pairs = [stars(x, y, 100 * NOISE_AREA), stars(x + gap, y, 15 * NOISE_AREA)]
    image = white(shape, 0) + light(shape, vstack(pairs))
    for option, thresh in (("array_rms", 4.0), ("float_globalrms", 4.0 / depth)):
        objects = find_sources(field_of(image, kernel, option, thresh=thresh)).objects
        bright, faint = (np.mean(nearest(pair, objects)[1] < 2) for pair in pairs)
        assert bright == 1
        assert faint >= 0.99


# Against SExtractor's way, and SEP's

SETTINGS = {
    "defaults": {},
    "small": {"thresh": 1.0, "minarea": 3},
    "single pixels": {"thresh": 1.2, "minarea": 1, "clean_param": 2.5},
    "steep": {"thresh": 1.2, "clean_param": 0.4},
    "flat profiles": {"clean_param": 0.1},
    "no filter": {"thresh": 1.0, "kernel": None},
    "RMS map": {"err_option": "array_rms", "filter_type": "conv"},
    "absolute": {"err_option": "none", "thresh": 1.8},
}
IMAGES = {
    "fuller": lambda: crowded(150, 2),
    "crowded": lambda: crowded(600, 3),
    "wide sources": lambda: crowded(150, 11, widest=19.0),
    "noise": lambda: crowded(0, 12),
    "photons": lambda: np.random.default_rng(13).poisson(5 + crowded(100, 13).clip(0)) * 1.0,
    "sky": lambda: read_image(DATA / "sky.fits")[1],
    "mosaic": lambda: read_image(DATA / "mosaic.fits")[1],
    "stack": lambda: read_image(DATA / "stack.fits", None, 0)[1],
    "deep field": deep_field,
}


def places(objects):
    return set(zip(objects["xpeak"], objects["ypeak"], strict=True))


@pytest.mark.parametrize(
    ("image", "settings"),
    [*((image, "defaults") for image in IMAGES), *(("fuller", name) for name in [*SETTINGS][1:])],
)
def test_cleaning_keeps_what_sep_keeps(image, settings):
    image, settings = IMAGES[image](), {"err_option": "float_globalrms", **SETTINGS[settings]}
    field = field_of(image, **settings)
    found = places(find_sources(field).objects)
    noise, beta = settings.pop("err_option"), settings.pop("clean_param", 1.0)
    keywords = {
        "thresh": settings.pop("thresh", 1.5),
        "err": None if noise == "none" else field.noise,
        "filter_kernel": settings.pop("kernel", DEFAULT_KERNEL),
        **settings,
    }
    expected = places(sep.extract(field.residual, **keywords, clean_param=beta))
    limit = 0.07 if keywords["filter_kernel"] is None else 0.04
    assert len(expected ^ found) <= limit * len(expected) + 1
    # The rest is that of SEP's heap: done pair by pair, the same are kept.
    objects, labels = sep.extract(field.residual, **keywords, clean=False, segmentation_map=True)
    if len(objects) < 500:
        margin = margins(objects, labels, field.residual, mask=None, **keywords)
        arguments = objects, labels, field.residual, margin, settings.get("minarea", 5), beta
        assert places(clean_plainly(*arguments)[0]) == found


@pytest.mark.parametrize("err_option", ["float_globalrms", "array_rms"])
def test_a_large_kernel_filters_as_a_small_one(monkeypatch, err_option):
    field = field_of(crowded(50, 14, side=90), make_kernel("gaussian", 5.0, None), err_option)
    where = np.flatnonzero(np.random.default_rng(14).random(field.mask.shape) < 0.3)
    filtered = []
    for limit in (0, 10**6):
        monkeypatch.setattr(source_extractor, "LARGE_KERNEL", limit)
        filtered.append(filter_pixels(field, where, np.zeros(len(where), int)))
    by_fourier, directly = filtered
    for name in directly.dtype.names:
        assert_allclose(by_fourier[name], directly[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("portion", [1, 2**18])
def test_all_pairs_that_reach_each_other_are_met_once(monkeypatch, portion):
    monkeypatch.setattr(source_extractor, "CHUNK", portion)
    rng = np.random.default_rng(5)
    x, y = rng.uniform(-5, 300, (2, 200))
    reach = 10 ** rng.uniform(-1, 2, 200)
    x[7] = reach[8] = np.nan
    pairs = [pair for i, j in close_pairs(x, y, reach) for pair in zip(i, j, strict=True)]
    assert len(pairs) == len(set(pairs))
    i, j = np.triu_indices(200, 1)
    near = np.hypot(x[i] - x[j], y[i] - y[j]) <= reach[i] + reach[j]
    assert set(zip(i[near], j[near], strict=True)) == set(pairs)


def test_the_number_of_pairs_grows_as_that_of_objects():
    count, rng = 50_000, np.random.default_rng(6)
    x, y = rng.uniform(0, np.sqrt(count) * 5, (2, count))
    reach = np.full(count, 5.0)
    reach[:5] = 1e3
    assert sum(len(i) for i, _ in close_pairs(x, y, reach)) < 30 * count


def test_thousands_of_noise_peaks_are_cleaned_within_seconds():
    field = field_of(white((1000, 1000), 7), thresh=0.5, minarea=1)
    start = time.process_time()
    objects = find_sources(field).objects
    assert time.process_time() - start < 10
    assert 15_000 < len(objects) < 27_000


def test_the_threshold_with_a_noise_image_is_the_level_of_the_isophote(run, write):
    image = crowded(100, 8)
    result = run(write(image), "--err-option", "array_rms", "--thresh", 4, "--deblend-nthresh", 1)
    catalog, labels = result.catalog, result.image("segmentation")
    residual = image - result.image("background")
    filtered = correlate(residual, DEFAULT_KERNEL / DEFAULT_KERNEL.sum())
    inside = [filtered[2:-2, 2:-2][labels[2:-2, 2:-2] == i].min() for i in catalog["id"]]
    assert np.median(inside / catalog["thresh"]) == pytest.approx(1.1, abs=0.1)


# Masked pixels, none of them bridged


def test_objects_keep_what_is_not_masked(run, write):
    image = white((120, 160), 2) + light((120, 160), stars(80, 60, 1000))
    image[18:23, 18:23] = 300
    image[19:22, 19:22] = np.nan  # its rim stays, and is one object
    image[39:44, 39:44] = np.nan
    image[41, 41] = 300  # alone in the middle of the mask
    result = run(write(image), "--thresh", 5, "--deblend-nthresh", 1, "--bridge", 0)
    found = rows_at(result.catalog, [20, 41, 80], [20, 41, 60])
    assert list(found["npix"][:2]) == [40, 1]
    assert list(found["flag"].astype(int) & CUT) == [CUT, CUT, 0]


def test_an_object_of_masked_pixels_alone_is_dropped():
    image = white((60, 80), 3)
    image[20, [19, 21]] = 1000
    image[40, 50] = 2000
    mask = np.zeros(image.shape, bool)
    mask[20, 20] = True
    kernel = np.array([[1, 0, 1]], np.float32)  # sees on each pixel the two beside it
    settings = {"kernel": kernel, "err_option": "none", "thresh": 800.0, "minarea": 1}
    field = field_of(image, mask=mask, **settings)
    before = sep.extract(field.residual, 800, mask=mask, filter_kernel=kernel, minarea=1)
    objects, labels = find_sources(field)
    assert list(before["xcpeak"]) == [20, 49, 51]
    assert list(objects["xcpeak"]) == [49, 51]
    assert (labels[40, 49], labels[40, 51], labels[20, 20]) == (1, 2, 0)
    assert np.count_nonzero(labels) == 2
