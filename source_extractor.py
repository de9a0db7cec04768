#!/usr/bin/env python
"""Extract sources from an astronomical or microscopy image with SEP.

The file reads in the order of the work, as `run`, near its end, tells it. Its sections:

    Settings                 what can be chosen, under SEP's own names
    Reading                  a FITS or TIFF file in; its origin, and one plane of pixels out
    Kernel                   the filter for the detection
    Mask and frame           which pixels count, and the numbers that SEP works on
    Background               a field: an image less its background, its mask and noise settled; a
                             second pass detects first
    Sharing the work         jobs on one image, done by one process or by many
    Detection                a field in, objects and the map of their labels out
    Measurements             sizes, fluxes and centroids of the objects
    Catalogue                all of it in one table; COLUMNS says what its columns are
    Products: files          a result in; maps, tables and regions out
    Products: pictures       a result for the eye
    Products: all or none    the table of them, and how they are put in place
    Command line: options    what can be said
    Command line: usage      what can't be said together, and where products go
    Command line: run        the work, and what is reported of it

Conventions, everywhere: images are indexed (y, x); x and y are 0-based with pixel centres at
integers; masks are True where a pixel is excluded; `theta` is in radians from +x towards +y.
"""

import argparse
import bz2
import gzip
import io
import itertools
import logging
import lzma
import math
import mmap
import multiprocessing
import operator
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import sep
from astropy import units as u
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from numpy.lib.stride_tricks import sliding_window_view

# Everything else is imported where it is used: a run does without most of it.
if TYPE_CHECKING:
    from astropy.wcs import WCS
    from pandas import DataFrame

PROG = "source_extractor.py"
__version__ = "1.0.0"

SIGNATURE = f"{PROG} {__version__} (sep {sep.__version__})"

PORTION = 2**18  # pixels, or pairs of objects, to work on at a time

log = logging.getLogger("source_extractor")


def one_line(text):
    """Return a message as one line, however it was broken."""
    return " ".join(str(text).split())


class InputError(Exception):
    """A file that can't be used: one line that says what is wrong with it, and what to do."""


@contextmanager
def about(name):
    """Put the name of the image before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


@contextmanager
def timed(stage):
    """Report at debug level how long a stage took; also as a decorator, of each call."""
    start = time.perf_counter()
    yield
    log.debug("%-22s %7.2f s", stage, time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackgroundSettings:
    """Keywords of `sep.Background`: mesh box (pixels), median filter (boxes) and its threshold."""

    bw: int = 64
    bh: int = 64
    fw: int = 3
    fh: int = 3
    fthresh: float = 0.0

    def cut_to(self, shape):
        """Return the settings with boxes no larger than an image (ny, nx)."""
        return replace(self, bw=min(self.bw, shape[1]), bh=min(self.bh, shape[0]))


@dataclass(frozen=True)
class ExtractionSettings:
    """Keywords of `sep.extract`."""

    thresh: float = 1.5
    gain: float | None = None
    minarea: int = 5
    filter_type: str = "matched"
    deblend_nthresh: int = 32
    deblend_cont: float = 0.005
    clean: bool = True
    clean_param: float = 1.0


@dataclass(frozen=True)
class PhotometrySettings:
    """How to measure: magnitude of one count, Kron ellipse in (a, b), apertures in pixels."""

    zeropoint: float = 0.0
    kron_factor: float = 2.5
    kron_min_radius: float = 3.5
    aperture_diameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """How to find sources: all that is the same for every image, in its values."""

    kernel: np.ndarray | None
    err_option: str
    background_passes: int
    background: BackgroundSettings
    extraction: ExtractionSettings
    bridge: int = 3

    def within(self, frame):
        """Return the method with everything that has the image's unit brought into the frame."""
        extraction = self.extraction
        if self.err_option == "none":
            extraction = replace(extraction, thresh=extraction.thresh / frame.scale)
        if extraction.gain is not None:
            extraction = replace(extraction, gain=extraction.gain * frame.scale)
        background = replace(self.background, fthresh=self.background.fthresh / frame.scale)
        return replace(self, background=background, extraction=extraction)

    def measures_noise(self):
        """Tell if the noise is that of the background."""
        return self.err_option in ("float_globalrms", "array_rms")

    def for_measuring(self):
        """Return the method without what was given for one image only: noise, or threshold."""
        if self.err_option == "array_rms":
            return self
        extraction = self.extraction
        if self.err_option == "none":
            extraction = replace(extraction, thresh=ExtractionSettings.thresh)
        return replace(self, err_option="float_globalrms", extraction=extraction)


def aperture(diameter):
    """Return how the columns of a circular aperture end."""
    return f"aper_{diameter:.15g}"


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FITS_MAGIC = (b"SIMPLE", b"\x1f\x8b", b"BZh")
COMPRESS_MAGIC = b"\x1f\x9d"

# What astropy remarks on that changes no pixel; ESO-LOG cards tell what the telescope did.
COSMETIC = re.compile(
    "non-ASCII characters|trailing END keyword|only applicable to integer data|convention: ESO-LOG"
)

# What tifffile begins its remarks with.
REPR = re.compile(r"^<tifffile\.[^>]*> ")

# The last card of a FITS header, which some fill with other bytes than blanks.
END = re.compile(rb"END(?![A-Z0-9_-])")

# A card that says how large a FITS HDU is.
SIZE = re.compile(rb"(BITPIX|NAXIS\d*|PCOUNT|GCOUNT|TFIELDS|ZNAXIS\d*|ZTILE\d+) *= *([+-]?\d+)")

# The card of random groups, in which NAXIS1 = 0 doesn't mean that there are no data.
GROUPS = re.compile(rb"GROUPS *= *T")

# CTYPE of an axis of the sky.
CELESTIAL = re.compile(r"(RA|DEC|[A-Z]L(ON|AT)|[A-Z]{2}L[NT])(-| *$)")

# The memory that must be allowed for a pixel: of the image, its background, and its map of labels.
BYTES_A_PIXEL = 12

# The most that a step of reading may take: of any file, and beside for each of its pixels. That is
# more than they need: astropy's decoders of tiles crash where they get no memory.
SECONDS_A_STEP, SECONDS_A_PIXEL = 15, 5e-6
BYTES_A_STEP, BYTES_TO_READ_A_PIXEL = 5 * 10**8, 32

# The most cards of a FITS header, and of a value in it.
MOST_CARDS = 360_000
MOST_CONTINUED = 1000

MOST_SIP_ORDER = 20  # of the polynomials of a WCS, which seldom have over 5
UNPACKED_PIECE = 2**24  # bytes of a packed file to unpack at a time
MOST_HDUS_TOLD = 20  # in a message


@dataclass(frozen=True)
class Origin:
    """Where pixels come from, and what their file says of them."""

    name: str  # file, and HDU where there is one, for messages
    dtype: str  # of the pixels in the file
    hdu: int | None = None
    wcs: "WCS | None" = None  # celestial, of the plane
    unit: str | None = None  # the header's BUNIT
    beam: float | None = None  # area in pixels of the beam that the unit is per
    black: int | None = None  # value of black in a TIFF in which 0 is white
    palette: bool = False  # whether pixels are numbers of colours
    product: str | None = None  # which of this tool's own products the file says it is
    saturation: float = math.nan  # the header's SATURATE, where it can be a level


class Stack(NamedTuple):
    """What an open file holds, before one plane is cut out of it."""

    origin: Origin
    axes: list[str]
    shape: tuple[int, ...]
    image_axes: list[int]
    cut: Callable[[int], np.ndarray]


def first_bytes(path, size):
    """Return up to so many bytes of a regular file: a pipe might never come, a device never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: a directory, pipe or device; give the name of a file")
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


class TooLong(BaseException):
    """Reading takes too long; no `Exception`, as libraries put up with those, and go on."""


def end_reading(*_):
    raise TooLong("takes more time to read than any image of its size")


@contextmanager
def bounded(pixels=0):
    """Raise `TooLong` or MemoryError at what takes more than so many pixels ever need.

    Files that lie of their size have a library count to 10^9, or ask for memory for that.
    """
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(FileNotFoundError):  # only Linux tells how much is used
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        most = used + BYTES_A_STEP + BYTES_TO_READ_A_PIXEL * pixels
        most = min(most, allowed(resource.RLIMIT_DATA), 2**62)
        resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    handler = signal.signal(signal.SIGPROF, end_reading)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_A_STEP + SECONDS_A_PIXEL * pixels, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextmanager
def reading(path, kind, pixels=0):
    """Turn whatever a damaged file makes a library raise into an `InputError`.

    Little but calls of libraries belongs in it: our own faults would be called damage. For what
    it may take see `bounded`.
    """
    with bounded(pixels):
        try:
            yield
        except InputError:
            raise
        except MemoryError:
            text = "not enough memory to read this image, or it is damaged and asks for too much"
            raise InputError(f"{path.name}: {text}") from None
        except Exception as error:
            reason = one_line(error) or type(error).__name__
            text = f"damaged, cut short, or no {kind} that can be read ({reason})"
            raise InputError(f"{path.name}: {text}; get the file again") from error


@contextmanager
def passing_on_remarks(path):
    """Warn, once a file is read, of what astropy and tifffile had to remark on it."""
    remarks, logger = [], logging.getLogger("tifffile")

    def keep(record):
        remarks.append(REPR.sub("", one_line(record.getMessage())))

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings(record=True, action="ignore") as caught:
            warnings.simplefilter("always", AstropyUserWarning)
            yield
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)
    remarks += [one_line(warning.message) for warning in caught]
    remarks = [remark for remark in dict.fromkeys(remarks) if not COSMETIC.search(remark)]
    if remarks:
        more = f", and {len(remarks) - 1} more such remarks" if remarks[1:] else ""
        log.warning("%s: read, but not as it should be: %s%s", path.name, remarks[0], more)


@contextmanager
def remarks_of_c(logger):
    """Have logged what a library in C writes to stderr itself, as libpng does."""
    if sys.__stderr__ is None:  # 2 may be any file then
        yield
        return
    stderr, (there, here) = os.dup(2), os.pipe()
    os.set_blocking(there, False)
    os.set_blocking(here, False)
    os.dup2(here, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        with suppress(BlockingIOError):  # nothing was written
            for line in os.read(there, 2**16).decode(errors="replace").splitlines():
                logger.warning(line)
        for each in (stderr, there, here):
            os.close(each)


def read_plane(path, hdu=None, plane=None, *, lone_serves_all=False):
    """Read one 2-D plane of a FITS or TIFF file, told apart by their first bytes.

    Raises InputError if the file can't be read, or holds no such HDU or plane.

    Parameters
    ----------
    path : Path
    hdu : str, optional
        Index, in FITS also EXTNAME, or EXTNAME,EXTVER; without it the first that holds an image.
    plane : int, optional
        Plane of a cube, stack or colour image, from 0 over the flattened other axes.
    lone_serves_all : bool
        Let a file of a single plane stand for every `plane`, as one mask does for a whole stack.

    Returns
    -------
    origin : Origin
    pixels : ndarray, shape (ny, nx)
        As stored.
    """
    head = first_bytes(path, 6)
    if head.startswith(TIFF_MAGIC):
        opened = open_tiff
    elif head.startswith(FITS_MAGIC):
        opened = open_fits
    elif head.startswith(COMPRESS_MAGIC):
        raise InputError(f"{path.name}: packed by compress (.Z); unpack it first (gzip -d)")
    else:
        raise InputError(f"{path.name}: neither a FITS nor a TIFF file; convert it to one of them")
    try:
        with passing_on_remarks(path), opened(path, hdu) as stack:
            pixels = stack.cut(choose_plane(stack, plane, lone_serves_all))
            if pixels.dtype.kind not in "biuf":
                raise InputError(f"{stack.origin.name}: {pixels.dtype} pixels are not real numbers")
            shape = [stack.shape[axis] for axis in stack.image_axes]
            if pixels.size != math.prod(shape):
                raise InputError(
                    f"{stack.origin.name}: not all pixels are there; get the file again"
                )
            return stack.origin, pixels.reshape(shape)
    except TooLong as error:
        raise InputError(f"{path.name}: {error}; get the file again") from error
    except OSError as error:  # of the file itself, not of what a library makes of it
        raise InputError(f"{path}: {error.strerror}") from error


# Bytes that each limit of memory (ulimit -v, -d) must allow for all but the image.
LEAST_MEMORY = {resource.RLIMIT_AS: 4 * 10**8, resource.RLIMIT_DATA: 10**8}


def allowed(limit):
    """Return how much of a resource this process may take."""
    most = resource.getrlimit(limit)[0]
    return math.inf if most == resource.RLIM_INFINITY else most


def allowed_for_the_image():
    """Return how many bytes the limits of memory leave to what depends on the image."""
    return min(allowed(limit) - least for limit, least in LEAST_MEMORY.items())


def choose_plane(stack, plane, lone_serves_all):
    """Return the number of the plane to cut, once it is known to exist and to fit in memory."""
    name = stack.origin.name
    if not 0 < math.prod(stack.shape) < 2**62:
        raise InputError(
            f"{name}: no image has {math.prod(stack.shape)} pixels; get the file again"
        )
    rows, columns = (stack.shape[axis] for axis in stack.image_axes)
    count = math.prod(stack.shape) // (rows * columns)
    if count == 1 and (plane is None or lone_serves_all):
        plane = 0
    if plane is None or plane >= count:
        layout = ", ".join(f"{axis}={n}" for axis, n in zip(stack.axes, stack.shape, strict=True))
        choice = f"choose one from 0 to {count - 1} with the plane option"
        if plane is None and lone_serves_all:
            choice = "the image has only one; give one for it"
        planes = "1 plane" if count == 1 else f"{count} planes"
        raise InputError(f"{name}: {planes} in axes ({layout}); {choice}")
    needed = BYTES_A_PIXEL * rows * columns
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > min(present, allowed_for_the_image()):
        raise InputError(
            f"{name}: {columns} x {rows} pixels need {needed / 1e9:.1f} GB of memory, beside the "
            "tool's own, which are not there, or not allowed (ulimit); cut the image into parts"
        )
    return plane


def cut_plane(read, shape, image_axes, plane, *, at_once):
    """Return a plane of a stack of this shape, of which `read` gives what is at some indices.

    It is read at once; or else row by row, each with all that the later axes hold, of which only
    the plane's part is kept.
    """
    first, last = image_axes
    lengths = [1 if axis in image_axes else n for axis, n in enumerate(shape)]
    cuts = [int(place) for place in np.unravel_index(plane, lengths)]
    cuts[first] = cuts[last] = slice(None)
    if at_once:
        return read(tuple(cuts))
    before, after = cuts[:first], tuple(cuts[first + 1 :])
    return np.stack([read((*before, y))[after].copy() for y in range(shape[first])])


@contextmanager
def open_fits(path, hdu):
    """Open a FITS file as a `Stack`; image axes: those of the sky, or the last longer than 1."""
    with unpacked(path) as file:
        with bounded():
            for _ in headers(path, file):  # refuses what can't be true
                pass
        with blaming_scaling(path, file), reading(path, "FITS"):
            # uint=False: else astropy ignores BLANK in unsigned integers.
            hdus = fits.open(file, memmap=False, uint=False)
            chosen = find_hdu(path, hdus, hdu)
            number, name = hdus.index_of(chosen), chosen.name
            if value_of(chosen.header, "BZERO") == 2**63:  # else rounded to multiples of 1024
                chosen = fits.open(file, memmap=False, uint=True)[number]
            header, shape = chosen.header, tuple(map(operator.index, chosen.shape))
            packed = isinstance(chosen, fits.CompImageHDU)
            dtype = fits.BITPIX2DTYPE[header["BITPIX"]]
        numbers = [len(shape) - axis for axis in range(len(shape))]
        axes = [str(value_of(header, f"CTYPE{n}") or f"NAXIS{n}") for n in numbers]
        long_axes = [axis for axis, length in enumerate(shape) if length > 1]
        image_axes = [axis for axis in long_axes if CELESTIAL.match(axes[axis])]
        if len(image_axes) != 2:
            image_axes = long_axes[-2:] if len(long_axes) > 1 else [len(shape) - 2, len(shape) - 1]

        def cut(plane):
            with blaming_scaling(path, file), reading(path, "FITS", math.prod(shape)):
                # Else astropy reads a pixel at a time; tiles it would unpack anew for each row.
                at_once = packed or image_axes[1] == len(shape) - 1
                read = chosen.section.__getitem__
                data = cut_plane(read, shape, image_axes, plane, at_once=at_once)
            if data.dtype == np.uint64 and not math.isnan(blank := number_of(header, "BLANK")):
                data = np.where(data == blank + 2**63, np.nan, data)
            return data

        wcs = celestial_wcs(path, hdus, header, [numbers[axis] for axis in image_axes[::-1]])
        unit, saturation = value_of(header, "BUNIT"), number_of(header, "SATURATE")
        origin = Origin(
            name=f"{path.name}[{number}]" + (f" {name}" if name else ""),
            dtype=dtype,
            hdu=number,
            wcs=wcs,
            unit=str(unit) if unit else None,
            beam=beam_area(header, wcs) if re.search(r"(?i)\bbeam\b", str(unit)) else None,
            product=product_told(str(value_of(header, "HISTORY") or "")),
            saturation=saturation if 0 < saturation < LARGEST else math.nan,
        )
        yield Stack(origin, axes, shape, image_axes, cut)


@contextmanager
def unpacked(path):
    """Open a FITS file, or an unpacked copy of it that is whole and agrees with its checksum.

    astropy never gets to the checksum, and may loop over a packed file that is damaged.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        packing = {b"\x1f\x8b": gzip, b"BZ": bz2}.get(file.read(2))
        if packing:
            file.seek(0)
            packed = stack.enter_context(packing.open(file))
            try:
                copy = stack.enter_context(tempfile.TemporaryFile())
                unpack(path, packed, copy)
                copy.flush()
                file = open(copy.fileno(), "rb", closefd=False)  # noqa: SIM115
            except OSError as error:
                text = f"can't be unpacked ({error.strerror}); set TMPDIR to a place with more room"
                raise InputError(f"{path.name}: {text}") from error
        yield file


def unpack(path, packed, copy):
    """Unpack a FITS file; refuse what goes on and on after the data that its headers tell of.

    The headers are read anew when there is twice as much of it.
    """
    enough = 0
    while True:
        with reading(path, "FITS"):
            piece = packed.read(UNPACKED_PIECE)
        if not piece:
            return
        copy.write(piece)
        if copy.tell() > enough:
            with bounded():
                told = max((end for _, end in headers(path, copy)), default=0)
            copy.seek(0, os.SEEK_END)
            room = told + 4 * UNPACKED_PIECE
            if copy.tell() > room:
                text = f"goes on beyond the {told} bytes that its headers tell of"
                raise InputError(f"{path.name}: {text}; get the file again")
            enough = max(room, 2 * copy.tell())


def headers(path, file):
    """Yield the cards of each FITS header, and where the data end that they tell of.

    One that can't be true is refused, as astropy would be at it for ever: it seeks back by a size
    below 0 and reads the same again, counts to any NAXIS or TFIELDS, looks for an END to the end of
    the file, and takes a time that is quadratic in the CONTINUE cards of a CTYPE.
    """
    end = 0
    for number in itertools.count():
        file.seek(end)
        sizes, cards = {"NAXIS": 0, "BITPIX": 8, "PCOUNT": 0, "GCOUNT": 1}, []
        while not any(map(END.match, cards[-36:])):
            block = file.read(2880)
            if len(block) < 2880 or not (
                cards or block.startswith(b"XTENSION" if number else b"S")
            ):
                return
            cards += [block[place : place + 80] for place in range(0, 2880, 80)]
            if len(cards) > MOST_CARDS:
                raise InputError(f"{path.name}: header {number} has no end; get the file again")
        for key, text in (match.groups() for match in map(SIZE.match, cards) if match):
            value, many = int(text), key in (b"NAXIS", b"ZNAXIS", b"TFIELDS")
            sizes[key.decode()] = value
            if (value > 999 and many) or (value < 0 and key != b"BITPIX"):
                text = f"{key.decode()} of HDU {number} can't be {value}; get the file again"
                raise InputError(f"{path.name}: {text}")
        runs = itertools.groupby(cards, key=lambda card: card.startswith(b"CONTINUE"))
        if max((len(list(run)) for goes_on, run in runs if goes_on), default=0) > MOST_CONTINUED:
            text = f"a value in header {number} goes on over more than {MOST_CONTINUED} cards"
            raise InputError(f"{path.name}: {text}; get the file again")
        axes = [sizes.get(f"NAXIS{axis + 1}", 0) for axis in range(sizes["NAXIS"])]
        grouped = axes[:1] == [0] and any(map(GROUPS.match, cards))
        values = math.prod(axes[1:] if grouped else axes) if axes else 0
        size = abs(sizes["BITPIX"]) // 8 * sizes["GCOUNT"] * (sizes["PCOUNT"] + values)
        if size > 2**62:
            raise InputError(
                f"{path.name}: HDU {number} can't have {size} bytes; get the file again"
            )
        end = file.tell() + size + -size % 2880
        yield cards, end


@contextmanager
def blaming_scaling(path, file):
    """Refuse a FITS file for what scales its pixels, if that is no number: astropy won't say so."""
    try:
        yield
    except InputError:
        scaling = ("BSCALE", "BZERO", "BLANK")
        with bounded():
            for card in itertools.chain.from_iterable(cards for cards, _ in headers(path, file)):
                key = card[:8].decode("latin-1").rstrip()
                if key in scaling and math.isnan(number_of(fits.Header.fromstring(card), key)):
                    told = one_line(card[9:].decode("latin-1"))
                    text = f"{key} can't be read ({told!r}); correct it in the header"
                    raise InputError(f"{path.name}: {text}") from None
        raise


def value_of(header, key):
    """Return the value of a card, None if there is none or it can't be parsed."""
    with suppress(Exception):  # astropy raises many kinds for a card that is damaged
        return header.get(key)


def number_of(header, key):
    """Return the value of a card that holds a number, nan in place of any other."""
    value = value_of(header, key)
    return value if type(value) in (int, float) else math.nan


def index_told(text):
    """Return the index that a text is, else None."""
    return int(text) if text.isdecimal() and len(text) < 10 else None


def find_hdu(path, hdus, wanted):
    """Return the image HDU that `wanted` names, or the first one if it is None."""
    for hdu in hdus:
        for key in ("EXTNAME", "EXTVER"):  # which astropy reads of all
            if value_of(hdu.header, key) is None:
                hdu.header.remove(key, ignore_missing=True)
        if wanted is None and holds_image(hdu):
            return hdu
    hdu, problem = None, "no extension (HDU) holds an image"
    if wanted is not None:
        name, _, text = wanted.rpartition(",")
        index, version = index_told(wanted), index_told(text)
        key = wanted if version is None or not name else (name, version)
        with suppress(KeyError, IndexError):
            hdu = hdus[key if index is None else index]
        if hdu is not None and holds_image(hdu):
            return hdu
        problem = f"no {'such' if hdu is None else 'image in'} extension (HDU): {wanted}"
    raise InputError(f"{path.name}: {problem}; the file has {describe_hdus(hdus)}")


def holds_image(hdu):
    return hdu.is_image and len(hdu.shape) >= 2 and math.prod(hdu.shape) > 0


def describe_hdus(hdus):
    told = "; ".join(
        f"{index} {hdu.name or '(no name)'}: "
        + (" x ".join(map(str, reversed(hdu.shape))) or "empty" if hdu.is_image else "table")
        for index, hdu in enumerate(hdus[:MOST_HDUS_TOLD])
    )
    more = len(hdus) - MOST_HDUS_TOLD
    return f"{told}; and {more} more" if more > 0 else told


def celestial_wcs(path, hdus, header, axes):
    """Return the celestial WCS of the FITS axes numbers `axes`, or None if there is none."""
    if not any(f"CTYPE{axis}" in header for axis in axes):
        return None
    from astropy.wcs import WCS, Sip

    try:
        for key in ("A_ORDER", "B_ORDER", "AP_ORDER", "BP_ORDER"):
            if number_of(header, key) > MOST_SIP_ORDER:
                raise ValueError(f"{key} is over {MOST_SIP_ORDER}")
        with warnings.catch_warnings(action="ignore"), bounded():
            wcs = WCS(without_double_distortion(path, header, axes), hdus, naxis=axes)
            if not wcs.has_celestial:
                return None
            wcs.to_fits(relax=True)[0].verify("exception")  # or else it could not be written
            matrix = wcs.pixel_scale_matrix
    except (Exception, TooLong) as error:  # wcslib and astropy raise many kinds
        problem = one_line(error) or type(error).__name__
    else:
        problem = problem_of_wcs(header, axes, matrix)
    if problem:
        log.warning("%s: WCS can't be used and is left out (%s)", path.name, problem)
        return None
    if wcs.sip:  # which astropy centres on axes 1 and 2
        wcs.sip = Sip(wcs.sip.a, wcs.sip.b, wcs.sip.ap, wcs.sip.bp, wcs.wcs.crpix)
        if not all(ctype.endswith("-SIP") for ctype in wcs.wcs.ctype):
            text = "SIP is applied, though CTYPE lacks -SIP; if it is undone already, remove it"
            log.warning("%s: %s", path.name, text)
    return wcs


def problem_of_wcs(header, axes, matrix):
    """Return what keeps a celestial WCS of the header, with its scale matrix, from use, or None."""
    needed = re.compile(rf"(CRVAL|CRPIX|CDELT|CD|PC|PV)[{axes[0]}{axes[1]}](_\d+)?$")
    for key in filter(needed.match, header):
        if math.isnan(number_of(header, key)):  # wcslib takes it for absent
            return f"{key} can't be read"
    # astropy mends a matrix of zeros, as uncalibrated frames have it, to a degree a pixel.
    blank = [value_of(header, f"CD{i}_{j}") for i in axes for j in axes] == [0] * 4
    if blank or not np.linalg.cond(matrix) < 1e8:
        return "its matrix is singular"
    return None


def without_double_distortion(path, header, axes):
    """Return a header without the SIP or the PV of SCAMP that, of both, its CTYPE doesn't name."""
    kinds = {str(value_of(header, f"CTYPE{axis}"))[5:].strip() for axis in axes}
    sip = {key for key in header if re.match(r"[AB]P?_(ORDER|\d+_\d+)$", key)}
    pv = {key for key in header if re.match(rf"PV[{axes[0]}{axes[1]}]_\d+$", key)}
    scamp = kinds <= {"TAN", "TAN-SIP"} and any(int(key[4:]) > 4 for key in pv)
    if not sip or not (scamp or kinds == {"TPV"}):
        return header
    kept, ignored, keys = ("SIP", "PV", pv) if kinds == {"TAN-SIP"} else ("PV", "SIP", sip)
    log.warning("%s: SIP and PV in its WCS: %s is taken, %s ignored", path.name, kept, ignored)
    return fits.Header(card for card in header.cards if card.keyword not in keys)


def beam_area(header, wcs):
    """Return the area in pixels of a Gaussian beam of BMAJ x BMIN degrees, None without them."""
    major, minor = number_of(header, "BMAJ"), number_of(header, "BMIN")
    if wcs is None or not (major > 0 and minor > 0):
        return None
    return math.pi / (4 * math.log(2)) * major * minor / wcs.proj_plane_pixel_area().value


class Alone(io.FileIO):
    """A file that seems to be none: or else tifffile opens others, whose names a TIFF may hold."""

    def fileno(self):
        raise io.UnsupportedOperation


@contextmanager
def open_tiff(path, hdu):
    """Open an image (series) of a TIFF file as a `Stack`."""
    import tifffile

    with ExitStack() as stack:
        with reading(path, "TIFF"):
            file = stack.enter_context(io.BufferedReader(Alone(path)))
            tiff = stack.enter_context(tifffile.TiffFile(file))
            everything = tiff.series
            images = [image for image in everything if not image.keyframe.is_reduced]
        images = images or everything
        last, number = len(images) - 1, 0 if hdu is None else index_told(hdu)
        if number is None or number > last:
            text = f"no such extension (HDU): {hdu or 0}; this TIFF file has images 0 to {last}"
            raise InputError(f"{path.name}: {text}")
        if hdu is None and last > 0:
            text = "%s: read the first of its %d images; choose another, 0 to %d, with --hdu"
            log.warning(f"{text} (Extension)", path.name, last + 1, last)
        series = images[number]
        with reading(path, "TIFF"):
            axes, page = series.axes, series.keyframe
            shape = tuple(map(operator.index, series.shape))  # floats, if tags are damaged
            image_axes = [axes.index("Y"), axes.index("X")]
            # ImageJ's are tables of colours to look at intensities with.
            colours = None if tiff.is_imagej else page.photometric
            white = colours == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.kind in "bu"
            palette = colours == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
            numbered = palette and bool((np.diff(page.colormap.astype(int)) < 0).any())
            black, description = (1 << page.bitspersample) - 1 if white else None, page.description

        def read(indices):
            rest = shape[len(indices) :]
            dtype = np.dtype(tiff.byteorder + series.dtype.char)
            size, before = math.prod(rest) * dtype.itemsize, shape[: len(indices)]
            file.seek(series.dataoffset + size * int(np.ravel_multi_index(indices, before)))
            return np.frombuffer(file.read(size), dtype).reshape(rest)

        def cut(plane):
            remarks = remarks_of_c(tifffile.logger())
            with remarks, reading(path, "TIFF", math.prod(shape)):
                held = planes_a_page(series, image_axes)
                raw = held != 1 and image_axes[0] < image_axes[1] and series.dataoffset is not None
                pages = [series.pages[plane // held]] if held else list(series.pages)
                if None in pages:
                    text = f"plane {plane} isn't in it; give another file of its set, if it is one"
                    raise InputError(f"{path.name}: {text}")
                if raw:
                    return cut_plane(read, shape, image_axes, plane, at_once=False)
                # In one thread: the stacks and the time of others would count as the file's.
                if held:
                    pixels, plane = pages[0].asarray(maxworkers=1), plane % held
                else:
                    pixels = series.asarray(maxworkers=1)
                planes = np.moveaxis(pixels, [axis - len(shape) for axis in image_axes], (-2, -1))
                return planes[np.unravel_index(plane, planes.shape[:-2])]

        origin = Origin(
            name=f"{path.name}[{number}]" if last else path.name,
            dtype=series.dtype.name,
            hdu=number if last else None,
            black=black,
            palette=numbered,
            product=product_told(description),
        )
        yield Stack(origin, list(axes), shape, image_axes, cut)


def planes_a_page(series, image_axes):
    """Return how many planes each page of a series holds, 0 unless each holds whole ones."""
    page, shape = series.keyframe, series.shape
    depth = len(shape) - page.ndim
    whole = shape[depth:] == page.shape and depth <= min(image_axes)
    if not whole or series.is_truncated or len(series.pages) != math.prod(shape[:depth]):
        return 0
    return page.size // math.prod(shape[axis] for axis in image_axes)


def product_told(history):
    """Return which product of this tool a file is, by the history that it tells, or None."""
    told = re.search(rf"^{re.escape(PROG)} .*: (\w+)$", history, re.MULTILINE)
    return told[1] if told and told[1] in PRODUCTS else None


def to_float(data):
    """Return `data` as a native, contiguous, writable array: float64 where float32 would round.

    The caller gives `data` up: its bytes may be swapped in place.
    """
    exact = 4 if data.dtype.kind == "f" else 2  # bytes of what float32 holds exactly
    if not data.dtype.isnative and data.flags.writeable:
        data = data.byteswap(inplace=True).view(data.dtype.newbyteorder())
    return np.require(data, np.float64 if data.dtype.itemsize > exact else np.float32, ["C", "W"])


@timed("read image")
def read_image(path, hdu=None, plane=None, blank=()):
    """Read the plane to work on: parameters, returns and errors else as in `read_plane`.

    The pixels are native, contiguous, and new: float64 where the file has float64 or integers of
    more than 16 bits, else float32; not finite where it has no value, or one of `blank`.
    """
    origin, stored = read_plane(path, hdu, plane)
    if origin.product:
        text = "%s: its HISTORY tells of the %s of an earlier run; is the original image meant?"
        log.warning(text, origin.name, origin.product)
    if origin.palette:
        text = "its pixels are numbers of a palette, not brightness; convert it to grey, or to RGB"
        raise InputError(f"{origin.name}: {text}")
    if origin.black is not None:
        log.warning("%s: 0 is white in this TIFF: inverted, so that more is brighter", origin.name)
    pixels = to_float(stored)
    for value in np.array(blank, pixels.dtype):  # to which scaled integers may be rounded otherwise
        pixels[np.abs(pixels - value) <= np.spacing(np.abs(value))] = np.nan
    return origin, pixels if origin.black is None else origin.black - pixels


def read_aligned(path, hdu, plane, shape):
    """Read a plane that must have the image's shape (ny, nx); a stack gives the image's plane."""
    origin, pixels = read_plane(path, hdu, plane, lone_serves_all=True)
    require_shape(origin, pixels, shape)
    return origin, pixels


def require_shape(origin, pixels, shape):
    """Refuse pixels that haven't the shape of the image to work on."""
    if pixels.shape != shape:
        raise InputError(
            f"{origin.name}: its shape (rows, columns) is {pixels.shape}, the image's {shape}; "
            "give a file that was made for this image"
        )


@timed("read mask")
def read_mask(path, hdu, plane, maskthresh, bits, shape):
    """Read a mask (ny, nx): True where NaN, at any of `bits`, or without them over `maskthresh`."""
    origin, stored = read_aligned(path, hdu, plane, shape)
    if bits is None:
        return ~(stored <= maskthresh)
    if np.dtype(origin.dtype).kind == "f":
        text = f"only whole numbers have bits (--mask-bits), not {origin.dtype}; take --maskthresh"
        raise InputError(f"{origin.name}: {text}")
    with np.errstate(invalid="ignore"):
        whole = stored.astype(np.int64).view(np.uint64)
    return ((whole & np.bitwise_or.reduce(np.array(bits, np.uint64))) != 0) | ~np.isfinite(stored)


@timed("read noise")
def read_noise(path, hdu, plane, kind, shape):
    """Read a noise image as standard deviations in the image's unit, of its shape (ny, nx).

    The file holds a `kind` of "stddev", "variance", or "weight", which is an inverse variance.
    Where it has no usable value, the noise isn't finite or isn't positive.
    """
    noise = to_float(read_aligned(path, hdu, plane, shape)[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind != "stddev":
            np.sqrt(noise, out=noise)
        if kind == "weight":
            np.divide(1, noise, out=noise)
    if not usable(noise).any():
        text = f"no pixel holds a usable {kind}; does it hold something else (--err-type)?"
        raise InputError(f"{path.name}: {text}")
    return noise


def read_measure_image(path, hdu, plane, blank, origin, shape):
    """Read the measure image, on which the sources of the other one are measured.

    It must have the shape (ny, nx) of the image from `origin`, and should have its WCS; parameters,
    returns and errors else as in `read_image`.
    """
    measure_origin, pixels = read_image(path, hdu, plane, blank)
    require_shape(measure_origin, pixels, shape)
    if origin.wcs and measure_origin.wcs:
        offset = wcs_offset(origin.wcs, measure_origin.wcs, shape)
        if offset > 0.5:
            finding = f"puts the corners of the image up to {offset:.1f} pixels away"
            if offset == math.inf:
                finding = "can't be compared with the image's"
            text = "%s: its WCS %s; measured pixel by pixel all the same"
            log.warning(text, measure_origin.name, finding)
    return measure_origin, pixels


def wcs_offset(one, other, shape):
    """Return how far apart (pixels) two WCS put an image (ny, nx), inf if it can't be told."""
    from astropy.utils import iers

    y, x = np.meshgrid(*(np.linspace(0, n - 1, 3) for n in shape))
    offline = iers.conf.set_temp("auto_download", False)  # of tables for positions on the Earth
    try:
        with warnings.catch_warnings(action="ignore"), offline:
            there = other.world_to_pixel(one.pixel_to_world(x, y))
    except Exception:  # wcslib and the frames raise many kinds
        return math.inf
    gaps = np.hypot(there[0] - x, there[1] - y)
    return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else math.inf


# ---------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------


# The most of a kernel, which takes SEP a multiplication for each element at each pixel: bytes of
# its text, and elements.
KERNEL_BYTES = 2**20
KERNEL_ELEMENTS = 2**16


def make_kernel(case, fwhm, path):
    """Return the detection filter of the `--filter-case`, float32 of odd shape, or None.

    `fwhm` is that of the Gaussian, or the diameter of the top hat, in pixels; `path` is the file of
    a kernel, which raises an `InputError` if SEP can't use it.
    """
    match case:
        case "none":
            return None
        case "default":
            return np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=np.float32)
        case "gaussian":
            return sample_kernel(lambda r: np.exp2(-((2 * r / fwhm) ** 2)), 1.5 * fwhm)
        case "tophat":
            return sample_kernel(lambda r: r <= fwhm / 2, fwhm / 2)
        case "file":
            return read_kernel(path)


def sample_kernel(profile, radius, subpixels=11):
    """Average a profile of the radius (pixels) over each pixel that reaches into `radius`."""
    half = math.ceil(radius - 0.5)
    side = 2 * half + 1
    offsets = (np.arange(side * subpixels) + 0.5) / subpixels - side / 2
    with np.errstate(over="ignore"):
        samples = profile(np.hypot(offsets, offsets[:, np.newaxis]))
    blocks = np.reshape(samples, (side, subpixels, side, subpixels))
    return np.ascontiguousarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def read_kernel(path):
    """Read a kernel: text for `numpy.loadtxt`, or SExtractor's .conv with its CONV line."""
    content = first_bytes(path, KERNEL_BYTES + 1)
    if len(content) > KERNEL_BYTES:
        raise InputError(f"{path.name}: more than {KERNEL_BYTES} bytes are no kernel")
    try:
        lines = content.decode(errors="replace").splitlines()
        if lines and lines[0].split()[:1] == ["CONV"]:
            lines = lines[1:]
        with warnings.catch_warnings(action="ignore"):
            kernel = np.loadtxt(lines, dtype=np.float32, ndmin=2)
    except ValueError as error:
        text = "not rows of numbers of equal length, as a kernel is"
        raise InputError(f"{path.name}: {text}") from error
    if not kernel.any() or not np.isfinite(kernel).all():
        raise InputError(f"{path.name}: a kernel needs finite values that are not all zero")
    rows, columns = kernel.shape
    if kernel.size > KERNEL_ELEMENTS:
        text = f"a kernel of {rows} x {columns} has more than {KERNEL_ELEMENTS} values"
        raise InputError(f"{path.name}: {text}; cut off its faint edge")
    if rows % 2 == 0 or columns % 2 == 0:
        raise InputError(
            f"{path.name}: a kernel of {rows} rows and {columns} columns has no central pixel and "
            "would shift the sources; make both odd"
        )
    return np.ascontiguousarray(kernel)


# ---------------------------------------------------------------------------------------------
# Mask and frame
# ---------------------------------------------------------------------------------------------


def build_mask(pixels, mask, noise, boxes):
    """Combine everything that excludes a pixel: no finite value, the mask, no noise, the boxes.

    All are arrays (ny, nx), but for the boxes (xmin, xmax, ymin, ymax) of 0-based pixels, ends
    included; mask and noise may be None. A box outside the image is an `InputError`, and so it is
    if nothing is left.
    """
    excluded = ~np.isfinite(pixels)
    if mask is not None:
        excluded |= mask
    if noise is not None:
        excluded |= ~usable(noise)
    ny, nx = excluded.shape
    for xmin, xmax, ymin, ymax in boxes:
        if xmin >= nx or ymin >= ny:
            raise InputError(
                f"the mask box {xmin} {xmax} {ymin} {ymax} (XMIN XMAX YMIN YMAX) "
                f"lies outside this image of {nx} columns and {ny} rows"
            )
        excluded[ymin : ymax + 1, xmin : xmax + 1] = True
    if excluded.all():
        raise InputError("every pixel is masked or has no finite value; mask less")
    return excluded


# What a map of gaps holds; else the turn in which a pixel was filled, 0 of one always good.
NARROW = 254
WIDE = 255

# A gap takes the values of a Gaussian where a pixel beside it is this many times the noise above
# the background; of none whose FWHM (pixels) is smaller.
BRIGHT = 5.0
SHARPEST = 2.5


def bridge(image, noise, excluded, rms, widest):
    """Interpolate an image and its noise over narrow gaps, in place; return what stays excluded.

    A gap is a run of up to `widest` excluded pixels along a row or a column between good ones. The
    narrowest are filled first, rows before columns; what is filled is good, so that gaps may cross.
    Larger squares of excluded pixels, and what touches them, stay as they are. The image (ny, nx)
    is without its background, `rms` its noise; `noise` may be a number, which needs no bridge.
    """
    if not widest or not excluded.any():
        return excluded
    state = narrow_or_wide(excluded, widest)
    for turn in range(1, 2 * widest + 1):  # rows and columns of each width
        for y, x in narrow_pixels(state):
            if turn % 2:
                fill_gaps(image, noise, state, y, x, rms, turn)
            else:
                fill_gaps(image.T, np.transpose(noise), state.T, x, y, rms, turn)
    return state >= NARROW


def narrow_or_wide(excluded, widest):
    """Return a map of the excluded pixels: WIDE in or beside larger squares, the others NARROW."""
    state = np.multiply(excluded, NARROW, dtype=np.uint8)
    rim = widest + 1
    for rows in portions(excluded.shape, PORTION):
        top = max(rows.start - rim, 0)
        padded = np.pad(excluded[top : rows.stop + rim], rim)
        # Where full squares begin, and what lies in or beside any of them.
        squares = sliding_window_view(padded, np.subtract(padded.shape, widest)).all(axis=(0, 1))
        if squares.any():
            near = sliding_window_view(squares, np.subtract(padded.shape, 2 * rim)).any(axis=(0, 1))
            part = state[rows]
            part[(part == NARROW) & near[rows.start - top :][: len(part)]] = WIDE
    return state


def narrow_pixels(state):
    """Yield, in portions, the places (y, x) that are NARROW yet."""
    for start in range(0, state.size, PORTION):
        where = np.flatnonzero(state.ravel()[start : start + PORTION] == NARROW)
        if where.size:
            yield np.divmod(start + where, state.shape[1])


def fill_gaps(image, noise, state, y, x, rms, turn):
    """Fill gaps along the rows, in place: those of a turn that begin at a pixel of (y, x).

    What the same turn has filled is not good yet, so that it doesn't matter what comes first.
    """
    width = (turn + 1) // 2
    step = np.arange(-2, width + 4)  # from the last pixel before the gap; three on each side
    place = x[:, None] - 1 + step
    at = np.clip(place, 0, state.shape[1] - 1)
    seen = np.where(at == place, state[y[:, None], at], WIDE)
    good = seen < turn
    closed = good[:, 2] & good[:, -3] & (seen[:, 3:-3] == NARROW).all(axis=1)
    y, at, good = y[closed, None], at[closed], good[closed]
    gap = y, at[:, 3:-3]
    for plane, spread in ((image, rms), (noise, math.inf)):
        if np.ndim(plane):
            values = plane[y, at].astype(np.float64)
            plane[gap] = interpolate(values, good, step, spread)[:, 3:-3]
    state[gap] = turn


def interpolate(values, good, step, rms):
    """Return lines between the two ends of gaps, or Gaussians that fit the good pixels there."""
    ends, part = values[:, [2, -3]], step / step[-3]
    filled = ends @ np.array([1 - part, part])
    bright = ends.max(axis=1) > BRIGHT * rms
    values, good, ends = np.where(good, values, 0)[bright], good[bright], ends[bright]
    # What rises away from the fainter end belongs to another source.
    fainter = (step < 1) == (ends[:, :1] < ends[:, 1:])
    good &= ~fainter | (values <= ends.min(axis=1, keepdims=True) + 3 * rms)
    unit = np.maximum(rms, 1e-3 * values.max(axis=1, keepdims=True))
    values /= unit
    powers = np.vander(step - step.mean(), 3)
    model = np.log(np.maximum(values, 1))
    most = np.where(good, model + 1, 99)
    for _ in range(6):  # Gauss and Newton's; where the noise leaves it open, with no curvature
        height = np.exp(model)
        weight = good * height**2
        matrix = np.einsum("ni,ij,ik->njk", weight, powers, powers) + np.diag([2, 0, 0])
        vector = weight * (model + np.clip(values / height - 1, -1, 1)) @ powers
        model = np.linalg.solve(matrix, vector[:, :, None])[:, :, 0] @ powers.T
        model = np.clip(model, -5, most)
    sharpest = np.exp(4 * math.log(2) / SHARPEST**2 * step * (step[-3] - step))
    most = filled[bright] * np.where(filled[bright] > 0, sharpest, 1)
    filled[bright] = np.minimum(unit * np.exp(model), most)
    return filled


def usable(noise):
    """Tell where standard deviations are finite and positive."""
    return (noise > 0) & np.isfinite(noise)


def portions(shape, pixels):
    """Return slices of rows that make up an image (ny, nx), of up to so many pixels or one row."""
    height = max(1, pixels // shape[1])
    return [slice(top, top + height) for top in range(0, shape[0], height)]


def sample(image, mask):
    """Return up to a million of the pixels of an image that are not masked, from all over it."""
    step = max(1, math.isqrt(image.size // 250_000))
    found = image[::step, ::step][~mask[::step, ::step]]
    return found if found.size else image[~mask]


@dataclass(frozen=True)
class Frame:
    """The numbers SEP works on, image value = offset + scale x number, as it computes in float32.

    It is the identity but for images that float32 can't take: a noise too far from 1 for its
    square to be represented, or a pedestal of which the noise is a tiny fraction.
    """

    offset: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, image, mask):
        """Choose the frame of an image, from a sample of its pixels that are not masked."""
        values = sample(image, mask).astype(np.float64)
        low, middle, high = (float(value) for value in np.percentile(values, [16, 50, 84]))
        spread = (high / 2 - low / 2) or float(np.abs(values / 2 - middle / 2).max())
        offset = middle if abs(middle) > 1e4 * spread else 0.0
        if spread == 0 or 1e-12 < spread < 1e12:
            return cls(offset)
        # Of a sky without noise only the wings of sources are the spread.
        spread = max(spread, 1e-15 * float(np.abs(values - offset).max()))
        return cls(offset, 2.0 ** (math.frexp(spread)[1] - 1))

    def enter(self, image):
        """Bring an image into the frame, in place."""
        if self != Frame():
            with np.errstate(over="ignore", invalid="ignore"):
                image -= self.offset
                image /= self.scale

    @np.errstate(over="ignore")
    def levels(self, values):
        """Bring levels back into image values, in place, and return them."""
        if self != Frame():
            values *= self.scale
            values += self.offset
        return values

    @np.errstate(over="ignore")
    def differences(self, values):
        """Return noise, fluxes and differences of levels in image values."""
        return values if self.scale == 1 else values * self.scale


# ---------------------------------------------------------------------------------------------
# Background
# ---------------------------------------------------------------------------------------------

# How far, in units of (a, b), the sources of the first pass are masked for the second: the profile
# of a bright galaxy goes on well beyond the isophote it was detected at.
GROWTH = 6.0

# Which part of an image a mask must hide, and how many times it must raise the noise, to be one
# that was made for another image.
MUCH_MASKED = 0.05
MUCH_NOISIER = 2.0

# In a noise of more quanta than this SEP's medians are as good as of a continuous one.
COARSE = 10

# What SEP itself puts for the noise of a masked pixel, and the largest number that it can sum.
NO_WEIGHT = 1e30
LARGEST = 1e30


@dataclass(frozen=True)
class Field:
    """An image with its background taken off, ready to be searched and measured.

    Arrays have the shape (ny, nx), and all is in `frame`.
    """

    residual: np.ndarray  # interpolated over bridged gaps
    excluded: np.ndarray  # where there is no value to use, or no noise
    mask: np.ndarray  # the same without bridged gaps
    saturated: tuple[np.ndarray, ...]  # rows and columns of saturated pixels
    noise: float | np.ndarray  # standard deviation, to detect and to measure against
    background: sep.Background
    method: Method
    frame: Frame

    def rows(self, first, last):
        """Return a view of some rows; background and saturated pixels stay those of the image."""
        noise = self.noise if np.ndim(self.noise) == 0 else self.noise[first:last]
        arrays = {
            name: getattr(self, name)[first:last] for name in ("residual", "excluded", "mask")
        }
        return replace(self, noise=noise, **arrays)

    def bridged(self):
        """Return rows and columns of bridged pixels."""
        none = self.mask is self.excluded
        return ([], []) if none else np.nonzero(self.excluded & ~self.mask)

    def level_map(self):
        """Return the background in image values."""
        return self.frame.levels(self.background.back())

    def rms_map(self):
        """Return the background RMS in image values."""
        return self.frame.differences(self.background.rms())

    def is_noiseless(self):
        """Tell if the noise was to be measured, and there is none."""
        return self.method.measures_noise() and global_rms(self.background) == 0

    def detection_noise(self):
        """Return the map of what the threshold is a multiple of: noise, or 1 if it is absolute."""
        noise = 1.0 if self.method.err_option == "none" else self.noise
        return np.broadcast_to(noise, self.mask.shape)

    def depth(self):
        """Return how many times deeper than its threshold SEP goes with a matched filter, or None.

        For white noise: where it has an array n of noise, SEP compares sum(k f / n^2) /
        sqrt(sum(k^2 / n^2)) with the threshold, but else sum(k f) / sum|k| with n times that.
        """
        kernel, matched = self.method.kernel, self.method.extraction.filter_type == "matched"
        if kernel is None or np.ndim(self.noise) == 0 or not matched:
            return None
        return float(np.abs(kernel, dtype=np.float64).sum() / np.linalg.norm(kernel.astype(float)))


@timed("build field")
def build_field(pixels, mask, noise, method, saturation=math.nan, threads=1):
    """Estimate the background of an image, take it off, and bridge narrow gaps in what is left.

    Raises InputError if too little of the image is unmasked.

    Parameters
    ----------
    pixels, mask, noise : ndarray, shape (ny, nx)
        The caller gives up the pixels and the noise: in place they become the residual and its
        noise. A noise image is for the method's `err_option` "file", else None.
    method : Method
    saturation : float
        Level of saturated pixels, in image values; nan if there is none.
    threads : int
        Processes to search with, for the second of two passes.
    """
    saturated = ([], []) if math.isnan(saturation) else np.nonzero(pixels >= saturation)
    frame = Frame.of(pixels, mask)
    frame.enter(pixels)
    # These take no notice of nan, which is masked already.
    low, high = np.fmin.reduce(pixels, axis=None), np.fmax.reduce(pixels, axis=None)
    if not -LARGEST < low <= high < LARGEST:
        mask = mask | too_large(pixels)
    method = method.within(frame)
    if noise is not None:
        with np.errstate(over="ignore"):
            noise /= frame.scale

    def field_of(pixels, noise, background):
        background.subfrom(pixels)
        excluded, settled = settle_noise(mask, noise, background, method)
        rms = global_rms(background)
        unbridged = bridge(pixels, settled, excluded, rms, method.bridge)
        return Field(pixels, excluded, unbridged, saturated, settled, background, method, frame)

    background = estimate_background(pixels, mask, method.background)
    if background is None:
        raise InputError(
            f"no background box of {method.background.bw} x {method.background.bh} pixels has half "
            "of its pixels unmasked; mask less, or take other background boxes (--bw and --bh)"
        )
    if method.background_passes == 2:
        copies = (None if array is None else array.copy() for array in (pixels, noise))
        covered = cover_sources(mask, field_of(*copies, background), threads)
        second = estimate_background(pixels, covered, method.background)
        if second is None:
            log.warning("sources fill every background box: kept the background of the first pass")
        background = second or background
    return field_of(pixels, noise, background)


def build_measure_field(pixels, mask, method, saturation, threads):
    """Return the `Field` of the measure image, under the mask of the other one.

    The pixels become its residual, in place.
    """
    mask = build_mask(pixels, mask, None, [])
    return build_field(pixels, mask, None, method.for_measuring(), saturation, threads)


def too_large(pixels):
    """Tell where values are too large for SEP to sum, or no numbers."""
    return ~((pixels > -LARGEST) & (pixels < LARGEST))


def settle_noise(mask, noise, background, method):
    """Return the mask and the noise of a field, as its method wants them.

    `noise` is that of a noise image, which the caller gives up, or None. Raises InputError if it is
    of another order of magnitude than float32 can hold beside the image.
    """
    overall = global_rms(background)
    if method.err_option in ("none", "float_globalrms") or (noise is None and overall == 0):
        return mask, overall
    if noise is None:
        noise = background.rms()
    mask = mask | ~usable(noise)
    if mask.all():
        raise InputError("no noise can be used beside its pixel; is it in the image's unit?")
    noise[mask] = NO_WEIGHT
    return mask, noise


@timed("estimate background")
def estimate_background(pixels, mask, settings):
    """Return the `sep.Background` of an image (ny, nx), or None if SEP can use no box of it.

    Of a noise of a few quanta SEP's medians, and so its level, are off by up to 1.4 quanta: there
    it takes a copy in which each value is spread over its quantum.
    """
    # SEP allocates whole boxes, also those larger than the image.
    settings = settings.cut_to(pixels.shape)
    masked = np.count_nonzero(mask)
    if 2 * masked > mask.size:
        good, bad = (box_sums(side, settings, mask) for side in (np.logical_not, np.asarray))
        if (good < bad).all():
            return None  # it takes no box of which less than half is unmasked
    keywords = {"mask": mask if masked else None, **asdict(settings)}  # None is faster
    background = sep.Background(pixels, **keywords)
    values = sample(pixels, mask)
    quantum = quantum_of(values)
    if not 0 < global_rms(background) < COARSE * quantum:
        return background
    spread = np.random.default_rng(0).random(pixels.shape, pixels.dtype)
    spread -= 0.5
    spread *= quantum
    spread += pixels
    # SEP's level is the mode: of photons, whose variance is their mean, up to 5/12 of one below it.
    faint = np.minimum(values, np.percentile(values, 95)) / quantum
    if abs(faint.var() - faint.mean()) < faint.mean() / 2:
        spread += quantum * min(faint.mean(), 5 / 12)
    return sep.Background(spread, **keywords)


def quantum_of(values):
    """Return the step of which all differences of the values are multiples; 0 if there is none."""
    ends = np.percentile(values, [10, 90], method="nearest")
    steps = np.diff(np.unique(np.clip(values, *ends)))
    quantum = float(steps.min(initial=np.inf))
    return quantum if steps.size and (np.abs(steps / quantum % 1 - 0.5) > 0.4).all() else 0.0


def box_sums(condition, mesh, *images):
    """Return of how many pixels in each background box a condition of images (ny, nx) is True."""
    ny, nx = images[0].shape
    sums = []
    for top in range(0, ny, mesh.bh):
        where = condition(*(image[top : top + mesh.bh] for image in images))
        rows = where.sum(axis=0, dtype=np.int32)
        sums.append(np.add.reduceat(rows, np.arange(0, nx, mesh.bw)))
    return np.stack(sums)


def cover_sources(mask, first, threads):
    """Return a mask with the sources of a first `Field` covered; as it was if there is no noise."""
    if first.is_noiseless():
        return mask
    found = find_sources(first, threads)
    warn_of_boxes(first, found)
    return grow_mask(mask, found.objects)


def grow_mask(mask, objects):
    """Return a copy of the mask that covers the objects as well, out to `GROWTH` times (a, b)."""
    grown = mask.copy()
    sane = objects[np.isfinite(objects["cxx"] + objects["cyy"] + objects["cxy"])]
    shape = {name: sane[name] for name in ("x", "y", "cxx", "cyy", "cxy")}
    sep.mask_ellipse(grown, **shape, r=GROWTH)
    return grown


def noise_raised_by_mask(field):
    """Return the global RMS over that without the mask; 1 if it hides little, or there is none.

    That without the mask is of up to 32 x 32 background boxes from all over the image.
    """
    if np.count_nonzero(field.mask) <= MUCH_MASKED * field.mask.size:
        return 1.0
    settings, places = field.method.background.cut_to(field.mask.shape), []
    for length, box in zip(field.mask.shape, (settings.bh, settings.bw), strict=True):
        step = max(1, length // (16 * box))
        places.append(np.flatnonzero(np.arange(length) // box % step == 0))
    some = np.ix_(*places)
    mask, residual = field.mask[some], field.residual[some]
    worthless = mask & too_large(residual)
    if np.count_nonzero(mask & ~worthless) <= MUCH_MASKED * mask.size:
        return 1.0
    pixels = field.background.back()[some] + residual
    whole = global_rms(estimate_background(pixels, worthless, settings))
    return global_rms(field.background) / whole if whole else 1.0


def global_rms(background):
    """Return the global RMS of a `sep.Background`; where there is no noise SEP calls it 1."""
    rms = background.globalrms
    return 0.0 if rms == 1 and not background.rms().any() else rms


# ---------------------------------------------------------------------------------------------
# Sharing the work
# ---------------------------------------------------------------------------------------------

LONG = 16  # the fewest jobs of which a terminal is shown the progress

jobs_of_worker = []  # of a worker process, filled when it starts


def shared_zeros(shape, dtype, threads):
    """Return an array of zeros that all processes which share the work can write to."""
    if threads == 1:
        return np.zeros(shape, dtype)  # faster: in larger pages
    try:
        memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
    except OSError as error:
        raise MemoryError from error
    return np.frombuffer(memory, dtype).reshape(shape)


def share(jobs, threads):
    """Yield what each job returns, in their order, done by this many processes.

    Processes, because SEP holds the interpreter's lock: threads would wait for one another.

    Parameters
    ----------
    jobs : sequence of callables
        They see all memory as it was when the processes started. Only what they return, and what
        they write into `shared_zeros`, is seen here.
    threads : int
        With 1 the jobs are done here, one after the other.

    Raises
    ------
    InputError
        If a process is killed or can't be started. Whatever a job raises is raised as well.
    """
    if min(threads, len(jobs)) == 1:
        yield from (job() for job in jobs)
        return
    # A forked process is given the jobs as they are; through a queue they would have to be pickled.
    context, start = multiprocessing.get_context("fork"), (jobs, os.getpid())
    pool = ProcessPoolExecutor(min(threads, len(jobs)), context, start_worker, start)
    try:
        with warnings.catch_warnings(action="ignore"):  # fork leaves out numpy's idle threads
            futures = [pool.submit(do_job, number) for number in range(len(jobs))]
        yield from (future.result() for future in futures)
    except BaseException as error:
        for process in multiprocessing.active_children():  # what they still do is of no use
            process.kill()
        if isinstance(error, BrokenProcessPool | BlockingIOError):
            text = "a worker process was killed or could not be started"
            raise InputError(f"{text}; if memory is short, try a smaller --threads") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(jobs, parent):
    """Prepare a worker process: keep its jobs, and end it when its parent is gone."""
    jobs_of_worker[:] = jobs

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(number):
    """Do one of the jobs of a worker process, and return what it returns."""
    return jobs_of_worker[number]()


def progress(stage, results, total):
    """Pass results on; a terminal is shown how far they are, if they are many."""
    if total < LONG or not sys.stderr.isatty() or log.level != logging.INFO:
        yield from results
        return
    from astropy.utils.console import ProgressBar

    print(f"{stage}:", file=sys.stderr)
    with ProgressBar(total, file=sys.stderr) as bar:
        for result in results:
            yield result
            bar.update()


# ---------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------

# The least rows of an image to search at a time, and the least more for what goes on below them.
STRIP = 512
OVERLAP = 32

# SEP's own starting values and the most it takes without overflow; see `grow_limits`.
PIXEL_STACK = 300_000
SUB_OBJECTS = 1024
MAX_SUB_OBJECTS = 32767

# What `flag` says beside SEP's own bits; the first is SExtractor's.
SATURATED = 4
BRIDGED = 256
BESIDE_MASK = 512

CLEAN_ZONE = 10.0  # SExtractor's: how far cleaning looks, in units of the sum of both a
COPY = 40  # bytes of SEP's copy of a pixel
DEBLENDING = 3e9  # bytes, the most that SEP may copy to deblend an object
LARGE_KERNEL = 200  # elements, from which on a Fourier transform is faster

# What the cleaning needs of an object: the profile by which it eats, its light, and the margin by
# which it resists; and where the group that it was split from ends, which orders the objects.
PROFILE = np.dtype([(name, float) for name in ("height", "alpha", "light", "margin", "row", "end")])

# A pixel of an object: which object, where, the light in the image, the filtered light, and the
# margin by which that is above the threshold.
PIXEL = np.dtype(
    [(name, int) for name in ("owner", "y", "x")]
    + [(name, float) for name in ("light", "filtered", "margin")]
)


class Detections(NamedTuple):
    """SEP's 30 fields of each object, and the map (ny, nx) that labels it with its index + 1."""

    objects: np.ndarray
    segmentation: np.ndarray


@timed("find sources")
def find_sources(field, threads=1):
    """Return the `Detections` in a field: SEP's, cleaned up, in SEP's order.

    That is by the last row of the object, or of the group that it was split from, then by the
    column where that row of it ends. Meanwhile masked pixels of the residual are 0. Raises
    InputError if there is no noise for the threshold to be a multiple of, or SEP gives up.
    """
    if field.is_noiseless() and field.residual[~field.mask].any():
        raise InputError(
            "the background has no noise, so a threshold in units of it has no meaning; give an "
            "absolute one (--err-option none), or a noise image (--err-option file)"
        )
    labels = shared_zeros(field.mask.shape, np.int32, threads)
    strips = cut_into_strips(field)
    apart = (2**31 - 1) // len(strips)  # the labels of two strips, until all are found
    # SEP takes them for 0 too, but filters the first rows before it does.
    with replaced(field.residual, field.mask, 0):
        require_room_to_deblend(field, strips, threads)
        jobs = [
            partial(search_strip, field, labels, strip, i * apart) for i, strip in enumerate(strips)
        ]
        found = list(progress("find sources", share(jobs, threads), len(jobs)))
    objects, profiles = map(np.concatenate, zip(*found, strict=True))
    order = np.lexsort((profiles["end"], profiles["row"]))
    if field.method.extraction.clean:
        beta = field.method.extraction.clean_param
        order = order[survive_cleaning(objects[order], profiles[order], beta)]
    ids = np.zeros(len(objects), np.int32)
    ids[order] = np.arange(1, len(order) + 1)
    starts = np.cumsum([0, *(len(own) for own, _ in found)])
    jobs = [partial(number_labels, labels, strip, ids, starts, apart) for strip in strips]
    list(share(jobs, threads))
    return Detections(objects[order], labels)


class Strip(NamedTuple):
    """A strip of rows to search: from `first` to before `end`; before `bottom` for what goes on."""

    first: int
    end: int
    bottom: int


def rim_of(field):
    """Return one row more than lack some of their filtered light at an edge of a strip."""
    kernel = field.method.kernel
    return 1 if kernel is None else len(kernel) // 2 + 1


def cut_into_strips(field):
    """Return the strips of a field; they depend on what is searched for, not on who searches."""
    # Enough for SEP to see an object in what goes on below, be it a pixel a row.
    overlap = max(OVERLAP, field.method.extraction.minarea + rim_of(field))
    rows, height = max(STRIP, overlap), len(field.mask)
    firsts = range(0, height, rows)
    return [Strip(first, min(first + rows, height), first + rows + overlap) for first in firsts]


def require_room_to_deblend(field, strips, threads):
    """Raise an `InputError` if SEP needed more memory to deblend an object than is bearable.

    It copies the pixels of an object for each level that they are above. Levels are equal factors
    apart, so by Jensen's inequality no more are below them on average than below their mean light.
    """
    extraction, levels = field.method.extraction, field.method.extraction.deblend_nthresh
    # Of noise as many are below as above; a prime step meets all of a pattern such as Bayer's.
    step, bright, thresh = 7, 0, extraction.thresh / (field.depth() or 1)
    for first, end, _ in strips:
        light = field.residual[first:end:step, ::step]
        with np.errstate(over="ignore"):
            level = thresh * field.detection_noise()[first:end:step, ::step]
        above, below = (np.count_nonzero(values > level) for values in (light, -light))
        bright += step**2 * max(above - below, 0)
    if COPY * levels * bright < DEBLENDING:
        return
    extraction = replace(extraction, deblend_nthresh=1, clean=False)
    method = replace(field.method, extraction=extraction)
    field, labels = replace(field, method=method), shared_zeros(field.mask.shape, np.int32, threads)
    jobs = [partial(search_strip, field, labels, strip, 0) for strip in strips]
    objects = np.concatenate([found for found, _ in share(jobs, threads)])
    mean, low, high = objects["cflux"] / objects["npix"], objects["thresh"], objects["cpeak"]
    with np.errstate(all="ignore"):
        part = np.nan_to_num(np.log(mean / low) / np.log(high / low))
    needed = COPY * objects["npix"] * (1 + levels * part)
    if len(needed) and needed.max() > DEBLENDING:
        raise InputError(
            f"to deblend an object of {objects['npix'][needed.argmax()]} pixels in {levels} levels "
            f"could take {needed.max() / 1e9:.0f} GB: take fewer (--deblend-nthresh "
            f"{max(1, int(levels * DEBLENDING / needed.max()))}), or a higher --thresh"
        )


def search_strip(field, labels, strip, base):
    """Find the objects that begin in a strip of the image; label them there base + index + 1.

    Objects that SEP split from one group are found where the group begins, and whole: what goes on
    below the window that SEP searches is searched for again, in a larger one. Returned are the
    objects, rid of masked pixels, and their profiles.
    """
    height, width = labels.shape
    first, end, bottom = strip
    rim, seen, parts = rim_of(field), 0, []
    while True:
        above, bottom = max(first - rim, 0), min(bottom, height)
        window = field.rows(above, bottom)
        with closed_below(window) if bottom < height else nullcontext():
            objects, found = extract(window)
        where = np.flatnonzero(found > 0)
        owner = found.take(where) - 1
        begin, row, end_of_row = group_extents(objects, found, where, owner)
        begin, row = begin + above, row + above
        own = (first <= begin) & (begin < end) & (seen <= row)
        unfinished = own & (row >= bottom - rim - 1) & (bottom < height)
        chosen = own & ~unfinished
        profiles = np.zeros(np.count_nonzero(chosen), PROFILE)
        profiles["row"], profiles["end"] = row[chosen], end_of_row[chosen]
        mine = chosen[owner]
        where, owner = where[mine], (np.cumsum(chosen) - 1)[owner[mine]]
        objects, profiles, where, owner = settle_objects(
            window, objects[chosen], profiles, where, owner
        )
        for name in ("ymin", "ymax", "y", "ycpeak", "ypeak"):
            objects[name] += above
        labels.reshape(-1)[where + above * width] = owner + (base + 1)
        base += len(objects)
        parts.append((objects, profiles))
        if not unfinished.any():
            return tuple(map(np.concatenate, zip(*parts, strict=True)))
        first, seen = begin[unfinished].min(), bottom - rim - 1
        bottom += 2 * (bottom - first)


@contextmanager
def closed_below(window):
    """Let nothing be found in those last rows of a `Field` that lack some of their filtered light.

    There it might join what is apart.
    """
    with replaced(window.residual, -1, np.nan), replaced(window.mask, -1, False):
        yield


def extract(window):
    """Return the objects that SEP finds in a `Field`, not cleaned, and the map of their labels."""
    keywords = asdict(window.method.extraction) | {
        "err": None if window.method.err_option == "none" else window.noise,
        "mask": window.mask if window.mask.any() else None,
        "filter_kernel": window.method.kernel,
        "segmentation_map": True,
        "clean": False,  # SEP's is quadratic, and of a noise array in wrong units
    }
    sep.set_extract_pixstack(PIXEL_STACK)
    sep.set_sub_object_limit(SUB_OBJECTS)
    while True:
        try:
            return sep.extract(window.residual, **keywords)
        except Exception as error:  # SEP raises nothing narrower
            grow_limits(error, window.residual.size)


def group_extents(objects, found, where, owner):
    """Return first row, last row, and last column of that row, of the group each object is of.

    A group are objects that SEP has split, and so touch, in its order one after the other. Beside
    them come the map of labels, flat indices of all that is labelled, and the object there.
    """
    y, x = np.divmod(where, found.shape[1])
    count = len(objects)
    split = (objects["flag"][owner] & sep.OBJ_MERGED) > 0
    rows, columns, own = y[split], x[split], owner[split]
    bonds = np.zeros(count + 1, int)
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        inside, at = pixels_at(rows + down, columns + right, found.shape)
        other = np.where(inside, found.take(at), 0) - 1
        touch = (other >= 0) & (other != own)
        pair = np.sort([own[touch], other[touch]], axis=0) + 1
        bonds += np.bincount(pair[0], minlength=count + 1)
        bonds -= np.bincount(pair[1], minlength=count + 1)
    group = np.cumsum(np.cumsum(bonds)[:count] == 0) - 1  # a new one where no bond leads further
    begin, last, end = np.full(count, len(found)), np.zeros(count, int), np.zeros(count, int)
    np.minimum.at(begin, group, objects["ymin"])
    np.maximum.at(last, group, objects["ymax"])
    lowest = y == last[group[owner]]
    np.maximum.at(end, group[owner[lowest]], x[lowest])
    return begin[group], last[group], end[group]


def number_labels(labels, strip, ids, starts, apart):
    """Turn the labels in a strip of the map into ids, in place.

    The `ids` are those of all strips, one after the other; `starts` is where each begins.
    """
    rows = labels[strip.first : strip.end].reshape(-1)
    where = np.flatnonzero(rows > 0)
    finder, index = np.divmod(rows[where] - 1, apart)
    rows[where] = ids[starts[finder] + index]


def flag_fields(found, field, measure_field):
    """Flag the objects, in place, that hold saturated or bridged pixels in any of the fields."""
    for each in (field,) if measure_field is field else (field, measure_field):
        for where, bit in ((each.saturated, SATURATED), (each.bridged(), BRIDGED)):
            labels = np.unique(found.segmentation[where])
            found.objects["flag"][labels[labels > 0] - 1] |= bit


@contextmanager
def replaced(array, where, value):
    """Put a value into an array, in place, and back at the end what was there."""
    before = np.copy(array[where])
    array[where] = value
    try:
        yield
    finally:
        array[where] = before


def grow_limits(error, pixels):
    """Raise the limit of which SEP complains, up to what an image of so many pixels can need."""
    stack, objects = sep.get_extract_pixstack(), sep.get_sub_object_limit()
    if isinstance(error, MemoryError):
        raise error
    if "pixel buffer full" in str(error) and stack < pixels + 2:
        sep.set_extract_pixstack(min(4 * stack, pixels + 2))
        log.debug("pixel stack full, grown to %d pixels", sep.get_extract_pixstack())
    elif "deblending overflow" in str(error) and objects < MAX_SUB_OBJECTS:
        sep.set_sub_object_limit(min(4 * objects, MAX_SUB_OBJECTS))
        log.debug("too many sub-objects, limit grown to %d", sep.get_sub_object_limit())
    elif "deblending overflow" in str(error):
        raise InputError(
            f"a source splits into more than {MAX_SUB_OBJECTS} parts; raise the threshold "
            "(--thresh), or switch deblending off (--deblend-nthresh 1)"
        ) from error
    else:
        raise InputError(f"SEP gave up: {one_line(error)}") from error


def settle_objects(field, objects, profiles, where, owner):
    """Take masked pixels from SEP's objects, and complete their profiles.

    Before and after, come objects and profiles, flat indices of their pixels, and the object there.
    One that loses pixels keeps SEP's position and shape: those of the filtered light, as far as the
    filter reaches into the mask. One that has masked pixels beside it is flagged.
    """
    by_owner = np.argsort(owner, kind="stable")
    where, owner = where[by_owner], owner[by_owner]
    pixels = filter_pixels(field, where, owner)
    good = ~field.mask.take(where)
    left = np.bincount(owner[good], minlength=len(objects))
    if depth := field.depth():
        noise = np.bincount(owner[good], field.noise.take(where[good]), len(objects))
        thresh = field.method.extraction.thresh / depth * noise / np.maximum(left, 1)
        bright = owner[pixels["light"] > thresh[owner]]
        objects["thresh"], objects["tnpix"] = thresh, np.bincount(bright, minlength=len(objects))
    if field.method.extraction.clean:
        describe_profiles(objects, profiles, pixels, field.method.extraction)
    cut = (left > 0) & (left < objects["npix"])
    recount(objects, cut, pixels[good & cut[owner]])
    where, owner = where[good], owner[good]
    if field.mask.any():
        y, x = np.divmod(where, field.mask.shape[1])
        beside = correlate(field.mask, np.ones((3, 3)), y, x) > 0
        objects["flag"][np.unique(owner[beside])] |= BESIDE_MASK
    kept = left > 0
    return objects[kept], profiles[kept], where, (np.cumsum(kept) - 1)[owner]


def recount(objects, cut, pixels):
    """Describe the objects that are `cut` anew, in place, by the pixels left to each of them."""
    owner = pixels["owner"]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    objects["npix"][cut] = np.diff(starts, append=len(owner))
    for axis in "xy":
        objects[f"{axis}min"][cut] = np.minimum.reduceat(pixels[axis], starts)
        objects[f"{axis}max"][cut] = np.maximum.reduceat(pixels[axis], starts)
    for kind, name in (("", "light"), ("c", "filtered")):
        values = pixels[name]
        top = pixels[np.lexsort((-values, owner))[starts]]
        objects[f"{kind}flux"][cut] = np.add.reduceat(values, starts)
        objects[f"{kind}peak"][cut] = top[name]
        objects[f"x{kind}peak"][cut], objects[f"y{kind}peak"][cut] = top["x"], top["y"]


@np.errstate(over="ignore", invalid="ignore")
def filter_pixels(field, where, owner):
    """Return a `PIXEL` for each flat index in `where`, of the image filtered as SEP does it.

    The object there is its `owner`. A matched filter weighs pixels by their noise: its margin is
    what it would be if the noise nearby were even.
    """
    kernel, thresh = field.method.kernel, field.method.extraction.thresh
    kernel = np.ones((1, 1)) if kernel is None else kernel / np.abs(kernel).sum()
    y, x = np.divmod(where, field.mask.shape[1])
    filtered = correlate(field.residual, kernel, y, x)
    if field.depth():
        precision = field.noise.astype(np.float64) ** -2
        weight = np.sqrt(correlate(precision, kernel**2, y, x))
        significance = correlate(field.residual * precision, kernel, y, x) / weight
        margin = (significance - thresh) * np.square(kernel).sum() / weight
    else:
        margin = filtered - thresh * field.detection_noise()[y, x]
    return np.rec.fromarrays((owner, y, x, field.residual[y, x], filtered, margin), dtype=PIXEL)


def correlate(image, kernel, y, x):
    """Return the sum of a kernel times an image about pixels (y, x), nothing beyond the edges."""
    (ny, nx), (top, left) = image.shape, np.floor_divide(kernel.shape, 2)
    if kernel.size > LARGE_KERNEL:
        shape = np.add(image.shape, kernel.shape) - 1
        image, kernel = image.astype(np.float64), kernel.astype(np.float64)
        product = np.fft.rfft2(image, shape) * np.fft.rfft2(kernel, shape).conj()
        return np.fft.irfft2(product, shape)[y - top, x - left]
    rows = [(y >= -step) & (y < ny - step) for step in range(-top, top + 1)]
    columns = [(x >= -step) & (x < nx - step) for step in range(-left, left + 1)]
    corner, total = (y - top) * nx + x - left, 0
    for (i, j), weight in np.ndenumerate(kernel):
        values = image.take(corner + (i * nx + j), mode="clip")
        total += weight * np.where(rows[i] & columns[j], values, 0)
    return total


@np.errstate(all="ignore")
def describe_profiles(objects, profiles, pixels, settings):
    """Fill in the profiles of objects, as SExtractor's CLEAN takes them.

    Around an object light falls off as height (1 + alpha r^2)^-`clean_param`, r in units of (a, b).
    """
    thresh, area, flux = objects["thresh"], np.pi * objects["a"] * objects["b"], objects["cflux"]
    owner, half = pixels["owner"], (thresh + objects["peak"]) / 2
    core = np.bincount(owner[pixels["light"] > half[owner]], minlength=len(objects))
    steepness = -2 * np.log(np.where(thresh < half, thresh / half, 0.99)) * area
    height = flux / (2 * area * np.minimum(np.maximum(objects["tnpix"] - core, 1) / steepness, 1))
    profiles["light"], profiles["height"] = flux, height
    fall = (height / thresh) ** (1 / settings.clean_param) - 1
    profiles["alpha"] = fall * area / objects["npix"]
    profiles["margin"] = margins_to_eat(objects["npix"], pixels, settings.minarea)


@np.errstate(all="ignore")
def survive_cleaning(objects, profiles, beta):
    """Tell which objects are more than the light of a brighter neighbour, as SExtractor's CLEAN.

    An object eats a neighbour at which its profile is more than the neighbour's margin over the
    threshold. What has been eaten when its turn comes eats no other.
    """
    x, y, a, cxx, cyy, cxy = (objects[name] for name in ("x", "y", "a", "cxx", "cyy", "cxy"))
    height, alpha, light, margin = (profiles[name] for name in PROFILE.names[:4])
    eating = [np.empty((3, 0), int)]
    for i, j in close_pairs(x, y, CLEAN_ZONE * a):
        eater = np.where(light[j] < light[i], i, j)
        eaten, dx, dy = i + j - eater, x[i] - x[j], y[i] - y[j]
        ellipse = cxx[eater] * dx**2 + cyy[eater] * dy**2 + cxy[eater] * dx * dy
        spread = 1 + alpha[eater] * ellipse
        eats = (spread > 1) & (spread < 1e10) & (height[eater] * spread**-beta > margin[eaten])
        eating.append(np.array([i, j, eaten])[:, eats])
    eating = np.hstack(eating)
    alive = np.ones(len(objects), bool)
    in_turn = eating[:, np.lexsort(eating[1::-1])].T.tolist()
    for i, own in itertools.groupby(in_turn, key=operator.itemgetter(0)):
        if alive[i]:
            for _, j, eaten in own:
                alive[eaten] &= not alive[j]
    return alive


def margins_to_eat(npix, pixels, minarea):
    """Return the margin of each object's `minarea`-th highest pixel; 0 of one with fewer.

    As SExtractor has it: it leaves out the pixel that it found after the first `minarea`, and of
    just as many takes the first found. It finds them row by row, but where a row begins further
    left than the one before, that end comes before all others.
    """
    owner, x, y, margin = (pixels[name] for name in ("owner", "x", "y", "margin"))
    rows = np.flatnonzero(np.diff(owner, prepend=-1) | np.diff(y, prepend=-1))
    before = np.where(np.diff(owner[rows], prepend=-1), 0, np.roll(x[rows], 1))
    ahead = x < np.repeat(before, np.diff(rows, append=len(x)))
    found = margin[np.lexsort((-(y + 1) * ahead, owner))]  # what is ahead, the last row first
    first = np.cumsum(npix) - npix
    ranked = np.where(np.arange(len(x)) == (first + minarea)[owner], -np.inf, found)
    ranked = ranked[np.lexsort((-ranked, owner))]
    nth = ranked.take(first + minarea - 1, mode="clip")
    return np.select([npix > minarea, npix == minarea], [nth, found[first]])


def close_pairs(x, y, reach):
    """Yield, in portions, all pairs i < j of objects no further apart than they reach together.

    Those that reach alike, within a factor of 2, meet all that reach no further in the nine cells
    about them of a grid as wide as any two of these may be apart.
    """
    size = np.where(np.isfinite(x + y + reach), np.frexp(reach)[1], 9999)
    for level in np.unique(size[size < 9999]):
        seekers, near = np.flatnonzero(size == level), np.flatnonzero(size <= level)
        row, column = (np.floor(values / 2.0 ** (level + 1)) for values in (y, x))
        width = column[near].max() + 2
        cell = row * width + column
        near = near[np.argsort(cell[near])]
        for middle in (cell[seekers] + step * width for step in (-1, 0, 1)):
            first, last = np.searchsorted(cell[near], [middle - 1, middle + 2])
            ends = np.cumsum(last - first)
            for start in range(0, int(ends[-1]), PORTION):
                place = np.arange(start, min(start + PORTION, ends[-1]))
                seeker = np.searchsorted(ends, place, side="right")
                i, j = seekers[seeker], near[place + (last - ends)[seeker]]
                meet = np.hypot(x[i] - x[j], y[i] - y[j]) <= reach[i] + reach[j]
                meet &= (size[j] < level) | (i < j)
                yield np.minimum(i, j)[meet], np.maximum(i, j)[meet]


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------

# SExtractor's KRON_NSIG: the Kron radius and the growth curve reach this far, in units of (a, b).
KRON_REACH = 6.0

# SExtractor's window for XWIN_IMAGE: its sigma per half-light radius, its reach in sigmas.
WINDOW_SIGMA = 2 / 2.35
WINDOW_REACH = 4.0

# How much further a neighbour matters to a window that moves, and how far in sigmas a centroid may:
# simulated sources that move further are then further from the truth than they were before.
WINDOW_ROOM = 1.25
STRAY = 0.5

# The label of masked pixels while sources are measured; exact in float32, in which SEP compares.
MASKED = 2**30

# How many sources are measured at a time, and pixels of the window of each.
BATCH = 1000
WINDOW_PIXELS = 500


class Shapes(NamedTuple):
    """Positions (pixels) and ellipses of objects, as SEP takes them."""

    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    theta: np.ndarray


@timed("measure")
def measure(field, measure_field, found, settings, threads=1):
    """Measure sizes, Kron and aperture fluxes, and windowed centroids.

    The objects `found` in `field` have their Kron ellipses there, and are measured in the other
    field. Neighbours and masked pixels are left out of every sum; meanwhile the map labels masked
    pixels.

    Returns
    -------
    dict of ndarray
        A value for each object, by the name of the column: sizes in pixels, fluxes in the frame of
        `measure_field`, nan where there is nothing to measure.
    """
    objects, labels = found
    shapes, sane = sane_shapes(objects)
    ids = np.flatnonzero(sane).astype(np.int32) + 1
    with masked_as_neighbours(labels, field.mask):
        neighbours = {"segmap": labels, "seg_id": ids}
        kron, kron_flag = kron_radii(field, shapes, neighbours, settings)
    jobs = []
    for start in range(0, max(len(ids), 1), BATCH):
        some = slice(start, start + BATCH)
        own = Shapes(*(values[some] for values in shapes))
        neighbours = {"segmap": labels, "seg_id": ids[some]}
        jobs.append(partial(measure_some, measure_field, own, kron[some], neighbours, settings))
    with masked_as_neighbours(labels, measure_field.mask):
        parts = list(progress("measure", share(jobs, threads), len(jobs)))
    measured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    flag = np.full(len(objects), sep.APER_ALLMASKED, np.int64)
    # The Kron radius reaches further than the flux: edge and neighbours there don't matter to it.
    flag[sane] = measured.pop("flag_auto") | (kron_flag & ~(sep.APER_TRUNC | sep.APER_HASMASKED))
    values, usable_kron = list(measured.values()), (kron_flag & sep.APER_ALLMASKED) == 0
    columns = np.full((len(values), len(objects)), np.nan)
    columns[:, sane] = np.where(usable_kron, values, np.nan)
    return dict(zip(measured, columns, strict=True)) | {"flag_auto": flag}


def measure_some(field, shapes, kron, neighbours, settings):
    """Return what is measured of some objects in one field; see `measure`."""
    # Like SExtractor, AUTO sums whole pixels whose centres are in the ellipse.
    ellipse = {"r": kron, "subpix": 1, **neighbours}
    flux, error, flag = sum_light(sep.sum_ellipse, field, *shapes, **ellipse)
    radius = half_light_radii(field, shapes, flux, neighbours)
    sigma = WINDOW_SIGMA * np.maximum(radius, 0.5)
    xwin, ywin = windowed_centroids(field, shapes, sigma, neighbours)
    return {
        **{"flux_auto": flux, "fluxerr_auto": error, "flag_auto": flag},
        **{"kron_radius": kron, "flux_radius": radius, "xwin": xwin, "ywin": ywin},
        **windowed_errors(field, xwin, ywin, sigma, neighbours),
        **aperture_fluxes(field, shapes, settings.aperture_diameters, neighbours),
    }


def sane_shapes(objects):
    """Return the `Shapes` of the objects that SEP can measure, and which these are.

    One that it refuses would make it give up on all: a shape that is not finite, or a theta that
    was a float32 and is a hair over pi/2.
    """
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    a, b = np.maximum(a, b), np.minimum(a, b)
    theta = np.mod(theta + np.pi / 2, np.pi) - np.pi / 2
    sane = np.isfinite(x + y + a + theta) & (b > 0)
    return Shapes(*(values[sane] for values in (x, y, a, b, theta))), sane


def masked_as_neighbours(labels, mask):
    """Give masked pixels a label of their own, so that SEP leaves them out as it does neighbours.

    With `mask=` beside `segmap=` SEP would scale each sum up by the area of both, and so the flux
    would depend on whether there is a mask.
    """
    return replaced(labels, mask, MASKED)


def kron_radii(field, shapes, neighbours, settings):
    """Return the radii of the AUTO ellipses in units of (a, b), and SEP's flags.

    SExtractor's recipe: max(kron_factor r_k, kron_min_radius), r_k of Kron (1980).
    """
    r_k, flag = sep.kron_radius(field.residual, *shapes, KRON_REACH, **neighbours)
    # Of positive light it can't be more; of noise around nothing it may be anything.
    r_k = np.clip(np.nan_to_num(r_k), 0, KRON_REACH)
    return np.maximum(settings.kron_factor * r_k, settings.kron_min_radius), flag


def sum_light(sum_in, field, *shapes, **keywords):
    """Return the fluxes that a function of SEP sums, their errors, and SEP's flags.

    Fluxes and errors are nan where the noise of no pixel was summed.
    """
    keywords |= {"err": field.noise, "gain": field.method.extraction.gain}
    flux, error, flag = sum_in(field.residual, *shapes, **keywords)
    empty = (error == 0) & np.any(field.noise)
    flux[empty], error[empty] = np.nan, np.nan
    flag[empty] |= sep.APER_ALLMASKED
    return flux, error, flag


def half_light_radii(field, shapes, flux, neighbours):
    """Return the radii (pixels) of the circles that hold half of each flux, nan where none does."""
    limit = KRON_REACH * shapes.a
    radius, _ = sep.flux_radius(
        field.residual, shapes.x, shapes.y, limit, 0.5, normflux=flux, subpix=5, **neighbours
    )
    radius[~((flux > 0) & (radius < limit))] = np.nan
    return radius


def aperture_fluxes(field, shapes, diameters, neighbours):
    """Return the fluxes in circles, and their errors, under the names of their columns."""
    found = {}
    for diameter in diameters:
        circle = {"r": diameter / 2, "subpix": 0, **neighbours}  # 0 is exact
        flux, error, _ = sum_light(sep.sum_circle, field, shapes.x, shapes.y, **circle)
        found |= {f"flux_{aperture(diameter)}": flux, f"fluxerr_{aperture(diameter)}": error}
    return found


def windowed_centroids(field, shapes, sigma, neighbours):
    """Return the centroids in a Gaussian window, nan where a source has no `sigma` (pixels).

    SExtractor's XWIN_IMAGE and YWIN_IMAGE. `sep.winpos` knows no neighbours, and would run to a
    bright one: a source that has any in reach is measured on a stamp of its own without them. Of
    `neighbours`, the map "segmap" labels masked pixels too, and "seg_id" are the sources' labels.
    Pixels at the edge of the window count by their exact part in it (`subpix` 0).
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    x, y, found = shapes.x, shapes.y, np.full((2, len(sigma)), np.nan)
    reach = WINDOW_ROOM * WINDOW_REACH * np.nan_to_num(sigma) + 2
    _, _, flag = sep.sum_circle(image, x, y, reach, subpix=1, **neighbours)
    crowded, sized = (flag & sep.APER_HASMASKED) > 0, np.isfinite(sigma)
    alone = sized & ~crowded
    found[:, alone] = sep.winpos(image, x[alone], y[alone], sigma[alone], subpix=0)[:2]
    for i in np.flatnonzero(sized & crowded):
        stamp, left, bottom = lone_stamp(image, labels, ids[i], x[i], y[i], reach[i])
        at_x, at_y, _ = sep.winpos(stamp, [x[i] - left], [y[i] - bottom], [sigma[i]], subpix=0)
        found[:, i] = at_x[0] + left, at_y[0] + bottom
    found[:, np.hypot(found[0] - x, found[1] - y) > STRAY * sigma] = np.nan
    return found


@np.errstate(over="ignore", invalid="ignore")
def windowed_errors(field, xwin, ywin, sigma, neighbours):
    """Return the error ellipses of the windowed centroids, by column; nan where there is none.

    SExtractor's ERRAWIN_IMAGE, ERRBWIN_IMAGE (pixels) and ERRTHETAWIN_IMAGE (here in radians). What
    isn't the source's own or sky is left out; parameters else as in `windowed_centroids`.
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    noise, gain = field.noise, field.method.extraction.gain or np.inf
    halves = np.ceil(np.minimum(WINDOW_REACH * sigma, max(image.shape)))
    halves[np.isnan(xwin)] = np.nan
    sums = np.full((4, len(xwin)), np.nan)
    # All windows of one size together, some rows at a time: fast for small ones, lean for large.
    for half in np.unique(halves[halves > 0]).astype(int):
        alike, offsets = np.flatnonzero(halves == half), np.arange(-half, half + 1)
        x, y, s, own_id = (values[alike, None, None] for values in (xwin, ywin, sigma, ids))
        columns, total = np.rint(x).astype(int) + offsets, 0
        height = max(1, WINDOW_PIXELS // len(offsets))
        for start in range(0, len(offsets), height):
            rows = np.rint(y).astype(int) + offsets[start : start + height, None]
            inside, at = pixels_at(rows, columns, image.shape)
            dx, dy = columns - x, rows - y
            r2 = (dx**2 + dy**2) / s**2
            owner = labels.take(at)
            own = inside & (r2 < WINDOW_REACH**2) & ((owner == own_id) | (owner == 0))
            weight = np.where(own, np.exp(-r2 / 2), 0)
            light = weight * np.where(own, image.take(at), 0)
            rms = weight * np.where(own, noise.take(at) if np.ndim(noise) else noise, 0)
            variance = rms**2 + weight * np.maximum(light, 0) / gain
            terms = light, variance * dx**2, variance * dy**2, variance * dx * dy
            total += np.array([term.sum(axis=(1, 2)) for term in terms])
        sums[:, alike] = total
    xx, yy, xy = 4 * sums[1:] / np.where(sums[0] > 0, sums[0], np.nan) ** 2
    mean, half_gap = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = np.sqrt([mean + half_gap, np.maximum(mean - half_gap, 0)])
    return {"errawin": major, "errbwin": minor, "errthetawin": np.arctan2(2 * xy, xx - yy) / 2}


def lone_stamp(image, labels, label, x, y, reach):
    """Cut out a source and replace what isn't its own, as SExtractor's MASK_TYPE CORRECT does.

    A foreign pixel takes the value opposite to it about (x, y), or 0 where that is foreign too.
    After the stamp come the column and the row of the image at its first pixel.
    """
    ny, nx = image.shape
    left = math.ceil(x - min(reach, max(x, nx - 1 - x)))
    bottom = math.ceil(y - min(reach, max(y, ny - 1 - y)))
    # The last pixel is the one opposite to the first, so that a flip swaps opposite pixels.
    rows = np.arange(bottom, round(2 * y) - bottom + 1)[:, np.newaxis]
    columns = np.arange(left, round(2 * x) - left + 1)
    inside, at = pixels_at(rows, columns, image.shape)
    stamp, owner = (np.where(inside, plane.take(at), 0) for plane in (image, labels))
    foreign = (owner != 0) & (owner != label)
    opposite = np.where(foreign[::-1, ::-1], 0, stamp[::-1, ::-1])
    return np.where(foreign, opposite, stamp), left, bottom


def pixels_at(rows, columns, shape):
    """Tell which pixels are in an image (ny, nx); return the flat indices of those nearest."""
    pairs = zip((rows, columns), shape, strict=True)
    y, x = (np.minimum(np.maximum(place, 0), size - 1) for place, size in pairs)
    return (y == rows) & (x == columns), y * shape[1] + x


# ---------------------------------------------------------------------------------------------
# Catalogue
# ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the catalogue."""

    name: str
    unit: str | None  # "image" and "measure" stand for the units of the images; see `name_units`
    ucd: str  # what it is in the words of the IVOA
    description: str


COLUMNS = (
    Column("id", None, "meta.id;meta.main", "label of the object in the segmentation map"),
    Column("x", "pixel", "pos.cartesian.x", "barycentre along x"),
    Column("y", "pixel", "pos.cartesian.y", "barycentre along y"),
    Column("ra", "deg", "pos.eq.ra;meta.main", "right ascension of (x, y), ICRS"),
    Column("dec", "deg", "pos.eq.dec;meta.main", "declination of (x, y), ICRS"),
    Column("flux_auto", "measure sum", "phot.flux", "flux in the Kron ellipse"),
    Column("fluxerr_auto", "measure sum", "stat.error;phot.flux", "error of flux_auto"),
    Column("snr", None, "stat.snr", "flux_auto / fluxerr_auto"),
    Column("mag_auto", "mag", "phot.mag", "magnitude of flux_auto"),
    Column("magerr_auto", "mag", "stat.error;phot.mag", "error of mag_auto"),
    Column("flux_radius", "pixel", "phys.angSize", "radius of a circle with half of flux_auto"),
    Column("fwhm", "pixel", "phys.angSize", "FWHM of a Gaussian of the same a and b"),
    Column("a", "pixel", "phys.size.smajAxis", "RMS of the light along the major axis"),
    Column("b", "pixel", "phys.size.sminAxis", "RMS of the light along the minor axis"),
    Column("theta", "rad", "pos.posAng", "angle of the major axis, from +x towards +y"),
    Column("elongation", None, "src.morph.param", "a / b"),
    Column("npix", "pixel", "meta.number;instr.pixel", "number of pixels of the object"),
    Column("flag", None, "meta.code", "extraction flags"),
    Column("flag_auto", None, "meta.code", "photometry flags"),
    Column("thresh", "image", "phot.flux;stat.min", "detection threshold at the object"),
    Column("tnpix", "pixel", "meta.number;instr.pixel", "those above the threshold unfiltered"),
    Column("xmin", "pixel", "pos.cartesian.x;stat.min", "first column of the object"),
    Column("xmax", "pixel", "pos.cartesian.x;stat.max", "last column of the object"),
    Column("ymin", "pixel", "pos.cartesian.y;stat.min", "first row of the object"),
    Column("ymax", "pixel", "pos.cartesian.y;stat.max", "last row of the object"),
    Column("x2", "pixel2", "src.morph.param", "variance of the light along x"),
    Column("y2", "pixel2", "src.morph.param", "variance of the light along y"),
    Column("xy", "pixel2", "src.morph.param", "covariance of the light in x and y"),
    Column("errx2", "pixel2", "stat.variance;pos.cartesian.x", "variance of the error of x"),
    Column("erry2", "pixel2", "stat.variance;pos.cartesian.y", "variance of the error of y"),
    Column("errxy", "pixel2", "stat.covariance;pos.cartesian", "covariance of errors of x and y"),
    Column("cxx", "pixel-2", "src.morph.param", "ellipse coefficient of dx^2"),
    Column("cyy", "pixel-2", "src.morph.param", "ellipse coefficient of dy^2"),
    Column("cxy", "pixel-2", "src.morph.param", "ellipse coefficient of dx dy"),
    Column("cflux", "image sum", "phot.flux", "sum of the object's pixels in the filtered image"),
    Column("flux", "image sum", "phot.flux", "sum of the object's pixels"),
    Column("cpeak", "image", "phot.flux;stat.max", "highest pixel in the filtered image"),
    Column("peak", "image", "phot.flux;stat.max", "highest pixel"),
    Column("xcpeak", "pixel", "pos.cartesian.x", "column of the highest filtered pixel"),
    Column("ycpeak", "pixel", "pos.cartesian.y", "row of the highest filtered pixel"),
    Column("xpeak", "pixel", "pos.cartesian.x", "column of the highest pixel"),
    Column("ypeak", "pixel", "pos.cartesian.y", "row of the highest pixel"),
    Column("background", "measure", "instr.background", "background level at the object"),
    Column("rms", "measure", "stat.stdev;instr.background", "background RMS at the object"),
    Column("kron_radius", None, "phys.angSize", "radius of the Kron ellipse in units of a and b"),
    Column("xwin", "pixel", "pos.cartesian.x", "windowed centroid along x"),
    Column("ywin", "pixel", "pos.cartesian.y", "windowed centroid along y"),
    Column("errawin", "pixel", "stat.error;pos.cartesian", "major axis of the error of xwin, ywin"),
    Column("errbwin", "pixel", "stat.error;pos.cartesian", "minor axis of the error of xwin, ywin"),
    Column("errthetawin", "rad", "stat.error;pos.posAng", "angle of the major axis of that error"),
)


def catalog_columns(diameters):
    """Return all columns of the catalogue, with those for the aperture diameters (pixels)."""
    return COLUMNS + tuple(
        Column(f"{name}_{aperture(diameter)}", unit, ucd, f"{text}, {diameter:.15g} pixels wide")
        for diameter in diameters
        for name, unit, ucd, text in (
            ("flux", "measure sum", "phot.flux", "flux in a circle"),
            ("fluxerr", "measure sum", "stat.error;phot.flux", "error of the flux in a circle"),
            ("mag", "mag", "phot.mag", "magnitude in a circle"),
            ("magerr", "mag", "stat.error;phot.mag", "error of the magnitude in a circle"),
        )
    )


def name_units(columns, image_unit, measure_unit):
    """Return the columns with the units of the two images, and of sums of their pixels."""
    units = {"image": image_unit, "measure": measure_unit}
    units |= {f"{name} sum": unit_of_sums(unit) for name, unit in units.items()}
    return tuple(column._replace(unit=units.get(column.unit, column.unit)) for column in columns)


def unit_of_sums(text):
    """Return the unit of a sum of pixels: another than theirs if that is, legibly, per area."""
    if text is None or re.search(r"\d{3}", text):  # astropy might work on its powers for ever
        return text
    try:
        with warnings.catch_warnings(action="ignore"):
            # As AIPS and CASA spell them.
            unit = u.Unit(re.sub("(?i)jy/beam", "Jy/beam", text).replace("/beam.", " beam-1 "))
        parts = unit.decompose()
        powers = dict(zip(parts.bases, parts.powers, strict=True))
    except (ValueError, AttributeError):
        return text
    if powers.get(u.rad) != -2 and powers.get(u.beam) != -1 and powers.get(u.pix) != -1:
        return text
    with suppress(ValueError):  # not every unit is FITS's
        return (unit * u.pix).to_string("fits")
    return (unit * u.pix).to_string()


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def build_catalog(objects, measured, field, measure_field, wcs, settings):
    """Return the catalogue as a DataFrame of `catalog_columns`, with a row for each object.

    Here fluxes and levels leave the frames of the two fields: the catalogue is in image values.

    Parameters
    ----------
    objects : structured array
        As `find_sources` returns them.
    measured : dict of ndarray
        As `measure` returns it.
    field, measure_field : Field
        Where the objects were found, and where they were measured.
    wcs : WCS or None
        Without one the sky positions are nan.
    settings : PhotometrySettings
    """
    from pandas import DataFrame

    columns = catalog_columns(settings.aperture_diameters)
    table = {name: objects[name] for name in objects.dtype.names} | measured
    table["id"] = np.arange(1, len(objects) + 1)
    frames = {"image": field.frame, "measure": measure_field.frame}
    for column in columns:
        of, *_ = (column.unit or "").split(" ")
        if of in frames and column.name in table:
            table[column.name] = frames[of].differences(table[column.name])
    table["background"] = at_objects(measure_field.level_map(), objects)
    table["rms"] = at_objects(measure_field.rms_map(), objects)
    table["ra"], table["dec"] = sky_positions(wcs, objects["x"], objects["y"])
    table["elongation"] = objects["a"] / objects["b"]
    # The FWHM of a round Gaussian is sqrt(8 ln 2) times its RMS, here sqrt((a² + b²) / 2).
    table["fwhm"] = 2 * np.sqrt(math.log(2) * (objects["a"] ** 2 + objects["b"] ** 2))
    error = table["fluxerr_auto"]
    table["snr"] = table["flux_auto"] / np.where(error > 0, error, np.nan)
    for kind in ("auto", *map(aperture, settings.aperture_diameters)):
        flux, error = table[f"flux_{kind}"], table[f"fluxerr_{kind}"]
        flux = np.where(flux > 0, flux, np.nan)
        table[f"mag_{kind}"] = settings.zeropoint - 2.5 * np.log10(flux)
        table[f"magerr_{kind}"] = 2.5 / math.log(10) * error / flux  # to first order
    return DataFrame({column.name: table[column.name] for column in columns})


def at_objects(values, objects):
    """Return the values of a map (ny, nx) at the pixels nearest to the objects' positions."""
    rows, columns = (
        np.clip(np.rint(np.nan_to_num(objects[axis])), 0, size - 1).astype(int)
        for axis, size in zip("yx", values.shape, strict=True)
    )
    return values[rows, columns].astype(float)


def sky_positions(wcs, x, y):
    """Return right ascension and declination of pixels (0-based) in degrees, ICRS, or nan."""
    nowhere = np.full(len(x), np.nan)
    if wcs is None or not len(x):
        return nowhere, nowhere
    try:
        if wcs.wcs.lngtyp not in ("RA", "GLON"):
            raise ValueError(f"{wcs.wcs.lngtyp} is neither RA nor GLON")
        with warnings.catch_warnings(action="ignore"):
            sky = wcs.pixel_to_world(x, y).icrs
    except Exception as error:  # wcslib and the frames raise many kinds
        log.warning("the WCS gives no sky positions: ra and dec are nan (%s)", one_line(error))
        return nowhere, nowhere
    return sky.ra.deg, sky.dec.deg


# ---------------------------------------------------------------------------------------------
# Products: files
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """All that the products of an image are made from."""

    origin: Origin
    field: Field
    found: Detections
    catalog: "DataFrame"
    columns: tuple[Column, ...]  # of the catalogue, with their units
    settings: list[str]  # how it was made, a line each
    image_format: str | None  # "fits", "tiff", or None to go by the extensions of image products

    def history(self, product):
        """Return lines that say what made a product, which one it is, and with what settings."""
        return [f"{SIGNATURE}: {product}", *self.settings]


PIECE = 2**16  # pixels of an image that are written at a time


def write_image(product, part, result):
    """Write an image product, floats as float32 unless the image is float64.

    FITS has the unit as BUNIT. TIFF keeps neither WCS nor unit, and labels as the smallest unsigned
    integers that hold them.
    """
    match product:
        case "background":
            values = result.field.level_map()
        case "rms":
            values = result.field.rms_map()
        case "segmentation":
            values = result.found.segmentation
        case "subtracted":
            values = result.field.frame.differences(result.field.residual)
    if values.dtype == np.float64 and result.origin.dtype != "float64":
        values = values.astype(np.float32)
    if (result.image_format or part.path.suffix.lower()) in ("tiff", ".tiff", ".tif"):
        import tifffile

        if values.dtype.kind == "i":
            values = values.astype(np.min_scalar_type(values.max()))
        description = "\n".join(result.history(product))
        with part.writing() as path:
            tifffile.imwrite(path, values, description=description, metadata=None)
        return
    wcs = result.origin.wcs
    with warnings.catch_warnings(action="ignore"):  # of cards that the WCS standard renames
        hdus = wcs.to_fits(relax=True) if wcs else fits.HDUList([fits.PrimaryHDU()])
        primary = hdus[0]
        primary.data = values
        if result.origin.unit and product != "segmentation":
            primary.header["BUNIT"] = result.origin.unit
        for line in result.history(product):
            primary.header.add_history(line)
        hdus.verify("exception")
    if part.path.suffix in PACKERS:
        write_hdus(hdus, part)
        return
    with part.writing() as path:
        # Large writes are slow where memory for them has to be made, as in a virtual machine.
        with open(path, "ab+") as file, fits.StreamingHDU(file, primary.header) as stream:
            for rows in portions(values.shape, PIECE):
                stream.write(values[rows])
        if len(hdus) > 1:  # tables of distortions
            with fits.open(path, "append") as file:
                file.extend(hdus[1:])


# How to pack a file without its name and time, which a gzip file else holds.
PACKERS = {
    ".gz": partial(gzip.GzipFile, "", "wb", 9, mtime=0),
    ".bz2": partial(bz2.BZ2File, mode="wb"),
    ".xz": partial(lzma.LZMAFile, mode="wb"),
}


def write_hdus(hdus, part):
    """Write a FITS file, packed if its extension says so."""
    packer = PACKERS.get(part.path.suffix, nullcontext)
    with part.writing() as path, open(path, "wb") as file, packer(file) as stream:
        hdus.writeto(stream)


def write_catalog(part, result):
    """Write the catalogue as tab-separated text: a line of names, full precision, `nan`."""
    with part.writing() as path:
        result.catalog.to_csv(path, sep="\t", index=False, na_rep="nan", lineterminator="\n")


def write_catalog_fits(part, result):
    """Write the catalogue as a FITS binary table with units, descriptions and UCDs."""
    from astropy.table import Table

    table = Table.from_pandas(result.catalog)
    for column in result.columns:
        table[column.name].description = column.description
    table.meta["HISTORY"] = result.history("catalog_fits")
    buffer = io.BytesIO()
    table.write(buffer, format="fits")  # with the descriptions as astropy reads them
    buffer.seek(0)
    with fits.open(buffer) as hdus:
        header = hdus[1].header
        for number, column in enumerate(result.columns, start=1):
            if column.unit:
                header[f"TUNIT{number}"] = column.unit
            header[f"TCOMM{number}"] = column.description
            header[f"TUCD{number}"] = column.ucd
        write_hdus(hdus, part)


def write_regions(part, result):
    """Write a DS9 region file: ellipses of semi-axes 3a and 3b, labelled with the id.

    In sky coordinates (ICRS) where the catalogue has them, else in DS9's 1-based pixels.
    """
    catalog = result.catalog
    x, y, a, b, theta = (catalog[name].to_numpy() for name in ("x", "y", "a", "b", "theta"))
    if np.isfinite(catalog["ra"]).any():
        system, shapes = "icrs", sky_ellipses(result.origin.wcs, x, y, 3 * a, 3 * b, theta)
        form = 'ellipse({:.15g},{:.15g},{:.9g}",{:.9g}",{:.9g})'
    else:
        system, shapes = "image", np.array([x + 1, y + 1, 3 * a, 3 * b, np.degrees(theta)])
        form = "ellipse({:.9g},{:.9g},{:.9g},{:.9g},{:.9g})"
    lines = ["# Region file format: DS9 version 4.1", "global color=red", system]
    lines += [
        f"{form.format(*shape)} # text={{{label}}}"
        for label, shape in zip(catalog["id"], np.transpose(shapes), strict=True)
        if np.isfinite(shape).all()
    ]
    part.write("\n".join([*lines, ""]).encode())


def sky_ellipses(wcs, x, y, a, b, theta):
    """Return ra, dec (degrees), semi-axes (arcsec) and DS9's angle (degrees) of pixel ellipses.

    DS9 counts the angle from west through north, 90 degrees ahead of the position angle.
    """
    along, across = (np.cos(theta), np.sin(theta)), (-np.sin(theta), np.cos(theta))
    with warnings.catch_warnings(action="ignore"):
        centre, major, minor = (
            wcs.pixel_to_world(x + length * dx, y + length * dy).icrs
            for length, (dx, dy) in ((0, along), (a, along), (b, across))
        )
    axes = (centre.separation(end).arcsec for end in (major, minor))
    angle = (centre.position_angle(major).deg + 90) % 180
    return np.array([centre.ra.deg, centre.dec.deg, *axes, angle])


# ---------------------------------------------------------------------------------------------
# Products: pictures
# ---------------------------------------------------------------------------------------------

# The most pixels a side of a panel; larger images are reduced to it before anything is drawn.
PICTURE_SIDE = 1000

# How to save a figure: a higher level takes longer to make files that are little smaller.
PNG = {"format": "png", "pil_kwargs": {"compress_level": 1}}


@contextmanager
def figure_of(part, **keywords):
    """Yield a figure, free of what the user's matplotlibrc may say; at the end, write its PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(**keywords)
        yield figure
        try:
            figure.savefig(buffer, **PNG)
        except ValueError as error:
            if "could not be made C-contiguous" in str(error):  # for want of memory
                raise MemoryError from error
            raise
    part.write(buffer.getbuffer())


def shrink(image, row_of_blocks):
    """Reduce an image by `block_means` or `block_maxima` to a picture, a strip of it at a time."""
    step = math.ceil(max(image.shape) / PICTURE_SIDE)
    starts, tops = np.arange(0, image.shape[1], step), range(0, image.shape[0], step)
    return np.stack([row_of_blocks(image[top : top + step], starts) for top in tops])


def block_means(strip, starts):
    """Return the mean of the finite values of each block of a strip, nan where there are none."""
    with np.errstate(invalid="ignore"):  # inf - inf, and 0 / 0
        sums, numbers = strip.sum(axis=0, dtype=np.float64), np.full(strip.shape[1], len(strip))
        if not np.isfinite(sums).all():
            finite = np.isfinite(strip)
            sums = np.where(finite, strip, 0).sum(axis=0, dtype=np.float64)
            numbers = finite.sum(axis=0)
        return np.add.reduceat(sums, starts) / np.add.reduceat(numbers, starts)


def block_maxima(strip, starts):
    """Return the largest value of each block of a strip."""
    return np.maximum.reduceat(strip.max(axis=0), starts)


def drawable(picture):
    """Return a picture without values at which matplotlib's scales overflow."""
    return np.clip(picture, -1e300, 1e300)


def panel_size(shape):
    """Return the width and height in inches of the panel for an image of this shape (ny, nx)."""
    height, width = (8 * max(length / max(shape), 0.2) for length in shape)
    return width, height


def show_image(axes, picture, shape, **style):
    """Show a shrunken picture of an image of this shape, row 0 at the bottom, axes in pixels."""
    axes.set(xlabel="x (pixel)", ylabel="y (pixel)")
    extent = (-0.5, shape[1] - 0.5, -0.5, shape[0] - 0.5)
    return axes.imshow(picture, origin="lower", extent=extent, interpolation="nearest", **style)


def show_sources(axes, result):
    """Show the background-subtracted image in grey, with a red ellipse of 6a x 6b a source.

    Masked pixels are under a blue veil, and so are bridged ones, whose values are interpolated.
    Returns the scale of greys.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import EllipseCollection
    from matplotlib.colors import LinearSegmentedColormap

    field, objects = result.field, result.found.objects
    picture = drawable(field.frame.differences(shrink(field.residual, block_means)))
    masked = np.zeros(picture.shape)
    if field.excluded.any():
        masked = shrink(field.excluded, block_means)
    open_sky = masked <= np.median(masked[masked < 1])
    greys = ScalarMappable(stretch(picture[open_sky]), "gray")
    show_image(axes, greys.to_rgba(picture, bytes=True), field.mask.shape)
    title = f"{len(objects)} source{'s' if len(objects) != 1 else ''}"
    if masked.any():
        title += "\nmasked pixels in blue"
        # Thicker the more of a picture's pixel is masked.
        veil = LinearSegmentedColormap.from_list("veil", [(0.1, 0.3, 1, 0), (0.1, 0.3, 1, 0.5)])
        show_image(axes, veil(masked, bytes=True), field.mask.shape)
    axes.set_title(title, loc="left", y=1)
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    place = {"units": "xy", "offsets": np.column_stack([x, y]), "offset_transform": axes.transData}
    style = {"facecolors": "none", "edgecolors": "red", "linewidths": 0.8}
    ellipses = EllipseCollection(6 * a, 6 * b, np.degrees(theta), **place, **style)
    axes.add_collection(ellipses, autolim=False)
    return greys


def stretch(values):
    """Return the scale of greys that shows faint sky and bright cores together.

    Linear within the noise and logarithmic far above it (Lupton, Gunn & Szalay 1999).
    """
    from matplotlib.colors import AsinhNorm

    low, middle, top = np.percentile(values, [16, 50, 100])
    noise = middle - low or (top - middle) / 1000
    if noise < 1e-280:  # matplotlib's scales end there
        noise = 1.0
    return AsinhNorm(noise / 2, middle - 3 * noise, max(top, middle + 3 * noise))


def draw_overlay(part, result):
    """Draw the picture of the sources (PNG)."""
    width, height = panel_size(result.field.mask.shape)
    whole = max(width + 1, 3.3), height + 1.1  # wide enough for the title
    place = np.divide([0.8, 0.6, width, height], [*whole, *whole])
    with figure_of(part, figsize=whole, dpi=120) as figure:
        show_sources(figure.add_axes(place, anchor="W"), result)


def draw_overview(part, result):
    """Draw four panels with colour bars: sources, background, RMS, segmentation (PNG)."""
    from matplotlib.colors import ListedColormap

    field, (objects, labels) = result.field, result.found
    width, height = panel_size(labels.shape)
    whole = 2 * width + 3, 2 * height + 1.5
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(objects) + 1, 3))
    colours[0] = 0
    with figure_of(part, figsize=whole, dpi=85, layout="compressed") as figure:
        panels = figure.subplots(2, 2).ravel()
        figure.colorbar(show_sources(panels[0], result), ax=panels[0])
        for axes, title, picture, colour_map in (
            (panels[1], "background", drawable(shrink(field.level_map(), block_means)), None),
            (panels[2], "background RMS", drawable(shrink(field.rms_map(), block_means)), None),
            (panels[3], "segmentation", shrink(labels, block_maxima), ListedColormap(colours)),
        ):
            figure.colorbar(show_image(axes, picture, labels.shape, cmap=colour_map), ax=axes)
            axes.set_title(title, loc="left")


# ---------------------------------------------------------------------------------------------
# Products: all or none
# ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A product on its way: where it is made, where to put it, and to keep what that replaces."""

    path: Path
    target: Path
    kept: Path

    @contextmanager
    def writing(self):
        """Give the path; turn what keeps it from being written into an `InputError`."""
        try:
            yield self.path
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise InputError(
                f"{self.target}: can't be written ({reason}); make room or choose another place"
            ) from error

    def write(self, content):
        """Write all of the product, bytes."""
        with self.writing() as path:
            path.write_bytes(content)


class Product(NamedTuple):
    """A product: its name in the output directory (None: on request), what it is, its writer."""

    default: str | None
    text: str
    write: Callable[[Part, Result], None]

    def file_name(self, suffix):
        """Return the default name, if any, an image's with the extension of its format."""
        is_image = self.default and "." not in self.default
        return self.default + suffix if is_image else self.default


PRODUCTS = {
    "background": Product(
        "background", "level of the background", partial(write_image, "background")
    ),
    "rms": Product("rms", "noise of the background", partial(write_image, "rms")),
    "segmentation": Product(
        "segmentation", "map of the sources' labels", partial(write_image, "segmentation")
    ),
    "overlay": Product("sources.png", "PNG of the sources as ellipses", draw_overlay),
    "catalog": Product("catalog.tsv", "catalogue", write_catalog),
    "subtracted": Product(None, "background-subtracted image", partial(write_image, "subtracted")),
    "catalog_fits": Product(
        None, "catalogue as FITS table with units and descriptions", write_catalog_fits
    ),
    "regions": Product(None, "DS9 region file", write_regions),
    "overview": Product(
        None, "PNG of four panels: sources, background, RMS, segmentation", draw_overview
    ),
}


def write_products(parts, result, threads):
    """Write each product to its part, shared by this many processes."""
    list(share([partial(write_product, name, parts[name], result) for name in parts], threads))


def write_product(name, part, result):
    """Write one product."""
    with timed(f"write {name}"):
        PRODUCTS[name].write(part, result)


# The signals at which a run removes what it has made before it ends.
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@contextmanager
def handling_signals(handler):
    """Let `handler` take the signals that stop a run, but for those ignored, as under nohup."""
    before = {signum: signal.getsignal(signum) for signum in STOPS}
    taken = [signum for signum in STOPS if before[signum] != signal.SIG_IGN]
    for signum in taken:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum in taken:
            signal.signal(signum, before[signum])


def stop(owner, signum, _):
    """Stop the process that owns the products by an exception, so that they are removed.

    A worker process, which inherits this handler, ends at once.
    """
    if os.getpid() != owner:
        os._exit(128 + signum)
    for each in STOPS:  # a second one must not interrupt the removal
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + signum)


@contextmanager
def staged(targets):
    """Yield a `Part` for each target, by the name of its product; at the end, put all in place.

    Products are made in a hidden directory beside their target, which only its owner may enter. If
    anything fails, or a signal stops the run, it is removed, as are the directories that were made
    for the targets, and nothing else has changed. A target that can't be written raises an
    `InputError` before anything is done.
    """
    parts, made, hidden = {}, [], {}

    def make(directory):
        for place in reversed([directory, *directory.parents]):
            if not place.exists():
                place.mkdir(exist_ok=True)
                made.append(place)

    def prepare(name, target):
        if target.is_dir():
            raise InputError(f"{target}: a directory; choose another place for the {name}")
        make(target.parent)
        if target.parent not in hidden:
            place = tempfile.mkdtemp(prefix=".source_extractor-", dir=target.parent)
            hidden[target.parent] = Path(place)
            made.append(Path(place))
        new, old = (hidden[target.parent] / kind for kind in ("new", "old"))
        make(new)
        make(old)
        parts[name] = Part(new / target.name, target, old / target.name)
        parts[name].path.touch(exist_ok=False)

    with handling_signals(partial(stop, os.getpid())):
        try:
            for name, target in targets.items():
                with Part(target, target, target).writing():
                    prepare(name, target)
            yield parts
            with handling_signals(signal.SIG_IGN):
                put_in_place(list(parts.values()))
        finally:
            with handling_signals(signal.SIG_IGN):
                for part in parts.values():
                    with suppress(OSError):
                        part.path.unlink()
                for place in reversed(made):
                    with suppress(OSError):  # it is not empty
                        place.rmdir()


def put_in_place(parts):
    """Move all products into place, older ones out of the way first; if one fails, undo it all.

    A product that replaces a file keeps the mode of that file.
    """
    for part in parts:
        with part.writing() as path:
            path.stat()  # it may have been taken away
    try:
        for part in parts:
            with part.writing() as path:
                if part.target.is_file() and not part.target.is_symlink():
                    shutil.copymode(part.target, path)
                if os.path.lexists(part.target):
                    part.target.replace(part.kept)
                path.replace(part.target)
    except InputError:
        for part in parts:
            with suppress(OSError):  # or else the older product stays in the hidden directory
                if os.path.lexists(part.kept):
                    part.kept.replace(part.target)
                elif not part.path.exists():
                    part.target.unlink()
        raise
    for part in parts:
        part.kept.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Command line: options
# ---------------------------------------------------------------------------------------------


def number(kind, minimum=-math.inf, maximum=math.inf, *, above=-math.inf, odd=False):
    """Return a converter for argparse: a finite int or float within bounds.

    `minimum` and `maximum` are allowed themselves, `above` is not.
    """

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not -math.inf < value < math.inf:
            wanted = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text.strip()!r} is not {wanted}")
        for is_wrong, what in (
            (value < minimum, f"less than {minimum}"),
            (value > maximum, f"more than {maximum}"),
            (value <= above, f"no more than {above}"),
            (odd and value % 2 == 0, "even; take an odd number"),
        ):
            if is_wrong:
                raise argparse.ArgumentTypeError(f"{text.strip()} is {what}")
        return value

    return convert


NEGATIVE = re.compile(r"-\.?\d")  # how a negative number begins

LONGEST_MESSAGE = 1000  # characters of what is wrong with the arguments


class Parser(argparse.ArgumentParser):
    """A parser that takes any negative number for a value, and whose errors are one line."""

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # argparse takes -1e-5 for an option, but nothing that begins with a blank.
        words = [f" {word}" if NEGATIVE.match(word) else word for word in words]
        return super().parse_args(words, namespace)

    def error(self, message):
        message = one_line(message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]} ..."
        self.exit(2, f"{PROG}: error: {message} (see --help)\n")


EXAMPLES = """examples:
  find and measure the sources of an image; then look at products/sources.png:
    source_extractor image.fits -o products
  only what is beyond doubt, with a bright star masked:
    source_extractor image.fits --thresh 5 --mask-box 40 140 215 300 -o sure
  one extension of several, another of them as its mask:
    source_extractor hst.fits --hdu SCI --mask hst.fits --mask-hdu DQ --mask-bits 256 -o hst
  colours: detect in one band, measure in another:
    source_extractor r.fits --measure-image g.fits --aperture-diameters 6 10 -o g
  nuclei in a microscope image, their labels as TIFF:
    source_extractor nuclei.tif --bw 256 --bh 256 --minarea 30 --image-format tiff -o nuclei
"""


def option_of(name):
    """Return the option that argparse stores under this name."""
    return "--" + name.replace("_", "-")


def add_option(group, names, kind, text, **keywords):
    """Add an option of a type, or of a tuple of choices, whose help ends in its default."""
    if isinstance(kind, tuple):
        keywords["choices"], kind = kind, type(kind[0])
    option = group.add_argument(*names.split(), type=kind, help=text, **keywords)
    if option.default not in (None, [], ()):
        option.help += " (default: %(default)s)"


def build_parser():
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROG,
        usage="%(prog)s IMAGE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        description="Find and measure the sources in an image: background, noise, segmentation map,"
        "\npicture and catalogue.",
        allow_abbrev=False,
    )
    for settings in (BackgroundSettings, ExtractionSettings, PhotometrySettings):
        parser.set_defaults(**asdict(settings()))
    parser.add_argument("image", metavar="IMAGE", type=Path, help="FITS or TIFF image")
    real, positive = number(float), partial(number, float, above=0)

    group = parser.add_argument_group("input")
    add = partial(add_option, group)
    add("--hdu", str, "index, EXTNAME, or EXTNAME,EXTVER (default: first with an image)")
    add("--plane", number(int, 0), "plane of a cube or stack, over the flattened other axes")
    add("--mask", Path, "mask image, FITS or TIFF, of the same shape")
    add("--mask-hdu", str, "HDU of the mask, as --hdu")
    either = partial(add_option, group.add_mutually_exclusive_group())
    either("--maskthresh", real, "mask pixels greater than this are masked", default=0.0)
    text = "or: mask pixels with any of these bits are masked, such as 1 2 1024, or their sum"
    either("--mask-bits", number(int, 1, 2**64 - 1), text, nargs="+", metavar="BIT")
    box = {"nargs": 4, "action": "append", "metavar": ("XMIN", "XMAX", "YMIN", "YMAX")}
    text = "mask 0-based pixels, ends included; repeatable"
    add("--mask-box", number(int, 0), text, default=[], **box)
    text = "value of pixels without data, such as 0 in a mosaic; repeatable"
    add("--blank", real, text, default=[], action="append", metavar="VALUE")
    text = "interpolate over masks this narrow, pixels; 0: none"
    add("--bridge", number(int, 0, 5), text, default=3)

    add = partial(add_option, parser.add_argument_group("background"))
    add("--bw", number(int, 8), "width of the boxes, pixels")
    add("--bh", number(int, 8), "height of the boxes, pixels")
    add("--fw", number(int, 1, 99, odd=True), "width of the median filter, boxes, odd")
    add("--fh", number(int, 1, 99, odd=True), "height of the median filter, boxes, odd")
    add("--fthresh", number(float, 0), "filter boxes this far from the median")
    add("--background-passes", (1, 2), "with 2, mask the sources and estimate it again", default=1)

    add = partial(add_option, parser.add_argument_group("detection"))
    add("--thresh", positive(), "times the noise; absolute without noise")
    noises = ("float_globalrms", "array_rms", "none", "file")
    text = "noise: one number, RMS map, none, or --err-file"
    add("--err-option", noises, text, default=noises[0])
    add("--err-file", Path, "noise image for --err-option file")
    add("--err-hdu", str, "HDU of the noise image, as --hdu")
    kinds = ("stddev", "variance", "weight")
    add("--err-type", kinds, "weight is inverse variance", default=kinds[0])
    add("--gain", positive(), "e-/ADU, for Poisson noise in errors")
    add("--saturation", real, "level of saturated pixels (default: SATURATE)")
    add("--minarea", number(int, 1, 2**31 - 1), "least pixels of a source")

    add = partial(add_option, parser.add_argument_group("filter"))
    kernels = ("none", "default", "gaussian", "tophat", "file")
    add("--filter-case", kernels, "default is 1 2 1 / 2 4 2 / 1 2 1", default="default")
    text = "FWHM of gaussian, diameter of tophat, pixels"
    add("--filter-fwhm", positive(maximum=50), text, default=2.0)
    add("--filter-file", Path, "kernel as text or SExtractor's .conv")
    add("--filter-type", ("matched", "conv"), "how to filter where noise is an array")

    group = parser.add_argument_group("deblending and cleaning")
    add = partial(add_option, group)
    add("--deblend-nthresh", number(int, 1, 1024), "number of levels")
    add("--deblend-cont", number(float, 0, 1), "least contrast; 1 splits nothing")
    text = "drop what bright neighbours make (default: on)"
    group.add_argument("--clean", action=argparse.BooleanOptionalAction, help=text)
    add("--clean-param", positive(), "a lower value drops more")

    add = partial(add_option, parser.add_argument_group("photometry"))
    add("--zeropoint", real, "magnitude of one count")
    add("--kron-factor", positive(maximum=100), "Kron radii in the AUTO ellipse")
    add("--kron-min-radius", positive(maximum=100), "its least radius, in (a, b)")
    size = positive(maximum=10_000)
    add("--aperture-diameters", size, "of circles, pixels", nargs="+", metavar="D")
    add("--measure-image", Path, "detect on IMAGE, measure on this aligned image")
    add("--measure-hdu", str, "HDU of the measure image, as --hdu")
    add("--measure-plane", number(int, 0), "plane of the measure image, as --plane")

    add = partial(add_option, parser.add_argument_group("output"))
    text = "where products without a path of their own go; made if missing"
    add("-o --output-dir", Path, text, default=Path("."), metavar="DIR")
    for name, product in PRODUCTS.items():
        default = product.file_name(".fits or .tiff")
        note = f"default: {default}" if default else "on request"
        add(option_of(name), Path, f"{product.text} ({note})", metavar="PATH")
    text = "of all image products (default: by file extension, else fits)"
    add("--image-format", ("fits", "tiff"), text)

    group = parser.add_argument_group("general")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="tell stages and times")
    volume.add_argument("-q", "--quiet", action="store_true", help="tell nothing but errors")
    text = "processes that share the work; they change nothing else"
    add_option(group, "--threads", number(int, 1, 1024), text, default=1)
    group.add_argument("--version", action="version", version=SIGNATURE)
    return parser


# ---------------------------------------------------------------------------------------------
# Command line: usage
# ---------------------------------------------------------------------------------------------


def check_usage(args):
    """Return what is wrong with a combination of options, or None."""
    for name, needed in (
        ("mask_hdu", "mask"),
        ("mask_bits", "mask"),
        ("err_hdu", "err_file"),
        ("measure_hdu", "measure_image"),
        ("measure_plane", "measure_image"),
    ):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            return f"{option_of(name)} needs {option_of(needed)}"
    for choice, path in (("err_option", "err_file"), ("filter_case", "filter_file")):
        if (getattr(args, choice) == "file") != (getattr(args, path) is not None):
            return f"{option_of(choice)} file and {option_of(path)} need each other"
    for xmin, xmax, ymin, ymax in args.mask_box:
        box = f"--mask-box {xmin} {xmax} {ymin} {ymax} (XMIN XMAX YMIN YMAX)"
        if xmin > xmax:
            return f"{box}: first column {xmin} is after last column {xmax}"
        if ymin > ymax:
            return f"{box}: first row {ymin} is after last row {ymax}"
    if len(set(map(aperture, args.aperture_diameters))) < len(args.aperture_diameters):
        return "--aperture-diameters: each diameter may be given once"
    if args.catalog_fits and len(catalog_columns(args.aperture_diameters)) > 999:
        return "--catalog-fits: a FITS table has 999 columns at the most; take fewer apertures"
    inputs = (args.image, args.mask, args.err_file, args.filter_file, args.measure_image)
    taken = {os.path.realpath(path) for path in inputs if path}
    for product, path in product_paths(args).items():
        option, real = option_of(product), os.path.realpath(path)
        if real in taken:
            return f"{option} {path}: the image or another option names this file already"
        if os.path.exists(path) and not os.path.isfile(path):
            return f"{option} {path}: not a regular file"
        taken.add(real)
    return None


def product_paths(args):
    """Return the path of each product to write, by name."""
    paths = {}
    for name, product in PRODUCTS.items():
        default = product.file_name(f".{args.image_format or 'fits'}")
        if path := getattr(args, name) or (default and args.output_dir / default):
            paths[name] = path
    return paths


# ---------------------------------------------------------------------------------------------
# Command line: run
# ---------------------------------------------------------------------------------------------


@timed("all")
def run(args):
    """Do the whole work, from the image to its products."""
    method, photometry = choose_method(args), settings_from(args, PhotometrySettings)
    threads = args.threads
    origin, pixels = read_image(args.image, args.hdu, args.plane, args.blank)
    mask, noise = read_mask_and_noise(args, pixels.shape)
    measure_origin, measure_pixels = origin, None
    if args.measure_image:
        chosen = args.measure_image, args.measure_hdu, args.measure_plane, args.blank
        measure_origin, measure_pixels = read_measure_image(*chosen, origin, pixels.shape)
    targets = product_paths(args)
    with staged(targets) as parts:  # first, so that a place that can't be written fails at once
        if threads > 1:
            import matplotlib  # noqa: F401  # or else what it makes for a read-only HOME would stay
        with about(origin.name):
            mask = build_mask(pixels, mask, noise, args.mask_box)
            values = report_image(origin, pixels, mask)
            level = report_header(args, origin)
            field = measure_field = build_field(pixels, mask, noise, method, level, threads)
            report_field(field, values)
            found = find_sources(field, threads)
            report_detections(field, found)
        if measure_pixels is not None:
            with about(measure_origin.name):
                level = report_header(args, measure_origin)
                measure_field = build_measure_field(measure_pixels, mask, method, level, threads)
        flag_fields(found, field, measure_field)
        measured = measure(field, measure_field, found, photometry, threads)
        catalog = build_catalog(
            found.objects, measured, field, measure_field, origin.wcs, photometry
        )
        columns = catalog_columns(photometry.aperture_diameters)
        columns = name_units(columns, origin.unit, measure_origin.unit)
        history, form = describe_settings(args, origin), args.image_format
        result = Result(origin, field, found, catalog, columns, history, form)
        write_products(parts, result, threads)
    for product, path in targets.items():
        log.info("%-13s %s", product, path.name)


def settings_from(args, kind):
    """Return the settings dataclass `kind`, filled from the parsed options of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def choose_method(args):
    """Return the `Method` that the options ask for."""
    return Method(
        make_kernel(args.filter_case, args.filter_fwhm, args.filter_file),
        args.err_option,
        args.background_passes,
        settings_from(args, BackgroundSettings),
        settings_from(args, ExtractionSettings),
        args.bridge,
    )


def read_mask_and_noise(args, shape):
    """Read the mask and the noise image for an image (ny, nx); what isn't given is None."""
    mask = noise = None
    if args.mask:
        choice = args.maskthresh, args.mask_bits
        mask = read_mask(args.mask, args.mask_hdu, args.plane, *choice, shape)
    if args.err_file:
        noise = read_noise(args.err_file, args.err_hdu, args.plane, args.err_type, shape)
    return mask, noise


def describe_settings(args, origin):
    """Return the options that decide what is found, a line each; files by name, without path."""
    not_told = {"output_dir", "image_format", "verbose", "quiet", "threads", *PRODUCTS}
    options = vars(args) | {"hdu": origin.hdu}
    return [
        f"{name} = {value.name if isinstance(value, Path) else value!a}"
        for name, value in options.items()
        if name not in not_told and value not in (None, [], ())
    ]


def report_image(origin, pixels, mask):
    """Tell what was read, and how much of it is masked; return a sample of it, without padding."""
    parts = portions(mask.shape, PORTION)
    bad = sum(np.count_nonzero(~np.isfinite(pixels[rows][mask[rows]])) for rows in parts)
    part = 100 * np.count_nonzero(mask) / mask.size
    log.info("image         %s: %d x %d %s", origin.name, *pixels.shape[::-1], origin.dtype)
    log.info("masked        %.2f %% (%d pixels have no finite value)", part, bad)
    values = sample(pixels, mask)
    return values[values != padding_of(origin, pixels, mask)]


# Which part of the blocks of an image must be padding for it to be told.
PADDED = 0.02


def padding_of(origin, pixels, mask):
    """Warn of whole blocks of the border's commonest value, if few others hold any; return it."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border, return_counts=True)
    value = values[counts.argmax()]

    def each(compare, step=1):
        """Return how many pixels of each block compare so, of every `step`-th row and column."""
        mesh, seen = BackgroundSettings(bw=32 // step, bh=32 // step), np.s_[::step, ::step]
        return box_sums(lambda p, m: compare(p, value) & ~m, mesh, pixels[seen], mask[seen])

    if np.mean(each(np.not_equal, 8) == 0) <= PADDED:
        return math.nan
    inside, outside = each(np.equal), each(np.not_equal)
    padded, rare = (inside > 0) & (outside == 0), 9 * inside < outside
    if padded.mean() > PADDED and 2 * rare.sum() > (outside > 0).sum():
        text = "%.0f %% of the image is exactly %s: if it is padding, name it (--blank %s)"
        stored = value if origin.black is None else origin.black - value
        log.warning(text, 100 * inside.sum() / mask.size, stored, stored)
        return value
    return math.nan


def report_header(args, origin):
    """Tell a beam's area and the level of saturated pixels; return the latter, nan if unknown."""
    if origin.beam:
        log.info("beam          %.6g pixels, by which to divide fluxes", origin.beam)
    level, source = args.saturation, "--saturation"
    if level is None:
        level, source = origin.saturation, "SATURATE"
    if not math.isnan(level):
        log.info("saturation    %.6g (%s)", level, source)
    return level


def report_field(field, values):
    """Tell level, noise and threshold, and what is unusual about them or a sample of the values."""
    frame, method = field.frame, field.method
    level = frame.levels(np.array(field.background.globalback, dtype=np.float64))
    rms = frame.differences(global_rms(field.background))
    log.info("background    %.6g, rms %.6g", level, rms)
    thresh = method.extraction.thresh
    if method.err_option == "none":
        log.info("threshold     %.6g (absolute)", frame.differences(thresh))
    elif np.ndim(field.noise) == 0:
        log.info("threshold     %.6g (%g x rms)", thresh * rms, thresh)
    else:
        depth = field.depth() or 1
        deep, typical = thresh / depth, frame.differences(typical_noise(field))
        log.info("threshold     %.6g (%.4g x noise, median)", deep * typical, deep)
        if depth != 1:
            log.warning(
                "with noise for each pixel the matched filter goes %.2f times deeper: %g is as %.3g"
                " on the global RMS, and %.3g as %g there; --filter-type conv goes no deeper",
                *(depth, thresh, deep, thresh * depth, thresh),
            )
    if method.measures_noise():
        warn_of_counts(field, values, level)
    raised = noise_raised_by_mask(field) if method.measures_noise() else 1.0
    if raised >= MUCH_NOISIER:
        log.warning(
            "the mask makes the noise %.1f times that of the whole image: if it hides quiet sky, "
            "faint sources are lost; was it made for this image?",
            raised,
        )


# Which part of the pixels may have one value; a filter for so sparse photons, pixels, and the log
# of the odds against one peak of their noise.
MUCH_ALIKE = 0.4
COUNT_FWHM = 4.0
COUNT_ODDS = 14.0


@np.errstate(over="ignore")
def warn_of_counts(field, values, background):
    """Tell if most pixels have one value, and how to find sources among photons all the same."""
    levels, numbers = np.unique(values, return_counts=True)
    if len(levels) < 2 or numbers.max() <= MUCH_ALIKE * len(values):
        return
    part, level = numbers.max() / len(values), levels[numbers.argmax()]
    # Bernstein's bound of Poisson's counts under the filter, of which as many are none.
    rate, area = -math.log(part), math.pi / math.log(4) * COUNT_FWHM**2
    excess = math.sqrt(2 * rate * area * COUNT_ODDS) + COUNT_ODDS / 3
    thresh = level + np.diff(levels).min() * (rate + excess / area) - background
    if not math.isfinite(thresh):  # at the ends of float64
        return
    text = (
        f"{100 * part:.0f} % of the pixels have the value {level:g}, so noise is no unit: mask "
        "them if they hold no data; else take an absolute threshold (--err-option none --thresh "
        f"{thresh:.3g}) and smooth more (--filter-case gaussian --filter-fwhm {COUNT_FWHM:g})"
    )
    if field.is_noiseless():
        raise InputError(text)
    log.warning(text)


def report_detections(field, found):
    """Tell the number of sources, and why there are none."""
    log.info("sources       %d", len(found.objects))
    if field.method.background_passes == 1:
        warn_of_boxes(field, found)
    if field.is_noiseless():
        log.warning("the image is constant: no sources")
    elif not len(found.objects):
        thresh = np.float64(field.method.extraction.thresh * typical_noise(field))
        above = hidden = 0
        for rows in portions(field.mask.shape, PORTION):
            light = field.residual[rows]
            bright = (light > thresh) & ~too_large(light)
            above += np.count_nonzero(bright)
            hidden += np.count_nonzero(bright & field.mask[rows])
        part = 100 * hidden / max(above, 1)
        advice = f"; the mask hides {part:.0f} % of the pixels above the threshold: mask less"
        text = "no sources found: the catalogue and the segmentation map are empty%s"
        log.warning(text, advice if part > 50 else "")


def typical_noise(field):
    """Return the noise to detect against as one number, the median of an array."""
    return float(np.median(sample(field.detection_noise(), field.mask)))


def warn_of_boxes(field, found):
    """Tell if sources fill background boxes, and which boxes would be large enough for them."""
    settings = field.method.background.cut_to(field.mask.shape)
    own = box_sums(lambda labels: labels > 0, settings, found.segmentation)
    good = box_sums(np.logical_not, settings, field.mask)
    full = (2 * own > good) & (4 * good > 3 * settings.bw * settings.bh)  # no strip at the edge
    widest = max(settings.bw, settings.bh)
    if not full.any() or widest == max(field.mask.shape):
        return
    width, height = (found.objects[f"{n}max"] - found.objects[f"{n}min"] + 1 for n in "xy")
    size = min(2 * max(widest, math.ceil(np.sqrt(width * height).max())), max(field.mask.shape))
    log.warning(
        "sources fill more than half of %d of the %d background boxes, which take their light for "
        "background: try boxes of %d pixels (--bw %d --bh %d)%s",
        *(full.sum(), full.size, size, size, size),
        "" if field.method.background_passes == 2 else ", or else --background-passes 2",
    )


class OneLine(logging.Formatter):
    """A formatter of one line a message, whatever a file is called."""

    def format(self, record):
        return one_line(super().format(record))


def start_logging(args):
    """Send reports to stdout and warnings, each in one line, to stderr; nowhere if it is closed."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names that are no text
    reports, warnings_ = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    reports.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings_.setLevel(logging.WARNING)
    warnings_.setFormatter(OneLine(f"{PROG}: warning: %(message)s"))
    log.handlers = [reports, warnings_]
    log.propagate = False
    log.setLevel(logging.ERROR if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    logging.raiseExceptions = False  # a reader of stdout may go away
    logging.captureWarnings(True)
    for library in ("py.warnings", "astropy", "matplotlib", "tifffile"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def main(argv=None):
    """Run the tool on command line arguments; return its exit code: 0, or 1 if it failed.

    Wrong arguments (2) and signals (128 and their number) raise a SystemExit.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        problem = check_usage(args)
    except OSError as error:  # of os.getcwd
        problem = f"the current directory can't be used ({error.strerror})"
    if problem:
        parser.error(problem)
    start_logging(args)
    try:
        # Until there is something to remove, a signal ends the process at once.
        with handling_signals(signal.SIG_DFL):
            run(args)
    except InputError as error:
        problem = one_line(error)
    except MemoryError:
        problem = f"{args.image}: not enough memory; cut the image into parts"
    except Exception as error:
        log.debug(traceback.format_exc())
        reason = f"{type(error).__name__}: {one_line(error)}"
        problem = f"{args.image}: a fault of the tool ({reason}); report it with what -v tells"
    if not problem:
        return 0
    print(f"{PROG}: error: {problem}", file=sys.stderr)
    return 1


def command():
    """Run `main` and end the process with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    command()
