"""Which one is Q, which is K and which is V: told by what happens when they are moved about."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import heatmap, number, table
from qkv.probabilities import weights

# The concept behind each word; both languages share the concepts, each adds its own noise. Nothing is learned.
ENGLISH = (("the", 0), ("black", 2), ("cat", 1), ("sleeps", 3), ("now", 4))
FRENCH = (("le", 0), ("chat", 1), ("noir", 2), ("dort", 3))
SIZE, SHARP = 16, 8.0
QUESTION = "Which one is Q, which is K, which is V?"
SOURCES = (
    "Bahdanau, Cho, Bengio 2014, arxiv.org/abs/1409.0473",
    "The question itself: stats.stackexchange.com/questions/421935",
)

WORDS = (
    ("", "Q asks", "K is matched", "V is returned"),
    ("self-attention", "each token of x", "each token of x", "each token of x"),
    ("cross-attention", "each token of x", "each of context", "each of context"),
    ("translation", "word being written", "each source word", "each source word"),
    ("search engine", "what you type", "a page's index", "the page"),
    ("d[key] in Python", "the key you want", "each key of d", "each value of d"),
    ("a chat's next word", "the newest token", "all tokens so far", "all tokens so far"),
)


def run(seed: int) -> Answer:
    """Translate four words by cross-attention, then swap, shuffle and widen Q, K and V."""
    rng = torch.Generator().manual_seed(seed)
    concepts = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=rng, dtype=torch.float64))[0]
    english = _sentence(ENGLISH, concepts, rng)
    french = _sentence(FRENCH, concepts, rng)
    values = torch.randn(1, 1, len(FRENCH), 3, generator=rng, dtype=torch.float64)  # Dv = 3, unlike D = 16

    written = weights(english, french, scale=SHARP)[0, 0]  # English is being written: it asks the French
    out = attention(english, french, values, scale=SHARP)
    itself = attention(english, english, english, scale=SHARP)
    back = attention(french, english, english, scale=SHARP)
    moved = _reordered(english, french, values, out, rng)

    shared = [row for row, (_, concept) in enumerate(ENGLISH) if concept in [c for _, c in FRENCH]]
    right = [FRENCH[written[row].argmax()][1] == ENGLISH[row][1] for row in shared]
    rest = written[[row for row in range(len(ENGLISH)) if row not in shared]].max().item()
    numbers: dict[str, Measured] = {
        "self: tokens asking, tokens offered, rows of out": (len(ENGLISH), len(ENGLISH), itself.shape[2]),
        "cross: English asks French": (len(ENGLISH), len(FRENCH), out.shape[2]),
        "roles swapped: French asks English": (len(FRENCH), len(ENGLISH), back.shape[2]),
        "columns of q, of k, of v, of out": (SIZE, SIZE, values.shape[3], out.shape[3]),
        "words that found their translation": sum(right) / len(right),
        'largest weight of "now", which has none': rest,
        **moved,
    }
    verdict = _verdict(out.shape[2], back.shape[2], values.shape[3], [*moved.values()][1:], right, rest)
    short = "Q asks and gives out its rows; K is what Q is compared with, V what comes back."
    if out.shape[2] != len(ENGLISH) or back.shape[2] != len(FRENCH):
        short = "The rows of out are not those of Q here: the numbers contradict the story."
    return Answer("names", QUESTION, numbers, _picture(written), verdict, SOURCES, short=short)


def _reordered(english: Tensor, french: Tensor, values: Tensor, out: Tensor, rng: torch.Generator) -> dict[str, float]:
    """By how much out changes when q, k and v together, or v alone, are put in another order."""
    order_q = torch.randperm(len(ENGLISH), generator=rng)
    order_k = torch.arange(len(FRENCH)).roll(1)  # a shuffle that leaves nothing in place
    q = attention(english[:, :, order_q], french, values, scale=SHARP)
    kv = attention(english, french[:, :, order_k], values[:, :, order_k], scale=SHARP)
    v = attention(english, french, values[:, :, order_k], scale=SHARP)
    return {
        "q reordered: out, put back in order, changes by": (q - out[:, :, order_q]).abs().max().item(),
        "k and v reordered together: out changes by": (kv - out).abs().max().item(),
        "v reordered alone: out changes by": (v - out).abs().max().item(),
    }


def _picture(written: Tensor) -> str:
    english, french = [word for word, _ in ENGLISH], [word for word, _ in FRENCH]
    return f"{table(WORDS)}\n\n{heatmap(written.tolist(), english, french)}"


def _verdict(rows: int, back: int, width: int, moved: list[float], right: list[bool], rest: float) -> str:
    together, alone = moved
    paired = "Reordering k and v together changed out, which must not happen."
    if together < 1e-9 < alone:
        paired = f"""
            K and V are two faces of one entry: reorder both and nothing changes ({number(together)}),
            V alone and out changes by {number(alone)}."""
    return prose(f"""
        {len(ENGLISH)} English words ask {len(FRENCH)} French ones (drawn): out has {rows} rows; swapped, {back}.
        {paired}
        q and k share a width ({SIZE}), they are compared; v's is free ({width}).
        In Bahdanau's translation K = V: c_i = Σ_j a_ij h_j.
        {sum(right)} of {len(right)} words found their translation; "now" has none, yet weights sum to 1:
        {number(rest)} goes to the merely nearest.
        """)


def _sentence(words: tuple[tuple[str, int], ...], concepts: Tensor, rng: torch.Generator) -> Tensor:
    noise = torch.randn(len(words), SIZE, generator=rng, dtype=torch.float64)
    rows = torch.stack([concepts[concept] for _, concept in words])
    noisy: Tensor = rows + 0.3 * noise / noise.norm(dim=-1, keepdim=True)
    return noisy[None, None]  # (1, 1, L, SIZE)
