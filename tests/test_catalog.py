"""The catalogue: its columns, its text, and the FITS table with units and descriptions."""

import re

import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.io.votable.ucd import check_ucd
from astropy.table import Table
from numpy.testing import assert_allclose

from common import SHAPE, read_catalog
from contract import COLUMNS
from headers import cards
from sky import blobs
from source_extractor import unit_of_sums

# Columns and text

DIAMETERS = "0.25", "1000", "12.3456789"
WITH_APERTURES = COLUMNS + [
    f"{quantity}_aper_{diameter}"
    for diameter in DIAMETERS
    for quantity in ("flux", "fluxerr", "mag", "magerr")
]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (COLUMNS, ["--err-option", "none", "--thresh", 5]),
        (COLUMNS, ["--err-option", "array_rms", "--gain", 2, "--zeropoint", 25]),
        (WITH_APERTURES, ["--aperture-diameters", *DIAMETERS]),
    ],
)
def test_the_columns_are_the_same_for_any_input_and_four_for_each_aperture_follow(
    run, write, stars, columns, options
):
    assert list(read_catalog(run(write(stars), *options).directory)) == columns


def assert_rounded(directory):
    """Demand that the text is the FITS table, to ten digits or, of ra and dec, to twelve."""
    table = fits.getdata(directory / "catalog.fits", 1)
    text = pd.read_csv(directory / "catalog.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(text) == table.columns.names
    for name in text:
        digits = 12 if name in ("ra", "dec") else 10
        assert list(text[name]) == [f"{value:.{digits}g}" for value in table[name].tolist()], name
    return text


def test_the_text_is_the_fits_table_to_ten_digits(everything):
    number = fits.getdata(everything / "segmentation.fits").max()
    assert list(assert_rounded(everything)["id"]) == [str(label) for label in range(1, number + 1)]
    assert (everything / "catalog.tsv").read_text().count("\n") == 1 + number


def test_whole_numbers_have_no_point_and_unknown_ones_are_nan(run, write, stars, tmp_path):
    table = tmp_path / "products" / "catalog.fits"
    options = "--err-option", "none", "--thresh", 5, "--catalog-fits", table
    rows = assert_rounded(run(write(stars), *options).directory)
    assert set(rows["thresh"]) == {"5"}
    assert {*rows["ra"], *rows["dec"]} == {"nan"}


def test_without_sources_the_catalogues_keep_their_columns(run, write, tmp_path):
    table, regions = tmp_path / "catalog.fits", tmp_path / "sources.reg"
    options = ("--thresh", 100, "--catalog-fits", table, "--regions", regions)
    result = run(write(blobs((64, 64))), *options, "--aperture-diameters", *DIAMETERS)
    assert result.code == 0
    assert "warning: no sources" in result.err
    assert (result.directory / "catalog.tsv").read_text() == "\t".join(WITH_APERTURES) + "\n"
    assert (Table.read(table).colnames, len(Table.read(table))) == (WITH_APERTURES, 0)
    assert "ellipse" not in regions.read_text()
    assert not result.image("segmentation").any()


# FITS table


def test_columns_have_units_but_for_pure_numbers(everything):
    expected = {name: "nJy" for name in ("flux", "background", "rms", "flux_auto", "fluxerr_auto")}
    expected |= {name: "pix" for name in ("fwhm", "flux_radius", "xwin", "ywin")}
    expected |= {"flux_aper_5": "nJy", "fluxerr_aper_5": "nJy", "x2": "pix2", "theta": "rad"}
    expected |= {name: "mag" for name in ("mag_auto", "magerr_auto", "mag_aper_7.5")}
    expected |= {"magerr_aper_7.5": "mag", "ra": "deg", "dec": "deg"}
    units = {
        column.name: column.unit for column in Table.read(everything / "catalog.fits").itercols()
    }
    assert {name: units[name].to_string() for name in expected} == expected
    pure_numbers = {"id", "flag", "elongation", "kron_radius", "snr", "detection_snr", "flag_auto"}
    assert {name for name, unit in units.items() if unit is None} == pure_numbers


def test_the_fits_table_tells_how_it_was_made_and_what_its_columns_are(everything):
    header = fits.getheader(everything / "catalog.fits", 1)
    assert "thresh = 1.5" in list(header["HISTORY"])
    numbers = range(1, header["TFIELDS"] + 1)
    descriptions = {header[f"TCOMM{number}"] for number in numbers}
    assert len(descriptions - {""}) == len(numbers)
    for number in numbers:
        ucd = header[f"TUCD{number}"]
        assert check_ucd(ucd, check_controlled_vocabulary=True), header[f"TTYPE{number}"]


# Units


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("Jy/beam", u.Jy * u.pix / u.beam),
        ("JY/BEAM", u.Jy * u.pix / u.beam),
        ("Jy/beam.km/s", u.Jy * u.pix / u.beam * u.km / u.s),
        ("MJy/sr", u.MJy * u.pix / u.sr),
        ("Jy/arcsec2", u.Jy * u.pix / u.arcsec**2),
        ("1e-20 erg/s/cm2/arcsec2", 1e-20 * u.erg / u.s / u.cm**2 * u.pix / u.arcsec**2),
        ("adu/pixel", u.adu),
        ("DN/pixel", u.Unit("DN")),
        ("ct/s/pix", u.ct / u.s),
        ("1/pixel", u.dimensionless_unscaled),
    ],
)
def test_a_sum_of_pixels_in_a_unit_per_area_is_in_another(unit, expected):
    found = unit_of_sums(unit)
    assert u.Unit(found).is_equivalent(expected)
    assert u.Unit(found).to(expected) == pytest.approx(1)
    assert "per" not in found


def test_a_sum_of_pixels_in_any_other_unit_is_in_it():
    units = ["ADU", "nJy", "erg/s/cm2/Angstrom", "W m-2", "K", "counts/pixel", "furlong", "m m("]
    units += ["mag(AB)", "dex(cm/s2)", "10**(99999999) Jy/beam", "3 Jy", "1e-20 erg/s"]
    assert [unit_of_sums(unit) for unit in units] == units


@pytest.mark.parametrize(
    ("unit", "summed"),
    [
        *(("Jy/beam", "Jy pix beam-1"), ("1/pixel", ""), ("10**(99999999) Jy/beam", None)),
        *(("m m(", None), ("mag(AB)", None), ("furlong", None), (3.5, None)),
    ],
)
def test_any_unit_gets_into_the_fits_catalogue(run, write, stars, tmp_path, unit, summed):
    table = tmp_path / "catalog.fits"
    result = run(write(stars, BUNIT=unit), "--catalog-fits", table, "--aperture-diameters", "5")
    assert (result.code, result.err.count("\n")) == (0, unit == "mag(AB)")  # a warning
    assert fits.getheader(result.directory / "background.fits")["BUNIT"] == str(unit)
    header = fits.getheader(table, 1)
    units = {header[f"TTYPE{n}"]: header.get(f"TUNIT{n}", "") for n in range(1, len(COLUMNS) + 5)}
    levels = "thresh", "cpeak", "peak", "background", "rms"
    sums = "cflux", "flux", "flux_auto", "fluxerr_auto", "flux_aper_5", "fluxerr_aper_5"
    assert {units[name] for name in levels} == {str(unit)}
    assert {units[name] for name in sums} == {str(unit) if summed is None else summed}
    assert len(fits.getdata(table, 1)) == 6


def test_astropy_reads_the_units_which_are_those_of_the_image_that_was_measured(
    run, write, stars, tmp_path
):
    detection = write(stars, "detection.fits", BUNIT="adu/pixel")
    other = write(stars, "other.fits", BUNIT="MJy/sr")
    run(detection, "--measure-image", other, "--catalog-fits", tmp_path / "catalog.fits")
    table = Table.read(tmp_path / "catalog.fits")
    assert (table["peak"].unit, table["flux"].unit) == (u.adu / u.pix, u.adu)
    assert table["background"].unit == u.MJy / u.sr
    assert table["flux_auto"].unit == u.MJy * u.pix / u.sr


# The beam of the image in pixels, wide and narrow, and its scale in degrees a pixel.
BEAM, SCALE = (5.0, 4.0), 1e-3
RADIO = cards("RA---SIN", "DEC--SIN", SCALE, BUNIT="Jy/beam", BPA=90.0)
RADIO |= {"BMAJ": BEAM[0] * SCALE, "BMIN": BEAM[1] * SCALE}
AREA = np.pi / (4 * np.log(2)) * np.prod(BEAM)


def beams_told(result):
    assert result.code == 0
    told = re.findall(r"^beam area +([\d.]+) pixels", result.out, re.MULTILINE)
    return [float(number) for number in told]


def test_a_flux_divided_by_the_beam_is_that_of_the_source(run, write):
    sigma = dict(zip("ab", np.divide(BEAM, np.sqrt(8 * np.log(2))), strict=True))
    image = blobs(SHAPE, (40, 60), level=0, noise=1e-3, peak=2.5, **sigma)  # Jy a beam
    image += blobs(SHAPE, (110, 50), level=0, noise=0, peak=1.0, **sigma)
    result = run(write(image, **RADIO), "--thresh", 20, "--aperture-diameters", "30")
    (beam,) = beams_told(result)
    assert beam == pytest.approx(AREA, rel=1e-5)
    assert_allclose(sorted(result.catalog["flux_aper_30"] / beam), [1.0, 2.5], rtol=0.01)


@pytest.mark.parametrize(
    "change",
    [{"BUNIT": "Jy"}, {"BMIN": None}, {"BMAJ": 0.0}, {"CTYPE1": "", "CTYPE2": ""}],
    ids=["not per beam", "no beam", "of size 0", "no WCS"],
)
def test_a_beam_that_is_not_known_is_not_told(run, write, stars, change):
    assert beams_told(run(write(stars, **RADIO | change))) == []


def test_the_beam_of_the_measure_image_is_told_too(run, write, stars):
    other = write(stars, "other.fits", **RADIO | {"BMAJ": 8e-3})
    result = run(write(stars, **RADIO), "--measure-image", other)
    assert_allclose(beams_told(result), [AREA, 8 / 5 * AREA], rtol=1e-5)
