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
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits

import source_extractor
from common import call, start_code
from contract import one_line
from files import patched_tiff, pillow_bytes, tiff_bytes
from source_extractor import InputError, OutOfMemoryError, read_image, read_mask

NAME = "dataset_1.dat"  # as Galaxy calls files, whatever is in them

RAMP = np.arange(20 * 24).reshape(20, 24)
SMOOTH = np.add.outer(np.arange(48), 2 * np.arange(64))
CUBE = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)


@pytest.fixture
def put(tmp_path):
    """Return a function that stores bytes under a name that says nothing, and returns the path."""

    def put_bytes(content):
        path = tmp_path / NAME
        path.write_bytes(content)
        return path

    return put_bytes


def fits_bytes(stored, *lines, first="SIMPLE  =                    T", **cards):
    """Return a FITS file made by hand: cards, lines of the header as given, big-endian pixels."""
    bitpix = 8 * stored.itemsize * (-1 if stored.dtype.kind == "f" else 1)
    axes = {f"NAXIS{number}": n for number, n in enumerate(stored.shape[::-1], start=1)}
    cards = {"BITPIX": bitpix, "NAXIS": stored.ndim, **axes, **cards}
    made = [f"{key:8}= {value:>20}" for key, value in cards.items()]
    header = "".join(f"{line:80}" for line in [first, *made, *lines, "END"]).encode()
    pixels = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    return in_blocks(header, b" ") + in_blocks(pixels, b"\0")


def in_blocks(content, filler):
    return content + filler * (-len(content) % 2880)


def extension_bytes(stored, *lines):
    """Return a FITS file with an empty primary HDU, and one with these lines in its header."""
    cards = {"first": "XTENSION= 'IMAGE   '", "PCOUNT": 0, "GCOUNT": 1}
    return hdus_bytes() + fits_bytes(stored, *lines, **cards)


def hdus_bytes(*hdus):
    """Return a FITS file with an empty primary HDU, and after it the given ones."""
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(buffer)
    return buffer.getvalue()


def tiles_bytes(stored, codec="RICE_1", header=None, **keywords):
    """Return a FITS file with a tile-compressed image in its first extension."""
    return hdus_bytes(fits.CompImageHDU(stored, header, compression_type=codec, **keywords))


def with_card(content, key, value):
    """Return a FITS file with another whole number on its one card of this key."""
    changed, count = re.subn(rf"{key:8}= +\d+".encode(), f"{key:8}= {value:20}".encode(), content)
    assert count == 1
    return changed


def pixels_of(path, hdu=None, plane=None):
    return read_image(path, hdu, plane)[1]


def assert_pixels(path, expected, hdu=None, plane=None):
    """Assert that a file reads as these values, in the form that the middle of the tool takes."""
    data = pixels_of(path, hdu, plane)
    assert data.dtype in (np.float32, np.float64)
    assert data.dtype.isnative
    assert data.flags.c_contiguous
    assert data.shape == expected.shape
    np.testing.assert_array_equal(data, expected)


def with_extreme(stored):
    """Return an image with a large value in it, which float32 would round if float64 does not."""
    kind, bits = stored.dtype.kind, min(8 * stored.itemsize, 53)
    stored[3, 4] = np.finfo(stored.dtype).max if kind == "f" else 2 ** (bits - (kind == "i")) - 1
    return stored


# FITS


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "f4", "f8"])
def test_fits_pixel_types_keep_their_values(put, dtype):
    stored = with_extreme((RAMP * 0.5).astype(dtype))
    assert_pixels(put(fits_bytes(stored)), stored)


@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        *(
            ("u1", {}),
            ("i8", {}),
            ("i2", {"BSCALE": 0.5, "BZERO": -10.0}),
            ("i4", {"BSCALE": -2.0}),
        ),
        *(("u1", {"BZERO": -128}), ("i2", {"BZERO": 2**15}), ("i4", {"BZERO": 2**31, "BSCALE": 1})),
    ],
)
def test_fits_scaling_and_blank_make_the_values_of_the_standard(put, dtype, scaling):
    stored = (RAMP % 100).astype(dtype)
    values = scaling.get("BZERO", 0) + scaling.get("BSCALE", 1) * stored.astype(np.float64)
    assert_pixels(put(fits_bytes(stored, **scaling)), values)
    values[stored == 7] = np.nan
    assert_pixels(put(fits_bytes(stored, **scaling, BLANK=7)), values)


def test_unsigned_integers_of_64_bits_are_not_rounded(put):
    stored = RAMP.astype(np.uint64)
    assert_pixels(put(hdus_bytes(fits.ImageHDU(stored))), RAMP)
    assert_pixels(put(tiles_bytes(stored, "GZIP_2")), RAMP)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *(("RICE_1", "u1"), ("GZIP_1", "i2"), ("GZIP_2", "u1"), ("PLIO_1", "i4")),
        *(("HCOMPRESS_1", "i2"), ("HCOMPRESS_1", "u2")),
    ],
)
def test_tile_compressed_integers_are_exact(put, codec, dtype):
    stored = (SMOOTH % 251).astype(dtype)
    for tile in (4, 64), (7, 64), (32, 40), (48, 64):
        assert_pixels(put(tiles_bytes(stored, codec, tile_shape=tile)), stored)


@pytest.mark.parametrize("codec", ["RICE_1", "HCOMPRESS_1"])
def test_tile_compressed_floats_come_within_their_quantization_and_nan_stays(put, codec):
    image = np.random.default_rng(3).normal(100, 4, (40, 50)).astype(np.float32)
    image[5, 6] = np.nan if codec != "HCOMPRESS_1" else 100
    path = put(tiles_bytes(image, codec, quantize_level=16))
    np.testing.assert_allclose(pixels_of(path), image, atol=4 / 16)


@pytest.mark.parametrize(("dtype", "zero"), [("i2", 0), ("u2", 2**15)])
def test_blank_is_seen_in_tile_compressed_integers(put, dtype, zero):
    path = put(tiles_bytes(RAMP.astype(dtype), header=fits.Header({"BLANK": 7 - zero})))
    assert_pixels(path, np.where(RAMP == 7, np.nan, RAMP))


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        *(((1, 1, 20, 24), (20, 24)), ((20, 1, 24), (20, 24)), ((20, 24, 1), (20, 24))),
        *(((1, 20, 1, 24, 1), (20, 24)), ((1, 1, 24), (1, 24)), ((1, 24), (1, 24))),
        *(((24, 1), (24, 1)), ((1, 1), (1, 1))),
    ],
)
def test_axes_of_length_one_are_dropped_but_a_row_column_or_pixel_is_an_image(put, stored, read):
    image = np.arange(np.prod(stored), dtype=np.int16)
    assert_pixels(put(fits_bytes(image.reshape(stored))), image.reshape(read))
    if stored == read:
        assert_pixels(put(tiff_bytes(image.reshape(stored))), image.reshape(read))


def test_planes_of_a_fits_cube_count_in_the_order_of_numpy(put):
    for plane, expected in enumerate(CUBE.reshape(-1, 4, 5)):
        assert_pixels(put(fits_bytes(CUBE)), expected, plane=plane)
    cube = np.arange(3 * 20 * 24, dtype=np.int16).reshape(3, 20, 24)
    assert_pixels(put(tiles_bytes(cube)), cube[2], plane=2)
    assert_pixels(put(fits_bytes(cube[:, np.newaxis])), cube[1], plane=1)


def test_plane_zero_of_a_lone_plane_is_that_plane(run, put):
    for content in (tiff_bytes(RAMP.astype(np.uint16)), fits_bytes(RAMP)):
        assert_pixels(put(content), RAMP, plane=0)
    run(put(content), "--plane", "1").assert_refused(NAME, "1 plane ", "leave out --plane")


@pytest.fixture
def extensions(put):
    """Return a file: empty primary, table, SCI, ERR, SCI again, a line, one without a name."""
    images = [
        fits.ImageHDU(np.full((4, 5), 1.0), name="SCI", ver=1),
        fits.ImageHDU(np.full((4, 5), 2.0), name="ERR", ver=1),
        fits.CompImageHDU(np.full((4, 5), 3, np.int16), fits.Header({"EXTVER": 2}), name="SCI"),
        LINE.copy(),
        fits.ImageHDU(np.full((4, 5), 4.0)),
        fits.ImageHDU(np.full((4, 5), 5.0), name="ODD,NAME"),
    ]
    return put(hdus_bytes(TABLE.copy(), *images))


@pytest.mark.parametrize(
    ("hdu", "value"),
    [(None, 1), ("2", 1), ("4", 3), ("6", 4), ("SCI", 1), ("sci", 1), ("SCI,1", 1), ("SCI,2", 3)],
)
def test_hdu_is_chosen_by_index_name_or_name_and_version(extensions, hdu, value):
    assert_pixels(extensions, np.full((4, 5), value), hdu=hdu)


NO_IMAGE, NO_SUCH = "no image in extension (HDU)", "no such extension (HDU)"


@pytest.mark.parametrize(
    ("hdu", "problem"),
    [
        *(("0", NO_IMAGE), ("TAB", NO_IMAGE), ("LINE", NO_IMAGE)),
        *(("8", NO_SUCH), ("SCI,3", NO_SUCH), ("-1", NO_SUCH), ("SCI,x", NO_SUCH)),
    ],
)
def test_an_hdu_without_an_image_is_refused_and_the_others_listed(run, extensions, hdu, problem):
    listed = "the file has 0 PRIMARY: empty; 1 TAB: table; 2 SCI: 5 x 4; 3 ERR: 5 x 4; "
    run(extensions, f"--hdu={hdu}").assert_refused(NAME, f"{problem}: {hdu}; {listed}")


def test_a_message_names_no_more_hdus_than_can_be_read(put):
    path = put(hdus_bytes(*[fits.ImageHDU()] * 50))
    with pytest.raises(InputError, match=r"; 19 \(no name\): empty; and 31 more$"):
        read_image(path)


@pytest.mark.parametrize("first", ["random groups", "an image without columns"])
def test_what_holds_no_image_is_passed_over(put, tmp_path, first):
    values, parameter = np.zeros((2, 1, 4, 4), np.float32), [np.zeros(2, np.float32)]
    groups = fits.GroupData(values, bitpix=-32, parnames=["u"], pardata=parameter)
    empty = fits.PrimaryHDU(np.zeros((100, 0)))
    hdus = [fits.GroupsHDU(groups) if first == "random groups" else empty, fits.ImageHDU(RAMP)]
    fits.HDUList(hdus).writeto(tmp_path / "image.fits")
    path = put(gzip.compress((tmp_path / "image.fits").read_bytes()))
    assert_pixels(path, RAMP)
    assert read_image(path)[0].name == f"{NAME}[1]"


def test_what_ends_a_header_or_follows_an_image_may_be_anything(put):
    whole, end = fits_bytes(RAMP), b"END".ljust(80)
    assert_pixels(put(whole.replace(end, b"END".ljust(80, b"\0"), 1)), RAMP)
    assert_pixels(put(whole + b" " * 300_000), RAMP)


# Cards that can't be parsed


@pytest.mark.parametrize(
    "card",
    [
        *("EXTNAME = SCI", "EXTNAME = 'SCI", "EXTVER  = 1,5", "CTYPE1  = nan", "CTYPE3  = nan"),
        *("BUNIT   = Jy beam-1", "BUNIT   =", "BMAJ    = 0,5", "BLANK   ="),
        *("DATE-OBS= 2020-01-01", "OBJECT  = M 31, really"),
    ],
)
def test_a_card_that_is_not_needed_may_be_anything(run, put, card):
    cube = np.stack([RAMP, RAMP + 1]).astype(np.int16)
    another = hdus_bytes(fits.ImageHDU(RAMP, name="B"))[2880:]
    path = put(extension_bytes(cube, card) + another)
    assert_pixels(path, RAMP + 1, plane=1)
    assert_pixels(path, RAMP + 1, hdu="1", plane=1)
    assert_pixels(path, RAMP, hdu="B")
    run(path).assert_refused("2 planes in axes (", "NAXIS1=24" if "CTYPE1" in card else "=24")


def test_a_name_that_can_not_be_read_is_left_out(put):
    path = put(fits_bytes(RAMP, "EXTNAME = 'abc", BZERO=2**63))
    assert read_image(path)[0].name == f"{NAME}[0] PRIMARY"


@pytest.mark.parametrize(
    "card",
    [
        *("BSCALE  = 0,5", "BSCALE  = '0,5'", "BSCALE  = 0,5 / counts", "BSCALE  ="),
        *("BZERO   = 32 768", "BZERO   = nan", "BLANK   = -32.768,0"),
    ],
)
def test_a_card_that_scales_pixels_and_cannot_be_read_is_refused(put, card):
    for dtype in (np.int16, np.int64, np.float32):
        with pytest.raises(InputError, match=f"^{NAME}: "):
            read_image(put(extension_bytes(RAMP.astype(dtype), card)))


# TIFF


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_tiff_pixel_types_keep_their_values(put, dtype):
    stored = with_extreme((RAMP % 100 * (0.5 if dtype.startswith("f") else 1)).astype(dtype))
    for byteorder in "<>":
        assert_pixels(put(tiff_bytes(stored, byteorder=byteorder)), stored)


@pytest.mark.parametrize(
    "layout",
    [
        *({"tile": (16, 32)}, {"rowsperstrip": 7}, {"bigtiff": True}, {"compression": "packbits"}),
        *({"compression": "zstd"}, {"compression": "lzw", "predictor": 2, "tile": (16, 32)}),
        {"compression": "zlib", "predictor": 2, "rowsperstrip": 7, "bigtiff": True},
        {"compression": "zlib", "predictor": 3},
    ],
)
def test_tiff_codecs_and_layouts_are_lossless(put, layout):
    stored = SMOOTH.astype(np.float32 if layout.get("predictor") == 3 else np.uint16)
    assert_pixels(put(tiff_bytes(stored, **layout)), SMOOTH)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [("raw", "u2"), ("tiff_lzw", "f4"), ("tiff_deflate", "u1"), ("group4", bool)],
)
def test_tiff_of_libtiff_is_read(put, codec, dtype):
    stored = RAMP % 3 == 0 if dtype is bool else (RAMP % 200).astype(dtype)
    assert_pixels(put(pillow_bytes(stored, compression=codec)), stored.astype(int))


@pytest.mark.parametrize(("dtype", "white"), [("u1", 255), ("u2", 65535), (bool, 1)])
def test_min_is_white_is_turned_so_that_more_is_brighter(put, dtype, white):
    stored = RAMP > 99 if dtype is bool else RAMP.astype(dtype)
    assert_pixels(put(tiff_bytes(stored, photometric="miniswhite")), white - stored.astype(int))


def test_what_imagej_shows_inverted_is_read_as_stored(put, told):
    content = tiff_bytes(RAMP.astype(np.uint16), imagej=True)
    assert_pixels(put(patched_tiff(content, "PhotometricInterpretation", 0)), RAMP)
    assert not told


def test_an_image_that_is_turned_is_said_to_be_and_a_mask_is_not_turned(run, put, stars):
    path = put(tiff_bytes(65535 - np.round(stars).astype(np.uint16), photometric="miniswhite"))
    result = run(path, "--thresh", 5)
    assert re.fullmatch(one_line("warning", ".*0 is white in this TIFF: inverted.*"), result.err)
    assert len(result.catalog) == 6
    mask = run(path, "--thresh", 5, "--mask", path, "--maskthresh", 1e6)
    assert mask.err == result.err


RAINBOW = np.random.default_rng(1).integers(0, 2**16, (3, 256)).astype(np.uint16)
GREEN = np.outer([0, 1, 0], np.arange(256) * 257).astype(np.uint16)


def test_numbers_of_colours_are_no_image_but_may_be_a_mask(run, put, write, stars):
    stored = np.round(stars).astype(np.uint8)
    path = put(tiff_bytes(stored, photometric="palette", colormap=RAINBOW))
    run(path).assert_refused(NAME, "palette", "convert it to grey")
    run(write(stars), "--measure-image", path).assert_refused(NAME, "palette")
    np.testing.assert_array_equal(
        read_mask(path, None, None, 120, None, None, stored.shape), stored > 120
    )


@pytest.mark.parametrize(("colormap", "text"), [(GREEN, ""), (RAINBOW, "ImageJ=1.53t\nunit=um\n")])
def test_a_palette_that_tints_brightness_or_is_of_imagej_is_read_as_stored(put, colormap, text):
    keywords = {"photometric": "palette", "colormap": colormap, "metadata": None}
    path = put(tiff_bytes(SMOOTH.astype(np.uint8), description=text, **keywords))
    assert_pixels(path, SMOOTH % 256)


@pytest.mark.parametrize(
    "keywords",
    [
        *({}, {"bigtiff": True}, {"compression": "zlib"}),
        {"ome": True, "metadata": {"axes": "CZYX"}},
        {"imagej": True, "metadata": {"axes": "ZCYX"}},
        {"imagej": True, "metadata": {"axes": "ZCYX"}, "truncate": True},  # all in one page
    ],
)
def test_planes_of_a_tiff_count_in_the_order_of_numpy(put, keywords):
    path = put(tiff_bytes(CUBE.astype(np.uint16), **keywords))
    for plane, expected in enumerate(CUBE.reshape(-1, 4, 5)):
        assert_pixels(path, expected, plane=plane)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_each_colour_is_a_plane_and_counts_fastest(put, monkeypatch, planar, compression, depth):
    stack = np.arange(depth * 3 * 20 * 24).reshape(depth, 3, 20, 24).astype(np.uint16)
    stored = stack if planar == "separate" else np.moveaxis(stack, 1, -1)
    keywords = {"photometric": "rgb", "planarconfig": planar, "compression": compression}
    path = put(tiff_bytes(stored[0] if depth == 1 else stored, **keywords))
    monkeypatch.delattr(tifffile.TiffPageSeries, "asarray")  # which reads all its pages
    for plane, expected in enumerate(stack.reshape(-1, 20, 24)):
        assert_pixels(path, expected, plane=plane)


def test_tiff_axes_of_length_one_are_dropped(put):
    stored = RAMP.astype(np.uint16)[np.newaxis, np.newaxis]
    assert_pixels(put(tiff_bytes(stored)), RAMP)
    assert_pixels(put(tiff_bytes(stored, ome=True, metadata={"axes": "CZYX"})), RAMP)
    assert_pixels(put(tiff_bytes(stored, imagej=True, metadata={"axes": "ZCYX"})), RAMP)


# Several images in a TIFF


@pytest.fixture
def two(tmp_path, stars):
    """Return a TIFF of two images of different shapes, both with sources."""
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(stars)
        tiff.write(stars[:110, :150] + 7)
    return path


def test_images_of_a_tiff_are_chosen_by_number_or_the_first_is_taken_with_a_warning(
    run, two, stars
):
    for hdu in ("2", "SCI", "0,1"):
        run(two, "--hdu", hdu).assert_refused("two.tif", "TIFF", hdu, "images 0 to 1")
    masked = "--mask", two, "--maskthresh", 1e6, "--mask-hdu"
    run(two, "--hdu", 1, *masked, 0).assert_refused("two.tif[0]: it has 160 x 120 pixels")
    for number, expected in (("0", stars), ("1", stars[:110, :150] + 7)):
        assert_pixels(two, expected, hdu=number)
    first = run(two)
    assert first.image("segmentation").shape == stars.shape
    assert "two.tif[0]: the first of 2 images is used; choose another with the HDU" in first.err
    assert first.err.count("\n") == 1
    second = run(two, "--hdu", 1, *masked, 1)
    assert (second.code, second.err) == (0, "")
    assert f"{two.name}[1]: 150 x 110" in second.out
    assert "hdu = 1" in str(fits.getheader(second.directory / "background.fits")["HISTORY"])


@pytest.mark.parametrize("where", ["SubIFDs", "pages after it", "a page before it", "stack"])
def test_reduced_images_are_no_images_of_their_own(tmp_path, stars, where):
    path, half = tmp_path / "pyramid.tif", stars[::2, ::2]
    reduced = {"subfiletype": 1, "metadata": None}
    planes, levels = (3, 1) if where == "stack" else (1, 2)
    with tifffile.TiffWriter(path) as tiff:
        if where == "a page before it":
            tiff.write(half, **reduced)
        for _ in range(planes):
            tiff.write(stars, subifds=levels if where in ("SubIFDs", "stack") else 0, metadata=None)
            for level in range(levels if where != "a page before it" else 0):
                tiff.write(half[:: level + 1, :: level + 1], **reduced)
    assert_pixels(path, stars, plane=planes - 1)
    assert read_image(path, plane=0)[0].name == "pyramid.tif"  # without a number: the only one
    with pytest.raises(InputError, match="images 0 to 0"):
        read_image(path, "1", 0)


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
        result.assert_refused("it lacks this plane; if it belongs to a set of files")
        assert "damaged" not in result.err


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
def test_no_such_plane_shows_the_axes_and_the_range(run, put, content, layout):
    path = put(content)
    for options in ([], ["--plane", 6], ["--plane", 10**12]):
        run(path, *options).assert_refused(NAME, "6 planes", "0 to 5", *layout)


# Files that can't be used

WHOLE = fits_bytes(SMOOTH.astype(np.float32))
RICE = tiles_bytes(SMOOTH.astype(np.int16))
GRAY = tiff_bytes(SMOOTH.astype("u1"))
LINE = fits.ImageHDU(np.arange(9.0), name="LINE")
TABLE = fits.BinTableHDU.from_columns([fits.Column("x", "E", array=np.arange(3.0))], name="TAB")
NO_PIXELS = fits_bytes(np.zeros((9, 0), "u1"), first="XTENSION= 'IMAGE   '")
ZEROS = np.zeros((40, 90), "f4")
BROKEN = hdus_bytes(fits.ImageHDU(RAMP))
BROKEN = BROKEN.replace(b"XTENSION= 'IMAGE   '", b"QTENSION= 'IMAGE\0   ")

NO_IMAGES = {
    "0 bytes": b"",
    "ten bytes of FITS": b"SIMPLE  = ",
    "a web page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "a PNG": pillow_bytes(RAMP.astype(np.uint8), format="PNG"),
}
TOO_LARGE = "8 TB FITS", "huge TIFF"  # by their headers
UNUSABLE = NO_IMAGES | {
    "six bytes of FITS": b"SIMPLE",
    "FITS header alone": WHOLE[:2880],
    "FITS header without an end": WHOLE[:320].ljust(300_000),
    "truncated FITS": WHOLE[:-3000],
    "truncated FITS extension": hdus_bytes(fits.ImageHDU(SMOOTH))[:-3000],
    "truncated compressed FITS": RICE[:-2880],
    "truncated gzip": gzip.compress(WHOLE)[:-200],
    "truncated bzip2": bz2.compress(WHOLE)[:-200],
    "truncated FITS in gzip": gzip.compress(WHOLE[:-3000]),
    "gzip of text": gzip.compress(b"x y\n1 2\n"),
    "gzip magic alone": b"\x1f\x8b\x08",
    "gzip of TIFF": gzip.compress(GRAY),
    "gzip with another checksum": gzip.compress(WHOLE)[:-8] + bytes(4) + gzip.compress(WHOLE)[-4:],
    "no image": hdus_bytes(),
    "only a table": hdus_bytes(TABLE.copy()),
    "one axis": hdus_bytes(LINE.copy()),
    "extension without primary": NO_PIXELS,
    "no pixels": hdus_bytes() + NO_PIXELS,
    "no rows": fits_bytes(ZEROS[:0]),
    "only NaN": fits_bytes(np.full((20, 24), np.nan)),
    "broken extension": BROKEN,
    "broken extension in gzip": gzip.compress(BROKEN),
    "8 TB FITS": fits_bytes(ZEROS, NAXIS1=10**6, NAXIS2=10**6),
    "more bytes than can be counted": fits_bytes(ZEROS, NAXIS1=2**62, NAXIS2=2**62),
    "more planes than can be counted": with_card(
        tiles_bytes(np.zeros((2, 9, 9), np.int16)), "ZNAXIS3", 2**62
    ),
    "ten times the rows": fits_bytes(ZEROS, NAXIS2=400),
    "negative axis": fits_bytes(ZEROS, NAXIS2=-4),
    "axis of 1.5 pixels": fits_bytes(ZEROS, NAXIS1=1.5),
    "axis that is no number": fits_bytes(ZEROS, NAXIS2="T"),
    "impossible BITPIX": fits_bytes(ZEROS, BITPIX=17),
    "BITPIX without a value": fits_bytes(ZEROS, BITPIX=""),
    "truncated TIFF": tiff_bytes(SMOOTH.astype("u2"))[:-900],
    "truncated LZW": tiff_bytes(SMOOTH.astype("u2"), compression="lzw")[:-90],
    "TIFF magic alone": b"II*\0",
    "TIFF without a page": b"II*\0\x08\0\0\0",
    "complex TIFF": tiff_bytes(SMOOTH.astype("c8")),
    "TIFF of width 0": patched_tiff(GRAY, "ImageWidth", 0),
    "TIFF of length 0": patched_tiff(tiff_bytes(ZEROS, compression="zlib"), "ImageLength", 0),
    "taller TIFF": patched_tiff(GRAY, "ImageLength", 480),
    "huge TIFF": patched_tiff(GRAY, "ImageLength", 2**31),
    "unknown codec": patched_tiff(GRAY, "Compression", 9999),
    "TIFF without offsets": GRAY.replace(*(struct.pack("<H", n) for n in (273, 53009))),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(run, put, name):
    result = run(put(UNUSABLE[name]))
    code = 3 if name in TOO_LARGE else 1
    result.assert_refused(f"error: {NAME}", "FITS" if name in NO_IMAGES else "", code=code)
    assert result.out == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("image.tif", WHOLE), ("image.fits", tiff_bytes(SMOOTH.astype("f4"))), ("image.gz", WHOLE)],
)
def test_an_image_under_the_ending_of_another_kind_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_pixels(tmp_path / name, SMOOTH)


SQUARE = tiles_bytes(SMOOTH.astype(np.int16), "HCOMPRESS_1", tile_shape=(16, 16))


@pytest.mark.parametrize(
    "cards",
    [{"ZTILE1": 8}, {"ZTILE1": 32}, {"ZNAXIS1": 60}, {"ZNAXIS2": 40}, {"ZTILE1": 8, "ZTILE2": 8}],
)
def test_an_hcompress_tile_of_another_size_than_the_header_tells_is_refused(run, put, cards):
    content = SQUARE
    for key, value in cards.items():
        content = with_card(content, key, value)
    run(put(content)).assert_refused(NAME, "damaged")


@pytest.mark.parametrize("sides", [(8, 16), (16, 2**31 - 1), (2**32 - 1, 16), (0, 0)])
def test_an_hcompress_stream_that_tells_another_size_is_refused(run, put, sides):
    own, told = (b"\xdd\x99" + struct.pack(">II", *size) for size in ((16, 16), sides))
    before, after = SQUARE.rsplit(own, 1)
    run(put(before + told + after)).assert_refused(NAME, "damaged")


@pytest.mark.parametrize(
    "options", [["--mask"], ["--err-option", "file", "--err-file"], ["--measure-image"]]
)
def test_a_second_image_that_cannot_be_used_is_refused_by_name(run, put, write, options):
    run(write(SMOOTH), *options, put(WHOLE[:-3000])).assert_refused(NAME)


def test_a_directory_a_pipe_and_a_missing_file_are_refused(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    words = {"": "a directory, pipe or device", "pipe": "pipe or device", NAME: "No such file"}
    for name, text in words.items():
        result = run(tmp_path / name)
        result.assert_refused(f"error: {tmp_path / name}: ", text)
        assert result.out == ""


def test_what_libpng_says_is_told_in_our_words_or_not_at_all(put, tmp_path, stars, capfd):
    whole = tiff_bytes(stars.astype(np.uint8), compression="png")
    for place in range(whole.index(b"IEND") - 100, whole.index(b"IEND") - 8, 7):
        content = bytearray(whole)
        content[place] ^= 1
        assert call(put(content), "-o", tmp_path) == 1
        assert re.fullmatch(one_line("error", f"{NAME}: damaged.*"), capfd.readouterr().err)


# Limits


def test_what_takes_too_long_to_open_is_refused(run, put, monkeypatch):
    empty = hdus_bytes(fits.ImageHDU())
    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    monkeypatch.setattr(source_extractor, "SECONDS_TO_OPEN", 1)
    many = put(empty[:2880] + empty[2880:] * 20_000)
    run(many).assert_refused(NAME, "opening it takes too much time or memory; get a new copy")
    after = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    assert after == before
    assert not multiprocessing.active_children()
    assert_pixels(put(WHOLE), SMOOTH)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use isn't told")
def test_what_takes_too_much_memory_to_open_is_refused(put, tmp_path):
    # In a process of its own: memory that this one has freed would count as in use.
    code = "import sys, source_extractor as s; s.BYTES_TO_OPEN = 2 * 10**7; sys.exit(s.main())"
    endless, out = put(WHOLE[:320].ljust(4 * 10**7)), tmp_path / "products"
    done = start_code(code, endless, "-o", out)
    text = "damaged: opening it takes too much time or memory; get a new copy"
    assert (done.returncode, out.exists()) == (1, False)
    assert re.fullmatch(one_line("error", f"{NAME}: {text}"), done.stderr)


@pytest.mark.parametrize("form", ["FITS", "tiles", "one tile", "TIFF", "packed TIFF"])
def test_pixels_take_nothing_of_the_memory_to_open_a_file(tmp_path, monkeypatch, form):
    image, path = np.zeros((4000, 4000), np.float32), tmp_path / "image"
    if "TIFF" in form:
        tifffile.imwrite(path, image, compression="zlib" if "packed" in form else None)
    elif "tile" in form:
        shape = image.shape if "one" in form else (500, 4000)
        fits.CompImageHDU(image, compression_type="GZIP_1", tile_shape=shape).writeto(path)
    else:
        fits.PrimaryHDU(image).writeto(path)
    monkeypatch.setattr(source_extractor, "BYTES_TO_OPEN", 5 * 10**7)
    assert pixels_of(path).shape == image.shape


def test_a_crash_of_a_library_on_opening_is_told_as_damage(run, put, monkeypatch):
    def crash(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(source_extractor, "open_fits", crash)
    run(put(WHOLE)).assert_refused(NAME, "damaged", "get a new copy")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_a_packed_file_is_unpacked_up_to_a_limit(put, monkeypatch, pack):
    path, size = put(pack(WHOLE)), len(WHOLE)
    assert path.stat().st_size < size
    monkeypatch.setattr(source_extractor, "UNPACKED_RATIO", 1)
    monkeypatch.setattr(source_extractor, "UNPACKED_BYTES", size)
    assert_pixels(path, SMOOTH)
    monkeypatch.setattr(source_extractor, "UNPACKED_BYTES", size - 1)
    with pytest.raises(InputError, match=f"{NAME}.*it unpacks to more than {size - 1} bytes"):
        pixels_of(path)
    monkeypatch.setattr(source_extractor, "UNPACKED_RATIO", 1 + size // path.stat().st_size)
    assert_pixels(path, SMOOTH)


@pytest.mark.parametrize(("dtype", "size"), [("u1", 4), ("i2", 4), ("i4", 8), ("f4", 4), ("f8", 8)])
def test_an_image_larger_than_the_memory_is_refused_before_it_is_read(
    put, monkeypatch, dtype, size
):
    path, needed = put(fits_bytes(SMOOTH.astype(dtype))), 3 * SMOOTH.size * size
    monkeypatch.setattr(source_extractor, "memory_limit", lambda: needed)
    assert_pixels(path, SMOOTH.astype(dtype))
    monkeypatch.setattr(source_extractor, "memory_limit", lambda: needed - 1)
    with pytest.raises(OutOfMemoryError, match=f"{NAME}.* 64 x 48 pixels need .* GB of memory"):
        pixels_of(path)


@pytest.mark.parametrize(
    ("group", "ulimit", "expected"),
    [
        *(("max", None, 4096 * 10**6), ("3000000", None, 3_000_000)),
        *(("9" * 12, None, 4096 * 10**6), (None, None, 4096 * 10**6)),
        *(("max", 10**9, 5 * 10**8), ("3000000", 10**9, 3_000_000)),
    ],
)
def test_memory_is_what_machine_group_and_ulimit_leave(monkeypatch, group, ulimit, expected):
    def read_text(path):
        if group is None:
            raise FileNotFoundError
        return {"/proc/self/cgroup": "0::/jobs/7\n"}.get(str(path)) or {
            "/sys/fs/cgroup/jobs/7/memory.max": f"{group}\n"
        }[str(path)]

    infinite = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_AS: ulimit or infinite}
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, infinite), infinite))
    assert source_extractor.memory_limit() == expected
