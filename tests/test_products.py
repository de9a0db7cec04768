"""The products: which, where, of what kind, and what their headers say."""

import os

import numpy as np
import pandas as pd
import pytest
import sep
import tifffile
from astropy.io import fits

import source_extractor
from common import all_products, extract, tree
from contract import ALL_PRODUCTS, DEFAULTS, FIVE, NOT_IN_HISTORY, ON_REQUEST

# Which and where


def test_the_five_products_are_written_by_default_and_replace_older_ones(run, image):
    first = tree(run(image, "--thresh", 1000).directory)
    again = tree(run(image).directory)
    assert set(first) == set(again) == FIVE
    assert again["catalog.tsv"] != first["catalog.tsv"]


@pytest.mark.parametrize(("option", "name"), ON_REQUEST.items())
def test_only_the_requested_product_joins_the_five(option, name):
    args = source_extractor.build_parser().parse_args(["image.fits", option, name])
    assert {path.name for path in source_extractor.product_paths(args).values()} == FIVE | {name}


def test_products_go_to_the_working_directory_or_to_one_that_is_made(image, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    extract(image)
    assert set(tree(here)) == FIVE
    extract(image, "-o", tmp_path / "a" / "b" / "c")
    assert set(tree(tmp_path / "a")) == {f"b/c/{name}" for name in FIVE}


def test_explicit_paths_leave_nothing_in_the_output_directory(run, write, stars, tmp_path):
    names = {"--background": "level.fits", "--rms": "noise.fits", "--segmentation": "map.fits"}
    names |= {"--overlay": "picture", "--catalog": "table.txt"}
    own = tmp_path / "my own"
    result = run(write(stars), *(x for option in names for x in (option, own / names[option])))
    assert result.code == 0
    assert set(tree(own)) == set(names.values())
    assert not result.directory.exists()
    assert (own / "picture").read_bytes().startswith(b"\x89PNG")


MAGIC = {"fits": b"SIMPLE", "gzip": b"\x1f\x8b", "tiff": b"II*\0"}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ((), {"b.fits.gz": "gzip", "b.dat": "fits", "b": "fits"}),
        ((), {"b.tif": "tiff", "b.tiff": "tiff", "b.TIF": "tiff"}),
        (("--image-format", "tiff"), {"b.dat": "tiff", "b.fits": "tiff"}),
        (("--image-format", "fits"), {"b.tif": "fits"}),
    ],
)
def test_image_format_goes_by_option_then_by_extension(write, stars, tmp_path, options, kinds):
    background = sep.Background(stars)
    expected = background.back(), background.rms(), stars - background.back()
    paths = [tmp_path / name for name in kinds]
    named = zip(("--background", "--rms", "--subtracted"), paths, strict=False)
    words = [word for pair in named for word in pair]
    extract(write(stars), "-o", tmp_path, *options, *words)
    for path, kind, pixels in zip(paths, kinds.values(), expected, strict=False):
        assert path.read_bytes().startswith(MAGIC[kind])
        found = tifffile.imread(path) if kind == "tiff" else fits.getdata(path)
        np.testing.assert_array_equal(found, pixels)


def test_products_get_the_permissions_that_the_umask_leaves(image, tmp_path):
    before = os.umask(0o027)
    try:
        extract(image, *all_products(tmp_path / "products"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "products").iterdir()}
    assert modes == dict.fromkeys(ALL_PRODUCTS, 0o640)


def test_a_product_replaces_a_link_and_leaves_alone_what_it_pointed_to(run, write, stars, tmp_path):
    precious, link = tmp_path / "precious.tsv", tmp_path / "link.tsv"
    precious.write_text("precious")
    link.symlink_to(precious)
    assert run(write(stars), "--catalog", link).code == 0
    assert precious.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text().startswith("id\tx\ty\t")


# Images


def test_fits_products_obey_the_standard_and_have_the_unit_of_their_values(everything):
    for path in everything.glob("*.fits"):
        with fits.open(path) as hdus:
            hdus.verify("exception")
            in_image_values = path.stem in ("background", "rms", "subtracted")
            assert hdus[0].header.get("BUNIT") == ("nJy" if in_image_values else None)
            if path.stem == "segmentation":
                assert hdus[0].data.dtype == np.dtype(">i4")
                assert "BZERO" not in hdus[0].header


@pytest.mark.parametrize(("pixels", "products"), [(">i4", ">f4"), (">f4", ">f4"), (">f8", ">f8")])
def test_levels_are_float32_unless_the_image_is_float64(run, write, stars, pixels, products):
    result = run(write(stars.astype(pixels)))
    assert result.image("background").dtype == result.image("rms").dtype == products


@pytest.mark.parametrize(
    ("side", "dtype"), [(0, np.uint8), (15, np.uint8), (16, np.uint16)], ids=["0", "225", "256"]
)
def test_tiff_segmentation_is_the_smallest_unsigned_integer(run, write, side, dtype):
    image = np.zeros((136, 136), np.float32)
    image[:2] = 1
    cells = np.add.outer(np.arange(side) * 8 + 8, np.arange(3)).ravel()
    image[np.ix_(cells, cells)] = 100
    options = ("--err-option", "none", "--thresh", 50, "--filter-case", "none")
    result = run(write(image), "--image-format", "tiff", *options)
    labels = tifffile.imread(result.directory / "segmentation.tiff")
    assert labels.dtype == dtype
    assert labels.max() == len(result.catalog) == side**2


# History

GIVEN = {
    **{"image": "image.fits", "plane": 0, "mask_box": [[0, 1, 2, 3], [4, 5, 6, 7]]},
    **{"bw": 32, "thresh": 2.25, "gain": 3.0, "clean": False},
}


def history(path):
    """Return the lines in which a product, FITS or TIFF, tells how it was made."""
    if path.suffix == ".fits":
        return list(fits.getheader(path)["HISTORY"])
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[0].description.splitlines()


@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_history_has_the_version_and_each_parameter(run, write, stars, form):
    boxes = ("--mask-box", 0, 1, 2, 3, "--mask-box", 4, 5, 6, 7)
    options = ("--thresh", 2.25, "--bw", 32, "--gain", 3, "--no-clean", "--plane", 0, *boxes)
    result = run(write(stars), *options, "--image-format", form)
    program = f"source_extractor.py {source_extractor.__version__} (sep {sep.__version__})"
    told = {
        f"{name} = {value!r}"
        for name, value in (DEFAULTS | GIVEN).items()
        if value not in (None, []) and name not in NOT_IN_HISTORY
    }
    for product in ("background", "rms", "segmentation"):
        said = history(result.directory / f"{product}.{form}")
        assert said[0] == f"{program}: {product}"
        assert told <= set(said)


def test_the_hdu_in_history_can_be_given_again(run, tmp_path, stars):
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(stars[:50]), fits.ImageHDU(stars, name="SCI")]
    fits.HDUList(hdus).writeto(tmp_path / "mef.fits")
    result = run(tmp_path / "mef.fits", "--hdu", "SCI")
    assert "hdu = 2" in history(result.directory / "rms.fits")
    again = run(tmp_path / "mef.fits", "--hdu", 2)
    pd.testing.assert_frame_equal(again.catalog, result.catalog)


@pytest.mark.parametrize("form", ["fits", "tiff"])
def test_odd_file_names_are_kept_in_history_as_ascii(run, write, stars, form):
    name = f'é☃ 星 o\'brien "x" new\nline 50%s{{0}} {"x" * 180}.fits'
    result = run(write(stars, name), "--image-format", form)
    assert result.code == 0
    assert ascii(name) in "".join(history(result.directory / f"background.{form}"))
