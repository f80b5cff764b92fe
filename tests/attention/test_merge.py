"""merge(): a monoid with a bitwise neutral element."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import qkv
from qkv.errors import ArgumentTypeError, ShapeError


def parts(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3, 4), Dv: int = 5, seed: int = 0) -> Any:
    gen = torch.Generator().manual_seed(seed)
    lse_type = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(*shape, Dv, generator=gen, dtype=torch.float64).to(dtype), (
        torch.randn(*shape, generator=gen, dtype=torch.float64) * 8
    ).to(lse_type)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_against_the_formula(dtype: torch.dtype) -> None:
    (out1, lse1), (out2, lse2) = parts(dtype, seed=1), parts(dtype, seed=2)
    out, lse = qkv.merge(out1, lse1, out2, lse2)
    w1, w2 = lse1.double().exp()[..., None], lse2.double().exp()[..., None]
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert lse.dtype == lse1.dtype
    assert torch.allclose(out.double(), (w1 * out1.double() + w2 * out2.double()) / (w1 + w2), atol=4 * eps, rtol=eps)
    assert torch.allclose(lse.double(), torch.log(w1 + w2)[..., 0], atol=4 * torch.finfo(lse.dtype).eps * 30)


@pytest.mark.parametrize("backend", ["reference", "tiled", None])
def test_parts_of_the_keys_make_the_whole(backend: str | None) -> None:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 30, 8, generator=gen) * 2 for _ in range(3))
    sinks = torch.randn(4, generator=gen)
    want, want_lse = qkv.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    for cuts in ((0, 30), (0, 1, 30), (0, 7, 8, 30), (0, 30, 30)):
        state = torch.zeros_like(want), torch.full((2, 4, 30), -torch.inf)
        for n, (start, stop) in enumerate(itertools.pairwise(cuts)):
            part = qkv.attention(
                q,
                k[:, :, start:stop],
                v[:, :, start:stop],
                sinks=sinks if n == 0 else None,
                return_lse=True,
                backend=backend,
            )
            state = qkv.merge(*state, *part)
        assert torch.allclose(state[0], want, atol=1e-5)
        assert torch.allclose(state[1], want_lse, atol=1e-5)


def test_the_neutral_element_changes_no_bit() -> None:
    out, lse = parts(torch.bfloat16)
    none = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for a, b in (((out, lse), none), (none, (out, lse))):
        merged = qkv.merge(*a, *b)
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    assert torch.equal(qkv.merge(*none, *none)[0], none[0])
    assert torch.equal(qkv.merge(*none, *none)[1], none[1])
    # An empty part is never read: whatever its rows hold.
    dirty = torch.full_like(out, math.nan), none[1]
    assert torch.equal(qkv.merge(out, lse, *dirty)[0], out)


def test_extreme_differences() -> None:
    out1, out2 = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    for a, b, want in ((1e30, -1e30, 1.0), (-1e4, 1e4, 2.0), (-3e38, -3e38, 1.5), (500.0, 500.0, 1.5)):
        out, lse = qkv.merge(out1, torch.tensor([a]), out2, torch.tensor([b]))
        assert out.item() == want
        assert abs(lse.item() - max(a, b)) <= 1 + 1e-7 * abs(a)
    assert qkv.merge(out1, torch.tensor([math.nan]), out2, torch.tensor([0.0]))[0].isnan().all()


def test_gradients() -> None:
    (out1, lse1), (out2, lse2) = parts(torch.float64, seed=1), parts(torch.float64, seed=2)
    leaves = [x.requires_grad_() for x in (out1, lse1 / 4, out2, lse2 / 4)]
    assert torch.autograd.gradcheck(qkv.merge, [x.detach().requires_grad_() for x in leaves])
    empty = torch.full_like(lse2, -math.inf).requires_grad_()
    out, lse = qkv.merge(leaves[0], leaves[1], leaves[2], empty)
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad([out, lse], [leaves[0], leaves[1], leaves[2], empty], [d_out, torch.ones_like(lse)])
    assert torch.equal(grads[0], d_out)
    assert torch.equal(grads[1], torch.ones_like(lse))
    assert not grads[2].any()
    assert not grads[3].any()


out, lse = parts()


@pytest.mark.parametrize(
    ("kind", "text", "args"),
    [
        (ArgumentTypeError, "must be a tensor", (out, lse, out, 1.0)),
        (ShapeError, "one shape", (out, lse, out[:1], lse[:1])),
        (ShapeError, "without the last|without Dv", (out, lse[:1], out, lse)),
        (ShapeError, "one shape", (lse[0, 0], lse[0, 0], lse[0, 0], lse[0, 0])),
        (ArgumentTypeError, "floating dtype", (out, lse, out.double(), lse)),
        (ArgumentTypeError, "floating dtype", (out.long(), lse, out.long(), lse)),
        (ArgumentTypeError, "lse must be float32", (out, lse.double(), out, lse)),
        (ArgumentTypeError, "lse must be float64", (out.double(), lse, out.double(), lse)),
        (ArgumentTypeError, "one device", (out, lse, out.to("meta"), lse)),
    ],
)
def test_errors(kind: type[Exception], text: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(kind, match=text) as error:
        qkv.merge(*args)
    assert str(error.value).startswith("qkv.merge(): ")


def test_a_merge_is_a_named_tuple_as_attention_gives() -> None:
    """The same class, unpacked or by name, compiled and under vmap too."""
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    left = qkv.attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
    right = qkv.attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
    merged = qkv.merge(*left, *right)
    out, lse = merged
    assert type(merged) is type(left)
    assert merged.out is out
    assert merged.lse is lse
    mapped = torch.vmap(qkv.merge)(*left, *right)
    assert type(mapped) is type(left)
    assert torch.equal(mapped.out, out)
