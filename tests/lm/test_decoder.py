"""The decoder of `qkv train` and its ablations, row by row in float64 NumPy, written here from the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import qkv
from qkv.errors import ArgumentError
from qkv.lm import training
from qkv.lm.decoder import KINDS, PLAIN, Config, Decoder, attention_layer
from qkv.lm.variants import ABLATIONS, AblatedAttention, Ablation
from tests.kit.training import TINY, corpus, letters

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]

Array = NDArray[np.float64]


# ---- attention with one thing changed, against its definition


def rotated(x: Array, dim: int) -> Array:
    """Turn the pair (i, i + dim/2) of row p by p * 10000^(-2i/dim)."""
    out: Array = x.copy()
    for p in range(len(x)):
        for i in range(dim // 2):
            angle = p * 10000.0 ** (-2 * i / dim)
            a, b = x[p, i], x[p, i + dim // 2]
            out[p, i] = a * math.cos(angle) - b * math.sin(angle)
            out[p, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def judged(x: Array, weights: dict[str, Array], heads: int, name: str) -> Array:
    """One (L, dim) row of the batch, by the words of the ablation's name; "mha" changes nothing."""
    length, dim = x.shape
    heads = 1 if name == "one-head" else heads
    size = dim // heads
    outs = []
    for h in range(heads):
        mine = slice(h * size, (h + 1) * size)
        if name == "folded-qk":
            q, k = rotated(x @ weights["q_proj.weight"][h * dim : (h + 1) * dim].T, dim), rotated(x, dim)
        else:
            w_k = weights["q_proj.weight" if name.startswith("shared-qk") else "k_proj.weight"]
            q, k = rotated(x @ weights["q_proj.weight"][mine].T, size), rotated(x @ w_k[mine].T, size)
        v = x if name == "v-is-x-whole" else x[:, mine]
        if "v_proj.weight" in weights:
            v = x @ weights["v_proj.weight"][mine].T
        scale = {"scale-1": 1.0, "scale-1/d": 1 / size}.get(name, 1 / math.sqrt(q.shape[1]))
        out = np.zeros((length, v.shape[1]))
        for p in range(length):
            seen = [j for j in range(p + 1) if not (name == "shared-qk-no-self" and j == p)]
            if seen:
                scores = scale * (k[seen] @ q[p])
                weight = np.exp(scores - scores.max())
                out[p] = weight @ v[seen] / weight.sum()
        outs.append(out)
    joined: Array = np.concatenate(outs, axis=1) @ weights["o_proj.weight"].T
    return joined


@pytest.mark.parametrize("name", ["mha", *ABLATIONS])
def test_an_ablation_is_what_its_name_says(name: str) -> None:
    torch.manual_seed(3)
    ablation = ABLATIONS.get(name, Ablation("nothing"))
    layer = AblatedAttention(24, 2, ablation).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # scores of several units: a wrong scale or mask shows
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    got = layer(x, mask=qkv.causal()).detach().numpy()
    weights = {key: value.numpy() for key, value in layer.state_dict().items()}
    want = np.stack([judged(row.numpy(), weights, 2, name) for row in x])
    # float64 throughout: a few hundred roundings of numbers up to |want|
    assert abs(got - want).max() < 1e-12 * (1 + abs(want).max())
    if name == "shared-qk-no-self":
        assert not got[:, 0].any()


def test_with_nothing_changed_it_is_the_layer_of_the_library() -> None:
    torch.manual_seed(4)
    plain = AblatedAttention(32, 4, Ablation("nothing")).double()
    layer = qkv.nn.Attention(32, 4, rotary=qkv.rotary.Rotary(8)).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    assert torch.allclose(plain(x, mask=qkv.causal()), layer(x, mask=qkv.causal()), rtol=0, atol=1e-13)


# ---- the decoder


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_is_its_formula(tied: bool) -> None:
    config = Config(tied=tied, **TINY)
    model = Decoder(config, seed=5).double()
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    tokens = np.frombuffer(letters(13, 5), dtype=np.uint8)

    def norm(x: Array, name: str) -> Array:
        eps = np.finfo(np.float64).eps
        return np.asarray(x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weights[f"{name}.weight"])

    x = weights["embedding.weight"][tokens] * math.sqrt(32)
    for n in range(2):
        own = {key[len(f"blocks.{n}.attention.") :]: w for key, w in weights.items() if f"blocks.{n}.attention." in key}
        x = x + judged(norm(x, f"blocks.{n}.before_attention"), own, 2, "mha") / 2
        into = norm(x, f"blocks.{n}.before_mlp") @ weights[f"blocks.{n}.mlp.into.weight"].T
        gate, up = np.split(into, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"blocks.{n}.mlp.down.weight"].T / 2
    x = norm(x, "norm") / (math.sqrt(32) if tied else 1)
    want = x @ weights["embedding.weight" if tied else "head.weight"].T
    got = model(torch.from_numpy(tokens.astype(np.int64))[None])[0].detach().numpy()
    assert abs(got - want).max() < 1e-11 * abs(want).max()
    # and the bits of a text are the mean of -log2 p over its bytes after the first
    logp = want - np.log(np.exp(want).sum(1, keepdims=True))
    bits = -logp[np.arange(12), tokens[1:]].mean() / math.log(2)
    found = corpus(b"x" * 99, bytes(tokens))
    assert abs(training.held_out_bits(model, found.held_out(4, 32)) - bits) < 1e-10


EVERY_KIND = [(kind, "qkv") for kind in (*KINDS, *ABLATIONS)] + [(kind, "sdpa") for kind in PLAIN]


@pytest.mark.parametrize(("kind", "op"), EVERY_KIND)
def test_a_later_byte_changes_no_bit_before_it(kind: str, op: str) -> None:
    model = Decoder(Config(attention=kind, op=op, **TINY), seed=1)
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(2))
    for at in (0, 1, 17, 29):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 256
        with torch.no_grad():
            before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :at], after[:, :at])
        assert (before[:, at] != after[:, at]).any()
        if at == 0 and kind not in ("window",):  # and what may be seen is: attention is not dead
            assert (before[:, 7] != after[:, 7]).any()


@pytest.mark.parametrize("op", ["qkv", "sdpa"])
def test_a_window_of_8_sees_7_bytes_back(op: str) -> None:
    model = Decoder(Config(attention="window", op=op, **{**TINY, "layers": 1}), seed=1)
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 256
    with torch.no_grad():
        differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(3, 3 + 8))


@pytest.mark.parametrize("kind", [*KINDS, *ABLATIONS])
def test_cached_numbers_are_those_of_the_layers(kind: str) -> None:
    config = Config(attention=kind, **TINY)
    layer: Any = attention_layer(config)
    x = torch.zeros(1, 1, 32)
    if kind == "mla":
        kept = layer.latent(x).shape[-1]
    elif kind in PLAIN:
        kept = sum(t.numel() for t in layer.project(x)[1:])
    else:  # keys of all heads (one of width dim where they are folded) and values (x itself where there is no W_V)
        kept = 32 + 32
    assert config.cached_numbers() == config.layers * kept


@pytest.mark.parametrize(
    "given",
    [
        {"attention": "mhq"},
        {"op": "flash"},
        {"op": "sdpa", "attention": "mla"},
        {"layers": 0},
        {"dim": 36, "heads": 4},
        {"attention": "gqa", "heads": 1},
        {"context": 1.5},
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^qkv train: .*\. Got .*\. "):
        Config(**{**TINY, **given})
