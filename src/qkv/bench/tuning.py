"""`qkv doctor --tune`: a few calls, timed with the native kernel and with PyTorch's own, for plans to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Literal, NamedTuple, TypeAlias

import torch

from qkv.backends import rates, registry
from qkv.backends.base import Speed
from qkv.backends.recorded import Kind, Machine, Point, Recording
from qkv.bench.race import Clock, ratio, take_turn
from qkv.functional import attention
from qkv.masks import causal

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEADS = 8
_SECONDS = 0.6  # of each call, both kernels together
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 25

Name: TypeAlias = Literal["prefill", "decode"]
MaskName: TypeAlias = Literal["full", "causal"]


class Case(NamedTuple):
    """A call to time."""

    kind: Name
    mask: MaskName
    dtype: torch.dtype
    D: int
    group: int
    keys: int

    def point(self, found: float) -> Point:
        """What timing it gave."""
        kind = Kind(self.kind, self.mask, str(self.dtype).removeprefix("torch."))
        return Point(kind, self.D, self.group, self.keys, found)


_MASKS: tuple[MaskName, ...] = ("full", "causal")
CASES = (
    *(Case("prefill", m, t, d, 1, n) for m, t, d, n in product(_MASKS, _DTYPES, (64, 128), (512, 2048))),
    *(Case("decode", "full", t, d, g, n) for t, d, g, n in product(_DTYPES, (64, 128), (1, 4), (512, 4096))),
)


def measure(isa: str, tell: Callable[[Point], None], clock: Clock | None = None) -> Recording:
    """Time every case, and tell of each."""
    points = []
    for case in CASES:
        points.append(case.point(compare(case, isa, clock or Clock())))
        tell(points[-1])
    return Recording(Machine.here(isa), tuple(points), tuple(speeds(isa)))


def speeds(isa: str) -> Iterator[Speed]:
    """What calls take, forward and backward: predictions of plans start from it."""
    backend = registry.load(f"cpu:{isa}")
    for dtype, D, backward in product(_DTYPES, (64, 128), (False, True)):
        found = rates.measure(backend, dtype, D, D, backward, turns=_LEAST_ROUNDS * 4)
        yield Speed(str(dtype).removeprefix("torch."), D, backward, *found)


def compare(case: Case, isa: str, clock: Clock) -> float:
    """How many times as long PyTorch's own kernel takes, by the median over rounds in which both take a turn."""
    q = torch.randn(1, _HEADS, 1 if case.kind == "decode" else case.keys, case.D).to(case.dtype)
    k, v = torch.randn(2, 1, _HEADS // case.group, case.keys, case.D).to(case.dtype).unbind(0)
    mask = causal() if case.mask == "causal" else None
    calls = [partial(attention, q, k, v, mask, backend=backend) for backend in (f"cpu:{isa}", "sdpa")]
    with torch.no_grad():
        for call in calls:
            call()  # prepares it, and starts threads
        estimates = []
        for call in calls:
            start = clock.now()
            call()
            estimates.append(clock.now() - start)
        rounds = round(_SECONDS / max(sum(estimates), 1e-3))
        times: tuple[dict[int, float], dict[int, float]] = ({}, {})
        for n in range(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, rounds))):
            for call, estimate, taken in zip(calls, estimates, times, strict=True):
                taken[n] = take_turn([call], estimate, cold=False, clock=clock)
    found = ratio(times[1], times[0])
    assert found is not None
    return round(found.median, 3)
