#!/usr/bin/env python
"""Extract sources from an astronomical or microscopy image with SEP.

The file reads in the order of the work: settings, reading, mask and kernel, background, detection,
catalogue, products, and last the command line, whose `run` is the table of contents.

Conventions, everywhere: images are indexed (y, x); x and y are 0-based with pixel centres at
integers; masks are True where a pixel is excluded; `theta` is in radians from +x towards +y.
"""

import argparse
import bz2
import gzip
import io
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import sep
import tifffile
from astropy.io import fits
from astropy.table import Table
from astropy.visualization import ZScaleInterval
from astropy.wcs import WCS
from matplotlib.collections import EllipseCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

__version__ = "1.0.0"

PROG = "source_extractor.py"

log = logging.getLogger("source_extractor")
logging.raiseExceptions = False  # a reader of stdout may go away


def one_line(text):
    """Return a message as one line, however it was broken."""
    return " ".join(str(text).split())


class InputError(Exception):
    """Data that can't be used: one line that says what is wrong with which file, and what to do."""


@contextmanager
def about(name):
    """Put the name of the image before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def timed(function):
    """Report at debug level how long each call of `function` took."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        log.debug("%-22s %7.2f s", function.__name__, time.perf_counter() - start)
        return result

    return wrapper


# ---------------------------------------------------------------------------------------------
# Settings, under SEP's own names
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackgroundSettings:
    """Keywords of `sep.Background`: mesh box (pixels), median filter (boxes) and its threshold."""

    bw: int = 64
    bh: int = 64
    fw: int = 3
    fh: int = 3
    fthresh: float = 0.0


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


def aperture(diameter):
    """Return how the columns of a circular aperture end."""
    return f"aper_{diameter:.15g}"


def settings_from(args, kind):
    """Return the settings dataclass `kind`, filled from the parsed options of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


# ---------------------------------------------------------------------------------------------
# Reading: FITS or TIFF in, one plane out
# ---------------------------------------------------------------------------------------------

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FITS_MAGIC = (b"SIMPLE", b"\x1f\x8b", b"BZh")


class Stack(NamedTuple):
    """What an open file holds, before one plane is cut out of it."""

    name: str
    axes: list[str]
    shape: tuple[int, ...]
    image_axes: list[int]
    dtype: str
    cut: Callable[[int], np.ndarray]
    wcs: WCS | None = None
    unit: str | None = None
    black: int | None = None


@dataclass(frozen=True)
class Image:
    """One 2-D plane of a file.

    Attributes
    ----------
    data : ndarray, shape (ny, nx)
        As stored from `read_plane`; from `read_image` native, contiguous float32 or float64,
        non-finite where the file has no value.
    name : str
        File, and HDU where there is one, for messages.
    dtype : str
        Type of the pixels in the file.
    wcs : WCS or None
        The celestial WCS of the plane.
    unit : str or None
        The header's BUNIT.
    black : int or None
        The value of black in a TIFF in which 0 is white.
    """

    data: np.ndarray
    name: str
    dtype: str
    wcs: WCS | None
    unit: str | None
    black: int | None


@contextmanager
def reading(path, kind):
    """Turn whatever a damaged file makes a library raise into an `InputError`, warnings dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read this image") from None
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"{path}: damaged, cut short, or no {kind} of a kind that can be read ({reason}); get "
            "the file again"
        ) from error


def read_plane(path, hdu=None, plane=None, *, lone_serves_all=False):
    """Read one 2-D plane of a FITS or TIFF file, told apart by their first bytes.

    Parameters
    ----------
    path : Path
    hdu : str, optional
        Index, EXTNAME, or EXTNAME,EXTVER; without it the first HDU that holds an image.
    plane : int, optional
        Plane of a cube, stack or colour image, from 0 over the flattened other axes.
    lone_serves_all : bool
        Let a file of a single plane stand for every `plane`, as one mask does for a whole stack.

    Returns
    -------
    Image

    Raises
    ------
    InputError
        If the file can't be read, or holds no such HDU or plane.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if head.startswith(TIFF_MAGIC):
        kind, opened = "TIFF", open_tiff
        if hdu is not None:
            raise InputError(f"{path}: a TIFF file has no HDU {hdu}; leave the HDU option out")
    elif head.startswith(FITS_MAGIC):
        kind, opened = "FITS", partial(open_fits, hdu=hdu)
    else:
        raise InputError(f"{path}: neither a FITS nor a TIFF file; convert it to one of them")
    with reading(path, kind), opened(path) as stack:
        data = stack.cut(choose_plane(stack, plane, lone_serves_all))
        if data.dtype.kind not in "biuf":
            raise InputError(f"{stack.name}: pixels of type {data.dtype} are not real numbers")
        data = data.reshape([stack.shape[axis] for axis in stack.image_axes])
        return Image(data, stack.name, stack.dtype, stack.wcs, stack.unit, stack.black)


def choose_plane(stack, plane, lone_serves_all):
    """Return the number of the plane to cut, once it is known to exist and to fit in memory."""
    rows, columns = (stack.shape[axis] for axis in stack.image_axes)
    count = math.prod(stack.shape) // (rows * columns)
    if count == 1 and (plane is None or lone_serves_all):
        plane = 0
    if plane is None or plane >= count:
        layout = ", ".join(f"{name}={n}" for name, n in zip(stack.axes, stack.shape, strict=True))
        choice = f"choose one from 0 to {count - 1} with the plane option"
        if plane is None and lone_serves_all:
            choice = "the image has only one; give one for it"
        raise InputError(
            f"{stack.name}: {count} plane{'s' if count > 1 else ''} in axes ({layout}); {choice}"
        )
    needed = 12 * rows * columns
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise InputError(
            f"{stack.name}: {columns} x {rows} pixels need {needed / 1e9:.0f} GB of memory, of "
            f"{present / 1e9:.0f} GB here; cut the image into parts"
        )
    return plane


@contextmanager
def open_fits(path, hdu):
    """Open a FITS file as a `Stack`; the image axes are the last two that are longer than 1."""
    # uint=False: else astropy ignores BLANK in unsigned integers.
    with unpacked(path) as file, fits.open(file, memmap=False, uint=False) as hdus:
        chosen = find_hdu(path, hdus, hdu)
        number = hdus.index_of(chosen)
        if chosen.header.get("BZERO") == 2**63:  # else astropy rounds them to multiples of 1024
            chosen = fits.open(file, memmap=False, uint=True)[number]
        header, shape = chosen.header, chosen.shape
        long_axes = [axis for axis, length in enumerate(shape) if length > 1]
        image_axes = long_axes[-2:] if len(long_axes) > 1 else [len(shape) - 2, len(shape) - 1]
        others = [axis for axis in range(len(shape)) if axis not in image_axes]

        def cut(plane):
            index = [slice(None)] * len(shape)
            position = np.unravel_index(plane, [shape[axis] for axis in others])
            for axis, place in zip(others, position, strict=True):
                index[axis] = int(place)
            data = chosen.section[tuple(index)]
            if data.dtype == np.uint64 and "BLANK" in header:
                data = np.where(data == header["BLANK"] + 2**63, np.nan, data)
            return data

        numbers = [len(shape) - axis for axis in range(len(shape))]
        yield Stack(
            name=f"{path}[{number}]" + (f" {chosen.name}" if chosen.name else ""),
            axes=[header.get(f"CTYPE{n}") or f"NAXIS{n}" for n in numbers],
            shape=shape,
            image_axes=image_axes,
            dtype=fits.BITPIX2DTYPE[header["BITPIX"]],
            cut=cut,
            wcs=celestial_wcs(path, hdus, header, [numbers[axis] for axis in image_axes[::-1]]),
            unit=str(header["BUNIT"]) if header.get("BUNIT") else None,
        )


@contextmanager
def unpacked(path):
    """Open a file, or an unpacked copy of it that is whole and agrees with its checksum.

    astropy never gets to the checksum, and may loop over a packed file that is damaged.
    """
    with open(path, "rb") as file:
        packing = {b"\x1f\x8b": gzip, b"BZ": bz2}.get(file.read(2))
        file.seek(0)
        if packing is None:
            yield file
            return
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory, "unpacked")
            try:
                with packing.open(file) as packed, copy.open("wb") as unpacked_file:
                    shutil.copyfileobj(packed, unpacked_file)
            except OSError as error:
                if error.errno is None:  # the file is damaged
                    raise
                raise InputError(
                    f"{path}: can't be unpacked in {directory} ({error.strerror}); set TMPDIR to a "
                    "place with more room"
                ) from error
            with copy.open("rb") as unpacked_file:
                yield unpacked_file


def find_hdu(path, hdus, wanted):
    """Return the image HDU that `wanted` names, or the first one if it is None."""
    if wanted is None:
        for hdu in hdus:
            if holds_image(hdu):
                return hdu
        raise InputError(f"{path}: no HDU holds an image ({describe_hdus(hdus)})")
    name, _, version = wanted.rpartition(",")
    key = (name, int(version)) if name and version.isdecimal() else wanted
    try:
        hdu = hdus[int(wanted) if wanted.isdecimal() else key]
    except (KeyError, IndexError):
        hdu = None
    if hdu is None or not holds_image(hdu):
        problem = "no such HDU" if hdu is None else "no image in HDU"
        raise InputError(f"{path}: {problem}: {wanted}; the file has {describe_hdus(hdus)}")
    return hdu


def holds_image(hdu):
    return hdu.is_image and len(hdu.shape) >= 2 and math.prod(hdu.shape) > 0


def describe_hdus(hdus):
    return "; ".join(
        f"{index} {hdu.name or '(no name)'}: "
        + (" x ".join(map(str, reversed(hdu.shape))) or "empty" if hdu.is_image else "table")
        for index, hdu in enumerate(hdus)
    )


def celestial_wcs(path, hdus, header, axes):
    """Return the celestial WCS of the FITS axes numbers `axes`, or None if there is none."""
    try:
        wcs = WCS(header, hdus)
        if wcs.naxis > 2:
            wcs = wcs.sub(axes)
        if not wcs.has_celestial:
            return None
        # astropy mends a matrix of zeros, as uncalibrated frames have it, to a degree a pixel.
        blank = [header.get(f"CD{i}_{j}") for i in axes for j in axes] == [0] * 4
        if blank or not np.linalg.cond(wcs.pixel_scale_matrix) < 1e8:
            raise ValueError("its matrix is singular")
        return wcs
    except Exception as error:
        log.warning("%s: WCS can't be used and is left out (%s)", path, one_line(error))
        return None


@contextmanager
def open_tiff(path):
    """Open the first series of a TIFF file as a `Stack`."""
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) > 1:
            log.warning("%s: read the first of its %d images", path, len(tiff.series))
        series = tiff.series[0]
        axes, shape, page = series.axes, series.shape, series.keyframe
        image_axes = [axes.index("Y"), axes.index("X")]
        one_page_a_plane = axes.endswith("YX") and len(series.pages) == math.prod(shape[:-2])

        def cut(plane):
            if one_page_a_plane and not series.is_truncated:
                return series.pages[plane].asarray()
            mapped = series.dataoffset is not None
            stack = tifffile.memmap(path, mode="r") if mapped else series.asarray()
            planes = np.moveaxis(stack, image_axes, (-2, -1))
            return planes[np.unravel_index(plane, planes.shape[:-2])]

        white = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.kind in "bu"
        yield Stack(
            *(str(path), list(axes), shape, image_axes, series.dtype.name, cut),
            black=(1 << page.bitspersample) - 1 if white else None,
        )


def to_float(data):
    """Return `data` as a native, contiguous, writable array: float64 where float32 would round."""
    exact = 4 if data.dtype.kind == "f" else 2
    if not data.dtype.isnative and data.flags.writeable:
        data = data.byteswap(inplace=True).view(data.dtype.newbyteorder())
    return np.require(data, np.float64 if data.dtype.itemsize > exact else np.float32, ["C", "W"])


@timed
def read_image(path, hdu=None, plane=None):
    """Read the plane to work on; parameters and errors as in `read_plane`.

    Returns
    -------
    Image
        float64 where the file has float64 or integers of more than 16 bits, else float32.
    """
    image = read_plane(path, hdu, plane)
    data = to_float(image.data)
    return replace(image, data=data if image.black is None else image.black - data)


def require_shape(found, shape):
    """Refuse an `Image` whose shape isn't that of the image to work on."""
    if found.data.shape != shape:
        raise InputError(
            f"{found.name}: its shape (rows, columns) is {found.data.shape}, the image's {shape}; "
            "give a file that was made for this image"
        )


def read_aligned(path, hdu, plane, shape):
    """Read a plane that must have the image's shape (ny, nx); a stack gives the image's plane."""
    found = read_plane(path, hdu, plane, lone_serves_all=True)
    require_shape(found, shape)
    return found.data


@timed
def read_mask(path, hdu, plane, maskthresh, shape):
    """Read a mask, True where its value exceeds `maskthresh` or is NaN; shape (ny, nx)."""
    return ~(read_aligned(path, hdu, plane, shape) <= maskthresh)


@timed
def read_noise(path, hdu, plane, kind, shape):
    """Read a noise image as standard deviations, in the image's unit.

    Parameters
    ----------
    path, hdu, plane
        As in `read_plane`.
    kind : {"stddev", "variance", "weight"}
        What the file holds; a weight is an inverse variance.
    shape : tuple of int
        The image's (ny, nx).

    Returns
    -------
    ndarray, shape (ny, nx)
        Not positive, or not finite, where the file has no usable value.
    """
    noise = to_float(read_aligned(path, hdu, plane, shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind != "stddev":
            np.sqrt(noise, out=noise)
        if kind == "weight":
            np.divide(1, noise, out=noise)
    if not usable(noise).any():
        raise InputError(f"{path}: no pixel holds a usable {kind}; see --err-type")
    return noise


def read_measure_image(path, hdu, plane, image):
    """Read the image to measure on: it must have the shape of `image`, and should have its WCS."""
    other = read_image(path, hdu, plane)
    require_shape(other, image.data.shape)
    if image.wcs and other.wcs:
        offset = wcs_offset(image.wcs, other.wcs, image.data.shape)
        if not offset <= 0.5:
            finding = f"puts the corners of the image up to {offset:.1f} pixels away"
            if offset == math.inf:
                finding = "can't be compared with the image's"
            log.warning("%s: its WCS %s; measured pixel by pixel all the same", other.name, finding)
    return other


# Corners and centre of an image, in parts of its width and of its height.
SPOTS = (0, 1, 0, 1, 0.5), (0, 0, 1, 1, 0.5)


def wcs_offset(one, other, shape):
    """Return how far apart, in pixels, two WCS put corners and centre of an image (ny, nx)."""
    x, y = (np.array(at) * (n - 1) for at, n in zip(SPOTS, shape[::-1], strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there = other.world_to_pixel(one.pixel_to_world(x, y))
    except Exception:  # wcslib and the frames raise many kinds
        return math.inf
    gaps = np.hypot(there[0] - x, there[1] - y)
    return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else math.inf


# ---------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------


def make_kernel(case, fwhm, path):
    """Return the detection filter, float32 of odd shape, or None.

    Parameters
    ----------
    case : {"none", "default", "gaussian", "tophat", "file"}
    fwhm : float
        FWHM of the Gaussian or diameter of the top hat, in pixels.
    path : Path
        File for the case "file".
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
    try:
        lines = path.read_text().splitlines()
        if lines and lines[0].split()[:1] == ["CONV"]:
            lines = lines[1:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel = np.loadtxt(lines, dtype=np.float32, ndmin=2)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"{path}: not a kernel; it takes rows of numbers of equal length"
        ) from error
    if not kernel.any() or not np.isfinite(kernel).all():
        raise InputError(f"{path}: a kernel needs finite values that are not all zero")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise InputError(
            f"{path}: a kernel of {kernel.shape[0]} rows and {kernel.shape[1]} columns has no "
            "central pixel and would shift the sources; make both odd"
        )
    return np.ascontiguousarray(kernel)


# ---------------------------------------------------------------------------------------------
# Mask and frame
# ---------------------------------------------------------------------------------------------


def build_mask(image, mask, noise, boxes):
    """Combine everything that excludes a pixel: no finite value, the mask, no noise, the boxes.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    mask : ndarray of bool, shape (ny, nx), or None
    noise : ndarray, shape (ny, nx), or None
        Standard deviations; a pixel without a finite positive one is masked.
    boxes : list of (xmin, xmax, ymin, ymax)
        0-based pixels, ends included.

    Raises
    ------
    InputError
        If a box lies outside the image, or nothing is left.
    """
    excluded = ~np.isfinite(image)
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


def usable(noise):
    """Tell where standard deviations are finite and positive."""
    return (noise > 0) & np.isfinite(noise)


def sample(image, mask):
    """Return about 250 000 of the pixels of an image that are not masked, from all over it."""
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
        extreme = spread > 0 and not 1e-12 < spread < 1e12
        return cls(offset, 2.0 ** math.floor(math.log2(spread)) if extreme else 1.0)

    def enter(self, image):
        """Bring an image into the frame, in place."""
        with np.errstate(over="ignore", invalid="ignore"):
            image -= self.offset
            image /= self.scale

    def levels(self, values):
        """Bring levels back into image values, in place, and return them."""
        values *= self.scale
        values += self.offset
        return values

    def differences(self, values):
        """Bring noise, fluxes and differences of levels back into image values."""
        return values * self.scale


# ---------------------------------------------------------------------------------------------
# Background and detection
# ---------------------------------------------------------------------------------------------

# How far, in units of (a, b), the sources of the first pass are masked for the second: the profile
# of a bright galaxy goes on well beyond the isophote it was detected at.
GROWTH = 6.0

# SEP's own starting values and the most it takes without overflow; see `grow_limits`.
PIXEL_STACK = 300_000
SUB_OBJECTS = 1024
MAX_SUB_OBJECTS = 32767

# What SEP itself puts for the noise of a masked pixel, and the largest number that it can sum.
NO_WEIGHT = 1e30
LARGEST = 1e30


@dataclass(frozen=True)
class Method:
    """How to find sources: all that is the same for every image, in its values."""

    kernel: np.ndarray | None
    err_option: str
    background_passes: int
    background: BackgroundSettings
    extraction: ExtractionSettings

    def within(self, frame):
        """Return the method with everything that has the image's unit brought into the frame."""
        extraction = self.extraction
        if self.err_option == "none":
            extraction = replace(extraction, thresh=extraction.thresh / frame.scale)
        if extraction.gain is not None:
            extraction = replace(extraction, gain=extraction.gain * frame.scale)
        background = replace(self.background, fthresh=self.background.fthresh / frame.scale)
        return replace(self, background=background, extraction=extraction)

    def for_another_image(self):
        """Return the method without what was given for one image only: noise, or threshold."""
        if self.err_option == "array_rms":
            return self
        extraction = self.extraction
        if self.err_option == "none":
            extraction = replace(extraction, thresh=ExtractionSettings.thresh)
        return replace(self, err_option="float_globalrms", extraction=extraction)


class Detections(NamedTuple):
    """SEP's 30 fields an object, and the map (ny, nx) that labels it index + 1."""

    objects: np.ndarray
    segmentation: np.ndarray


@dataclass(frozen=True)
class Field:
    """An image with its background taken off.

    Attributes
    ----------
    residual : ndarray, shape (ny, nx)
    mask : ndarray of bool, shape (ny, nx)
        True also where there is no usable noise.
    noise : float or ndarray of shape (ny, nx)
        Standard deviations to detect and to measure against.
    background : sep.Background
    method : Method
    frame : Frame
        In which all of these are.
    """

    residual: np.ndarray
    mask: np.ndarray
    noise: float | np.ndarray
    background: sep.Background
    method: Method
    frame: Frame

    def level_map(self):
        """Return the background in image values."""
        return self.frame.levels(self.background.back())

    def rms_map(self):
        """Return the background RMS in image values."""
        rms = self.background.rms()
        rms *= self.frame.scale
        return rms

    def is_noiseless(self):
        """Tell if the noise was to be measured, and there is none."""
        measured = self.method.err_option in ("float_globalrms", "array_rms")
        return measured and global_rms(self.background) == 0


def subtract_background(image, mask, noise, method):
    """Estimate the background and take it off, in place.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    mask : ndarray of bool, shape (ny, nx)
    noise : ndarray, shape (ny, nx), or None
        Noise image for the method's `err_option` "file".
    method : Method

    Returns
    -------
    Field

    Raises
    ------
    InputError
        If too little of the image is unmasked.
    """
    frame = Frame.of(image, mask)
    frame.enter(image)
    if not -LARGEST < image.min() <= image.max() < LARGEST:
        mask = mask | ~(np.abs(image) < LARGEST)
    method = method.within(frame)
    if noise is not None:
        noise = noise / frame.scale
    background = estimate_background(image, mask, method.background)
    if background is None:
        raise InputError(
            f"no background box of {method.background.bw} x {method.background.bh} pixels has half "
            "of its pixels unmasked; mask less, or take other boxes with --bw and --bh"
        )
    if method.background_passes == 2:
        residual = image - background
        first = settle_noise(Field(residual, mask, noise, background, method, frame))
        background = estimate_again(image, mask, first) or background
    background.subfrom(image)
    return settle_noise(Field(image, mask, noise, background, method, frame))


def estimate_again(image, mask, first):
    """Return the background with the sources of a first `Field` masked, or None if that fails."""
    if first.is_noiseless():
        return None
    grown = grow_mask(mask, find_sources(first).objects)
    background = estimate_background(image, grown, first.method.background)
    if background is None:
        log.warning("sources fill every background box: kept the background of the first pass")
    return background


def settle_noise(field):
    """Return the field with the noise that its method wants, where it had the one given, if any."""
    if field.method.err_option in ("none", "float_globalrms") or field.is_noiseless():
        return replace(field, noise=global_rms(field.background))
    given = field.method.err_option == "file"
    noise = field.noise.copy() if given else field.background.rms()
    mask = field.mask | ~usable(noise)
    noise[mask] = NO_WEIGHT
    return replace(field, noise=noise, mask=mask)


def subtract_other(other, mask, method):
    """Return the `Field` of an `Image` that is only measured, under the mask of the other one."""
    with about(other.name):
        mask = build_mask(other.data, mask, None, [])
        return subtract_background(other.data, mask, None, method.for_another_image())


@timed
def estimate_background(image, mask, settings):
    """Return the `sep.Background` of an image (ny, nx), or None if SEP could use no box of it."""
    # SEP allocates whole boxes, also those larger than the image.
    bw, bh = min(settings.bw, image.shape[1]), min(settings.bh, image.shape[0])
    if not mask.any():
        mask = None  # SEP is faster without
    elif not has_usable_box(mask, bw, bh):
        return None
    return sep.Background(image, mask=mask, **asdict(replace(settings, bw=bw, bh=bh)))


def has_usable_box(mask, bw, bh):
    """Tell if half of the pixels of any box are not masked; SEP takes no box with fewer."""
    rows, columns = np.arange(0, mask.shape[0], bh), np.arange(0, mask.shape[1], bw)
    good = np.add.reduceat(np.add.reduceat(~mask, rows, axis=0, dtype=np.int64), columns, axis=1)
    heights, widths = np.diff(rows, append=mask.shape[0]), np.diff(columns, append=mask.shape[1])
    return (2 * good >= np.outer(heights, widths)).any()


def grow_mask(mask, objects):
    """Return a copy of the mask that covers the objects as well, out to `GROWTH` times (a, b)."""
    grown = mask.copy()
    sane = objects[np.isfinite(objects["cxx"] + objects["cyy"] + objects["cxy"])]
    shape = {name: sane[name] for name in ("x", "y", "cxx", "cyy", "cxy")}
    sep.mask_ellipse(grown, **shape, r=GROWTH)
    return grown


def global_rms(background):
    """Return the global RMS of a `sep.Background`; where there is no noise SEP calls it 1."""
    rms = background.globalrms
    return 0.0 if rms == 1 and not background.rms().any() else rms


def require_noise(field):
    """Refuse sources in a field without the noise that the threshold is to be a multiple of."""
    if field.is_noiseless() and field.residual[~field.mask].any():
        raise InputError(
            "the background has no noise, so a threshold in units of it has no meaning; give an "
            "absolute one with --err-option none, or the noise with --err-option file"
        )


@timed
def find_sources(field):
    """Run `sep.extract`, with its internal limits grown as far as this image needs.

    Parameters
    ----------
    field : Field

    Returns
    -------
    Detections
    """
    residual, mask, kernel = field.residual, field.mask, field.method.kernel
    noise = None if field.method.err_option == "none" else field.noise
    sep.set_extract_pixstack(PIXEL_STACK)
    sep.set_sub_object_limit(SUB_OBJECTS)
    # SEP filters the first rows before it has applied the mask to them.
    first = residual[: 0 if kernel is None else kernel.shape[0] // 2]
    kept = first.copy()
    first[mask[: len(first)]] = 0
    keywords = asdict(field.method.extraction) | {
        "filter_kernel": kernel,
        "segmentation_map": True,
    }
    try:
        while True:
            try:
                return Detections(*sep.extract(residual, err=noise, mask=mask, **keywords))
            except Exception as error:  # SEP raises nothing narrower
                grow_limits(error, residual.size)
    finally:
        first[:] = kept


def grow_limits(error, pixels):
    """Raise the limit of which SEP complains, up to what an image of so many pixels can need."""
    stack, objects = sep.get_extract_pixstack(), sep.get_sub_object_limit()
    if "pixel buffer full" in str(error) and stack < pixels + 2:
        sep.set_extract_pixstack(min(4 * stack, pixels + 2))
        log.debug("pixel stack full, grown to %d pixels", sep.get_extract_pixstack())
    elif "deblending overflow" in str(error) and objects < MAX_SUB_OBJECTS:
        sep.set_sub_object_limit(min(4 * objects, MAX_SUB_OBJECTS))
        log.debug("too many sub-objects, limit grown to %d", sep.get_sub_object_limit())
    elif "deblending overflow" in str(error):
        raise InputError(
            f"a source splits into more than {MAX_SUB_OBJECTS} parts; raise --thresh, or switch "
            "deblending off with --deblend-nthresh 1"
        ) from error
    else:
        raise InputError(f"SEP gave up: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------

# SExtractor's KRON_NSIG: the Kron radius and the growth curve reach this far, in units of (a, b).
KRON_REACH = 6.0

# SExtractor's window for XWIN_IMAGE: its sigma per half-light radius, its reach in sigmas.
WINDOW_SIGMA = 2 / 2.35
WINDOW_REACH = 4.0

# The label of masked pixels while sources are measured; exact in float32, in which SEP compares.
MASKED = 2**30


@contextmanager
def masked_as_neighbours(segmentation, mask):
    """Give masked pixels a label of their own, so that SEP leaves them out as it does neighbours.

    With `mask=` beside `segmap=` SEP would scale each sum up by the area of both, and so the flux
    would depend on whether there is a mask. Done in place, and undone.
    """
    hidden = segmentation[mask]
    segmentation[mask] = MASKED
    try:
        yield
    finally:
        segmentation[mask] = hidden


@timed
def measure(field, target, objects, segmentation, settings):
    """Measure sizes, Kron and aperture fluxes, and windowed centroids.

    Neighbours and masked pixels are left out of every sum.

    Parameters
    ----------
    field, target : Field
        Where the objects were found, which gives the Kron ellipses, and where to measure in them.
    objects : structured ndarray
        `sep.extract`'s objects.
    segmentation : ndarray of int32, shape (ny, nx)
        Their map: 0 for sky, index + 1 for an object.
    settings : PhotometrySettings

    Returns
    -------
    DataFrame
        A row an object, in pixels and image values; nan where there is nothing to measure.

    Notes
    -----
    The Kron radius (Kron 1980) is SExtractor's: max(kron_factor r_k, kron_min_radius) in units of
    (a, b); like SExtractor, AUTO sums whole pixels whose centres are in the ellipse.
    """
    ids = np.arange(1, len(objects) + 1, dtype=np.int32)
    x, y, a, b, theta, sane = sane_shapes(objects)
    image, errors = target.residual, {"err": target.noise, "gain": target.method.extraction.gain}
    in_image_values = target.frame.differences
    others = {"segmap": segmentation, "seg_id": ids[sane]}
    with masked_as_neighbours(segmentation, field.mask):
        r_k, kron_flag = sep.kron_radius(field.residual, x, y, a, b, theta, KRON_REACH, **others)
    # Of positive light it can't be more; of noise around nothing it may be anything.
    r_k = np.clip(np.nan_to_num(r_k), 0, KRON_REACH)
    kron = np.maximum(settings.kron_factor * r_k, settings.kron_min_radius)
    with masked_as_neighbours(segmentation, target.mask):
        flux, error, flag = sep.sum_ellipse(
            image, x, y, a, b, theta, kron, subpix=1, **errors, **others
        )
        flag[forget_empty(flux, error, target.noise)] |= sep.APER_ALLMASKED
        limit = KRON_REACH * a
        radius, _ = sep.flux_radius(image, x, y, limit, 0.5, normflux=flux, subpix=5, **others)
        radius[~((flux > 0) & (radius < limit))] = np.nan
        xwin, ywin = windowed_centroids(image, segmentation, ids[sane], x, y, radius)
        found = {
            "kron_radius": kron,
            "flux_auto": in_image_values(flux),
            "fluxerr_auto": in_image_values(error),
            "flux_radius": radius,
            "xwin": xwin,
            "ywin": ywin,
        }
        for diameter in settings.aperture_diameters:
            flux, error, _ = sep.sum_circle(image, x, y, diameter / 2, **errors, **others)
            forget_empty(flux, error, target.noise)
            found[f"flux_{aperture(diameter)}"] = in_image_values(flux)
            found[f"fluxerr_{aperture(diameter)}"] = in_image_values(error)
    measured = pd.DataFrame(found, index=ids[sane])
    measured[(kron_flag & sep.APER_ALLMASKED) > 0] = np.nan
    measured["flag_auto"] = flag | (kron_flag & ~(sep.APER_TRUNC | sep.APER_HASMASKED))
    measured = measured.reindex(ids).reset_index(drop=True)
    measured["flag_auto"] = measured["flag_auto"].fillna(sep.APER_ALLMASKED).astype(np.int64)
    return measured


def forget_empty(flux, error, noise):
    """Make fluxes and errors nan, in place, where the noise of no pixel was summed; tell where."""
    empty = (error == 0) & np.any(noise)
    flux[empty], error[empty] = np.nan, np.nan
    return empty


def sane_shapes(objects):
    """Return x, y, a, b, theta of the objects that SEP can measure, and which these are.

    One that it refuses would make it give up on all: a shape that is not finite, or a theta that
    was a float32 and is a hair over pi/2.
    """
    x, y, a, b, theta = (objects[name] for name in ("x", "y", "a", "b", "theta"))
    a, b = np.maximum(a, b), np.minimum(a, b)
    theta = np.mod(theta + np.pi / 2, np.pi) - np.pi / 2
    sane = np.isfinite(x + y + a + theta) & (b > 0)
    return *(values[sane] for values in (x, y, a, b, theta)), sane


def survey_background(field, target, objects, write):
    """Have the background and its RMS written, one at a time; return what they are at the objects.

    Parameters
    ----------
    field, target : Field
        Whose maps are written, and whose values are returned.
    objects : structured ndarray
    write : callable
        Takes the name of the product and the map (ny, nx), in image values.

    Returns
    -------
    dict of str to ndarray
    """

    def survey(product, make_map):
        values = make_map(field)
        write(product, values)
        return at_objects(values if target is field else make_map(target), objects)

    return {
        "background": survey("background", Field.level_map),
        "rms": survey("rms", Field.rms_map),
    }


def at_objects(values, objects):
    """Return the values of a map (ny, nx) at the pixels nearest to the objects' positions."""
    rows, columns = (
        np.clip(np.rint(np.nan_to_num(objects[name])), 0, size - 1).astype(int)
        for name, size in zip(("y", "x"), values.shape, strict=True)
    )
    return values[rows, columns].astype(float)


def windowed_centroids(image, labels, ids, x, y, radius):
    """Return the centroids in a Gaussian window, nan where a source has no `radius`.

    SExtractor's XWIN_IMAGE and YWIN_IMAGE. `sep.winpos` knows no neighbours, and would run to a
    bright one: a source that has any in reach is measured on a stamp of its own without them.

    Parameters
    ----------
    image, labels : ndarray, shape (ny, nx)
        What to measure on, and the map of the sources in which masked pixels have a label too.
    ids, x, y, radius : ndarray
        Labels, positions and half-light radii (pixels) of the sources.

    Returns
    -------
    xwin, ywin : ndarray
    """
    xwin, ywin = np.full((2, len(x)), np.nan)
    sized = np.flatnonzero(np.isfinite(radius))
    ids, x, y = ids[sized], x[sized], y[sized]
    sigma = WINDOW_SIGMA * np.maximum(radius[sized], 0.5)
    reach = 1.25 * WINDOW_REACH * sigma + 2  # the window moves
    _, _, flag = sep.sum_circle(image, x, y, reach, segmap=labels, seg_id=ids, subpix=1)
    crowded = (flag & sep.APER_HASMASKED) > 0
    found = np.full((2, len(x)), np.nan)
    found[:, ~crowded] = sep.winpos(image, x[~crowded], y[~crowded], sigma[~crowded])[:2]
    for i in np.flatnonzero(crowded):
        stamp, left, bottom = lone_stamp(image, labels, ids[i], x[i], y[i], reach[i])
        at_x, at_y, _ = sep.winpos(stamp, [x[i] - left], [y[i] - bottom], [sigma[i]])
        found[:, i] = at_x[0] + left, at_y[0] + bottom
    # Simulated sources that move by more are further from the truth than they were before.
    strayed = np.hypot(found[0] - x, found[1] - y) > 0.5 * sigma
    found[:, strayed] = np.nan
    xwin[sized], ywin[sized] = found
    return xwin, ywin


def lone_stamp(image, labels, label, x, y, reach):
    """Cut out a source and replace what isn't its own, as SExtractor's MASK_TYPE CORRECT does.

    A foreign pixel takes the value opposite to it about (x, y), or 0 where that is foreign too.

    Returns
    -------
    stamp : ndarray
    left, bottom : int
        Column and row of the image at the stamp's first pixel.
    """
    ny, nx = image.shape
    left = math.ceil(x - min(reach, max(x, nx - 1 - x)))
    bottom = math.ceil(y - min(reach, max(y, ny - 1 - y)))
    # The last pixel is the one opposite to the first, so that a flip swaps opposite pixels.
    width, height = round(2 * x) - 2 * left + 1, round(2 * y) - 2 * bottom + 1
    stamp, foreign = np.zeros((height, width), image.dtype), np.zeros((height, width), bool)
    rows = slice(max(bottom, 0), min(bottom + height, ny))
    columns = slice(max(left, 0), min(left + width, nx))
    inside = (
        slice(rows.start - bottom, rows.stop - bottom),
        slice(columns.start - left, columns.stop - left),
    )
    stamp[inside] = image[rows, columns]
    foreign[inside] = (labels[rows, columns] != 0) & (labels[rows, columns] != label)
    opposite = np.where(foreign[::-1, ::-1], 0, stamp[::-1, ::-1])
    return np.where(foreign, opposite, stamp), left, bottom


# ---------------------------------------------------------------------------------------------
# Catalogue
# ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the catalogue: the unit may be that of the "image", or of the "measured" one.

    The UCD says what it is in the words of the IVOA.
    """

    name: str
    unit: str | None
    ucd: str
    description: str


COLUMNS = (
    Column("id", None, "meta.id;meta.main", "label of the object in the segmentation map"),
    Column("thresh", "image", "phot.flux;stat.min", "detection threshold at the object"),
    Column("npix", "pixel", "meta.number;instr.pixel", "number of pixels of the object"),
    Column(
        "tnpix",
        "pixel",
        "meta.number;instr.pixel",
        "number of its pixels above the threshold without filter",
    ),
    Column("xmin", "pixel", "pos.cartesian.x;stat.min", "first column of the object"),
    Column("xmax", "pixel", "pos.cartesian.x;stat.max", "last column of the object"),
    Column("ymin", "pixel", "pos.cartesian.y;stat.min", "first row of the object"),
    Column("ymax", "pixel", "pos.cartesian.y;stat.max", "last row of the object"),
    Column("x", "pixel", "pos.cartesian.x", "barycentre along x"),
    Column("y", "pixel", "pos.cartesian.y", "barycentre along y"),
    Column("x2", "pixel2", "src.morph.param", "variance of the light along x"),
    Column("y2", "pixel2", "src.morph.param", "variance of the light along y"),
    Column("xy", "pixel2", "src.morph.param", "covariance of the light in x and y"),
    Column("errx2", "pixel2", "stat.variance;pos.cartesian.x", "variance of the error of x"),
    Column("erry2", "pixel2", "stat.variance;pos.cartesian.y", "variance of the error of y"),
    Column(
        "errxy", "pixel2", "stat.covariance;pos.cartesian", "covariance of the errors of x and y"
    ),
    Column("a", "pixel", "phys.size.smajAxis", "RMS of the light along the major axis"),
    Column("b", "pixel", "phys.size.sminAxis", "RMS of the light along the minor axis"),
    Column("theta", "rad", "pos.posAng", "angle of the major axis, from +x towards +y"),
    Column("cxx", "pixel-2", "src.morph.param", "ellipse coefficient of dx^2"),
    Column("cyy", "pixel-2", "src.morph.param", "ellipse coefficient of dy^2"),
    Column("cxy", "pixel-2", "src.morph.param", "ellipse coefficient of dx dy"),
    Column("cflux", "image", "phot.flux", "sum of the object's pixels in the filtered image"),
    Column("flux", "image", "phot.flux", "sum of the object's pixels"),
    Column("cpeak", "image", "phot.flux;stat.max", "highest pixel in the filtered image"),
    Column("peak", "image", "phot.flux;stat.max", "highest pixel"),
    Column(
        "xcpeak", "pixel", "pos.cartesian.x", "column of the highest pixel in the filtered image"
    ),
    Column("ycpeak", "pixel", "pos.cartesian.y", "row of the highest pixel in the filtered image"),
    Column("xpeak", "pixel", "pos.cartesian.x", "column of the highest pixel"),
    Column("ypeak", "pixel", "pos.cartesian.y", "row of the highest pixel"),
    Column("flag", None, "meta.code", "extraction flags"),
    Column("ra", "deg", "pos.eq.ra;meta.main", "right ascension of (x, y), ICRS"),
    Column("dec", "deg", "pos.eq.dec;meta.main", "declination of (x, y), ICRS"),
    Column("elongation", None, "src.morph.param", "a / b"),
    Column("fwhm", "pixel", "phys.angSize", "FWHM of a Gaussian of the same a and b"),
    Column("background", "measured", "instr.background", "background level at the object"),
    Column("rms", "measured", "stat.stdev;instr.background", "background RMS at the object"),
    Column(
        "kron_radius", None, "phys.angSize", "Kron radius of the AUTO ellipse in units of a and b"
    ),
    Column("flux_auto", "measured", "phot.flux", "flux in the Kron ellipse"),
    Column("fluxerr_auto", "measured", "stat.error;phot.flux", "error of flux_auto"),
    Column("mag_auto", "mag", "phot.mag", "magnitude of flux_auto"),
    Column("magerr_auto", "mag", "stat.error;phot.mag", "error of mag_auto"),
    Column("snr", None, "stat.snr", "flux_auto / fluxerr_auto"),
    Column(
        "flux_radius", "pixel", "phys.angSize", "radius of the circle that holds half of flux_auto"
    ),
    Column("xwin", "pixel", "pos.cartesian.x", "windowed centroid along x"),
    Column("ywin", "pixel", "pos.cartesian.y", "windowed centroid along y"),
    Column("flag_auto", None, "meta.code", "photometry flags"),
)


def catalog_columns(diameters):
    """Return all columns of the catalogue, with those for the aperture diameters (pixels)."""
    return COLUMNS + tuple(
        Column(f"{name}_{aperture(diameter)}", unit, ucd, f"{text}, {diameter:.15g} pixels wide")
        for diameter in diameters
        for name, unit, ucd, text in (
            ("flux", "measured", "phot.flux", "flux in a circle"),
            ("fluxerr", "measured", "stat.error;phot.flux", "error of the flux in a circle"),
            ("mag", "mag", "phot.mag", "magnitude in a circle"),
            ("magerr", "mag", "stat.error;phot.mag", "error of the magnitude in a circle"),
        )
    )


def build_catalog(objects, frame, measured, wcs, settings):
    """Return the catalogue, a row an object, with exactly the columns that the contract has.

    Parameters
    ----------
    objects : structured ndarray
        `sep.extract`'s objects.
    frame : Frame
        The one they were found in.
    measured : DataFrame
        What `measure` found, and the background and its RMS there, in image values.
    wcs : WCS or None
    settings : PhotometrySettings
    """
    catalog = pd.concat([pd.DataFrame(objects), measured], axis=1)
    for name in ("thresh", "cflux", "flux", "cpeak", "peak"):
        catalog[name] = frame.differences(catalog[name])
    catalog["id"] = np.arange(1, len(objects) + 1)
    catalog["ra"], catalog["dec"] = sky_positions(wcs, objects["x"], objects["y"])
    catalog["elongation"] = catalog["a"] / catalog["b"]
    # The FWHM of a round Gaussian is sqrt(8 ln 2) times its RMS, here sqrt((a² + b²) / 2).
    catalog["fwhm"] = 2 * np.sqrt(math.log(2) * (catalog["a"] ** 2 + catalog["b"] ** 2))
    catalog["snr"] = catalog["flux_auto"] / catalog["fluxerr_auto"].where(lambda error: error > 0)
    for kind in ("auto", *map(aperture, settings.aperture_diameters)):
        catalog[f"mag_{kind}"], catalog[f"magerr_{kind}"] = to_magnitudes(
            catalog[f"flux_{kind}"], catalog[f"fluxerr_{kind}"], settings.zeropoint
        )
    return catalog[[column.name for column in catalog_columns(settings.aperture_diameters)]]


def to_magnitudes(flux, error, zeropoint):
    """Return magnitudes and their errors, to first order; nan where the flux is not positive."""
    flux = flux.where(flux > 0)
    return zeropoint - 2.5 * np.log10(flux), 2.5 / math.log(10) * error / flux


def sky_positions(wcs, x, y):
    """Return right ascension and declination of pixels (0-based) in degrees, ICRS, or nan."""
    nowhere = np.full(len(x), np.nan)
    if wcs is None or not len(x):
        return nowhere, nowhere
    try:
        if wcs.wcs.lngtyp not in ("RA", "GLON"):
            raise ValueError(f"{wcs.wcs.lngtyp} is neither RA nor GLON")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sky = wcs.pixel_to_world(x, y).icrs
    except Exception as error:  # wcslib and the frames raise many kinds
        log.warning("the WCS gives no sky positions: ra and dec are nan (%s)", one_line(error))
        return nowhere, nowhere
    return sky.ra.deg, sky.dec.deg


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------

SUFFIXES = {"fits": ".fits", "tiff": ".tiff"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def staged(targets):
    """Give each target a temporary path beside it; put all in place at the end, or none.

    Parameters
    ----------
    targets : dict of str to Path

    Yields
    ------
    dict of str to Path
        Under the same names.
    """
    token = secrets.token_hex(4)
    parts = {}
    try:
        for where in targets.values():
            where.parent.mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            where = target
            with suppress(FileNotFoundError):
                target.stat()  # fails now rather than at the end if its name can't be one
            if target.is_dir():
                raise InputError(f"{target}: a directory; choose another place for the {name}")
            part = target.with_name(f".{name}-{token}{target.suffix}")
            part.touch(exist_ok=False)
            parts[name] = part
        where = targets["catalog"].parent
        yield parts
        with stopping_by(signal.SIG_IGN):
            for name, part in list(parts.items()):
                part.replace(targets[name])
                del parts[name]
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(
            f"{where}: can't be written ({reason}); make room or choose another place"
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextmanager
def stopping_by(handler):
    """Let `handler` take the signals that stop a process, but for those that nohup ignores."""
    before = {signum: signal.getsignal(signum) for signum in STOPS}
    heeded = [signum for signum in STOPS if before[signum] != signal.SIG_IGN]
    for signum in heeded:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum in heeded:
            signal.signal(signum, before[signum])


@timed
def write_image(path, data, form, wcs, history, unit):
    """Write an image product.

    Parameters
    ----------
    path : Path
    data : ndarray, shape (ny, nx)
    form : {"fits", "tiff"} or None
        None to go by the extension. TIFF keeps neither WCS nor unit, and labels as the smallest
        unsigned integers that hold them.
    wcs : WCS or None
    history : list of str
        HISTORY cards, or the description of the TIFF.
    unit : str or None
        BUNIT.
    """
    if form == "tiff" or (form is None and path.suffix.lower() in (".tif", ".tiff")):
        if data.dtype.kind == "i":
            data = data.astype(np.min_scalar_type(data.max()))
        tifffile.imwrite(path, data, description="\n".join(history), metadata=None)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cards that the WCS standard renames
        hdus = wcs.to_fits(relax=True) if wcs else fits.HDUList([fits.PrimaryHDU()])
        primary = hdus[0]
        primary.data = data
        if unit:
            primary.header["BUNIT"] = unit
        for line in history:
            primary.header.add_history(line)
        hdus.writeto(path, overwrite=True, output_verify="exception")


@timed
def write_catalog(path, catalog):
    """Write the catalogue as tab-separated text: one line of names, full precision, `nan`."""
    values = catalog.astype(object)  # pandas is slower to write its own numbers than Python's
    values.to_csv(path, sep="\t", index=False, na_rep="nan", lineterminator="\n")


@timed
def write_catalog_fits(path, catalog, columns, units, history):
    """Write the catalogue as a FITS binary table with units, descriptions and UCDs."""
    table = Table.from_pandas(catalog)
    for column in columns:
        table[column.name].description = column.description
    table.meta["HISTORY"] = history
    buffer = io.BytesIO()
    table.write(buffer, format="fits")  # with the descriptions as astropy reads them
    buffer.seek(0)
    with fits.open(buffer) as hdus:
        header = hdus[1].header
        for number, column in enumerate(columns, start=1):
            unit = units.get(column.unit, column.unit)
            if unit:
                header[f"TUNIT{number}"] = unit
            header[f"TCOMM{number}"] = column.description
            header[f"TUCD{number}"] = column.ucd
        hdus.writeto(path, overwrite=True)


@timed
def write_regions(path, catalog, wcs):
    """Write a DS9 region file: ellipses of semi-axes 3a and 3b, labelled with the id.

    In sky coordinates (ICRS) where the catalogue has them, else in DS9's 1-based pixels.
    """
    x, y, a, b, theta = catalog[["x", "y", "a", "b", "theta"]].to_numpy().T
    if catalog["ra"].notna().any():
        system, shapes = "icrs", sky_ellipses(wcs, x, y, 3 * a, 3 * b, theta)
        form = 'ellipse({:.15g},{:.15g},{:.9g}",{:.9g}",{:.9g})'
    else:
        system, shapes = "image", np.array([x + 1, y + 1, 3 * a, 3 * b, np.degrees(theta)])
        form = "ellipse({:.9g},{:.9g},{:.9g},{:.9g},{:.9g})"
    lines = ["# Region file format: DS9 version 4.1", "global color=red", system]
    lines += [
        f"{form.format(*shape)} # text={{{label}}}"
        for label, shape in zip(catalog["id"], shapes.T, strict=True)
        if np.isfinite(shape).all()
    ]
    path.write_text("\n".join(lines) + "\n")


def sky_ellipses(wcs, x, y, a, b, theta):
    """Return ra, dec (degrees), semi-axes (arcsec) and DS9's angle (degrees) of pixel ellipses.

    DS9 counts the angle from west through north, 90 degrees ahead of the position angle.
    """
    along, across = (np.cos(theta), np.sin(theta)), (-np.sin(theta), np.cos(theta))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        centre, major, minor = (
            wcs.pixel_to_world(x + length * dx, y + length * dy).icrs
            for length, (dx, dy) in ((0, along), (a, along), (b, across))
        )
    return np.array(
        [
            centre.ra.deg,
            centre.dec.deg,
            centre.separation(major).arcsec,
            centre.separation(minor).arcsec,
            (centre.position_angle(major).deg + 90) % 180,
        ]
    )


# The most pixels a side of a panel; larger images are reduced to it before anything is drawn.
PICTURE_SIDE = 1000


def shrink(image, row_of_blocks):
    """Reduce an image (ny, nx) to the resolution of a picture, a strip of it at a time.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    row_of_blocks : callable
        `block_means` or `block_maxima`.
    """
    step = math.ceil(max(image.shape) / PICTURE_SIDE)
    starts = np.arange(0, image.shape[1], step)
    tops = range(0, image.shape[0], step)
    return np.stack([row_of_blocks(image[top : top + step], starts) for top in tops])


def block_means(strip, starts):
    """Return the mean of the finite values of each block of a strip, nan where there are none."""
    finite = np.isfinite(strip)
    total = np.add.reduceat(np.where(finite, strip, 0).sum(axis=0, dtype=np.float64), starts)
    with np.errstate(invalid="ignore"):
        return total / np.add.reduceat(finite.sum(axis=0), starts)


def block_maxima(strip, starts):
    """Return the largest value of each block of a strip."""
    return np.maximum.reduceat(strip.max(axis=0), starts)


def panel_size(shape):
    """Return the width and height in inches of the panel for an image of this shape (ny, nx)."""
    height, width = (8 * max(length / max(shape), 0.2) for length in shape)
    return width, height


def show_image(axes, picture, shape, **style):
    """Show a shrunken picture of an image of this shape, row 0 at the bottom, axes in pixels."""
    axes.set(xlabel="x (pixel)", ylabel="y (pixel)")
    extent = (-0.5, shape[1] - 0.5, -0.5, shape[0] - 0.5)
    return axes.imshow(picture, origin="lower", extent=extent, interpolation="nearest", **style)


def show_sources(axes, field, catalog):
    """Show the background-subtracted image in grey, with a red ellipse of 6a x 6b a source."""
    picture = shrink(field.residual, block_means)
    low, high = map(field.frame.differences, ZScaleInterval().get_limits(picture))
    picture = field.frame.differences(picture)
    drawn = show_image(axes, picture, field.residual.shape, cmap="gray", vmin=low, vmax=high)
    x, y, a, b, theta = catalog[["x", "y", "a", "b", "theta"]].to_numpy().T
    ellipses = EllipseCollection(
        *(6 * a, 6 * b, np.degrees(theta)),
        units="xy",
        offsets=np.column_stack([x, y]),
        offset_transform=axes.transData,
        facecolors="none",
        edgecolors="red",
        linewidths=0.8,
    )
    axes.add_collection(ellipses, autolim=False)
    return drawn


@timed
def draw_overlay(path, field, catalog):
    """Draw the picture of the sources (PNG)."""
    width, height = panel_size(field.residual.shape)
    whole_width, whole_height = width + 1, height + 0.8
    figure = Figure(figsize=(whole_width, whole_height), dpi=120)
    axes = figure.add_axes(
        (0.8 / whole_width, 0.6 / whole_height, width / whole_width, height / whole_height)
    )
    show_sources(axes, field, catalog)
    figure.savefig(path, format="png", pil_kwargs={"compress_level": 1})


@timed
def draw_overview(path, field, catalog, segmentation):
    """Draw four panels with colour bars: sources, background, RMS, segmentation (PNG)."""
    shape = segmentation.shape
    width, height = panel_size(shape)
    figure = Figure(figsize=(2 * width + 3, 2 * height + 1.5), dpi=85, layout="compressed")
    panels = figure.subplots(2, 2).ravel()
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(catalog) + 1, 3))
    colours[0] = 0
    drawn = {
        "sources": show_sources(panels[0], field, catalog),
        "background": show_image(panels[1], shrink(field.level_map(), block_means), shape),
        "background RMS": show_image(panels[2], shrink(field.rms_map(), block_means), shape),
        "segmentation": show_image(
            panels[3], shrink(segmentation, block_maxima), shape, cmap=ListedColormap(colours)
        ),
    }
    for axes, (title, picture) in zip(panels, drawn.items(), strict=True):
        axes.set_title(title)
        figure.colorbar(picture, ax=axes)
    figure.savefig(path, format="png")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def number(kind, minimum=-math.inf, maximum=math.inf, *, above=None, odd=False):
    """Return a converter for argparse: a finite int or float within bounds.

    `minimum` and `maximum` are allowed themselves, `above` is not.
    """

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value in (math.inf, -math.inf) or value != value:
            wanted = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is more than {maximum}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is no more than {above}")
        if odd and value % 2 == 0:
            raise argparse.ArgumentTypeError(f"{text} is even; take an odd number")
        return value

    return convert


POSITIVE = number(float, above=0)

# The products that are always written, with their default names; images get an extension.
ALWAYS = {
    "background": "background",
    "rms": "rms",
    "segmentation": "segmentation",
    "overlay": "sources.png",
    "catalog": "catalog.tsv",
}
ON_REQUEST = {
    "subtracted": "background-subtracted image",
    "catalog_fits": "catalogue as FITS table with units and descriptions",
    "regions": "DS9 region file",
    "overview": "PNG of four panels: sources, background, RMS, segmentation",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        # Or else argparse takes -1e-5 for an option.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message):
        self.exit(2, f"{PROG}: error: {one_line(message)} (see --help)\n")


def option_of(name):
    """Return the option that argparse stores under this name."""
    return "--" + name.replace("_", "-")


def add_option(group, name, kind, default, text, **keywords):
    """Add an option of a type, or of a tuple of choices, whose help ends in its default."""
    if isinstance(kind, tuple):
        keywords["choices"], kind = kind, type(kind[0])
    if default not in (None, [], ()):
        text += " (default: %(default)s)"
    group.add_argument(name, type=kind, default=default, help=text, **keywords)


def build_parser():
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROG,
        usage="%(prog)s IMAGE [options]",
        description="Find and measure the sources in an image: background, noise, segmentation "
        "map, picture and catalogue.",
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="FITS or TIFF image")
    mesh, extraction = BackgroundSettings, ExtractionSettings

    add = partial(add_option, parser.add_argument_group("input"))
    add("--hdu", str, None, "index, EXTNAME, or EXTNAME,EXTVER (default: first with an image)")
    add("--plane", number(int, 0), None, "plane of a cube or stack, over the flattened other axes")
    add("--mask", Path, None, "mask image, FITS or TIFF, of the same shape")
    add("--mask-hdu", str, None, "HDU of a FITS mask, as --hdu")
    add("--maskthresh", number(float), 0.0, "mask pixels greater than this are masked")
    box = {"nargs": 4, "action": "append", "metavar": ("XMIN", "XMAX", "YMIN", "YMAX")}
    add("--mask-box", number(int, 0), [], "mask 0-based pixels, ends included; repeatable", **box)

    add = partial(add_option, parser.add_argument_group("background"))
    add("--bw", number(int, 8), mesh.bw, "width of the boxes, pixels")
    add("--bh", number(int, 8), mesh.bh, "height of the boxes, pixels")
    add("--fw", number(int, 1, 99, odd=True), mesh.fw, "width of the median filter, boxes, odd")
    add("--fh", number(int, 1, 99, odd=True), mesh.fh, "height of the median filter, boxes, odd")
    add("--fthresh", number(float, 0), mesh.fthresh, "filter boxes this far from the median")
    add("--background-passes", (1, 2), 1, "with 2, mask the sources and estimate it again")

    add = partial(add_option, parser.add_argument_group("detection"))
    add("--thresh", POSITIVE, extraction.thresh, "times the noise; absolute without noise")
    noises = ("float_globalrms", "array_rms", "none", "file")
    add("--err-option", noises, noises[0], "noise: one number, RMS map, none, or --err-file")
    add("--err-file", Path, None, "noise image for --err-option file")
    add("--err-hdu", str, None, "HDU of a FITS noise image, as --hdu")
    add("--err-type", ("stddev", "variance", "weight"), "stddev", "weight is inverse variance")
    add("--gain", POSITIVE, extraction.gain, "e-/ADU, for Poisson noise in errors")
    add("--minarea", number(int, 1, 2**31 - 1), extraction.minarea, "least pixels of a source")

    add = partial(add_option, parser.add_argument_group("filter"))
    kernels = ("none", "default", "gaussian", "tophat", "file")
    add("--filter-case", kernels, "default", "default is 1 2 1 / 2 4 2 / 1 2 1")
    width = number(float, maximum=50, above=0)
    add("--filter-fwhm", width, 2.0, "FWHM of gaussian, diameter of tophat, pixels")
    add("--filter-file", Path, None, "kernel as text or SExtractor's .conv")
    kinds = ("matched", "conv")
    add("--filter-type", kinds, extraction.filter_type, "how to filter where noise is an array")

    group = parser.add_argument_group("deblending and cleaning")
    add = partial(add_option, group)
    levels = number(int, 1, 1024)
    add("--deblend-nthresh", levels, extraction.deblend_nthresh, "number of levels")
    contrast = number(float, 0, 1)
    add("--deblend-cont", contrast, extraction.deblend_cont, "least contrast; 1 splits nothing")
    group.add_argument(
        "--clean",
        action=argparse.BooleanOptionalAction,
        default=extraction.clean,
        help="drop what bright neighbours make (default: on)",
    )
    add("--clean-param", POSITIVE, extraction.clean_param, "a lower value drops more")

    photometry = PhotometrySettings
    add = partial(add_option, parser.add_argument_group("photometry"))
    add("--zeropoint", number(float), photometry.zeropoint, "magnitude of one count")
    radii = number(float, maximum=100, above=0)
    add("--kron-factor", radii, photometry.kron_factor, "Kron radii in the AUTO ellipse")
    add("--kron-min-radius", radii, photometry.kron_min_radius, "its least radius, in (a, b)")
    sizes = number(float, maximum=10_000, above=0)
    add("--aperture-diameters", sizes, (), "of circles, pixels", nargs="+", metavar="D")
    add("--measure-image", Path, None, "detect on IMAGE, measure on this aligned image")
    add("--measure-hdu", str, None, "HDU of a FITS measure image, as --hdu")
    add("--measure-plane", number(int, 0), None, "plane of the measure image, as --plane")

    group = parser.add_argument_group("output")
    group.add_argument(
        *("-o", "--output-dir"),
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where products without a path of their own go; made if missing (default: .)",
    )
    for product, name in ALWAYS.items():
        text = f"default: {name}" + ("" if "." in name else ".fits or .tiff")
        group.add_argument(f"--{product}", type=Path, metavar="PATH", help=text)
    for product, text in ON_REQUEST.items():
        group.add_argument(
            option_of(product), type=Path, metavar="PATH", help=text + "; on request"
        )
    group.add_argument(
        "--image-format",
        choices=tuple(SUFFIXES),
        help="of all image products (default: by file extension, else fits)",
    )

    group = parser.add_argument_group("general")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="tell stages and times")
    volume.add_argument("-q", "--quiet", action="store_true", help="tell nothing but errors")
    version = f"{PROG} {__version__} (sep {sep.__version__})"
    group.add_argument("--version", action="version", version=version)
    return parser


def check_usage(args):
    """Return what is wrong with a combination of options, or None."""
    for name, needed in (
        ("mask_hdu", "mask"),
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
        if xmin > xmax or ymin > ymax:
            return f"--mask-box {xmin} {xmax} {ymin} {ymax}: the order is XMIN XMAX YMIN YMAX"
    if len(set(args.aperture_diameters)) < len(args.aperture_diameters):
        return "--aperture-diameters: each diameter may be given once"
    if args.catalog_fits and len(catalog_columns(args.aperture_diameters)) > 999:
        return "--catalog-fits: a FITS table has 999 columns at the most; take fewer apertures"
    inputs = (args.image, args.mask, args.err_file, args.filter_file, args.measure_image)
    taken = {os.path.realpath(path) for path in inputs if path}
    for product, path in product_paths(args).items():
        option, real = option_of(product), os.path.realpath(path)
        if real in taken:
            return f"{option} {path}: another option names this file already"
        if os.path.exists(path) and not os.path.isfile(path):
            return f"{option} {path}: not a regular file"
        taken.add(real)
    return None


def product_paths(args):
    """Return the path of each product to write, by name."""
    suffix = SUFFIXES[args.image_format or "fits"]
    paths = {}
    for product in (*ALWAYS, *ON_REQUEST):
        path = getattr(args, product)
        if path is None and product in ALWAYS:
            name = ALWAYS[product]
            path = args.output_dir / (name if "." in name else name + suffix)
        if path is not None:
            paths[product] = path
    return paths


def describe_run(args, image):
    """Return lines that say with which version and parameters the products were made."""
    elsewhere = {"output_dir", "image_format", "verbose", "quiet", *ALWAYS, *ON_REQUEST}
    lines = [f"{PROG} {__version__} (sep {sep.__version__})"]
    taken = vars(args) | {"hdu": image.name.removeprefix(str(args.image)) or None}
    for name, value in taken.items():
        if name not in elsewhere and value not in (None, [], ()):
            lines.append(f"{name} = {value.name if isinstance(value, Path) else value!a}")
    return lines


@timed
def run(args):
    """Do the whole work, from the image to its products."""
    image = read_image(args.image, args.hdu, args.plane)
    mask, noise, other = read_companions(args, image)
    method, photometry = choose_method(args), settings_from(args, PhotometrySettings)
    targets = product_paths(args)
    with staged(targets) as paths:
        with about(image.name):
            mask = build_mask(image.data, mask, noise, args.mask_box)
            report_image(image, mask)
            field = subtract_background(image.data, mask, noise, method)
            require_noise(field)
            found = find_sources(field)
            report_detections(field, found)
        target = field if other is None else subtract_other(other, mask, method)
        measured = measure(field, target, found.objects, found.segmentation, photometry)
        write = partial(write_map, paths, args, image)
        local = survey_background(field, target, found.objects, write)
        measured = measured.assign(**local)
        catalog = build_catalog(found.objects, field.frame, measured, image.wcs, photometry)
        write_products(paths, args, image, other, field, found.segmentation, catalog)
    for product, path in targets.items():
        log.info("%-13s %s", product, path)


def read_companions(args, image):
    """Return the mask, the noise image and the image to measure on, None for what isn't given."""
    shape = image.data.shape
    mask = noise = other = None
    if args.mask:
        mask = read_mask(args.mask, args.mask_hdu, args.plane, args.maskthresh, shape)
    if args.err_file:
        noise = read_noise(args.err_file, args.err_hdu, args.plane, args.err_type, shape)
    if args.measure_image:
        other = read_measure_image(args.measure_image, args.measure_hdu, args.measure_plane, image)
    return mask, noise, other


def choose_method(args):
    """Return the `Method` that the options ask for."""
    return Method(
        make_kernel(args.filter_case, args.filter_fwhm, args.filter_file),
        args.err_option,
        args.background_passes,
        settings_from(args, BackgroundSettings),
        settings_from(args, ExtractionSettings),
    )


def write_map(paths, args, image, product, values):
    """Write an image product, float32 unless the image is float64, with WCS and unit."""
    unit = None if product == "segmentation" else image.unit
    if values.dtype == np.float64 and image.dtype != "float64":
        values = values.astype(np.float32)
    history = describe_run(args, image)
    write_image(paths[product], values, args.image_format, image.wcs, history, unit)


def write_products(paths, args, image, other, field, segmentation, catalog):
    """Write the products that have a path, but for the background's."""
    write_map(paths, args, image, "segmentation", segmentation)
    write_catalog(paths["catalog"], catalog)
    draw_overlay(paths["overlay"], field, catalog)
    if "subtracted" in paths:
        residual = field.frame.differences(field.residual)
        write_map(paths, args, image, "subtracted", residual)
    if "catalog_fits" in paths:
        columns, history = catalog_columns(args.aperture_diameters), describe_run(args, image)
        units = {"image": image.unit, "measured": (other or image).unit}
        write_catalog_fits(paths["catalog_fits"], catalog, columns, units, history)
    if "regions" in paths:
        write_regions(paths["regions"], catalog, image.wcs)
    if "overview" in paths:
        draw_overview(paths["overview"], field, catalog, segmentation)


def report_image(image, mask):
    """Tell what was read, and how much of it is masked."""
    rows, columns = image.data.shape
    bad = np.count_nonzero(~np.isfinite(image.data[mask]))
    log.info("image         %s: %d x %d %s", image.name, columns, rows, image.dtype)
    log.info("masked        %.2f %% (%d pixels are not finite)", 100 * mask.mean(), bad)


def report_detections(field, found):
    """Tell level, noise and threshold in image values, the number of sources, and warnings."""
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
        typical = frame.differences(float(np.median(sample(field.noise, field.mask))))
        log.info("threshold     %.6g (%g x noise, median)", thresh * typical, thresh)
        warn_of_depth(method)
    log.info("sources       %d", len(found.objects))
    if field.is_noiseless():
        log.warning("the image is constant: no sources")
    elif not len(found.objects):
        log.warning("no sources found: the catalogue and the segmentation map are empty")


def warn_of_depth(method):
    """Tell how much deeper than on a global noise a matched filter goes with a noise image.

    For white noise: SEP compares sum(k f / n^2) / sqrt(sum(k^2 / n^2)) with the threshold where it
    has an array n, but sum(k f) / sum|k| with n times the threshold where it has one number.
    """
    if method.kernel is None or method.extraction.filter_type != "matched":
        return
    kernel, thresh = method.kernel.astype(np.float64), method.extraction.thresh
    depth = float(np.abs(kernel).sum() / np.sqrt(np.square(kernel).sum()))
    log.warning(
        "with a noise image the matched filter goes %.2f times deeper: --thresh %g is as %.3g on "
        "the global RMS, and %.3g as %g there; --filter-type conv goes no deeper",
        *(depth, thresh, thresh / depth, thresh * depth, thresh),
    )


def start_logging(args):
    """Send reports to stdout and warnings, each in one line, to stderr; nowhere if it is closed."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names that are no text
    reports, warnings_ = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    reports.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings_.setLevel(logging.WARNING)
    warnings_.setFormatter(logging.Formatter(f"{PROG}: warning: %(message)s"))
    log.handlers = [reports, warnings_]
    log.propagate = False
    log.setLevel(logging.ERROR if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    logging.captureWarnings(True)
    for library in ("py.warnings", "tifffile"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def stop(signum, _frame):
    """End in good order when told to, so that no half product stays behind."""
    sys.exit(128 + signum)


def main(argv=None):
    """Run the tool on command line arguments; return its exit code (0, or 1 for unusable data)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    problem = check_usage(args)
    if problem:
        parser.error(problem)
    start_logging(args)
    try:
        with stopping_by(stop):
            run(args)
    except InputError as error:
        problem = one_line(error)
    except MemoryError:
        problem = f"{args.image}: not enough memory; cut the image into parts"
    else:
        return 0
    print(f"{PROG}: error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
