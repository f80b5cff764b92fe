"""Where the queries stand: the readings of `positions=`, turned into one int64 tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.checks import LIMIT, given_as, integers, whole
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError


def resolve_positions(call: str, positions: Any, *, B: int, Lq: int, Lk: int) -> Tensor:
    """The position of every query, int64 of shape (B or 1, Lq), on the CPU.

    Parameters
    ----------
    positions : None or "start" (p = i), "end" (p = i + Lk - Lq), an int (p = that + i), B ints (the same for each
        batch row), or an integer tensor of shape (B or 1, Lq). Negative positions are allowed. None means "start".

    >>> resolve_positions("f()", "end", B=1, Lq=2, Lk=5)
    tensor([[3, 4]])
    """
    rows = torch.arange(Lq, device="cpu")[None]
    if positions is None or (isinstance(positions, str) and positions == "start"):
        return rows
    if isinstance(positions, str):
        if positions == "end":
            return rows + (Lk - Lq)
        fix = 'Use "start" (p = i), "end" (p = i + Lk - Lq), an int, B ints or a (B or 1, Lq) integer tensor'
        raise ArgumentError.of(call, 'positions must be "start" or "end"', f"positions={positions!r}", fix)
    first = whole(positions)
    if first is not None:
        if abs(first) > LIMIT:
            rule = f"positions must be of magnitude <= {LIMIT}"
            raise ArgumentError.of(call, rule, f"positions={first}", "Pass smaller positions")
        return rows + first
    if isinstance(positions, (bool, float, dict, bytes)):
        fix = 'Use "start", "end", an int, B ints or a (B or 1, Lq) integer tensor'
        raise ArgumentTypeError.of(call, "positions must be integers", given_as("positions", positions), fix)
    at = integers(call, "positions", positions, low=None, dims=(1, 2))
    if at.ndim == 1:
        if at.shape[0] != B:
            rule = "positions of one dimension must hold the first position of each batch row"
            fix = f"Pass {B} int{'s' * (B != 1)}, or a tensor of shape (1, {Lq}) for the position of each query"
            raise ShapeError.of(call, rule, f"positions {tuple(at.shape)} and B={B}", fix)
        return at[:, None] + rows
    if at.shape[0] not in (1, B) or at.shape[1] != Lq:
        rule = "positions of two dimensions must be (B or 1, Lq)"
        fix = f"Pass a tensor of shape (1, {Lq})" + (f" or ({B}, {Lq})" if B != 1 else "")
        raise ShapeError.of(call, rule, f"positions {tuple(at.shape)}, B={B} and Lq={Lq}", fix)
    return at
