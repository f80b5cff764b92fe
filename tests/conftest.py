"""What every test run says first: which backends it judges."""

from __future__ import annotations

from tests import gate


def pytest_report_header() -> str:
    return f"qkv backends: {', '.join(gate.backends())}"
