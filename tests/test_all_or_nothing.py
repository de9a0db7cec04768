"""All or nothing: whatever stops a run, no new product stays, and no old one goes."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import source_extractor
from common import SCRIPT, all_products, call, extract, start_code, tree
from contract import ALL_PRODUCTS, ONE_ERROR, one_line
from sky import blobs


@pytest.fixture
def coarse_pictures():
    """Draw pictures with all their pixels here, so that a disk can be too full for them."""


@pytest.fixture
def old(tmp_path):
    """Return a directory that holds older products, all of them."""
    directory = tmp_path / "results"
    directory.mkdir()
    for name in ALL_PRODUCTS:
        (directory / name).write_text(f"old {name}")
    return directory


KERNEL = ["--filter-case", "file", "--filter-file", "note.txt"]
FAILURES = {
    "mask of another shape": (1, ["--mask", "small.fits"]),
    "no background box left": (1, ["--mask-box", "2", "159", "0", "119"]),
    "target is a directory": (2, ["--catalog", "folder"]),
    "target becomes a directory": (1, ["--catalog", "new/x", "--rms", "new/x/rms.fits"]),
    "target is a device": (2, ["--overview", os.devnull]),
    "target is the image": (2, ["--background", "image.fits"]),
    "target is the image by another name": (2, ["--subtracted", "folder/../image.fits"]),
    "target is a link to the image": (2, ["--rms", "link.fits"]),
    "target is the mask": (2, ["--mask", "small.fits", "--regions", "small.fits"]),
    "target is the kernel": (2, [*KERNEL, "--regions", "note.txt"]),
    "target is the measured image": (2, ["--measure-image", "small.fits", "--rms", "small.fits"]),
    "two products in one file": (2, ["--catalog", "x.tsv", "--overlay", "./x.tsv"]),
    "two products by default in one file": (2, ["--overlay", "results/catalog.tsv"]),
    "target where nobody may write": (1, ["--catalog", "/proc/catalog.tsv"]),
    "target below a file": (1, ["--catalog", "note.txt/catalog.tsv"]),
    "output directory is a file": (1, ["-o", "note.txt"]),
    "target's name too long": (1, ["--catalog", "x" * 300]),
}


@pytest.mark.parametrize(("code", "options"), FAILURES.values(), ids=FAILURES)
def test_a_failing_run_leaves_everything_as_it_was(
    write, stars, old, tmp_path, monkeypatch, capsys, code, options
):
    write(stars)
    write(stars[:50], "small.fits")
    (tmp_path / "note.txt").write_text("1 2\n3 4\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.fits").symlink_to("image.fits")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    arguments = ["image.fits", *all_products(old.relative_to(tmp_path)), *options]
    assert call(*arguments) == code
    assert re.fullmatch(ONE_ERROR, capsys.readouterr().err)
    assert tree(tmp_path) == before


def test_a_product_that_can_not_be_put_in_place_takes_the_others_back(
    write, stars, old, capsys, monkeypatch
):
    image = write(stars)
    for name in ("rms.fits", "catalog.tsv"):
        (old / name).unlink()
    before, put = tree(old), os.replace

    def refuse(source, target):
        if Path(source).name.startswith("new_") and str(target).endswith("sources.reg"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        put(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert call(image, *all_products(old)) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(one_line("error", r".*sources\.reg: can't be written.*"), said)
    assert tree(old) == before


SLOW = """
import sys, time
from matplotlib.figure import Figure
import source_extractor

def wait(*args, **kwargs):
    print("drawing", flush=True)
    time.sleep(60)

Figure.savefig = wait
sys.exit(source_extractor.main(sys.argv[1:]))
"""


def kill_while_drawing(number, image, output):
    """Send a signal to a run that is drawing; return its exit code, stderr, and hidden file."""
    command = [sys.executable, "-c", SLOW, image, "-q", *all_products(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def let_it_stop():  # in the background some signals are ignored
        os.umask(0o002)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=SCRIPT.parent, preexec_fn=let_it_stop, **pipes) as process:
        assert process.stdout.readline() == "drawing\n"
        (hidden,) = output.glob(".*")
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o700  # for its owner alone
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
    return process.returncode, err, hidden


def assert_new(directory):
    """Assert that a directory holds all products, and no old one."""
    found = tree(directory)
    assert found.keys() >= set(ALL_PRODUCTS)
    assert not any(content.startswith(b"old") for content in found.values())


@pytest.mark.parametrize("number", [*source_extractor.STOP_SIGNALS, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_everything_as_it_was(write, stars, old, tmp_path, number):
    image = write(stars)
    before = tree(tmp_path)
    code, err, hidden = kill_while_drawing(number, image, old)
    assert code in (-number, 128 + number)
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert tree(tmp_path) == before
    else:  # but for one hidden directory, beside which the next run succeeds
        assert before.items() <= tree(tmp_path).items()
        extract(image, *all_products(old))
        assert list(old.glob(".*")) == [hidden]
        assert_new(old)


KILLED_WHILE_PUTTING_IN_PLACE = """
import os, signal, sys
import source_extractor

def put_and_kill(*args, put=os.replace):
    put(*args)
    os.kill(parent, signal.SIGTERM)

os.replace = put_and_kill
parent = os.getpid()
sys.exit(source_extractor.main(sys.argv[1:]))
"""


def test_a_signal_while_products_are_put_in_place_leaves_all_new_ones(write, stars, old):
    image = write(stars)
    done = start_code(KILLED_WHILE_PUTTING_IN_PLACE, image, "-q", *all_products(old))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(tree(old)) == len(ALL_PRODUCTS)
    assert_new(old)


def test_a_product_keeps_the_mode_of_the_file_that_it_replaces(write, stars, old):
    (old / "catalog.tsv").chmod(0o640)
    extract(write(stars), "-o", old)
    assert stat.S_IMODE((old / "catalog.tsv").stat().st_mode) == 0o640


def test_a_run_after_one_that_was_stopped_is_a_run(write, stars, tmp_path, monkeypatch):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    image = write(stars)
    handlers = {number: signal.getsignal(number) for number in source_extractor.STOP_SIGNALS}
    with monkeypatch.context() as patch:
        patch.setattr(source_extractor, "build_mask", kill)
        assert call(image, "-o", tmp_path / "products") == 128 + signal.SIGTERM
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert call(image, "-o", tmp_path / "products") == 0


@contextmanager
def largest_file(size):
    """Refuse, as a full disk would, to let any file grow beyond a size (bytes)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_to_unpack_an_image_is_not_taken_for_damage(run, write, stars):
    image = write(stars, "image.fits.gz")
    with largest_file(50_000):
        result = run(image)
    result.assert_refused("image.fits.gz", os.strerror(errno.EFBIG))


@pytest.mark.parametrize(
    ("size", "options"), [(2000, ()), (30_000, ()), (2000, ("--image-format", "tiff"))]
)
def test_a_full_disk_costs_one_line_and_leaves_everything_as_it_was(
    run, write, old, tmp_path, size, options
):
    image = write(blobs((64, 64), (30, 30)))
    before = tree(tmp_path)
    with largest_file(size):
        result = run(image, "-q", "--catalog", old / "catalog.tsv", *options)
    assert result.code == 1
    assert re.fullmatch(one_line("error", r".*(products|results)/\w+\.\w+: .+"), result.err)
    assert tree(tmp_path) == before
