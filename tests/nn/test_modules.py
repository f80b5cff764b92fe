"""The attention layer as a module: names, copies, devices, dtypes, autocast, checkpointing, dropout, and its errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.nn import Attention
from qkv.rotary import Rotary
from tests.kit.layers import LAYERS, built, close, sample

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_and_shapes_of_the_parameters() -> None:
    sizes = {"num_kv_heads": 2, "head_dim": 6, "value_dim": 5, "context_dim": 20}
    layer = Attention(32, 4, **sizes, bias=True, qk_norm=True, gate=True, sinks=True)  # type: ignore[arg-type]
    weights = {"q": (24, 32), "k": (12, 20), "v": (10, 20), "o": (32, 20)}
    named = {f"{name}_proj.weight": shape for name, shape in weights.items()} | {"gate_proj.weight": (20, 32)}
    named |= {name.replace("weight", "bias"): shape[:1] for name, shape in named.items()}  # type: ignore[misc]
    named |= {"q_norm.weight": (6,), "k_norm.weight": (6,), "sinks": (4,)}  # type: ignore[dict-item]
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == named
    assert list(Attention(32, 4).state_dict()) == [f"{n}_proj.weight" for n in "qkvo"]
    assert not list(layer.buffers())  # nothing that a checkpoint of another library would lack


def test_copies_pickles_and_state_dicts() -> None:
    layer, x = built(32, 4, **LAYERS["all"], mask=qkv.sliding_window(3) & qkv.documents([4, 5])), sample(2, 9, 32)
    want = layer(x)
    fresh = Attention(32, 4, **LAYERS["all"], mask=layer.mask, dtype=torch.float64)
    assert not torch.equal(fresh(x), want)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.q_proj.weight.zero_()
    assert torch.equal(layer(x), want)


def test_built_on_the_meta_device() -> None:
    layer = Attention(32, 4, **LAYERS["all"], device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert torch.equal(layer.sinks, torch.zeros(4))
    assert layer(sample(2, 9, 32, dtype=torch.float32)).isfinite().all()
    source = built(32, 4, **LAYERS["all"])
    empty = Attention(32, 4, **LAYERS["all"], device="meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(sample(2, 9, 32)), source(sample(2, 9, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """One layer moved through the dtypes: rotary tables and norms follow. A half result has some 30 roundings."""
    layer, x = built(32, 4, **LAYERS["all"]), sample(2, 9, 32)
    want = layer(x, mask=qkv.causal())
    moved = copy.deepcopy(layer).to(dtype)
    got = moved(x.to(dtype), mask=qkv.causal())
    assert got.dtype == dtype
    close(got.double(), want, 40 * torch.finfo(dtype).eps)
    got.backward(sample(*got.shape, seed=1, dtype=dtype))
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in moved.parameters())


@pytest.mark.parametrize("name", ["all", "MHA"])
def test_autocast(name: str) -> None:
    layer, x = built(32, 4, **LAYERS[name]).float(), sample(2, 9, 32, dtype=torch.float32)
    want = layer(x, mask=qkv.causal())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x, mask=qkv.causal())
        assert {z.dtype for z in layer.project(x)} == {torch.bfloat16}
    assert got.dtype == torch.bfloat16
    close(got.float(), want, 40 * torch.finfo(torch.bfloat16).eps)
    got.backward(sample(*got.shape, seed=1, dtype=torch.bfloat16))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_activation_checkpointing(dropout_p: float) -> None:
    """Recomputed in backward, dropout included: the seed comes from torch's generator, which checkpointing restores."""
    layer = built(32, 4, **LAYERS["all"], dropout_p=dropout_p, mask=qkv.causal())
    found = []
    for wrapped in (False, True):
        x = sample(2, 9, 32).requires_grad_()
        torch.manual_seed(5)
        out = checkpoint(layer, x, use_reentrant=False) if wrapped else layer(x)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], sample(*out.shape, seed=1))])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_dropout_only_in_training() -> None:
    layer, x = built(32, 4, dropout_p=0.5), sample(2, 9, 32)
    torch.manual_seed(1)
    dropped = layer(x)
    assert not torch.equal(dropped, layer(x))
    torch.manual_seed(1)
    assert torch.equal(dropped, layer(x))
    layer.eval()
    assert torch.equal(layer(x), built(32, 4)(x))


def test_backend_is_passed_on() -> None:
    x = sample(2, 9, 32)
    close(built(32, 4, backend="reference")(x), built(32, 4, backend="tiled")(x))
    with pytest.raises(ArgumentError, match="backend"):
        built(32, 4, backend="none such")(x)


def test_empty_sizes() -> None:
    layer = built(32, 4, **LAYERS["all"])
    assert layer(sample(0, 9, 32)).shape == (0, 9, 32)
    assert layer(sample(2, 0, 32)).shape == (2, 0, 32)
    out = built(32, 4, bias=True)(sample(2, 3, 32), sample(2, 0, 32))
    assert torch.equal(out, built(32, 4, bias=True).o_proj.bias.expand(2, 3, 32))


def test_repr_says_what_the_layer_is() -> None:
    text = repr(Attention(32, 4, num_kv_heads=2, rotary=Rotary(8), mask=qkv.causal(), dropout_p=0.1))
    for part in ("num_kv_heads=2", "Rotary(dim=8", "mask=causal()", "dropout_p=0.1"):
        assert part in text


x, y = torch.zeros(2, 5, 32), torch.zeros(2, 7, 20)
rotary = Rotary(8)


@pytest.mark.parametrize(
    ("kind", "text", "make"),
    [
        (ArgumentTypeError, "dim must be an integer", lambda: Attention(32.0, 4)),  # type: ignore[arg-type]
        (ArgumentError, "num_heads must be an integer >= 1", lambda: Attention(32, 0)),
        (ArgumentError, "dim must be a multiple of num_heads", lambda: Attention(32, 5)),
        (ArgumentError, r"Use num_kv_heads in \{1, 2, 4\}", lambda: Attention(32, 4, num_kv_heads=3)),
        (ArgumentError, "rotary.dim=16 and head_dim=8", lambda: Attention(32, 4, rotary=Rotary(16))),
        (ArgumentTypeError, "rotary must be a Rotary", lambda: Attention(32, 4, rotary=True)),  # type: ignore[arg-type]
        (ArgumentError, "gate is a bool", lambda: Attention(32, 4, gate="elementwise")),
        (ArgumentTypeError, "mask", lambda: Attention(32, 4, mask="causal")),  # type: ignore[arg-type]
        (ArgumentTypeError, "mask", lambda: Attention(32, 4)(x, mask=torch.zeros(5, 5))),
        (ArgumentTypeError, "x must be a tensor", lambda: Attention(32, 4)([1.0])),
        (ShapeError, r"x \(2, 5, 32\) and dim=16", lambda: Attention(16, 4)(x)),
        (ShapeError, r"unsqueeze\(0\)", lambda: Attention(32, 4)(x[0])),
        (ShapeError, "context_dim=32", lambda: Attention(32, 4)(x, y)),
        (ArgumentError, "needs a context", lambda: Attention(32, 4, context_dim=20)(x)),
        (ShapeError, "one batch size", lambda: Attention(32, 4, context_dim=20)(x, y[:1])),
        (ArgumentError, "positions=", lambda: Attention(32, 4, context_dim=20, rotary=rotary)(x, y)),
        (ArgumentError, "positions=", lambda: Attention(32, 4, context_dim=20, mask=qkv.causal())(x, y)),
        (ShapeError, "positions must be", lambda: Attention(32, 4)(x, positions=torch.zeros(4).long())),
        (ArgumentTypeError, "positions must", lambda: Attention(32, 4)(x, positions="end")),
        (ArgumentTypeError, "positions must", lambda: Attention(32, 4, context_dim=20)(x, y, positions="middle")),
        (ArgumentTypeError, r"Pass step\.layer\(i\)", lambda: Attention(32, 4)(x, cache=object())),
        (ArgumentError, "dropout_p", lambda: Attention(32, 4, dropout_p=1.0)(x)),
    ],
)
def test_errors(kind: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(kind, match=text) as error:
        make()
    assert str(error.value).startswith("qkv.")
