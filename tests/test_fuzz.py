"""Some of the cases that tools/fuzz.py makes without end, and what it has found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import SCRIPT

FUZZ = Path(__file__).parent / "tools" / "fuzz.py"


@pytest.mark.parametrize("seed", [100, 101])
def test_odd_and_damaged_files_end_in_good_order(tmp_path, seed):
    command = [sys.executable, FUZZ, "--seed", str(seed), "--cases", "75", "--seconds", "600"]
    done = subprocess.run(
        [*command, "--keep", tmp_path / "failures"],
        cwd=SCRIPT.parent,
        env={"PYTHONPATH": str(SCRIPT.parent), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "75 cases, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("NAXIS", -1), ("NAXIS", 10**9), ("NAXIS1", -48), ("PCOUNT", -2880), ("GCOUNT", -1)),
        *(("TFIELDS", 2**31 - 1), ("ZNAXIS", 10**9), ("ZTILE1", -1)),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(run, write, stars, key, value):
    path = write(stars)
    content = path.read_bytes()
    card = f"{key:8}= {value:20}".ljust(80).encode()
    path.write_bytes(content.replace(b"NAXIS   =", card + b"NAXIS   =", 1)[:2880] + content[2880:])
    run(path).assert_refused(path, f"{key} of HDU 0 can't be {value}")


def test_values_at_both_ends_of_float64_are_taken(run, write):
    high = np.random.default_rng(0).normal(size=(40, 48)) > 0
    top = np.finfo(np.float64).max
    assert run(write(np.where(high, top, -top))).code == 0
