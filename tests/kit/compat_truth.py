"""qkv.compat.sdpa is judged by this: float64 mathematics with error bounds, random calls, two fixtures and marks.

A test file takes a fixture by assignment, `own = compat_truth.own`, so that no other file gets it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.compat import sdpa

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:qkv:UserWarning"),  # said once where there is no native extension
]
MODULE = importlib.import_module("qkv.compat.scaled_dot_product")
ATTRIBUTE = importlib.import_module("qkv.compat.attribute")
COUNTING = importlib.import_module("qkv.compat.counting")
TORCH = torch._C._nn.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = {torch.float16: 2.0**-24, torch.float64: 2.0**-1022}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """No test may leave the patch behind."""
    yield
    assert F.scaled_dot_product_attention is TORCH
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any((ATTRIBUTE._levels, ATTRIBUTE._aside, ATTRIBUTE._owed, COUNTING._watching))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's function is out of reach: what passes was computed by qkv."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the call was passed on to PyTorch")

    monkeypatch.setattr(MODULE, "torch_sdpa", refuse)


class Bounded(NamedTuple):
    """A result in float64 and how far from it a kernel may be (design: error bounds of outputs and gradients)."""

    value: Tensor
    bound: Tensor


def _group(x: Tensor, heads: int) -> Tensor:
    """Head h of the result is head h // (heads / own heads): indexed, not repeated."""
    return x[..., torch.arange(heads) // (heads // x.shape[-3]), :, :] if x.shape[-3] else x


def truth(
    given: dict[str, Tensor], cotangent: Tensor, *, causal: bool = False, scale: float | None = None, gqa: bool = False
) -> dict[str, Bounded]:
    """Attention and its gradients by formula, with every factor's absolute value beside it."""
    dtype = given["q"].dtype
    eps, acc = (torch.finfo(t).eps for t in (dtype, torch.float64 if dtype == torch.float64 else torch.float32))
    if dtype == torch.float64:
        eps, acc = 4 * eps, 4 * acc  # this oracle rounds in float64 too
    q, k, v = (given[n].detach().double() for n in "qkv")
    if gqa:
        k, v = _group(k, q.shape[-3]), _group(v, q.shape[-3])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    full = (*lead, q.shape[-2], k.shape[-2])
    bias, visible = torch.zeros(full, dtype=torch.float64), torch.ones(full, dtype=torch.bool)
    if "mask" in given:
        mask = given["mask"].detach()
        visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
        bias = bias if mask.dtype == torch.bool else mask.double().expand(full).masked_fill(~visible, 0.0)
    if causal:
        visible = visible & (torch.arange(full[-1]) <= torch.arange(full[-2])[:, None])

    s = (q @ k.mT * scale + bias).masked_fill(~visible, -math.inf)
    size = (q.abs() @ k.abs().mT * abs(scale) + bias.abs()).masked_fill(~visible, 0.0)
    weight = 1 + (size.amax(-1, keepdim=True) if full[-1] else torch.zeros(*full[:-1], 1))
    p = torch.softmax(s, -1).nan_to_num(0.0) if full[-1] else s
    do = cotangent.double()
    dp, dp_size = do @ v.mT, do.abs() @ v.abs().mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    ds_size = p * (dp_size + (p * dp_size).sum(-1, keepdim=True))
    out = p @ v
    plain, heavy = p @ v.abs(), (p * weight) @ v.abs()
    floor = TINY.get(dtype, 2.0**-126) * (1 + float(v.abs().max() if v.numel() else 0))
    found = {"out": Bounded(out, 2 * eps * plain + 4 * acc * heavy + floor)}

    def gradient(name: str, value: Tensor, plain: Tensor, heavy: Tensor) -> None:
        shape = given[name].shape
        parts = []
        for x in (value, plain, heavy):
            if gqa and name in "kv":
                x = x.unflatten(-3, (shape[-3], -1)).sum(-3)
            parts.append(x.sum_to_size(shape))
        # one rounding more than the kernel's: PyTorch adds the gradients of what broadcast
        own_eps = max(eps, torch.finfo(given[name].dtype).eps)  # a float32 mask has a float32 gradient
        found[name] = Bounded(parts[0], 3 * own_eps * parts[1] + 8 * acc * parts[2] + 64 * floor)

    q_, k_, do_ = q.abs() * abs(scale), k.abs() * abs(scale), do.abs()
    gradient("q", ds @ k * scale, ds_size @ k_, (ds_size * weight) @ k_)
    gradient("k", ds.mT @ q * scale, ds_size.mT @ q_, (ds_size * weight).mT @ q_)
    gradient("v", p.mT @ do, p.mT @ do_, (p * weight).mT @ do_)
    if "mask" in given and given["mask"].dtype != torch.bool:
        gradient("mask", ds, ds_size, ds_size * weight)
    return found


def check(given: dict[str, Tensor], note: str, *, is_causal: bool = False, gqa: bool = False, **kwargs: Any) -> None:
    """Forward and backward of one call against the truth."""
    leaves = {n: x.detach().requires_grad_(x.dtype != torch.bool) for n, x in given.items()}
    mask = leaves.get("mask")
    out = sdpa(
        leaves["q"], leaves["k"], leaves["v"], attn_mask=mask, is_causal=is_causal, enable_gqa=gqa, **kwargs
    )  # fmt: skip
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    wanted = truth(given, cotangent, causal=is_causal, gqa=gqa, **kwargs)
    names = [n for n in wanted if n != "out"]
    found = dict(zip(names, torch.autograd.grad(out, [leaves[n] for n in names], cotangent), strict=True))
    found["out"] = out.detach()
    for name, (value, bound) in wanted.items():
        mine = found[name]
        assert mine.shape == value.shape, (note, name)
        assert mine.dtype == (given[name].dtype if name != "out" else given["q"].dtype), (note, name)
        wrong = ~((mine.double() - value).abs() <= bound)
        assert not wrong.any(), f"{note}: {name} is off at {wrong.nonzero()[0].tolist()}, {int(wrong.sum())} places"


def draw(q: Any, k: Any, v: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """q, k and v of the given shapes, with scores of standard deviation 4."""
    g = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in (("q", q), ("k", k), ("v", v))}
    tensors["q"] *= 4
    return {n: x.to(dtype) for n, x in tensors.items()}


def bool_mask(shape: Any, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def float_mask(shape: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)) * 3
    return mask.masked_fill(~bool_mask(shape, seed), -math.inf).to(dtype)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Every test's usual q, k and v: two batch rows, three heads, five queries, seven keys."""
    return tuple(draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype).values())  # type: ignore[return-value]
