"""How things are timed: checked first, then interleaved A B C A B C ..., with ratios taken within each round.

A machine's speed drifts; within one round of a few milliseconds to a second it hardly does. So every ratio is computed
from times of one round, and the median over rounds is reported with its quartiles.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from qkv.bench import machine
from qkv.bench.budget import OUT_OF_TIME
from qkv.bench.cases import BEST, BEST_BUT_GGML, LIMIT, TOLERANCE, Row, Target
from qkv.bench.inputs import Inputs, build
from qkv.bench.peers import Roster
from qkv.bench.peers.base import Prepared, Unavailable

OURS = "qkv"
_LIMITS = ("gemm", "read f32", "read i64")
GEMM_SIZE = 1536


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles by linear interpolation between the sorted values.

    >>> spread([4.0, 1.0, 3.0, 2.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if not values:
        raise ValueError("spread() needs at least one value")
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    return Spread(at(0.5), at(0.25), at(0.75))


def ratio(theirs: Mapping[int, float], ours: Mapping[int, float]) -> Spread | None:
    """How many times as long theirs took, over the rounds that both have."""
    shared = sorted(theirs.keys() & ours.keys())
    return spread([theirs[n] / ours[n] for n in shared]) if shared else None


@dataclass
class Timing:
    """What is known about one contender of one row. `rounds` maps the round to seconds a call."""

    name: str
    rounds: dict[int, float] = field(default_factory=dict)
    unavailable: str = ""
    error: float | None = None  # worst relative error of the sampled rows
    part: str = "out"  # the result that has it: out, dq, dk or dv
    agrees: bool = True
    note: str = ""

    @property
    def usable(self) -> bool:
        return bool(self.rounds) and self.agrees and not self.unavailable


@dataclass
class Check:
    target: Target
    opponent: str
    measured: Spread | None
    verdict: str  # pass, miss, near (the target lies within the quartiles), no data


@dataclass
class Result:
    row: Row
    timings: dict[str, Timing]
    best_peer: str | None = None
    ratio: Spread | None = None
    limit_seconds: float | None = None
    of_limit: Spread | None = None
    checks: list[Check] = field(default_factory=list)


@dataclass
class Clock:
    """The time source, and the pause that lets other libraries' spinning threads go to sleep; replaced in tests."""

    now: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep

    def settle(self, longest: float = 0.05) -> None:
        start = self.now()
        while self.now() - start < longest:
            before = self.cpu()
            self.sleep(0.001)
            if self.cpu() - before < 0.0003:
                return


def take_turn(calls: Sequence[Callable[[], Any]], estimate: float, *, cold: bool, clock: Clock) -> float:
    """Seconds a call, in one turn of one contender.

    Warm: the same call repeated, the median of up to five; below 0.2 ms, batches of calls. Cold: one pass over every
    set of K and V (each was last read a whole pass ago), total time divided by their number.
    """
    clock.settle()
    if cold:
        calls[-1]()  # starts the threads; by the time its set is due again, the pass has evicted it from the cache
        start = clock.now()
        for call in calls:
            call()
        return (clock.now() - start) / len(calls)
    call = calls[0]
    if estimate < 2e-4:
        batch = max(1, round(2e-3 / max(estimate, 1e-7)))
        return spread([_batch(call, batch, clock) for _ in range(3)]).median
    if estimate < 0.05:
        call()
    return spread([_batch(call, 1, clock) for _ in range(_repeats(estimate))]).median


def _repeats(estimate: float) -> int:
    return max(1, min(5, round(0.03 / estimate)))


def _turn_seconds(sets: int, estimate: float, cold: bool) -> float:
    """How long `take_turn` takes."""
    if cold:
        return (sets + 1) * estimate
    return 6e-3 if estimate < 2e-4 else (_repeats(estimate) + (estimate < 0.05)) * estimate


def _batch(call: Callable[[], Any], count: int, clock: Clock) -> float:
    start = clock.now()
    for _ in range(count):
        call()
    return (clock.now() - start) / count


def interleave(
    contenders: Mapping[str, Sequence[Callable[[], Any]]],
    estimates: Mapping[str, float],
    *,
    cold: bool = False,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 15),
    keep: Callable[[str], bool] = lambda name: True,
    until: float = math.inf,
    clock: Clock | None = None,
) -> dict[str, dict[int, float]]:
    """Turns of every contender, round after round, each second round in reverse order.

    Ends after `seconds`, but never before the least number of rounds nor after the most. A contender that `keep`
    does not name cannot be the best once it is three times as slow as the fastest of those, and leaves after two
    rounds (ten times as slow: after one). One whose next turn would end after `until`, a time of the clock, leaves
    then; the first turn of the first contender is always taken.
    """
    clock = clock or Clock()
    taken: dict[str, dict[int, float]] = {name: {} for name in contenders}
    playing = list(contenders)
    start = clock.now()
    first = playing[0] if playing else ""
    for number in range(rounds[1]):
        for name in list(playing) if number % 2 == 0 else playing[::-1]:
            lasts = _turn_seconds(len(contenders[name]), estimates[name], cold)
            if clock.now() + lasts > until and (number or name != first):
                playing.remove(name)
                continue
            taken[name][number] = take_turn(contenders[name], estimates[name], cold=cold, clock=clock)
        if first not in playing:  # a round without it compares nothing
            break
        if number < 2:
            optional = {name: min(taken[name].values()) for name in playing if not keep(name)}
            bound = (10, 3)[number] * min(optional.values(), default=0.0)
            playing = [name for name in playing if optional.get(name, 0.0) <= bound]
        elapsed = clock.now() - start
        if number + 1 >= rounds[0] and elapsed + elapsed / (number + 1) > seconds:
            break
    return taken


class Runner:
    """Runs rows, one after the other; the inputs of only one are in memory at a time."""

    def __init__(self, roster: Roster, cache_bytes: int, *, clock: Clock | None = None) -> None:
        self.roster, self.cache_bytes, self.clock = roster, cache_bytes, clock or Clock()
        self._costs: dict[str, float] = {}  # seconds that a contender's preparation and check took last, by name

    def run(self, row: Row, seconds: float, until: float = math.inf) -> Result:
        """`seconds` are for the rounds; whatever would end after `until`, a time of the clock, is left out."""
        with torch.no_grad():
            inputs = build(row.case, row.case.cold_sets(self.cache_bytes) if row.case.cold else 1)
            timings, prepared, estimates = self._prepare(row, inputs, until)
            calls: dict[str, Sequence[Callable[[], Any]]] = {name: p.calls for name, p in prepared.items()}
            flops = self._add_limits(row, inputs, calls, estimates)
            keep = {OURS, *row.own, *_LIMITS, *(t.against for t in row.targets)}
            taken = interleave(
                calls,
                estimates,
                cold=row.case.cold,
                seconds=seconds,
                rounds=(5 if row.targets else 3, 15),
                keep=keep.__contains__,
                until=until,
                clock=self.clock,
            )
        for name, rounds in taken.items():
            timing = timings.setdefault(name, Timing(name))
            timing.rounds, timing.unavailable = rounds, "" if rounds else OUT_OF_TIME
        del calls, prepared, inputs
        gc.collect()
        return judge(row, timings, flops)

    def _prepare(
        self, row: Row, inputs: Inputs, until: float
    ) -> tuple[dict[str, Timing], dict[str, Prepared], dict[str, float]]:
        timings: dict[str, Timing] = {}
        prepared: dict[str, Prepared] = {}
        estimates: dict[str, float] = {}
        wanted = [(OURS, inputs), *((name, build(case)) for name, case in row.own.items())]
        wanted += [(name, inputs) for name in row.peers]
        for name, given in wanted:
            timing = timings[name] = Timing(name)
            begun = self.clock.now()
            if name != OURS and begun + self._costs.get(name, 0.0) > until:
                timing.unavailable = OUT_OF_TIME
                continue
            try:
                ready = self.roster.prepare(OURS if name in row.own else name, given)
                dtype = name.partition(" ")[2]
                tolerance = TOLERANCE[dtype if dtype in TOLERANCE else given.case.dtype]
                ends = ready.calls[:1] if len(ready.calls) == 1 else (ready.calls[0], ready.calls[-1])
                errors = []
                for call in ends:
                    started = self.clock.now()
                    result = call()
                    took = self.clock.now() - started
                    errors.append(given.errors(ready.read(result)))
                timing.error, timing.part = max((e, part) for found in errors for part, e in found.items())
                timing.agrees, timing.note = timing.error <= tolerance, ready.note
                if timing.agrees:
                    prepared[name] = ready
                    estimates[name] = took if took > 0.5 else self._estimate(ready.calls[0])
            except Unavailable as reason:
                timing.unavailable = str(reason)
            except Exception as error:  # a peer that fails must be reported, not end the run
                timing.unavailable = f"failed: {type(error).__name__}: {str(error)[:160]}"
            self._costs[name] = self.clock.now() - begun
        return timings, prepared, estimates

    def _estimate(self, call: Callable[[], Any]) -> float:
        first = _batch(call, 1, self.clock)
        return first if first > 0.02 else min(first, _batch(call, 2, self.clock))

    def _add_limits(
        self,
        row: Row,
        inputs: Inputs,
        calls: dict[str, Sequence[Callable[[], Any]]],
        estimates: dict[str, float],
    ) -> int:
        """The machine's own rate takes part in every round. Returns the FLOPs of its matrix product."""
        if row.limit == "gemm":
            dtype = machine.product_type(row.case.torch_dtype)
            a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
            b = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
            calls["gemm"] = [lambda: torch.mm(a, b)]
        elif row.limit == "read":
            flat = [tuple(t.view(-1) for t in pair) for pair in inputs.sets]
            for name, kind in (("read f32", torch.float32), ("read i64", torch.int64)):
                calls[name] = [partial(read_through, k.view(kind), v.view(kind)) for k, v in flat]
        for name in calls.keys() & set(_LIMITS):
            estimates[name] = self._estimate(calls[name][0])
        return 2 * GEMM_SIZE**3


def read_through(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads every byte of K and V once, in as many threads as PyTorch uses."""
    return torch.sum(k), torch.sum(v)


def judge(row: Row, timings: dict[str, Timing], gemm_flops: int) -> Result:
    """Ratios, the fraction of the machine's limit, and the verdict on every target of the row."""
    result = Result(row, timings)
    ours = timings[OURS]
    limits = [timings[name] for name in _LIMITS if name in timings and timings[name].rounds]
    if limits:
        fastest = min(limits, key=lambda t: spread(list(t.rounds.values())).median)
        scale = row.case.flops / gemm_flops if row.limit == "gemm" else 1.0
        times = {n: s * scale for n, s in fastest.rounds.items()}
        result.limit_seconds = spread(list(times.values())).median
        result.of_limit = ratio(times, ours.rounds) if ours.usable else None
    result.best_peer = _best(row, timings, lambda name: True)
    if result.best_peer and ours.usable:
        result.ratio = ratio(timings[result.best_peer].rounds, ours.rounds)
    for target in row.targets:
        result.checks.append(_check(result, target))
    return result


def _best(row: Row, timings: dict[str, Timing], wanted: Callable[[str], bool]) -> str | None:
    """The fastest agreeing peer that computes in the row's own type."""
    ranked = [
        (spread(list(timings[name].rounds.values())).median, name)
        for name in row.peers
        if " " not in name and wanted(name) and name in timings and timings[name].usable
    ]
    return min(ranked)[1] if ranked else None


def _check(result: Result, target: Target) -> Check:
    row, timings = result.row, result.timings
    if target.against == LIMIT:
        opponent, measured = "limit", result.of_limit
    else:
        opponent = target.against
        if opponent == BEST:
            opponent = result.best_peer or ""
        elif opponent == BEST_BUT_GGML:
            opponent = _best(row, timings, lambda name: name != "ggml") or ""
        usable = timings[OURS].usable and opponent in timings and timings[opponent].usable
        measured = ratio(timings[opponent].rounds, timings[OURS].rounds) if usable else None
    if measured is None:
        return Check(target, opponent, None, "no data" if timings[OURS].agrees else "wrong result")
    passed = measured.median >= target.needed
    if not passed and target.slack_us and opponent in timings:
        passed = within_slack(timings[OURS].rounds, timings[opponent].rounds, target.slack_us)
    near = measured.low <= target.needed <= measured.high
    return Check(target, opponent, measured, "pass" if passed else "near" if near else "miss")


def within_slack(ours: Mapping[int, float], theirs: Mapping[int, float], slack_us: float) -> bool:
    """Whether ours is at most `slack_us` slower than a call that itself takes under 10 microseconds."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared or spread([theirs[n] for n in shared]).median >= 10e-6:
        return False
    return spread([ours[n] - theirs[n] for n in shared]).median <= slack_us * 1e-6
