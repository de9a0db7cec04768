"""Some of the cases that tools/fuzz.py makes without end, and what was found on the way."""

import gzip
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from common import SCRIPT, call, insert_cards, start
from contract import one_line
from files import patched_tiff, tiff_bytes

FUZZ = Path(__file__).parent / "tools" / "fuzz.py"


@pytest.mark.parametrize(
    ("kind", "seed", "cases"),
    [("files", 100, 75), ("files", 31, 75), ("options", 100, 150), ("faults", 100, 20)],
)
def test_whatever_comes_ends_in_good_order(tmp_path, kind, seed, cases):
    command = [sys.executable, FUZZ, kind, "--seed", seed, "--cases", cases, "--seconds", 600]
    done = subprocess.run(
        [*map(str, command), "--keep", tmp_path / "failures"],
        cwd=SCRIPT.parent,
        env={"PYTHONPATH": str(SCRIPT.parent), "PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 failed" in done.stdout
    some_case_succeeded = re.search(r": .+? [1-9]\d*( +\d+){3}$", done.stdout, re.MULTILINE)
    assert kind == "faults" or some_case_succeeded


def test_a_header_without_an_end_is_refused(run, write, stars):
    path = write(stars)
    path.write_bytes(path.read_bytes()[:320].ljust(30_000_000))
    run(path).assert_refused(path)


def test_a_size_beyond_all_numbers_is_refused(run, write, stars):
    path = insert_cards(
        write(stars), *[f"NAXIS{n}  = {2**62:20}".ljust(80).encode() for n in (1, 2)]
    )
    path.write_bytes(path.read_bytes().replace(b"NAXIS1  =                  160", b" " * 30))
    path.write_bytes(path.read_bytes().replace(b"NAXIS2  =                  120", b" " * 30))
    run(path).assert_refused(path)


@pytest.mark.parametrize("role", [(), ("--filter-case", "file", "--filter-file")])
def test_what_is_no_file_is_not_waited_for(run, write, stars, tmp_path, role):
    os.mkfifo(tmp_path / "pipe")
    arguments = (write(stars), *role) if role else ()
    run(*arguments, tmp_path / "pipe").assert_refused("pipe: a directory, pipe or device")


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
def test_a_kernel_may_have_remarks_in_any_letters(run, write, stars, tmp_path, coding):
    (tmp_path / "kernel").write_bytes("# by \xc5ngstr\xf6m 3\n1 2 1\n".encode(coding))
    result = run(write(stars), "--filter-case", "file", "--filter-file", tmp_path / "kernel")
    assert result.code == 0


def test_a_kernel_file_without_end_is_not_read_to_its_end(run, write, stars, tmp_path):
    with open(tmp_path / "kernel", "wb") as file:
        file.truncate(10**11)
    result = run(write(stars), "--filter-case", "file", "--filter-file", tmp_path / "kernel")
    result.assert_refused("kernel", "not rows of numbers")


@pytest.mark.parametrize(("kind", "megabytes"), [("AS", 300), ("AS", 500), ("DATA", 200)])
def test_a_limit_of_memory_costs_one_line(write, tmp_path, kind, megabytes):
    image = write(np.random.default_rng(0).normal(size=(4000, 4000)).astype(np.float32))
    limit = 2 * [megabytes * 10**6]
    done = start(
        image,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), limit),
    )
    assert done.returncode == 1
    assert re.fullmatch(one_line("error", ".*memory.*"), done.stderr)
    assert list(tmp_path.iterdir()) == [image]


@pytest.mark.parametrize(("key", "value"), [("NAXIS1", "1.5"), ("NAXIS2", "T"), ("BITPIX", "")])
def test_a_size_that_is_no_whole_number_is_refused(run, write, stars, key, value):
    path = insert_cards(write(stars))
    text = re.sub(
        f"{key:8}= +-?\\d+".encode(), f"{key:8}= {value}".encode(), path.read_bytes(), count=1
    )
    path.write_bytes(text[:2880].ljust(2880) + path.read_bytes()[2880:])
    run(path).assert_refused(path)


def test_an_end_with_other_bytes_than_blanks_is_one(run, write, stars):
    path = write(np.tile(stars, (30, 20)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"END".ljust(80), b"END".ljust(80, b"\0"), 1))
    assert run(path).code == 0


def test_what_follows_an_image_is_its_own_affair(run, write, stars):
    path = write(stars)
    path.write_bytes(path.read_bytes() + b" " * 30_000_000)
    assert run(path).code == 0


def test_more_pixels_than_can_be_counted_are_refused(run, tmp_path, stars):
    hdu = fits.CompImageHDU(np.stack([stars.astype(np.int16)] * 2), name="SCI")
    hdu.writeto(tmp_path / "image.fits")
    content = (tmp_path / "image.fits").read_bytes()
    card = b"ZNAXIS3 =                    2"
    assert card in content
    content = content.replace(card, b"ZNAXIS3 =  4611686018427387904")
    (tmp_path / "image.fits").write_bytes(content)
    run(tmp_path / "image.fits").assert_refused("image.fits")


@pytest.mark.parametrize("dtype", [np.uint64, np.float32])
def test_a_name_that_can_not_be_read_is_left_out(run, write, stars, dtype):
    path = insert_cards(write(stars.astype(dtype)), b"EXTNAME = 'abc")
    result = run(path)
    assert result.code == 0
    assert "image.fits[0] PRIMARY: 160 x 120" in result.out


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength"])
def test_a_tiff_without_pixels_is_refused(run, write, stars, tmp_path, tag):
    path = tmp_path / "image.tif"
    path.write_bytes(patched_tiff(tiff_bytes(stars, compression="zlib"), tag, 0))
    run(write(stars), "--measure-image", path).assert_refused(path)


def test_a_message_names_no_more_hdus_than_can_be_read(run, tmp_path):
    fits.HDUList([fits.PrimaryHDU(), *[fits.ImageHDU()] * 500]).writeto(tmp_path / "many.fits")
    result = run(tmp_path / "many.fits")
    result.assert_refused("; 19 (no name): empty; and 481 more")


def test_large_stacks_of_threads_keep_no_tiff_from_being_read(tmp_path, stars):
    path = tmp_path / "image.tif"
    path.write_bytes(tiff_bytes(np.tile(stars, (4, 4)), tile=(32, 32), compression="zlib"))
    stack = 2 * [10**8]
    done = start(
        *(path, "-o", tmp_path),
        env=os.environ | {"TIFFFILE_NUM_THREADS": "32"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, stack),
    )
    assert done.returncode == 0


def test_what_follows_an_image_without_columns_is_read(run, tmp_path, stars):
    hdus = fits.HDUList([fits.PrimaryHDU(np.zeros((100, 0))), fits.ImageHDU(stars)])
    hdus.writeto(tmp_path / "image.fits.gz")
    assert run(tmp_path / "image.fits.gz").code == 0


def test_random_groups_are_passed_over(run, tmp_path, stars):
    values, parameter = np.zeros((2, 1, 4, 4), np.float32), [np.zeros(2, np.float32)]
    groups = fits.GroupData(values, bitpix=-32, parnames=["u"], pardata=parameter)
    fits.HDUList([fits.GroupsHDU(groups), fits.ImageHDU(stars)]).writeto(tmp_path / "image.fits")
    packed = tmp_path / "image.fits.gz"
    packed.write_bytes(gzip.compress((tmp_path / "image.fits").read_bytes()))
    assert "image.fits.gz[1]: 160 x 120" in run(packed).out


def test_what_libpng_says_is_told_in_our_words_or_not_at_all(tmp_path, stars, capfd):
    whole = tiff_bytes(stars.astype(np.uint8), compression="png")
    for place in range(whole.index(b"IEND") - 100, whole.index(b"IEND") - 8):
        content = bytearray(whole)
        content[place] ^= 1
        (tmp_path / "image.tif").write_bytes(content)
        assert call(tmp_path / "image.tif", "-o", tmp_path) == 1
        assert re.fullmatch(one_line("error", "image.tif: damaged.*"), capfd.readouterr().err)
