"""Latent attention: against its definition in float64, one form against the other, and against transformers' layers."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.nn import LatentAttention, layer as nn_layer
from qkv.rotary import Rotary, YaRN
from tests.kit.layers import CLOSE, close, sample, turn

pytestmark = pytest.mark.usefixtures("one_thread")

# All sizes differ, so that no two can be taken for each other.
SIZES: dict[str, Any] = {
    "q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7,
}  # fmt: skip


def built(dim: int = 24, num_heads: int = 3, seed: int = 0, **options: Any) -> LatentAttention:
    """A float64 layer with sharp scores, whose every parameter is random."""
    layer = LatentAttention(dim, num_heads, **{**SIZES, "dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            gain = 3.0 if name in ("q_proj.weight", "q_b_proj.weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size * gain)
    return layer


def definition(layer: LatentAttention, x: Tensor, seen: Tensor, p: Any = None) -> Tensor:
    """Equations 37 to 47 of DeepSeek-V2's paper, a head and a query at a time; seen (B, L, L)."""
    w = dict(layer.named_parameters())
    R, dn, dr, dv = layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim

    def linear(name: str, z: Tensor) -> Tensor:
        return torch.einsum("lc,oc->lo", z, w[f"{name}.weight"]) + w.get(f"{name}.bias", torch.zeros(()))

    def normed(name: str, z: Tensor) -> Tensor:
        return z / ((z * z).sum(-1, keepdim=True) / z.shape[-1] + 1e-6).sqrt() * w[f"{name}.weight"]

    rows = []
    for b in range(len(x)):
        at = range(x.shape[1]) if p is None else p[b]
        if layer.q_lora_rank is None:
            q = linear("q_proj", x[b])
        else:
            q = linear("q_b_proj", normed("q_a_layernorm", linear("q_a_proj", x[b])))
        compressed = linear("kv_a_proj_with_mqa", x[b])
        c, k_rope = normed("kv_a_layernorm", compressed[:, :R]), turn(compressed[:, R:], layer.rotary, at)
        up = linear("kv_b_proj", c)
        heads = []
        for h in range(layer.num_heads):
            qh = q[:, h * (dn + dr) : (h + 1) * (dn + dr)]
            q_rope = turn(qh[:, dn:], layer.rotary, at)
            kh, vh = up[:, h * (dn + dv) :][:, :dn], up[:, h * (dn + dv) + dn :][:, :dv]
            outs = []
            for i in range(x.shape[1]):
                j = seen[b, i].nonzero()[:, 0]
                s = (kh[j] @ qh[i, :dn] + k_rope[j] @ q_rope[i]) * (layer.scale or 1 / math.sqrt(dn + dr))
                if layer.softcap is not None:
                    s = layer.softcap * torch.tanh(s / layer.softcap)
                outs.append(s.softmax(0) @ vh[j] if len(j) else torch.zeros(dv, dtype=torch.float64))
            heads.append(torch.stack(outs))
        rows.append(linear("o_proj", torch.cat(heads, dim=1)))
    return torch.stack(rows)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no query compression": {"q_lora_rank": None},
    "bias": {"bias": True, "v_head_dim": 3},
    "halves": {"rotary": Rotary(4, 30.0)},
    "scores": {"scale": 0.6, "softcap": 4.0, "rotary": Rotary(4, 30.0, interleaved=True)},
}
CAUSAL = torch.tensor([[[j <= i for j in range(8)] for i in range(8)]] * 2)


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_against_the_definition(name: str, absorb: bool) -> None:
    """Outputs and the gradients of x and every parameter, for a random cotangent."""
    layer, x = built(**LAYERS[name], absorb=absorb, mask=qkv.causal()), sample(2, 8, 24).requires_grad_()
    got, want = layer(x), definition(layer, x, CAUSAL)
    close(got, want)
    leaves, cotangent = [x, *layer.parameters()], sample(*got.shape, seed=9)
    pairs = zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True)
    for n, (g, w) in zip(["x", *dict(layer.named_parameters())], pairs, strict=True):
        assert w.abs().max() > 1e-6, f"{n} is not tested"
        close(g, w, 20 * CLOSE)


MASKS = {
    "window": (qkv.sliding_window(3), lambda b, i, j: i - 3 < j <= i),
    "padding": (qkv.padding([8, 3]), lambda b, i, j: j < (8, 3)[b]),
    "documents": (qkv.documents([3, 5]) & qkv.causal(), lambda b, i, j: j <= i and (i >= 3) == (j >= 3)),
    "empty rows": (qkv.padding([8, 0]), lambda b, i, j: b == 0),
}


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_layer_and_call(name: str, absorb: bool) -> None:
    mask, predicate = MASKS[name]
    seen = torch.tensor([[[predicate(b, i, j) for j in range(8)] for i in range(8)] for b in range(2)])
    x, layer = sample(2, 8, 24), built(absorb=absorb)
    close(layer(x, mask=mask), definition(layer, x, seen))
    close(layer(x, mask=seen[:, None]), definition(layer, x, seen))
    layer.mask = mask
    close(layer(x), definition(layer, x, seen))
    close(layer(x, mask=qkv.causal()), definition(layer, x, seen & CAUSAL))


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
def test_positions(absorb: bool) -> None:
    layer, x = built(absorb=absorb, mask=qkv.causal(), rotary=Rotary(4, 30.0, interleaved=True)), sample(2, 8, 24)
    own = torch.tensor([[0, 5, 1, 1, 9, 40, 3, 2], [7, 6, 5, 4, 3, 2, 1, 0]])
    close(layer(x, positions=own), definition(layer, x, CAUSAL, own))
    close(layer(x, positions=own[1]), definition(layer, x, CAUSAL, own[[1, 1]]))
    close(layer(x, positions=500), layer(x), 1e-11)  # distances only; angles of 500 rounded
    assert (layer(x, positions=own) - layer(x)).abs().max() > 1e-3


def test_the_absorbed_form_is_one_head_over_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches attention(): R + dr numbers a token, values that are the keys' own memory, the unabsorbed scale."""
    calls: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((q, k, v, options))
        return qkv.attention(q, k, v, *args, **options)

    monkeypatch.setattr(nn_layer, "attention", spy)
    x = sample(2, 8, 24)
    for absorb in (False, True):
        built(absorb=absorb)(x)
    (q, k, v, options), (q2, k2, v2, options2) = calls
    assert (q.shape, k.shape, v.shape) == ((2, 3, 8, 9), (2, 3, 8, 9), (2, 3, 8, 7))
    assert (q2.shape, k2.shape, v2.shape) == ((2, 3, 8, 14), (2, 1, 8, 14), (2, 1, 8, 10))
    assert v2.data_ptr() == k2.data_ptr()
    assert v2.stride() == k2.stride()
    assert options["scale"] == options2["scale"] == 1 / 3
    assert torch.equal(k2, built().latent(x))


@pytest.mark.parametrize(("rank", "absorbed"), [(512, False), (10, False), (5, True)])
def test_by_itself_it_takes_the_cheaper_form(rank: int, absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 R + dr against dn + dr + dv numbers a pair: of dn = 5 and dv = 7, R = 5 is the smaller."""
    heads = []
    monkeypatch.setattr(
        nn_layer, "attention", lambda q, k, v, *_, **__: heads.append(k.shape[1]) or q[..., : v.shape[-1]]
    )
    for absorb in (None, True, False):
        layer = LatentAttention(24, 3, **{**SIZES, "kv_lora_rank": rank}, absorb=absorb)
        assert layer(sample(1, 4, 24, dtype=torch.float32)).shape == (1, 4, 24)
    assert heads == [1 if absorbed else 3, 1, 3]


# ------------------------------------------------------------------------------------------- transformers' layers
ROPES: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({"rope_type": "default"}, None),
    "yarn": (
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0,
            "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1,
        },
        YaRN(40.0, 64, mscale=1.0, mscale_all_dim=0.8),
    ),
}  # fmt: skip


def _theirs(version: int, rope: str, q_lora_rank: int | None, bias: bool) -> tuple[Any, Any]:
    """transformers' layer and its rotary module."""
    options: dict[str, Any] = {
        "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": q_lora_rank,
        "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 7, "attention_bias": bias,
        "attn_implementation": "eager", "rope_parameters": {"rope_theta": 100.0, **ROPES[rope][0]},
        "max_position_embeddings": 2560,
    }  # fmt: skip
    if version == 2:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2

        config = v2.DeepseekV2Config(**options)
        return v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    config = v3.DeepseekV3Config(**options)
    return v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("q_lora_rank", [14, None])
@pytest.mark.parametrize("version", [2, 3])
def test_weights_of_deepseek_load_as_they_are(version: int, q_lora_rank: int | None, rope: str, absorb: bool) -> None:
    bias = q_lora_rank is not None
    theirs, embedding = _theirs(version, rope, q_lora_rank, bias)
    layer = built(
        48, q_lora_rank=q_lora_rank, qk_nope_head_dim=6, qk_rope_head_dim=8, absorb=absorb, bias=bias,
        rotary=Rotary(8, 100.0, interleaved=True, scaling=ROPES[rope][1]), mask=qkv.causal(),
    )  # fmt: skip
    theirs.double().eval().load_state_dict(layer.state_dict())  # strict: the same names and shapes
    x, positions = sample(2, 9, 48), torch.arange(30, 39)[None]
    hidden = torch.full((9, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    want = theirs(hidden_states=x, attention_mask=hidden[None, None], position_embeddings=embedding(x, positions))[0]
    close(layer(x, positions=positions), want, 2e-5)  # theirs computes angles, norms and softmax in float32


def test_the_scale_of_yarn() -> None:
    """DeepSeek multiplies the softmax scale by mscale_all_dim's factor, squared; without it nothing changes."""
    x = sample(1, 8, 24)
    for scaling, scale in (
        (YaRN(40.0, 64, mscale=1.0, mscale_all_dim=0.8), (0.1 * 0.8 * math.log(40) + 1) ** 2 / 3),
        (YaRN(40.0, 64), 1 / 3),
    ):
        rotary = Rotary(4, interleaved=True, scaling=scaling)
        close(built(rotary=rotary)(x), built(rotary=rotary, scale=scale)(x))


# --------------------------------------------------------------------------------------------------- as a module
def test_names_and_shapes_of_the_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in LatentAttention(24, 3, **SIZES, bias=True).named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (14, 24), "q_a_proj.bias": (14,), "q_a_layernorm.weight": (14,), "q_b_proj.weight": (27, 14),
        "kv_a_proj_with_mqa.weight": (14, 24), "kv_a_proj_with_mqa.bias": (14,), "kv_a_layernorm.weight": (10,),
        "kv_b_proj.weight": (36, 10), "o_proj.weight": (24, 21), "o_proj.bias": (24,),
    }  # fmt: skip
    assert "q_proj.weight" in LatentAttention(24, 3, **{**SIZES, "q_lora_rank": None}).state_dict()


def test_copies_pickles_and_state_dicts() -> None:
    layer, x = built(mask=qkv.sliding_window(3), bias=True), sample(2, 8, 24)
    want = layer(x)
    fresh = LatentAttention(24, 3, **SIZES, bias=True, mask=layer.mask, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.kv_b_proj.weight.zero_()
    assert torch.equal(layer(x), want)


def test_built_on_the_meta_device() -> None:
    layer = LatentAttention(24, 3, **SIZES, bias=True, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.kv_a_layernorm.weight, torch.ones(10))
    assert layer(sample(2, 8, 24, dtype=torch.float32)).isfinite().all()
    empty, source = LatentAttention(24, 3, **SIZES, device="meta"), built()
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(sample(2, 8, 24)), source(sample(2, 8, 24)))


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, absorb: bool) -> None:
    """A half result has some 40 roundings."""
    layer, x = built(absorb=absorb, mask=qkv.causal()), sample(2, 8, 24)
    want = layer(x)
    moved = copy.deepcopy(layer).to(dtype)
    got = moved(x.to(dtype))
    assert got.dtype == dtype
    close(got.double(), want, 60 * torch.finfo(dtype).eps)
    got.backward(sample(*got.shape, seed=1, dtype=dtype))
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in moved.parameters())


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
def test_autocast(absorb: bool) -> None:
    layer, x = built(absorb=absorb, mask=qkv.causal()).float(), sample(2, 8, 24, dtype=torch.float32)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    close(got.float(), want, 60 * torch.finfo(torch.bfloat16).eps)
    got.backward(sample(*got.shape, seed=1, dtype=torch.bfloat16))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
def test_activation_checkpointing(absorb: bool) -> None:
    layer = built(absorb=absorb, dropout_p=0.4, mask=qkv.causal())
    found = []
    for wrapped in (False, True):
        x = sample(2, 8, 24).requires_grad_()
        torch.manual_seed(5)
        out = checkpoint(layer, x, use_reentrant=False) if wrapped else layer(x)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], sample(*out.shape, seed=1))])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
    assert not torch.equal(found[0][0], layer.eval()(sample(2, 8, 24)))


def test_the_two_forms_drop_the_same_weights() -> None:
    """The same seed drops the same (row, head, query, key), whatever the heads of keys."""
    x = sample(2, 8, 24)
    torch.manual_seed(5)
    materialised = built(dropout_p=0.4, absorb=False)(x)
    torch.manual_seed(5)
    close(built(dropout_p=0.4, absorb=True)(x), materialised)


def test_empty_sizes() -> None:
    for absorb in (False, True):
        layer = built(absorb=absorb)
        assert layer(sample(0, 8, 24)).shape == (0, 8, 24)
        assert layer(sample(2, 0, 24)).shape == (2, 0, 24)


def test_repr_says_what_the_layer_is() -> None:
    text = repr(LatentAttention(24, 3, **SIZES, mask=qkv.causal(), dropout_p=0.1))
    for part in ("kv_lora_rank=10", "Rotary(dim=4", "interleaved=True", "mask=causal()", "dropout_p=0.1"):
        assert part in text


def given(**options: Any) -> LatentAttention:
    return LatentAttention(24, 3, **{**SIZES, **options})


x = torch.zeros(2, 5, 24)


@pytest.mark.parametrize(
    ("kind", "text", "make"),
    [
        (ArgumentError, "kv_lora_rank must be an integer >= 1", lambda: given(kv_lora_rank=0)),
        (ArgumentTypeError, "q_lora_rank must be an integer", lambda: given(q_lora_rank="none")),
        (ArgumentError, "qk_rope_head_dim must be an integer >= 2", lambda: given(qk_rope_head_dim=0)),
        (ArgumentError, "dim must be even", lambda: given(qk_rope_head_dim=3)),
        (ArgumentError, "rotary.dim=8 and qk_rope_head_dim=4", lambda: given(rotary=Rotary(8))),
        (ArgumentTypeError, "rotary must be a Rotary", lambda: given(rotary=False)),
        (ArgumentError, "absorb is a bool", lambda: given(absorb="auto")),
        (ArgumentTypeError, "mask", lambda: given(mask=3)),
        (ShapeError, r"x must be \(B, L, dim\)", lambda: given()(x[..., :8])),
        (ShapeError, "positions must be", lambda: given()(x, positions=torch.zeros(4).long())),
        (ArgumentTypeError, "positions must be", lambda: given()(x, positions="end")),
        (ArgumentTypeError, r"Pass step\.layer\(i\)", lambda: given()(x, cache={})),
        (ArgumentError, "dropout_p", lambda: given(dropout_p=1.0)(x)),
    ],
)
def test_errors(kind: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(kind, match=text) as error:
        make()
    assert str(error.value).startswith("qkv.")
