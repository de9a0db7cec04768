"""Compare all products of two versions of the tool, over many sets of options.

    git show HEAD:source_extractor.py > /tmp/before.py
    python tests/tools/golden.py /tmp/before.py [--data DIRECTORY] [--only TEXT]

Each case runs with the older script, then with the one of this working tree. Tables are compared by
the names and values of their columns, images and pictures pixel by pixel, other products and what
is said as they are; numbers are equal if they agree to 1e-9. Prints what differs by case, and a
count at the end; exits with 1 if any case differs. `--data` names a directory with more images: a
case whose image is not there is skipped.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
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
    " --regions products/sources.reg --overview products/overview.png --seeds products/seeds.tif"
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


def run(script, case, directories, place):
    """Run a case in a new directory; return what was said and written: arrays and texts by name."""
    place.mkdir()
    for path in (path for directory in directories for path in directory.iterdir()):
        (place / path.name).symlink_to(path.resolve())
    command = [sys.executable, script.resolve(), *case, *ALL_PRODUCTS.split()]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    said = {"exit code": str(done.returncode), "stdout": done.stdout, "stderr": done.stderr}
    contents = {path.name: content(path) for path in place.glob("products/*")}
    parts = {f"{name}: {part}": v for name, own in contents.items() for part, v in own.items()}
    return said | parts


def content(path):
    """Return what a product holds: arrays and texts by name."""
    if path.name == "catalog.fits":
        return dict(Table(fits.getdata(path, 1)).to_pandas().items())
    if path.read_bytes()[:4] == b"II*\0":
        return {"pixels": tifffile.imread(path)}
    match path.suffix:
        case ".tsv":
            return dict(pd.read_csv(path, sep="\t").items())
        case ".fits":
            return {"header": repr(fits.getheader(path)), "pixels": fits.getdata(path)}
        case ".png":
            return {"pixels": matplotlib.image.imread(path)}
    return {"text": path.read_text()}


def compare(before, after):
    """Yield what differs between two runs, as texts."""
    if missing := sorted(before.keys() ^ after.keys()):
        yield f"only in one: {', '.join(missing)}"
    for name in sorted(before.keys() & after.keys()):
        if isinstance(before[name], str):
            if before[name] != after[name]:
                yield f"{name}: {before[name].strip()!r} became {after[name].strip()!r}"
        else:
            same = np.testing.assert_array_equal
            if before[name].dtype.kind in "biuf":
                same = partial(np.testing.assert_allclose, rtol=1e-9)
            try:
                same(after[name], before[name], strict=True)
            except AssertionError as error:
                yield f"{name}: {' '.join(str(error).split())}"


def main():
    """Compare all cases; return 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the older script")
    parser.add_argument("--data", type=Path, help="a directory with more images")
    parser.add_argument("--only", default="", help="cases with this text only")
    args = parser.parse_args()
    directories = [ROOT / "test-data", *([args.data] if args.data else [])]
    present = {path.name for directory in directories for path in directory.iterdir()}
    cases = [f"{name} {words}".split() for name in CASES for words in CASES[name].split("/")]
    chosen = [case for case in cases if args.only in " ".join(case) and case[0] in present]
    different = 0
    for case in chosen:
        with tempfile.TemporaryDirectory() as name:
            before = run(args.before, case, directories, Path(name, "before"))
            after = run(ROOT / "source_extractor.py", case, directories, Path(name, "after"))
            found = list(compare(before, after))
        if found:
            different += 1
            print(" ".join(case) + "\n    " + "\n    ".join(found), flush=True)
    print(f"{different} of {len(chosen)} cases differ, {len(cases) - len(chosen)} were skipped")
    return different > 0


if __name__ == "__main__":
    sys.exit(main())
