"""`qkv demo --long`, measured: one sparse call at growing lengths, beside PyTorch's attention as long as that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qkv.cli.demo import memory
from qkv.cli.demo.contenders import DTYPE, HEADS, MASK, SIZE, full, inputs, ours, sampled, theirs
from qkv.plans import plan

FIRST = 4096  # the shortest length
SHARE = 0.6  # of the memory that is free: PyTorch is not asked for more
PATIENCE = 60.0  # seconds that one call of PyTorch's may be expected to take


@dataclass
class Line:
    """One contender: what it took at each length, and why it stops where it does."""

    name: str
    times: dict[int, float] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)  # inputs, output and what the call takes beyond
    stopped: str = ""
    expected: tuple[int, float, int] | None = None  # the length that was not run, and what it would have taken


@dataclass
class Found:
    """What a run measured."""

    lines: list[Line]
    agreed: float = 0.0  # the largest difference from PyTorch, where both ran with the same mask
    rows: float = 0.0  # the largest difference of sampled rows from float64, at the longest length
    largest: float = 0.0  # what these are to be seen against: the largest number of those rows


def lengths(tokens: int) -> list[int]:
    """Doubling from FIRST to `tokens`.

    >>> lengths(20_000)
    [4096, 8192, 16384, 20000]
    """
    found = [min(FIRST, tokens)]
    while found[-1] < tokens:
        found.append(min(2 * found[-1], tokens))
    return found


def predicted(tokens: int) -> float | None:
    """Seconds that the call is expected to take; no data is needed for that."""
    q = torch.zeros((), dtype=DTYPE, device="cpu").expand(1, HEADS, tokens, SIZE)
    return plan(q, q, q, MASK).seconds


def contenders() -> list[tuple[Line, Callable[..., Callable[[], Tensor]], Callable[[int], int]]]:
    """Name, call, and the bytes that it is expected to take at a length beyond q, k, v and out."""
    return [
        (Line("qkv"), ours, lambda L: 0),
        # The mask, and the copy of it in q's dtype that PyTorch adds to the scores.
        (Line("PyTorch, this mask"), theirs, lambda L: L * L * (1 + DTYPE.itemsize)),
        (Line("PyTorch, causal only"), full, lambda L: 1 << 24),
    ]


def run(tokens: int, show: Callable[[str, int, int], None]) -> Iterator[Found]:
    """Measure length after length, and yield what was found so far after each; `show`: (name, length, queries done)."""
    q, k, v = inputs(tokens)
    racers = contenders()
    found = Found([line for line, _, _ in racers])
    for L in lengths(tokens):
        at = q[:, :, :L], k[:, :, :L], v[:, :, :L]
        outs = []
        for line, call, beyond in racers:
            if line.stopped or _stops(line, L, beyond(L)):
                continue
            taken, extra, out = _measured(call, at, partial(show, line.name, L))
            line.times[L], line.bytes[L] = taken, extra + 3 * at[0].nbytes
            outs.append(out)
        if len(outs) > 1 and L in found.lines[1].times:
            found.agreed = max(found.agreed, float((outs[0] - outs[1]).abs().max()))
        found.rows, found.largest = sampled(*at, outs[0])
        yield found


def _stops(line: Line, L: int, beyond: int) -> bool:
    """Whether a contender is not asked for this length, because of what it would take: then that is written down."""
    if line.name == "qkv":
        return False
    before = max(line.times, default=0)
    seconds = line.times[before] * (L / before) ** 2 if before else 0.0
    bytes, free = beyond + 4 * HEADS * L * SIZE * DTYPE.itemsize, memory.available()
    if bytes > SHARE * free:
        line.stopped = (
            f"{bytes / 2**30:,.1f} GiB at {L:,} would be over {SHARE:.0%} of the {free / 2**30:,.1f} GiB free"
        )
    elif seconds > PATIENCE:
        line.stopped = f"{seconds:,.0f} s expected at {L:,}, over the {PATIENCE:.0f} s it is given"
    if line.stopped:
        line.expected = (L, seconds, bytes)
    return bool(line.stopped)


def _measured(
    prepare: Callable[..., Callable[[], Tensor]], at: tuple[Tensor, Tensor, Tensor], tell: Callable[[int], None]
) -> tuple[float, int, Tensor]:
    """Seconds of a call, the rise of the process's peak memory with what it needs and its output, and the output."""
    if at[0].shape[2] <= 2 * FIRST:
        prepare(*at, lambda done: None)()  # starts threads, and loads code
    before = memory.reset()
    call = prepare(*at, tell)
    start = time.perf_counter()
    out = call()
    taken = time.perf_counter() - start
    return taken, max(out.nbytes, memory.status("VmHWM") - before), out
