"""qkv.compat: what PyTorch's own tests ask of scaled_dot_product_attention on a CPU, against float64 mathematics."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import qkv
from qkv.compat import patch_sdpa, sdpa

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:qkv:UserWarning"),  # said once where there is no native extension
]

MODULE = importlib.import_module("qkv.compat.scaled_dot_product")
TORCH = torch._C._nn.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = {torch.float16: 2.0**-24, torch.float64: 2.0**-1022}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """No test may leave the patch behind."""
    yield
    assert F.scaled_dot_product_attention is TORCH
    assert not MODULE._levels


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's function is out of reach: what passes was computed by qkv."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the call was passed on to PyTorch")

    monkeypatch.setattr(MODULE, "_torch_sdpa", refuse)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that was passed on to PyTorch."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return TORCH(*args, **kwargs)

    monkeypatch.setattr(MODULE, "_torch_sdpa", count)
    return calls


# ---------------------------------------------------------------------------------------------------------------- truth
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


# -------------------------------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_and_rescales(own: None, p: float) -> None:
    """With the identity as values the output is the matrix of dropped weights itself."""
    q, k, _ = draw((4, 4, 32, 8), (4, 4, 32, 8), (1,)).values()
    q, v = (q / 4).requires_grad_(), torch.eye(32).expand(4, 4, 32, 32).clone().requires_grad_()
    full = torch.softmax((q.detach().double() @ k.double().mT) / 8**0.5, -1)
    torch.manual_seed(0)
    out = sdpa(q, k, v, dropout_p=p)
    kept = out != 0
    assert ((out.double() - full / (1 - p)).abs() <= 1e-5 * full / (1 - p))[kept].all()
    count = kept.numel()
    sigma = (p * (1 - p) * count) ** 0.5
    assert abs(int((~kept).sum()) - p * count) < 5 * sigma  # a wrong p of 1 % is 9 sigma off
    for dim in (0, 1, 2, 3):  # every row, key, head and batch row draws its own
        moved = (kept & kept.roll(1, dim)).sum()
        assert abs(int(moved) - (1 - p) ** 2 * count) < 8 * (count * (1 - p) ** 2) ** 0.5
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (dv,) = torch.autograd.grad(out, v, cotangent)  # the backward drops the very same weights
    wanted = out.detach().double().mT @ cotangent.double()
    assert ((dv.double() - wanted).abs() <= 1e-5 * (out.detach().double().mT @ cotangent.double().abs())).all()
    torch.manual_seed(0)
    assert torch.equal(sdpa(q, k, v, dropout_p=p), out)
    assert not torch.equal(sdpa(q, k, v, dropout_p=p), out)


def test_dropout_of_everything_and_of_nothing(own: None) -> None:
    given = {n: x.requires_grad_() for n, x in draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)).items()}
    given["attn_mask"] = torch.randn(5, 7).requires_grad_()
    q, k, v, mask = given.values()
    assert torch.equal(sdpa(q, k, v, mask, dropout_p=0), sdpa(q, k, v, mask))
    out = sdpa(q, k, v, mask, dropout_p=1.0)
    assert out.shape == (2, 3, 5, 6)
    assert not out.any()
    grads = torch.autograd.grad(out, list(given.values()), torch.randn_like(out))
    assert not any(g.any() for g in grads)


# ------------------------------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.float64,) * 3, (torch.float16,) * 3, (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_autocast(own: None, dtypes: tuple[torch.dtype, ...], to: torch.dtype) -> None:
    given = draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6))
    given = {n: x.to(t).requires_grad_() for (n, x), t in zip(given.items(), dtypes, strict=True)}
    # autocast leaves float64 alone but makes the mask a half type, which neither function takes with float64
    bias = torch.randn(5, 7).requires_grad_() if torch.float64 not in dtypes else None
    with torch.autocast("cpu", dtype=to):
        out = sdpa(*given.values(), attn_mask=bias)
        plain = TORCH(*(x.detach() for x in given.values()), attn_mask=None if bias is None else bias.detach())
    assert out.dtype == plain.dtype
    eps = torch.finfo(out.dtype).eps
    assert ((out - plain).abs() <= 16 * eps * (1 + plain.abs())).all()  # both round what they read and what they return
    leaves = [*given.values(), *([] if bias is None else [bias])]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1))
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    assert all(g.any() for g in grads)


# --------------------------------------------------------------------------------------------- what PyTorch keeps doing
class Logged(Tensor):
    """A subclass that sees the functions it is passed to."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def _qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype).values())  # type: ignore[return-value]


def test_subclasses_are_passed_on(passed: list[int]) -> None:
    q, k, v = _qkv()
    Logged.seen = []
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q.as_subclass(Logged), k, v)
    assert isinstance(out, Logged)
    assert TORCH in Logged.seen
    assert passed
    assert torch.equal(out.as_subclass(Tensor), TORCH(q, k, v))


def test_parameters_are_plain_tensors(own: None) -> None:
    q, k, v = (torch.nn.Parameter(x) for x in _qkv())
    assert torch.equal(sdpa(q, k, v), sdpa(q.data, k.data, v.data))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_passed_on(passed: list[int], layout: torch.layout) -> None:
    parts = [torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    if layout == torch.jagged:  # the ragged dimension is stored first
        nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts], layout=layout).transpose(1, 2)
    else:
        nested = torch.nested.nested_tensor(parts, layout=layout)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(nested, nested, nested)
    assert passed
    for found, x in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(found, sdpa(x, x, x), atol=1e-5, rtol=0)


def test_tensors_without_data_are_passed_on(passed: list[int]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in _qkv())
        assert sdpa(q, k, v).shape == (2, 3, 5, 8)
    assert len(passed) == 1
    q, k, v = (x.to("meta") for x in _qkv())
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa(q, k, v).device.type == "meta"
    assert len(passed) == 2


def test_transforms_are_passed_on(passed: list[int]) -> None:
    q, k, v = _qkv()
    cotangent = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    mapped = torch.vmap(sdpa)(q, k, v)
    torch.testing.assert_close(mapped, TORCH(q, k, v), atol=1e-5, rtol=0)
    found = torch.func.grad(lambda x: (sdpa(x, k, v) * cotangent).sum())(q)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x: sdpa(x, k, v), (q,), (cotangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, cotangent)
            again = torch.autograd.forward_ad.unpack_dual(sdpa(dual, k, v)).tangent
    assert len(passed) == 4
    assert ((found.double() - truth({"q": q, "k": k, "v": v}, cotangent)["q"].value).abs() <= 1e-4).all()
    step = 1e-5
    q, k, v, cotangent = (x.double() for x in (q, k, v, cotangent))
    difference = (TORCH(q + step * cotangent, k, v) - TORCH(q - step * cotangent, k, v)) / (2 * step)
    for one in (tangent, again):
        assert ((one - difference).abs() <= 1e-4).all()  # float32 tangents of magnitude 10


def test_modes_that_watch_operations_see_them(passed: list[int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = _qkv()
    with Watch():
        sdpa(q, k, v)
    assert passed
    assert any("scaled_dot_product" in name for name in seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_record_pytorchs_operation(passed: list[int]) -> None:
    q, k, v = _qkv()
    with patch_sdpa():
        traced = torch.jit.trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))
    assert "scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(q, k, v), TORCH(q, k, v, is_causal=True))


def test_compile_without_a_break() -> None:
    q, k, v = _qkv()
    with patch_sdpa():
        compiled = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2, fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(q, k, v), TORCH(q, k, v, is_causal=True) * 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_pytorchs_to_refuse(passed: list[int], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in _qkv())
    with pytest.raises(RuntimeError):
        sdpa(q, k, v)
    assert passed


# ---------------------------------------------------------------------------------------------------------- causal bias
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")  # with PyTorch: not here
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("Lq", "Lk"), [(5, 5), (5, 7), (7, 5)])
def test_causal_bias(own: None, Lq: int, Lk: int, patched: bool) -> None:
    given = draw((2, 3, Lq, 8), (2, 3, Lk, 8), (2, 3, Lk, 8))
    leaves = [x.detach().requires_grad_() for x in given.values()]
    cotangent = torch.randn(2, 3, Lq, 8, generator=torch.Generator().manual_seed(0))
    for bias, diagonal in ((causal_upper_left(Lq, Lk), 0), (causal_lower_right(Lq, Lk), Lk - Lq)):
        if patched:
            with patch_sdpa():
                out = F.scaled_dot_product_attention(*leaves, attn_mask=bias)
        else:
            out = sdpa(*leaves, attn_mask=bias)
        wanted = truth(given | {"mask": torch.ones(Lq, Lk, dtype=torch.bool).tril(diagonal)}, cotangent)
        found = dict(zip("qkv", torch.autograd.grad(out, leaves, cotangent), strict=True)) | {"out": out.detach()}
        for name, mine in found.items():
            assert ((mine.double() - wanted[name].value).abs() <= wanted[name].bound).all(), name


# --------------------------------------------------------------------------------------------------------------- errors
def _bad(**changes: Any) -> dict[str, Any]:
    q, k, v = _qkv()
    return {"query": q, "key": k, "value": v} | changes


BAD: dict[str, tuple[dict[str, Any], type[Exception], bool]] = {  # what, the error, whether PyTorch raises it too
    "mask and causal": (_bad(attn_mask=torch.ones(5, 7, dtype=torch.bool), is_causal=True), qkv.ArgumentError, True),
    "a list": (_bad(value=[1.0]), qkv.ArgumentTypeError, True),
    "a list as mask": (_bad(attn_mask=[[True]]), qkv.ArgumentTypeError, True),
    "a qkv mask": (_bad(attn_mask=qkv.causal()), qkv.ArgumentTypeError, True),
    "one dimension": (_bad(query=torch.randn(8)), qkv.ShapeError, True),
    "head sizes": (_bad(key=torch.randn(2, 3, 7, 4)), qkv.ShapeError, True),
    "key lengths": (_bad(value=torch.randn(2, 3, 6, 8)), qkv.ShapeError, False),
    "batch": (_bad(key=torch.randn(4, 3, 7, 8)), qkv.ShapeError, True),
    "heads": (_bad(key=torch.randn(2, 1, 7, 8), value=torch.randn(2, 2, 7, 8)), qkv.ShapeError, True),
    "dtypes": (_bad(key=torch.randn(2, 3, 7, 8).double()), qkv.ArgumentTypeError, True),
    "mask of ints": (_bad(attn_mask=torch.ones(5, 7, dtype=torch.int64)), qkv.ArgumentTypeError, True),
    "mask of float64": (_bad(attn_mask=torch.ones(5, 7).double()), qkv.ArgumentTypeError, True),
    "mask of bfloat16": (_bad(attn_mask=torch.ones(5, 7).bfloat16()), qkv.ArgumentTypeError, True),
    "mask sizes": (_bad(attn_mask=torch.ones(7, 7)), qkv.ShapeError, True),
    "mask of (B, Lq, Lk)": (_bad(attn_mask=torch.ones(2, 5, 7)), qkv.ShapeError, True),
    "mask with more dimensions": (_bad(attn_mask=torch.ones(1, 2, 3, 5, 7)), qkv.ShapeError, True),
    "dropout above 1": (_bad(dropout_p=1.5), qkv.ArgumentError, True),
    "dropout below 0": (_bad(dropout_p=-0.5), qkv.ArgumentError, False),
    "dropout NaN": (_bad(dropout_p=math.nan), qkv.ArgumentError, False),
    "dropout None": (_bad(dropout_p=None), qkv.ArgumentTypeError, True),
    "scale as text": (_bad(scale="1"), qkv.ArgumentTypeError, True),
    "causal as int": (_bad(is_causal=1), qkv.ArgumentTypeError, True),
    "gqa as int": (_bad(enable_gqa=1), qkv.ArgumentTypeError, True),
    "groups": (_bad(query=torch.randn(2, 4, 5, 8), enable_gqa=True), qkv.ShapeError, True),
    "no key heads": (
        _bad(key=torch.ones(2, 0, 7, 8), value=torch.ones(2, 0, 7, 8), enable_gqa=True),
        qkv.ShapeError,
        False,
    ),
    "groups without heads": (_bad(query=torch.randn(5, 8), enable_gqa=True), qkv.ShapeError, False),
    "lower right of other lengths": (_bad(attn_mask=causal_lower_right(4, 7)), qkv.ShapeError, True),
    "lower right and causal": (_bad(attn_mask=causal_lower_right(5, 7), is_causal=True), qkv.ArgumentError, False),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_pytorchs_and_say_what_to_do(own: None, case: str) -> None:
    arguments, kind, as_torch = BAD[case]
    with pytest.raises(kind) as raised:
        sdpa(**arguments)
    message = str(raised.value)
    assert message.startswith("qkv.compat.sdpa(): ")
    assert ". Got " in message
    if as_torch:  # code that catches PyTorch's error catches ours
        with sdpa_kernel(SDPBackend.MATH), pytest.raises((RuntimeError, TypeError)) as theirs:
            TORCH(**arguments)
        assert isinstance(raised.value, RuntimeError if isinstance(theirs.value, RuntimeError) else TypeError)


def test_the_signature_is_pytorchs() -> None:
    q, k, v = _qkv()
    assert list(inspect.signature(sdpa).parameters) == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    assert torch.equal(sdpa(q, k, v, None, 0.0, True), sdpa(query=q, key=k, value=v, is_causal=True))
    for function in (sdpa, TORCH):
        with pytest.raises(TypeError):
            function(q, k, v, None, 0.0, True, 0.5)
        with pytest.raises(TypeError):
            function(q, k, v, window=3)


# ---------------------------------------------------------------------------------------------------------------- patch
def test_the_patch_comes_and_goes() -> None:
    with patch_sdpa():
        assert F.scaled_dot_product_attention is sdpa
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(KeyError), patch_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH


def test_the_patch_nests_and_one_object_serves_again() -> None:
    one = patch_sdpa()
    with one:
        with one, patch_sdpa():
            assert F.scaled_dot_product_attention is sdpa
        assert F.scaled_dot_product_attention is sdpa
    assert F.scaled_dot_product_attention is TORCH
    with one:
        assert F.scaled_dot_product_attention is sdpa


def test_the_backend_sdpa_keeps_pytorchs_function() -> None:
    """Loaded inside the patch it would call us, and we it: in a fresh process the first call is under the patch."""
    code = """
import torch, qkv, qkv.compat
F, q = torch.nn.functional, torch.randn(1, 2, 5, 8)
plain = F.scaled_dot_product_attention
F.scaled_dot_product_attention = qkv.compat.sdpa
out = qkv.attention(q, q, q, backend="sdpa")
import qkv.backends.sdpa as backend
assert backend.scaled_dot_product_attention is plain
assert torch.equal(out, plain(q, q, q))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_patch_as_a_decorator() -> None:
    @patch_sdpa()
    def depth(n: int) -> int:
        assert F.scaled_dot_product_attention is sdpa
        return depth(n - 1) + 1 if n else 0

    assert depth(3) == 3
    assert F.scaled_dot_product_attention is TORCH


def test_other_assignments_are_kept() -> None:
    def other(*args: Any, **kwargs: Any) -> Tensor:
        return TORCH(*args, **kwargs)

    try:
        F.scaled_dot_product_attention = other  # type: ignore[assignment]
        with patch_sdpa():
            assert F.scaled_dot_product_attention is sdpa
        assert F.scaled_dot_product_attention is other
        F.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
        with patch_sdpa():
            pass
        assert F.scaled_dot_product_attention is sdpa
        F.scaled_dot_product_attention = TORCH
        with patch_sdpa():
            F.scaled_dot_product_attention = other  # type: ignore[assignment]
            with patch_sdpa():
                assert F.scaled_dot_product_attention is sdpa
            assert F.scaled_dot_product_attention is other
        assert F.scaled_dot_product_attention is other
    finally:
        F.scaled_dot_product_attention = TORCH


def test_the_last_thread_restores() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[Any] = []

    def worker() -> None:
        with patch_sdpa():
            inside.set()
            leave.wait(10)
            seen.append(F.scaled_dot_product_attention)

    thread = threading.Thread(target=worker)
    with patch_sdpa():
        thread.start()
        assert inside.wait(10)
    seen.append(F.scaled_dot_product_attention)  # the first one left, the worker is still inside
    leave.set()
    thread.join()
    assert seen == [sdpa, sdpa]
    assert F.scaled_dot_product_attention is TORCH


# ------------------------------------------------------------------------------------------------- modules that call it
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that qkv computed."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return qkv.attention(*args, **kwargs)

    monkeypatch.setattr(MODULE, "attention", count)
    return calls


def _both(model: torch.nn.Module, inputs: Any, kwargs: Any, seed: int = 0) -> list[list[Tensor]]:
    """Outputs and all gradients without and with the patch."""
    found = []
    for patched in (False, True):
        x = [t.clone().requires_grad_() for t in inputs]
        if patched:
            with patch_sdpa():
                out = model(*x, **kwargs)
        else:
            out = model(*x, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(out, [*x, *model.parameters()], cotangent, allow_unused=True)
        found.append([out.detach(), *(g for g in grads if g is not None)])
    return found


def _close(found: list[list[Tensor]]) -> None:
    theirs, ours = found
    assert len(theirs) == len(ours) > 3
    for a, b in zip(theirs, ours, strict=True):
        assert ((a - b).abs() <= 2e-5 * (1 + a.abs().max())).all()  # two float32 orders of a few hundred terms


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "bool", "float 3-D"])
def test_multihead_attention_under_the_patch(counted: list[int], mask: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 6, 24)
    kwargs: dict[str, Any] = {"need_weights": False}
    if mask == "causal":
        kwargs |= {"attn_mask": torch.nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True}
    elif mask == "padding":
        kwargs["key_padding_mask"] = torch.arange(6) >= torch.tensor([[6], [4]])
    elif mask == "bool":
        kwargs["attn_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(2)
    elif mask == "float 3-D":
        kwargs["attn_mask"] = torch.randn(6, 6, 6)
    found = _both(model, (x, x.roll(1, 1), x.roll(2, 1)), kwargs)
    assert len(counted) == 1
    _close(found)


def test_encoder_layer_under_the_patch(counted: list[int]) -> None:
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 6, 24), torch.arange(6) >= torch.tensor([[6], [4]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    _close(_both(model, (x,), {"src_mask": causal, "is_causal": True}))
    _close(_both(model, (x,), {"src_key_padding_mask": padding}))
    assert len(counted) == 2


def test_the_fast_path_of_pytorch_goes_around_the_patch(counted: list[int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 6, 24)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.no_grad(), patch_sdpa():
            torch.backends.mha.set_fastpath_enabled(True)
            fast = layer(x)
            assert not counted
            torch.backends.mha.set_fastpath_enabled(False)
            slow = layer(x)
            assert len(counted) == 1
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
