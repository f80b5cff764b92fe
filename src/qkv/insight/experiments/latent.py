"""Latent attention: one short vector a token for all heads, and why it may stay folded."""

from __future__ import annotations

from typing import Any

import torch

from qkv.cache import LatentCache, PagedCache
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.masks import causal
from qkv.nn import LatentAttention

HEADS, RANK, NOPE, ROPE, VALUE = 128, 512, 128, 64, 128  # DeepSeek-V2 and V3
TOKENS = 40
QUESTION = "How can 576 numbers stand for 128 heads' keys and values?"
SOURCES = ("DeepSeek-AI 2024, DeepSeek-V2, section 2.1, arxiv.org/abs/2405.04434",)


def run(seed: int) -> Answer:
    """Compute a small latent layer expanded and absorbed, measure ranks, and count DeepSeek's bytes and FLOPs."""
    rng = torch.Generator().manual_seed(seed)
    layer = _layer(rng)
    x = torch.randn(1, TOKENS, 64, generator=rng, dtype=torch.float64)
    outs = []
    with torch.no_grad():
        for absorb in (False, True):
            layer.absorb = absorb
            outs.append(layer(x))
        latent = layer.latent(x)[0, 0]
        expanded = layer.kv_b_proj(latent[:, : layer.kv_lora_rank])
    apart = (outs[0] - outs[1]).abs().max().item()
    kept = LatentCache(rank=RANK, rope_dim=ROPE, pages=1, dtype=torch.bfloat16).stats().bytes_per_token
    whole = PagedCache(pages=1, num_kv_heads=HEADS, head_dim=NOPE + ROPE, value_dim=VALUE, dtype=torch.bfloat16)
    heads, grouped = whole.stats().bytes_per_token, 2 * 8 * 128 * 2
    numbers: dict[str, Measured] = {
        "numbers a token: latent, rotated key, both": (RANK, ROPE, RANK + ROPE),
        "bytes a token: latent, GQA of 8 × 128, 128 heads": (kept, grouped, heads),
        "times smaller than 128 heads": heads / kept,
        "absorbed differs from expanded by": apart,
        "small layer: rank of all heads' keys and values": int(torch.linalg.matrix_rank(expanded)),
        "small layer: numbers of all heads' keys and values": expanded.shape[1],
        "small layer: numbers of the latent": layer.kv_lora_rank,
        "FLOPs a pair, expanded": 2 * HEADS * (NOPE + ROPE + VALUE),
        "FLOPs a pair, absorbed": 2 * HEADS * (2 * RANK + ROPE),
        "FLOPs to expand one token": 2 * HEADS * RANK * (NOPE + VALUE),
    }
    rank, wide = (numbers[f"small layer: {n} of all heads' keys and values"] for n in ("rank", "numbers"))
    expand, absorb_ = (2 * HEADS * (NOPE + ROPE + VALUE), 2 * HEADS * (2 * RANK + ROPE))
    lines = [
        f"what a cache keeps of a token, {RANK} + {ROPE} = {RANK + ROPE} numbers for all {HEADS} heads:",
        f"[ c: {RANK} numbers, keys and values of every head | k_r: {ROPE}, rotated ]",
        "q_h · k_h = q_h · (W_UK c)  = (W_UKᵀ q_h) · c      and      out_h = W_UV (p c)",
        "            expanded            absorbed: c is key and value of all heads",
        "",
        "bytes a token, bfloat16, a layer",
    ]
    for name, size in (("latent (MLA)", kept), ("8 heads of 128 (GQA)", grouped), (f"{HEADS} heads (MHA)", heads)):
        lines.append(f"  {name:<22} {bar(size, 40, heads)} {number(size)}")
    verdict = prose(f"""
        All heads' keys and values of a token are linear in one latent c of {RANK} numbers, so c is all that is kept,
        with one rotated key of {ROPE} that heads share: {RANK} + {ROPE} = {RANK + ROPE} numbers, {number(kept)} bytes a
        token instead of {number(heads)}, {number(heads / kept)} times less. In a small layer {wide} numbers have rank
        {rank}, the latent's {layer.kv_lora_rank}. Folding W_UK into the query and W_UV into the output never expands
        them: {"the same" if apart < 1e-9 else "not the same"} result (differs by {number(apart)}). It is not less
        arithmetic: {number(absorb_)} FLOPs a pair absorbed, {number(expand)} expanded. Decoding waits for memory, so it
        absorbs; training expands. A rotation between W_UK and q would stop the fold: hence the {ROPE} apart.
        """)
    short = f"All heads are linear in a latent of {RANK}; it and a rotated key of {ROPE} are kept."
    if apart >= 1e-9 or rank != layer.kv_lora_rank:
        short = "Absorbed and expanded do not agree here, which must not happen: see the numbers."
    return Answer("latent", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _layer(rng: torch.Generator) -> LatentAttention:
    """A small layer whose weights come from the experiment's generator, not from torch's."""
    sizes: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    layer = LatentAttention(64, 8, q_lora_rank=None, mask=causal(), device="meta", dtype=torch.float64, **sizes)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            made = torch.randn(weight.shape, generator=rng, dtype=weight.dtype) / weight.shape[-1] ** 0.5
            weight.copy_(torch.ones_like(weight) if "norm" in name else made)
    return layer
