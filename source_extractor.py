#!/usr/bin/env python
"""Extract sources from an astronomical or microscopy image with SEP.

The sections follow the order of the work; read `run`, near the end, for an overview:

    Settings, Reading, Kernel       parameters of the method; read one plane of a FITS or TIFF file
    Mask and frame, Background      combine masks; subtract the background, estimate the noise
    Worker processes, Detection     run jobs in parallel; find objects and their segmentation map
    Noise, Measurements             of empty sky; sizes, fluxes and centroids of objects
    Catalogue                       the table of all columns
    Products, Advice, Command line  write files and pictures; warnings; options and the whole run

Conventions: images are indexed (y, x); x and y are 0-based with pixel centres at integers; masks
are True where a pixel is excluded; `theta` is in radians from +x towards +y.
"""

import argparse
import atexit
import bz2
import errno
import gc
import gzip
import io
import itertools
import logging.handlers
import math
import multiprocessing
import operator
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import sep
from astropy import units as u
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning

# Everything else is imported where it is used, since most runs need only a part of it.
if TYPE_CHECKING:
    from astropy.wcs import WCS
    from pandas import DataFrame

PROG = "source_extractor.py"
__version__ = "1.0.0"

SIGNATURE = f"{PROG} {__version__} (sep {sep.__version__})"

CHUNK = 2**18  # pixels, or pairs of objects, that are processed at a time

log = logging.getLogger("source_extractor")


def one_line(text):
    """Replace each run of white space in a text, including line breaks, by one space."""
    return " ".join(str(text).split())


class InputError(Exception):
    """Input that can't be used; its message says what is wrong and what to do, in one line."""

    exit_code = 1


class OutOfMemoryError(InputError):
    """An image that needs more memory than there is."""

    exit_code = 3


def lacks_memory(error):
    """Return True if there was not enough memory, or a process was killed, mostly for that."""
    killed = isinstance(error, MemoryError | BrokenProcessPool)
    return killed or getattr(error, "errno", None) == errno.ENOMEM


@contextmanager
def about(name):
    """Prefix the message of an `InputError` with the name of the image."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{name}: {error}") from error


@contextmanager
def timed(stage):
    """Log the duration of a stage at debug level; also works as a decorator."""
    start = time.perf_counter()
    yield
    log.debug("%-22s %7.2f s", stage, time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackgroundSettings:
    """Keywords of `sep.Background`: boxes (pixels), median filter (boxes) and its threshold."""

    bw: int = 64
    bh: int = 64
    fw: int = 3
    fh: int = 3
    fthresh: float = 0.0

    def limited_to(self, shape):
        """Return the settings with boxes no larger than an image of this shape (ny, nx)."""
        return replace(self, bw=min(self.bw, shape[1]), bh=min(self.bh, shape[0]))


@dataclass(frozen=True)
class ExtractionSettings:
    """Keywords of `sep.extract`; `clean` and `clean_param` are used by `find_sources` instead."""

    thresh: float = 1.5  # nan until `choose_threshold`
    gain: float | None = None
    minarea: int = 5
    filter_type: str = "matched"
    deblend_nthresh: int = 32
    deblend_cont: float = 0.005
    clean: bool = True
    clean_param: float = 1.0


@dataclass(frozen=True)
class PhotometrySettings:
    """Zero point (mag), Kron ellipse (least radius in a and b), circular apertures (pixels)."""

    zeropoint: float = 0.0
    kron_factor: float = 2.5
    kron_min_radius: float = 3.5
    aperture_diameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """How to find sources; levels have the unit of the image or, after `within`, of a `Frame`."""

    kernel: np.ndarray | None
    err_option: str
    background_passes: int
    background: BackgroundSettings
    extraction: ExtractionSettings
    bridge: int = 3

    def within(self, frame):
        """Return the method with its levels converted from the image's unit to the frame's."""
        thresh, gain = self.extraction.thresh, self.extraction.gain
        if self.err_option == "none":
            thresh /= frame.scale
        extraction = replace(self.extraction, thresh=thresh, gain=gain and gain * frame.scale)
        background = replace(self.background, fthresh=self.background.fthresh / frame.scale)
        return replace(self, background=background, extraction=extraction)

    def estimates_noise(self):
        """Return True if the noise is estimated from the image, as the RMS of its background."""
        return self.err_option in ("float_globalrms", "array_rms")

    def for_measuring(self):
        """Return the method for the measure image, without noise image and absolute threshold."""
        if self.estimates_noise():
            return self
        extraction = self.extraction
        if self.err_option == "none":
            extraction = replace(extraction, thresh=ExtractionSettings.thresh)
        return replace(self, err_option="float_globalrms", extraction=extraction)


def aperture(diameter):
    """Return the suffix of the columns for a circular aperture of this diameter (pixels)."""
    return f"aper_{diameter:.15g}"


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FITS_MAGIC = (b"SIMPLE", b"\x1f\x8b", b"BZh")

# Warnings of astropy that don't concern the pixels; ESO-LOG cards are a log of the telescope.
HARMLESS = re.compile(
    "non-ASCII characters|trailing END keyword|only applicable to integer data|convention: ESO-LOG"
)

# Cards, and words in the HISTORY, of an image that was trimmed, combined or resampled.
RESAMPLED = re.compile(
    r"(?im)^(RESAMP|COMBINET|NCOMBINE|IMCMB|STACKCNT|NDRIZIM|TRIM(?!SEC))"
    r"|swarp|drizzl|reproject|resampl|stack|coadd"
)

# Cards that place an image on the sky.
WCS_CARD = re.compile(r"C(TYPE|UNIT|RVAL|RPIX|DELT|ROTA)\d|L(ON|AT)POLE|(CD|P[CV])\d+_|[AB]P?_")

LARGEST_ARCSINH = 50  # larger pixels are no arcsinh of a flux (1e20 times BSOFTEN)

CELESTIAL = re.compile(r"(RA|DEC|[A-Z]L(ON|AT)|[A-Z]{2}L[NT])(-| *$)")  # CTYPE of a sky axis

# Limits for opening a file, without reading its pixels: seconds of CPU time, bytes of memory.
SECONDS_TO_OPEN, BYTES_TO_OPEN = 15, 5 * 10**8

# A packed file may unpack to at most this many times its size (the most gzip can reach), but this
# many bytes are always allowed, since bzip2 packs constant images even better.
UNPACKED_RATIO, UNPACKED_BYTES = 1040, 2**30

# Bytes of each limit (ulimit) that the loaded libraries already occupy.
LIBRARY_BYTES = {resource.RLIMIT_AS: 5 * 10**8, resource.RLIMIT_DATA: 10**8}


@dataclass(frozen=True)
class Origin:
    """Which file a plane comes from, and what the file says about its pixels."""

    path: Path
    name: str  # for messages: file, and HDU if there is one
    dtype: str  # of the pixels in the file
    hdu: int | None = None
    wcs: "WCS | None" = None  # celestial WCS of the plane
    unit: str | None = None  # BUNIT
    beam: float | None = None  # area of the beam in pixels, if the unit is per beam
    black: int | None = None  # largest stored value, which is black, if a TIFF stores white as 0
    palette: bool = False  # True if pixels are indices of colours that aren't sorted by brightness
    product: str | None = None  # name of the product, if the file was written by this tool
    plane: int | None = None  # --plane, if given
    saturation: float = math.nan  # SATURATE, or --saturation
    mosaic: str | None = None  # colours of neighbouring pixels in a raw image, such as RGGB
    header: fits.Header | None = None  # of a FITS file, including inherited cards


class Stack(NamedTuple):
    """The array of an open file, whose pixels are not read yet."""

    origin: Origin
    axes: list[str]
    shape: tuple[int, ...]
    image_axes: list[int]  # the two axes of a plane
    images: int  # how many images `hdu` names; this is the first
    read: Callable[[tuple], np.ndarray]  # returns the pixels at these indices


def first_bytes(path, size):
    """Return the first `size` bytes of a regular file; refuse a pipe, which might never end."""
    with reading(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: a directory, pipe or device; give the name of a file")
        with open(path, "rb") as file:
            return file.read(size)


@contextmanager
def reading(path):
    """Turn any exception that a library raises for a damaged file into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        problem = f"{path.name}: damaged, incomplete, or"
        if lacks_memory(error):
            text = f"{problem} too large for the memory; cut the image into parts"
            raise OutOfMemoryError(text) from error
        if isinstance(error, OSError) and error.errno:  # of the file itself
            raise InputError(f"{path}: {error.strerror}") from error
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{problem} can't be read ({reason}); get a new copy") from error


def try_to_open(path, opened):
    """Open a file in a child process of limited time and memory; raise InputError if it dies.

    A damaged size may make a library loop forever, crash, or allocate all memory. Other errors are
    not reported here, as they occur again when this process opens the file. `opened` returns a
    context manager.
    """

    def attempt():
        logging.disable()
        limits = {resource.RLIMIT_CPU: SECONDS_TO_OPEN}
        with suppress(FileNotFoundError):  # on Linux only
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits[resource.RLIMIT_AS] = used + BYTES_TO_OPEN
        for kind, limit in limits.items():
            hard = resource.getrlimit(kind)[1]
            unlimited = hard == resource.RLIM_INFINITY
            resource.setrlimit(kind, (limit if unlimited else min(limit, hard), hard))
        try:
            with opened():
                os._exit(0)
        except Exception as error:  # `reading` turns a MemoryError into an InputError
            os._exit(1 if isinstance(error.__cause__ or error, MemoryError) else 0)

    child = multiprocessing.get_context("fork").Process(target=attempt, daemon=True)
    with warnings.catch_warnings(action="ignore"):  # of threads, which are not forked
        child.start()
    child.join()
    if child.exitcode:
        text = "opening it takes too much time or memory; get a new copy"
        raise InputError(f"{path.name}: damaged: {text}")


@contextmanager
def summarizing_warnings(path):
    """Log the first warning of astropy and tifffile about a file, and the number of others."""
    logger, texts = logging.getLogger("tifffile"), []

    def collect(record):  # returns None, so that no handler gets the record
        texts.append(re.sub(r"^<tifffile\.[^>]*> ", "", record.getMessage()))

    logger.addFilter(collect)
    try:
        with warnings.catch_warnings(record=True, action="ignore") as caught:
            warnings.simplefilter("always", AstropyUserWarning)
            yield
    finally:
        logger.removeFilter(collect)
    texts = dict.fromkeys(map(one_line, [*texts, *(w.message for w in caught)]))  # each once
    if texts := [text for text in texts if not HARMLESS.search(text)]:
        more = f", and {len(texts) - 1} more" if texts[1:] else ""
        log.warning("%s: read with warnings: %s%s", path.name, texts[0], more)


def read_plane(path, hdu=None, plane=None, image=None):
    """Read one 2-D plane of a FITS or TIFF file; the format is recognised from the content.

    Raises InputError if the file can't be read, or has no such HDU or plane.

    Parameters
    ----------
    path : Path
    hdu : str, optional
        Index; in FITS also EXTNAME, or EXTNAME,N, see `find_hdus`. By default the first image.
    plane : int, optional
        Plane of a cube, stack or colour image, counted from 0 over its other axes, flattened.
    image : Origin, optional
        The image that a mask or noise image belongs to. Such a file with a single plane is accepted
        for any `plane`, such as one mask for a whole stack.

    Returns
    -------
    origin : Origin
    pixels : ndarray, shape (ny, nx)
        As stored.
    """
    head = first_bytes(path, 6)
    if not head.startswith(TIFF_MAGIC + FITS_MAGIC):
        raise InputError(f"{path.name}: neither a FITS nor a TIFF file; convert it to one of them")
    # Libraries are imported before the child process starts, which inherits them.
    with ExitStack() as files:
        if head.startswith(TIFF_MAGIC):
            import tifffile  # noqa: F401

            opened = partial(open_tiff, path, hdu)
        else:
            file = files.enter_context(unpacked(path))
            file.seek(0)
            if b"CTYPE" in file.read(2**16):
                import astropy.wcs  # noqa: F401
            opened = partial(open_fits, path, file, hdu)
        try_to_open(path, opened)
        files.enter_context(summarizing_warnings(path))
        stack = files.enter_context(opened())
        indices = choose_plane(stack, plane, image is not None)
        with reading(path):  # `reshape` fails if damaged pages have another shape
            pixels = stack.read(indices).reshape([stack.shape[n] for n in sorted(stack.image_axes)])
    if stack.images > 1:
        same = image and image.hdu == stack.origin.hdu and path.samefile(image.path)
        name = f"{stack.origin.name}{', the image itself' if same else ''}"
        text = "%s: the first of %d images is used; choose another with the HDU option"
        log.warning(text, name, stack.images)
    return replace(stack.origin, plane=plane), pixels.transpose(np.argsort(stack.image_axes))


def choose_plane(stack, plane, single_serves_all):
    """Return the indices of a plane; raise InputError if it doesn't exist or fit in memory."""
    name, shape = stack.origin.name, stack.shape
    rows, columns = (shape[axis] for axis in stack.image_axes)
    planes_shape = [1 if axis in stack.image_axes else n for axis, n in enumerate(shape)]
    count = math.prod(planes_shape)
    if count == 1 and (plane is None or single_serves_all):
        plane = 0
    if plane is None or plane >= count:
        layout = ", ".join(f"{axis}={n}" for axis, n in zip(stack.axes, shape, strict=True))
        choice = f"choose one from 0 to {count - 1} with --plane, or --measure-plane"
        if count == 1:
            choice = "leave out --plane, or --measure-plane"
        elif plane is None and single_serves_all:
            choice = "give a file with one plane, or choose a plane of both files with --plane"
        planes = f"{count} plane{'s' if count > 1 else ''}"
        raise InputError(f"{name}: {planes} in axes ({layout}); {choice}")
    if np.dtype(stack.origin.dtype).kind not in "biuf":
        raise InputError(f"{name}: {stack.origin.dtype} pixels are not real numbers")
    # Image, label map, and background or noise.
    needed = 3 * to_float(np.empty(0, stack.origin.dtype)).itemsize * rows * columns
    if needed > memory_limit():
        text = f"{columns} x {rows} pixels need {needed / 1e9:.1f} GB of memory, more than there is"
        raise OutOfMemoryError(f"{name}: {text}; cut the image into parts")
    indices = enumerate(map(int, np.unravel_index(plane, planes_shape)))
    return tuple(slice(None) if axis in stack.image_axes else index for axis, index in indices)


def memory_limit():
    """Return the bytes that the machine, its control group and ulimit allow for an image."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # there is no control group, or its limit is "max"
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        sizes.append(int(Path("/sys/fs/cgroup", group, "memory.max").read_text()))
    for kind, taken in LIBRARY_BYTES.items():
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            sizes.append(limit - taken)
    return min(sizes)


@contextmanager
def open_fits(path, source, hdu):
    """Open a FITS file as a `Stack`.

    A plane has the celestial axes, otherwise the last ones; axes of length 1 are only taken if
    there are no others.
    """
    # The child process has moved the position in the file, which is shared.
    with open(source.fileno(), "rb", closefd=False) as file:
        file.seek(0)
        with reading(path):
            # uint=False: else astropy ignores BLANK in unsigned integers.
            hdus = fits.open(file, memmap=False, uint=False)
            found = find_hdus(path, hdus, hdu)
            chosen = hdus[number := found[0]]
            name = chosen.name
            if value_of(chosen.header, "BZERO") == 2**63:  # float64 would round these integers
                chosen = fits.open(file, memmap=False, uint=True)[number]
            header, shape = inherited(hdus, chosen.header), chosen.shape
            dtype = fits.BITPIX2DTYPE[header["BITPIX"]]
        numbers = range(len(shape), 0, -1)  # FITS numbers axes in reverse
        axes = [str(value_of(header, f"CTYPE{n}") or f"NAXIS{n}") for n in numbers]
        # `sorted` is stable: of axes with the same rank the last ones are taken.
        ranks = [(n > 1, bool(CELESTIAL.match(axis))) for n, axis in zip(shape, axes, strict=True)]
        image_axes = sorted(sorted(range(len(shape)), key=ranks.__getitem__)[-2:])

        def read(indices):
            packed = isinstance(chosen, fits.CompImageHDU)
            if packed and chosen.compression_type == "HCOMPRESS_1":
                check_hcompress(file, number, chosen)
            # Unless the plane contains the last axis, `section` reads one pixel at a time.
            use_section = packed or image_axes[1] == len(shape) - 1
            return (chosen.section if use_section else chosen.data)[indices]

        image_numbers = [numbers[axis] for axis in image_axes[::-1]]
        wcs = celestial_wcs(path, hdus, header, image_numbers, [shape[n] for n in image_axes])
        unit, saturation = str(value_of(header, "BUNIT") or ""), number_of(header, "SATURATE")
        mosaic = re.match(r"(?i)[RGBCMYW]{4,}$", str(value_of(header, "BAYERPAT")).strip())
        beam, major, minor = None, number_of(header, "BMAJ"), number_of(header, "BMIN")
        if wcs and major > 0 and minor > 0 and re.search(r"(?i)\bbeam\b", unit):
            square_degrees = math.pi / (4 * math.log(2)) * major * minor  # of a Gaussian beam
            beam = square_degrees / wcs.proj_plane_pixel_area().value
        yield Stack(
            Origin(
                path=path,
                name=f"{path.name}[{number}] {name}".rstrip(),
                dtype=dtype,
                hdu=number,
                wcs=wcs,
                unit=unit or None,
                beam=beam,
                product=product_of(str(value_of(header, "HISTORY") or "")),
                saturation=saturation if 0 < saturation < LARGEST else math.nan,
                mosaic=mosaic and mosaic[0],
                header=header,
            ),
            axes,
            shape,
            image_axes,
            len(found),
            read,
        )


@contextmanager
def unpacked(path):
    """Open a FITS file or, if it is packed, a completely unpacked temporary copy."""
    with open(path, "rb") as file, ExitStack() as files:
        if packing := {b"\x1f\x8b": gzip, b"BZ": bz2}.get(file.read(2)):
            file.seek(0)
            limit = max(UNPACKED_RATIO * path.stat().st_size, UNPACKED_BYTES)
            with reading(path), packing.open(file) as packed:
                file = files.enter_context(tempfile.TemporaryFile())
                while piece := packed.read(2**20):
                    file.write(piece)
                    if file.tell() > limit:
                        raise ValueError(f"it unpacks to more than {limit} bytes")
                file.flush()
        yield file


def check_hcompress(file, number, hdu):
    """Raise ValueError if a compressed tile doesn't have as many pixels as the header says.

    astropy's decoder would write beyond the end of its buffer. The stream of a tile begins with the
    bytes DD 99 and the lengths of its two sides.
    """
    table = fits.open(file, memmap=False, disable_image_compression=True)[number]
    shape, tile = hdu.shape, hdu.tile_shape
    corners = itertools.product(*(range(0, n, step) for n, step in zip(shape, tile, strict=True)))
    for stream, corner in zip(table.data["COMPRESSED_DATA"], corners, strict=True):
        start = bytes(np.asarray(stream[:10]).view(np.uint8))
        if start:  # else the tile is stored in another column of the table
            sides = [min(n, end - at) for n, end, at in zip(tile, shape, corner, strict=True)]
            stored = [int.from_bytes(start[place : place + 4]) for place in (2, 6)]
            if start[:2] != b"\xdd\x99" or math.prod(stored) != math.prod(sides):
                raise ValueError(f"a tile of {sides} pixels is stored as one of {stored}")


def value_of(header, key):
    """Return the value of a card, or None if it is missing or can't be parsed."""
    with suppress(Exception):  # astropy raises many kinds of exceptions for a damaged card
        return header.get(key)


def number_of(header, key):
    """Return the value of a card if it is a number, else nan."""
    value = value_of(header, key)
    return value if type(value) in (int, float) else math.nan


def find_hdus(path, hdus, wanted):
    """Return the indices of the images that `wanted` names, by default of all.

    `wanted` is an index, EXTNAME, or EXTNAME,N. N is EXTVER; if that doesn't name exactly one HDU,
    the N-th HDU of this name is meant.
    """
    images, names, contents, named, counted = [], [], [], {}, {}
    for number, hdu in enumerate(hdus):
        for key in ("EXTNAME", "EXTVER"):  # astropy fails if it can't parse one of these
            if value_of(hdu.header, key) is None:
                hdu.header.remove(key, ignore_missing=True)
        names.append(name := hdu.name.upper())
        for key in (name, f"{name},{hdu.ver}"):
            named.setdefault(key, []).append(number)
        counted[f"{name},{names.count(name)}"] = [number]
        if hdu.is_image and len(hdu.shape) > 1 and math.prod(hdu.shape) > 0:
            images.append(number)
        size = " x ".join(map(str, reversed(hdu.shape))) or "empty" if hdu.is_image else "table"
        contents.append(f"{number} {hdu.name or '(no name)'}: {size}")
    found, problem = images, "no extension (HDU) holds an image"
    if wanted is not None:
        found = named.get(wanted.upper(), [])
        found = found if len(found) == 1 else counted.get(wanted.upper(), found)
        if wanted.isdecimal():
            found = [int(wanted)] if int(wanted) < len(names) else []
        problem = f"{'no image in' if found else 'no such'} extension (HDU): {wanted}"
    if found := [number for number in found if number in images]:
        return found
    if len(contents) > 20:
        contents[20:] = [f"and {len(contents) - 20} more"]
    raise InputError(f"{path.name}: {problem}; the file has {'; '.join(contents)}")


def inherited(hdus, header):
    """Return the header, with missing cards of the primary header added if it says INHERIT = T.

    If it has any card about its place on the sky, it inherits none of these.
    """
    header, placed = header.copy(), any(map(WCS_CARD.match, header))
    if value_of(header, "INHERIT") is True:
        more = (card for card in hdus[0].header.cards if card.keyword not in header)
        header.extend(fits.Header(c for c in more if not (placed and WCS_CARD.match(c.keyword))))
    return header


def celestial_wcs(path, hdus, header, axes, shape):
    """Return the celestial WCS of two FITS axes, given by their numbers; None if there is none.

    `shape` (ny, nx) is that of the image in these axes.
    """
    if not any(f"CTYPE{axis}" in header for axis in axes):
        return None
    from astropy.wcs import WCS, Sip

    needed = re.compile(rf"(CRVAL|CRPIX|CDELT|CD|PC|PV)[{axes[0]}{axes[1]}](_\d+)?$")
    try:
        with warnings.catch_warnings(action="ignore"):
            header, conflict = without_conflict(header, axes)
            wcs = WCS(header, hdus, naxis=axes)
            if not wcs.has_celestial:
                return None
            wcs.to_fits(relax=True)[0].verify("exception")  # can it be written?
        for key in filter(needed.match, header):
            if math.isnan(number_of(header, key)):  # wcslib would use the default of the card
                raise ValueError(f"{key} can't be read")
        # Uncalibrated frames have a matrix of zeros, for which astropy takes one degree per pixel.
        blank = [value_of(header, f"CD{i}_{j}") for i in axes for j in axes] == [0] * 4
        if blank or not np.linalg.cond(wcs.pixel_scale_matrix) < 1e8:
            raise ValueError("its matrix is singular")
    except Exception as error:  # wcslib and astropy raise many kinds of exceptions
        reason = one_line(error) or type(error).__name__
        log.warning("%s: WCS can't be used and is left out (%s)", path.name, reason)
        return None
    if conflict:
        other, text = conflict
        shift = largest_shift(wcs, partial(WCS, other, hdus, naxis=axes), shape)
        if not shift <= 0.01:
            more = f"; they differ by up to {shift:.3g} pixels" if math.isfinite(shift) else ""
            log.warning("%s: its WCS has %s%s", path.name, text, more)
    if wcs.sip:  # astropy takes CRPIX1 and CRPIX2 as its centre, even if `axes` are others
        wcs.sip = Sip(wcs.sip.a, wcs.sip.b, wcs.sip.ap, wcs.sip.bp, wcs.wcs.crpix)
        if not all(ctype.endswith("-SIP") for ctype in wcs.wcs.ctype):
            text = "SIP is applied, though CTYPE lacks -SIP; remove it if the image is undistorted"
            log.warning("%s: %s", path.name, text)
    return wcs


def without_conflict(header, axes):
    """Return the header without the second of two conflicting WCS; and what it conflicts with.

    astropy would apply both SIP and PV distortions: SIP is kept for a CTYPE of TAN-SIP; PV for TPV,
    and for TAN, which SCAMP writes. Of CD and PC matrices, CD, which plate solvers write, is kept.
    The conflict is None, or the header with the other WCS and a text.
    """
    kinds = {str(value_of(header, f"CTYPE{axis}"))[5:].strip() for axis in axes}
    patterns = r"[AB]P?_(ORDER|\d+_\d+)$", rf"PV[{axes[0]}{axes[1]}]_\d+$", r"CD\d_\d$", r"PC\d_\d$"
    sip, pv, cd, pc = ({key for key in header if re.match(form, key)} for form in patterns)
    scamp = kinds <= {"TAN", "TAN-SIP"} and any(int(key[4:]) > 4 for key in pv)
    kept, other = ("CD", cd), ("PC", pc)
    if sip and (scamp or kinds == {"TPV"}):
        kept, other = ("PV", pv), ("SIP", sip)
        if kinds == {"TAN-SIP"}:
            kept, other = other, kept
    elif not (cd and pc):
        return header, None
    without_kept, without_other = (
        fits.Header(card for card in header.cards if card.keyword not in keys)
        for _, keys in (kept, other)
    )
    text = f"{kept[0]} and {other[0]}: {kept[0]} is used, {other[0]} ignored"
    return without_other, (without_kept, text)


def largest_shift(wcs, make_other, shape):
    """Return by how many pixels a WCS of an image (ny, nx) differs at most from another one.

    They are compared at the corners, the middles of the sides, and the centre. Returns nan if the
    other can't be made or compared.
    """
    from astropy.utils import iers

    x, y = np.meshgrid(*(np.linspace(0, n - 1, 3) for n in shape[::-1]))
    offline = iers.conf.set_temp("auto_download", False)
    with suppress(Exception), warnings.catch_warnings(action="ignore"), offline:
        dx, dy = np.subtract(make_other().world_to_pixel(wcs.pixel_to_world(x, y)), (x, y))
        return float(np.nanmax(np.hypot(dx, dy)))
    return math.nan


class FileWithoutDescriptor(io.FileIO):
    """A file that hides its descriptor; tifffile would use it to open files that the TIFF names."""

    def fileno(self):
        raise io.UnsupportedOperation


@contextmanager
def open_tiff(path, hdu):
    """Open an image (series) of a TIFF file as a `Stack`."""
    import tifffile

    with ExitStack() as files:
        with reading(path):
            file = files.enter_context(io.BufferedReader(FileWithoutDescriptor(path)))
            tiff = files.enter_context(tifffile.TiffFile(file))
            images = [image for image in tiff.series if not image.keyframe.is_reduced]
            images = images or tiff.series
            last, number = len(images) - 1, hdu or "0"
            if number not in map(str, range(len(images))):
                text = f"no such extension (HDU): {number}; this TIFF file has images 0 to {last}"
                raise InputError(f"{path.name}: {text}")
            series = images[number := int(number)]
            axes, page = series.axes, series.keyframe
            shape = tuple(map(operator.index, series.shape))  # damaged tags may give floats
            image_axes = [axes.index("Y"), axes.index("X")]
            # ImageJ's colour tables are for display only.
            colours = None if tiff.is_imagej else page.photometric
            white = colours == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.kind in "bu"
            palette = colours == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
            palette = palette and bool((np.diff(page.colormap.astype(int)) < 0).any())
            dtype, description = series.dtype.name, page.description
            black = (1 << page.bitspersample) - 1 if white else None
            offset, slope = tiff_calibration(path, tiff)
        origin = Origin(
            path=path,
            name=f"{path.name}[{number}]" if last else path.name,
            dtype=dtype,
            hdu=number if last else None,
            black=black,
            palette=palette,
            product=product_of(description),
            mosaic="CFA" if colours == tifffile.PHOTOMETRIC.CFA else None,
        )

        def read(indices):
            stored = read_series(path, tiff, series, indices)
            return stored if (offset, slope) == (0, 1) else to_float(stored) * slope + offset

        yield Stack(origin, list(axes), shape, image_axes, 1 if hdu else last + 1, read)


def tiff_calibration(path, tiff):
    """Return offset and slope of ImageJ's calibration of pixel values, by default 0 and 1."""
    imagej, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    line = number_of(imagej, "c0"), number_of(imagej, "c1")
    linear = imagej.get("cf") == 0 and math.isfinite(sum(line)) and line[1] != 0
    gdal = str(tags.valueof("GDAL_METADATA"))
    scales = set(re.findall(r"role=\"(?:scale|offset)\"[^>]*>([^<]*)<", gdal)) - {"0", "1"}
    if scales or ("cf" in imagej and not linear):
        log.warning("%s: the file's calibration of pixel values is ignored", path.name)
    return line if linear else (0, 1)


def read_series(path, tiff, series, indices):
    """Return the pixels of a TIFF series at some indices, if possible without reading the rest."""
    if series.dataoffset is not None and series.transform is None:  # contiguous, not compressed
        dtype = np.dtype(tiff.byteorder + series.dtype.char)
        return np.array(np.memmap(path, dtype, "r", series.dataoffset, series.shape)[indices])
    page, depth = series.keyframe, series.ndim - series.keyframe.ndim
    outer, inner, stacked = indices[:depth], indices[depth:], series.shape[:depth]
    pages_are_planes = (*stacked, *page.shape) == series.shape and slice(None) not in outer
    # One worker, since the stacks of threads count against `ulimit -v`.
    if not pages_are_planes or series.transform or len(series.pages) != math.prod(stacked):
        return series.asarray(maxworkers=1)[indices]
    page = series.pages[int(np.arange(math.prod(stacked)).reshape(stacked)[outer])]
    if page is None:
        text = "it lacks this plane; if it belongs to a set of files, give the one that has it"
        raise InputError(f"{path.name}: {text}")
    return page.asarray(maxworkers=1)[inner]


def product_of(history):
    """Return which product of this tool a file is, according to its history, or None."""
    found = re.search(rf"^{re.escape(PROG)} .*: (\w+)$", history, re.MULTILINE)
    return found[1] if found and found[1] in PRODUCTS else None


def to_float(data):
    """Return `data` as native, contiguous, writable float32, or float64 if float32 would round it.

    The bytes of `data` may be swapped in place, so that it can't be used afterwards.
    """
    exact = 4 if data.dtype.kind == "f" else 2  # size of the types that float32 holds exactly
    dtype = np.float64 if data.itemsize > exact else np.float32
    if not data.dtype.isnative and data.flags.writeable:
        data = data.byteswap(inplace=True).view(data.dtype.newbyteorder())
    return np.require(data, dtype, ["C", "W"])


@timed("read image")
def read_image(path, hdu=None, plane=None, blank=(), allow_product=False):
    """Read the plane to work on; parameters, returns and errors as in `read_plane`.

    The pixels are float64 if the file has float64 or integers of more than 16 bits, else float32.
    Pixels with one of the values in `blank` become nan, and so does overscan. A product of this
    tool, except the background-subtracted image, is refused unless `allow_product`.
    """
    origin, stored = read_plane(path, hdu, plane)
    if origin.product not in (None, "subtracted") and not allow_product:
        text = f"it is the {origin.product} product of an earlier run; choose the original image"
        raise InputError(f"{origin.name}: {text}, or allow this one with --allow-product")
    if origin.palette:
        text = "its pixels are indices of a colour palette; convert it to grey or to RGB"
        raise InputError(f"{origin.name}: {text}")
    pixels = to_float(stored)
    for value in np.array(blank, pixels.dtype):  # equal up to the rounding of BSCALE and BZERO
        pixels[np.abs(pixels - value) <= np.spacing(np.abs(value))] = np.nan
    if origin.black is not None:
        log.warning(
            "%s: 0 is white in this TIFF: inverted, so that larger is brighter", origin.name
        )
        np.subtract(origin.black, pixels, out=pixels)
    pixels = linearize(origin, pixels)
    blank_overscan(origin, pixels)
    return origin, pixels


@np.errstate(over="ignore")
def linearize(origin, pixels):
    """Return the pixels without the compression that BSOFTEN and BOFFSET describe (Pan-STARRS).

    Each stored value is 2.5 log10(e) arcsinh((flux - BOFFSET) / (2 BSOFTEN)) (Waters et al. 2020).
    """
    soften, offset = (number_of(origin.header, key) for key in ("BSOFTEN", "BOFFSET"))
    if not (soften > 0 and math.isfinite(offset)):
        return pixels
    if np.nanmax(np.abs(pixels), initial=0) > LARGEST_ARCSINH:
        log.warning("%s: BSOFTEN and BOFFSET ignored, as its pixels look linear", origin.name)
        return pixels
    text = "%s: pixels converted to linear values, by BSOFTEN and BOFFSET of its header"
    log.warning(text, origin.name)
    return 2 * soften * np.sinh(pixels * (math.log(10) / 2.5)) + offset


def blank_overscan(origin, pixels):
    """Set overscan to nan, in place, and log a warning.

    It is a strip at the border, outside DATASEC or TRIMSEC. It is masked if BIASSEC lies within or
    its level or noise differs from the rest, and all of it is less than 15 % of the image; if it
    differs but is more, this only warns. These cards may be left from before an image was cut or
    resampled, where they mean nothing.
    """
    keys, header = ("DATASEC", "TRIMSEC", "BIASSEC"), origin.header
    *data, bias = (section_of(header, key, pixels.shape) for key in keys)
    history = str(value_of(header, "HISTORY")).replace("\n", " ")
    if not any(data) or RESAMPLED.search("\n".join([*header, f" {history}"])):
        return
    outside = np.zeros(pixels.shape, bool)
    for rows, columns in filter(None, data):
        outside[: rows.start] = outside[rows.stop :] = True
        outside[:, : columns.start] = outside[:, columns.stop :] = True
    part, shifts = outside.mean(), [number_of(header, key) for key in ("LTV1", "LTV2")]
    if not 0 < part < 0.5 or np.nansum(np.abs(shifts)) > 0:
        return
    samples = [sample(pixels, where | ~np.isfinite(pixels)) for where in (outside, ~outside)]
    if min(map(len, samples)) < 2:
        return
    (level, other), noise = map(np.median, samples), [half_range(np.diff(each)) for each in samples]
    differs = abs(level - other) > 3 * max(noise) or max(noise) > 2 * min(noise)
    text = f"{origin.name}: {100 * part:.1f} % of the pixels are outside DATASEC or TRIMSEC"
    if part < 0.15 and (differs or (bias and outside[bias].all())):
        pixels[outside] = np.nan
        warn(DATA_WARNING, f"{text}: masked as overscan")
    elif differs:
        warn(DATA_WARNING, f"{text} and differ from the rest: if it is overscan, use --mask-box")


def half_range(values):
    """Return half the range from the 16th to the 84th percentile: sigma, if they are normal."""
    low, high = np.percentile(values, [16, 84])
    return float(high - low) / 2


def section_of(header, key, shape):
    """Return the slices of a section such as [25:488,1:400] of an image (ny, nx), or None."""
    text = str(value_of(header, key)).replace(" ", "")
    found = re.fullmatch(r"\[(\d+):(\d+),(\d+):(\d+)\]", text)
    x1, x2, y1, y2 = map(int, found.groups()) if found else (0, 0, 0, 0)
    valid = 0 < x1 <= x2 <= shape[1] and 0 < y1 <= y2 <= shape[0]
    return np.s_[y1 - 1 : y2, x1 - 1 : x2] if valid and header["NAXIS"] == 2 else None


def read_aligned(path, hdu, plane, image, shape):
    """Read a plane that belongs to an `image`, of shape (ny, nx); otherwise as `read_plane`."""
    origin, pixels = read_plane(path, hdu, plane, image)
    require_shape(origin, pixels, shape)
    return origin, pixels


def require_shape(origin, pixels, shape):
    """Raise InputError unless the pixels have the shape (ny, nx) of the image."""
    if pixels.shape != shape:
        (rows, columns), (ny, nx) = pixels.shape, shape
        text = f"it has {columns} x {rows} pixels (columns x rows), the image has {nx} x {ny}"
        raise InputError(f"{origin.name}: {text}; give a file that was made for this image")


@timed("read mask")
def read_mask(path, hdu, plane, maskthresh, bits, image, shape):
    """Read a mask (ny, nx): True at NaN and at any of `bits` or, without these, above a level."""
    origin, stored = read_aligned(path, hdu, plane, image, shape)
    if bits is None:
        return ~(stored <= maskthresh)
    if np.dtype(origin.dtype).kind == "f":
        text = f"--mask-bits needs integers, not {origin.dtype}; use --maskthresh"
        raise InputError(f"{origin.name}: {text}")
    with np.errstate(invalid="ignore"):
        whole = stored.astype(np.int64).view(np.uint64)
    return ((whole & np.bitwise_or.reduce(np.array(bits, np.uint64))) != 0) | ~np.isfinite(stored)


@timed("read noise")
def read_noise(path, hdu, plane, kind, image, shape):
    """Read a noise image (ny, nx); return standard deviations in the unit of the image.

    Its `kind` is "stddev", "variance", or "weight", an inverse variance. Where it has no usable
    value, the result isn't finite or isn't positive.
    """
    origin, stored = read_aligned(path, hdu, plane, image, shape)
    noise = linearize(origin, to_float(stored))
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind != "stddev":
            np.sqrt(noise, out=noise)
        if kind == "weight":
            np.divide(1, noise, out=noise)
    if not usable(noise).any():
        text = f"no pixel holds a usable {kind}; does it hold something else (--err-type)?"
        raise InputError(f"{path.name}: {text}")
    return noise


def read_measure_image(path, hdu, plane, blank, origin, shape, allow_product=False):
    """Read the image in which the sources of the image from `origin` are measured.

    It must have the same shape (ny, nx); a warning is logged if its WCS is not aligned. Otherwise
    as `read_image`.
    """
    measure_origin, pixels = read_image(path, hdu, plane, blank, allow_product)
    require_shape(measure_origin, pixels, shape)
    if origin.wcs and measure_origin.wcs:
        offset = largest_shift(origin.wcs, lambda: measure_origin.wcs, shape)
        if not offset <= 0.5:
            away = f"up to {offset:.1f}" if math.isfinite(offset) else "an unknown number of"
            text = "%s: by its WCS it is shifted by %s pixels; measured at the same pixels anyway"
            log.warning(text, measure_origin.name, away)
    return measure_origin, pixels


# ---------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------


def make_kernel(case, fwhm, path):
    """Return the convolution kernel of a `--filter-case`, float32 of odd shape, or None.

    `fwhm` is that of the Gaussian, or the diameter of the top hat, in pixels. `path` is a file with
    a kernel; raises InputError if SEP can't use it.
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
    """Return a kernel that averages a radial profile over each pixel, out to `radius` (pixels)."""
    side = 2 * math.ceil(radius - 0.5) + 1
    offsets = (np.arange(side * subpixels) + 0.5) / subpixels - side / 2
    with np.errstate(over="ignore"):
        samples = profile(np.hypot(offsets, offsets[:, np.newaxis]))
    blocks = np.reshape(samples, (side, subpixels, side, subpixels))
    return np.ascontiguousarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def read_kernel(path):
    """Read a kernel from text for `numpy.loadtxt`, or SExtractor's .conv with its CONV line."""
    lines = first_bytes(path, 2**24).decode(errors="replace").splitlines()
    try:
        with warnings.catch_warnings(action="ignore"):
            kernel = np.loadtxt(lines, dtype=np.float32, comments=["#", "CONV"], ndmin=2)
    except ValueError as error:
        text = "not a kernel, which has rows of numbers of equal length"
        raise InputError(f"{path.name}: {text}") from error
    if not kernel.any() or not np.isfinite(kernel).all():
        text = "a kernel needs finite values that are not all zero"
        raise InputError(f"{path.name}: {text}")
    if 0 in np.mod(kernel.shape, 2):
        text = f"its shape {kernel.shape} has no central pixel and shifts sources; make both odd"
        raise InputError(f"{path.name}: {text}")
    return np.ascontiguousarray(kernel)


# ---------------------------------------------------------------------------------------------
# Mask and frame
# ---------------------------------------------------------------------------------------------


def build_mask(pixels, mask, noise, boxes):
    """Return True for pixels that aren't finite, are masked, in a box, or have no usable noise.

    Pixels, mask and noise are arrays (ny, nx), the latter two may be None; a box is (xmin, xmax,
    ymin, ymax) of 0-based pixels, ends included. Raises InputError for a box outside the image, or
    if no pixel is left.
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
                f"lies outside this image of {nx} columns and {ny} rows, counted from 0"
            )
        excluded[ymin : ymax + 1, xmin : xmax + 1] = True
    if excluded.all():
        raise InputError("every pixel is masked or not finite; mask fewer (see --maskthresh)")
    # A new array of zeros takes no memory until it is written to.
    return excluded if excluded.any() else np.zeros(excluded.shape, bool)


# A gap is filled with a Gaussian if the pixel at one of its ends exceeds this many times the noise,
# otherwise with a straight line. A Gaussian has at least this FWHM (pixels).
BRIGHT, MIN_FWHM = 5.0, 2.5


def bridge(image, noise, excluded, rms, max_width):
    """Interpolate an image and its noise over narrow gaps, in place; return what stays excluded.

    A gap is a run of up to `max_width` excluded pixels in a row or a column, with good pixels at
    both ends. Narrower gaps are filled first, rows before columns. Filled pixels count as good, so
    that gaps may cross. Gaps within excluded squares wider than `max_width`, or next to these,
    aren't filled. The image (ny, nx) is background-subtracted, and `rms` is its noise. `noise` is
    an array (ny, nx) or a number, which is left as it is. Returns `excluded` itself if there is
    nothing to fill.
    """
    if not max_width or not excluded.any():
        return excluded
    # Erode by squares of max_width + 1, dilate by max_width + 3: wide squares and 1 pixel around.
    wide = np.pad(excluded, max_width + 1)
    for combine, side in ((np.logical_and, max_width + 1), (np.logical_or, max_width + 3)):
        for _ in range(side - 1):
            wide = combine(wide[1:], wide[:-1])
            wide = combine(wide[:, 1:], wide[:, :-1])
    mask, narrow = excluded.copy(), excluded & ~wide
    for width in range(1, max_width + 1):
        fill_gaps(image, noise, mask, narrow, width, rms)
        fill_gaps(image.T, np.transpose(noise), mask.T, narrow.T, width, rms)
    return mask


def fill_gaps(image, noise, mask, narrow, width, rms):
    """Fill narrow gaps of one width along the rows, in place; see `bridge`."""
    position = np.arange(-2, width + 4)  # 0 is the last pixel before, width + 1 the first after
    for rows in row_slices(mask.shape, CHUNK):
        gaps = ~mask[rows, : -width - 1] & ~mask[rows, width + 1 :]
        for k in range(1, width + 1):
            gaps &= narrow[rows, k : k - width - 1]
        y, x = np.divmod(np.flatnonzero(gaps)[:, None], gaps.shape[1])  # faster than np.nonzero
        y, x = y + rows.start, x + position
        columns = np.clip(x, 0, mask.shape[1] - 1)
        good, gap = (columns == x) & ~mask[y, columns], (y, x[:, 3:-3])
        image[gap] = interpolate(image[y, columns], good, position, rms)[:, 3:-3]
        if np.ndim(noise):
            noise[gap] = straight_lines(noise[y, columns], position)[:, 3:-3]
        mask[gap] = narrow[gap] = False


def straight_lines(values, position):
    """Return lines through the two ends of gaps; each row of `values` is a gap, see `fill_gaps`."""
    part = position / position[-3]
    return values[:, [2, -3]].astype(np.float64) @ np.array([1 - part, part])


def interpolate(values, good, position, rms):
    """Return straight lines across gaps or, where an end is bright, fitted Gaussians.

    Each row of `values` (n, width + 6) is a gap with three pixels on each side. Only those that are
    `good` are fitted. `position` (width + 6) counts from the last pixel before the gap, which is 0.
    """
    filled, ends = straight_lines(values, position), values[:, [2, -3]].astype(np.float64)
    bright = ends.max(axis=1) > BRIGHT * rms
    values, good, ends = np.where(good, values, 0.0)[bright], good[bright], ends[bright]
    # On the side of the fainter end, pixels that are brighter than it belong to another source.
    fainter = (position < 1) == (ends[:, :1] < ends[:, 1:])
    good &= ~fainter | (values <= ends.min(axis=1, keepdims=True) + 3 * rms)
    # Fit log(values / unit) = parabola by Gauss-Newton steps, with a weak prior on its curvature.
    unit = np.maximum(rms, 1e-3 * values.max(axis=1, keepdims=True))
    powers, model = np.vander(position - position.mean(), 3), np.log(np.maximum(values / unit, 1))
    for _ in range(6):
        height = np.exp(model)
        weight = good * height**2
        matrix = np.einsum("ni,ij,ik->njk", weight, powers, powers) + np.diag([2, 0, 0])
        vector = (weight * (model + np.clip(values / unit / height - 1, -1, 1))) @ powers
        model = np.clip(np.linalg.solve(matrix, vector[:, :, None])[:, :, 0] @ powers.T, -5, 50)
    # The ratio of a Gaussian of the smallest FWHM to the line, for ends of equal height.
    sharpest = np.exp(4 * math.log(2) / MIN_FWHM**2 * position * (position[-3] - position))
    limit = filled[bright] * np.where(filled[bright] > 0, sharpest, 1)
    filled[bright] = np.minimum(unit * np.exp(model), limit)
    return filled


def usable(noise):
    """Return True where standard deviations are finite and positive."""
    return (noise > 0) & np.isfinite(noise)


def row_slices(shape, pixels):
    """Return slices of the rows of an image (ny, nx), each of up to this many pixels or one row."""
    return slices(shape[0], max(1, pixels // shape[1]))


def slices(count, size):
    """Return slices of up to `size` elements that cover `count`; one slice if that is 0."""
    return [slice(start, start + size) for start in range(0, count or 1, size)]


def sample(image, mask):
    """Return up to about a million unmasked pixels of an image, on a regular grid."""
    step = max(1, math.isqrt(image.size // 250_000))
    found = image[::step, ::step][~mask[::step, ::step]]
    return found if found.size else image[~mask]


@dataclass(frozen=True)
class Frame:
    """The scale of the pixels that SEP gets: image value = offset + scale x pixel.

    The frame is the identity unless SEP, which computes in float32, would get wrong results: values
    are so small or large that their squares can't be represented, or the noise is tiny compared
    with the level.
    """

    offset: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, image, mask):
        """Choose the frame of an image from a sample of its unmasked pixels."""
        values = sample(image, mask).astype(np.float64)
        low, middle, high = (float(value) for value in np.percentile(values, [16, 50, 84]))
        # Differences of halves don't overflow.
        spread = (high / 2 - low / 2) or float(np.abs(values / 2 - middle / 2).max())
        offset = middle if abs(middle) > 1e4 * spread else 0.0
        if spread == 0 or 1e-12 < spread < 1e12:
            return cls(offset)
        # If the sky has no noise, the spread may be that of the faintest wings of sources.
        spread = max(spread, 1e-15 * float(np.abs(values - offset).max()))
        return cls(offset, 2.0 ** (math.frexp(spread)[1] - 1))  # a power of 2 is exact

    @np.errstate(over="ignore")
    def levels(self, values):
        """Convert levels to image values, in place, and return them."""
        if self != Frame():
            values *= self.scale
            values += self.offset
        return values

    @np.errstate(over="ignore")
    def differences(self, values):
        """Return noise, fluxes or differences of levels, converted to image values."""
        return values if self.scale == 1 else values * self.scale


# ---------------------------------------------------------------------------------------------
# Background
# ---------------------------------------------------------------------------------------------

# Before the second pass, sources are masked out to this many times (a, b), since the light of a
# bright galaxy extends well beyond the isophote at which it is detected.
MASK_RADIUS = 6.0

# Digital pixel values are multiples of a step, such as 1 for integers. If the noise is at least
# this many steps, SEP's medians are as good as those of continuous values.
FINE_NOISE = 10

NO_WEIGHT = 1e30  # SEP's own noise value for a masked pixel
LARGEST = 1e30  # SEP's sums of larger values may overflow


@dataclass(frozen=True)
class Field:
    """A background-subtracted image (ny, nx) with all that SEP needs, in the unit of `frame`."""

    residual: np.ndarray  # the image less its background, interpolated over narrow gaps
    excluded: np.ndarray  # True where a pixel has no usable value or noise
    mask: np.ndarray  # the same, but False where the residual is interpolated
    saturated: tuple[np.ndarray, ...]  # rows and columns of saturated pixels
    noise: float | np.ndarray  # standard deviation of a pixel
    filtered_noise: float | np.ndarray  # for the threshold, unless "none"; see `filter_noise`
    background: sep.Background
    method: Method
    frame: Frame

    def rows(self, which):
        """Return some rows (slice or indices); only background and saturated pixels stay whole."""
        names = "residual", "excluded", "mask", "noise", "filtered_noise"
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v[which] for k, v in arrays.items() if np.ndim(v)})

    def with_extraction(self, **settings):
        """Return the field with some other `ExtractionSettings`."""
        extraction = replace(self.method.extraction, **settings)
        return replace(self, method=replace(self.method, extraction=extraction))

    def level(self):
        """Return the global level of the background in image values."""
        return self.frame.levels(np.array(self.background.globalback, dtype=np.float64))

    def level_map(self):
        """Return the background in image values."""
        return self.frame.levels(self.background.back())

    def rms_map(self):
        """Return the background RMS in image values."""
        return self.frame.differences(self.background.rms())

    def is_noiseless(self):
        """Return True if the noise is estimated from the image and turns out to be zero."""
        return self.method.estimates_noise() and global_rms(self.background) == 0

    def threshold_unit(self):
        """Return a map of the unit of the threshold: the noise, or 1 for an absolute threshold."""
        noise = 1.0 if self.method.err_option == "none" else self.filtered_noise
        return np.broadcast_to(noise, self.mask.shape)

    def threshold_scale(self):
        """Return by what a threshold of the field is multiplied to be one of `--thresh`."""
        return self.frame.scale if self.method.err_option == "none" else 1

    def weights_by_noise(self):
        """Return True if SEP's matched filter weights each pixel by its noise."""
        matched = self.method.extraction.filter_type == "matched"
        return matched and self.method.kernel is not None and np.ndim(self.noise) > 0

    def depth(self):
        """Return by which factor a filter that weights by noise lowers the limit, otherwise 1.

        With a number n as noise, SEP requires sum(k f) / sum|k| > thresh n, for a kernel k and an
        image f. With an array n, its matched filter requires sum(k f / n^2) / sqrt(sum(k^2 / n^2))
        > thresh. For white noise both differ by this factor.
        """
        if not self.weights_by_noise():
            return 1.0
        kernel = self.method.kernel.astype(np.float64)
        return float(np.abs(kernel).sum() / np.linalg.norm(kernel))


@timed("build field")
@np.errstate(over="ignore", invalid="ignore")
def build_field(pixels, mask, noise, method, saturation=math.nan, objects=None):
    """Return the `Field` of an image (ny, nx), with its background subtracted.

    `mask` is True where a pixel has no usable value; `noise` is an array of standard deviations, or
    None. Pixels and noise are changed in place, and become part of the field. Pixels of at least
    the `saturation` level are recorded. `objects`, as in `Detections`, are masked while the
    background is estimated. Raises InputError if too little of the image is unmasked.
    """
    saturated = ([], []) if math.isnan(saturation) else np.nonzero(pixels >= saturation)
    frame = Frame.of(pixels, mask)
    if frame != Frame():
        pixels -= frame.offset
        pixels /= frame.scale
        if noise is not None:
            noise /= frame.scale
    if not -LARGEST < np.nanmin(pixels) <= np.nanmax(pixels) < LARGEST:
        mask = mask | too_large(pixels)
    method, background = method.within(frame), None
    settings = method.background
    unusable = mask if noise is None else mask | low_weight(noise, mask)
    if objects is not None:
        grown = unusable.copy()
        sane = objects[np.isfinite(objects["cxx"] + objects["cyy"] + objects["cxy"])]
        shapes = {name: sane[name] for name in ("x", "y", "cxx", "cyy", "cxy")}
        sep.mask_ellipse(grown, **shapes, r=MASK_RADIUS)
        background = estimate_background(pixels, grown, settings)
        if background is None:
            log.warning("sources fill every background box: the second pass doesn't mask them")
    background = background or estimate_background(pixels, unusable, settings)
    if background is None:
        raise InputError(
            f"in every background box of {settings.bw} x {settings.bh} pixels more than half of "
            "the pixels are masked; mask fewer, or use other boxes (--bw and --bh)"
        )
    background.subfrom(pixels)
    excluded, noise = settle_noise(noise, mask, background, method.err_option)
    mask = bridge(pixels, noise, excluded, global_rms(background), method.bridge)
    filtered = filter_noise(noise, mask, method)
    return Field(pixels, excluded, mask, saturated, noise, filtered, background, method, frame)


def too_large(pixels):
    """Return True where values are nan, or so large that SEP's sums may overflow."""
    return ~((pixels > -LARGEST) & (pixels < LARGEST))


def settle_noise(noise, mask, background, err_option):
    """Return a mask, and the noise of an `err_option`, a number or an array (ny, nx).

    Pixels without usable noise are masked as well. Raises InputError if no others are left.
    """
    overall = global_rms(background)
    noiseless = noise is None and overall == 0
    if err_option in ("none", "float_globalrms") or noiseless:
        return mask, overall
    if noise is None:
        noise = background.rms()
    mask = mask | ~usable(noise)
    if mask.all():
        raise InputError("no pixel has usable noise; is it in the unit of the image?")
    noise[mask] = NO_WEIGHT
    return mask, noise


def low_weight(noise, mask):
    """Return True where the weight, 1 / noise^2, is less than 1/1000 of its median."""
    return noise > math.sqrt(1000) * np.median(sample(noise, mask))


def filter_noise(noise, mask, method):
    """Return the noise with which the filtered image is compared, as an array if it is one.

    SEP's conv filters only the image. Where the noise rises abruptly, noise would be taken for
    sources. Like SExtractor, this filters the variance as well, here without masked pixels.
    """
    kernel = method.kernel
    if np.ndim(noise) == 0 or kernel is None or method.extraction.filter_type != "conv":
        return noise
    from astropy.convolution import convolve

    filtered, half = np.empty_like(noise), len(kernel) // 2
    weights = np.abs(kernel[::-1, ::-1]) / np.abs(kernel).sum()  # convolve turns it back
    for rows in row_slices(noise.shape, 16 * CHUNK):
        some = slice(max(rows.start - half, 0), rows.stop + half)
        variance = np.where(mask[some], np.nan, noise[some].astype(np.float64)) ** 2
        with warnings.catch_warnings(action="ignore"):  # pixels with only masked neighbours
            mean = convolve(variance, weights, boundary="fill", fill_value=np.nan)
        filtered[rows] = np.sqrt(mean[rows.start - some.start :][: len(filtered[rows])])
    return np.nan_to_num(filtered, nan=NO_WEIGHT, copy=False)


@timed("estimate background")
def estimate_background(pixels, mask, settings):
    """Return the `sep.Background` of an image (ny, nx), or None if SEP can't use any box.

    If the noise is only a few digital steps, the level from SEP's medians is off by up to 1.4
    steps. The background is then estimated from a dithered copy, with uniform noise of one step
    added (which raises the variance by step^2 / 12). For photon counts the copy is shifted as well.
    """
    settings = settings.limited_to(pixels.shape)  # SEP allocates whole boxes
    masked = np.count_nonzero(mask)
    if 2 * masked > mask.size and (box_sums(settings, ~mask) < box_sums(settings, mask)).all():
        return None  # SEP uses boxes of which at least half is unmasked
    keywords = {"mask": mask if masked else None, **asdict(settings)}  # None is faster
    background = sep.Background(pixels, **keywords)
    values = sample(pixels, mask)
    step = digital_step(values)
    if not 0 < global_rms(background) < FINE_NOISE * step:
        return background
    dithered = np.random.default_rng(0).random(pixels.shape, pixels.dtype)
    dithered -= 0.5
    dithered *= step
    dithered += pixels
    # SEP's level is 2.5 median - 1.5 mean. Of photon counts, whose variance is their mean, the
    # median is up to 1/6 below the mean, and so the level is up to 5/12 below it.
    faint = np.minimum(values, np.percentile(values, 95)) / step
    if abs(faint.var() - faint.mean()) < faint.mean() / 2:
        dithered += step * min(faint.mean(), 5 / 12)
    return sep.Background(dithered, **keywords)


def digital_step(values):
    """Return the step size of digitised values, 0 if they look continuous; outliers don't count."""
    ends = np.percentile(values, [10, 90], method="nearest")
    steps = np.diff(np.unique(np.clip(values, *ends)))
    step = float(steps.min(initial=np.inf))
    return step if steps.size and (np.abs(steps / step % 1 - 0.5) > 0.4).all() else 0.0


def box_sums(settings, where):
    """Return the sum of an array (ny, nx) in each background box; of booleans, the number."""
    ny, nx = where.shape
    tops, lefts = np.arange(0, ny, settings.bh), np.arange(0, nx, settings.bw)
    rows = [where[top : top + settings.bh].sum(axis=0) for top in tops]
    return np.add.reduceat(rows, lefts, axis=1)


def global_rms(background):
    """Return the global RMS of a `sep.Background`, 0 if there is no noise (SEP then returns 1)."""
    rms = background.globalrms
    return 0.0 if rms == 1 and not background.rms().any() else rms


# ---------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------

# The signals at which a run removes its files before it ends.
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

worker = {}  # in a worker process: its jobs, and the directory for their results


@contextmanager
def blocking_signals():
    """Hold back signals: an exception that a handler raises during a fork would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_jobs(jobs, processes):
    """Yield the results of the jobs, callables, in order; run in up to this many processes.

    Threads don't help, as SEP doesn't release the interpreter's lock. Processes are forked: they
    share the memory of this one, but a job must not rely on changing it. Raises InputError if a
    process is killed or can't be started.
    """
    workers = min(processes, len(jobs))
    if workers == 1:
        yield from (job() for job in jobs)
        return
    # Forked processes inherit the jobs, which hold whole images; only their indices are sent.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        start = (jobs, directory, os.getpid())
        pool = ProcessPoolExecutor(workers, context, start_worker, start)
        try:
            # Python warns that the threads of numpy are not forked; they are idle.
            with blocking_signals(), warnings.catch_warnings(action="ignore"):
                futures = [pool.submit(do_job, index) for index in range(len(jobs))]
            for future in futures:
                yield pickle.loads(future.result().read_bytes())
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool | OSError):
                killed = isinstance(error, BrokenProcessPool)
                reason = "one was killed" if killed else one_line(error)
                text = f"worker processes failed ({reason}); try a smaller --threads"
                raise (OutOfMemoryError if lacks_memory(error) else InputError)(text) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(jobs, directory, parent):
    """Prepare a worker process: store its jobs, and let it end when its parent has ended."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    worker.update(jobs=jobs, directory=directory)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(index):
    """Run a job and return the path of a file with its pickled result.

    Large results are not sent through the pool, which would wait forever if a process were killed
    while it sends one.
    """
    path = Path(worker["directory"], str(index))
    path.write_bytes(pickle.dumps(worker["jobs"][index]()))
    return path


# ---------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------

# SEP's defaults for its pixel stack and its number of sub-objects; above the maximum it overflows.
PIXEL_STACK = 300_000
SUB_OBJECTS, MAX_SUB_OBJECTS = 1024, 32767

# Bits of `flag` in addition to SEP's; the first is also SExtractor's.
SATURATED, BRIDGED, NEXT_TO_MASK = 4, 256, 512

CLEAN_ZONE = 10.0  # SExtractor's: cleaning compares objects closer than this times a1 + a2
LARGE_KERNEL = 200  # elements; larger kernels are applied faster by a Fourier transform

# A pixel of an object: index of the object, position, value, value in the filtered image, by how
# much the latter exceeds the threshold, and what is compared with `thresh`.
PIXEL = np.dtype("int, int, int, float, float, float, float")
PIXEL.names = ("owner", "y", "x", "value", "filtered", "margin", "significance")


class Detections(NamedTuple):
    """SEP's structured array of objects, and a map (ny, nx) of their labels, index + 1."""

    objects: np.ndarray
    segmentation: np.ndarray


@timed("find sources")
def find_sources(field, threads=1):
    """Return the `Detections` in a field, after removing masked pixels and cleaning.

    Raises InputError if the threshold is a multiple of a noise that is 0, or SEP fails.
    """
    if field.is_noiseless() and field.residual[~field.mask].any():
        raise InputError(
            "the background has no noise, so the threshold can't be a multiple of it; give an "
            "absolute one (--err-option none), or a noise image (--err-option file)"
        )
    # SEP sets masked pixels to 0 as well, but not before it filters the first rows.
    with replaced(field.residual, field.mask, 0):
        objects, labels = extract(field)
        batches = slices(len(objects), BATCH)
        jobs = [partial(settle_objects, field, objects, labels, batch) for batch in batches]
        objects, profiles = zip(*run_jobs(jobs, threads), strict=True)
    objects = np.concatenate(objects)
    kept = objects["npix"] > 0
    if field.method.extraction.clean:
        profiles, beta = np.concatenate(profiles), field.method.extraction.clean_param
        kept[kept] = survive_cleaning(objects[kept], profiles[kept], beta)
    ids = np.append(0, np.cumsum(kept) * kept).astype(np.int32)
    for rows in row_slices(labels.shape, CHUNK):
        labels[rows] = np.where(field.mask[rows], 0, ids[labels[rows]])
    return Detections(objects[kept], labels)


def extract(field):
    """Return the objects that SEP finds in a `Field`, without cleaning, and their label map."""
    keywords = asdict(field.method.extraction) | {
        "err": None if field.method.err_option == "none" else field.filtered_noise,
        "mask": field.mask if field.mask.any() else None,
        "filter_kernel": field.method.kernel,
        "segmentation_map": True,
        "clean": False,  # SEP's own takes quadratic time, and uses wrong units for a noise array
    }
    stack, parts, max_stack = PIXEL_STACK, SUB_OBJECTS, field.residual.size + 2
    while True:
        sep.set_extract_pixstack(stack)
        sep.set_sub_object_limit(parts)
        try:
            return sep.extract(field.residual, **keywords)
        except MemoryError:
            raise
        except Exception as error:  # SEP raises nothing narrower
            problem = one_line(error)
            if "pixel buffer full" in problem and stack < max_stack:
                stack = min(4 * stack, max_stack)
            elif "deblending overflow" in problem and parts < MAX_SUB_OBJECTS:
                parts = min(4 * parts, MAX_SUB_OBJECTS)
            else:
                advice = "raise the threshold (--thresh), or switch deblending off"
                text = f"SEP failed ({problem}); {advice} (--deblend-nthresh 1)"
                raise InputError(text) from error
            log.debug("raised SEP's limits to %d sub-objects and %d pixels", parts, stack)


def flag_pixels(found, field, measure_field):
    """Return the `Detections` with flags for saturated and bridged pixels in either field."""
    objects = found.objects.copy()
    for each in (field,) if measure_field is field else (field, measure_field):
        unbridged = each.mask is each.excluded  # saves a search through the whole image
        bridged = ([], []) if unbridged else each.excluded & ~each.mask
        for where, bit in ((each.saturated, SATURATED), (bridged, BRIDGED)):
            labels = np.unique(found.segmentation[where])
            objects["flag"][labels[labels > 0] - 1] |= bit
    return found._replace(objects=objects)


@contextmanager
def replaced(array, where, value):
    """Set elements of an array to a value, in place, and restore them at the end."""
    before = np.copy(array[where])
    array[where] = value
    try:
        yield
    finally:
        array[where] = before


def settle_objects(field, objects, labels, batch):
    """Remove masked pixels from a batch of SEP's objects.

    `labels` (ny, nx) is the map of all `objects`, index + 1, and `batch` a slice of these. An
    object that loses pixels keeps SEP's position and shape; one that loses all gets an `npix` of 0;
    one with masked pixels next to it is flagged. `thresh` and `tnpix` are corrected where the
    filter weights by noise. Returns the objects and their profiles for `survive_cleaning`, None
    without cleaning.
    """
    objects, extraction = objects[batch].copy(), field.method.extraction
    rim = 1 if field.method.kernel is None else len(field.method.kernel) // 2 + 1
    top = max(objects["ymin"].min(initial=len(labels)) - rim, 0)
    end = objects["ymax"].max(initial=0) + rim + 1
    band, labels = field.rows(np.s_[top:end]), labels[top:end]
    where = np.flatnonzero((labels > batch.start) & (labels <= batch.start + len(objects)))
    where = where[np.argsort(labels.take(where), kind="stable")]
    owner = labels.take(where) - (batch.start + 1)
    pixels, good = filter_pixels(band, where, owner), ~band.mask.take(where)
    left = np.bincount(owner[good], minlength=len(objects))
    if field.weights_by_noise():
        noise = np.bincount(owner[good], band.noise.take(where[good]), len(objects))
        thresh = extraction.thresh / field.depth() * noise / np.maximum(left, 1)
        bright = owner[pixels["value"] > thresh[owner]]
        objects["thresh"], objects["tnpix"] = thresh, np.bincount(bright, minlength=len(objects))
    # Cleaning compares objects as SEP found them, with their masked pixels.
    profiles = describe_profiles(objects, pixels, extraction) if extraction.clean else None
    if band.mask.any():
        y, x = np.divmod(where[good], band.mask.shape[1])
        next_to_mask = correlate(band.mask, np.ones((3, 3)), y, x) > 0
        objects["flag"][np.unique(owner[good][next_to_mask])] |= NEXT_TO_MASK
    pixels["y"] += top
    cut = left < objects["npix"]
    if np.ndim(field.noise):
        wrong = cut | (field.filtered_noise is not field.noise)
        measure_errors(objects, wrong, pixels[good], band.noise.take(where[good]), extraction.gain)
    recount(objects, cut & (left > 0), pixels[good & cut[owner]])
    objects["npix"] = left
    return objects, profiles


def measure_errors(objects, wrong, pixels, noise, gain):
    """Measure the errors of positions as SEP does it, in place, where those of SEP are `wrong`.

    SEP takes the filtered noise, and an infinite one for masked pixels; `noise` is the right one.
    """
    owner, light = pixels["owner"], np.maximum(pixels["filtered"], 0)
    variance = noise.astype(np.float64) ** 2 + light / (gain or np.inf)
    dx, dy = (pixels[axis] - objects[axis][owner] for axis in "xy")
    total, xx, yy, xy = (
        np.bincount(owner, variance * term, len(objects)) / objects["cflux"] ** 2
        for term in (1, dx**2, dy**2, dx * dy)
    )
    # Very thin objects: add the variance of a position within one pixel, 1/12.
    thin = (objects["flag"] & sep.OBJ_SINGU > 0) & (xx * yy - xy**2 < (total / 12) ** 2)
    xx, yy = xx + thin * total / 12, yy + thin * total / 12
    for name, values in (("errx2", xx), ("erry2", yy), ("errxy", xy)):
        objects[name][wrong] = values[wrong]


def recount(objects, cut, pixels):
    """Update extent, fluxes and peaks of objects that lost pixels (`cut`), in place."""
    owner = pixels["owner"]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for axis in "xy":
        objects[f"{axis}min"][cut] = np.minimum.reduceat(pixels[axis], starts)
        objects[f"{axis}max"][cut] = np.maximum.reduceat(pixels[axis], starts)
    for kind, name in (("", "value"), ("c", "filtered")):
        top = pixels[np.lexsort((-pixels[name], owner))[starts]]
        objects[f"{kind}flux"][cut] = np.add.reduceat(pixels[name], starts)
        objects[f"{kind}peak"][cut] = top[name]
        objects[f"x{kind}peak"][cut], objects[f"y{kind}peak"][cut] = top["x"], top["y"]


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def filter_pixels(field, where, owner):
    """Return the pixels at flat indices `where` as `PIXEL`, filtered as SEP does it.

    `owner` is the index of the object at each pixel. If the filter weights by noise, the margin is
    converted: for uniform noise n it is the filtered value less thresh n / depth.
    """
    kernel, thresh = field.method.kernel, field.method.extraction.thresh
    kernel = np.ones((1, 1)) if kernel is None else kernel / np.abs(kernel).sum()
    y, x = np.divmod(where, field.mask.shape[1])
    filtered = correlate(field.residual, kernel, y, x)
    if field.weights_by_noise():
        precision = field.noise.astype(np.float64) ** -2
        weight = np.sqrt(correlate(precision, kernel**2, y, x))
        significance = correlate(field.residual * precision, kernel, y, x) / weight
        margin = (significance - thresh) * np.square(kernel).sum() / weight
    else:
        unit = field.threshold_unit()[y, x]
        margin, significance = filtered - thresh * unit, filtered / unit
    columns = owner, y, x, field.residual[y, x], filtered, margin, significance
    return np.rec.fromarrays(columns, dtype=PIXEL)


def correlate(image, kernel, y, x):
    """Return the correlation of an image with a kernel at pixels (y, x); 0 beyond the edges."""
    (ny, nx), (top, left) = image.shape, np.floor_divide(kernel.shape, 2)
    if kernel.size > LARGE_KERNEL and len(y) > image.size / 100:
        shape = np.add(image.shape, kernel.shape) - 1
        image, kernel = image.astype(np.float64), kernel.astype(np.float64)
        product = np.fft.rfft2(image, shape) * np.fft.rfft2(kernel, shape).conj()
        return np.fft.irfft2(product, shape)[y - top, x - left]  # periodic: -1 is the last
    at, total = y * nx + x, 0
    for (i, j), weight in np.ndenumerate(kernel):
        dy, dx = i - top, j - left
        inside = (y >= -dy) & (y < ny - dy) & (x >= -dx) & (x < nx - dx)
        total += weight * np.where(inside, image.take(at + (dy * nx + dx), mode="clip"), 0)
    return total


@np.errstate(all="ignore")
def describe_profiles(objects, pixels, settings):
    """Return the Moffat profiles of SExtractor's CLEAN, for `survive_cleaning`.

    The light of an object at r, in units of (a, b), is height (1 + alpha r^2)^-`clean_param`. The
    object with the larger `flux` absorbs another if its light there exceeds the other's `margin`.

    The height is that of a Gaussian with this flux. Its area is that of (a, b) times `abcor`, the
    number of pixels between two isophotes (at the threshold and halfway to the peak) over the
    number for a Gaussian with sigmas (a, b).
    """
    thresh, area, flux = objects["thresh"], np.pi * objects["a"] * objects["b"], objects["cflux"]
    owner, half = pixels["owner"], (thresh + objects["peak"]) / 2
    core = np.bincount(owner[pixels["value"] > half[owner]], minlength=len(objects))
    gaussian_ring = -2 * np.log(np.where(thresh < half, thresh / half, 0.99)) * area
    abcor = np.minimum(np.maximum(objects["tnpix"] - core, 1) / gaussian_ring, 1)
    height = flux / (2 * area * abcor)
    alpha = ((height / thresh) ** (1 / settings.clean_param) - 1) * area / objects["npix"]
    margin = cleaning_margins(objects["npix"], pixels, settings.minarea)
    return np.rec.fromarrays((height, alpha, flux, margin), names="height, alpha, flux, margin")


@np.errstate(all="ignore")
def survive_cleaning(objects, profiles, beta):
    """Return False for objects that are explained by the light of a brighter neighbour.

    This is SExtractor's CLEAN; `beta` is `clean_param`. Of two close objects the brighter absorbs
    the other if its profile, at the other's position, exceeds the other's margin. Pairs (i, j) are
    processed in order, unless one of the two is already absorbed. As in SExtractor, an i that is
    absorbed during its own pairs goes on absorbing.
    """
    x, y, a, cxx, cyy, cxy = (objects[name] for name in ("x", "y", "a", "cxx", "cyy", "cxy"))
    height, alpha, flux, margin = (profiles[name] for name in profiles.dtype.names)
    absorptions = [np.empty((3, 0), int)]
    for i, j in close_pairs(x, y, CLEAN_ZONE * a):
        bright = np.where(flux[j] < flux[i], i, j)
        faint, dx, dy = i + j - bright, x[i] - x[j], y[i] - y[j]
        r2 = cxx[bright] * dx**2 + cyy[bright] * dy**2 + cxy[bright] * dx * dy
        base = 1 + alpha[bright] * r2
        absorbs = (base > 1) & (base < 1e10) & (height[bright] * base**-beta > margin[faint])
        absorptions.append(np.array([i, j, faint])[:, absorbs])
    absorptions = np.hstack(absorptions)
    i, j, _ = absorptions
    absorptions = absorptions[:, np.lexsort((j, i))].T.tolist()
    survives = np.ones(len(objects), bool)
    for i, pairs in itertools.groupby(absorptions, operator.itemgetter(0)):
        if survives[i]:
            for _, j, faint in pairs:
                if survives[j]:
                    survives[faint] = False
    return survives


def cleaning_margins(npix, pixels, minarea):
    """Return the margin of each object's `minarea`-th highest pixel, 0 if it has fewer.

    Two quirks of SExtractor are kept. Of more than `minarea` pixels, number `minarea` + 1 in its
    order is left out; of exactly `minarea`, the first counts, not the faintest. In its order the
    pixels to the left of where the previous row starts come first, from the last row up; then all
    others, row by row.
    """
    owner, x, y, margin = (pixels[name] for name in ("owner", "x", "y", "margin"))
    new_owner, new_row = np.diff(owner, prepend=-1) != 0, np.diff(y, prepend=-1) != 0
    starts = np.flatnonzero(new_owner | new_row)
    previous_start = np.where(new_owner[starts], 0, np.roll(x[starts], 1))
    to_the_left = x < np.repeat(previous_start, np.diff(starts, append=len(x)))
    detected = margin[np.lexsort((-(y + 1) * to_the_left, owner))]
    first = np.cumsum(npix) - npix
    skipped = np.arange(len(x)) == (first + minarea)[owner]
    ranked = np.where(skipped, -np.inf, detected)
    ranked = ranked[np.lexsort((-ranked, owner))]
    nth = ranked.take(first + minarea - 1, mode="clip")
    return np.select([npix > minarea, npix == minarea], [nth, detected[first]])


def close_pairs(x, y, reach):
    """Yield, in chunks, all pairs i < j of objects at a distance of up to reach[i] + reach[j].

    Objects are grouped by reach, in powers of 2, so that a few large ones don't slow down the rest.
    Each object of a group is compared with those of this and of smaller groups in the 3 x 3 cells
    around it. A cell is at least twice as wide as the largest reach of the group, so that objects
    within reach are always in adjacent cells.
    """
    finite = np.isfinite(x + y + reach)
    exponent = np.where(finite, np.frexp(reach)[1], 9999)  # 2**exponent > reach
    for level in np.unique(exponent[finite]):
        group, partners = np.flatnonzero(exponent == level), np.flatnonzero(exponent <= level)
        row, column = (np.floor(values / 2.0 ** (level + 1)) for values in (y, x))
        width = column[partners].max() + 2
        cell = row * width + column
        partners = partners[np.argsort(cell[partners])]
        for middle in (cell[group] + step * width for step in (-1, 0, 1)):
            first, last = np.searchsorted(cell[partners], [middle - 1, middle + 2])
            ends = np.cumsum(last - first)
            for start in range(0, int(ends[-1]), CHUNK):
                pair = np.arange(start, min(start + CHUNK, ends[-1]))  # of all that share cells
                member = np.searchsorted(ends, pair, side="right")
                i, j = group[member], partners[pair + (last - ends)[member]]
                close = np.hypot(x[i] - x[j], y[i] - y[j]) <= reach[i] + reach[j]
                close &= (exponent[j] < level) | (i < j)  # each pair of a group once
                yield np.minimum(i, j)[close], np.maximum(i, j)[close]


# ---------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------

# Discs in empty sky.
RADII = 1.42 ** np.arange(1, 10)  # pixels; SEP's disc of radius 1 is a single pixel
PLACES = 50_000  # random pixels that are tried as centres
DISC_PIXELS = 300_000  # limits the number of discs of a radius
CLEARANCE = 4  # pixels around a disc that are neither masked nor detected
MIN_DISCS = 100
MIN_INDEPENDENT = 30  # discs that fit side by side into the empty sky

WEAK = 5  # detections whose peak is below this many sigmas count as sky
FIRST_PIXELS = 10_000  # pixels from which sigma is first estimated

STRIPS, STRIP_PIXELS = 16, 2**17  # where sources of a large image and its negative are counted

# Automatic threshold, in sigmas of the filtered image.
LEVELS = np.linspace(2.3, 4.2, 5)  # thresholds to try
SAFE_LEVEL = 3.2  # lowest threshold where the purity is uncertain
FEW = 100  # number of sources below which it is uncertain
VERY_SKEWED = 0.4  # the least skewness at which the negative says nothing about noise
FIRST_PASS = 3.75  # sigmas above which sources are masked for the second background pass

MAX_SKEWNESS = 0.08  # of the sky; the negative of noise with 0.1 has 4 times too few detections


@dataclass(frozen=True)
class Noise:
    """The noise of the sky in a `Field`: of apertures, and of the filtered image.

    Neighbouring pixels of a resampled image are correlated, so that sums over them are noisier than
    those of independent ones. Undetected sources and an uneven background add to that. `areas`
    (pixels, ascending) and `ratios` describe discs in empty sky, as in Labbe et al. (2003), Gawiser
    et al. (2006) and Whitaker et al. (2011). All else is nan if there is too little empty sky.
    """

    areas: np.ndarray
    ratios: np.ndarray  # noise of the sum over a disc, relative to that of independent pixels
    empty: float  # part of the pixels around which a smallest disc is clear
    sigma: float  # standard deviation of the filtered image, in units of the threshold
    pixel: float  # standard deviation of a pixel, relative to the noise of the field
    skewness: float  # of the pixels, 0 if it may be chance

    def ratio(self, area):
        """Return the ratios for apertures of these areas (pixels).

        Beyond the largest disc they are extrapolated with the slope of the last two steps, at most
        with the root of the area, as for a background that is off.
        """
        x, y = np.log(self.areas), np.log(self.ratios)
        slope = np.clip((y[-1] - y[-3:][0]) / max(x[-1] - x[-3:][0], 1), 0, 0.5)
        at = np.log(np.maximum(area, 1))
        return np.exp(np.interp(at, x, y) + slope * np.maximum(at - x[-1], 0))


# Pixels share no noise: errors stay as they are.
INDEPENDENT = Noise(np.ones(1), np.ones(1), 0.0, math.nan, math.nan, math.nan)


@timed("measure noise")
def measure_noise(field, segmentation, strong):
    """Measure the `Noise` of a field in its empty sky.

    This is where nothing is masked or belongs to a `strong` detection (see `are_strong`) of the
    `segmentation` map (ny, nx). Weak detections, which may be noise, are part of it: without them
    its noise would be too low.
    """
    from pandas import Series

    blocked = field.mask | np.append(False, strong)[segmentation]
    areas, ratios, empty, sky = measure_discs(field, blocked)
    if not len(sky):
        return INDEPENDENT
    pixels = filter_sky(field, sky)
    values = pixels.value / np.broadcast_to(field.noise, blocked.shape)[pixels.y, pixels.x]
    pixel = half_range(values)
    noise = Noise(areas, ratios, empty, half_range(pixels.significance), pixel, 0.0)
    if half_range(pixels.value) < global_rms(field.background) / 10:  # most have the same value
        return replace(noise, sigma=math.nan)
    skewness = Series(values[np.abs(values - np.median(values)) < 5 * pixel]).skew()
    # The noise of ratio^2 pixels is shared. The standard error is that of normal values.
    independent = min(len(sky), np.count_nonzero(~blocked) / noise.ratio(9 * math.pi) ** 2)
    by_chance = abs(skewness) < 3 * math.sqrt(6 / independent)
    return noise if by_chance else replace(noise, skewness=skewness)


def random_pixels(where):
    """Return the flat indices of random pixels where an array (ny, nx) is True."""
    rng, size = np.random.default_rng(0), where.size
    # In large images few are drawn twice.
    tried = rng.permutation(size) if size < 10 * PLACES else rng.integers(size, size=PLACES)
    return tried[where.take(tried)][:PLACES]


def are_strong(field, found):
    """Return which of the `Detections` found in this field or another are no noise in this one.

    These have their highest filtered pixel above 5 sigma, which noise hardly reaches.
    """
    sky = random_pixels(~field.mask & (found.segmentation == 0))[:FIRST_PIXELS]
    if not len(sky):
        return np.ones(len(found.objects), bool)
    sigma = half_range(filter_sky(field, sky).significance)
    return peak_significance(field, found.objects) > WEAK * sigma


def measure_discs(field, blocked):
    """Return `areas`, `ratios` and `empty` of `Noise`, and the centres of the smallest discs.

    The discs are clear of `blocked` pixels (ny, nx). A ratio that isn't above 1 by 3 times its
    uncertainty is no larger than that of the disc before, so that those of white noise are 1.
    """

    def disc_sums(centres, radius, **keywords):
        y, x = np.divmod(centres, blocked.shape[1])
        return sep.sum_circle(field.residual, x, y, radius, subpix=1, **keywords)

    centres, unblocked = random_pixels(~field.mask), blocked.size - np.count_nonzero(blocked)
    flag = disc_sums(centres, RADII[0] + CLEARANCE, mask=blocked)[2]
    empty = np.mean((flag & sep.APER_HASMASKED) == 0)
    centres, sky, areas, ratios = centres[flag == 0], centres[:0], [1], [1.0]
    for radius in RADII:
        centres = centres[: int(DISC_PIXELS / (math.pi * radius * (radius + CLEARANCE)))]
        centres = centres[disc_sums(centres, radius + CLEARANCE, mask=blocked)[2] == 0]
        sums, errors, _ = disc_sums(centres, radius, err=field.noise)
        offsets = np.arange(-int(radius), int(radius) + 1)
        area = np.count_nonzero(np.hypot(offsets, offsets[:, np.newaxis]) <= radius)
        independent = min(len(centres), unblocked / area)
        if len(centres) < MIN_DISCS or independent < MIN_INDEPENDENT or not errors.all():
            break
        sky = sky if len(sky) else centres
        # 0.96 is for the half range of normal values. The noise map is known to some 1 %.
        uncertainty = math.hypot(0.96 / math.sqrt(independent), 0.01)
        ratio = max(half_range(sums / errors), 1.0)
        areas.append(area)
        ratios.append(ratio if ratio > 1 + 3 * uncertainty else min(ratio, ratios[-1]))
    return np.array(areas), np.array(ratios), empty, sky


def filter_sky(field, where):
    """Return pixels at flat indices `where`, as `filter_pixels` does, with masked ones as 0."""
    with replaced(field.residual, field.mask, 0):
        return filter_pixels(field, where, np.zeros_like(where))


def peak_significance(field, objects):
    """Return what is compared with `thresh` at the highest filtered pixel of each object."""
    where = objects["ycpeak"] * field.mask.shape[1] + objects["xcpeak"]
    return filter_sky(field, where).significance


class FalseSources(NamedTuple):
    """About how many of the sources are noise, nan if unknown, and a doubt about it, or ""."""

    number: float
    doubt: str


@timed("count false sources")
def count_false(field, found, strong, noise):
    """Return the `FalseSources` among the `Detections`: as many as the negative of the field has.

    These aren't deblended, and are counted only for the empty sky, as strong sources hide noise.
    If there are over twice as many as independent normal pixels would exceed the threshold, or as
    there are weak detections, noise doesn't explain them.
    """
    if math.isnan(noise.sigma):
        return FalseSources(math.nan, "there is too little empty sky, or no noise")
    count, weak = noise.empty * count_sources(field, -1), np.count_nonzero(~strong)
    sigmas = field.method.extraction.thresh / noise.sigma
    white = np.count_nonzero(~field.mask) * math.erfc(sigmas / math.sqrt(2)) / 2
    doubt = ""
    if count > 3 + 2 * min(white, weak):
        doubt = f"the negative of the image has {count:.0f}, more than uniform noise makes"
    elif abs(noise.skewness) > MAX_SKEWNESS:
        values = "bright" if noise.skewness > 0 else "dark"
        doubt = (
            f"the negative of the image has {count:.0f}, but the sky is skewed to {values} values"
        )
    return FalseSources(count if doubt else min(count, weak), doubt)


def count_sources(field, sign):
    """Return how many sources a field (`sign` 1) or its negative (-1) has, if none are deblended.

    In a large image they are counted in strips of rows, put together, and their number is scaled.
    """
    ny, nx = field.mask.shape
    rows = math.ceil(STRIP_PIXELS / nx)
    if ny >= 2 * STRIPS * rows:
        tops = np.linspace(0, ny, STRIPS, endpoint=False, dtype=int) + ny // STRIPS // 2
        field = field.rows(np.add.outer(tops, np.arange(rows)).ravel())
    field = replace(field.with_extraction(deblend_nthresh=1), residual=sign * field.residual)
    return len(find_sources(field).objects) * ny / len(field.mask)


def sigma_below(field):
    """Estimate the standard deviation of the filtered image, before its sources are known.

    It is taken below the median, without bright pixels, which are clipped.
    """
    values = filter_sky(field, random_pixels(~field.mask)[:FIRST_PIXELS]).significance
    for _ in range(6):
        low, middle = np.percentile(values, [16, 50])
        values = values[~(values > middle + 3 * (middle - low))]  # also nan, if there is no noise
    return float(middle - low)


def lowest_pure_level(field, sigma, empty, purity):
    """Return the lowest threshold (in `sigma`) with this purity, and how many sources it finds.

    Noise makes as many sources as the negative of the image has in the `empty` part of it. The
    logarithm of their number is close to a straight line in the square of the threshold, as for
    normal noise; a fit to all `LEVELS` is more stable than each count. Returns the highest level
    if none is pure enough. Sources aren't deblended.
    """
    fields = [field.with_extraction(thresh=level * sigma) for level in LEVELS]
    some, false = (np.array([count_sources(each, s) for each in fields]) + 0.5 for s in (1, -1))
    log_false = np.polynomial.Polynomial.fit(LEVELS**2, np.log(false), 1, w=np.sqrt(false))
    levels = np.linspace(LEVELS[0], LEVELS[-1], 191)
    counts = np.interp(levels, LEVELS, some)
    pure = empty * np.exp(log_false(levels**2)) <= (1 - purity) * counts
    best = np.argmax(pure) if pure.any() else -1
    return levels[best], counts[best]


@timed("choose threshold")
def choose_threshold(field, purity):
    """Return the field with the lowest threshold at which `purity` is the fraction of real sources.

    Also returns a line for the report. Raises InputError if the sky has no noise.
    """
    sigma = sigma_below(field)
    if not sigma > 0:
        if field.residual[~field.mask].any():
            raise InputError("the sky has no noise: give a number instead of --thresh auto")
        return field.with_extraction(thresh=ExtractionSettings.thresh), "auto          no noise"
    bright = field.with_extraction(thresh=4 * sigma, deblend_nthresh=1)
    found = find_sources(bright)
    noise = measure_noise(bright, found.segmentation, are_strong(bright, found))
    sigma = sigma if math.isnan(noise.sigma) else noise.sigma
    level, count = lowest_pure_level(field, sigma, noise.empty, purity)
    note = ""
    if math.isnan(noise.sigma):
        level, note = SAFE_LEVEL, f"; {SAFE_LEVEL} sigma, as there is too little empty sky"
    elif abs(noise.skewness) > VERY_SKEWED:
        level, note = max(level, SAFE_LEVEL), f"; at least {SAFE_LEVEL} sigma"
        log.warning("bright and dark noise differ much: check the threshold (--thresh)")
    elif count < FEW and level < SAFE_LEVEL:
        level, note = SAFE_LEVEL, f"; {SAFE_LEVEL} sigma, the least for fewer than {FEW} sources"
    elif level in LEVELS[[0, -1]]:
        note = (
            f"; {level:g} sigma, the {'lowest' if level < SAFE_LEVEL else 'highest'} that is tried"
        )
    if abs(noise.skewness) > MAX_SKEWNESS:
        note += "; bright and dark noise differ, so that the purity is uncertain"
    unit = field.threshold_scale()
    thresh = float(f"{level * sigma * unit:.4g}")
    line = f"auto          --thresh {thresh:g} for a purity of {purity:g}{note}"
    return field.with_extraction(thresh=thresh / unit), line


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------

# SExtractor's KRON_NSIG: limit, in units of (a, b), of the Kron radius and of the growth curve.
KRON_REACH = 6.0

# SExtractor's window for XWIN_IMAGE: its sigma per half-light radius, its limit in sigmas.
WINDOW_SIGMA, WINDOW_REACH = 2 / 2.35, 4.0

# A window moves during the fit, so that neighbours within 1.25 times its limit count. A centroid
# that moves by more than 0.5 sigmas is dropped: in simulations it ends further from the truth.
WINDOW_MARGIN, MAX_SHIFT = 1.25, 0.5

# The label of masked pixels while SEP measures, so that it leaves them out like neighbours (with
# `mask=` it would scale fluxes up for both). SEP compares labels as float32, which holds 2**30.
MASKED = 2**30

BATCH = 1000  # sources measured at a time
WINDOW_PIXELS = 500  # pixels of each window processed at a time


@timed("measure")
def measure(field, measure_field, found, settings, threads=1, noise=INDEPENDENT):
    """Measure background, sizes, Kron and aperture fluxes, and windowed centroids.

    Kron ellipses are those of the objects `found` in `field`; all else is measured in
    `measure_field`, without pixels of neighbours and masked ones, which are labelled in the
    segmentation map for the duration of this function. `noise` is the `Noise` of that field.

    Returns
    -------
    dict of ndarray
        By the name of the column, a value for each object: sizes in pixels, fluxes and levels in
        the frame of `measure_field`, nan where nothing can be measured.
    """
    objects, labels = found
    shapes, measurable = measurable_shapes(objects)
    ids = np.flatnonzero(measurable).astype(np.int32) + 1
    with replaced(labels, field.mask, MASKED):
        neighbours = {"segmap": labels, "seg_id": ids}
        r_k, kron_flag = sep.kron_radius(field.residual, *shapes, KRON_REACH, **neighbours)
    # Kron (1980), as in SExtractor. Limited to the range of real light: noise can give any r_k.
    kron = settings.kron_factor * np.clip(np.nan_to_num(r_k), 0, KRON_REACH)
    kron = np.maximum(kron, settings.kron_min_radius)
    jobs = [partial(background_at, measure_field, objects["x"], objects["y"])]
    for batch in slices(len(ids), BATCH):
        neighbours = {"segmap": labels, "seg_id": ids[batch]}
        ellipses = shapes[:, batch], kron[batch]
        jobs.append(partial(measure_batch, measure_field, *ellipses, neighbours, noise, settings))
    with replaced(labels, measure_field.mask, MASKED):
        measured, *parts = run_jobs(jobs, threads)
    parts, flags = zip(*parts, strict=True)
    flag = np.full(len(objects), sep.APER_ALLMASKED, np.int64)
    # The Kron radius is summed in a larger ellipse, whose edge and neighbours don't matter.
    flag[measurable] = np.concatenate(flags) | (kron_flag & ~(sep.APER_TRUNC | sep.APER_HASMASKED))
    measured["flag_auto"] = flag
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        measured[name] = np.full(len(objects), np.nan)
        measured[name][measurable] = np.where(kron_flag & sep.APER_ALLMASKED, np.nan, values)
    return measured


def background_at(field, x, y):
    """Return level and RMS of the background at the pixels nearest to (x, y), as named columns."""
    x, y = (np.rint(np.nan_to_num(place)) for place in (x, y))
    nearest = pixels_at(y, x, field.mask.shape)[1].astype(int)
    maps = {"background": field.background.back, "rms": field.background.rms}
    return {name: make().take(nearest).astype(float) for name, make in maps.items()}


def scale_position_errors(found, noise, gain):
    """Return the `Detections` with errors of (x, y) for this `Noise` of the sky.

    The variance by the source's own photons, x2 / (gain cflux) in x, is not scaled.
    """
    objects, extra = found.objects.copy(), noise.ratio(found.objects["npix"]) ** 2 - 1
    photons = (objects["x2"] + objects["y2"]) / (objects["cflux"] * (gain or np.inf))
    total = objects["errx2"] + objects["erry2"]
    # A mask may have cut cflux, so that the photons seem to make more than the total.
    sky = np.maximum(total - photons, 0) / np.where(total > 0, total, 1)
    for name in ("errx2", "erry2", "errxy"):
        objects[name] *= 1 + extra * sky
    return found._replace(objects=objects)


def measurable_shapes(objects):
    """Return x, y, a, b, theta (5, n) of the n objects that SEP can measure, and a mask of these.

    SEP refuses a whole call for one shape that isn't finite, or for a theta that is slightly above
    pi/2, which its own float32 angles may be.
    """
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    theta = np.mod(theta + np.pi / 2, np.pi) - np.pi / 2
    shapes = np.array([x, y, np.maximum(a, b), np.minimum(a, b), theta])
    measurable = np.isfinite(shapes).all(axis=0) & (shapes[3] > 0)
    return shapes[:, measurable], measurable


def measure_batch(field, shapes, kron, neighbours, noise, settings):
    """Return the measurements of some objects, as named columns, and their flags; see `measure`.

    `shapes` are those of `measurable_shapes`. `neighbours` are SEP's keywords `segmap`, in which
    masked pixels are labelled as well, and `seg_id`, the labels of these objects.
    """
    x, y, a, b, _ = shapes
    # Like SExtractor, AUTO sums whole pixels whose centres are in the ellipse.
    ellipse = {"r": kron, "subpix": 1, **neighbours}
    sums = partial(aperture_sums, field, noise)
    flux, error, flag = sums(sep.sum_ellipse, math.pi * a * b * kron**2, *shapes, **ellipse)
    growth = {"frac": 0.5, "normflux": flux, "subpix": 5, **neighbours}
    radius, _ = sep.flux_radius(field.residual, x, y, KRON_REACH * a, **growth)
    radius[~((flux > 0) & (radius < KRON_REACH * a))] = np.nan
    sigma = WINDOW_SIGMA * np.maximum(radius, 0.5)
    xwin, ywin = windowed_centroids(field, x, y, sigma, neighbours)
    measured = windowed_errors(field, noise, xwin, ywin, sigma, neighbours)
    measured |= {"flux_auto": flux, "fluxerr_auto": error, "kron_radius": kron}
    measured |= {"flux_radius": radius, "xwin": xwin, "ywin": ywin}
    for diameter in settings.aperture_diameters:
        circle = {"r": diameter / 2, "subpix": 0, **neighbours}  # 0: exact overlap
        flux, error, _ = sums(sep.sum_circle, math.pi * diameter**2 / 4, x, y, **circle)
        measured |= {f"flux_{aperture(diameter)}": flux, f"fluxerr_{aperture(diameter)}": error}
    return measured, flag


def aperture_sums(field, noise, sum_in, area, *shapes, **keywords):
    """Return the fluxes, their errors and flags from an aperture function `sum_in` of SEP.

    `area` (pixels) is that of the apertures, for the part of the sky in their errors. Fluxes and
    errors are nan if no pixel was summed.
    """
    flux, error, flag = sum_in(field.residual, *shapes, err=field.noise, **keywords)
    empty = (error == 0) & np.any(field.noise)
    photons = np.maximum(flux, 0) / (field.method.extraction.gain or np.inf)
    error = np.sqrt((noise.ratio(area) * error) ** 2 + photons)
    flux[empty], error[empty] = np.nan, np.nan
    flag[empty] |= sep.APER_ALLMASKED
    return flux, error, flag


def windowed_centroids(field, x, y, sigma, neighbours):
    """Return the centroids (2, n) in Gaussian windows about (x, y), nan where `sigma` is nan.

    SExtractor's XWIN_IMAGE and YWIN_IMAGE, with `subpix` 0, the exact overlap of pixels and window.
    `sep.winpos` would move to a bright neighbour, so that sources with a neighbour in reach are
    measured on a cutout without it. `neighbours` as in `measure_batch`.
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    reach = WINDOW_MARGIN * WINDOW_REACH * np.nan_to_num(sigma) + 2
    _, _, flag = sep.sum_circle(image, x, y, reach, subpix=1, **neighbours)
    crowded, sized = (flag & sep.APER_HASMASKED) > 0, np.isfinite(sigma)
    isolated, centroids = sized & ~crowded, np.full((2, len(sigma)), np.nan)
    position = x[isolated], y[isolated], sigma[isolated]
    centroids[:, isolated] = sep.winpos(image, *position, subpix=0)[:2]
    for i in np.flatnonzero(sized & crowded):
        cutout, left, bottom = cutout_without_neighbours(
            image, labels, ids[i], x[i], y[i], reach[i]
        )
        at_x, at_y, _ = sep.winpos(cutout, [x[i] - left], [y[i] - bottom], [sigma[i]], subpix=0)
        centroids[:, i] = at_x[0] + left, at_y[0] + bottom
    centroids[:, np.hypot(centroids[0] - x, centroids[1] - y) > MAX_SHIFT * sigma] = np.nan
    return centroids


def cutout_without_neighbours(image, labels, label, x, y, reach):
    """Cut out a source and replace foreign pixels, as SExtractor's MASK_TYPE CORRECT does.

    A foreign pixel gets the value opposite to it about (x, y), or 0 if that is foreign as well.
    Returns the cutout and the column and the row of its first pixel in the image.
    """
    ny, nx = image.shape
    left = math.ceil(x - min(reach, max(x, nx - 1 - x)))
    bottom = math.ceil(y - min(reach, max(y, ny - 1 - y)))
    # The last pixel is opposite to the first one, so that flipping both axes swaps opposite pixels.
    rows = np.arange(bottom, round(2 * y) - bottom + 1)[:, np.newaxis]
    columns = np.arange(left, round(2 * x) - left + 1)
    inside, at = pixels_at(rows, columns, image.shape)
    cutout, owner = (np.where(inside, plane.take(at), 0) for plane in (image, labels))
    foreign = (owner != 0) & (owner != label)
    opposite = np.where(foreign[::-1, ::-1], 0, cutout[::-1, ::-1])
    return np.where(foreign, opposite, cutout), left, bottom


def pixels_at(rows, columns, shape):
    """Return whether pixels are inside an image (ny, nx), and the flat indices of the nearest."""
    y, x = np.clip(rows, 0, shape[0] - 1), np.clip(columns, 0, shape[1] - 1)
    return (y == rows) & (x == columns), y * shape[1] + x


@np.errstate(over="ignore", invalid="ignore")
def windowed_errors(field, noise, xwin, ywin, sigma, neighbours):
    """Return the error ellipses of windowed centroids, as named columns; nan where these are nan.

    SExtractor's ERRAWIN_IMAGE, ERRBWIN_IMAGE (pixels) and ERRTHETAWIN_IMAGE (here in radians), from
    pixels of the source and the sky only. Parameters else as in `windowed_centroids`.
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    # The noise of a window is that of a disc of 1.3 sigmas.
    scale = noise.ratio(math.pi * (1.3 * sigma) ** 2)
    pixel_noise, gain = field.noise, field.method.extraction.gain or np.inf
    known, sums = np.isfinite(xwin), np.full((4, len(xwin)), np.nan)
    halves = np.ceil(np.minimum(WINDOW_REACH * sigma, max(image.shape)))
    # Windows of the same size are processed together, some rows at a time to save memory.
    for half in np.unique(halves[known]).astype(int):
        same_size, offsets = known & (halves == half), np.arange(-half, half + 1)
        windows = xwin, ywin, sigma, scale, ids
        x, y, s, factor, own_id = (values[same_size, None, None] for values in windows)
        columns, total = np.rint(x).astype(int) + offsets, 0
        for part in row_slices((len(offsets), len(offsets)), WINDOW_PIXELS):
            rows = np.rint(y).astype(int) + offsets[part, None]
            inside, at = pixels_at(rows, columns, image.shape)
            dx, dy = columns - x, rows - y
            r2 = (dx**2 + dy**2) / s**2
            owner = labels.take(at)
            own = inside & (r2 < WINDOW_REACH**2) & ((owner == own_id) | (owner == 0))
            weight = np.where(own, np.exp(-r2 / 2), 0)
            flux = weight * np.where(own, image.take(at), 0)
            rms = pixel_noise.take(at) if np.ndim(pixel_noise) else pixel_noise
            rms = weight * np.where(own, rms * factor, 0)
            variance = rms**2 + weight * np.maximum(flux, 0) / gain
            terms = flux, variance * dx**2, variance * dy**2, variance * dx * dy
            total += np.array([term.sum(axis=(1, 2)) for term in terms])
        sums[:, same_size] = total
    xx, yy, xy = 4 * sums[1:] / np.where(sums[0] > 0, sums[0], np.nan) ** 2
    major, minor, angle = ellipse_axes(xx, yy, xy)
    return {"errawin": major, "errbwin": minor, "errthetawin": angle}


def ellipse_axes(xx, yy, xy):
    """Return major and minor semi-axis and angle of an ellipse from its variances, covariance."""
    mean, half_gap = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = np.sqrt([mean + half_gap, np.maximum(mean - half_gap, 0)])
    return major, minor, np.arctan2(2 * xy, xx - yy) / 2


# ---------------------------------------------------------------------------------------------
# Catalogue
# ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the catalogue."""

    name: str
    unit: str | None  # "image", "measure" and their "... sum" are placeholders; see `name_units`
    ucd: str  # Unified Content Descriptor (IVOA)
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
    Column("detection_snr", None, "stat.snr", "highest filtered pixel over its noise"),
    Column("thresh", "image", "phot.flux;stat.min", "detection threshold at the object"),
    Column("tnpix", "pixel", "meta.number;instr.pixel", "unfiltered pixels above the threshold"),
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
    Column("errawin", "pixel", "stat.error;pos.cartesian", "RMS error of xwin, ywin, major axis"),
    Column("errbwin", "pixel", "stat.error;pos.cartesian", "RMS error of xwin, ywin, minor axis"),
    Column("errthetawin", "rad", "stat.error;pos.posAng", "angle of the major axis of that error"),
)


def catalog_columns(diameters):
    """Return all columns of the catalogue, including those of circular apertures (pixels)."""
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
    """Return the columns with the units of the two images in place of the placeholders."""
    units = {"image": image_unit, "measure": measure_unit}
    units |= {f"{name} sum": unit_of_sums(unit) for name, unit in units.items()}
    return tuple(column._replace(unit=units.get(column.unit, column.unit)) for column in columns)


def unit_of_sums(text):
    """Return the unit of a sum of pixels: times pixel if a pixel's is per pixel, beam or sr."""
    if text is None or re.search(r"\d{3}", text):  # astropy may take forever for large powers
        return text
    try:
        with warnings.catch_warnings(action="ignore"):
            # Spellings of AIPS and CASA.
            unit = u.Unit(re.sub("(?i)jy/beam", "Jy/beam", text).replace("/beam.", " beam-1 "))
        parts = unit.decompose()
        powers = zip(parts.bases, parts.powers, strict=True)
    except (ValueError, AttributeError):
        return text
    if not {(u.rad, -2), (u.beam, -1), (u.pix, -1)} & set(powers):
        return text
    with suppress(ValueError):  # not every unit has a name in FITS
        return (unit * u.pix).to_string("fits")
    return (unit * u.pix).to_string()


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def build_catalog(columns, found, measured, noise, field, measure_field, wcs, settings):
    """Return the catalogue as a DataFrame with these columns and a row for each object.

    `found`, `measured` and `noise` are what `find_sources`, `measure` and `measure_noise` return.
    Their fluxes and levels are converted here, by the placeholders of their units, from the frames
    of the two fields to image values. Without a WCS, ra and dec are nan.
    """
    from pandas import DataFrame

    objects = found.objects
    table = {name: objects[name] for name in objects.dtype.names} | measured
    table["id"] = np.arange(1, len(objects) + 1)
    table["detection_snr"] = peak_significance(field, objects) / noise.sigma
    frames = {"image": field.frame, "measure": measure_field.frame}
    for column in columns:
        frame = frames.get((column.unit or "").split(" ")[0])
        if frame and column.name in table:
            convert = frame.levels if column.name == "background" else frame.differences
            table[column.name] = convert(table[column.name])
    table["ra"], table["dec"] = sky_positions(wcs, objects["x"], objects["y"])
    table["elongation"] = objects["a"] / objects["b"]
    # The FWHM of a round Gaussian is sqrt(8 ln 2) times its RMS, here sqrt((a² + b²) / 2).
    table["fwhm"] = 2 * np.sqrt(math.log(2) * (objects["a"] ** 2 + objects["b"] ** 2))
    error = table["fluxerr_auto"]
    table["snr"] = table["flux_auto"] / np.where(error > 0, error, np.nan)
    for kind in ("auto", *map(aperture, settings.aperture_diameters)):
        flux = np.where(table[f"flux_{kind}"] > 0, table[f"flux_{kind}"], np.nan)
        table[f"mag_{kind}"] = settings.zeropoint - 2.5 * np.log10(flux)
        table[f"magerr_{kind}"] = 2.5 / math.log(10) * table[f"fluxerr_{kind}"] / flux
    return DataFrame({column.name: table[column.name] for column in columns})


def sky_positions(wcs, x, y):
    """Return right ascension and declination (degrees, ICRS) of 0-based pixels, nan if unknown."""
    if wcs is not None and len(x):
        try:
            if wcs.wcs.lngtyp not in ("RA", "GLON"):
                raise ValueError(f"{wcs.wcs.lngtyp} is neither RA nor GLON")
            with warnings.catch_warnings(action="ignore"):
                sky = wcs.pixel_to_world(x, y).icrs
            return sky.ra.deg, sky.dec.deg
        except Exception as error:  # wcslib and astropy raise many kinds of exceptions
            log.warning("the WCS gives no sky positions: ra and dec are nan (%s)", one_line(error))
    return np.full((2, len(x)), np.nan)


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Everything that the products are made from."""

    origin: Origin
    field: Field
    found: Detections
    catalog: "DataFrame"
    columns: tuple[Column, ...]  # of the catalogue, with their units
    false: FalseSources
    seeds: np.ndarray | None  # see `seed_map`, if they are a product
    warning: str  # the most important one, for the picture
    settings: list[str]  # lines for the history of the products
    image_format: str | None  # "fits", "tiff", or None to go by the file extension


def seed_map(labels):
    """Return a map (ny, nx) that is 255 at a seed for each label, else 0, as uint8.

    Each seed is 4-connected, and no two of them touch, not even diagonally. Of each label the
    largest connected part is taken. Where two of these touch, the larger gives up its pixels that
    touch the other; if it has no others, it has no seed.
    """
    labels = largest_parts(labels)
    areas = np.bincount(labels[labels > 0])
    rank = np.argsort(np.argsort(areas, kind="stable"))
    seeds, (ny, nx) = labels.copy(), labels.shape
    for dx, dy in (1, 0), (0, 1), (1, 1), (-1, 1):
        one = np.s_[: ny - dy, max(-dx, 0) : nx - max(dx, 0)]
        other = np.s_[dy:, max(dx, 0) : nx + min(dx, 0)]
        a, b = labels[one], labels[other]
        touching = np.nonzero((a != b) & (a > 0) & (b > 0))
        larger = rank[a[touching]] > rank[b[touching]]
        seeds[one][touching] *= ~larger  # slices are views: this changes `seeds` itself
        seeds[other][touching] *= larger
    return np.where(largest_parts(seeds), 255, 0).astype(np.uint8)


def largest_parts(labels):
    """Return a map of labels (ny, nx) with the largest 4-connected part of each, else 0."""
    padded = np.pad(labels, ((0, 0), (0, 1)))  # so that no row continues in the next one
    # Runs of equal labels, also 0, in a row; run 0 has no pixels if the first one has a label.
    starts = np.diff(padded.ravel(), prepend=0) != 0
    run = starts.cumsum(dtype=np.int32).reshape(padded.shape)
    label = np.zeros(run[-1, -1] + 1, labels.dtype)
    label[run] = padded
    linked = (padded[:-1] == padded[1:]) & (padded[1:] > 0)
    above, below = run[:-1][linked], run[1:][linked]
    part = np.arange(len(label))  # of each run; in the end, the lowest number of its runs
    while (part[above] != part[below]).any():
        low, high = np.minimum(part[above], part[below]), np.maximum(part[above], part[below])
        np.minimum.at(part, high, low)
        while (part[part] != part).any():
            part = part[part]
    lengths = np.diff(np.flatnonzero(starts), prepend=0, append=starts.size)
    by_area = np.argsort(-np.bincount(part, lengths), kind="stable")
    _, largest = np.unique(label[by_area], return_index=True)  # where each label comes first
    return np.where(np.isin(part, by_area[largest])[run], padded, 0)[:, :-1]


def write_image(product, path, result):
    """Write an image product; floats are float32 unless the image is float64.

    FITS gets the WCS and the unit. TIFF gets neither, and stores labels in the smallest unsigned
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
        case "seeds":
            values = result.seeds
    if values.dtype == np.float64 and result.origin.dtype != "float64":
        values = values.astype(np.float32)
    history = [f"{SIGNATURE}: {product}", *result.settings]
    wcs, unit = result.origin.wcs, result.origin.unit
    image_format = None if product == "seeds" else result.image_format
    if (image_format or path.suffix.lower()) in ("tiff", ".tiff", ".tif"):
        import tifffile

        if product == "segmentation":
            values = values.astype(np.min_scalar_type(values.max()))
        tifffile.imwrite(path, values, description="\n".join(history), metadata=None)
        return
    with warnings.catch_warnings(action="ignore"):  # of cards that the standard renames
        hdus = wcs.to_fits(relax=True) if wcs else fits.HDUList([fits.PrimaryHDU()])
        # astropy swaps bytes in place, which must not happen to arrays that other products use.
        shared = product in ("segmentation", "subtracted")
        hdus[0].data = values.copy() if shared else values
        if unit and product not in ("segmentation", "seeds"):
            hdus[0].header["BUNIT"] = unit
        for line in history:
            hdus[0].header.add_history(line)
        hdus.verify("exception")
    write_hdus(hdus, path)


def write_hdus(hdus, path):
    """Write a FITS file; if it ends in .gz by gzip, without name and time, to be reproducible."""
    if path.suffix != ".gz":
        hdus.writeto(path, overwrite=True)
        return
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
        hdus.writeto(stream)


def write_catalog(path, result):
    """Write the catalogue as tab-separated text with a line of column names.

    Floats have ten significant digits; ra and dec have twelve, for micro-arcseconds.
    """
    text = result.catalog.copy()
    for name in text.select_dtypes("float"):
        form = "{:.12g}" if name in ("ra", "dec") else "{:.10g}"
        text[name] = [form.format(value) for value in text[name].tolist()]
    text.to_csv(path, sep="\t", index=False, lineterminator="\n")


def write_catalog_fits(path, result):
    """Write the catalogue as a FITS binary table with units, descriptions and UCDs."""
    table = fits.BinTableHDU(result.catalog.to_records(index=False))
    for number, column in enumerate(result.columns, start=1):
        cards = {"TUNIT": column.unit, "TCOMM": column.description, "TUCD": column.ucd}
        table.header.update({f"{key}{number}": text for key, text in cards.items() if text})
    for line in (f"{SIGNATURE}: catalog_fits", *result.settings):
        table.header.add_history(line)
    write_hdus(fits.HDUList([fits.PrimaryHDU(), table]), path)


def write_regions(path, result):
    """Write a DS9 region file: ellipses of semi-axes 3a and 3b, labelled with the id.

    Coordinates are ICRS if the catalogue has these, else DS9's 1-based pixels. In ICRS, DS9 counts
    the angle from west through north. The axes of an ellipse on the sky are computed on the sky, as
    they differ from those in the image if pixels are not square.
    """
    names = ("x", "y", "a", "b", "theta", "id")
    x, y, a, b, theta, labels = (result.catalog[name].to_numpy() for name in names)
    a, b, dx, dy = 3 * a, 3 * b, np.cos(theta), np.sin(theta)
    if np.isfinite(result.catalog["ra"]).any():
        system, form = "icrs", 'ellipse({:.15g},{:.15g},{:.9g}",{:.9g}",{:.9g})'
        ends = (x, y), (x + a * dx, y + a * dy), (x - b * dy, y + b * dx)
        with warnings.catch_warnings(action="ignore"):
            centre, *ends = (result.origin.wcs.pixel_to_world(*end).icrs for end in ends)
        lengths = np.array([centre.separation(end).arcsec for end in ends])
        angles = np.array([centre.position_angle(end).rad for end in ends])
        east, north = lengths * np.sin(angles), lengths * np.cos(angles)  # of both ends
        products = (east, east), (north, north), (east, north)
        *axes, angle = ellipse_axes(*((p * q).sum(axis=0) for p, q in products))
        shapes = centre.ra.deg, centre.dec.deg, *axes, -np.degrees(angle) % 180
    else:
        system, form = "image", "ellipse({:.9g},{:.9g},{:.9g},{:.9g},{:.9g})"
        shapes = x + 1, y + 1, a, b, np.degrees(theta)
    lines = ["# Region file format: DS9 version 4.1", "global color=red", system]
    lines += [
        f"{form.format(*shape)} # text={{{label}}}"
        for label, *shape in zip(labels, *shapes, strict=True)
        if np.isfinite(shape).all()
    ]
    path.write_text("\n".join([*lines, ""]))


PICTURE_SIDE = 1000  # pixels; larger images are averaged in blocks before they are drawn


@contextmanager
def figure_at(path, font_size=10, **keywords):
    """Yield a figure in matplotlib's default style, whatever the user's settings; then write it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.size"] = font_size
        figure = Figure(**keywords)
        yield figure
        # Higher levels take longer and make the file hardly smaller.
        figure.savefig(path, format="png", pil_kwargs={"compress_level": 1})


def block_edges(shape):
    """Return first rows and first columns of the blocks of an image, each a pixel of a picture."""
    step = math.ceil(max(shape) / PICTURE_SIDE)
    return np.arange(0, shape[0], step), np.arange(0, shape[1], step)


@np.errstate(invalid="ignore")  # 0 / 0
def block_means(image):
    """Return the mean of the finite pixels of each block of an image, nan if there are none."""
    (tops, lefts), means = block_edges(image.shape), []
    for strip in np.split(image, tops[1:]):
        finite = np.isfinite(strip)
        if not finite.all():
            strip = np.where(finite, strip, 0)
        sums = strip.sum(axis=0, dtype=np.float64), finite.sum(axis=0)
        means.append(np.divide(*np.add.reduceat(sums, lefts, axis=1)))
    return np.array(means)


def panel_size(shape):
    """Return width and height (inches) of the panel for an image of this shape (ny, nx)."""
    height, width = (8 * max(length / max(shape), 0.2) for length in shape)
    return width, height


def show_image(axes, picture, shape, **style):
    """Show the block means of an image of this shape, row 0 at the bottom, axes in pixels."""
    axes.set(xlabel="x (pixel)", ylabel="y (pixel)")
    extent = (-0.5, shape[1] - 0.5, -0.5, shape[0] - 0.5)
    return axes.imshow(picture, origin="lower", extent=extent, interpolation="nearest", **style)


def show_sources(axes, result, room=0):
    """Show the background-subtracted image in grey, with a red ellipse (3a, 3b) for each source.

    Masked and interpolated pixels are tinted blue. `room` (inches) is left free below the title.
    Returns the grey scale.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import EllipseCollection
    from matplotlib.colors import LinearSegmentedColormap

    field, objects = result.field, result.found.objects
    picture = field.frame.differences(block_means(field.residual))
    masked = block_means(field.excluded)
    least_masked = masked <= np.median(masked[masked < 1])
    greys = ScalarMappable(stretch(picture[least_masked]), "gray")
    show_image(axes, greys.to_rgba(picture, bytes=True), field.mask.shape)
    title = f"{len(objects)} source{'s' if len(objects) != 1 else ''}"
    if result.false.number >= 0.5 and not result.false.doubt:
        title += f", about {result.false.number:.0f} of them noise"
    if masked.any():
        title += "\nmasked pixels in blue"
        # The opacity is proportional to the masked part of a block.
        tint = LinearSegmentedColormap.from_list("tint", [(0.1, 0.3, 1, 0), (0.1, 0.3, 1, 0.5)])
        show_image(axes, tint(masked, bytes=True), field.mask.shape)
    axes.set_title(title, loc="left", y=1, pad=6 + 72 * room)
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    place = {"units": "xy", "offsets": np.column_stack([x, y]), "offset_transform": axes.transData}
    style = {"facecolors": "none", "edgecolors": "red", "linewidths": 0.8}
    ellipses = EllipseCollection(6 * a, 6 * b, np.degrees(theta), **place, **style)
    axes.add_collection(ellipses, autolim=False)
    return greys


def stretch(values):
    """Return a grey scale that shows faint sky and bright cores together.

    It is linear within the noise and logarithmic far above it (Lupton, Gunn & Szalay 1999).
    """
    from matplotlib.colors import AsinhNorm

    low, middle, top = np.percentile(values, [16, 50, 100])
    noise = middle - low or (top - middle) / 1000 or 1.0
    return AsinhNorm(noise / 2, middle - 3 * noise, max(top, middle + 3 * noise))


def draw_overlay(path, result):
    """Draw the picture of the sources (PNG), with the most important warning below its title."""
    width, height = panel_size(result.field.mask.shape)
    whole = max(width + 1, 4.2)  # wide enough for the title
    text = result.warning.encode(errors="backslashreplace").decode()  # for names of files
    # 12 letters to the inch; options stay whole.
    warning = textwrap.wrap(text, int(12 * (whole - 1)), break_on_hyphens=False)
    room = 0.18 * len(warning)  # inches
    size = whole, height + 1.1 + room
    place = np.divide([0.8, 0.6, width, height], [*size, *size])
    with figure_at(path, figsize=size, dpi=120) as figure:
        axes = figure.add_axes(place, anchor="W")
        show_sources(axes, result, room)
        at = {"xycoords": "axes fraction", "xytext": (0, 4), "textcoords": "offset points"}
        style = {"color": "red", "linespacing": 1.25, "parse_math": False}
        axes.annotate("\n".join(warning), (0, 1), **at, **style)


def draw_overview(path, result):
    """Draw four panels with colour bars: sources, background, RMS, segmentation (PNG)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import AsinhLocator

    field, (objects, labels) = result.field, result.found
    width, height = panel_size(labels.shape)
    whole = 2 * width + 5, 2 * height + 3
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(objects) + 1, 3))
    colours[0] = 0
    in_colours = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": len(objects)}
    tops, lefts = block_edges(labels.shape)
    largest = np.maximum.reduceat(np.maximum.reduceat(labels, tops), lefts, axis=1)
    # Large letters, as the picture is mostly shown at half its size.
    with figure_at(path, font_size=22, figsize=whole, dpi=75, layout="compressed") as figure:
        panels = figure.subplots(2, 2).ravel()
        greys = show_sources(panels[0], result)
        few = AsinhLocator(greys.norm.linear_width, numticks=5)
        figure.colorbar(greys, ax=panels[0], ticks=few)
        for axes, title, picture, style in (
            (panels[1], "background", block_means(field.level_map()), {}),
            (panels[2], "background RMS", block_means(field.rms_map()), {}),
            (panels[3], "segmentation", largest, in_colours),
        ):
            figure.colorbar(show_image(axes, picture, labels.shape, **style), ax=axes)
            axes.set_title(title, loc="left")


class Product(NamedTuple):
    """A product, with the function that writes it."""

    default: str  # file name, {} is the extension of an image; "" if only written on request
    text: str  # for --help
    write: Callable[[Path, Result], None]


PRODUCTS = {
    "background": Product("background{}", "background level", partial(write_image, "background")),
    "rms": Product("rms{}", "noise of the background", partial(write_image, "rms")),
    "segmentation": Product("segmentation{}", "label map", partial(write_image, "segmentation")),
    "overlay": Product("sources.png", "PNG of the sources as ellipses", draw_overlay),
    "catalog": Product("catalog.tsv", "catalogue", write_catalog),
    "subtracted": Product("", "background-subtracted image", partial(write_image, "subtracted")),
    "seeds": Product("", "white seeds of the sources on black", partial(write_image, "seeds")),
    "catalog_fits": Product("", "catalogue as FITS table with units", write_catalog_fits),
    "regions": Product("", "DS9 region file", write_regions),
    "overview": Product("", "PNG: sources, background, RMS, segmentation", draw_overview),
}


def write_products(paths, targets, result, threads):
    """Write each product to its path, in up to this many processes; errors name the target."""

    def write(name):
        with timed(f"write {name}"), writing(targets[name]):
            PRODUCTS[name].write(paths[name], result)

    names = sorted(paths, key=lambda name: targets[name].suffix != ".png")  # longest jobs first
    list(run_jobs([partial(write, name) for name in names], threads))


@contextmanager
def writing(target):
    """Turn an error of the file system into an `InputError` about the target."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        text = f"can't be written ({reason}); free some space or choose another directory"
        raise InputError(f"{target}: {text}") from error


def ignore_signals():
    """Ignore the signals that end a run from now on."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def handling_signals(handler):
    """Handle the signals that end a run, except those that are ignored, as under nohup."""
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    for signum, before in handlers.items():
        signal.signal(signum, signal.SIG_IGN if before == signal.SIG_IGN else handler)
    try:
        yield
    finally:
        for signum, before in handlers.items():
            signal.signal(signum, before)


@contextmanager
def staged(targets):
    """Yield temporary paths, by the name of the product; at the end, move all files to `targets`.

    The paths are in hidden directories next to the targets, which only the user may enter. If
    anything fails, or a signal ends the run, they are removed, and no product has changed. Raises
    InputError at once if a target can't be written.
    """
    paths, hidden, owner = {}, {}, os.getpid()

    def stop(signum, _):
        if os.getpid() != owner:  # worker processes inherit this handler
            os._exit(128 + signum)
        ignore_signals()
        sys.exit(128 + signum)

    with handling_signals(stop), ExitStack() as stack:
        for name, target in targets.items():
            place = target.parent
            with writing(target):
                place.mkdir(parents=True, exist_ok=True)
                if place not in hidden:
                    directory = tempfile.TemporaryDirectory(
                        prefix=".source_extractor-", dir=place, ignore_cleanup_errors=True
                    )
                    hidden[place] = Path(stack.enter_context(directory))
                paths[name] = hidden[place] / f"new_{target.name}"
                paths[name].touch()
        stack.callback(ignore_signals)  # if the run fails, before the directories are removed
        yield paths
        ignore_signals()
        move_into_place(paths, targets)


def move_into_place(paths, targets):
    """Move all products to their targets, after setting old files aside; undo all if one fails.

    A product gets the permissions of the file that it replaces.
    """
    with ExitStack() as undo:
        for name, new in paths.items():
            target, old = targets[name], new.with_name(f"old_{name}")
            with writing(target):
                if target.is_file() and not target.is_symlink():
                    shutil.copymode(target, new)
                if os.path.lexists(target) and not target.is_dir():
                    target.replace(old)
                    undo.callback(old.replace, target)
                new.replace(target)
                undo.callback(target.unlink)
        undo.pop_all()


# ---------------------------------------------------------------------------------------------
# Advice
# ---------------------------------------------------------------------------------------------
# Each `..._advice` returns one line about a likely mistake, or None.

# Levels of warnings, besides logging.WARNING; the picture shows one of the highest level.
DATA_WARNING, BACKGROUND_WARNING = 32, 31  # on hidden or spoiled data, and on the background


def padding_value(pixels, mask):
    """Return the value of padding at the border of an image (ny, nx), nan if there is none.

    It is the most common value of the border, if more than 2 % of the blocks of 32 x 32 pixels hold
    nothing else, and more than half of the other blocks hold it in less than a tenth of their
    pixels. If many pixels are only a little higher, it is a clipped background instead.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border[np.isfinite(border)], return_counts=True)
    if counts.max(initial=0) < 32:
        return math.nan
    value, blocks = values[counts.argmax()], BackgroundSettings(bw=32, bh=32)
    same = (pixels == value) & ~mask
    inside, good = box_sums(blocks, same), box_sums(blocks, ~mask)
    padded, rare = (inside > 0) & (inside == good), 10 * inside < good
    scattered = 2 * rare.sum() <= (inside < good).sum()
    if padded.mean() <= 0.02 or scattered:
        return math.nan
    lowest, faint, middle = np.percentile(sample(pixels, mask | same), [0, 5, 50]) - value
    clipped = lowest > 0 and 2 * faint < middle
    return math.nan if clipped else value


def padding_advice(origin, padding, values):
    """Warn of a value that is likely padding (nan: none); `values` is a sample of the image."""
    if math.isnan(padding):
        return None
    stored = str(padding if origin.black is None else origin.black - padding)
    if number_of(origin.header, "BSOFTEN") > 0:
        stored = "the value in the file"
    part = 100 * np.mean(values == padding)
    return (
        f"{part:.0f} % of the pixels are exactly {stored}: if that is padding, use --blank {stored}"
    )


def depth_advice(field, noise):
    """Warn of a matched filter that detects fainter sources than the threshold suggests."""
    depth, thresh = field.depth(), field.method.extraction.thresh
    if depth == 1 or thresh > 3.5 * noise.sigma:
        return None
    return (
        f"with noise for each pixel the matched filter goes {depth:.2f} times deeper: --thresh "
        f"{thresh:g} is like {thresh / depth:.3g} with the global RMS; for the depth of {thresh:g} "
        f"there, use --thresh {thresh * depth:.3g}, or --filter-type conv"
    )


@np.errstate(over="ignore")
def counts_advice(field, values):
    """Warn if more than 40 % of the pixels have the same value, so that the noise is not measured.

    `values` is a sample of the image. If the most common value has others on both sides (rounded
    data), the noise is still measured well. If it is the lowest, the image has few photons or a
    clipped background.
    """
    levels, numbers = np.unique(values, return_counts=True)
    if not field.method.estimates_noise() or len(levels) < 2:
        return None
    part, level = numbers.max() / len(values), levels[numbers.argmax()]
    low, high = np.percentile(values, [1, 99], method="nearest")
    if part <= 0.4 or (low < level < high and digital_step(values)):
        return None
    # A peak of noise exceeds the advised threshold with a probability of exp(-14) (Bernstein's
    # inequality for Poisson counts within the area of the filter); the part of zeros is exp(-rate).
    rate, fwhm, log_odds = -math.log(part), 4, 14
    area = math.pi / math.log(4) * fwhm**2
    excess = math.sqrt(2 * rate * area * log_odds) + log_odds / 3
    thresh = level + np.diff(levels).min() * (rate + excess / area) - field.level()
    if not math.isfinite(thresh):
        return None
    text = (
        f"{100 * part:.0f} % of the pixels have the value {level:g}, so the noise is unknown: mask "
        "them if they hold no data"
    )
    if thresh <= 0:  # the background is not these pixels
        return text
    return (
        f"{text}; else use an absolute threshold (--err-option none --thresh {thresh:.3g}) and "
        f"smooth more (--filter-case gaussian --filter-fwhm {fwhm})"
    )


def mask_advice(field):
    """Warn if more than 5 % of the pixels are masked and this at least doubles the noise."""
    few = np.count_nonzero(field.mask) <= 0.05 * field.mask.size
    if few or not field.method.estimates_noise():
        return None
    hidden = field.mask & ~too_large(field.residual)
    if hidden.mean() <= 0.05:
        return None
    settings, rms = field.method.background, global_rms(field.background)
    whole = global_rms(estimate_background(field.residual, field.mask ^ hidden, settings))
    if not 0 < 2 * whole <= rms:
        return None
    return (
        f"the mask makes the noise {rms / whole:.1f} times that of the whole image: does it hide "
        "empty sky, or was it made for another image?"
    )


def boxes_advice(field, found):
    """Warn of sources larger than half a background box, if there is only a single pass.

    Sources with a mean of less than 6 times the noise are ignored. They may be background that
    varies within a box, for which larger boxes would be wrong.
    """
    objects, longest = found.objects, max(field.mask.shape)
    settings = field.method.background.limited_to(field.mask.shape)
    widest = max(settings.bw, settings.bh)
    large = objects[objects["npix"] > settings.bw * settings.bh / 2]
    large = large[large["flux"] > 6 * global_rms(field.background) * large["npix"]]
    if field.method.background_passes == 2 or widest == longest or not len(large):
        return None
    width, height = (large[f"{n}max"] - large[f"{n}min"] + 1 for n in "xy")
    size = min(2 * max(widest, math.ceil(np.sqrt(width * height).max())), longest)
    return (
        f"sources larger than half a background box: {len(large)}; part of their light is "
        "subtracted as background; if the background varies little over "
        f"{size} pixels, use --bw {size} --bh {size}"
    )


def seeds_advice(found, seeds):
    """Warn of sources without a seed, as their pixels all touch those of smaller ones."""
    if seeds is None:
        return None
    lost = len(found.objects) - len(np.unique(found.segmentation[seeds > 0]))
    text = f"sources without a seed, as all their pixels touch other sources: {lost}"
    return f"{text}; the segmentation map has them" if lost else None


def noise_advice(field):
    """Warn of a noise image that falls where the measured noise rises, as weights do.

    Compares means in background boxes, if those of the noise image vary by more than 20 %.
    """
    from pandas import DataFrame

    if field.method.err_option != "file":
        return None
    boxes, good = field.method.background.limited_to(field.mask.shape), ~field.mask
    maps = {"given": field.noise, "measured": field.background.rms()}
    sums = {name: box_sums(boxes, values * good).ravel() for name, values in maps.items()}
    means = DataFrame(sums).div(box_sums(boxes, good).ravel(), axis=0).dropna()
    low, middle, high = means["given"].quantile([0.05, 0.5, 0.95])
    opposite = means.rank().corr().iloc[0, 1] < -0.5  # Spearman's rank correlation
    if len(means) < 10 or high - low < 0.2 * middle or not opposite:
        return None
    return "the noise image is low where the image is noisy: is --err-type right for this file?"


def noise_unit_advice(field, noise):
    """Warn if the noise that was used is far from the `Noise` of the sky."""
    if field.method.err_option == "file" and (noise.pixel < 0.6 or noise.pixel > 1.6):
        text = "is it in the unit of the image, and is --err-type right for it?"
        return f"the noise of the sky is {noise.pixel:.2g} times that of the noise image: {text}"
    if 0.1 < noise.pixel < 0.5:
        text = "if the background varies within its boxes, take smaller ones (--bw, --bh)"
        return f"the noise of empty sky is only {noise.pixel:.2g} times the RMS: {text}"
    return None


def dark_advice(field, padding):
    """Warn if far more pixels are below minus the threshold than above it, without padding."""
    limit = field.method.extraction.thresh / field.depth()
    levels = limit * sample(field.threshold_unit(), field.mask)
    values = sample(field.residual, field.mask)
    dark, bright = (np.count_nonzero(sign * values > levels) for sign in (-1, 1))
    if dark <= 100 or dark < 3 * bright or not math.isnan(padding):
        return None
    parts = [f"{100 * number / len(values):.2g} %" for number in (dark, bright)]
    return (
        f"{parts[0]} of the pixels are below the background by more than the threshold, {parts[1]} "
        "above it: for dark objects, invert the image (its maximum minus the image)"
    )


def linear_advice(origin, mask):
    """Warn of raw colour images, unless half of the pixels are masked, and of logarithmic units."""
    if origin.mosaic and origin.plane is None and mask.mean() < 0.45:
        return (
            f"{origin.name}: a raw colour image ({origin.mosaic}): its pattern is taken for noise; "
            "mask all but the green pixels (--mask)"
        )
    logarithm = r"(?i)(m|AB|ST)?mag(nitudes?)?\b|(dex|dB[a-z]?|log(10)?|ln)\b"
    if re.match(logarithm, origin.unit or ""):
        text = f"{origin.name}: the unit {origin.unit} is logarithmic, so that fluxes are wrong"
        return f"{text}; convert the image to linear values"
    return None


def purity_advice(false, found):
    """Warn if more than a fifth of the sources are, or may be, noise."""
    number = len(found.objects)
    if not false.number > 0.2 * number > 0:
        return None
    if false.doubt:
        text = "--err-option array_rms, --background-passes 2, or a higher threshold may help"
        return f"some of the {number} sources may be noise: {false.doubt}; {text}"
    text = "sources are noise: the negative of the image has as many; raise the threshold"
    return f"about {false.number:.0f} of {number} {text}"


def no_sources_advice(field, found):
    """Warn if there are no sources."""
    if field.is_noiseless():
        return "the image is constant: no sources"
    if len(found.objects):
        return None
    text = "no sources found: the catalogue and the segmentation map are empty"
    hidden = 100 * field.mask.mean()
    return text + (f"; {hidden:.1f} % of the pixels are masked" if hidden else "")


# ---------------------------------------------------------------------------------------------
# Command line: options
# ---------------------------------------------------------------------------------------------


def number(kind, minimum=-math.inf, maximum=math.inf, *, above=-math.inf, odd=False):
    """Return an argparse type: a finite int or float within bounds, greater than `above`."""
    wanted = "an odd number" if odd else "a whole number" if kind is int else "a finite number"
    for word, bound in (("of at least", minimum), ("above", above), ("and at most", maximum)):
        wanted += f" {word} {bound}" if math.isfinite(bound) else ""

    def convert(text):
        with suppress(ValueError):
            value = kind(text)
            if minimum <= value <= maximum and above < value < math.inf and (value % 2 or not odd):
                return value
        raise argparse.ArgumentTypeError(f"{text.strip()!r} is not {wanted}")

    return convert


def level_or_auto(text):
    """Return a threshold, or "auto"; an argparse type."""
    return text if text == "auto" else number(float, above=0)(text)


def words_of(path):
    """Return a function that replaces options in a text by section and label in a form (XML).

    Of an option with several labels the first is taken.
    """
    from xml.etree import ElementTree

    labels = {}
    try:
        inputs = ElementTree.parse(path).find("inputs")
        for section in (*inputs.iter("section"), inputs):  # the last for what is in no section
            place = section.get("title", "").partition(":")[0]
            for item in section.iter():
                option = item.get("argument") or option_of(item.get("name", ""))
                label = item.get("label") or item.get("title")
                if label and item.tag != "section":
                    labels.setdefault(option, f'"{place}: {label}"' if place else f'"{label}"')
    except Exception as error:  # the file may be anything
        raise argparse.ArgumentTypeError(f"{path}: not a Galaxy form ({error})") from error
    option = r"(?<![\w.-])--[a-z-]*[a-z]"  # not within the name of a file
    return partial(re.sub, option, lambda found: labels.get(found[0], found[0]))


class Parser(argparse.ArgumentParser):
    """A parser that accepts any negative number as a value, and whose errors are one line."""

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # argparse takes -1e-5 for an option, unless it begins with a space.
        negative = re.compile(r"-\.?\d[\d.e+-]*", re.IGNORECASE)
        words = [f" {word}" if negative.fullmatch(word) else word for word in words]
        return super().parse_args(words, namespace)

    def error(self, message):
        self.exit(2, f"{PROG}: error: {one_line(message):.1000} (see --help)\n")


EXAMPLES = """examples:
  find and measure the sources of an image; then look at products/sources.png:
    source_extractor image.fits -o products
  only sources that are beyond doubt, with a bright star masked:
    source_extractor image.fits --thresh 5 --mask-box 40 140 215 300 -o sure
  an extension (HDU) of a FITS file, with another one as its mask:
    source_extractor hst.fits --hdu SCI --mask hst.fits --mask-hdu DQ --mask-bits 256 -o hst
  colours: detect in one band, measure in another:
    source_extractor r.fits --measure-image g.fits --aperture-diameters 6 10 -o g
  nuclei in a microscope image, with labels as TIFF:
    source_extractor nuclei.tif --thresh 2.5 --bw 256 --bh 256 --image-format tiff -o nuclei
"""


# What --auto sets, unless it is given. It was chosen on simulated skies: see docs/validation.md.
AUTO = {"background_passes": 2, "filter_case": "gaussian", "deblend_cont": 1e-4, "thresh": "auto"}


def option_of(name):
    """Return the option for the name of an attribute of the parsed arguments."""
    return "--" + name.replace("_", "-")


def add_option(group, names, kind, text, metavar=None, **keywords):
    """Add an option of a type, or with a tuple of choices; its help ends with its default."""
    if isinstance(kind, tuple):
        keywords["choices"], kind = kind, type(kind[0])
    elif kind is Path:
        metavar = metavar or "FILE"
    option = group.add_argument(*names.split(), type=kind, help=text, metavar=metavar, **keywords)
    if option.default not in (None, [], ()):
        option.help += " (default: %(default)s)"


def build_parser():
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROG,
        usage="%(prog)s IMAGE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        description="Find the sources in an image: background, segmentation map and catalogue.",
        allow_abbrev=False,
    )
    for settings in (BackgroundSettings, ExtractionSettings, PhotometrySettings):
        parser.set_defaults(**asdict(settings()))
    parser.set_defaults(maskthresh=0.0, mask_box=[], blank=[], bridge=Method.bridge)
    parser.set_defaults(background_passes=1, err_option="float_globalrms", err_type="stddev")
    parser.set_defaults(filter_case="default", filter_fwhm=2.0, output_dir=Path("."), threads=1)
    parser.set_defaults(noise_correlation="measured", purity=0.97)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="FITS or TIFF image")
    real, positive = number(float), partial(number, float, above=0)

    group = parser.add_argument_group("input")
    add = partial(add_option, group)
    text = "accept any product of this tool as an image, such as a background"
    group.add_argument("--allow-product", action="store_true", default=None, help=text)
    add("--hdu", str, "index, EXTNAME, or EXTNAME,N (default: first with an image)", "HDU")
    add("--plane", number(int, 0), "plane of a cube or stack, from 0", "INDEX")
    add("--mask", Path, "mask image, FITS or TIFF, of the same shape")
    add("--mask-hdu", str, "HDU of the mask, as --hdu", "HDU")
    either = partial(add_option, group.add_mutually_exclusive_group())
    either("--maskthresh", real, "mask where the mask image exceeds this", "LEVEL")
    text = "instead: mask where any of these bits is set, such as 1 2 1024 or their sum"
    either("--mask-bits", number(int, 1, 2**64 - 1), text, "BIT", nargs="+")
    box = {"nargs": 4, "action": "append", "metavar": ("XMIN", "XMAX", "YMIN", "YMAX")}
    text = "mask a box of 0-based pixels, ends included; repeatable"
    add("--mask-box", number(int, 0), text, **box)
    more = {"action": "append", "metavar": "VALUE"}
    add("--blank", real, "value of pixels without data, such as 0 in a mosaic; repeatable", **more)
    add("--bridge", number(int, 0, 5), "interpolate over gaps up to this wide; 0: off", "PIXELS")

    add = partial(add_option, parser.add_argument_group("background"))
    add("--bw", number(int, 8), "width of the boxes", "PIXELS")
    add("--bh", number(int, 8), "height of the boxes", "PIXELS")
    add("--fw", number(int, 1, 99, odd=True), "width of the median filter, odd", "BOXES")
    add("--fh", number(int, 1, 99, odd=True), "height of the median filter, odd", "BOXES")
    text = "change only boxes that differ from the median by this"
    add("--fthresh", number(float, 0), text, "LEVEL")
    text = "2: mask the sources, then estimate the background again"
    add("--background-passes", (1, 2), text)

    group = parser.add_argument_group("detection")
    add = partial(add_option, group)
    text = "find faint sources: sets " + " ".join(f"{option_of(n)} {v}" for n, v in AUTO.items())
    group.add_argument("--auto", action="store_true", default=None, help=text)
    text = "in units of the noise, in image units with --err-option none; auto: see --purity"
    add("--thresh", level_or_auto, text, "LEVEL")
    text = "for --thresh auto: fraction of sources that are not noise (but may be fragments)"
    add("--purity", number(float, 0.5, 0.999), text, "PART")
    noises = ("float_globalrms", "array_rms", "none", "file")
    add("--err-option", noises, "global RMS, RMS map, none (absolute threshold), or --err-file")
    add("--err-file", Path, "noise image for --err-option file")
    add("--err-hdu", str, "HDU of the noise image, as --hdu", "HDU")
    add("--err-type", ("stddev", "variance", "weight"), "weight is inverse variance")
    add("--gain", positive(), "electrons per image unit, for Poisson noise in errors", "FACTOR")
    text = "level of saturated pixels (default: SATURATE in the header)"
    add("--saturation", real, text, "LEVEL")
    add("--minarea", number(int, 1, 2**31 - 1), "minimum number of pixels of a source", "PIXELS")

    add = partial(add_option, parser.add_argument_group("filter"))
    kernels = ("none", "default", "gaussian", "tophat", "file")
    add("--filter-case", kernels, "default is 1 2 1 / 2 4 2 / 1 2 1")
    add("--filter-fwhm", positive(maximum=50), "FWHM of gaussian, diameter of tophat", "PIXELS")
    add("--filter-file", Path, "kernel as text or SExtractor's .conv")
    text = "with a noise image or map: matched weights pixels by their noise"
    add("--filter-type", ("matched", "conv"), text)

    group = parser.add_argument_group("deblending and cleaning")
    add = partial(add_option, group)
    add("--deblend-nthresh", number(int, 1, 64), "number of levels", "LEVELS")
    text = "minimum contrast: a lower value splits more; 1: no deblending"
    add("--deblend-cont", number(float, 0, 1), text, "FACTOR")
    text = "drop detections that are the light of bright neighbours (default: on)"
    group.add_argument("--clean", action=argparse.BooleanOptionalAction, help=text)
    add("--clean-param", positive(), "a lower value drops more detections", "VALUE")

    add = partial(add_option, parser.add_argument_group("photometry"))
    add("--zeropoint", real, "magnitude of a flux of 1", "MAG")
    radius, diameter = positive(maximum=100), positive(maximum=10_000)
    add("--kron-factor", radius, "radius of the AUTO ellipse in Kron radii", "FACTOR")
    add("--kron-min-radius", radius, "its minimum radius, in units of a, b", "RADIUS")
    add("--aperture-diameters", diameter, "diameters of circular apertures", "PIXELS", nargs="+")
    text = "measured: errors are those of empty apertures; none: as if pixels were independent"
    add("--noise-correlation", ("measured", "none"), text)
    add("--measure-image", Path, "detect on IMAGE, measure on this aligned image")
    add("--measure-hdu", str, "HDU of the measure image, as --hdu", "HDU")
    add("--measure-plane", number(int, 0), "plane of the measure image, as --plane", "INDEX")

    add = partial(add_option, parser.add_argument_group("output"))
    text = "directory of products that are not named below; created if missing"
    add("-o --output-dir", Path, text, "DIR")
    for name, product in PRODUCTS.items():
        default = product.default.format(".fits or .tiff")
        note = f"default: {default}" if default else "on request"
        add(option_of(name), Path, f"{product.text} ({note})")
    text = "format of images except seeds; input: as IMAGE (default: by file extension, else fits)"
    add("--image-format", ("fits", "tiff", "input"), text)

    group = parser.add_argument_group("general")
    add = partial(add_option, group)
    text = "name options in messages by their labels in this Galaxy wrapper (XML)"
    add("--form", words_of, text, "FILE")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="show stages and times")
    volume.add_argument("-q", "--quiet", action="store_true", help="show nothing but errors")
    add("--threads", number(int, 1, 1024), "number of processes", "NUMBER")
    group.add_argument("--version", action="version", version=SIGNATURE)
    return parser


def check_usage(args):
    """Return a message if options contradict each other, or None."""
    needs = {"mask_hdu": "mask", "mask_bits": "mask", "err_hdu": "err_file"}
    needs |= {"measure_hdu": "measure_image", "measure_plane": "measure_image"}
    for name, needed in needs.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            return f"{option_of(name)} needs {option_of(needed)}"
    for choice, path in (("err_option", "err_file"), ("filter_case", "filter_file")):
        if (getattr(args, choice) == "file") != (getattr(args, path) is not None):
            return f"{option_of(choice)} file and {option_of(path)} must be given together"
    for xmin, xmax, ymin, ymax in args.mask_box:
        box = f"--mask-box {xmin} {xmax} {ymin} {ymax} (XMIN XMAX YMIN YMAX)"
        for line, first, last in (("column", xmin, xmax), ("row", ymin, ymax)):
            if first > last:
                return f"{box}: first {line} {first} is after last {line} {last}"
    if len(set(map(aperture, args.aperture_diameters))) < len(args.aperture_diameters):
        return "--aperture-diameters: a diameter is repeated"
    inputs = (args.image, args.mask, args.err_file, args.filter_file, args.measure_image)
    taken = {os.path.realpath(path) for path in inputs if path}
    for name, path in product_paths(args).items():
        if os.path.realpath(path) in taken:
            return f"{option_of(name)} {path}: already used as an input or for another product"
        if os.path.exists(path) and not os.path.isfile(path):
            return f"{option_of(name)} {path}: not a regular file"
        taken.add(os.path.realpath(path))
    return None


def product_paths(args):
    """Return the paths of the products to write, by name."""
    paths = {}
    for name, product in PRODUCTS.items():
        default = product.default.format(f".{args.image_format or 'fits'}")
        if path := getattr(args, name) or (default and args.output_dir / default):
            paths[name] = path
    return paths


# ---------------------------------------------------------------------------------------------
# Command line: run
# ---------------------------------------------------------------------------------------------


@timed("all")
def run(args, warned):
    """Process an image: read, find, measure, write.

    `warned` is a list of the log records of warnings, to which each further one is added.
    """
    mesh, extraction, photometry = (
        kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
        for kind in (BackgroundSettings, ExtractionSettings, PhotometrySettings)
    )
    if extraction.thresh == "auto":
        extraction = replace(extraction, thresh=math.nan)
    kernel = make_kernel(args.filter_case, args.filter_fwhm, args.filter_file)
    method = Method(kernel, args.err_option, args.background_passes, mesh, extraction, args.bridge)
    origin, pixels = read_image(args.image, args.hdu, args.plane, args.blank, args.allow_product)
    shape, mask, noise, measure_origin = pixels.shape, None, None, origin
    if args.mask:
        chosen = args.mask, args.mask_hdu, args.plane, args.maskthresh, args.mask_bits
        mask = read_mask(*chosen, origin, shape)
    if args.err_file:
        chosen = args.err_file, args.err_hdu, args.plane, args.err_type
        noise = read_noise(*chosen, origin, shape)
    if args.measure_image:
        chosen = args.measure_image, args.measure_hdu, args.measure_plane
        measure_origin, measure_pixels = read_measure_image(
            *chosen, args.blank, origin, shape, args.allow_product
        )
    if args.saturation is not None:
        both = origin, measure_origin
        origin, measure_origin = (replace(each, saturation=args.saturation) for each in both)
    targets = product_paths(args)
    with staged(targets) as paths:  # before the computation, so that it fails early if it must
        if args.threads > 1:
            import matplotlib  # noqa: F401  # a worker would leave its temporary directory behind
        with about(origin.name):
            excluded = build_mask(pixels, mask, noise, args.mask_box)
            padding, values = padding_value(pixels, excluded), sample(pixels, excluded)
            lines = describe_image(origin, pixels, excluded)
            field = measure_field = subtract_background(
                pixels, excluded, noise, method, origin.saturation, args.threads
            )
            chosen = []
            if args.thresh == "auto":
                field, *chosen = choose_threshold(field, args.purity)
                measure_field = field
            lines += [*describe_field(field), *chosen]
            counts = counts_advice(field, values[values != padding])
            if field.is_noiseless() and counts:
                raise InputError(counts)
            found = find_sources(field, args.threads)
            seeds = seed_map(found.segmentation) if args.seeds else None
            strong = are_strong(field, found)
            sky_noise = flux_noise = measure_noise(field, found.segmentation, strong)
            false = count_false(field, found, strong, sky_noise)
            data = padding_advice(origin, padding, values), counts, mask_advice(field)
            linear = linear_advice(origin, excluded) or dark_advice(field, padding)
            of_noise = noise_advice(field) or noise_unit_advice(field, sky_noise)
            warn(DATA_WARNING, *data, linear, of_noise, no_sources_advice(field, found))
            warn(BACKGROUND_WARNING, boxes_advice(field, found))
            deep = None if args.thresh == "auto" else depth_advice(field, sky_noise)
            warn(logging.WARNING, purity_advice(false, found), deep, seeds_advice(found, seeds))
        if args.measure_image:
            with about(measure_origin.name):
                excluded = build_mask(measure_pixels, mask, None, args.mask_box)
                warn(DATA_WARNING, linear_advice(measure_origin, excluded))
                lines += describe_image(measure_origin, measure_pixels, excluded, "measured on")
                level, measure_method = measure_origin.saturation, method.for_measuring()
                measure_field = subtract_background(
                    measure_pixels, excluded, None, measure_method, level, args.threads
                )
            strong = strong | are_strong(measure_field, found)
            flux_noise = measure_noise(measure_field, found.segmentation, strong)
        found = flag_pixels(found, field, measure_field)
        lines += describe_noise(flux_noise, args.noise_correlation)
        lines += describe_detection(field, sky_noise, false, found)
        if args.noise_correlation == "none":
            flux_noise = INDEPENDENT
        else:
            found = scale_position_errors(found, sky_noise, field.method.extraction.gain)
        measured = measure(field, measure_field, found, photometry, args.threads, flux_noise)
        columns = catalog_columns(photometry.aperture_diameters)
        catalog = build_catalog(
            columns, found, measured, sky_noise, field, measure_field, origin.wcs, photometry
        )
        lines += describe_depth(flux_noise, measure_field, catalog, photometry)
        by_weight = sorted(warned, key=lambda record: -record.levelno)
        messages = [record.getMessage() for record in by_weight]
        result = Result(
            origin=origin,
            field=field,
            found=found,
            catalog=catalog,
            columns=name_units(columns, origin.unit, measure_origin.unit),
            false=false,
            seeds=seeds,
            warning=messages[0] if messages else "",
            settings=[*describe_settings(args, origin, flux_noise), *chosen],
            image_format=args.image_format,
        )
        write_products(paths, targets, result, args.threads)
    report(found, messages, lines, targets)


def warn(level, *texts):
    """Log each text that is not None as a warning of this level."""
    for text in filter(None, texts):
        log.log(level, "%s", text)


def subtract_background(pixels, mask, noise, method, saturation, threads):
    """Return the `Field` of an image; in a second pass, the sources of the first are masked.

    `threads` is the number of processes; other parameters as in `build_field`.
    """
    objects = None
    if method.background_passes == 2:
        copies = pixels.copy(), mask, None if noise is None else noise.copy()
        first = build_field(*copies, method)
        if not first.is_noiseless():
            if math.isnan(method.extraction.thresh):
                first = first.with_extraction(thresh=FIRST_PASS * sigma_below(first))
            objects = find_sources(first, threads).objects
    return build_field(pixels, mask, noise, method, saturation, objects)


def describe_settings(args, origin, noise):
    """Return a line for each option that affects the results, and for each disc of the `Noise`.

    Files are named without directories.
    """
    left_out = {"output_dir", "image_format", "form", "verbose", "quiet", "threads", *PRODUCTS}
    if args.thresh != "auto":
        left_out.add("purity")
    options = vars(args) | {"hdu": origin.hdu}
    lines = [
        f"{name} = {value.name if isinstance(value, Path) else value!a}"
        for name, value in options.items()
        if name not in left_out and value not in (None, [], ())
    ]
    for area, ratio in zip(noise.areas[1:], noise.ratios[1:], strict=True):
        lines.append(f"noise_ratio at radius {math.sqrt(area / math.pi):.3g} = {ratio:.3g}")
    return lines


def describe_image(origin, pixels, mask, role="image"):
    """Return lines on what was read, how much is masked, and the header's beam and saturation."""
    bad = np.count_nonzero(~np.isfinite(pixels[mask]))
    ny, nx = pixels.shape
    plane = "" if origin.plane is None else f", plane {origin.plane}"
    lines = [
        f"{role:13} {origin.name}{plane}: {nx} x {ny} {origin.dtype}",
        f"masked        {100 * mask.mean():.2f} % ({bad} pixels have no finite value)",
    ]
    if origin.beam:
        lines.append(f"beam area     {origin.beam:.6g} pixels; divide fluxes by it")
    if not math.isnan(origin.saturation):
        lines.append(f"saturation    {origin.saturation:.6g}")
    return lines


def describe_field(field):
    """Return lines on level, noise and threshold in image values."""
    rms = field.frame.differences(global_rms(field.background))
    times = field.method.extraction.thresh / field.depth()
    noise = np.median(sample(field.threshold_unit(), field.mask))
    thresh = field.frame.differences(times * float(noise))
    unit = "rms" if np.ndim(field.noise) == 0 else "noise, median"
    absolute = field.method.err_option == "none"
    note = ""
    if field.method.err_option == "file":
        low = low_weight(field.noise, field.mask)[~field.mask].mean()
        if low > 0.001:
            note = f"; {100 * low:.1f} % of the pixels, of low weight, are left out"
    return [
        f"background    {field.level():.6g}, rms {rms:.6g}{note}",
        f"threshold     {thresh:.6g} ({'absolute' if absolute else f'{times:.4g} x {unit}'})",
    ]


def describe_noise(noise, correlation):
    """Return a line on the noise of apertures, and whether it is in the errors."""
    ratio = noise.ratio(9 * math.pi)
    text = f"{ratio:.2f} times that of independent pixels in an aperture of radius 3"
    if len(noise.areas) == 1:
        text, correlation = "not measured: there is too little empty sky, or no noise", "none"
    if correlation == "none":
        text += "; errors are those of independent pixels"
    return [f"noise         {text}"]


def describe_detection(field, noise, false, found):
    """Return lines on the depth of the detection, and on false sources."""
    thresh, number, lines = field.method.extraction.thresh, len(found.objects), []
    if math.isfinite(noise.sigma):
        deep = 4 * noise.sigma * field.threshold_scale()
        depth = f"{thresh / noise.sigma:.3g} sigma of the filtered image"
        lines.append(f"detection     {depth}; --thresh {deep:.3g} is 4 sigma")
    if number:
        text = f"about {false.number:.0f} of {number} sources are noise"
        lines.append(f"purity        {f'unknown: {false.doubt}' if false.doubt else text}")
    return lines


def describe_depth(noise, field, catalog, settings):
    """Return lines on the size of compact sources, and on the depth in an aperture of that size."""
    clean = catalog[(catalog["snr"] > 20) & (catalog["flag"] == 0) & (catalog["flag_auto"] == 0)]
    compact = clean[clean["flux_radius"] < 1.3 * clean["flux_radius"].quantile(0.2)]
    fwhm, half_light = compact["fwhm"].median(), compact["flux_radius"].median()
    if len(compact) < 3 or not fwhm > 0:
        return []
    size = f"FWHM {fwhm:.2f}, half-light radius {half_light:.2f} pixels"
    lines = [f"seeing        {size}: medians of {len(compact)} compact sources"]
    area = math.pi * fwhm**2
    pixel = np.median(sample(np.broadcast_to(field.noise, field.mask.shape), field.mask))
    flux = 5 * field.frame.differences(float(pixel) * math.sqrt(area) * noise.ratio(area))
    if flux > 0:
        text = f"magnitude {settings.zeropoint - 2.5 * math.log10(flux):.2f}"
        where = f"in a circle {2 * fwhm:.3g} pixels wide"
        lines.append(f"depth         5 sigma {where}: flux {flux:.4g}, {text}")
    return lines


def report(found, messages, lines, targets):
    """Log the number of sources, the warnings, these lines, and the names of the products.

    Galaxy shows the first lines in its history.
    """
    log.info("sources       %d", len(found.objects))
    for message in messages:
        log.info("warning       %s", message)
    for line in lines:
        log.info(line)
    log.info("written       %s", ", ".join(path.name for path in targets.values()))


def start_logging(args, words):
    """Log reports to stdout and warnings to stderr, if these are open, all in the form's `words`.

    Returns a list of the records of warnings, which grows with each.
    """

    def reword(record):
        text = record.getMessage()  # of which a file name may contain line breaks
        text = one_line(text) if record.levelno >= logging.WARNING else text
        record.msg, record.args = words(text), ()
        return True

    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names that can't be encoded
    reports, problems = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    reports.addFilter(lambda record: record.levelno < logging.WARNING)
    problems.setFormatter(logging.Formatter(f"{PROG}: warning: %(message)s"))
    warned = logging.handlers.BufferingHandler(10**4)  # the picture has a warning even if quiet
    reports.setLevel(logging.ERROR if args.quiet else logging.DEBUG)
    problems.setLevel(logging.ERROR if args.quiet else logging.WARNING)
    warned.setLevel(logging.WARNING)
    log.handlers, log.filters, log.propagate = [reports, problems, warned], [reword], False
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    logging.raiseExceptions = False  # the process that reads stdout may have ended
    logging.captureWarnings(True)
    for library in ("py.warnings", "astropy", "matplotlib"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return warned.buffer


def main(argv=None):
    """Run the tool on command line arguments; return the exit code, 0, 1, or 3 (out of memory).

    Wrong arguments (code 2) and signals (128 plus their number) raise SystemExit.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.auto:
        parser.set_defaults(**AUTO)  # other options that are given win
        args = parser.parse_args(argv)
    words = args.form or str
    warned = start_logging(args, words)
    gc.disable()  # garbage collection takes 0.4 s during imports, and 0.6 s at exit
    atexit.register(gc.freeze)
    try:
        # Until there are files to remove, a signal ends the process at once.
        with handling_signals(signal.SIG_DFL):
            if args.image_format == "input":
                head = first_bytes(args.image, 4)
                args.image_format = "tiff" if head.startswith(TIFF_MAGIC) else "fits"
            if problem := check_usage(args):
                parser.exit(2, f"{PROG}: error: {words(one_line(problem))}\n")
            run(args, warned)
        return 0
    except InputError as error:
        problem, exit_code = error, error.exit_code
    except MemoryError:
        problem, exit_code = f"{args.image}: not enough memory; cut the image into parts", 3
    except Exception as error:
        log.debug("traceback", exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        problem = f"{args.image}: internal error ({reason}); please report it with the output of -v"
        exit_code = 1
    print(f"{PROG}: error: {words(one_line(problem))}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
