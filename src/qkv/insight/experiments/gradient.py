"""What is true and what is false of the vanishing gradients without a scale."""

from __future__ import annotations

import math

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose, series
from qkv.insight.experiments.scale import FLAT, RULES, jacobian_norm
from qkv.insight.given import Given
from qkv.insight.terminal import number, pad, table
from qkv.probabilities import weights

SIZES = (16, 64, 256, 1024)
SETS, KEYS, ROWS = 4, 128, 64
WIDTH, HEAD, TOKENS, RATE = 64, 16, 24, 0.1  # of the layer whose step is compared
QUESTION = "Do gradients vanish without the scale? Could W_Q absorb it?"
SOURCES = (
    "The claim: Vaswani et al. 2017, footnote 4, arxiv.org/abs/1706.03762",
    "QK-norm, the other cure: Henry et al. 2020, arxiv.org/abs/2010.04245",
)


def run(seed: int) -> Answer:
    """Measure the softmax's Jacobian by width with and without 1/√d, then one step of W_Q with the scale in and out."""
    rng = torch.Generator().manual_seed(seed)
    median: dict[str, list[float]] = {"no scale": [], "1/√d": []}
    flat: dict[str, list[float]] = {"no scale": [], "1/√d": []}
    for d in SIZES:
        q = torch.randn(SETS, 1, ROWS, d, generator=rng, dtype=torch.float32)
        k = torch.randn(SETS, 1, KEYS, d, generator=rng, dtype=torch.float32)
        for rule in median:
            norm = jacobian_norm(weights(q, k, scale=RULES[rule](d)).double())
            median[rule].append(norm.median().item())
            flat[rule].append((norm < FLAT).double().mean().item())
    numbers: dict[str, Measured] = {"d": SIZES}
    numbers |= {f"median gradient, {rule}": tuple(median[rule]) for rule in median}
    numbers |= {f"rows with gradient < 0.01, {rule}": tuple(flat[rule]) for rule in median}
    numbers |= _absorbed(rng)
    rows = [["d", "median, no scale", "median, 1/√d", "flat rows, no scale", "flat rows, 1/√d"]]
    for i, d in enumerate(SIZES):
        gradients = [number(median[rule][i]) for rule in median]
        rows.append([str(d), *gradients, *(f"{flat[rule][i]:.1%}" for rule in median)])
    at, last = SIZES.index(64), -1
    raw, scaled = median["no scale"], median["1/√d"]
    early, late = raw[at] < 0.5 * scaled[at], raw[last] < 0.1 * scaled[last]
    short = f"At d = 64 {_yes(early)}, at d = {SIZES[last]} {_yes(late)}; W_Q could absorb the scale."
    return Answer("gradient", QUESTION, numbers, table(rows, "<>>>>"), _verdict(numbers, early), SOURCES, short=short)


def _yes(vanishes: bool) -> str:
    return "they do" if vanishes else "they do not"


def _absorbed(rng: torch.Generator) -> dict[str, float]:
    """The same layer with the scale outside and inside of W_Q: outputs, gradients, and outputs after one step."""
    x = torch.randn(1, 1, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    w_q, w_k, w_v = (torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5 for _ in range(3))
    aim = torch.randn(1, 1, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    outs, slopes, after = [], [], []
    for scale, inside in ((HEAD**-0.5, w_q), (1.0, w_q * HEAD**-0.5)):
        w = inside.clone().requires_grad_()
        out = attention(x @ w, x @ w_k, x @ w_v, scale=scale)
        (slope,) = torch.autograd.grad((out - aim).square().mean(), w)
        stepped = w.detach() - RATE * TOKENS * slope
        outs.append(out.detach())
        slopes.append(slope)
        after.append(attention(x @ stepped, x @ w_k, x @ w_v, scale=scale))
    moves = [(a - b).norm().item() for a, b in zip(after, outs, strict=True)]
    return {
        "scale inside W_Q: out differs by": (outs[0] - outs[1]).abs().max().item(),
        "scale inside W_Q: gradient of W_Q longer by": (slopes[1].norm() / slopes[0].norm()).item(),
        "one step: out moves further by, scale inside": moves[1] / moves[0],
        "√d of that layer": math.sqrt(HEAD),
    }


def _verdict(numbers: dict[str, Measured], early: bool) -> str:
    raw, scaled, flat = (
        series(numbers[name])
        for name in ("median gradient, no scale", "median gradient, 1/√d", "rows with gradient < 0.01, no scale")
    )
    at = SIZES.index(64)
    told = "as told" if early else "the often-told story is wrong at this width"
    apart, longer, further = (one(x) for x in list(numbers.values())[-4:-1])
    return prose(f"""
        The gradient is that of a row's weights by its scores, ‖diag(p) − p pᵀ‖; a row is flat below 0.01.
        At d = 64 the median without a scale is {number(raw[at])} against {number(scaled[at])}, {flat[at]:.0%} flat:
        {told}. At d = {SIZES[-1]} it is {number(raw[-1])} against {number(scaled[-1])}, {flat[-1]:.0%} flat.
        What fails is not every row but a growing share of them, those whose softmax is already sure.
        W_Q / √d with no scale is the same function
        (out differs by {number(apart)}),
        so the scale adds nothing to what can be expressed. But W_Q's gradient is then {number(longer)} times as long,
        and one equal step moves out {number(further)} times as far: the scale is a choice of start and of learning
        rate.
        """)


def on(given: Given) -> Answer:
    """The Jacobians of the caller's rows at the scale of the call, at none, 1/√d and 1/d."""
    d = given.q.shape[3]
    scales = {"this call": given.sharpness, **{rule: scale(d) for rule, scale in RULES.items()}}
    norms = {n: torch.cat([jacobian_norm(given.weights(h, s)) for h in given.heads]) for n, s in scales.items()}
    numbers: dict[str, Measured] = {}
    rows = [["scale", "", "median gradient", "flat rows"]]
    for name, norm in norms.items():
        median, flat = norm.median().item(), (norm < FLAT).double().mean().item()
        numbers |= {f"median gradient, {name}": median, f"rows with gradient < 0.01, {name}": flat}
        rows.append([pad(name, 9), number(scales[name]), number(median), f"{flat:.1%}"])
    mine = one(numbers["median gradient, this call"])
    flat = one(numbers["rows with gradient < 0.01, this call"])
    verdict = prose(f"""
        The gradient is that of a row's weights by its scores, ‖diag(p) − p pᵀ‖; a row is flat below 0.01.
        At the scale of this call the median of your rows is {number(mine)} and {flat:.0%} are flat.
        A row that sees one key only is flat at any scale: it has nothing to choose.
        A flat row passes nothing back to q and k; v still learns from it.
        """)
    short = f"{flat:.0%} of your rows pass no gradient back to q and k (median {number(mine)})."
    return Answer("gradient", QUESTION, numbers, table(rows, "<>>>"), verdict, SOURCES, short=short)
