"""Write the pictures in README, form and tutorial, with the tool itself."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tifffile
from astropy.io import fits
from matplotlib.figure import Figure
from PIL import Image
from skimage.measure import label
from skimage.segmentation import expand_labels, find_boundaries

from sky import stacked_noise

ROOT = Path(__file__).resolve().parents[2]
HUBBLE, SKY = "hubble_deep_field.tiff", "sky.fits"

BRIGHT, FAINT = ("4", "140", "215", "351"), ("232", "351", "12", "130")  # of the galaxies

# Each picture of the tutorial: image and options.
TUTORIAL = {
    "default": (HUBBLE,),
    "threshold": (HUBBLE, "--thresh", "3"),
    "galaxies": (SKY,),
    "contrast": (SKY, "--deblend-cont", "0.0001"),
    "mask": (SKY, "--mask-box", *BRIGHT, "--mask-box", *FAINT),
}
SEEDS = (*TUTORIAL["threshold"], "--seeds", "seeds.tif")
WIDTH = 480


def extract(directory, image, *options):
    """Run the tool with products in a directory; return the picture of the sources."""
    form = "--form", ROOT / "source_extractor.xml"  # for warnings as in Galaxy
    command = [sys.executable, ROOT / "source_extractor.py", ROOT / "test-data" / image, "-q"]
    subprocess.run([*command, *form, *options], cwd=directory, check=True)
    return Image.open(Path(directory, "sources.png")).convert("RGB")


def save(picture, path):
    """Write a picture in few bytes."""
    picture.quantize(128).save(ROOT / path, optimize=True)


def noise_ratios(directory, image):
    """Return radii of empty apertures, and their noise relative to that of independent pixels."""
    fits.writeto(Path(directory, "noise.fits"), image.astype(np.float32), overwrite=True)
    extract(directory, Path(directory, "noise.fits"), "--thresh", "10")
    history = str(fits.getheader(Path(directory, "background.fits"))["HISTORY"])
    return np.array(re.findall(r"noise_ratio at radius (\S+) = (\S+)", history), dtype=float).T


def plot_noise(directory, path):
    """Plot the noise of empty apertures, for white noise and for a stack of shifted images."""
    rng, shape = np.random.default_rng(1), (1000, 1000)
    noises = {"resampled": stacked_noise(shape, rng), "white": rng.normal(size=shape)}
    figure = Figure(figsize=(5, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="radius of the aperture (pixels)", ylabel="noise / independent pixels")
    for name, image in noises.items():
        axes.plot(*noise_ratios(directory, image), "o-", label=name)
    axes.set(xlim=(0, 15), ylim=(0, None))
    axes.legend()
    figure.savefig(Path(directory, "noise.png"))
    save(Image.open(Path(directory, "noise.png")).convert("RGB"), path)


def main():
    """Write static/images/sources.png, docs/noise.png, and docs/tutorial/*."""
    with TemporaryDirectory() as directory:
        for name, call in TUTORIAL.items():
            picture = extract(directory, *call)
            if name == "threshold":
                save(picture, "static/images/sources.png")
            height = round(picture.height * WIDTH / picture.width)
            small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
            small.save(ROOT / f"docs/tutorial/{name}.jpg", quality=80)
        plot_noise(directory, "docs/noise.png")
        extract(directory, *SEEDS)
        seeds = tifffile.imread(Path(directory, "seeds.tif"))
    cells = expand_labels(label(seeds), distance=max(seeds.shape))
    outlines = np.stack([np.where(find_boundaries(cells), 255, seeds), seeds, seeds], axis=2)
    for name, image in {"seeds": seeds, "cells": outlines}.items():
        upright = Image.fromarray(image[::-1]).convert("RGB")
        save(upright, f"docs/tutorial/{name}.png")


if __name__ == "__main__":
    main()
