"""The seeds and the label map are fit for a Voronoi segmentation, as in Galaxy's tutorial."""

import re

import numpy as np
import pytest
import tifffile
from numpy.testing import assert_array_equal
from skimage.measure import label
from skimage.segmentation import expand_labels

from common import DATA
from sky import blobs, grid_positions
from source_extractor import Detections, seed_map, seeds_advice

SHAPE = (96, 128)


def nuclei():
    """Return an image of round nuclei on a grid, and long ones across some of them."""
    centres = zip(*grid_positions(SHAPE, 32), strict=True)
    round_ones = blobs(SHAPE, *centres, noise=8, peak=900, a=4, b=4)
    long_ones = blobs(SHAPE, (40, 22), (90, 55), (23, 71), noise=0, peak=700, a=6, b=3, theta=0.7)
    return np.rint(round_ones + long_ones).astype(np.uint16)


def tessellate(labels):
    """Return the Voronoi cells of labels."""
    return expand_labels(labels, distance=np.hypot(*labels.shape))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sky.fits", ["--deblend-cont", 0.0001]),
        ("hubble_deep_field.tiff", []),
        ("crowded.tif", []),
        ("nuclei.tif", ["--bw", 200, "--bh", 200, "--thresh", 4]),
    ],
)
def test_the_steps_of_the_tutorial_give_each_source_a_cell(run, tmp_path, crowded, name, options):
    tifffile.imwrite(tmp_path / "crowded.tif", crowded)
    tifffile.imwrite(tmp_path / "nuclei.tif", nuclei())
    image = next(path for path in (DATA / name, tmp_path / name) if path.exists())
    path = tmp_path / "seeds.tif"
    options = *options, "--seeds", path, "--segmentation", tmp_path / "labels.tif"
    result, seeds = run(image, *options), tifffile.imread(path)
    segmentation = tifffile.imread(tmp_path / "labels.tif")
    count = len(result.catalog)
    assert count > 10
    assert (seeds.dtype, set(np.unique(seeds))) == (np.uint8, {0, 255})
    # The tutorial labels connected parts; versions of its tool differ in the neighbours.
    for connectivity in (1, 2):
        parts = label(seeds > 0, connectivity=connectivity)
        cells = tessellate(parts)
        ids = [np.unique(segmentation[parts == part]).tolist() for part in range(1, count + 1)]
        assert sorted(ids) == [[number] for number in range(1, count + 1)]
        assert len(np.unique(cells)) == parts.max() == count
        # Cells within a mask, with the seeds themselves cut out, as the tutorial computes them.
        mask = np.where(segmentation > 0, 255, 0)
        shown = cells * (mask / 255) * (1 - seeds / 255)
        assert (shown == np.rint(shown)).all()
        assert set(np.unique(shown)) <= {0, *range(1, count + 1)}
    assert np.count_nonzero(seeds) > 0.9 * np.count_nonzero(segmentation)


def test_the_label_map_itself_is_one_of_seeds(run, tmp_path):
    tifffile.imwrite(tmp_path / "image.tiff", nuclei())
    options = "--image-format", "input", "--bw", 200, "--bh", 200, "--thresh", 4
    result = run(tmp_path / "image.tiff", *options)
    count, path = len(result.catalog), result.directory / "segmentation.tiff"
    seeds = tifffile.imread(path)
    assert seeds.dtype.kind == "u"
    assert seeds.shape == SHAPE
    assert 0.2 < np.mean(seeds == 0) < 0.98
    assert count > 10
    assert_array_equal(np.unique(seeds), np.arange(count + 1))
    assert_array_equal(result.catalog["id"], np.arange(1, count + 1))
    cells = tessellate(seeds)
    assert (cells > 0).all()
    assert_array_equal(cells[seeds > 0], seeds[seeds > 0])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["11122"], ["11.22"]),  # the larger gives way
        (["1122"], ["11.2"]),  # of two of the same size that with the higher number
        (["12"], ["1."]),  # and has no seed if it has no other pixels
        (["111", "121", "111"], ["...", ".2.", "..."]),
        (["1100", "0011"], ["11..", "...."]),  # parts that touch only diagonally are two
        (["1011111"], ["..11111"]),
        (["1", "1", "1"], ["1", "1", "1"]),
        (["000"], ["..."]),
    ],
)
def test_seeds_of_hard_labels(labels, expected):
    labels = np.array([list(map(int, row)) for row in labels], np.int32)
    seeds = np.where(seed_map(labels) == 255, labels, 0)
    assert ["".join(map(str, row)).replace("0", ".") for row in seeds.tolist()] == expected


def brute_force_seeds(labels):
    """Return a map of seeds with their labels, pixel by pixel."""

    def largest(labels):
        kept = np.zeros_like(labels)
        for number in np.unique(labels[labels > 0]):
            parts = label(labels == number, connectivity=1)
            kept[parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])] = number
        return kept

    labels = largest(labels)
    areas, seeds = np.bincount(labels.ravel()), labels.copy()
    for (y, x), one in np.ndenumerate(labels):
        for other in np.unique(labels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]):
            if one and other and (areas[one], one) > (areas[other], other):
                seeds[y, x] = 0
    return largest(seeds)


def test_seeds_of_random_labels_are_those_of_a_slow_way():
    rng = np.random.default_rng(5)
    for largest in (6, 6, 6, 60, 10**5) * 10:
        labels = rng.integers(0, largest, rng.integers(1, 12, 2)).repeat(2, 0).repeat(2, 1)
        expected = brute_force_seeds(labels)
        assert_array_equal(seed_map(labels.astype(np.int32)), np.where(expected, 255, 0))
        assert expected.any() == labels.any()


def test_sources_without_a_seed_cost_a_warning_with_their_number():
    found = Detections(np.zeros(3), np.array([[1, 2, 0, 3]], np.int32))
    assert re.search(r"without a seed.*: 1;", seeds_advice(found, seed_map(found.segmentation)))
    found = Detections(np.zeros(1), np.array([[1, 1]], np.int32))
    assert seeds_advice(found, seed_map(found.segmentation)) is None
