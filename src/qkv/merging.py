"""Combine attention over two disjoint key sets into attention over their union.

A result of attention over some of the keys is the pair (out, lse).
Merging is associative up to rounding, and (0, -inf), attention over no key, is its neutral element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv import _torch
from qkv.checks import DTYPES, no_tensor, short
from qkv.errors import ArgumentTypeError, ShapeError

_CALL = "qkv.merge()"


class OutputWithLse(NamedTuple):
    """out (..., Lq, Dv) and lse (..., Lq), as `merge` and return_lse=True give them."""

    out: Tensor
    lse: Tensor


_torch.register_tuple(OutputWithLse, "qkv.OutputWithLse")


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> OutputWithLse:
    """Merge attention over two disjoint key sets into attention over both.

    With w = exp(lse1) / (exp(lse1) + exp(lse2))::

        out = w * out1 + (1 - w) * out2        lse = log(exp(lse1) + exp(lse2))

    Parameters
    ----------
    out1, out2 : Tensor, shape (..., Lq, Dv)
        Outputs for the same queries over key sets that share no key; one dtype.
    lse1, lse2 : Tensor, shape (..., Lq)
        Their log-sum-exps (natural log): float32, or float64 where the outputs are float64.
        At most one of the two parts may have been computed with sinks, else the sink counts twice.

    Returns
    -------
    out : Tensor, shape (..., Lq, Dv)
        In the dtype of the parts. A row whose lse is -inf in one part is the other part's row, bit for bit;
        a row that is -inf in both stays (out1's row, -inf). Differentiable in all four arguments.
    lse : Tensor, shape (..., Lq)
        Natural log, in the dtype of lse1 and lse2. The pair is an `OutputWithLse`.

    Raises
    ------
    ShapeError
        The shapes differ, or an lse is not its output's shape without the last dimension.
    ArgumentTypeError
        Not tensors, or dtypes or devices that do not fit.

    Notes
    -----
    An lse is one rounded number: at 1e6 float32 knows it to 0.03, and the share of each part no better.
    Cost: reads both parts once, 3 FLOPs an output element. Source: the online softmax (Milakov and Gimelshein 2018).

    Examples
    --------
    >>> import torch, qkv
    >>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    >>> left = qkv.attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
    >>> right = qkv.attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
    >>> out, lse = qkv.merge(*left, *right)
    >>> torch.allclose(out, qkv.attention(q, k, v), atol=1e-5)
    True
    """
    _check(out1, lse1, out2, lse2)
    none1, none2 = lse1 == -torch.inf, lse2 == -torch.inf
    # Rows with an empty part are selected below; a zero difference there keeps inf - inf out of value and gradient.
    difference = torch.where(none1 | none2, 0.0, lse1 - lse2)
    w1, w2 = torch.sigmoid(difference).unsqueeze(-1), torch.sigmoid(-difference).unsqueeze(-1)
    a, b = out1.to(lse1.dtype), out2.to(lse1.dtype)
    mixed = (w1 * a + w2 * b).to(out1.dtype)
    out = torch.where(none2.unsqueeze(-1), out1, torch.where(none1.unsqueeze(-1), out2, mixed))
    both = torch.maximum(lse1, lse2) + torch.log1p(torch.exp(-difference.abs()))
    lse = torch.where(none2, lse1, torch.where(none1, lse2, both))
    return OutputWithLse(out, lse)


def _check(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> None:
    named = {"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise no_tensor(_CALL, name, value, "Pass out1, lse1, out2, lse2")
    given = ", ".join(f"{name} {tuple(t.shape)} {short(t.dtype)} on {t.device}" for name, t in named.items())
    if out1.shape != out2.shape or out1.dim() < 2:
        rule = "the two outputs must have one shape (..., Lq, Dv)"
        raise ShapeError.of(_CALL, rule, given, "Merge parts of the same queries")
    if lse1.shape != out1.shape[:-1] or lse2.shape != out1.shape[:-1]:
        rule = "an lse has its output's shape without Dv"
        raise ShapeError.of(_CALL, rule, given, "Pass the lse that return_lse=True returned")
    if out1.dtype not in DTYPES or out1.dtype != out2.dtype:
        raise ArgumentTypeError.of(_CALL, "the outputs must share one floating dtype", given, "Convert one of them")
    wanted = torch.float64 if out1.dtype == torch.float64 else torch.float32
    if lse1.dtype != wanted or lse2.dtype != wanted:
        rule = f"lse must be {short(wanted)} here"
        raise ArgumentTypeError.of(_CALL, rule, given, "Pass the lse as return_lse=True returned it")
    if len({t.device for t in named.values()}) > 1:
        raise ArgumentTypeError.of(_CALL, "all four tensors must be on one device", given, "Move them with .to(device)")
