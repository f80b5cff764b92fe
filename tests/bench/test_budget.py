"""`qkv bench` on any processor: `--seconds` is kept, slow products are no limit, and results come as they are known."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qkv.bench import caches, machine, memory, race, report, session, sweep, training
from qkv.bench.budget import OUT_OF_TIME, Budget
from qkv.bench.caches import contest as caches_race, reading as caches_rows
from qkv.bench.caches.contest import Bench, Line, Race
from qkv.bench.cases import Case, Row, Target
from qkv.bench.inputs import build
from qkv.bench.peers.base import Prepared, Setup
from qkv.bench.peers.torch import Matmuls
from qkv.bench.race import Runner, interleave
from qkv.lm.decoder import Config
from tests.kit.bench_fakes import CACHE, SMALL, FakeClock, FakeRoster, command, right

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW, FAST = 0.1, 0.001  # seconds of a small product with and without an instruction for it


# ---- products


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of bfloat16."""
    machine.product_type.cache_clear()
    monkeypatch.setattr(machine, "product_seconds", lambda dtype, rows: SLOW if dtype == torch.bfloat16 else FAST)
    yield
    machine.product_type.cache_clear()


def _products(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> list[torch.dtype]:
    """The types of the large products that are asked for; one of bfloat16 takes 24 seconds, as with AVX2."""
    seen: list[torch.dtype] = []
    plain = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[0] < race.GEMM_SIZE:
            return plain(a, b)
        seen.append(a.dtype)
        clock.call(24.0 if a.dtype == torch.bfloat16 else 0.04)()
        return a

    monkeypatch.setattr(torch, "mm", mm)
    return seen


def test_the_faster_product_is_the_limit(slow_bfloat16: None) -> None:
    assert machine.product_type(torch.bfloat16) == torch.float32
    assert machine.product_type(torch.float16) == torch.float32
    assert machine.product_type(torch.float32) == torch.float32
    assert machine.product_type(torch.float64) == torch.float64


def test_bfloat16_is_its_own_limit_where_it_has_products(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.product_type.cache_clear()
    monkeypatch.setattr(machine, "product_seconds", lambda dtype, rows: 0.5 * FAST if dtype.itemsize == 2 else FAST)
    assert machine.product_type(torch.bfloat16) == torch.bfloat16
    machine.product_type.cache_clear()


def test_the_product_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2 if a.dtype == torch.bfloat16 else 0)
        return plain(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    threads = torch.get_num_threads()
    assert machine.product_seconds(torch.bfloat16, 8) >= 0.2
    assert machine.product_seconds(torch.float32, 8) < 0.2
    assert torch.get_num_threads() == threads


def test_a_row_is_limited_by_the_float32_product(slow_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, roster = FakeClock(), FakeRoster()
    roster.ours, roster._made = Slow(clock, 0.0, 0.02), {"sdpa": Slow(clock, 0.0, 0.04)}  # type: ignore[assignment]
    seen = _products(monkeypatch, clock)
    row = Row("r", replace(SMALL, dtype="bf16"), ("sdpa",), limit="gemm")
    result = Runner(roster, CACHE, clock=clock).run(row, 1.0)
    assert set(seen) == {torch.float32}
    assert clock.now() < 2.0, "a minute before"
    assert result.limit_seconds == pytest.approx(0.04 * SMALL.flops / (2 * race.GEMM_SIZE**3))


def test_caches_are_limited_by_the_float32_product(slow_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    seen = _products(monkeypatch, clock)
    monkeypatch.setattr(caches_race, "read_through", lambda k, v: clock.call(0.001)())
    calls = {"ours": clock.call(0.005), "other": clock.call(0.010)}
    race = Race(Bench(cache_bytes=1, clock=clock, seconds=0.5), calls, {}, (torch.zeros(8), torch.zeros(8)), flops=8)
    assert set(seen) == {torch.float32}
    assert race.line("row", "ours", "other", nbytes=1).figure is not None
    assert clock.now() < 2.0


def test_two_matmuls_run_in_float32_where_that_is_faster(slow_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[torch.dtype] = set()
    plain = {name: getattr(torch, name) for name in ("mm", "bmm")}
    for name, call in plain.items():

        def watched(a: torch.Tensor, b: torch.Tensor, call: Callable[..., torch.Tensor] = call) -> torch.Tensor:
            kinds.add(a.dtype)
            return call(a, b)

        monkeypatch.setattr(torch, name, watched)
    ready = Matmuls(Setup(1)).prepare(inputs := build(Case("bf16", 1, 48, 24, Hq=8, Hkv=1, rank=16)))
    assert inputs.error(ready.read(ready.calls[0]())) < 0.04
    assert ready.note == "on float32 copies"
    small = Bench(cache_bytes=1 << 10, rounds=(1, 1), seconds=0.0)
    (line,) = caches_rows.latent(small, Case("bf16", 1, 50, 40, B=2, Hq=4, Hkv=1, rank=32), needed=1.0)
    assert line.problem == ""
    assert kinds == {torch.float32}


# ---- the seconds


class Slow:
    """A peer whose preparation and calls take their time."""

    def __init__(self, clock: FakeClock, preparing: float, calling: float) -> None:
        self.clock, self.preparing, self.calling = clock, preparing, calling

    def prepare(self, inputs: Any) -> Prepared:
        self.clock.call(self.preparing)()
        out = right(inputs.case, inputs.q, *inputs.sets[0])

        def call() -> torch.Tensor:
            self.clock.call(self.calling)()
            return out

        return Prepared([call], lambda out: out)


# name -> seconds of preparing and of a call: ours, and two peers
KINDS = {
    "quick": ((0.0, 0.01), (0.0, 0.05), (0.5, 0.02)),
    "a peer that compiles": ((0.0, 0.01), (0.0, 0.05), (20.0, 0.02)),
    "a slow peer": ((0.0, 0.02), (0.0, 4.0), (0.5, 0.02)),
    "slow": ((0.2, 2.0), (0.2, 6.0), (0.5, 2.0)),
    "a peer that takes half a minute": ((0.0, 2.0), (0.0, 24.0), (0.5, 2.0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [60.0, 130.0, 300.0])
def test_the_seconds_are_kept_and_what_has_no_room_is_named(
    kind: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race.gc, "collect", lambda: 0)  # after each row: half a minute of this test
    clock, roster = FakeClock(), FakeRoster()
    ours, sdpa, flex = (Slow(clock, *times) for times in KINDS[kind])
    roster.ours, roster._made = ours, {"sdpa": sdpa, "flex": flex}  # type: ignore[assignment]
    rows = [Row(f"row {n}", SMALL, ("sdpa", "flex"), (Target("sdpa", 1.0),)) for n in range(40)]
    budget = Budget(seconds, len(rows), clock.now)
    results = session.measure_rows(
        rows, Runner(roster, CACHE, clock=clock), budget, lambda text: None, lambda so_far: None
    )
    assert clock.now() <= 1.2 * seconds
    assert [r.row.name for r in results] + budget.names == [row.name for row in rows]
    assert all(result.timings["qkv"].rounds for result in results)
    for name in budget.names:
        assert name in budget.said()
    told = report.summary(results)
    for result in results:
        for timing in result.timings.values():
            assert timing.rounds or timing.unavailable == OUT_OF_TIME
            if timing.unavailable:
                assert OUT_OF_TIME in told
    if kind == "quick":
        assert not budget.names
    if seconds == 130.0:
        assert clock.now() >= 0.5 * seconds, "what is there is used, where there is something to measure"


def test_a_contender_whose_turn_would_end_too_late_leaves() -> None:
    clock = FakeClock()
    calls = {"ours": [clock.call(1.0)], "fast": [clock.call(0.5)], "slow": [clock.call(9.0)]}
    estimates = {"ours": 1.0, "fast": 0.5, "slow": 9.0}
    taken = interleave(calls, estimates, seconds=99.0, rounds=(5, 15), keep=lambda _: True, until=16.0, clock=clock)
    assert {name: len(rounds) for name, rounds in taken.items()} == {"ours": 5, "fast": 4, "slow": 1}
    assert clock.now() <= 16.0
    late = interleave(calls, estimates, rounds=(5, 15), until=0.0, clock=clock)
    assert {name: len(rounds) for name, rounds in late.items()} == {"ours": 1, "fast": 0, "slow": 0}


def test_few_rounds_are_told() -> None:
    clock, roster = FakeClock(), FakeRoster()
    roster.ours, roster._made = Slow(clock, 0.0, 3.0), {"sdpa": Slow(clock, 0.0, 3.0)}  # type: ignore[assignment]
    result = Runner(roster, CACHE, clock=clock).run(Row("r", SMALL, ("sdpa",)), 1.0, until=19.0)
    assert len(result.timings["qkv"].rounds) == 2
    assert "in fewer than three rounds, since --seconds had no room for more: r" in report.summary([result])


def test_caches_keep_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(caches_race, "read_through", lambda k, v: clock.call(0.001)())
    monkeypatch.setattr(caches.gc, "collect", lambda: 0)

    def contest(small: Bench) -> list[Line]:
        clock.call(2.0)()
        calls = {"ours": clock.call(0.5), "other": clock.call(24.0)}
        race = Race(small, calls, {}, (torch.zeros(8), torch.zeros(8)))
        return [race.line("row", "ours", "other")]

    chosen = {f"row {n}": contest for n in range(16)}
    shown: list[Line] = []
    small, budget = Bench(cache_bytes=1, clock=clock), Budget(100.0, len(chosen), clock.now)
    lines, took = caches.measure(chosen, small, budget, lambda text: None, shown.append)  # type: ignore[arg-type]
    assert 60.0 <= clock.now() <= 120.0
    assert shown == lines
    assert [*took, *budget.names] == list(chosen)
    assert not any(line.problem for line in lines)


def test_the_extras_keep_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def late(*given: Any, timeout: float, **more: Any) -> Any:
        limits.append(timeout)
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(memory.subprocess, "run", late)
    (first, *_) = measured = memory.measure_all(memory.CASES, 1, None, 7.0, lambda text: None)
    assert 6.0 < limits[0] <= 7.0
    assert first.problem == OUT_OF_TIME
    assert memory.measure_all(memory.CASES, 1, None, 0.0, lambda text: None)[0].problem == OUT_OF_TIME
    assert OUT_OF_TIME in memory.summary(measured)
    monkeypatch.setattr(training, "STEPS", ((8, 2, 1.0), (16, 1, 1.0)))
    steps = training.measure(lambda text: None, size=Config(dim=16, layers=1, heads=2, context=8), seconds=0.0)
    assert len(steps) == 2
    assert sweep.sweep(FakeRoster(sdpa=right), seconds=-1.0) == []
    assert "200 of 200 shapes left out" in sweep.summary([], 200)


# ---- results as they come


def test_each_row_is_printed_when_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    measure = Runner.run

    def run(self: Runner, row: Row, *given: float) -> Any:
        seen.append(capsys.readouterr().out)
        return measure(self, row, *given)

    monkeypatch.setattr(Runner, "run", run)
    options = ["--only", "^tiny", "--peers", "sdpa", "--seconds", "20", "--backend", "tiled", "--threads", "1"]
    assert command(options) == 0
    assert "case" in seen[0]
    assert "tiny 1x4x32x32 f32" in seen[1]
    assert "tiny 1x4x32x32 bf16" in capsys.readouterr().out
