"""Background boxes that sources fill, and the size that a warning says to try."""

import re
from itertools import product

import numpy as np
import pytest

from common import DATA
from contract import one_line
from sky import galaxies, grid_positions, light, simulate, stars

SHAPE = (1000, 1000)
ADVICE = r"sources larger than half a background box: (\d+);.* use (--bw \d+ --bh \d+)"
TOLD = re.compile(one_line("warning", ADVICE))


def cells(diameter, *centres):
    """Return an image of flat discs 100 high on 200, and the flux of one of them."""
    y, x = np.indices(SHAPE)
    discs = [
        100 * np.clip(0.5 + (diameter / 2 - np.hypot(x - x0, y - y0)) / 3, 0, 1)
        for x0, y0 in centres
    ]
    noise = np.random.default_rng(1).normal(200, 5, SHAPE)
    return (noise + sum(discs)).astype(np.float32), discs[0].sum()


def galaxy(radius):
    flux = 2e3 * radius**2
    source = galaxies(510.0, 490.0, flux, n=1, a=radius, b=0.8 * radius)
    return simulate(SHAPE, source, noise=5, level=200, seed=1)[0], flux


LOSING = {
    "cell of 300 pixels": lambda: cells(300, (510, 490)),
    "cell of 150 pixels": lambda: cells(150, (510, 490)),
    "galaxy of 40 pixels": lambda: galaxy(40.0),
}


@pytest.mark.parametrize("kind", LOSING)
def test_the_advised_boxes_keep_the_light_and_a_second_pass_needs_no_advice(run, write, kind):
    image, flux = LOSING[kind]()
    path = write(image)
    small = run(path)
    assert max(small.catalog["flux_auto"], default=0) < 0.98 * flux
    assert "background-passes" not in small.err
    large = run(path, *TOLD.search(small.err).group(2).split())
    assert max(large.catalog["flux_auto"]) > 0.955 * flux
    if kind == "cell of 150 pixels":
        assert not TOLD.search(run(path, "--background-passes", 2).err)


def test_a_vignetted_field_is_not_told_to_take_larger_boxes(run, write):
    shape = (600, 600)
    x, y = grid_positions(shape, 75, seed=3)
    nuclei = light(shape, stars(x, y, 1e4, fwhm=12.0), level=180)
    fall = np.exp(-sum(np.square(np.indices(shape) - 300)) / 300**2)
    image = np.random.default_rng(3).poisson(20 + fall * nuclei).astype(np.float32)
    result = run(write(image), "--bw", 128, "--bh", 128)
    assert np.bincount(result.image("segmentation").ravel())[1:].max() > 128**2
    assert not TOLD.search(result.err)


def test_small_sources_cost_no_warning(run, write):
    image, flux = cells(40, *product(range(75, 1000, 150), repeat=2))
    result = run(write(image))
    assert result.catalog["flux"].median() == pytest.approx(flux, rel=0.02)
    assert not TOLD.search(result.err)


@pytest.mark.parametrize(
    ("name", "warned"),
    [("sky.fits", True), ("hubble_deep_field.tiff", False), ("stack.fits", False)],
)
def test_images_of_the_tests(run, name, warned):
    planes = ("--plane", 0) if name != "sky.fits" else ()
    assert bool(TOLD.search(run(DATA / name, *planes).err)) == warned
