"""The products: which, where, the same each time, with the permissions that are due."""

import os

import numpy as np
import pytest
import sep
import tifffile
from astropy.io import fits

from common import NINE_OPTIONS, all_nine, extract, tree
from contract import FIVE, NINE, ON_REQUEST


def test_the_five_products_and_no_other_file_are_written_by_default(run, write, stars):
    assert set(tree(run(write(stars)).directory)) == FIVE


def test_all_nine_products_are_written_on_request(nine):
    assert set(tree(nine)) == NINE


@pytest.mark.parametrize(("option", "name"), ON_REQUEST.items())
def test_only_the_requested_product_joins_the_five(run, write, stars, tmp_path, option, name):
    result = run(write(stars), option, tmp_path / "products" / name)
    assert set(tree(result.directory)) == FIVE | {name}


def test_products_go_to_the_working_directory_by_default(write, stars, tmp_path, monkeypatch):
    image = write(stars)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    extract(image)
    assert set(tree(tmp_path / "here")) == FIVE


def test_the_output_directory_is_made_with_its_parents(write, stars, tmp_path):
    extract(write(stars), "-o", tmp_path / "a" / "b" / "c")
    assert set(tree(tmp_path / "a")) == {f"b/c/{name}" for name in FIVE}


def test_explicit_paths_leave_nothing_in_the_output_directory(run, write, stars, tmp_path):
    names = {
        "--background": "level.fits",
        "--rms": "noise.fits",
        "--segmentation": "map.fits",
        "--overlay": "picture",
        "--catalog": "table.txt",
    }
    own = tmp_path / "my own"
    result = run(write(stars), *(x for option in names for x in (option, own / names[option])))
    assert result.code == 0
    assert set(tree(own)) == set(names.values())
    assert not result.directory.exists()
    assert (own / "picture").read_bytes().startswith(b"\x89PNG")


MAGIC = {"fits": b"SIMPLE", "gzip": b"\x1f\x8b", "tiff": b"II*\0"}


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("b.fits", (), "fits"),
        ("b.fits.gz", (), "gzip"),
        ("b.dat", (), "fits"),
        ("b", (), "fits"),
        ("b.tif", (), "tiff"),
        ("b.tiff", (), "tiff"),
        ("b.TIF", (), "tiff"),
        ("b.dat", ("--image-format", "tiff"), "tiff"),
        ("b.fits", ("--image-format", "tiff"), "tiff"),
        ("b.tif", ("--image-format", "fits"), "fits"),
    ],
)
def test_image_format_goes_by_option_then_by_extension(write, stars, tmp_path, name, options, kind):
    path = tmp_path / name
    extract(write(stars), "-o", tmp_path, "--background", path, *options)
    assert path.read_bytes().startswith(MAGIC[kind])
    found = tifffile.imread(path) if kind == "tiff" else fits.getdata(path)
    np.testing.assert_array_equal(found, sep.Background(stars).back())


def test_image_format_tiff_changes_the_default_names(run, write, stars):
    result = run(write(stars), "--image-format", "tiff")
    assert set(tree(result.directory)) == {name.replace(".fits", ".tiff") for name in FIVE}


def test_two_runs_give_the_same_bytes(nine, tmp_path):
    extract(nine.with_name("nine.fits"), *NINE_OPTIONS, *all_nine(tmp_path))
    assert tree(tmp_path) == tree(nine)


def test_two_runs_give_the_same_bytes_in_tiff(write, stars, tmp_path):
    image = write(stars)
    for name in ("once", "again"):
        directory = tmp_path / name
        extract(image, "-o", directory, "--image-format", "tiff")
    assert tree(tmp_path / "once") == tree(tmp_path / "again")


def test_products_get_the_permissions_that_the_umask_leaves(write, stars, tmp_path):
    image = write(stars)
    before = os.umask(0o027)
    try:
        extract(image, *all_nine(tmp_path / "products"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "products").iterdir()}
    assert modes == dict.fromkeys(NINE, 0o640)


def test_a_product_replaces_a_link_and_leaves_alone_what_it_pointed_to(run, write, stars, tmp_path):
    precious, link = tmp_path / "precious.tsv", tmp_path / "link.tsv"
    precious.write_text("precious")
    link.symlink_to(precious)
    assert run(write(stars), "--catalog", link).code == 0
    assert precious.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text().startswith("id\tx\ty\t")


def test_older_products_are_replaced(run, write, stars):
    image = write(stars)
    first = tree(run(image, "--thresh", 1000).directory)
    again = tree(run(image).directory)
    assert again.keys() == first.keys()
    assert again["catalog.tsv"] != first["catalog.tsv"]
