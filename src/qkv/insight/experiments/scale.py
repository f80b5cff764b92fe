"""What dividing by sqrt(d) does to the softmax, against no scale and 1/d."""

from __future__ import annotations

import math

import torch

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number, pad
from qkv.probabilities import weights

SIZES = (4, 16, 64, 256, 1024)
SETS, KEYS, ROWS = 6, 128, 40  # several sets of keys: one set's longest key would decide everything at d = 4
FLAT = 0.01  # below this the Jacobian of a row passes on less than a hundredth of what arrives
RULES = {"no scale": lambda d: 1.0, "1/√d": lambda d: 1 / math.sqrt(d), "1/d": lambda d: 1 / d}
SERIES = ("peak weight", "entropy, nats", "median gradient", "rows with gradient < 0.01")
QUESTION = "Why divide q·k by the square root of d?"
SOURCES = (
    "Vaswani et al. 2017, section 3.2.1 and footnote 4 (variance), arxiv.org/abs/1706.03762",
    "QK-norm: arxiv.org/abs/2010.04245; muP: arxiv.org/abs/2203.03466",
)

Found = dict[str, dict[str, list[float]]]  # series -> rule -> a value for each of SIZES


def run(seed: int) -> Answer:
    """Measure softmax(scale * q·k) over 128 random keys for five sizes d and three scales."""
    variance, found, absorbed = measure(torch.Generator().manual_seed(seed))
    numbers: dict[str, Measured] = {"d": SIZES, "variance of q·k": tuple(variance)}
    for rule in ("1/√d", "1/d"):
        scaled = tuple(s * RULES[rule](d) ** 2 for s, d in zip(variance, SIZES, strict=True))
        numbers[f"variance of q·k, {rule}"] = scaled
    numbers |= {f"{title}, {rule}": tuple(found[title][rule]) for title in SERIES for rule in RULES}
    numbers["entropy of equal weights, nats"] = math.log(KEYS)
    numbers["largest difference if W_Q absorbs 1/√d"] = absorbed
    unit = [s / d for s, d in zip(variance, SIZES, strict=True)]
    steady = max(abs(u - 1) for u in unit) < 0.2
    short = f"So that the scores' variance is 1 at any width: {number(min(unit))} to {number(max(unit))} measured."
    if not steady:
        short = f"The scaled variance is {number(min(unit))} to {number(max(unit))} here: not the 1 that is told."
    verdict = _verdict(variance, found, absorbed)
    return Answer("scale", QUESTION, numbers, _picture(variance, found["peak weight"]), verdict, SOURCES, short=short)


def measure(rng: torch.Generator) -> tuple[list[float], Found, float]:
    """The variance of q·k by size, the series, and by how much results differ if W_Q absorbs the scale."""
    found: Found = {title: {rule: [] for rule in RULES} for title in SERIES}
    variance, absorbed = [], 0.0
    for d in SIZES:
        q = torch.randn(SETS, 1, ROWS, d, generator=rng, dtype=torch.float32)
        k = torch.randn(SETS, 1, KEYS, d, generator=rng, dtype=torch.float32)
        variance.append((q @ k.mT).var().item())
        for rule, scale in RULES.items():
            p = weights(q, k, scale=scale(d)).double()
            for title, value in zip(SERIES, told(p), strict=True):
                found[title][rule].append(value)
            if rule == "1/√d":  # the same scale, moved into q as W_Q would
                moved = weights(q * scale(d), k, scale=1.0)
                absorbed = max(absorbed, (moved - p).abs().max().item())
    return variance, found, absorbed


def told(p: torch.Tensor) -> tuple[float, float, float, float]:
    """SERIES of rows of probabilities."""
    jacobian = jacobian_norm(p)
    peak, entropy = p.max(-1).values.mean(), torch.special.entr(p).sum(-1).mean()
    return peak.item(), entropy.item(), jacobian.median().item(), (jacobian < FLAT).double().mean().item()


def jacobian_norm(p: torch.Tensor) -> torch.Tensor:
    """Return ‖diag(p) − p pᵀ‖_F for each row p, without building the matrices."""
    squares = p.square().sum(-1)
    return (squares - 2 * p.pow(3).sum(-1) + squares.square()).clamp_min(0).sqrt()


def on(given: Given) -> Answer:
    """The caller's queries and keys at four scales: the one of the call, none, 1/√d and 1/d."""
    d = given.q.shape[3]
    products = torch.cat([given.queries(head) @ given.keys(head).mT for head in given.heads])
    spread = products.var(unbiased=False).item()
    scales = {"this call": given.sharpness, **{rule: scale(d) for rule, scale in RULES.items()}}
    series = {
        rule: told(torch.cat([given.weights(head, scale) for head in given.heads])) for rule, scale in scales.items()
    }
    numbers: dict[str, Measured] = {"d": d, "variance of q·k": spread}
    for rule, scale in scales.items():
        numbers[f"variance of the scores, {rule}"] = spread * scale**2
        numbers |= {f"{title}, {rule}": value for title, value in zip(SERIES, series[rule], strict=True)}
    lines = [f"{'':<10} {'variance':>9}  peak weight"]
    lines += [
        f"{pad(rule, 10)} {number(spread * scale**2):>9}  {bar(series[rule][0], 30)} {number(series[rule][0])}"
        for rule, scale in scales.items()
    ]
    mine = spread * given.sharpness**2
    verdict = prose(f"""
        q·k has variance {number(spread)}, {number(spread / d)} d (independent numbers of variance 1 would give d):
        {"these queries and keys are aligned or long" if spread > 2 * d else "no more than chance would give"}.
        At the scale of this call, {number(given.sharpness)}, the scores' variance is {number(mine)}, the mean largest
        weight {number(series["this call"][0])} and the entropy {number(series["this call"][1])} nats.
        Variances are over all keys, hidden ones too; weights are those of the visible.
        """)
    short = f"Your scores have variance {number(mine)} at scale {number(given.sharpness)}; 1/√d aims at about 1."
    return Answer("scale", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _verdict(variance: list[float], found: Found, absorbed: float) -> str:
    peak = found["peak weight"]
    hardens = f"{number(peak['no scale'][0])} to {number(peak['no scale'][-1])}"
    stays = f"{number(min(peak['1/√d']))} to {number(max(peak['1/√d']))}"
    return prose(f"""
        The variance of q·k grows like d, so without a scale the softmax hardens as heads get wider: the largest weight
        goes from {hardens}. Over √d it stays at {stays}; over d it flattens to
        {number(peak["1/d"][-1])} (equal: {number(1 / KEYS)}).
        {_gradients(found["median gradient"], found["rows with gradient < 0.01"])}
        W_Q can absorb the scale (outputs differ by {number(absorbed)}): it is about the start of training.
        Random q and k; once training aligns them q·k can grow like d, the case for 1/d (muP) and QK-norm.
        """)


def _gradients(slope: dict[str, list[float]], flat: dict[str, list[float]]) -> str:
    """What is measured of the claim that gradients vanish without the scale, at d = 64 and at the widest."""
    at = SIZES.index(64)
    plain, scaled, ratio = slope["no scale"][at], slope["1/√d"][at], slope["no scale"][at] / slope["1/√d"][at]
    if ratio >= 0.5:
        text = f"""
            At d = 64 the median gradient (of a row's weights by its scores) without a scale does not vanish:
            {number(plain)}, {number(ratio)} times the scaled {number(scaled)}."""
    else:
        text = f"""
            At d = 64 the median gradient (of a row's weights by its scores) without a scale has fallen to
            {number(plain)}, {number(ratio)} of the scaled one's."""
    d, plain, scaled = SIZES[-1], slope["no scale"][-1], slope["1/√d"][-1]
    if plain < 0.1 * scaled:
        return f"{text} At d = {d} it does vanish: {number(plain)} against {number(scaled)}."
    return f"{text} At d = {d} it is still {number(plain)}."


def _picture(variance: list[float], peak: dict[str, list[float]]) -> str:
    drawn = [("no scale", 15), ("1/√d", 8), ("1/d", 5)]
    heads = "".join(f"{'peak, ' + rule:<{wide + 8}}" for rule, wide in drawn).rstrip()
    lines = [f"{'d':<5}{'variance':>9}{'over d':>7}   {heads}"]
    for index, d in enumerate(SIZES):
        bars = "".join(
            f"{bar(peak[rule][index], wide)} {number(peak[rule][index]):<7}" for rule, wide in drawn
        ).rstrip()
        lines.append(f"{d:<5}{number(variance[index]):>9}{number(variance[index] / d):>7}   {bars}")
    return "\n".join(lines)
