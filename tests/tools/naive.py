"""Source extraction as a first version would do it, for the benchmark to compare with.

It takes the steps of SEP's tutorial one after the other, with SEP's defaults, and writes the same
five products: background, RMS, segmentation, overlay and catalogue.

    tests/tools/naive.py IMAGE OUTPUT_DIR
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sep
from astropy.io import fits
from astropy.wcs import WCS
from matplotlib.patches import Ellipse

image_path, output = Path(sys.argv[1]), Path(sys.argv[2])
output.mkdir(parents=True, exist_ok=True)

data = fits.getdata(image_path).astype(np.float64)
background = sep.Background(data)
level = background.back()
rms = background.rms()
subtracted = data - level
sep.set_extract_pixstack(data.size)
noise = background.globalrms
sources, segmentation = sep.extract(subtracted, 1.5, err=noise, segmentation_map=True)

theta = np.clip(sources["theta"], -np.pi / 2, np.pi / 2)
shape = sources["x"], sources["y"], sources["a"], sources["b"], theta
neighbours = {"segmap": segmentation, "seg_id": np.arange(1, len(sources) + 1)}
kron, _ = sep.kron_radius(subtracted, *shape, 6.0, **neighbours)
flux, error, _ = sep.sum_ellipse(subtracted, *shape, 2.5 * kron, err=noise, subpix=1, **neighbours)
radius, _ = sep.flux_radius(
    subtracted, *shape[:2], 6 * sources["a"], 0.5, normflux=flux, subpix=5, **neighbours
)
xwin, ywin, _ = sep.winpos(subtracted, *shape[:2], 2 / 2.35 * radius)
ra, dec = WCS(fits.getheader(image_path)).all_pix2world(*shape[:2], 0)

fits.writeto(output / "background.fits", level, overwrite=True)
fits.writeto(output / "rms.fits", rms, overwrite=True)
fits.writeto(output / "segmentation.fits", segmentation, overwrite=True)
catalog = pd.DataFrame(sources).assign(
    ra=ra, dec=dec, flux_auto=flux, fluxerr_auto=error, flux_radius=radius, xwin=xwin, ywin=ywin
)
catalog.to_csv(output / "catalog.tsv", sep="\t", index=False)

ny, nx = data.shape
figure = plt.figure(figsize=(nx / 100, ny / 100), dpi=100)
axes = figure.add_axes((0, 0, 1, 1))  # a pixel of the picture for each of the image
mean, sigma = np.mean(subtracted), np.std(subtracted)
limits = {"vmin": mean - sigma, "vmax": mean + sigma}
axes.imshow(subtracted, interpolation="nearest", cmap="gray", origin="lower", **limits)
for source in sources:
    place, angle = (source["x"], source["y"]), np.degrees(source["theta"])
    ellipse = Ellipse(place, width=6 * source["a"], height=6 * source["b"], angle=angle)
    ellipse.set_facecolor("none")
    ellipse.set_edgecolor("red")
    axes.add_artist(ellipse)
figure.savefig(output / "sources.png")
