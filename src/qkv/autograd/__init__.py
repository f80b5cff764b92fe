"""A call that someone may differentiate or map: planned and prepared as any other, as a function of autograd's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv import execute
from qkv._torch import forward_mode, has_tangent, outside_transforms, transformed, under_transform
from qkv.autograd.functions import Attention, Recipe, Through, TransformedAttention, backward
from qkv.backends.base import Backend, Prepared
from qkv.call.problem import CALL, Inputs, Options, Output, Problem
from qkv.call.validate import validate
from qkv.errors import UnsupportedError
from qkv.masks import Mask, Tile
from qkv.masks.portable import encode
from qkv.plans import check_backend, choose
from qkv.scores import ScoreMod, ScoreTerm

__all__ = ["attend", "backward", "differentiable", "followed", "refuse_captured"]


def attend(
    q: Any, k: Any, v: Any, mask: Any, options: Options, backend: str | None, key: Any = None, seed: int | None = None
) -> Output:
    """A call that someone may differentiate or map: check it, plan it, and make it a function of autograd's.

    `key`: as of `execute.prepare`.
    """
    check_backend(CALL, backend)
    # Positions and bias are looked at in every call: what they hold is data, and no key can stand for it.
    problem, inputs = validate(CALL, q, k, v, mask, options)
    if under_transform() or forward_mode():
        if followed(problem, inputs):
            return _transform(problem, inputs, backend)
        if under_transform():  # a constant there: computed as if outside
            with outside_transforms():
                return attend(q, k, v, mask, options, backend, seed=seed)
    prepared = execute.prepare(problem, inputs, options, backend, key)
    if problem.dropout_p > 0:
        inputs = inputs._replace(seed=int(execute.draw_seed()) if seed is None else seed)
    if inputs.bias is not None and not _by_its_own_operations(prepared.backend):
        refuse_captured(inputs.bias, q.device)
    return differentiable(prepared, inputs) if problem.needs_grad else Output(*prepared.run(*inputs))


def differentiable(prepared: Prepared, inputs: Inputs) -> Output:
    """A prepared call as a function of autograd's."""
    if _by_its_own_operations(prepared.backend):
        return Output(*prepared.run(*inputs))
    return _applied(Recipe(prepared.problem, prepared.backend, prepared, inputs.bias, inputs.seed), inputs)


def _by_its_own_operations(backend: Backend) -> bool:
    """Whether autograd needs no function of ours, as often as it differentiates."""
    return backend.differentiable and not backend.has_backward


def _transform(problem: Problem, inputs: Inputs, backend: str | None) -> Output:
    """A call whose tensors torch.func or forward mode follows; nothing of it is kept."""
    refuse_captured(inputs.bias, inputs.q.device)
    seed = int(execute.draw_seed()) if problem.dropout_p > 0 else 0
    chosen = choose(problem, backend).chosen
    words: list[int] = []
    operands: list[Tensor] = []
    if problem.mask is not None and any(map(transformed, _tensors_of(problem.mask))):
        encode(CALL, problem.mask, words, operands)  # what is mapped has to be an argument
    problem = replace(problem, needs_grad=True)
    recipe = Recipe(problem, chosen, None, inputs.bias, seed, tuple(words) if words else None, len(operands))
    return _applied(recipe, inputs, operands)


def followed(problem: Problem, inputs: Inputs) -> bool:
    """Whether torch.func or forward mode follows one of the call's tensors."""
    bias = inputs.bias.tensors() if inputs.bias is not None else ()
    tensors = [t for t in (inputs.q, inputs.k, inputs.v, inputs.sinks, *bias) if t is not None]
    if any(map(transformed, tensors + _tensors_of(problem.mask))):
        return True
    return forward_mode() and any(map(has_tangent, tensors))


def _tensors_of(mask: Mask | None) -> list[Tensor]:
    """The user's own tensors in a mask, which torch.func may map."""
    return [t for t in execute.users_own(mask) if isinstance(t, Tensor)]


def _applied(recipe: Recipe, inputs: Inputs, masks: Sequence[Tensor] = ()) -> Output:
    """`masks`: the mask's tensors, if `recipe.words` encodes it."""
    q, k, v, positions, bias, sinks, _ = inputs
    transforms = under_transform()
    if recipe.backend.differentiable and not transforms and not forward_mode():
        out = recipe.ready(recipe.problem, inputs).run(*inputs)[0]
        return Output(Through.apply(recipe, out, q, k, v, sinks, positions), None)
    function: Any = TransformedAttention if transforms else Attention
    rest = map(savable, (positions, *(() if bias is None else bias.tensors()), *masks))
    return Output(*function.apply(recipe, q, k, v, sinks, *rest)[:2])


def savable(t: Tensor | None) -> Tensor | None:
    """A constant of the call as autograd can keep it: what was made in inference mode is copied."""
    return t.clone() if t is not None and t.is_inference() else t


def refuse_captured(bias: ScoreTerm | None, device: torch.device) -> None:
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
            given = f"{term!r}, whose function uses a tensor that requires a gradient"
            fix = (
                "Pass the tensor as bias=, qkv.relative(table) or qkv.alibi(slopes), detach() it, "
                "or use backend='reference'"
            )
            raise UnsupportedError.of(CALL, "score_mod is differentiated with respect to the scores only", given, fix)
