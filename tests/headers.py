"""Headers with a celestial WCS of every kind, good and broken."""

import warnings

import numpy as np
from astropy.coordinates import FK4, FK5, ICRS, Galactic
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable

J2000, B1950 = FK5(equinox="J2000"), FK4(equinox="B1950")


def cards(lon="RA---TAN", lat="DEC--TAN", scale=1.11111111111e-4, **more):
    """Return the header of a celestial WCS turned by 30 degrees, `scale` degrees a pixel."""
    cos, sin = scale * np.cos(np.pi / 6), scale * np.sin(np.pi / 6)
    return {
        **{"CTYPE1": lon, "CTYPE2": lat, "CUNIT1": "deg", "CUNIT2": "deg"},
        **{"CRVAL1": 210.802267432198765, "CRVAL2": -54.348950123456789},
        **{"CRPIX1": 80.123456789, "CRPIX2": 45.678901234},
        **{"CD1_1": -cos, "CD1_2": sin, "CD2_1": sin, "CD2_2": cos},
        **more,
    }


SIP = {"A_ORDER": 3, "B_ORDER": 2, "A_2_0": 1.1e-5, "A_0_3": 2e-8, "B_1_1": -3e-5, "B_0_2": 2e-5}
BOTH_SIP = SIP | {"AP_ORDER": 1, "BP_ORDER": 1, "AP_1_0": 1e-7, "BP_0_1": 1e-7}
TPV = {"PV1_0": 1e-4, "PV1_1": 1.01, "PV1_2": 2e-3, "PV1_4": 0.05, "PV2_1": 0.99, "PV2_6": -0.04}
OUTSIDE = {"CRPIX2": -60.987654321}
LATITUDE_FIRST = {"CRVAL1": 2.5, "CRVAL2": 150.25}

# Header, and the frame of its positions.
SKIES = {
    "TAN": (cards(), ICRS()),
    "TAN about a point outside": (cards(**OUTSIDE), ICRS()),
    "SIP": (cards("RA---TAN-SIP", "DEC--TAN-SIP", **SIP), ICRS()),
    "SIP with its inverse": (cards("RA---TAN-SIP", "DEC--TAN-SIP", **BOTH_SIP, **OUTSIDE), ICRS()),
    "TPV": (cards("RA---TPV", "DEC--TPV", **TPV), ICRS()),
    "TPV about a point outside": (cards("RA---TPV", "DEC--TPV", **TPV, **OUTSIDE), ICRS()),
    "ZPN": (cards("RA---ZPN", "DEC--ZPN", PV2_1=1.0, PV2_3=45.0), ICRS()),
    "3.6 microarcseconds a pixel": (cards("RA---SIN", "DEC--SIN", scale=1e-9), ICRS()),
    "36 arcseconds a pixel": (cards("RA---SIN", "DEC--SIN", scale=1e-2), ICRS()),
    "mirrored": (cards(CD1_1=8.6e-5, CD2_1=-5e-5), ICRS()),
    "near the pole": (cards(CRVAL2=89.999), ICRS()),
    "latitude first": (cards("DEC--TAN", "RA---TAN", **LATITUDE_FIRST), ICRS()),
    "FK5": (cards(RADESYS="FK5", EQUINOX=2000.0), J2000),
    "FK5 of another year": (cards(RADESYS="FK5", EQUINOX=1975.0), FK5(equinox="J1975")),
    "FK4": (cards(RADESYS="FK4", EQUINOX=1950.0), B1950),
    "no frame, 1950": (cards(EQUINOX=1950.0), B1950),
    "galactic": (cards("GLON-CAR", "GLAT-CAR", CRVAL1=120.0, CRVAL2=0.0), Galactic()),
    "galactic, oblique": (cards("GLON-CAR", "GLAT-CAR"), Galactic()),
    "galactic of 2000": (cards("GLON-TAN", "GLAT-TAN", EQUINOX=2000.0), Galactic()),
    "galactic, FK5": (cards("GLON-TAN", "GLAT-TAN", RADESYS="FK5", EQUINOX=2000.0), Galactic()),
}

ALL_SKY = {
    **{"CTYPE1": "RA---AIT", "CTYPE2": "DEC--AIT", "CRPIX1": 80.5, "CRPIX2": 60.5},
    **{"CDELT1": -2.0, "CDELT2": 1.3},
}

ECLIPTIC = cards("ELON-TAN", "ELAT-TAN", CRVAL1=30.0, CRVAL2=10.0)

# With these there is no WCS at all.
NO_WCS = {
    "singular": cards(CD1_1=1e-4, CD1_2=1e-4, CD2_1=1e-4, CD2_2=1e-4),
    "zero": cards(CD1_1=0.0, CD1_2=0.0, CD2_1=0.0, CD2_2=0.0),
    "projection": cards("RA---XYZ", "DEC--XYZ"),
    "projections": cards(CTYPE2="DEC--SIN"),
    "no parameters": cards("RA---ZPN", "DEC--ZPN"),
    "systems": cards(CTYPE2="GLAT-TAN"),
    "twice the same": cards(CTYPE2="RA---TAN"),
    "half of SIP": cards("RA---TAN-SIP", "DEC--TAN-SIP", A_ORDER=2, A_2_0=1e-5),
    "unit": cards(CUNIT1="furlong"),
    "beyond the pole": cards(CRVAL2=200.0),
    "no lookup table": cards(CPDIS1="LOOKUP", DP1="EXTVER: 1"),
    "no -TAB table": cards("RA---TAB", "DEC--TAB", PS1_0="WCS-TAB"),
}
# With these there is one, but its frame can't be turned into ICRS.
NO_ICRS = {"frame": cards(RADESYS="NONSENSE"), "apparent place": cards(RADESYS="GAPPT")}


def distorted(image):
    """Return the HDUs of an image whose WCS is distorted by lookup tables."""
    wcs = WCS(fits.Header(cards()))
    shifts = np.random.default_rng(1).normal(0, 0.5, (2, 7, 9)).astype(np.float32)
    wcs.cpdis1, wcs.cpdis2 = (
        DistortionLookupTable(table, (1, 1), (1, 1), (20, 20)) for table in shifts
    )
    hdus = wcs.to_fits(relax=True)
    hdus[0].data = image
    return hdus


def celestial_wcs(path):
    """Return the celestial WCS of a file's first HDU, without astropy's warnings."""
    with warnings.catch_warnings(), fits.open(path) as hdus:
        warnings.simplefilter("ignore")
        return WCS(hdus[0].header, hdus).celestial
