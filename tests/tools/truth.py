"""How right the measurements are: simulated skies, measured by the tool, against what is true.

    tests/tools/truth.py [--seed 1] [--snr 5 10 20 ...]

Prints a Markdown table: for each sky a row for each range of signal-to-noise. Exits with 1 if the
pull of isolated Gaussian stars in white noise has not a width of 0.8 to 1.25.

Rows go by the true signal-to-noise ratio: that of the best possible measurement of a source's
flux, which weighs the pixels with the source's own profile. The columns:

sources      in this range
complete     part of them that are detected
pure         part of the detections of this range, by their own `snr`, that are sources
x, xwin      position error per axis, in units of FWHM / 2.355 / SNR; white noise allows a Gaussian
             star 1.41 at the best. A galaxy's FWHM is twice its half-light radius here.
bias         of `flux_auto`, median
scatter      of `flux_auto`
pull         width of (flux_auto - true flux) / fluxerr_auto
flux_radius  over the true half-light radius, median
fwhm         over the true one, median

Errors, scatter and width are half the range of the middle 68.3 %: the standard deviation, without
its outliers.
"""

import argparse
import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.table import Table

import source_extractor
from sky import galaxies, grid_positions, random_sources, simulate, stars

BINS = (5, 10, 20, 50, 200, 500)
RADIUS = 1.5  # pixels within which a detection and a source are the same
PULL_WIDTH = (0.8, 1.25)
PINNED = "isolated Gaussian stars"
FWHM = 3.0
INDEPENDENT = "--noise-correlation", "none"  # for errors that are SExtractor's


class Sky(NamedTuple):
    shape: tuple[int, int]
    sources: Table
    conditions: dict  # keywords of `simulate`
    options: tuple[str, ...] = ()


class Run(NamedTuple):
    catalog: pd.DataFrame
    images: dict
    warnings: str


def run_tool(image, *options, header=None, mask=None):
    """Run the tool on an array (ny, nx) in this process: to start one takes longer than the run."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(out), redirect_stderr(err):
        work = Path(directory)
        fits.writeto(work / "image.fits", image, header)
        options += ("-o", work, "--subtracted", work / "subtracted.fits")
        if mask is not None:
            fits.writeto(work / "mask.fits", mask.astype(np.uint8))
            options += ("--mask", work / "mask.fits")
        if source_extractor.main([str(work / "image.fits"), *map(str, options)]):
            raise RuntimeError(err.getvalue())
        images = {path.stem: fits.getdata(path) for path in work.glob("*.fits")}
        return Run(pd.read_csv(work / "catalog.tsv", sep="\t"), images, err.getvalue())


def match(catalog, truth, radius):
    """Return the row numbers in both of those that are each other's nearest, within `radius`."""
    if not len(catalog):
        return np.empty((2, 0), int)
    there, distance = nearest(catalog, truth)
    back, _ = nearest(truth, catalog)
    i = np.flatnonzero((back[there] == np.arange(len(catalog))) & (distance <= radius))
    return i, there[i]


def nearest(points, others):
    """Return for each of the points the row number of the nearest of the others, and how far it is.

    Both are tables or mappings with the columns x and y, in pixels.
    """
    here, there = (np.asarray(t["x"]) + 1j * np.asarray(t["y"]) for t in (points, others))
    index = np.array([np.abs(there - place).argmin() for place in here], int)
    return index, np.abs(there[index] - here)


def spread(values):
    """Return half the range of the middle 68.3 %: the standard deviation of a normal sample."""
    low, high = np.nanpercentile(values, [15.87, 84.13]) if len(values) else (np.nan, np.nan)
    return (high - low) / 2


def noise_area(source):
    """Return the number of pixels whose noise limits the flux of a source (a table of one row)."""
    alone = source.copy()
    alone["x"], alone["y"], alone["flux"] = 127.0, 127.0, 1.0
    profile, _ = simulate((255, 255), alone, noise=0.0)
    return 1 / np.sum(profile.astype(float) ** 2)


def isolated(make, *, seed, gain=None, **conditions):
    """Make a sky of one kind of source, S/N 5 to 500, far from each other."""
    shape = (1536, 1536)
    x, y = grid_positions(shape, 48, seed=seed)
    noise = np.sqrt(1 + 100 / gain) if gain else 1.0
    snr = 5 * 100 ** np.random.default_rng(seed).random(len(x))
    flux = snr * noise * np.sqrt(noise_area(make(0.0, 0.0, 1.0)))
    conditions = {"level": 100.0, "gain": gain, **conditions}
    return Sky(shape, make(x, y, flux), conditions, ("--gain", gain) if gain else ())


def crowded(pixels_per_source, *, seed):
    """Make a sky of stars and galaxies at random places."""
    shape = (1024, 1024)
    number = shape[0] * shape[1] // pixels_per_source
    flux = np.array([5, 500]) * np.sqrt(noise_area(stars(0.0, 0.0, 1.0, fwhm=FWHM)))
    sources = random_sources(shape, number, seed=seed, flux=flux, fwhm=FWHM)
    return Sky(shape, sources, {"level": 100.0})


gaussian = partial(stars, fwhm=FWHM)
moffat = partial(stars, fwhm=FWHM, beta=3.0)
sersic = partial(galaxies, a=3.0, b=1.8, theta=0.5, fwhm=FWHM)

# Functions of a seed.
SKIES = {
    PINNED: partial(isolated, gaussian),
    "isolated Moffat stars (beta 3)": partial(isolated, moffat),
    "isolated Sersic galaxies, n = 1": partial(isolated, partial(sersic, n=1)),
    "isolated Sersic galaxies, n = 4": partial(isolated, partial(sersic, n=4)),
    "Gaussian stars, gradient of 30 times the noise across": partial(
        isolated, gaussian, gradient=(30.0, -15.0)
    ),
    "Gaussian stars, correlated noise (FWHM 2)": partial(isolated, gaussian, noise_fwhm=2.0),
    "Gaussian stars, Poisson noise (gain 2, sky 100)": partial(isolated, gaussian, gain=2.0),
    "stars and galaxies, one in 2500 pixels": partial(crowded, 2500),
    "stars and galaxies, one in 400 pixels": partial(crowded, 400),
}


def observe(sky, seed):
    """Simulate and measure a sky; return the catalogue, and the truth with its S/N."""
    image, truth = simulate(sky.shape, sky.sources, seed=seed, **sky.conditions)
    truth = truth.to_pandas()
    gain, level = sky.conditions.get("gain"), sky.conditions["level"]
    variance = 1 + level / gain if gain else 1.0
    same = len(set(sky.sources["n"][np.isfinite(sky.sources["n"])])) < 2
    area = noise_area(sky.sources[:1]) if same else noise_area(gaussian(0.0, 0.0, 1.0))
    own = truth["flux"] / gain if gain else 0.0
    truth["snr"] = truth["flux"] / np.sqrt(area * variance + own)
    return run_tool(image, *sky.options).catalog, truth


def compare(catalog, truth):
    """Return a row for each matched source: its true S/N, and what was measured against truth.

    Units are those of the table that the head of this file explains.
    """
    i, j = match(catalog, truth, RADIUS)
    found, true = catalog.iloc[i].reset_index(drop=True), truth.iloc[j].reset_index(drop=True)
    star = true["kind"] == "star"
    unit = true["fwhm"].where(star, 2 * true["r50"]) / 2.355 / true["snr"]
    pixels = np.sqrt(1 + 0.46 / (2 * true["r50"]) ** 2)  # a sum over square pixels is wider
    return pd.DataFrame(
        {
            "snr": true["snr"],
            "x": (found["x"] - true["x"]) / unit,
            "y": (found["y"] - true["y"]) / unit,
            "xwin": (found["xwin"] - true["x"]) / unit,
            "ywin": (found["ywin"] - true["y"]) / unit,
            "flux": found["flux_auto"] / true["flux"] - 1,
            "pull": (found["flux_auto"] - true["flux"]) / found["fluxerr_auto"],
            "flux_radius": found["flux_radius"] / (true["r50"] * pixels),
            "fwhm": (found["fwhm"] / true["fwhm"]).where(star),
        }
    )


# Columns of the table: how each is written, and what it is of the pairs within a range.
COLUMNS = {
    "x": ("{:.2f}", lambda pairs: spread(pairs[["x", "y"]])),
    "xwin": ("{:.2f}", lambda pairs: spread(pairs[["xwin", "ywin"]])),
    "bias": ("{:+.1%}", lambda pairs: pairs["flux"].median()),
    "scatter": ("{:.1%}", lambda pairs: spread(pairs["flux"])),
    "pull": ("{:.2f}", lambda pairs: spread(pairs["pull"])),
    "flux_radius": ("{:.2f}", lambda pairs: pairs["flux_radius"].median()),
    "fwhm": ("{:.2f}", lambda pairs: pairs["fwhm"].median()),
}


def summarize(catalog, truth, bins):
    """Yield the rows of a sky as texts, with the columns that the head of this file explains."""
    pairs = compare(catalog, truth)
    real = pd.Series(False, index=catalog.index)
    real.iloc[match(catalog, truth, RADIUS)[0]] = True
    for low, high in pairwise(bins):
        ours, true, within = (
            table["snr"].between(low, high, inclusive="left") for table in (catalog, truth, pairs)
        )
        complete = within.sum() / true.sum() if true.any() else np.nan
        cells = [f"{low:g}-{high:g}", true.sum(), f"{complete:.1%}"]
        cells.append(f"{real[ours].mean():.1%}")
        cells += [form.format(value_of(pairs[within])) for form, value_of in COLUMNS.values()]
        yield ["" if "nan" in str(cell) else cell for cell in cells]


def row_of(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def main(argv=None):
    """Make the skies, print their table; return 1 if the errors of the fluxes are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--snr", type=float, nargs="+", default=BINS, help="ends of the ranges")
    args = parser.parse_args(argv)
    good = True
    print(row_of("sky", "S/N", "sources", "complete", "pure", *COLUMNS))
    print("|---|---|" + "---:|" * (len(COLUMNS) + 3))
    for name, make in SKIES.items():
        catalog, truth = observe(make(seed=args.seed), args.seed)
        for number, cells in enumerate(summarize(catalog, truth, args.snr)):
            print(row_of("" if number else name, *cells), flush=True)
        if name == PINNED:
            width = spread(compare(catalog, truth)["pull"])
            good = PULL_WIDTH[0] <= width <= PULL_WIDTH[1]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
