"""The benchmark of ranks runs, and compares the results of all ways before it times them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("ranks")
ROOT = Path(__file__).parents[2]


def test_every_way_is_timed() -> None:
    ways = ["ring", "ring-silent", "allgather", "ulysses", "gather+sdpa"]
    command = [sys.executable, "benchmarks/distributed.py", "96", "--rounds", "1", "--only", ",".join(ways)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2 ranks, median of 1" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:]] == ["one process", *ways]
