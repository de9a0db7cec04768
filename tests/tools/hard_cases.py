"""Data that people have and that are hard: what the tool makes of them, against what is true.

    tests/tools/hard_cases.py [--seed 1] [WORD ...]

Makes images for each case (only those with one of the words in their names), runs the tool and,
where it is installed, SExtractor on them, and prints a Markdown table. Exits with 1 if a value of
the tool is beyond its limit; such cells end with an exclamation mark.

Values for several distances, widths or rates stand in one cell, divided by strokes. A source and a
detection are the same if they are each other's nearest, within 2 pixels: "found" is the part of the
sources for which there is one, "spurious" the number of the other detections.
"""

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from math import inf, nan, pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.table import Table

import sextractor
import source_extractor
from compare_sextractor import sextract
from sky import galaxies, grid_positions, simulate, stars, vstack
from truth import match, nearest, noise_area, row_of, spread

KERNEL = Path(__file__).resolve().parents[2] / "test-data" / "kernel.conv"  # FWHM 3
RADIUS = 2.0  # pixels within which a detection and a source are the same
FWHM = 3.0
BAD_VALUE = 50_000  # of the pixels of a bad column


# The table


class Row(NamedTuple):
    """A row of the table, but for the case: values are numbers, truth values, texts, or tuples."""

    measured: str
    truth: object
    limits: tuple | None  # (low, high) of our value
    ours: object
    theirs: Callable = lambda: ""  # called only where SExtractor is installed

    def good(self):
        """Tell if all of our values are within the limits."""
        low, high = self.limits or (-inf, inf)
        values = self.ours if isinstance(self.ours, tuple) else (self.ours,)
        return self.limits is None or all(low <= value <= high for value in values)

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


def written(value):
    """Return a value as the text of a cell."""
    match value:
        case tuple():
            return " / ".join(map(written, value))
        case bool() | np.bool_():
            return "yes" if value else "no"
        case float() | np.floating():
            return f"{value:.3g}"
        case _:
            return str(value)


def is_warned(ours, of=""):
    return Row(f"is there a warning{of}?", True, (True, True), ours)


def on_both(ours, run_theirs, *arguments, **keywords):
    """Return a function that measures our result, and theirs when it is asked for."""
    theirs = cache(partial(run_theirs, *arguments, **keywords))
    return lambda measure: (measure(ours), lambda: measure(theirs()))


# Running: the columns compared, and what SExtractor calls them

POSITIONS = "x y xwin ywin errx2 erry2 errawin errbwin errthetawin"
NAMES = {
    **{name: f"{name.upper()}_IMAGE" for name in POSITIONS.split()},
    **{"thresh": "THRESHOLD", "flux_auto": "FLUX_AUTO", "fluxerr_auto": "FLUXERR_AUTO"},
    **{"flux_aper_4": "FLUX_APER"},
}


class Run(NamedTuple):
    """What one run of the tool makes of an image, and its warnings."""

    catalog: pd.DataFrame
    images: dict
    warnings: str

    def advised(self, option):
        """Return the options in the warnings that name this one, each with a value."""
        lines = " ".join(line for line in self.warnings.splitlines() if option in line)
        first = dict(reversed(re.findall(r"(--[a-z-]+) ([\w.]+)", lines)))
        return [word for pair in first.items() for word in pair]


def tool(image, *options, mask=None):
    """Run the tool in this process: it takes longer to start than to run."""
    err = io.StringIO()
    with tempfile.TemporaryDirectory() as directory, redirect_stderr(err):
        work = Path(directory)
        fits.writeto(work / "image.fits", image)
        if mask is not None:
            fits.writeto(work / "mask.fits", mask.astype(np.uint8))
            options += ("--mask", work / "mask.fits")
        options += ("-o", work, "--subtracted", work / "subtracted.fits")
        with redirect_stdout(io.StringIO()):
            source_extractor.main([str(work / "image.fits"), *map(str, options)])
        catalog = pd.read_csv(work / "catalog.tsv", sep="\t")
        images = {path.stem: fits.getdata(path) for path in work.glob("*.fits")}
    native = {name: data.astype(data.dtype.newbyteorder("=")) for name, data in images.items()}
    return Run(catalog, native, err.getvalue())


def sextract_both(image, bad=None, **settings):
    """Return SExtractor's catalogue, and the image less its background; `bad` has weight 0."""
    weight = None if bad is None else (~bad).astype(np.float32)
    catalog, rest = sextract(NAMES, image, weight=weight, PHOT_APERTURES=4, **settings)
    catalog["errthetawin"] = np.radians(catalog["errthetawin"])
    return catalog, rest


def sextracted(image, **keywords):
    return sextract_both(image, **keywords)[0]


# Skies, and what is measured on them


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


# Cases: from a seed to rows

CASES = {}


def case(name):
    """Put a function of a seed into the table of cases."""
    return lambda function: CASES.setdefault(name, function)


@case("stars of S/N 15 beside S/N 100, 4 sigma, noise as an array")
def faint_beside_bright(seed):
    distances, shape = (12, 16, 20, 24), (1280, 1600)
    x, y = grid_positions(shape, 80, seed=seed)
    distance, angle = np.resize(distances, len(x)), np.random.default_rng(seed).random(len(x)) * pi
    at = x + distance * np.cos(angle), y + distance * np.sin(angle)
    sources = [stars(*at, star_flux(15), fwhm=FWHM), stars(x, y, star_flux(100), fwhm=FWHM)]
    image, truth = simulate(shape, vstack(sources), seed=seed, level=100.0)
    where = [np.append(distance == d, np.zeros(len(x), bool)) for d in distances]
    for name, text, options in (
        ("default kernel", sextractor.KERNEL, ()),
        (
            "Gaussian of 3",
            KERNEL.read_text(),
            ("--filter-case", "file", "--filter-file", KERNEL),
        ),
    ):
        kernel = np.array([row.split() for row in text.splitlines() if row[0].isdigit()], float)
        height = 4 * np.sqrt(np.sum(kernel**2)) / np.sum(kernel)  # where its own S/N is 4
        run = tool(image, "--err-option", "array_rms", "--thresh", 4, *options)
        both = on_both(run.catalog, sextracted, image, kernel=text, DETECT_THRESH=height)
        yield Row(
            f"found, %, {written(distances)} pixels from the bright star, {name}",
            *(100, (99, inf)),
            *both(lambda catalog: tuple(found(catalog, truth, w) for w in where)),
        )
        name, limits = f"`thresh` over the noise, {name}", (0.93 * height, 1.07 * height)
        yield Row(name, height, limits, *both(lambda catalog: catalog["thresh"].median()))


@case("half of each star masked")
def masked_pixels(seed):
    image, truth = star_field((480, 480), 48, (30, 300), seed)
    mask = np.zeros(image.shape, bool)
    for x, y in truth["x", "y"].iterrows():
        mask[round(y) - 20 : round(y) + 20, round(x) + 1 : round(x) + 8] = True
    run = tool(image, mask=mask)
    labels, catalog = run.images["segmentation"].ravel(), run.catalog
    npix = np.bincount(labels)[1:]
    flux = np.bincount(labels, np.nan_to_num(run.images["subtracted"]).ravel())[1:]
    yield Row("masked pixels with a label", 0, (0, 0), np.sum(labels[mask.ravel()] > 0))
    gap = np.abs(npix - catalog["npix"]).max()
    yield Row("`npix` against the map, largest difference", 0, (0, 0), gap)
    gap = 100 * np.abs(flux / catalog["flux"] - 1).max()
    yield Row("`flux` against the map's pixels, largest difference, %", 0, (-inf, 0.1), gap)


@case("bad columns, masked")
def bad_columns(seed):
    widths = 1, 2, 3
    kinds = [(w, offset, fwhm) for w in widths for offset in (0, 2) for fwhm in (3.0, 4.0)]
    shape = (480, 64 * len(kinds))
    x, y = grid_positions(shape, 64, seed=seed)
    width, offset, fwhm = np.transpose(kinds)[:, (x // 64).astype(int)]
    flux = np.where(fwhm == 3, star_flux(200, 3.0), star_flux(200, 4.0))
    whole, truth = simulate(shape, stars(x, y, flux, fwhm=fwhm), seed=seed, level=100.0)
    bad = np.zeros(shape, bool)
    for number, (columns, off, _) in enumerate(kinds):
        first = 64 * number + 32 + off - columns // 2
        bad[:, first : first + columns] = True
    image = np.where(bad, np.float32(BAD_VALUE), whole)
    both = on_both(
        (tool(image, mask=bad).catalog, tool(whole).catalog),
        lambda: (sextracted(image, bad=bad), sextracted(whole)),
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

    def of_each(measure, parts):
        return lambda catalogs: tuple(measure(catalogs, part) for part in parts)

    for place, off in (("through the star", 0), ("2 pixels off", 2)):
        for size in (3, 4):
            parts = [truth[(width == w) & (offset == off) & (fwhm == size)] for w in widths]
            for what, right, limits, measure in (
                ("sources a star, most", 1, (1, 1), pieces),
                ("`flux_auto` over that without the gap, median", 1, (0.98, 1.02), flux_ratio),
                ("`x`, `y` from truth, median, pixels", 0, (-inf, 0.1), distance),
            ):
                name = f"FWHM {size}: {what}, {written(widths)} columns {place}"
                yield Row(name, right, limits, *both(of_each(measure, parts)))


@case("mosaic, 46 % padding")
def padded_mosaic(seed):
    image, truth = star_field((800, 800), 40, (15, 200), seed)
    rows, columns = np.indices(image.shape) - 399.5
    along = columns * np.cos(0.35) + rows * np.sin(0.35)
    across = rows * np.cos(0.35) - columns * np.sin(0.35)
    reach = np.maximum(np.abs(along), np.abs(across))
    outside = reach > 294 + np.random.default_rng(seed).uniform(-4, 4, (len(reach), 1))
    at = reach[np.rint(truth["y"]).astype(int), np.rint(truth["x"]).astype(int)]
    truth, whole = truth[at < 300], at[at < 300] < 280  # those further out aren't there
    zeros, nans = np.where(outside, 0, image), np.where(outside, nan, image)

    def median_error(catalog):
        catalog, true = pair(catalog, truth[whole])
        return 100 * (catalog["flux_auto"] / true["flux"] - 1).median()

    plain = tool(zeros)
    yield is_warned("--blank" in plain.warnings, " of the zeros")
    for name, run, bad in (
        ("zeros", plain, None),
        ("zeros, `--blank 0`", tool(zeros, "--blank", 0), outside),
        ("NaN", tool(nans), outside),
    ):
        both = on_both(run.catalog, sextracted, zeros, bad=bad)
        for what, right, limits, measure in (
            ("found, %", 100, (99, inf), lambda catalog: found(catalog, truth, whole)),
            ("spurious", 0, (-inf, 2), lambda catalog: spurious(catalog, truth)),
            ("median error of `flux_auto`, %", 0, (-2, 2), median_error),
        ):
            yield Row(f"{what}, {name}", right, None if run is plain else limits, *both(measure))


@case("integers")
def integers(seed):
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
        worst_error(lambda sky: tool(sky).images["background"].mean()),
        lambda: worst_error(lambda sky: np.mean(sky - sextract_both(sky)[1])),
    )
    image, truth = star_field((768, 768), 32, (30, 30), seed, level=100.3)
    image = np.rint(image).astype(np.int16)

    def mean_pull(catalog):
        catalog, true = pair(catalog, truth)
        return np.mean((catalog["flux_auto"] - true["flux"]) / catalog["fluxerr_auto"])

    name = "bias of `flux_auto` at S/N 30, in its errors, in noise of 1"
    yield Row(name, 0, (-0.3, 0.3), *on_both(tool(image).catalog, sextracted, image)(mean_pull))


@case("counts")
def counts(seed):
    rates, shape = (0.01, 0.03, 0.1, 0.3), (512, 512)
    rng = np.random.default_rng(seed)
    empty = [rng.poisson(rate, shape).astype(np.int16) for rate in rates]
    sources = stars(*grid_positions(shape, 64, seed=seed), 60.0, fwhm=FWHM)
    conditions = {"seed": seed, "noise": 0.0, "gain": 1.0}
    starry = [simulate(shape, sources, level=rate, **conditions)[0] for rate in rates]

    def of_each(measure):
        return lambda catalogs: tuple(measure(catalog, sources) for catalog in catalogs)

    def as_advised(sky):
        return tool(sky, *tool(sky).advised("--err-option")).catalog

    runs = [tool(sky) for sky in empty]
    yield Row(
        f"sources on an empty sky of {written(rates)} a pixel",
        *(0, None),
        tuple(len(run.catalog) for run in runs),
        lambda: tuple(len(sextracted(sky)) for sky in empty),
    )
    yield is_warned(tuple("--err-option none" in run.warnings for run in runs))
    number = tuple(len(as_advised(sky)) for sky in empty)
    yield Row("sources there, with the options that it advises", 0, (-inf, 2), number)
    catalogs = [as_advised(sky.astype(np.int16)) for sky in starry]
    both = on_both(catalogs, lambda: [sextracted(sky) for sky in starry])
    name = "stars of 60 counts, with the options that it advises"
    yield Row(f"found, %, {name}", 100, (99, inf), *both(of_each(found)))
    yield Row(f"spurious, {name}", 0, (-inf, 2), *both(of_each(spurious)))


@case("objects larger than the boxes")
def large_objects(seed):
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
    for name, image, truth in (
        ("cells of 150 pixels", tissue, each),
        ("a galaxy of half-light radius 60", *simulate(shape, source, seed=seed, level=100.0)),
    ):

        def lost(catalog, truth=truth):
            flux = brightest_near(catalog, truth, 75)["flux_auto"].fillna(0)
            return 100 * np.max(1 - flux / truth["flux"])

        run = tool(image)
        both = on_both(run.catalog, sextracted, image)
        yield Row(f"flux lost, %, {name}", 0, None, *both(lost))
        yield is_warned("--bw" in run.warnings)
        better = lost(tool(image, *run.advised("--bw")).catalog)
        yield Row("flux lost, %, with the options that it advises", 0, (-inf, 10), better)


@case("apertures and errors")
def apertures_and_errors(seed):
    image, truth = star_field((1200, 1200), 40, (7, 200), seed)
    snr = truth["flux"] / star_flux(1)
    run = tool(image, "--aperture-diameters", 4)
    both = on_both((run.catalog, run.images["subtracted"]), sextract_both, image)

    def aperture_error(result):
        catalog, _ = pair(result[0], truth[snr > 20])
        places = zip(catalog["x"], catalog["y"], strict=True)
        exact = np.array([sum_in_circle(result[1], x, y, 2.0) for x, y in places])
        return 100 * np.sqrt(np.mean((catalog["flux_aper_4"] / exact - 1) ** 2))

    def windowed_pull(result):
        catalog, true = pair(result[0], truth[snr > 10])
        a, b, theta = (catalog[f"err{name}win"] for name in ("a", "b", "theta"))
        cos, sin = np.cos(theta), np.sin(theta)
        errors = np.hypot(a * cos, b * sin), np.hypot(a * sin, b * cos)
        gaps = catalog["xwin"] - true["x"], catalog["ywin"] - true["y"]
        return spread(np.divide(gaps, errors))

    def isophotal_pull(result):
        catalog, true = pair(result[0], truth[snr < 15])
        gaps = catalog["x"] - true["x"], catalog["y"] - true["y"]
        return spread(np.divide(gaps, np.sqrt([catalog["errx2"], catalog["erry2"]])))

    for name, right, limits, measure in (
        ("rms error of an aperture of 4 pixels, %", 0, (-inf, 0.02), aperture_error),
        ("pulls of `xwin`, `ywin`, width, S/N over 10", 1, (0.9, 1.1), windowed_pull),
        ("pulls of `x`, `y`, width, S/N 7 to 15", 1, None, isophotal_pull),
    ):
        yield Row(name, right, limits, *both(measure))


def main(argv=None):
    """Run the cases, print their table; return 1 if a value of the tool is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only cases named like this")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    good = True
    print(row_of("case", "measured", "truth", "limit", "tool", "SExtractor"))
    print("|---|---|---:|---:|---:|---:|")
    for name, rows_of in CASES.items():
        if args.words and not any(word in name for word in args.words):
            continue
        for number, row in enumerate(rows_of(args.seed)):
            good &= row.good()
            theirs = written(row.theirs()) if sextractor.PROGRAM else ""
            cells = (row.measured, written(row.truth), row.limit(), row.cell(), theirs)
            print(row_of("" if number else name, *cells), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
