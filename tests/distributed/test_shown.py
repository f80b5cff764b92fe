"""What the documentation shows of ranks: the picture, and the example under torchrun."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    place = ROOT / "docs" / "pictures" / "ranks.py"
    spec = importlib.util.spec_from_file_location("ranks", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(place.parent))
    return module


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_the_script_draws(drawing: ModuleType, theme: str) -> None:
    assert drawing.picture(theme) == (ROOT / "docs" / "pictures" / f"ranks-{theme}.svg").read_text(encoding="utf-8")


def test_every_visible_tile_is_computed_once_and_ranks_are_never_idle(drawing: ModuleType) -> None:
    plan = drawing.planned()
    cells = drawing.computed(plan)
    assert set(cells) == {(row, column) for row in range(drawing.CHUNKS) for column in range(row + 1)}
    for rank in range(drawing.RANKS):
        for stage in range(drawing.RANKS):
            work = sum(0.5 if a == b else 1 for (a, b), known in cells.items() if known == (rank, stage))
            assert work == 2, (rank, stage)


def test_the_example_runs_under_torchrun() -> None:
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "examples/ranks.py"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "3 ranks, Shards(" in done.stdout
    assert float(done.stdout.split()[-1]) < 2e-6
