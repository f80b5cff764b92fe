"""The indexer's layer against the attention of transformers' DeepSeek-V3.2 and GLM, with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config, DynamicCache, GlmMoeDsaConfig

import qkv
from qkv.nn import Indexer, LatentAttention
from qkv.rotary import Rotary, YaRN
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()

DIM, HEADS, TOP_K, LENGTH = 64, 4, 7, 40
SIZES: dict[str, Any] = {
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
# With 16 heads no score is exactly 0, as where no head is positive: of equal ones torch.topk takes any.
INDEX = {"index_n_heads": 16, "index_head_dim": 20, "index_topk": TOP_K}
_YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
_PUBLISHED: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    "deepseek_v32": ("deepseek_v32", DeepseekV32Config, False, _PLAIN),
    "deepseek_v32, yarn": ("deepseek_v32", DeepseekV32Config, False, _YARN),
    "deepseek_v32, by default": ("deepseek_v32", DeepseekV32Config, False, _PUBLISHED),
    "glm_moe_dsa": ("glm_moe_dsa", GlmMoeDsaConfig, True, _PLAIN),
}


class Pair:
    """Their layer and ours, with the same random weights, in float64 but where theirs says float32."""

    def __init__(self, case: str, seed: int = 0, **options: Any) -> None:
        self.name, kind, interleaved, rope = CASES[case]
        module = importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        self.config = kind(
            **SIZES, **INDEX, hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=8,
            num_hidden_layers=1, vocab_size=32, rope_parameters=dict(rope), max_position_embeddings=256,
        )  # fmt: skip
        self.config._attn_implementation = "eager"
        prefix = "DeepseekV32" if self.name == "deepseek_v32" else "GlmMoeDsa"
        torch.manual_seed(seed)
        self.theirs = getattr(module, f"{prefix}Attention")(self.config, 0).double().eval()
        self.rotary_emb = getattr(module, f"{prefix}RotaryEmbedding")(self.config).double()
        with torch.no_grad():
            for name, x in self.theirs.named_parameters():
                size = x.shape[-1] ** -0.5 if x.dim() > 1 else 1.0
                x.copy_(torch.randn_like(x) * size * (4.0 if name == "q_b_proj.weight" else 1.0))
        scaling = None
        if rope is _YARN:
            scaling = YaRN(4.0, 16, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.7)
        turn = None if rope is _PUBLISHED else Rotary(8, 100.0, interleaved=interleaved, scaling=scaling)
        indexer = Indexer(
            DIM, INDEX["index_n_heads"], INDEX["index_head_dim"], TOP_K, q_lora_rank=24, rope_dim=8, rotary=turn,
            dtype=torch.float64,
        )  # fmt: skip
        main = None if rope is _PUBLISHED else Rotary(8, 100.0, interleaved=True, scaling=scaling)
        self.ours = LatentAttention(
            DIM, HEADS, **SIZES, rotary=main, mask=qkv.causal(), indexer=indexer, dtype=torch.float64, **options
        ).eval()
        self.ours.load_state_dict(self.theirs.state_dict())

    def wanted(self, x: Tensor, cache: Any = None, start: int = 0, seen: Tensor | None = None) -> Tensor:
        B, L = x.shape[:2]
        at = torch.arange(start, start + L)[None].expand(B, -1)
        if seen is None:
            seen = (torch.arange(start + L) <= at[..., None])[:, None]
        added = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        with torch.no_grad():
            found = self.theirs(x, self.rotary_emb(x, at), added, cache=cache, position_ids=at)
        return found[0]  # type: ignore[no-any-return]


def sample(seed: int, B: int = 2) -> Tensor:
    return torch.randn(B, LENGTH, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("absorb", [False, True], ids=["materialised", "absorbed"])
@pytest.mark.parametrize("case", CASES)
def test_prefill(case: str, absorb: bool) -> None:
    pair = Pair(case, absorb=absorb)
    for seed in range(3):
        x = sample(seed)
        want = pair.wanted(x)
        with torch.no_grad():
            found, plain = pair.ours(x), pair.ours(x, mask=None)
            pair.ours.indexer, kept = None, pair.ours.indexer
            full = pair.ours(x)
            pair.ours.indexer = kept
        assert (found - want).abs().max() < 1e-5, seed
        assert torch.equal(found, plain)
        assert (full - want)[:, TOP_K:].abs().max() > 1e-2  # to attend to everything shows


@pytest.mark.parametrize("case", CASES)
def test_prefill_with_padding(case: str) -> None:
    pair, x = Pair(case, seed=3), sample(5)
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, 25])[:, None]
    seen = (torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None]) & real[:, None, None]
    want = pair.wanted(x, seen=seen)
    with torch.no_grad():
        found = pair.ours(x, mask=qkv.padding([LENGTH, 25]))
    assert (found - want)[real].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["paged", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_decode(case: str, kind: str) -> None:
    """A prompt, then chunks and single tokens, each against their cache."""
    pair, x = Pair(case, seed=1), sample(9)
    sizes: dict[str, Any] = {"pages": 40, "page_size": 4} if kind == "paged" else {"sequences": 2}
    cache = qkv.cache.LatentCache(rank=20, rope_dim=8, index_dim=20, dtype=torch.float64, debug=True, **sizes)
    seqs, theirs, at = [cache.add(), cache.add()], DynamicCache(config=pair.config), 0
    for T in (5, 1, 12, 1, 1, 3, *[1] * 17):
        want = pair.wanted(x[:, at : at + T], theirs, at)
        with torch.inference_mode():
            found = pair.ours(x[:, at : at + T], cache=cache.step(seqs, T=T).layer(0))
        assert (found - want).abs().max() < 1e-5, at
        at += T
    assert at == LENGTH


def test_a_shared_selection() -> None:
    """GLM: a layer without an indexer attends to the keys that the layer before has chosen."""
    pair, x = Pair("glm_moe_dsa", seed=2), sample(4)
    with torch.no_grad():
        out, seen = pair.ours(x, return_mask=True)
        pair.ours.indexer = None
        assert torch.equal(pair.ours(x, mask=seen), out)
        assert (pair.ours(x) - out).abs().max() > 1e-2
