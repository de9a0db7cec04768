"""The pictures: what is drawn where, and that it can be seen."""

import warnings

import numpy as np
import pytest
from astropy.io import fits
from matplotlib import image as mpl_image
from skimage.measure import block_reduce

import source_extractor
from common import NX, SHAPE
from sky import blobs


@pytest.fixture
def coarse_pictures():
    """Draw pictures with all their pixels here."""


def is_red(rgb):
    red, green, blue = np.moveaxis(rgb, 2, 0)
    return (red > 0.6) & (green < 0.4) & (blue < 0.4)


class Picture:
    """A PNG of one panel, with its pixels found by the image's x and y."""

    def __init__(self, path, shape):
        self.shape, self.rgb = shape, mpl_image.imread(path)[..., :3]
        dark = self.rgb.max(axis=2) < 0.25
        columns, rows = (
            np.flatnonzero(dark.sum(axis) > 0.9 * dark.sum(axis).max()) for axis in (0, 1)
        )
        self.left, self.right, self.top, self.bottom = columns[0], columns[-1], rows[0], rows[-1]
        self.scale = (self.right - self.left) / shape[1]
        self.red = is_red(self.rgb)
        self.blue = self.rgb[..., 2] > self.rgb[..., 0] + 0.1  # under a blue tint
        # How many pixels are written on above the frame.
        self.title = np.count_nonzero(self.rgb[: self.top - 2].max(axis=2) < 0.5)
        self.colour = np.ptp(self.rgb, axis=2)

    def at(self, layer):
        """Return a layer at the centres of the image's pixels, as an array of the image's shape."""
        return layer[self.place(*np.indices(self.shape)[::-1])]

    def position(self, where):
        """Return the mean x and y, in the image's pixels, of the picture's pixels `where`."""
        rows, columns = np.nonzero(where)
        x = (columns.mean() - self.left) / self.scale - 0.5
        return x, (self.bottom - rows.mean()) / self.scale - 0.5

    def place(self, x, y):
        """Return the row and column in the picture of the image's x and y."""
        rows, columns = self.bottom - (y + 0.5) * self.scale, self.left + (x + 0.5) * self.scale
        return np.rint(rows).astype(int), np.rint(columns).astype(int)


@pytest.mark.parametrize("theta", [0.5, -1.0])
def test_ellipses_of_6a_by_6b_are_drawn_around_every_source(run, write, theta):
    centres = [(40, 30), (110.5, 80.25), (30, 95)]
    result = run(write(blobs(SHAPE, *centres, peak=200, a=5, b=2, theta=theta)), "--thresh", 8)
    assert len(result.catalog) == 3
    assert result.catalog["theta"].to_numpy() == pytest.approx(theta, abs=0.05)
    picture = Picture(result.directory / "sources.png", SHAPE)
    red = picture.red
    near = sum(np.roll(red, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) > 0
    angle = np.linspace(0, 2 * np.pi, 60)
    for source in result.catalog.itertuples():
        along, across = 3 * source.a * np.cos(angle), 3 * source.b * np.sin(angle)
        dx = along * np.cos(source.theta) - across * np.sin(source.theta)
        dy = along * np.sin(source.theta) + across * np.cos(source.theta)
        assert near[picture.place(source.x + dx, source.y + dy)].mean() > 0.95
        inner = picture.place(source.x + 0.6 * dx, source.y + 0.6 * dy)
        assert red[inner].mean() < 0.05


def test_an_overlay_without_sources_has_no_ellipse(run, write):
    result = run(write(blobs(SHAPE, (60, 50))), "--thresh", 1000)
    picture = Picture(result.directory / "sources.png", SHAPE)
    assert not picture.red[picture.top :].any()  # a warning stands above
    assert picture.at(picture.rgb[..., 0]).any()


def test_the_cuts_of_the_overlay_survive_nan_and_a_bright_star(run, write):
    image = blobs(SHAPE, (100, 40))
    image[60:64, 20:24] = 1e6
    image[80:100, 60:90] = np.nan
    image[0, 0] = np.inf
    result = run(write(image))
    picture = Picture(result.directory / "sources.png", SHAPE)
    rows, columns = picture.place(np.arange(120, 155), np.arange(75, 110))
    sky = picture.rgb[np.ix_(rows, columns)][..., 0]
    low, middle, high = np.percentile(sky, [10, 50, 90])
    assert 0.05 < middle < 0.95
    assert high - low > 0.15


def test_only_masked_pixels_are_tinted_blue_and_the_title_tells_of_them(run, write):
    image, mask = blobs(SHAPE, (40, 30), (60, 80), (140, 100), peak=200), np.zeros(SHAPE, np.uint8)
    mask[20:60, 100:150] = 1
    plain, nan = write(image), write(np.where(mask, np.float32(np.nan), image), "nan.fits")
    noise = write((1 - mask).astype(np.float32), "noise.fits")
    titles = []
    for masked, *words in (
        (False, plain),
        (True, plain, "--mask-box", 100, 149, 20, 59),
        (True, plain, "--mask", write(mask, "mask.fits")),
        (True, nan),
        (True, plain, "--err-option", "file", "--err-file", noise, "--filter-type", "conv"),
    ):
        result = run(*words, "--thresh", 8)
        assert (len(result.catalog), result.err) == (3, "")
        picture = Picture(result.directory / "sources.png", SHAPE)
        titles.append(picture.title)
        tinted = mask * masked > 0
        np.testing.assert_array_equal(picture.at(picture.blue), tinted)
        # The ellipses are red and the rest is grey.
        assert np.count_nonzero(picture.red) > 100
        assert ((picture.at(picture.colour) < 0.02) | tinted).mean() > 0.9
        rgb = picture.rgb[picture.rgb[..., 0] > picture.rgb[..., 2]] if masked else picture.rgb
        red, green, blue = np.moveaxis(rgb, -1, 0)
        assert np.abs(green - blue).max() < 0.02
        assert (red >= green if masked else red > green - 0.02).all()
    assert titles[0] > 50
    assert min(titles[1:]) > 1.5 * titles[0]


def test_brighter_pixels_are_never_darker_in_the_picture(run, write, tmp_path):
    image = blobs(SHAPE, (40, 30), peak=5, a=4, b=4)
    image += blobs(SHAPE, (110, 80), peak=300, noise=0) + blobs(SHAPE, (30, 95), peak=1e4, noise=0)
    subtracted = tmp_path / "subtracted.fits"
    result = run(write(image), "--subtracted", subtracted, "--thresh", 3)
    picture = Picture(result.directory / "sources.png", SHAPE)
    grey = picture.at(picture.colour) == 0
    order = np.argsort(fits.getdata(subtracted)[grey])
    levels = picture.at(picture.rgb[..., 0])[grey][order]
    assert (np.diff(levels) >= 0).all()
    assert len(np.unique(levels)) > 100


def test_faint_sky_and_structure_in_a_bright_core_are_seen_together(run, write):
    shape = (200, 260)
    core, knot, faint = (80, 100), (88, 104), (200, 60)
    image = blobs(shape, core, peak=3000, a=7, b=7)
    image += blobs(shape, knot, peak=2200, a=1.5, b=1.5, noise=0)
    image += blobs(shape, faint, peak=4, a=8, b=8, noise=0)
    result = run(write(image), "--bw", 300, "--bh", 300)
    picture = Picture(result.directory / "sources.png", shape)
    grey = picture.at(picture.rgb[..., 0])

    def level(x, y, reach=0):
        return np.median(grey[y - reach : y + reach + 1, x - reach : x + reach + 1])

    between = level(84, 102)
    assert image[core[::-1]] < image[knot[::-1]] < 1.25 * image[core[::-1]]
    assert level(*knot) > level(*core) + 0.01
    assert between < level(*core) - 0.01
    low, middle, high = np.percentile(grey[140:195, 190:255], [16, 50, 84])
    assert high - low > 0.1
    assert 0.1 < middle < 0.4
    assert level(*faint, reach=2) > high


@pytest.mark.parametrize("shape", [(1, 500), (3000, 2), (1300, 2500)])
def test_the_picture_is_of_bounded_size_whatever_the_image(run, write, tmp_path, shape):
    overview = tmp_path / "overview.png"
    result = run(write(blobs(shape)), "--overview", overview)
    assert result.code == 0
    for path, limit in ((result.directory / "sources.png", 1300), (overview, 2600)):
        height, width = mpl_image.imread(path).shape[:2]
        assert 100 < height < limit
        assert 100 < width < limit


def test_sources_and_masks_are_in_place_in_the_reduced_picture_of_a_large_image(run, write):
    shape = (400, 2300)
    image = write(blobs(shape, (1900, 120), peak=400, a=8, b=8))
    mesh, box = ("--bw", 200, "--bh", 200), ("--mask-box", 600, 1199, 40, 99)
    result = run(image, "--thresh", 8, *mesh, *box)
    picture = Picture(result.directory / "sources.png", shape)
    assert picture.position(picture.red) == pytest.approx((1900, 120), abs=6)
    assert picture.position(picture.blue) == pytest.approx((899.5, 69.5), abs=3)
    size = (picture.right - picture.left) * (picture.bottom - picture.top)
    assert picture.blue.sum() / size == pytest.approx(600 * 60 / (400 * 2300), rel=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1000), (2001, 3), (1001, 1500)])
def test_block_means_are_those_of_finite_values(shape):
    rng = np.random.default_rng(5)
    image = rng.normal(size=shape)
    image[rng.random(shape) < 0.3] = np.nan
    step = -(-max(shape) // source_extractor.PICTURE_SIDE)
    with warnings.catch_warnings(action="ignore"):
        means = block_reduce(image, step, np.nanmean, cval=np.nan)
    image[np.isnan(image)] = rng.choice([np.nan, np.inf, -np.inf], np.isnan(image).sum())
    found = source_extractor.block_means(image)
    np.testing.assert_allclose(found, means, rtol=1e-12, atol=1e-12)


def test_the_overview_has_four_panels_with_colour_bars(run, write, tmp_path):
    image = blobs(SHAPE, (40, 30), (110, 80)) + np.linspace(0, 300, NX, dtype=np.float32)
    run(write(image), "--overview", tmp_path / "overview.png", "--bw", 20, "--bh", 20)
    rgb = mpl_image.imread(tmp_path / "overview.png")[..., :3]
    height, width = (length // 2 for length in rgb.shape[:2])
    sources, background = rgb[:height, :width], rgb[:height, width:]
    rms, segmentation = rgb[height:, :width], rgb[height:, width:]

    def count(panel, *colour):
        return np.count_nonzero(np.abs(panel - np.array(colour)).max(axis=2) < 0.03)

    viridis = [(0.267, 0.005, 0.329), (0.128, 0.567, 0.551), (0.993, 0.906, 0.144)]
    assert all(count(sources, grey, grey, grey) for grey in np.linspace(0.1, 0.9, 9))
    assert is_red(sources).any()
    for panel in (background, rms):
        assert all(count(panel, *colour) for colour in viridis)
        assert not is_red(panel).any()
    assert count(segmentation, 0, 0, 0) > 0.2 * height * width
    labels = np.round(segmentation[np.ptp(segmentation, axis=2) > 0.05], 1)
    _, pixels = np.unique(labels, axis=0, return_counts=True)
    assert np.count_nonzero(pixels > 300) == 2
