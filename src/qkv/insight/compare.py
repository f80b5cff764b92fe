"""Where two traces differ: of two runs, kernels or checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.errors import ArgumentError
from qkv.insight.record import Record
from qkv.insight.terminal import number, table

_AXES = {
    "lse": "batch head query", "score": "batch head query", "weight": "batch head query", "entropy": "batch head query",
    "distance": "batch head query", "top_weights": "batch head query place", "mass": "batch head key",
    "map": "batch head row column", "out": "batch head query column",
}  # fmt: skip


class Difference(NamedTuple):
    """The largest difference of one statistic, and where it is."""

    name: str
    largest: float
    """Inf where one of the two is NaN or infinite alone."""
    here: float
    there: float
    where: tuple[tuple[str, int], ...]
    ulps: float
    """The largest difference in units of the last place of the larger number."""
    differ: int
    """How many numbers are not the same to the bit."""
    of: int


@dataclass(frozen=True)
class Comparison:
    """Two traces side by side; `print` it."""

    differences: tuple[Difference, ...]
    backends: tuple[str, str]

    @property
    def same(self) -> bool:
        """Whether all statistics are the same to the bit."""
        return all(d.differ == 0 for d in self.differences)

    def __str__(self) -> str:
        left, right = self.backends
        if self.same:
            return f"{left} and {right}: the same, bit for bit"
        grid = [["", "largest", "ulps", "here", "there", "where", "differ"]]
        for d in self.differences:
            where = " ".join(f"{name} {at:,}" for name, at in d.where)
            share = f"{d.differ / d.of:.1%}" if d.of else ""
            ulps = "" if math.isinf(d.ulps) else number(round(d.ulps, 1))
            grid.append([d.name, number(d.largest), ulps, number(d.here), number(d.there), where, share])
        return f"{left} (here) and {right} (there), largest differences\n{table(grid, '<>>>><>')}"


def compared(here: Record, there: Record) -> Comparison:
    """The largest difference of each statistic that both traces have."""
    mine, other = (t.shapes._replace(D=0, Dv=0) for t in (here, there))
    if mine != other or here.heads != there.heads:
        given = f"{tuple(here.shapes)} of heads {here.heads[:8]} and {tuple(there.shapes)} of heads {there.heads[:8]}"
        fix = "Compare traces of one size"
        raise ArgumentError.of("Trace.compare()", "both traces must have the same sizes and heads", given, fix)
    pairs = [(name, getattr(here.statistics, name), getattr(there.statistics, name)) for name in _AXES if name != "out"]
    if here.held is not None and there.held is not None and here.held.out.shape == there.held.out.shape:
        pairs.append(("out", here.held.out, there.held.out))
    found = [_difference(name, a, b) for name, a, b in pairs if a is not None and b is not None and a.shape == b.shape]
    return Comparison(tuple(found), (here.backend, there.backend))


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    kind = a.dtype if a.dtype == b.dtype else torch.float32
    x, y = a.detach().double().cpu(), b.detach().double().cpu()
    same = (x == y) | (x.isnan() & y.isnan())
    apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(math.inf, math.inf)
    if not apart.numel():
        return Difference(name, 0.0, math.nan, math.nan, (), 0.0, 0, 0)
    at = int(apart.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at, dtype=torch.int64, device="cpu"), apart.shape)]
    unit = torch.finfo(kind).eps * torch.maximum(x.abs(), y.abs()).clamp(min=torch.finfo(kind).tiny)
    ulps = float(torch.where(same, 0.0, apart / unit).max())
    where = tuple(zip(_AXES[name].split(), place, strict=True))
    return Difference(
        name, float(apart.flatten()[at]), float(x.flatten()[at]), float(y.flatten()[at]), where, ulps,
        int((~same).sum()), same.numel(),
    )  # fmt: skip
