"""qkv.compat.sdpa: dropout, autocast, PyTorch's causal bias objects, its signature, and errors that are its errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import qkv
from qkv.compat import patch_sdpa, sdpa
from tests.kit import compat_truth
from tests.kit.compat_truth import TORCH, draw, drawn, truth

pytestmark = compat_truth.MARKS
restored, own = compat_truth.restored, compat_truth.own


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


def test_a_causal_bias_is_no_bias_of_qkv_attention() -> None:
    """It holds no data: what lies in its memory would be added to the scores."""
    q, k, v = drawn()
    for given in ({"bias": causal_upper_left(5, 7)}, {"mask": causal_upper_left(5, 7)}):
        with pytest.raises(qkv.ArgumentTypeError):
            qkv.attention(q, k, v, **given)
    with pytest.raises(qkv.ArgumentTypeError, match=r"mask=qkv\.causal\(\)"):
        qkv.attention(q, k, v, bias=causal_lower_right(5, 7))


# --------------------------------------------------------------------------------------------------------------- errors
def _bad(**changes: Any) -> dict[str, Any]:
    q, k, v = drawn()
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
    q, k, v = drawn()
    assert list(inspect.signature(sdpa).parameters) == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    assert torch.equal(sdpa(q, k, v, None, 0.0, True), sdpa(query=q, key=k, value=v, is_causal=True))
    for function in (sdpa, TORCH):
        with pytest.raises(TypeError):
            function(q, k, v, None, 0.0, True, 0.5)
        with pytest.raises(TypeError):
            function(q, k, v, window=3)
