#!/usr/bin/env python
"""Extract sources from an astronomical or microscopy image with SEP.

The sections stand in the order of the work, as `run`, near the end, tells it:

    Settings, Reading, Kernel       what can be chosen; a FITS or TIFF file in, one plane out
    Mask and frame, Background      a field: an image less its background, its noise settled
    Sharing the work, Detection     jobs for many processes; objects and the map of their labels
    Measurements, Catalogue         sizes, fluxes and centroids; all of it in one table
    Products, Advice, Command line  files and pictures out; warnings; options, and the whole run

Conventions: images are indexed (y, x); x and y are 0-based with pixel centres at integers; masks
are True where a pixel is excluded; `theta` is in radians from +x towards +y.
"""

import argparse
import atexit
import bz2
import gc
import gzip
import io
import itertools
import logging
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
    """How to find sources, in image values or, `within` a frame, in its numbers."""

    kernel: np.ndarray | None
    err_option: str
    background_passes: int
    background: BackgroundSettings
    extraction: ExtractionSettings
    bridge: int = 3

    def within(self, frame):
        """Return the method with everything that has the image's unit brought into the frame."""
        thresh, gain = self.extraction.thresh, self.extraction.gain
        if self.err_option == "none":
            thresh /= frame.scale
        extraction = replace(self.extraction, thresh=thresh, gain=gain and gain * frame.scale)
        background = replace(self.background, fthresh=self.background.fthresh / frame.scale)
        return replace(self, background=background, extraction=extraction)

    def measures_noise(self):
        """Return True if the noise is that of the background."""
        return self.err_option in ("float_globalrms", "array_rms")

    def for_measuring(self):
        """Return the method for another image: no noise image, no threshold in image values."""
        if self.measures_noise():
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

# Warnings of astropy that concern no pixel; ESO-LOG cards record what the telescope did.
COSMETIC = re.compile(
    "non-ASCII characters|trailing END keyword|only applicable to integer data|convention: ESO-LOG"
)

CELESTIAL = re.compile(r"(RA|DEC|[A-Z]L(ON|AT)|[A-Z]{2}L[NT])(-| *$)")  # CTYPE of the sky

# Limits for opening a file, without its pixels: seconds of CPU, and bytes of memory.
SECONDS_TO_OPEN, BYTES_TO_OPEN = 15, 5 * 10**8

# A packed file may grow this many times, gzip's limit, and always to this many bytes: bzip2 packs
# an empty mask of any size into a few bytes.
UNPACKED_TIMES, UNPACKED_BYTES = 1040, 2**30

# Bytes that the libraries take of each ulimit.
LIBRARIES = {resource.RLIMIT_AS: 4 * 10**8, resource.RLIMIT_DATA: 10**8}


@dataclass(frozen=True)
class Origin:
    """Where pixels come from, and what their file says about them."""

    name: str  # file, and HDU where there is one, for messages
    dtype: str  # of the pixels in the file
    hdu: int | None = None
    wcs: "WCS | None" = None  # celestial, of the plane
    unit: str | None = None  # the header's BUNIT
    beam: float | None = None  # area in pixels of the beam that the unit is per
    black: int | None = None  # value of black in a TIFF in which 0 is white
    palette: bool = False  # whether pixels are numbers of colours
    product: str | None = None  # which of this tool's own products the file is
    saturation: float = math.nan  # level of saturated pixels: the header's SATURATE, if usable


class Stack(NamedTuple):
    """What an open file holds; `cut` reads what is at some indices of its array."""

    origin: Origin
    axes: list[str]
    shape: tuple[int, ...]
    image_axes: list[int]
    cut: Callable[[tuple], np.ndarray]


def first_bytes(path, size):
    """Return up to `size` bytes of a regular file; reading a pipe or a device might never end."""
    with reading(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: a directory, pipe or device; give the name of a file")
        with open(path, "rb") as file:
            return file.read(size)


@contextmanager
def reading(path):
    """Turn whatever a damaged file makes a library raise into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the file itself
            raise InputError(f"{path}: {error.strerror}") from error
        text = f"can't be read ({one_line(error) or type(error).__name__}); get the file again"
        if isinstance(error, MemoryError):
            text = "asks for too much memory; cut the image into parts"
        raise InputError(f"{path.name}: damaged, cut short, or {text}") from error


def try_to_open(path, opened):
    """Open a file in a child process of limited time and memory; raise InputError if it dies.

    A damaged size may make a library loop for ever, crash or ask for all memory. Any other error
    comes up again when this process opens the file. `opened` returns a context manager.
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
        except Exception as error:
            os._exit(isinstance(error.__context__ or error, MemoryError))

    child = multiprocessing.get_context("fork").Process(target=attempt, daemon=True)
    with warnings.catch_warnings(action="ignore"):  # fork leaves out numpy's idle threads
        child.start()
    child.join()
    if child.exitcode:
        text = "it takes too much time or memory to open; get the file again"
        raise InputError(f"{path.name}: damaged: {text}")


@contextmanager
def passing_on_warnings(path):
    """Log what astropy and tifffile warn of in a file as one warning."""
    logger, texts = logging.getLogger("tifffile"), []

    def keep(record):  # and return nothing, so that no handler sees it
        texts.append(re.sub(r"^<tifffile\.[^>]*> ", "", record.getMessage()))

    logger.addFilter(keep)
    try:
        with warnings.catch_warnings(record=True, action="ignore") as caught:
            warnings.simplefilter("always", AstropyUserWarning)
            yield
    finally:
        logger.removeFilter(keep)
    texts = dict.fromkeys(map(one_line, [*texts, *(w.message for w in caught)]))  # each once
    text, *more = [text for text in texts if not COSMETIC.search(text)] or [""]
    if text:
        text += f", and {len(more)} more" if more else ""
        log.warning("%s: read with warnings: %s", path.name, text)


def read_plane(path, hdu=None, plane=None, *, lone_serves_all=False):
    """Read one 2-D plane of a FITS or TIFF file; the format is recognised from the content.

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
    if not head.startswith(TIFF_MAGIC + FITS_MAGIC):
        raise InputError(f"{path.name}: neither a FITS nor a TIFF file; convert it to one of them")
    with ExitStack() as files:  # imports stand here, or the child process would do them as well
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
        files.enter_context(passing_on_warnings(path))
        stack = files.enter_context(opened())
        indices = choose_plane(stack, plane, lone_serves_all)
        with reading(path):
            pixels = stack.cut(indices).reshape([stack.shape[axis] for axis in stack.image_axes])
    return stack.origin, pixels


def choose_plane(stack, plane, lone_serves_all):
    """Return the indices of a plane, once it is known to exist and to fit in memory."""
    name, shape = stack.origin.name, stack.shape
    rows, columns = (shape[axis] for axis in stack.image_axes)
    others = [1 if axis in stack.image_axes else n for axis, n in enumerate(shape)]
    count = math.prod(others)
    if not math.prod(shape):
        raise InputError(f"{name}: an image of {columns} x {rows} pixels; get the file again")
    if count == 1 and (plane is None or lone_serves_all):
        plane = 0
    if plane is None or plane >= count:
        layout = ", ".join(f"{axis}={n}" for axis, n in zip(stack.axes, shape, strict=True))
        choice = f"choose one from 0 to {count - 1} with the plane option"
        if plane is None and lone_serves_all:
            choice = "the image has only one; give one for it"
        planes = f"{count} plane{'s' if count > 1 else ''}"
        raise InputError(f"{name}: {planes} in axes ({layout}); {choice}")
    if np.dtype(stack.origin.dtype).kind not in "biuf":
        raise InputError(f"{name}: {stack.origin.dtype} pixels are not real numbers")
    needed = 3 * to_float(np.empty(0, stack.origin.dtype)).itemsize * rows * columns
    if needed > available_memory():
        text = f"{columns} x {rows} pixels need {needed / 1e9:.1f} GB of memory, more than there is"
        raise InputError(f"{name}: {text}; cut the image into parts")
    indices = [int(place) for place in np.unravel_index(plane, others)]
    return tuple(slice(None) if n in stack.image_axes else at for n, at in enumerate(indices))


def available_memory():
    """Return the bytes that the machine, its control group and ulimit leave for an image."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # there is no group, or it says "max"
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        sizes.append(int(Path("/sys/fs/cgroup", group, "memory.max").read_text()))
    for kind, taken in LIBRARIES.items():
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            sizes.append(limit - taken)
    return min(sizes)


@contextmanager
def open_fits(path, source, hdu):
    """Open a FITS file as a `Stack`; image axes: those of the sky, or the last longer than 1."""
    # A file object of its own: a child process moves the position that the two share.
    with open(source.fileno(), "rb", closefd=False) as file:
        file.seek(0)
        with reading(path):
            # uint=False: else astropy ignores BLANK in unsigned integers.
            hdus = fits.open(file, memmap=False, uint=False)
            number, chosen = find_hdu(path, hdus, hdu)
            name = chosen.name
            if value_of(chosen.header, "BZERO") == 2**63:  # else rounded to multiples of 1024
                chosen = fits.open(file, memmap=False, uint=True)[number]
            header, shape = chosen.header, chosen.shape
            dtype = fits.BITPIX2DTYPE[header["BITPIX"]]
        numbers = range(len(shape), 0, -1)  # FITS counts axes from the last
        axes = [str(value_of(header, f"CTYPE{n}") or f"NAXIS{n}") for n in numbers]
        ranks = [(n > 1, bool(CELESTIAL.match(axis))) for n, axis in zip(shape, axes, strict=True)]
        image_axes = sorted(sorted(range(len(shape)), key=ranks.__getitem__)[-2:])

        def cut(indices):
            packed = isinstance(chosen, fits.CompImageHDU)
            if packed and chosen.compression_type == "HCOMPRESS_1":
                check_hcompress(file, number, chosen)
            # astropy cuts along the last axis a pixel at a time.
            at_once = packed or image_axes[1] == len(shape) - 1
            return (chosen.section if at_once else chosen.data)[indices]

        wcs = celestial_wcs(path, hdus, header, [numbers[axis] for axis in image_axes[::-1]])
        unit, saturation = str(value_of(header, "BUNIT") or ""), number_of(header, "SATURATE")
        beam, major, minor = None, number_of(header, "BMAJ"), number_of(header, "BMIN")
        if wcs and major > 0 and minor > 0 and re.search(r"(?i)\bbeam\b", unit):  # of a Gaussian
            square_degrees = math.pi / (4 * math.log(2)) * major * minor
            beam = square_degrees / wcs.proj_plane_pixel_area().value
        yield Stack(
            Origin(
                name=f"{path.name}[{number}] {name}".rstrip(),
                dtype=dtype,
                hdu=number,
                wcs=wcs,
                unit=unit or None,
                beam=beam,
                product=product_of(str(value_of(header, "HISTORY") or "")),
                saturation=saturation if 0 < saturation < LARGEST else math.nan,
            ),
            axes,
            shape,
            image_axes,
            cut,
        )


@contextmanager
def unpacked(path):
    """Open a FITS file, or an unpacked copy of it that is whole and agrees with its checksum."""
    with open(path, "rb") as file, ExitStack() as files:
        if packing := {b"\x1f\x8b": gzip, b"BZ": bz2}.get(file.read(2)):
            file.seek(0)
            most = max(UNPACKED_TIMES * path.stat().st_size, UNPACKED_BYTES)
            with reading(path), packing.open(file) as packed:
                file = files.enter_context(tempfile.TemporaryFile())
                while piece := packed.read(2**20):
                    file.write(piece)
                    if file.tell() > most:
                        raise ValueError(f"it unpacks to more than {most} bytes")
                file.flush()
        yield file


def check_hcompress(file, number, hdu):
    """Raise ValueError if a tile of an HDU holds more or fewer pixels than the header says.

    astropy's decoder would write beyond its buffer. A tile begins with DD 99 and its two sides.
    """
    table = fits.open(file, memmap=False, disable_image_compression=True)[number]
    shape, tile = hdu.shape, hdu.tile_shape
    corners = itertools.product(*(range(0, n, step) for n, step in zip(shape, tile, strict=True)))
    for stream, corner in zip(table.data["COMPRESSED_DATA"], corners, strict=True):
        start = bytes(np.asarray(stream[:10]).view(np.uint8))
        if start:  # else the tile is in another column
            sides = [min(n, end - at) for n, end, at in zip(tile, shape, corner, strict=True)]
            stored = [int.from_bytes(start[place : place + 4]) for place in (2, 6)]
            if start[:2] != b"\xdd\x99" or math.prod(stored) != math.prod(sides):
                raise ValueError(f"a tile of {sides} is packed as one of {stored}")


def value_of(header, key):
    """Return the value of a card, None if there is none or it can't be parsed."""
    with suppress(Exception):  # astropy raises many kinds for a card that is damaged
        return header.get(key)


def number_of(header, key):
    """Return the value of a card that holds a number, nan in place of any other."""
    value = value_of(header, key)
    return value if type(value) in (int, float) else math.nan


def find_hdu(path, hdus, wanted):
    """Return index and HDU of the image that `wanted` names, or of the first if it is None."""
    contents, problem = [], "no extension (HDU) holds an image"
    if wanted is not None:
        problem = f"no such extension (HDU): {wanted}"
    for number, hdu in enumerate(hdus):
        for key in ("EXTNAME", "EXTVER"):  # which astropy reads from each header
            if value_of(hdu.header, key) is None:
                hdu.header.remove(key, ignore_missing=True)
        name, size = hdu.name.upper(), "table"
        names = [str(number)] if (wanted or "").isdecimal() else [name, f"{name},{hdu.ver}"]
        if wanted is None or wanted.upper() in names:
            if hdu.is_image and len(hdu.shape) > 1 and math.prod(hdu.shape) > 0:
                return number, hdu
            if wanted is not None:
                problem = f"no image in extension (HDU): {wanted}"
        if hdu.is_image:
            size = " x ".join(map(str, reversed(hdu.shape))) or "empty"
        contents.append(f"{number} {hdu.name or '(no name)'}: {size}")
    if len(contents) > 20:
        contents[20:] = [f"and {len(contents) - 20} more"]
    raise InputError(f"{path.name}: {problem}; the file has {'; '.join(contents)}")


def celestial_wcs(path, hdus, header, axes):
    """Return the celestial WCS of the FITS axes numbers `axes`, or None if there is none."""
    if not any(f"CTYPE{axis}" in header for axis in axes):
        return None
    from astropy.wcs import WCS, Sip

    needed = re.compile(rf"(CRVAL|CRPIX|CDELT|CD|PC|PV)[{axes[0]}{axes[1]}](_\d+)?$")
    try:
        with warnings.catch_warnings(action="ignore"):
            wcs = WCS(without_double_distortion(path, header, axes), hdus, naxis=axes)
            if not wcs.has_celestial:
                return None
            wcs.to_fits(relax=True)[0].verify("exception")  # or else it could not be written
        for key in filter(needed.match, header):
            if math.isnan(number_of(header, key)):  # wcslib takes it for absent
                raise ValueError(f"{key} can't be read")
        # astropy mends a matrix of zeros, as uncalibrated frames have it, to a degree a pixel.
        blank = [value_of(header, f"CD{i}_{j}") for i in axes for j in axes] == [0] * 4
        if blank or not np.linalg.cond(wcs.pixel_scale_matrix) < 1e8:
            raise ValueError("its matrix is singular")
    except Exception as error:  # wcslib and astropy raise many kinds
        reason = one_line(error) or type(error).__name__
        log.warning("%s: WCS can't be used and is left out (%s)", path.name, reason)
        return None
    if wcs.sip:  # which astropy centres on axes 1 and 2
        wcs.sip = Sip(wcs.sip.a, wcs.sip.b, wcs.sip.ap, wcs.sip.bp, wcs.wcs.crpix)
        if not all(ctype.endswith("-SIP") for ctype in wcs.wcs.ctype):
            text = "SIP is applied, though CTYPE lacks -SIP; if it is undone already, remove it"
            log.warning("%s: %s", path.name, text)
    return wcs


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


class FileWithoutPath(io.FileIO):
    """A file without a descriptor: given one, tifffile opens other files that a TIFF names."""

    def fileno(self):
        raise io.UnsupportedOperation


@contextmanager
def open_tiff(path, hdu):
    """Open an image (series) of a TIFF file as a `Stack`."""
    import tifffile

    with ExitStack() as files:
        with reading(path):
            file = files.enter_context(io.BufferedReader(FileWithoutPath(path)))
            tiff = files.enter_context(tifffile.TiffFile(file))
            images = [image for image in tiff.series if not image.keyframe.is_reduced]
            images = images or tiff.series
            last, number = len(images) - 1, hdu or "0"
            if number not in map(str, range(len(images))):
                text = f"no such extension (HDU): {number}; this TIFF file has images 0 to {last}"
                raise InputError(f"{path.name}: {text}")
            series = images[number := int(number)]
            axes, page = series.axes, series.keyframe
            shape = tuple(map(operator.index, series.shape))  # floats, if tags are damaged
            image_axes = [axes.index("Y"), axes.index("X")]
            # ImageJ's are tables of colours to look at intensities with.
            colours = None if tiff.is_imagej else page.photometric
            white = colours == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.kind in "bu"
            palette = colours == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None
            palette = palette and bool((np.diff(page.colormap.astype(int)) < 0).any())
            dtype, bits, description = series.dtype.name, page.bitspersample, page.description
        if hdu is None and last > 0:
            text = "%s: read the first of its %d images; choose another, 0 to %d, with --hdu"
            log.warning(f"{text} (Extension)", path.name, last + 1, last)
        origin = Origin(
            name=f"{path.name}[{number}]" if last else path.name,
            dtype=dtype,
            hdu=number if last else None,
            black=(1 << bits) - 1 if white else None,
            palette=palette,
            product=product_of(description),
        )
        cut = partial(cut_tiff, path, tiff, series)
        yield Stack(origin, list(axes), shape, image_axes, cut)


def cut_tiff(path, tiff, series, indices):
    """Return what is at some indices of a series, read from as little of the file as may be."""
    if series.dataoffset is not None:
        dtype = np.dtype(tiff.byteorder + series.dtype.char)
        return np.array(np.memmap(path, dtype, "r", series.dataoffset, series.shape)[indices])
    page, depth = series.keyframe, series.ndim - series.keyframe.ndim
    outer, inner, stacked = indices[:depth], indices[depth:], series.shape[:depth]
    pages_are_planes = (*stacked, *page.shape) == series.shape and slice(None) not in outer
    # In one thread: the stacks of others would count as memory of the file.
    if not pages_are_planes or len(series.pages) != math.prod(stacked):
        return series.asarray(maxworkers=1)[indices]
    page = series.pages[int(np.arange(math.prod(stacked)).reshape(stacked)[outer])]
    if page is None:
        text = "this plane isn't in it; give another file of its set, if it is one"
        raise InputError(f"{path.name}: {text}")
    return page.asarray(maxworkers=1)[inner]


def product_of(history):
    """Return which product of this tool a file is, by its history, or None."""
    found = re.search(rf"^{re.escape(PROG)} .*: (\w+)$", history, re.MULTILINE)
    return found[1] if found and found[1] in PRODUCTS else None


def to_float(data):
    """Return `data` as native, contiguous and writable float32, or float64 if that would round it.

    The caller gives `data` up: its bytes may be swapped in place.
    """
    exact = 4 if data.dtype.kind == "f" else 2  # bytes of what float32 holds exactly
    dtype = np.float64 if data.itemsize > exact else np.float32
    if not data.dtype.isnative and data.flags.writeable:
        data = data.byteswap(inplace=True).view(data.dtype.newbyteorder())
    return np.require(data, dtype, ["C", "W"])


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
    pixels = to_float(stored)
    for value in np.array(blank, pixels.dtype):  # to which scaled integers may be rounded otherwise
        pixels[np.abs(pixels - value) <= np.spacing(np.abs(value))] = np.nan
    if origin.black is not None:
        log.warning("%s: 0 is white in this TIFF: inverted, so that more is brighter", origin.name)
        np.subtract(origin.black, pixels, out=pixels)
    return origin, pixels


def read_aligned(path, hdu, plane, shape):
    """Read a plane of the image's shape (ny, nx), as `read_plane`; a stack gives its `plane`."""
    origin, pixels = read_plane(path, hdu, plane, lone_serves_all=True)
    require_shape(origin, pixels, shape)
    return origin, pixels


def require_shape(origin, pixels, shape):
    """Raise InputError unless pixels have the shape (ny, nx) of the image to work on."""
    if pixels.shape != shape:
        text = f"its shape (rows, columns) is {pixels.shape}, the image's {shape}"
        raise InputError(f"{origin.name}: {text}; give a file that was made for this image")


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
    """Read the measure image, on which the sources of the image from `origin` are measured.

    It must have the shape (ny, nx) of that image, and should have its WCS; parameters, returns and
    errors else as in `read_image`.
    """
    measure_origin, pixels = read_image(path, hdu, plane, blank)
    require_shape(measure_origin, pixels, shape)
    if origin.wcs and measure_origin.wcs:
        from astropy.utils import iers

        x, y = np.meshgrid(*(np.linspace(0, n - 1, 3) for n in shape[::-1]))
        offset, offline = math.nan, iers.conf.set_temp("auto_download", False)
        with suppress(Exception), warnings.catch_warnings(action="ignore"), offline:
            sky = origin.wcs.pixel_to_world(x, y)  # wcslib and the frames raise many kinds
            dx, dy = np.subtract(measure_origin.wcs.world_to_pixel(sky), (x, y))
            offset = np.nanmax(np.hypot(dx, dy))
        if not offset <= 0.5:
            away = f"up to {offset:.1f}" if math.isfinite(offset) else "an unknown number of"
            text = "%s: by its WCS the corners of the image are %s pixels away; measured pixel by "
            log.warning(text + "pixel all the same", measure_origin.name, away)
    return measure_origin, pixels


# ---------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------


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
    side = 2 * math.ceil(radius - 0.5) + 1
    offsets = (np.arange(side * subpixels) + 0.5) / subpixels - side / 2
    with np.errstate(over="ignore"):
        samples = profile(np.hypot(offsets, offsets[:, np.newaxis]))
    blocks = np.reshape(samples, (side, subpixels, side, subpixels))
    return np.ascontiguousarray(blocks.mean(axis=(1, 3)), dtype=np.float32)


def read_kernel(path):
    """Read a kernel: text for `numpy.loadtxt`, or SExtractor's .conv with its CONV line."""
    lines = first_bytes(path, 2**24).decode(errors="replace").splitlines()
    try:
        with warnings.catch_warnings(action="ignore"):
            kernel = np.loadtxt(lines, dtype=np.float32, comments=["#", "CONV"], ndmin=2)
    except ValueError as error:
        text = "not rows of numbers of equal length, as a kernel is"
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
    """Combine everything that excludes a pixel: no finite value, the mask, no noise, the boxes.

    All are arrays (ny, nx), but for the boxes (xmin, xmax, ymin, ymax) of 0-based pixels, ends
    included; mask and noise may be None. Raises InputError for a box outside the image, or if no
    pixel is left.
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
    return excluded if excluded.any() else np.zeros(excluded.shape, bool)  # takes no memory yet


# A gap is filled with a Gaussian if a pixel beside it is so many times the noise above the
# background, else with a straight line; no Gaussian has a smaller FWHM (pixels) than this.
BRIGHT, SHARPEST = 5.0, 2.5


def bridge(image, noise, excluded, rms, widest):
    """Interpolate an image and its noise over narrow gaps, in place; return what stays excluded.

    A gap is a run of up to `widest` excluded pixels along a row or a column between good ones. The
    narrowest are filled first, rows before columns; what is filled is good, so that gaps may cross.
    Larger squares of excluded pixels, and what touches them, stay as they are. The image (ny, nx)
    is without its background, `rms` its noise; `noise` may be a number, which needs no bridge.
    """
    if not widest or not excluded.any():
        return excluded
    near = np.pad(excluded, widest + 1)  # becomes True in and beside the larger squares
    for combine, side in ((np.logical_and, widest + 1), (np.logical_or, widest + 3)):
        for _ in range(side - 1):
            near = combine(near[1:], near[:-1])
            near = combine(near[:, 1:], near[:, :-1])
    mask, narrow = excluded.copy(), excluded & ~near
    for width in range(1, widest + 1):
        fill_gaps(image, noise, mask, narrow, width, rms)
        fill_gaps(image.T, np.transpose(noise), mask.T, narrow.T, width, rms)
    return mask


def fill_gaps(image, noise, mask, narrow, width, rms):
    """Fill narrow gaps of one width along the rows, in place; see `bridge`."""
    step = np.arange(-2, width + 4)  # 0 is the last pixel before the gap; 3 pixels on each side
    for rows in portions(mask.shape, PORTION):
        gaps = ~mask[rows, : -width - 1] & ~mask[rows, width + 1 :]
        for k in range(1, width + 1):
            gaps &= narrow[rows, k : k - width - 1]
        y, x = np.divmod(np.flatnonzero(gaps)[:, None], gaps.shape[1])  # faster than np.nonzero
        y, x = y + rows.start, x + step
        at = np.clip(x, 0, mask.shape[1] - 1)
        good, gap = (at == x) & ~mask[y, at], (y, at[:, 3:-3])
        for plane, spread in ((image, rms), (noise, math.inf)):
            if np.ndim(plane):
                plane[gap] = interpolate(plane[y, at], good, step, spread)[:, 3:-3]
        mask[gap] = narrow[gap] = False


def interpolate(values, good, step, rms):
    """Return lines between the two ends of gaps, or Gaussians that fit the good pixels there."""
    ends, part = values[:, [2, -3]].astype(np.float64), step / step[-3]
    filled = ends @ np.array([1 - part, part])
    bright = ends.max(axis=1) > BRIGHT * rms
    values, good, ends = np.where(good, values, 0.0)[bright], good[bright], ends[bright]
    # What rises away from the fainter end belongs to another source.
    fainter = (step < 1) == (ends[:, :1] < ends[:, 1:])
    good &= ~fainter | (values <= ends.min(axis=1, keepdims=True) + 3 * rms)
    # Fit exp(parabola) by Gauss and Newton; a weak prior flattens what the noise leaves open.
    unit = np.maximum(rms, 1e-3 * values.max(axis=1, keepdims=True))
    powers, model = np.vander(step - step.mean(), 3), np.log(np.maximum(values / unit, 1))
    for _ in range(6):
        height = np.exp(model)
        weight = good * height**2
        matrix = np.einsum("ni,ij,ik->njk", weight, powers, powers) + np.diag([2, 0, 0])
        vector = weight * (model + np.clip(values / unit / height - 1, -1, 1)) @ powers
        model = np.clip(np.linalg.solve(matrix, vector[:, :, None])[:, :, 0] @ powers.T, -5, 50)
    sharpest = np.exp(4 * math.log(2) / SHARPEST**2 * step * (step[-3] - step))
    most = filled[bright] * np.where(filled[bright] > 0, sharpest, 1)
    filled[bright] = np.minimum(unit * np.exp(model), most)
    return filled


def usable(noise):
    """Return where standard deviations are finite and positive."""
    return (noise > 0) & np.isfinite(noise)


def portions(shape, pixels):
    """Return slices of rows that make up an image (ny, nx), of up to so many pixels or one row."""
    return batches(shape[0], max(1, pixels // shape[1]))


def batches(count, size):
    """Return slices of up to `size` that make up so many rows or objects, and at least one."""
    return [slice(start, start + size) for start in range(0, count or 1, size)]


def sample(image, mask):
    """Return about a million of the pixels of an image that are not masked, from all over it."""
    step = max(1, math.isqrt(image.size // 250_000))
    found = image[::step, ::step][~mask[::step, ::step]]
    return found if found.size else image[~mask]


@dataclass(frozen=True)
class Frame:
    """The numbers SEP works on, image value = offset + scale x number, as it computes in float32.

    It is the identity unless the noise is too far from 1 for its square to be represented, or is
    a tiny fraction of a pedestal.
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
        # Where the sky has no noise, the spread may be that of the faintest wings of sources.
        spread = max(spread, 1e-15 * float(np.abs(values - offset).max()))
        return cls(offset, 2.0 ** (math.frexp(spread)[1] - 1))

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

# For the second pass, sources of the first are masked to this many times (a, b): the light of a
# bright galaxy goes on well beyond the isophote it was detected at.
GROWTH = 6.0

# Pixel values are multiples of a quantum, such as 1 in integers. Where the noise is at least so
# many quanta, SEP's medians are as good as those of continuous values.
COARSE = 10

# What SEP itself puts for the noise of a masked pixel, and the largest number that it can sum.
NO_WEIGHT = 1e30
LARGEST = 1e30


@dataclass(frozen=True)
class Field:
    """An image (ny, nx) less its background, ready to be searched and measured, in `frame`."""

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
        arrays = {name: getattr(self, name) for name in ("residual", "excluded", "mask", "noise")}
        return replace(self, **{k: v[first:last] for k, v in arrays.items() if np.ndim(v)})

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
@np.errstate(over="ignore", invalid="ignore")
def build_field(pixels, mask, noise, method, saturation=math.nan, objects=None):
    """Return the `Field` of an image (ny, nx) less its background.

    `mask` is True where there is no value to use, and `noise` a standard deviation, or None; pixels
    and noise become the field's, in place. Pixels from the `saturation` level on are saturated.
    Structured `objects`, as `find_sources` returns them, are masked while the background is
    estimated. Raises InputError if too little of the image is unmasked.
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
    if objects is not None:
        grown = mask.copy()
        sane = objects[np.isfinite(objects["cxx"] + objects["cyy"] + objects["cxy"])]
        shapes = {name: sane[name] for name in ("x", "y", "cxx", "cyy", "cxy")}
        sep.mask_ellipse(grown, **shapes, r=GROWTH)
        background = estimate_background(pixels, grown, settings)
        if background is None:
            log.warning("sources fill every background box: kept the background of the first pass")
    background = background or estimate_background(pixels, mask, settings)
    if background is None:
        raise InputError(
            f"no background box of {settings.bw} x {settings.bh} pixels has half of its pixels "
            "unmasked; mask less, or take other background boxes (--bw and --bh)"
        )
    background.subfrom(pixels)
    excluded, noise = settle_noise(noise, mask, background, method.err_option)
    mask = bridge(pixels, noise, excluded, global_rms(background), method.bridge)
    return Field(pixels, excluded, mask, saturated, noise, background, method, frame)


def too_large(pixels):
    """Return where values are too large for SEP to sum, or no numbers."""
    return ~((pixels > -LARGEST) & (pixels < LARGEST))


def settle_noise(noise, mask, background, err_option):
    """Return the mask of an image and its noise for SEP: one number, or an array (ny, nx).

    Raises InputError if a noise image is of another order of magnitude than float32 can hold.
    """
    overall = global_rms(background)
    if err_option in ("none", "float_globalrms") or (noise is None and overall == 0):
        return mask, overall
    if noise is None:
        noise = background.rms()
    mask = mask | ~usable(noise)
    if mask.all():
        raise InputError("every noise value is unusable; is it in the image's unit?")
    noise[mask] = NO_WEIGHT
    return mask, noise


@timed("estimate background")
def estimate_background(pixels, mask, settings):
    """Return the `sep.Background` of an image (ny, nx), or None if SEP can use no box of it.

    In a noise of a few quanta SEP's medians, and so its level, are off by up to 1.4 quanta: there
    it takes a copy in which each value is spread over its quantum.
    """
    settings = settings.cut_to(pixels.shape)  # SEP allocates whole boxes
    masked = np.count_nonzero(mask)
    if 2 * masked > mask.size and (box_sums(settings, ~mask) < box_sums(settings, mask)).all():
        return None  # SEP takes no box of which less than half is unmasked
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


def box_sums(settings, where):
    """Return how many pixels of each background box are True in `where` (ny, nx)."""
    ny, nx = where.shape
    tops, lefts = np.arange(0, ny, settings.bh), np.arange(0, nx, settings.bw)
    rows = [where[top : top + settings.bh].sum(axis=0, dtype=np.int32) for top in tops]
    return np.add.reduceat(rows, lefts, axis=1)


def global_rms(background):
    """Return the global RMS of a `sep.Background`; where there is no noise SEP calls it 1."""
    rms = background.globalrms
    return 0.0 if rms == 1 and not background.rms().any() else rms


# ---------------------------------------------------------------------------------------------
# Sharing the work
# ---------------------------------------------------------------------------------------------

worker = {}  # the jobs of a worker process and where their results go, once it has started


def share(jobs, threads):
    """Yield what each job, a callable, returns, in order; done by up to this many processes.

    SEP holds the interpreter's lock, so threads would wait for one another. A process sees memory
    as it was when it was forked; only what a job returns or raises comes back. Raises InputError if
    a process is killed or can't be started.
    """
    workers = min(threads, len(jobs))
    if workers == 1:
        yield from (job() for job in jobs)
        return
    # A forked process is given the jobs as they are; through a queue they would have to be pickled.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        start = (jobs, directory, os.getpid())
        pool = ProcessPoolExecutor(workers, context, start_worker, start)
        try:
            with warnings.catch_warnings(action="ignore"):  # fork leaves out numpy's idle threads
                futures = [pool.submit(do_job, number) for number in range(len(jobs))]
            for future in futures:
                yield pickle.loads(future.result().read_bytes())
        except BaseException as error:
            for process in multiprocessing.active_children():  # what they still do is of no use
                process.kill()
            if isinstance(error, BrokenProcessPool | OSError):
                killed = isinstance(error, BrokenProcessPool)
                reason = "one was killed" if killed else one_line(error)
                text = f"worker processes failed ({reason}); if memory is short, try a smaller"
                raise InputError(f"{text} --threads") from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(jobs, directory, parent):
    """Prepare a worker process: keep its jobs, and end it when its parent is gone."""
    worker.update(jobs=jobs, directory=directory)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(number):
    """Do a job and return the path of a file with its pickled result.

    The pool waits for ever for a large result of a process that is killed while it sends it.
    """
    path = Path(worker["directory"], str(number))
    path.write_bytes(pickle.dumps(worker["jobs"][number]()))
    return path


# ---------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------

# Pixels and parts of a source that SEP has room for at first, and the most parts without overflow.
PIXEL_STACK = 300_000
SUB_OBJECTS, MAX_SUB_OBJECTS = 1024, 32767

# Bits of `flag` beside SEP's own; the first is SExtractor's.
SATURATED, BRIDGED, BESIDE_MASK = 4, 256, 512

CLEAN_ZONE = 10.0  # SExtractor's: how far cleaning looks, in units of the sum of both a
LARGE_KERNEL = 200  # elements, from which on a Fourier transform is faster

# A pixel of an object: whose, where, its light, that in the filtered image, and the margin by which
# the filtered light is above the threshold.
PIXEL = np.dtype("int, int, int, float, float, float")
PIXEL.names = ("owner", "y", "x", "light", "filtered", "margin")


class Detections(NamedTuple):
    """SEP's 30 fields of each object, and the map (ny, nx) that labels it with its index + 1."""

    objects: np.ndarray
    segmentation: np.ndarray


@timed("find sources")
def find_sources(field, threads=1):
    """Return the `Detections` in a field: SEP's, cleaned up, in SEP's order.

    Raises InputError if there is no noise for the threshold to be a multiple of, or SEP gives up.
    """
    if field.is_noiseless() and field.residual[~field.mask].any():
        raise InputError(
            "the background has no noise for the threshold to be in units of; give an absolute one "
            "(--err-option none), or a noise image (--err-option file)"
        )
    # SEP takes masked pixels for 0 too, but filters the first rows before it does.
    with replaced(field.residual, field.mask, 0):
        objects, labels = extract(field)
        some = batches(len(objects), BATCH)
        jobs = [partial(settle_objects, field, objects, labels, each) for each in some]
        objects, profiles = zip(*share(jobs, threads), strict=True)
    objects = np.concatenate(objects)
    kept = objects["npix"] > 0
    if field.method.extraction.clean:
        profiles, beta = np.concatenate(profiles), field.method.extraction.clean_param
        kept[kept] = survive_cleaning(objects[kept], profiles[kept], beta)
    ids = np.append(0, np.cumsum(kept) * kept).astype(np.int32)
    for rows in portions(labels.shape, PORTION):
        labels[rows] = np.where(field.mask[rows], 0, ids[labels[rows]])
    return Detections(objects[kept], labels)


def extract(field):
    """Return the objects that SEP finds in a `Field`, not cleaned, and the map of their labels."""
    keywords = asdict(field.method.extraction) | {
        "err": None if field.method.err_option == "none" else field.noise,
        "mask": field.mask if field.mask.any() else None,
        "filter_kernel": field.method.kernel,
        "segmentation_map": True,
        "clean": False,  # SEP's is quadratic, and of a noise array in wrong units
    }
    stack, parts, most = PIXEL_STACK, SUB_OBJECTS, field.residual.size + 2
    while True:
        sep.set_extract_pixstack(stack)
        sep.set_sub_object_limit(parts)
        try:
            return sep.extract(field.residual, **keywords)
        except MemoryError:
            raise
        except Exception as error:  # SEP raises nothing narrower
            problem = one_line(error)
            if "pixel buffer full" in problem and stack < most:
                stack = min(4 * stack, most)
            elif "deblending overflow" in problem and parts < MAX_SUB_OBJECTS:
                parts = min(4 * parts, MAX_SUB_OBJECTS)
            else:
                cure = "raise the threshold (--thresh), or switch deblending off"
                text = f"SEP gave up ({problem}); {cure} (--deblend-nthresh 1)"
                raise InputError(text) from error
            log.debug("SEP's limits of sub-objects, pixels grown to %d, %d", parts, stack)


def flag_pixels(found, field, measure_field):
    """Return the `Detections` with flags of saturated and bridged pixels in any of the fields."""
    objects = found.objects.copy()
    for each in (field,) if measure_field is field else (field, measure_field):
        none = each.mask is each.excluded  # bridged; to look for any takes long
        bridged = ([], []) if none else each.excluded & ~each.mask
        for where, bit in ((each.saturated, SATURATED), (bridged, BRIDGED)):
            labels = np.unique(found.segmentation[where])
            objects["flag"][labels[labels > 0] - 1] |= bit
    return found._replace(objects=objects)


@contextmanager
def replaced(array, where, value):
    """Put a value into an array, in place, and back at the end what was there."""
    before = np.copy(array[where])
    array[where] = value
    try:
        yield
    finally:
        array[where] = before


def settle_objects(field, objects, labels, some):
    """Take masked pixels away from a slice `some` of SEP's objects; return them and their profiles.

    `labels` (ny, nx) is the map of all `objects`, index + 1. An object that loses pixels keeps
    SEP's position and shape, those of the filtered light; one that loses all has an `npix` of 0;
    one that has masked pixels beside it is flagged. Without cleaning there are no profiles (None).
    """
    objects, extraction = objects[some].copy(), field.method.extraction
    rim = 1 if field.method.kernel is None else len(field.method.kernel) // 2 + 1
    top = max(objects["ymin"].min(initial=len(labels)) - rim, 0)
    end = objects["ymax"].max(initial=0) + rim + 1
    field, labels = field.rows(top, end), labels[top:end]
    where = np.flatnonzero((labels > some.start) & (labels <= some.start + len(objects)))
    where = where[np.argsort(labels.take(where), kind="stable")]
    owner = labels.take(where) - (some.start + 1)
    pixels, good = filter_pixels(field, where, owner), ~field.mask.take(where)
    left = np.bincount(owner[good], minlength=len(objects))
    if depth := field.depth():
        noise = np.bincount(owner[good], field.noise.take(where[good]), len(objects))
        thresh = extraction.thresh / depth * noise / np.maximum(left, 1)
        bright = owner[pixels["light"] > thresh[owner]]
        objects["thresh"], objects["tnpix"] = thresh, np.bincount(bright, minlength=len(objects))
    profiles = describe_profiles(objects, pixels, extraction) if extraction.clean else None
    if field.mask.any():
        y, x = np.divmod(where[good], field.mask.shape[1])
        beside = correlate(field.mask, np.ones((3, 3)), y, x) > 0
        objects["flag"][np.unique(owner[good][beside])] |= BESIDE_MASK
    pixels["y"] += top
    cut = left < objects["npix"]
    recount(objects, cut & (left > 0), pixels[good & cut[owner]])
    objects["npix"] = left
    return objects, profiles


def recount(objects, cut, pixels):
    """Describe the objects that are `cut` anew, in place, by the pixels left to each of them."""
    owner = pixels["owner"]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for axis in "xy":
        objects[f"{axis}min"][cut] = np.minimum.reduceat(pixels[axis], starts)
        objects[f"{axis}max"][cut] = np.maximum.reduceat(pixels[axis], starts)
    for kind, name in (("", "light"), ("c", "filtered")):
        top = pixels[np.lexsort((-pixels[name], owner))[starts]]
        objects[f"{kind}flux"][cut] = np.add.reduceat(pixels[name], starts)
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
    at, total = y * nx + x, 0
    for (i, j), weight in np.ndenumerate(kernel):
        dy, dx = i - top, j - left
        inside = (y >= -dy) & (y < ny - dy) & (x >= -dx) & (x < nx - dx)
        total += weight * np.where(inside, image.take(at + (dy * nx + dx), mode="clip"), 0)
    return total


@np.errstate(all="ignore")
def describe_profiles(objects, pixels, settings):
    """Return what `survive_cleaning` needs of each object, as SExtractor's CLEAN has it.

    Around an object light falls off as height (1 + alpha r^2)^-`clean_param`, r in units of (a, b).
    `light` ranks it; `margin`, that of its `minarea`-th highest pixel, is what a brighter one has
    to exceed.
    """
    thresh, area, light = objects["thresh"], np.pi * objects["a"] * objects["b"], objects["cflux"]
    owner, half = pixels["owner"], (thresh + objects["peak"]) / 2
    core = np.bincount(owner[pixels["light"] > half[owner]], minlength=len(objects))
    steepness = -2 * np.log(np.where(thresh < half, thresh / half, 0.99)) * area
    height = light / (2 * area * np.minimum(np.maximum(objects["tnpix"] - core, 1) / steepness, 1))
    alpha = ((height / thresh) ** (1 / settings.clean_param) - 1) * area / objects["npix"]
    margin = margins_to_eat(objects["npix"], pixels, settings.minarea)
    return np.rec.fromarrays((height, alpha, light, margin), names="height, alpha, light, margin")


@np.errstate(all="ignore")
def survive_cleaning(objects, profiles, beta):
    """Return True for objects that are more than a brighter neighbour's light (SExtractor's CLEAN).

    Of two objects that are close the brighter eats the other if its profile, at the other's place,
    exceeds the other's margin. Pairs (i, j) are compared in order; an object that is eaten by the
    time its own pairs begin eats no other.
    """
    x, y, a, cxx, cyy, cxy = (objects[name] for name in ("x", "y", "a", "cxx", "cyy", "cxy"))
    height, alpha, light, margin = (profiles[name] for name in profiles.dtype.names)
    meals = [np.empty((3, 0), int)]
    for i, j in close_pairs(x, y, CLEAN_ZONE * a):
        eater = np.where(light[j] < light[i], i, j)
        eaten, dx, dy = i + j - eater, x[i] - x[j], y[i] - y[j]
        ellipse = cxx[eater] * dx**2 + cyy[eater] * dy**2 + cxy[eater] * dx * dy
        spread = 1 + alpha[eater] * ellipse
        eats = (spread > 1) & (spread < 1e10) & (height[eater] * spread**-beta > margin[eaten])
        meals.append(np.array([i, j, eaten])[:, eats])
    meals = np.hstack(meals)
    meals = meals[:, np.lexsort(meals[1::-1])].T.tolist()
    alive = np.ones(len(objects), bool)
    for i, pairs in itertools.groupby(meals, operator.itemgetter(0)):
        if alive[i]:
            for _, j, eaten in pairs:
                if alive[j]:
                    alive[eaten] = False
    return alive


def margins_to_eat(npix, pixels, minarea):
    """Return the margin of each object's `minarea`-th highest pixel; 0 of one with fewer.

    As in SExtractor's code, the pixel found after the first `minarea` is left out, and of just
    `minarea` the first found is taken. Pixels are found row by row, except that the part of a row
    that lies left of the start of the row before comes first of all.
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
    """Yield, in portions, all pairs i < j of objects no further apart than their reaches in sum.

    Objects are grouped by reach, within a factor of 2. Those of a group seek all of the same or
    smaller groups in the 3 x 3 cells around them; a cell is as wide as two of these can reach.
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
WINDOW_SIGMA, WINDOW_REACH = 2 / 2.35, 4.0

# How much further a neighbour matters to a window that moves, and how far in sigmas a centroid may:
# simulated sources that move further are then further from the truth than they were before.
WINDOW_ROOM, STRAY = 1.25, 0.5

# Masked pixels have this label, exact in float32, while SEP measures, so that it leaves them out as
# it does neighbours. With `mask=` beside `segmap=` it would scale each sum up by the area of both.
MASKED = 2**30

# How many sources are measured at a time, and pixels of the window of each.
BATCH = 1000
WINDOW_PIXELS = 500


@timed("measure")
def measure(field, measure_field, found, settings, threads=1):
    """Measure background, sizes, Kron and aperture fluxes, and windowed centroids.

    The objects `found` in `field` have their Kron ellipses there, and are measured in the other
    field, without neighbours and masked pixels; meanwhile the map labels masked pixels.

    Returns
    -------
    dict of ndarray
        A value for each object, by the name of the column: sizes in pixels, fluxes and levels in
        the frame of `measure_field`, nan where there is nothing to measure.
    """
    objects, labels = found
    shapes, sane = sane_shapes(objects)
    ids = np.flatnonzero(sane).astype(np.int32) + 1
    with replaced(labels, field.mask, MASKED):
        neighbours = {"segmap": labels, "seg_id": ids}
        r_k, kron_flag = sep.kron_radius(field.residual, *shapes, KRON_REACH, **neighbours)
    # Kron (1980) and SExtractor. Noise around nothing may give any r_k, positive light none beyond.
    kron = settings.kron_factor * np.clip(np.nan_to_num(r_k), 0, KRON_REACH)
    kron = np.maximum(kron, settings.kron_min_radius)
    jobs = [partial(background_at, measure_field, objects["x"], objects["y"])]
    for some in batches(len(ids), BATCH):
        neighbours = {"segmap": labels, "seg_id": ids[some]}
        own = shapes[:, some], kron[some]
        jobs.append(partial(measure_some, measure_field, *own, neighbours, settings))
    with replaced(labels, measure_field.mask, MASKED):
        measured, *parts = share(jobs, threads)
    parts, flags = zip(*parts, strict=True)
    flag = np.full(len(objects), sep.APER_ALLMASKED, np.int64)
    # The Kron radius reaches further than the flux: edge and neighbours there don't matter to it.
    flag[sane] = np.concatenate(flags) | (kron_flag & ~(sep.APER_TRUNC | sep.APER_HASMASKED))
    measured["flag_auto"] = flag
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        measured[name] = np.full(len(objects), np.nan)
        measured[name][sane] = np.where(kron_flag & sep.APER_ALLMASKED, np.nan, values)
    return measured


def background_at(field, x, y):
    """Return level and RMS of the background at the pixels nearest to some points, by column."""
    x, y = (np.rint(np.nan_to_num(place)) for place in (x, y))
    nearest = pixels_at(y, x, field.mask.shape)[1].astype(int)
    maps = {"background": field.background.back, "rms": field.background.rms}
    return {name: make().take(nearest).astype(float) for name, make in maps.items()}


def sane_shapes(objects):
    """Return x, y, a, b and theta of the objects that SEP can measure, and which these are.

    One that it refuses would make it give up on all: a shape that is not finite, or a theta that
    was a float32 and is a hair over pi/2.
    """
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    theta = np.mod(theta + np.pi / 2, np.pi) - np.pi / 2
    shapes = np.array([x, y, np.maximum(a, b), np.minimum(a, b), theta])
    sane = np.isfinite(shapes).all(axis=0) & (shapes[3] > 0)
    return shapes[:, sane], sane


def measure_some(field, shapes, kron, neighbours, settings):
    """Return what is measured of some objects in one field, and their flags; see `measure`."""
    x, y, a, _, _ = shapes
    # Like SExtractor, AUTO sums whole pixels whose centres are in the ellipse.
    ellipse = {"r": kron, "subpix": 1, **neighbours}
    flux, error, flag = sum_light(sep.sum_ellipse, field, *shapes, **ellipse)
    growth = {"frac": 0.5, "normflux": flux, "subpix": 5, **neighbours}
    radius, _ = sep.flux_radius(field.residual, x, y, KRON_REACH * a, **growth)
    radius[~((flux > 0) & (radius < KRON_REACH * a))] = np.nan
    sigma = WINDOW_SIGMA * np.maximum(radius, 0.5)
    xwin, ywin = windowed_centroids(field, x, y, sigma, neighbours)
    measured = windowed_errors(field, xwin, ywin, sigma, neighbours)
    measured |= {"flux_auto": flux, "fluxerr_auto": error, "kron_radius": kron}
    measured |= {"flux_radius": radius, "xwin": xwin, "ywin": ywin}
    for diameter in settings.aperture_diameters:
        circle = {"r": diameter / 2, "subpix": 0, **neighbours}  # 0 is exact
        flux, error, _ = sum_light(sep.sum_circle, field, x, y, **circle)
        measured |= {f"flux_{aperture(diameter)}": flux, f"fluxerr_{aperture(diameter)}": error}
    return measured, flag


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


def windowed_centroids(field, x, y, sigma, neighbours):
    """Return the centroids in Gaussian windows about (x, y), nan where there is no `sigma`.

    SExtractor's XWIN_IMAGE and YWIN_IMAGE. `sep.winpos` knows no neighbours, and would run to a
    bright one: a source that has any in reach is measured on a stamp of its own without them. Of
    `neighbours`, the map "segmap" labels masked pixels too, and "seg_id" are the sources' labels.
    Pixels at the edge of the window count by their exact part in it (`subpix` 0).
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    reach = WINDOW_ROOM * WINDOW_REACH * np.nan_to_num(sigma) + 2
    _, _, flag = sep.sum_circle(image, x, y, reach, subpix=1, **neighbours)
    crowded, sized = (flag & sep.APER_HASMASKED) > 0, np.isfinite(sigma)
    alone, found = sized & ~crowded, np.full((2, len(sigma)), np.nan)
    found[:, alone] = sep.winpos(image, x[alone], y[alone], sigma[alone], subpix=0)[:2]
    for i in np.flatnonzero(sized & crowded):
        stamp, left, bottom = lone_stamp(image, labels, ids[i], x[i], y[i], reach[i])
        at_x, at_y, _ = sep.winpos(stamp, [x[i] - left], [y[i] - bottom], [sigma[i]], subpix=0)
        found[:, i] = at_x[0] + left, at_y[0] + bottom
    found[:, np.hypot(found[0] - x, found[1] - y) > STRAY * sigma] = np.nan
    return found


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
    """Return which pixels are in an image (ny, nx), and the flat indices of those nearest."""
    y, x = np.clip(rows, 0, shape[0] - 1), np.clip(columns, 0, shape[1] - 1)
    return (y == rows) & (x == columns), y * shape[1] + x


@np.errstate(over="ignore", invalid="ignore")
def windowed_errors(field, xwin, ywin, sigma, neighbours):
    """Return the error ellipses of the windowed centroids, by column; nan where there is none.

    SExtractor's ERRAWIN_IMAGE, ERRBWIN_IMAGE (pixels) and ERRTHETAWIN_IMAGE (here in radians), of
    the source's own pixels and the sky; parameters else as in `windowed_centroids`.
    """
    image, labels, ids = field.residual, neighbours["segmap"], neighbours["seg_id"]
    noise, gain = field.noise, field.method.extraction.gain or np.inf
    known, sums = np.isfinite(xwin), np.full((4, len(xwin)), np.nan)
    halves = np.ceil(np.minimum(WINDOW_REACH * sigma, max(image.shape)))
    # All windows of one size together, some rows at a time: fast for small ones, lean for large.
    for half in np.unique(halves[known]).astype(int):
        alike, offsets = known & (halves == half), np.arange(-half, half + 1)
        x, y, s, own_id = (values[alike, None, None] for values in (xwin, ywin, sigma, ids))
        columns, total = np.rint(x).astype(int) + offsets, 0
        for part in portions((len(offsets), len(offsets)), WINDOW_PIXELS):
            rows = np.rint(y).astype(int) + offsets[part, None]
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
        powers = zip(parts.bases, parts.powers, strict=True)
    except (ValueError, AttributeError):
        return text
    if not {(u.rad, -2), (u.beam, -1), (u.pix, -1)} & set(powers):
        return text
    with suppress(ValueError):  # not every unit is FITS's
        return (unit * u.pix).to_string("fits")
    return (unit * u.pix).to_string()


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def build_catalog(columns, found, measured, field, measure_field, wcs, settings):
    """Return the catalogue as a DataFrame of `catalog_columns`, with a row for each object.

    Here fluxes and levels leave the frames of the two fields, in which the objects were `found` and
    `measured` (as by `measure`), for image values. Without a WCS the sky positions are nan.
    """
    from pandas import DataFrame

    objects = found.objects
    table = {name: objects[name] for name in objects.dtype.names} | measured
    table["id"] = np.arange(1, len(objects) + 1)
    frames = {"image": field.frame, "measure": measure_field.frame}
    for column in columns:
        of, *_ = (column.unit or "").split(" ")
        if of in frames and column.name in table:
            convert = frames[of].levels if column.name == "background" else frames[of].differences
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
        # To first order.
        table[f"magerr_{kind}"] = 2.5 / math.log(10) * table[f"fluxerr_{kind}"] / flux
    return DataFrame({column.name: table[column.name] for column in columns})


def sky_positions(wcs, x, y):
    """Return right ascension and declination of pixels (0-based) in degrees, ICRS, or nan."""
    if wcs is not None and len(x):
        try:
            if wcs.wcs.lngtyp not in ("RA", "GLON"):
                raise ValueError(f"{wcs.wcs.lngtyp} is neither RA nor GLON")
            with warnings.catch_warnings(action="ignore"):
                sky = wcs.pixel_to_world(x, y).icrs
            return sky.ra.deg, sky.dec.deg
        except Exception as error:  # wcslib and the frames raise many kinds
            log.warning("the WCS gives no sky positions: ra and dec are nan (%s)", one_line(error))
    return np.full((2, len(x)), np.nan)


# ---------------------------------------------------------------------------------------------
# Products
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


def write_image(product, path, result):
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
    history = [f"{SIGNATURE}: {product}", *result.settings]
    wcs, unit = result.origin.wcs, result.origin.unit
    if (result.image_format or path.suffix.lower()) in ("tiff", ".tiff", ".tif"):
        import tifffile

        if product == "segmentation":
            values = values.astype(np.min_scalar_type(values.max()))
        tifffile.imwrite(path, values, description="\n".join(history), metadata=None)
        return
    with warnings.catch_warnings(action="ignore"):  # of cards that the WCS standard renames
        hdus = wcs.to_fits(relax=True) if wcs else fits.HDUList([fits.PrimaryHDU()])
        # astropy swaps bytes in place: of an array that other processes share, on a copy.
        shared = product in ("segmentation", "subtracted")
        hdus[0].data = values.copy() if shared else values
        if unit and product != "segmentation":
            hdus[0].header["BUNIT"] = unit
        for line in history:
            hdus[0].header.add_history(line)
        hdus.verify("exception")
    write_hdus(hdus, path)


def write_hdus(hdus, path):
    """Write a FITS file, packed if its extension says so: by gzip without file name and time."""
    if path.suffix != ".gz":
        hdus.writeto(path, overwrite=True)
        return
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
        hdus.writeto(stream)


def write_catalog(path, result):
    """Write the catalogue as tab-separated text with a line of names, `nan` for no value.

    Floats have ten significant digits; ra and dec have twelve, a few micro-arcseconds.
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

    In sky coordinates (ICRS) where the catalogue has them, else in DS9's 1-based pixels. There DS9
    counts the angle from west through north, 90 degrees ahead of the position angle.
    """
    names = ("x", "y", "a", "b", "theta", "id")
    x, y, a, b, theta, labels = (result.catalog[name].to_numpy() for name in names)
    a, b, dx, dy = 3 * a, 3 * b, np.cos(theta), np.sin(theta)
    if np.isfinite(result.catalog["ra"]).any():
        system, form = "icrs", 'ellipse({:.15g},{:.15g},{:.9g}",{:.9g}",{:.9g})'
        ends = (x, y), (x + a * dx, y + a * dy), (x - b * dy, y + b * dx)
        with warnings.catch_warnings(action="ignore"):
            centre, *ends = (result.origin.wcs.pixel_to_world(*end).icrs for end in ends)
        angle = (centre.position_angle(ends[0]).deg + 90) % 180
        axes = (centre.separation(end).arcsec for end in ends)
        shapes = centre.ra.deg, centre.dec.deg, *axes, angle
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


# The most pixels a side of a panel; larger images are reduced to it before anything is drawn.
PICTURE_SIDE = 1000


@contextmanager
def figure_at(path, **keywords):
    """Yield a figure that is free of what the user's matplotlibrc may say; then write its PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(**keywords)
        yield figure
        # A higher level takes longer to make files that are little smaller.
        figure.savefig(path, format="png", pil_kwargs={"compress_level": 1})


def block_edges(shape):
    """Return the first rows and the first columns of the blocks that become a picture's pixels."""
    step = math.ceil(max(shape) / PICTURE_SIDE)
    return np.arange(0, shape[0], step), np.arange(0, shape[1], step)


@np.errstate(invalid="ignore")  # 0 / 0
def block_means(image):
    """Return the mean of the finite values of each block of an image, nan where there are none."""
    (tops, lefts), means = block_edges(image.shape), []
    for strip in np.split(image, tops[1:]):
        finite = np.isfinite(strip)
        if not finite.all():
            strip = np.where(finite, strip, 0)
        sums = strip.sum(axis=0, dtype=np.float64), finite.sum(axis=0)
        means.append(np.divide(*np.add.reduceat(sums, lefts, axis=1)))
    return np.array(means)


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
    picture = field.frame.differences(block_means(field.residual))
    masked = block_means(field.excluded)
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
    noise = middle - low or (top - middle) / 1000 or 1.0
    return AsinhNorm(noise / 2, middle - 3 * noise, max(top, middle + 3 * noise))


def draw_overlay(path, result):
    """Draw the picture of the sources (PNG)."""
    width, height = panel_size(result.field.mask.shape)
    whole = max(width + 1, 3.3), height + 1.1  # wide enough for the title
    place = np.divide([0.8, 0.6, width, height], [*whole, *whole])
    with figure_at(path, figsize=whole, dpi=120) as figure:
        show_sources(figure.add_axes(place, anchor="W"), result)


def draw_overview(path, result):
    """Draw four panels with colour bars: sources, background, RMS, segmentation (PNG)."""
    from matplotlib.colors import ListedColormap

    field, (objects, labels) = result.field, result.found
    width, height = panel_size(labels.shape)
    whole = 2 * width + 3, 2 * height + 1.5
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(objects) + 1, 3))
    colours[0] = 0
    in_colours = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": len(objects)}
    tops, lefts = block_edges(labels.shape)
    largest = np.maximum.reduceat(np.maximum.reduceat(labels, tops), lefts, axis=1)
    with figure_at(path, figsize=whole, dpi=85, layout="compressed") as figure:
        panels = figure.subplots(2, 2).ravel()
        figure.colorbar(show_sources(panels[0], result), ax=panels[0])
        for axes, title, picture, style in (
            (panels[1], "background", block_means(field.level_map()), {}),
            (panels[2], "background RMS", block_means(field.rms_map()), {}),
            (panels[3], "segmentation", largest, in_colours),
        ):
            figure.colorbar(show_image(axes, picture, labels.shape, **style), ax=axes)
            axes.set_title(title, loc="left")


class Product(NamedTuple):
    """A product: its name in the output directory ("": on request), what it is, its writer."""

    default: str  # {} is the extension of an image
    text: str
    write: Callable[[Path, Result], None]


PRODUCTS = {
    "background": Product("background{}", "background level", partial(write_image, "background")),
    "rms": Product("rms{}", "noise of the background", partial(write_image, "rms")),
    "segmentation": Product("segmentation{}", "label map", partial(write_image, "segmentation")),
    "overlay": Product("sources.png", "PNG of the sources as ellipses", draw_overlay),
    "catalog": Product("catalog.tsv", "catalogue", write_catalog),
    "subtracted": Product("", "background-subtracted image", partial(write_image, "subtracted")),
    "catalog_fits": Product("", "catalogue as FITS table with units", write_catalog_fits),
    "regions": Product("", "DS9 region file", write_regions),
    "overview": Product("", "PNG: sources, background, RMS, segmentation", draw_overview),
}


def write_products(paths, targets, result, threads):
    """Write each product to its path, shared by this many processes; errors name its target."""

    def write(name):
        with timed(f"write {name}"), writing(targets[name]):
            PRODUCTS[name].write(paths[name], result)

    names = sorted(paths, key=lambda name: targets[name].suffix != ".png")  # which takes longest
    list(share([partial(write, name) for name in names], threads))


@contextmanager
def writing(target):
    """Turn what keeps a product from being written into an `InputError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        text = f"can't be written ({reason}); make room or choose another place"
        raise InputError(f"{target}: {text}") from error


# The signals at which a run removes what it has made before it ends.
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def ignore_stops():
    """Let no signal interrupt what is done next."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def handling_signals(handler):
    """Let `handler` take the signals that stop a run, but for those ignored, as under nohup."""
    handlers = {signum: signal.getsignal(signum) for signum in STOPS}
    for signum, before in handlers.items():
        signal.signal(signum, signal.SIG_IGN if before == signal.SIG_IGN else handler)
    try:
        yield
    finally:
        for signum, before in handlers.items():
            signal.signal(signum, before)


@contextmanager
def staged(targets):
    """Yield a path to write each target to, by the name of its product; then put all in place.

    Products are made in a hidden directory beside their target, which only its owner may enter. If
    anything fails, or a signal stops the run, all of them are removed, and no product has changed.
    A target that can't be written raises an `InputError` before anything is done.
    """
    paths, hidden, owner = {}, {}, os.getpid()

    def stop(signum, _):
        if os.getpid() != owner:  # a worker process, which inherits this handler
            os._exit(128 + signum)
        ignore_stops()
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
        stack.callback(ignore_stops)  # before all that is removed
        yield paths
        ignore_stops()
        put_in_place(paths, targets)


def put_in_place(paths, targets):
    """Move all products into place, older ones out of the way first; if one fails, undo it all.

    A product that replaces a file keeps the mode of that file.
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
# Each `..._advice` returns one line on what is likely a mistake, or None.


def padding_of(pixels, mask):
    """Return the value with which an image (ny, nx) is filled up at its border; nan if it isn't.

    It is the commonest value of the border. Over 2 % of the blocks (32 x 32) have no other, and few
    of the rest hold any of it. Where the faintest of the other pixels are less than half as high
    above it as their median, it is a background that is cut off, as at 0.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    values, counts = np.unique(border, return_counts=True)
    if counts.max() < 32:
        return math.nan
    value, blocks = values[counts.argmax()], BackgroundSettings(bw=32, bh=32)
    same = (pixels == value) & ~mask
    inside, good = box_sums(blocks, same), box_sums(blocks, ~mask)
    padded, rare = (inside > 0) & (inside == good), 10 * inside < good
    if padded.mean() <= 0.02 or 2 * rare.sum() <= (inside < good).sum():
        return math.nan
    lowest, faint, middle = np.percentile(sample(pixels, mask | same), [0, 5, 50]) - value
    return math.nan if lowest > 0 and 2 * faint < middle else value


def padding_advice(origin, padding, values):
    """Return a text on a value (nan: none) that is likely padding; `values` is a sample."""
    if math.isnan(padding):
        return None
    stored = str(padding if origin.black is None else origin.black - padding)
    text = f"{100 * np.mean(values == padding):.0f} % of the image is exactly {stored}: if it is"
    return f"{text} padding, name it (--blank {stored})"


def depth_advice(field):
    """Return a text on a matched filter that goes deeper than the threshold says."""
    depth, thresh = field.depth() or 1, field.method.extraction.thresh
    if depth == 1:
        return None
    return (
        f"with noise for each pixel the matched filter goes {depth:.2f} times deeper: {thresh:g} "
        f"is as {thresh / depth:.3g} on the global RMS, and {thresh * depth:.3g} as {thresh:g} "
        "there; --filter-type conv goes no deeper"
    )


@np.errstate(over="ignore")
def counts_advice(field, values):
    """Return a text on an image in which over 40 % of the pixels are one value, and so no noise.

    `values` is a sample of the image. Rounded noise with values on both sides of its commonest one
    is measured well; where that is the lowest, photons are sparse, or the background is cut off.
    """
    levels, numbers = np.unique(values, return_counts=True)
    if not field.method.measures_noise() or len(levels) < 2:
        return None
    part, level = numbers.max() / len(values), levels[numbers.argmax()]
    low, high = np.percentile(values, [1, 99], method="nearest")
    if part <= 0.4 or (low < level < high and quantum_of(values)):
        return None
    # Bernstein's inequality for Poisson counts under the filter, with odds of exp(14) against a
    # peak of noise above the threshold; the rate is that of the zeros.
    rate, fwhm, odds = -math.log(part), 4, 14
    area = math.pi / math.log(4) * fwhm**2
    excess = math.sqrt(2 * rate * area * odds) + odds / 3
    thresh = level + np.diff(levels).min() * (rate + excess / area) - field.level()
    if not math.isfinite(thresh):
        return None
    return (
        f"{100 * part:.0f} % of the pixels have the value {level:g}, so noise is no unit: mask "
        "them if they hold no data; else take an absolute threshold (--err-option none --thresh "
        f"{thresh:.3g}) and smooth more (--filter-case gaussian --filter-fwhm {fwhm})"
    )


def mask_advice(field):
    """Return a text on a mask, of over 5 % of the pixels, that at least doubles the noise."""
    few = np.count_nonzero(field.mask) <= 0.05 * field.mask.size
    if few or not field.method.measures_noise():
        return None
    hidden = field.mask & ~too_large(field.residual)
    if hidden.mean() <= 0.05:
        return None
    settings, rms = field.method.background, global_rms(field.background)
    whole = global_rms(estimate_background(field.residual, field.mask ^ hidden, settings))
    if not 0 < 2 * whole <= rms:
        return None
    return (
        f"the mask makes the noise {rms / whole:.1f} times that of the whole image: if it hides "
        "quiet sky, faint sources are lost; was it made for this image?"
    )


def boxes_advice(field, found):
    """Return a text on sources larger than half a box of a background estimated in a single pass.

    Sources with a mean up to 6 times the noise may be nothing but a background that changes within
    a box, for which larger boxes are wrong: they don't count.
    """
    objects, longest = found.objects, max(field.mask.shape)
    settings = field.method.background.cut_to(field.mask.shape)
    widest = max(settings.bw, settings.bh)
    large = objects[objects["npix"] > settings.bw * settings.bh / 2]
    large = large[large["flux"] > 6 * global_rms(field.background) * large["npix"]]
    if field.method.background_passes == 2 or widest == longest or not len(large):
        return None
    width, height = (large[f"{n}max"] - large[f"{n}min"] + 1 for n in "xy")
    size = min(2 * max(widest, math.ceil(np.sqrt(width * height).max())), longest)
    return (
        f"sources larger than half a background box: {len(large)}; part of their light is taken "
        f"for background: to measure them, use boxes of {size} pixels (--bw {size} --bh {size}), "
        "if the background changes little over them"
    )


def no_sources_advice(field, found):
    """Return a text on why there are no sources."""
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
    """Return a converter for argparse: a finite int or float within bounds, more than `above`."""
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


class Parser(argparse.ArgumentParser):
    """A parser that takes any negative number for a value, and whose errors are one line."""

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # argparse takes -1e-5 for an option, but nothing that begins with a blank.
        words = [f" {word}" if re.match(r"-\.?\d", word) else word for word in words]
        return super().parse_args(words, namespace)

    def error(self, message):
        self.exit(2, f"{PROG}: error: {one_line(message):.1000} (see --help)\n")


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
        description="Find the sources in an image: background, segmentation map and catalogue.",
        allow_abbrev=False,
    )
    for settings in (BackgroundSettings, ExtractionSettings, PhotometrySettings):
        parser.set_defaults(**asdict(settings()))
    parser.set_defaults(maskthresh=0.0, mask_box=[], blank=[], bridge=Method.bridge)
    parser.set_defaults(background_passes=1, err_option="float_globalrms", err_type="stddev")
    parser.set_defaults(filter_case="default", filter_fwhm=2.0, output_dir=Path("."), threads=1)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="FITS or TIFF image")
    real, positive = number(float), partial(number, float, above=0)

    group = parser.add_argument_group("input")
    add = partial(add_option, group)
    add("--hdu", str, "index, EXTNAME, or EXTNAME,EXTVER (default: first with an image)")
    add("--plane", number(int, 0), "plane of a cube or stack, over the flattened other axes")
    add("--mask", Path, "mask image, FITS or TIFF, of the same shape")
    add("--mask-hdu", str, "HDU of the mask, as --hdu")
    either = partial(add_option, group.add_mutually_exclusive_group())
    either("--maskthresh", real, "mask pixels greater than this are masked")
    text = "or: mask pixels with any of these bits are masked, such as 1 2 1024, or their sum"
    either("--mask-bits", number(int, 1, 2**64 - 1), text, nargs="+", metavar="BIT")
    box = {"nargs": 4, "action": "append", "metavar": ("XMIN", "XMAX", "YMIN", "YMAX")}
    add("--mask-box", number(int, 0), "mask 0-based pixels, ends included; repeatable", **box)
    more = {"action": "append", "metavar": "VALUE"}
    add("--blank", real, "value of pixels without data, such as 0 in a mosaic; repeatable", **more)
    add("--bridge", number(int, 0, 5), "interpolate over masks this narrow, pixels; 0: none")

    add = partial(add_option, parser.add_argument_group("background"))
    add("--bw", number(int, 8), "width of the boxes, pixels")
    add("--bh", number(int, 8), "height of the boxes, pixels")
    add("--fw", number(int, 1, 99, odd=True), "width of the median filter, boxes, odd")
    add("--fh", number(int, 1, 99, odd=True), "height of the median filter, boxes, odd")
    add("--fthresh", number(float, 0), "filter boxes this far from the median")
    add("--background-passes", (1, 2), "with 2, mask the sources and estimate it again")

    add = partial(add_option, parser.add_argument_group("detection"))
    add("--thresh", positive(), "times the noise; absolute without noise")
    noises = ("float_globalrms", "array_rms", "none", "file")
    add("--err-option", noises, "noise: one number, RMS map, none, or --err-file")
    add("--err-file", Path, "noise image for --err-option file")
    add("--err-hdu", str, "HDU of the noise image, as --hdu")
    add("--err-type", ("stddev", "variance", "weight"), "weight is inverse variance")
    add("--gain", positive(), "e-/ADU, for Poisson noise in errors")
    add("--saturation", real, "level of saturated pixels (default: SATURATE)")
    add("--minarea", number(int, 1, 2**31 - 1), "least pixels of a source")

    add = partial(add_option, parser.add_argument_group("filter"))
    kernels = ("none", "default", "gaussian", "tophat", "file")
    add("--filter-case", kernels, "default is 1 2 1 / 2 4 2 / 1 2 1")
    add("--filter-fwhm", positive(maximum=50), "FWHM of gaussian, diameter of tophat, pixels")
    add("--filter-file", Path, "kernel as text or SExtractor's .conv")
    add("--filter-type", ("matched", "conv"), "how to filter where noise is an array")

    group = parser.add_argument_group("deblending and cleaning")
    add = partial(add_option, group)
    add("--deblend-nthresh", number(int, 1, 64), "number of levels")
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
    add("-o --output-dir", Path, "of products without a path; made if missing", metavar="DIR")
    for name, product in PRODUCTS.items():
        default = product.default.format(".fits or .tiff")
        note = f"default: {default}" if default else "on request"
        add(option_of(name), Path, f"{product.text} ({note})", metavar="PATH")
    add("--image-format", ("fits", "tiff"), "of images (default: by file extension, else fits)")

    group = parser.add_argument_group("general")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="tell stages and times")
    volume.add_argument("-q", "--quiet", action="store_true", help="tell nothing but errors")
    add = partial(add_option, group)
    add("--threads", number(int, 1, 1024), "processes that share the work; nothing else changes")
    group.add_argument("--version", action="version", version=SIGNATURE)
    return parser


def check_usage(args):
    """Return what is wrong with a combination of options, or None."""
    needs = {"mask_hdu": "mask", "mask_bits": "mask", "err_hdu": "err_file"}
    needs |= {"measure_hdu": "measure_image", "measure_plane": "measure_image"}
    for name, needed in needs.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            return f"{option_of(name)} needs {option_of(needed)}"
    for choice, path in (("err_option", "err_file"), ("filter_case", "filter_file")):
        if (getattr(args, choice) == "file") != (getattr(args, path) is not None):
            return f"{option_of(choice)} file and {option_of(path)} need each other"
    for xmin, xmax, ymin, ymax in args.mask_box:
        box = f"--mask-box {xmin} {xmax} {ymin} {ymax} (XMIN XMAX YMIN YMAX)"
        for line, first, last in (("column", xmin, xmax), ("row", ymin, ymax)):
            if first > last:
                return f"{box}: first {line} {first} is after last {line} {last}"
    if len(set(map(aperture, args.aperture_diameters))) < len(args.aperture_diameters):
        return "--aperture-diameters: each diameter may be given once"
    inputs = (args.image, args.mask, args.err_file, args.filter_file, args.measure_image)
    taken = {os.path.realpath(path) for path in inputs if path}
    for name, path in product_paths(args).items():
        if os.path.realpath(path) in taken:
            return f"{option_of(name)} {path}: the image or another option names this file already"
        if os.path.exists(path) and not os.path.isfile(path):
            return f"{option_of(name)} {path}: not a regular file"
        taken.add(os.path.realpath(path))
    return None


def product_paths(args):
    """Return the path of each product to write, by name."""
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
def run(args):
    """Do the whole work, from the image to its products."""
    mesh, extraction, photometry = (
        kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
        for kind in (BackgroundSettings, ExtractionSettings, PhotometrySettings)
    )
    kernel = make_kernel(args.filter_case, args.filter_fwhm, args.filter_file)
    method = Method(kernel, args.err_option, args.background_passes, mesh, extraction, args.bridge)
    origin, pixels = read_image(args.image, args.hdu, args.plane, args.blank)
    shape, mask, noise, measure_origin = pixels.shape, None, None, origin
    if args.mask:
        chosen = args.mask, args.mask_hdu, args.plane
        mask = read_mask(*chosen, args.maskthresh, args.mask_bits, shape)
    if args.err_file:
        noise = read_noise(args.err_file, args.err_hdu, args.plane, args.err_type, shape)
    if args.measure_image:
        chosen = args.measure_image, args.measure_hdu, args.measure_plane
        measure_origin, measure_pixels = read_measure_image(*chosen, args.blank, origin, shape)
    if args.saturation is not None:
        both = origin, measure_origin
        origin, measure_origin = (replace(each, saturation=args.saturation) for each in both)
    targets = product_paths(args)
    with staged(targets) as paths:  # so that a place that can't be written fails before the work
        if args.threads > 1:
            import matplotlib  # noqa: F401  # whose temporary directory a worker would leave behind
        with about(origin.name):
            excluded = build_mask(pixels, mask, noise, args.mask_box)
            padding, values = padding_of(pixels, excluded), sample(pixels, excluded)
            report_image(origin, pixels, excluded)
            image = pixels, excluded, noise, method, origin.saturation
            field = measure_field = subtract_background(*image, args.threads)
            report_field(field)
            counts = counts_advice(field, values[values != padding])
            if field.is_noiseless() and counts:
                raise InputError(counts)
            found = find_sources(field, args.threads)
            log.info("sources       %d", len(found.objects))
            advice = [padding_advice(origin, padding, values), depth_advice(field), counts]
            advice += [mask_advice(field), boxes_advice(field, found)]
            for text in filter(None, [*advice, no_sources_advice(field, found)]):
                log.warning(text)
        if args.measure_image:
            with about(measure_origin.name):
                excluded = build_mask(measure_pixels, mask, None, args.mask_box)
                report_image(measure_origin, measure_pixels, excluded)
                image = measure_pixels, excluded, None, method.for_measuring()
                level = measure_origin.saturation
                measure_field = subtract_background(*image, level, args.threads)
        found = flag_pixels(found, field, measure_field)
        measured = measure(field, measure_field, found, photometry, args.threads)
        columns, both = catalog_columns(photometry.aperture_diameters), (field, measure_field)
        catalog = build_catalog(columns, found, measured, *both, origin.wcs, photometry)
        columns = name_units(columns, origin.unit, measure_origin.unit)
        settings = describe_settings(args, origin)
        result = Result(origin, field, found, catalog, columns, settings, args.image_format)
        write_products(paths, targets, result, args.threads)
    for product, path in targets.items():
        log.info("%-13s %s", product, path.name)


def subtract_background(pixels, mask, noise, method, saturation, threads):
    """Return the `Field` of an image; of two passes the second masks the sources of the first.

    Parameters else as in `build_field`.
    """
    objects = None
    if method.background_passes == 2:
        copies = pixels.copy(), mask, None if noise is None else noise.copy()
        first = build_field(*copies, method)
        if not first.is_noiseless():
            objects = find_sources(first, threads).objects
    return build_field(pixels, mask, noise, method, saturation, objects)


def describe_settings(args, origin):
    """Return the options that decide what is found, a line each; files by name, without path."""
    left_out = {"output_dir", "image_format", "verbose", "quiet", "threads", *PRODUCTS}
    options = vars(args) | {"hdu": origin.hdu}
    return [
        f"{name} = {value.name if isinstance(value, Path) else value!a}"
        for name, value in options.items()
        if name not in left_out and value not in (None, [], ())
    ]


def report_image(origin, pixels, mask):
    """Log what was read, how much of it is masked, and what the header says, if it does."""
    bad = np.count_nonzero(~np.isfinite(pixels[mask]))
    masked = 100 * np.count_nonzero(mask) / mask.size
    log.info("image         %s: %d x %d %s", origin.name, *pixels.shape[::-1], origin.dtype)
    log.info("masked        %.2f %% (%d pixels have no finite value)", masked, bad)
    if origin.beam:
        log.info("beam          %.6g pixels, by which to divide fluxes", origin.beam)
    if not math.isnan(origin.saturation):
        log.info("saturation    %.6g", origin.saturation)


def report_field(field):
    """Log level, noise and threshold, in image values."""
    rms = field.frame.differences(global_rms(field.background))
    log.info("background    %.6g, rms %.6g", field.level(), rms)
    times = field.method.extraction.thresh / (field.depth() or 1)
    noise = np.median(sample(field.detection_noise(), field.mask))
    thresh = field.frame.differences(times * float(noise))
    unit = "rms" if np.ndim(field.noise) == 0 else "noise, median"
    absolute = field.method.err_option == "none"
    log.info("threshold     %.6g (%s)", thresh, "absolute" if absolute else f"{times:.4g} x {unit}")


def start_logging(args):
    """Send reports to stdout and warnings to stderr; nowhere if it is closed."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names that are no text
    reports, problems = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    reports.addFilter(lambda record: record.levelno < logging.WARNING)
    problems.setLevel(logging.WARNING)
    problems.setFormatter(logging.Formatter(f"{PROG}: warning: %(message)s"))
    log.handlers, log.propagate = [reports, problems], False
    log.setLevel(logging.ERROR if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    logging.raiseExceptions = False  # a reader of stdout may go away
    logging.captureWarnings(True)
    for library in ("py.warnings", "astropy", "matplotlib"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def main(argv=None):
    """Run the tool on command line arguments; return its exit code: 0, or 1 if it failed.

    Wrong arguments (2) and signals (128 and their number) raise a SystemExit.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    start_logging(args)
    gc.disable()  # to look for cycles among what is imported takes 0.4 s, and at the end 0.6 s
    atexit.register(gc.freeze)
    try:
        # Until there is something to remove, a signal ends the process at once.
        with handling_signals(signal.SIG_DFL):
            if problem := check_usage(args):
                parser.error(problem)
            run(args)
        return 0
    except InputError as error:
        problem = error
    except MemoryError:
        problem = f"{args.image}: not enough memory; cut the image into parts"
    except Exception as error:
        log.debug("what led to it", exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        problem = f"{args.image}: a fault of the tool ({reason}); report it with what -v tells"
    print(f"{PROG}: error: {one_line(problem)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
