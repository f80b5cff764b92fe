"""qkv.compat.sdpa: outputs and gradients of masks, shapes, layouts, head groups and empty rows, against float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkv.compat import sdpa
from tests.kit import compat_truth
from tests.kit.compat_truth import DTYPES, TORCH, bool_mask, check, draw, float_mask, truth

pytestmark = compat_truth.MARKS
restored, own = compat_truth.restored, compat_truth.own


# ---------------------------------------------------------------------------------------------------- values, gradients
B, H, LQ, LK, D, DV = 2, 3, 5, 7, 8, 6
MASKS = [
    *itertools.product((B, 1), (H, 1), (LQ, 1), (LK, 1)),
    *itertools.product((H, 1), (LQ, 1), (LK, 1)),
    *itertools.product((LQ, 1), (LK, 1)),
    (LK,),
    (),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "float32"])
def test_masks_of_every_broadcast_shape(own: None, kind: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(MASKS):
        given = draw((B, H, LQ, D), (B, H, LK, D), (B, H, LK, DV), dtype, seed)
        if kind == "bool":
            given["mask"] = bool_mask(shape, seed)
        else:
            given["mask"] = float_mask(shape, dtype if kind == "float" else torch.float32, seed)
        check(given, f"mask {shape} seed {seed}")


SHAPES: dict[str, tuple[Any, Any, Any]] = {
    "2d": ((5, 8), (7, 8), (7, 6)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "4d": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "5d": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    "6d": ((2, 1, 2, 3, 5, 8), (2, 2, 2, 3, 7, 8), (2, 2, 1, 3, 7, 6)),
    "more queries": ((2, 3, 9, 8), (2, 3, 4, 8), (2, 3, 4, 8)),
    "2d q, 4d k": ((5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "4d q, 2d k": ((2, 3, 5, 8), (7, 8), (7, 6)),
    "3d k": ((2, 3, 5, 8), (3, 7, 8), (1, 7, 6)),
    "one batch row of k": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
    "one batch row of q": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "only v has a batch": ((1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 6)),
    "one head of k and v": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "one head of k": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 6)),
    "one head of q": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "5d, inner batch of k": ((2, 4, 3, 5, 8), (4, 3, 7, 8), (2, 1, 3, 7, 6)),
    "5d, outer batch of k": ((2, 4, 3, 5, 8), (2, 1, 1, 7, 8), (1, 4, 1, 7, 6)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_leading_dimensions(own: None, name: str, is_causal: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(draw(*SHAPES[name], dtype), f"{name} {dtype}", is_causal=is_causal)


@pytest.mark.parametrize(
    "shape", [(2, 4, 3, 5, 7), (1, 4, 1, 5, 7), (2, 1, 3, 1, 7), (1, 1, 3, 5, 7), (4, 1, 5, 7), (5, 7)]
)
def test_masks_of_five_dimensions(own: None, shape: tuple[int, ...]) -> None:
    given = draw((2, 4, 3, 5, 8), (2, 1, 1, 7, 8), (1, 4, 3, 7, 6))
    check(given | {"mask": bool_mask(shape)}, "bool")
    check(given | {"mask": float_mask(shape, torch.float32)}, "float")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("Lq", "Lk", "Dh"), [(1, 1, 8), (2, 2, 16), (1, 77, 64), (77, 144, 33), (130, 67, 40), (144, 144, 64)]
)
def test_lengths_and_head_sizes(own: None, Lq: int, Lk: int, Dh: int, dtype: torch.dtype) -> None:
    for is_causal in (False, True):
        given = draw((1, 2, Lq, Dh), (1, 2, Lk, Dh), (1, 2, Lk, Dh), dtype)
        check(given, f"causal {is_causal}", is_causal=is_causal)


@pytest.mark.parametrize(("Lq", "Lk"), [(4, 9), (9, 4)])
def test_causal_is_top_left(own: None, Lq: int, Lk: int) -> None:
    given = draw((2, 3, Lq, 8), (2, 3, Lk, 8), (2, 3, Lk, 8))
    out = sdpa(given["q"], given["k"], given["v"], is_causal=True)
    first = given["v"][:, :, 0]
    assert ((out[:, :, 0] - first).abs() <= 1e-6 * first.abs()).all()
    masked = sdpa(given["q"], given["k"], given["v"], torch.ones(Lq, Lk, dtype=torch.bool).tril())
    torch.testing.assert_close(out, masked, atol=1e-6, rtol=0)  # of the size of the error bound at |v| < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["split of one projection", "transposed", "channels", "expanded", "strided"])
def test_layouts(own: None, layout: str, dtype: torch.dtype) -> None:
    given = draw((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8), dtype)
    if layout == "split of one projection":
        x = torch.cat([given[n].transpose(1, 2).flatten(2) for n in "qkv"], -1)
        given = {n: y.unflatten(-1, (3, 8)).transpose(1, 2) for n, y in zip("qkv", x.split(24, -1), strict=True)}
    elif layout == "transposed":
        given = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in given.items()}
    elif layout == "channels":
        given = {n: x.mT.contiguous().mT for n, x in given.items()}
    elif layout == "expanded":
        given = {n: x[:, :1].expand(-1, 3, -1, -1) for n, x in given.items()}
    else:
        given = {n: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] for n, x in given.items()}
    # gradients are those of the views, so expand() is no special case
    check(given, layout, is_causal=True)
    mask = bool_mask((6, 2, 12)).permute(1, 0, 2)[:, None, :, ::2]
    check(given | {"mask": mask}, layout)


def test_the_gradient_reaches_a_packed_projection(own: None) -> None:
    x = torch.randn(2, 6, 72, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in x.split(24, -1))
    cotangent = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(sdpa(q, k, v), x, cotangent)
    wanted = truth({"q": q, "k": k, "v": v}, cotangent)
    value, bound = (
        torch.cat([wanted[n][part].transpose(1, 2).flatten(2) for n in "qkv"], -1) for part in (0, 1)
    )  # fmt: skip
    assert ((found.double() - value).abs() <= bound).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1, -0.7, 2.5, 1e-3])
def test_scale(own: None, scale: float) -> None:
    for is_causal in (False, True):
        check(draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), f"scale {scale}", is_causal=is_causal, scale=scale)


def test_scale_as_a_tensor_and_without_a_limit(own: None) -> None:
    q, k, v = draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)).values()
    assert torch.equal(sdpa(q, k, v, scale=torch.tensor(0.5)), sdpa(q, k, v, scale=0.5))
    assert sdpa(q, k, v, scale=math.nan).isnan().all()
    assert sdpa(q.abs(), k.abs(), v, scale=math.inf).isnan().all()


def test_half_types_do_not_overflow(own: None) -> None:
    """Scores of 200,000 do not exist in float16, their softmax does."""
    q = torch.full((1, 2, 4, 64), 60.0, dtype=torch.float16)
    v = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(0)).half()
    out = sdpa(q, q, v)
    assert ((out.double() - v.double().mean(2, keepdim=True)).abs() <= 2e-3).all()  # 2 eps of the largest |v|


# ---------------------------------------------------------------------------------------------------------- head groups
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
        ((2, 6, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
        ((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 6)),
        ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 6)),
        ((2, 6, 5, 8), (2, 6, 7, 8), (2, 2, 7, 6)),
        ((2, 6, 5, 8), (2, 1, 7, 8), (2, 3, 7, 6)),
        ((6, 5, 8), (2, 7, 8), (2, 7, 6)),
        ((2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)),
        ((6, 5, 8), (2, 2, 7, 8), (1, 2, 7, 6)),
        ((3, 2, 6, 5, 8), (2, 2, 7, 8), (3, 1, 2, 7, 6)),
    ],
)
def test_grouped_heads(own: None, q: Any, k: Any, v: Any, is_causal: bool) -> None:
    check(draw(q, k, v), f"{q} {k} {v}", is_causal=is_causal, gqa=True)
    if not is_causal:
        check(draw(q, k, v) | {"mask": bool_mask((q[-3], 5, 7))}, "mask", gqa=True)


# ---------------------------------------------------------------------------------------- rows, emptiness, what is read
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_without_keys_is_zero_like_the_math_path(own: None, kind: str) -> None:
    given = draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), seed=4)
    mask = bool_mask((2, 1, 5, 7), 4)
    mask[:, :, 1::2] = False
    given["mask"] = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    check(given, kind)
    leaves = {n: x.detach().requires_grad_(x.dtype != torch.bool) for n, x in given.items()}
    for function in (sdpa, TORCH):
        with sdpa_kernel(SDPBackend.MATH):
            out = function(leaves["q"], leaves["k"], leaves["v"], leaves["mask"])
        assert not out[:, :, 1::2].any()
        wanted = [leaves["q"], *([leaves["mask"]] if kind == "float" else [])]
        for grad in torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(-1)):
            assert not grad[:, :, 1::2].any()
            assert grad[:, :, ::2].any()


def test_hidden_keys_are_not_read(own: None) -> None:
    given = draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, 4:] = False
    clean = sdpa(given["q"], given["k"], given["v"], mask)
    given["k"][:, :, 4:], given["v"][:, :, 4:] = math.nan, math.inf
    assert torch.equal(sdpa(given["q"], given["k"], given["v"], mask), clean)
    added = sdpa(given["q"], given["k"], given["v"], torch.zeros(5, 7).masked_fill(~mask, -math.inf))
    torch.testing.assert_close(added, clean, atol=1e-5, rtol=0)  # another path, the same keys


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
        ((0, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
        ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6)),
        ((2, 0, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
        ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
        ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
        ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 6)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((2, 0, 3, 5, 8), (2, 1, 3, 7, 8), (1, 1, 3, 7, 6)),
        ((0, 8), (0, 8), (0, 6)),
    ],
)
def test_empty_dimensions(own: None, q: Any, k: Any, v: Any) -> None:
    given = draw(q, k, v)
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    for mask in (None, torch.ones(1, 1, dtype=torch.bool), torch.ones(q[-2], k[-2], dtype=torch.bool)):
        out = sdpa(*leaves.values(), attn_mask=mask)
        wanted = TORCH(*given.values(), attn_mask=mask)
        assert out.shape == wanted.shape
        torch.testing.assert_close(out.detach(), wanted, atol=1e-6, rtol=0)  # rounding of a mean of 7 values below 4
        grads = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
        assert [g.shape for g in grads] == [x.shape for x in leaves.values()]
        assert all(g.isfinite().all() for g in grads)
