"""`qkv bench --sparse` on toy calls: what is compared, what is noticed, and what is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkv
from qkv.bench import patterns, results, sparse, turns
from qkv.bench.budget import Budget
from qkv.bench.turns import Terms
from qkv.errors import ArgumentError
from tests.kit.bench_fakes import FakeClock, command

pytestmark = pytest.mark.usefixtures("one_thread")
NEAR = patterns.Pattern(
    "window 5", lambda L: qkv.sliding_window(5), lambda L: lambda p, j: (j <= p) & (p - j < 5), lambda L: qkv.causal()
)
TOY = sparse.Call(NEAR, "f32", 8, heads=2, length=70)


@pytest.mark.parametrize("pattern", patterns.PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("length", [1100, 1024])
def test_rules_and_masks_are_the_same(pattern: patterns.Pattern, length: int) -> None:
    seen = pattern.mask(length).tensor(length, length)[0, 0]
    p, j = torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(pattern.rule(length)(p, j), seen)
    assert pattern.share(length) == pytest.approx(float(seen.double().mean()))
    if pattern.cover is not None:
        assert not (seen & ~pattern.cover(length).tensor(length, length)[0, 0]).any()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_contenders_are_compared(backward: bool, dtype: str) -> None:
    one = sparse.compare(replace(TOY, backward=backward, dtype=dtype), Terms(rounds=3))
    assert one.agrees, one
    assert one.rounds == 3
    assert one.cover is not None
    assert (one.efficiency is not None) == backward
    assert one.flex is None
    assert one.full > 0
    held = replace(TOY, pattern=replace(NEAR, cover=None), backward=backward)
    assert (sparse.compare(held, Terms(rounds=1)).needed is None) == backward


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_result_is_told(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(TOY, backward=True)
    real = torch.autograd.grad

    def wrong(*given: Any, **more: Any) -> Any:
        found = list(real(*given, **more))
        found[index - 1] = found[index - 1] * 1.01
        return found

    if index:
        monkeypatch.setattr(torch.autograd, "grad", wrong)
    else:  # one key too many
        rule = lambda L: lambda p, j: (j <= p) & (p - j < 4)  # noqa: E731
        call = replace(call, pattern=replace(NEAR, rule=rule))
    assert sparse.compare(call, Terms(rounds=1)).verdict == "wrong result"


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "pass"),
        ({"time": (0.04, 0.06, 0.07)}, "near"),
        ({"time": (0.06, 0.06, 0.07)}, "miss"),
        ({"needed": None, "time": (0.06, 0.06, 0.07)}, "pass"),
        ({"cover": (3.0, 3.9, 3.95)}, "miss"),
        ({"cover": (3.0, 3.9, 4.1)}, "near"),
        ({"flex": (2.0, 2.5, 2.9)}, "miss"),
        ({"flex": (2.0, 2.5, 2.9), "flex_needed": None}, "pass"),
        ({"efficiency": (0.7, 0.75, 0.79)}, "miss"),
        ({"efficiency": (0.7, 0.85, 0.9)}, "pass"),
        ({"error": 1e-2}, "wrong result"),
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: str) -> None:
    one = sparse.Measured("x", 0.04, 100.0, (0.04, 0.05, 0.06), 0.055, None, None, 3.0, None, 1e-7, 1e-3, 5)
    one = replace(one, **changed)
    assert one.verdict == verdict
    assert str(one).endswith(verdict)


def test_the_run_keeps_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(turns.time, "perf_counter", clock.now)
    real = qkv.attention
    monkeypatch.setattr(qkv, "attention", lambda *given, **more: clock.call(1.0)() or real(*given, **more))
    shown: list[str] = []
    which = [replace(TOY, length=20 + n) for n in range(12)]
    budget = Budget(30.0, len(which), clock.now)
    found = turns.measure(sparse.measurement(), which, Terms(), budget, lambda text: None, shown.append)
    assert [str(one) for one in found] == shown[1:]
    assert 20.0 <= clock.now() <= 40.0
    assert len(found) + len(budget.names) == len(which)
    assert budget.names


def test_a_peer_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(sparse, "_flex", fails)
    assert "flex: no compiler here" in str(sparse.compare(TOY, Terms(rounds=1, compiled=True)))
    monkeypatch.setattr(sparse, "_flex", lambda pattern, L, q, k, v: lambda: v * 2)
    assert "flex differs by" in str(sparse.compare(TOY, Terms(rounds=1, compiled=True)))


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sparse, "calls", lambda quick: [TOY, replace(TOY, backward=True)])
    path = tmp_path / "sparse.jsonl"
    assert command(["--sparse", "--quick", "--threads", "1", "--json", str(path)]) == 0
    document = results.read(path)["sparse"]
    names = ["window 5 2×70 d8 f32", "window 5 2×70 d8 f32 backward"]
    assert [row["name"] for row in document["sparse"]] == names
    assert names[0] in capsys.readouterr().out
    assert command(["--sparse", "--list", "--only", "backward"]) == 0
    assert capsys.readouterr().out == f"{names[1]}\n"


def test_every_kind_that_was_promised_is_a_row() -> None:
    names = [call.name for call in sparse.calls()]
    assert len(names) == len(set(names)) == 8 * len(patterns.PATTERNS) + 2
    assert "BigBird 64 8×8192 d64 f32 backward" in names
    *quick, step = (call.name for call in sparse.calls(quick=True))
    assert quick == [n for n in names if n.endswith("d128 bf16")]
    assert step.startswith("decode 32/8×16384")


@pytest.mark.parametrize("other", ["--training", "--caches", "--models", "--insight", "--peers=sdpa", "--chart=x.svg"])
def test_other_measurements_are_another_run(other: str) -> None:
    with pytest.raises(ArgumentError, match="Make two runs"):
        command(["--sparse", other])
