"""How attention is differentiated: four autograd functions, each defined by the others.

    Attention  (given)                                 -> out, lse, state?  by the plan's backend
    Backward   (given, d_out, d_lse, (out, lse, state?)?) -> gradients   by the backend's own kernels, else by `tiled`
    Along      (given, tangents)                       -> out', lse'     forward mode: `qkv.backends.tiled.second.along`
    Curved     (given, d_out, d_lse, tangents)         -> gradients'     of Backward along the tangents: `curved`

    Attention   backwards: Backward             forwards: Along
    Backward    backwards: Curved and Along     forwards: Curved and Backward
    Along       backwards: Curved and Backward  forwards: refused, as is a third derivative

`given` is q, k, v, sinks, positions, the bias's tensors and, where they may be traced, the mask's. The state
(`Output`) is there where the backend that made it also computes Backward; who has no output of it at hand gets Backward
from `tiled`, which needs none. Under torch.vmap the mapped dimension joins the batch if nothing that it maps
is shared by batch rows; else there is one call a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qkv._torch import forward_mode, older_vmaps, over_samples, under_transform
from qkv.backends.base import Backend, Gradients, Prepared
from qkv.backends.tiled import backward as tiled_backward
from qkv.backends.tiled.second import along, curved
from qkv.call.problem import Inputs, Output, Problem, join_batch, one_by_one
from qkv.errors import UnsupportedError
from qkv.masks.portable import decode
from qkv.scores import ScoreTerm

_FIXED = 5  # q, k, v, sinks and positions come first in `given`; the last two may be None


@dataclass(slots=True, eq=False)
class Recipe:
    """What of one use of attention is no tensor: what all four functions take first."""

    problem: Problem
    backend: Backend
    prepared: Prepared | None = None  # None: the tensors' strides are known only when the function runs
    bias: ScoreTerm | None = None  # the terms' structure; its tensors are replaced
    seed: int = 0
    words: tuple[int, ...] | None = None  # the mask's encoding, where its tensors are part of `given`
    masks: int = 0  # the number of these tensors

    @property
    def terms(self) -> int:
        """Tensors of the bias."""
        return len(self.bias.tensors()) if self.bias is not None else 0

    @property
    def given(self) -> int:
        """Tensors of `given`."""
        return _FIXED + self.terms + self.masks

    def inputs(self, given: Sequence[Any]) -> tuple[Problem, Inputs]:
        """The problem, and the tensors where backends look for them."""
        q, k, v, sinks, positions, *rest = given
        bias = self.bias.with_tensors(rest[: self.terms]) if self.bias is not None else None
        problem = self.problem
        if self.words is not None:
            problem = replace(problem, mask=decode(self.words, rest[self.terms :]))
        return problem, Inputs(q, k, v, positions, bias, sinks, self.seed)

    def ready(self, problem: Problem, inputs: Inputs) -> Prepared:
        """The backend's prepared call."""
        return self.backend.prepare(problem, inputs) if self.prepared is None else self.prepared

    def learned(self, given: Sequence[Any]) -> list[Any]:
        """What gradients are for, of tensors in the order of `given`: q, k, v, sinks (or None), the bias's tensors."""
        return [*given[:4], *given[_FIXED : _FIXED + self.terms]]

    def spread(self, found: Sequence[Any]) -> list[Any]:
        """Gradients as Backward returns them, in the order of `given`; None for what has none."""
        q, k, v, *rest = found
        sinks = rest.pop(0) if self.problem.has_sinks else None
        return [q, k, v, sinks, None, *rest, *[None] * self.masks]


def backward(prepared: Prepared, inputs: Inputs, output: Output | None, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """Gradients of sum(out * d_out) + sum(lse * d_lse): by the backend's own kernels, else by `tiled`."""
    if output is None or prepared.no_backward is not None:
        return tiled_backward.backward(prepared.problem, inputs, d_out, d_lse)
    return prepared.backward(inputs, output, d_out, d_lse)


def _no_lse(problem: Problem, q: Tensor) -> Tensor:
    """What stands where a backend has no lse and nobody asked for one: whoever reads it all the same will notice."""
    return q.new_full(q.shape[:3], torch.nan, dtype=problem.accumulate)


def _attention(recipe: Recipe, *given: Any) -> tuple[Any, ...]:
    problem, inputs = recipe.inputs(given)
    out, lse, state = recipe.ready(problem, inputs).run(*inputs)
    if lse is None:
        assert not problem.needs_lse
        lse = _no_lse(problem, inputs.q)
    return (out, lse) if state is None else (out, lse, state)


def _listed(found: Gradients) -> tuple[Any, ...]:
    return (found.q, found.k, found.v, *([] if found.sinks is None else [found.sinks]), *found.bias)


def _tangents(listed: Sequence[Any]) -> Gradients:
    q, k, v, sinks, *bias = listed
    return Gradients(q, k, v, sinks, tuple(bias))


class _Mapped(Function):
    """What torch.func and torch.vmap may map."""

    rows: tuple[int, ...] = ()
    """Of the first tensors after the call's own, which dimension is the batch: the second of a state."""
    sums = False
    """Whether what is for sinks and bias is a sum over the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, recipe: Recipe, *tensors: Any) -> Any:
        count, dims, p = info.batch_size, in_dims[1:], recipe.problem
        batched = {0: 0, 1: 0, 2: 0} | {recipe.given + n: batch for n, batch in enumerate(cls.rows)}
        bias = [t for t in tensors[_FIXED : _FIXED + recipe.terms] if t.dim() == 4 and t.shape[0] > 1]
        shared = p.has_sinks or recipe.terms > 0
        alone = any(d is not None and n not in batched for n, d in enumerate(dims))
        if alone or p.varies_by_batch or bias or (shared and cls.sums) or p.dropout_p > 0:
            return one_by_one(partial(cls.apply, replace(recipe, prepared=None)), count, dims, tensors)
        folded = [
            join_batch(t, d, count, batched[n]) if n in batched else t
            for n, (t, d) in enumerate(zip(tensors, dims, strict=True))
        ]
        wider = replace(recipe, problem=replace(p, B=count * p.B), prepared=None)
        found = cls.apply(wider, *folded)
        ends = (0,) * len(found) if cls.sums else (0, 0, 1)[: len(found)]  # else out, lse and, it may be, a state
        return tuple(t.unflatten(end, (count, p.B)) for t, end in zip(found, ends, strict=True)), ends


class _Differentiable(_Mapped):
    """What the four share: everything they are given and return is saved, so that writing into it is noticed."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.recipe = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])


class Attention(Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *given: Any) -> tuple[Any, ...]:
        found = _attention(recipe, *given)
        ctx.recipe = recipe
        # Saved tensors, not attributes: writing into an input before backward is then an error, not a wrong gradient.
        ctx.save_for_backward(*given, *found)
        if forward_mode():
            ctx.save_for_forward(*given, *found)
        return found[:2]  # the state is saved without being a result, which would cost every call

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, *_: None) -> Any:
        recipe, saved, n = ctx.recipe, ctx.saved_tensors, ctx.recipe.given
        found = _apply(_Backward, recipe, *saved[:n], d_out, d_lse, *saved[n:])
        return None, *_needed(ctx, recipe.spread(found))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        recipe, saved = ctx.recipe, ctx.saved_tensors[: ctx.recipe.given]
        return _apply(_Along, recipe, *saved, *_filled(recipe, saved, tangents))


class TransformedAttention(_Mapped, Attention):
    """The same for torch.func, in the form that it asks for; its apply costs tens of microseconds more."""

    @staticmethod
    def forward(recipe: Recipe, *given: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _attention(recipe, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.recipe, ctx.results = inputs[0], len(output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        return *Attention.jvp(ctx, _, *tangents), *[None] * (ctx.results - 2)


class _Backward(_Differentiable):
    rows, sums = (0, 0, 0, 0, 1), True

    @staticmethod
    def forward(recipe: Recipe, *tensors: Any) -> tuple[Any, ...]:
        d_out, d_lse, *output = tensors[recipe.given :]
        problem, inputs = recipe.inputs(tensors[: recipe.given])
        if not output:
            return _listed(tiled_backward.backward(problem, inputs, d_out, d_lse))
        return _listed(backward(recipe.ready(problem, inputs), inputs, Output(*output), d_out, d_lse))

    @staticmethod
    def backward(ctx: Any, *towards: Any) -> Any:
        recipe, saved, n = ctx.recipe, ctx.saved_tensors, ctx.recipe.given
        tangents = recipe.learned(recipe.spread(towards))
        found = recipe.spread(_apply(_Curved, recipe, *saved[: n + 2], *tangents))
        lifted = _apply(_Along, recipe, *saved[:n], *tangents)
        # out, lse and state are functions of the rest: what depends on them is already in the other gradients.
        return None, *_needed(ctx, [*found, *lifted, *[None] * len(saved[n + 2 :])])

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        recipe, saved, n = ctx.recipe, ctx.saved_tensors, ctx.recipe.given
        found = _apply(_Curved, recipe, *saved[: n + 2], *_filled(recipe, saved, tangents))
        d_out, d_lse = (
            torch.zeros_like(x) if t is None else t for x, t in zip(saved[n : n + 2], tangents[n : n + 2], strict=True)
        )
        more = _apply(_Backward, recipe, *saved[:n], d_out, d_lse, *saved[n + 2 :])
        return tuple(a + b for a, b in zip(found, more, strict=True))


class _Along(_Differentiable):
    rows = (0, 0, 0)

    @staticmethod
    def forward(recipe: Recipe, *tensors: Any) -> tuple[Any, ...]:
        problem, inputs = recipe.inputs(tensors[: recipe.given])
        return along(problem, inputs, _tangents(tensors[recipe.given :]))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        recipe, saved = ctx.recipe, ctx.saved_tensors
        n = recipe.given
        found = recipe.spread(_apply(_Curved, recipe, *saved[:n], d_out, d_lse, *saved[n:]))
        towards = recipe.learned(recipe.spread(_apply(_Backward, recipe, *saved[:n], d_out, d_lse)))
        return None, *_needed(ctx, [*found, *towards])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        rule = "forward mode over forward mode is not supported"
        fix = (
            "Put one of them backwards, as torch.func.hessian does, or use backend='reference' with torch.autograd.grad"
        )
        raise UnsupportedError.of(ctx.recipe.problem.call, rule, "a tangent of a tangent", fix)


class _Curved(_Differentiable):
    rows, sums = (0, 0, 0, 0, 0), True

    @staticmethod
    def forward(recipe: Recipe, *tensors: Any) -> tuple[Any, ...]:
        d_out, d_lse, *tangents = tensors[recipe.given :]
        problem, inputs = recipe.inputs(tensors[: recipe.given])
        return _listed(curved(problem, inputs, d_out, d_lse, _tangents(tangents)))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        rule = "this backend differentiates twice"
        fix = "Use backend='reference', which is differentiable any number of times by torch.autograd.grad"
        raise UnsupportedError.of(ctx.recipe.problem.call, rule, "a gradient of a gradient of a gradient", fix)

    jvp = backward


class Through(Function):
    """The result of a backend whose own autograd differentiates once: what it cannot, the other functions do.

    A gradient that may be differentiated again, or that is computed for several at once, goes to the inputs past the
    backend's operations; any other goes through them.
    """

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, out: Tensor, *given: Any) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*given)
        return out.clone()  # not a view: writing into it must not reach what the backend's operations saved

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        recipe, given = ctx.recipe, ctx.saved_tensors
        if not (torch.is_grad_enabled() or under_transform() or older_vmaps()):
            return None, d_out, *[None] * len(given)
        q, lse = given[0], _no_lse(recipe.problem, given[0])
        out = q.new_full((), torch.nan).expand(*lse.shape, recipe.problem.Dv)
        found = recipe.spread(_apply(_Backward, recipe, *given, d_out, torch.zeros_like(lse), out, lse))
        return None, None, *[g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad[2:], strict=True)]


def _apply(function: Any, recipe: Recipe, *tensors: Any) -> tuple[Any, ...]:
    """The function, as part of a graph only where someone may differentiate or map it."""
    found: tuple[Any, ...] | None
    if at := older_vmaps():
        found = over_samples(lambda *each: _apply(function, recipe, *each), tensors, at)
        if found is not None:
            return found
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if learned or under_transform() or forward_mode():
        found = function.apply(recipe, *tensors)
    else:
        with torch.no_grad():
            found = function.forward(recipe, *tensors)
    return found


def _filled(recipe: Recipe, given: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The tangents of what can have one; zeros where nothing came."""
    pairs = zip(recipe.learned(given), recipe.learned(tangents), strict=True)
    return [torch.zeros_like(x) if t is None and x is not None else t for x, t in pairs]


def _needed(ctx: Any, gradients: Sequence[Any]) -> list[Any]:
    return [g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad[1:], strict=True)]
