"""Why many heads: what one head cannot return, and what more of them cost."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, bars, one, prose, series
from qkv.insight.given import Given
from qkv.insight.terminal import heatmap, number
from qkv.nn import Attention

ENTRIES, VALUE, SHARP = 16, 16, 40.0
WIDTH, LENGTH, COUNTS = 512, 1024, (1, 8, 64)
ALIKE = 0.1  # total variation below which two heads are called duplicates
QUESTION = "Why many heads, and not one big one?"
SOURCES = (
    "Vaswani et al. 2017, 3.2.2 (with one head averaging inhibits this), arxiv.org/abs/1706.03762",
    "Many can be pruned: Michel et al. 2019, arxiv.org/abs/1905.10650",
)


def run(seed: int) -> Answer:
    """Look two entries up at once with one head and with two, exchange their values, and count what heads cost."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.linalg.qr(torch.randn(ENTRIES, ENTRIES, generator=rng, dtype=torch.float64))[0]
    values = torch.linalg.qr(torch.randn(ENTRIES, VALUE, generator=rng, dtype=torch.float64))[0]
    a, b = torch.randperm(ENTRIES, generator=rng)[:2].tolist()
    wanted = torch.cat([values[a], values[b]])
    swapped = values.clone()
    swapped[[a, b]] = values[[b, a]]
    one = _look([keys[a] + keys[b]], keys, values).repeat(2)  # the one answer, given to both questions
    two = _look([keys[a], keys[b]], keys, values)
    moved = {
        "one head": (_look([keys[a] + keys[b]], keys, swapped).repeat(2) - one).norm().item(),
        "two heads": (_look([keys[a], keys[b]], keys, swapped) - two).norm().item(),
    }
    error = {"one head": (one - wanted).square().sum().item(), "two heads": (two - wanted).square().sum().item()}
    numbers: dict[str, Measured] = {f"squared error of two look-ups, {name}": e for name, e in error.items()}
    numbers |= {f"out moves if the two values change places, {name}": m for name, m in moved.items()}
    numbers["one head: differs from the mean of the two by"] = (one[:VALUE] - (values[a] + values[b]) / 2).norm().item()
    layers = [Attention(WIDTH, h, bias=False, device="meta") for h in COUNTS]
    numbers["heads of a layer"] = COUNTS
    numbers["parameters"] = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    numbers["FLOPs of q·k, 1,024 tokens"] = tuple(2 * h * (WIDTH // h) * LENGTH**2 for h in COUNTS)
    numbers["weights, 1,024 tokens"] = tuple(h * LENGTH**2 for h in COUNTS)
    picture = f"squared error of two look-ups at once\n{bars(error)}\n"
    picture += f"how far out moves if the two values change places\n{bars(moved, largest=2**0.5)}"
    lost = error["one head"] > 0.5 and error["two heads"] < 1e-6
    short = "A head returns one mean: asked for two things, a blend. Two heads return both."
    if not lost:
        short = "One head did no worse here than two, which is not what is told of it."
    return Answer("heads", QUESTION, numbers, picture, _verdict(numbers, error, moved), SOURCES, short=short)


def _look(queries: list[Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """What each query, a head of its own, brings back, one after the other."""
    q = torch.stack(queries)[None, :, None]
    out = attention(q, keys[None, None], values[None, None], scale=SHARP)
    return out[0, :, 0].flatten()


def _verdict(numbers: dict[str, Measured], error: dict[str, float], moved: dict[str, float]) -> str:
    params, flops, entries = (
        series(numbers[name]) for name in ("parameters", "FLOPs of q·k, 1,024 tokens", "weights, 1,024 tokens")
    )
    same = len(set(params)) == 1 == len(set(flops))
    return prose(f"""
        A head returns one weighted mean. Asked for two entries at once it gives half of each (error
        {number(error["one head"])}; {number(one(numbers["one head: differs from the mean of the two by"]))} from their
        mean), and cannot tell which was which: exchange the two values and it moves by {number(moved["one head"])}.
        Two heads give both (error {number(error["two heads"])}).
        The price: {"the same" if same else "not the same"} parameters ({number(params[0])} of a layer {WIDTH} wide with
        {", ".join(map(str, COUNTS))} heads) and FLOPs ({number(flops[0])} for q·k), but {number(entries[0])},
        {number(entries[1])} and {number(entries[2])} weights; and thinner heads, which see less (qkv why thin-heads).
        """)


def on(given: Given) -> Answer:
    """How different the caller's heads are: the share of weight that any two of them place differently."""
    heads = list(given.heads)
    if len(heads) == 1:
        heads = list(range(given.q.shape[1]))
    heads = heads[:_MOST]
    apart = torch.zeros(len(heads), len(heads), dtype=torch.float64)
    kept = [given.weights(h)[:: max(1, len(given.rows) // _ROWS)] for h in heads]
    for i in range(len(heads)):
        for j in range(i):
            apart[i, j] = apart[j, i] = (kept[i] - kept[j]).abs().sum(-1).mean() / 2
    pairs = [(apart[i, j].item(), heads[j], heads[i]) for i in range(len(heads)) for j in range(i)]
    near = min(pairs, default=(0.0, heads[0], heads[0]))
    entropy = [torch.special.entr(p).sum(-1).mean().exp().item() for p in kept]
    numbers: dict[str, Measured] = {
        "effective tokens of each head": tuple(entropy),
        "mean total variation of two heads": sum(p[0] for p in pairs) / max(1, len(pairs)),
        "smallest": near[0],
        "of heads": (float(near[1]), float(near[2])),
        "pairs of heads that are nearly one": float(sum(p[0] < ALIKE for p in pairs)),
    }
    alike = int(sum(p[0] < ALIKE for p in pairs))
    drawn = heatmap(apart[:16, :16].tolist(), [f"head {h}" for h in heads[:16]])
    verdict = prose(f"""
        Two heads differ on average by {number(sum(p[0] for p in pairs) / max(1, len(pairs)))} (total variation, drawn:
        dark is different); the two most alike, {near[1]} and {near[2]}, by {number(near[0])}.
        {alike} of {len(pairs)} pairs differ by less than {ALIKE}. A head spreads over
        {number(min(entropy))} to {number(max(entropy))} effective tokens. Heads that place their weights alike may
        still read different values.
        """)
    short = f"{alike} of {len(pairs)} pairs of your heads look at nearly the same tokens."
    return Answer("heads", QUESTION, numbers, drawn, verdict, SOURCES[1:], short=short)


_MOST, _ROWS = 64, 32  # heads compared, and rows of each
