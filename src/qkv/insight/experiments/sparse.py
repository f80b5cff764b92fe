"""What is saved and what is lost where a token sees a few others only."""

from __future__ import annotations

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import number, table
from qkv.masks import Mask, bigbird, causal, global_tokens, sliding_window, window
from qkv.probabilities import weights

LENGTH, WINDOW, BLOCK = 512, 64, 16
FAR = 40  # the token that the last one looks for: outside of its window, and not a global one
QUESTION = "What is lost if a token sees a few others only?"
SOURCES = (
    "Longformer: arxiv.org/abs/2004.05150; BigBird: arxiv.org/abs/2007.14062; Mistral: arxiv.org/abs/2310.06825",
)


def run(seed: int) -> Answer:
    """Look for a far token with four masks, count pairs, and count the layers that news of it needs."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, LENGTH, 64, generator=rng, dtype=torch.float64)
    q[0, 0, -1] = 3 * k[0, 0, FAR]  # the last token's question fits the far one
    near = window(WINDOW, WINDOW)
    masks: dict[str, Mask] = {
        "everything": window(None, None),
        "window of 64 each side": near,
        "window + 4 global": near | global_tokens([0, 1, 2, 3]),
        "BigBird, random too": bigbird(BLOCK, 3, 1, 3, seed=seed),
        "causal window": causal() & sliding_window(WINDOW + 1),
        "causal window + 4 global": causal() & (near | global_tokens([0, 1, 2, 3])),
    }
    pairs, found, hops = [], [], []
    for mask in masks.values():
        seen = mask.tensor(LENGTH, LENGTH)[0, 0]
        pairs.append(int(seen.sum()))
        found.append(weights(q, k, rows=[-1], mask=mask)[0, 0, 0, FAR].item())
        hops.append(_hops(seen))
    through = _through(near, hops[1], rng)
    numbers: dict[str, Measured] = {
        "pairs scored": tuple(pairs),
        "weight on the far one": tuple(found),
        "layers until it arrives": tuple(hops),
        "estimate for the window, distance / 64 rounded up": -(-(LENGTH - 1 - FAR) // WINDOW),
        "window: gradient from it to the last, those layers": through[0],
        "window: gradient from it to the last, one layer fewer": through[1],
    }
    rows = [["512 tokens", "pairs", "of all", "weight on it", "layers to it"]]
    for name, n, w, h in zip(masks, pairs, found, hops, strict=True):
        rows.append([name, number(n), f"{n / pairs[0]:.0%}", number(w), number(h)])
    exact = through[1] == 0 < through[0]
    verdict = prose(f"""
        A window scores {pairs[1] / pairs[0]:.0%} of the pairs here, and n × {2 * WINDOW + 1} instead of n² as texts
        grow. Token {FAR}, which fits the last token's question, lies outside: weight {number(found[1])} (everything:
        {number(found[0])}). The softmax is exact over what is seen; nothing stands for the rest. News still travels, a
        window a layer: {number(hops[1])} layers
        ({"one fewer passes no gradient at all" if exact else "the gradient does not confirm it"}), mixed with all that
        is on the way. Global tokens, seen by all and seeing all, make it {number(hops[2])}, random blocks
        {number(hops[3])}; under a causal mask they read only what came before them: {number(hops[5])}
        instead of {number(hops[4])}. Models mix layers: windows for most, full attention for some.
        """)
    lost = found[1] == 0 < found[0]
    short = "What it cannot see has weight 0, exactly; news of it needs one layer a window."
    if not lost:
        short = "Nothing was lost here: the far token was seen, or did not fit."
    return Answer("sparse", QUESTION, numbers, table(rows, "<>>>>"), verdict, SOURCES, short=short)


def _hops(seen: torch.Tensor) -> int:
    """Layers until something of token FAR is in the last token: each sees what its keys held a layer before."""
    holds = torch.zeros(LENGTH, dtype=torch.bool)
    holds[FAR] = True
    for layer in range(1, LENGTH):
        holds = (seen & holds).any(-1) | holds
        if holds[-1]:
            return layer
    return LENGTH


def _through(mask: Mask, layers: int, rng: torch.Generator) -> tuple[float, float]:
    """The size of d (last token) / d (token FAR) after that many layers of attention, and after one fewer."""
    x = torch.randn(1, 1, LENGTH, 8, generator=rng, dtype=torch.float64)
    sizes = []
    for depth in (layers, layers - 1):
        first = x.clone().requires_grad_()
        y = first
        for _ in range(depth):
            y = attention(y, y, y, mask=mask)
        slope = torch.autograd.grad(y[0, 0, -1].sum(), first)[0] if depth else torch.zeros_like(x)
        sizes.append(slope[0, 0, FAR].norm().item())
    return sizes[0], sizes[1]
