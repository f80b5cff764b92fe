"""Predicted times: from the rates of a machine, measured once or recorded, and never by a call itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.backends import rates, recorded
from qkv.backends.amounts import duration
from qkv.backends.base import Speed
from qkv.backends.cpu import instruction_sets
from qkv.backends.recorded import Machine, Recording
from qkv.backends.registry import load
from tests.kit.sharp import inputs

PAIR, ROW, BYTE = 3e-10, 2e-8, 5e-11


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine whose times are known; returns what was timed."""
    timed: list[Any] = []

    def of(backend: Any, dtype: torch.dtype, D: int, Dv: int, backward: bool, L: int, mask: Any, turns: int) -> Any:
        timed.append((dtype, D, backward, L, mask))
        pairs = 8 * L * (L if mask is None else 80)
        return (3 if backward else 1) * (pairs * PAIR + 8 * L * ROW), pairs

    monkeypatch.setattr(rates, "_timed", of)
    monkeypatch.setattr(rates, "_read", lambda *given: BYTE)
    rates.measured.cache_clear()
    yield timed
    rates.measured.cache_clear()


def test_two_calls_tell_the_time_of_pairs_from_that_of_rows(clock: list[Any]) -> None:
    found = rates.measure(load("tiled"), torch.float32, 16, 16)
    assert found == pytest.approx((PAIR, ROW, BYTE))
    assert rates.measure(load("tiled"), torch.float32, 16, 16, backward=True) == pytest.approx((3 * PAIR, 3 * ROW, 0))


def test_a_prediction_follows_what_is_computed(clock: list[Any]) -> None:
    plan = qkv.plan(*inputs(B=2, Hq=4, Lq=512, Lk=512), mask=qkv.causal(), backend="tiled")
    assert plan.seconds == pytest.approx(plan.pairs * PAIR + 2 * 4 * 512 * ROW)
    assert plan.dense_seconds == pytest.approx(2 * 4 * 512 * (512 * PAIR + ROW))
    assert plan.gradient_seconds is None
    count = len(clock)
    assert plan.seconds == qkv.plan(*inputs(B=2, Hq=4, Lq=512, Lk=512), mask=qkv.causal(), backend="tiled").seconds
    assert len(clock) == count, "measured once"
    assert "time      about" in str(plan)
    assert "; dense about" in str(plan)


def test_few_queries_take_the_time_to_read_keys(clock: list[Any]) -> None:
    q, k, v = inputs(B=1, Hq=4, Hkv=2, Lq=1, Lk=100_000, D=8)
    plan = qkv.plan(q, k, v, backend="tiled")
    assert plan.seconds == pytest.approx(max(plan.pairs * PAIR, plan.pairs / 2 * 16 * 4 * BYTE))


def test_nothing_is_predicted_where_nothing_can_be_timed(clock: list[Any]) -> None:
    assert qkv.plan(*inputs(), backend="reference").seconds is None
    plan = qkv.plan(*inputs(), backend="reference")
    assert "time " not in str(plan)
    assert clock == []


def test_attention_and_plans_alone_time_nothing(clock: list[Any]) -> None:
    q, k, v = inputs()
    qkv.attention(q, k, v)
    found = qkv.plan(q, k, v)
    assert (found.pairs, found.flops, found.bytes, found.visible, found.dense) is not None
    assert hash(found) is not None
    assert clock == []


def test_recorded_speeds_go_first(clock: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    sets = instruction_sets()
    isa = sets[0] if sets else "none"
    monkeypatch.setenv(recorded.VARIABLE, str(tmp_path / "tune.json"))
    speed = Speed("float32", 8, False, 1e-9, 1e-7, 1e-10)
    recorded.write(tmp_path / "tune.json", Recording(Machine.here(isa), (), (speed,)))
    recorded.forget()
    try:
        assert recorded.read(tmp_path / "tune.json") == [Recording(Machine.here(isa), (), (speed,))]
        if sets and load("cpu").missing is None:
            plan = qkv.plan(*inputs(Lq=64, Lk=64, D=8), backend="cpu")
            p = plan.problem
            assert plan.seconds == pytest.approx(plan.pairs * 1e-9 + p.B * p.Hq * 64 * 1e-7)
            assert clock == []
    finally:
        recorded.forget()


@pytest.mark.parametrize("change", [{"pair": -1.0}, {"row": True}, {"byte": "x"}, {"backward": 1}, {"D": 0}])
def test_speeds_of_another_form_are_refused(change: dict[str, Any]) -> None:
    entry = {"dtype": "float32", "D": 8, "backward": False, "pair": 1e-9, "row": 0.0, "byte": 0, **change}
    with pytest.raises(ValueError, match="is"):
        recorded._speed(entry)


def test_a_real_measurement_is_positive_and_short() -> None:
    found = rates.measure(load("tiled"), torch.float32, 8, 8, turns=1)
    assert 0 < found.pair < 1e-6
    assert 0 <= found.row < 1e-3
    assert 0 < found.byte < 1e-6


SAID = {2e-7: "0.2 µs", 0.0123: "12 ms", 0.5: "500 ms", 75: "75 s", 1500: "25 min", 9e3: "2.5 h", 5e5: "5.8 days"}


@pytest.mark.parametrize(("seconds", "text"), SAID.items())
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
