"""Compare all products of two versions of the tool, over many sets of options.

    git show HEAD:source_extractor.py > /tmp/before.py
    python tests/tools/golden.py /tmp/before.py [--data DIRECTORY] [--only TEXT] [--threads 2]

Each case runs with the older script, then with the one of this working tree. Tables are compared by
the names and values of their columns, images and pictures pixel by pixel, other products and what
is said line by line. One line is printed for each case that differs, and a count at the end; the
exit code is 1 if any case differs. `--data` names a directory with more images: a case whose images
are not there is skipped. Numbers are equal if they agree to `--tolerance` (relative, 1e-9).
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import tifffile
from astropy.io import fits
from astropy.table import Table

ROOT = Path(__file__).parent.parent.parent
ALL_PRODUCTS = (
    "-o products --subtracted products/subtracted.fits --catalog-fits products/catalog.fits"
    " --regions products/sources.reg --overview products/overview.png"
)
# For each image the sets of options, divided by strokes; some images need another directory.
CASES = {
    "sky.fits": """
        / --mask sky_mask.fits / --mask sky_mask.fits --bridge 0
        / --mask sky_mask.fits --bridge 5 --background-passes 2 / --background-passes 2
        / --err-option array_rms / --err-option array_rms --filter-type conv --mask sky_mask.fits
        / --err-option none --thresh 30 / --bw 32 --bh 48 --fw 5 --fh 1 --fthresh 2
        / --gain 2.5 --saturation 2000 / --no-clean --minarea 1 --thresh 1 / --clean-param 0.3
        / --deblend-nthresh 1 / --deblend-cont 0.0001 --deblend-nthresh 64
        / --filter-case none / --filter-case gaussian --filter-fwhm 4
        / --filter-case tophat --filter-fwhm 5 / --filter-case file --filter-file kernel.conv
        / --aperture-diameters 5 7.5 12 --zeropoint 25 / --kron-factor 2 --kron-min-radius 2
        / --mask-box 10 60 20 90 --mask-box 100 101 0 255 / --image-format tiff / --thresh 1e6
        / --measure-image sky.fits --err-option none --thresh 40""",
    "empty.fits": "",
    "mosaic.fits": "/ --blank 0",
    "stack.fits": "/ --plane 1 / --plane 0 --measure-image stack.fits --measure-plane 2",
    "hubble_deep_field.tiff": "/ --thresh 3 --background-passes 2 --image-format tiff",
    "desi_legacy_g.fits": """
        / --background-passes 2 --err-option array_rms --aperture-diameters 6""",
    "decam_r.fits.fz": """--mask decam_r_dq.fits.fz
        / --err-option file --err-file decam_r_weight.fits.fz --err-type weight
          --mask decam_r_dq.fits.fz --mask-bits 1 2 4
        / --err-option file --err-file decam_r_weight.fits.fz --err-type weight
          --filter-type conv""",
    "emmi_field.fits": "--gain 1.5 --thresh 2",
    "hst_nicmos_mef.fits": """--hdu ERR
        / --hdu SCI --err-option file --err-file hst_nicmos_mef.fits --err-hdu ERR
          --mask hst_nicmos_mef.fits --mask-hdu DQ""",
    "radio_4axes.fits": "",
    "nuclei_uint16.tif": """--mask nuclei_labels.tif
        / --bw 256 --bh 256 --minarea 30 --filter-case gaussian --filter-fwhm 4
          --deblend-cont 0.0005 --thresh 2.5 --image-format tiff""",
    "cells_lzw.tiff": "",
}


def run(script, case, directories, place, *more):
    """Run a case in a new directory; return what was said, and the paths of products by name."""
    place.mkdir()
    for path in (path for directory in directories for path in directory.iterdir()):
        (place / path.name).symlink_to(path.resolve())
    words = [*case, *ALL_PRODUCTS.split(), *more]
    command = [sys.executable, script.resolve(), *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    said = {"exit code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    return said, {path.name: path for path in place.glob("products/*")}


def differing_columns(one, other, tolerance):
    """Yield what differs between two tables, as texts."""
    yield from (f"lacks {name}" for name in one.columns if name not in other.columns)
    yield from (f"has {name}" for name in other.columns if name not in one.columns)
    if len(one) != len(other):
        yield f"{len(one)} and {len(other)} rows"
        return
    for name in one.columns.intersection(other.columns):
        a, b = one[name].to_numpy(float), other[name].to_numpy(float)
        gap = ~np.isclose(a, b, rtol=tolerance, atol=0, equal_nan=True)
        if gap.any():
            largest = np.nanmax(np.abs(a - b)[gap] / np.maximum(np.abs(a[gap]), 1e-300))
            yield f"{name} in {gap.sum()} rows (relative {largest:.2g})"


def table_of(path):
    """Return a catalogue, as text or FITS, as a DataFrame."""
    if path.suffix == ".tsv":
        return pd.read_csv(path, sep="\t")
    with warnings.catch_warnings(action="ignore"):  # of units that FITS doesn't know
        return Table.read(path).to_pandas()


PIXELS_OF = {".fits": fits.getdata, ".tiff": tifffile.imread, ".png": matplotlib.image.imread}


def difference_of(one, other, tolerance):
    """Return what differs between two files of a product, or an empty text."""
    if one.read_bytes() == other.read_bytes():
        return ""
    if one.stem == "catalog":
        return "; ".join(differing_columns(table_of(one), table_of(other), tolerance))
    if pixels_of := PIXELS_OF.get(one.suffix):
        a, b = pixels_of(one), pixels_of(other)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{a.shape} became {b.dtype}{b.shape}"
        gap = ~np.isclose(a, b, rtol=tolerance, atol=0, equal_nan=True)
        if gap.any():
            return f"{gap.sum()} of {a.size} pixels"
        same = one.suffix != ".fits" or fits.getheader(one) == fits.getheader(other)
        return "" if same else "header"
    lines = zip(one.read_text().splitlines(), other.read_text().splitlines(), strict=False)
    return next((f"{a!r} became {b!r}" for a, b in lines if a != b), "length")


def compare(before, after, tolerance):
    """Yield what differs between two runs, a text for each product or stream."""
    (said, old), (says, new) = before, after
    for stream in said:
        if said[stream] != says[stream]:
            yield f"{stream}: {str(said[stream]).strip()!r} became {str(says[stream]).strip()!r}"
    yield from (f"{name}: only in one" for name in sorted(old.keys() ^ new.keys()))
    for name in sorted(old.keys() & new.keys()):
        if text := difference_of(old[name], new[name], tolerance):
            yield f"{name}: {text}"


def main():
    """Compare all cases; return 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the older script")
    parser.add_argument("--after", type=Path, default=ROOT / "source_extractor.py")
    parser.add_argument("--data", type=Path, help="a directory with more images")
    parser.add_argument("--only", default="", help="cases with this text only")
    parser.add_argument("--threads", default="1", help="of the later script")
    parser.add_argument("--tolerance", type=float, default=1e-9)
    args = parser.parse_args()
    directories = [ROOT / "test-data", *([args.data] if args.data else [])]
    present = {path.name for directory in directories for path in directory.iterdir()}
    counts = {"same": 0, "different": 0, "skipped": 0}
    cases = [f"{name} {words}".split() for name in CASES for words in CASES[name].split("/")]
    for case in cases:
        if args.only not in " ".join(case) or case[0] not in present:
            counts["skipped"] += 1
            continue
        with tempfile.TemporaryDirectory() as name:
            before = run(args.before, case, directories, Path(name, "before"))
            later = "--threads", args.threads
            after = run(args.after, case, directories, Path(name, "after"), *later)
            found = list(compare(before, after, args.tolerance))
        counts["different" if found else "same"] += 1
        if found:
            print(" ".join(case) + "\n    " + "\n    ".join(found), flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return counts["different"] > 0


if __name__ == "__main__":
    sys.exit(main())
