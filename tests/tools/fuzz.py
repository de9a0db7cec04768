"""Feed the tool with odd, damaged and hostile files for as long as it is told.

    python tests/tools/fuzz.py [--seconds 60] [--seed 0] [--first 0] [--cases N] [--keep DIRECTORY]

Each case is made from the seed and its number alone: a file of the corpus, mostly spoilt, as image,
mask, noise, measure image or kernel, with options. It is run in a process of its own. A case fails
if the process crashes, takes more than 60 s or a gigabyte more than it has before it begins, ends
with another exit code than 0, 1 and 2, says anything on stderr but warnings and one error in one
line each, leaves anything behind when it fails, or doesn't leave the five products when it
succeeds; also if a whole file of the corpus is refused. What has failed is kept, with the arguments
and what was said. At the end stands a table of the cases by kind and outcome.
"""

import argparse
import bz2
import collections
import gzip
import io
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table

import source_extractor
from files import patched_tiff, pillow_bytes, tiff_bytes
from sky import blobs

SECONDS = 60
BYTES = 10**9
LINE = re.compile(r"source_extractor\.py: (warning|error): .+")
PRODUCTS = ["background.fits", "catalog.tsv", "rms.fits", "segmentation.fits", "sources.png"]


# ---------------------------------------------------------------------------------------------
# The corpus: whole files
# ---------------------------------------------------------------------------------------------


def stars(shape=(40, 48)):
    """Return a sky of a few stars, positive and of a range that small integers hold."""
    return blobs(shape, (10, 9), (30, 12), (20, 25), (39, 31), level=40, noise=3).astype(float)


def fits_of(*hdus):
    buffer = io.BytesIO()
    fits.HDUList(list(hdus)).writeto(buffer, output_verify="ignore")
    return buffer.getvalue()


def corpus_of_fits():
    image, primary = stars(), fits.PrimaryHDU
    files = {
        f"{dtype}.fits": fits_of(primary(image.astype(dtype)))
        for dtype in ("u1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8")
    }
    scaled = primary(image.astype("f4"))
    scaled.scale("int16", bscale=0.01, bzero=30)
    scaled.header["BLANK"] = -32768
    files["scaled.fits"] = fits_of(scaled)
    for kind in ("RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "PLIO_1", "NOCOMPRESS"):
        for dtype in ("i2", "i4", "f4", "f8"):
            if kind != "PLIO_1" or dtype == "i2":
                hdu = fits.CompImageHDU(image.astype(dtype), compression_type=kind)
                files[f"{kind}-{dtype}.fits"] = fits_of(primary(), hdu)
    files["cube.fits"] = fits_of(primary(np.stack([image] * 3).astype("f4")))
    files["axes.fits"] = fits_of(primary(image.astype("f4")[None, None]))
    table = fits.BinTableHDU(Table({"x": np.arange(9), "name": ["a"] * 9}))
    several = [fits.ImageHDU(image.astype("f4"), name=name) for name in ("SCI", "ERR", "DQ")]
    files["several.fits"] = fits_of(primary(), table, *several)
    wcs = primary(image.astype("f4"))
    wcs.header.update(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=150.0, CRVAL2=2.0)
    wcs.header.update(CRPIX1=20.0, CRPIX2=20.0, CDELT1=-1e-4, CDELT2=1e-4, BUNIT="Jy/beam")
    wcs.header.update(BMAJ=3e-4, BMIN=2e-4, SATURATE=1e4, LONG="word " * 60)
    files["wcs.fits"] = fits_of(wcs)
    files["f4.fits.gz"] = gzip.compress(files["f4.fits"])
    files["several.fits.bz2"] = bz2.compress(files["several.fits"])
    return files


def corpus_of_tiff():
    image = stars()
    files = {
        f"{dtype}.tif": tiff_bytes(image.astype(dtype))
        for dtype in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
    }
    for kind in ("zlib", "lzw", "packbits", "zstd", "lzma", "lerc", "png", "jpeg", "jpeg2000"):
        for dtype in ("u1", "u2", "f4"):
            if dtype == "u1" or (dtype == "u2" and kind != "jpeg") or kind[0] in "zl":
                files[f"{kind}-{dtype}.tif"] = tiff_bytes(image.astype(dtype), compression=kind)
    more = {
        "tiled": {"tile": (16, 16), "compression": "zlib", "predictor": True},
        "big": {"bigtiff": True},
        "motorola": {"byteorder": ">"},
        "strips": {"rowsperstrip": 3},
        "white": {"photometric": "miniswhite"},
    }
    files |= {f"{name}.tif": tiff_bytes(image.astype("u2"), **how) for name, how in more.items()}
    stack = np.stack([image] * 3).astype("u2")
    files["stack.tif"] = tiff_bytes(stack)
    files["imagej.tif"] = tiff_bytes(stack, imagej=True)
    files["ome.tif"] = tiff_bytes(stack, ome=True)
    files["rgb.tif"] = tiff_bytes(np.moveaxis(stack, 0, 2), photometric="rgb")
    files["planar.tif"] = tiff_bytes(stack, photometric="rgb", planarconfig="separate")
    files["bilevel.tif"] = pillow_bytes(image > 60)
    return files


def corpus_of_oddities():
    """Return files of few or odd pixels, and files that hold no image."""
    files, top = {}, np.finfo("f8").max
    for shape in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 50), (50, 1), (3, 3)):
        files[f"{shape}.fits"] = fits_of(fits.PrimaryHDU(stars((99, 99))[: shape[0], : shape[1]]))
        files[f"{shape}.tif"] = tiff_bytes(stars((99, 99))[: shape[0], : shape[1]])
    spots = stars()
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "top": top}.items():
        some = spots.copy()
        some[5:9, 7:30] = value
        files[f"some {name}.fits"] = fits_of(fits.PrimaryHDU(some))
        files[f"all {name}.fits"] = fits_of(fits.PrimaryHDU(np.full((20, 20), value)))
    for name, scale in {"tiny": 1e-320, "small": 1e-300, "large": 1e300, "deep": 1e-30}.items():
        files[f"{name}.fits"] = fits_of(fits.PrimaryHDU(spots * scale))
    files["ends.fits"] = fits_of(fits.PrimaryHDU(np.where(spots > 40, top, -top)))
    files["constant.fits"] = fits_of(fits.PrimaryHDU(np.ones((30, 30))))
    for dtype in ("i8", "u8"):
        limits = np.iinfo(dtype)
        ends = np.where(spots > 40, limits.max, limits.min).astype(dtype)
        files[f"ends-{dtype}.fits"] = fits_of(fits.PrimaryHDU(ends))
        files[f"ends-{dtype}.tif"] = tiff_bytes(ends)
    files["complex.tif"] = tiff_bytes(spots.astype("c8"))
    table = Table({"x": np.arange(9.0), "z": np.arange(9) * 1j, "b": np.arange(9) > 4})
    files["events.fits"] = fits_of(fits.PrimaryHDU(), fits.BinTableHDU(table))
    files["no data.fits"] = fits_of(fits.PrimaryHDU())
    files["empty"], files["text"] = b"", b"x y flux\n1 2 3\n" * 99
    files["hdf5"], files["pdf"] = b"\x89HDF\r\n\x1a\n" + bytes(2000), b"%PDF-1.7\n" + bytes(999)
    files["png"] = pillow_bytes(spots.astype("u1"), format="PNG")
    files["gzip of nothing.gz"], files["gzip of text.gz"] = gzip.compress(b""), gzip.compress(b"a")
    # Zeros without end, and a gigabyte of them in a strip of 4 kB.
    files["bomb.fits.gz"] = gzip.compress(files["constant.fits"] + bytes(10**8))
    strip = zlib.compress(bytes(10**9))
    whole = tiff_bytes(spots.astype("u1"), compression="zlib", rowsperstrip=40)
    bomb = patched_tiff(whole + strip, "StripOffsets", len(whole))
    files["bomb.tif"] = patched_tiff(bomb, "StripByteCounts", len(strip))
    return files


KERNELS = (
    "1 2 1\n2 4 2\n1 2 1\n",
    "CONV NORM\n1 2 1\n2 4 2\n1 2 1\n",
    "1\n",
    "1 nan 1\n",
    "-1 0 1\n",
)


# ---------------------------------------------------------------------------------------------
# How they are spoilt
# ---------------------------------------------------------------------------------------------


def cut_short(content, rng):
    return content[: rng.choice((rng.randrange(len(content)), rng.randrange(3000)))]


def flip_bytes(content, rng):
    spoilt = bytearray(content)
    last = rng.choice((len(spoilt), min(len(spoilt), 2880), min(len(spoilt), 400)))
    for _ in range(rng.choice((1, 1, 3, 10, 100))):
        spoilt[rng.randrange(last)] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(spoilt)


def move_blocks(content, rng):
    """Return the content with a piece of it removed, repeated, or put elsewhere."""
    unit = rng.choice((1, 80, 2880))
    first, last, place = sorted(rng.randrange(len(content) + 1) // unit * unit for _ in range(3))
    piece = content[first:last]
    without = content[:first] + content[last:]
    return rng.choice((without, content[:place] + piece + content[place:], without + piece))


LIES = (
    *("0", "-1", "1", "2", "3", "7", "8", "16", "-32", "999", "1000", "100000", "1000000000"),
    *("2147483647", "-2147483648", "4294967296", "9223372036854775807", "99999999999999999999"),
    *("1.5", "1E400", "-1E-400", "NaN", "Inf", "T", "F", "''", "'text'", "(1, 2)", ""),
    *("'RA---TAN'", "'RICE_1'", "'1PB(9999999999)'", "'999999999D'", "'IMAGE'", "'BINTABLE'"),
    "'Jy/beam'",
)
KEYS = (
    *("BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "NAXIS3", "PCOUNT", "GCOUNT", "TFIELDS", "BLANK"),
    *("BSCALE", "BZERO", "EXTEND", "EXTNAME", "EXTVER", "XTENSION", "CTYPE1", "CRVAL1", "CDELT1"),
    *("CD1_1", "CRPIX2", "ZIMAGE", "ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZTILE1", "ZTILE2", "ZCMPTYPE"),
    *("ZVAL1", "ZBLANK", "ZQUANTIZ", "TFORM1", "THEAP", "WCSAXES", "A_ORDER", "SATURATE", "BUNIT"),
    *("GROUPS", "DATASUM", "CHECKSUM", "END", "SIMPLE", "HISTORY", "CONTINUE", "LATPOLE"),
    "EQUINOX",
)


def lie_in_header(content, rng):
    """Change, add or repeat cards of any header of a FITS file."""
    spoilt = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        card = re.compile(rb"[A-Z0-9_-]{1,8} *=? ").match
        cards = [at for at in range(0, len(spoilt) - 79, 80) if card(spoilt, at)]
        key, lie = rng.choice(KEYS), rng.choice(LIES)
        own = [at for at in cards if bytes(spoilt[at : at + 8]).decode("latin-1").strip() == key]
        at = rng.choice(own or cards or [0])
        if rng.random() < 0.3:
            key = bytes(spoilt[at : at + 8]).decode("latin-1").strip()
        line = f"{key:8}= {lie:>20}".encode()
        spoilt[at : at + 80] = f"{line[:80].decode('latin-1'):80}".encode("latin-1")
    if rng.random() < 0.05:
        line, count = rng.choice((b"CONTINUE  'a&'", b"HISTORY a", b"")), rng.choice((100, 10**5))
        spoilt[80:80] = line.ljust(80) * (count // 36 * 36)
    return bytes(spoilt)


def entries(content):
    """Return the byte order of a classic TIFF, its first directory's place, and its entries'."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, start)
    return order, start, [start + 2 + 12 * i for i in range(count)]


def lie_in_directory(content, rng):
    """Change types, counts and values of tags of a TIFF, or let a directory lead to itself."""
    try:
        order, start, places = entries(content)
    except struct.error:
        return flip_bytes(content, rng)
    spoilt = bytearray(content)
    numbers = (0, 1, 2, 3, 17, 255, 32773, 65535, 10**8, 2**31, 2**32 - 1, start, len(content) - 4)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.choice(places), rng.randrange(6)
        if what == 0:
            struct.pack_into(
                order + "H", spoilt, at, rng.choice((256, 257, 258, 259, 262, 273, 277))
            )
        elif what == 1:
            struct.pack_into(order + "H", spoilt, at + 2, rng.randrange(20))
        elif what == 2:
            struct.pack_into(order + "I", spoilt, at + 4, rng.choice(numbers))
        elif what == 3 and places[-1] + 16 <= len(spoilt):
            struct.pack_into(order + "I", spoilt, places[-1] + 12, rng.choice(numbers))
        else:
            struct.pack_into(order + "I", spoilt, at + 8, rng.choice(numbers))
    return bytes(spoilt)


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------

OPTIONS = (
    *("", "", "", "--threads 2", "--background-passes 2", "--hdu 1", "--hdu SCI", "--plane 0"),
    *("--err-option array_rms", "--err-option none --thresh 50", "--image-format tiff", "-v"),
    *("--bw 8 --bh 8", "--filter-case gaussian", "--minarea 1", "--thresh 0.1", "--blank 40"),
    "--aperture-diameters 5",
)
ROLES = {"image": 12, "mask": 2, "noise": 2, "measure": 1, "kernel": 1}  # and how often


def make_case(corpus, seed, number, directory):
    """Put a case into a directory; return its kind, whether it must succeed, and its arguments."""
    rng = random.Random(f"{seed} {number}")
    family, name = rng.choice(list(corpus))
    content, how = corpus[family, name], "whole"
    if family != "oddity" and rng.random() < 0.93:
        lie = lie_in_header if family == "FITS" else lie_in_directory
        spoil = rng.choice((cut_short, flip_bytes, move_blocks, lie, lie, lie))
        how = spoil.__name__
        packing = {".gz": gzip, ".bz2": bz2}.get(Path(name).suffix)
        if packing and rng.random() < 0.5:
            content = packing.compress(spoil(packing.decompress(content), rng))
        else:
            content = spoil(content, rng)
    path = directory / name
    path.write_bytes(content)
    (role,) = rng.choices(list(ROLES), list(ROLES.values()))
    good = directory / "good.fits"
    good.write_bytes(corpus["FITS", "f4.fits"])
    options = rng.choice(OPTIONS).split()
    match role:
        case "image":
            arguments = [path]
        case "mask":
            arguments = [good, "--mask", path, *rng.choice(([], ["--mask-bits", "2"]))]
        case "noise":
            kind = rng.choice(("stddev", "variance", "weight"))
            arguments = [good, "--err-option", "file", "--err-file", path, "--err-type", kind]
            options = []
        case "measure":
            arguments = [good, "--measure-image", path]
        case "kernel":
            kernel = rng.choice((flip_bytes(rng.choice(KERNELS).encode(), rng), content))
            path.write_bytes(kernel)
            arguments, options = [good, "--filter-case", "file", "--filter-file", path], []
    sound = role == "image" and how == "whole" and family != "oddity" and not options
    sound = sound and not name.startswith(("cube", "stack", "imagej", "ome", "rgb", "planar"))
    return f"{family} {role} {how}", sound, [str(word) for word in (*arguments, *options)]


def run_case(arguments, directory):
    """Run the tool in a process of its own; return its status, seconds, and bytes more than now."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9, 8 * 10**9))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = 99
        try:
            code = source_extractor.main([*arguments, "-o", str(directory / "products")])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        (directory / "peak").write_text(str(1024 * peak))
        os._exit(code or 0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            break
        if seconds > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang", seconds, 0
        time.sleep(0.005)
    peak = int((directory / "peak").read_text()) if (directory / "peak").exists() else 0
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}", seconds, peak
    return os.WEXITSTATUS(status), seconds, peak


def fault_of(status, peak, sound, directory):
    """Return what is wrong with an end, or None."""
    said = (directory / "stderr").read_text(errors="replace").splitlines()
    left = sorted(path.name for path in directory.glob("products/*"))
    errors = sum(" error: " in line for line in said if LINE.fullmatch(line))
    if status not in (0, 1, 2):
        return f"ended with {status}"
    if not all(map(LINE.fullmatch, said)):
        return "said more than lines of its own"
    if peak > BYTES:
        return f"took {peak / 1e9:.1f} GB"
    if any("a fault of the tool" in line for line in said):
        return "called it a fault of its own"
    if status:
        if errors != 1:
            return f"said {errors} errors"
        if left:
            return "left something behind"
        return "refused a whole file" if sound else None
    if errors:
        return "said an error, but succeeded"
    if left != PRODUCTS and "--image-format" not in (directory / "arguments").read_text():
        return f"left {left}"
    return None


def main():
    """Run cases until the time is up; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--cases", type=int, default=10**9, help="the most to try")
    parser.add_argument("--keep", type=Path, default=Path("failures"), help="for what failed")
    args = parser.parse_args()
    makers = {"FITS": corpus_of_fits, "TIFF": corpus_of_tiff, "oddity": corpus_of_oddities}
    corpus = {(kind, name): file for kind, make in makers.items() for name, file in make().items()}
    end, counts, failures = time.monotonic() + args.seconds, collections.Counter(), 0
    for number in range(args.first, args.first + args.cases):
        if time.monotonic() > end:
            break
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            kind, sound, arguments = make_case(corpus, args.seed, number, directory)
            (directory / "arguments").write_text(shlex.join(arguments))
            status, seconds, peak = run_case(arguments, directory)
            fault = fault_of(status, peak, sound, directory)
            counts[kind, "FAILED" if fault else status] += 1
            if fault:
                failures += 1
                shutil.copytree(directory, args.keep / f"{args.seed}-{number}", dirs_exist_ok=True)
                print(f"{number} {kind}: {fault} ({seconds:.1f} s)", flush=True)
    for (kind, outcome), count in sorted(counts.items(), key=str):
        print(f"{count:6} {kind}: {outcome}")
    print(f"{sum(counts.values())} cases, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
