"""Where the queries stand: the readings of `positions=`, turned into one int64 tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv import _torch
from qkv.checks import LIMIT, given_as, integers, whole
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError


def read_positions(call: str, positions: Any, B: int, Lq: int) -> str | tuple[int, ...] | Tensor:
    """What `positions=` says, checked: "start", "end", the position of query 0 (one, or one a batch row), or of each.

    A tensor is int64 (B or 1, Lq), on the CPU.
    """
    if isinstance(positions, str):
        if positions in ("start", "end"):
            return positions
        fix = 'Use "start" (p = i), "end" (p = i + Lk - Lq), an int, B ints or a (B or 1, Lq) integer tensor'
        raise ArgumentError.of(call, 'positions must be "start" or "end"', f"positions={positions!r}", fix)
    first = whole(positions)
    if first is not None:
        if abs(first) > LIMIT:
            rule = f"positions must be of magnitude <= {LIMIT}"
            raise ArgumentError.of(call, rule, f"positions={first}", "Pass smaller positions")
        return (first,)
    if isinstance(positions, (bool, float, dict, bytes)):
        fix = 'Use "start", "end", an int, B ints or a (B or 1, Lq) integer tensor'
        raise ArgumentTypeError.of(call, "positions must be integers", given_as("positions", positions), fix)
    if isinstance(positions, Tensor) and _torch.transformed(positions):
        rule, given = "torch.func transforms cannot map positions", f"positions {tuple(positions.shape)} inside of one"
        fix = "Pass the same positions for all samples, as a plain tensor or as ints"
        raise UnsupportedError.of(call, rule, given, fix)
    at = integers(call, "positions", positions, low=None, dims=(1, 2))
    if at.ndim == 1:
        if at.shape[0] != B:
            rule = "positions of one dimension must hold the first position of each batch row"
            fix = f"Pass {B} int{'s' * (B != 1)}, or a tensor of shape (1, {Lq}) for the position of each query"
            raise ShapeError.of(call, rule, f"positions {tuple(at.shape)} and B={B}", fix)
        # Not tolist(), which torch 2.9 cannot under a transform. A batch of no rows may be anywhere.
        return tuple(int(n) for n in at) or (0,)
    if at.shape[0] not in (1, B) or at.shape[1] != Lq:
        rule = "positions of two dimensions must be (B or 1, Lq)"
        fix = f"Pass a tensor of shape (1, {Lq})" + (f" or ({B}, {Lq})" if B != 1 else "")
        raise ShapeError.of(call, rule, f"positions {tuple(at.shape)}, B={B} and Lq={Lq}", fix)
    return at


def resolve_positions(call: str, positions: Any, *, B: int, Lq: int, Lk: int) -> Tensor:
    """The position of every query, int64 of shape (B or 1, Lq), on the CPU.

    Parameters
    ----------
    positions : None or "start" (p = i), "end" (p = i + Lk - Lq), an int (p = that + i), B ints (the same for each
        batch row), or an integer tensor of shape (B or 1, Lq). Negative positions are allowed. None means "start".

    >>> resolve_positions("f()", "end", B=1, Lq=2, Lk=5)
    tensor([[3, 4]])
    """
    read = read_positions(call, "start" if positions is None else positions, B, Lq)
    if isinstance(read, Tensor):
        return read
    starts = read if isinstance(read, tuple) else (0 if read == "start" else Lk - Lq,)
    return torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None] + torch.arange(Lq, device="cpu")
