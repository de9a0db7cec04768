"""Some of the cases that tools/fuzz.py makes without end, and what was found on the way."""

import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from common import SCRIPT, start, start_python
from contract import one_line
from files import tiff_bytes

FUZZ = Path(__file__).parent / "tools" / "fuzz.py"


@pytest.mark.parametrize(("kind", "cases"), [("files", 25), ("options", 25), ("faults", 4)])
def test_whatever_comes_ends_in_good_order(tmp_path, kind, cases):
    done = start_python(
        *(FUZZ, kind, "--seed", "100", "--cases", str(cases), "--seconds", "600"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(SCRIPT.parent), "PATH": os.defpath, "HOME": str(tmp_path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 failed" in done.stdout
    some_case_succeeded = re.search(r": .+? [1-9]\d*( +\d+){3}$", done.stdout, re.MULTILINE)
    assert kind == "faults" or some_case_succeeded


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
def test_a_kernel_may_have_remarks_in_any_letters(run, write, stars, tmp_path, coding):
    (tmp_path / "kernel").write_bytes("# by \xc5ngstr\xf6m 3\n1 2 1\n".encode(coding))
    result = run(write(stars), "--filter-case", "file", "--filter-file", tmp_path / "kernel")
    assert result.code == 0


def test_what_is_no_kernel_is_not_read_to_its_end(run, write, stars, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").touch()
    os.truncate(tmp_path / "endless", 10**11)
    image, words = write(stars), {"pipe": "a directory, pipe or device", "endless": "not a kernel"}
    for name, text in words.items():
        result = run(image, "--filter-case", "file", "--filter-file", tmp_path / name)
        result.assert_refused(name, text)


@pytest.mark.parametrize(("kind", "megabytes"), [("AS", 300), ("AS", 500), ("DATA", 200)])
def test_a_limit_of_memory_costs_one_line(write, tmp_path, kind, megabytes):
    image = write(np.random.default_rng(0).normal(size=(4000, 4000)).astype(np.float32))
    limit = getattr(resource, f"RLIMIT_{kind}"), 2 * [megabytes * 10**6]
    done = start(image, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    assert done.returncode == 3
    assert re.fullmatch(one_line("error", ".*memory.*"), done.stderr)
    assert list(tmp_path.iterdir()) == [image]


def test_large_stacks_of_threads_keep_no_tiff_from_being_read(tmp_path, stars):
    path = tmp_path / "image.tif"
    path.write_bytes(tiff_bytes(np.tile(stars, (4, 4)), tile=(32, 32), compression="zlib"))
    done = start(
        *(path, "-o", tmp_path),
        env=os.environ | {"TIFFFILE_NUM_THREADS": "32"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, 2 * [10**8]),
    )
    assert done.returncode == 0
