"""What is lost when queries and keys are the same vectors."""

from __future__ import annotations

import torch

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.masks import Mask, causal, sliding_window
from qkv.probabilities import weights

TOKENS, WIDTH, HEAD = 64, 512, 64
SHARP = 24.0  # makes a score lead of 1/2 a weight of nearly 1 among 64 tokens
SOURCES = (
    "Kitaev et al. 2020, Reformer, arxiv.org/abs/2001.04451; "
    "Kayyam et al. 2026 (abstract): a shared Q and K has no direction, arxiv.org/abs/2606.04032",
)


def run(seed: int) -> Answer:
    """Compare separate, shared and absent projections, then a relation that points one way."""
    projected = _projections(torch.Generator().manual_seed(seed))
    lost, found = _one_before()
    numbers: dict[str, Measured] = {
        f"{title}, {name}": value for title, series in projected.items() for name, value in series.items()
    }
    numbers["'the one before me': part no symmetric score can hold"] = lost
    numbers |= {f"weight on the one before, {name}": value for name, value in found.items()}
    wide, onto_self = max(map(len, found)), projected["mean weight on itself"]
    lines = ["weight on the token before, with"]
    lines += [f"  {name:<{wide}}  {bar(value, 30)} {number(value)}" for name, value in found.items()]
    lines += ["weight on itself, random weights, with"]
    lines += [f"  {name:<{wide}}  {bar(value, 30)} {number(value)}" for name, value in onto_self.items()]
    question, verdict = "Why are a query and a key two different things?", _verdict(projected, lost, found)
    tied = onto_self["W_Q = W_K"]
    short = f"What I look for is not what I offer; tied, {tied:.0%} of my weight is on myself."
    if tied < 0.5:
        short = f"Tied, only {tied:.0%} of a token's weight is on itself: the usual reason fails here."
    return Answer("same-qk", question, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _projections(rng: torch.Generator) -> dict[str, dict[str, float]]:
    """What random weights make of random tokens, with two matrices, one, or none: by what is measured, then by case."""
    x = torch.randn(1, 1, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    w_q = torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5
    w_k = torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5
    cases = {"W_Q and W_K": (x @ w_q, x @ w_k), "W_Q = W_K": (x @ w_q, x @ w_q), "no projection": (x, x)}
    onto_self, best_is_self, lopsided = {}, {}, {}
    for name, (q, k) in cases.items():
        p = weights(q, k)[0, 0]
        scores = (q @ k.mT)[0, 0]
        onto_self[name] = p.diagonal().mean().item()
        best_is_self[name] = (p.argmax(-1) == torch.arange(TOKENS)).double().mean().item()
        lopsided[name] = ((scores - scores.mT).norm() / scores.norm()).item()
    return {
        "mean weight on itself": onto_self,
        "rows whose best key is itself": best_is_self,
        "asymmetry of the scores": lopsided,
    }


def _one_before() -> tuple[float, dict[str, float]]:
    """How much of "the token before me" no symmetric score can hold, and the weight on it with two matrices and one."""
    # The relation has score 1 for j = i - 1, else 0. A score q_i·k_j with k = q is symmetric, and the nearest symmetric
    # matrix to any T is (T + Tᵀ) / 2.
    before = torch.diag(torch.ones(TOKENS - 1, dtype=torch.float64), -1)
    nearest = (before + before.mT) / 2
    lost = ((before - nearest).norm() / before.norm()).item()
    # k = q also makes the scores a Gram matrix, which has no negative eigenvalue: the diagonal has to rise for that.
    eigenvalues, vectors = torch.linalg.eigh(nearest)
    lift = max(0.0, -eigenvalues.min().item())
    tied = (vectors * (eigenvalues + lift).clamp_min(0).sqrt())[None, None]  # tied @ tiedᵀ = nearest + lift * I
    unit = torch.eye(TOKENS, dtype=torch.float64)[None, None]
    not_self = ~sliding_window(1)
    return lost, {
        "two matrices": _weight_before(before[None, None], unit, None),
        "one, as it is": _weight_before(tied, tied, None),
        "one, itself hidden": _weight_before(tied, tied, not_self),
        "one, itself and future hidden": _weight_before(tied, tied, causal() & not_self),
    }


def _weight_before(q: torch.Tensor, k: torch.Tensor, mask: Mask | None) -> float:
    """Return the mean weight that tokens 1 .. n-2 put on the token before them (the ends have one neighbour only)."""
    p = weights(q, k, mask=mask, scale=SHARP)[0, 0]
    return p.diagonal(-1)[:-1].mean().item()


def _verdict(projected: dict[str, dict[str, float]], lost: float, found: dict[str, float]) -> str:
    onto_self, best_is_self, lopsided = projected.values()
    one, two = "W_Q = W_K", "W_Q and W_K"
    always = "nearly always " if best_is_self[one] > 0.9 else ""
    return prose(f"""
        With k = q every score is symmetric (asymmetry {number(lopsided[one])}, {number(lopsided[two])} with two
        matrices) and a token's best match is {always}itself: {best_is_self[one]:.0%} of rows,
        mean weight {number(onto_self[one])} (equal weights: {number(1 / TOKENS)}).
        A relation that points one way does not fit: the best symmetric score for "the token before me"
        misses {lost:.1%} of it (Frobenius norm).
        Masks give direction too: hide the token itself and {number(found["one, itself hidden"])} lands on the one
        before; hide the future as well and it is {number(found["one, itself and future hidden"])}.
        Random weights, one relation: what a tied score cannot hold, not what a trained model loses.
        """)
