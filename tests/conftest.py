"""What every test run says first, which backends it judges, and fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kit import backends, private
from tests.kit.skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 (hooks)


def pytest_report_header() -> str:
    return f"qkv backends: {', '.join(backends.available())}"


@pytest.hookimpl(trylast=True)  # after xdist's
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one xdist_group share a process: by their names, which xdist 3.8 writes where pytest 9.2 reads none."""
    for item in items:
        named = vars(item).get("_nodeid")
        if named is not None and item.nodeid != named:
            item._id = type(item.id).parse(named)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from torch's generator is the same in every run, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No plan and no prepared call from before the test, and none of its own after it."""
    private.forget()
    yield
    private.forget()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small calls in large numbers: waking threads would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
