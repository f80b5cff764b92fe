"""What a call costs in stops: Python calls and files of ours that it enters, with everything loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkv

ROOT = os.path.dirname(qkv.__file__)
pytestmark = pytest.mark.usefixtures("nothing_kept")


def stops(call: Callable[[], Any]) -> list[str]:
    """Every Python function of ours that the call enters, as file and name."""
    found: list[str] = []

    def entered(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            found.append(f"{os.path.relpath(code.co_filename, ROOT)} {code.co_name}")

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def files(found: list[str]) -> set[str]:
    return {stop.split()[0] for stop in found}


@pytest.mark.parametrize(("mask", "most"), [(None, 40), (qkv.causal(), 60)], ids=["no mask", "causal"])
def test_a_cold_call_makes_few_stops_and_a_warm_one_hardly_any(mask: Any, most: int) -> None:
    q, k, v = torch.randn(3, 1, 8, 64, 64).unbind(0)
    qkv.attention(q[:, :, :7], k, v, mask, positions="start")  # loads what the first call of a process loads
    cold = stops(lambda: qkv.attention(q, k, v, mask))
    assert 5 < len(cold) <= most, cold
    assert len(files(cold)) <= 9, files(cold)
    warm = stops(lambda: qkv.attention(q, k, v, mask))
    assert 1 < len(warm) <= 4, warm


def test_a_training_step_prepares_nothing_twice() -> None:
    """A second step of a kind checks, lowers and prepares nothing: neither forward nor backward."""
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask = qkv.documents([25, 15]) & qkv.causal()

    def step() -> None:
        qkv.attention(q, k, v, mask).sum().backward()

    first, again = stops(step), stops(step)
    for work in ("cpu.py prepare", "_lower", "plans.py choose"):
        assert [stop for stop in first if work in stop], work
        assert not [stop for stop in again if work in stop], work
    assert not [stop for stop in again if "validate" in stop]
