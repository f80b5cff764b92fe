"""What is lost when queries and keys are the same vectors."""

from __future__ import annotations

import torch

from qkv.functional import weights
from qkv.insight.answer import Answer
from qkv.insight.terminal import bar, number
from qkv.masks import Mask, causal, sliding_window

TOKENS, WIDTH, HEAD = 64, 512, 64
SHARP = 24.0  # makes a score lead of 1/2 a weight of nearly 1 among 64 tokens


def run(seed: int) -> Answer:
    """Compare separate, shared and absent projections, then a relation that points one way."""
    rng = torch.Generator().manual_seed(seed)
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

    # "The token before me": score 1 for j = i - 1, else 0. A score q_i·k_j with k = q is symmetric, and the nearest
    # symmetric matrix to any T is (T + Tᵀ) / 2.
    before = torch.diag(torch.ones(TOKENS - 1, dtype=torch.float64), -1)
    nearest = (before + before.mT) / 2
    lost = ((before - nearest).norm() / before.norm()).item()
    # k = q also makes the scores a Gram matrix, which has no negative eigenvalue: the diagonal has to rise for that.
    eigenvalues, vectors = torch.linalg.eigh(nearest)
    lift = max(0.0, -eigenvalues.min().item())
    tied = (vectors * (eigenvalues + lift).clamp_min(0).sqrt())[None, None]  # tied @ tiedᵀ = nearest + lift * I
    unit = torch.eye(TOKENS, dtype=torch.float64)[None, None]
    not_self = ~sliding_window(1)
    found = {
        "two matrices": _weight_before(before[None, None], unit, None),
        "one, as it is": _weight_before(tied, tied, None),
        "one, itself hidden": _weight_before(tied, tied, not_self),
        "one, itself and future hidden": _weight_before(tied, tied, causal() & not_self),
    }

    numbers: dict[str, float | tuple[float, ...]] = {}
    for title, series in (
        ("mean weight on itself", onto_self),
        ("rows whose best key is itself", best_is_self),
        ("asymmetry of the scores", lopsided),
    ):
        numbers |= {f"{title}, {name}": value for name, value in series.items()}
    numbers["'the one before me': part no symmetric score can hold"] = lost
    numbers |= {f"weight on the one before, {name}": value for name, value in found.items()}

    share = {name: best_is_self[name] for name in cases}
    verdict = (
        f"What I look for is not what I offer. With k = q every score is symmetric (asymmetry "
        f"{number(lopsided['W_Q = W_K'])}, against {number(lopsided['W_Q and W_K'])} with two matrices) and a token's "
        f"best "
        f"match is {'nearly always ' if share['W_Q = W_K'] > 0.9 else ''}itself: {share['W_Q = W_K']:.0%} of rows, "
        f"mean weight "
        f"{number(onto_self['W_Q = W_K'])}, against {number(onto_self['W_Q and W_K'])} (and 1/{TOKENS} = "
        f"{number(1 / TOKENS)} "
        f'for equal weights). A relation that points one way does not fit: the best symmetric score for "the token '
        f"before "
        f'me" misses {lost:.1%} of it (in Frobenius norm). '
        f"But masks give direction too: hide the token itself and {number(found['one, itself hidden'])} lands on the "
        f"one "
        f"before (the rest on the one after); hide the future as well and it is "
        f"{number(found['one, itself and future hidden'])}. That is how Reformer shares Q and K in causal models. "
        f"These are "
        f"random weights and one relation: they show what a tied score cannot hold, not how much a trained model "
        f"loses."
    )
    wide = max(map(len, found))
    lines = ["weight on the token before, with"]
    lines += [f"  {name:<{wide}}  {bar(value, 30)} {number(value)}" for name, value in found.items()]
    lines += ["weight on itself, random weights, with"]
    lines += [f"  {name:<{wide}}  {bar(value, 30)} {number(value)}" for name, value in onto_self.items()]
    sources = (
        "Kitaev, Kaiser, Levskaya 2020, Reformer (shared Q and K, a token hidden from itself), "
        "arxiv.org/abs/2001.04451",
        "Kayyam et al. 2026 (abstract): sharing Q and K breaks the direction of attention, sharing K and V costs "
        "little, "
        "arxiv.org/abs/2606.04032",
    )
    return Answer(
        "same-qk", "Why are a query and a key two different things?", numbers, "\n".join(lines), verdict, sources
    )


def _weight_before(q: torch.Tensor, k: torch.Tensor, mask: Mask | None) -> float:
    """Return the mean weight that tokens 1 .. n-2 put on the token before them (the ends have one neighbour only)."""
    p = weights(q, k, mask=mask, scale=SHARP)[0, 0]
    return p.diagonal(-1)[:-1].mean().item()
