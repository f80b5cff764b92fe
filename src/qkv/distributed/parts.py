"""Attention over a part of each row's keys, so that the results of all parts can be joined and differentiated.

A row's result over some keys is (out, m, l): its largest score, in a unit of the backend's own, and the sum of
exp(s_j - m). Two are joined by the larger m; out is held in the accumulation dtype, so that each part is rounded once.
An lse would do in their place but for its rounding: at 1e6 float32 knows it to 0.03, and the share of a part no better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkv import execute
from qkv.backends import registry
from qkv.backends.base import Gradients
from qkv.backends.tiled import backward as tiled
from qkv.call.problem import Inputs, Options, Output, Problem
from qkv.distributed.exchange import Piece
from qkv.masks.portion import portion
from qkv.scores import ScoreTerm


@dataclass(frozen=True, eq=False)
class Whole:
    """The call that all ranks make together: sizes are those of the whole sequences."""

    problem: Problem
    options: Options
    backend: str
    bias: ScoreTerm | None  # rows are the rank's own, columns all keys
    positions: Tensor | None  # (B or 1, Lq), on the tensors' device
    seed: int

    @property
    def unit(self) -> float:
        """The definition's score of an m of 1, in what the backend's states say."""
        return registry.load(self.backend).unit(replace(self.problem, has_sinks=False))  # of pieces: sinks join last

    def problem_of(self, piece: Piece) -> Problem:
        """The piece as a call of its own."""
        p, (a, b), (lo, hi) = self.problem, piece.queries, piece.keys
        mask = None
        if p.mask is not None:
            mask = portion(p.mask, first_key=lo, first_query=a, Lq=p.Lq, Lk=p.Lk)
        at: Any = "tensor"
        if self.positions is None:
            batch = range(p.B) if isinstance(p.positions, tuple) and len(p.positions) > 1 else range(1)
            at = tuple(p.offset(i) + a - lo for i in batch)
        return replace(
            p,
            Lq=b - a,
            Lk=hi - lo,
            mask=mask,
            positions=at,
            needs_grad=True,
            needs_lse=True,
            has_sinks=False,
            part=True,
        )

    def inputs_of(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> tuple[Problem, Inputs]:
        """The piece's problem and tensors; `rows`: where its queries stand among the rank's own."""
        p, (a, b), (lo, hi) = self.problem_of(piece), piece.queries, piece.keys
        positions = None if self.positions is None else self.positions[:, a:b] - lo
        bias = None if self.bias is None else self.bias.cut(rows, slice(lo, hi))
        if bias is not None:
            p = replace(p, bias=bias.specs())
        seed = mixed(self.seed, piece) if p.dropout_p else 0
        return p, Inputs(q[:, :, rows], k, v, positions, bias, None, seed)

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        """out, lse and state of a piece."""
        options = self.options._replace(return_lse=True, sinks=None)
        found = Output(*execute.prepare(problem, inputs, options, self.backend).run(*inputs))
        return found if found.state is not None else found._replace(state=found.rows(1.0).to(problem.accumulate))

    def gradients(self, problem: Problem, inputs: Inputs, whole: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        """A piece's gradients, from the rows' results over all keys."""
        options = self.options._replace(return_lse=True, sinks=None)
        prepared = execute.prepare(problem, inputs, options, self.backend)
        if prepared.no_backward is None:
            return prepared.backward(inputs, whole, d_out, d_lse)
        natural = whole
        if self.unit != 1:
            assert whole.state is not None
            natural = whole._replace(state=torch.stack([whole.state[0] * self.unit, whole.state[1]]))
        return tiled.backward(problem, inputs, d_out, d_lse, natural)


def mixed(seed: int, *of: Any) -> int:
    """A seed of its own for a part of a call: dropout draws by the indices of a call, and parts have them alike."""
    return hash((seed, *of)) & (2**63 - 1)


class Joined:
    """Results over the keys so far, of a rank's rows: out (B, Hq, rows, Dv) in the accumulation dtype, and m and l."""

    def __init__(self, problem: Problem, rows: int, device: torch.device, unit: float) -> None:
        p, kind = problem, problem.accumulate
        self.unit = unit
        self.out = torch.zeros(p.B, p.Hq, rows, p.Dv, dtype=kind, device=device)
        self.state = torch.zeros(2, p.B, p.Hq, rows, dtype=kind, device=device)
        self.state[0] = -math.inf

    def add(self, rows: slice, found: Output) -> None:
        """Take in what was found of some rows over further keys."""
        assert found.state is not None
        out, (m, l) = self.out[:, :, rows], self.state[:, :, :, rows]
        m2, l2 = found.state
        if not bool((m != -math.inf).any()) and not bool((l != 0).any()):
            out.copy_(found.out)
            m.copy_(m2), l.copy_(l2)
            return
        top = torch.where(m.isnan() | (m > m2), m, m2)
        base = torch.where(top == -math.inf, 0.0, top)
        w1, w2 = l * torch.exp((m - base) * self.unit), l2 * torch.exp((m2 - base) * self.unit)
        total = w1 + w2
        by = torch.where(total == 0, 1.0, total)
        share1, share2 = (w1 / by).unsqueeze(-1), (w2 / by).unsqueeze(-1)
        # A part without a visible key is not mixed in: 0 times its inf or NaN would be NaN.
        if bool((w1 == 0).any()) or bool((w2 == 0).any()):
            mixed = share1 * out + share2 * found.out
            mixed = torch.where(
                (l2 == 0).unsqueeze(-1), out, torch.where((l == 0).unsqueeze(-1), found.out.to(out.dtype), mixed)
            )
            out.copy_(mixed)
        else:
            out.mul_(share1).addcmul_(found.out.to(out.dtype), share2)
        m.copy_(top), l.copy_(total)

    def add_sinks(self, sinks: Tensor | None) -> None:
        """One score a head that has no value."""
        if sinks is None:
            return
        m = (sinks.to(self.out.dtype) / self.unit)[None, :, None].expand(self.state.shape[1:])
        l = (m != -math.inf).to(m.dtype)
        none = self.out.new_zeros(()).expand(self.out.shape)
        self.add(slice(None), Output(none, None, torch.stack([m, l])))

    def finish(self, dtype: torch.dtype) -> Output:
        """out in its dtype, lse and state."""
        m, l = self.state
        return Output(self.out.to(dtype), m * self.unit + torch.log(l), self.state)
