"""What a layer of attention costs: its projections and its pairs, counted, and the length at which they are equal."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.masks import causal
from qkv.nn import Attention

WIDTH, HEADS, LENGTHS = 64, 4, (32, 64, 128, 256, 512)
REAL, LONG = 4096, 100_000  # the width of a model that people run, and a long text
QUESTION = "What does a layer cost: is it the n² of attention?"
SOURCES = ("Kaplan et al. 2020, section 2.1 (counts), arxiv.org/abs/2001.08361",)


def run(seed: int) -> Answer:
    """Count the FLOPs of a small layer at five lengths, with everything visible and with a causal mask."""
    rng = torch.Generator().manual_seed(seed)
    layer = Attention(WIDTH, HEADS, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng, dtype=weight.dtype) / WIDTH**0.5)
    projections, pairs, masked = [], [], []
    for n in LENGTHS:
        x = torch.randn(1, n, WIDTH, generator=rng, dtype=torch.float32)
        whole, half = _counted(layer, x, None), _counted(layer, x, causal())
        own = 8 * n * WIDTH**2  # q, k, v and the output: 4 products of x with a matrix, 2 FLOPs a weight
        projections.append(own)
        pairs.append(whole - own)
        masked.append(half - own)
    equal = 2 * WIDTH
    numbers: dict[str, Measured] = {
        "tokens": LENGTHS,
        "projections, FLOPs": tuple(projections),
        "pairs, all visible": tuple(pairs),
        "pairs, causal": tuple(masked),
        "4 n² d": tuple(4 * n * n * WIDTH for n in LENGTHS),
        "tokens at which pairs cost as much, all visible": equal,
        "the same, a layer 4,096 wide": 2 * REAL,
        "the same, causal": 4 * REAL,
        "weights of a head, 100,000 tokens, bytes in float32": LONG * LONG * 4,
    }
    lines = [f"{'tokens':>6}  {'pairs, share of all FLOPs of the layer (width 64)':<50}  causal"]
    for n, own, all_, half in zip(LENGTHS, projections, pairs, masked, strict=True):
        share, part = all_ / (all_ + own), half / (half + own)
        lines.append(f"{n:>6}  {bar(share, 40)} {share:>7.0%}  {part:>8.0%}")
    exact = all(found == 4 * n * n * WIDTH for found, n in zip(pairs, LENGTHS, strict=True))
    growth = pairs[-1] / pairs[-2]
    verdict = prose(f"""
        Twice the text is {number(growth)} times the pairs, and twice the projections. Projections cost 8 n d² FLOPs,
        pairs 4 n² d ({"counted: exactly" if exact else "counted: not exactly"}), so they are equal at n = 2 d, here
        {equal} tokens ({pairs[2] / (pairs[2] + projections[2]):.0%} of the layer), and {number(2 * REAL)} in a layer
        {number(REAL)} wide; a causal mask halves the pairs, which doubles that. Below it n² is not what a layer costs
        (the usual feed-forward layer beside it costs twice the projections again). Memory is another matter:
        kept whole, weights are {number(LONG * LONG * 4 / 1e9)} GB a head for {number(LONG)} tokens in float32, and
        need not be (qkv why flash).
        """)
    short = f"Only beyond n = 2 d tokens, {number(2 * REAL)} at width {number(REAL)}: below, projections cost more."
    if not exact:
        short = "The FLOPs counted here are not 4 n² d: see the numbers."
    return Answer("cost", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _counted(layer: Attention, x: torch.Tensor, mask: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x, mask=mask)  # type: ignore[arg-type]
    return int(counter.get_total_flops())
