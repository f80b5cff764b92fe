"""Finite scores of any magnitude: what people's masks and features make of them, on every backend.

The gates have the exact cases under the error rule (`tests/kit/wide.py`). Here stand the ways that lead there: additive
masks of -1e12 and lower on padded rows, raw features as queries and keys, a large scale, and training that saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
import qkv.compat
import qkv.nn
from tests.kit import backends, saturated

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = backends.promising()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOP = torch.finfo(torch.float32).max
LARGE = (-1e9, -1e10, -1e12, -1e15, -1e18, -1e25, -1e32, 1e10, 1e12, -TOP / 2, -TOP, TOP / 2)


def short(x: Any) -> str:
    return str(x).removeprefix("torch.")


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(n * 31**i for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def as_held(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, scale: float | None = None) -> Tensor:
    """Attention with the scores as float32 holds them, all the rest in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.double() @ k.double().mT * scale + torch.as_tensor(bias).double()).float()
    return scores.double().softmax(-1) @ v.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", LARGE)
def test_an_additive_mask_of_any_size_on_every_key(bias: float, backend: str) -> None:
    """A row of padding: all its scores are far below zero, and it is the mean that rounding leaves."""
    q, k, v = normal(1, 4, 20, 16), normal(1, 2, 20, 16, seed=4), normal(1, 2, 20, 8, seed=5)
    for rows in (20, 1):  # prefill and decode have kernels of their own
        mask = torch.full((rows, 20), bias)
        mask[-1, 3:] = 0.0 if bias < 0 else bias
        got = qkv.attention(q[:, :, :rows], k, v, bias=mask, backend=backend)
        if backend == "reference" and abs(bias) < 1e17:
            continue  # its float64 still tells apart what float32 does not
        torch.testing.assert_close(got.double(), as_held(q[:, :, :rows], k, v, mask), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weights_add_up_to_one_at_any_scale(dtype: torch.dtype, backend: str) -> None:
    """V = 1 gives 1 in every row where scores are large: four roundings are allowed."""
    scales = (3e3, 1e8, 1e9, 1e10, 1e12, 1e16, 1e25, 1e36)
    for scale in (*scales, 1e19, 1e100, 1e306) if dtype == torch.float64 else scales:
        for Lq, Lk, Hq, mask in ((40, 70, 2, None), (1, 300, 4, None), (33, 33, 2, qkv.causal()), (3, 5, 1, None)):
            q, k = normal(1, Hq, Lq, 16, dtype=dtype), normal(1, 1, Lk, 16, seed=4, dtype=dtype)
            out = qkv.attention(q, k, torch.ones_like(k), mask=mask, scale=scale, backend=backend)
            error = float((out.double() - 1).abs().max())
            assert error <= 4 * torch.finfo(dtype).eps, f"scale {scale:.0e}, {Lq} x {Lk}: {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_floats(backend: str) -> None:
    """Ties of the largest score share the weight; a difference that overflows is a weight of 0."""
    k = torch.tensor([TOP, -TOP, TOP, 0.0, TOP / 2])[None, None, :, None]
    v = torch.tensor([[1.0, 0.5], [4, 4], [3, 1.5], [8, 8], [9, 9]])[None, None]
    q = torch.tensor([1.0, -1.0])[None, None, :, None]
    out, lse = qkv.attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    assert out.tolist() == [[[[2.0, 1.0], [4.0, 4.0]]]]
    assert lse.tolist() == [[[TOP, TOP]]]
    low = qkv.attention(q, torch.zeros_like(k), v, bias=torch.full((2, 5), -TOP), backend=backend)
    torch.testing.assert_close(low, v.mean(2, keepdim=True).expand_as(low))
    sinks = qkv.attention(q, k, v, scale=1.0, sinks=torch.tensor([TOP]), backend=backend)
    torch.testing.assert_close(sinks, torch.tensor([[[[4 / 3, 2 / 3], [2.0, 2.0]]]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_score_has_to_be_finite(backend: str) -> None:
    """Neither scale times q, nor q.k with a small scale, limits it."""
    v = normal(1, 1, 3, 4)
    k = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    for q_size, k_size, scale in ((1e20, 1e-20, 1e30), (2.0**60, 2.0**60, 2.0**-118), (2.0**-60, 2.0**-60, 2.0**122)):
        q, keys = torch.full((1, 1, 1, 1), q_size), k * k_size
        got = qkv.attention(q, keys, v, scale=scale, backend=backend)
        torch.testing.assert_close(got.double(), as_held(q, keys, v, 0.0, scale), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_without_a_norm(backend: str) -> None:
    """A column of 1.7e5 in q and k beside ordinary ones: scores of 1.7e9 that differ by little."""
    column = (1.7e9 + torch.rand(1, 1, 6, 1, generator=torch.Generator().manual_seed(0)) * 1e6) / 1e4
    x = torch.cat([column, normal(1, 1, 6, 3)], -1)
    out = qkv.attention(x, x, torch.eye(6)[None, None], backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 1, 6))


# ------------------------------------------------------------------------------------------------------- gradients
def gradients(attend: Callable[..., Tensor], tensors: list[Tensor], towards: Tensor, kind: torch.dtype) -> Any:
    leaves = [x.to(kind).requires_grad_() for x in tensors]
    return torch.autograd.grad(attend(*leaves), leaves, towards.to(kind))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5, 1e6, 2.0**100])
def test_gradients_of_saturated_rows(scale: float, dtype: torch.dtype, backend: str) -> None:
    """At scores of 3e4 to 1e31 they are as good as those of a dense softmax in the same dtype.

    Whole numbers for q and k: the scores are exact, so that rows of one best key and rows of equal ones stand apart.
    """
    gen = torch.Generator().manual_seed(7)
    tensors = [torch.randint(-3, 4, (1, 2, 90, 12), generator=gen).to(dtype) for _ in range(2)] + [
        normal(1, 2, 90, 12, dtype=dtype)
    ]
    towards = normal(1, 2, 90, 12, seed=8, dtype=dtype)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).mul(scale)).softmax(-1) @ v

    if dtype == torch.float16:
        tensors[0], scale = tensors[0] * 2.0**-6, min(scale, 1e5) * 2.0**6  # PyTorch's scores end at 65,504
    wide = torch.float64
    kind = torch.float32 if dtype == torch.float16 else dtype
    found = gradients(lambda *x: qkv.attention(*x, scale=scale, backend=backend), tensors, towards, dtype)
    exact, beside = (gradients(dense, tensors, towards, each) for each in (wide, kind))
    for name, x, y, want in zip("qkv", found, beside, exact, strict=True):
        want = want.to(dtype).to(wide) if want.abs().max() > torch.finfo(dtype).max else want
        largest = float(want.abs().max())
        error, other = (float((t.to(wide) - want).nan_to_num(0).abs().max()) for t in (x, y))
        bound = 1.25 * other + 4 * torch.finfo(dtype).eps * largest + 2.0**-100 * scale
        assert not x.isnan().any()
        assert error <= bound, f"d{name} errs by {error / largest:.1e}, dense by {other / largest:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5, 1e7])
def test_weights_of_the_backward_pass_add_up_to_one(scale: float, backend: str) -> None:
    assert not saturated.fault(backend, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3e4, 3e5, 3e6, 3e7])
def test_values_learn_from_weights_that_add_up_to_one(size: float, backend: str) -> None:
    """Equal scores of 3e4 and more: each key has one weight of 1 / n in dV, however coarse lse is there."""
    q, k = torch.full((1, 1, 4, 1), size).requires_grad_(), torch.ones(1, 1, 48, 1, requires_grad=True)
    v = normal(1, 1, 48, 3).requires_grad_()
    towards = normal(1, 1, 4, 3, seed=9)
    out, lse = qkv.attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (towards, torch.ones_like(lse)))
    torch.testing.assert_close(dv, (towards.sum(2, keepdim=True) / 48).expand_as(dv), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dq, torch.ones_like(dq), rtol=1e-4, atol=1e-5)
    assert dk.isfinite().all()


# --------------------------------------------------------------------------------- padding, modules, compat, merge
@pytest.mark.parametrize("low", [-1e12, -1e15, -1e32, torch.finfo(torch.float32).min])
def test_left_padding_by_a_float_mask(low: float) -> None:
    """(1 - mask) * low, once for padding and once for the future: a dense softmax's values and gradients.

    PyTorch's own kernel has its values too, but not its gradients (2.13, CPU): it keeps lse as one number.
    """
    seen = torch.ones(2, 8)
    seen[1, :3] = 0
    add = ((1 - seen)[:, None, None, :] * low + torch.triu(torch.ones(8, 8), 1) * low).clamp(min=-TOP)
    tensors = [normal(2, 2, 8, 16, seed=n) for n in range(3)]
    towards = normal(2, 2, 8, 16, seed=9)
    found = []

    def dense(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return (q @ k.mT / 4 + attn_mask).softmax(-1) @ v

    for attend in (qkv.compat.sdpa, dense):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, attn_mask=add)
        found.append([out, *torch.autograd.grad(out, leaves, towards)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("low", [-1e12, -1e32])
def test_one_padded_text_spoils_no_gradient_of_a_layer(low: float) -> None:
    """qkv.nn.MultiheadAttention with a float key_padding_mask that is low everywhere in one text."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    mine = qkv.nn.MultiheadAttention(32, 4, batch_first=True)
    mine.load_state_dict(theirs.state_dict())
    x, mask = normal(2, 6, 32), torch.zeros(2, 6)
    mask[1] = low
    for layer in (theirs, mine):
        # theirs with weights, which is a dense softmax: its kernel keeps lse as one number
        out = layer(x, x, x, key_padding_mask=mask, need_weights=layer is theirs)[0]
        out.backward(normal(2, 6, 32, seed=9))
    for (name, want), got in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_weights_at_any_magnitude() -> None:
    q, k = normal(1, 2, 5, 8), normal(1, 2, 9, 8, seed=4)
    for scale in (1e3, 1e12, 1e30):
        p = qkv.weights(q, k, scale=scale)
        torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, 5))
        assert torch.equal(p.argmax(-1), (q @ k.mT).argmax(-1))


def test_parts_with_any_lse_merge() -> None:
    """Equal parts of any lse share the weight; a difference that overflows leaves the larger part, bit for bit."""
    one, two = normal(1, 3, 4), normal(1, 3, 4, seed=4)
    for size in (1e6, 1e12, 1e32, TOP):
        lse = torch.full((1, 3), size)
        out, both = qkv.merge(one, lse, two, lse)
        torch.testing.assert_close(out, (one + two) / 2)
        torch.testing.assert_close(both, lse + 0.6931472)
        leaves = [x.clone().requires_grad_() for x in (one, lse, two, -lse)]
        out, both = qkv.merge(*leaves)
        assert torch.equal(out, one)
        assert torch.equal(both, lse)
        for x in torch.autograd.grad([out, both], leaves, [normal(1, 3, 4, seed=5), torch.ones(1, 3)]):
            assert x.isfinite().all()


def test_pages_and_stored_numbers_at_any_scale() -> None:
    """A cache's pages, shared by two sequences, and int8: V = 1 gives 1 there as well."""
    for storage in (None, torch.int8):
        kwargs = {} if storage is None else {"storage": storage}
        cache = qkv.cache.PagedCache(pages=80, page_size=16, num_kv_heads=2, head_dim=16, dtype=torch.float32, **kwargs)
        first = cache.add()
        cache.append([first], normal(1, 2, 560, 16), torch.ones(1, 2, 560, 16))
        seqs = [first, cache.fork(first)]
        cache.append(seqs, normal(2, 2, 1, 16), torch.ones(2, 2, 1, 16))
        for scale in (1.0, 1e10, 1e30):
            out = qkv.attention(normal(2, 4, 1, 16), cache.view(seqs), mask=qkv.causal(), scale=scale)
            torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6, rtol=0)
