"""The label map is fit for a label-image tool: the sources as seeds of a Voronoi segmentation."""

import numpy as np
import pytest
import tifffile
from skimage import io
from skimage.segmentation import expand_labels

from sky import blobs, grid_positions, random_sources, simulate

SHAPE = (96, 128)


def nuclei():
    """Return round and longish blobs of a fluorescence image, 16 bits, some of which touch."""
    centres = zip(*grid_positions(SHAPE, 32), strict=True)
    round_ones = blobs(SHAPE, *centres, noise=8, peak=900, a=4, b=4)
    long_ones = blobs(SHAPE, (40, 22), (90, 55), (23, 71), noise=0, peak=700, a=6, b=3, theta=0.7)
    return np.rint(round_ones + long_ones).astype(np.uint16)


def star_field():
    sources = random_sources(SHAPE, 40, seed=3, flux=(300, 2e4), galaxy_fraction=0.3)
    return simulate(SHAPE, sources, seed=4, level=100)[0]


@pytest.fixture(params=[nuclei, star_field])
def seeds(request, run, tmp_path):
    """Return the labels of a field, as a label-image tool reads them from TIFF."""
    tifffile.imwrite(tmp_path / "image.tiff", request.param())
    options = "--image-format", "tiff", "--bw", 200, "--bh", 200, "--thresh", 4
    result = run(tmp_path / "image.tiff", *options)
    assert result.code == 0
    path = result.directory / "segmentation.tiff"
    labels = tifffile.imread(path)
    np.testing.assert_array_equal(io.imread(path), labels)
    assert len(result.catalog) > 10
    np.testing.assert_array_equal(np.unique(labels), [0, *result.catalog["id"]])
    np.testing.assert_array_equal(result.catalog["id"], np.arange(1, len(result.catalog) + 1))
    return labels


def squared_distances(labels):
    """Return, for each label, the squared distance of every pixel from its nearest pixel."""
    y, x = np.indices(labels.shape)
    found = {}
    for label in np.unique(labels[labels > 0]):
        rows, columns = np.nonzero(labels == label)
        gaps = (np.subtract.outer(y, rows) ** 2, np.subtract.outer(x, columns) ** 2)
        found[label] = sum(gaps).min(axis=2)
    return found


def test_the_map_is_a_plane_of_integers_with_background_0(seeds):
    assert seeds.dtype.kind == "u"
    assert seeds.shape == SHAPE
    assert 0.2 < np.mean(seeds == 0) < 0.98


def test_each_seed_grows_into_the_region_that_is_nearest_to_it(seeds):
    regions = expand_labels(seeds, distance=np.hypot(*SHAPE))
    assert (regions > 0).all()
    np.testing.assert_array_equal(regions[seeds > 0], seeds[seeds > 0])
    for label in np.unique(regions):
        assert set(seeds[regions == label]) - {0} == {label}
    distances = squared_distances(seeds)
    assert set(np.unique(regions)) == set(distances)
    nearest = np.min(list(distances.values()), axis=0)
    own = sum(np.where(regions == label, gap, 0) for label, gap in distances.items())
    np.testing.assert_array_equal(own, nearest)
