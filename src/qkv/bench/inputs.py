"""The tensors of a case, and the float64 answer on sampled rows.

Nothing here uses the library: visibility is written out again as plain key ranges, so that a wrong mask cannot agree
with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qkv.bench.cases import DTYPES, Case
from qkv.bench.gradients import Gradients, expect


@dataclass
class Inputs:
    """Tensors of a case. All sets of K and V hold the same keys in another order, so every set has the same answer."""

    case: Case
    q: Tensor
    sets: list[tuple[Tensor, Tensor]]
    samples: list[tuple[int, int, int]]
    expected: Tensor = field(repr=False)
    d_out: Tensor | None = field(default=None, repr=False)  # the output's gradient, where the case has a backward
    gradients: Gradients | None = field(default=None, repr=False)

    def to(self, dtype: str) -> Inputs:
        """The same numbers in another type (for peers without ours)."""
        if dtype == self.case.dtype:
            return self
        case, kind = replace(self.case, dtype=dtype), DTYPES[dtype]
        sets = []
        for k, v in self.sets:
            k2 = k.to(kind)
            sets.append((k2, k2[..., : case.rank] if case.rank else v.to(kind)))
        d_out = None if self.d_out is None else self.d_out.to(kind)
        return Inputs(case, self.q.to(kind), sets, self.samples, self.expected, d_out, self.gradients)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as tensors that take gradients, in the same memory."""
        q, k, v = (t.detach().requires_grad_() for t in (self.q, *self.sets[0]))
        return q, k, v

    def errors(self, result: Any) -> dict[str, float]:
        """Worst relative error of the sampled rows of "out", and of "dq", "dk" and "dv" where the case has them."""
        if self.gradients is None:
            return {"out": self._error_of_out(result)}
        out, *gradients = result
        return {"out": self._error_of_out(out), **self.gradients.errors(gradients)}

    def error(self, result: Any) -> float:
        """The largest of `errors`; infinite where a shape or a value is not sane."""
        return max(self.errors(result).values())

    def _error_of_out(self, out: Tensor) -> float:
        case = self.case
        if tuple(out.shape) != (case.B, case.Hq, case.Lq, case.Dv):
            return math.inf
        rows = torch.stack([out[s].detach().to(torch.float64) for s in self.samples])
        worst = ((rows - self.expected).norm(dim=1) / self.expected.norm(dim=1)).max().item()
        return worst if math.isfinite(worst) else math.inf


def build(case: Case, sets: int = 1, seed: int = 0) -> Inputs:
    """Inputs with logits of standard deviation 4, needles at the edge of what sampled rows see, magnets beyond it."""
    g = torch.Generator().manual_seed(seed)
    kind = case.torch_dtype
    q = (4.0 * torch.randn(case.B, case.Hq, case.Lq, case.D, generator=g)).to(kind)
    k = torch.randn(case.B, case.Hkv, case.Lk, case.D, generator=g).to(kind)
    samples = _sample_rows(case, g)
    _plant(case, q, k, samples)
    v = k[..., : case.rank] if case.rank else torch.randn(case.B, case.Hkv, case.Lk, case.Dv, generator=g).to(kind)
    pairs = [(k, v)]
    for n in range(1, sets):
        k2 = k.roll(n * 97, dims=2)
        pairs.append((k2, k2[..., : case.rank] if case.rank else v.roll(n * 97, dims=2)))
    inputs = Inputs(case, q, pairs, samples, _expected(case, q, k, v, samples))
    if case.backward:
        inputs.d_out = torch.randn(case.B, case.Hq, case.Lq, case.Dv, generator=g).to(kind)
        inputs.gradients = expect(case, (q, k, v, inputs.d_out), samples, seed)
    return inputs


def _sample_rows(case: Case, g: torch.Generator, count: int = 8) -> list[tuple[int, int, int]]:
    picks = {(0, 0, 0), (case.B - 1, case.Hq - 1, case.Lq - 1)}
    for _ in range(count - 2):
        b, h, i = (int(torch.randint(n, (), generator=g)) for n in (case.B, case.Hq, case.Lq))
        picks.add((b, h, i))
    return sorted(picks)


def _plant(case: Case, q: Tensor, k: Tensor, samples: list[tuple[int, int, int]]) -> None:
    """A key of score ~14 at the first or last visible place, of ~20 at the nearest hidden ones; one row a K head."""
    done: set[tuple[int, int]] = set()
    for n, (b, h, i) in enumerate(samples):
        head = (b, h // (case.Hq // case.Hkv))
        if head in done:
            continue
        done.add(head)
        lo, hi = case.visible(i)
        row = q[b, h, i].float()
        unit = row / (case.scale * row.square().sum()).clamp(min=1e-6)
        k[head[0], head[1], lo if n % 2 else hi - 1] = (14.0 * unit).to(k.dtype)
        for j in (lo - 1, hi):
            if 0 <= j < case.Lk:
                k[head[0], head[1], j] = (20.0 * unit).to(k.dtype)


def _expected(case: Case, q: Tensor, k: Tensor, v: Tensor, samples: list[tuple[int, int, int]]) -> Tensor:
    rows = []
    for b, h, i in samples:
        head = h // (case.Hq // case.Hkv)
        lo, hi = case.visible(i)
        scores = k[b, head, lo:hi].double() @ q[b, h, i].double() * case.scale
        weights = (scores - scores.max()).exp()
        rows.append((weights / weights.sum()) @ v[b, head, lo:hi].double())
    return torch.stack(rows)
