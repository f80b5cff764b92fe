"""How much a call is, in words: pairs, work, memory and time, beside the same call without a mask."""

from __future__ import annotations

import math
from typing import NamedTuple

from qkv.masks.counts import Pairs


class Dense(NamedTuple):
    """What a call without a mask would cost, and the bytes of the mask as a tensor of bools."""

    pairs: int
    flops: int
    mask_bytes: int


def of_pairs(visible: Pairs, computed: int, every: int) -> str:
    """Pairs that are visible and that are computed, of all."""
    least, most = visible
    part = f" ({most / every:.2%})" if every else ""
    seen = f"{most:,}" if least == most else f"{least:,} to {most:,} (bounds: too many to look at each)"
    return f"{seen} of {every:,} visible{part}, {computed:,} computed"


def of_work(flops: int, bytes: int, dense: Dense | None) -> list[str]:
    """Two lines of a plan; `dense` is told where there is a mask."""
    work, memory = unit(flops, "FLOP", 1000), f"{unit(bytes, 'B', 1024)} of inputs and output"
    if dense is not None:
        work += f"; dense {unit(dense.flops, 'FLOP', 1000)}"
        memory += f"; the mask as a tensor would take {unit(dense.mask_bytes, 'B', 1024)}"
    return [f"work      {work}", f"memory    {memory}"]


def of_time(seconds: float, gradient: float | None, dense: float | None) -> str:
    """Predicted times."""
    said = f"about {duration(seconds)} on this machine"
    said += "" if gradient is None else f", its gradients {duration(gradient)}"
    return said + ("" if dense is None else f"; dense about {duration(dense)}")


def unit(n: float, name: str, step: int) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if n < step or prefix == "P":
            text = f"{n:.3g}" if prefix and n < 999.5 else f"{n:,.0f}"
            return f"{text} {prefix}{'i' if step == 1024 and prefix else ''}{name}".replace("ki", "Ki")
        n /= step
    raise AssertionError


def duration(seconds: float) -> str:
    """A time in two digits.

    >>> duration(0.0123), duration(75), duration(5e5)
    ('12 ms', '75 s', '5.8 days')
    """
    for size, unit in ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days")):
        # Two minutes are said in seconds, and two hours in minutes.
        if seconds < {"µs": 1e-3, "ms": 1.0, "s": 120.0, "min": 7200.0, "h": 172800.0}.get(unit, math.inf):
            amount = seconds / size
            return f"{amount:.2g} {unit}" if amount < 100 else f"{amount:,.0f} {unit}"
    raise AssertionError
