"""qkv.nn.MultiheadAttention beside torch.nn.MultiheadAttention: parameters, call, masks, weights, and no NaN."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_upper_left

import qkv
from qkv.nn.multihead import MultiheadAttention
from tests.kit.multihead_truth import EXACT, LAYERS, MASKS, E, H, L, N, S, compare, masks, pair, same, tokens

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:qkv:UserWarning"),  # said once where there is no native extension
]


# ----------------------------------------------------------------------------------------------------- the same results
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients(name: str, mask: str) -> None:
    theirs, ours = pair(**LAYERS[name])
    for batch, (need, average) in itertools.product((N, None), ((True, True), (True, False), (False, True))):
        note = f"batch {batch}, need_weights {need}, average {average}"
        kwargs = masks(mask, batch) | {"need_weights": need, "average_attn_weights": average}
        compare(theirs, ours, tokens(ours, batch=batch), note, **kwargs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_inputs(batch_first: bool, bias: bool) -> None:
    """Self-attention and one source of keys and values take other ways through the projections."""
    theirs, ours = pair(batch_first=batch_first, bias=bias)
    x, y, _ = tokens(ours, lengths=(S, S))
    for inputs in ([x, x, x], [x, y, y], [x, x, y], [x, y, x]):
        compare(theirs, ours, inputs, "shared", key_padding_mask=masks("pad")["key_padding_mask"])


def test_float_and_bool_masks_mix() -> None:
    theirs, ours = pair()
    pad, added = masks("pad")["key_padding_mask"], masks("2d float")["attn_mask"]
    as_float = torch.zeros(N, S, dtype=torch.float64).masked_fill(pad, -math.inf)
    kwargs = {"key_padding_mask": as_float, "attn_mask": added}
    compare(theirs, ours, tokens(ours), "mixed", kwargs, key_padding_mask=pad, attn_mask=added)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ["plain", "both keys"])
@pytest.mark.parametrize(("Lq", "Lk"), [(5, 5), (5, 8), (8, 5)])
def test_is_causal(Lq: int, Lk: int, name: str, need_weights: bool) -> None:
    theirs, ours = pair(**LAYERS[name])
    inputs = tokens(ours, lengths=(Lq, Lk))
    hidden = torch.ones(Lq, Lk, dtype=torch.bool).triu(1)
    explicit = {"attn_mask": hidden, "need_weights": need_weights}
    compare(theirs, ours, inputs, "no mask", explicit, is_causal=True, need_weights=need_weights)
    compare(theirs, ours, inputs, "with its mask", explicit, is_causal=True, **explicit)
    # a mask that is not causal is no hint to be believed: both apply
    window = torch.ones(Lq, Lk, dtype=torch.bool).tril(-3)
    window[:, 0] = False
    kwargs = {"attn_mask": hidden | window, "need_weights": need_weights}
    compare(theirs, ours, inputs, "both", kwargs, is_causal=True, attn_mask=window, need_weights=need_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_smaller_dtypes(dtype: torch.dtype) -> None:
    _, exact = pair()
    theirs, ours = pair(dtype=dtype)
    exact.load_state_dict(ours.state_dict())
    inputs = tokens(ours)
    for kwargs in (masks("pad and 2d"), masks("pad and 3d float", dtype=dtype), masks("2d float", dtype=torch.float32)):
        wide = {n: x.double() if x.is_floating_point() else x for n, x in kwargs.items()}
        wanted = exact(*(x.double() for x in inputs), **wide)
        found = ours(*inputs, **kwargs)
        for a, b in zip(wanted, found, strict=True):
            assert b.dtype == dtype
            # four roundings of the dtype on the way (projections, attention, output) through values of size 10
            same(a, b.double(), str(dtype), 40 * torch.finfo(dtype).eps)
    assert [x.dtype for x in theirs(*inputs)] == [x.dtype for x in ours(*inputs)]


def test_autocast() -> None:
    theirs, ours = pair(dtype=torch.float32, add_bias_kv=True)
    inputs = tokens(ours)
    plain = ours(*inputs, key_padding_mask=masks("pad")["key_padding_mask"])
    for kwargs in (masks("pad"), masks("pad float", dtype=torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, wanted = ours(*inputs, **kwargs), theirs(*inputs, **kwargs)
        assert [x.dtype for x in found] == [x.dtype for x in wanted] == [torch.bfloat16] * 2
        if "float" not in str(kwargs["key_padding_mask"].dtype):
            same(plain[0], found[0].float(), "out", 40 * 2**-7)
            same(plain[1], found[1].float(), "weights", 4 * 2**-7)


# --------------------------------------------------------------------------------------------------- rows without a key
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_fully_padded_row_is_finite(kind: str, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True)
    pad = torch.zeros(N, S, dtype=torch.bool)
    pad[1] = True
    pad[2, 4:] = True
    mask = pad if kind == "bool" else torch.zeros(N, S, dtype=torch.float64).masked_fill(pad, -math.inf)
    inputs = [x.requires_grad_() for x in tokens(ours)]
    out, p = ours(*inputs, key_padding_mask=mask, need_weights=need_weights, average_attn_weights=False)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
    wanted, q = theirs(*inputs, key_padding_mask=mask, need_weights=need_weights, average_attn_weights=False)
    same(out[::2], wanted[::2], "other rows")
    if p is not None:
        assert not p[1].any()
        same(p[::2], q[::2], "weights")
        assert wanted[1].isnan().all()  # what our class is for
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    loss = (out * cotangent).sum() + (0 if p is None else p.square().sum())
    grads = torch.autograd.grad(loss, [*inputs, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[1].any() for g in grads[:3])
    assert all(g[0].any() for g in grads[:3])


def test_padding_is_not_read() -> None:
    _, ours = pair(batch_first=True)
    query, key, value = tokens(ours)
    pad = torch.arange(S).expand(N, S) >= torch.tensor([[6], [3], [0]])
    wanted = ours(query, key, value, key_padding_mask=pad)
    key[pad], value[pad] = math.nan, math.inf
    for a, b in zip(wanted, ours(query, key, value, key_padding_mask=pad), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- dropout
def test_dropout_in_training_returns_the_weights_that_were_used() -> None:
    _, ours = pair(dropout=0.4, batch_first=True)
    inputs = tokens(ours, lengths=(40, 50))
    full = ours.eval()(*inputs, average_attn_weights=False)[1]
    ours.train()
    torch.manual_seed(0)
    out, p = ours(*inputs, average_attn_weights=False)
    kept = p != 0
    same(p[kept], full[kept] / 0.6, "kept weights")
    count = kept.numel()
    assert abs(int(kept.sum()) - 0.6 * count) < 5 * (0.24 * count) ** 0.5
    v = torch.nn.functional.linear(inputs[2], ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    heads = p @ v.unflatten(-1, (H, E // H)).transpose(1, 2)
    same(out, ours.out_proj(heads.transpose(1, 2).flatten(2)), "out")
    torch.manual_seed(0)
    same(ours(*inputs)[1], p.mean(1), "average")


def test_dropout_without_weights() -> None:
    _, ours = pair(dropout=0.4, batch_first=True)
    inputs = tokens(ours)
    plain = ours.eval()(*inputs, need_weights=False)[0]
    assert torch.equal(ours(*inputs, need_weights=False)[0], plain)
    ours.train()
    torch.manual_seed(0)
    draws = torch.stack([ours(*inputs, need_weights=False)[0] for _ in range(400)])
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - plain).abs() < 6 * draws.std(0) / 20).all()  # unbiased: six standard errors of 400 draws


# ---------------------------------------------------------------------------------------------- parameters and pickling
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_seed_gives_the_same_parameters(name: str) -> None:
    made = []
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(5)
        made.append(kind(E, H, **LAYERS[name]).state_dict())
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(a, b) for a, b in zip(made[0].values(), made[1].values(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_load_both_ways_and_copies_compute_the_same(name: str) -> None:
    theirs, ours = pair(**LAYERS[name])
    fresh = torch.nn.MultiheadAttention(E, H, dtype=torch.float64, **LAYERS[name])
    fresh.load_state_dict(ours.state_dict(), strict=True)
    inputs = tokens(ours)
    same(fresh(*inputs)[0], theirs(*inputs)[0], "loaded")
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(again) is MultiheadAttention
        assert torch.equal(again(*inputs)[0], ours(*inputs)[0])
        assert again.out_proj.weight is not ours.out_proj.weight


def test_device_and_dtype() -> None:
    layer = MultiheadAttention(E, H, add_bias_kv=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


# -------------------------------------------------------------------------------------------------- in PyTorch's layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_inside_pytorchs_transformer_layers(batch_first: bool) -> None:
    torch.manual_seed(0)
    kwargs = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    encoder = torch.nn.TransformerEncoderLayer(E, H, **kwargs)
    decoder = torch.nn.TransformerDecoderLayer(E, H, **kwargs)
    x, memory, _ = tokens(MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64))
    memory_pad, causal = masks("pad")["key_padding_mask"], torch.ones(L, L, dtype=torch.bool).triu(1)
    wanted = (
        encoder(memory, src_key_padding_mask=memory_pad),
        decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=memory_pad),
    )
    for layer in (encoder, decoder):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                ours = MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64)
                ours.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, ours)
    found = (
        encoder(memory, src_key_padding_mask=memory_pad),
        decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=memory_pad),
    )
    for a, b in zip(wanted, found, strict=True):
        same(a, b, "layer", 10 * EXACT)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"embed_dim": 0, "num_heads": 1}, qkv.ArgumentError),
        ({"embed_dim": 16, "num_heads": 0}, qkv.ArgumentError),
        ({"embed_dim": 16, "num_heads": 3}, qkv.ArgumentError),
        ({"embed_dim": 16.0, "num_heads": 4}, qkv.ArgumentTypeError),
        ({"embed_dim": 16, "num_heads": 4, "kdim": -1}, qkv.ArgumentError),
        ({"embed_dim": 16, "num_heads": 4, "dropout": 1.0}, qkv.ArgumentError),
        ({"embed_dim": 16, "num_heads": 4, "dropout": "0"}, qkv.ArgumentTypeError),
    ],
)
def test_errors_of_the_constructor(kwargs: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"qkv\.nn\.MultiheadAttention\(\): .*Got "):
        MultiheadAttention(**kwargs)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"query": [1.0]}, qkv.ArgumentTypeError, "query must be a tensor"),
    "four dimensions": ({"query": torch.zeros(1, L, N, E)}, qkv.ShapeError, "received 4-D query"),
    "batched and not": ({"query": torch.zeros(L, E)}, qkv.ShapeError, "to be 2-D but found 3-D and 3-D tensors"),
    "width": ({"key": torch.zeros(S, N, E + 1)}, qkv.ShapeError, "features"),
    "lengths": ({"value": torch.zeros(S + 1, N, E)}, qkv.ShapeError, "same tokens"),
    "batch": ({"query": torch.zeros(L, N + 1, E)}, qkv.ShapeError, "batch size"),
    "padding sizes": ({"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}, qkv.ShapeError, "key_padding_mask"),
    "padding without a batch": ({"key_padding_mask": torch.zeros(S, dtype=torch.bool)}, qkv.ShapeError, "(3, 6)"),
    "padding of ints": ({"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}, qkv.ArgumentTypeError, "bool"),
    "mask sizes": ({"attn_mask": torch.zeros(L, S + 1)}, qkv.ShapeError, "attn_mask"),
    "mask of a batch": ({"attn_mask": torch.zeros(N, L, S)}, qkv.ShapeError, "(12, 5, 6)"),
    "mask of float64": ({"attn_mask": torch.zeros(L, S).double()}, qkv.ArgumentTypeError, "float32"),
    "a qkv mask": ({"attn_mask": qkv.causal()}, qkv.ArgumentTypeError, "attn_mask"),
    # a causal bias holds no data; its sizes (1, L, S) are those of a mask for one row and one head
    "a causal bias": ({"attn_mask": causal_upper_left(L, S)}, qkv.ArgumentTypeError, "is_causal=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_of_the_call(case: str) -> None:
    layer = MultiheadAttention(E, H)
    changes, kind, words = BAD[case]
    given = {"query": torch.zeros(L, N, E), "key": torch.zeros(S, N, E), "value": torch.zeros(S, N, E)} | changes
    with pytest.raises(kind) as raised:
        layer(**given)
    message = str(raised.value)
    assert message.startswith("qkv.nn.MultiheadAttention(): ")
    assert words in message
    assert ". Got " in message


def test_errors_are_pytorchs_as_well() -> None:
    """Code, and PyTorch's own tests, that expect its layer's AssertionError get ours."""
    theirs, ours = pair()
    x, y, _ = tokens(ours, lengths=(S, S))
    ints = torch.zeros(N, S, dtype=torch.int64)
    calls: dict[str, tuple[Any, ...]] = {
        "expected `key` and `value` to be 3-D but found 2-D and 3-D tensors respectively": (x, y[0], y),
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D tensor instead": (x, y, y, ints[0].bool()),
        "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor instead": (
            x,
            y,
            y,
            None,
            True,
            ints[0] > 0,
        ),
        "only bool and floating types of key_padding_mask are supported": (x, y, y, ints),
        "query should be unbatched 2D or batched 3D tensor but received 1-D query tensor": (x[0, 0], y, y),
    }
    for words, given in calls.items():
        for layer in (theirs, ours):
            with pytest.raises(AssertionError, match=re.escape(words)):
                layer(*given)
    many = torch.zeros(H + 1, S, S, dtype=torch.bool)
    for layer in (theirs, ours):  # without a batch
        with pytest.raises(AssertionError, match="Expected `attn_mask` shape to be "):
            layer(x[0], x[0], x[0], attn_mask=many)
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
            kind(16, 3)


def test_a_bias_of_another_dtype_is_taken_as_pytorch_takes_it() -> None:
    theirs, ours = pair(batch_first=True)
    for layer in (theirs, ours):
        layer.in_proj_bias = torch.nn.Parameter(layer.in_proj_bias.detach().half())
    x = tokens(ours, lengths=(S, S))[0]
    same(theirs(x, x, x)[0], ours(x, x, x)[0], "a bias in float16")
