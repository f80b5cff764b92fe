"""What dividing by sqrt(d) does to the softmax, against no scale and 1/d."""

from __future__ import annotations

import math

import torch

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

SIZES = (4, 16, 64, 256, 1024)
SETS, KEYS, ROWS = 6, 128, 40  # several sets of keys: one set's longest key would decide everything at d = 4
FLAT = 0.01  # below this the Jacobian of a row passes on less than a hundredth of what arrives
RULES = {"no scale": lambda d: 1.0, "1/√d": lambda d: 1 / math.sqrt(d), "1/d": lambda d: 1 / d}
SERIES = ("peak weight", "entropy, nats", "median gradient", "rows with gradient < 0.01")
SOURCES = (
    "Vaswani et al. 2017, section 3.2.1 and footnote 4 (the variance argument), arxiv.org/abs/1706.03762",
    "Henry et al. 2020, Query-Key Normalization for Transformers, arxiv.org/abs/2010.04245",
    "Yang et al. 2022, Tensor Programs V (muP, 1/d), arxiv.org/abs/2203.03466",
)

Found = dict[str, dict[str, list[float]]]  # series -> rule -> a value for each of SIZES


def run(seed: int) -> Answer:
    """Measure softmax(scale * q·k) over 128 random keys for five sizes d and three scales."""
    variance, found, absorbed = _measure(torch.Generator().manual_seed(seed))
    numbers: dict[str, Measured] = {"d": SIZES, "variance of q·k": tuple(variance)}
    for rule in ("1/√d", "1/d"):
        scaled = tuple(s * RULES[rule](d) ** 2 for s, d in zip(variance, SIZES, strict=True))
        numbers[f"variance of q·k, {rule}"] = scaled
    numbers |= {f"{title}, {rule}": tuple(found[title][rule]) for title in SERIES for rule in RULES}
    numbers["entropy of equal weights, nats"] = math.log(KEYS)
    numbers["largest difference if W_Q absorbs 1/√d"] = absorbed
    question, verdict = "Why divide q·k by the square root of d?", _verdict(variance, found, absorbed)
    return Answer("scale", question, numbers, _picture(found["peak weight"]), verdict, SOURCES)


def _measure(rng: torch.Generator) -> tuple[list[float], Found, float]:
    """The variance of q·k by size, the series, and by how much results differ if W_Q absorbs the scale."""
    found: Found = {title: {rule: [] for rule in RULES} for title in SERIES}
    variance, absorbed = [], 0.0
    for d in SIZES:
        q = torch.randn(SETS, 1, ROWS, d, generator=rng, dtype=torch.float32)
        k = torch.randn(SETS, 1, KEYS, d, generator=rng, dtype=torch.float32)
        variance.append((q @ k.mT).var().item())
        for rule, scale in RULES.items():
            p = weights(q, k, scale=scale(d)).double()
            jacobian = _jacobian_norm(p)
            peak, entropy = p.max(-1).values.mean(), torch.special.entr(p).sum(-1).mean()
            values = (peak, entropy, jacobian.median(), (jacobian < FLAT).double().mean())
            for title, value in zip(SERIES, values, strict=True):
                found[title][rule].append(value.item())
            if rule == "1/√d":  # the same scale, moved into q as W_Q would
                moved = weights(q * scale(d), k, scale=1.0)
                absorbed = max(absorbed, (moved - p).abs().max().item())
    return variance, found, absorbed


def _verdict(variance: list[float], found: Found, absorbed: float) -> str:
    peak, d = found["peak weight"], SIZES[-1]
    hardens = f"{number(peak['no scale'][0])} to {number(peak['no scale'][-1])}"
    stays = f"{number(min(peak['1/√d']))} to {number(max(peak['1/√d']))}"
    return prose(f"""
        The variance of q·k grows like d ({number(variance[0])} at d = {SIZES[0]}, {number(variance[-1])} at {d}),
        so without a scale the softmax hardens as heads get wider: its peak goes from {hardens}.
        Divided by √d its variance is 1 and the peak stays where it is, {stays} at every d.
        Dividing by d flattens it: {number(peak["1/d"][-1])} at d = {d},
        where equal weights would be {number(1 / KEYS)}.
        {_gradients(found["median gradient"], found["rows with gradient < 0.01"])}
        The scale is about the start of training, not about what can be expressed:
        W_Q can absorb it (outputs differ by {number(absorbed)}).
        These q and k are random and independent; once training has aligned them, q·k can grow like d itself,
        which is the case for 1/d (muP) and for normalising q and k.
        """)


def _gradients(slope: dict[str, list[float]], flat: dict[str, list[float]]) -> str:
    """What is measured of the claim that gradients vanish without the scale, at d = 64 and at the widest."""
    at = SIZES.index(64)
    plain, scaled, ratio = slope["no scale"][at], slope["1/√d"][at], slope["no scale"][at] / slope["1/√d"][at]
    if ratio >= 0.5:
        text = f"""
            At d = 64 the often-told story is wrong in its simple form:
            without a scale the median gradient does not vanish, it is {number(plain)},
            {number(ratio)} times the scaled one's {number(scaled)};
            only {flat["no scale"][at]:.0%} of the rows are flat."""
    else:
        text = f"""
            At d = 64 the median gradient without a scale has fallen to {number(plain)},
            {number(ratio)} of the scaled one's."""
    d, plain, scaled = SIZES[-1], slope["no scale"][-1], slope["1/√d"][-1]
    if plain < 0.1 * scaled:
        rows = f"{flat['no scale'][-1]:.0%} of the rows flat (scaled: {flat['1/√d'][-1]:.0%})"
        return f"{text} At d = {d} it does vanish: {number(plain)} against {number(scaled)}, with {rows}."
    return f"{text} At d = {d} it is still {number(plain)}."


def _picture(peak: dict[str, list[float]]) -> str:
    lines = [" " * 9 + "".join(f"{'peak, ' + rule:<23}" for rule in RULES).rstrip()]
    for index, d in enumerate(SIZES):
        drawn = "".join(f"{bar(peak[rule][index], 14)} {number(peak[rule][index]):<8}" for rule in RULES)
        lines.append(f"d = {d:<5}" + drawn.rstrip())
    return "\n".join(lines)


def _jacobian_norm(p: torch.Tensor) -> torch.Tensor:
    """Return ‖diag(p) − p pᵀ‖_F for each row p, without building the matrices."""
    squares = p.square().sum(-1)
    return (squares - 2 * p.pow(3).sum(-1) + squares.square()).clamp_min(0).sqrt()
