"""A pytest plugin that puts qkv in PyTorch's place before the test file is imported; `tests/gates/foreign.py` loads it.

FOREIGN_WITH says what is replaced: nothing, "patch_sdpa", or "MultiheadAttention", which is both. FOREIGN_RESULTS is
the file that gets one JSON line a test, FOREIGN_EVERY runs every n-th test only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv.compat
import qkv.nn

WITH = os.environ.get("FOREIGN_WITH", "")
RESULTS = Path(os.environ["FOREIGN_RESULTS"])
EVERY = int(os.environ.get("FOREIGN_EVERY", "1"))

_block = qkv.compat.patch_sdpa()
if WITH in ("patch_sdpa", "MultiheadAttention"):
    _block.__enter__()
if WITH == "MultiheadAttention":
    for _module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
        _module.MultiheadAttention = qkv.nn.MultiheadAttention  # type: ignore[misc]


def _write(**line: Any) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say how many there are, and leave out what was not asked for."""
    _write(collected=len(items))
    items[:] = items[::EVERY]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: how it ended, and the last line of what it said."""
    if report.when == "call" or report.outcome != "passed":
        said = str(report.longrepr).strip().splitlines() if report.failed else [""]
        told = [line for line in said if line.startswith("E  ")] or said[-1:]
        _write(test=report.nodeid.split("::", 1)[1], outcome=report.outcome, said=told[0][:200])


def pytest_sessionfinish() -> None:
    """Where the calls went."""
    _write(calls=str(_block))
