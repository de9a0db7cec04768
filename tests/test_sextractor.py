"""The measurements agree with SExtractor's own, where it is installed."""

import numpy as np
import pytest
from astropy.io import fits

from compare_sextractor import COMPARED, LEAST_MATCHED, compare, run_sextractor, simulated
from sextractor import PROGRAM
from truth import INDEPENDENT, run_tool

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="SExtractor is not installed")


@pytest.mark.parametrize("pixels_per_source", [2500, 400])
def test_bright_sources_are_sextractors(pixels_per_source):
    image, header = simulated(pixels_per_source, seed=3, shape=(600, 600))
    ours = run_tool(image, "--aperture-diameters", 6, *INDEPENDENT, header=header).catalog
    shares, gaps = compare(ours, run_sextractor(image, header))
    assert min(shares) >= LEAST_MATCHED
    for name, (_, _, limit) in COMPARED.items():
        if limit is not None:
            assert gaps[name].median() < limit, name


def test_measuring_on_another_image_is_sextractors(tmp_path):
    image, header = simulated(2500, seed=3, shape=(600, 600))
    noise = np.random.default_rng(3).normal(0, 1, image.shape)
    other = (0.2 * image + noise).astype(np.float32)
    fits.writeto(tmp_path / "other.fits", other)
    options = "--aperture-diameters", 6, "--measure-image", tmp_path / "other.fits", *INDEPENDENT
    ours = run_tool(image, *options, header=header).catalog
    _, gaps = compare(ours, run_sextractor(image, header, other))
    assert len(gaps) > 10
    # Circles are exact here; SExtractor counts 5 x 5 subpixels of each pixel.
    limits = {"flux_aper_6": 0.3, "fluxerr_aper_6": 0.3}
    for name in ("kron_radius", "flux_auto", "fluxerr_auto", "flux_radius", *limits):
        assert gaps[name].median() < limits.get(name, 0.1), name
