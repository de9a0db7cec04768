"""Units: of the image for its pixels, another for their sums where it is one per area."""

import math
import re

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import Table
from numpy.testing import assert_allclose

from sky import blobs

SUMS = ("cflux", "flux", "flux_auto", "fluxerr_auto", "flux_aper_5", "fluxerr_aper_5")
LEVELS = ("thresh", "cpeak", "peak", "background", "rms")


@pytest.fixture
def units_of(run, write, stars, tmp_path):
    """Return a function that gives the units of the FITS catalogue for a BUNIT, as text."""

    def units(unit):
        table = tmp_path / "catalog.fits"
        result = run(write(stars, BUNIT=unit), "--catalog-fits", table, "--aperture-diameters", "5")
        assert (result.code, result.err) == (0, "")
        header = fits.getheader(table, 1)
        names = {header[f"TTYPE{n}"]: n for n in range(1, header["TFIELDS"] + 1)}
        assert {header.get(f"TUNIT{names[name]}") for name in LEVELS} == {unit}
        (summed,) = {header.get(f"TUNIT{names[name]}", "") for name in SUMS}
        return summed

    return units


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("Jy/beam", u.Jy * u.pix / u.beam),
        ("mJy beam-1", u.mJy * u.pix / u.beam),
        ("JY/BEAM", u.Jy * u.pix / u.beam),
        ("Jy/beam.km/s", u.Jy * u.pix / u.beam * u.km / u.s),
        ("MJy/sr", u.MJy * u.pix / u.sr),
        ("Jy/arcsec2", u.Jy * u.pix / u.arcsec**2),
        ("1e-20 erg/s/cm2/arcsec2", 1e-20 * u.erg / u.s / u.cm**2 * u.pix / u.arcsec**2),
        ("adu/pixel", u.adu),
        ("ct/s/pix", u.ct / u.s),
        ("DN/pixel", u.Unit("DN")),
        ("electron/s/pix", u.electron / u.s),
        ("1/pixel", u.dimensionless_unscaled),
    ],
)
def test_a_sum_of_pixels_in_a_unit_per_area_is_in_another(units_of, unit, expected):
    found = units_of(unit)
    assert u.Unit(found).is_equivalent(expected)
    assert u.Unit(found).to(expected) == pytest.approx(1)
    assert "per" not in found


@pytest.mark.parametrize(
    "unit",
    [
        *("adu", "nJy", "erg/s/cm2/Angstrom", "W m-2", "K", "counts/pixel", "furlong", "m m("),
        *("mag(AB)", "dex(cm/s2)", "10**(99999999) Jy/beam"),
    ],
)
def test_a_sum_of_pixels_in_any_other_unit_is_in_it(units_of, unit):
    assert units_of(unit) == unit


def test_astropy_reads_the_units_of_the_table(run, write, stars, tmp_path):
    run(write(stars, BUNIT="Jy/beam"), "--catalog-fits", tmp_path / "catalog.fits")
    table = Table.read(tmp_path / "catalog.fits")
    assert table["flux_auto"].unit == u.Jy * u.pix / u.beam
    assert table["peak"].unit == u.Jy / u.beam


def test_units_of_sums_follow_the_image_that_was_summed(run, write, stars, tmp_path):
    other = write(stars, "other.fits", BUNIT="MJy/sr")
    path = write(stars, BUNIT="adu/pixel")
    run(path, "--measure-image", other, "--catalog-fits", tmp_path / "catalog.fits")
    table = Table.read(tmp_path / "catalog.fits")
    assert table["flux"].unit == u.adu
    assert table["flux_auto"].unit == u.MJy * u.pix / u.sr


# The beam of the image in pixels, wide and narrow, and its scale in degrees a pixel.
BEAM, SCALE = (5.0, 4.0), 1e-3
RADIO = {
    **{"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "CRVAL1": 83.6, "CRVAL2": 22.0},
    **{"CRPIX1": 70.5, "CRPIX2": 50.5, "CDELT1": -SCALE, "CDELT2": SCALE},
    **{"BMAJ": BEAM[0] * SCALE, "BMIN": BEAM[1] * SCALE, "BPA": 90.0, "BUNIT": "Jy/beam"},
}


def beam_told(result):
    return [float(number) for number in re.findall(r"^beam +([\d.]+) pixels", result.out, re.M)]


def test_a_flux_divided_by_the_beam_is_that_of_the_source(run, write):
    y, x = np.indices((120, 160))
    image = np.random.default_rng(3).normal(0, 1e-3, (120, 160))
    for x0, y0, flux in ((40, 60, 2.5), (110, 50, 1.0)):  # Jy, the peak of a point source
        image += flux * np.exp(
            -4 * math.log(2) * (((x - x0) / BEAM[0]) ** 2 + ((y - y0) / BEAM[1]) ** 2)
        )
    path = write(image.astype(np.float32), **RADIO)
    result = run(path, "--thresh", 20, "--aperture-diameters", "30")
    (beam,) = beam_told(result)
    assert beam == pytest.approx(np.pi / (4 * np.log(2)) * 20, rel=1e-5)
    assert_allclose(sorted(result.catalog["flux_aper_30"] / beam), [1.0, 2.5], rtol=0.01)


@pytest.mark.parametrize(
    "change",
    [{"BUNIT": "Jy"}, {"BMIN": None}, {"BMAJ": 0.0}, {"CTYPE1": "", "CTYPE2": ""}],
    ids=["not per beam", "no beam", "of size 0", "no WCS"],
)
def test_a_beam_that_is_not_known_is_not_told(run, write, stars, change):
    result = run(write(stars, **RADIO | change))
    assert result.code == 0
    assert beam_told(result) == []


def test_the_beam_of_the_measure_image_is_told_too(run, write):
    image = blobs((120, 160), (40, 30), (100, 80), peak=40, seed=7)
    other = write(image, "other.fits", **RADIO | {"BMAJ": 8e-3})
    result = run(write(image, **RADIO), "--measure-image", other)
    assert_allclose(beam_told(result), np.pi / (4 * np.log(2)) * np.array([20, 32]), rtol=1e-5)
