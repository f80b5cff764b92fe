"""The float64 gradients of a benchmark case on sampled queries and keys, against which every contender is checked.

    p_ij = exp(s_ij) / sum_j exp(s_ij)       delta_i = do_i . o_i            ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j             dk_j = scale sum_i ds_ij q_i            dv_j = sum_i p_ij do_i

The sums over i run over every query that sees key j, of all query heads that share it. `do` is random: under the
gradient of out.sum() every ds is 0, and a kernel without a backward pass of scores would look right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.bench.cases import Case

At = tuple[int, int, int]  # batch row, head, and the index of a query or key
_ROWS = 256  # queries whose float64 scores are in memory at a time


@dataclass(frozen=True)
class Gradients:
    """Expected gradients at sampled queries `rows` and keys `keys`, and the shapes of the whole tensors."""

    rows: list[At]
    keys: list[At]
    expected: dict[str, Tensor]  # dq of the rows, dk and dv of the keys
    sizes: dict[str, Tensor]  # what an error of each is relative to
    shapes: dict[str, tuple[int, ...]]

    def errors(self, gradients: Sequence[Tensor]) -> dict[str, float]:
        """Worst relative error of the sampled rows of dq, dk, dv; infinite where a shape or a value is not sane.

        Relative to the norm of the terms of their sum, with ds taken as p (|do . v| + |delta|): where the softmax is
        all but one key, ds is a difference of equal numbers, and what is left of it is their rounding. A size below
        the median counts as the median, so that a key of almost no weight needs no relative accuracy.
        """
        found = {}
        for (name, want), got in zip(self.expected.items(), gradients, strict=True):
            found[name] = math.inf
            if tuple(got.shape) == self.shapes[name]:
                at = self.rows if name == "dq" else self.keys
                values = torch.stack([got[s].detach().to(torch.float64) for s in at])
                worst = ((values - want).norm(dim=1) / self.sizes[name]).max().item()
                found[name] = worst if math.isfinite(worst) else math.inf
        return found


def expect(case: Case, tensors: tuple[Tensor, Tensor, Tensor, Tensor], rows: list[At], seed: int = 0) -> Gradients:
    """Gradients of `tensors` (q, k, v and the output's gradient) at the given queries and at telling keys.

    Those keys, of the first and last sampled head, are the first and last one, two random ones, and those beside the
    ends of what a sampled query sees: needles and magnets lie there.

    Cost: float64 attention of two groups of heads, 256 queries at a time.
    """
    group = case.Hq // case.Hkv
    heads = sorted({(b, h // group) for b, h, _ in (rows[0], rows[-1])})
    g = torch.Generator().manual_seed(seed)
    keys: list[At] = []
    of_keys = []
    for b, head in heads:
        picks = {0, case.Lk - 1, *(int(torch.randint(case.Lk, (), generator=g)) for _ in range(2))}
        for lo, hi in (case.visible(i) for n, h, i in rows if (n, h // group) == (b, head)):
            picks |= {j for j in (lo - 1, lo, hi - 1, hi) if 0 <= j < case.Lk}
        chosen = sorted(picks)
        keys += [(b, head, j) for j in chosen]
        parts = [_Head(case, tensors, b, h).of_keys(chosen) for h in range(head * group, (head + 1) * group)]
        of_keys.append([torch.stack(part).sum(0) for part in zip(*parts, strict=True)])
    dk, dv, dk_size, dv_size = (torch.cat(part) for part in zip(*of_keys, strict=True))
    dq, dq_size = map(torch.stack, zip(*(_Head(case, tensors, b, h).of_query(i) for b, h, i in rows), strict=True))
    sizes = {name: x.sqrt() for name, x in (("dq", dq_size), ("dk", dk_size), ("dv", dv_size))}
    sizes = {name: x.clamp(min=x.median()) for name, x in sizes.items()}
    shapes = {name: tuple(t.shape) for name, t in zip(sizes, tensors[:3], strict=True)}
    return Gradients(rows, keys, {"dq": dq, "dk": dk, "dv": dv}, sizes, shapes)


class _Head:
    """One query head with its keys, in float64."""

    def __init__(self, case: Case, tensors: tuple[Tensor, Tensor, Tensor, Tensor], b: int, h: int) -> None:
        q, k, v, d_out = tensors
        head = h // (case.Hq // case.Hkv)
        self.case, self.seen = case, torch.tensor([case.visible(i) for i in range(case.Lq)])
        self.k, self.v, self.d_out = (x.double() for x in (k[b, head], v[b, head], d_out[b, h]))
        self.q = q[b, h].double() * case.scale

    def _range(self, rows: slice) -> tuple[int, int]:
        """The first key that any of the queries sees, and the one after the last."""
        return int(self.seen[rows, 0].min()), int(self.seen[rows, 1].max())

    def _tile(self, rows: slice, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p and ds (queries, keys) at some of the keys in range, and the size of ds before its two terms cancel."""
        lo, hi = self._range(rows)
        seen, d_out = self.seen[rows], self.d_out[rows]
        j = torch.arange(lo, hi)
        scores = (self.q[rows] @ self.k[lo:hi].t()).masked_fill_((j < seen[:, :1]) | (j >= seen[:, 1:]), -math.inf)
        weights = scores.softmax(-1)
        delta = (d_out * (weights @ self.v[lo:hi])).sum(-1, keepdim=True)
        p, dp = weights[:, keys - lo], d_out @ self.v[keys].t()
        return p, p * (dp - delta), p * (dp.abs() + delta.abs())

    def of_query(self, i: int) -> tuple[Tensor, Tensor]:
        """dq, and the sum of squares of its terms."""
        keys = torch.arange(*self._range(slice(i, i + 1)))
        _, ds, size = self._tile(slice(i, i + 1), keys)
        k = self.k[keys] * self.case.scale
        return ds[0] @ k, size[0].square() @ k.square().sum(1)

    def of_keys(self, keys: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This head's part of dk and dv at the keys, and the sums of squares of their terms."""
        dk, dv = self.k.new_zeros(len(keys), self.k.shape[1]), self.v.new_zeros(len(keys), self.v.shape[1])
        dk_size, dv_size = self.k.new_zeros(2, len(keys))
        for start in range(0, self.case.Lq, _ROWS):
            rows = slice(start, min(start + _ROWS, self.case.Lq))
            lo, hi = self._range(rows)
            here = [n for n, j in enumerate(keys) if lo <= j < hi]
            if here:
                p, ds, size = (x.t() for x in self._tile(rows, torch.tensor([keys[n] for n in here])))
                q, d_out = self.q[rows], self.d_out[rows]
                dk[here] += ds @ q
                dv[here] += p @ d_out
                dk_size[here] += size.square() @ q.square().sum(1)
                dv_size[here] += p.square() @ d_out.square().sum(1)
        return dk, dv, dk_size, dv_size
