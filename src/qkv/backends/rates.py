"""How long a call takes on this machine, from how much it computes: rates of a backend, measured once.

A call of many queries takes a time for each pair of query and key that is computed, and one for each row of queries;
one of few queries takes the time to read its keys and values. The rates of a backend, a dtype and a head size come from
what `qkv doctor --tune` recorded on this machine, or from calls of up to 0.1 s together, which are timed when a
prediction is first asked for: never at import, and never by `attention`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.backends.base import Backend, Speed
from qkv.call.problem import Options, Output, Problem
from qkv.call.validate import validate
from qkv.masks import Mask, sliding_window

CALL = "qkv.plan()"
_HEADS = 8
_WIDTH = 64  # of the window whose time says what a row costs
_SHORT, _LONG = 192, 1536  # queries of a timed call: whole tiles, and so many that the window's pairs are fewer
_SECONDS = 0.004  # that a timed call takes, if it can be so short: others who use the machine leave such gaps
_TURNS = 3
_PATIENCE = 0.05  # seconds after which a call is not timed again
_FEW = 16  # queries of a head below which reading keys and values is what takes time
_READ = 1 << 26  # bytes of keys and values that are read: from memory, as after the other layers of a model


# What this thread ran, where that is told to a small part of a timed call.
_ran = time.thread_time if time.get_clock_info("thread_time").resolution < _SECONDS / 100 else time.perf_counter


class Rates(NamedTuple):
    """Seconds for each pair of query and key, row of queries, and byte of keys and values that is read."""

    pair: float
    row: float
    byte: float


def seconds(backend: Backend, problem: Problem, pairs: int, backward: bool = False) -> float | None:
    """About how long a call takes that computes so many pairs; None where nothing of this device can be timed."""
    p, found = problem, of(backend, problem, backward)
    if found is None:
        return None
    if p.Lq >= _FEW or backward:
        return pairs * found.pair + p.B * p.Hq * p.Lq * found.row
    read = pairs / (p.group * max(p.Lq, 1)) * (p.D + p.Dv) * p.dtype.itemsize
    return max(pairs * found.pair, read * found.byte)


def of(backend: Backend, problem: Problem, backward: bool = False) -> Rates | Speed | None:
    """The rates of a backend for problems of this kind; None where nothing of this device can be timed."""
    p = problem
    if p.device != "cpu" or backend.name == "reference" or 0 in (p.D, p.Dv):
        return None
    known = backend.speed(p, backward)
    return known or measured(backend, p.dtype, p.D, p.Dv, backward, torch.get_num_threads())


@lru_cache(maxsize=64)
def measured(backend: Backend, dtype: torch.dtype, D: int, Dv: int, backward: bool, threads: int) -> Rates:
    """Measured once a process."""
    return measure(backend, dtype, D, Dv, backward)


def measure(
    backend: Backend, dtype: torch.dtype, D: int, Dv: int, backward: bool = False, turns: int = _TURNS
) -> Rates:
    """Time a few calls: the least of each, for what else the machine does only adds."""
    with torch.no_grad():
        each = partial(_timed, backend, dtype, D, Dv, backward)
        length, short = _SHORT, each(_SHORT, None, 2)[0]
        while length < _LONG and 4 * short <= _SECONDS:
            length, short = 2 * length, 4 * short
        full, pairs = each(length, None, turns)
        taken, some = each(2 * length, sliding_window(_WIDTH), turns)
        byte = 0.0 if backward else _read(backend, dtype, D, Dv, 3)
    # Two equations: both calls have pairs and rows.
    rows, more = _HEADS * length, _HEADS * 2 * length
    pair = max((full * more - taken * rows) / (pairs * more - some * rows), full / pairs / 2)
    return Rates(pair, max(0.0, (taken - some * pair) / more), byte)


def _timed(
    backend: Backend, dtype: torch.dtype, D: int, Dv: int, backward: bool, L: int, mask: Mask | None, turns: int
) -> tuple[float, int]:
    """The least time of a call, and how many pairs it computes."""
    q, k, v = (numbers((1, _HEADS, L, d), dtype) for d in (D, D, Dv))
    problem, inputs = validate(CALL, q, k, v, mask, Options())
    problem = replace(problem, needs_grad=backward)
    prepared = backend.prepare(problem, inputs)
    call: Callable[[], object] = partial(prepared.run, q, k, v)
    if backward:
        output = Output(*prepared.run(q, k, v))
        assert output.lse is not None
        call = partial(prepared.backward, inputs, output, torch.ones_like(output.out), torch.zeros_like(output.lse))
    return least(call, turns), backend.visited(problem, None)


def _read(backend: Backend, dtype: torch.dtype, D: int, Dv: int, turns: int) -> float:
    """Seconds a byte of keys and values takes one query."""
    Lk = max(64, _READ // (_HEADS * (D + Dv) * dtype.itemsize))
    q = numbers((1, _HEADS, 1, D), dtype)
    k, v = (torch.full((1, _HEADS, Lk, d), 0.25, dtype=dtype, device="cpu") for d in (D, Dv))
    problem, inputs = validate(CALL, q, k, v, None, Options(positions="end"))
    prepared = backend.prepare(problem, inputs)
    return least(partial(prepared.run, q, k, v), turns) / (_HEADS * Lk * (D + Dv) * dtype.itemsize)


def least(call: Callable[[], object], turns: int) -> float:
    """The least time of so many calls, after one that warms up, with all threads and with one.

    One thread is timed by what it ran, which other programs that have the processors do not add to. Threads that wait
    for one another take a hundred times as long then: a prediction is at most as many times too long as there are
    threads.
    """
    threads, taken, begun = torch.get_num_threads(), [], time.perf_counter()
    try:
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            clock = _ran if count == 1 else time.perf_counter
            call()
            for turn in range(turns):
                if turn and time.perf_counter() - begun > _PATIENCE:
                    break  # a busy machine is not made to answer more often
                start = clock()
                call()
                taken.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(taken)


def numbers(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers between -1/2 and 1/2, and not from the program's generator."""
    count = torch.Size(size).numel()
    return ((torch.arange(count, dtype=torch.float32, device="cpu") % 97) / 97 - 0.5).to(dtype).view(size)
