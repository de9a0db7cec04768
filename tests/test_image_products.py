"""The image products: standard, of the right type, with unit, history and place on the sky."""

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits

import source_extractor
from common import NX, NY, SHAPE
from contract import DEFAULTS, NOT_IN_HISTORY
from headers import RADIO, SKIES, cards, celestial_wcs, distorted
from sky import blobs


@pytest.mark.parametrize(
    "name", ["background.fits", "rms.fits", "segmentation.fits", "subtracted.fits", "catalog.fits"]
)
def test_fits_products_obey_the_standard(nine, name):
    with fits.open(nine / name) as hdus:
        hdus.verify("exception")


@pytest.mark.parametrize(
    ("pixels", "products"),
    [("u1", ">f4"), (">i2", ">f4"), (">f4", ">f4"), (">f8", ">f8")],
)
def test_levels_are_float32_unless_the_image_is_float64(run, write, stars, pixels, products):
    result = run(write(stars.astype(pixels)))
    assert result.image("background").dtype == products
    assert result.image("rms").dtype == products


def test_fits_segmentation_is_int32_in_the_primary_hdu(nine):
    with fits.open(nine / "segmentation.fits") as hdus:
        assert hdus[0].data.dtype == np.dtype(">i4")
        assert "BZERO" not in hdus[0].header


@pytest.mark.parametrize(
    ("side", "dtype"), [(0, np.uint8), (15, np.uint8), (16, np.uint16)], ids=["0", "225", "256"]
)
def test_tiff_segmentation_is_the_smallest_unsigned_integer(run, write, side, dtype):
    image = np.zeros((136, 136), np.float32)
    image[:2] = 1
    cells = np.add.outer(np.arange(side) * 8 + 8, np.arange(3)).ravel()
    image[np.ix_(cells, cells)] = 100
    options = ("--err-option", "none", "--thresh", 50, "--filter-case", "none")
    result = run(write(image), "--image-format", "tiff", *options)
    labels = tifffile.imread(result.directory / "segmentation.tiff")
    assert labels.dtype == dtype
    assert labels.max() == len(result.catalog) == side**2


@pytest.mark.parametrize("name", ["background", "rms", "subtracted"])
def test_products_in_image_values_keep_the_unit(nine, name):
    assert fits.getheader(nine / f"{name}.fits")["BUNIT"] == "nJy"


def test_labels_have_no_unit(nine):
    assert "BUNIT" not in fits.getheader(nine / "segmentation.fits")


GIVEN = {
    "image": "image.fits",
    "plane": 0,
    "mask_box": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "bw": 32,
    "thresh": 2.25,
    "gain": 3.0,
    "clean": False,
}


def history(path):
    """Return the lines in which a product, FITS or TIFF, tells how it was made."""
    if path.suffix == ".fits":
        return list(fits.getheader(path)["HISTORY"])
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[0].description.splitlines()


@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_history_has_the_version_and_each_parameter(run, write, stars, form):
    boxes = ("--mask-box", 0, 1, 2, 3, "--mask-box", 4, 5, 6, 7)
    options = ("--thresh", 2.25, "--bw", 32, "--gain", 3, "--no-clean", "--plane", 0, *boxes)
    result = run(write(stars), *options, "--image-format", form)
    for product in ("background", "rms", "segmentation"):
        said = history(result.directory / f"{product}.{form}")
        version = source_extractor.__version__
        assert said[0] == f"source_extractor.py {version} (sep {sep.__version__}): {product}"
        for name, value in (DEFAULTS | GIVEN).items():
            if value not in (None, []) and name not in NOT_IN_HISTORY:
                assert f"{name} = {value!r}" in said


def test_the_hdu_in_history_can_be_given_again(run, tmp_path, stars):
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(stars[:50]), fits.ImageHDU(stars, name="SCI")]
    fits.HDUList(hdus).writeto(tmp_path / "mef.fits")
    result = run(tmp_path / "mef.fits", "--hdu", "SCI")
    told = next(line for line in history(result.directory / "rms.fits") if line.startswith("hdu"))
    assert told == "hdu = 2"
    again = run(tmp_path / "mef.fits", "--hdu", told.removeprefix("hdu = "))
    pd.testing.assert_frame_equal(again.catalog, result.catalog)


@pytest.mark.parametrize(
    "name",
    ["é☃ 星.fits", 'o\'brien "x".fits', "new\nline.fits", "x" * 200 + ".fits", "50%s{0}.dat"],
    ids=["unicode", "quotes", "newline", "long", "format"],
)
@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_odd_file_names_are_kept_in_history_as_ascii(run, write, stars, name, form):
    result = run(write(stars, name), "--image-format", form)
    assert result.code == 0
    assert ascii(name) in "".join(history(result.directory / f"background.{form}"))


# ---------------------------------------------------------------------------------------------
# World coordinates
# ---------------------------------------------------------------------------------------------


def assert_same_sky(path, other):
    """Compare the sky positions in two files, on a grid that goes beyond the image."""
    x, y = np.meshgrid(np.linspace(-20, NX + 20, 13), np.linspace(-20, NY + 20, 11))
    sky, expected = (celestial_wcs(file).pixel_to_world(x, y) for file in (path, other))
    assert sky.frame.is_equivalent_frame(expected.frame)
    assert sky.separation(expected).deg.max() < 1e-9


@pytest.mark.parametrize("kind", SKIES)
def test_products_lie_where_the_image_lies_on_the_sky(run, write, kind):
    image = write(blobs(SHAPE, (60, 50)), **SKIES[kind][0])
    result = run(image)
    assert result.err == ""
    for product in ("background", "rms", "segmentation"):
        assert_same_sky(result.directory / f"{product}.fits", image)


def test_lookup_table_distortion_is_kept(run, tmp_path):
    distorted(blobs(SHAPE, (60, 50))).writeto(tmp_path / "distorted.fits")
    result = run(tmp_path / "distorted.fits")
    assert_same_sky(result.directory / "background.fits", tmp_path / "distorted.fits")
    with fits.open(result.directory / "segmentation.fits") as written:
        written.verify("exception")
        assert "CPDIS1" in written[0].header


def test_a_radio_image_of_four_axes_keeps_its_two_celestial_ones(run, write):
    image = write(blobs(SHAPE, (60, 50))[np.newaxis, np.newaxis], **RADIO)
    background = run(image).directory / "background.fits"
    assert fits.getheader(background)["WCSAXES"] == 2
    assert_same_sky(background, image)


def test_the_plane_of_a_cube_keeps_the_celestial_axes(run, write):
    cube = np.stack([blobs(SHAPE, (60, 50)), blobs(SHAPE, (90, 80))])
    image = write(cube, **cards(CTYPE3="VELO", CRVAL3=1.0, CRPIX3=1.0, CD3_3=1.0))
    assert_same_sky(run(image, "--plane", 1).directory / "background.fits", image)


def test_the_wcs_comes_from_the_chosen_hdu(run, tmp_path):
    hdus = [fits.PrimaryHDU(blobs(SHAPE), fits.Header(cards(CRVAL1=10.0)))]
    hdus.append(fits.ImageHDU(blobs(SHAPE, (60, 50)), fits.Header(cards()), name="SCI"))
    fits.HDUList(hdus).writeto(tmp_path / "two.fits")
    fits.PrimaryHDU(hdus[1].data, hdus[1].header).writeto(tmp_path / "one.fits")
    result = run(tmp_path / "two.fits", "--hdu", "SCI")
    assert_same_sky(result.directory / "rms.fits", tmp_path / "one.fits")


def test_without_a_wcs_products_have_none(run, write, stars):
    header = fits.getheader(run(write(stars)).directory / "background.fits")
    assert not any(key.startswith(("CTYPE", "CRVAL", "WCS")) for key in header)
