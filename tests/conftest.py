"""Fixtures: run the tool in this process, and look at what it wrote."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

import source_extractor

DATA = Path(__file__).parent.parent / "test-data"


@dataclass(frozen=True)
class Run:
    """One run of the tool: exit code, what it said, and the directory of its products."""

    code: int
    out: str
    err: str
    directory: Path

    @property
    def catalog(self):
        return pd.read_csv(self.directory / "catalog.tsv", sep="\t")

    def image(self, product):
        return fits.getdata(self.directory / f"{product}.fits")

    def assert_refused(self, *words):
        """Demand exit code 1, one line on stderr that holds these words, and no product."""
        assert self.code == 1
        assert self.err.startswith("source_extractor.py: error: ")
        assert self.err.count("\n") == 1
        for word in words:
            assert str(word) in self.err
        assert not any(self.directory.rglob("*"))


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs the tool on its arguments, with products in a fresh directory."""

    def run_tool(*arguments):
        directory = tmp_path / "products"
        try:
            code = source_extractor.main([*map(str, arguments), "-o", str(directory)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Run(code, out, err, directory)

    return run_tool


@pytest.fixture
def data():
    """Return the directory of the test images."""
    return DATA


@pytest.fixture
def stars():
    """Return a float32 image (120, 160) of white noise (sigma 1) with six round sources on 100.

    One source stands near the lower left corner: (x, y) = (12, 9).
    """
    rng = np.random.default_rng(7)
    image = rng.normal(100, 1, (120, 160))
    y, x = np.indices(image.shape)
    for x0, y0 in ((12, 9), (40, 30), (80.3, 60.7), (120, 100), (140.5, 20.5), (30, 95)):
        image += 40 * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / 8)
    return image.astype(np.float32)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an array as FITS and returns its path."""

    def write_fits(data, name="image.fits", **cards):
        header = fits.Header({key.replace("_", "-"): value for key, value in cards.items()})
        fits.PrimaryHDU(data, header).writeto(tmp_path / name)
        return tmp_path / name

    return write_fits
