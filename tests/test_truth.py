"""Detections on simulated skies against what is true."""

import numpy as np
import pandas as pd
import pytest

from make_test_data import MASK_BOXES
from sky import galaxies, grid_positions, simulate, stars
from truth import nearest


@pytest.mark.parametrize(
    ("option", "gain"),
    [("float_globalrms", None), ("array_rms --thresh 4", 4), ("none --thresh 10", None)],
)
def test_isolated_stars_are_all_found_in_place_with_their_flux(run, write, option, gain):
    shape = (240, 240)
    positions = grid_positions(shape, 40, seed=1)
    true = stars(*positions, np.geomspace(2e3, 1e5, 36), fwhm=3.5)
    image, _ = simulate(shape, true, seed=2, level=50, gradient=(5, 3), noise=2, gain=gain)
    catalog = run(write(image), "--err-option", *option.split()).catalog
    index, distance = nearest(true, catalog)
    assert len(catalog) == len(set(index)) == len(true)
    assert distance.max() < 0.2
    assert np.median(distance) < 0.05
    np.testing.assert_allclose(catalog.flux[index], true["flux"], rtol=0.12)
    np.testing.assert_allclose(catalog.flux[index][18:], true["flux"][18:], rtol=0.03)


@pytest.mark.parametrize(("a", "theta"), [(5, -1.2), (5, 0.0), (7, 0.6), (5, 1.5)])
def test_a_galaxys_angle_runs_from_x_towards_y(run, write, theta, a):
    true = galaxies(40.4, 30.2, 2e4, a=a, b=2, theta=theta)
    image, _ = simulate((160, 160), true, seed=3, level=10, noise=1)
    brightest = run(write(image)).catalog.sort_values("flux").iloc[-1]
    assert brightest.theta == pytest.approx(theta, abs=0.05)
    assert brightest.a > 1.5 * brightest.b
    assert brightest.elongation > 1.5
    assert brightest.flux_auto == pytest.approx(2e4, rel=0.1)
    assert (brightest.x, brightest.y) == pytest.approx((40.4, 30.2), abs=0.15)


def test_empty_sky_has_no_sources(run, write):
    image = np.random.default_rng(4).normal(100, 3, (256, 256)).astype(np.float32)
    result = run(write(image))
    assert result.catalog.empty
    assert result.image("background") == pytest.approx(100, abs=0.5)
    assert result.image("rms") == pytest.approx(3, rel=0.1)


def test_sources_of_the_test_sky_are_complete_and_pure(run, data):
    boxes = [word for box in MASK_BOXES for word in ("--mask-box", *box)]
    catalog = run(data / "sky.fits", *boxes, "--background-passes", 2).catalog
    truth = pd.read_csv(data / "sky_truth.tsv", sep="\t")
    bright = truth[~truth.kind.eq("halo") & truth.flux.gt(0.5)]
    bright = bright[bright.x.between(2, 357) & bright.y.between(2, 357)]
    for xmin, xmax, ymin, ymax in MASK_BOXES:
        near = bright.x.between(xmin - 3, xmax + 3) & bright.y.between(ymin - 3, ymax + 3)
        bright = bright[~near]
    _, distance = nearest(bright, catalog)
    assert len(bright) > 20
    assert np.mean(distance < 2) > 0.9
    _, distance = nearest(catalog, truth)
    assert np.mean(distance < 4) > 0.85
