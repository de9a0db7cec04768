"""All or nothing: whatever stops a run, no new product stays, and no old one goes."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from astropy.io import fits

import source_extractor
from common import SCRIPT, all_nine, call, extract, start_code, tree
from contract import NINE, ONE_ERROR, one_line
from sky import blobs


@pytest.fixture
def old(tmp_path):
    """Return a directory that holds older products, all nine."""
    directory = tmp_path / "results"
    directory.mkdir()
    for name in NINE:
        (directory / name).write_text(f"old {name}")
    return directory


FAILURES = {
    "mask of another shape": (1, ["--mask", "small.fits"]),
    "mask of everything": (1, ["--mask", "image.fits"]),
    "mask that is no image": (1, ["--mask", "note.txt"]),
    "mask that is not there": (1, ["--mask", "nowhere.fits"]),
    "kernel of even size": (1, ["--filter-case", "file", "--filter-file", "note.txt"]),
    "box outside the image": (1, ["--mask-box", "1000", "1001", "0", "0"]),
    "no background box left": (1, ["--mask-box", "2", "159", "0", "119"]),
    "plane that is not there": (1, ["--plane", "1"]),
    "target is a directory": (2, ["--catalog", "folder"]),
    "target becomes a directory": (1, ["--catalog", "new/x", "--rms", "new/x/rms.fits"]),
    "more columns than FITS has": (2, ["--aperture-diameters", *map(str, range(1, 240))]),
    "target is a device": (2, ["--overview", os.devnull]),
    "target is the image": (2, ["--background", "image.fits"]),
    "target is the image by another name": (2, ["--subtracted", "folder/../image.fits"]),
    "target is a link to the image": (2, ["--rms", "link.fits"]),
    "target is the mask": (2, ["--mask", "small.fits", "--regions", "small.fits"]),
    "target is the kernel": (
        2,
        ["--filter-case", "file", "--filter-file", "note.txt", "--regions", "note.txt"],
    ),
    "target is the measured image": (2, ["--measure-image", "small.fits", "--rms", "small.fits"]),
    "two products in one file": (2, ["--catalog", "x.tsv", "--overlay", "./x.tsv"]),
    "two products by default in one file": (2, ["--overlay", "results/catalog.tsv"]),
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
    arguments = ["image.fits", *all_nine(old.relative_to(tmp_path)), *options]
    assert call(*arguments) == code
    assert re.fullmatch(ONE_ERROR, capsys.readouterr().err)
    assert tree(tmp_path) == before


@contextmanager
def no_root():
    """Give up the right of root to write anywhere."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_without_permission_costs_one_line(stars, capsys):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        fits.PrimaryHDU(stars).writeto(place / "image.fits")
        (place / "locked").mkdir(mode=0o555)
        (place / "open").mkdir()
        for path in (place, place / "open", place / "image.fits"):
            path.chmod(0o777)
        before = tree(place)
        with no_root():
            code = call(
                place / "image.fits", "-o", place / "open", "--catalog", place / "locked" / "x"
            )
        assert code == 1
        assert re.fullmatch(one_line("error", ".*locked.*"), capsys.readouterr().err)
        assert tree(place) == before


@pytest.mark.parametrize("links", [True, False])
def test_a_product_that_can_not_be_put_in_place_takes_the_others_back(
    write, stars, old, capsys, monkeypatch, links
):
    image = write(stars)
    for name in ("rms.fits", "catalog.tsv"):
        (old / name).unlink()
    before, put = tree(old), os.replace

    def refuse(source, target):
        if "new" in Path(source).parts and str(target).endswith("sources.reg"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        put(source, target)

    def link(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", refuse)
    if not links:
        monkeypatch.setattr(os, "link", link)
    assert call(image, *all_nine(old)) == 1
    assert re.fullmatch(
        one_line("error", r".*sources\.reg: can't be written.*"), capsys.readouterr().err
    )
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


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "QUIT", "XCPU", "USR1", "USR2", "ALRM"])
def test_a_run_that_is_killed_leaves_everything_as_it_was(write, stars, old, tmp_path, number):
    number = signal.Signals[f"SIG{number}"]
    image = write(stars)
    before = tree(tmp_path)
    command = [sys.executable, "-c", SLOW, image, "-q", *all_nine(old)]
    with subprocess.Popen(
        command,
        cwd=SCRIPT.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "drawing\n"
        assert tree(tmp_path) != before
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in err
    assert tree(tmp_path) == before


KILLED_TWICE = """
import os, signal, sys
from pathlib import Path
import source_extractor

def with_a_kill(function):
    def kill_and_call(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)
    return kill_and_call

source_extractor.build_field = with_a_kill(source_extractor.build_field)
Path.unlink = with_a_kill(Path.unlink)
source_extractor.command()
"""


KILLED_IN_A_CALLBACK = """
import os, signal, sys, weakref
import source_extractor

class Thing:
    pass

def with_a_callback(function):
    def call(*args, **kwargs):
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        return function(*args, **kwargs)
    return call

source_extractor.build_field = with_a_callback(source_extractor.build_field)
source_extractor.command()
"""


KILLED_IN_C = """
import os, signal, sys
import source_extractor

def kill_and_change_the_error(*args, **kwargs):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        raise ImportError("initialization failed")

source_extractor.build_field = kill_and_change_the_error
source_extractor.command()
"""


KILLED_WHERE_NO_ERROR_COUNTS = """
import os, signal, sys
import source_extractor

def kill_and_go_on(*args, **kwargs):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        return find_sources(*args, **kwargs)

find_sources = source_extractor.find_sources
source_extractor.find_sources = kill_and_go_on
source_extractor.command()
"""


KILLED_BY_TWO_AT_ONCE = """
import os, signal, sys
import source_extractor

def kill(*args, **kwargs):
    signal.pthread_sigmask(signal.SIG_BLOCK, source_extractor.STOPS)
    for number in (signal.SIGTERM, signal.SIGXCPU):
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, source_extractor.STOPS)

source_extractor.build_field = kill
source_extractor.command()
"""


@pytest.mark.parametrize(
    "code",
    [
        KILLED_TWICE,
        KILLED_IN_A_CALLBACK,
        KILLED_IN_C,
        KILLED_WHERE_NO_ERROR_COUNTS,
        KILLED_BY_TWO_AT_ONCE,
    ],
    ids=[
        *("and while it clears up", "where nothing can be raised", "where another error is made"),
        *("where no error counts", "by two signals"),
    ],
)
def test_a_kill_is_not_lost_and_leaves_nothing(write, stars, tmp_path, code):
    image = write(stars)
    before = tree(tmp_path)
    done = start_code(code, image, "-q", *all_nine(tmp_path))
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert tree(tmp_path) == before


KILLED_WHILE_PUTTING_IN_PLACE = """
import os, signal, sys
import source_extractor

put = os.replace

def put_and_kill(*args, **kwargs):
    put(*args, **kwargs)
    os.kill(parent, getattr(signal, sys.argv[1]))

os.replace = put_and_kill
parent = os.getpid()
sys.exit(source_extractor.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_kill_while_products_are_put_in_place_leaves_all_new_ones(write, stars, old, number):
    image = write(stars)
    # To its last word, which may be another process' than the first.
    start_code(KILLED_WHILE_PUTTING_IN_PLACE, number, image, "-q", *all_nine(old))
    after = {name: content for name, content in tree(old).items() if not name.startswith(".")}
    assert after.keys() == set(NINE)
    assert not any(content.startswith(b"old") for content in after.values())


HELPER_KILLED = """
import itertools, os, signal, sys
import source_extractor

name, number = sys.argv[1], int(sys.argv[2])
act, parent, acts = getattr(os, name), os.getpid(), itertools.count(1)

def act_and_die(*args, **kwargs):
    act(*args, **kwargs)
    if os.getpid() != parent and next(acts) == number:
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

setattr(os, name, act_and_die)
sys.exit(source_extractor.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("act", ["link", "replace", "unlink"])
@pytest.mark.parametrize("number", ["1", "4", "9"])
def test_what_a_killed_process_began_to_put_in_place_is_finished(write, stars, old, act, number):
    image = write(stars)
    done = start_code(HELPER_KILLED, act, number, image, "-q", *all_nine(old))
    assert (done.returncode, done.stdout, done.stderr) == (0, "killed\n", "")
    assert tree(old).keys() == set(NINE)
    assert not any(content.startswith(b"old") for content in tree(old).values())


FAILED_AND_KILLED = """
import itertools, os, signal, sys
import source_extractor

put, parent, puts = os.replace, os.getpid(), itertools.count(1)

def put_or_fail(source, target):
    if os.path.basename(target) == "sources.png" and "new" in str(source):
        raise PermissionError(1, "not permitted")
    put(source, target)
    if os.getpid() != parent and next(puts) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = put_or_fail
sys.exit(source_extractor.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", range(1, 10))
def test_a_kill_while_old_products_are_put_back_loses_none(write, stars, old, number):
    image = write(stars)
    before = tree(old)
    done = start_code(FAILED_AND_KILLED, str(number), image, *all_nine(old))
    assert done.returncode == 1
    assert re.fullmatch(one_line("error", ".*sources.png: can't be written.*"), done.stderr)
    assert tree(old) == before


def test_a_product_that_is_taken_away_in_time_fails_the_run(write, stars, old, monkeypatch, capsys):
    def take_away(*args, **kwargs):
        for path in old.glob(".source_extractor-*/new/rms.fits"):
            path.unlink()
        return share(*args, **kwargs)

    image, before, share = write(stars), tree(old), source_extractor.tabulate
    monkeypatch.setattr(source_extractor, "tabulate", take_away)
    assert call(image, *all_nine(old)) == 1
    assert "rms.fits: can't be written (No such file" in capsys.readouterr().err
    assert tree(old) == before


def test_a_run_after_one_that_was_stopped_is_a_run(write, stars, tmp_path, monkeypatch):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    image = write(stars)
    handlers = {number: signal.getsignal(number) for number in source_extractor.STOPS}
    with monkeypatch.context() as patch:
        patch.setattr(source_extractor, "build_mask", kill)
        assert call(image, "-o", tmp_path / "products") == 128 + signal.SIGTERM
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert call(image, "-o", tmp_path / "products") == 0


def test_sigkill_leaves_one_hidden_directory_which_is_in_nobodys_way(write, stars, old, tmp_path):
    image = write(stars)
    before = tree(tmp_path)
    command = [sys.executable, "-c", SLOW, image, "-q", *all_nine(old)]
    with subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    hidden = [path for path in old.iterdir() if path.name.startswith(".")]
    assert len(hidden) == 1
    assert {name: tree(tmp_path)[name] for name in before} == before
    extract(image, *all_nine(old))
    assert {path for path in old.iterdir() if path.name.startswith(".")} == set(hidden)
    assert tree(old).keys() - tree(hidden[0]).keys() >= set(NINE)
    assert not any(content.startswith(b"old") for content in tree(old).values())


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
    result.assert_refused("image.fits.gz", "unpacked", "TMPDIR")


@pytest.mark.parametrize(
    ("size", "options"),
    [(2000, ()), (30_000, ()), (2000, ("--image-format", "tiff"))],
    ids=["FITS", "PNG", "TIFF"],
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
