"""qkv.compat.sdpa against oracle and judge for any leading dimensions; random calls, two fixtures and marks.

A test file takes a fixture by assignment, `own = compat_truth.own`, so that no other file gets it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.compat import sdpa
from tests.kit import judge
from tests.kit.oracle import Grad
from tests.kit.truth import Truth

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:qkv:UserWarning"),  # said once where there is no native extension
]
MODULE = importlib.import_module("qkv.compat.scaled_dot_product")
ATTRIBUTE = importlib.import_module("qkv.compat.attribute")
COUNTING = importlib.import_module("qkv.compat.counting")
TORCH = torch._C._nn.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """A result by the oracle, and the judge's bound of how far from it a kernel may be."""

    value: Tensor
    bound: Tensor

    @classmethod
    def of(cls, value: Any, bound: Any) -> Bounded:
        return cls(*(torch.from_numpy(np.asarray(x, np.float64)) for x in (value, bound)))


def _group(x: Tensor, heads: int) -> Tensor:
    """Head h of the result is head h // (heads / own heads): indexed, not repeated."""
    return x[..., torch.arange(heads) // (heads // x.shape[-3]), :, :] if x.shape[-3] else x


def _visible(given: dict[str, Tensor], full: tuple[int, ...], causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """What of (*lead, Lq, Lk) the mask shows, and the bias, in the shape of four dimensions that `_flat` makes."""
    mask = given.get("mask")
    seen = torch.ones(full[-2:], dtype=torch.bool).tril() if causal else None
    if mask is None or mask.dtype == torch.bool:
        both = seen if mask is None else mask.detach() if seen is None else mask.detach() & seen
        return None if both is None else _flat(both.expand(full)), None
    return None if seen is None else _flat(seen.expand(full)), _flat(mask.detach().expand(full))


def _flat(x: Tensor) -> Tensor:
    """Every leading dimension as a head of one batch row."""
    return x.reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:])


def truth(
    given: dict[str, Tensor], cotangent: Tensor, *, causal: bool = False, scale: float | None = None, gqa: bool = False
) -> dict[str, Bounded]:
    """Attention and its gradients by the oracle, for any leading dimensions, which broadcast."""
    q, k, v = (given[n].detach() for n in "qkv")
    if gqa:
        k, v = _group(k, q.shape[-3]), _group(v, q.shape[-3])
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    full = (*lead, q.shape[-2], k.shape[-2])
    seen, bias = _visible(given, full, causal)
    flat = (_flat(x.expand(*lead, *x.shape[-2:])) for x in (q, k, v))
    known = Truth(*flat, seen, bias, scale=scale, d_out=_flat(cotangent))
    shape = (*full[:-1], v.shape[-1])
    out = (known.result.out.reshape(shape), judge.output_bound(q.dtype, known.result).reshape(shape))
    found = {"out": Bounded.of(*out)}
    names = {"q": "q", "k": "k", "v": "v"} | ({} if bias is None else {"mask": "bias0"})
    for name, known_as in names.items():
        grad, own, grouped = known.result.grads[known_as], given[name], gqa and name in "kv"
        parts = (x.reshape(*lead, *x.shape[-2:]) for x in (grad.value, grad.plain, grad.weighted))
        mine = Grad(*(_reduced(x, own.shape, grouped) for x in parts))
        found[name] = Bounded.of(mine.value, _gradient_bound(known, mine, own.dtype, grad.value.size))
    return found


def _gradient_bound(known: Truth, grad: Grad, own: torch.dtype, terms: int) -> Any:
    """For a sum of `terms` numbers: PyTorch adds the gradients of what broadcast, and rounds once more."""
    each = terms / max(1, grad.value.size)
    e, tiny = max(judge.eps(known.dtype), judge.eps(own)), max(judge.TINY[known.dtype], judge.TINY[own])
    return judge.gradient_bound(known.call, known.sizes, known.dtype, grad, (2 + (each > 1)) * e, each * tiny)


def _reduced(x: Any, shape: tuple[int, ...], grouped: bool) -> Any:
    """The sum over what was broadcast to make x from a tensor of `shape`; of groups of heads where they share."""
    if grouped:
        x = x.reshape(*x.shape[:-3], shape[-3], -1, *x.shape[-2:]).sum(-3)
    x = x.sum(tuple(range(x.ndim - len(shape))))
    wide = tuple(d for d, n in enumerate(shape) if n == 1 and x.shape[d] != 1)
    return x.sum(wide, keepdims=True) if wide else x


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
        own = given["q" if name == "out" else name].dtype
        verdict = judge.compare(name, found[name], value.numpy(), bound.numpy(), own)
        assert verdict.passed, (note, verdict.fault)


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
