"""The arguments of `torch.nn.functional.scaled_dot_product_attention`: checked, and folded to four dimensions."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qkv.checks import given_as, no_tensor, short
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

CALL = "qkv.compat.sdpa()"


class TorchShapeError(ShapeError, RuntimeError):
    """Sizes that do not fit together, where PyTorch raises a RuntimeError."""


class TorchArgumentError(ArgumentError, RuntimeError):
    """A value outside its range or a forbidden combination, where PyTorch raises a RuntimeError."""


class TorchArgumentTypeError(ArgumentTypeError, RuntimeError):
    """A dtype that the function does not take, where PyTorch raises a RuntimeError."""


# --------------------------------------------------------------------------------------------------------------- checks
def refuse_other_types(**given: Any) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise no_tensor(CALL, name, x, "Pass a tensor (..., H, L, D)")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    if not query.dtype == key.dtype == value.dtype:
        given = ", ".join(f"{n} {short(x.dtype)}" for n, x in (("query", query), ("key", key), ("value", value)))
        fix = "Convert them with .to(query.dtype)"
        raise TorchArgumentTypeError.of(CALL, "query, key and value must share one dtype", given, fix)
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        rule = "query, key and value must have at least 2 dimensions"
        raise TorchShapeError.of(CALL, rule, _sizes(query, key, value), "Pass (..., H, L, D)")
    if query.shape[-1] != key.shape[-1]:
        fix = "Project both to one head size"
        raise TorchShapeError.of(CALL, "query and key must have one last dimension D", _sizes(query, key, value), fix)
    if key.shape[-2] != value.shape[-2]:
        fix = "Every key has one value: give them the same tokens"
        raise TorchShapeError.of(CALL, "key and value must have one length Lk", _sizes(query, key, value), fix)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        given = f"attn_mask {short(attn_mask.dtype)} and query {short(query.dtype)}"
        fix = "Convert it with .to(query.dtype) where it is added, with .bool() where it says who may attend"
        raise TorchArgumentTypeError.of(CALL, "attn_mask must be bool, float32 or of query's dtype", given, fix)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _real(name: str, x: Any, fix: str) -> float:
    if not isinstance(x, (Real, torch.SymInt, torch.SymFloat)) and not (
        isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex()
    ):
        raise ArgumentTypeError.of(CALL, f"{name} must be a number", given_as(name, x), fix)
    return float(x)


def as_dropout(x: Any) -> float:
    fix = "Use 0 for no dropout"
    p = _real("dropout_p", x, fix)
    if not 0 <= p <= 1:
        raise TorchArgumentError.of(CALL, "dropout_p must be in [0, 1]", f"dropout_p={p}", fix)
    return p


def as_scale(x: Any) -> float | None:
    return None if x is None else _real("scale", x, "Leave it out for 1/sqrt(D)")


def cast(x: Tensor, to: torch.dtype) -> Tensor:
    """What autocast does to an argument: floating tensors change their dtype, float64 stays."""
    return x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x


# --------------------------------------------------------------------------------------------------------------- shapes
def folded(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), and the leading dimensions that B and Hq stand for."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, tuple(query.shape[:2])
    shapes: list[tuple[int, ...]] = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if gqa:
        key, value = _same_heads(query, key, value)
        shapes = [tuple(query.shape[:-2]), (*key.shape[:-3], 1), (*value.shape[:-3], 1)]
    try:
        lead = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        rule = "the dimensions before L must broadcast"
        fix = "Give each its size or 1"
        if not gqa and all(x.dim() > 2 for x in (query, key, value)) and query.shape[-3] != key.shape[-3]:
            fix += "; for fewer key/value heads than query heads pass enable_gqa=True"
        raise TorchShapeError.of(CALL, rule, _sizes(query, key, value), fix) from None
    B, Hq = math.prod(lead[:-1]), lead[-1] if lead else 1
    Hk, Hv = (x.shape[-3] if x.dim() > 2 else 1 for x in (key, value))
    Hkv = Hk if Hk == Hv and (gqa or Hq) else Hq  # one head shared by all stays one
    return _fold(query, lead, B, Hq), _fold(key, lead, B, Hkv), _fold(value, lead, B, Hkv), lead


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with one number of heads, that query's is a multiple of."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        given, fix = _sizes(query, key, value), "Pass (..., H, L, D)"
        raise TorchShapeError.of(CALL, "enable_gqa needs a dimension of heads", given, fix)
    Hq, Hk, Hv = (x.shape[-3] for x in (query, key, value))
    if not Hq == Hk == Hv and (not Hk or not Hv or Hq % Hk or Hq % Hv or not Hq):
        given = f"{_sizes(query, key, value)} → Hq={Hq}, Hk={Hk}, Hv={Hv}"
        fix = "Use numbers of heads that divide Hq, or check that the heads are dimension -3"
        raise TorchShapeError.of(CALL, "query heads must be a multiple of key and of value heads", given, fix)
    if Hk != Hv:
        heads = math.lcm(Hk, Hv)
        key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    return key, value


def _fold(x: Tensor, lead: tuple[int, ...], B: int, H: int) -> Tensor:
    """x (..., h, L, D) as (B, H, L, D): a view, unless it broadcasts along some of several batch dimensions."""
    L, D = x.shape[-2:]
    h = x.shape[-3] if x.dim() > 2 else 1
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, h, L, D).expand(B, H, L, D)
    return x.expand(*lead[:-1], H, L, D).reshape(B, H, L, D)


def fitted(attn_mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """attn_mask, which broadcasts to `full` = (..., Hq, Lq, Lk), in 4 dimensions that broadcast to (B, Hq, Lq, Lk)."""
    shape = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        given = f"attn_mask {tuple(attn_mask.shape)} for {full}"
        fix = "Give each dimension its size or 1"
        raise TorchShapeError.of(CALL, "attn_mask must broadcast to (..., Hq, Lq, Lk)", given, fix)
    shape = (1,) * (4 - len(shape)) + shape
    batch, rest = shape[:-3], shape[-3:]
    if all(n == 1 for n in batch):
        return attn_mask.reshape(1, *rest)
    return attn_mask.reshape(shape).expand(*full[:-3], *rest).reshape(math.prod(full[:-3]), *rest)
