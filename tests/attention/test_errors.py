"""Every bad call of attention() is a typed error that says the rule, what was given and the fix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError

T = torch.zeros


q = T(2, 4, 5, 8)


def call(**change: Any) -> Any:
    return lambda: qkv.attention(**({"q": q, "k": q, "v": q} | change))


# name: (the error, words of its message, the call)
BAD_CALLS: dict[str, tuple[type[QKVError], str, Any]] = {
    "q is a list": (ArgumentTypeError, "q must be a tensor", call(q=[1])),
    "v left out": (ArgumentTypeError, "cache's view", call(v=None)),
    "q int": (ArgumentTypeError, "float64, float32", call(q=q.long())),
    "mixed dtypes": (ArgumentTypeError, "one dtype", call(k=q.double())),
    "meta key": (ArgumentTypeError, "one device", call(k=q.to("meta"))),
    "all meta": (UnsupportedError, "meta", call(q=q.to("meta"), k=q.to("meta"), v=q.to("meta"))),
    "sparse": (ArgumentTypeError, "strided", call(q=q.to_sparse())),
    "3-D": (ShapeError, "4 dimensions", call(q=q[0])),
    "batch": (ShapeError, "batch size", call(k=T(1, 4, 5, 8))),
    "D": (ShapeError, "head size D", call(k=T(2, 4, 5, 7))),
    "D 0": (ShapeError, "at least 1", call(q=q[..., :0], k=q[..., :0])),
    "Lk": (ShapeError, "one length Lk", call(v=T(2, 4, 6, 8))),
    "Hkv": (ShapeError, "same heads", call(v=T(2, 2, 5, 8))),
    "multiple": (ShapeError, r"Hkv in \{1, 2, 4\}", call(k=T(2, 3, 5, 8), v=T(2, 3, 5, 8))),
    "no kv heads": (ShapeError, "multiple", call(k=T(2, 0, 5, 8), v=T(2, 0, 5, 8))),
    "float mask": (ArgumentTypeError, "bias=", call(mask=T(5, 5))),
    "mask str": (ArgumentTypeError, "causal", call(mask="causal")),
    "mask shape": (ShapeError, "broadcast", call(mask=torch.ones(5, 6).bool())),
    "bias int": (ArgumentTypeError, "bias", call(bias=T(5, 5).long())),
    "bias bool": (ArgumentTypeError, "mask=", call(bias=torch.ones(5, 5).bool())),
    "bias dtype": (ArgumentTypeError, "q's dtype or float32", call(bias=T(5, 5).double())),
    "bias shape": (ShapeError, "broadcast", call(bias=T(5, 6))),
    "bias 5-D": (ShapeError, "broadcast", call(bias=T(1, 1, 1, 5, 5))),
    "bias fn": (ArgumentTypeError, "score_mod", call(bias=lambda s: s)),
    "alibi heads": (ShapeError, "slope", call(bias=qkv.alibi([1.0]))),
    "table heads": (ShapeError, "row a query head", call(bias=qkv.relative(T(3, 5)))),
    "scale nan": (ArgumentError, "finite", call(scale=math.nan)),
    "scale inf": (ArgumentError, "finite", call(scale=-math.inf)),
    "scale huge": (ArgumentError, "finite", call(scale=10**400)),
    "scale tensor": (ArgumentTypeError, "number", call(scale=torch.tensor(1.0))),
    "scale bool": (ArgumentTypeError, "number", call(scale=True)),
    "scale str": (ArgumentTypeError, "number", call(scale="1")),
    "scale complex": (ArgumentTypeError, "number", call(scale=1j)),
    "softcap 0": (ArgumentError, "> 0", call(softcap=0)),
    "softcap negative": (ArgumentError, "> 0", call(softcap=-1.0)),
    "softcap nan": (ArgumentError, "finite", call(softcap=math.nan)),
    "softcap bool": (ArgumentTypeError, "number", call(softcap=True)),
    "dropout 1": (ArgumentError, r"\[0, 1\)", call(dropout_p=1.0)),
    "dropout negative": (ArgumentError, r"\[0, 1\)", call(dropout_p=-0.1)),
    "dropout nan": (ArgumentError, "finite", call(dropout_p=math.nan)),
    "dropout none": (ArgumentTypeError, "number", call(dropout_p=None)),
    "sinks list": (ArgumentTypeError, "sinks", call(sinks=[0.0] * 4)),
    "sinks int": (ArgumentTypeError, "sinks", call(sinks=torch.zeros(4).long())),
    "sinks shape": (ShapeError, r"\(Hq,\)", call(sinks=T(5))),
    "sinks device": (ArgumentTypeError, "device", call(sinks=T(4, device="meta"))),
    "positions str": (ArgumentError, "start", call(positions="middle")),
    "positions float": (ArgumentTypeError, "positions", call(positions=1.5)),
    "positions bool": (ArgumentTypeError, "positions", call(positions=True)),
    "positions count": (ShapeError, "each batch row", call(positions=[1, 2, 3])),
    "positions shape": (ShapeError, "B or 1, Lq", call(positions=torch.zeros(2, 4).long())),
    "positions floats": (ArgumentTypeError, "integers", call(positions=torch.zeros(2, 5))),
    "positions huge": (ArgumentError, "magnitude", call(positions=2**50)),
    "return_lse 1": (ArgumentTypeError, "bool", call(return_lse=1)),
    "return_lse None": (ArgumentTypeError, "bool", call(return_lse=None)),
    "backend unknown": (ArgumentError, "reference, tiled, sdpa, cpu", call(backend="cuda")),
    "backend type": (ArgumentTypeError, "name", call(backend=1)),
    "backend list": (ArgumentTypeError, "name", call(backend=["tiled"])),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors(name: str) -> None:
    kind, text, call = BAD_CALLS[name]
    with pytest.raises(kind, match=text) as error:
        call()
    assert type(error.value) is kind
    assert isinstance(error.value, (ValueError, TypeError))
    assert str(error.value).startswith("qkv.attention(): ")
    assert " Got " in str(error.value)


def test_the_message_of_the_design() -> None:
    with pytest.raises(ShapeError) as error:
        qkv.attention(T(2, 10, 64, 64), T(2, 4, 64, 64), T(2, 4, 64, 64))
    assert str(error.value) == (
        "qkv.attention(): query heads must be a multiple of key/value heads. Got q (2, 10, 64, 64) → Hq=10 and "
        "k (2, 4, 64, 64) → Hkv=4. Use Hkv in {1, 2, 5, 10}, or check that q is (B, H, L, D)."
    )


def test_what_torch_func_cannot_map_is_refused_by_name() -> None:
    q, p = torch.randn(1, 2, 5, 8), torch.arange(5).expand(3, 1, 5)
    with pytest.raises(UnsupportedError, match="positions"):
        torch.vmap(lambda p: qkv.attention(q, q, q, mask=qkv.causal(), positions=p))(p)
