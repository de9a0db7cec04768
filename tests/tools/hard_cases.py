"""Data that people have and that are hard: what the tool makes of them, against what is true.

    tests/tools/hard_cases.py [--script PATH] [--before PATH] [--seed 1] [WORD ...]

Makes images for each case (only those with one of the words in their names), runs the tool and,
where it is installed, SExtractor on them, and prints a Markdown table. `--script` is the version
of the tool to run; one given as `--before` has a column of its own. An option that a version
doesn't know is left out. Exits with 1 if a value of the tool is beyond its limit; such cells end
with an exclamation mark. Takes half a minute a version.

Values for several distances, widths or rates stand in one cell, divided by strokes, and a dash
where there is none. A source and a detection are the same if they are each other's nearest, within
2 pixels: "found" is the part of the sources for which there is one, "spurious" the number of the
other detections.
"""

import argparse
import contextlib
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from math import inf, log, nan, pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tifffile
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

import sextractor
from sky import blobs, galaxies, grid_positions, simulate, stars, tan_wcs, vstack
from truth import match, nearest, noise_area, row_of, spread

ROOT = Path(__file__).resolve().parents[2]
RADIUS = 2.0  # pixels within which a detection and a source are the same
FWHM = 3.0
BAD_VALUE = 50_000  # of the pixels of a bad column


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table, without the name of its case.

    Attributes
    ----------
    measured : str
    truth
        A number, truth value or text, or a tuple of them, and so the next two.
    limits : (low, high) or None
        Of our value.
    ours
    theirs : callable
        Returns SExtractor's value; called only where that is installed.
    """

    measured: str
    truth: object
    limits: tuple | None
    ours: object
    theirs: Callable = lambda: ""

    def good(self):
        """Tell if all of our values are within the limits."""
        if self.limits is None:
            return True
        low, high = self.limits
        return all(low <= value <= high for value in in_tuple(self.ours))

    def cell(self):
        """Return our value as the text of a cell, marked if it is beyond a limit."""
        return written(self.ours) + " !" * (not self.good())

    def limit(self):
        """Return the limits as the text of a cell."""
        low, high = self.limits or ("", "")
        if low == high:
            return written(low)
        if high == inf:
            return f"≥ {written(low)}"
        return f"≤ {written(high)}" if low == -inf else f"{written(low)} to {written(high)}"


def in_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def written(value):
    """Return a value as the text of a cell."""
    match value:
        case tuple():
            return " / ".join(map(written, value))
        case bool() | np.bool_():
            return "yes" if value else "no"
        case float() | np.floating():
            return f"{value:.3g}".replace("nan", "-")
        case _:
            return str(value).replace("|", "/")


def only(value):
    return value, value


def at_least(value):
    return value, inf


def at_most(value):
    return -inf, value


def on_both(ours, run_theirs):
    """Return a function that measures our catalogue, and theirs when it is asked for."""
    theirs = cache(run_theirs)
    return lambda measure: (measure(ours), lambda: measure(theirs()))


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------

# The columns compared, and what SExtractor calls them.
NAMES = {
    "x": "X_IMAGE",
    "y": "Y_IMAGE",
    "xwin": "XWIN_IMAGE",
    "ywin": "YWIN_IMAGE",
    "errx2": "ERRX2_IMAGE",
    "erry2": "ERRY2_IMAGE",
    "errawin": "ERRAWIN_IMAGE",
    "errbwin": "ERRBWIN_IMAGE",
    "errthetawin": "ERRTHETAWIN_IMAGE",
    "thresh": "THRESHOLD",
    "flux_auto": "FLUX_AUTO",
    "fluxerr_auto": "FLUXERR_AUTO",
    "flux_aper_4": "FLUX_APER",
    "flag": "FLAGS",
}


class Run(NamedTuple):
    """One run: exit code, what was said, processor time in seconds, and where the products are."""

    code: int
    out: str
    err: str
    seconds: float
    directory: Path

    @property
    def catalog(self):
        """The catalogue, without rows if the image was refused."""
        path = self.directory / "catalog.tsv"
        if self.code:
            return pd.DataFrame(columns=list(NAMES), dtype=float)
        return pd.read_csv(path, sep="\t")

    def image(self, product):
        data = fits.getdata(self.directory / f"{product}.fits")
        return data.astype(data.dtype.newbyteorder("="))

    def says(self, words):
        """Tell if a warning has these words."""
        return any("warning:" in line and words in line for line in self.err.splitlines())

    def line(self):
        """Return the first line on stderr without its beginning and without directories."""
        first = self.err.partition("\n")[0].partition(": ")[2]
        return re.sub(r"(?<= )/\S*/", "", first) or "nothing"


class Tool:
    """A version of the tool, loaded once: it takes longer to start than to run."""

    def __init__(self, script, directory):
        self.directory = directory
        spec = importlib.util.spec_from_file_location(f"tool_{directory.name}", script)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.module
        spec.loader.exec_module(self.module)
        self.options = set(re.findall(r"--[\w-]+", self._call("--help")[1]))

    def __call__(self, image, *words, header=None):
        """Run on a file, or on an array and its header; arrays among the words become files too."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        arguments, known = ["-o", directory], True
        for word in ("--subtracted", directory / "subtracted.fits", *words):
            if str(word).startswith("--"):
                known = word in self.options
            if known:
                arguments.append(as_file(word, directory / f"{len(arguments)}.fits"))
        path = as_file(image, directory / "image.fits", header)
        start = time.process_time()
        said = self._call(path, *arguments)
        return Run(*said, time.process_time() - start, directory)

    def _call(self, *arguments):
        """Return exit code, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.module.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        return code, out.getvalue(), err.getvalue()


def as_file(value, path, header=None):
    """Return the path of an array that is written there, or what isn't an array as it is."""
    if not isinstance(value, np.ndarray):
        return value
    fits.writeto(path, value.astype(np.uint8) if value.dtype == bool else value, header)
    return path


def run_sextractor(image, *, bad=None, kernel=None, **settings):
    """Run SExtractor on an array.

    Parameters
    ----------
    image : (ny, nx) array
    bad : (ny, nx) bool array, optional
        Where its weight is 0.
    kernel : Path, optional
        A .conv file; without it the default kernel.
    **settings
        Beside the tool's defaults.

    Returns
    -------
    catalog : DataFrame
        With the tool's names and origin.
    subtracted : (ny, nx) array
        The image less the background.
    """
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        fits.writeto(work / "image.fits", image)
        settings |= {
            "CATALOG_NAME": "catalog.fits",
            "CATALOG_TYPE": "FITS_1.0",
            "CHECKIMAGE_TYPE": "-BACKGROUND",
            "CHECKIMAGE_NAME": "subtracted.fits",
            "PHOT_APERTURES": 4,
            "MEMORY_PIXSTACK": 3_000_000,
        }
        if bad is not None:
            fits.writeto(work / "weight.fits", (~bad).astype(np.float32))
            settings |= {"WEIGHT_TYPE": "MAP_WEIGHT", "WEIGHT_IMAGE": "weight.fits"}
        command = sextractor.configured(work, NAMES.values(), **settings)
        if kernel is not None:
            (work / "default.conv").write_text(kernel.read_text())
        subprocess.run([*command, "image.fits"], cwd=work, check=True)
        table = Table.read(work / "catalog.fits", hdu=1)
        subtracted = fits.getdata(work / "subtracted.fits").astype(np.float32)
    catalog = pd.DataFrame({ours: np.array(table[theirs], float) for ours, theirs in NAMES.items()})
    catalog[["x", "y", "xwin", "ywin"]] -= 1  # its first pixel is (1, 1)
    catalog["errthetawin"] = np.radians(catalog["errthetawin"])
    return catalog, subtracted


# ---------------------------------------------------------------------------------------------
# Skies, and what is measured on them
# ---------------------------------------------------------------------------------------------


def star_flux(snr, fwhm=FWHM):
    """Return the flux of a star of this signal-to-noise ratio, in noise of 1."""
    return snr * np.sqrt(noise_area(stars(0.0, 0.0, 1.0, fwhm=fwhm)))


def star_field(shape, spacing, snr, seed, level=100.0):
    """Return an image and the truth of isolated stars, of S/N from one number to another."""
    x, y = grid_positions(shape, spacing, seed=seed)
    part = np.random.default_rng(seed).random(len(x))
    flux = star_flux(snr[0] * (snr[1] / snr[0]) ** part)
    return simulate(shape, stars(x, y, flux, fwhm=FWHM), seed=seed, level=level)


def pair(catalog, truth):
    """Return the rows of both that are the same source, in the same order."""
    if not len(catalog):
        return catalog, truth[:0]
    i, j = match(catalog, truth, RADIUS)
    return catalog.iloc[i].reset_index(drop=True), truth[j]


def found(catalog, truth, where=True):
    """Return the percentage of the true sources that are found, of those `where` it is True."""
    wanted = np.broadcast_to(where, len(truth))
    seen = np.zeros(len(truth), bool)
    if len(catalog):
        seen[match(catalog, truth, RADIUS)[1]] = True
    return 100 * np.mean(seen[wanted])


def spurious(catalog, truth):
    """Return the number of detections that are no source's."""
    return len(catalog) - len(pair(catalog, truth)[0])


def pulls(catalog, truth):
    """Return the errors of flux_auto in units of its own error, of the sources found."""
    catalog, truth = pair(catalog, truth)
    return np.asarray((catalog["flux_auto"] - truth["flux"]) / catalog["fluxerr_auto"])


def brightest_near(catalog, truth, radius):
    """Return for each true source the brightest detection within `radius` pixels; nan for none."""
    ranked = catalog.sort_values("flux_auto", ascending=False)
    rows = [
        ranked[np.hypot(ranked["x"] - x, ranked["y"] - y) < radius].head(1).to_numpy()
        for x, y in truth["x", "y"].iterrows()
    ]
    rows = [row[0] if len(row) else np.full(len(ranked.columns), nan) for row in rows]
    return pd.DataFrame(rows, columns=ranked.columns)


def sum_in_circle(image, x, y, radius):
    """Return the sum of the pixels (squares) in a circle: exact along y, in fine steps along x."""
    reach = int(radius) + 2
    columns, rows = (np.arange(-reach, reach + 1) + round(at) for at in (x, y))
    steps = columns[:, np.newaxis] + (np.arange(1000) + 0.5) / 1000 - 0.5
    half = np.sqrt(np.maximum(radius**2 - (steps - x) ** 2, 0))
    middle = rows[:, np.newaxis, np.newaxis]
    chords = np.minimum(y + half, middle + 0.5) - np.maximum(y - half, middle - 0.5)
    return np.sum(np.maximum(chords, 0).mean(axis=2) * image[np.ix_(rows, columns)])


def distance_on_sky(catalog, wcs):
    """Return how far at the most ra, dec are from where a WCS has x, y, in arcsec."""
    if not len(catalog) or catalog["ra"].isna().any():
        return nan
    there = SkyCoord(catalog["ra"], catalog["dec"], unit="deg")
    here = wcs.pixel_to_world(catalog["x"].to_numpy(), catalog["y"].to_numpy())
    return here.icrs.separation(there).arcsec.max()


# ---------------------------------------------------------------------------------------------
# Cases: from a tool and a seed to rows
# ---------------------------------------------------------------------------------------------


def faint_beside_bright(tool, seed):
    distances = 12, 16, 20, 24
    shape = (1280, 1600)
    x, y = grid_positions(shape, 80, seed=seed)
    distance, angle = np.resize(distances, len(x)), np.random.default_rng(seed).random(len(x)) * pi
    at = x + distance * np.cos(angle), y + distance * np.sin(angle)
    faint = stars(*at, star_flux(15), fwhm=FWHM)
    bright = stars(x, y, star_flux(100), fwhm=FWHM)
    image, truth = simulate(shape, vstack([faint, bright]), seed=seed, level=100.0)
    where = [np.append(distance == d, np.zeros(len(x), bool)) for d in distances]
    gaussian = ROOT / "test-data" / "kernel.conv"  # FWHM 3
    for name, file, options, kernel in (
        ("default kernel", None, (), np.outer((1, 2, 1), (1, 2, 1))),
        (
            *("Gaussian of 3", gaussian, ("--filter-case", "file", "--filter-file", gaussian)),
            np.loadtxt(gaussian, skiprows=2),
        ),
    ):
        # The filtered image where its own S/N is 4.
        height = 4 * np.sqrt(np.sum(kernel**2)) / np.sum(kernel)
        run = tool(image, "--err-option", "array_rms", "--thresh", 4, *options)
        both = on_both(
            run.catalog,
            lambda k=file, t=height: run_sextractor(image, kernel=k, DETECT_THRESH=t)[0],
        )
        yield Row(
            f"found, %, {written(distances)} pixels from the bright star, {name}",
            *(100, at_least(99)),
            *both(lambda catalog: tuple(found(catalog, truth, w) for w in where)),
        )
        yield Row(
            f"`thresh` over the noise, {name}",
            *(height, (0.93 * height, 1.07 * height)),
            *both(lambda catalog: catalog["thresh"].median()),
        )


def cleaning(tool, seed):
    image = np.random.default_rng(seed).normal(0, 1, (1000, 1000)).astype(np.float32)
    clean, without = (
        tool(image, "--thresh", 0.5, "--minarea", 1, option).seconds
        for option in ("--clean", "--no-clean")
    )
    yield Row("time with cleaning, over that without", "", None, clean / without)


def masked_pixels(tool, seed):
    image, truth = star_field((480, 480), 48, (30, 300), seed)
    mask = np.zeros(image.shape, bool)
    for x, y in truth["x", "y"].iterrows():
        mask[round(y) - 20 : round(y) + 20, round(x) + 1 : round(x) + 8] = True
    run = tool(image, "--mask", mask)
    labels, catalog = run.image("segmentation").ravel(), run.catalog
    npix = np.bincount(labels)[1:]
    flux = np.bincount(labels, np.nan_to_num(run.image("subtracted")).ravel())[1:]
    yield Row("masked pixels with a label", 0, only(0), np.sum(labels[mask.ravel()] > 0))
    gap = np.abs(npix - catalog["npix"]).max()
    yield Row("`npix` against the map, largest difference", 0, only(0), gap)
    gap = 100 * np.abs(flux / catalog["flux"] - 1).max()
    yield Row("`flux` against the map's pixels, largest difference, %", 0, at_most(0.1), gap)


def bad_columns(tool, seed):
    widths = 1, 2, 3
    kinds = [(w, offset, fwhm) for w in widths for offset in (0, 2) for fwhm in (3.0, 4.0)]
    shape = (480, 64 * len(kinds))
    x, y = grid_positions(shape, 64, seed=seed)
    width, offset, fwhm = np.transpose(kinds)[:, (x // 64).astype(int)]
    flux = np.where(fwhm == 3, star_flux(200, 3.0), star_flux(200, 4.0))
    image, truth = simulate(shape, stars(x, y, flux, fwhm=fwhm), seed=seed, level=100.0)
    whole = image.copy()
    bad = np.zeros(shape, bool)
    for number, (columns, off, _) in enumerate(kinds):
        first = 64 * number + 32 + off - columns // 2
        bad[:, first : first + columns] = True
    image[bad] = BAD_VALUE
    both = on_both(
        (tool(image, "--mask", bad).catalog, tool(whole).catalog),
        lambda: (run_sextractor(image, bad=bad)[0], run_sextractor(whole)[0]),
    )

    def pieces(catalogs, true):
        there, distance = nearest(catalogs[0], true)
        return np.bincount(there[distance < 10], minlength=len(true)).max()

    def flux_ratio(catalogs, true):
        near, before = (brightest_near(catalog, true, 10)["flux_auto"] for catalog in catalogs)
        return (near / before).median()

    def distance(catalogs, true):
        near = brightest_near(catalogs[0], true, 10)
        return np.hypot(near["x"] - true["x"], near["y"] - true["y"]).median()

    for place, off in (("through the star", 0), ("2 pixels off", 2)):
        for size in (3, 4):
            parts = [truth[(width == w) & (offset == off) & (fwhm == size)] for w in widths]
            for name, right, limits, measure in (
                ("sources a star, most", 1, only(1), pieces),
                ("`flux_auto` over that without the gap, median", 1, (0.98, 1.02), flux_ratio),
                ("`x`, `y` from truth, median, pixels", 0, at_most(0.1), distance),
            ):
                yield Row(
                    f"FWHM {size}: {name}, {written(widths)} columns {place}",
                    *(right, limits),
                    *both(lambda found, m=measure, p=parts: tuple(m(found, part) for part in p)),
                )


def quality_bits(tool, seed):
    image, truth = star_field((480, 480), 48, (20, 200), seed)
    quality = np.zeros(image.shape, np.int16)
    rows, columns = np.indices(image.shape)
    for x, y in truth["x", "y"].iterrows():
        quality[np.hypot(columns - x, rows - y) < 6] = 32
    quality[:, 5::96] |= 1
    image[:, 5::96] = BAD_VALUE
    run = tool(image, "--mask", quality)
    yield Row("found, %, with `--mask`", "", None, found(run.catalog, truth))
    yield Row("is there a warning?", "", None, run.says("--mask"))
    catalog = tool(image, "--mask", quality, "--mask-bits", 1).catalog
    yield Row("found, %, with `--mask-bits 1`", 100, at_least(99), found(catalog, truth))
    yield Row("spurious, with `--mask-bits 1`", 0, only(0), spurious(catalog, truth))


def padded_mosaic(tool, seed):
    image, truth = star_field((800, 800), 40, (15, 200), seed)
    rows, columns = np.indices(image.shape) - 399.5
    along = columns * np.cos(0.35) + rows * np.sin(0.35)
    across = rows * np.cos(0.35) - columns * np.sin(0.35)
    reach = np.maximum(np.abs(along), np.abs(across))
    outside = reach > 294 + np.random.default_rng(seed).uniform(-4, 4, (len(reach), 1))
    at = reach[np.rint(truth["y"]).astype(int), np.rint(truth["x"]).astype(int)]
    truth, whole = truth[at < 300], at[at < 300] < 280  # those further out aren't there
    zeros, nans = np.where(outside, 0, image), np.where(outside, nan, image)
    plain, blank, natural = tool(zeros), tool(zeros, "--blank", 0), tool(nans)
    yield Row("is there a warning of the zeros?", True, only(True), plain.says("--blank"))
    for name, run, bad, limited in (
        ("zeros", plain, None, False),
        ("zeros, `--blank 0`", blank, outside, True),
        ("NaN", natural, outside, True),
    ):
        both = on_both(run.catalog, lambda b=bad: run_sextractor(zeros, bad=b)[0])
        for what, right, limits, measure in (
            ("found, %", 100, at_least(99), lambda c: found(c, truth, whole)),
            ("spurious", 0, at_most(2), lambda c: spurious(c, truth)),
            ("median error of `flux_auto`, %", 0, (-2, 2), lambda c: median_error(c, truth[whole])),
        ):
            yield Row(f"{what}, {name}", right, limits if limited else None, *both(measure))


def median_error(catalog, truth):
    """Return the median error of flux_auto in percent."""
    catalog, truth = pair(catalog, truth)
    return 100 * (catalog["flux_auto"] / truth["flux"] - 1).median()


def saturated_stars(tool, seed):
    image, truth = star_field((480, 480), 48, (100, 20_000), seed)
    level = 3000.0
    rows, columns = (np.rint(truth[name]).astype(int) for name in ("y", "x"))
    clipped = image[rows, columns] >= level
    image = np.minimum(image, level)

    def flagged(where):
        return lambda catalog: np.sum((pair(catalog, truth[where])[0]["flag"].astype(int) & 4) > 0)

    for name, options, cards in (
        ("`--saturation`", ("--saturation", level), {}),
        ("SATURATE", (), {"SATURATE": level}),
    ):
        catalog = tool(image, *options, header=fits.Header(cards)).catalog
        both = on_both(catalog, lambda: run_sextractor(image, SATUR_LEVEL=level - 1)[0])
        for kind, where, right in (
            ("clipped", clipped, clipped.sum()),
            ("other", ~clipped, 0),
        ):
            yield Row(f"{kind} stars with bit 4, {name}", right, only(right), *both(flagged(where)))


def distorted_skies(tool, seed):
    image, _ = star_field((240, 240), 48, (50, 200), seed)
    plain = tan_wcs(image.shape).to_header()
    sip = {"A_ORDER": 2, "A_2_0": 2e-4, "A_1_1": -1e-4, "B_ORDER": 2, "B_0_2": 3e-4, "B_1_1": 1e-4}
    named = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"}
    pv = {f"PV{i}_{j}": 1.0 if j == 1 else 1e-4 for i in (1, 2) for j in range(8) if j != 3}
    frequency = {"CTYPE3": "FREQ", "CRVAL3": 1.4e9, "CDELT3": 1e6, "CRPIX3": 1.0, "CUNIT3": "Hz"}
    said = []
    for name, cards in (
        ("SIP", sip | named),
        ("SIP without -SIP in CTYPE", sip),
        ("SIP with PV", sip | named | pv),
    ):
        header = fits.Header(plain, copy=True)
        header.update(cards)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wcs = WCS(header)
        header.update(frequency)
        run = tool(np.stack([image, image]), "--plane", 1, "-q", header=header)
        said += run.out.splitlines()
        distance = distance_on_sky(run.catalog, wcs)
        yield Row(f"{name}: from astropy's positions, arcsec", 0, at_most(1e-3), distance)
    yield Row("lines on stdout with `-q`", 0, only(0), len(said))


def velocity_first(tool, seed):
    image, truth = star_field((180, 240), 48, (50, 200), seed)
    cube = np.random.default_rng(seed).normal(100, 1, (*image.shape, 4)).astype(np.float32)
    cube[..., 2] = image
    wcs = tan_wcs(image.shape)
    header = fits.Header({"CTYPE1": "VELO", "CRVAL1": 0.0, "CDELT1": 1e3, "CRPIX1": 1.0})
    for card in wcs.to_header().cards:
        axis = re.fullmatch(r"(CTYPE|CRVAL|CDELT|CRPIX|CUNIT)([12])", card.keyword)
        if axis:
            header[f"{axis[1]}{int(axis[2]) + 1}"] = card.value
    catalog = tool(cube, "--plane", 2, header=header).catalog
    yield Row("found, %, by `--plane` of the velocity", 100, at_least(99), found(catalog, truth))
    distance = distance_on_sky(pair(catalog, truth)[0], wcs)
    yield Row("from their positions on the sky, arcsec", 0, at_most(1e-3), distance)


def jansky_per_beam(tool, seed):
    image, _ = star_field((240, 240), 48, (50, 200), seed)
    header = tan_wcs(image.shape, scale=1.0).to_header()
    header.update({"BUNIT": "Jy/beam", "BMAJ": 5 / 3600, "BMIN": 3 / 3600, "BPA": 20.0})
    table = tool.directory / "beam.fits"
    run = tool(image, "--catalog-fits", table, header=header)
    unit = fits.getdata(table, 1).columns["flux_auto"].unit
    area = pi / (4 * log(2)) * 5 * 3
    lines = [line for line in (run.out + run.err).splitlines() if "beam" in line]
    numbers = [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]
    told = min(numbers, key=lambda number: abs(number - area), default=nan)
    yield Row("unit of `flux_auto`", "", None, unit)
    yield Row("area of the beam that is told, pixels", area, (0.99 * area, 1.01 * area), told)


def integers(tool, seed):
    levels, noises = (1000.0, 1000.3, 1000.6), (0.7, 1, 3, 10)

    def worst_error(background):
        errors = []
        for noise in noises:
            rng = np.random.default_rng(seed)
            skies = [np.rint(rng.normal(v, noise, (384, 384))).astype(np.int16) for v in levels]
            gaps = [background(sky) - level for sky, level in zip(skies, levels, strict=True)]
            errors.append(max(gaps, key=abs))
        return tuple(errors)

    yield Row(
        f"error of the background, quanta, in noise of {written(noises)}",
        *(0, (-0.1, 0.1)),
        worst_error(lambda sky: tool(sky).image("background").mean()),
        lambda: worst_error(lambda sky: np.mean(sky - run_sextractor(sky)[1])),
    )
    image, truth = star_field((768, 768), 32, (30, 30), seed, level=100.3)
    image = np.rint(image).astype(np.int16)
    both = on_both(tool(image).catalog, lambda: run_sextractor(image)[0])
    yield Row(
        "bias of `flux_auto` at S/N 30, in its errors, in noise of 1",
        *(0, (-0.3, 0.3)),
        *both(lambda catalog: np.mean(pulls(catalog, truth))),
    )


def counts(tool, seed):
    rates, shape = (0.01, 0.03, 0.1, 0.3), (512, 512)
    rng = np.random.default_rng(seed)
    empty = [rng.poisson(rate, shape).astype(np.int16) for rate in rates]
    places = grid_positions(shape, 64, seed=seed)
    sources = stars(*places, 60.0, fwhm=FWHM)
    conditions = {"seed": seed, "noise": 0.0, "gain": 1.0}
    starry = [simulate(shape, sources, level=rate, **conditions)[0] for rate in rates]

    def each(measure):
        return lambda catalogs: tuple(measure(catalog, sources) for catalog in catalogs)

    def as_advised(sky):
        return tool(sky, *advised(tool(sky), "--err-option")).catalog

    runs = [tool(sky) for sky in empty]
    yield Row(
        f"sources on an empty sky of {written(rates)} a pixel",
        *(0, None),
        tuple(len(run.catalog) for run in runs),
        lambda: tuple(len(run_sextractor(sky)[0]) for sky in empty),
    )
    warned = tuple(run.says("--err-option none") for run in runs)
    yield Row("is there a warning?", True, only(True), warned)
    number = tuple(len(as_advised(sky)) for sky in empty)
    yield Row("sources there, with the options that it advises", 0, at_most(2), number)
    catalogs = [as_advised(sky.astype(np.int16)) for sky in starry]
    both = on_both(catalogs, lambda: [run_sextractor(sky)[0] for sky in starry])
    name = "stars of 60 counts, with the options that it advises"
    yield Row(f"found, %, {name}", 100, at_least(99), *both(each(found)))
    yield Row(f"spurious, {name}", 0, at_most(2), *both(each(spurious)))


def advised(run, option):
    """Return the options in the lines on stderr that name this one, each with its first value."""
    lines = " ".join(line for line in run.err.splitlines() if option in line)
    first = dict(reversed(re.findall(r"(--[a-z-]+) ([\w.]+)", lines)))
    return [word for pair in first.items() for word in pair]


def large_objects(tool, seed):
    shape = (900, 900)
    x, y = grid_positions(shape, 300, seed=seed)
    rows, columns = np.indices(shape)
    cells = sum(
        40 / (1 + np.exp((np.hypot(columns - left, rows - low) - 75) / 3))
        for left, low in zip(x, y, strict=True)
    )
    noise = np.random.default_rng(seed).normal(100, 1, shape)
    tissue = (noise + cells).astype(np.float32)
    each = Table({"x": x, "y": y, "flux": np.full(len(x), cells.sum() / len(x))})
    source = galaxies(450.0, 450.0, 4e5, a=60.0, b=50.0)
    galaxy, lone = simulate(shape, source, seed=seed, level=100.0)
    for name, image, truth in (
        ("cells of 150 pixels", tissue, each),
        ("a galaxy of half-light radius 60", galaxy, lone),
    ):

        def lost(catalog, truth=truth):
            flux = brightest_near(catalog, truth, 75)["flux_auto"].fillna(0)
            return 100 * np.max(1 - flux / truth["flux"])

        run = tool(image)
        both = on_both(run.catalog, lambda i=image: run_sextractor(i)[0])
        yield Row(f"flux lost, %, {name}", 0, None, *both(lost))
        yield Row("is there a warning?", True, only(True), run.says("--bw"))
        better = lost(tool(image, *advised(run, "--bw")).catalog)
        yield Row("flux lost, %, with the options that it advises", 0, at_most(10), better)


def tiffs(tool, seed):
    centres = [(x, y) for x in (40, 100, 160) for y in (40, 80, 120)]
    image = blobs((160, 200), *centres, seed=seed, level=20, peak=120).round().astype(np.uint8)
    truth = Table(np.array(centres, float), names=("x", "y"))
    inverting, series, palette = (
        tool.directory / f"{name}.tif" for name in ("inverting", "series", "palette")
    )
    plain = {"photometric": "minisblack", "metadata": None}
    told = {"photometric": "miniswhite", "metadata": None, "description": "ImageJ=1.54f\n"}
    tifffile.imwrite(inverting, image, **told)
    with tifffile.TiffWriter(series) as file:
        file.write(np.full((50, 60), 7, np.uint8), **plain)
        file.write(image, **plain)
    colours = np.random.default_rng(seed).integers(0, 65536, (3, 256), np.uint16)
    tifffile.imwrite(palette, image, photometric="palette", colormap=colours)
    for name, run in (
        ("ImageJ's inverting LUT", tool(inverting)),
        ("second series by `--hdu 1`", tool(series, "--hdu", 1)),
    ):
        yield Row(f"found, %, {name}", 100, at_least(99), found(run.catalog, truth))
        yield Row(f"spurious, {name}", 0, only(0), spurious(run.catalog, truth))
    yield Row("what is said of a palette", "", None, tool(palette).line())


def odd_cards(tool, seed):
    image, truth = star_field((240, 240), 48, (50, 200), seed)

    def with_card(keyword, rest, pixels):
        """Return a file that has this card, which no library would write."""
        path = tool.directory / f"{keyword.lower()}.fits"
        fits.writeto(path, pixels, fits.Header({"PLACE": 0}))
        content = path.read_bytes()
        start = content.index(b"PLACE   ")
        card = f"{keyword:8}= {rest}".ljust(80).encode()
        path.write_bytes(content[:start] + card + content[start + 80 :])
        return path

    whole = image.round().astype(np.int16)
    for name, path in (
        ("EXTNAME unparsable", with_card("EXTNAME", "'SCI", image)),
        ("CTYPE1 nan", with_card("CTYPE1", "nan", image)),
        ("BLANK empty", with_card("BLANK", "", whole)),
    ):
        yield Row(f"found, %, {name}", 100, at_least(99), found(tool(path).catalog, truth))
    run = tool(with_card("BSCALE", "'0,5     '", whole))
    yield Row("exit code, BSCALE '0,5'", 1, only(1), run.code)


def apertures_and_errors(tool, seed):
    image, truth = star_field((1200, 1200), 40, (7, 200), seed)
    snr = truth["flux"] / star_flux(1)
    run = tool(image, "--aperture-diameters", 4)
    both = on_both((run.catalog, run.image("subtracted")), lambda: run_sextractor(image))

    def aperture_error(result):
        catalog, _ = pair(result[0], truth[snr > 20])
        places = zip(catalog["x"], catalog["y"], strict=True)
        exact = np.array([sum_in_circle(result[1], x, y, 2.0) for x, y in places])
        return 100 * np.sqrt(np.mean((catalog["flux_aper_4"] / exact - 1) ** 2))

    def windowed_pull(result):
        if "errawin" not in result[0]:
            return nan
        catalog, true = pair(result[0], truth[snr > 10])
        a, b, theta = (catalog[f"err{name}win"] for name in ("a", "b", "theta"))
        errors = (
            np.hypot(a * np.cos(theta), b * np.sin(theta)),
            np.hypot(a * np.sin(theta), b * np.cos(theta)),
        )
        gaps = catalog["xwin"] - true["x"], catalog["ywin"] - true["y"]
        return spread(np.divide(gaps, errors))

    def isophotal_pull(result):
        catalog, true = pair(result[0], truth[snr < 15])
        errors = np.sqrt(catalog["errx2"]), np.sqrt(catalog["erry2"])
        gaps = catalog["x"] - true["x"], catalog["y"] - true["y"]
        return spread(np.divide(gaps, errors))

    name = "rms error of an aperture of 4 pixels, %"
    yield Row(name, 0, at_most(0.02), *both(aperture_error))
    name = "pulls of `xwin`, `ywin`, width, S/N over 10"
    yield Row(name, 1, (0.9, 1.1), *both(windowed_pull))
    name = "pulls of `x`, `y`, width, S/N 7 to 15"
    yield Row(name, 1, None, *both(isophotal_pull))


CASES = {
    "stars of S/N 15 beside S/N 100, 4 sigma, noise as an array": faint_beside_bright,
    "pure noise, threshold 0.5, area 1": cleaning,
    "half of each star masked": masked_pixels,
    "bad columns, masked": bad_columns,
    "quality image: sources 32, bad columns 1": quality_bits,
    "mosaic, 46 % padding": padded_mosaic,
    "saturated stars": saturated_stars,
    "cube RA, DEC, FREQ": distorted_skies,
    "cube VELO, RA, DEC": velocity_first,
    "Jy/beam": jansky_per_beam,
    "integers": integers,
    "counts": counts,
    "objects larger than the boxes": large_objects,
    "TIFF": tiffs,
    "odd cards": odd_cards,
    "apertures and errors": apertures_and_errors,
}


def main(argv=None):
    """Run the cases, print their table; return 1 if a value of the tool is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only cases named like this")
    own = ROOT / "source_extractor.py"
    parser.add_argument("--script", type=Path, default=own, help="the tool (default: this one)")
    parser.add_argument("--before", type=Path, help="another version of it, to compare")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    versions = {"before": args.before, "tool": args.script}
    versions = {title: path for title, path in versions.items() if path}
    good = True
    print(row_of("case", "measured", "truth", "limit", *versions, "SExtractor"))
    print("|---|---|" + "---:|" * (len(versions) + 3))
    with tempfile.TemporaryDirectory() as work:
        tools = [
            Tool(path, Path(tempfile.mkdtemp(prefix=title, dir=work)))
            for title, path in versions.items()
        ]
        for name, case in CASES.items():
            if args.words and not any(word in name for word in args.words):
                continue
            label = name
            for rows in zip(*(case(tool, args.seed) for tool in tools), strict=True):
                row = rows[-1]
                good &= row.good()
                theirs = written(row.theirs()) if sextractor.PROGRAM else ""
                ours = (version.cell() for version in rows)
                cells = (row.measured, written(row.truth), row.limit(), *ours, theirs)
                print(row_of(label, *cells), flush=True)
                label = ""
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
