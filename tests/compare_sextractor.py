"""How close to SExtractor the tool is: both measure the same images with the same parameters.

    compare_sextractor.py [--snr 10] [--seed 1] [IMAGE ...]

Compares simulated skies and the first image of each FITS file given; a WCS is reduced to its
celestial part. Sources of S/N over 10 are to be found by both within half a pixel. Prints Markdown:
how many are, and the median and 90th percentile of the differences. "itself" is SExtractor against
SExtractor on the transposed image: its deblending gives the pixels between two sources to either
of them by lot, so that no two programs, and no two of its own runs, agree better. Exits with 1 if
a field is beyond the limits. Needs SExtractor 2.25.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from sky import random_sources, simulate, tan_wcs
from truth import detect, match

RADIUS = 0.5  # pixels
LEAST_MATCHED = 0.99
APERTURE = 6  # diameter in pixels

# Column: SExtractor's name, whether the difference is relative, the most its median may be.
COMPARED = {
    "x": ("X_IMAGE", False, 0.01),
    "y": ("Y_IMAGE", False, 0.01),
    "ra": ("ALPHA_J2000", False, 0.01),
    "dec": ("DELTA_J2000", False, 0.01),
    "a": ("A_IMAGE", True, 0.01),
    "b": ("B_IMAGE", True, 0.01),
    "flux_auto": ("FLUX_AUTO", True, 0.005),
    "fluxerr_auto": ("FLUXERR_AUTO", True, None),
    "magerr_auto": ("MAGERR_AUTO", True, 0.05),
    "kron_radius": ("KRON_RADIUS", True, None),
    "flux_radius": ("FLUX_RADIUS", True, 0.02),
    "xwin": ("XWIN_IMAGE", False, None),
    "ywin": ("YWIN_IMAGE", False, None),
    f"flux_aper_{APERTURE}": ("FLUX_APER", True, None),
    f"fluxerr_aper_{APERTURE}": ("FLUXERR_APER", True, None),
    "background": ("BACKGROUND", True, None),
}
UNITS = {"x": "px", "y": "px", "xwin": "px", "ywin": "px", "ra": "arcsec", "dec": "arcsec"}

SEXTRACTOR_NAMES = ("source-extractor", "sex", "sextractor")
CONVOLUTION = "CONV NORM\n1 2 1\n2 4 2\n1 2 1\n"
CONFIGURATION = f"""
CATALOG_NAME      catalog.fits
CATALOG_TYPE      FITS_1.0
PARAMETERS_NAME   columns.param
DETECT_MINAREA    5
THRESH_TYPE       RELATIVE
DETECT_THRESH     1.5
ANALYSIS_THRESH   1.5
FILTER            Y
FILTER_NAME       default.conv
DEBLEND_NTHRESH   32
DEBLEND_MINCONT   0.005
CLEAN             Y
CLEAN_PARAM       1.0
MASK_TYPE         CORRECT
WEIGHT_TYPE       NONE
PHOT_AUTOPARAMS   2.5, 3.5
PHOT_APERTURES    {APERTURE}
PHOT_FLUXFRAC     0.5
MAG_ZEROPOINT     0.0
GAIN              0.0
GAIN_KEY          NONE
SATUR_LEVEL       1e29
SATUR_KEY         NONE
PIXEL_SCALE       1.0
BACK_SIZE         64
BACK_FILTERSIZE   3
BACKPHOTO_TYPE    GLOBAL
MEMORY_BUFSIZE    16384
MEMORY_PIXSTACK   30000000
VERBOSE_TYPE      QUIET
"""


def run_sextractor(image, header=None):
    """Run SExtractor on an array (ny, nx); return its catalogue with the tool's names and origin."""
    program = next(filter(None, map(shutil.which, SEXTRACTOR_NAMES)))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        fits.writeto(work / "image.fits", image, header)
        (work / "columns.param").write_text("\n".join(name for name, *_ in COMPARED.values()))
        (work / "default.conv").write_text(CONVOLUTION)
        (work / "sextractor.conf").write_text(CONFIGURATION)
        command = [program, "image.fits", "-c", "sextractor.conf"]
        subprocess.run(command, cwd=work, check=True)
        table = Table.read(work / "catalog.fits", hdu=1)
        catalog = pd.DataFrame(
            {name: np.array(table[theirs], float) for name, (theirs, *_) in COMPARED.items()}
        )
    catalog[["x", "y", "xwin", "ywin"]] -= 1  # its first pixel is (1, 1)
    catalog["snr"] = catalog["flux_auto"] / catalog["fluxerr_auto"]
    return catalog


def run_transposed(image):
    """Run SExtractor on the transposed image; return its catalogue as of the image, without WCS."""
    catalog = run_sextractor(np.ascontiguousarray(image.T))
    catalog[["ra", "dec"]] = np.nan
    return catalog.rename(columns={"x": "y", "y": "x", "xwin": "ywin", "ywin": "xwin"})


def differences(one, other, snr):
    """Compare two catalogues.

    Returns
    -------
    shares : (float, float)
        Parts of either's sources of S/N over `snr` that the other has too.
    table : DataFrame
        A column for each that is compared: |one - other| of the pairs, over |other| if relative.
    """
    i, j = match(one, other, RADIUS)
    shares = tuple(
        np.isin(np.flatnonzero(catalog["snr"] > snr), matched).mean()
        for catalog, matched in ((one, i), (other, j))
    )
    bright = one["snr"].to_numpy()[i] > snr
    one, other = one.iloc[i[bright]].reset_index(), other.iloc[j[bright]].reset_index()
    table = pd.DataFrame(
        {
            name: (one[name] - other[name]).abs() / (other[name].abs() if relative else 1)
            for name, (_, relative, _) in COMPARED.items()
        }
    )
    table["ra"] *= 3600 * np.cos(np.radians(other["dec"]))
    table["dec"] *= 3600
    return shares, table


def report(name, image, header, snr):
    """Print the table of one field; return whether it is within the limits."""
    ours = detect(image, "--aperture-diameters", APERTURE, header=header)
    theirs, again = run_sextractor(image, header), run_transposed(image)
    if header is None:
        theirs[["ra", "dec"]] = np.nan
    shares, found = differences(ours, theirs, snr)
    _, itself = differences(again, theirs, snr)
    good = min(shares) >= LEAST_MATCHED
    print(
        f"\n**{name}**: {len(ours)} sources, SExtractor {len(theirs)}; of those with S/N > {snr:g} "
        f"{shares[0]:.1%} and {shares[1]:.1%} are matched ({len(found)})\n\n"
        "| column | median | 90 % | limit | | itself | 90 % |\n|---|---:|---:|---:|---|---:|---:|"
    )
    for column, (_, relative, limit) in COMPARED.items():
        verdict = ""
        if limit is not None and found[column].notna().any():
            within = bool(found[column].median() < limit)
            verdict, good = "ok" if within else "OVER", good and within
        unit = "%" if relative else UNITS[column]
        cells = [
            f"{table[column].quantile(part) * (100 if relative else 1):.4f}"
            for table in (found, itself)
            for part in (0.5, 0.9)
        ]
        cells[2:2] = ["" if limit is None else f"{limit * (100 if relative else 1):g}", verdict]
        print(f"| {column}, {unit} | {' | '.join(cells)} |".replace("nan", "-"), flush=True)
    return good


def simulated(pixels_per_source, seed, shape=(1024, 1024)):
    """Return the array and the header of a sky of stars and galaxies with a gradient."""
    number, wcs = shape[0] * shape[1] // pixels_per_source, tan_wcs(shape)
    sources = random_sources(shape, number, seed=seed, flux=(20.0, 2000.0), beta=3.0)
    image, _ = simulate(shape, sources, seed=seed, level=100.0, gradient=(5.0, -3.0), wcs=wcs)
    return image, wcs.to_header()


def read(path):
    """Return the first image of a FITS file as float32 (ny, nx), and a header of its WCS or None."""
    with fits.open(path) as hdus:
        hdu = next(hdu for hdu in hdus if hdu.is_image and len(hdu.shape) >= 2)
        image, wcs = np.squeeze(hdu.data).astype(np.float32), WCS(hdu.header, hdus)
    header = wcs.celestial.to_header(relax=True) if wcs.has_celestial else None
    return image, header


def main(argv=None):
    """Compare all fields; return 1 if one is beyond the limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", type=Path, help="FITS images")
    parser.add_argument("--snr", type=float, default=10, help="compare sources over this")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    fields = {
        f"simulated, one source in {pixels} pixels": simulated(pixels, args.seed)
        for pixels in (2500, 400)
    }
    fields |= {path.name: read(path) for path in args.images}
    good = [report(name, *field, args.snr) for name, field in fields.items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
