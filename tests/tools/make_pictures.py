"""Write the pictures in README, form and tutorial, with the tool itself."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tifffile
from PIL import Image
from skimage.measure import label
from skimage.segmentation import expand_labels, find_boundaries

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


def main():
    """Write static/images/sources.png and docs/tutorial/*."""
    with TemporaryDirectory() as directory:
        for name, call in TUTORIAL.items():
            picture = extract(directory, *call)
            if name == "threshold":
                save(picture, "static/images/sources.png")
            height = round(picture.height * WIDTH / picture.width)
            small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
            small.save(ROOT / f"docs/tutorial/{name}.jpg", quality=80)
        extract(directory, *SEEDS)
        seeds = tifffile.imread(Path(directory, "seeds.tif"))
    cells = expand_labels(label(seeds), distance=max(seeds.shape))
    outlines = np.stack([np.where(find_boundaries(cells), 255, seeds), seeds, seeds], axis=2)
    for name, image in {"seeds": seeds, "cells": outlines}.items():
        upright = Image.fromarray(image[::-1]).convert("RGB")
        save(upright, f"docs/tutorial/{name}.png")


if __name__ == "__main__":
    main()
