"""What the tool promises: products, columns, defaults, and how it words what goes wrong."""

from pathlib import Path

FIVE = {"background.fits", "rms.fits", "segmentation.fits", "sources.png", "catalog.tsv"}
ON_REQUEST = {
    "--subtracted": "subtracted.fits",
    "--catalog-fits": "catalog.fits",
    "--regions": "sources.reg",
    "--seeds": "seeds.tif",
    "--overview": "overview.png",
}
ALL_PRODUCTS = FIVE | set(ON_REQUEST.values())

SEP_FIELDS = [
    *("thresh", "npix", "tnpix", "xmin", "xmax", "ymin", "ymax", "x", "y", "x2", "y2", "xy"),
    *("errx2", "erry2", "errxy", "a", "b", "theta", "cxx", "cyy", "cxy", "cflux", "flux"),
    *("cpeak", "peak", "xcpeak", "ycpeak", "xpeak", "ypeak", "flag"),
]
DETECTION = ["id", *SEP_FIELDS]
FIRST = [
    *("id", "x", "y", "ra", "dec", "flux_auto", "fluxerr_auto", "snr", "mag_auto", "magerr_auto"),
    *("flux_radius", "fwhm", "a", "b", "theta", "elongation", "npix", "flag", "flag_auto"),
    "detection_snr",
]
LAST = ["background", "rms", "kron_radius", "xwin", "ywin", "errawin", "errbwin", "errthetawin"]
COLUMNS = [*FIRST, *(name for name in SEP_FIELDS if name not in FIRST), *LAST]

NO_DEFAULT = """
hdu plane mask mask_hdu mask_bits err_file err_hdu gain saturation filter_file measure_image
measure_hdu measure_plane subtracted catalog_fits regions overview seeds image_format form
allow_product
"""
DEFAULTS = {
    **dict.fromkeys(NO_DEFAULT.split()),
    **{"maskthresh": 0.0, "mask_box": [], "blank": [], "bridge": 3},
    **{"bw": 64, "bh": 64, "fw": 3, "fh": 3, "fthresh": 0.0, "background_passes": 1},
    **{"thresh": 1.5, "err_option": "float_globalrms", "err_type": "stddev", "minarea": 5},
    **{"filter_case": "default", "filter_fwhm": 2.0, "filter_type": "matched"},
    **{"deblend_nthresh": 32, "deblend_cont": 0.005, "clean": True, "clean_param": 1.0},
    **{"zeropoint": 0.0, "kron_factor": 2.5, "kron_min_radius": 3.5},
    "noise_correlation": "measured",
    **{"output_dir": Path("."), "verbose": False, "quiet": False},
    "threads": 1,
}
NOT_IN_HISTORY = {"output_dir", "image_format", "form", "verbose", "quiet", "threads"}


def one_line(kind, text=".+"):
    """Return the pattern of all that is said of one "error" or "warning"."""
    return rf"source_extractor\.py: {kind}: {text}\n"


ONE_ERROR = one_line("error")
