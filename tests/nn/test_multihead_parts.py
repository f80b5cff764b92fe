"""qkv.nn.MultiheadAttention: whatever stands in the place of out_proj is called; nested tensors; what is not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.nn.multihead import MultiheadAttention
from tests.kit.multihead_truth import EXACT, LAYERS, E, H, L, N, S, pair, same, tokens

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:qkv:UserWarning"),  # said once where there is no native extension
]


class Adapter(torch.nn.Module):
    """A low-rank adapter around a layer, as adapter libraries put one in its place."""

    def __init__(self, base: torch.nn.Module, *, weight: bool) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = torch.nn.Linear(E, 2, False), torch.nn.Linear(2, E, False)
        self.to(base.weight.dtype)
        if weight:  # some show the weight of the layer they wrap: reading it ignores what was learned
            self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_replaces_out_proj_is_called(weight: bool, need_weights: bool) -> None:
    _, ours = pair(batch_first=True)
    inputs = tokens(ours)
    plain = ours.out_proj
    heads: list[Tensor] = []
    plain.register_forward_hook(lambda module, args, out: heads.append(args[0].detach()))
    before = ours(*inputs, need_weights=need_weights)[0]
    assert len(heads) == 1  # hooks take part
    ours.out_proj = Adapter(plain, weight=weight)
    out = ours(*inputs, need_weights=need_weights)[0]
    same(out, before + ours.out_proj.up(ours.out_proj.down(heads[0])), "adapted")
    grads = torch.autograd.grad(out, list(ours.out_proj.up.parameters()), torch.ones_like(out).cumsum(-1))
    assert all(g.any() for g in grads)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_adapter_takes_part_in_pytorchs_layers_in_evaluation() -> None:
    """Their fused code reads weights; for a layer whose out_proj has no plain weight they must not take it."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn, _ = pair(batch_first=True)[::-1]
    assert layer.self_attn._qkv_same_embed_dim  # PyTorch's fast path stays open for the plain layer
    layer.self_attn.out_proj = Adapter(layer.self_attn.out_proj, weight=True)
    encoder = torch.nn.TransformerEncoder(layer, 2)
    x = torch.randn(N, S, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pad = torch.arange(S) >= torch.tensor([[6], [3], [5]])
    wanted = encoder(x, src_key_padding_mask=pad).detach()
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=pad)
    same(found[~pad], wanted[~pad], "evaluation", 10 * EXACT)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, about its own quantised tensors
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_out_proj_is_called() -> None:
    layer = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, S, E, generator=torch.Generator().manual_seed(0))
    plain = layer(x, x, x)[0]
    layer.out_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(_prepared(layer.out_proj))
    out = layer(x, x, x)[0]
    assert not torch.equal(out, plain)
    same(out, plain, "quantised", 0.1)  # eight bits of a weight of size 0.25, sixteen of them, over values of size 1


def _prepared(linear: torch.nn.Linear) -> torch.nn.Linear:
    copied = torch.nn.Linear(E, E)
    copied.load_state_dict(linear.state_dict())
    copied.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return copied


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["plain", "learned key", "both keys"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_tensors_are_a_call_a_row(name: str, layout: torch.layout, need_weights: bool) -> None:
    _, ours = pair(**(LAYERS[name] | {"batch_first": True}))
    lengths, keys = (4, 1, 6), (3, 7, 5)
    gen = torch.Generator().manual_seed(0)
    q_rows, k_rows = (
        [torch.randn(n, E, generator=gen, dtype=torch.float64).requires_grad_() for n in each]
        for each in (lengths, keys)
    )
    for own in (False, True):  # attention to itself, and to others
        for is_causal in (False, True):
            query, key = (torch.nested.as_nested_tensor(rows, layout=layout) for rows in (q_rows, k_rows))
            other, other_rows = (query, q_rows) if own else (key, k_rows)
            out, p = ours(query, other, other, need_weights=need_weights, is_causal=is_causal)
            assert out.layout == layout
            cotangents = [torch.randn(n, E, generator=gen, dtype=torch.float64) for n in lengths]
            leaves = [*q_rows, *([] if own else k_rows), *ours.parameters()]
            loss = sum((a * b).sum() for a, b in zip(out.unbind(), cotangents, strict=True))
            found = torch.autograd.grad(loss, leaves)
            single = [
                ours(a, b, b, need_weights=need_weights, is_causal=is_causal)
                for a, b in zip(q_rows, other_rows, strict=True)
            ]
            loss = sum((a * b).sum() for (a, _), b in zip(single, cotangents, strict=True))
            wanted = torch.autograd.grad(loss, leaves)
            for a, (b, _) in zip(out.unbind(), single, strict=True):
                same(a, b, "out")
            for a, b in zip(found, wanted, strict=True):
                same(a, b, "gradients", 100 * EXACT)
            if p is not None:
                extra = (ours.bias_k is not None) + ours.add_zero_attn
                for n, (row, (_, one)) in enumerate(zip(p, single, strict=True)):
                    L1, S1 = one.shape[0], one.shape[1] - extra
                    same(row[:L1, :S1], one[:, :S1], "weights")
                    same(row[:L1, row.shape[1] - extra :], one[:, S1:], "weights of the keys that are appended")
                    assert not row[L1:].any(), n
                    assert not row[:, S1 : row.shape[1] - extra].any(), n
    assert (query + ours(query, query, query)[0]).is_nested  # a residual connection: the same sizes, by PyTorch's books


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_that_nests_computes_the_same_with_ours() -> None:
    """A hook closes the fast path of the layers, and the encoder nests what it gives them all the same."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = pair(batch_first=True)[1]
    encoder = torch.nn.TransformerEncoder(layer, 2)
    x = torch.randn(N, S, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pad = torch.arange(S) >= torch.tensor([[6], [3], [5]])
    wanted = encoder(x, src_key_padding_mask=pad).detach()
    seen: list[bool] = []
    for each in encoder.layers:
        each.self_attn.register_forward_hook(lambda module, args, out: seen.append(args[0].is_nested))
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=pad)
    assert seen == [True, True]
    same(found[~pad], wanted[~pad], "encoder", 10 * EXACT)
    assert not found[pad].any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_that_do_not_fit_are_refused() -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    x, y, z = (torch.nested.nested_tensor([torch.zeros(n, E) for n in each]) for each in ((3, 4), (4, 3), (3, 4, 5)))
    empty = torch.nested.nested_tensor([])
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((x, x.to_padded_tensor(0), x), "all be nested"),
        ((x, x, y), "one batch size N, and key and value the same lengths"),
        ((z, x, x), "one batch size N"),
        ((empty, empty, empty), "received 1-D query tensor"),
        ((x, x, x, torch.zeros(2, 4, dtype=torch.bool)), "hold their lengths"),
    ]
    for given, words in refused:
        with pytest.raises((qkv.ArgumentError, qkv.ShapeError, qkv.ArgumentTypeError), match=words):
            ours(*given)
    with pytest.raises(qkv.ArgumentError, match="batch_first=True"):
        MultiheadAttention(E, H)(x, x, x)


@pytest.mark.parametrize("low", [-1e12, -1e32, torch.finfo(torch.float32).min])
def test_gradients_of_a_text_that_a_float_mask_pads_are_finite(low: float) -> None:
    """Masks of large finite numbers, alone and added to each other; a row of them throughout weighs its keys alike."""
    theirs, ours = pair(batch_first=True, dtype=torch.float32)
    pad = torch.arange(S) >= torch.tensor([[6], [3], [0]])
    added = torch.zeros(N, S).masked_fill(pad, low)
    for more in (None, torch.zeros(L, S).masked_fill(torch.ones(L, S).triu(3).bool(), low)):
        if more is not None and low < -1e32:
            continue  # two of them have no sum in float32
        made = []
        # PyTorch's layer with weights asked for: its fused backward pass loses such rows (torch 2.13)
        for layer, need_weights in ((theirs, True), (ours, True), (ours, False)):
            inputs = [x.requires_grad_() for x in tokens(layer)]
            out, p = layer(*inputs, key_padding_mask=added, attn_mask=more, need_weights=need_weights)
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            made.append([out.detach(), *torch.autograd.grad((out * cotangent).sum(), [*inputs, *layer.parameters()])])
            assert p is None or p.isfinite().all()
        for a, *both in zip(*made, strict=True):
            for b in both:
                assert ((a - b).abs() <= 1e-4 * (1 + a.abs().max())).all()  # float32 sums of some hundred terms


def test_dropped_and_hidden_values_are_not_read() -> None:
    """Also where the weights are asked for, which decides which were dropped before the values are met."""
    _, ours = pair(dropout=0.4, batch_first=True)
    query, key, value = tokens(ours)
    pad = torch.arange(S).expand(N, S) >= torch.tensor([[6], [3], [0]])
    made = []
    for bad in (False, True):
        if bad:
            key[pad], value[pad] = math.nan, math.inf
        torch.manual_seed(0)
        made.append(ours.train()(query, key, value, key_padding_mask=pad))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
