"""Inject stars of known flux into empty places of an image, and see how well they are measured.

    python tests/tools/inject.py IMAGE [--fwhm 3] [--number 300] [options of source_extractor ...]

A few stars at a time are put where nothing was detected. Prints the scatter of the fluxes of those
that are found, in units of their errors (1 is right), of a circle 6 pixels wide and of the Kron
ellipse, against what the injected star alone has there; and the completeness by magnitude.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import sep

import sky
import source_extractor
from truth import nearest, run_tool, spread

AT_ONCE, BINS = 8, 8


def empty_places(segmentation, bad, distance, rng, number):
    """Return x and y of places at least so far from sources, bad pixels, and the border."""
    ny, nx = segmentation.shape
    blocked, found = np.pad((segmentation > 0) | bad, 1, constant_values=True), []
    for x, y in rng.uniform(0, [nx - 1, ny - 1], (200_000, 2)):
        if len(found) == number:
            break
        row, column, reach = round(y) + 1, round(x) + 1, int(distance)
        part = np.s_[
            max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1
        ]
        apart = all(np.hypot(x - other[0], y - other[1]) > 4 * distance for other in found)
        if (
            apart
            and not blocked[part].any()
            and reach < row < ny - reach
            and reach < column < nx - reach
        ):
            found.append((x, y))
    return np.reshape(found, (-1, 2)).T


def inject(image, fwhm, number, options, seed=1):
    """Return a row for each injected star: its flux, and its pulls, nan if it wasn't found."""
    rng, rows = np.random.default_rng(seed), []
    options = "--aperture-diameters", 6, *options
    before = run_tool(image, *options)
    segmentation, noise = before.images["segmentation"], before.catalog["fluxerr_aper_6"].median()
    while len(rows) < number:
        x, y = empty_places(segmentation, ~np.isfinite(image), 2 * fwhm + 4, rng, AT_ONCE)
        if not len(x):
            raise SystemExit("there is no empty place for a star")
        flux = noise * 10 ** rng.uniform(np.log10(2), 2.3, len(x))
        stars = sky.stars(x, y, flux, fwhm=fwhm)
        light = sky.light(image.shape, stars)
        found = run_tool((image + light).astype(image.dtype), *options).catalog
        if not len(found):
            rows += [(each, np.nan, np.nan) for each in flux]
            continue
        for each, at, distance in zip(flux, *nearest(stars, found), strict=True):
            if distance > 2:
                rows.append((each, np.nan, np.nan))
                continue
            row = found.iloc[at]
            circle = sep.sum_circle(light, [row["x"]], [row["y"]], 3, subpix=0)[0][0]
            shape = [[row[name]] for name in ("x", "y", "a", "b", "theta", "kron_radius")]
            ellipse = sep.sum_ellipse(light, *shape, subpix=1)[0][0]
            pulls = [
                (row[f"flux_{kind}"] - true) / row[f"fluxerr_{kind}"]
                for kind, true in (("aper_6", circle), ("auto", ellipse))
            ]
            rows.append((each, *pulls))
    return pd.DataFrame(rows, columns=["flux", "aper_6", "auto"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--hdu")
    parser.add_argument("--fwhm", type=float, default=3.0)
    parser.add_argument("--number", type=int, default=300)
    args, options = parser.parse_known_args()
    source_extractor.logging.disable()
    _, image = source_extractor.read_image(args.image, args.hdu)
    stars = inject(image, args.fwhm, args.number, options)
    print(f"{args.image.name} {' '.join(options)}: {len(stars)} stars injected")
    for kind in ("aper_6", "auto"):
        print(f"{kind:8} scatter {spread(stars[kind]):.2f}, median {stars[kind].median():+.2f}")
    magnitude = -2.5 * np.log10(stars["flux"])
    for part in np.array_split(magnitude.sort_values().index, BINS):
        complete = stars.loc[part, "auto"].notna().mean()
        low, high = magnitude[part].min(), magnitude[part].max()
        print(f"{low:7.2f} to {high:6.2f} mag  complete to {100 * complete:3.0f} %")


if __name__ == "__main__":
    main()
