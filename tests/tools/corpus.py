"""Odd files, and ways to spoil good ones: what `fuzz.py` feeds the tool with.

Most are what people have. Others are crafted: they hold numbers that nobody but a fuzzer writes.
"""

import bz2
import gzip
import io
import re
import struct
import zlib
from functools import partial
from unittest import mock
from uuid import UUID

import numpy as np
import tifffile
from astropy.io import fits
from astropy.table import Table

from files import patched_tiff, pillow_bytes, tiff_bytes
from sky import blobs

# Whole files


def stars(shape=(40, 48)):
    """Return a sky of a few stars, positive and of a range that small integers hold."""
    return blobs(shape, (10, 9), (30, 12), (20, 25), (39, 31), level=40, noise=3).astype(float)


def fits_of(*hdus):
    buffer = io.BytesIO()
    fits.HDUList(list(hdus)).writeto(buffer, output_verify="ignore")
    return buffer.getvalue()


def corpus_of_fits():
    image, primary = stars(), fits.PrimaryHDU
    single = image.astype("f4")
    dtypes = "u1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8"
    files = {f"{dtype}.fits": fits_of(primary(image.astype(dtype))) for dtype in dtypes}
    scaled = primary(single)
    scaled.scale("int16", bscale=0.01, bzero=30)
    scaled.header["BLANK"] = -32768
    files["scaled.fits"] = fits_of(scaled)
    for kind in ("RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "PLIO_1", "NOCOMPRESS"):
        for dtype in ("i2", "i4", "f4", "f8") if kind != "PLIO_1" else ("i2",):
            hdu = fits.CompImageHDU(image.astype(dtype), compression_type=kind)
            files[f"{kind}-{dtype}.fits"] = fits_of(primary(), hdu)
    files["cube.fits"] = fits_of(primary(np.stack([single] * 3)))
    files["axes.fits"] = fits_of(primary(single[None, None]))
    table = fits.BinTableHDU(Table({"x": np.arange(9), "name": ["a"] * 9}))
    several = [fits.ImageHDU(single, name=name) for name in ("SCI", "ERR", "DQ")]
    files["several.fits"] = fits_of(primary(), table, *several)
    wcs = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0}
    wcs |= {"CRPIX1": 20.0, "CRPIX2": 20.0, "CDELT1": -1e-4, "CDELT2": 1e-4, "BUNIT": "Jy/beam"}
    wcs |= {"BMAJ": 3e-4, "BMIN": 2e-4, "SATURATE": 1e4, "LONG": "word " * 60}
    files["wcs.fits"] = fits_of(primary(single, fits.Header(wcs)))
    files["f4.fits.gz"] = gzip.compress(files["f4.fits"])
    files["several.fits.bz2"] = bz2.compress(files["several.fits"])
    return files


def corpus_of_tiff():
    image = stars()
    dtypes = "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"
    files = {f"{dtype}.tif": tiff_bytes(image.astype(dtype)) for dtype in dtypes}
    for kind in ("zlib", "lzw", "packbits", "zstd", "lzma", "lerc", "png", "jpeg", "jpeg2000"):
        for dtype in ("u1", "u2", "f4"):
            if dtype == "u1" or (dtype == "u2" and kind != "jpeg") or kind[0] in "zl":
                files[f"{kind}-{dtype}.tif"] = tiff_bytes(image.astype(dtype), compression=kind)
    layouts = {"big": {"bigtiff": True}, "motorola": {"byteorder": ">"}}
    layouts |= {"strips": {"rowsperstrip": 3}, "white": {"photometric": "miniswhite"}}
    layouts["tiled"] = {"tile": (16, 16), "compression": "zlib", "predictor": True}
    for name, layout in layouts.items():
        files[f"{name}.tif"] = tiff_bytes(image.astype("u2"), **layout)
    stack = np.stack([image] * 3).astype("u2")
    files["stack.tif"] = tiff_bytes(stack)
    files["imagej.tif"] = tiff_bytes(stack, imagej=True)
    files["ome.tif"] = tiff_bytes(stack, ome=True)
    files["rgb.tif"] = tiff_bytes(np.moveaxis(stack, 0, 2), photometric="rgb")
    files["planar.tif"] = tiff_bytes(stack, photometric="rgb", planarconfig="separate")
    palette = np.repeat(np.arange(0, 65536, 257, dtype="u2")[None], 3, axis=0)
    files["palette.tif"] = tiff_bytes(image.astype("u1"), photometric="palette", colormap=palette)
    files["bilevel.tif"] = pillow_bytes(image > 60)
    return files


def corpus_of_oddities():
    """Return files of few or odd pixels, and files that hold no image."""
    files, images, spots, top = {}, {}, stars(), np.finfo("f8").max
    for shape in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 50), (50, 1), (3, 3)):
        few = stars((99, 99))[: shape[0], : shape[1]]
        files |= {f"{shape}.fits": fits_of(fits.PrimaryHDU(few)), f"{shape}.tif": tiff_bytes(few)}
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "top": top}.items():
        images[f"some {name}"] = spots.copy()
        images[f"some {name}"][5:9, 7:30] = value
        images[f"all {name}"] = np.full((20, 20), value)
    for name, scale in {"tiny": 1e-320, "small": 1e-300, "large": 1e300, "deep": 1e-30}.items():
        images[name] = spots * scale
    images["ends"] = np.where(spots > 40, 1e300, -1e300)
    images["constant"] = np.ones((30, 30))
    files |= {f"{name}.fits": fits_of(fits.PrimaryHDU(data)) for name, data in images.items()}
    for dtype in ("i8", "u8"):
        limits = np.iinfo(dtype)
        ends = np.where(spots > 40, limits.max, limits.min).astype(dtype)
        files[f"ends-{dtype}.fits"] = fits_of(fits.PrimaryHDU(ends))
        files[f"ends-{dtype}.tif"] = tiff_bytes(ends)
    table = Table({"x": np.arange(9.0), "z": np.arange(9) * 1j, "b": np.arange(9) > 4})
    complex_tiff = tiff_bytes(spots.astype("c8"))
    return files | {
        "complex.tif": complex_tiff,
        "events.fits": fits_of(fits.PrimaryHDU(), fits.BinTableHDU(table)),
        "no data.fits": fits_of(fits.PrimaryHDU()),
        **{"empty": b"", "text": b"x y flux\n1 2 3\n" * 99},
        **{"hdf5": b"\x89HDF\r\n\x1a\n" + bytes(2000), "pdf": b"%PDF-1.7\n" + bytes(999)},
        "png": pillow_bytes(spots.astype("u1"), format="PNG"),
        **{"gzip of nothing.gz": gzip.compress(b""), "gzip of text.gz": gzip.compress(b"a")},
        "page.fits": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "archive.fits": b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(2000),
        **{"tiff.fits": complex_tiff, "fits.tif": files["constant.fits"]},
    }


def crafted_files():
    """Return files that ask for any time or memory by numbers that nobody but a fuzzer writes."""
    spots = stars()
    # Zeros without end, and a gigabyte of them in a strip of 1 MB.
    files = {"bomb.fits.gz": gzip.compress(fits_of(fits.PrimaryHDU(spots)) + bytes(10**8))}
    strip = zlib.compress(bytes(10**9))
    whole = tiff_bytes(spots.astype("u1"), compression="zlib", rowsperstrip=40)
    bomb = patched_tiff(whole + strip, "StripOffsets", len(whole))
    files["bomb.tif"] = patched_tiff(bomb, "StripByteCounts", len(strip))
    with tifffile.TiffFile(io.BytesIO(tiff_bytes(spots, ome=True))) as tiff:
        lie = re.sub('(SizeZ|PlaneCount)="1"', r'\1="1000000000"', tiff.ome_metadata)
    files["planes.ome.tif"] = tiff_bytes(spots, description=lie, metadata=None)
    sip = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"}
    sip |= {"A_ORDER": 30_000, "B_ORDER": 30_000, "A_2_0": 1e-9}
    files["distortion.fits"] = fits_of(fits.PrimaryHDU(spots, fits.Header(sip)))
    return files


KERNELS = {
    **{"default": "1 2 1\n2 4 2\n1 2 1\n", "conv": "CONV NORM\n# \xe9\n1 2 1\n2 4 2\n1 2 1\n"},
    **{"one": "1\n", "wide": "1 " * 101, "nan": "1 nan 1\n", "negative": "-1 0 1\n"},
    **{"zero": "0 0 0\n", "even": "1 2\n2 1\n", "ragged": "1 2 3\n1 2\n", "large": "1e39 1 1\n"},
    **{"complex": "1+2j 1 1\n", "words": "one two three\n", "title alone": "CONV NORM\n"},
    **{"nothing": "", "nulls": "1 \0 1\n"},
}


# Ways to spoil them


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
    piece, without = content[first:last], content[:first] + content[last:]
    return rng.choice((without, content[:place] + piece + content[place:], without + piece))


# What a card may say instead, and numbers that nobody but a fuzzer writes.
LIES = (
    *("0", "-1", "1", "2", "3", "7", "8", "16", "-32", "49", "999", "1000", "100000"),
    *("1.5", "1E400", "-1E-400", "NaN", "Inf", "T", "F", "''", "'text'", "(1, 2)", ""),
    *("'RA---TAN'", "'RICE_1'", "'IMAGE'", "'BINTABLE'", "'Jy/beam'"),
)
GIANT_LIES = (
    *("1000000000", "2147483647", "-2147483648", "4294967296", "9223372036854775807"),
    *("99999999999999999999", "'1PB(9999999999)'", "'999999999D'"),
)
KEYS = """
BITPIX NAXIS NAXIS1 NAXIS2 NAXIS3 PCOUNT GCOUNT TFIELDS BLANK BSCALE BZERO EXTEND EXTNAME EXTVER
XTENSION CTYPE1 CRVAL1 CDELT1 CD1_1 CRPIX2 ZIMAGE ZBITPIX ZNAXIS ZNAXIS1 ZTILE1 ZTILE2 ZCMPTYPE
ZVAL1 ZBLANK ZQUANTIZ TFORM1 THEAP WCSAXES A_ORDER SATURATE BUNIT GROUPS DATASUM CHECKSUM END SIMPLE
HISTORY CONTINUE LATPOLE EQUINOX
"""


def lie_in_header(content, rng, giant=False):
    """Change cards of any header of a FITS file."""
    spoilt = bytearray(content)
    is_card = re.compile(rb"[A-Z0-9_-]{1,8} *=? ").match
    for _ in range(rng.choice((1, 1, 2, 5))):
        cards = [at for at in range(0, len(spoilt) - 79, 80) if is_card(spoilt, at)]
        key, lie = rng.choice(KEYS.split()), rng.choice(GIANT_LIES if giant else LIES)
        own = [at for at in cards if spoilt[at : at + 8].rstrip() == key.encode()]
        at = rng.choice(own or cards or [0])
        if rng.random() < 0.3:
            key = spoilt[at : at + 8].decode("latin-1")
        spoilt[at : at + 80] = f"{key:8}= {lie:>20}".encode("latin-1").ljust(80)
    return bytes(spoilt)


def lie_in_directory(content, rng, giant=False):
    """Change tags, types, counts and values of a TIFF; giant: also let it lead to itself."""
    order = "<" if content[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, start)
    except struct.error:
        return flip_bytes(content, rng)
    spoilt = bytearray(content)
    numbers = (0, 1, 2, 3, 17, 41, 255, 32773, 65535)
    numbers = (10**8, 2**31, 2**32 - 1, start, len(content) - 4) if giant else numbers
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, end = start + 2 + 12 * rng.randrange(count), start + 2 + 12 * count
        tag, value = rng.choice((256, 257, 258, 259, 262, 273, 277)), rng.choice(numbers)
        places = ("H", tag, at), ("H", rng.randrange(20), at + 2), ("I", value, at + 4)
        kind, new, place = rng.choice((*places, *[("I", value, at + 8)] * 2, ("I", value, end)))
        if place + 4 <= len(spoilt):
            struct.pack_into(order + kind, spoilt, place, new)
    return bytes(spoilt)


def corpus():
    """Return all files, by their family and name: the same bytes in every run."""
    makers = {"FITS": corpus_of_fits, "TIFF": corpus_of_tiff, "odd": corpus_of_oddities}
    makers["crafted"] = crafted_files
    time, identifier = {"return_value": 0.0}, {"return_value": UUID(int=0)}
    with mock.patch("time.time", **time), mock.patch("uuid.uuid1", **identifier):
        return {(kind, name): file for kind in makers for name, file in makers[kind]().items()}


SPOIL = {"cut short": cut_short, "bytes flipped": flip_bytes, "blocks moved": move_blocks}
LIE = {"FITS": lie_in_header, "TIFF": lie_in_directory}


def spoilt(family, name, content, rng):
    """Return how a file is spoilt, if it is, and what becomes of it."""
    if family not in LIE:
        return family, content
    if rng.random() > 0.93:
        return "whole", content
    how = rng.choice((*SPOIL, "lies", "lies", "crafted"))
    spoil = SPOIL.get(how) or partial(LIE[family], giant=how == "crafted")
    if name.endswith(".gz") and rng.random() < 0.5:
        return how, gzip.compress(spoil(gzip.decompress(content), rng), mtime=0)
    if name.endswith(".bz2") and rng.random() < 0.5:
        return how, bz2.compress(spoil(bz2.decompress(content), rng))
    return how, spoil(content, rng)
