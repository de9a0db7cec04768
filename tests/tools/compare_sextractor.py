"""How close to SExtractor the tool is: both measure the same images with the same parameters.

    tests/tools/compare_sextractor.py [--seed 1] [IMAGE ...]

Compares simulated skies and the first image of each FITS file given, its WCS reduced to the
celestial part. Sources of S/N over 10 are to be found by both within half a pixel. Prints a row of
a Markdown table for each field: how many are, and the median and 90th percentile of the absolute
differences; then those of flux_auto between SExtractor and itself on the transposed image, since
its deblending gives pixels between two sources to either of them at random. Exits with 1 if a
median is beyond its limit. Needs SExtractor 2.25.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

import sextractor
from sky import random_sources, simulate, tan_wcs
from truth import INDEPENDENT, match, row_of, run_tool

RADIUS = 0.5  # pixels
LEAST_MATCHED = 0.99
APERTURE = 6  # diameter in pixels

# Column: SExtractor's name, unit of the difference, the most its median may be.
COMPARED = {
    "x": ("X_IMAGE", "px", 0.01),
    "y": ("Y_IMAGE", "px", 0.01),
    "ra": ("ALPHA_J2000", "arcsec", 0.01),
    "dec": ("DELTA_J2000", "arcsec", 0.01),
    "a": ("A_IMAGE", "%", 1),
    "b": ("B_IMAGE", "%", 1),
    "flux_auto": ("FLUX_AUTO", "%", 0.5),
    "fluxerr_auto": ("FLUXERR_AUTO", "%", None),
    "magerr_auto": ("MAGERR_AUTO", "%", 5),
    "kron_radius": ("KRON_RADIUS", "%", None),
    "flux_radius": ("FLUX_RADIUS", "%", 2),
    "xwin": ("XWIN_IMAGE", "px", None),
    "ywin": ("YWIN_IMAGE", "px", None),
    f"flux_aper_{APERTURE}": ("FLUX_APER", "%", None),
    f"fluxerr_aper_{APERTURE}": ("FLUXERR_APER", "%", None),
}
LIMITS = {column: limit for column, (_, _, limit) in COMPARED.items() if limit is not None}


def sextract(names, *images, header=None, weight=None, **settings):
    """Run SExtractor on an array (ny, nx), or on two: it finds the sources in the first of them.

    `names` maps the tool's columns to SExtractor's. Return the catalogue with the tool's names and
    origin, and the image less its background.
    """
    settings |= {
        **{"CATALOG_NAME": "catalog.fits", "CATALOG_TYPE": "FITS_1.0"},
        **{"CHECKIMAGE_TYPE": "-BACKGROUND", "CHECKIMAGE_NAME": "subtracted.fits"},
        **{"MEMORY_BUFSIZE": 16384, "MEMORY_PIXSTACK": 30_000_000},
    }
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if weight is not None:
            fits.writeto(work / "weight.fits", weight)
            settings |= {"WEIGHT_TYPE": "MAP_WEIGHT", "WEIGHT_IMAGE": "weight.fits"}
        paths = [f"{number}.fits" for number in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            fits.writeto(work / path, image, header)
        command = sextractor.configured(work, names.values(), **settings)
        subprocess.run([*command, ",".join(paths)], cwd=work, check=True)
        table = Table.read(work / "catalog.fits", hdu=1)
        subtracted = fits.getdata(work / "subtracted.fits").astype(np.float32)
    catalog = pd.DataFrame({ours: np.array(table[theirs], float) for ours, theirs in names.items()})
    catalog[["x", "y", "xwin", "ywin"]] -= 1  # its first pixel is (1, 1)
    return catalog, subtracted


def run_sextractor(image, header=None, measured=None):
    """Run SExtractor on an array (ny, nx); return its catalogue with the tool's names and origin.

    With `measured` it finds the sources in `image` and measures them there. Its sky positions are
    in the frame of the file: FK5 is brought to ICRS here.
    """
    names = {name: theirs for name, (theirs, *_) in COMPARED.items()}
    images = (image,) if measured is None else (image, measured)
    catalog, _ = sextract(names, *images, header=header, PHOT_APERTURES=APERTURE)
    catalog["snr"] = catalog["flux_auto"] / catalog["fluxerr_auto"]
    if header is None:
        catalog[["ra", "dec"]] = np.nan
    elif header.get("RADESYS") == "FK5":
        sky = SkyCoord(catalog["ra"], catalog["dec"], unit="deg", frame="fk5").icrs
        catalog["ra"], catalog["dec"] = sky.ra.deg, sky.dec.deg
    return catalog


def differences(one, other):
    """Return a column of absolute differences for each that is compared, row by row."""
    gap = (one[list(COMPARED)] - other[list(COMPARED)]).abs()
    gap["ra"] = np.minimum(gap["ra"], 360 - gap["ra"]) * np.cos(np.radians(other["dec"]))
    for name, (_, unit, _) in COMPARED.items():
        gap[name] *= {"px": 1, "arcsec": 3600, "%": 100 / other[name].abs()}[unit]
    return gap


def compare(one, other, snr=10):
    """Compare the sources of S/N over `snr` in two catalogues.

    Return the parts of either's that the other has too, and the `differences` of those.
    """
    i, j = match(one, other, RADIUS)
    matched = (one, i), (other, j)
    shares = [np.isin(np.flatnonzero(table["snr"] > snr), rows).mean() for table, rows in matched]
    bright = one["snr"].to_numpy()[i] > snr
    one, other = one.iloc[i[bright]], other.iloc[j[bright]]
    return shares, differences(one.reset_index(drop=True), other.reset_index(drop=True))


def report(name, image, header):
    """Print the row of one field; return if it is within the limits."""
    ours = run_tool(image, "--aperture-diameters", APERTURE, *INDEPENDENT, header=header).catalog
    theirs = run_sextractor(image, header)
    shares, gaps = compare(ours, theirs)
    transposed = run_sextractor(np.ascontiguousarray(image.T)).rename(columns={"x": "y", "y": "x"})
    _, itself = compare(transposed, theirs)
    columns = [gaps[column] for column in LIMITS] + [itself["flux_auto"]]
    cells = (" / ".join(f"{gap.quantile(part):.4f}" for part in (0.5, 0.9)) for gap in columns)
    print(
        row_of(name, len(gaps), f"{min(shares):.1%}", *cells).replace("nan / nan", ""), flush=True
    )
    # Without a WCS the differences of ra and dec are nan, which is beyond no limit.
    over = [column for column, limit in LIMITS.items() if gaps[column].median() >= limit]
    return min(shares) >= LEAST_MATCHED and not over


def simulated(pixels_per_source, seed, shape=(1024, 1024)):
    """Return the array and the header of a sky of stars and galaxies with a gradient."""
    number, wcs = shape[0] * shape[1] // pixels_per_source, tan_wcs(shape)
    sources = random_sources(shape, number, seed=seed, flux=(40.0, 8000.0), beta=3.0)
    image, _ = simulate(shape, sources, seed=seed, level=100.0, gradient=(5.0, -3.0), wcs=wcs)
    return image, wcs.to_header()


def read(path):
    """Return the first image of a FITS file as float32 (ny, nx), and a header of its WCS."""
    with fits.open(path) as hdus:
        hdu = next(hdu for hdu in hdus if hdu.is_image and len(hdu.shape) >= 2)
        image, wcs = np.squeeze(hdu.data).astype(np.float32), WCS(hdu.header, hdus)
    header = wcs.celestial.to_header(relax=True) if wcs.has_celestial else None
    return image, header


def main(argv=None):
    """Compare all fields; return 1 if one is beyond the limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", type=Path, help="FITS images")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    fields = {
        f"simulated, one source in {pixels} pixels": simulated(pixels, args.seed)
        for pixels in (2500, 400)
    }
    fields |= {path.name: read(path) for path in args.images}
    units = [f"{column} ({COMPARED[column][1]})" for column in LIMITS]
    print(row_of("field", "sources", "matched", *units, "flux_auto of itself (%)"))
    print("|---|" + "---:|" * (len(LIMITS) + 3))
    good = [report(name, *field) for name, field in fields.items()]
    limits = (f"{limit:g}" for limit in LIMITS.values())
    print(row_of("limit of the median", "", f"{LEAST_MATCHED:.0%}", *limits, ""))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
