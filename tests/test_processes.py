"""Processes: who works on an image changes nothing that is found; a run leaves none of them."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import source_extractor
from common import SCRIPT, all_products, call, field_of
from contract import ALL_PRODUCTS, ONE_ERROR
from sky import blobs, random_sources, simulate
from source_extractor import find_sources, make_kernel, run_jobs


@pytest.fixture
def small_batches(monkeypatch):
    """Let the objects be settled and measured in batches of seven."""
    monkeypatch.setattr(source_extractor, "BATCH", 7)


def crowded_sky(pixels_per_source=150, shape=(420, 300)):
    sources = random_sources(shape, shape[0] * shape[1] // pixels_per_source, seed=1)
    return simulate(shape, sources, seed=2, level=100.0)[0].astype(np.float32)


def holes(shape):
    mask = np.random.default_rng(3).random(shape) < 0.02
    mask[200:230] = True
    mask[:, 100:103] = True
    return mask


@pytest.mark.parametrize(
    ("kernel", "noise", "threads"),
    [
        *(("none", "float_globalrms", 3), ("none", "array_rms", 1), ("default", "none", 1)),
        *(("default", "array_rms", 3), ("gaussian", "float_globalrms", 1), ("gaussian", "none", 3)),
    ],
)
def test_batches_of_objects_change_nothing(monkeypatch, kernel, noise, threads):
    image = crowded_sky()
    kernel, mask = make_kernel(kernel, 6.0, None), holes(image.shape)
    whole = find_sources(field_of(image, kernel, noise, mask))
    assert len(whole.objects) > 50
    monkeypatch.setattr(source_extractor, "BATCH", 7)
    objects, labels = find_sources(field_of(image, kernel, noise, mask), threads)
    assert_array_equal(labels, whole.segmentation)
    for name in objects.dtype.names:  # a Fourier transform of another window rounds otherwise
        assert_allclose(objects[name], whole.objects[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert_array_equal(np.bincount(labels.ravel())[1:], objects["npix"])
    assert not labels[mask].any()
    assert (objects["flag"] & source_extractor.NEXT_TO_MASK > 0).any()


@pytest.fixture
def sky(write):
    """Return a sky of many objects, with a trail across them and masked pixels."""
    image = crowded_sky(400, (300, 120))
    image[40:250, 40] += 200
    image[200:210, :30] = np.nan
    return write(image)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("options", [(), ("--err-option", "array_rms", "--background-passes", "2")])
def test_products_are_the_same_for_any_number_of_processes(sky, tmp_path, options):
    written = []
    for threads in (1, 3):
        output = tmp_path / f"by {threads}"
        assert call(sky, "-q", *all_products(output), "--threads", threads, *options) == 0
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert set(written[0]) == ALL_PRODUCTS
    assert written[0] == written[1]
    assert not multiprocessing.active_children()


def test_jobs_come_back_in_their_order():
    def job(number):
        time.sleep(0.02 * (number % 3))
        return number, os.getpid()

    numbers, processes = zip(*run_jobs([partial(job, i) for i in range(20)], 3), strict=True)
    assert numbers == tuple(range(20))
    assert len(set(processes)) == 3
    assert os.getpid() not in processes


def processes(path):
    """Return the processes whose command line holds a path."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]


def workers(process):
    """Return the processes that share a run; that which tries to open a file is alone."""
    children = psutil.Process(process.pid).children()
    return children if len(children) > 1 else None


def wait_for(condition):
    """Wait for a condition to hold, and return it; give up after a minute."""
    for _ in range(600):
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture
def noise(write):
    """Return an image whose objects are so many that it takes a while."""
    return write(np.random.default_rng(1).normal(size=(2000, 900)).astype(np.float32))


@pytest.mark.parametrize("victim", ["parent by TERM", "parent by KILL", "child"])
def test_a_killed_run_leaves_no_process_and_no_product(noise, tmp_path, victim):
    output = tmp_path / "products"
    command = [SCRIPT, noise, "-o", output, "--threads", "2", "--thresh", "0.3", "--minarea", "1"]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    children = wait_for(lambda: workers(process))
    if victim == "child":
        children[0].kill()
    else:
        process.send_signal(signal.SIGKILL if "KILL" in victim else signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {"child": 3, "parent by TERM": 143}.get(victim, -signal.SIGKILL)
    assert re.fullmatch(ONE_ERROR if victim == "child" else "", errors)
    wait_for(lambda: not processes(noise))
    left = [path.name for path in output.iterdir()]
    assert all(name.startswith(".") for name in left) if "KILL" in victim else not left


def test_a_run_under_nohup_outlives_its_terminal(noise, tmp_path):
    output = tmp_path / "products"
    options = "-q", "-o", output, "--threads", "2", "--thresh", "1"
    command = ["nohup", sys.executable, SCRIPT, noise, *options]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **streams, start_new_session=True)
    wait_for(lambda: workers(process))
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(list(output.iterdir())) == 5


def test_a_process_that_cannot_start_costs_one_line(run, write, monkeypatch):
    fork, forks = os.fork, []

    def refuse():
        forks.append(1)
        if len(forks) == 1:  # to open the file in
            return fork()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    path = write(blobs((100, 120), (10, 40), peak=100, seed=1))
    monkeypatch.setattr(os, "fork", refuse)
    run(path, "--threads", "2").assert_refused("--threads")
    assert not multiprocessing.active_children()


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def without_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("work", "fault", "words"),
    [
        ("settle_objects", killed, ["killed", "--threads"]),
        ("overlay", killed, ["killed", "--threads"]),
        ("overlay", without_room, ["No space left"]),
    ],
)
def test_a_process_that_fails_costs_one_line(run, sky, monkeypatch, work, fault, words):
    if work == "overlay":
        overlay = source_extractor.PRODUCTS[work]._replace(write=fault)
        monkeypatch.setitem(source_extractor.PRODUCTS, work, overlay)
    else:
        monkeypatch.setattr(source_extractor, work, fault)
    code = 3 if fault is killed else 1
    run(sky, "--threads", "2").assert_refused(*words, code=code)
    assert not multiprocessing.active_children()
