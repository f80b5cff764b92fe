"""Pictures of the course in which a matrix is the point: self-attention, cross-attention, masks, sparse masks."""

from __future__ import annotations

import torch
from sheet import SMALL, Sheet
from torch import Tensor

import qkv

FEATURES = ("article", "adjective", "noun", "verb", "dark", "furry", "loud")
SENTENCE = (("a", "article"), ("black", "adjective dark"), ("cat", "noun furry"), ("purrs", "verb loud"))
ASKS = {"adjective": "noun", "noun": "adjective", "verb": "noun"}  # what a word of each kind looks for
SHARP = 6.0
SOURCE = ("she", "reads", "a", "red", "book")
TARGET = (("le", "a"), ("livre", "book"), ("rouge", "red"))


def two(number: float) -> str:
    """A weight as the pictures write it."""
    return f"{number:.2f}"


def sentence() -> tuple[Tensor, ...]:
    """x (L, dim) of the sentence, and W_Q, W_K (dim, D), W_V (dim, Dv), W_O (Dv, dim)."""
    at = {name: i for i, name in enumerate(FEATURES)}
    x = torch.zeros(len(SENTENCE), len(FEATURES), dtype=torch.float64)
    for i, (_, features) in enumerate(SENTENCE):
        x[i, [at[name] for name in features.split()]] = 1.0
    w_q, w_k = torch.zeros(2, len(FEATURES), 4, dtype=torch.float64)
    for kind, wanted in ASKS.items():
        w_q[at[kind], at[wanted]] = SHARP
    w_k[range(4), range(4)] = 1.0
    w_v = torch.zeros(len(FEATURES), 3, dtype=torch.float64)
    w_v[range(4, 7), range(3)] = 1.0
    return x, w_q, w_k, w_v, w_v.T


def self_attention(theme: str) -> str:
    """From x to Q, K, V, to scores, to weights, to what comes out."""
    x, w_q, w_k, w_v, w_o = sentence()
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    scores = q @ k.T / q.shape[1] ** 0.5
    p = qkv.weights(q[None, None], k[None, None])[0, 0]
    out = p @ v
    y = x + out @ w_o
    words = [word for word, _ in SENTENCE]
    s = Sheet(
        theme, 452, "Self-attention: x becomes Q, K and V; Q meets K in scores; softmax makes weights; they mix V"
    )

    def label(name: str, t: Tensor, at: float, top: float) -> None:
        s.text(at, top - 8, f"{name}  {t.shape[0]}×{t.shape[1]}", bold=True, fill="accent")

    def names(top: float, step: float) -> None:
        for i, word in enumerate(words):
            s.text(56, top + step * i + step / 2 + 4, word, SMALL, "muted", anchor="end")

    largest = {"x": 1.0, "Q": SHARP, "K": 1.0, "V": 1.0}
    for name, t, at in (("x", x, 64), ("Q", q, 214), ("K", k, 304), ("V", v, 394)):
        label(name, t, at, 30)
        s.matrix(at, 30, (t / largest[name]).tolist(), 16, 16)
    names(30, 16)
    s.arrow(182, 62, 206, 62)
    s.text(64, 114, "columns of x: article, adjective, noun, verb,", SMALL, "muted")
    s.text(64, 132, "dark, furry, loud", SMALL, "muted")
    top, step = 186, 26
    for name, t, at, unit in (("QKᵀ/√D", scores, 64, 3.0), ("weights", p, 262, 1.0)):
        label(name, t, at, top - 16)
        for j, word in enumerate(words):
            s.text(at + 46 * j + 22, top - 5, word, SMALL, "muted", anchor="middle")
        s.matrix(at, top, t.tolist(), 46, step, say=two, share=lambda n, u=unit: 0.9 * n / u)
    names(top, step)
    s.text(446, top + 4 * step + 16, "each row sums to 1", SMALL, "muted", anchor="end")
    top = 354
    label("out = weights · V", out, 64, top - 16)
    for j, word in enumerate(FEATURES[4:]):
        s.text(64 + 46 * j + 22, top - 5, word, SMALL, "muted", anchor="middle")
    s.matrix(64, top, out.tolist(), 46, 22, say=two, share=lambda n: 0.9 * n)
    names(top, 22)
    s.arrow(214, top + 44, 238, top + 44)
    label("y = x + out · W_O", y, 262, top)
    s.matrix(262, top, y.tolist(), 22, 22, share=lambda n: min(n, 1.0))
    return s.svg()


def translation() -> tuple[Tensor, Tensor]:
    """q (1, 1, Lq, D) of the target's words and k (1, 1, Lk, D) of the source's."""
    k = torch.eye(len(SOURCE), dtype=torch.float64)
    q = torch.stack([k[SOURCE.index(meant)] for _, meant in TARGET])
    return q[None, None], k[None, None]


def cross_attention(theme: str) -> str:
    """Three French words ask five English ones."""
    q, k = translation()
    p = qkv.weights(q, k, scale=4.0)[0, 0]
    Lq, Lk = p.shape
    s = Sheet(theme, 250, "Cross-attention: three words of the target ask five of the source; three rows come out")
    left, top, width, step = 92, 92, 56, 33
    s.text(left, 22, f"the source, Lk = {Lk}: gives K and V", bold=True, fill=s.hues[1])
    for j, word in enumerate(SOURCE):
        s.box(left + width * j, 32, width - 4, 26, s.hues[1], opacity=0.18, line=None)
        s.text(left + width * j + width / 2 - 2, 50, word, anchor="middle")
        s.line(left + width * j + width / 2 - 2, 60, left + width * j + width / 2 - 2, top - 4, s.hues[1], 1, 0.6)
    for i, (word, _) in enumerate(TARGET):
        y = top + step * i
        s.box(8, y, 62, step - 2, s.hues[0], opacity=0.18, line=None)
        s.text(39, y + 20, word, anchor="middle")
        s.line(72, y + step / 2 - 1, left - 4, y + step / 2 - 1, s.hues[0], 1, 0.6)
        s.arrow(left + width * Lk + 2, y + step / 2 - 1, left + width * Lk + 24, y + step / 2 - 1)
        meant = SOURCE[int(p[i].argmax())]
        s.text(left + width * Lk + 30, y + 20, meant, fill="text")
    s.matrix(left, top, p.tolist(), width, step, say=two)
    s.text(left + width * Lk + 30, top - 8, "out", bold=True, fill="accent")
    s.text(8, top - 8, "asks", bold=True, fill=s.hues[0])
    s.text(8, 222, f"the target, Lq = {Lq}: gives Q, and out has its length", bold=True, fill=s.hues[0])
    s.text(8, 242, f"weights Lq × Lk = {Lq}×{Lk}; each row sums to 1", SMALL, "muted")
    return s.svg()


def masked(theme: str) -> str:
    """Scores with −∞ where a key is hidden, the weights that are left, and the two readings of Lq < Lk."""
    L, (few, many) = 5, (2, 5)
    q = torch.tensor([1.0, 0.5, 2.0, 1.5, 1.0], dtype=torch.float64).view(1, 1, L, 1)
    k = torch.tensor([0.5, 1.0, 0.25, 1.0, 0.5], dtype=torch.float64).view(1, 1, L, 1)
    seen = qkv.causal().tensor(L, L)[0, 0]
    scores = (q @ k.mT)[0, 0].masked_fill(~seen, -torch.inf)
    p = qkv.weights(q, k, mask=qkv.causal())[0, 0]
    s = Sheet(theme, 372, "A mask: hidden scores become minus infinity before the softmax, so their weights are 0")
    for at, t, name in ((8, scores, "scores, masked"), (250, p, "weights = softmax")):
        s.text(at, 20, name, bold=True, fill="accent")
        for i, row in enumerate(t.tolist()):
            for j, number in enumerate(row):
                words = "−∞" if number == -torch.inf else f"{number:.2f}"
                share = 0.0 if not seen[i, j] else (number / 2.5 if name != "weights = softmax" else number)
                s.cell(at + 45 * j, 30 + 28 * i, 45, 28, 0.9 * share, words if seen[i, j] or at == 8 else "0")
    s.text(8, 190, "rows: query positions; columns: key positions", SMALL, "muted")
    s.text(8, 226, f"{few} queries, {many} keys: where do the queries stand?", bold=True, fill="accent")
    for at, where, told in ((8, "start", "as the first two"), (250, "end", "as the last two")):
        shown = qkv.causal().tensor(few, many, positions=where)[0, 0]
        s.text(at, 252, f'positions="{where}"', SMALL, mono=True)
        s.text(at, 270, told, SMALL, "muted")
        for i, row in enumerate(shown.tolist()):
            for j, bit in enumerate(row):
                s.cell(at + 30 * j, 280 + 30 * i, 30, 30, 0.9 * bit)
            s.text(at + 30 * many + 6, 299 + 30 * i, f"{sum(row)} key" + "s" * (sum(row) > 1), SMALL)
    s.text(8, 362, "blue: may attend", SMALL, "muted")
    return s.svg()


SPARSE = (
    ("causal", "qkv.causal()"),
    ("a window of 8", "qkv.sliding_window(8)"),
    ("every 8th key", "qkv.causal() & qkv.strided(8)"),
    ("BigBird, blocks of 4", "qkv.bigbird(4, random_blocks=2)"),
)
SPARSE_LENGTH, SPARSE_TILE, SPARSE_CELL = 64, 8, 3


def shares(seen: Tensor, tile: int) -> tuple[float, float, Tensor]:
    """Shares of visible pairs and of tiles with a visible pair, and those tiles (rows, columns)."""
    blocks = seen.unfold(0, tile, tile).unfold(1, tile, tile).flatten(2).any(-1)
    return seen.double().mean().item(), blocks.double().mean().item(), blocks


def sparse(theme: str) -> str:
    """Four masks: which pairs they show, and which tiles have to be visited for them."""
    L, t, c = SPARSE_LENGTH, SPARSE_TILE, SPARSE_CELL
    s = Sheet(theme, 580, "Four masks of 64 queries and keys: the pairs they show, and the tiles that must be visited")
    for n, (name, code) in enumerate(SPARSE):
        x0, y0 = 8 + 244 * (n % 2), 28 + 274 * (n // 2)
        seen = eval(code, {"qkv": qkv}).tensor(L, L)[0, 0]
        pairs, tiles, blocks = shares(seen, t)
        s.text(x0, y0 - 10, name, bold=True, fill="accent")
        s.box(x0, y0, L * c, L * c, "panel", corner=0)
        for i, row in enumerate(blocks.tolist()):
            for j, bit in enumerate(row):
                if bit:
                    s.box(x0 + t * c * j, y0 + t * c * i, t * c, t * c, "accent", opacity=0.22, corner=0)
        path = "".join(f"M{x0 + c * j} {y0 + c * i}h{c}v{c}h-{c}z" for i, j in seen.nonzero().tolist())
        s.parts.append(f'<path d="{path}" fill="{s.c["accent"]}"/>')
        s.text(x0, y0 + L * c + 19, f"{pairs:.1%} of the pairs,")
        s.text(x0, y0 + L * c + 38, f"{tiles:.0%} of the tiles")
    s.text(8, 570, f"{L} queries × {L} keys; a square is a tile of {t} × {t}; pale: visited", SMALL, "muted")
    return s.svg()
