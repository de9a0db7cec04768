"""The sky: positions, the WCS of products and DS9 regions, against astropy's own WCS and frames."""

import os
import re

import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from astropy.coordinates import ICRS, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from numpy.testing import assert_allclose

from common import NX, NY, insert_cards, start
from contract import FIVE, one_line
from headers import ALL_SKY, ECLIPTIC, NO_ICRS, NO_WCS, SIP, SKIES, cards, celestial_wcs, distorted
from source_extractor import read_image, read_measure_image, sky_positions


def sky_of(wcs, x, y, frame=None):
    """Return positions by wcslib's numbers, in an explicit frame where one is given."""
    if frame is None:
        return wcs.pixel_to_world(np.asarray(x), np.asarray(y)).icrs
    world = wcs.all_pix2world(x, y, 0)
    lon, lat = (world[axis] * u.deg for axis in (wcs.wcs.lng, wcs.wcs.lat))
    return SkyCoord(lon, lat, frame=frame).icrs


def assert_on_sky(catalog, path, frame, tolerance=1e-5):
    """Compare with a file's WCS within seconds of arc, right ascensions in 0 to 360 degrees."""
    assert len(catalog) == 6
    found = SkyCoord(catalog["ra"], catalog["dec"], unit="deg")
    expected = sky_of(celestial_wcs(path), catalog["x"], catalog["y"], frame)
    assert found.separation(expected).arcsec.max() < tolerance
    assert catalog["ra"].between(0, 360).all()


def assert_same_sky(path, other):
    """Compare the sky positions in two files, on a grid that goes beyond the image."""
    x, y = np.meshgrid(np.linspace(-20, NX + 20, 13), np.linspace(-20, NY + 20, 11))
    sky, expected = (celestial_wcs(file).pixel_to_world(x, y) for file in (path, other))
    assert sky.frame.is_equivalent_frame(expected.frame)
    assert sky.separation(expected).deg.max() < 1e-9


def positions(path, plane=None):
    """Return some pixels of an image, with the sky positions that the tool gives them."""
    x, y = np.array([(12, 9), (40, 30), (80.3, 60.7), (120, 100), (140.5, 20.5), (30, 95)]).T
    origin, _ = read_image(path, plane=plane)
    ra, dec = sky_positions(origin.wcs, x, y)
    return pd.DataFrame({"x": x, "y": y, "ra": ra, "dec": dec})


NUMBER = r"(-?\d+\.\d+(?:e-\d+)?)"
ELLIPSE = re.compile(
    rf'ellipse\({NUMBER},{NUMBER},{NUMBER}("?),{NUMBER}("?),{NUMBER}\) # text={{(\d+)}}'
)


def read_regions(path, system):
    """Return the numbers and labels of the ellipses of a region file in this system."""
    head, _, shapes = path.read_text().partition(f"\n{system}\n")
    assert head.startswith("# Region file format: DS9")
    found = [ELLIPSE.fullmatch(line) for line in shapes.splitlines()]
    seconds = '"' if system == "icrs" else ""
    assert all(match.group(4, 6) == (seconds, seconds) for match in found)
    return np.array([match.group(1, 2, 3, 5, 7, 8) for match in found], dtype=float)


def assert_ellipses_lie_on_the_sources(catalog, regions, wcs, tolerance):
    """Turn sky ellipses into pixels by DS9's rule: angles count from west through north."""
    ra, dec, major, minor, angle, label = regions.T
    assert list(label) == list(catalog["id"])
    centre = SkyCoord(ra, dec, unit="deg")
    x, y, theta = (catalog[name].to_numpy() for name in ("x", "y", "theta"))
    assert_allclose(wcs.world_to_pixel(centre), [x, y], atol=tolerance)
    for phase in np.linspace(0, 2 * np.pi, 24, endpoint=False):
        right, left = major * np.cos(phase), minor * np.sin(phase)
        turn, distance = angle - 90 - np.degrees(np.arctan2(left, right)), np.hypot(right, left)
        point = centre.directional_offset_by(turn * u.deg, distance * u.arcsec)
        dx, dy = np.subtract(wcs.world_to_pixel(point), [x, y])
        along, across = (
            dx * np.cos(theta) + dy * np.sin(theta),
            dy * np.cos(theta) - dx * np.sin(theta),
        )
        assert_allclose(np.hypot(along / catalog["a"], across / catalog["b"]), 3, rtol=0.01)


@pytest.mark.parametrize("kind", SKIES)
def test_positions_products_and_regions_are_right_on_any_sky(run, write, stars, tmp_path, kind):
    header, frame = SKIES[kind]
    path, regions = write(stars, **header), tmp_path / "sources.reg"
    same = "--measure-image", write(stars, "other.fits", **header)  # no cause for a warning
    result = run(path, "--thresh", 5, "--regions", regions, *same)
    assert (result.code, result.err) == (0, "")
    assert_on_sky(result.catalog, path, frame)
    for product in ("background", "rms", "segmentation"):
        assert_same_sky(result.directory / f"{product}.fits", path)
    wcs = celestial_wcs(path)
    assert wcs.pixel_to_world(0, 0).frame.is_equivalent_frame(frame)
    shapes = read_regions(regions, "icrs")
    assert_ellipses_lie_on_the_sources(result.catalog, shapes, wcs, tolerance=0.01)


def test_lookup_table_distortion_counts_and_is_kept(run, tmp_path, stars):
    path = tmp_path / "distorted.fits"
    distorted(stars).writeto(path)
    result = run(path, "--thresh", 5)
    catalog = result.catalog
    assert_on_sky(catalog, path, ICRS())
    plain = sky_of(WCS(fits.Header(cards())), catalog["x"], catalog["y"])
    found = SkyCoord(catalog["ra"], catalog["dec"], unit="deg")
    assert plain.separation(found).arcsec.max() > 0.01
    assert_same_sky(result.directory / "background.fits", path)
    with fits.open(result.directory / "segmentation.fits") as written:
        written.verify("exception")
        assert "CPDIS1" in written[0].header


# Cubes

AXES = {
    "V": {"CTYPE": "VELO-LSR", "CUNIT": "m/s", "CRVAL": 3e4, "CRPIX": 2.0, "CDELT": 1300.0},
    "S": {"CTYPE": "STOKES", "CRVAL": 1.0, "CRPIX": 1.0, "CDELT": 1.0},
    "R": {"CTYPE": "RA---SIN", "CUNIT": "deg", "CRVAL": 83.6, "CRPIX": 70.5, "CDELT": -1e-3},
    "D": {"CTYPE": "DEC--SIN", "CUNIT": "deg", "CRVAL": 22.0, "CRPIX": 50.5, "CDELT": 1e-3},
}
LENGTHS = {"V": 3, "S": 2}


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize("order", ["RDV", "VRD", "RVD", "DVR", "DRV", "SVRD", "RSDV", "RDVS"])
def test_the_plane_of_a_cube_is_that_of_the_sky_in_any_order_of_axes(run, write, stars, order):
    header = fits.Header({f"{k}{n}": v for n, a in enumerate(order, 1) for k, v in AXES[a].items()})
    names = order[::-1]  # as numpy's axes
    image = stars if names.index("D") < names.index("R") else np.ascontiguousarray(stars.T)
    sky = [axis for axis, name in enumerate(names) if name in "RD"]
    lengths = [LENGTHS[name] for name in names if name in LENGTHS]
    where = np.unravel_index(1, lengths)
    cube = np.zeros((*lengths, *image.shape), np.float32)
    cube[where] = image
    path = write(np.ascontiguousarray(np.moveaxis(cube, (-2, -1), sky)), **header)
    assert np.array_equal(read_image(path, plane=1)[1], image)
    result = run(path, "--plane", 1, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    catalog = result.catalog
    # Where the whole WCS puts the pixels of that plane.
    pixels = [*where]
    for axis, name in zip(sky, "yx", strict=True):
        pixels.insert(axis, catalog[name])
    world, wcs = WCS(header).all_pix2world(*np.broadcast_arrays(*pixels[::-1]), 0), WCS(header).wcs
    expected = SkyCoord(world[wcs.lng], world[wcs.lat], unit="deg")
    found = SkyCoord(catalog["ra"], catalog["dec"], unit="deg")
    assert found.separation(expected).arcsec.max() < 1e-5
    assert_on_sky(catalog, result.directory / "segmentation.fits", None)
    assert fits.getheader(result.directory / "segmentation.fits")["WCSAXES"] == 2


@pytest.mark.parametrize("dtype", [np.int16, np.uint64])
def test_a_compressed_cube_is_cut_alike(tmp_path, dtype):
    header = fits.Header({"CTYPE1": "VELO", "CTYPE2": "RA---TAN", "CTYPE3": "DEC--TAN"})
    cube = np.arange(20 * 24 * 5).reshape(20, 24, 5).astype(dtype)
    packed = fits.CompImageHDU(cube, header, compression_type="GZIP_2", tile_shape=(4, 6, 5))
    packed.writeto(tmp_path / "cube.fits")
    _, pixels = read_image(tmp_path / "cube.fits", plane=3)
    assert np.array_equal(pixels, cube[:, :, 3])


def test_a_spectrum_along_a_slit_is_a_plane_as_it_is_stored(write, stars):
    axes = {"CTYPE1": "WAVE", "CTYPE2": "RA---TAN", "CTYPE3": "DEC--TAN", "CDELT2": 0.1}
    origin, pixels = read_image(write(stars[np.newaxis], **axes))
    assert origin.wcs is None
    assert np.array_equal(pixels, stars)


@pytest.mark.parametrize(
    ("kind", "third"),
    [
        ("SIP", {}),
        ("SIP with its inverse", {"CTYPE3": "RGB"}),
        ("SIP", {"CTYPE3": "FREQ", "CRVAL3": 1e9}),
    ],
)
def test_planes_of_a_distorted_cube_have_the_positions_of_the_image(run, write, stars, third, kind):
    header, frame = SKIES[kind]
    flat = write(stars, "flat.fits", **header)
    result = run(write(np.stack([stars] * 3), **header, **third), "--plane", 2, "--thresh", 5)
    assert (result.code, result.err) == (0, "")
    for path in (flat, result.directory / "background.fits"):
        assert_on_sky(result.catalog, path, frame)


# Distortions

SCAMP = {f"PV{i}_{j}": 1e-2 / (i + j) for i in (1, 2) for j in (0, 4, 5, 6)} | {
    **{"PV1_1": 1.01, "PV2_1": 0.99}
}


@pytest.mark.parametrize(
    ("kind", "cards_", "planes", "told"),
    [
        ("TAN-SIP", SIP | SCAMP, (2,), "SIP is used, PV ignored"),
        ("TPV", SIP | SCAMP, (), "PV is used, SIP ignored"),
        ("TAN", SIP | SCAMP, (1,), "PV is used, SIP ignored"),
        ("TAN", SIP, (), "SIP is applied, though CTYPE lacks -SIP"),
        ("TAN", SIP, (2,), "SIP is applied, though CTYPE lacks -SIP"),
    ],
)
def test_odd_distortions_cost_one_line_and_no_position(
    run, write, stars, kind, cards_, planes, told
):
    header = cards(f"RA---{kind}", f"DEC--{kind}", **cards_)
    flat = write(stars, "flat.fits", **header)
    path = write(np.broadcast_to(stars, planes + stars.shape), **header)
    result = run(path, "--thresh", 5, "--plane", 0)
    assert re.fullmatch(one_line("warning", f".*{told}.*"), result.err)
    for file in (flat, result.directory / "background.fits"):
        assert_on_sky(result.catalog, file, ICRS())


def test_sip_is_centred_on_the_axes_of_the_sky(run, write, stars):
    sky = {"CTYPE": ("RA---TAN-SIP", "DEC--TAN-SIP"), "CRPIX": (80.0, 60.0), "CRVAL": (10.0, 20.0)}
    sky["CDELT"] = -1e-4, 1e-4
    flat, header = (
        {f"{key}{i}": v for key, two in sky.items() for i, v in enumerate(two, n)} for n in (1, 2)
    )
    header |= {"CTYPE1": "VELO-LSR", "CDELT1": 1.0, "CRPIX1": 1.0}
    result = run(write(stars[:, :, np.newaxis], **header, **SIP), "--thresh", 5)
    for path in (write(stars, "flat.fits", **flat, **SIP), result.directory / "background.fits"):
        assert_on_sky(result.catalog, path, ICRS())


@pytest.mark.parametrize(
    ("kind", "distortion"),
    [
        ("TAN", SCAMP),
        ("TPV", SCAMP),
        ("ZPN-SIP", SIP | {"PV2_1": 1.0, "PV2_3": 45.0, "PV2_5": 9.0}),
    ],
    ids=["SCAMP before 2012", "SCAMP", "parameters of a projection"],
)
def test_a_pv_that_sip_does_not_contradict_is_kept_in_silence(write, stars, told, kind, distortion):
    path = write(stars, **cards(f"RA---{kind}", f"DEC--{kind}", **distortion))
    assert_on_sky(positions(path), path, ICRS())
    assert told == []


# What the libraries log of this header is more than a pipe holds that nobody reads.
TALKATIVE = cards(**SIP)


def test_libraries_write_nothing_to_stdout(write, stars, tmp_path):
    result = start(write(stars, **TALKATIVE), "-q", "-o", tmp_path / "products")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_reader_of_stdout_that_goes_away_costs_neither_products_nor_positions(
    write, stars, tmp_path
):
    path, products = write(stars, **TALKATIVE), tmp_path / "products"
    reading, writing = os.pipe()
    os.close(reading)
    result = start(path, "-o", products, stdout=writing)
    os.close(writing)
    assert "can't be used" not in result.stderr
    assert {file.name for file in products.iterdir()} == FIVE
    assert "CTYPE1" in fits.getheader(products / "background.fits")


# No positions


def test_without_a_wcs_positions_are_nan_and_regions_in_pixels(run, write, stars, tmp_path):
    other, regions = write(stars, "other.fits"), tmp_path / "sources.reg"
    result = run(write(stars), "--measure-image", other, "--regions", regions)
    catalog = result.catalog
    assert result.err == ""
    assert catalog[["ra", "dec"]].isna().all(axis=None)
    header = fits.getheader(result.directory / "background.fits")
    assert not any(key.startswith(("CTYPE", "CRVAL", "WCS")) for key in header)
    assert "e-" not in regions.read_text()
    expected = [catalog["x"] + 1, catalog["y"] + 1, 3 * catalog["a"], 3 * catalog["b"]]
    expected += [np.degrees(catalog["theta"]), catalog["id"]]  # DS9 counts pixels from 1
    assert_allclose(read_regions(regions, "image"), np.transpose(expected), atol=1e-3)


def test_sources_beyond_the_sky_are_nan_and_the_others_are_not(run, write, stars, tmp_path):
    header = ALL_SKY | {"CDELT1": -2.2, "CDELT2": 1.5}
    path, regions = write(stars, **header), tmp_path / "sources.reg"
    same = "--measure-image", write(stars, "other.fits", **header)
    result = run(path, "--thresh", 5, "--regions", regions, *same)
    catalog = result.catalog
    assert result.err == ""
    expected = celestial_wcs(path).all_pix2world(catalog["x"], catalog["y"], 0)
    assert 0 < np.isnan(expected[0]).sum() < 6
    assert_allclose(catalog[["ra", "dec"]].to_numpy().T, expected)
    shapes = read_regions(regions, "icrs")
    assert 0 < len(shapes) <= catalog["ra"].notna().sum()
    assert np.isfinite(shapes).all()


@pytest.mark.parametrize("kind", [*NO_WCS, *NO_ICRS, "ecliptic"])
def test_a_wcs_without_icrs_positions_costs_them_and_one_warning(write, stars, told, kind):
    path = write(stars, **(NO_WCS | NO_ICRS | {"ecliptic": ECLIPTIC})[kind])
    assert positions(path)[["ra", "dec"]].isna().all(axis=None)
    (text,) = told
    assert "WCS" in text
    assert ("ELON" in text) == (kind == "ecliptic")
    assert (read_image(path)[0].wcs is None) == (kind in NO_WCS)


@pytest.mark.parametrize(("header", "kept"), [(NO_WCS["singular"], 0), (NO_ICRS["frame"], 1)])
def test_with_a_broken_wcs_regions_are_in_pixels(run, write, stars, tmp_path, header, kept):
    result = run(write(stars, **header), "--regions", tmp_path / "sources.reg")
    assert (result.code, len(result.catalog)) == (0, 6)
    assert re.fullmatch(one_line("warning", ".*WCS.*"), result.err)
    assert result.catalog[["ra", "dec"]].isna().all(axis=None)
    assert "\nimage\nellipse" in (tmp_path / "sources.reg").read_text()
    assert ("CTYPE1" in fits.getheader(result.directory / "background.fits")) == kept


@pytest.mark.parametrize(
    ("key", "value"), [("CRVAL1", "1,5"), ("CRPIX2", "'1.5'"), ("CD1_2", "nan"), ("CRVAL1", "nan")]
)
def test_a_card_of_the_wcs_that_cannot_be_read_is_named(write, stars, told, key, value):
    path = write(stars, **cards())
    card = f"{key:8}= {value}".ljust(80).encode()
    path.write_bytes(re.sub(rb"%-8b=.{71}" % key.encode(), card, path.read_bytes(), count=1))
    assert positions(path)[["ra", "dec"]].isna().all(axis=None)
    (text,) = told
    assert re.search(f"WCS.*{key} can't be read", text)


def test_a_wcs_that_can_not_be_written_is_left_out(write, stars, told):
    path = insert_cards(write(stars, **cards()), b"LONPOLE =                1E400")
    assert positions(path)["ra"].isna().all()
    (text,) = told
    assert "WCS can't be used and is left out" in text


# Two images


def test_the_wcs_comes_from_the_chosen_hdu(run, write, stars):
    two = write(stars, "two.fits", **cards(CRVAL1=10.0))
    fits.append(two, stars, fits.Header(cards(EXTNAME="SCI")))
    result = run(two, "--hdu", "SCI")
    assert_same_sky(result.directory / "rms.fits", write(stars, "one.fits", **cards()))


CENTRE = SkyCoord(cards()["CRVAL1"], cards()["CRVAL2"], unit="deg").fk5
SAME_IN_FK5 = cards(RADESYS="FK5", EQUINOX=2000.0, CRVAL1=CENTRE.ra.deg, CRVAL2=CENTRE.dec.deg)


@pytest.mark.parametrize(
    ("header", "away"),
    [
        (SAME_IN_FK5, None),
        (cards(CRPIX1=83.12), "up to"),
        (cards(CRVAL2=-54.35), "up to"),
        (cards(CD1_1=8.66e-5), "up to"),
        (cards(RADESYS="FK4"), "up to"),
        (ECLIPTIC, "an unknown number of"),
    ],
    ids=["same sky", "shift", "pointing", "mirrored", "frame", "ecliptic"],
)
def test_another_sky_to_measure_on_costs_a_warning(write, stars, told, header, away):
    origin, pixels = read_image(write(stars, **cards()))
    read_measure_image(write(stars, "other.fits", **header), None, None, (), origin, pixels.shape)
    assert len(told) == (away is not None)
    assert all(re.search(rf"other\.fits.*WCS.* {away} .*pixels;", text) for text in told)


def test_with_another_wcs_the_pixels_are_measured_and_positions_are_the_images(run, write, stars):
    path, other = write(stars, **cards()), write(stars, "other.fits", **cards(CRPIX1=83.12))
    result = run(path, "--thresh", 5, "--measure-image", other)
    plain = run(path, "--thresh", 5).catalog
    assert re.fullmatch(one_line("warning", r".*other\.fits.*WCS.*"), result.err)
    assert_allclose(result.catalog, plain)
    assert_on_sky(result.catalog, path, ICRS())
