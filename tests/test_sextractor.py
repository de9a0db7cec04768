"""The measurements agree with SExtractor's own, where it is installed."""

import shutil

import pytest

from compare_sextractor import (
    COMPARED,
    LEAST_MATCHED,
    SEXTRACTOR_NAMES,
    compare,
    run_sextractor,
    simulated,
)
from truth import detect

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, SEXTRACTOR_NAMES)), reason="SExtractor is not installed"
)


@pytest.mark.parametrize("pixels_per_source", [2500, 400])
def test_bright_sources_are_sextractors(pixels_per_source):
    image, header = simulated(pixels_per_source, seed=3, shape=(600, 600))
    ours = detect(image, "--aperture-diameters", 6, header=header)
    shares, gaps = compare(ours, run_sextractor(image, header), 10)
    assert min(shares) >= LEAST_MATCHED
    for name, (_, _, limit) in COMPARED.items():
        if limit is not None:
            assert gaps[name].median() < limit, name
