"""A call as a node of the graph that somebody makes: torch.compile, torch.export, make_fx and modes that watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from qkv import execute
from qkv._torch import exporting_onnx, modes, recording, stands_in
from qkv.call.problem import CALL, Options, Output
from qkv.call.validate import check_metadata
from qkv.errors import ArgumentTypeError, UnsupportedError
from qkv.graph.ops import KINDS
from qkv.masks import as_mask
from qkv.masks.portable import encode
from qkv.plans import check_backend
from qkv.scores import as_bias

P = ParamSpec("P")
R = TypeVar("R")


def traced(q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> tuple[Tensor, Tensor]:
    """attention() as one node: (out, lse). Written for tracers to follow: plain branches, no tables, no data."""
    if v is None:
        fix = "Pass v; it is left out only where k is a cache's view"
        raise ArgumentTypeError.of(CALL, "v must be a tensor", "v=None", fix)
    if any(isinstance(t, Tensor) and t.is_nested for t in (q, k, v)):
        check_metadata(CALL, q, k, v)  # says how to pack them
    positions, bias, scale, softcap, sinks, dropout_p, return_lse = options
    words: list[int] = []
    operands: list[Tensor] = []
    if mask is not None:
        known = mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else as_mask(mask, CALL)
        assert known is not None
        encode(CALL, known, words, operands)
    kinds: list[int] = []
    tensors: list[Tensor] = []
    if bias is not None:
        _encode_bias(q, bias, kinds, tensors)
    reading, offsets, where = _encode_positions(positions, q)
    seed = execute.draw_seed() if dropout_p else None
    out, lse, _ = torch.ops.qkv.attention(
        q, k, v, sinks, where, seed, tensors, operands, words=words, kinds=kinds, reading=reading, offsets=offsets,
        scale=scale, softcap=softcap, dropout_p=dropout_p, backend=backend, return_lse=return_lse,
    )  # fmt: skip
    return out, lse


def follow(q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> Output | None:
    """The call as a node of the graph that a tracer is making, or None where none is."""
    followed = stands_in(q) or stands_in(k) or stands_in(v)
    if not followed and modes() == 0:
        return None
    check_backend(CALL, backend)
    try:
        found = traced(q, k, v, mask, options, backend)
    except UnsupportedError:
        if followed:
            raise
        return None  # a mode only watches: the parts of a call that is no node are its to see
    return Output(*found)


def refuse_recording() -> None:
    """TorchScript would keep the numbers of this one call, and ONNX has no such node."""
    if recording() or exporting_onnx():
        given = "a call inside of torch.jit.trace" if recording() else "a call inside of torch.onnx.export"
        fix = "Use torch.export.export or torch.compile, which take it as one node; for ONNX export PyTorch's own layer"
        raise UnsupportedError.of(CALL, "no TorchScript and no ONNX graph can hold the call", given, fix)


def _encode_bias(q: Tensor, bias: Any, kinds: list[int], tensors: list[Tensor]) -> None:
    given = as_bias(bias, CALL)
    assert given is not None
    for term in given.terms:
        lowered = term.lowered(q.device)
        kind = -1
        for index, known in enumerate(KINDS):
            if isinstance(lowered, known):
                kind = index
        if kind < 0:
            rule = "a score term that is a Python function cannot be part of a graph"
            fix = "Pass a tensor, qkv.alibi or qkv.relative, or call attention outside of the traced function"
            raise UnsupportedError.of(CALL, rule, f"{type(lowered).__name__} while tracing", fix)
        kinds += [kind]
        tensors += [lowered.tensors()[0]]


def _encode_positions(positions: Any, q: Tensor) -> tuple[str, list[int], Tensor | None]:
    if positions is None:
        return "", [], None
    if isinstance(positions, str):
        return positions, [], None
    if isinstance(positions, Tensor):
        if positions.dim() < 2:  # where each batch row starts
            positions = positions.reshape(-1, 1) + torch.arange(q.shape[2], device=positions.device)
        return "tensor", [], positions
    if isinstance(positions, (list, tuple)):
        return "at", list(positions), None
    return "at", [positions], None


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """The function as torch.compile is to leave it: a cache's tables are Python's, and no graph holds them."""
    return torch.compiler.disable(function) if torch.compiler.is_dynamo_compiling() else function
