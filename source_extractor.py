#!/usr/bin/env python
"""Extract sources from an astronomical or microscopy image with SEP.

The file reads in the order of the work: settings, reading, mask and kernel, background, detection,
catalogue, products, and last the command line, whose `run` is the table of contents.

Conventions, everywhere: images are indexed (y, x); x and y are 0-based with pixel centres at
integers; masks are True where a pixel is excluded; `theta` is in radians from +x towards +y.
"""

import argparse
import logging
import math
import os
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
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


class InputError(Exception):
    """Data that can't be used: one line that says what is wrong with which file, and what to do."""


@contextmanager
def about(name):
    """Put the name of the image before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def stage(function):
    """Report at debug level how long each call of `function` took."""

    @wraps(function)
    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        log.debug("%-22s %7.2f s", function.__name__, time.perf_counter() - start)
        return result

    return timed


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
    """

    data: np.ndarray
    name: str
    dtype: str
    wcs: WCS | None
    unit: str | None


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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged or unsupported {kind} file ({reason})") from error


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
        chosen = choose_plane(stack, plane, lone_serves_all)
        return Image(stack.cut(chosen), stack.name, stack.dtype, stack.wcs, stack.unit)


def choose_plane(stack, plane, lone_serves_all):
    """Return the number of the plane to cut, once it is known to exist and to fit in memory."""
    rows, columns = (stack.shape[axis] for axis in stack.image_axes)
    count = math.prod(stack.shape) // (rows * columns)
    if count == 1 and (plane is None or lone_serves_all):
        plane = 0
    if plane is None or plane >= count:
        layout = ", ".join(f"{name}={n}" for name, n in zip(stack.axes, stack.shape, strict=True))
        raise InputError(
            f"{stack.name}: {count} plane{'s' if count > 1 else ''} in axes ({layout}); choose one "
            f"from 0 to {count - 1} with the plane option"
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
    with fits.open(path, memmap=False, uint=False) as hdus:
        chosen = find_hdu(path, hdus, hdu)
        header, shape = chosen.header, chosen.shape
        long_axes = [axis for axis, length in enumerate(shape) if length > 1]
        image_axes = long_axes[-2:] if len(long_axes) > 1 else [len(shape) - 2, len(shape) - 1]
        others = [axis for axis in range(len(shape)) if axis not in image_axes]

        def cut(plane):
            index = [slice(None)] * len(shape)
            position = np.unravel_index(plane, [shape[axis] for axis in others])
            for axis, place in zip(others, position, strict=True):
                index[axis] = int(place)
            return chosen.section[tuple(index)]

        numbers = [len(shape) - axis for axis in range(len(shape))]
        yield Stack(
            name=f"{path}[{hdus.index_of(chosen)}]" + (f" {chosen.name}" if chosen.name else ""),
            axes=[header.get(f"CTYPE{n}") or f"NAXIS{n}" for n in numbers],
            shape=shape,
            image_axes=image_axes,
            dtype=fits.BITPIX2DTYPE[header["BITPIX"]],
            cut=cut,
            wcs=celestial_wcs(path, hdus, header, [numbers[axis] for axis in image_axes[::-1]]),
            unit=str(header["BUNIT"]) if header.get("BUNIT") else None,
        )


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
        return wcs if wcs.has_celestial else None
    except Exception as error:
        reason = " ".join(str(error).split())
        log.warning("%s: WCS can't be used and is left out (%s)", path, reason)
        return None


@contextmanager
def open_tiff(path):
    """Open the first series of a TIFF file as a `Stack`."""
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        axes, shape, page = series.axes, series.shape, series.keyframe
        image_axes = [axes.index("Y"), axes.index("X")]
        one_page_a_plane = axes.endswith("YX") and len(series.pages) == math.prod(shape[:-2])

        def cut(plane):
            if one_page_a_plane and not series.is_truncated:
                data = series.pages[plane].asarray()
            else:
                planes = np.moveaxis(series.asarray(), image_axes, (-2, -1))
                data = planes.reshape(-1, *planes.shape[-2:])[plane]
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and data.dtype.kind in "bu":
                data = ~data if page.bitspersample == 1 else (1 << page.bitspersample) - 1 - data
            return data

        yield Stack(str(path), list(axes), shape, image_axes, series.dtype.name, cut)


def to_float(path, data):
    """Return `data` as a native, contiguous, writable array: float64 where float32 would round."""
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind not in "biuf":
        raise InputError(f"{path}: pixels of type {data.dtype} are not real numbers")
    dtype = np.float64 if size > (4 if kind == "f" else 2) else np.float32
    return np.require(data, dtype, ["C", "W"])


@stage
def read_image(path, hdu=None, plane=None):
    """Read the plane to work on; parameters and errors as in `read_plane`.

    Returns
    -------
    Image
        float64 where the file has float64 or integers of more than 16 bits, else float32.
    """
    image = read_plane(path, hdu, plane)
    return replace(image, data=to_float(path, image.data))


def read_aligned(path, hdu, plane, shape):
    """Read a plane that must have the image's shape (ny, nx); a stack gives the image's plane."""
    found = read_plane(path, hdu, plane, lone_serves_all=True)
    if found.data.shape != shape:
        raise InputError(
            f"{found.name}: its shape (rows, columns) is {found.data.shape}, the image's {shape}; "
            "give a file that was made for this image"
        )
    return found.data


@stage
def read_mask(path, hdu, plane, maskthresh, shape):
    """Read a mask, True where its value exceeds `maskthresh` or is NaN; shape (ny, nx)."""
    return ~(read_aligned(path, hdu, plane, shape) <= maskthresh)


@stage
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
    noise = to_float(path, read_aligned(path, hdu, plane, shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind != "stddev":
            np.sqrt(noise, out=noise)
        if kind == "weight":
            np.divide(1, noise, out=noise)
    if not ((noise > 0) & np.isfinite(noise)).any():
        raise InputError(f"{path}: no pixel holds a usable {kind}; see --err-type")
    return noise


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


def build_mask(image, mask, boxes):
    """Combine everything that excludes a pixel: no finite value, the mask, the boxes.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    mask : ndarray of bool, shape (ny, nx), or None
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
        spread = (high - low) / 2 or float(np.std(values))
        offset = middle if abs(middle) > 1e4 * spread else 0.0
        extreme = spread > 0 and not 1e-12 < spread < 1e12
        return cls(offset, 2.0 ** round(math.log2(spread)) if extreme else 1.0)

    def enter(self, image):
        """Bring an image into the frame, in place."""
        image -= self.offset
        image /= self.scale

    def settings(self, settings, err_option):
        """Return `ExtractionSettings` for the frame: absolute threshold and gain rescaled."""
        thresh = settings.thresh / (self.scale if err_option == "none" else 1)
        gain = settings.gain and settings.gain * self.scale
        return replace(settings, thresh=thresh, gain=gain)

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
GROWTH = 4.0

# SEP's own starting values and the most it takes without overflow; see `grow_limits`.
PIXEL_STACK = 300_000
SUB_OBJECTS = 1024
MAX_SUB_OBJECTS = 32767

# What SEP itself puts for the noise of a masked pixel.
NO_WEIGHT = 1e30


class Detections(NamedTuple):
    """SEP's 30 fields an object, the map (ny, nx) that labels it index + 1, and the noise."""

    objects: np.ndarray
    segmentation: np.ndarray
    noise: float | np.ndarray | None


@stage
def estimate_background(image, mask, settings):
    """Return the `sep.Background` of an image (ny, nx), or None if SEP could use no box of it."""
    if mask.any() and not has_usable_box(mask, settings.bw, settings.bh):
        return None
    return sep.Background(image, mask=mask, **asdict(settings))


def has_usable_box(mask, bw, bh):
    """Tell if half of the pixels of any box are not masked; SEP takes no box with fewer."""
    rows, columns = np.arange(0, mask.shape[0], bh), np.arange(0, mask.shape[1], bw)
    good = np.add.reduceat(np.add.reduceat(~mask, rows, axis=0, dtype=np.int64), columns, axis=1)
    heights, widths = np.diff(rows, append=mask.shape[0]), np.diff(columns, append=mask.shape[1])
    return (2 * good >= np.outer(heights, widths)).any()


def model_background(image, mask, settings, passes, find):
    """Estimate the background, in two passes on request.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    mask : ndarray of bool, shape (ny, nx)
    settings : BackgroundSettings
    passes : {1, 2}
        With 2, the sources that `find` sees over the first background are masked for the second.
    find : callable
        From a residual and its background to `Detections`.

    Returns
    -------
    sep.Background
    """
    background = estimate_background(image, mask, settings)
    if background is None:
        raise InputError(
            f"no background box of {settings.bw} x {settings.bh} pixels has half of its pixels "
            "unmasked; mask less, or take other boxes with --bw and --bh"
        )
    if passes == 1:
        return background
    grown = grow_mask(mask, find(image - background, background).objects)
    again = estimate_background(image, grown, settings)
    if again is None:
        log.warning("sources fill every background box: kept the background of the first pass")
    return again or background


def grow_mask(mask, objects):
    """Return a copy of the mask that covers the objects as well, out to `GROWTH` times (a, b)."""
    grown = mask.copy()
    sane = objects[np.isfinite(objects["cxx"] + objects["cyy"] + objects["cxy"])]
    shape = {name: sane[name] for name in ("x", "y", "cxx", "cyy", "cxy")}
    sep.mask_ellipse(grown, **shape, r=GROWTH)
    return grown


def choose_noise(option, background, residual, mask, noise):
    """Return the noise to detect against, and the mask with the pixels added that have none.

    Parameters
    ----------
    option : {"float_globalrms", "array_rms", "none", "file"}
    background : sep.Background
    residual : ndarray, shape (ny, nx)
        Background-subtracted image.
    mask : ndarray of bool, shape (ny, nx)
    noise : ndarray, shape (ny, nx), or None
        The noise image for the option "file", as standard deviations.

    Returns
    -------
    noise : float, ndarray of shape (ny, nx), or None
        Standard deviations; None for an absolute threshold.
    mask : ndarray of bool, shape (ny, nx)

    Raises
    ------
    InputError
        If the noise was to be measured, and there is none, but there are sources.
    """
    if option == "none":
        return None, mask
    # SEP calls the global RMS 1 where it finds no noise at all.
    if option != "file" and background.globalrms == 1 and not background.rms().any():
        if residual[~mask].any():
            raise InputError(
                "the background has no noise, so a threshold in units of it has no meaning; give "
                "an absolute one with --err-option none, or the noise with --err-option file"
            )
        log.warning("the image is constant: no sources")
        return 0.0, mask
    if option == "float_globalrms":
        return background.globalrms, mask
    if option == "array_rms":
        noise = background.rms()
    mask = mask | ~((noise > 0) & np.isfinite(noise))
    return np.where(mask, noise.dtype.type(NO_WEIGHT), noise), mask


@stage
def detect(residual, mask, noise, kernel, settings):
    """Run `sep.extract`, with its internal limits grown as far as this image needs.

    Parameters
    ----------
    residual : ndarray, shape (ny, nx)
        Background-subtracted image; as it was when the function returns.
    mask : ndarray of bool, shape (ny, nx)
    noise : float, ndarray of shape (ny, nx), or None
    kernel : ndarray, or None
    settings : ExtractionSettings

    Returns
    -------
    Detections
    """
    sep.set_extract_pixstack(PIXEL_STACK)
    sep.set_sub_object_limit(SUB_OBJECTS)
    # SEP filters the first rows before it has applied the mask to them.
    first = residual[: 0 if kernel is None else kernel.shape[0] // 2]
    kept = first.copy()
    first[mask[: len(first)]] = 0
    keywords = asdict(settings) | {"filter_kernel": kernel, "segmentation_map": True}
    try:
        while True:
            try:
                return Detections(*sep.extract(residual, err=noise, mask=mask, **keywords), noise)
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
            f"a source splits into more than {MAX_SUB_OBJECTS} parts; raise --thresh or "
            "--deblend-cont, or lower --deblend-nthresh"
        ) from error
    else:
        raise InputError(f"SEP gave up: {' '.join(str(error).split())}") from error


def matched_depth(kernel):
    """Return how many times fainter a matched filter with a noise array goes than a global noise.

    For white noise: SEP compares sum(k f / n²) / sqrt(sum(k² / n²)) with the threshold where it
    has an array n, but sum(k f) / sum|k| with the threshold times n where it has one number.
    """
    return float(np.abs(kernel).sum() / np.sqrt(np.square(kernel).sum()))


# ---------------------------------------------------------------------------------------------
# Catalogue
# ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the catalogue; the unit "image" stands for that of the pixels."""

    name: str
    unit: str | None
    description: str


COLUMNS = (
    Column("id", None, "label of the object in the segmentation map"),
    Column("thresh", "image", "detection threshold at the object"),
    Column("npix", "pixel", "number of pixels of the object"),
    Column("tnpix", "pixel", "number of its pixels above the threshold without filter"),
    Column("xmin", "pixel", "first column of the object"),
    Column("xmax", "pixel", "last column of the object"),
    Column("ymin", "pixel", "first row of the object"),
    Column("ymax", "pixel", "last row of the object"),
    Column("x", "pixel", "barycentre along x"),
    Column("y", "pixel", "barycentre along y"),
    Column("x2", "pixel2", "variance of the light along x"),
    Column("y2", "pixel2", "variance of the light along y"),
    Column("xy", "pixel2", "covariance of the light in x and y"),
    Column("errx2", "pixel2", "variance of the error of x"),
    Column("erry2", "pixel2", "variance of the error of y"),
    Column("errxy", "pixel2", "covariance of the errors of x and y"),
    Column("a", "pixel", "RMS of the light along the major axis"),
    Column("b", "pixel", "RMS of the light along the minor axis"),
    Column("theta", "rad", "angle of the major axis, from +x towards +y"),
    Column("cxx", "pixel-2", "ellipse coefficient of dx²"),
    Column("cyy", "pixel-2", "ellipse coefficient of dy²"),
    Column("cxy", "pixel-2", "ellipse coefficient of dx dy"),
    Column("cflux", "image", "sum of the object's pixels in the filtered image"),
    Column("flux", "image", "sum of the object's pixels"),
    Column("cpeak", "image", "highest pixel in the filtered image"),
    Column("peak", "image", "highest pixel"),
    Column("xcpeak", "pixel", "column of the highest pixel in the filtered image"),
    Column("ycpeak", "pixel", "row of the highest pixel in the filtered image"),
    Column("xpeak", "pixel", "column of the highest pixel"),
    Column("ypeak", "pixel", "row of the highest pixel"),
    Column("flag", None, "extraction flags"),
)


def build_catalog(objects, frame):
    """Return the catalogue as a DataFrame, a row an object, in image values.

    Parameters
    ----------
    objects : structured ndarray
        `sep.extract`'s objects, as found in the frame.
    frame : Frame
    """
    catalog = pd.DataFrame(objects)
    catalog.insert(0, "id", np.arange(1, len(objects) + 1))
    for column in COLUMNS:
        if column.unit == "image":
            catalog[column.name] = frame.differences(catalog[column.name])
    return catalog


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------

SUFFIXES = {"fits": ".fits", "tiff": ".tiff"}


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
    parts = {
        name: target.with_name(f".{name}-{token}{target.suffix}")
        for name, target in targets.items()
    }
    try:
        for name, part in parts.items():
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)
        yield parts
        for name, part in parts.items():
            part.replace(targets[name])
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"{error.filename or 'products'}: can't be written ({reason})") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@stage
def write_image(path, data, form, wcs, history, unit=None):
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
    unit : str, optional
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


@stage
def write_catalog(path, catalog):
    """Write the catalogue as tab-separated text: one line of names, full precision, `nan`."""
    catalog.to_csv(path, sep="\t", index=False, na_rep="nan", lineterminator="\n")


@stage
def write_catalog_fits(path, catalog, unit, history):
    """Write the catalogue as a FITS binary table with units and descriptions."""
    table = Table.from_pandas(catalog)
    for column in COLUMNS:
        table[column.name].unit = unit if column.unit == "image" else column.unit
        table[column.name].description = column.description
    table.meta["HISTORY"] = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a BUNIT that is no standard unit
        table.write(path, format="fits", overwrite=True)


@stage
def write_regions(path, catalog):
    """Write a DS9 region file: ellipses of semi-axes 3a and 3b, in DS9's 1-based pixels."""
    lines = ["# Region file format: DS9 version 4.1", "global color=red", "image"]
    lines += [
        f"ellipse({x + 1:.4f},{y + 1:.4f},{3 * a:.4f},{3 * b:.4f},{math.degrees(theta):.4f})"
        f" # text={{{label}}}"
        for label, x, y, a, b, theta in zip(
            *(catalog[name] for name in ("id", "x", "y", "a", "b", "theta")), strict=True
        )
    ]
    path.write_text("\n".join(lines) + "\n")


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


def show_sources(axes, residual, catalog, frame):
    """Show the background-subtracted image in grey, with a red ellipse of 6a x 6b a source."""
    picture = frame.differences(shrink(residual, block_means))
    low, high = ZScaleInterval().get_limits(picture)
    drawn = show_image(axes, picture, residual.shape, cmap="gray", vmin=low, vmax=high)
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


@stage
def draw_overlay(path, residual, catalog, frame):
    """Draw the picture of the sources (PNG).

    Parameters
    ----------
    path : Path
    residual : ndarray, shape (ny, nx)
        Background-subtracted image, in the frame.
    catalog : DataFrame
    frame : Frame
    """
    width, height = panel_size(residual.shape)
    whole_width, whole_height = width + 1, height + 0.8
    figure = Figure(figsize=(whole_width, whole_height), dpi=120)
    axes = figure.add_axes(
        (0.8 / whole_width, 0.6 / whole_height, width / whole_width, height / whole_height)
    )
    show_sources(axes, residual, catalog, frame)
    figure.savefig(path, format="png")


@stage
def draw_overview(path, residual, background, segmentation, catalog, frame):
    """Draw four panels with colour bars: sources, background, RMS, segmentation (PNG).

    Parameters
    ----------
    path, residual, catalog, frame
        As in `draw_overlay`.
    background : sep.Background
    segmentation : ndarray of int, shape (ny, nx)
    """
    shape = residual.shape
    width, height = panel_size(shape)
    figure = Figure(figsize=(2 * width + 3, 2 * height + 1.5), dpi=85, layout="compressed")
    panels = figure.subplots(2, 2).ravel()
    level = frame.levels(shrink(background.back(), block_means))
    noise = frame.differences(shrink(background.rms(), block_means))
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(catalog) + 1, 3))
    colours[0] = 0
    drawn = {
        "sources": show_sources(panels[0], residual, catalog, frame),
        "background": show_image(panels[1], level, shape),
        "background RMS": show_image(panels[2], noise, shape),
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
        wanted = "a whole number" if kind is int else "a number"
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is more than {maximum}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not more than {above}")
        if odd and value % 2 == 0:
            raise argparse.ArgumentTypeError(f"{text} is even; take an odd number")
        return value

    return convert


POSITIVE = number(float, above=0)


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

    def error(self, message):
        self.exit(2, f"{PROG}: error: {message} (see --help)\n")


def add_option(group, name, kind, default, text, **keywords):
    """Add an option of a type, or of a tuple of choices, whose help ends in its default."""
    if isinstance(kind, tuple):
        keywords["choices"], kind = kind, type(kind[0])
    if default not in (None, []):
        text += " (default: %(default)s)"
    group.add_argument(name, type=kind, default=default, help=text, **keywords)


def build_parser():
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROG,
        description="Find and measure the sources in an image: background, noise, segmentation "
        "map, picture and catalogue.",
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="FITS or TIFF image")
    sizes, extraction = BackgroundSettings, ExtractionSettings

    add = partial(add_option, parser.add_argument_group("input"))
    add("--hdu", str, None, "index, EXTNAME, or EXTNAME,EXTVER (default: first with an image)")
    add("--plane", number(int, 0), None, "plane of a cube or stack, over the flattened other axes")
    add("--mask", Path, None, "mask image, FITS or TIFF, of the same shape")
    add("--mask-hdu", str, None, "HDU of a FITS mask, as --hdu")
    add("--maskthresh", number(float), 0.0, "mask pixels greater than this are masked")
    box = {"nargs": 4, "action": "append", "metavar": ("XMIN", "XMAX", "YMIN", "YMAX")}
    add("--mask-box", number(int, 0), [], "mask 0-based pixels, ends included; repeatable", **box)

    add = partial(add_option, parser.add_argument_group("background"))
    add("--bw", number(int, 8), sizes.bw, "width of the boxes, pixels")
    add("--bh", number(int, 8), sizes.bh, "height of the boxes, pixels")
    add("--fw", number(int, 1, 99, odd=True), sizes.fw, "width of the median filter, boxes, odd")
    add("--fh", number(int, 1, 99, odd=True), sizes.fh, "height of the median filter, boxes, odd")
    add("--fthresh", number(float, 0), sizes.fthresh, "filter boxes this far from the median")
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
        help="drop what bright neighbours make",
    )
    add("--clean-param", POSITIVE, extraction.clean_param, "a lower value drops more")

    group = parser.add_argument_group("output")
    group.add_argument(
        *("-o", "--output-dir"),
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where products without a path of their own go; made if missing",
    )
    for product, name in ALWAYS.items():
        text = f"default: {name}" + ("" if "." in name else ".fits or .tiff")
        group.add_argument(f"--{product}", type=Path, metavar="PATH", help=text)
    for product, text in ON_REQUEST.items():
        option = f"--{product.replace('_', '-')}"
        group.add_argument(option, type=Path, metavar="PATH", help=text + "; on request")
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
    for given, needed, text in (
        (args.mask_hdu, args.mask, "--mask-hdu needs --mask"),
        (args.err_hdu, args.err_file, "--err-hdu needs --err-file"),
        (args.err_option == "file", args.err_file, "--err-option file needs --err-file"),
        (args.err_file, args.err_option == "file", "--err-file needs --err-option file"),
        (args.filter_case == "file", args.filter_file, "--filter-case file needs --filter-file"),
        (args.filter_file, args.filter_case == "file", "--filter-file needs --filter-case file"),
    ):
        if given and not needed:
            return text
    for xmin, xmax, ymin, ymax in args.mask_box:
        if xmin > xmax or ymin > ymax:
            return f"--mask-box {xmin} {xmax} {ymin} {ymax}: the order is XMIN XMAX YMIN YMAX"
    inputs = (args.image, args.mask, args.err_file, args.filter_file)
    taken = {os.path.realpath(path) for path in inputs if path}
    for product, path in product_paths(args).items():
        option, real = f"--{product.replace('_', '-')}", os.path.realpath(path)
        if real in taken:
            return f"{option} {path}: another option names this file already"
        if path.exists() and not path.is_file():
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


def describe_run(args):
    """Return lines that say with which version and parameters the products were made."""
    elsewhere = {"output_dir", "image_format", "verbose", "quiet", *ALWAYS, *ON_REQUEST}
    lines = [f"{PROG} {__version__} (sep {sep.__version__})"]
    for name, value in vars(args).items():
        if name not in elsewhere and value not in (None, []):
            lines.append(f"{name} = {value.name if isinstance(value, Path) else value!a}")
    return lines


@stage
def run(args):
    """Do the whole work, from the image to its products."""
    image = read_image(args.image, args.hdu, args.plane)
    pixels, shape = image.data, image.data.shape
    mask = args.mask and read_mask(args.mask, args.mask_hdu, args.plane, args.maskthresh, shape)
    noise = args.err_file and read_noise(
        args.err_file, args.err_hdu, args.plane, args.err_type, shape
    )
    kernel = make_kernel(args.filter_case, args.filter_fwhm, args.filter_file)
    history = describe_run(args)
    targets = product_paths(args)
    with staged(targets) as paths, about(image.name):
        write = partial(write_image, form=args.image_format, wcs=image.wcs, history=history)
        mask = build_mask(pixels, mask, args.mask_box)
        report_image(image, mask)
        frame = Frame.of(pixels, mask)
        frame.enter(pixels)
        settings = frame.settings(settings_from(args, ExtractionSettings), args.err_option)
        if noise is not None:
            noise /= frame.scale

        def find(residual, background):
            against, usable = choose_noise(args.err_option, background, residual, mask, noise)
            return detect(residual, usable, against, kernel, settings)

        sizes = settings_from(args, BackgroundSettings)
        sizes = replace(sizes, fthresh=sizes.fthresh / frame.scale)
        background = model_background(pixels, mask, sizes, args.background_passes, find)
        write(paths["background"], frame.levels(background.back()), unit=image.unit)
        write(paths["rms"], frame.differences(background.rms()), unit=image.unit)

        background.subfrom(pixels)
        found = find(pixels, background)
        catalog = build_catalog(found.objects, frame)
        report_detections(found, mask, background, frame, settings, kernel)
        write(paths["segmentation"], found.segmentation)
        write_catalog(paths["catalog"], catalog)
        draw_overlay(paths["overlay"], pixels, catalog, frame)
        if args.subtracted:
            write(paths["subtracted"], frame.differences(pixels), unit=image.unit)
        if args.catalog_fits:
            write_catalog_fits(paths["catalog_fits"], catalog, image.unit, history)
        if args.regions:
            write_regions(paths["regions"], catalog)
        if args.overview:
            draw_overview(paths["overview"], pixels, background, found.segmentation, catalog, frame)
    for product, path in targets.items():
        log.info("%-13s %s", product, path)


def report_image(image, mask):
    """Tell what was read, and how much of it is masked."""
    rows, columns = image.data.shape
    bad = image.data.size - np.count_nonzero(np.isfinite(image.data))
    log.info("image         %s: %d x %d %s", image.name, columns, rows, image.dtype)
    log.info("masked        %.2f %% (%d pixels are not finite)", 100 * mask.mean(), bad)


def report_detections(found, mask, background, frame, settings, kernel):
    """Tell level, noise and threshold in image values, the number of sources, and warnings."""
    level = frame.levels(np.array(background.globalback, dtype=np.float64))
    log.info("background    %.6g, rms %.6g", level, frame.differences(background.globalrms))
    if found.noise is None:
        log.info("threshold     %.6g (absolute)", frame.differences(settings.thresh))
    else:
        typical = found.noise if np.ndim(found.noise) == 0 else np.median(sample(found.noise, mask))
        log.info(
            "threshold     %.6g (%g x %s)",
            *(frame.differences(settings.thresh * typical), settings.thresh),
            "noise" if np.ndim(found.noise) == 0 else "noise at each pixel, median",
        )
    if np.ndim(found.noise) == 2 and kernel is not None and settings.filter_type == "matched":
        deeper = matched_depth(kernel)
        log.warning(
            "the matched filter on a noise image detects %.2f times fainter than --thresh %g on "
            "the global RMS; --thresh %.3g would reach as deep as that",
            *(deeper, settings.thresh, settings.thresh * deeper),
        )
    log.info("sources       %d", len(found.objects))
    if not len(found.objects):
        log.warning("no sources found: the catalogue and the segmentation map are empty")


def start_logging(args):
    """Send reports to stdout and warnings, each in one line, to stderr."""
    reports, warnings_ = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    reports.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings_.setLevel(logging.WARNING)
    warnings_.setFormatter(logging.Formatter(f"{PROG}: warning: %(message)s"))
    log.handlers = [reports, warnings_]
    log.propagate = False
    log.setLevel(logging.ERROR if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)


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
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        run(args)
    except InputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
