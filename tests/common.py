"""What the tests share: where things lie, how the tool is run, how its products are read."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.table import Table

import source_extractor
from contract import ON_REQUEST, ONE_ERROR
from same_as_sep import DEFAULT_KERNEL
from truth import nearest

SCRIPT = Path(source_extractor.__file__)
DATA = Path(__file__).parent.parent / "test-data"
SKY = DATA / "sky.fits"

SHAPE = NY, NX = 120, 160  # of the fixture `stars`
BLOCK = np.s_[85:116, 10:56]  # holds the star at (30, 95), and no other


@dataclass(frozen=True)
class Run:
    """One run of the tool: exit code, what it said, and the directory of its products."""

    code: int
    out: str
    err: str
    directory: Path
    catalog: pd.DataFrame | None = None  # with all digits, as it was given to the writers

    def image(self, product):
        return fits.getdata(self.directory / f"{product}.fits")

    def assert_refused(self, *words, code=1):
        """Demand an exit code, one line on stderr with these words or paths, and no product."""
        assert self.code == code
        assert re.fullmatch(ONE_ERROR, self.err)
        for word in words:
            assert str(getattr(word, "name", word)) in self.err
        assert not any(self.directory.rglob("*"))


def call(*arguments):
    """Run the tool in this process; return its exit code."""
    try:
        return source_extractor.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def extract(*arguments):
    """Run the tool in this process, in silence and with success."""
    assert call("-q", *arguments) == 0


def start(*arguments, **keywords):
    """Run the tool as a file, in a process of its own."""
    return start_python(SCRIPT, *arguments, **keywords)


def start_code(code, *arguments, **keywords):
    """Run Python code that imports the tool, in a process of its own."""
    return start_python("-c", code, *arguments, cwd=SCRIPT.parent, **keywords)


def start_python(*arguments, **keywords):
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60} | keywords
    return subprocess.run([sys.executable, *arguments], check=False, text=True, **keywords)


def all_products(directory):
    """Return the options that put all products into a directory."""
    requested = [word for option, name in ON_REQUEST.items() for word in (option, directory / name)]
    return ["-o", directory, *requested]


def tree(directory):
    """Return the content of all files below a directory; hidden directories count, as empty."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
        if path.is_file() or path.name.startswith(".")
    }


def insert_cards(path, *cards):
    """Put cards (bytes) before the first NAXIS of a FITS file; return its path."""
    content = path.read_bytes()
    more = b"".join(card.ljust(80) for card in cards)
    header = content[:2880].rstrip().replace(b"NAXIS   =", more + b"NAXIS   =", 1)
    path.write_bytes(header.ljust(len(header) + -len(header) % 2880) + content[2880:])
    return path


def read_catalog(directory):
    """Return the catalogue of a run: with all digits if it has written a FITS table as well."""
    if (path := directory / "catalog.fits").exists():
        return Table(fits.getdata(path, 1)).to_pandas()
    return pd.read_csv(directory / "catalog.tsv", sep="\t")


def block(value=True, dtype=bool, rest=0):
    """Return an image that is `value` in the block and `rest` outside; by default a mask."""
    image = np.full(SHAPE, rest, dtype)
    image[BLOCK] = value
    return image


def rows_at(catalog, x, y):
    """Return the rows of the catalogue at these positions, each within 2 pixels."""
    index, distance = nearest({"x": x, "y": y}, catalog)
    assert distance.max() < 2
    return catalog.iloc[index].reset_index(drop=True)


def field_of(
    image, kernel=DEFAULT_KERNEL, err_option="float_globalrms", mask=None, noise=None, **extraction
):
    """Return an image as the `Field` in which its sources are found; keywords as SEP's."""
    extraction = source_extractor.ExtractionSettings(**extraction)
    background = source_extractor.BackgroundSettings()
    method = source_extractor.Method(kernel, err_option, 1, background, extraction, bridge=0)
    mask = np.zeros(image.shape, bool) if mask is None else mask
    return source_extractor.build_field(image.copy(), mask, noise, method)
