"""DS9 regions: their ellipses lie on the sources, in pixels or on the sky."""

import re

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from numpy.testing import assert_allclose

from common import SKY, read_catalog
from headers import ALL_SKY, SKIES, cards, celestial_wcs

NUMBER = r"(-?\d+\.\d+(?:e-\d+)?)"
ELLIPSE = re.compile(
    rf'ellipse\({NUMBER},{NUMBER},{NUMBER}("?),{NUMBER}("?),{NUMBER}\) # text={{(\d+)}}'
)


def read_regions(path):
    """Return the system of a region file, and the numbers and labels of its ellipses."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Region file format: DS9")
    system = next(line for line in lines if line in ("icrs", "image"))
    shapes = lines[lines.index(system) + 1 :]
    found = [ELLIPSE.fullmatch(line) for line in shapes]
    assert all(found), shapes
    seconds = '"' if system == "icrs" else ""
    assert all(match.group(4, 6) == (seconds, seconds) for match in found)
    numbers = [match.group(1, 2, 3, 5, 7, 8) for match in found]
    return system, np.array(numbers, dtype=float)


@pytest.fixture
def ellipses(run, tmp_path):
    """Return a function that runs the tool and returns catalogue, system and parsed regions."""

    def run_tool(*arguments):
        path = tmp_path / "sources.reg"
        catalog = run(*arguments, "--regions", path).catalog
        return catalog, *read_regions(path)

    return run_tool


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
def test_sky_ellipses_lie_on_the_sources(ellipses, write, stars, kind):
    header, frame = SKIES[kind]
    path = write(stars, **header)
    catalog, system, regions = ellipses(path, "--thresh", 5)
    assert system == "icrs"
    wcs = celestial_wcs(path)
    assert wcs.pixel_to_world(0, 0).frame.is_equivalent_frame(frame)
    assert_ellipses_lie_on_the_sources(catalog, regions, wcs, tolerance=0.01)


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-2], ids=["3.6 uas", "0.36 mas", "36 arcsec"])
def test_sky_ellipses_are_precise_at_any_scale(ellipses, write, stars, scale):
    path = write(stars, **cards("RA---SIN", "DEC--SIN", scale=scale))
    catalog, _, regions = ellipses(path, "--thresh", 5)
    assert_ellipses_lie_on_the_sources(catalog, regions, celestial_wcs(path), tolerance=0.02)


def test_ellipses_at_the_limb_of_the_sky_are_left_out_or_finite(ellipses, write, stars):
    catalog, _, regions = ellipses(write(stars, **ALL_SKY), "--thresh", 5)
    assert 0 < len(regions) <= catalog["ra"].notna().sum()
    assert np.isfinite(regions).all()


@pytest.mark.parametrize("options", [[], ["--thresh", 5]])
def test_without_a_wcs_ellipses_are_in_1_based_pixels(ellipses, write, stars, tmp_path, options):
    catalog, system, regions = ellipses(write(stars), *options)
    assert system == "image"
    assert "e-" not in (tmp_path / "sources.reg").read_text()
    expected = np.column_stack(
        [
            catalog[["x", "y"]] + 1,
            3 * catalog[["a", "b"]],
            np.degrees(catalog["theta"]),
            catalog["id"],
        ]
    )
    assert_allclose(regions, expected, atol=1e-3)


def test_angles_are_theta_where_north_is_up(nine):
    catalog = read_catalog(nine)
    system, regions = read_regions(nine / "sources.reg")
    assert system == "icrs"
    assert "e-" not in (nine / "sources.reg").read_text()
    x, y, a, b, angle, label = regions.T
    wcs = WCS(fits.getheader(SKY))
    ra, dec = wcs.all_pix2world(catalog["x"], catalog["y"], 0)
    assert_allclose(np.column_stack([x, y]), np.column_stack([ra, dec]), atol=2e-7)
    arcsec = 3600 * wcs.wcs.cdelt[1]
    assert_allclose(a, 3 * catalog["a"] * arcsec, atol=1e-3)
    assert_allclose(b, 3 * catalog["b"] * arcsec, atol=1e-3)
    # In an image with north up and east left DS9 counts its angle as theta, from +x towards +y.
    turn = (angle - np.degrees(catalog["theta"]) + 90) % 180 - 90
    assert_allclose(turn, 0, atol=0.05)
    assert list(label) == list(catalog["id"])
