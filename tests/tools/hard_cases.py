"""Data that people have and that are hard: what the tool makes of them, against what is true.

    tests/tools/hard_cases.py [--seed 1]

Makes images for each case, runs the tool and, where it is installed, SExtractor on them, and prints
a Markdown table. Exits with 1 if a value of the tool is beyond its limits; such cells end with an
exclamation mark. A source and a detection are the same if they are each other's nearest, within 2
pixels: "found" is the part of the sources for which there is one, "spurious" the number of the
other detections. "Warned" is 1 if the tool's warnings name the option that helps.
"""

import argparse
import re
import sys
from math import inf, pi

import numpy as np

from compare_sextractor import sextract
from sextractor import PROGRAM
from sky import grid_positions, simulate, stars, vstack
from truth import match, noise_area, row_of, run_tool, spread

RADIUS = 2.0  # pixels within which a detection and a source are the same
FWHM = 3.0
BAD_VALUE = 50_000  # of the pixels of a bad column
ANY = (-inf, inf)


# The table


def row(measured, limits, ours, theirs=""):
    """Return if our values are within the limits, and a row of the table, but for the case."""
    low, high = limits
    good = all(low <= value <= high for value in np.atleast_1d(ours))
    within = "" if limits == ANY else f"{low:g} to {high:g}"
    return good, (measured, within, written(ours) + " !" * (not good), theirs)


def written(values):
    """Return a number, or several, as the text of a cell."""
    return " / ".join(f"{float(value):.3g}" for value in np.atleast_1d(values))


def compared(ours, run_theirs, *measurements):
    """Yield a row for each name, limits and function of our result and of SExtractor's."""
    theirs = run_theirs() if PROGRAM else None
    for name, limits, measure in measurements:
        yield row(name, limits, measure(ours), written(measure(theirs)) if PROGRAM else "")


# Running: the columns compared, and what SExtractor calls them

POSITIONS = "x y xwin ywin errawin errbwin errthetawin"
NAMES = {name: f"{name.upper()}_IMAGE" for name in POSITIONS.split()}
NAMES |= {"flux_auto": "FLUX_AUTO", "flux_aper_4": "FLUX_APER"}


def options_advised(run, option):
    """Return the options in the warnings that name this one, each with a value."""
    lines = " ".join(line for line in run.warnings.splitlines() if option in line)
    first = dict(reversed(re.findall(r"(--[a-z-]+) ([\w.]+)", lines)))
    return [word for pair in first.items() for word in pair]


def sextract_both(image, bad=None, **settings):
    """Return SExtractor's catalogue, and the image less its background; `bad` has weight 0."""
    weight = None if bad is None else (~bad).astype(np.float32)
    catalog, rest = sextract(NAMES, image, weight=weight, PHOT_APERTURES=4, **settings)
    catalog["errthetawin"] = np.radians(catalog["errthetawin"])
    return catalog, rest


# Skies, and what is measured on them


def star_flux(snr, fwhm=FWHM):
    """Return the flux of a star of this signal-to-noise ratio, in noise of 1."""
    return snr * np.sqrt(noise_area(stars(0.0, 0.0, 1.0, fwhm=fwhm)))


def star_field(shape, spacing, snr, seed):
    """Return an image and the truth of isolated stars, of S/N from one number to another."""
    x, y = grid_positions(shape, spacing, seed=seed)
    part = np.random.default_rng(seed).random(len(x))
    flux = star_flux(snr[0] * (snr[1] / snr[0]) ** part)
    return simulate(shape, stars(x, y, flux, fwhm=FWHM), seed=seed, level=100.0)


def found(catalog, truth, where=True):
    """Return the percentage of the true sources that are found, of those `where` it is True."""
    seen = np.isin(np.arange(len(truth)), match(catalog, truth, RADIUS)[1])
    return 100 * np.mean(seen[np.broadcast_to(where, len(truth))])


def spurious(catalog, truth):
    """Return the number of detections that are no source's."""
    return len(catalog) - len(match(catalog, truth, RADIUS)[0])


def brightest_near(catalog, x, y, radius):
    """Return for each place the brightest detection within `radius` pixels; nan for none."""
    ranked = catalog.sort_values("flux_auto", ascending=False)
    distance = np.hypot(*(ranked[[name]].to_numpy() - at for name, at in (("x", x), ("y", y))))
    first = np.where((distance < radius).any(axis=0), (distance < radius).argmax(axis=0), -1)
    return ranked.reset_index(drop=True).reindex(first).reset_index(drop=True)


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
    return lambda function: CASES.setdefault(name, function)


@case("stars of S/N 15 beside S/N 100, 4 sigma, noise as an array")
def faint_beside_bright(seed):
    distances, shape = (12, 16, 20, 24), (1280, 1600)
    x, y = grid_positions(shape, 80, seed=seed)
    distance, angle = np.resize(distances, len(x)), np.random.default_rng(seed).random(len(x)) * pi
    at = x + distance * np.cos(angle), y + distance * np.sin(angle)
    sources = stars(*at, star_flux(15), fwhm=FWHM), stars(x, y, star_flux(100), fwhm=FWHM)
    image, truth = simulate(shape, vstack(sources), seed=seed, level=100.0)
    where = [np.append(distance == d, np.zeros(len(x), bool)) for d in distances]
    # The noise of the filtered image is 6/16 of that of the image.
    yield from compared(
        run_tool(image, "--err-option", "array_rms", "--thresh", 4).catalog,
        lambda: sextract_both(image, DETECT_THRESH=4 * 6 / 16)[0],
        (
            f"found, %, {written(distances)} pixels from the bright star",
            (99, inf),
            lambda catalog: [found(catalog, truth, w) for w in where],
        ),
    )


@case("half of each star masked")
def masked_pixels(seed):
    image, truth = star_field((480, 480), 48, (30, 300), seed)
    mask = np.zeros(image.shape, bool)
    for x, y in truth["x", "y"].iterrows():
        mask[round(y) - 20 : round(y) + 20, round(x) + 1 : round(x) + 8] = True
    labels = run_tool(image, mask=mask).images["segmentation"]
    yield row("masked pixels with a label", (0, 0), np.sum(labels[mask] > 0))


@case("bad columns through stars of S/N 200, masked")
def bad_columns(seed):
    widths = 1, 2, 3
    kinds = [(w, offset, fwhm) for w in widths for offset in (0, 2) for fwhm in (3.0, 4.0)]
    shape = (480, 64 * len(kinds))
    x, y = grid_positions(shape, 64, seed=seed)
    width, offset, fwhm = np.transpose(kinds)[:, (x // 64).astype(int)]
    flux = np.where(fwhm == 3, star_flux(200, 3.0), star_flux(200, 4.0))
    whole, _ = simulate(shape, stars(x, y, flux, fwhm=fwhm), seed=seed, level=100.0)
    bad = np.zeros(shape, bool)
    for number, (columns, off, _) in enumerate(kinds):
        first = 64 * number + 32 + off - columns // 2
        bad[:, first : first + columns] = True
    image = np.where(bad, np.float32(BAD_VALUE), whole)

    def medians(values):
        return [values[(width == w) & (offset == 0) & (fwhm == 3)].median() for w in widths]

    def flux_ratio(catalogs):
        near, before = (brightest_near(catalog, x, y, 10) for catalog in catalogs)
        return medians(near["flux_auto"] / before["flux_auto"])

    def distance(catalogs):
        near = brightest_near(catalogs[0], x, y, 10)
        return medians(np.hypot(near["x"] - x, near["y"] - y))

    yield from compared(
        (run_tool(image, mask=bad).catalog, run_tool(whole).catalog),
        lambda: (sextract_both(image, bad=bad)[0], sextract_both(whole)[0]),
        ("`flux_auto` over that without the gap, 1 / 2 / 3 columns", (0.98, 1.02), flux_ratio),
        ("error of the position, pixels, 1 / 2 / 3 columns", (0, 0.1), distance),
    )


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
    zeros = np.where(outside, 0, image)
    plain = run_tool(zeros)
    yield row("warned of the zeros", (1, 1), "--blank" in plain.warnings)
    for name, run, bad, least, most in (
        ("zeros", plain, None, -inf, inf),
        ("zeros, `--blank 0`", run_tool(zeros, "--blank", 0), outside, 99, 2),
    ):
        yield from compared(
            run.catalog,
            lambda bad=bad: sextract_both(zeros, bad=bad)[0],
            (f"found, %, {name}", (least, inf), lambda catalog: found(catalog, truth, whole)),
            (f"spurious, {name}", (-inf, most), lambda catalog: spurious(catalog, truth)),
        )


@case("integers")
def integers(seed):
    levels, rng = (1000.0, 1000.3, 1000.6), np.random.default_rng(seed)
    skies = [np.rint(rng.normal(level, 1, (384, 384))).astype(np.int16) for level in levels]

    def worst(backgrounds):
        return max(np.subtract(backgrounds, levels), key=abs)

    yield from compared(
        [run_tool(sky).images["background"].mean() for sky in skies],
        lambda: [np.mean(sky - sextract_both(sky)[1]) for sky in skies],
        ("error of the background, quanta, in noise of 1", (-0.1, 0.1), worst),
    )


@case("counts")
def counts(seed):
    rates, rng = (0.01, 0.03, 0.1, 0.3), np.random.default_rng(seed)
    skies = [rng.poisson(rate, (512, 512)).astype(np.int16) for rate in rates]
    runs = [run_tool(sky) for sky in skies]
    yield from compared(
        [run.catalog for run in runs],
        lambda: [sextract_both(sky)[0] for sky in skies],
        (f"spurious, empty sky of {written(rates)} a pixel", ANY, lambda some: [*map(len, some)]),
    )
    yield row("warned of them", (1, 1), ["--err-option none" in run.warnings for run in runs])
    advised = [options_advised(run, "--err-option") for run in runs]
    number = [len(run_tool(sky, *words).catalog) for sky, words in zip(skies, advised, strict=True)]
    yield row("spurious there, with the options that it advises", (0, 2), number)


@case("cells of 150 pixels")
def large_objects(seed):
    shape = (900, 900)
    x, y = grid_positions(shape, 300, seed=seed)
    rows, columns = np.indices(shape)
    cells = sum(
        40 / (1 + np.exp((np.hypot(columns - left, rows - low) - 75) / 3))
        for left, low in zip(x, y, strict=True)
    )
    image = (np.random.default_rng(seed).normal(100, 1, shape) + cells).astype(np.float32)

    def lost(catalog):
        flux = brightest_near(catalog, x, y, 75)["flux_auto"].fillna(0)
        return 100 * np.max(1 - flux / (cells.sum() / len(x)))

    run = run_tool(image)
    yield from compared(run.catalog, lambda: sextract_both(image)[0], ("flux lost, %", ANY, lost))
    yield row("warned", (1, 1), "--bw" in run.warnings)
    better = lost(run_tool(image, *options_advised(run, "--bw")).catalog)
    yield row("flux lost, %, with the options that it advises", (-inf, 10), better)


@case("apertures and errors")
def apertures_and_errors(seed):
    image, truth = star_field((1200, 1200), 40, (7, 200), seed)
    snr = truth["flux"] / star_flux(1)

    def pair(catalog, true):
        i, j = match(catalog, true, RADIUS)
        return catalog.iloc[i].reset_index(drop=True), true[j]

    def aperture_error(result):
        catalog, _ = pair(result[0], truth[snr > 20])
        places = zip(catalog["x"], catalog["y"], strict=True)
        exact = np.array([sum_in_circle(result[1], x, y, 2.0) for x, y in places])
        return 100 * np.sqrt(np.mean((catalog["flux_aper_4"] / exact - 1) ** 2))

    def windowed_pull(result):
        catalog, true = pair(result[0], truth[snr > 10])
        a, b = catalog["errawin"], catalog["errbwin"]
        cos, sin = np.cos(catalog["errthetawin"]), np.sin(catalog["errthetawin"])
        errors = np.hypot(a * cos, b * sin), np.hypot(a * sin, b * cos)
        gaps = catalog["xwin"] - true["x"], catalog["ywin"] - true["y"]
        return spread(np.divide(gaps, errors))

    run = run_tool(image, "--aperture-diameters", 4)
    yield from compared(
        (run.catalog, run.images["subtracted"]),
        lambda: sextract_both(image),
        ("rms error of an aperture of 4 pixels, %", (0, 0.02), aperture_error),
        ("pulls of `xwin`, `ywin`, width, S/N over 10", (0.9, 1.1), windowed_pull),
    )


def main(argv=None):
    """Run the cases, print their table; return 1 if a value of the tool is beyond its limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    args, good = parser.parse_args(argv), True
    print(row_of("case", "measured", "limits", "tool", "SExtractor"))
    print("|---|---|---:|---:|---:|")
    for name, rows_of in CASES.items():
        for number, (within, cells) in enumerate(rows_of(args.seed)):
            good &= within
            print(row_of("" if number else name, *cells), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
