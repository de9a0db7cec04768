"""Time and memory of whole runs: the tool, a naive version of it (naive.py), and SExtractor.

    tests/tools/benchmark.py [--size 4096] [--repeats 3]

All three find the sources of the same simulated sky, one source in 2500 pixels, with the same
parameters. The runs are interleaved, so that whatever else the machine does is shared fairly. A
run counts only if it wrote all its products; the sources found tell whether the work was the same.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sextractor

HERE = Path(__file__).resolve().parent
TOOL = HERE.parents[1] / "source_extractor.py"
NAIVE = HERE / "naive.py"

PIXELS_PER_SOURCE = 2500

MAPS = ("background.fits", "rms.fits", "segmentation.fits")
PRODUCTS = {
    "tool": (*MAPS, "sources.png", "catalog.tsv"),
    "naive": (*MAPS, "sources.png", "catalog.tsv"),
    "sextractor": (*MAPS, "catalog.cat"),
}

SEXTRACTOR_COLUMNS = """
NUMBER THRESHOLD ISOAREAF_IMAGE XMIN_IMAGE XMAX_IMAGE YMIN_IMAGE YMAX_IMAGE X_IMAGE Y_IMAGE
X2_IMAGE Y2_IMAGE XY_IMAGE ERRX2_IMAGE ERRY2_IMAGE ERRXY_IMAGE A_IMAGE B_IMAGE THETA_IMAGE
CXX_IMAGE CYY_IMAGE CXY_IMAGE FLUX_ISO FLUX_MAX XPEAK_IMAGE YPEAK_IMAGE FLAGS ALPHA_J2000
DELTA_J2000 FLUX_AUTO FLUXERR_AUTO MAG_AUTO MAGERR_AUTO KRON_RADIUS FLUX_RADIUS XWIN_IMAGE
YWIN_IMAGE
"""
SEXTRACTOR_SETTINGS = {
    "CATALOG_NAME": "catalog.cat",
    "CATALOG_TYPE": "ASCII_HEAD",
    "CHECKIMAGE_TYPE": "BACKGROUND,BACKGROUND_RMS,SEGMENTATION",
    "CHECKIMAGE_NAME": "background.fits,rms.fits,segmentation.fits",
    "MEMORY_PIXSTACK": 3_000_000,
}


def write_sky(path, size):
    """Write a simulated sky of (size, size) float32 pixels as FITS; return how many sources it has.

    The imports are here because this runs in a process of its own: a command's peak memory is never
    less than that of the process that starts it, which therefore has to stay small.
    """
    from astropy.io import fits

    from sky import random_sources, simulate, tan_wcs

    shape = (size, size)
    number = size * size // PIXELS_PER_SOURCE
    wcs = tan_wcs(shape)
    sources = random_sources(shape, number, seed=1)
    image, _ = simulate(shape, sources, seed=2, level=100.0, gradient=(5.0, -3.0), wcs=wcs)
    fits.writeto(path, image, wcs.to_header())
    return number


def commands(image, work):
    """Commands to compare, by name, for those that are there; each writes to `work` / its name."""
    found = {}
    if TOOL.exists():
        found["tool"] = [sys.executable, TOOL, image, "-o", work / "tool", "-q"]
    found["naive"] = [sys.executable, NAIVE, image, work / "naive"]
    if sextractor.PROGRAM:
        columns = SEXTRACTOR_COLUMNS.split()
        found["sextractor"] = [*sextractor.configured(work, columns, **SEXTRACTOR_SETTINGS), image]
    return found


def measure(command, directory):
    """Wall time in seconds and peak resident memory in bytes of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=directory)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit


def count_sources(directory, products):
    """Number of rows in the catalogue, the last of the products, all of which must be there."""
    missing = [name for name in products if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory.name} wrote no {', '.join(missing)}")
    lines = (directory / products[-1]).read_text().splitlines()
    header = 1 if products[-1].endswith(".tsv") else 0
    return sum(not line.startswith("#") for line in lines) - header


def main(argv=None):
    """Make the sky, run the commands in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--size", type=int, default=4096, help="side of the sky (%(default)s pixels)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (%(default)s)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            number = pool.apply(write_sky, (work / "sky.fits", args.size))
        print(
            f"{args.size} x {args.size} float32 pixels, {number} sources, {args.repeats} runs each"
        )
        candidates = commands(work / "sky.fits", work)
        runs = {name: [] for name in candidates}
        found = {}
        for _ in range(args.repeats):
            for name, command in candidates.items():
                output = work / name
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir()
                runs[name].append(measure(command, output))
                found[name] = count_sources(output, PRODUCTS[name])

    medians = {}
    print(
        f"{'':12}{'seconds':>9}{'fastest':>9}{'slowest':>9}"
        f"{'peak MB':>9}{'bytes/pixel':>13}{'found':>8}"
    )
    for name, results in runs.items():
        seconds, memory = zip(*results, strict=True)
        medians[name] = statistics.median(seconds), statistics.median(memory)
        wall, peak = medians[name]
        print(
            f"{name:12}{wall:9.2f}{min(seconds):9.2f}{max(seconds):9.2f}"
            f"{peak / 1e6:9.0f}{peak / args.size**2:13.1f}{found[name]:8}"
        )
    tool = medians.pop("tool", None)
    if tool:
        for name, other in medians.items():
            wall, peak = (mine / theirs for mine, theirs in zip(tool, other, strict=True))
            print(f"tool / {name}: {wall:.2f} of the time, {peak:.2f} of the memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
