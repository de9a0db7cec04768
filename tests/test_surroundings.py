"""What is around a run: network, home, locale, directory, paths, and another run beside it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits

import source_extractor
from common import SCRIPT, all_products, call, start, start_code, tree
from contract import ALL_PRODUCTS
from headers import cards
from source_extractor import PRODUCTS

WITHOUT_NETWORK = """
import socket, sys

def refuse(*args, **kwargs):
    print("asked for the network", file=sys.stderr)
    raise OSError("no network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import source_extractor
sys.exit(source_extractor.main())
"""


BEAM = {"BUNIT": "Jy/beam", "BMAJ": 3e-4, "BMIN": 2e-4}
OLD_EQUATOR = {"RADESYS": "FK4", "EQUINOX": 1950.0}


@pytest.mark.parametrize(
    ("axes", "one", "other"),
    [
        (("RA---TAN", "DEC--TAN"), OLD_EQUATOR, OLD_EQUATOR),
        # The frame of the Earth needs tables of its rotation, which astropy would download.
        (("TLON-TAN", "TLAT-TAN"), {"DATE-OBS": "2031-01-01"}, {"DATE-OBS": "2032-05-05"}),
    ],
    ids=["equatorial", "earth"],
)
def test_no_run_asks_for_the_network(write, stars, tmp_path, axes, one, other):
    image = write(stars, "image.fits", **cards(*axes, **BEAM, **one))
    measured = write(stars, "measured.fits", **cards(*axes, **BEAM, **other))
    arguments = image, "--measure-image", measured, *all_products(tmp_path / "products")
    done = start_code(WITHOUT_NETWORK, *arguments, env={"HOME": str(tmp_path)})
    assert done.returncode == 0
    assert "network" not in done.stderr
    assert tree(tmp_path / "products").keys() == set(ALL_PRODUCTS)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_run_needs_no_home_display_or_locale_and_leaves_nothing(write, stars, tmp_path, threads):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bare = {"HOME": "/proc", "TMPDIR": str(scratch), "LC_ALL": "C"}
    bare |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = *all_products(tmp_path / "products"), "--threads", threads
    done = start(write(stars), *options, cwd="/", env=bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "products").keys() == set(ALL_PRODUCTS)
    assert not list(scratch.iterdir())


def test_what_matplotlib_is_set_to_changes_no_picture(write, stars, tmp_path):
    image, settings = write(stars), "text.usetex: True\nfigure.facecolor: red\nnonsense\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    for number, place in enumerate((tmp_path, "/")):
        done = start(image, "-q", "-o", tmp_path / str(number), cwd=place)
        assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "0") == tree(tmp_path / "1")


@pytest.mark.parametrize("name", ['it\'s "so" $(touch y)', "x\ny", "Süd ☉", "-q", "*.fits"])
def test_a_path_may_hold_anything(write, stars, tmp_path, monkeypatch, capsys, name):
    odd = tmp_path / name
    odd.mkdir()
    image, mask = write(stars), write(np.zeros(stars.shape, np.uint8), "mask.fits")
    inputs = [path.rename(odd / f"{name}.{path.name}") for path in (image, mask)]
    monkeypatch.chdir(odd)
    assert call(inputs[0], "-v", "--mask", inputs[1], *all_products(odd / "products")) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert tree(odd / "products").keys() == set(ALL_PRODUCTS)
    assert len(tree(tmp_path)) == 2 + len(ALL_PRODUCTS)
    history = fits.getheader(odd / "products" / "rms.fits")["HISTORY"]
    assert str(tmp_path) not in f"{history}{said.out}"


def test_two_runs_at_once_in_one_directory_do_not_meet(image, tmp_path):
    command, runs = [sys.executable, SCRIPT, image, "-q"], []
    for run in "ab":
        own = [f"{source_extractor.option_of(name)}={name}{run}.x" for name in PRODUCTS]
        runs.append(subprocess.Popen([*command, *own], cwd=tmp_path))
    assert [run.wait(60) for run in runs] == [0, 0]
    for name in ("catalog", "overlay", "overview", "regions"):
        one, other = (Path(tmp_path, f"{name}{run}.x").read_bytes() for run in "ab")
        assert one == other
    assert len(tree(tmp_path)) == 1 + 2 * len(ALL_PRODUCTS)


def test_products_are_the_same_to_the_byte_whoever_makes_them(write, stars, tmp_path):
    image, made = write(stars, **cards(**BEAM)), []
    packed = "--subtracted", "x/s.fits.gz", "--catalog-fits", "x/c.fits.gz", "--rms", "x/rms.tiff"
    for number in ("1", "3"):
        place = tmp_path / number
        place.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": number, "SOURCE_DATE_EPOCH": number}
        options = (*all_products(Path("x")), *packed, "--threads", number)
        assert start(image, *options, cwd=place, env=environment).returncode == 0
        made.append(tree(place))
    assert len(made[0]) == len(ALL_PRODUCTS)
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "remark",
    [
        'ImageJ=1.53\nimages=2\nInfo=`touch y`\n"\n',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><OME UUID="u">&x;</OME>',
        '{"shape": __import__("os").system("touch y")}',
    ],
)
def test_what_a_tiff_says_is_not_done(run, stars, tmp_path, monkeypatch, remark):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("image.tif", stars, description=remark, metadata=None)
    assert run("image.tif").code in (0, 1)
    assert not Path("y").exists()
