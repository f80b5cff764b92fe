"""How attention is differentiated: four autograd functions, each defined by the others.

    Attention  (given)                                 -> out, lse, state?  by the plan's backend
    Backward   (given, d_out, d_lse, (out, lse, state?)?) -> gradients   by the backend's own kernels, else by `tiled`
    Along      (given, tangents)                       -> out', lse'     forward mode: `qkv.backends.tiled.second.along`
    Curved     (given, d_out, d_lse, tangents)         -> gradients'     of Backward along the tangents: `curved`

    Attention   backwards: Backward             forwards: Along
    Backward    backwards: Curved and Along     forwards: Curved and Backward
    Along       backwards: Curved and Backward  forwards: refused, as is a third derivative

`given` is q, k, v, sinks, positions, the bias's tensors and, where they may be traced, the mask's. The state
(`spec.Output`) is there where the backend that made it also computes Backward; who has no output of it at hand gets
Backward from `tiled`, which needs none. Under torch.vmap the mapped dimension joins the batch if nothing that it maps
is shared by batch rows; else there is one call a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qkv._torch import forward_mode, older_vmaps, over_samples, under_transform
from qkv.backends import base
from qkv.backends.base import Gradients
from qkv.backends.tiled import backward as tiled_backward
from qkv.backends.tiled.second import along, curved
from qkv.call.problem import Inputs, Output, Problem, join_batch
from qkv.errors import UnsupportedError, describe
from qkv.masks import Tile
from qkv.masks.portable import decode
from qkv.scores import ScoreMod, ScoreTerm

_FIXED = 5  # q, k, v, sinks and positions come first in `given`; the last two may be None


@dataclass(frozen=True)
class Call:
    """One attention call without its tensors: what all four functions take first."""

    problem: Problem
    backend: base.Backend
    run: Callable[[Inputs], Output] | None = None  # the backend's prepared call, where there is one
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

    def compute(self, problem: Problem, inputs: Inputs) -> Output:
        """What the backend returns."""
        return self.run(inputs) if self.run is not None else self.backend.run(problem, inputs)

    def learned(self, given: Sequence[Any]) -> list[Any]:
        """What gradients are for, of tensors in the order of `given`: q, k, v, sinks (or None), the bias's tensors."""
        return [*given[:4], *given[_FIXED : _FIXED + self.terms]]

    def spread(self, found: Sequence[Any]) -> list[Any]:
        """Gradients as Backward returns them, in the order of `given`; None for what has none."""
        q, k, v, *rest = found
        sinks = rest.pop(0) if self.problem.has_sinks else None
        return [q, k, v, sinks, None, *rest, *[None] * self.masks]


def backward(
    call: Call, problem: Problem, inputs: Inputs, output: Output | None, d_out: Tensor, d_lse: Tensor
) -> Gradients:
    """Gradients of sum(out * d_out) + sum(lse * d_lse): by the backend's own kernels, else by `tiled`."""
    if output is None or base.no_backward(call.backend, problem) is not None:
        return tiled_backward.backward(problem, inputs, d_out, d_lse)
    found: Gradients = call.backend.backward(problem, inputs, output, d_out, d_lse)  # type: ignore[attr-defined]
    return found


def _no_lse(problem: Problem, q: Tensor) -> Tensor:
    """What stands where a backend has no lse and nobody asked for one: whoever reads it all the same will notice."""
    return q.new_full(q.shape[:3], torch.nan, dtype=problem.accumulate)


# What each function computes, on plain tensors.
def _attention(call: Call, *given: Any) -> tuple[Any, ...]:
    problem, inputs = call.inputs(given)
    out, lse, state = call.compute(problem, inputs)
    if lse is None:
        assert not problem.needs_lse
        lse = _no_lse(problem, inputs.q)
    return (out, lse) if state is None else (out, lse, state)


def _backward(call: Call, *tensors: Any) -> tuple[Any, ...]:
    d_out, d_lse, *output = tensors[call.given :]
    problem, inputs = call.inputs(tensors[: call.given])
    return _listed(backward(call, problem, inputs, Output(*output) if output else None, d_out, d_lse))


def _along(call: Call, *tensors: Any) -> tuple[Any, ...]:
    problem, inputs = call.inputs(tensors[: call.given])
    return along(problem, inputs, _tangents(tensors[call.given :]))


def _curved(call: Call, *tensors: Any) -> tuple[Any, ...]:
    d_out, d_lse, *tangents = tensors[call.given :]
    problem, inputs = call.inputs(tensors[: call.given])
    return _listed(curved(problem, inputs, d_out, d_lse, _tangents(tangents)))


def _listed(found: Gradients) -> tuple[Any, ...]:
    return (found.q, found.k, found.v, *([] if found.sinks is None else [found.sinks]), *found.bias)


def _tangents(listed: Sequence[Any]) -> Gradients:
    q, k, v, sinks, *bias = listed
    return Gradients(q, k, v, sinks, tuple(bias))


class _Differentiable(Function):
    """What the four share: everything they are given and return is saved, so that writing into it is noticed."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *given: Any) -> tuple[Any, ...]:
        found = _attention(call, *given)
        ctx.call = call
        # Saved tensors, not attributes: writing into an input before backward is then an error, not a wrong gradient.
        ctx.save_for_backward(*given, *found)
        if forward_mode():
            ctx.save_for_forward(*given, *found)
        return found[:2]  # the state is saved without being a result, which would cost every call

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, *_: None) -> Any:
        call, saved, n = ctx.call, ctx.saved_tensors, ctx.call.given
        found = _apply(_Backward, call, *saved[:n], d_out, d_lse, *saved[n:])
        return None, *_needed(ctx, call.spread(found))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        call, saved = ctx.call, ctx.saved_tensors[: ctx.call.given]
        return _apply(_Along, call, *saved, *_filled(call, saved, tangents))


class _TransformedAttention(_Attention):
    """The same for torch.func, in the form that it asks for; its apply costs tens of microseconds more."""

    @staticmethod
    def forward(call: Call, *given: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _attention(call, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.results = inputs[0], len(output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        return *_Attention.jvp(ctx, _, *tangents), *[None] * (ctx.results - 2)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Any) -> Any:
        return _mapped(_TransformedAttention, (), False, info, in_dims, call, tensors)


class _Backward(_Differentiable):
    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Any, ...]:
        return _backward(call, *tensors)

    @staticmethod
    def backward(ctx: Any, *towards: Any) -> Any:
        call, saved, n = ctx.call, ctx.saved_tensors, ctx.call.given
        tangents = call.learned(call.spread(towards))
        found = call.spread(_apply(_Curved, call, *saved[: n + 2], *tangents))
        lifted = _apply(_Along, call, *saved[:n], *tangents)
        # out, lse and state are functions of the rest: what depends on them is already in the other gradients.
        return None, *_needed(ctx, [*found, *lifted, *[None] * len(saved[n + 2 :])])

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        call, saved, n = ctx.call, ctx.saved_tensors, ctx.call.given
        found = _apply(_Curved, call, *saved[: n + 2], *_filled(call, saved, tangents))
        d_out, d_lse = (
            torch.zeros_like(x) if t is None else t for x, t in zip(saved[n : n + 2], tangents[n : n + 2], strict=True)
        )
        more = _apply(_Backward, call, *saved[:n], d_out, d_lse, *saved[n + 2 :])
        return tuple(a + b for a, b in zip(found, more, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Any) -> Any:
        return _mapped(_Backward, (0, 0, 0, 0, 1), True, info, in_dims, call, tensors)


class _Along(_Differentiable):
    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Any, ...]:
        return _along(call, *tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        n = call.given
        found = call.spread(_apply(_Curved, call, *saved[:n], d_out, d_lse, *saved[n:]))
        towards = call.learned(call.spread(_apply(_Backward, call, *saved[:n], d_out, d_lse)))
        return None, *_needed(ctx, [*found, *towards])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        rule = "forward mode over forward mode is not supported"
        fix = (
            "Put one of them backwards, as torch.func.hessian does, or use backend='reference' with torch.autograd.grad"
        )
        raise UnsupportedError(describe(ctx.call.problem.call, rule, "a tangent of a tangent", fix))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Any) -> Any:
        return _mapped(_Along, (0,) * 3, False, info, in_dims, call, tensors)


class _Curved(_Differentiable):
    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Any, ...]:
        return _curved(call, *tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        rule = "this backend differentiates twice"
        fix = "Use backend='reference', which is differentiable any number of times by torch.autograd.grad"
        raise UnsupportedError(describe(ctx.call.problem.call, rule, "a gradient of a gradient of a gradient", fix))

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Any) -> Any:
        return _mapped(_Curved, (0,) * 5, True, info, in_dims, call, tensors)


class _Through(Function):
    """The result of a backend whose own autograd differentiates once: what it cannot, the other functions do.

    A gradient that may be differentiated again, or that is computed for several at once, goes to the inputs past the
    backend's operations; any other goes through them.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, out: Tensor, *given: Any) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*given)
        return out.clone()  # not a view: writing into it must not reach what the backend's operations saved

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        call, given = ctx.call, ctx.saved_tensors
        if not (torch.is_grad_enabled() or under_transform() or older_vmaps()):
            return None, d_out, *[None] * len(given)
        q, lse = given[0], _no_lse(call.problem, given[0])
        out = q.new_full((), torch.nan).expand(*lse.shape, call.problem.Dv)
        found = call.spread(_apply(_Backward, call, *given, d_out, torch.zeros_like(lse), out, lse))
        return None, None, *[g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad[2:], strict=True)]


_COMPUTE = {_Attention: _attention, _Backward: _backward, _Along: _along, _Curved: _curved}


def _apply(function: Any, call: Call, *tensors: Any) -> tuple[Any, ...]:
    """The function, as part of a graph only where someone may differentiate or map it."""
    found: tuple[Any, ...] | None
    if at := older_vmaps():
        found = over_samples(lambda *each: _apply(function, call, *each), tensors, at)
        if found is not None:
            return found
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if learned or under_transform() or forward_mode():
        found = function.apply(call, *tensors)
    else:
        with torch.no_grad():
            found = _COMPUTE[function](call, *tensors)
    return found


def _filled(call: Call, given: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The tangents of what can have one; zeros where nothing came."""
    pairs = zip(call.learned(given), call.learned(tangents), strict=True)
    return [torch.zeros_like(x) if t is None and x is not None else t for x, t in pairs]


def _needed(ctx: Any, gradients: Sequence[Any]) -> list[Any]:
    return [g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad[1:], strict=True)]


def _mapped(
    function: Any, rows: tuple[int, ...], sums: bool, info: Any, in_dims: Any, call: Call, tensors: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A function over a mapped dimension.

    `rows`: of the first tensors after `given`, which dimension is the batch: the second of a state. `sums`: it sums
    over the batch what is for sinks and bias.
    """
    count, dims, p = info.batch_size, in_dims[1:], call.problem
    batched = {0: 0, 1: 0, 2: 0} | {call.given + n: batch for n, batch in enumerate(rows)}
    bias = [t for t in tensors[_FIXED : _FIXED + call.terms] if t.dim() == 4 and t.shape[0] > 1]
    shared = p.has_sinks or call.terms > 0
    alone = any(d is not None and n not in batched for n, d in enumerate(dims))
    # Dropout draws by batch row: samples in one batch would not drop the same weights as one by one.
    if alone or p.varies_by_batch or bias or (shared and sums) or p.dropout_p > 0:
        return _one_by_one(function, count, dims, call, tensors)
    folded = [
        join_batch(t, d, count, batched[n]) if n in batched else t
        for n, (t, d) in enumerate(zip(tensors, dims, strict=True))
    ]
    wider = replace(call, problem=replace(p, B=count * p.B), run=None)
    found = function.apply(wider, *folded)
    ends = (0,) * len(found) if sums else (0, 0, 1)[: len(found)]  # else out, lse and, it may be, a state
    return tuple(t.unflatten(end, (count, p.B)) for t, end in zip(found, ends, strict=True)), ends


def _one_by_one(
    function: Any, count: int, dims: Sequence[int | None], call: Call, tensors: tuple[Any, ...]
) -> tuple[Any, Any]:
    samples = []
    for n in range(max(count, 1)):
        each = [
            t if d is None else t.select(d, n) if count else t.new_zeros(t.movedim(d, 0).shape[1:])
            for t, d in zip(tensors, dims, strict=True)
        ]
        samples.append(function.apply(replace(call, run=None), *each))
    found = tuple(torch.stack(parts)[:count] for parts in zip(*samples, strict=True))
    return found, (0,) * len(found)


def attend(call: Call, inputs: Inputs, masks: Sequence[Tensor] = ()) -> Output:
    """A call that someone may differentiate or map. `masks`: the mask's tensors, if `call.words` encodes it."""
    bias = inputs.bias.tensors() if inputs.bias is not None else ()
    transformed = under_transform()
    if call.backend.differentiable and not transformed and not forward_mode():
        out = call.compute(call.problem, inputs).out
        return Output(_Through.apply(call, out, inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.positions), None)
    function: Any = _TransformedAttention if transformed else _Attention
    rest = map(_savable, (inputs.positions, *bias, *masks))
    found = function.apply(call, inputs.q, inputs.k, inputs.v, inputs.sinks, *rest)
    return Output(*found[:2])


def _savable(t: Tensor | None) -> Tensor | None:
    """A constant of the call as autograd can keep it: what was made in inference mode is copied."""
    return t.clone() if t is not None and t.is_inference() else t


def refuse_captured(call: str, bias: ScoreTerm | None, device: torch.device) -> None:
    """A score_mod whose function holds a tensor that requires a gradient would silently lose it: refuse."""
    for term in bias.terms if bias is not None else ():
        if not isinstance(term, ScoreMod) or not torch.is_grad_enabled():
            continue
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        one = slice(0, 1)
        if term.apply(
            torch.zeros(zero.shape, device=device, dtype=torch.float32),
            Tile(one, one, one, one, zero, zero, zero, zero, zero),
        ).requires_grad:
            rule = "score_mod is differentiated with respect to the scores only"
            given = f"{term!r}, whose function uses a tensor that requires a gradient"
            fix = (
                "Pass the tensor as bias=, qkv.relative(table) or qkv.alibi(slopes), detach() it, "
                "or use backend='reference'"
            )
            raise UnsupportedError(describe(call, rule, given, fix))
