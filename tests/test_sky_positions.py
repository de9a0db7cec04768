"""Sky positions and regions, against astropy's own WCS and coordinate frames."""

import re
import warnings

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import FK4, FK5, ICRS, Galactic, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable
from numpy.testing import assert_allclose

import source_extractor

SHAPE = (120, 160)
J2000, B1950 = FK5(equinox="J2000"), FK4(equinox="B1950")


def cards(lon="RA---TAN", lat="DEC--TAN", scale=1e-4, **more):
    """Return the header of a celestial WCS turned by 30 degrees, `scale` degrees a pixel."""
    cos, sin = scale * np.cos(np.pi / 6), scale * np.sin(np.pi / 6)
    return {
        **{"CTYPE1": lon, "CTYPE2": lat, "CUNIT1": "deg", "CUNIT2": "deg"},
        **{"CRVAL1": 210.8, "CRVAL2": -54.3, "CRPIX1": 80.12, "CRPIX2": 45.67},
        **{"CD1_1": -cos, "CD1_2": sin, "CD2_1": sin, "CD2_2": cos},
        **more,
    }


SIP = {"A_ORDER": 3, "B_ORDER": 2, "A_2_0": 1.1e-5, "A_0_3": 2e-8, "B_1_1": -3e-5, "B_0_2": 2e-5}
TPV = {"PV1_0": 1e-4, "PV1_1": 1.01, "PV1_2": 2e-3, "PV1_4": 0.05, "PV2_1": 0.99, "PV2_6": -0.04}
LATITUDE_FIRST = {"CRVAL1": 2.5, "CRVAL2": 150.25}

SKIES = {
    "TAN": (cards(), ICRS()),
    "SIP": (cards("RA---TAN-SIP", "DEC--TAN-SIP", **SIP), ICRS()),
    "TPV": (cards("RA---TPV", "DEC--TPV", **TPV), ICRS()),
    "ZPN": (cards("RA---ZPN", "DEC--ZPN", PV2_1=1.0, PV2_3=45.0), ICRS()),
    "mirrored": (cards(CD1_1=8.6e-5, CD2_1=-5e-5), ICRS()),
    "near the pole": (cards(CRVAL2=89.999), ICRS()),
    "over 0 hours": (cards(CRVAL1=0.0), ICRS()),
    "latitude first": (cards("DEC--TAN", "RA---TAN", **LATITUDE_FIRST), ICRS()),
    "FK5": (cards(RADESYS="FK5", EQUINOX=2000.0), J2000),
    "FK5 of another year": (cards(RADESYS="FK5", EQUINOX=1975.0), FK5(equinox="J1975")),
    "FK4": (cards(RADESYS="FK4", EQUINOX=1950.0), B1950),
    "no frame, 1950": (cards(EQUINOX=1950.0), B1950),
    "galactic": (cards("GLON-CAR", "GLAT-CAR", CRVAL1=120.0, CRVAL2=0.0), Galactic()),
    "galactic of 2000": (cards("GLON-TAN", "GLAT-TAN", EQUINOX=2000.0), Galactic()),
    "galactic, FK5": (cards("GLON-TAN", "GLAT-TAN", RADESYS="FK5", EQUINOX=2000.0), Galactic()),
}

ALL_SKY = {
    **{"CTYPE1": "RA---AIT", "CTYPE2": "DEC--AIT", "CRPIX1": 80.5, "CRPIX2": 60.5},
    **{"CDELT1": -2.0, "CDELT2": 1.3},
}


@pytest.fixture
def put(tmp_path, stars):
    """Return a function that writes the stars with a header and returns the path."""

    def write_fits(header, name="image.fits", data=stars):
        fits.writeto(tmp_path / name, data, fits.Header(header))
        return tmp_path / name

    return write_fits


@pytest.fixture
def ellipses(run, tmp_path):
    """Return a function that runs the tool and returns catalogue, system and parsed regions."""

    def run_tool(*arguments):
        path = tmp_path / "sources.reg"
        catalog = run(*arguments, "--regions", path).catalog
        lines = path.read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("ellipse"))
        number = r"([-+.\de]+)"
        shape = re.compile(
            rf'ellipse\({number},{number},{number}"?,{number}"?,{number}\) # text={{(\d+)}}'
        )
        assert lines[0].startswith("# Region file format: DS9")
        found = [shape.fullmatch(line) for line in lines[start:]]
        assert all(found), lines[start:]
        return catalog, lines[start - 1], np.array([match.groups() for match in found], dtype=float)

    return run_tool


def quiet_wcs(path):
    with warnings.catch_warnings(), fits.open(path) as hdus:
        warnings.simplefilter("ignore")
        return WCS(hdus[0].header, hdus).celestial


def true_sky(path, catalog, frame):
    """Return the sources' positions by wcslib's numbers and an explicit frame."""
    wcs = quiet_wcs(path)
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
def test_positions_are_icrs_whatever_projection_and_frame(run, put, kind):
    header, frame = SKIES[kind]
    path = put(header)
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
def test_landmarks_of_the_sky_are_where_the_books_say(header, expected):
    wcs = WCS(fits.Header(header))
    found = source_extractor.sky_positions(wcs, np.array([79.12]), np.array([44.67]))
    assert_allclose(np.ravel(found), expected, atol=1e-4)


def test_lookup_table_distortion_counts(run, tmp_path, stars):
    wcs = WCS(fits.Header(cards()))
    shifts = np.random.default_rng(1).normal(0, 0.5, (2, 7, 9)).astype(np.float32)
    wcs.cpdis1, wcs.cpdis2 = (
        DistortionLookupTable(table, (1, 1), (1, 1), (20, 20)) for table in shifts
    )
    hdus = wcs.to_fits(relax=True)
    hdus[0].data = stars
    hdus.writeto(tmp_path / "distorted.fits")
    catalog = run(tmp_path / "distorted.fits", "--thresh", 5).catalog
    expected = true_sky(tmp_path / "distorted.fits", catalog, ICRS())
    assert_on_sky(catalog, expected)
    plain = WCS(fits.Header(cards())).pixel_to_world(*catalog[["x", "y"]].to_numpy().T)
    assert plain.separation(expected).arcsec.max() > 0.01


def test_a_radio_image_of_four_axes_has_positions(run, put, stars):
    header = {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "CTYPE3": "FREQ", "CTYPE4": "STOKES"}
    header |= {"CRVAL1": 83.6, "CRVAL2": 22.0, "CRVAL3": 1.4e9, "CRVAL4": 1.0, "CRPIX1": 70.5}
    header |= {"CDELT1": -0.001, "CDELT2": 0.001, "CDELT3": 1e6, "CRPIX2": 50.5, "CUNIT3": "Hz"}
    header |= {"RADESYS": "FK5", "EQUINOX": 2000.0}
    path = put(header, data=stars[np.newaxis, np.newaxis])
    catalog = run(path, "--thresh", 5).catalog
    assert_on_sky(catalog, true_sky(path, catalog, J2000))


def test_ecliptic_coordinates_are_not_taken_for_equatorial(run, put):
    path = put(cards("ELON-TAN", "ELAT-TAN", CRVAL1=30.0, CRVAL2=10.0))
    result = run(path, "--thresh", 5)
    assert re.fullmatch(r"source_extractor\.py: warning: .*ELON.*\n", result.err)
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


def test_without_a_wcs_positions_are_nan(run, put):
    result = run(put({}))
    assert result.err == ""
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


def test_sources_beyond_the_sky_are_nan_and_the_others_are_not(run, put):
    path = put(ALL_SKY | {"CDELT1": -2.2, "CDELT2": 1.5})
    catalog = run(path, "--thresh", 5).catalog
    wcs = quiet_wcs(path)
    expected = wcs.all_pix2world(catalog["x"], catalog["y"], 0)
    assert 0 < np.isnan(expected[0]).sum() < 6
    assert_allclose(catalog[["ra", "dec"]].to_numpy().T, expected)


BROKEN = {
    "singular": {"CD1_1": 1e-4, "CD1_2": 1e-4, "CD2_1": 1e-4, "CD2_2": 1e-4},
    "zero": {"CD1_1": 0.0, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 0.0},
    "projection": {"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"},
    "projections": {"CTYPE2": "DEC--SIN"},
    "systems": {"CTYPE2": "GLAT-TAN"},
    "twice the same": {"CTYPE2": "RA---TAN"},
    "frame": {"RADESYS": "NONSENSE"},
    "apparent place": {"RADESYS": "GAPPT"},
    "unit": {"CUNIT1": "furlong"},
    "beyond the pole": {"CRVAL2": 200.0},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_wcs_costs_the_positions_and_one_warning(ellipses, run, put, kind):
    path = put(cards(**BROKEN[kind]))
    result = run(path)
    assert result.code == 0
    assert re.fullmatch(r"source_extractor\.py: warning: .*WCS.*\n", result.err)
    assert len(result.catalog) == 6
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)
    _, system, _ = ellipses(path)
    assert system == "image"


# ---------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------


def pixels(wcs, sky):
    return np.array(wcs.world_to_pixel(sky))


def assert_ellipses_lie_on_the_sources(catalog, regions, wcs, tolerance):
    """Turn sky ellipses into pixels by DS9's rule: angles count from west through north."""
    ra, dec, major, minor, angle, label = regions.T
    assert list(label) == list(catalog["id"])
    centre = SkyCoord(ra, dec, unit="deg")
    x, y, theta = (catalog[name].to_numpy() for name in ("x", "y", "theta"))
    assert_allclose(pixels(wcs, centre), [x, y], atol=tolerance)
    along = 3 * catalog["a"].to_numpy() * np.array([np.cos(theta), np.sin(theta)])
    end = centre.directional_offset_by((angle - 90) * u.deg, major * u.arcsec)
    reached = pixels(wcs, end) - [x, y]
    reached *= np.sign(np.sum(reached * along, axis=0))
    assert_allclose(reached, along, atol=tolerance)
    side = centre.directional_offset_by(angle * u.deg, minor * u.arcsec)
    assert_allclose(np.hypot(*(pixels(wcs, side) - [x, y])), 3 * catalog["b"], rtol=0.02)


@pytest.mark.parametrize("kind", SKIES)
def test_sky_ellipses_lie_on_the_sources(ellipses, put, kind):
    header, frame = SKIES[kind]
    path = put(header)
    catalog, system, regions = ellipses(path, "--thresh", 5)
    assert system == "icrs"
    wcs = quiet_wcs(path)
    assert wcs.pixel_to_world(0, 0).frame.is_equivalent_frame(frame)
    assert_ellipses_lie_on_the_sources(catalog, regions, wcs, tolerance=0.01)


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-2], ids=["3.6 uas", "0.36 mas", "36 arcsec"])
def test_sky_ellipses_are_precise_at_any_scale(ellipses, put, scale):
    path = put(cards("RA---SIN", "DEC--SIN", scale=scale))
    catalog, _, regions = ellipses(path, "--thresh", 5)
    assert_ellipses_lie_on_the_sources(catalog, regions, quiet_wcs(path), tolerance=0.02)


def test_ellipses_at_the_limb_of_the_sky_are_left_out_or_finite(ellipses, put):
    catalog, _, regions = ellipses(put(ALL_SKY), "--thresh", 5)
    assert 0 < len(regions) <= catalog["ra"].notna().sum()
    assert np.isfinite(regions).all()


def test_without_a_wcs_ellipses_are_in_1_based_pixels(ellipses, put):
    catalog, system, regions = ellipses(put({}), "--thresh", 5)
    assert system == "image"
    expected = np.column_stack(
        [
            catalog[["x", "y"]] + 1,
            3 * catalog[["a", "b"]],
            np.degrees(catalog["theta"]),
            catalog["id"],
        ]
    )
    assert_allclose(regions, expected, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Two images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [*(header for header, _ in SKIES.values()), ALL_SKY, {}],
    ids=[*SKIES, "all sky", "none"],
)
def test_the_same_wcs_is_no_cause_for_a_warning(run, put, header):
    result = run(put(header), "--thresh", 5, "--measure-image", put(header, "other.fits"))
    assert result.code == 0
    assert result.err == ""


def test_the_same_sky_in_another_frame_is_no_cause_for_a_warning(run, put):
    centre = SkyCoord(210.8, -54.3, unit="deg")
    fk5 = cards(RADESYS="FK5", EQUINOX=2000.0)
    fk5["CRVAL1"], fk5["CRVAL2"] = centre.fk5.ra.deg, centre.fk5.dec.deg
    result = run(put(cards()), "--measure-image", put(fk5, "other.fits"))
    assert result.err == ""


@pytest.mark.parametrize(
    "change",
    [{"CRPIX1": 83.12}, {"CRVAL2": -54.301}, {"CD1_1": 8.66e-5}, {"RADESYS": "FK4"}],
    ids=["shift", "pointing", "mirrored", "frame"],
)
def test_another_wcs_costs_a_warning_and_the_pixels_are_measured(run, put, change):
    plain = run(put(cards()), "--thresh", 5).catalog
    other = put(cards(**change), "other.fits")
    result = run(put(cards(), "again.fits"), "--thresh", 5, "--measure-image", other)
    assert result.code == 0
    assert re.fullmatch(r"source_extractor\.py: warning: .*other\.fits.*WCS.*\n", result.err)
    assert_allclose(result.catalog, plain)


def test_a_wcs_that_cannot_be_compared_is_said_to_be_one(run, put):
    other = put(cards("ELON-TAN", "ELAT-TAN", CRVAL1=30.0, CRVAL2=10.0), "other.fits")
    result = run(put(cards()), "--measure-image", other)
    assert result.code == 0
    assert re.fullmatch(r"source_extractor\.py: warning: .*can't be compared.*\n", result.err)


def test_positions_come_from_the_detection_image(run, put):
    other = put(cards(CRPIX1=83.12), "other.fits")
    path = put(cards())
    catalog = run(path, "--thresh", 5, "--measure-image", other).catalog
    assert_on_sky(catalog, true_sky(path, catalog, ICRS()))
