"""How contenders of `qkv bench --caches` are raced, and what is told of them: figures, the machine's limit, lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.bench import machine
from qkv.bench.budget import OUT_OF_TIME
from qkv.bench.race import GEMM_SIZE, Clock, Spread, interleave, ratio, read_through, spread

# Reading as PyTorch does it comes this near to what the memory can do; a call beyond it had a disturbed opponent.
_POSSIBLE = 1.15
READS = {"read f32": torch.float32, "read i64": torch.int64}


@dataclass(frozen=True)
class Figure:
    """A measured number with its quartiles, and what it has to reach."""

    value: Spread
    unit: str = "×"
    needed: float | None = None
    at_most: bool = False
    possible: float | None = None  # more than this no machine does: something else disturbed what it is compared with

    @property
    def verdict(self) -> str:
        """`pass`: the median reached it. `near`: it lies between the quartiles. `miss`: neither. `no data`: disturbed.

        >>> Figure(Spread(1.05, 1.0, 1.1), needed=1.08, at_most=True).verdict
        'pass'
        """
        if self.needed is None:
            return ""
        middle, low, high = self.value
        if self.possible is not None and middle > self.possible:
            return "no data"
        if middle <= self.needed if self.at_most else middle >= self.needed:
            return "pass"
        return "near" if low <= self.needed <= high else "miss"


@dataclass(frozen=True)
class Line:
    """One line of the table. Times are seconds a call; `reached` is the part of the machine's limit, named `limit`."""

    case: str
    ours: Spread | None = None
    opponent: str = ""
    theirs: Spread | None = None
    figure: Figure | None = None
    limit: str = ""
    reached: Figure | None = None
    rounds: int = 0
    note: str = ""
    problem: str = ""  # a wrong result, or why there is none

    @property
    def checks(self) -> list[Figure]:
        """The figures that have a target."""
        return [f for f in (self.figure, self.reached) if f is not None and f.needed is not None]


@dataclass
class Bench:
    """What the contests of one run share; `seconds` is the time for the rounds of the one that runs."""

    cache_bytes: int
    backend: str | None = None
    seconds: float = 5.0
    until: float = math.inf  # the time of the clock by which that one has to end
    rounds: tuple[int, int] = (5, 40)
    clock: Clock = field(default_factory=Clock)

    def attention(self, q: Tensor, k: Any, v: Tensor | None = None, mask: Any = None) -> Tensor:
        out: Tensor = qkv.attention(q, k, v, mask=mask, backend=self.backend)
        return out


class Race:
    """The times of contenders that were found right, and what is to be told of them."""

    def __init__(
        self,
        bench: Bench,
        calls: Mapping[str, Callable[[], Any]],
        wrong: Mapping[str, str],
        reads: tuple[Tensor, Tensor],
        flops: int = 0,
    ) -> None:
        """`reads`: what the read rate is measured on. `flops`: of a call, 0 where reading is the only limit."""
        self.wrong, self.flops, self.read_bytes = wrong, flops, sum(x.nbytes for x in reads)
        running = {name: [call] for name, call in calls.items() if name not in wrong}
        flat = [x.reshape(-1) for x in reads]
        for name, kind in READS.items():
            running[name] = [lambda kind=kind: read_through(*(x.view(kind) for x in flat))]  # type: ignore[misc]
        if flops:
            kind = machine.product_type(torch.bfloat16)
            a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(kind) for _ in range(2))
            running["GEMM"] = [lambda: torch.mm(a, b)]
        now = bench.clock.now
        estimates = {}
        for name, (call,) in running.items():
            for _ in range(2):  # the first also starts threads; in a long call that is a small part
                start = now()
                call()
                estimates[name] = now() - start
                if estimates[name] > 0.5:
                    break
        self.taken = interleave(
            running, estimates, seconds=bench.seconds, rounds=bench.rounds, until=bench.until, clock=bench.clock
        )

    def line(
        self,
        case: str,
        ours: str,
        against: str,
        needed: float | None = None,
        *,
        nbytes: int = 0,
        at_most: bool = False,
        of_read: float | None = None,
    ) -> Line:
        """A line of `ours` against another; at_most: how many times as long ours may take, else as long theirs must."""
        problems = [f"{name}: {self.wrong[name]}" for name in (ours, against) if name in self.wrong]
        if problems:
            return Line(case, opponent=against, problem="; ".join(problems))
        mine, theirs = self.taken[ours], self.taken[against]
        value = ratio(mine, theirs) if at_most else ratio(theirs, mine)
        if value is None:
            return Line(case, opponent=against, note=f"{case}: {OUT_OF_TIME}")
        kind, best = self._limit(nbytes)
        part = ratio(best, mine)
        return Line(
            case,
            spread(list(mine.values())),
            against,
            spread(list(theirs.values())),
            Figure(value, "×", needed, at_most),
            kind,
            None if part is None or not nbytes else Figure(part, "", of_read, possible=_POSSIBLE),
            len(mine),
        )

    def _limit(self, nbytes: int) -> tuple[str, dict[int, float]]:
        """The longer of reading `nbytes` and of the FLOPs at the rates of each round."""
        reads = [self.taken[name] for name in READS if self.taken[name]]
        limits = {}
        if reads:
            reading = min(reads, key=lambda taken: spread(list(taken.values())).median)
            limits["read"] = {n: s * nbytes / self.read_bytes for n, s in reading.items()}
        if self.flops and self.taken["GEMM"]:
            limits["GEMM"] = {n: s * self.flops / (2 * GEMM_SIZE**3) for n, s in self.taken["GEMM"].items()}
        return max(limits.items(), key=lambda kind: spread(list(kind[1].values())).median, default=("read", {}))
