"""The caller's tensors, as the experiments of `qkv.why` look at them: a head at a time, a bounded number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.call.problem import Options
from qkv.call.validate import named, validate
from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.masks import Mask
from qkv.probabilities import weights

MOST_ROWS, FEWEST_ROWS = 256, 16  # of a head that are looked at; evenly spaced where there are more
MOST_PAIRS = 1 << 22  # of query and key, in all heads that are looked at: about a second
_NAMES = ("q", "k", "v", "mask", "positions", "scale", "head")


@dataclass(frozen=True, eq=False)
class Given:
    """Tensors that were passed to `qkv.why`, checked as `qkv.attention` checks them."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Mask | Tensor | None
    positions: Any
    scale: float | None
    head: int | None
    batch: int

    @property
    def heads(self) -> range:
        """The query heads that are looked at: the one that was chosen, or all."""
        return range(self.q.shape[1]) if self.head is None else range(self.head, self.head + 1)

    @property
    def sharpness(self) -> float:
        """The scale of the scores."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    @property
    def rows(self) -> Tensor:
        """The query rows that are looked at: all, or evenly spaced ones with the first and last of them."""
        count, row = self.q.shape[2], self.q.shape[0] * self.k.shape[2] * len(self.heads)
        most = min(count, MOST_ROWS, max(FEWEST_ROWS, MOST_PAIRS // row))
        return torch.linspace(0, count - 1, most, dtype=torch.float64, device="cpu").round().long()

    def queries(self, head: int) -> Tensor:
        """Those rows of a query head, float64 (rows, D)."""
        return self.q[self.batch, head, self.rows.to(self.q.device)].detach().double().cpu()

    def keys(self, head: int) -> Tensor:
        """The keys that a query head reads, float64 (Lk, D)."""
        return _of(self.k, self.batch, head, self.q.shape[1])

    def values(self, head: int) -> Tensor:
        """The values that a query head reads, float64 (Lk, Dv)."""
        if self.v is None:  # `needs` of the topic asked for it
            raise AssertionError
        return _of(self.v, self.batch, head, self.q.shape[1])

    def weights(self, head: int, scale: float | None = None) -> Tensor:
        """The probabilities of those rows of a head, float64 (rows, Lk)."""
        chosen: dict[str, Any] = {"mask": self.mask, "positions": self.positions}
        chosen["scale"] = self.scale if scale is None else scale
        with torch.no_grad():
            found = weights(self.q, self.k, rows=self.rows, heads=head, **chosen)
        return found[self.batch, 0].double().cpu()

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """Every head that is looked at and its probabilities."""
        for head in self.heads:
            yield head, self.weights(head)

    def __str__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in (("q", self.q), ("k", self.k), ("v", self.v)) if x is not None}
        text = "your " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        if self.head is not None:
            text += f", head {self.head}"
        if self.q.shape[0] > 1:
            text += f", batch row {self.batch}"
        seen = len(self.rows)
        return text + (f", {seen} of {self.q.shape[2]:,} rows" if seen < self.q.shape[2] else "")


def _of(x: Tensor, batch: int, head: int, heads: int) -> Tensor:
    found: Tensor = x[batch, head // (heads // x.shape[1])].detach().double().cpu()
    return found


def given(call: str, passed: Mapping[str, Any], batch: Any) -> Given:
    """Check the tensors by the rules of `qkv.attention`, and what is chosen of them."""
    q: Any
    k: Any
    q, k, v, mask, positions, scale, head = (passed.get(name) for name in _NAMES)
    for name, x in (("q", q), ("k", k)):
        if x is None:
            rule = "tensors are passed as q= and k= together"
            raise ArgumentTypeError.of(call, rule, f"{name}=None", f"Pass {name}= too, or no tensors")
    values = v if v is not None else k[..., :0] if isinstance(k, Tensor) and k.dim() == 4 else k
    problem, _ = validate(call, q, k, values, mask, Options(positions, None, scale))
    if problem.Lq == 0 or problem.Lk == 0 or problem.B == 0:
        fix = "Pass at least one batch row, query and key"
        raise ArgumentError.of(call, "there must be something to measure", named(q=q, k=k), fix)
    batch = integer(call, "batch", batch, high=problem.B - 1)
    head = None if head is None else integer(call, "head", head, high=problem.Hq - 1)
    return Given(q, k, v, mask, positions, scale, head, batch)
