"""Try to break the tool, for as long as it is told.

    python tests/tools/fuzz.py [files] [options] [faults] [--seconds 60] [--seed 0] [--cases N]

Each case is made from the seed and its number alone, and run in a process of its own
(only the time of a signal and the memory in use depend on the machine):

- files: a file of the corpus, mostly spoilt, as image, mask, noise, measure image or kernel;
- options: any of them, with values within, at and beyond their bounds, and right and wrong files;
- faults: a run over older products is ended by a signal, or lacks room on disk, or memory.

A case fails if the process crashes, takes more than 60 s or 1 GB, or ends with another exit code
than 0 to 3; if stderr holds anything but warnings and one error, a line each, or the words
internal error; if anything is changed without success; or if a product can't be read, or something
else is left. With a fault all products are as before, or as without it, to the byte; SIGKILL may
leave one hidden directory, beside which the next run must succeed.

Crafted files, of numbers that nobody but a fuzzer writes, may end otherwise: they are counted only.
The directory `failures` keeps what failed, with the arguments and what was said.
"""

import argparse
import contextlib
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, namedtuple
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import astropy.table
import astropy.wcs  # noqa: F401
import matplotlib.figure  # noqa: F401
import numpy as np
import PIL.Image
import psutil
import tifffile
from astropy.io import fits

import source_extractor
from corpus import KERNELS, corpus, fits_of, flip_bytes, spoilt, stars

SECONDS = 60
SAID = "stdout", "stderr"
BYTES = 10**9
LINE = re.compile(r"source_extractor\.py: (warning|error): .+")

# A run of the tool. If sound, it must succeed. Its fault, if any, is a signal within the time
# of a run without a fault, limits of resources, or a disk of so many bytes.
Case = namedtuple("Case", "kind arguments sound stop limits disk", defaults=(False, None, (), None))

# How it ended: exit code, or what else; and how many bytes more than before it took.
End = namedtuple("End", "status seconds peak")


# Files

OPTIONS = (
    *("", "", "", "--threads 2", "--background-passes 2", "--hdu 1", "--hdu SCI", "--plane 0"),
    *("--err-option array_rms", "--err-option none --thresh 50", "--image-format tiff", "-v"),
    *("--bw 8 --bh 8", "--filter-case gaussian", "--minarea 1", "--thresh 0.1", "--blank 40"),
    "--aperture-diameters 5",
)
ROLES = {
    "image": (),
    "mask": ("good.fits", "--mask"),
    "noise": ("good.fits", "--err-option", "file", "--err-file"),
    "measure": ("good.fits", "--measure-image"),
    "kernel": ("good.fits", "--filter-case", "file", "--filter-file"),
}


def case_of_files(files, rng, directory):
    """Return a case of one file, in any role."""
    family, name = rng.choice(list(files))
    how, content = spoilt(family, name, files[family, name], rng)
    (directory / "good.fits").write_bytes(files["FITS", "f4.fits"])
    (role,) = rng.choices(list(ROLES), (12, 2, 2, 1, 1))
    options = rng.choice(OPTIONS).split()
    if role == "mask":
        options = [*rng.choice(([], ["--mask-bits", "2"])), *options]
    elif role == "noise":
        options = ["--err-type", rng.choice(("stddev", "variance", "weight"))]
    elif role == "kernel":
        kernel, options = rng.choice(list(KERNELS.values())).encode("latin-1"), []
        content = rng.choice((flip_bytes(kernel + b"\n", rng), content))
    (directory / name).write_bytes(content)
    planes = name.startswith(("cube", "stack", "imagej", "ome", "rgb", "planar"))
    sound = role == "image" and how == "whole" and not planes and not options
    return Case(how, [*ROLES[role], name, *options, "-o", "products"], sound)


# Options

NUMBERS = (
    *("0", "1", "2", "3", "5", "7", "8", "50", "51", "64", "99", "100", "101", "1024", "1025"),
    *("10000", "10001", "2147483647", "2147483648", "18446744073709551615", "18446744073709551616"),
    *("-1", "-0", "-2147483649", "0.5", "1.5", "-0.5", "1e-45", "1e-300", "1e-320", "1e38"),
    *("1e300", "1e400", "nan", "inf", "-inf", "NaN", "Infinity", "", " ", "\n", "\u0663"),
    *("\u00b2", "\u0660.\u0665", "\u22121", "1_0", "0x10", "1,5", "1.5.1", "five", "1 2", "1j"),
    *("9" * 5000, "0." + "9" * 5000, "1e" + "9" * 50, "0" * 5000 + "5", "True", "None"),
)
HDUS = ("SCI", "sci,1", "DQ,\u0661", ",", "1,2,3", "-1", "ERR,2", "SCI,99999999999")
PLACES = "a.fits", "b.TIF", "c.fits.gz", "d", "new/x", "new/x/y", "image.fits", ".", "text/x", "\n"
TOGETHER = (
    *(("err_option", "err_file", "err_type"), ("err_file", "err_hdu")),
    *(("filter_case", "filter_file"), ("filter_case", "filter_fwhm")),
    *(("mask", "mask_bits"), ("mask", "maskthresh", "mask_bits"), ("mask", "mask_hdu")),
    *(("measure_image", "measure_plane"), ("verbose", "quiet")),
    *(("catalog_fits", "aperture_diameters"), ("catalog", "rms"), ("output_dir", "regions")),
)


def shelf(files):
    """Return right and wrong files for options, by their names."""
    image, noise = stars(), np.full(stars().shape, 3.0)
    scales = {"noise": 1, "negative": -1, "zero": 0, "nan": np.nan, "tiny": 1e-300, "huge": 1e300}
    arrays = {"image": image} | {name: scale * noise for name, scale in scales.items()}
    arrays |= {"quality": (image > 90).astype("i2") * 6, "small": image[:20]}
    arrays["all"] = np.ones(image.shape, "u1")
    found = {f"{name}.fits": fits_of(fits.PrimaryHDU(data)) for name, data in arrays.items()}
    found["several.fits"] = files["FITS", "several.fits"]
    found |= {name: files["odd", name] for name in ("events.fits", "complex.tif", "text")}
    return found | {f"{name}.txt": text.encode("latin-1") for name, text in KERNELS.items()}


def words_of(action, names, rng):
    """Return the words of a value for an option, right or wrong."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(rng.choice((*action.choices, *action.choices, "x", "")))]
    if action.nargs == 4 and rng.random() < 0.5:
        return [str(place) for place in sorted(rng.sample(range(48), 4))]
    if action.dest in source_extractor.PRODUCTS or action.dest == "output_dir":
        return [rng.choice(PLACES)]
    if action.type is Path:
        return [rng.choice((*names, *names, "missing.fits", ".", ""))]
    number = rng.choice((2, 3, 4)) if action.nargs == 4 else rng.choice((1, 1, 3))
    pool = HDUS + NUMBERS if action.dest.endswith("hdu") else NUMBERS
    return [rng.choice(pool) for _ in range(number if action.nargs else 1)]


def case_of_options(files, rng, directory):
    """Return a case of any options, and put what they name into the directory."""
    on_shelf = shelf(files)
    actions = {action.dest: action for action in source_extractor.build_parser()._actions}
    chosen = rng.sample(sorted(actions.keys() - {"image"}), rng.choice((1, 1, 2, 3, 6)))
    if rng.random() < 0.5:
        chosen += [name for name in rng.choice(TOGETHER) if name not in chosen]
    arguments = [rng.choice(("image.fits", "image.fits", "several.fits", "text"))]
    for name in chosen:
        words = words_of(actions[name], list(on_shelf), rng)
        if name in ("err_option", "filter_case") and rng.random() < 0.5:
            words = ["file"]
        option = rng.choice(actions[name].option_strings)
        glued = len(words) == 1 and option.startswith("--") and rng.random() < 0.5
        arguments += [f"{option}={words[0]}"] if glued else [option, *words]
    for name, content in on_shelf.items():
        if any(name in argument for argument in arguments):
            (directory / name).write_bytes(content)
    return Case("sets of options", arguments)


# Faults

REQUESTED = (
    *("--catalog-fits", "products/catalog.fits.gz", "--regions", "products/sources.reg"),
    *("--subtracted", "products/subtracted.fits", "--overview", "products/overview.png"),
)
SIGNALS = *(2 * ("SIGTERM",)), *(2 * ("SIGKILL",)), "SIGINT", "SIGHUP"


def case_of_faults(files, rng, directory):
    """Return a case that would succeed without its fault, with older products in place."""
    name = rng.choice(("f4.fits", "f4.fits.gz", "RICE_1-f4.fits", "wcs.fits"))
    (directory / name).write_bytes(files["FITS", name])
    arguments = [name, "-v", "-o", "products", *REQUESTED, *rng.choice(([], ["--threads", "2"]))]
    fault = rng.choice((*SIGNALS, "file size", "disk", "memory"))
    size = int(10 ** rng.uniform(2.5, 5.5))
    if fault == "disk":
        return Case("full disk", arguments, disk=60_000 + size)
    if fault == "file size":
        return Case("limits", arguments, limits=[(resource.RLIMIT_FSIZE, size)])
    if fault == "memory":
        most = psutil.Process().memory_info().vms + 1000 * size
        return Case("limits", arguments, limits=[(resource.RLIMIT_AS, most)])
    return Case("signals", arguments, stop=signal.Signals[fault])


@contextlib.contextmanager
def disk(directory, size):
    """Let a directory be a disk of so many bytes; tell if that is allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", directory], check=True)


@cache
def unharmed(arguments, image):
    """Return the products of a run without a fault, which must succeed, and its seconds."""
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / arguments[0]).write_bytes(image)
        end = run(arguments, directory)
        if end.status:
            raise RuntimeError((directory / "stderr").read_text())
        return tree(directory / "products"), end.seconds


def run_with_fault(case, rng, directory):
    """Run a case with its fault over older products; return its kind, end and fault, or None."""
    products, killed = directory / "products", case.stop == signal.SIGKILL
    image = (directory / case.arguments[0]).read_bytes()
    new, seconds = unharmed(tuple(case.arguments), image)
    old = dict.fromkeys(new, b"old")
    products.mkdir()
    with disk(products, case.disk) if case.disk else contextlib.nullcontext(True) as allowed:
        for name, content in old.items():
            (products / name).write_bytes(content)
        stop = case.stop and (case.stop, rng.uniform(0, 1.05) * seconds)
        end = run(case.arguments, directory, case.limits, stop)
        if killed:
            time.sleep(0.2)  # what puts the products in place goes on
        now = tree(products)
        hidden = {name.partition("/")[0] for name in now if name.startswith(".")}
        seen = {name: content for name, content in now.items() if not name.startswith(".")}
        fault = fault_of_words(end, directory, case.stop)
        if seen != new if end.status == 0 else seen not in (old, new):
            fault = "left neither all old products nor all new ones"
        elif len(hidden) > killed:
            fault = f"left {sorted(hidden)}"
        elif killed:
            again = run(case.arguments, directory)
            if again.status or not new.items() <= tree(products).items():
                fault = "the next run failed"
    return case.kind if allowed else "disk that could not be mounted", end, fault


# Running and judging


def tree(directory):
    """Return the content of all below a directory by relative path, None of directories."""
    found = {}
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            content = None if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(directory))] = content
    return found


def run(arguments, directory, limits=(), stop=None):
    """Run the tool in a directory, in a process of its own, and return its `End`.

    There may be limits of resources, and a signal after so many seconds.
    """
    start = time.monotonic()
    with open(directory / "stdout", "wb") as out, open(directory / "stderr", "wb") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(directory)
            for limit, most in ((resource.RLIMIT_AS, 4 * BYTES), *limits):
                resource.setrlimit(limit, (most, most))
            if stop and stop[0] != signal.SIGKILL:  # in the background some are ignored
                signal.signal(stop[0], signal.SIG_DFL)
            sys.argv[1:], code = arguments, 99
            try:
                code = source_extractor.main()
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
    before, done = psutil.Process().memory_info().rss, False
    while not done:
        time.sleep(0.002)
        done, status, used = os.wait4(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if not done and stop and seconds > stop[1]:
            os.kill(child, stop[0])
            stop = None
        if not done and seconds > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return End("hang", seconds, 0)
    code = os.waitstatus_to_exitcode(status)
    return End(f"signal {-code}" if code < 0 else code, seconds, 1024 * used.ru_maxrss - before)


def fault_of_words(end, directory, stop=None):
    """Return what is wrong with the end of a run, that a signal may stop, and with its words."""
    said = (directory / "stderr").read_text(errors="replace").splitlines()
    errors = sum(" error: " in line for line in said)
    stopped = stop and end.status in (f"signal {stop}", 128 + stop)
    faults = {
        "said more than lines of its own": not all(map(LINE.fullmatch, said)),
        f"ended with {end.status}": end.status not in (0, 1, 2, 3) and not stopped,
        f"took {end.peak / 1e9:.1f} GB": end.peak > BYTES,
        "called it a fault of its own": any("internal error" in line for line in said),
        f"said {errors} errors": errors != (end.status in (1, 2, 3)),
    }
    return next((fault for fault, present in faults.items() if present), None)


def is_sound(product, path):
    """Tell if a product can be read."""
    if product == "catalog":
        text = path.read_text()
        return text.startswith("id\t") and len({x.count("\t") for x in text.splitlines()}) == 1
    if product == "regions":
        return path.read_text().startswith("# Region file format: DS9")
    if product in ("overlay", "overview"):
        with PIL.Image.open(path) as picture:
            return picture.format == "PNG" and np.asarray(picture).ndim == 3
    if path.read_bytes()[:2] in (b"II", b"MM"):
        return tifffile.imread(path).ndim == 2
    return fits.getdata(path, 1 if product == "catalog_fits" else 0) is not None


def run_and_judge(case, rng, directory):
    """Run a case of files or options; return its kind, end and fault, or None."""
    before = tree(directory)
    end = run(case.arguments, directory)
    fault = fault_of_words(end, directory) or fault_of_products(end, case, before, directory)
    return case.kind, end, fault


def fault_of_products(end, case, before, directory):
    """Return what is wrong with what a run has left, or None."""
    after = {path: content for path, content in tree(directory).items() if path not in SAID}
    changed = {name for name in after.keys() | before if after.get(name) != before.get(name)}
    targets = {}
    if not end.status and not {"--help", "-h", "--version"} & set(case.arguments):
        args = source_extractor.build_parser().parse_args(case.arguments)
        targets = source_extractor.product_paths(args)
        changed = {name for name in changed if after.get(name) is not None}
    elif case.sound:
        return "refused a whole file"
    if changed != {str(path) for path in targets.values()}:
        return f"left {sorted(changed)}"
    spoilt = [name for name, path in targets.items() if not is_sound(name, directory / path)]
    return f"left {spoilt} that can't be read" if spoilt else None


OUTCOMES = "products", "one line", "stopped", "otherwise"
KINDS = {"files": (case_of_files, run_and_judge), "options": (case_of_options, run_and_judge)}
KINDS["faults"] = case_of_faults, run_with_fault


def main():
    """Run cases until the time is up; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="of cases (all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (0)")
    parser.add_argument("--cases", type=int, default=10**9, help="the most to try")
    args = parser.parse_args()
    files, kinds = corpus(), args.kinds or list(KINDS)
    end, counts, failures = time.monotonic() + args.seconds, Counter(), 0
    for number in range(args.cases):
        if time.monotonic() > end:
            break
        kind = kinds[number % len(kinds)]
        make, judge = KINDS[kind]
        rng = random.Random(args.seed * 10**9 + number)
        with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            directory = Path(scratch)
            case = make(files, rng, directory)
            what, ended, fault = judge(case, rng, directory)
            outcome = {0: "products", 1: "one line", 2: "one line"}.get(ended.status, "stopped")
            counts[f"{kind}: {what}", "otherwise" if fault else outcome] += 1
            if fault:
                print(f"{number} {what}: {fault} ({ended.seconds:.1f} s)", flush=True)
            if fault and what != "crafted":
                failures += 1
                (directory / "arguments").write_text(shlex.join(case.arguments))
                kept = Path("failures", f"{kind}-{args.seed}-{number}")
                shutil.copytree(directory, kept, dirs_exist_ok=True)
    print(f"{'':44}", *(f"{outcome:>10}" for outcome in OUTCOMES))
    for what in sorted({what for what, _ in counts}):
        print(f"{what:44}", *(f"{counts[what, outcome]:10}" for outcome in OUTCOMES))
    print(f"{counts.total()} cases, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
