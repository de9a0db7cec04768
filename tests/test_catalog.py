"""The catalogue: its columns, its text, and the FITS table with units and descriptions."""

import math
import re
from decimal import Context, Decimal

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits
from astropy.io.votable.ucd import check_ucd
from astropy.table import Table

from common import read_catalog, table_path
from contract import COLUMNS, SEP_FIELDS
from sky import blobs, tan_wcs

# ---------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------


def fits_with_wcs(path, image):
    fits.writeto(path, image, tan_wcs(image.shape).to_header())


def fits_without_wcs(path, image):
    fits.writeto(path, image)


def noise_alone(path, image):
    fits.writeto(path, image[:40, 50:110] * 0 + np.float32(3))


@pytest.mark.parametrize(
    ("write_input", "options"),
    [
        (fits_with_wcs, []),
        (fits_without_wcs, []),
        (tifffile.imwrite, []),
        (fits_without_wcs, ["--thresh", 1000]),
        (noise_alone, []),
        (fits_without_wcs, ["--err-option", "none", "--thresh", 5]),
        (fits_without_wcs, ["--err-option", "array_rms", "--gain", 2, "--zeropoint", 25]),
    ],
    ids=["wcs", "no-wcs", "tiff", "no-sources", "constant", "absolute", "array"],
)
def test_the_columns_are_the_same_whatever_the_input(run, tmp_path, stars, write_input, options):
    write_input(tmp_path / "image", stars)
    assert list(run(tmp_path / "image", *options).catalog) == COLUMNS


@pytest.mark.parametrize("thresh", [1.5, 1000], ids=["sources", "no-sources"])
@pytest.mark.parametrize(
    "diameters", [["5"], ["7.5", "5"], ["0.25", "1000", "12.3456789"]], ids=len
)
def test_each_aperture_adds_four_columns_in_the_order_given(run, write, stars, diameters, thresh):
    result = run(write(stars), "--aperture-diameters", *diameters, "--thresh", thresh)
    assert list(result.catalog)[len(COLUMNS) :] == [
        f"{quantity}_aper_{diameter}"
        for diameter in diameters
        for quantity in ("flux", "fluxerr", "mag", "magerr")
    ]


def test_the_catalogues_fields_are_seps_own():
    objects = sep.extract(np.eye(9, dtype=np.float32), 0.5)
    assert list(objects.dtype.names) == SEP_FIELDS


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def test_the_catalogue_has_one_line_of_names_and_one_a_source(nine):
    lines = (nine / "catalog.tsv").read_text().split("\n")
    assert lines[-1] == ""
    labels = [line.split("\t")[0] for line in lines[1:-1]]
    assert labels == [str(number) for number in range(1, len(labels) + 1)]
    assert len(labels) == fits.getdata(nine / "segmentation.fits").max()
    assert {line.count("\t") for line in lines[:-1]} == {len(read_catalog(nine).columns) - 1}


def assert_rounded(directory):
    """Demand that the text is the FITS table, to ten digits or, of ra and dec, to twelve."""
    table = fits.getdata(table_path(directory), 1)
    text = pd.read_csv(directory / "catalog.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(text) == table.columns.names
    for name in text:
        rounding = Context(prec=12 if name in ("ra", "dec") else 10)
        for written, value in zip(text[name], table[name].tolist(), strict=True):
            if math.isnan(value):
                assert written == "nan", name
            else:
                assert Decimal(written) == rounding.create_decimal(value), name
                assert re.fullmatch(r"-?\d+(\.\d*[1-9])?(e[-+]\d+)?", written), name


def test_the_text_is_the_fits_table_to_ten_digits(nine):
    assert_rounded(nine)


def test_whole_numbers_have_no_point_and_unknown_ones_are_nan(run, write, stars):
    result = run(write(stars), "--err-option", "none", "--thresh", 5)
    assert_rounded(result.directory)
    rows = pd.read_csv(result.directory / "catalog.tsv", sep="\t", dtype=str, na_filter=False)
    assert set(rows["thresh"]) == {"5"}
    assert {*rows["ra"], *rows["dec"]} == {"nan"}


def test_without_sources_the_catalogues_keep_their_columns(run, write, tmp_path):
    image = write(blobs((64, 64)))
    table, regions = tmp_path / "catalog.fits", tmp_path / "sources.reg"
    result = run(image, "--thresh", 100, "--catalog-fits", table, "--regions", regions)
    assert result.code == 0
    assert "warning: no sources" in result.err
    assert (result.directory / "catalog.tsv").read_text() == "\t".join(COLUMNS) + "\n"
    assert Table.read(table).colnames == COLUMNS
    assert len(Table.read(table)) == 0
    assert "ellipse" not in regions.read_text()
    assert not result.image("segmentation").any()


# ---------------------------------------------------------------------------------------------
# FITS table
# ---------------------------------------------------------------------------------------------

UNITS = {
    "flux": "nJy",
    "theta": "rad",
    "x2": "pix2",
    "ra": "deg",
    "dec": "deg",
    "fwhm": "pix",
    "background": "nJy",
    "rms": "nJy",
    "flux_auto": "nJy",
    "fluxerr_auto": "nJy",
    "mag_auto": "mag",
    "magerr_auto": "mag",
    "flux_radius": "pix",
    "xwin": "pix",
    "ywin": "pix",
    "flux_aper_5": "nJy",
    "fluxerr_aper_5": "nJy",
    "mag_aper_7.5": "mag",
    "magerr_aper_7.5": "mag",
}


@pytest.fixture
def table(nine):
    return Table.read(nine / "catalog.fits")


@pytest.mark.parametrize("name", UNITS)
def test_columns_have_units(table, name):
    assert table[name].unit.to_string() == UNITS[name]


def test_only_pure_numbers_have_no_unit(table):
    pure_numbers = {"id", "flag", "elongation", "kron_radius", "snr", "flag_auto"}
    assert {column.name for column in table.itercols() if column.unit is None} == pure_numbers


def test_every_column_has_a_description_of_its_own(nine):
    header = fits.getheader(nine / "catalog.fits", 1)
    descriptions = [header[f"TCOMM{number}"] for number in range(1, header["TFIELDS"] + 1)]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions)


def test_the_fits_catalogue_tells_how_it_was_made(nine):
    assert "thresh = 1.5" in list(fits.getheader(nine / "catalog.fits", 1)["HISTORY"])


def test_every_column_has_a_ucd_of_the_ivoa(nine):
    header = fits.getheader(nine / "catalog.fits", 1)
    for number in range(1, header["TFIELDS"] + 1):
        ucd = header[f"TUCD{number}"]
        assert check_ucd(ucd, check_controlled_vocabulary=True), header[f"TTYPE{number}"]


def test_measured_columns_have_the_unit_of_the_measured_image(run, write, stars, tmp_path):
    detection = write(stars, "detection.fits", BUNIT="adu")
    other = write(stars, "other.fits", BUNIT="nJy")
    run(detection, "--measure-image", other, "--catalog-fits", tmp_path / "catalog.fits")
    table = Table.read(tmp_path / "catalog.fits")
    assert str(table["flux"].unit) == "adu"
    assert str(table["flux_auto"].unit) == str(table["background"].unit) == "nJy"


@pytest.mark.parametrize("unit", ["ADU", "furlong", "3 Jy", "mag(AB)", "m m(", "1e-20 erg/s", 3.5])
def test_any_unit_gets_into_the_fits_catalogue(run, write, stars, tmp_path, unit):
    result = run(write(stars, BUNIT=unit), "--catalog-fits", tmp_path / "catalog.fits")
    assert result.code == 0
    assert len(fits.getdata(tmp_path / "catalog.fits", 1)) == 6
    assert fits.getheader(result.directory / "background.fits")["BUNIT"] == str(unit)
