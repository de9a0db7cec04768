"""Sky positions, against astropy's own WCS and coordinate frames."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import ICRS, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from numpy.testing import assert_allclose

from common import SCRIPT, rows_at, start
from contract import FIVE, one_line
from headers import (
    ALL_SKY,
    ECLIPTIC,
    J2000,
    NO_ICRS,
    NO_WCS,
    RADIO,
    SIP,
    SKIES,
    cards,
    celestial_wcs,
    distorted,
)
from source_extractor import read_image


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


VELOCITY = {"CTYPE": "VELO-LSR", "CUNIT": "m/s", "CRVAL": 3e4, "CRPIX": 2.0, "CDELT": 1300.0}
STOKES = {"CTYPE": "STOKES", "CRVAL": 1.0, "CRPIX": 1.0, "CDELT": 1.0}
RA = {"CTYPE": "RA---SIN", "CUNIT": "deg", "CRVAL": 83.6, "CRPIX": 70.5, "CDELT": -1e-3}
DEC = {"CTYPE": "DEC--SIN", "CUNIT": "deg", "CRVAL": 22.0, "CRPIX": 50.5, "CDELT": 1e-3}
LENGTHS = {"RA---SIN": 160, "DEC--SIN": 120, "VELO-LSR": 3, "STOKES": 2}


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize(
    "order",
    [
        *([RA, DEC, VELOCITY], [VELOCITY, RA, DEC], [RA, VELOCITY, DEC]),
        *([DEC, RA, VELOCITY], [VELOCITY, DEC, RA], [DEC, VELOCITY, RA]),
        *([VELOCITY, RA, STOKES, DEC], [STOKES, VELOCITY, RA, DEC], [RA, STOKES, DEC, VELOCITY]),
    ],
    ids=lambda order: "-".join(axis["CTYPE"][:2] for axis in order),
)
def test_the_plane_of_a_cube_is_that_of_the_sky_in_any_order_of_axes(
    run, write, tmp_path, stars, order
):
    header = fits.Header({f"{k}{n}": v for n, axis in enumerate(order, 1) for k, v in axis.items()})
    names = [axis["CTYPE"] for axis in order[::-1]]
    ra_first = names.index("DEC--SIN") < names.index("RA---SIN")
    image = stars if ra_first else np.ascontiguousarray(stars.T)
    others = [LENGTHS[name] for name in names if name in ("VELO-LSR", "STOKES")]
    where = np.unravel_index(1, others)
    cube = np.zeros((*others, *image.shape), np.float32)
    cube[where] = image
    sky = sorted([names.index("RA---SIN"), names.index("DEC--SIN")])
    cube = np.ascontiguousarray(np.moveaxis(cube, (-2, -1), sky))
    fits.writeto(tmp_path / "cube.fits", cube, header)
    result = run(tmp_path / "cube.fits", "--plane", 1, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    found, labels = result.catalog, result.image("segmentation")
    # Where the whole WCS puts the pixel of that plane.
    pixel = [None] * len(names)
    for axis, at in zip((a for a in range(len(names)) if a not in sky), where, strict=True):
        pixel[axis] = np.full(len(found), at)
    pixel[sky[0]], pixel[sky[1]] = found["y"].to_numpy(), found["x"].to_numpy()
    whole = WCS(header)
    world = whole.all_pix2world(*pixel[::-1], 0)
    lon, lat = (world[axis] * u.deg for axis in (whole.wcs.lng, whole.wcs.lat))
    assert_on_sky(found, SkyCoord(lon, lat))
    product = WCS(fits.getheader(result.directory / "segmentation.fits"))
    assert_on_sky(found, product.pixel_to_world(*found[["x", "y"]].to_numpy().T).icrs)
    alone = run(write(image, "plane.fits"), "--thresh", 5)  # in place of the products above
    assert_allclose(found[["x", "y", "flux_auto"]], alone.catalog[["x", "y", "flux_auto"]])
    assert np.array_equal(labels, alone.image("segmentation"))


@pytest.mark.parametrize("dtype", [np.int16, np.uint64])
def test_a_compressed_cube_is_cut_alike(tmp_path, dtype):
    header = fits.Header({"CTYPE1": "VELO", "CTYPE2": "RA---TAN", "CTYPE3": "DEC--TAN"})
    cube = np.arange(20 * 24 * 5).reshape(20, 24, 5).astype(dtype)
    packed = fits.CompImageHDU(cube, header, compression_type="GZIP_2", tile_shape=(4, 6, 5))
    packed.writeto(tmp_path / "cube.fits")
    _, pixels = read_image(tmp_path / "cube.fits", plane=3)
    assert np.array_equal(pixels, cube[:, :, 3])


def test_a_wcs_that_can_not_be_written_is_left_out(run, tmp_path, stars):
    header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -1e-4})
    header.update({"CDELT2": 1e-4, "CRVAL1": 10.0, "CRVAL2": 20.0, "CRPIX1": 5.0, "CRPIX2": 5.0})
    header.append(fits.Card.fromstring("LONPOLE =                1E400"))
    fits.PrimaryHDU(stars, header).writeto(tmp_path / "image.fits", output_verify="ignore")
    result = run(tmp_path / "image.fits")
    assert re.search(one_line("warning", r".*WCS can't be used and is left out.*"), result.err)
    assert result.catalog["ra"].isna().all()


def test_a_spectrum_along_a_slit_is_a_plane_as_it_is_stored(run, write, stars):
    axes = {"CTYPE1": "WAVE", "CTYPE2": "RA---TAN", "CTYPE3": "DEC--TAN", "CDELT2": 0.1}
    result = run(write(stars[np.newaxis], **axes), "--thresh", 5)
    assert result.image("segmentation").shape == stars.shape
    assert len(result.catalog) == 6
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


@pytest.mark.parametrize("third", [{}, {"CTYPE3": "RGB"}, {"CTYPE3": "FREQ", "CRVAL3": 1e9}])
@pytest.mark.parametrize("kind", ["SIP", "SIP with its inverse"])
def test_planes_of_a_distorted_cube_have_the_positions_of_the_image(run, write, stars, third, kind):
    header, frame = SKIES[kind]
    flat = write(stars, "flat.fits", **header)
    result = run(write(np.stack([stars] * 3), **header, **third), "--plane", 2, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    assert_on_sky(result.catalog, true_sky(flat, result.catalog, frame))
    product = result.directory / "background.fits"
    assert_on_sky(result.catalog, true_sky(product, result.catalog, frame))


SCAMP = {f"PV{i}_{j}": 1e-2 / (i + j) for i in (1, 2) for j in (0, 4, 5, 6)} | {
    **{"PV1_1": 1.01, "PV2_1": 0.99}
}


@pytest.mark.parametrize(
    ("kind", "cards_", "told"),
    [
        ("TAN-SIP", SIP | SCAMP, "SIP is taken, PV ignored"),
        ("TPV", SIP | SCAMP, "PV is taken, SIP ignored"),
        ("TAN", SIP | SCAMP, "PV is taken, SIP ignored"),
        ("TAN", SIP, "SIP is applied, though CTYPE lacks -SIP"),
    ],
)
@pytest.mark.parametrize("planes", [(), (1,), (2,)], ids=["image", "one plane", "cube"])
def test_odd_distortions_cost_one_line_and_no_position(
    run, write, stars, kind, cards_, told, planes
):
    header = cards(f"RA---{kind}", f"DEC--{kind}", **cards_)
    flat = write(stars, "flat.fits", **header)
    path = write(np.broadcast_to(stars, planes + stars.shape), **header)
    result = run(path, "--thresh", 5, "--plane", 0)
    assert re.fullmatch(one_line("warning", f".*{told}.*"), result.err)
    labels = {line.split()[0] for line in result.out.splitlines()}
    reports = {"image", "masked", "background", "threshold", "sources"}
    assert labels == reports | {"rms", "segmentation", "overlay", "catalog", "catalog_fits"}
    assert_on_sky(result.catalog, true_sky(flat, result.catalog, ICRS()))
    product = result.directory / "background.fits"
    assert_on_sky(result.catalog, true_sky(product, result.catalog, ICRS()))


def test_sip_is_centred_on_the_axes_of_the_sky(run, write, stars):
    sky = {"CTYPE": ("RA---TAN-SIP", "DEC--TAN-SIP"), "CRPIX": (80.0, 60.0), "CRVAL": (10.0, 20.0)}
    sky["CDELT"] = -1e-4, 1e-4
    flat, header = (
        {f"{key}{i}": v for key, two in sky.items() for i, v in enumerate(two, n)} for n in (1, 2)
    )
    header |= {"CTYPE1": "VELO-LSR", "CDELT1": 1.0, "CRPIX1": 1.0}
    result = run(write(stars[:, :, np.newaxis], **header, **SIP), "--thresh", 5)
    flat = write(stars, "flat.fits", **flat, **SIP)
    assert_on_sky(result.catalog, true_sky(flat, result.catalog, ICRS()))
    product = result.directory / "background.fits"
    assert_on_sky(result.catalog, true_sky(product, result.catalog, ICRS()))


@pytest.mark.parametrize(
    ("kind", "distortion"),
    [
        ("TAN", SCAMP),
        ("TPV", SCAMP),
        ("ZPN-SIP", SIP | {"PV2_1": 1.0, "PV2_3": 45.0, "PV2_5": 9.0}),
    ],
    ids=["SCAMP before 2012", "SCAMP", "parameters of a projection"],
)
def test_a_pv_that_sip_does_not_contradict_is_neither_dropped_nor_told(
    run, write, stars, kind, distortion
):
    path = write(stars, **cards(f"RA---{kind}", f"DEC--{kind}", **distortion))
    result = run(path, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    assert_on_sky(result.catalog, true_sky(path, result.catalog, ICRS()))


# What the libraries log of this header is more than a pipe holds that nobody reads.
TALKATIVE = cards(**SIP)


def test_libraries_write_nothing_to_stdout(write, stars, tmp_path):
    result = start(write(stars, **TALKATIVE), "-q", "-o", tmp_path / "products")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_a_reader_of_stdout_that_goes_away_costs_neither_products_nor_positions(
    write, stars, tmp_path, options
):
    path, products = write(stars, **TALKATIVE), tmp_path / "products"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, SCRIPT, path, *options, "-o", products]
    result = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "can't be used" not in result.stderr
    assert {file.name for file in products.iterdir()} == FIVE
    assert "CTYPE1" in fits.getheader(products / "background.fits")


@pytest.mark.parametrize("key", ["CRVAL1", "CRPIX2", "CD1_2"])
@pytest.mark.parametrize("value", ["1,5", "'1.5'", "nan"])
def test_a_card_of_the_wcs_that_cannot_be_read_is_named(run, tmp_path, stars, key, value):
    path = tmp_path / "image.fits"
    fits.writeto(path, stars, fits.Header(cards()))
    content = path.read_bytes()
    start = content.index(f"{key:8}=".encode())
    path.write_bytes(
        content[:start] + f"{key:8}= {value}".ljust(80).encode() + content[start + 80 :]
    )
    result = run(path, "--thresh", 5)
    assert re.fullmatch(one_line("warning", f".*WCS.*{key} can't be read.*"), result.err)
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)


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
    assert re.fullmatch(one_line("warning", ".*an unknown number of pixels away.*"), result.err)


def test_positions_come_from_the_detection_image(run, write, stars):
    other = write(stars, "other.fits", **cards(CRPIX1=83.12))
    path = write(stars, **cards())
    catalog = run(path, "--thresh", 5, "--measure-image", other).catalog
    assert_on_sky(catalog, true_sky(path, catalog, ICRS()))
