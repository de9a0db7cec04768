"""Time and memory of whole runs: the tool beside SExtractor.

    python tests/benchmark.py [--sizes 360 1024 4096] [--repeats 5]

Both find the sources of the same simulated skies with the same parameters, and write background,
RMS, segmentation and a catalogue of the same quantities:

    tool        source_extractor.py in one process, with its picture of the sources
    tool x2     the same in two
    SExtractor  if it is installed

They run in turn, and a ratio is the median of those of the runs of one turn. The first run of each
is not timed: the memory of all its processes is read then. Prints a table for each size:

    seconds        of wall time, the median
    tool / it      the tool's seconds over this program's
    largest        peak resident memory of the largest process, in MB; at least 20, of this process
    together       peak memory of all processes, shared pages counted once, in MB; on Linux only
    bytes a pixel  by which the peak grows from the smallest image to one of 4096 x 4096 or more
    found          sources in the catalogue: they tell whether the work was the same

Exits with 1 if a program failed.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import sextractor

TOOL = Path(__file__).resolve().parents[1] / "source_extractor.py"

DENSITY = 2500  # pixels for each source
INTERVAL = 0.02  # seconds between two looks at the memory
LARGE = 4096  # pixels on a side

MAPS = ("background.fits", "rms.fits", "segmentation.fits")
PRODUCTS = {  # the catalogue is the last
    **dict.fromkeys(("tool", "tool x2"), (*MAPS, "sources.png", "catalog.tsv")),
    **({"SExtractor": (*MAPS, "catalog.cat")} if sextractor.PROGRAM else {}),
}
COLUMNS = """
NUMBER THRESHOLD ISOAREAF_IMAGE XMIN_IMAGE XMAX_IMAGE YMIN_IMAGE YMAX_IMAGE X_IMAGE Y_IMAGE
X2_IMAGE Y2_IMAGE XY_IMAGE ERRX2_IMAGE ERRY2_IMAGE ERRXY_IMAGE A_IMAGE B_IMAGE THETA_IMAGE
CXX_IMAGE CYY_IMAGE CXY_IMAGE FLUX_ISO FLUX_MAX XPEAK_IMAGE YPEAK_IMAGE FLAGS ALPHA_J2000
DELTA_J2000 FLUX_AUTO FLUXERR_AUTO MAG_AUTO MAGERR_AUTO KRON_RADIUS FLUX_RADIUS XWIN_IMAGE
YWIN_IMAGE ERRAWIN_IMAGE ERRBWIN_IMAGE ERRTHETAWIN_IMAGE
"""
SETTINGS = {
    "CATALOG_NAME": "catalog.cat",
    "CATALOG_TYPE": "ASCII_HEAD",
    "CHECKIMAGE_TYPE": "BACKGROUND,BACKGROUND_RMS,SEGMENTATION",
    "CHECKIMAGE_NAME": ",".join(MAPS),
}


class Run(NamedTuple):
    """Seconds, bytes of the largest process and of all together (0 if not watched), sources."""

    seconds: float
    largest: int
    together: int
    found: int


def command(name, image, output):
    """Return the command of a program for an image and an empty directory, its working one."""
    if name == "SExtractor":
        return [*sextractor.configured(output, COLUMNS.split(), **SETTINGS), image]
    threads = "2" if name == "tool x2" else "1"
    return [sys.executable, TOOL, image, "-o", output, "-q", "--threads", threads]


def write_sky(path, size):
    """Write a simulated sky of `size` x `size` float32 pixels; return how many sources it has.

    The imports are here because this runs in a process of its own: a command's peak memory is never
    less than that of the process that starts it.
    """
    import numpy as np
    from astropy.io import fits

    from sky import light, random_sources, tan_wcs

    shape = (size, size)
    sources = random_sources(shape, size * size // DENSITY, seed=1)
    image = light(shape, sources, level=100.0, gradient=(5.0, -3.0))
    image += np.random.default_rng(seed=2).standard_normal(shape, dtype=np.float32)
    fits.writeto(path, image, tan_wcs(shape).to_header())
    return len(sources)


def held(pid):
    """Return the bytes that a process and its descendants hold, their shared pages counted once."""
    process = Path("/proc", str(pid))
    try:
        size = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
        children = " ".join(path.read_text() for path in process.glob("task/*/children")).split()
    except OSError:  # it has ended
        return 0
    return (int(size[1]) * 1024 if size else 0) + sum(map(held, children))


def measure(arguments, directory, watched):
    """Run a command to its end; return seconds, and bytes of its largest process, and of all."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=directory)
    ended = together = 0
    while not ended:
        if watched:
            together = max(together, held(process.pid))
            time.sleep(INTERVAL)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG if watched else 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit, together


def count_sources(directory, products):
    """Return the number of rows in the catalogue; all of the products must be there."""
    if missing := [product for product in products if not (directory / product).is_file()]:
        raise FileNotFoundError(f"wrote no {', '.join(missing)}")
    with open(directory / products[-1]) as catalog:
        return sum(line.lstrip()[0].isdigit() for line in catalog)


def compare(image, repeats):
    """Run the programs on an image in turn; return the runs of each that never failed, by name."""
    runs = {name: [] for name in PRODUCTS}
    output = image.with_name("products")
    for turn in range(repeats + 1):
        for name in list(runs):
            output.mkdir()
            try:
                results = measure(command(name, image, output), output, watched=turn == 0)
                runs[name].append(Run(*results, count_sources(output, PRODUCTS[name])))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                del runs[name]
            shutil.rmtree(output)
    return runs


def ratio(some, others):
    """Return the median of the ratios of the seconds of runs, as text."""
    ratios = [a.seconds / b.seconds for a, b in zip(some, others, strict=False)]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def report(size, runs, smallest):
    """Print the table of one size; `smallest` has size and peak memory of a program's first."""
    print(
        "| program | seconds (fastest, slowest) | tool / it | tool x2 / it "
        "| largest | together | bytes a pixel | found |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    timed = {name: of_one[1:] for name, of_one in runs.items()}
    for name, (watched, *others) in runs.items():
        seconds = [run.seconds for run in others]
        largest = statistics.median(run.largest for run in others)
        peak = max(largest, watched.together)
        first, least = smallest.setdefault(name, (size, peak))
        cells = [
            name,
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f}, {max(seconds):.2f})",
            *(ratio(timed.get(tool, []), others) for tool in ("tool", "tool x2")),
            f"{largest / 1e6:.0f}",
            f"{peak / 1e6:.0f}" if watched.together else "",
            f"{(peak - least) / (size**2 - first**2):.1f}" if size >= LARGE > first else "",
            str(watched.found),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv=None):
    """Make a sky of each size, run the programs on it, print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[360, 1024, 4096], help="of skies")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (%(default)s)")
    args = parser.parse_args(argv)
    smallest, failed = {}, False
    for size in sorted(args.sizes):
        with tempfile.TemporaryDirectory() as directory:
            image = Path(directory, "sky.fits").absolute()
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                number = pool.apply(write_sky, (image, size))
            os.sync()  # or the first program's run would wait for it
            print(f"\n{size} x {size} pixels, {number} sources, {args.repeats} runs each\n")
            runs = compare(image, args.repeats)
            report(size, runs, smallest)
        failed |= runs.keys() != PRODUCTS.keys()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
