"""The definition of attention, in float64 and quadratic memory. Every other backend is tested against it.

s_ij = softcap(scale * q_i . k_j) + bias_ij,  dropped where the mask hides j from i
p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink_h))
o_i  = sum_j p_ij v_j                                    lse_i = log of that denominator
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.backends.base import Backend
from qkv.call.problem import Inputs, Output, Problem, empty_output, query_positions
from qkv.masks import Tile
from qkv.numerics import dropout_keep, finite, no_autocast, softcap, steady_matmul
from qkv.scores import ScoreMod, TensorBias


def definition(
    problem: Problem, inputs: Inputs, rows: Tensor, heads: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities p, visibility, out and lse of the query rows `rows` and of all heads, or some, in float64."""
    at = whole_tile(problem, inputs, rows, heads)
    q, k, v = inputs.q.index_select(2, rows), inputs.k, inputs.v
    if heads is not None:
        q, k, v = q.index_select(1, heads), *(x.index_select(1, heads // problem.group) for x in (k, v))
    q, k, v = (_double(x) for x in (q, k, v))
    if heads is None:
        k, v = (x.repeat_interleave(problem.group, dim=1)[:, : problem.Hq] for x in (k, v))  # head h reads h // group

    terms = inputs.bias.terms if inputs.bias is not None else ()
    visible = torch.ones(*q.shape[:3], problem.Lk, dtype=torch.bool, device=q.device)
    if problem.mask is not None:
        visible = visible & problem.mask.visible(at, problem.sizes)
    for term in terms:
        if isinstance(term, TensorBias):  # -inf hides
            visible = visible & (term.tile(at, q.dtype) != -torch.inf)

    s = torch.where(visible, _dots(q, k) * problem.scale, 0.0)
    if problem.softcap is not None:
        s = softcap(s, problem.softcap)
    for term in terms:
        s = term.apply(s, at) if isinstance(term, ScoreMod) else s + term.tile(at, s.dtype)
    visible = visible & (s != -torch.inf)
    s = torch.where(visible, s, -torch.inf)

    sink = s.new_full((), -torch.inf) if inputs.sinks is None else inputs.sinks.to(s.dtype)[at.heads, None, None]
    none = s.new_full((*s.shape[:3], 1), -torch.inf)
    top = torch.maximum(torch.cat((s, none), -1).amax(-1, keepdim=True), sink).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True) + torch.exp(sink - top)
    dead = total == 0
    p = torch.where(visible, e / torch.where(dead, 1.0, total), 0.0)  # hidden values take no part, in gradients too
    lse = torch.where(dead, -torch.inf, top + torch.log(torch.where(dead, 1.0, total)))

    kept = p
    if problem.dropout_p > 0:
        keep = dropout_keep(inputs.seed, problem.dropout_p, at.b, at.h, at.i, at.j)
        kept = torch.where(keep, p / (1 - problem.dropout_p), 0.0)
    out = torch.where(dead, 0.0, _mean(kept, v, visible))  # a constant: no gradient enters a dead row
    return p, visible, out, lse.squeeze(-1)


# In both products a NaN or inf takes part as 0, and what it does to the results that see it is added as a constant:
# NaN * 0 is NaN, so a product would carry it, and its derivative, to all others.
def _dots(q: Tensor, k: Tensor) -> Tensor:
    """q_i . k_j for all i and j; the mask selects afterwards, element by element."""
    # Long dot products are added up in runs: rounding grows with the run.
    clean = q.new_zeros(())
    for a, b in zip(finite(q).split(128, -1), finite(k).split(128, -1), strict=True):
        clean = clean + steady_matmul(a, b, b_t=True)
    raw = steady_matmul(q, k, b_t=True).detach()
    return clean + torch.where(torch.isfinite(raw), 0.0, raw)


def _double(x: Tensor) -> Tensor:
    """In float64, and dense: strides must not choose the matrix product."""
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _mean(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """sum_j p_ij v_j over the visible keys."""
    mean, seen = steady_matmul(p, finite(v)), visible.to(p.dtype)
    for special, number in ((v.isnan(), torch.nan), (v == torch.inf, torch.inf), (v == -torch.inf, -torch.inf)):
        mean = mean + torch.where(seen @ special.to(p.dtype) > 0, number, 0.0)
    return mean


def whole_tile(problem: Problem, inputs: Inputs, rows: Tensor, heads: Tensor | None = None) -> Tile:
    """The tile of the given query rows, all heads or some, and all keys."""
    device = inputs.q.device
    p = query_positions(problem, inputs.positions, device).index_select(1, rows)
    b, h, j = (torch.arange(n, device=device) for n in (problem.B, problem.Hq, problem.Lk))
    h = h if heads is None else heads
    every = (slice(0, problem.B), slice(0, problem.Hq) if heads is None else heads, rows, slice(0, problem.Lk))
    return Tile(*every, b[:, None, None, None], h[:, None, None], rows[:, None], p[:, None, :, None], j)


class ReferenceBackend(Backend):
    """The definition as it stands: any dtype, any device, any feature, differentiated by autograd."""

    name = "reference"
    differentiable = True

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        with no_autocast(problem.device):
            rows = torch.arange(problem.Lq, device=inputs.q.device)
            _, _, out, lse = definition(problem, inputs, rows)
            if out.requires_grad:
                out.register_hook(lambda grad: grad if grad is None else _double(grad))
            return Output(empty_output(inputs.q, problem.Dv).copy_(out), lse.to(problem.accumulate))

    def tile(self, problem: Problem) -> tuple[int, int]:
        return max(problem.Lq, 1), max(problem.Lk, 1)

    def note(self, problem: Problem) -> str:
        return "the definition, for checking: float64 and memory quadratic in the length"
