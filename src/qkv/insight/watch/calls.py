"""Calls as they are met, by whatever function, as calls of `qkv.attention`: what is looked at is one thing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.call.problem import Options
from qkv.checks import DTYPES, short
from qkv.masks import Mask, causal


class Unseen(Exception):
    """A call that cannot be looked at; the message says why."""


class Call(NamedTuple):
    """One call of attention: by whom it was made, and the arguments of `qkv.attention` that mean the same."""

    via: str
    q: Any
    k: Any
    v: Any
    mask: Mask | Tensor | None
    options: Options
    backend: str | None = None


def of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """A call of torch.nn.functional.scaled_dot_product_attention."""
    _plain(query, key, value, attn_mask)
    query, key, value = (_cast(x) for x in (query, key, value))
    heads = 1 if enable_gqa else 0
    leads = [x.shape[: x.dim() - 2 - heads] for x in (query, key, value)]
    lead = torch.broadcast_shapes(*leads)
    q, k, v = (_four(x.expand(*lead, *x.shape[len(own) :])) for x, own in zip((query, key, value), leads, strict=True))
    mask: Mask | Tensor | None = causal() if is_causal else None
    bias: Tensor | None = None
    if attn_mask is not None:
        every = (*query.shape[:-1], key.shape[-2]) if enable_gqa else (*lead, query.shape[-2], key.shape[-2])
        given = _four(attn_mask.detach().expand(torch.broadcast_shapes(attn_mask.shape, every)))
        mask, bias = (given, None) if given.dtype == torch.bool else _of_numbers(given, q.dtype)
    return Call("torch.nn.functional.scaled_dot_product_attention", q, k, v, mask, Options("start", bias, scale))


def of_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Call:
    """A call of a model's own `eager_attention_forward`, or of a function with its arguments."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise Unseen(f"its mask is a {type(attention_mask).__name__}")
    _plain(query, key, value, attention_mask)
    query, key, value = (_cast(x) for x in (query, key, value))
    mask: Tensor | None = None
    bias = position_bias
    if attention_mask is not None:
        if attention_mask.dim() != 4:
            raise Unseen(f"its mask has {attention_mask.dim()} dimensions")
        given = attention_mask.detach()[..., : key.shape[2]]
        mask, added = (given, None) if given.dtype == torch.bool else _of_numbers(given, query.dtype)
        bias = added if bias is None else bias if added is None else bias + added
    if bias is not None:
        bias = bias.detach()[..., : key.shape[2]]
        bias = bias if bias.dtype in (query.dtype, torch.float32) else bias.float()
    sinks = getattr(module, "sinks", None) if s_aux is None else s_aux
    sinks = sinks.detach() if isinstance(sinks, Tensor) and sinks.shape == query.shape[1:2] else None
    scale = None if scaling is None else float(scaling)
    return Call("eager", query, key, value, mask, Options("start", bias, scale, softcap, sinks))


class Projected(NamedTuple):
    """What PyTorch's layers project by themselves: inputs (B, L, E), weights of all three, heads."""

    query: Tensor
    key: Tensor
    weights: tuple[Tensor, Tensor]  # of queries and of keys
    biases: tuple[Tensor | None, Tensor | None]
    heads: int


def of_projected(via: str, given: Projected, hidden: Tensor | None, added: Tensor | None = None) -> Call:
    """A call whose queries and keys are made and used up inside of a fused function. `hidden`: True = may not."""
    _plain(given.query, given.key, None, None)
    q, k = (
        torch.nn.functional.linear(x, w, b).unflatten(-1, (given.heads, -1)).transpose(1, 2)
        for x, w, b in zip((given.query, given.key), given.weights, given.biases, strict=True)
    )
    return Call(via, q, k, None, None if hidden is None else ~hidden, Options("start", added))


def _plain(*tensors: Any) -> None:
    for x in tensors:
        if x is None:
            continue
        if x.is_nested or x.layout != torch.strided:
            raise Unseen(f"tensors are {'nested' if x.is_nested else x.layout}")
        if x.dtype not in (*DTYPES, torch.bool):
            raise Unseen(f"tensors are {short(x.dtype)}")


def _cast(x: Tensor) -> Tensor:
    """As autocast hands it to PyTorch's function."""
    kind = x.device.type
    x = x.detach()
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x


def _four(x: Tensor) -> Tensor:
    """(B, H, L, D) of any number of dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4) if x.dim() > 4 else x


def _of_numbers(given: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the bias that a float mask stands for: the smallest numbers of its dtype hide."""
    hidden = given <= torch.finfo(given.dtype).min / 2
    bias = None
    if bool(((given != 0) & ~hidden).any()):
        bias = given if given.dtype in (dtype, torch.float32) else given.float()
    return (~hidden if bool(hidden.any()) else None), bias
