"""Gradients of attention from the saved lse, tile by tile: scores are recomputed, nothing quadratic is kept.

    p_ij  = exp(s_ij - lse_i)            w_ij = keep_ij p_ij / (1 - dropout_p)
    delta_i = do_i . o_i - dlse_i
    ds_ij = p_ij (keep_ij (do_i . v_j) / (1 - dropout_p) - delta_i)
    dv_j  = sum_i w_ij do_i              dq_i = scale sum_j dx_ij k_j          dk_j = scale sum_i dx_ij q_i
    with dx = ds through softcap and score_mod;  dbias = ds;  dsink_h = -sum_i exp(sink_h - lse_i) delta_i

Source: Dao et al., FlashAttention (2022), appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.backends.base import Gradients
from qkv.backends.tiled import Block, Scores, Walk, product
from qkv.numerics import finite, no_autocast, softcap_slope, steady_matmul
from qkv.scores import ScoreMod
from qkv.spec import Inputs, Output, Problem
from qkv.tiling import KeyTile


def backward(problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """Gradients of sum(out * d_out) + sum(lse * d_lse)."""
    with no_autocast(problem.device):
        return _Backward(problem, inputs, output, d_out, d_lse).run()


class _Backward:
    def __init__(self, problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> None:
        assert output.lse is not None
        self.walk = Walk(problem, inputs)
        self.problem, self.inputs, self.d_out = problem, inputs, d_out
        kind = problem.accumulate
        # One look at the data decides whether NaN and inf have to be kept from what does not see them.
        data = (inputs.q, inputs.k, inputs.v, d_out)
        self.careful = not all(bool(torch.isfinite(x.sum(dtype=kind))) for x in data)
        o, do = (x.to(kind).contiguous() for x in (output.out, d_out))  # the order of a sum follows the strides
        dots = do * o
        if self.careful:
            dots = torch.where(o == 0, 0.0, dots)  # a dead row's output is a constant, whatever its gradient holds
        self.delta = dots.sum(-1) - d_lse
        self.lse = output.lse
        bias = inputs.bias
        self.buffers = [t.new_gradients(kind) for t in bias.terms] if bias is not None else []

    def run(self) -> Gradients:
        walk, inputs, kind = self.walk, self.inputs, self.problem.accumulate
        dq, dk, dv = (torch.zeros_like(x) for x in (inputs.q, inputs.k, inputs.v))
        for block in walk.blocks():
            heads = walk.heads(block)
            mine = (block.batch, block.kv_heads)
            dk_sum = torch.zeros(dk[mine].shape, dtype=kind, device=dk.device)
            dv_sum = torch.zeros(dv[mine].shape, dtype=kind, device=dv.device)
            for index, rows in walk.query_tiles():
                tile = self._query_tile(block, index, rows, dk_sum, dv_sum)
                dq[block.batch, heads, rows] = walk.unfold(tile).to(dq.dtype)
            dk[mine], dv[mine] = dk_sum.to(dk.dtype), dv_sum.to(dv.dtype)
        tensors = inputs.bias.tensors() if inputs.bias is not None else ()
        flat = [buffer for buffers in self.buffers for buffer in buffers]
        return Gradients(dq, dk, dv, self._sinks(), tuple(x.to(t.dtype) for x, t in zip(flat, tensors, strict=True)))

    def _query_tile(self, block: Block, index: int, rows: slice, dk: Tensor, dv: Tensor) -> Tensor:
        """Add one query tile's share to dk and dv, and return its dq."""
        walk, p, inputs = self.walk, self.problem, self.inputs
        plain_q = walk.load_queries(inputs.q, block, rows)
        q = plain_q * p.scale
        do = walk.load_queries(self.d_out, block, rows)
        lse = walk.load_queries(self.lse.unsqueeze(-1), block, rows)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        delta = walk.load_queries(self.delta.unsqueeze(-1), block, rows)
        # A row that sees a NaN has NaN scores already; in the products its factor counts as 0, to touch no other row.
        clean_q = finite(q) if self.careful else q
        dq = torch.zeros_like(q)
        for key in walk.schedule(block).keys(index):
            where = slice(key.start, key.stop)
            k, v = walk.load(inputs.k, block, where), walk.load(inputs.v, block, where)
            found = walk.scores(q, k, block, rows, key)
            seen = found.s != -torch.inf if found.seen is not None or self.careful or walk.can_hide else None
            prob = (found.s - lse).exp_()
            if seen is not None:
                prob = torch.where(
                    seen, prob, 0.0
                )  # a NaN lse (a visible NaN) must not reach what the row does not see
            d_prob = steady_matmul(do, v, b_t=True)
            weight = prob
            if p.dropout_p > 0:
                keep = walk.keep(found.at)
                weight, d_prob = (torch.where(keep, x / (1.0 - p.dropout_p), 0.0) for x in (prob, d_prob))
            dv[:, :, where] += self._transposed(weight, seen, do)
            ds = prob * (d_prob - delta)
            if seen is not None:
                ds = torch.where(seen, ds, 0.0)
            dx = self._through(ds, found, key)
            dq += steady_matmul(dx, finite(k) if self.careful else k)
            dk[:, :, where] += steady_matmul(dx, clean_q, a_t=True)
        return dq * p.scale

    def _transposed(self, weight: Tensor, seen: Tensor | None, do: Tensor) -> Tensor:
        if self.careful:
            assert seen is not None
            return product(weight, seen, do, transposed=True)
        return steady_matmul(weight, do, a_t=True)

    def _through(self, ds: Tensor, found: Scores, key: KeyTile) -> Tensor:
        """Add the terms' own gradients, and return the gradient of scale * q.k."""
        walk = self.walk
        if walk.terms:
            ds = walk.unfold(ds)
            for index in reversed(range(len(walk.terms))):
                term = walk.terms[index]
                if isinstance(term, ScoreMod):
                    with torch.enable_grad():
                        before = found.before[index].detach().requires_grad_()
                        after = term.apply(before, found.at)
                    if after.requires_grad:
                        through = torch.autograd.grad(after, before, ds, allow_unused=True)[0]
                        through = torch.zeros_like(ds) if through is None else through
                    else:
                        through = torch.zeros_like(ds)
                    # Hidden scores have no gradient, even where fn's derivative is not finite there.
                    ds = torch.where(ds == 0, 0.0, through) if found.seen is not None or self.careful else through
                else:
                    term.add_gradients(self.buffers[index], ds, found.at)
            ds = walk.fold(ds)
        if found.dots is not None:
            assert self.problem.softcap is not None
            slope = softcap_slope(found.dots, self.problem.softcap)
            ds = torch.where(ds == 0, 0.0, ds * slope)
        return ds

    def _sinks(self) -> Tensor | None:
        sinks = self.inputs.sinks
        if sinks is None:
            return None
        s = sinks.to(self.lse.dtype)[:, None]
        share = torch.where(s == -torch.inf, 0.0, torch.exp(s - self.lse))
        return -(share * self.delta).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
