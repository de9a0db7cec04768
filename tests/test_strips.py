"""Strips and processes: how an image is cut, and who works on it, changes nothing that is found."""

import errno
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sep
from numpy.testing import assert_allclose, assert_array_equal
from skimage.measure import label

import source_extractor
from common import SCRIPT, all_nine, call, field_of
from contract import NINE, ONE_ERROR
from sky import blobs, random_sources, simulate
from source_extractor import InputError, find_sources, make_kernel, share

WHOLE = 10**9, 0
SMALL, TALL = (100, 120), (1200, 90)
CUTS = (32, 0), (64, 16), (150, 40)


@pytest.fixture
def cut(monkeypatch):
    """Return a function that finds the sources of a field in strips of so many rows."""

    def find(field, rows, overlap, threads=1):
        monkeypatch.setattr(source_extractor, "STRIP", rows)
        monkeypatch.setattr(source_extractor, "OVERLAP", overlap)
        return find_sources(field, threads)

    return find


def crowded_sky(pixels_per_source=150, shape=(420, 300)):
    sources = random_sources(shape, shape[0] * shape[1] // pixels_per_source, seed=1)
    return simulate(shape, sources, seed=2, level=100.0)[0].astype(np.float32)


def holes(shape):
    mask = np.random.default_rng(3).random(shape) < 0.02
    mask[200:230] = True
    mask[:, 100:103] = True
    return mask


def noises(shape):
    return np.random.default_rng(4).uniform(0.8, 1.3, shape).astype(np.float32)


def assert_same(one, other):
    assert_array_equal(one.segmentation, other.segmentation)
    for name in one.objects.dtype.names:
        assert_allclose(one.objects[name], other.objects[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("rows", CUTS)
@pytest.mark.parametrize("kernel", ["none", "default", "gaussian", "tophat"])
@pytest.mark.parametrize("noise", ["float_globalrms", "array_rms", "none"])
def test_strips_give_what_sep_gives_for_the_whole(cut, rows, kernel, noise):
    kernel = make_kernel(kernel, 4.0, None)
    field = field_of(crowded_sky(), kernel, noise, deblend_nthresh=1, clean=False)
    objects, labels = sep.extract(
        field.residual,
        1.5,
        err=None if noise == "none" else field.noise,
        filter_kernel=kernel,
        deblend_nthresh=1,
        clean=False,
        segmentation_map=True,
    )
    for name in ("thresh", "tnpix"):  # SEP's own are of another level
        if noise == "array_rms":
            objects[name] = find_sources(field).objects[name]
    assert len(objects) > 100
    assert_same(cut(field, *rows), source_extractor.Detections(objects, labels))


@pytest.mark.parametrize("filter_type", ["matched", "conv"])
@pytest.mark.parametrize("kernel", ["none", "default", "gaussian", "tophat"])
@pytest.mark.parametrize("noise", ["float_globalrms", "file"])
def test_strips_are_cut_under_masks_as_well(cut, kernel, noise, filter_type):
    image = crowded_sky()
    mask = holes(image.shape)
    given = noises(image.shape) if noise == "file" else None
    kernel = make_kernel(kernel, 6.0, None)
    settings = {"deblend_nthresh": 1, "filter_type": filter_type}
    field = field_of(image, kernel, noise, mask, given, **settings)
    whole = cut(field, *WHOLE)
    assert len(whole.objects) > 50
    assert (whole.objects["flag"] & source_extractor.BESIDE_MASK > 0).any()
    for rows in CUTS:
        assert_same(cut(field, *rows), whole)


@pytest.mark.parametrize("rows", CUTS)
def test_of_what_is_deblended_only_the_lots_differ(cut, rows):
    field = field_of(crowded_sky(), clean=False)
    whole, strips = cut(field, *WHOLE).objects, cut(field, *rows).objects
    for name in ("xcpeak", "ycpeak", "cpeak"):  # which no lot decides
        assert_allclose(strips[name], whole[name], err_msg=name)
    alone = whole["flag"] & sep.OBJ_MERGED == 0
    assert 50 < alone.sum() < len(whole) - 50
    for name in whole.dtype.names:
        assert_allclose(strips[name][alone], whole[name][alone], rtol=1e-9, err_msg=name)


def trails():
    """Return an image with bleeding trails, one of them through all of it, and a hook."""
    image = blobs((420, 300), (60, 100), (150, 250), (240, 64), peak=500, seed=1)
    image[:, 60] += 300
    image[180:330, 150] += 300
    image[10:400, 200] += 200  # two prongs that only meet at the end
    image[30:400, 220] += 200
    image[399, 200:221] += 200
    return image


def giant():
    """Return an image whose one galaxy is larger than any strip, with stars on and beside it."""
    y, x = np.mgrid[:420, :300]
    image = blobs((420, 300), (150, 210), (40, 31), (250, 390), (150, 32), peak=3000, seed=2)
    return image + (2000 * np.exp(-np.hypot(x - 150, (y - 210) / 1.5) / 30)).astype(np.float32)


@pytest.mark.parametrize("make", [trails, giant])
@pytest.mark.parametrize("kernel", ["none", "default", "gaussian"])
def test_what_is_larger_than_a_strip_is_found_whole(cut, make, kernel):
    settings = {"deblend_nthresh": 1, "clean": False}
    field = field_of(make(), make_kernel(kernel, 5.0, None), "none", thresh=30.0, **settings)
    whole = cut(field, *WHOLE)
    heights = whole.objects["ymax"] - whole.objects["ymin"]
    assert heights.max() > 250
    for rows in CUTS:
        assert_same(cut(field, *rows), whole)


def test_a_line_of_just_minarea_pixels_is_found_across_a_border(cut):
    image = np.zeros((300, 60), np.float32)
    image[np.arange(90, 190), 10 + np.arange(100) // 3] = 10
    settings = {"deblend_nthresh": 1, "minarea": 100, "thresh": 5.0}
    field = field_of(image, None, "none", **settings)
    for rows in (WHOLE, *CUTS):
        assert cut(field, *rows).objects["npix"].tolist() == [100]


def test_half_filtered_rows_join_nothing(cut):
    image = np.zeros((300, 90), np.float32)
    image[50:200, 40] = image[100:200, 50] = 100  # one begins in the first strip, one in the second
    end = 64 + 64 + 16  # of what is searched for the second
    image[end - 1, 41:50], image[end, 41:50] = 20, -100  # would join them if cut between
    settings = {"deblend_nthresh": 1, "clean": False, "thresh": 8.0}
    found = cut(field_of(image, err_option="none", **settings), 64, 16).objects
    assert sorted(found["ymin"]) == [49, 99]


@pytest.mark.parametrize("levels", [1, 32])
def test_objects_stand_in_the_order_in_which_their_groups_end(cut, levels):
    field = field_of(crowded_sky(), clean=False, deblend_nthresh=levels)
    objects, labels = cut(field, 64, 16)
    groups = label(labels > 0, connectivity=2)
    assert (groups.max() < len(objects)) == (levels > 1)
    ends = []
    for y, x in zip(objects["ypeak"], objects["xpeak"], strict=True):
        rows, columns = np.nonzero(groups == groups[y, x])
        ends.append((rows.max(), columns[rows == rows.max()].max()))
    assert ends == sorted(ends)


@pytest.fixture
def tall(write):
    """Return a sky of more than three strips, with a trail across them and masked pixels."""
    image = crowded_sky(400, (1700, 90))
    image[400:1200, 40] += 200
    image[600:610, :30] = np.nan
    return write(image)


@pytest.mark.parametrize("options", [(), ("--err-option", "array_rms", "--background-passes", "2")])
def test_products_are_the_same_for_any_number_of_processes(tall, tmp_path, options):
    written = []
    for threads in (1, 2, 3, 9):
        output = tmp_path / f"by {threads}"
        assert call(tall, "-q", *all_nine(output), "--threads", threads, *options) == 0
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert set(written[0]) == NINE
    assert all(others == written[0] for others in written[1:])
    assert not multiprocessing.active_children()


def test_jobs_come_back_in_their_order():
    def job(number):
        time.sleep(0.02 * (number % 3))
        return number, os.getpid()

    numbers, processes = zip(*share([partial(job, i) for i in range(20)], 3), strict=True)
    assert numbers == tuple(range(20))
    assert len(set(processes)) == 3
    assert os.getpid() not in processes


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_job_raises_is_raised(threads):
    def refuse():
        raise InputError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        list(share([int, refuse, int], threads))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_costs_one_line(run, tall, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(source_extractor, "extract", die)
    run(tall, "--threads", "2").assert_refused(tall, "killed", "--threads")
    assert not multiprocessing.active_children()


def processes(marker):
    """Return the numbers of the processes, by their parents', whose command line holds a text."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(marker) in (entry / "cmdline").read_text():
                parent = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)
                found.setdefault(int(parent[1]), []).append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for(condition):
    """Wait for a condition to hold, and return it; give up after a minute."""
    for _ in range(600):
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture
def noise(write):
    """Return an image that takes several strips, and so a while."""
    return write(np.random.default_rng(1).normal(size=(2000, 900)).astype(np.float32))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("victim", ["parent by TERM", "parent by KILL", "child"])
def test_a_killed_run_leaves_no_process_and_no_product(noise, tmp_path, victim):
    output = tmp_path / "products"
    command = [SCRIPT, noise, "-o", output, "--threads", "2", "--thresh", "0.3", "--minarea", "1"]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    children = wait_for(lambda: processes(noise).get(process.pid))
    if victim == "child":
        os.kill(children[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if "KILL" in victim else signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {"child": 1, "parent by TERM": 143}.get(victim, -signal.SIGKILL)
    assert re.fullmatch(ONE_ERROR if victim == "child" else "", errors)
    wait_for(lambda: not processes(noise))
    if victim == "parent by KILL":
        assert all(path.name.startswith(".") for path in output.iterdir())
    else:
        assert not output.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_run_under_nohup_outlives_its_terminal(noise, tmp_path):
    output = tmp_path / "products"
    command = ["nohup", sys.executable, SCRIPT, noise, "-q", "-o", output, "--threads", "2"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **streams, start_new_session=True)
    wait_for(lambda: processes(noise).get(process.pid))
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(list(output.iterdir())) == 5


@pytest.mark.parametrize("shape", [SMALL, TALL])
def test_a_process_that_cannot_start_costs_one_line(run, write, monkeypatch, shape):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    path = write(blobs(shape, (10, 40), peak=100, seed=1))
    monkeypatch.setattr(os, "fork", refuse)
    run(path, "--threads", "2").assert_refused("--threads")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_a_picture_that_is_not_drawn_costs_one_line(run, tall, monkeypatch, error):
    def fail(part, _):
        with part.writing():
            if error:
                raise error
        os.kill(os.getpid(), signal.SIGKILL)

    overlay = source_extractor.PRODUCTS["overlay"]._replace(write=fail)
    monkeypatch.setitem(source_extractor.PRODUCTS, "overlay", overlay)
    run(tall, "--threads", "2").assert_refused("No space left" if error else "killed")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "bright",
    [
        lambda y, x: (y % 36 < 3) | (x % 36 < 3),
        lambda y, x: ((y % 2 == 1) | (x % 2 == 1)) & (np.hypot(x - 450, y - 450) < 200),
    ],
    ids=["a net of thin lines", "a mosaic of colours"],
)
def test_what_is_full_of_holes_can_be_too_large_to_deblend_as_well(run, write, bright):
    image = np.random.default_rng(1).normal(0, 1, (900, 900)).astype(np.float32)
    image[bright(*np.indices(image.shape))] += 100
    options = ("--deblend-nthresh", 1024, "--bw", 900, "--bh", 900)
    run(write(image), *options).assert_refused("GB", "1024 levels")


def test_too_many_levels_for_a_large_object_are_refused_before_it_starts(run, write):
    y, x = np.mgrid[:700, :700]
    image = np.random.default_rng(1).normal(100, 1, (700, 700))
    image += 1000 * np.exp(-((x - 350) ** 2 + (y - 350) ** 2) / (2 * 150**2))
    options = ("--bw", 700, "--bh", 700, "--deblend-nthresh")
    refused = run(write(image.astype(np.float32)), *options, 1024)
    refused.assert_refused("GB", "1024 levels", "--thresh")
    fewer = re.search(r"--deblend-nthresh (\d+)", refused.err)[1]
    assert run(write(image.astype(np.float32), "again.fits"), *options, fewer).code == 0


@pytest.fixture
def long(write):
    """Return an image of so many strips that it is long work."""
    return write(blobs((16 * 512, 20), (10, 100), peak=100, seed=1))


def on_a_terminal(*command):
    """Return what a command writes on stdout and stderr if both are a terminal."""
    here, there = pty.openpty()
    process = subprocess.Popen(map(str, command), stdout=there, stderr=there)
    os.close(there)
    written = b""
    try:
        while part := os.read(here, 4096):
            written += part
    except OSError:  # the other side is closed
        pass
    os.close(here)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.parametrize("option", ["--threads=2", "-v", "-q"])
def test_a_terminal_shows_progress(long, tmp_path, option):
    written = on_a_terminal(sys.executable, SCRIPT, long, "-o", tmp_path, option)
    assert ("16 / 16" in written) == (option == "--threads=2")


def test_a_log_shows_no_progress(run, long):
    assert run(long).err == ""
