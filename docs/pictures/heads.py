"""Pictures of the course about heads: why several, who shares keys and values, and latents."""

from __future__ import annotations

import torch
from sheet import SMALL, Sheet
from torch import Tensor

import qkv

COLOURS = (("cherry", (176, 24, 56)), ("sea", (38, 112, 184)), ("lime", (132, 190, 52)), ("plum", (110, 60, 140)))
WANTED = (0, 1)  # cherry and sea, both
HQ, D, BYTES = 32, 128, 2  # README's heads, in bfloat16
LATENT = {"heads": 128, "rank": 512, "rope": 64, "nope": 128, "value": 128}  # DeepSeek-V2


def per_token(kv_heads: int, numbers: int = 2 * D) -> int:
    """Bytes of keys and values that one layer keeps for a token."""
    return kv_heads * numbers * BYTES


def retrieved() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (1, keys) and colour of one head that wants two things; weights (2, keys) and colours of two heads."""
    k = torch.eye(len(COLOURS), dtype=torch.float64)[None, None]
    v = torch.tensor([rgb for _, rgb in COLOURS], dtype=torch.float64)[None, None]
    each = k[:, :, list(WANTED)].transpose(1, 2)  # a head for each thing
    both = each.sum(1, keepdim=True)
    found = []
    for q in (both, each):
        found += [qkv.weights(q, k, scale=9.0)[0, :, 0], qkv.attention(q, k, v, scale=9.0)[0, :, 0]]
    return found[0], found[1], found[2], found[3]


def rgb(colour: Tensor) -> str:
    """A colour as SVG has it."""
    return f"rgb({','.join(str(round(part)) for part in colour.tolist())})"


def multi_head(theme: str) -> str:
    """Two things are wanted: one head returns their mean, two heads return both."""
    one, mixed, two, apart = retrieved()
    s = Sheet(theme, 330, "One head that looks for two things returns their mean; two heads return both")

    def lookup(top: float, name: str, weights: Tensor, colour: Tensor, hue: str) -> None:
        s.text(8, top + 26, name, bold=True, fill=hue)
        for n, weight in enumerate(weights.tolist()):
            s.cell(118 + 50 * n, top + 8, 50, 28, 0.9 * weight, f"{weight:.2f}", hue)
        s.arrow(322, top + 21, 346, top + 21, hue)
        s.box(356, top + 3, 36, 36, rgb(colour), corner=6)

    s.text(8, 22, "keys", SMALL, "muted")
    for n, (name, value) in enumerate(COLOURS):
        s.text(142 + 50 * n, 22, name, SMALL, "muted", anchor="middle")
        s.box(126 + 50 * n, 30, 32, 18, f"rgb{value}".replace(" ", ""), corner=4)
    s.text(8, 44, "values", SMALL, "muted")
    lookup(62, "one head", one[0], mixed[0], s.c["accent"])
    s.text(118, 122, "one softmax can only mix: neither colour is left", SMALL, "muted")
    for h in range(2):
        lookup(140 + 52 * h, f"head {h}", two[h], apart[h], s.hues[h])
    s.text(118, 262, "a softmax for each head: both come back", SMALL, "muted")
    s.text(8, 304, "W_O", bold=True, fill="accent")
    s.text(52, 304, "reads the heads side by side:", SMALL, "muted")
    for h in range(2):
        s.box(276 + 40 * h, 284, 36, 30, rgb(apart[h]), corner=6)
    s.arrow(358, 299, 380, 299)
    s.text(390, 304, "y, any mix")
    return s.svg()


def fan(s: Sheet, top: float, kv_heads: int, name: str, wrong: bool = False) -> None:
    """Query heads above, key/value heads below, and a line from each to the one that it reads."""
    step, group = 464 / HQ, HQ // kv_heads
    s.text(8, top, name, bold=True, fill="accent")
    wide = min(464 / kv_heads - 3, 60)
    for h in range(HQ):
        reads = h % kv_heads if wrong else h // group
        hue = s.hues[reads % 4]
        x, kx = 8 + step * (h + 0.5), 8 + 464 / kv_heads * (reads + 0.5)
        s.box(x - 5.5, top + 12, 11, 14, hue, opacity=0.75, line=None, corner=2)
        s.line(x, top + 28, kx, top + 58, hue, 1.2, 0.8)
    for g in range(kv_heads):
        x = 8 + 464 / kv_heads * (g + 0.5)
        s.box(x - wide / 2, top + 60, wide, 14, s.hues[g % 4], line=None, corner=2)


def bars(s: Sheet, top: float, rows: tuple[tuple[str, int], ...]) -> None:
    """Bytes a token as bars."""
    most = max(n for _, n in rows)
    s.text(8, top, "K and V of one token, one layer, bfloat16", SMALL, "muted")
    for i, (name, n) in enumerate(rows):
        y = top + 14 + 26 * i
        s.text(8, y + 14, name)
        s.box(118, y + 2, max(2.0, round(230 * n / most, 1)), 16, "accent", line=None)
        s.text(472, y + 15, f"{n:,} bytes", anchor="end")


def multi_query(theme: str) -> str:
    """32 heads with keys and values of their own, and 32 that share one."""
    s = Sheet(
        theme, 318, "Multi-head: each query head reads keys and values of its own; multi-query: all read the same"
    )
    fan(s, 22, HQ, f"MHA: {HQ} query heads, {HQ} key/value heads")
    fan(s, 128, 1, f"MQA: {HQ} query heads, 1 key/value head")
    bars(s, 240, (("MHA", per_token(HQ)), ("MQA", per_token(1))))
    return s.svg()


def grouped_query(theme: str) -> str:
    """Query head h reads key/value head h // 4; h mod 8 is another model."""
    kv = 8
    s = Sheet(theme, 352, "Grouped-query attention: groups of four neighbouring query heads share keys and values")
    fan(s, 22, kv, f"GQA: query head h reads key/value head h // {HQ // kv}")
    fan(s, 128, kv, f"not h mod {kv}: the same shapes, another model", wrong=True)
    bars(s, 240, (("MHA, 32", per_token(HQ)), (f"GQA, {kv}", per_token(kv)), ("MQA, 1", per_token(1))))
    return s.svg()


def latent(theme: str) -> str:
    """What is cached, and the two ways to use it."""
    n = LATENT
    kept = n["rank"] + n["rope"]
    s = Sheet(theme, 486, "Latent attention: 512 + 64 numbers a token are kept, and used in two ways")
    s.text(8, 26, "x, one token")
    s.arrow(104, 21, 132, 21)
    s.box(140, 6, 236, 30, "accent", opacity=0.3)
    s.box(376, 6, 96, 30, s.hues[1], opacity=0.35)
    s.text(258, 26, f"c: R = {n['rank']}", anchor="middle", bold=True)
    s.text(424, 26, f"k_r: {n['rope']}", anchor="middle", bold=True)
    s.text(472, 56, f"kept: {n['rank']} + {n['rope']} = {kept} numbers, for all heads", SMALL, "muted", anchor="end")
    expanded, absorbed = n["nope"] + n["rope"], kept
    for x, name, does, key, value in (
        (8, "expanded (training)", "unfold c for each head", ("W_UK c", n["nope"]), ("W_UV c", n["value"])),
        (250, "absorbed (decoding)", "fold W_UK into q instead", ("c", n["rank"]), ("c", n["rank"])),
    ):
        s.box(x, 78, 222, 190, "panel", corner=8)
        s.text(x + 12, 102, name, bold=True, fill="accent")
        s.text(x + 12, 122, does, SMALL, "muted")
        s.text(x + 12, 152, "key")
        s.text(x + 12, 202, "value")
        for y, (what, size), rope in ((136, key, True), (186, value, False)):
            s.box(x + 58, y, 104, 26, "accent", opacity=0.3)
            s.text(x + 110, y + 18, f"{what}: {size}", SMALL, anchor="middle")
            if rope:
                s.box(x + 162, y, 52, 26, s.hues[1], opacity=0.35)
                s.text(x + 188, y + 18, str(n["rope"]), SMALL, anchor="middle")
        sizes = (expanded, n["value"]) if x == 8 else (absorbed, n["rank"])
        heads = n["heads"] if x == 8 else 1
        s.text(x + 12, 238, f"D = {sizes[0]}, Dv = {sizes[1]},", SMALL)
        s.text(x + 12, 256, f"Hkv = {heads}; a pair: {2 * sum(sizes):,} FLOPs", SMALL)
    s.text(8, 296, f"The same result; Hq = {n['heads']}, scale 1/√{expanded} in both.", bold=True)
    rows = (
        ("128 heads", per_token(n["heads"], expanded + n["value"])),
        ("GQA, 8", per_token(8)),
        ("latent", kept * BYTES),
    )
    bars(s, 330, rows)
    s.text(8, 448, "a pair: a query and a key of one head, scores and values;", SMALL, "muted")
    s.text(8, 468, "bytes down, arithmetic up: decoding waits for bytes", SMALL, "muted")
    return s.svg()
