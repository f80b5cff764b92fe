"""What W_Q, W_K and W_V are each for, and the price of multiplying them together beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

PART, TOKENS = 32, 24  # a token is [wants | is | carries], three parts of 32 numbers
WIDTH, HEAD, HEADS = 512, 64, 8  # the layer whose folding is priced
RANKS = (8, 32, 64, 128)
SOURCES = (
    "Vaswani et al. 2017, 3.2.2, arxiv.org/abs/1706.03762; "
    "Karbevski, Mijoski 2025 (abstract): W_Q can be left out, arxiv.org/abs/2510.23912",
)


def run(seed: int) -> Answer:
    """Leave out one projection at a time on a task that needs all three, then fold them."""
    rng = torch.Generator().manual_seed(seed)
    found = _without(rng)
    fold = _fold(rng)
    numbers: dict[str, Measured] = {f"tokens found, {name}": value for name, value in found.hits.items()}
    numbers["tokens that find themselves, neither"] = found.itself
    numbers["error of out, all three"] = found.error
    numbers |= {f"share of out that is the load, {name}": found.loads[name] for name in ("all three", "no W_V")}
    numbers |= fold
    numbers[f"rank of the scores, W_Q and W_K {', '.join(map(str, RANKS))} wide"] = _ranks(rng)
    wide = max(map(len, found.hits))
    lines = [f"  {name:<{wide}}  {bar(value, 30)} {value:.0%}" for name, value in found.hits.items()]
    picture = "\n".join(["tokens that found their partner", *lines])
    question = "What do W_Q, W_K and W_V buy, and what does folding cost?"
    short = "W_Q reads what a token wants, W_K what it is, W_V what it carries."
    if found.hits["all three"] < 1 or found.hits["no W_Q, W_K refitted"] < 1:
        short = "The projections did not do here what is told of them: see the bars."
    return Answer("projections", question, numbers, picture, _verdict(found, fold), SOURCES, short=short)


@dataclass
class _Found:
    """By case, which projections there are: tokens that found their partner, the load's share of out, out's width."""

    hits: dict[str, float] = field(default_factory=dict)
    loads: dict[str, float] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    itself: float = 0.0  # tokens that find themselves, without W_Q and W_K
    error: float = 0.0  # of out against the partner's load, with all three


def _without(rng: torch.Generator) -> _Found:
    x, wanted = _tokens(rng)
    carried = x[:, 2 * PART :]
    zero, one = torch.zeros(PART, PART, dtype=torch.float64), torch.eye(PART, dtype=torch.float64)
    wants, is_, carries = (torch.cat([one if i == part else zero for i in range(3)]) for part in range(3))
    identity = torch.eye(3 * PART, dtype=torch.float64)
    widen = torch.cat([one, zero, zero], 1)  # puts a part's numbers back where the identity would look for them
    cases = {
        "all three": (wants, is_, carries),
        "no W_Q": (identity, is_ @ torch.cat([zero, one, zero], 1), carries),
        "no W_K": (wants @ widen, identity, carries),
        "neither": (identity, identity, carries),
        "no W_Q, W_K refitted": (identity, is_ @ widen, carries),
        "no W_V": (wants, is_, identity),
    }
    result = _Found()
    for name, (w_q, w_k, w_v) in cases.items():
        q, k, v = ((x @ w)[None, None] for w in (w_q, w_k, w_v))
        found = weights(q, k, scale=16.0)[0, 0].argmax(-1)
        out = attention(q, k, v, scale=16.0)[0, 0]
        result.hits[name] = (found == wanted).double().mean().item()
        load = out[:, -PART:].square().sum() / out.square().sum()  # the load stands last in any out
        result.loads[name], result.widths[name] = load.item(), out.shape[1]
        if name == "neither":
            result.itself = (found == torch.arange(TOKENS)).double().mean().item()
        if name == "all three":
            result.error = ((out - carried[wanted]).norm() / carried.norm()).item()
    return result


def _verdict(found: _Found, fold: dict[str, float]) -> str:
    hits, widths = found.hits, found.widths
    cost = {name: number(value) for name, value in fold.items()}
    return prose(f"""
        With all three {hits["all three"]:.0%} of the tokens find their partner and out is its load
        (error {number(found.error)}); with neither W_Q nor W_K {found.itself:.0%} find themselves.
        Refit W_K and W_Q is not missed: only the product W_Q W_Kᵀ matters (so do W_V and W_O).
        Without W_V out is all of the partner: {widths["no W_V"]} numbers, {found.loads["no W_V"]:.0%} of it load.
        Folding is exact (weights differ by {cost["fold: largest difference of the weights"]})
        but {WIDTH} wide and of rank {HEAD}: {cost["parameters, folded"]} parameters instead of
        {cost["parameters, two thin matrices"]}, {cost["FLOPs a score, folded"]} FLOPs a score instead of
        {cost["FLOPs a score, thin"]}. It saves cache: {cost["cached numbers a token, folded"]} numbers a token
        instead of {cost["cached numbers a token, thin"]}. A rotation between the two (RoPE) stops it: the product
        changes by {fold["fold under a rotation: the product changes by"]:.0%} from one step to the next.
        """)


def _tokens(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (TOKENS, 3 * PART) and, for each, the index of the token that is what it wants (never itself)."""
    things = torch.linalg.qr(torch.randn(PART, PART, generator=rng, dtype=torch.float64))[0][:TOKENS]
    order = torch.randperm(TOKENS, generator=rng)
    wanted = torch.empty_like(order)
    wanted[order] = order.roll(1)  # one cycle through all tokens: none wants itself
    load = torch.randn(TOKENS, PART, generator=rng, dtype=torch.float64) / PART**0.5
    return torch.cat([things[wanted], things, load], 1), wanted


def _fold(rng: torch.Generator) -> dict[str, float]:
    """Multiply W_Q and W_K together for one head, compare, and count what each form costs."""
    x = torch.randn(1, 1, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    w_q = torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5
    w_k = torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5
    thin = weights(x @ w_q, x @ w_k)
    folded = weights(x @ (w_q @ w_k.mT), x, scale=HEAD**-0.5)  # the key is now x itself

    angle = torch.arange(1, HEAD // 2 + 1, dtype=torch.float64) ** -1.0
    pairs = zip(angle.cos().tolist(), angle.sin().tolist(), strict=True)
    turn = torch.block_diag(*(torch.tensor([[c, -s], [s, c]], dtype=torch.float32) for c, s in pairs))
    still, turned = w_q @ w_k.mT, w_q @ turn.to(w_q.dtype) @ w_k.mT
    return {
        "fold: largest difference of the weights": (thin - folded).abs().max().item(),
        "parameters, two thin matrices": 2 * WIDTH * HEAD * HEADS,
        "parameters, folded": WIDTH * WIDTH * HEADS,
        "FLOPs a score, thin": 2 * HEAD,
        "FLOPs a score, folded": 2 * WIDTH,
        "cached numbers a token, thin": 2 * HEAD * HEADS,
        "cached numbers a token, folded": WIDTH,
        "fold under a rotation: the product changes by": ((turned - still).norm() / still.norm()).item(),
    }


def _ranks(rng: torch.Generator) -> tuple[int, ...]:
    """Measure the rank of the scores of 256 tokens for W_Q and W_K of the widths RANKS."""
    x = torch.randn(2 * RANKS[-1], WIDTH, generator=rng, dtype=torch.float64)
    ranks = []
    for rank in RANKS:
        a, b = (torch.randn(WIDTH, rank, generator=rng, dtype=torch.float64) for _ in range(2))
        ranks.append(int(torch.linalg.matrix_rank(x @ a @ (x @ b).mT)))
    return tuple(ranks)
