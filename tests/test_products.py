"""The products: which, where, in what form, true to the input, and all of them or none."""

import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, DistortionLookupTable
from matplotlib import image as mpl_image

import source_extractor

SCRIPT = source_extractor.__file__
SKY = Path(__file__).parent.parent / "test-data" / "sky.fits"

FIVE = {"background.fits", "rms.fits", "segmentation.fits", "sources.png", "catalog.tsv"}
ON_REQUEST = {
    "--subtracted": "subtracted.fits",
    "--catalog-fits": "catalog.fits",
    "--regions": "sources.reg",
    "--overview": "overview.png",
}
SEP_FIELDS = [
    *("thresh", "npix", "tnpix", "xmin", "xmax", "ymin", "ymax", "x", "y", "x2", "y2", "xy"),
    *("errx2", "erry2", "errxy", "a", "b", "theta", "cxx", "cyy", "cxy", "cflux", "flux"),
    *("cpeak", "peak", "xcpeak", "ycpeak", "xpeak", "ypeak", "flag"),
]


def all_nine(directory):
    """Return the options that put all nine products into a directory."""
    requested = [word for option, name in ON_REQUEST.items() for word in (option, directory / name)]
    return ["-o", directory, *requested]


def extract(*arguments):
    assert source_extractor.main([str(argument) for argument in ("-q", *arguments)]) == 0


def tree(directory):
    """Return the content of every file below a directory, hidden ones too, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def blobs(shape, *centres, noise=1.0, peak=60.0, a=2.0, b=2.0, theta=0.0):
    """Return a float32 image of white noise on 100 with an elliptical Gaussian at each centre."""
    image = np.random.default_rng(3).normal(100, noise, shape)
    y, x = np.indices(shape)
    for x0, y0 in centres:
        along = (x - x0) * np.cos(theta) + (y - y0) * np.sin(theta)
        across = (y - y0) * np.cos(theta) - (x - x0) * np.sin(theta)
        image += peak * np.exp(-((along / a) ** 2 + (across / b) ** 2) / 2)
    return image.astype(np.float32)


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """Return the directory of all nine products of the simulated sky, whose unit is nJy."""
    directory = tmp_path_factory.mktemp("nine")
    image = directory.with_name("nine.fits")
    header = fits.getheader(SKY)
    header["BUNIT"] = "nJy"
    fits.PrimaryHDU(fits.getdata(SKY), header).writeto(image)
    extract(image, *all_nine(directory))
    return directory


@pytest.fixture(scope="module")
def catalog(nine):
    return pd.read_csv(nine / "catalog.tsv", sep="\t")


# ---------------------------------------------------------------------------------------------
# Which products, and where
# ---------------------------------------------------------------------------------------------


def test_the_five_products_and_no_other_file_are_written_by_default(run, write, stars):
    assert set(tree(run(write(stars)).directory)) == FIVE


def test_all_nine_products_are_written_on_request(nine):
    assert set(tree(nine)) == FIVE | set(ON_REQUEST.values())


@pytest.mark.parametrize(("option", "name"), ON_REQUEST.items())
def test_only_the_requested_product_joins_the_five(run, write, stars, tmp_path, option, name):
    result = run(write(stars), option, tmp_path / "products" / name)
    assert set(tree(result.directory)) == FIVE | {name}


def test_products_go_to_the_working_directory_by_default(write, stars, tmp_path, monkeypatch):
    image = write(stars)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    extract(image)
    assert set(tree(tmp_path / "here")) == FIVE


def test_the_output_directory_is_made_with_its_parents(write, stars, tmp_path):
    extract(write(stars), "-o", tmp_path / "a" / "b" / "c")
    assert set(tree(tmp_path / "a")) == {f"b/c/{name}" for name in FIVE}


def test_explicit_paths_leave_nothing_in_the_output_directory(run, write, stars, tmp_path):
    names = {
        "--background": "level.fits",
        "--rms": "noise.fits",
        "--segmentation": "map.fits",
        "--overlay": "picture",
        "--catalog": "table.txt",
    }
    own = tmp_path / "my own"
    result = run(write(stars), *(x for option in names for x in (option, own / names[option])))
    assert result.code == 0
    assert set(tree(own)) == set(names.values())
    assert not result.directory.exists()
    assert (own / "picture").read_bytes().startswith(b"\x89PNG")


MAGIC = {"fits": b"SIMPLE", "gzip": b"\x1f\x8b", "tiff": b"II*\0"}


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("b.fits", (), "fits"),
        ("b.fits.gz", (), "gzip"),
        ("b.dat", (), "fits"),
        ("b", (), "fits"),
        ("b.tif", (), "tiff"),
        ("b.tiff", (), "tiff"),
        ("b.TIF", (), "tiff"),
        ("b.dat", ("--image-format", "tiff"), "tiff"),
        ("b.fits", ("--image-format", "tiff"), "tiff"),
        ("b.tif", ("--image-format", "fits"), "fits"),
    ],
)
def test_image_format_goes_by_option_then_by_extension(write, stars, tmp_path, name, options, kind):
    path = tmp_path / name
    extract(write(stars), "-o", tmp_path, "--background", path, *options)
    assert path.read_bytes().startswith(MAGIC[kind])
    found = tifffile.imread(path) if kind == "tiff" else fits.getdata(path)
    np.testing.assert_array_equal(found, sep.Background(stars).back())


def test_image_format_tiff_changes_the_default_names(run, write, stars):
    result = run(write(stars), "--image-format", "tiff")
    assert set(tree(result.directory)) == {name.replace(".fits", ".tiff") for name in FIVE}


# ---------------------------------------------------------------------------------------------
# Image products
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["background.fits", "rms.fits", "segmentation.fits", "subtracted.fits", "catalog.fits"]
)
def test_fits_products_obey_the_standard(nine, name):
    with fits.open(nine / name) as hdus:
        hdus.verify("exception")


def test_image_products_are_those_of_sep(nine):
    image = fits.getdata(SKY).astype(np.float32)
    background = sep.Background(image)
    residual = image - background
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32)
    labels = sep.extract(
        residual, 1.5, background.globalrms, filter_kernel=kernel, segmentation_map=True
    )[1]
    for name, expected in {
        "background": background.back(),
        "rms": background.rms(),
        "subtracted": residual,
        "segmentation": labels,
    }.items():
        np.testing.assert_array_equal(fits.getdata(nine / f"{name}.fits"), expected, name)


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


def test_segmentation_counts_are_the_catalogues(nine, catalog):
    labels, counts = np.unique(fits.getdata(nine / "segmentation.fits"), return_counts=True)
    assert dict(zip(labels[1:], counts[1:], strict=True)) == dict(
        zip(catalog["id"], catalog["npix"], strict=True)
    )


@pytest.mark.parametrize("name", ["background", "rms", "subtracted"])
def test_products_in_image_values_keep_the_unit(nine, name):
    assert fits.getheader(nine / f"{name}.fits")["BUNIT"] == "nJy"


def test_labels_have_no_unit(nine):
    assert "BUNIT" not in fits.getheader(nine / "segmentation.fits")


PARAMETERS = {
    "image": "image.fits",
    "plane": 0,
    "maskthresh": 0.0,
    "mask_box": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "bw": 32,
    "bh": 64,
    "fw": 3,
    "fh": 3,
    "fthresh": 0.0,
    "background_passes": 1,
    "thresh": 2.25,
    "err_option": "float_globalrms",
    "err_type": "stddev",
    "gain": 3.0,
    "minarea": 5,
    "filter_case": "default",
    "filter_fwhm": 2.0,
    "filter_type": "matched",
    "deblend_nthresh": 32,
    "deblend_cont": 0.005,
    "clean": False,
    "clean_param": 1.0,
    "zeropoint": 0.0,
    "kron_factor": 2.5,
    "kron_min_radius": 3.5,
}


@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_history_has_the_version_and_each_parameter(run, write, stars, form):
    boxes = ("--mask-box", 0, 1, 2, 3, "--mask-box", 4, 5, 6, 7)
    options = ("--thresh", 2.25, "--bw", 32, "--gain", 3, "--no-clean", "--plane", 0, *boxes)
    result = run(write(stars), *options, "--image-format", form)
    for product in ("background", "rms", "segmentation"):
        path = result.directory / f"{product}.{form}"
        if form == "fits":
            said = list(fits.getheader(path)["HISTORY"])
        else:
            with tifffile.TiffFile(path) as tiff:
                said = tiff.pages[0].description.splitlines()
        assert source_extractor.__version__ in said[0]
        assert sep.__version__ in said[0]
        for name, value in PARAMETERS.items():
            assert f"{name} = {value!r}" in said


@pytest.mark.parametrize(
    "name",
    ["é☃ 星.fits", 'o\'brien "x".fits', "new\nline.fits", "x" * 200 + ".fits", "50%s{0}.dat"],
    ids=["unicode", "quotes", "newline", "long", "format"],
)
@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_odd_file_names_are_kept_in_history_as_ascii(run, write, stars, name, form):
    result = run(write(stars, name), "--image-format", form)
    assert result.code == 0
    path = result.directory / f"background.{form}"
    if form == "fits":
        said = "".join(fits.getheader(path)["HISTORY"])
    else:
        with tifffile.TiffFile(path) as tiff:
            said = tiff.pages[0].description
    assert ascii(name) in said


# ---------------------------------------------------------------------------------------------
# World coordinates
# ---------------------------------------------------------------------------------------------

NY, NX = SHAPE = (120, 160)


def wcs_cards(lon="RA---TAN", lat="DEC--TAN", **more):
    """Return the cards of a celestial WCS of 0.4 arcsec pixels, turned by 30 degrees."""
    return {
        "CTYPE1": lon,
        "CTYPE2": lat,
        "CUNIT1": "deg",
        "CUNIT2": "deg",
        "CRVAL1": 210.802267432198765,
        "CRVAL2": -54.348950123456789,
        "CRPIX1": 80.123456789,
        "CRPIX2": -60.987654321,
        "CD1_1": -9.622504486493764e-05,
        "CD1_2": 5.555555555555556e-05,
        "CD2_1": 5.555555555555556e-05,
        "CD2_2": 9.622504486493764e-05,
        **more,
    }


SIP = {"A_ORDER": 3, "B_ORDER": 2, "A_2_0": 1.1e-5, "A_0_3": 2e-8, "B_1_1": -3e-5, "B_0_2": 2e-5}
INVERSE_SIP = {"AP_ORDER": 1, "BP_ORDER": 1, "AP_1_0": 1e-7, "BP_0_1": 1e-7}
TPV = {"PV1_0": 1e-4, "PV1_1": 1.01, "PV1_2": 2e-3, "PV1_4": 0.05, "PV2_1": 0.99, "PV2_6": -0.04}
SKIES = {
    "TAN": wcs_cards(),
    "FK5": wcs_cards(RADESYS="FK5", EQUINOX=2000.0),
    "FK4": wcs_cards(RADESYS="FK4", EQUINOX=1950.0),
    "SIP": wcs_cards("RA---TAN-SIP", "DEC--TAN-SIP", **SIP, **INVERSE_SIP),
    "TPV": wcs_cards("RA---TPV", "DEC--TPV", **TPV),
    "ZPN": wcs_cards("RA---ZPN", "DEC--ZPN", PV2_1=1.0, PV2_3=45.0),
    "galactic": wcs_cards("GLON-CAR", "GLAT-CAR"),
    "latitude first": wcs_cards("DEC--TAN", "RA---TAN", CRVAL1=2.5, CRVAL2=150.25),
}


def assert_same_sky(path, other):
    """Compare the sky positions in two files, on a grid that goes beyond the image."""
    x, y = np.meshgrid(np.linspace(-20, NX + 20, 13), np.linspace(-20, NY + 20, 11))
    with warnings.catch_warnings(), fits.open(path) as found, fits.open(other) as hdus:
        warnings.simplefilter("ignore")
        expected = WCS(hdus[0].header, hdus).celestial.pixel_to_world(x, y)
        sky = WCS(found[0].header, found).pixel_to_world(x, y)
    assert sky.frame.is_equivalent_frame(expected.frame)
    assert sky.separation(expected).deg.max() < 1e-9


@pytest.fixture
def write_cards(tmp_path):
    """Return a function that writes an array as FITS with a dictionary of cards."""

    def write_fits(data, cards):
        path = tmp_path / "image.fits"
        fits.PrimaryHDU(data, fits.Header(cards)).writeto(path)
        return path

    return write_fits


@pytest.mark.parametrize("kind", SKIES)
def test_products_lie_where_the_image_lies_on_the_sky(run, write_cards, kind):
    image = write_cards(blobs(SHAPE, (60, 50)), SKIES[kind])
    result = run(image)
    assert result.err == ""
    for product in ("background", "rms", "segmentation"):
        assert_same_sky(result.directory / f"{product}.fits", image)


def test_lookup_table_distortion_is_kept(run, tmp_path):
    wcs = WCS(fits.Header(wcs_cards()))
    shifts = np.random.default_rng(1).normal(0, 0.5, (2, 7, 9)).astype(np.float32)
    wcs.cpdis1, wcs.cpdis2 = (
        DistortionLookupTable(table, (1, 1), (1, 1), (20, 20)) for table in shifts
    )
    hdus = wcs.to_fits(relax=True)
    hdus[0].data = blobs(SHAPE, (60, 50))
    hdus.writeto(tmp_path / "distorted.fits")
    result = run(tmp_path / "distorted.fits")
    assert_same_sky(result.directory / "background.fits", tmp_path / "distorted.fits")
    with fits.open(result.directory / "segmentation.fits") as written:
        written.verify("exception")
        assert "CPDIS1" in written[0].header


def test_a_radio_image_of_four_axes_keeps_its_two_celestial_ones(run, write_cards):
    cards = {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "CTYPE3": "FREQ", "CTYPE4": "STOKES"}
    cards |= {"CRVAL1": 83.6, "CRVAL2": 22.0, "CRVAL3": 1.4e9, "CRVAL4": 1.0, "CRPIX1": 70.5}
    cards |= {"CDELT1": -0.001, "CDELT2": 0.001, "CDELT3": 1e6, "CRPIX2": 50.5, "CUNIT3": "Hz"}
    image = write_cards(blobs(SHAPE, (60, 50))[np.newaxis, np.newaxis], cards)
    background = run(image).directory / "background.fits"
    assert fits.getheader(background)["WCSAXES"] == 2
    assert_same_sky(background, image)


def test_the_plane_of_a_cube_keeps_the_celestial_axes(run, write_cards):
    cube = np.stack([blobs(SHAPE, (60, 50)), blobs(SHAPE, (90, 80))])
    image = write_cards(cube, wcs_cards(CTYPE3="VELO", CRVAL3=1.0, CRPIX3=1.0, CD3_3=1.0))
    assert_same_sky(run(image, "--plane", 1).directory / "background.fits", image)


def test_the_wcs_comes_from_the_chosen_hdu(run, tmp_path):
    hdus = [fits.PrimaryHDU(blobs(SHAPE), fits.Header(wcs_cards(CRVAL1=10.0)))]
    hdus.append(fits.ImageHDU(blobs(SHAPE, (60, 50)), fits.Header(wcs_cards()), name="SCI"))
    fits.HDUList(hdus).writeto(tmp_path / "two.fits")
    fits.PrimaryHDU(hdus[1].data, hdus[1].header).writeto(tmp_path / "one.fits")
    result = run(tmp_path / "two.fits", "--hdu", "SCI")
    assert_same_sky(result.directory / "rms.fits", tmp_path / "one.fits")


def test_without_a_wcs_products_have_none(run, write, stars):
    header = fits.getheader(run(write(stars)).directory / "background.fits")
    assert not any(key.startswith(("CTYPE", "CRVAL", "WCS")) for key in header)


@pytest.mark.parametrize(
    "cards",
    [
        pytest.param(wcs_cards("RA---XYZ", "DEC--XYZ"), id="projection"),
        pytest.param(wcs_cards("RA---ZPN", "DEC--ZPN"), id="no parameters"),
        pytest.param(wcs_cards("RA---TAN", "RA---TAN"), id="twice the same axis"),
        pytest.param(
            wcs_cards("RA---TAN-SIP", "DEC--TAN-SIP", A_ORDER=2, A_2_0=1e-5), id="half of SIP"
        ),
        pytest.param(wcs_cards(CUNIT1="furlong"), id="unit"),
        pytest.param(wcs_cards(CRVAL2=200.0), id="latitude"),
        pytest.param(wcs_cards(CPDIS1="LOOKUP", DP1="EXTVER: 1"), id="no lookup table"),
        pytest.param(wcs_cards("RA---TAB", "DEC--TAB", PS1_0="WCS-TAB"), id="no -TAB table"),
    ],
)
def test_a_broken_wcs_costs_a_warning_and_no_more(run, write_cards, stars, cards):
    result = run(write_cards(stars, cards))
    assert result.code == 0
    assert len(result.err.splitlines()) == 1
    assert re.match(r"source_extractor\.py: warning: .*WCS", result.err)
    assert "CTYPE1" not in fits.getheader(result.directory / "background.fits")


# ---------------------------------------------------------------------------------------------
# Catalogue and regions
# ---------------------------------------------------------------------------------------------


def test_the_catalogue_has_one_line_of_names_and_one_a_source(nine, catalog):
    lines = (nine / "catalog.tsv").read_text().split("\n")
    assert lines[0].split("\t")[:31] == ["id", *SEP_FIELDS]
    assert lines[-1] == ""
    labels = [line.split("\t")[0] for line in lines[1:-1]]
    assert labels == [str(number) for number in range(1, len(labels) + 1)]
    assert len(labels) == fits.getdata(nine / "segmentation.fits").max()
    assert {line.count("\t") for line in lines[:-1]} == {len(catalog.columns) - 1}


def test_the_catalogues_fields_are_seps_own():
    objects = sep.extract(np.eye(9, dtype=np.float32), 0.5)
    assert list(objects.dtype.names) == SEP_FIELDS


def test_text_and_fits_catalogue_are_equal_to_the_last_digit(nine, catalog):
    table = Table.read(nine / "catalog.fits")
    assert table.colnames == list(catalog.columns)
    for name in table.colnames:
        values = np.asarray(table[name])
        np.testing.assert_array_equal(values, catalog[name].astype(values.dtype), name)


def test_the_fits_catalogue_has_a_unit_and_a_description_for_every_column(nine):
    table = Table.read(nine / "catalog.fits")
    pure_numbers = {"id", "flag", "elongation", "kron_radius", "snr", "flag_auto"}
    assert [column.name for column in table.itercols() if not column.description] == []
    assert {column.name for column in table.itercols() if column.unit is None} == pure_numbers
    assert table["flux"].unit == "nJy"
    assert table["theta"].unit == "rad"
    assert table["x2"].unit == "pix2"
    assert "thresh = 1.5" in list(fits.getheader(nine / "catalog.fits", 1)["HISTORY"])


@pytest.mark.parametrize("unit", ["ADU", "furlong", "3 Jy", "mag(AB)", "m m(", "1e-20 erg/s", 3.5])
def test_any_unit_gets_into_the_fits_catalogue(run, write, stars, tmp_path, unit):
    result = run(write(stars, BUNIT=unit), "--catalog-fits", tmp_path / "catalog.fits")
    assert result.code == 0
    assert len(fits.getdata(tmp_path / "catalog.fits", 1)) == 6
    assert fits.getheader(result.directory / "background.fits")["BUNIT"] == str(unit)


def test_every_column_is_documented_once(catalog):
    documented = [column.name for column in source_extractor.COLUMNS]
    assert documented == list(catalog.columns)
    assert all(column.description for column in source_extractor.COLUMNS)


def test_what_could_not_be_measured_is_spelled_nan(tmp_path):
    table = pd.DataFrame({"id": [1, 2], "flux": [0.1, np.nan]})
    source_extractor.write_catalog(tmp_path / "t.tsv", table)
    assert (tmp_path / "t.tsv").read_bytes() == b"id\tflux\n1\t0.1\n2\tnan\n"


def test_without_sources_the_catalogues_keep_their_columns(run, write, tmp_path, catalog):
    image = write(blobs((64, 64)))
    table, regions = tmp_path / "catalog.fits", tmp_path / "sources.reg"
    result = run(image, "--thresh", 100, "--catalog-fits", table, "--regions", regions)
    assert result.code == 0
    names = "\t".join(catalog.columns)
    assert (result.directory / "catalog.tsv").read_text() == f"{names}\n"
    assert Table.read(table).colnames == list(catalog.columns)
    assert len(Table.read(table)) == 0
    assert "ellipse" not in regions.read_text()
    assert not result.image("segmentation").any()


NUMBER = r"(-?\d+\.\d+)"


def read_regions(path, system, arc=""):
    """Return the parameters of the ellipses in a region file, and the labels behind them."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Region file format: DS9")
    shapes = lines[lines.index(system) + 1 :]
    ellipse = rf"ellipse\({NUMBER},{NUMBER},{NUMBER}{arc},{NUMBER}{arc},{NUMBER}\) # text={{(\d+)}}"
    return np.array([re.fullmatch(ellipse, line).groups() for line in shapes], dtype=float)


def test_regions_are_ellipses_in_1_based_pixels_without_a_wcs(run, write, stars, tmp_path):
    table = run(write(stars), "--regions", tmp_path / "sources.reg").catalog
    found = read_regions(tmp_path / "sources.reg", "image")
    centres, axes = table[["x", "y"]] + 1, 3 * table[["a", "b"]]
    expected = np.column_stack([centres, axes, np.degrees(table["theta"]), table["id"]])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_regions_are_ellipses_on_the_sky_with_a_wcs(nine, catalog):
    x, y, a, b, angle, label = read_regions(nine / "sources.reg", "icrs", arc='"').T
    wcs = WCS(fits.getheader(SKY))
    ra, dec = wcs.all_pix2world(catalog["x"], catalog["y"], 0)
    np.testing.assert_allclose(np.column_stack([x, y]), np.column_stack([ra, dec]), atol=2e-7)
    arcsec = 3600 * wcs.wcs.cdelt[1]
    np.testing.assert_allclose(a, 3 * catalog["a"] * arcsec, atol=1e-3)
    np.testing.assert_allclose(b, 3 * catalog["b"] * arcsec, atol=1e-3)
    # In an image with north up and east left DS9 counts its angle as theta, from +x towards +y.
    turn = (angle - np.degrees(catalog["theta"]) + 90) % 180 - 90
    np.testing.assert_allclose(turn, 0, atol=0.05)
    assert list(label) == list(catalog["id"])


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def is_red(rgb):
    red, green, blue = np.moveaxis(rgb, 2, 0)
    return (red > 0.6) & (green < 0.4) & (blue < 0.4)


class Picture:
    """A PNG of one panel, with its pixels found by the image's x and y."""

    def __init__(self, path, shape):
        self.rgb = mpl_image.imread(path)[..., :3]
        dark = self.rgb.max(axis=2) < 0.25
        columns = np.flatnonzero(dark.sum(axis=0) > 0.9 * dark.sum(axis=0).max())
        rows = np.flatnonzero(dark.sum(axis=1) > 0.9 * dark.sum(axis=1).max())
        self.left, self.right = columns[0], columns[-1]
        self.top, self.bottom = rows[0], rows[-1]
        self.ny, self.nx = shape

    @property
    def red(self):
        return is_red(self.rgb)

    @property
    def grey(self):
        """Brightness inside the frame, 0 where it is coloured."""
        flat = np.ptp(self.rgb, axis=2) < 0.02
        inside = np.zeros_like(flat)
        inside[self.top + 3 : self.bottom - 2, self.left + 3 : self.right - 2] = True
        return np.where(flat & inside, self.rgb[..., 0], 0)

    def position(self, where):
        """Return the mean x and y, in the image's pixels, of the picture's pixels `where`."""
        rows, columns = np.nonzero(where)
        scale = (self.right - self.left) / self.nx
        x = (columns.mean() - self.left) / scale - 0.5
        y = (self.bottom - rows.mean()) / scale - 0.5
        return x, y

    def place(self, x, y):
        """Return the row and column in the picture of the image's x and y."""
        scale = (self.right - self.left) / self.nx
        rows = self.bottom - (y + 0.5) * scale
        return np.rint(rows).astype(int), np.rint(self.left + (x + 0.5) * scale).astype(int)


@pytest.mark.parametrize("x", [14, 145])
@pytest.mark.parametrize("y", [12, 106])
def test_row_0_of_the_overlay_is_at_the_bottom(run, write, x, y):
    result = run(write(blobs(SHAPE, (x, y), peak=300, a=3, b=3)), "--thresh", 8)
    assert len(result.catalog) == 1
    picture = Picture(result.directory / "sources.png", SHAPE)
    grey = picture.grey
    blurred = sum(np.roll(grey, (i, j), (0, 1)) for i in range(-9, 10, 3) for j in range(-9, 10, 3))
    assert picture.position(blurred == blurred.max()) == pytest.approx((x, y), abs=2)
    assert picture.position(picture.red) == pytest.approx((x, y), abs=0.7)


@pytest.mark.parametrize("theta", [0, 0.5, -1.0])
def test_ellipses_of_6a_by_6b_are_drawn_around_every_source(run, write, theta):
    centres = [(40, 30), (110.5, 80.25), (30, 95)]
    result = run(write(blobs(SHAPE, *centres, peak=200, a=5, b=2, theta=theta)), "--thresh", 8)
    assert len(result.catalog) == 3
    assert result.catalog["theta"].to_numpy() == pytest.approx(theta, abs=0.05)
    picture = Picture(result.directory / "sources.png", SHAPE)
    red = picture.red
    near = sum(np.roll(red, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) > 0
    angle = np.linspace(0, 2 * np.pi, 60)
    for source in result.catalog.itertuples():
        along, across = 3 * source.a * np.cos(angle), 3 * source.b * np.sin(angle)
        dx = along * np.cos(source.theta) - across * np.sin(source.theta)
        dy = along * np.sin(source.theta) + across * np.cos(source.theta)
        assert near[picture.place(source.x + dx, source.y + dy)].mean() > 0.95
        inner = picture.place(source.x + 0.6 * dx, source.y + 0.6 * dy)
        assert red[inner].mean() < 0.05


def test_an_overlay_without_sources_has_no_ellipse(run, write):
    result = run(write(blobs(SHAPE, (60, 50))), "--thresh", 1000)
    picture = Picture(result.directory / "sources.png", SHAPE)
    assert not picture.red.any()
    assert picture.grey.any()


def test_the_cuts_of_the_overlay_survive_nan_and_a_bright_star(run, write):
    image = blobs(SHAPE, (100, 40))
    image[60:64, 20:24] = 1e6
    image[80:100, 60:90] = np.nan
    image[0, 0] = np.inf
    result = run(write(image))
    picture = Picture(result.directory / "sources.png", SHAPE)
    rows, columns = picture.place(np.arange(120, 155), np.arange(75, 110))
    sky = picture.rgb[np.ix_(rows, columns)][..., 0]
    low, middle, high = np.percentile(sky, [10, 50, 90])
    assert 0.05 < middle < 0.95
    assert high - low > 0.15


@pytest.mark.parametrize("shape", [(1, 500), (3000, 2), (2, 2), (1300, 2500)])
def test_the_picture_is_of_bounded_size_whatever_the_image(run, write, tmp_path, shape):
    overview = tmp_path / "overview.png"
    result = run(write(blobs(shape)), "--overview", overview)
    assert result.code == 0
    for path, limit in ((result.directory / "sources.png", 1300), (overview, 2600)):
        height, width = mpl_image.imread(path).shape[:2]
        assert 100 < height < limit
        assert 100 < width < limit


def test_a_source_is_found_in_the_reduced_picture_of_a_large_image(run, write):
    shape = (400, 2300)
    image = write(blobs(shape, (1900, 120), peak=400, a=8, b=8))
    result = run(image, "--thresh", 8, "--bw", 200, "--bh", 200)
    picture = Picture(result.directory / "sources.png", shape)
    assert picture.position(picture.red) == pytest.approx((1900, 120), abs=6)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1000), (1, 2500), (2001, 3), (1001, 1500)])
def test_shrink_takes_block_means_of_finite_values_and_block_maxima(shape):
    rng = np.random.default_rng(5)
    image = rng.normal(size=shape)
    image[rng.random(shape) < 0.3] = np.nan
    step = -(-max(shape) // source_extractor.PICTURE_SIDE)
    padded = np.pad(image, [(0, -length % step) for length in shape], constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = np.nanmean(blocks, axis=(1, 3))
    found = source_extractor.shrink(image, source_extractor.block_means)
    np.testing.assert_allclose(found, means, rtol=1e-12, atol=1e-12)
    labels = np.where(np.isnan(blocks), 0, 1000 + 100 * blocks).astype(int)
    values = np.where(np.isnan(image), 0, 1000 + 100 * image).astype(int)
    found = source_extractor.shrink(values, source_extractor.block_maxima)
    np.testing.assert_array_equal(found, labels.max(axis=(1, 3)))


def test_block_means_treat_infinity_as_no_value():
    strip = np.array([[1.0, np.inf, -np.inf, np.nan], [3.0, 4.0, np.inf, np.nan]])
    means = source_extractor.block_means(strip, np.array([0, 2]))
    np.testing.assert_array_equal(means, [8 / 3, np.nan])


def test_the_overview_has_four_panels_with_colour_bars(run, write, tmp_path):
    image = blobs(SHAPE, (40, 30), (110, 80)) + np.linspace(0, 300, NX, dtype=np.float32)
    run(write(image), "--overview", tmp_path / "overview.png", "--bw", 20, "--bh", 20)
    rgb = mpl_image.imread(tmp_path / "overview.png")[..., :3]
    height, width = (length // 2 for length in rgb.shape[:2])
    sources, background = rgb[:height, :width], rgb[:height, width:]
    rms, segmentation = rgb[height:, :width], rgb[height:, width:]

    def count(panel, *colour):
        return np.count_nonzero(np.abs(panel - np.array(colour)).max(axis=2) < 0.03)

    def has_grey_ramp(panel):
        return all(count(panel, grey, grey, grey) for grey in np.linspace(0.1, 0.9, 9))

    viridis = [(0.267, 0.005, 0.329), (0.128, 0.567, 0.551), (0.993, 0.906, 0.144)]
    assert has_grey_ramp(sources)
    assert is_red(sources).any()
    for panel in (background, rms):
        assert all(count(panel, *colour) for colour in viridis)
        assert not is_red(panel).any()
    assert count(segmentation, 0, 0, 0) > 0.2 * height * width
    coloured = Counter(map(tuple, segmentation[np.ptp(segmentation, axis=2) > 0.05]))
    labels = []
    for colour in (np.array(colour) for colour, pixels in coloured.items() if pixels > 300):
        if all(np.abs(colour - label).max() > 0.05 for label in labels):
            labels.append(colour)
    assert len(labels) == 2


# ---------------------------------------------------------------------------------------------
# The same again, and permissions
# ---------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(nine, tmp_path):
    extract(nine.with_name("nine.fits"), *all_nine(tmp_path))
    assert tree(tmp_path) == tree(nine)


def test_two_runs_give_the_same_bytes_in_tiff(write, stars, tmp_path):
    image = write(stars)
    for name in ("once", "again"):
        directory = tmp_path / name
        extract(image, "-o", directory, "--image-format", "tiff")
    assert tree(tmp_path / "once") == tree(tmp_path / "again")


def test_products_get_the_permissions_that_the_umask_leaves(write, stars, tmp_path):
    image = write(stars)
    before = os.umask(0o027)
    try:
        extract(image, *all_nine(tmp_path / "products"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "products").iterdir()}
    assert modes == dict.fromkeys(FIVE | set(ON_REQUEST.values()), 0o640)


def test_a_product_replaces_a_link_and_leaves_alone_what_it_pointed_to(run, write, stars, tmp_path):
    precious, link = tmp_path / "precious.tsv", tmp_path / "link.tsv"
    precious.write_text("precious")
    link.symlink_to(precious)
    assert run(write(stars), "--catalog", link).code == 0
    assert precious.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text().startswith("id\tthresh")


def test_older_products_are_replaced(run, write, stars):
    image = write(stars)
    first = tree(run(image, "--thresh", 1000).directory)
    again = tree(run(image).directory)
    assert again.keys() == first.keys()
    assert again["catalog.tsv"] != first["catalog.tsv"]


# ---------------------------------------------------------------------------------------------
# All or nothing
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """Return a directory that holds older products, all nine."""
    directory = tmp_path / "results"
    directory.mkdir()
    for name in FIVE | set(ON_REQUEST.values()):
        (directory / name).write_text(f"old {name}")
    return directory


FAILURES = {
    "mask of another shape": (1, ["--mask", "small.fits"]),
    "mask of everything": (1, ["--mask", "image.fits"]),
    "mask that is no image": (1, ["--mask", "note.txt"]),
    "mask that is not there": (1, ["--mask", "nowhere.fits"]),
    "kernel of even size": (1, ["--filter-case", "file", "--filter-file", "note.txt"]),
    "box outside the image": (1, ["--mask-box", "1000", "1001", "0", "0"]),
    "no background box left": (1, ["--mask-box", "2", "159", "0", "119"]),
    "plane that is not there": (1, ["--plane", "1"]),
    "target is a directory": (2, ["--catalog", "folder"]),
    "target becomes a directory": (1, ["--catalog", "new/x", "--rms", "new/x/rms.fits"]),
    "more columns than FITS has": (2, ["--aperture-diameters", *map(str, range(1, 240))]),
    "target is a device": (2, ["--overview", os.devnull]),
    "target is the image": (2, ["--background", "image.fits"]),
    "target is the image by another name": (2, ["--subtracted", "folder/../image.fits"]),
    "target is a link to the image": (2, ["--rms", "link.fits"]),
    "target is the mask": (2, ["--mask", "small.fits", "--regions", "small.fits"]),
    "target is the kernel": (
        2,
        ["--filter-case", "file", "--filter-file", "note.txt", "--regions", "note.txt"],
    ),
    "target is the measured image": (2, ["--measure-image", "small.fits", "--rms", "small.fits"]),
    "two products in one file": (2, ["--catalog", "x.tsv", "--overlay", "./x.tsv"]),
    "two products by default in one file": (2, ["--overlay", "results/catalog.tsv"]),
    "target below a file": (1, ["--catalog", "note.txt/catalog.tsv"]),
    "output directory is a file": (1, ["-o", "note.txt"]),
    "target's name too long": (1, ["--catalog", "x" * 300]),
}


@pytest.mark.parametrize(("code", "options"), FAILURES.values(), ids=FAILURES)
def test_a_failing_run_leaves_everything_as_it_was(
    write, stars, old, tmp_path, monkeypatch, capsys, code, options
):
    write(stars)
    write(stars[:50], "small.fits")
    (tmp_path / "note.txt").write_text("1 2\n3 4\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.fits").symlink_to("image.fits")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    arguments = ["image.fits", *map(str, all_nine(old.relative_to(tmp_path))), *options]
    try:
        found = source_extractor.main(arguments)
    except SystemExit as end:
        found = end.code
    err = capsys.readouterr().err
    assert found == code
    assert re.fullmatch(r"source_extractor\.py: error: .+\n", err)
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_costs_one_line(run, write, stars, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    result = run(write(stars), "--catalog", locked / "catalog.tsv")
    assert result.code == 1
    assert re.fullmatch(r"source_extractor\.py: error: .*locked.*\n", result.err)
    assert not result.directory.exists() or not tree(result.directory)


SLOW = """
import sys, time
from matplotlib.figure import Figure
import source_extractor

def wait(*args, **kwargs):
    print("drawing", flush=True)
    time.sleep(60)

Figure.savefig = wait
sys.exit(source_extractor.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_killed_leaves_everything_as_it_was(write, stars, old, tmp_path, number):
    image = write(stars)
    before = tree(tmp_path)
    command = [sys.executable, "-c", SLOW, image, "-q", *all_nine(old)]
    with subprocess.Popen(
        command,
        cwd=Path(SCRIPT).parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "drawing\n"
        assert tree(tmp_path) != before
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in err
    assert tree(tmp_path) == before


KILLED_WHILE_PUTTING_IN_PLACE = """
import os, signal, sys
import source_extractor

put = os.replace

def put_and_kill(*args, **kwargs):
    put(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)

os.replace = put_and_kill
sys.exit(source_extractor.main(sys.argv[1:]))
"""


def test_a_kill_while_products_are_put_in_place_leaves_all_old_or_all_new(
    write, stars, old, tmp_path
):
    image = write(stars)
    before = tree(old)
    command = [sys.executable, "-c", KILLED_WHILE_PUTTING_IN_PLACE, image, "-q", *all_nine(old)]
    subprocess.run(command, cwd=Path(SCRIPT).parent, check=False, timeout=60)
    after = tree(old)
    assert after.keys() == before.keys()
    replaced = [name for name in before if after[name] != before[name]]
    assert len(replaced) in (0, len(before))


@contextmanager
def largest_file(size):
    """Refuse, as a full disk would, to let any file grow beyond a size (bytes)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_to_unpack_an_image_is_not_taken_for_damage(run, write, stars):
    image = write(stars, "image.fits.gz")
    with largest_file(50_000):
        result = run(image)
    result.assert_refused("image.fits.gz", "unpacked", "TMPDIR")


@pytest.mark.parametrize(
    ("size", "options"),
    [(2000, ()), (30_000, ()), (2000, ("--image-format", "tiff"))],
    ids=["FITS", "PNG", "TIFF"],
)
def test_a_full_disk_costs_one_line_and_leaves_everything_as_it_was(
    run, write, old, tmp_path, size, options
):
    image = write(blobs((64, 64), (30, 30)))
    before = tree(tmp_path)
    with largest_file(size):
        result = run(image, "-q", "--catalog", old / "catalog.tsv", *options)
    assert result.code == 1
    assert re.fullmatch(r"source_extractor\.py: error: .*(products|results): .+\n", result.err)
    assert tree(tmp_path) == before
