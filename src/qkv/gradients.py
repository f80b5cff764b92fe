"""The one autograd function: forward by the plan's backend, backward by `tiled` from the saved lse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkv.backends.tiled_backward import backward
from qkv.errors import UnsupportedError, describe
from qkv.scores import ScoreMod, ScoreTerm, Tile
from qkv.spec import Inputs, Output, Problem


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, run: Callable[[Inputs], Output], problem: Problem, inputs: Inputs, q, k, v, sinks, *bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = run(inputs)
        assert lse is not None
        # Saved tensors, not attributes: writing into an input before backward is then an error, not a wrong gradient.
        ctx.save_for_backward(q, k, v, out, lse, sinks, inputs.positions, *bias)
        ctx.problem, ctx.seed, ctx.bias = problem, inputs.seed, inputs.bias
        return out, lse

    @staticmethod
    def backward(ctx, d_out: Tensor, d_lse: Tensor) -> Any:  # type: ignore[no-untyped-def]
        q, k, v, out, lse, sinks, positions, *tensors = ctx.saved_tensors
        bias: ScoreTerm | None = ctx.bias.with_tensors(tensors) if ctx.bias is not None else None
        inputs = Inputs(q, k, v, positions, bias, sinks, ctx.seed)
        with torch.no_grad():
            found = backward(ctx.problem, inputs, Output(out, lse), d_out, d_lse)
        gradients = [found.q, found.k, found.v, found.sinks, *found.bias]
        if torch.is_grad_enabled():
            sources = [t for t in (q, k, v, d_out, d_lse) if t.requires_grad]
            gradients = _once(ctx.problem.call, gradients, sources)
        needed = ctx.needs_input_grad[3:]
        return (None, None, None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)))


class _Once(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, call: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.call = call
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Any:  # type: ignore[no-untyped-def]
        fix = "Use backend='reference', which is differentiable any number of times"
        raise UnsupportedError(describe(ctx.call, "this backend differentiates once", "a gradient of a gradient", fix))


def _once(call: str, gradients: list[Tensor | None], sources: list[Tensor]) -> list[Tensor | None]:
    present = [g for g in gradients if g is not None]
    passed = iter(_Once.apply(call, len(present), *present, *sources))
    return [None if g is None else next(passed) for g in gradients]


def attend(run: Callable[[Inputs], Output], problem: Problem, inputs: Inputs) -> Output:
    """`run` on a call that needs gradients."""
    bias = inputs.bias.tensors() if inputs.bias is not None else ()
    out, lse = _Attention.apply(run, problem, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks, *bias)
    return Output(out, lse)


def refuse_captured(call: str, bias: ScoreTerm | None, device: torch.device) -> None:
    """A score_mod whose function holds a tensor that requires a gradient would silently lose it: refuse."""
    for term in bias.terms if bias is not None else ():
        if not isinstance(term, ScoreMod) or not torch.is_grad_enabled():
            continue
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        one = slice(0, 1)
        if term.apply(
            torch.zeros(zero.shape, device=device), Tile(one, one, one, one, zero, zero, zero, zero, zero)
        ).requires_grad:
            rule = "score_mod is differentiated with respect to the scores only"
            given = f"{term!r}, whose function uses a tensor that requires a gradient"
            fix = (
                "Pass the tensor as bias=, qkv.relative(table) or qkv.alibi(slopes), detach() it, "
                "or use backend='reference'"
            )
            raise UnsupportedError(describe(call, rule, given, fix))
