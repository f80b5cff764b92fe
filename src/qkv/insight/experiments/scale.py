"""What dividing by sqrt(d) does to the softmax, against no scale and 1/d."""

from __future__ import annotations

import math

import torch

from qkv.functional import weights
from qkv.insight.answer import Answer
from qkv.insight.terminal import bar, number

SIZES = (4, 16, 64, 256, 1024)
SETS, KEYS, ROWS = 6, 128, 40  # several sets of keys: one set's longest key would decide everything at d = 4
FLAT = 0.01  # below this the Jacobian of a row passes on less than a hundredth of what arrives
RULES = {"no scale": lambda d: 1.0, "1/√d": lambda d: 1 / math.sqrt(d), "1/d": lambda d: 1 / d}


def run(seed: int) -> Answer:
    """Measure softmax(scale * q·k) over 128 random keys for five sizes d and three scales."""
    rng = torch.Generator().manual_seed(seed)
    variance, peak, entropy, slope, flat = [], _by_rule(), _by_rule(), _by_rule(), _by_rule()
    absorbed = 0.0
    for d in SIZES:
        q = torch.randn(SETS, 1, ROWS, d, generator=rng, dtype=torch.float32)
        k = torch.randn(SETS, 1, KEYS, d, generator=rng, dtype=torch.float32)
        variance.append((q @ k.mT).var().item())
        for rule, scale in RULES.items():
            p = weights(q, k, scale=scale(d)).double()
            jacobian = _jacobian_norm(p)
            peak[rule].append(p.max(-1).values.mean().item())
            entropy[rule].append(torch.special.entr(p).sum(-1).mean().item())
            slope[rule].append(jacobian.median().item())
            flat[rule].append((jacobian < FLAT).double().mean().item())
            if rule == "1/√d":  # the same scale, moved into q as W_Q would
                moved = weights(q * scale(d), k, scale=1.0)
                absorbed = max(absorbed, (moved - p).abs().max().item())

    numbers: dict[str, float | tuple[float, ...]] = {"d": SIZES, "variance of q·k": tuple(variance)}
    for rule, scale in RULES.items():
        if rule != "no scale":
            scaled = tuple(s * scale(d) ** 2 for s, d in zip(variance, SIZES, strict=True))
            numbers[f"variance of q·k, {rule}"] = scaled
    for title, series in (
        ("peak weight", peak),
        ("entropy, nats", entropy),
        ("median gradient", slope),
        ("rows with gradient < 0.01", flat),
    ):
        numbers |= {f"{title}, {rule}": tuple(series[rule]) for rule in RULES}
    numbers["entropy of equal weights, nats"] = math.log(KEYS)
    numbers["largest difference if W_Q absorbs 1/√d"] = absorbed

    at = SIZES.index(64)
    last = len(SIZES) - 1
    ratio = slope["no scale"][at] / slope["1/√d"][at]
    sixty_four = (
        f"At d = 64 the often-told story is wrong in its simple form: without a scale the median gradient does not "
        f"vanish, it "
        f"is {number(slope['no scale'][at])}, {number(ratio)} times the scaled one's {number(slope['1/√d'][at])}; "
        f"only "
        f"{flat['no scale'][at]:.0%} of the rows are flat."
        if ratio >= 0.5
        else f"At d = 64 the median gradient without a scale has fallen to {number(slope['no scale'][at])}, "
        f"{number(ratio)} of the scaled one's."
    )
    far = (
        f"At d = {SIZES[last]} it does vanish: {number(slope['no scale'][last])} against "
        f"{number(slope['1/√d'][last])}, with "
        f"{flat['no scale'][last]:.0%} of the rows flat (scaled: {flat['1/√d'][last]:.0%})."
        if slope["no scale"][last] < 0.1 * slope["1/√d"][last]
        else f"At d = {SIZES[last]} it is still {number(slope['no scale'][last])}."
    )
    verdict = (
        f"The variance of q·k grows like d ({number(variance[0])} at d = {SIZES[0]}, {number(variance[-1])} at "
        f"{SIZES[-1]}), so without a scale the softmax hardens as heads get wider: its peak goes from "
        f"{number(peak['no scale'][0])} to {number(peak['no scale'][-1])}. Divided by √d its variance "
        f"is 1 and the peak stays where it is, "
        f"{number(min(peak['1/√d']))} to {number(max(peak['1/√d']))} at every d. Dividing by d flattens it: "
        f"{number(peak['1/d'][-1])} at d = {SIZES[-1]}, where equal weights would be {number(1 / KEYS)}. {sixty_four} "
        f"{far} "
        f"The scale is about the start of training, not about what can be expressed: W_Q can absorb it "
        f"(outputs differ by {number(absorbed)}). These q and k are random and independent; once training has aligned "
        f"them, "
        f"q·k can grow like d itself, which is the case for 1/d (muP) and for normalising q and k."
    )
    lines = [" " * 9 + "".join(f"{'peak, ' + rule:<23}" for rule in RULES).rstrip()]
    for index, d in enumerate(SIZES):
        drawn = "".join(f"{bar(peak[rule][index], 14)} {number(peak[rule][index]):<8}" for rule in RULES)
        lines.append(f"d = {d:<5}" + drawn.rstrip())
    sources = (
        "Vaswani et al. 2017, section 3.2.1 and footnote 4 (the variance argument), arxiv.org/abs/1706.03762",
        "Henry et al. 2020, Query-Key Normalization for Transformers, arxiv.org/abs/2010.04245",
        "Yang et al. 2022, Tensor Programs V (muP, 1/d), arxiv.org/abs/2203.03466",
    )
    return Answer("scale", "Why divide q·k by the square root of d?", numbers, "\n".join(lines), verdict, sources)


def _by_rule() -> dict[str, list[float]]:
    return {rule: [] for rule in RULES}


def _jacobian_norm(p: torch.Tensor) -> torch.Tensor:
    """Return ‖diag(p) − p pᵀ‖_F for each row p, without building the matrices."""
    squares = p.square().sum(-1)
    return (squares - 2 * p.pow(3).sum(-1) + squares.square()).clamp_min(0).sqrt()
