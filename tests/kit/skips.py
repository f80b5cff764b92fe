"""The reasons for which a test may be skipped, and the hooks that fail a run for any other, and for every xfail."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

NO_MUTANTS = "the mutants of the kernels are not built here: make gate builds them and asks them more"
NOT_LINUX = "memory that kills who touches it, and a process's peak in kilobytes, are asked of Linux"
NO_TUNED_KERNEL = "no kernel here is tuned for its processor, so none can be emulated as untuned"
OLDER_TRANSFORMERS = "this transformers keeps positions along the row"

ALLOWED = frozenset({NO_MUTANTS, NOT_LINUX, NO_TUNED_KERNEL, OLDER_TRANSFORMERS})


def on_linux_only() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip(NOT_LINUX)


def refuse(report: Any) -> None:
    """Turn a report that something was skipped into a failure, unless its reason is one of `ALLOWED`."""
    if report.outcome != "skipped":
        return
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = said.removeprefix("Skipped: ")
    if hasattr(report, "wasxfail"):
        reason = f"an expected failure, {report.wasxfail}"
        del report.wasxfail
    elif reason in ALLOWED:
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} was skipped for a reason that tests/kit/skips.py does not allow: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    refuse(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    refuse(report)
    return report
