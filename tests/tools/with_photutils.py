"""Source extraction with photutils, version 3, for the benchmark to compare with.

It finds sources as its guide says, with the tool's parameters, and writes background, RMS,
segmentation and a catalogue; no picture.

    tests/tools/with_photutils.py IMAGE OUTPUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
from astropy.convolution import convolve
from astropy.io import fits
from astropy.wcs import WCS
from photutils.background import Background2D
from photutils.segmentation import SourceCatalog, deblend_sources, detect_sources

KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
COLUMNS = """
label bbox_xmin bbox_xmax bbox_ymin bbox_ymax area x_centroid y_centroid covariance_xx covariance_yy
covariance_xy semimajor_axis semiminor_axis orientation ellipse_cxx ellipse_cyy ellipse_cxy
segment_flux segment_flux_err max_value max_value_xindex max_value_yindex kron_radius kron_flux
kron_flux_err x_centroid_win y_centroid_win
"""


def main(image_path, output_dir):
    """Extract the sources of a FITS image of shape (ny, nx) and write the products."""
    output = Path(output_dir)
    data, header = fits.getdata(image_path, header=True)
    data = data.astype(np.float32)

    background = Background2D(data, 64, exclude_percentile=50)  # with the boxes cut by the edges
    level, noise = background.background, background.background_rms
    subtracted = data - level
    convolved = convolve(subtracted, KERNEL)
    segments = detect_sources(convolved, 1.5 * noise, 5)
    segments = deblend_sources(convolved, segments, 5, contrast=0.005, progress_bar=False)

    sources = SourceCatalog(
        subtracted,
        segments,
        convolved_data=convolved,
        error=noise,
        wcs=WCS(header),
        kron_params=(2.5, 3.5, 0.0),
    )
    catalog = sources.to_table(columns=COLUMNS.split())
    catalog["flux_radius"] = sources.flux_radius(0.5)
    catalog["ra"], catalog["dec"] = sources.sky_centroid.ra.deg, sources.sky_centroid.dec.deg

    fits.writeto(output / "background.fits", level)
    fits.writeto(output / "rms.fits", noise)
    fits.writeto(output / "segmentation.fits", segments.data)
    catalog.write(output / "catalog.tsv", format="ascii.tab")


if __name__ == "__main__":
    main(*sys.argv[1:])
