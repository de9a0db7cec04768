"""Write the files in test-data/: a simulated sky with truth, mask and kernel, and a real picture.

    tests/tools/make_test_data.py [DIRECTORY]

sky.fits                 sky like the DESI Legacy Surveys' in g: two bright stars that pull the
                         background up, faint galaxies and stars, a gradient, a TAN WCS
sky_truth.tsv            its sources, as `sky.simulate` knows them
sky_mask.fits            1 in the rectangles MASK_BOXES around the bright stars, else 0; compressed
kernel.conv              Gaussian of KERNEL_FWHM pixels in SExtractor's filter format
stack.fits               extensions SCI, a cube of three planes: stars, sky alone, the same stars
                         twice as bright; ERR, the noise of a pixel; DQ, 1 around the first star
mosaic.fits              stars, one of them saturated, three on a bad column; 0 in that column, and
                         where the mosaic ends
empty.fits               sky alone
hubble_deep_field.tiff   grey crop of the Hubble Deep Field (R. Williams, the HDF team and NASA;
                         public domain), from the picture that scikit-image ships

Everything comes from the seed, so that the files are the same whenever they are made. The picture
needs scikit-image and tifffile, the others numpy and astropy.
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile
from astropy.io import fits
from skimage.data import hubble_deep_field

from sky import grid_positions, random_sources, simulate, stars, tan_wcs, vstack

SEED = 20240
SHAPE = (360, 360)

# XMIN XMAX YMIN YMAX, ends included, 0-based: what --mask-box takes, once for each.
MASK_BOXES = ((4, 140, 215, 351), (232, 351, 12, 130))

KERNEL_SIZE = 5
KERNEL_FWHM = 3.0

STACK_SHAPE = (96, 128)
STACK_FLUXES = (2000.0, 0.0, 4000.0)  # of each star, by plane
STACK_NOISE = 2.0


def sky():
    """Image of SHAPE in nanomaggies, its header, and its truth table."""
    kinds = {"galaxy_fraction": 0.6, "radius": (1.0, 4.0), "fwhm": 3.6, "beta": 3.0}
    faint = random_sources(SHAPE, 80, seed=SEED, flux=(0.25, 12.0), slope=0.7, **kinds)
    centres = [72.3, 291.8], [283.6, 71.2]
    bright = stars(*centres, [900.0, 500.0], fwhm=6.0, beta=2.5)
    halos = stars(*centres, [450.0, 320.0], fwhm=70.0, beta=5.0)
    halos["kind"] = "halo"
    wcs = tan_wcs(SHAPE, ra=186.445, dec=12.662, scale=0.262)
    sources = vstack([bright, halos, faint])
    levels = {"level": 0.0005, "gradient": (0.0005, 0.0003), "noise": 0.001}
    image, truth = simulate(SHAPE, sources, seed=SEED + 1, wcs=wcs, **levels)
    header = wcs.to_header()
    header["BUNIT"] = ("nanomaggy", "1 nanomaggy is 22.5 mag (AB)")
    header["BAND"] = ("g", "that the levels are like")
    header["COMMENT"] = "Simulated by make_test_data.py; sky_truth.tsv lists the sources."
    return image, header, truth


def mask():
    """Mask of SHAPE, uint8, and a header that says which boxes it is made of."""
    excluded = np.zeros(SHAPE, np.uint8)
    header = fits.Header()
    header["COMMENT"] = "1: masked. The same as:"
    for xmin, xmax, ymin, ymax in MASK_BOXES:
        excluded[ymin : ymax + 1, xmin : xmax + 1] = 1
        header["COMMENT"] = f"--mask-box {xmin} {xmax} {ymin} {ymax}"
    return excluded, header


def kernel():
    """Text of a Gaussian kernel of KERNEL_SIZE x KERNEL_SIZE in SExtractor's format, peak 1."""
    offset = np.arange(KERNEL_SIZE) - KERNEL_SIZE // 2
    profile = 2.0 ** -((2 * offset / KERNEL_FWHM) ** 2)
    rows = (" ".join(f"{value:.6f}" for value in row) for row in np.outer(profile, profile))
    title = f"# {KERNEL_SIZE}x{KERNEL_SIZE} Gaussian with FWHM = {KERNEL_FWHM} pixels."
    return "\n".join(["CONV NORM", title, *rows]) + "\n"


def stack():
    """HDUs of a cube with its noise and data quality; the primary HDU is empty."""
    x, y = grid_positions(STACK_SHAPE, 32, seed=SEED)
    planes = [
        simulate(STACK_SHAPE, stars(x, y, flux), seed=SEED + i, level=100.0, noise=STACK_NOISE)[0]
        for i, flux in enumerate(STACK_FLUXES)
    ]
    noise = np.full(STACK_SHAPE, STACK_NOISE, np.float32)
    quality = np.zeros(STACK_SHAPE, np.uint8)
    quality[:32, :32] = 1  # around the first star
    parts = {"SCI": np.stack(planes), "ERR": noise, "DQ": quality}
    extensions = [fits.ImageHDU(pixels, name=name) for name, pixels in parts.items()]
    return fits.HDUList([fits.PrimaryHDU(), *extensions])


def mosaic():
    """Stars of the stack's first flux and one of thirty times that, int16, and a header."""
    x, y = grid_positions(STACK_SHAPE, 32, seed=SEED)
    flux = np.full(len(x), STACK_FLUXES[0])
    flux[4] *= 30
    image, _ = simulate(STACK_SHAPE, stars(x, y, flux), seed=SEED, level=100.0, noise=STACK_NOISE)
    saturation, bad_column, end = 4000, 48, 92
    image = np.rint(np.minimum(image, saturation)).astype(np.int16)
    image[:, end:] = image[:, bad_column] = 0
    return image, fits.Header({"SATURATE": saturation})


def main(argv=None):
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parents[2] / "test-data"
    parser.add_argument("directory", nargs="?", type=Path, default=here, help="(%(default)s)")
    directory = parser.parse_args(argv).directory
    directory.mkdir(parents=True, exist_ok=True)

    def write(name, image, header=None):
        fits.writeto(directory / name, image, header, overwrite=True)

    image, header, truth = sky()
    write("sky.fits", image, header)
    truth.write(directory / "sky_truth.tsv", format="ascii.tab", overwrite=True)
    packed = fits.CompImageHDU(*mask(), compression_type="GZIP_1")
    packed.writeto(directory / "sky_mask.fits", overwrite=True)
    (directory / "kernel.conv").write_text(kernel())
    stack().writeto(directory / "stack.fits", overwrite=True)
    write("mosaic.fits", *mosaic())
    conditions = {"seed": SEED, "level": 100.0, "noise": STACK_NOISE}
    write("empty.fits", simulate((80, 96), stars([], [], []), **conditions)[0])
    colours = hubble_deep_field()[240:640, 300:700]
    grey = np.rint(colours @ (0.299, 0.587, 0.114)).astype(np.uint8)  # by ITU-R BT.601
    told = "Hubble Deep Field, part of; R. Williams and the HDF team (STScI) and NASA"
    packing = {"compression": "zlib", "predictor": True, "metadata": None}
    tifffile.imwrite(directory / "hubble_deep_field.tiff", grey, description=told, **packing)


if __name__ == "__main__":
    main()
