"""The label map is fit for a label-image tool: the sources as seeds of a Voronoi segmentation."""

import numpy as np
import tifffile
from skimage import io
from skimage.segmentation import expand_labels

from sky import blobs, grid_positions

SHAPE = (96, 128)


def test_the_map_of_nuclei_is_a_label_image_in_which_each_is_a_seed(run, tmp_path):
    centres = zip(*grid_positions(SHAPE, 32), strict=True)
    round_ones = blobs(SHAPE, *centres, noise=8, peak=900, a=4, b=4)
    long_ones = blobs(SHAPE, (40, 22), (90, 55), (23, 71), noise=0, peak=700, a=6, b=3, theta=0.7)
    tifffile.imwrite(tmp_path / "image.tiff", np.rint(round_ones + long_ones).astype(np.uint16))
    options = "--image-format", "tiff", "--bw", 200, "--bh", 200, "--thresh", 4
    result = run(tmp_path / "image.tiff", *options)
    count, path = len(result.catalog), result.directory / "segmentation.tiff"
    seeds = tifffile.imread(path)
    np.testing.assert_array_equal(io.imread(path), seeds)
    assert seeds.dtype.kind == "u"
    assert seeds.shape == SHAPE
    assert 0.2 < np.mean(seeds == 0) < 0.98
    assert count > 10
    np.testing.assert_array_equal(np.unique(seeds), np.arange(count + 1))
    np.testing.assert_array_equal(result.catalog["id"], np.arange(1, count + 1))
    regions = expand_labels(seeds, distance=np.hypot(*SHAPE))
    assert (regions > 0).all()
    np.testing.assert_array_equal(regions[seeds > 0], seeds[seeds > 0])
