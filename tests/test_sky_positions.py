"""Sky positions, against astropy's own WCS and coordinate frames."""

import re

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import ICRS, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from numpy.testing import assert_allclose

from common import rows_at
from contract import one_line
from headers import (
    ALL_SKY,
    ECLIPTIC,
    J2000,
    NO_ICRS,
    NO_WCS,
    RADIO,
    SKIES,
    cards,
    celestial_wcs,
    distorted,
)


def true_sky(path, catalog, frame):
    """Return the sources' positions by wcslib's numbers and an explicit frame."""
    wcs = celestial_wcs(path)
    world = wcs.all_pix2world(catalog["x"], catalog["y"], 0)
    lon, lat = (world[axis] * u.deg for axis in (wcs.wcs.lng, wcs.wcs.lat))
    return SkyCoord(lon, lat, frame=frame).icrs


def assert_on_sky(catalog, expected, tolerance=1e-5):
    """Compare within a tolerance in seconds of arc, right ascensions in 0 to 360 degrees."""
    assert len(catalog) == 6
    found = SkyCoord(catalog["ra"], catalog["dec"], unit="deg")
    assert found.separation(expected).arcsec.max() < tolerance
    assert catalog["ra"].between(0, 360).all()


# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SKIES)
def test_positions_are_icrs_whatever_projection_and_frame(run, write, stars, kind):
    header, frame = SKIES[kind]
    path = write(stars, **header)
    result = run(path, "--thresh", 5)
    assert result.err == ""
    assert_on_sky(result.catalog, true_sky(path, result.catalog, frame))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (cards("GLON-TAN", "GLAT-TAN", CRVAL1=0.0, CRVAL2=0.0), (266.40499, -28.93617)),
        (cards(RADESYS="FK4", EQUINOX=1950.0, CRVAL1=192.25, CRVAL2=27.4), (192.85948, 27.12825)),
    ],
    ids=["galactic centre", "north galactic pole of 1950"],
)
def test_landmarks_of_the_sky_are_where_the_books_say(run, write, stars, header, expected):
    catalog = run(write(stars, **header | {"CRPIX1": 81.3, "CRPIX2": 61.7})).catalog
    assert_allclose(rows_at(catalog, [80.3], [60.7])[["ra", "dec"]], [expected], atol=1e-4)


def test_lookup_table_distortion_counts(run, tmp_path, stars):
    distorted(stars).writeto(tmp_path / "distorted.fits")
    catalog = run(tmp_path / "distorted.fits", "--thresh", 5).catalog
    expected = true_sky(tmp_path / "distorted.fits", catalog, ICRS())
    assert_on_sky(catalog, expected)
    plain = WCS(fits.Header(cards())).pixel_to_world(*catalog[["x", "y"]].to_numpy().T)
    assert plain.separation(expected).arcsec.max() > 0.01


def test_a_radio_image_of_four_axes_has_positions(run, write, stars):
    path = write(stars[np.newaxis, np.newaxis], **RADIO)
    catalog = run(path, "--thresh", 5).catalog
    assert_on_sky(catalog, true_sky(path, catalog, J2000))


def test_ecliptic_coordinates_are_not_taken_for_equatorial(run, write, stars):
    path = write(stars, **ECLIPTIC)
    result = run(path, "--thresh", 5)
    assert re.fullmatch(one_line("warning", ".*ELON.*"), result.err)
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


def test_without_a_wcs_positions_are_nan(run, write, stars):
    result = run(write(stars))
    assert result.err == ""
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


def test_sources_beyond_the_sky_are_nan_and_the_others_are_not(run, write, stars):
    path = write(stars, **ALL_SKY | {"CDELT1": -2.2, "CDELT2": 1.5})
    catalog = run(path, "--thresh", 5).catalog
    wcs = celestial_wcs(path)
    expected = wcs.all_pix2world(catalog["x"], catalog["y"], 0)
    assert 0 < np.isnan(expected[0]).sum() < 6
    assert_allclose(catalog[["ra", "dec"]].to_numpy().T, expected)


@pytest.mark.parametrize("kind", [*NO_WCS, *NO_ICRS])
def test_a_broken_wcs_costs_the_positions_and_one_warning(run, write, stars, tmp_path, kind):
    path, regions = write(stars, **(NO_WCS | NO_ICRS)[kind]), tmp_path / "sources.reg"
    result = run(path, "--regions", regions)
    assert result.code == 0
    assert re.fullmatch(one_line("warning", ".*WCS.*"), result.err)
    assert len(result.catalog) == 6
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)
    assert "\nimage\nellipse" in regions.read_text()
    if kind in NO_WCS:
        assert "CTYPE1" not in fits.getheader(result.directory / "background.fits")


# ---------------------------------------------------------------------------------------------
# Two images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [*(header for header, _ in SKIES.values()), ALL_SKY, {}],
    ids=[*SKIES, "all sky", "none"],
)
def test_the_same_wcs_is_no_cause_for_a_warning(run, write, stars, header):
    other = write(stars, "other.fits", **header)
    result = run(write(stars, **header), "--thresh", 5, "--measure-image", other)
    assert result.code == 0
    assert result.err == ""


def test_the_same_sky_in_another_frame_is_no_cause_for_a_warning(run, write, stars):
    centre = SkyCoord(cards()["CRVAL1"], cards()["CRVAL2"], unit="deg")
    fk5 = cards(RADESYS="FK5", EQUINOX=2000.0)
    fk5["CRVAL1"], fk5["CRVAL2"] = centre.fk5.ra.deg, centre.fk5.dec.deg
    result = run(write(stars, **cards()), "--measure-image", write(stars, "other.fits", **fk5))
    assert result.err == ""


@pytest.mark.parametrize(
    "change",
    [{"CRPIX1": 83.12}, {"CRVAL2": -54.35}, {"CD1_1": 8.66e-5}, {"RADESYS": "FK4"}],
    ids=["shift", "pointing", "mirrored", "frame"],
)
def test_another_wcs_costs_a_warning_and_the_pixels_are_measured(run, write, stars, change):
    plain = run(write(stars, **cards()), "--thresh", 5).catalog
    other = write(stars, "other.fits", **cards(**change))
    result = run(write(stars, "again.fits", **cards()), "--thresh", 5, "--measure-image", other)
    assert result.code == 0
    assert re.fullmatch(one_line("warning", r".*other\.fits.*WCS.*"), result.err)
    assert_allclose(result.catalog, plain)


def test_a_wcs_that_cannot_be_compared_is_said_to_be_one(run, write, stars):
    other = write(stars, "other.fits", **ECLIPTIC)
    result = run(write(stars, **cards()), "--measure-image", other)
    assert result.code == 0
    assert re.fullmatch(one_line("warning", ".*can't be compared.*"), result.err)


def test_positions_come_from_the_detection_image(run, write, stars):
    other = write(stars, "other.fits", **cards(CRPIX1=83.12))
    path = write(stars, **cards())
    catalog = run(path, "--thresh", 5, "--measure-image", other).catalog
    assert_on_sky(catalog, true_sky(path, catalog, ICRS()))
