"""`qkv bench --insight` on toy calls: what is compared, what is noticed, and what is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkv
from qkv.bench import looking, results, turns
from qkv.bench.budget import Budget
from qkv.bench.turns import Terms
from qkv.errors import ArgumentError
from tests.kit.bench_fakes import FakeClock, command

pytestmark = pytest.mark.usefixtures("one_thread")
TOY = looking.Call(2, 70, 8, True, torch.float32)


def test_contenders_are_compared() -> None:
    for call in (TOY, replace(TOY, causal=False, dtype=torch.bfloat16)):
        one = looking.compare(call, Terms(rounds=3))
        assert one.agrees, one
        assert one.rounds == 3
        assert all(low <= middle <= high for low, middle, high in (one.rows, one.all))
        assert one.milliseconds > 0
        assert one.rectangle is None


@pytest.mark.parametrize("name", ["lse", "score", "weight", "entropy", "top_keys", "top_weights", "mass", "out"])
def test_a_wrong_statistic_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = looking.observe

    def wrong(*given: Any) -> Any:
        found = real(*given)
        if name == "out":
            return found._replace(out=found.out.neg())
        t = getattr(found.statistics, name)
        if t is None:
            return found
        other = t.roll(1, 2) if name in ("top_keys", "mass") else t * 1.0001
        return found._replace(statistics=found.statistics._replace(**{name: other}))

    monkeypatch.setattr(looking, "observe", wrong)
    assert looking.compare(TOY, Terms(rounds=1)).verdict == "wrong result"


@pytest.mark.parametrize(
    ("rows", "every", "rectangle", "verdict"),
    [
        ((1.0, 1.2, 1.4), (2.0, 2.4, 2.6), None, "pass"),
        ((1.2, 1.35, 1.5), (2.0, 2.4, 2.6), None, "near"),
        ((1.0, 1.2, 1.4), (2.6, 2.7, 2.8), None, "miss"),
        ((1.0, 1.2, 1.4), (2.0, 2.4, 2.6), 51.0, "miss"),
    ],
)
def test_verdicts(rows: Any, every: Any, rectangle: float | None, verdict: str) -> None:
    one = looking.Looked("causal", 10.0, rows, every, 1e-7, 5, rectangle)
    assert one.verdict == verdict
    assert str(one).endswith(verdict)
    assert replace(one, error=2e-5).verdict == "wrong result"


def test_a_rectangle_of_the_longest_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "_LONG", 600)
    one = looking.compare(replace(TOY, heads=1, length=600), Terms(rounds=1))
    assert one.rectangle is not None
    assert "256 × 256 weights" in str(one)


def test_looking_keeps_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(turns.time, "perf_counter", clock.now)
    for module, name in ((looking, "observe"), (qkv, "attention")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, **more: clock.call(1.0)() or real(*given, **more))
    shown: list[str] = []
    which = [replace(TOY, length=20 + n) for n in range(12)]
    budget = Budget(30.0, len(which), clock.now)
    found = turns.measure(looking.measurement(), which, Terms(), budget, lambda text: None, shown.append)
    assert [str(one) for one in found] == shown[1:]
    assert 20.0 <= clock.now() <= 40.0
    assert found
    assert len(found) + len(budget.names) == len(which)
    assert budget.names


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(looking, "calls", lambda quick: [TOY, replace(TOY, causal=False)])
    path = tmp_path / "insight.jsonl"
    assert command(["--insight", "--quick", "--threads", "1", "--json", str(path)]) == 0
    document = results.read(path)["insight"]
    assert [row["name"] for row in document["insight"]] == ["causal 2×70 d8 f32", "full 2×70 d8 f32"]
    assert "causal 2×70 d8 f32" in capsys.readouterr().out
    assert command(["--insight", "--list", "--only", "full"]) == 0
    assert capsys.readouterr().out == "full 2×70 d8 f32\n"


def test_every_kind_that_was_promised_is_a_row() -> None:
    names = [call.name for call in looking.calls()]
    assert len(names) == len(set(names)) == 10
    assert "causal 1×100000 d64 bf16" in names
    assert [call.name for call in looking.calls(quick=True)] == [n for n in names if "8×2048 d64" in n]


@pytest.mark.parametrize("other", ["--training", "--caches", "--models", "--peers=sdpa", "--chart=x.svg"])
def test_other_measurements_are_another_run(other: str) -> None:
    with pytest.raises(ArgumentError, match="Make two runs"):
        command(["--insight", other])
