"""Fixtures: run the tool in this process, and look at what it wrote."""

import pytest
from astropy.io import fits

import source_extractor
from common import DATA, SHAPE, SKY, Run, all_products, call, extract
from sky import blobs, random_sources, simulate


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Draw pictures as always, but with few pixels, as that takes half of the time of a run."""
    figure_at = source_extractor.figure_at
    coarse = lambda path, **keywords: figure_at(path, **keywords | {"dpi": 20})  # noqa: E731
    monkeypatch.setattr(source_extractor, "figure_at", coarse)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch, request):
    """Return a function that runs the tool on its arguments, with products in a fresh directory.

    Options that a module of tests names ALWAYS are added to each run.
    """
    always = getattr(request.module, "ALWAYS", ())
    catalogs, build = [], source_extractor.build_catalog

    def keep_catalog(*arguments):
        catalogs.append(build(*arguments))
        return catalogs[-1].copy()

    monkeypatch.setattr(source_extractor, "build_catalog", keep_catalog)

    def run_tool(*arguments):
        directory = tmp_path / "products"
        catalogs.clear()
        code = call(*always, *arguments, "-o", directory)
        result = Run(code, *capsys.readouterr(), directory, *catalogs)
        assert "internal error" not in result.err
        return result

    return run_tool


@pytest.fixture
def told(monkeypatch):
    """Return the list of the warnings that functions of the tool give from now on."""
    texts = []
    logger = source_extractor.log
    monkeypatch.setattr(logger, "warning", lambda text, *values: texts.append(text % values))
    return texts


@pytest.fixture
def data():
    """Return the directory of the test images."""
    return DATA


@pytest.fixture
def stars():
    """Return a float32 image (120, 160) of white noise (sigma 1) with six round sources on 100."""
    centres = (12, 9), (40, 30), (80.3, 60.7), (120, 100), (140.5, 20.5), (30, 95)
    return blobs(SHAPE, *centres, peak=40, seed=7)


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """Return the directory of all products of the simulated sky, whose unit is nJy."""
    directory = tmp_path_factory.mktemp("everything")
    image = directory.with_name("everything.fits")
    fits.writeto(image, *fits.getdata(SKY, header=True))
    fits.setval(image, "BUNIT", value="nJy")
    extract(image, "--aperture-diameters", 5, 7.5, *all_products(directory))
    return directory


@pytest.fixture(scope="session")
def crowded():
    """Return an image (180, 220) of stars and galaxies, some of which overlap, on a slope."""
    shape = (180, 220)
    sources = random_sources(shape, 60, seed=4, flux=(300.0, 20000.0), slope=0.6)
    image, _ = simulate(shape, sources, seed=5, level=100.0, gradient=(5.0, 3.0), noise=2.0)
    return image


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an array as FITS and returns its path."""

    def write_fits(data, name="image.fits", **cards):
        fits.PrimaryHDU(data, fits.Header(cards)).writeto(tmp_path / name)
        return tmp_path / name

    return write_fits


@pytest.fixture
def image(write, stars):
    """Return the path of `stars` as FITS."""
    return write(stars)
