"""Reading: however an image is stored, its pixels are the same; what can't be read is refused."""

import bz2
import gzip
import io
import multiprocessing
import os
import re
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import source_extractor
from common import call, start
from contract import one_line
from files import patched_tiff, pillow_bytes, tiff_bytes
from source_extractor import InputError, read_image

# What Galaxy calls every file, whatever is in it.
NAME = "dataset_1.dat"

RAMP = np.arange(20 * 24).reshape(20, 24)
SMOOTH = np.add.outer(np.arange(48), 2 * np.arange(64))
CUBE = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)

PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def put(tmp_path):
    """Return a function that stores bytes under a name that says nothing, and returns the path."""

    def put_bytes(content):
        path = tmp_path / NAME
        path.write_bytes(content)
        return path

    return put_bytes


def fits_bytes(stored, **cards):
    """Return a FITS file made by hand: cards and big-endian pixels in blocks of 2880 bytes."""
    bitpix = 8 * stored.itemsize * (-1 if stored.dtype.kind == "f" else 1)
    axes = {f"NAXIS{number}": n for number, n in enumerate(stored.shape[::-1], start=1)}
    cards = {"SIMPLE": True, "BITPIX": bitpix, "NAXIS": stored.ndim, **axes, **cards}
    lines = [
        f"{key:8}= {'FT'[value] if isinstance(value, bool) else value:>20}"
        for key, value in cards.items()
    ]
    header = "".join(f"{line:80}" for line in [*lines, "END"]).encode()
    pixels = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    return in_blocks(header, b" ") + in_blocks(pixels, b"\0")


def in_blocks(content, filler):
    return content + filler * (-len(content) % 2880)


def hdus_bytes(*hdus):
    """Return a FITS file with an empty primary HDU, and after it the given ones."""
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(buffer)
    return buffer.getvalue()


def imagej_bytes(stack):
    """Return a stack as ImageJ itself stores it: one page, and all planes in one go after it."""
    depth, rows, columns = stack.shape
    text = f"ImageJ=1.53\nimages={depth}\nslices={depth}\n\0".encode()
    start = 8 + 2 + 10 * 12 + 4
    tags = (
        (256, 4, 1, columns),
        (257, 4, 1, rows),
        (258, 4, 1, 16),
        (259, 4, 1, 1),
        (262, 4, 1, 1),
        (270, 2, len(text), start),
        (273, 4, 1, start + len(text)),
        (277, 4, 1, 1),
        (278, 4, 1, rows),
        (279, 4, 1, 2 * rows * columns),
    )
    directory = b"".join(struct.pack(">HHII", *tag) for tag in tags)
    head = struct.pack(">2sHIH", b"MM", 42, 8, len(tags)) + directory + bytes(4)
    return head + text + stack.astype(">u2").tobytes()


def pixels_of(path, hdu=None, plane=None):
    _, pixels = read_image(path, hdu, plane)
    return pixels


def assert_pixels(path, expected, hdu=None, plane=None):
    """Assert that a file reads as these values, in the form that the middle of the tool takes."""
    data = pixels_of(path, hdu, plane)
    assert data.dtype in (np.float32, np.float64)
    assert data.dtype.isnative
    assert data.flags.c_contiguous
    assert data.shape == expected.shape
    np.testing.assert_array_equal(data, expected)


# FITS


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_fits_is_read_plain_and_packed_whatever_its_name(put, pack):
    assert_pixels(put(pack(fits_bytes(RAMP.astype(np.int16)))), RAMP)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "f4", "f8"])
def test_fits_pixel_types_keep_their_values(put, dtype):
    stored = (RAMP * 0.5).astype(dtype)
    stored[3, 4] = 100
    assert_pixels(put(fits_bytes(stored)), stored)


@pytest.mark.parametrize("dtype", ["i4", "i8", "f8"])
def test_values_that_float32_would_round_are_kept(put, dtype):
    stored = np.array([[2**24 + 1, 2**30 + 1], [-(2**24) - 1, 0]], dtype=dtype)
    assert_pixels(put(fits_bytes(stored)), stored)


@pytest.mark.parametrize("blank", [None, 7])
@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        ("u1", {}),
        ("i2", {}),
        ("i4", {}),
        ("i8", {}),
        ("i2", {"BSCALE": 0.5, "BZERO": -10.0}),
        ("i4", {"BSCALE": -2.0}),
        ("u1", {"BZERO": -128}),
        ("i2", {"BZERO": 2**15}),
        ("i4", {"BZERO": 2**31, "BSCALE": 1}),
    ],
)
def test_fits_scaling_and_blank_make_the_values_of_the_standard(put, dtype, scaling, blank):
    stored = (RAMP % 100).astype(dtype)
    values = scaling.get("BZERO", 0) + scaling.get("BSCALE", 1) * stored.astype(np.float64)
    if blank is not None:
        values[stored == blank] = np.nan
        scaling = scaling | {"BLANK": blank}
    assert_pixels(put(fits_bytes(stored, **scaling)), values)


@pytest.mark.parametrize("kind", [fits.ImageHDU, fits.CompImageHDU])
def test_unsigned_integers_of_64_bits_are_not_rounded(put, kind):
    options = {"compression_type": "GZIP_2"} if kind is fits.CompImageHDU else {}
    plain = kind(RAMP.astype(np.uint64), **options)
    assert_pixels(put(hdus_bytes(plain)), RAMP)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *((codec, dtype) for codec in ("RICE_1", "GZIP_1", "GZIP_2") for dtype in ("u1", "i2")),
        *(
            (codec, dtype)
            for codec in ("RICE_1", "GZIP_1", "HCOMPRESS_1")
            for dtype in ("u2", "i4")
        ),
        *(("PLIO_1", dtype) for dtype in ("u1", "i2", "i4")),
    ],
)
def test_tile_compressed_integers_are_exact(put, codec, dtype):
    stored = (RAMP % 251).astype(dtype)
    hdu = fits.CompImageHDU(stored, compression_type=codec, tile_shape=(7, 24))
    assert_pixels(put(hdus_bytes(hdu)), stored)


@pytest.mark.parametrize("codec", ["RICE_1", "HCOMPRESS_1", "GZIP_2"])
def test_tile_compressed_floats_come_within_their_quantization_and_nan_stays(put, codec):
    image = np.random.default_rng(3).normal(100, 4, (40, 50)).astype(np.float32)
    image[5, 6] = np.nan if codec != "HCOMPRESS_1" else 100
    hdu = fits.CompImageHDU(image, compression_type=codec, quantize_level=16)
    np.testing.assert_allclose(pixels_of(put(hdus_bytes(hdu))), image, atol=4 / 16)


@pytest.mark.parametrize("dtype", ["i2", "u2"])
def test_blank_is_seen_in_tile_compressed_integers(put, dtype):
    stored_as = 7 - (2**15 if dtype == "u2" else 0)
    hdu = fits.CompImageHDU(RAMP.astype(dtype), fits.Header({"BLANK": stored_as}))
    assert_pixels(put(hdus_bytes(hdu)), np.where(RAMP == 7, np.nan, RAMP))


@pytest.mark.parametrize(
    "shape", [(20, 24), (1, 20, 24), (1, 1, 20, 24), (20, 1, 24), (20, 24, 1), (1, 20, 1, 24, 1)]
)
def test_fits_axes_of_length_one_are_dropped(put, shape):
    assert_pixels(put(fits_bytes(RAMP.reshape(shape))), RAMP)


@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (1, 1, 24), (1, 1)])
def test_a_single_row_column_or_pixel_is_an_image(put, shape):
    line = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    assert_pixels(put(fits_bytes(line)), line.reshape(shape[-2:]))
    if len(shape) == 2:
        assert_pixels(put(tiff_bytes(line)), line)


@pytest.mark.parametrize("plane", [0, 1, 4, 5])
def test_planes_of_a_fits_hypercube_count_in_numpys_order(put, plane):
    assert_pixels(put(fits_bytes(CUBE)), CUBE.reshape(-1, 4, 5)[plane], plane=plane)


def test_planes_of_a_compressed_cube_and_of_an_axis_in_the_middle(put):
    cube = np.arange(3 * 20 * 24, dtype=np.int16).reshape(3, 20, 24)
    assert_pixels(put(hdus_bytes(fits.CompImageHDU(cube))), cube[2], plane=2)
    assert_pixels(put(fits_bytes(cube[:, np.newaxis])), cube[1], plane=1)


def test_plane_zero_of_a_lone_plane_is_that_plane(put):
    assert_pixels(put(fits_bytes(RAMP)), RAMP, plane=0)
    assert_pixels(put(tiff_bytes(RAMP.astype(np.uint16))), RAMP, plane=0)


@pytest.fixture
def extensions(put):
    """Return a file: empty primary, table, SCI, ERR, SCI again, a line, one without a name."""
    table = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.arange(3.0))], name="TAB")
    images = [
        fits.ImageHDU(np.full((4, 5), 1.0), name="SCI", ver=1),
        fits.ImageHDU(np.full((4, 5), 2.0), name="ERR", ver=1),
        fits.CompImageHDU(np.full((4, 5), 3, np.int16), fits.Header({"EXTVER": 2}), name="SCI"),
        fits.ImageHDU(np.arange(9.0), name="LINE"),
        fits.ImageHDU(np.full((4, 5), 4.0)),
        fits.ImageHDU(np.full((4, 5), 5.0), name="ODD,NAME"),
    ]
    return put(hdus_bytes(table, *images))


@pytest.mark.parametrize(
    ("hdu", "value"),
    [
        *((None, 1), ("2", 1), ("3", 2), ("4", 3), ("6", 4)),
        *(("SCI", 1), ("sci", 1), ("ERR", 2), ("SCI,1", 1), ("SCI,2", 3)),
    ],
)
def test_hdu_is_chosen_by_index_name_or_name_and_version(extensions, hdu, value):
    assert_pixels(extensions, np.full((4, 5), value), hdu=hdu)


@pytest.mark.parametrize(
    ("hdu", "problem"),
    [
        *((hdu, "no image in extension (HDU)") for hdu in ("0", "1", "TAB", "LINE")),
        *(
            (hdu, "no such extension (HDU)")
            for hdu in ("8", "99", "SCI,3", "-1", "nothing", "SCI,x")
        ),
    ],
)
def test_an_hdu_without_an_image_is_refused_and_the_others_listed(run, extensions, hdu, problem):
    listed = "the file has 0 PRIMARY: empty; 1 TAB: table; 2 SCI: 5 x 4; 3 ERR: 5 x 4; "
    run(extensions, f"--hdu={hdu}").assert_refused(NAME, f"{problem}: {hdu}; {listed}")


@pytest.mark.parametrize("hdu", ["SCI", "1", "0,1"])
def test_no_such_image_of_a_tiff_is_refused(run, put, hdu):
    path = put(tiff_bytes(RAMP.astype(np.uint8)))
    run(path, "--hdu", hdu).assert_refused(NAME, "TIFF", hdu, "images 0 to 0")
    assert_pixels(path, RAMP % 256, hdu="0")


# TIFF


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_tiff_pixel_types_keep_their_values(put, dtype, byteorder):
    stored = (RAMP % 100 * (0.5 if dtype.startswith("f") else 1)).astype(dtype)
    stored[2, 3] = np.finfo(dtype).max if dtype.startswith("f") else np.iinfo(dtype).max
    assert_pixels(put(tiff_bytes(stored, byteorder=byteorder)), stored)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 7}, {"bigtiff": True}])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd"])
def test_tiff_codecs_and_layouts_are_lossless(put, compression, layout):
    stored = SMOOTH.astype(np.uint16)
    for predictor in (None, 2) if compression in ("lzw", "zlib", "zstd") else (None,):
        packed = tiff_bytes(stored, compression=compression, predictor=predictor, **layout)
        assert_pixels(put(packed), stored)


def test_tiff_floats_with_a_predictor_are_lossless(put):
    stored = np.sqrt(SMOOTH).astype(np.float32)
    assert_pixels(put(tiff_bytes(stored, compression="zlib", predictor=3)), stored)


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_jpeg_in_tiff_comes_close(put, tile):
    stored = SMOOTH.astype(np.uint8)
    data = pixels_of(put(tiff_bytes(stored, compression="jpeg", tile=tile)))
    np.testing.assert_allclose(data, stored, atol=4)


@pytest.mark.parametrize(
    "codec", ["raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"]
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_tiff_of_libtiff_is_read(put, dtype, codec):
    stored = (RAMP % 200).astype(dtype)
    assert_pixels(put(pillow_bytes(stored, compression=codec)), stored)


@pytest.mark.parametrize("codec", ["raw", "group4", "packbits"])
def test_one_bit_tiff_is_zero_and_one(put, codec):
    bits = RAMP % 3 == 0
    assert_pixels(put(pillow_bytes(bits, compression=codec)), bits.astype(int))


def test_min_is_white_is_turned_so_that_more_is_brighter(put):
    for dtype, white in (("u1", 255), ("u2", 65535)):
        stored = RAMP.astype(dtype)
        assert_pixels(put(tiff_bytes(stored, photometric="miniswhite")), white - stored.astype(int))
    assert_pixels(put(tiff_bytes(RAMP > 99, photometric="miniswhite")), (RAMP <= 99).astype(int))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_what_imagej_shows_inverted_is_searched_as_stored(run, tmp_path, stars, dtype):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, np.round(stars).astype(dtype), imagej=True)
    set_photometric(path, 0)
    result = run(path, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    assert len(result.catalog) == 6
    assert_pixels(path, np.round(stars))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_an_image_that_is_turned_is_said_to_be(run, tmp_path, stars, dtype):
    path, stored = tmp_path / "image.tif", np.iinfo(dtype).max - np.round(stars).astype(dtype)
    tifffile.imwrite(path, stored, photometric="miniswhite")
    result = run(path, "--thresh", 5)
    assert re.fullmatch(one_line("warning", ".*0 is white in this TIFF: inverted.*"), result.err)
    assert len(result.catalog) == 6
    mask = run(path, "--thresh", 5, "--mask", path, "--maskthresh", 1e6)
    assert mask.err == result.err


def set_photometric(path, value):
    """Write another PhotometricInterpretation into the first page of a TIFF."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags[262].overwrite(value)


RAINBOW = np.random.default_rng(1).integers(0, 2**16, (3, 256)).astype(np.uint16)
GREEN = np.outer([0, 1, 0], np.arange(256) * 257).astype(np.uint16)


def test_numbers_of_colours_are_no_image(run, put, write, stars):
    stored = np.round(stars).astype(np.uint8)
    rainbow = tiff_bytes(stored, photometric="palette", colormap=RAINBOW)
    run(put(rainbow)).assert_refused(NAME, "palette", "convert it to grey")
    image = write(stars)
    run(image, "--measure-image", put(rainbow)).assert_refused(NAME, "palette")
    assert run(image, "--mask", put(rainbow), "--maskthresh", 120).code == 0


def test_a_palette_that_only_tints_brightness_is_read_as_stored(put, stars):
    stored = np.round(stars).astype(np.uint8)
    assert_pixels(put(tiff_bytes(stored, photometric="palette", colormap=GREEN)), stored)


def test_imagejs_tables_of_colours_are_read_as_stored(tmp_path, stars):
    stored, path = np.round(stars).astype(np.uint8), tmp_path / "fire.tif"
    text = "ImageJ=1.53t\nunit=um\n"
    keywords = {"photometric": "palette", "colormap": RAINBOW, "metadata": None}
    tifffile.imwrite(path, stored, description=text, **keywords)
    assert_pixels(path, stored)


def test_stacks_of_pages_are_counted_in_numpys_order(put):
    stack = CUBE.astype(np.uint16)
    ome = {"ome": True, "metadata": {"axes": "CZYX"}}
    imagej = {"imagej": True, "metadata": {"axes": "ZCYX"}}
    for keywords in ({}, {"bigtiff": True}, {"compression": "zlib"}, ome, imagej):
        path = put(tiff_bytes(stack, **keywords))
        for plane, expected in enumerate(stack.reshape(-1, 4, 5)):
            assert_pixels(path, expected, plane=plane)


def test_planes_of_imagejs_single_page_stack_are_found(put):
    stack = np.arange(3 * 20 * 24).reshape(3, 20, 24)
    for plane in range(3):
        assert_pixels(put(imagej_bytes(stack)), stack[plane], plane=plane)


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_each_colour_is_a_plane(put, planar, compression):
    colours = np.stack([RAMP % 251, RAMP % 241, RAMP % 239]).astype(np.uint8)
    stored = colours if planar == "separate" else np.moveaxis(colours, 0, -1)
    keywords = {"photometric": "rgb", "planarconfig": planar, "compression": compression}
    for plane, expected in enumerate(colours):
        assert_pixels(put(tiff_bytes(stored, **keywords)), expected, plane=plane)


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours_of_a_stack_count_fastest(put, monkeypatch, planar, compression):
    stack = np.arange(2 * 3 * 20 * 24).reshape(2, 3, 20, 24).astype(np.uint16)
    stored = stack if planar == "separate" else np.moveaxis(stack, 1, -1)
    keywords = {"photometric": "rgb", "planarconfig": planar, "compression": compression}
    path = put(tiff_bytes(stored, **keywords))
    monkeypatch.delattr(tifffile.TiffPageSeries, "asarray")  # which reads all its pages
    for plane, expected in enumerate(stack.reshape(-1, 20, 24)):
        assert_pixels(path, expected, plane=plane)


def test_tiff_axes_of_length_one_are_dropped(put):
    stored = RAMP.astype(np.uint16)[np.newaxis, np.newaxis]
    assert_pixels(put(tiff_bytes(stored)), RAMP)
    assert_pixels(put(tiff_bytes(stored, ome=True, metadata={"axes": "CZYX"})), RAMP)
    assert_pixels(put(tiff_bytes(stored, imagej=True, metadata={"axes": "ZCYX"})), RAMP)


# Planes, and pixels without a value


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (fits_bytes(CUBE, CTYPE3="'FREQ'", CTYPE4="'STOKES'"), ("STOKES=2", "FREQ=3", "=4", "=5")),
        (fits_bytes(CUBE), ("NAXIS4=2", "NAXIS3=3", "NAXIS2=4", "NAXIS1=5")),
        (tiff_bytes(CUBE, ome=True, metadata={"axes": "TCYX"}), ("T=2", "C=3", "Y=4", "X=5")),
    ],
    ids=["named axes", "axes without names", "OME"],
)
@pytest.mark.parametrize("plane", [None, 6, 10**12])
def test_no_such_plane_shows_the_axes_and_the_range(run, put, content, layout, plane):
    options = [] if plane is None else ["--plane", plane]
    run(put(content), *options).assert_refused(NAME, "6 planes", "0 to 5", *layout)


def test_plane_of_a_lone_plane_is_out_of_range(run, put):
    run(put(fits_bytes(RAMP)), "--plane", "1").assert_refused(NAME, "1 plane ", "0 to 0")


def test_plane_reaches_the_products(run, put, stars):
    result = run(put(fits_bytes(np.stack([stars, stars[::-1]]))), "--plane", 1)
    alone = run(put(fits_bytes(stars[::-1])))
    assert (result.code, alone.code) == (0, 0)
    assert len(result.catalog) == 6
    np.testing.assert_array_equal(result.image("segmentation"), alone.image("segmentation"))


@pytest.mark.parametrize("form", [fits_bytes, tiff_bytes])
def test_pixels_that_are_not_finite_are_masked_and_counted(run, put, stars, form):
    stars[50:52, 60:70] = np.nan
    stars[2, 2], stars[3, 3] = np.inf, -np.inf
    result = run(put(form(stars)))
    assert result.code == 0
    assert result.err == ""
    assert re.search(r"\b22 pixels have no finite value", result.out)
    assert len(result.catalog) == 6
    assert np.isfinite(result.image("background")).all()
    assert not result.image("segmentation")[~np.isfinite(stars)].any()


def test_blank_pixels_of_unsigned_integers_are_masked_and_counted(run, put, stars):
    stored = np.round(stars).astype(np.int16)
    stored[10:14, 100:105] = -32768
    result = run(put(fits_bytes(stored, BZERO=32768, BLANK=-32768)))
    assert "20 pixels have no finite value" in result.out
    assert len(result.catalog) == 6


def test_an_image_without_any_value_is_refused(run, put):
    run(put(fits_bytes(np.full((20, 24), np.nan)))).assert_refused(NAME, "masked", "finite")


# Files that can't be used


WHOLE = fits_bytes(SMOOTH.astype(np.float32))
RICE = hdus_bytes(fits.CompImageHDU(SMOOTH.astype(np.int16)))
LINE = fits.ImageHDU(np.arange(9.0))
NO_PIXELS = fits.Header({"XTENSION": "IMAGE", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 0, "NAXIS2": 9})
TABLE = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.arange(3.0))], name="TAB")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"SIMPLE", id="six bytes of FITS"),
        pytest.param(b"SIMPLE  =                    T", id="thirty bytes of FITS"),
        pytest.param(WHOLE[:2880], id="FITS header alone"),
        pytest.param(WHOLE[:-3000], id="truncated FITS"),
        pytest.param(hdus_bytes(fits.ImageHDU(SMOOTH))[:-3000], id="truncated FITS extension"),
        pytest.param(RICE[: len(RICE) - 2880], id="truncated compressed FITS"),
        pytest.param(gzip.compress(WHOLE)[:-200], id="truncated gzip"),
        pytest.param(bz2.compress(WHOLE)[:-200], id="truncated bzip2"),
        pytest.param(gzip.compress(WHOLE[:-3000]), id="truncated FITS in gzip"),
        pytest.param(gzip.compress(b"x y\n1 2\n"), id="gzip of text"),
        pytest.param(b"\x1f\x8b\x08", id="gzip magic alone"),
        pytest.param(gzip.compress(tiff_bytes(SMOOTH.astype("u1"))), id="gzip of TIFF"),
        pytest.param(hdus_bytes(), id="no image"),
        pytest.param(hdus_bytes(TABLE), id="only a table"),
        pytest.param(hdus_bytes(LINE), id="one axis"),
        pytest.param(NO_PIXELS.tostring().encode(), id="extension without primary"),
        pytest.param(hdus_bytes() + NO_PIXELS.tostring().encode(), id="no pixels"),
        pytest.param(fits_bytes(np.zeros((0, 9), "f4")), id="no rows"),
        pytest.param(
            fits_bytes(np.zeros((4, 9), "f4"), NAXIS1=10**6, NAXIS2=10**6), id="8 TB FITS"
        ),
        pytest.param(fits_bytes(np.zeros((4, 9), "f4"), NAXIS2=10**6), id="a million rows"),
        pytest.param(fits_bytes(np.zeros((40, 90), "f4"), NAXIS2=400), id="ten times the rows"),
        pytest.param(fits_bytes(np.zeros((4, 9), "f4"), NAXIS2=-4), id="negative axis"),
        pytest.param(fits_bytes(np.zeros((4, 9), "f4"), BITPIX=17), id="impossible BITPIX"),
        pytest.param(tiff_bytes(SMOOTH.astype("u2"))[:-900], id="truncated TIFF"),
        pytest.param(tiff_bytes(SMOOTH.astype("u2"), compression="lzw")[:-90], id="truncated LZW"),
        pytest.param(b"II*\0", id="TIFF magic alone"),
        pytest.param(b"II*\0\x08\0\0\0", id="TIFF without a page"),
        pytest.param(tiff_bytes(SMOOTH.astype("c8")), id="complex TIFF"),
        pytest.param(patched_tiff(tiff_bytes(SMOOTH.astype("u1")), 256, 0), id="TIFF of width 0"),
        pytest.param(patched_tiff(tiff_bytes(SMOOTH.astype("u1")), 257, 480), id="taller TIFF"),
        pytest.param(patched_tiff(tiff_bytes(SMOOTH.astype("u1")), 257, 2**31), id="huge TIFF"),
        pytest.param(patched_tiff(tiff_bytes(SMOOTH.astype("u1")), 259, 9999), id="unknown codec"),
        pytest.param(
            tiff_bytes(SMOOTH.astype("u1")).replace(*(struct.pack("<H", n) for n in (273, 53009))),
            id="TIFF without offsets",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(run, put, content):
    path = put(content)
    result = run(path)
    result.assert_refused(f"error: {path.name}")
    assert result.out == ""


ARCHIVE = io.BytesIO()
with zipfile.ZipFile(ARCHIVE, "w") as archive:
    archive.writestr("image.fits", WHOLE)
NO_IMAGES = {
    "0 bytes": b"",
    "text": b"x y\n1 2\n",
    "a table": b"id,x,y\n1,2,3\n",
    "ten bytes of FITS": b"SIMPLE  = ",
    "a web page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "a zip": ARCHIVE.getvalue(),
    "a PNG": pillow_bytes(RAMP.astype(np.uint8), format="PNG"),
}


@pytest.mark.parametrize("content", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_at_all_is_told_what_would_be_one(run, put, content):
    path = put(content)
    result = run(path)
    result.assert_refused(f"error: {path.name}", "FITS")
    assert result.out == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("image.tif", WHOLE), ("image.fits", tiff_bytes(SMOOTH.astype("f4"))), ("image.gz", WHOLE)],
)
def test_an_image_under_the_ending_of_another_kind_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_pixels(tmp_path / name, SMOOTH)


TILES = {"smaller tiles at the edges": (32, 40), "rows": (4, 64), "one tile": (48, 64)}
SQUARE = fits.CompImageHDU(
    SMOOTH.astype(np.int16), compression_type="HCOMPRESS_1", tile_shape=(16, 16)
)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_hcompress_tiles_of_any_size_are_read(put, tile):
    hdu = fits.CompImageHDU(
        SMOOTH.astype(np.int16), compression_type="HCOMPRESS_1", tile_shape=tile
    )
    assert_pixels(put(hdus_bytes(hdu)), SMOOTH)


def with_card(content, key, value):
    """Return a FITS file with another whole number on its one card of this key."""
    changed, count = re.subn(rf"{key:8}= +\d+".encode(), f"{key:8}= {value:20}".encode(), content)
    assert count == 1
    return changed


@pytest.mark.parametrize(
    "damage",
    [
        *([("ZTILE1", 8)], [("ZTILE2", 8)], [("ZTILE1", 32)], [("ZNAXIS1", 60)], [("ZNAXIS2", 40)]),
        [("ZTILE1", 8), ("ZTILE2", 8)],
    ],
)
def test_an_hcompress_tile_of_another_size_than_the_header_tells_is_refused(run, put, damage):
    content = hdus_bytes(SQUARE)
    for key, value in damage:
        content = with_card(content, key, value)
    run(put(content)).assert_refused(NAME, "damaged")


@pytest.mark.parametrize("sides", [(8, 16), (32, 16), (16, 2**31 - 1), (2**32 - 1, 16), (0, 0)])
def test_an_hcompress_stream_that_tells_another_size_is_refused(run, put, sides):
    content, own = hdus_bytes(SQUARE), b"\xdd\x99" + struct.pack(">II", 16, 16)
    assert content.count(own) == 12
    last = content.rindex(own)
    spoilt = content[:last] + own[:2] + struct.pack(">II", *sides) + content[last + len(own) :]
    run(put(spoilt)).assert_refused(NAME, "damaged")


@pytest.mark.parametrize("option", ["--mask", "--err-file"])
@pytest.mark.parametrize("content", [WHOLE[:-3000], b"text", tiff_bytes(SMOOTH.astype("c8"))])
def test_a_second_image_that_cannot_be_used_is_refused_by_name(run, put, write, option, content):
    image = write(SMOOTH)
    noise = ["--err-option", "file"] if option == "--err-file" else []
    run(image, option, put(content), *noise).assert_refused(NAME)


def test_a_directory_and_a_missing_file_are_refused(run, tmp_path):
    for path, word in ((tmp_path, "directory"), (tmp_path / NAME, "No such file")):
        result = run(path)
        result.assert_refused(f"error: {path}: ", word)
        assert result.out == ""


def test_pixels_that_fail_their_checksum_in_gzip_are_refused(run, put):
    packed = bytearray(gzip.compress(WHOLE))
    packed[-8] ^= 1
    run(put(packed)).assert_refused(NAME)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_a_broken_extension_does_not_hang_the_search_for_an_image(put, pack):
    whole = hdus_bytes(fits.ImageHDU(RAMP))
    broken = whole.replace(b"XTENSION= 'IMAGE   '", b"QTENSION= 'IMAGE\0   ")
    assert broken != whole
    result = start(put(pack(broken)))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1


# Limits


def test_what_takes_too_long_to_open_is_refused(run, put, monkeypatch):
    empty = hdus_bytes(fits.ImageHDU())
    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    monkeypatch.setattr(source_extractor, "SECONDS_TO_OPEN", 1)
    many = put(empty[:2880] + empty[2880:] * 20_000)
    run(many).assert_refused(NAME, "it takes too much time or memory to open; get the file again")
    assert before == [
        resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)
    ]
    assert not multiprocessing.active_children()
    assert_pixels(put(WHOLE), SMOOTH)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use isn't told")
def test_what_takes_too_much_memory_to_open_is_refused(run, put, monkeypatch):
    monkeypatch.setattr(source_extractor, "BYTES_TO_OPEN", 10**8)
    endless = put(WHOLE[:320].ljust(2 * 10**8))
    run(endless).assert_refused(
        NAME, "it takes too much time or memory to open; get the file again"
    )
    assert_pixels(put(WHOLE), SMOOTH)


@pytest.mark.parametrize("form", ["FITS", "tiles", "one tile", "TIFF", "packed TIFF"])
def test_pixels_take_nothing_of_the_memory_to_open_a_file(tmp_path, monkeypatch, form):
    image, path = np.zeros((5000, 5000), np.float32), tmp_path / "image"
    if "TIFF" in form:
        tifffile.imwrite(path, image, compression="zlib" if "packed" in form else None)
    elif "tile" in form:
        shape = image.shape if "one" in form else None
        hdu = fits.CompImageHDU(image, compression_type="GZIP_1", tile_shape=shape)
        hdu.writeto(path)
    else:
        fits.PrimaryHDU(image).writeto(path)
    monkeypatch.setattr(source_extractor, "BYTES_TO_OPEN", 5 * 10**7)
    assert pixels_of(path).shape == image.shape


def test_a_crash_of_a_library_on_opening_is_told_as_damage(run, put, monkeypatch):
    def crash(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(source_extractor, "open_fits", crash)
    run(put(WHOLE)).assert_refused(NAME, "damaged", "get the file again")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_a_packed_file_is_unpacked_up_to_a_limit(run, put, monkeypatch, pack):
    path, size = put(pack(WHOLE)), len(WHOLE)
    assert path.stat().st_size < size
    monkeypatch.setattr(source_extractor, "UNPACKED_TIMES", 1)
    monkeypatch.setattr(source_extractor, "UNPACKED_BYTES", size)
    assert_pixels(path, SMOOTH)
    monkeypatch.setattr(source_extractor, "UNPACKED_BYTES", size - 1)
    run(path).assert_refused(NAME, f"it unpacks to more than {size - 1} bytes")
    monkeypatch.setattr(source_extractor, "UNPACKED_TIMES", 1 + size // path.stat().st_size)
    assert_pixels(path, SMOOTH)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_an_image_larger_than_the_memory_is_refused_before_it_is_read(run, put, monkeypatch, dtype):
    path = put(fits_bytes(SMOOTH.astype(dtype)))
    needed = 3 * SMOOTH.size * (8 if dtype in ("i4", "f8") else 4)
    monkeypatch.setattr(source_extractor, "available_memory", lambda: needed)
    assert_pixels(path, SMOOTH.astype(dtype))
    monkeypatch.setattr(source_extractor, "available_memory", lambda: needed - 1)
    run(path).assert_refused(NAME, "64 x 48 pixels need", "GB of memory")


@pytest.mark.parametrize(
    ("group", "ulimit", "expected"),
    [
        *(
            ("max", None, 4096 * 10**6),
            ("3000000", None, 3_000_000),
            ("9" * 12, None, 4096 * 10**6),
        ),
        *((None, None, 4096 * 10**6), ("max", 10**9, 6 * 10**8), ("3000000", 10**9, 3_000_000)),
    ],
)
def test_memory_is_what_machine_group_and_ulimit_leave(monkeypatch, group, ulimit, expected):
    def read_text(path):
        if group is None:
            raise FileNotFoundError
        return {"/proc/self/cgroup": "0::/jobs/7\n"}.get(str(path)) or {
            "/sys/fs/cgroup/jobs/7/memory.max": f"{group}\n"
        }[str(path)]

    limits = {resource.RLIMIT_AS: ulimit or resource.RLIM_INFINITY}
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    monkeypatch.setattr(Path, "read_text", read_text)
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, infinite), infinite))
    assert source_extractor.available_memory() == expected


# Properties

SIZES = st.integers(2, 7)
FITS_TYPES = ("u1", "i2", "i4", "i8", "f4", "f8")
TIFF_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8")


@st.composite
def arrays(draw, dtypes):
    """Draw an image of a type, byte order and shape, with any bits but those of NaN and inf."""
    dtype = np.dtype(draw(st.sampled_from(dtypes))).newbyteorder(draw(st.sampled_from("<>")))
    shape = draw(st.tuples(SIZES, SIZES))
    size = dtype.itemsize * shape[0] * shape[1]
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return np.where(np.isfinite(bits), bits, 0).astype(dtype)


@PROPERTY
@given(
    stored=arrays(FITS_TYPES),
    ones=st.sampled_from([(), (0,), (1,), (2,), (0, 1), (0, 3), (2, 3), (0, 2, 4)]),
    pack=st.sampled_from([bytes, gzip.compress]),
)
def test_any_fits_image_reads_as_its_values(put, stored, ones, pack):
    path = put(pack(fits_bytes(np.expand_dims(stored, ones))))
    assert_pixels(path, stored.astype(np.float64))


@PROPERTY
@given(
    stored=arrays(TIFF_TYPES),
    ones=st.integers(0, 3),
    compression=st.sampled_from([None, "lzw", "zlib", "zstd"]),
    tile=st.sampled_from([None, (16, 16)]),
    bigtiff=st.booleans(),
)
def test_any_tiff_image_reads_as_its_values(put, stored, ones, **keywords):
    order = "<>"[stored.dtype.byteorder == ">"]
    content = tiff_bytes(stored[(np.newaxis,) * ones], byteorder=order, **keywords)
    assert_pixels(put(content), stored.astype(np.float64))


VICTIMS = {
    "fits": fits_bytes(RAMP.astype(np.int16), BZERO=32768, BLANK=5),
    "extension": hdus_bytes(fits.ImageHDU(RAMP.astype(np.float32), name="SCI")),
    "gzip": gzip.compress(hdus_bytes(fits.ImageHDU(RAMP.astype(np.float32)))),
    "rice": hdus_bytes(fits.CompImageHDU(RAMP.astype(np.int16))),
    "hcompress": hdus_bytes(
        fits.CompImageHDU(RAMP.astype(np.int16), compression_type="HCOMPRESS_1")
    ),
    "tiff": tiff_bytes(RAMP.astype(np.uint16)),
    "lzw": tiff_bytes(RAMP.astype(np.uint16), compression="lzw", tile=(16, 16)),
    "jpeg": tiff_bytes(RAMP.astype(np.uint8), compression="jpeg"),
    "imagej": imagej_bytes(np.stack([RAMP, RAMP])),
    "ome": tiff_bytes(np.stack([RAMP, RAMP]).astype(np.uint16), ome=True),
}
CHANGES = st.lists(st.tuples(st.integers(0, 1500) | st.integers(0, 10**5), st.integers(0, 255)))


@pytest.mark.parametrize("victim", VICTIMS)
@settings(PROPERTY, derandomize=True)
@given(CHANGES, st.none() | st.integers(0, 10**5))
@example([], 7)
def test_a_damaged_file_is_read_or_refused(put, victim, changes, length):
    content = bytearray(VICTIMS[victim])
    for position, byte in changes:
        content[position % len(content)] = byte
    result = data_or_message(put(content if length is None else content[: length % len(content)]))
    if isinstance(result, str):
        assert NAME in result
        assert "\n" not in result
    else:
        assert result.ndim == 2
        assert result.size


def data_or_message(path):
    try:
        return pixels_of(path, plane=0)
    except InputError as error:
        return str(error)


# Several images in a TIFF


@pytest.fixture
def two(tmp_path, stars):
    """Return a TIFF of two images of different shapes, both with sources."""
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(stars)
        tiff.write(stars[:110, :150] + 7)
    return path


def test_a_tiff_of_several_images_gives_the_first_and_says_how_to_get_others(run, two, stars):
    result = run(two)
    assert result.code == 0
    assert result.image("segmentation").shape == stars.shape
    assert "first of its 2 images; choose another, 0 to 1, with --hdu" in result.err
    assert result.err.count("\n") == 1


def test_an_image_that_a_tiff_has_not_is_refused(run, two):
    run(two, "--hdu", 2).assert_refused("two.tif", "images 0 to 1")


def test_each_image_of_a_tiff_is_reached_by_its_number(run, two, stars):
    for number, expected in (("0", stars), ("1", stars[:110, :150] + 7)):
        assert_pixels(two, expected, hdu=number)
    result = run(two, "--hdu", 1)
    assert (result.code, result.err) == (0, "")
    assert f"{two.name}[1]: 150 x 110" in result.out
    assert "hdu = 1" in str(fits.getheader(result.directory / "background.fits")["HISTORY"])


@pytest.mark.parametrize("name", ["mask", "err", "measure"])
def test_masks_and_the_like_are_any_image_of_a_tiff(run, write, two, stars, name):
    option = {"mask": "--mask", "err": "--err-file", "measure": "--measure-image"}[name]
    more = {"mask": ["--maskthresh", 1e6], "err": ["--err-option", "file"], "measure": []}[name]
    image = write(stars[:110, :150])
    result = run(image, option, two, f"--{name}-hdu", 1, *more)
    assert result.code == 0
    assert "first of" not in result.err
    result = run(image, option, two, f"--{name}-hdu", 0, *more)
    assert result.code == 1
    assert "two.tif[0]: its shape" in result.err


@pytest.mark.parametrize("where", ["SubIFDs", "pages after it", "a page before it", "stack"])
def test_reduced_images_are_no_images_of_their_own(run, tmp_path, stars, where):
    path, planes, half = tmp_path / "pyramid.tif", 1, stars[::2, ::2]
    reduced = {"subfiletype": 1, "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        if where == "a page before it":
            tiff.write(half, **reduced)
        if where == "stack":
            planes = 3
            for _ in range(planes):
                tiff.write(stars, metadata=None, subifds=1)
                tiff.write(half, **reduced)
        else:
            tiff.write(stars, subifds=2 if where == "SubIFDs" else 0, metadata=None)
        if where in ("SubIFDs", "pages after it"):
            tiff.write(half, **reduced)
            tiff.write(half[::2, ::2], **reduced)
    assert_pixels(path, stars, plane=planes - 1)
    result = run(path, "--plane", 0)
    assert (result.code, result.err) == (0, "")
    assert "images 0 to 0" in run(path, "--plane", 0, "--hdu", 1).err


OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{}">
<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16"
SizeX="24" SizeY="20" SizeC="2" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0"/>
<Channel ID="Channel:0:1"/>
<TiffData IFD="0" FirstC="0" PlaneCount="1"><UUID FileName="c0.tif">urn:uuid:0</UUID></TiffData>
<TiffData IFD="0" FirstC="1" PlaneCount="1"><UUID FileName="c1.tif">urn:uuid:1</UUID></TiffData>
</Pixels></Image></OME>"""


def test_a_plane_in_another_file_of_an_ome_set_is_refused_and_that_file_not_read(run, tmp_path):
    planes = np.stack([RAMP, 2 * RAMP]).astype(np.uint16)
    for number, plane in enumerate(planes):
        path = tmp_path / f"c{number}.tif"
        tifffile.imwrite(path, plane, description=OME.format(number), metadata=None)
    assert_pixels(tmp_path / "c0.tif", planes[0], plane=0)
    for name in ("c1.tif", "nowhere.tif", str(tmp_path / "c1.tif")):
        text = OME.format(0).replace("c1.tif", name)
        tifffile.imwrite(tmp_path / "c0.tif", planes[0], description=text, metadata=None)
        result = run(tmp_path / "c0.tif", "--plane", 1)
        result.assert_refused("this plane isn't in it; give another file of its set")
        assert "damaged" not in result.err


# Cards that can't be parsed


def with_cards(stored, *cards):
    """Return a FITS file with an empty primary HDU, and an extension with these very cards."""
    axes = [f"NAXIS{number:<3}= {n:>20}" for number, n in enumerate(stored.shape[::-1], start=1)]
    lines = [
        "XTENSION= 'IMAGE   '",
        *(f"BITPIX  = {8 * stored.itemsize:>20}", f"NAXIS   = {stored.ndim:>20}", *axes),
        *("PCOUNT  =                    0", "GCOUNT  =                    1", *cards, "END"),
    ]
    header = "".join(f"{line:80}" for line in lines).encode()
    pixels = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    return hdus_bytes() + in_blocks(header, b" ") + in_blocks(pixels, b"\0")


@pytest.mark.parametrize(
    "card",
    [
        *("EXTNAME = SCI", "EXTNAME = nan", "EXTNAME = 'SCI", "EXTVER  = 1,5", "CTYPE1  = nan"),
        *("CTYPE3  = nan", "BUNIT   = Jy beam-1", "BUNIT   =", "BMAJ    = 0,5", "BLANK   ="),
        *("DATE-OBS= 2020-01-01", "OBJECT  = M 31, really"),
    ],
)
def test_a_card_that_is_not_needed_may_be_anything(run, put, card):
    cube = np.stack([RAMP, RAMP + 1]).astype(np.int16)
    another = hdus_bytes(fits.ImageHDU(RAMP, name="B"))[2880:]
    path = put(with_cards(cube, card) + another)
    assert_pixels(path, RAMP + 1, plane=1)
    assert_pixels(path, RAMP + 1, hdu="1", plane=1)
    assert_pixels(path, RAMP, hdu="B")
    run(path).assert_refused("2 planes in axes (", "NAXIS1=24" if "CTYPE1" in card else "=24")


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.float32])
@pytest.mark.parametrize(
    "card",
    [
        *("BSCALE  = 0,5", "BSCALE  = '0,5'", "BSCALE  = 0,5 / counts", "BSCALE  ="),
        *("BZERO   = 32 768", "BZERO   = nan", "BLANK   = -32.768,0"),
    ],
)
def test_a_card_that_scales_pixels_and_cannot_be_read_is_refused(run, put, card, dtype):
    run(put(with_cards(RAMP.astype(dtype), card))).assert_refused(NAME)


@pytest.mark.parametrize("name", ["image.fits", "image.tif"])
def test_a_fault_of_the_tool_is_not_called_damage(tmp_path, stars, monkeypatch, capsys, name):
    fits.PrimaryHDU(stars).writeto(tmp_path / "image.fits")
    tifffile.imwrite(tmp_path / "image.tif", stars)
    monkeypatch.setattr(source_extractor, "product_of", lambda _: {}["no such"])
    assert call(tmp_path / name, "-o", tmp_path) == 1
    assert "a fault of the tool (KeyError: 'no such')" in capsys.readouterr().err
