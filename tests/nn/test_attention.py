"""The attention layer: against its definition in float64, against torch's and transformers' layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.nn import Attention
from qkv.rotary import DynamicNTK, Rotary, YaRN
from tests.kit.layers import CLOSE, LAYERS, built, close, sample, turn

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ the definition
def definition(layer: Attention, x: Tensor, y: Tensor, seen: Tensor, qp: Any = None, kp: Any = None) -> Tensor:
    """The layer, a batch row, head and query at a time; seen (B, Lq, Lk) says what may be attended to."""
    w = dict(layer.named_parameters())
    Hq, Hkv, D, Dv = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim

    def projected(name: str, z: Tensor) -> Tensor:
        out = torch.einsum("blc,oc->blo", z, w[f"{name}.weight"])
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def normed(name: str, z: Tensor) -> Tensor:
        return (
            z / ((z * z).sum(-1, keepdim=True) / D + 1e-6).sqrt() * w[f"{name}.weight"] if name + ".weight" in w else z
        )

    q, k, v = projected("q_proj", x), projected("k_proj", y), projected("v_proj", y)
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(Hq):
            g = h * Hkv // Hq
            qh, kh = normed("q_norm", q[b, :, h * D : (h + 1) * D]), normed("k_norm", k[b, :, g * D : (g + 1) * D])
            vh = v[b, :, g * Dv : (g + 1) * Dv]
            if layer.rotary is not None:
                qh = turn(qh, layer.rotary, range(x.shape[1]) if qp is None else qp[b])
                kh = turn(kh, layer.rotary, range(y.shape[1]) if kp is None else kp[b])
            outs = []
            for i in range(x.shape[1]):
                j = seen[b, i].nonzero()[:, 0]
                s = kh[j] @ qh[i] * (layer.scale if layer.scale is not None else 1 / math.sqrt(D))
                if layer.softcap is not None:
                    s = layer.softcap * torch.tanh(s / layer.softcap)
                e, sink = s.exp(), w["sinks"][h].exp() if "sinks" in w else 0.0
                outs.append(e @ vh[j] / (e.sum() + sink) if len(j) else torch.zeros(Dv, dtype=torch.float64))
            heads.append(torch.stack(outs))
        out = torch.stack(heads, dim=1)  # (Lq, Hq, Dv)
        if "gate_proj.weight" in w:
            gates = 1 / (1 + (-projected("gate_proj", x)[b]).exp())
            out = out * gates.reshape(len(out), Hq, -1)
        rows.append(out.reshape(len(out), Hq * Dv))
    return projected("o_proj", torch.stack(rows))


def everything(B: int, Lq: int, Lk: int) -> Tensor:
    return torch.ones(B, Lq, Lk, dtype=torch.bool)


def agree(
    layer: Attention, x: Tensor, context: Tensor | None, seen: Tensor, qp: Any = None, kp: Any = None, **call: Any
) -> None:
    """Output and all gradients (inputs and parameters), for a random cotangent, against the definition."""
    inputs = [x.requires_grad_()] + ([] if context is None else [context.requires_grad_()])
    names = ["x", "context"][: len(inputs)] + [name for name, _ in layer.named_parameters()]
    leaves = [*inputs, *layer.parameters()]
    got, want = layer(x, context, **call), definition(layer, x, x if context is None else context, seen, qp, kp)
    close(got, want)
    cotangent = sample(*got.shape, seed=9)
    pairs = zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True)
    for name, (g, w) in zip(names, pairs, strict=True):
        assert w.abs().max() > 1e-6, f"{name} is not tested"
        close(g, w, 20 * CLOSE)


CAUSAL = torch.tensor([[[j <= i for j in range(9)] for i in range(9)]] * 2)


@pytest.mark.parametrize("name", LAYERS)
def test_self_attention(name: str) -> None:
    agree(built(32, 4, **LAYERS[name]), sample(2, 9, 32), None, CAUSAL, mask=qkv.causal())


@pytest.mark.parametrize("name", ["MHA", "sizes", "qk_norm", "gate", "sinks"])
def test_cross_attention(name: str) -> None:
    layer = built(32, 4, context_dim=20, **LAYERS[name])
    agree(layer, sample(2, 5, 32), sample(2, 7, 20, seed=1), everything(2, 5, 7))


@pytest.mark.parametrize(
    ("positions", "offset"),
    [("start", 0), ("end", 2), (1, 1), (torch.arange(3, 8), 3)],
    ids=["start", "end", "int", "tensor"],
)
def test_cross_attention_with_positions(positions: Any, offset: int) -> None:
    """Rotary and mask read the same positions; the context stands on 0 .. Lk - 1."""
    layer = built(32, 4, rotary=Rotary(8, 50.0), mask=qkv.causal())
    seen = torch.tensor([[[j <= i + offset for j in range(7)] for i in range(5)]] * 2)
    at = [range(offset, offset + 5)] * 2
    agree(layer, sample(2, 5, 32), sample(2, 7, 32, seed=1), seen, at, positions=positions)


MASKS = {
    "window": (qkv.sliding_window(3), lambda b, i, j: i - 3 < j <= i),
    "padding": (qkv.padding([9, 4]), lambda b, i, j: j < (9, 4)[b]),
    "documents": (
        qkv.documents([2, 4, 3]) & qkv.causal(),
        lambda b, i, j: j <= i and (i >= 2) == (j >= 2) and (i >= 6) == (j >= 6),
    ),
    "none": (qkv.padding([9, 0]), lambda b, i, j: b == 0),
}


@pytest.mark.parametrize("where", ["layer", "call", "both"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_layer_and_call(name: str, where: str) -> None:
    mask, predicate = MASKS[name]
    seen = torch.tensor([[[predicate(b, i, j) for j in range(9)] for i in range(9)] for b in range(2)])
    own, given = {"layer": (mask, None), "call": (None, mask), "both": (qkv.causal(), mask)}[where]
    if where == "both":
        seen &= CAUSAL
    layer = built(32, 4, rotary=Rotary(8, 50.0), bias=True, mask=own)
    close(layer(sample(2, 9, 32), mask=given), definition(layer, sample(2, 9, 32), sample(2, 9, 32), seen))
    as_tensor = layer(sample(2, 9, 32), mask=seen[:, None])  # a bool tensor means the same, and is combined as well
    close(layer(sample(2, 9, 32), mask=given), as_tensor)


def test_packed_documents_are_separate_sequences() -> None:
    """Each with its own positions, or with those of the row: rotary sees distances only."""
    layer = built(32, 4, num_kv_heads=2, rotary=Rotary(8, 50.0), qk_norm=True, mask=qkv.causal())
    x, lengths = sample(1, 11, 32), [4, 1, 6]
    alone = torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1)
    own = torch.cat([torch.arange(n) for n in lengths])
    for positions in (None, own, own[None], 1000):
        close(layer(x, mask=qkv.documents(lengths), positions=positions), alone, 1e-10)
    assert (layer(x) - alone).abs().max() > 1e-3


def test_positions_of_each_batch_row() -> None:
    layer = built(32, 4, rotary=Rotary(8, 50.0))
    positions = torch.tensor([[5, 0, 2, 40, 7, 8, 1, 1, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    agree(layer, sample(2, 9, 32), None, CAUSAL, positions, positions, mask=qkv.causal(), positions=positions)
    close(layer(sample(2, 9, 32))[1], layer(sample(2, 9, 32), positions=positions)[1])
    assert (layer(sample(2, 9, 32)) - layer(sample(2, 9, 32), positions=positions))[0].abs().max() > 1e-3


def test_scaled_rotary() -> None:
    """YaRN's attention factor is on queries and keys: scores grow by its square."""
    scaling = YaRN(16.0, 8)
    rotary = Rotary(8, 50.0, scaling=scaling)
    layer, x = built(32, 4, rotary=rotary), sample(2, 9, 32)
    q, k, _ = layer.project(x)
    turned = [Rotary(8, 50.0, scaling=YaRN(16.0, 8, attention_factor=1.0)).rotate(z) for z in _heads(layer, x)]
    close(q, turned[0] * (0.1 * math.log(16) + 1))
    close(k, turned[1] * (0.1 * math.log(16) + 1))


@pytest.mark.parametrize(("at", "length"), [("start", 9), ("end", 9), (30, 35), (torch.arange(40, 45), 45)])
def test_queries_and_keys_share_frequencies_that_depend_on_length(at: Any, length: int) -> None:
    """The sequence ends with the last key or the last query, whichever is later."""
    rotary = Rotary(8, 50.0, scaling=DynamicNTK(3.0, 4))
    layer, x, y = built(32, 4, rotary=rotary), sample(2, 5, 32), sample(2, 9, 32, seed=1)
    q, k, _ = layer.project(x, y, positions=at)
    start = {"start": 0, "end": 4}.get(at, at) if isinstance(at, str) else at
    for got, heads, positions in ((q, _heads(layer, x)[0], start), (k, _heads(layer, y)[1], 0)):
        close(got, rotary.apply(heads, *rotary.tables(positions, heads.shape[2], length=length, dtype=torch.float64)))
    assert not torch.equal(k, rotary.rotate(_heads(layer, y)[1])) or length == 9


def _heads(layer: Attention, x: Tensor) -> list[Tensor]:
    return [p(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)]


def test_project_gives_what_forward_attends_with() -> None:
    layer, x = built(32, 4, **LAYERS["all"]), sample(2, 9, 32)
    q, k, v = layer.project(x, positions=3)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 9, 6), (2, 2, 9, 6), (2, 2, 9, 5))
    out = qkv.attention(q, k, v, qkv.causal(), scale=0.9, softcap=5.0, sinks=layer.sinks).transpose(1, 2)
    assert layer.gate_proj is not None
    gated = out * layer.gate_proj(x).sigmoid().unflatten(-1, (4, 5))
    close(layer(x, mask=qkv.causal(), positions=3), layer.o_proj(gated.flatten(2)))


# ------------------------------------------------------------------------------------------------ other layers
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torchs_layer(bias: bool) -> None:
    """torch.nn.MultiheadAttention keeps W_Q, W_K, W_V one above another, and its masks are True where hidden."""
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True, dtype=torch.float64)
    ours = Attention(32, 4, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(sample(96, 32, seed=1) / 4)
        state = dict(zip(("q", "k", "v"), theirs.in_proj_weight.split(32), strict=True))
        state = {f"{name}_proj.weight": w for name, w in state.items()} | {"o_proj.weight": theirs.out_proj.weight}
        if bias:
            theirs.in_proj_bias.copy_(sample(96, seed=2))
            biases = zip(("q", "k", "v"), theirs.in_proj_bias.split(32), strict=True)
            state |= {f"{name}_proj.bias": b for name, b in biases} | {"o_proj.bias": theirs.out_proj.bias}
        ours.load_state_dict(state)
    x, y = sample(2, 9, 32).requires_grad_(), sample(2, 7, 32, seed=3)
    padded = torch.arange(7) >= torch.tensor([[7], [3]])
    for got, want in (
        (ours(x, y), theirs(x, y, y)[0]),
        (ours(x, mask=qkv.causal()), theirs(x, x, x, attn_mask=~CAUSAL[0], is_causal=False)[0]),
        (ours(x, y, mask=qkv.padding([7, 3])), theirs(x, y, y, key_padding_mask=padded)[0]),
    ):
        close(got, want)
        cotangent = sample(*got.shape, seed=4)
        close(torch.autograd.grad(got, x, cotangent)[0], torch.autograd.grad(want, x, cotangent)[0])


def test_grouped_heads_are_repeated_heads() -> None:
    few, many = built(32, 4, num_kv_heads=2, rotary=Rotary(8)), built(32, 4, rotary=Rotary(8), seed=1)
    state = few.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    x = sample(2, 9, 32)
    close(few(x, mask=qkv.causal()), many(x, mask=qkv.causal()))


def _llama(**extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        **extra,
    }


def _theirs(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """transformers' layer, its rotary module, and how ours is built to be the same."""
    common: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 16, "rotary": Rotary(16, 100.0)}
    if kind == "llama":
        from transformers.models.llama import modeling_llama as llama

        config = llama.LlamaConfig(**_llama())
        return llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config), common
    if kind == "qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as qwen3

        config = qwen3.Qwen3Config(**_llama())
        return qwen3.Qwen3Attention(config, 0), qwen3.Qwen3RotaryEmbedding(config), common | {"qk_norm": True}
    from transformers.models.gpt_oss import modeling_gpt_oss as oss

    config = oss.GptOssConfig(**_llama(sliding_window=4, layer_types=["sliding_attention"], num_hidden_layers=1))
    ours = common | {"bias": True, "sinks": True, "mask": qkv.sliding_window(4)}
    return oss.GptOssAttention(config, 0), oss.GptOssRotaryEmbedding(config), ours


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_oss"])
def test_weights_of_transformers_load_as_they_are(kind: str) -> None:
    theirs, embedding, options = _theirs(kind)
    layer = built(64, 4, **options)
    theirs.double().eval().load_state_dict(layer.state_dict())  # strict: the same names and shapes
    x, positions = sample(2, 9, 64), torch.arange(9)[None]
    hidden = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            if j > i or (kind == "gpt_oss" and j <= i - 4):
                hidden[0, 0, i, j] = torch.finfo(torch.float64).min
    want = theirs(x, embedding(x, positions), hidden)[0]
    close(layer(x, mask=qkv.causal()), want, 1e-5)  # theirs computes angles, norms and softmax in float32
