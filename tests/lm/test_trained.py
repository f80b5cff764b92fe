"""What `qkv.why` tells of trained models is what was measured, and is said as it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import qkv
from qkv.insight.trained import TOPICS, results, trained

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "benchmarks" / "results" / "decoders.jsonl"


def _tables() -> Any:
    spec = importlib.util.spec_from_file_location("train_tables", ROOT / "benchmarks" / "train_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_are_those_of_the_runs() -> None:
    runs, _ = _tables().read(RUNS)
    assert _tables().told(runs) == results()


@pytest.mark.parametrize("topic", TOPICS)
def test_an_answer_tells_what_its_changes_cost(topic: str) -> None:
    answer = qkv.why(topic)
    assert answer.trained == trained(topic)
    printed = " ".join(str(answer).split())
    for name in TOPICS[topic]:
        row = results()["ablations"][name]
        assert f"{row['what']} {row['cost'][0]:+.3f}" in printed


def test_a_difference_within_the_seeds_is_called_none() -> None:
    for topic, names in TOPICS.items():
        told = trained(topic)
        for name in names:
            row = results()["ablations"][name]
            part = told[told.index(row["what"]) :].split(";")[0]
            assert ("no difference beyond the seeds'" in part) == (row["cost"][1] <= 0 <= row["cost"][2])


def test_the_document_holds_the_tables() -> None:
    document = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = document.partition("<!-- tables:start -->\n")[2].partition("<!-- tables:end -->")[0]
    tables = _tables()
    assert shown.strip() == tables.tables(*tables.read(RUNS))
    for row in results()["ablations"].values():
        assert f"| {row['what']} |" in shown
        assert f"{row['cost'][0]:+.4f}" in shown
