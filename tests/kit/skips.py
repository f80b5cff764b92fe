"""The reasons for which a test may be skipped, and the hooks that fail a run for any other, and for every xfail."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

NO_MUTANTS = "the mutants of the kernels are not built here: make gate builds them and asks them more"
NOT_LINUX = "memory that kills who touches it, a process's peak in kilobytes, and its threads are asked of Linux"
NO_TUNED_KERNEL = "no kernel here is tuned for its processor, so none can be emulated as untuned"
NO_OBJECTS = "no objects of these sources are in build/, or there is no nm: building the extension makes them"
NO_ARM_OBJECTS = "no objects for ARM of these sources are in build/arm: make test-arm makes and counts them"
NO_CHROMIUM = "no Chromium is here to open the page in: make test-page installs it where it may"
OLDER_TRANSFORMERS = "this transformers keeps positions along the row"
NO_NAMESPACES = "network namespaces and veth need Linux, root and iproute2, and not all are here"
NO_FLA = "no flash-linear-attention is installed here (pip install --no-deps flash-linear-attention fla-core)"

ALLOWED = frozenset({
    NO_MUTANTS, NO_OBJECTS, NO_ARM_OBJECTS, NO_CHROMIUM, NOT_LINUX, NO_TUNED_KERNEL, OLDER_TRANSFORMERS, NO_FLA,
    NO_NAMESPACES,
})  # fmt: skip


def on_linux_only() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip(NOT_LINUX)


def refuse(report: Any) -> None:
    """Turn a skip for a reason that is not one of `ALLOWED`, and every xfail, passed or not, into a failure."""
    if hasattr(report, "wasxfail"):
        said = f"is expected to fail: {report.wasxfail}"
        del report.wasxfail
    elif report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ") in ALLOWED:
            return
        said = f"is skipped: {reason}"
    else:
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} {said}: tests/kit/skips.py does not allow it"


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
