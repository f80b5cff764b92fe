"""What is published of speed is what the files of results hold: docs/speed.md, README's table, the chart."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qkv.bench import readme, results

ROOT = Path(__file__).resolve().parents[2]


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "benchmarks" / "speed_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def test_the_page_is_what_the_script_writes() -> None:
    assert SCRIPT.FILES
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == SCRIPT.page()


def test_the_table_and_the_chart_are_of_these_files() -> None:
    runs = SCRIPT.shown()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(f"{readme.START}\n")[2].partition(readme.END)[0] == readme.table(runs)
    assert (ROOT / "docs" / "pictures" / "bench.svg").read_text(encoding="utf-8") == readme.svg(runs[0])


@pytest.mark.parametrize("path", SCRIPT.FILES, ids=lambda path: path.stem)
def test_a_file_is_a_row_a_line_with_four_digits(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row == results.rounded(row)
    for run in results.read(path).values():
        assert run["schema"] == 2
        assert all(row["contenders"]["qkv"].get("agrees") for row in run["rows"])
