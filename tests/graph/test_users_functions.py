"""Errors inside of a user's function, and inputs that are no tensors: what was given is named, and the cure."""

from __future__ import annotations

import io
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError
from tests.kit.layers import sample

pytestmark = pytest.mark.usefixtures("one_thread")

Q = sample(2, 4, 6, 8)


def branching(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Any:
    return j <= p if p > j else j == 0


def scored(s: Tensor, b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Any:
    return s if p > j else s * 2


def chained(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Any:
    return (p >= j) and (j > 2)


def failing(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Any:
    return {"a": p}["b"]


MASK, SCORE = r"fn\(b, h, p, j\)", r"fn\(s, b, h, p, j\)"
WHERE = r"torch\.where\(p > j"
WRONG: list[tuple[Any, type[Exception], type[Exception], str]] = [
    (qkv.mask_mod(branching), ArgumentError, RuntimeError, rf"mask_mod\(branching\).*{MASK}.*{WHERE}"),
    (qkv.mask_mod(chained), ArgumentError, RuntimeError, rf"{MASK}.*write & \| ~ for and, or, not"),
    (qkv.mask_mod(lambda q, k: q), ArgumentTypeError, TypeError, rf"{MASK}.*takes 2 positional.*take these"),
    (qkv.mask_mod(failing), ArgumentError, KeyError, rf"mask_mod\(failing\).*{MASK}.*KeyError: 'b'"),
    (qkv.score_mod(scored), ArgumentError, RuntimeError, rf"score_mod\(scored\).*{SCORE}.*{WHERE}"),
    (qkv.score_mod(lambda s: s), ArgumentTypeError, TypeError, rf"{SCORE}.*takes 1 positional"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", WRONG, ids=range(len(WRONG)))
def test_an_error_inside_of_a_users_function_names_the_signature(case: Any, backend: str | None) -> None:
    value, kind, cause, text = case
    name = "mask" if isinstance(value, qkv.Mask) else "bias"
    with pytest.raises(kind, match=text) as error:
        qkv.attention(Q, Q, Q, **{name: value}, backend=backend)
    assert type(error.value.__cause__) is cause
    assert isinstance(error.value, QKVError)


def test_an_error_of_ours_inside_of_a_users_function_stays_itself() -> None:
    with pytest.raises(ShapeError, match="must have 4 dimensions"):
        qkv.attention(Q, Q, Q, qkv.mask_mod(lambda b, h, p, j: qkv.attention(Q[0], Q[0], Q[0]) > 0))


@pytest.mark.parametrize("lengths", [[[2, 4], [3, 3]], [[2, 4], [6]], torch.tensor([[2, 4], [3, 3]])], ids=str)
def test_lengths_of_every_row_name_segment_ids(lengths: Any) -> None:
    with pytest.raises(ShapeError, match=r"shared by the batch.*pass segment_ids=.*repeat_interleave"):
        qkv.documents(lengths)
    with pytest.raises(ShapeError, match="pass k_segment_ids="):
        qkv.documents([2, 4], lengths)


def test_the_cure_for_lengths_of_every_row_is_right() -> None:
    lengths = [[2, 4], [3, 3]]
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    seen = qkv.documents(segment_ids=ids).tensor(6, 6, B=2)
    for b, row in enumerate(lengths):
        assert torch.equal(seen[b, 0], qkv.documents(row).tensor(6, 6)[0, 0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: qkv.attention(x, Q, Q), "q"),
        (lambda x: qkv.attention(Q, Q, x), "v"),
        (lambda x: qkv.attention(Q, Q, Q, x), "x"),
        (lambda x: qkv.attention(Q, Q, Q, bias=x), "bias"),
        (lambda x: qkv.nn.Attention(8, 2)(x), "x"),
        (lambda x: qkv.plan(x, Q, Q), "q"),
    ],
)
def test_an_array_is_named_by_its_shape_and_the_cure_is_from_numpy(call: Any, name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"torch\.from_numpy\({name}\)") as error:
        call(np.full((2, 4, 6, 8), 0.123456, dtype=np.float32))
    text = str(error.value)
    assert "0.123" not in text
    assert "\n" not in text
    assert name == "bias" or "float32 ndarray of shape (2, 4, 6, 8)" in text


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = qkv.nn.Attention(16, 2, mask=qkv.causal())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
def test_jit_trace_ends_in_a_sentence(layer: bool) -> None:
    """It recorded the numbers of the one call that it saw."""
    run: Any = Net() if layer else lambda q: qkv.attention(q, q, q)
    given = torch.randn(1, 6, 16) if layer else Q.clone()
    with torch.no_grad():
        run(given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(
                UnsupportedError, match=r"inside of torch\.jit\.trace.*torch\.export\.export or torch\.compile"
            ):
                torch.jit.trace(run, (given,))
        run(given)


def test_jit_trace_over_a_cache_ends_in_a_sentence() -> None:
    cache = qkv.cache.PagedCache(pages=2, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    seq = cache.add()
    cache.append([seq], Q[:1, :2], Q[:1, :2])
    view = cache.view([seq])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=r"inside of torch\.jit\.trace"):
            torch.jit.trace(lambda q: qkv.attention(q, view, mask=qkv.causal()), (Q[:1],))


def test_onnx_export_ends_in_a_sentence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=r"no ONNX graph can hold the call.*for ONNX export PyTorch's own"):
            torch.onnx.export(Net().eval(), (torch.randn(1, 6, 16),), io.BytesIO(), dynamo=False)


def test_an_onnx_export_by_torch_export_ends_in_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's flag is what tells; the exporter itself needs a package that is not installed."""
    flags = import_module("torch.onnx._internal.exporter._flags")
    monkeypatch.setattr(flags, "_is_onnx_exporting", True)
    with pytest.raises(UnsupportedError, match=r"inside of torch\.onnx\.export"):
        torch.export.export(Net().eval(), (torch.randn(1, 6, 16),))
