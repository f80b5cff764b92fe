"""Random configurations, each replayable from one integer, and the tensors that make a wrong kernel visible.

Values are not drawn flat. Logits have a standard deviation of 4 and more. Some query rows are needles: nearly all
their weight lies on one key, the first, the last, or one at the edge of a tile or a chunk, so losing that key loses
the row. Others are magnets: they point at a key that the mask hides from them, so one leaked key takes the row over.
Slots that no row may see hold NaN, infinities or huge numbers, in K, in V, in biases and in the gaps of strided
memory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.kit.cases import Config, query_positions, uses_position
from tests.kit.masks import KINDS, Draw, Rng, Spec, chance, pick, upto
from tests.kit.wide import widened

EDGES = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193)
FAR_EDGES = (255, 256, 257, 383, 384, 511, 512, 513, 575, 577, 767, 769, 1023, 1024, 1025)
HEAD_DIMS = (8, 16, 32, 64, 80, 96, 128)
PRIMES = (1, 2, 3, 5, 7, 13, 23, 31, 37, 61, 67, 101, 127, 131, 193, 251)


# ---------------------------------------------------------------------------------------------------------- sizes
def _length(rng: Rng, top: int) -> int:
    edges = [e for e in EDGES + FAR_EDGES if e <= top]
    kind = pick(rng, "edge", "small", "any", p=(0.5, 0.3, 0.2))
    return pick(rng, *edges) if kind == "edge" else upto(rng, min(9, top) if kind == "small" else top, 1)


def _head_dim(rng: Rng, top: int = 256) -> int:
    kind = pick(rng, "common", "prime", "any", p=(0.7, 0.15, 0.15))
    dim = pick(rng, *HEAD_DIMS) if kind == "common" else pick(rng, *PRIMES) if kind == "prime" else upto(rng, 256, 1)
    return min(dim, top)


def _sizes(rng: Rng) -> dict[str, int]:
    """Lengths by profile. The product of batch, heads and queries is bounded: the oracle walks the rows."""
    profile = pick(
        rng,
        "tiny",
        "square",
        "rectangle",
        "chunk",
        "long",
        "decode",
        "empty",
        p=(0.24, 0.2, 0.2, 0.1, 0.07, 0.16, 0.03),
    )
    B, Hkv, group = pick(rng, 1, 1, 2, 3), pick(rng, 1, 1, 2, 2, 3, 5), pick(rng, 1, 1, 1, 2, 3, 4, 5, 7, 8)
    if profile in ("tiny", "empty"):
        Lq, Lk = upto(rng, 9, 1), upto(rng, 9, 1)
    elif profile == "square":
        Lq = Lk = _length(rng, 129)
    elif profile == "rectangle":
        Lq, Lk = _length(rng, 65), _length(rng, 193)
    elif profile == "chunk":
        Lq = _length(rng, 49)
        Lk = Lq + _length(rng, 300)
    elif profile == "long":
        B, Hkv, group = 1, 1, pick(rng, 1, 2)
        Lq = Lk = upto(rng, 300, 130)
    else:
        Lq = pick(rng, 1, 1, 1, 2, 3, 5, 11)
        Lk = pick(rng, _length(rng, 300), pick(rng, *FAR_EDGES), upto(rng, 1100, 1), pick(rng, 1537, 2049, 3000))
        group = pick(rng, group, 1, 4, 6, 11, 16)
    budget = 640 if profile != "tiny" else 300
    while B * Hkv * group * Lq > budget and (B > 1 or Hkv > 1 or group > 1):
        B, Hkv, group = (B - 1, Hkv, group) if B > 1 else (B, Hkv - 1, group) if Hkv > 1 else (B, Hkv, group - 1)
    D = _head_dim(rng, 128 if Lk * Hkv * B > 600 else 256)
    Dv = D if chance(rng, 0.8) else _head_dim(rng, 128 if Lk > 300 else 256)
    if B * Hkv == 1 and chance(rng, 0.05):  # the widths of absorbed latent attention
        D, Dv = 576, 512
    sizes = {"B": B, "Hq": Hkv * group, "Hkv": Hkv, "Lq": Lq, "Lk": Lk, "D": D, "Dv": Dv}
    if profile == "empty":
        for key in {"B": ["B"], "H": ["Hq", "Hkv"]}.get(gone := pick(rng, "B", "H", "Lq", "Lk", "Lk", "Dv"), [gone]):
            sizes[key] = 0
    return sizes


# ---------------------------------------------------------------------------------------------------------- masks
def random_atom(rng: Rng, s: dict[str, int], last: int, nested: bool) -> Spec:
    """One mask that is not a composition with & | ~. `last` is the highest position of a query."""
    Lk = s["Lk"]
    near = pick(rng, 1, 2, 3, 7, 16, 17, 64, upto(rng, max(1, Lk), 1))
    kind = pick(rng, *(kind for kind in KINDS for _ in range(kind.share)), *[None] * (not nested and s["Hq"]))
    indices = tuple(sorted({upto(rng, max(0, Lk - 1)) for _ in range(upto(rng, 4))})) if Lk else ()
    draw = Draw(rng, s, last, near, indices)
    if kind is not None:
        return (kind.name, *kind.draw(draw))
    draw.block()
    return ("per_head", *(random_mask(rng, s, last, 1, nested=True) for _ in range(s["Hq"])))


def random_mask(rng: Rng, s: dict[str, int], last: int, depth: int, nested: bool = False) -> Spec:
    if depth == 0 or chance(rng, 0.45):
        return random_atom(rng, s, last, nested)
    kind = pick(rng, "and", "and", "or", "not")
    parts = 1 if kind == "not" else 2
    return (kind, *(random_mask(rng, s, last, depth - 1, nested) for _ in range(parts)))


def _of_a_larger_call(config: Config, last: int) -> Config:
    """Now and then the mask is that of a part of a larger call; drawn apart, so that all else stays what it was."""
    rng = np.random.default_rng((config.seed, 17))
    if config.mask is None or not chance(rng, 0.1):
        return config
    first_key, first_query = (pick(rng, 0, pick(rng, 1, 16, 64), upto(rng, 100)) for _ in range(2))
    Lq, Lk = config.Lq + first_query + upto(rng, 9), config.Lk + first_key + pick(rng, 0, upto(rng, 40))
    sizes = {"B": config.B, "Hq": config.Hq, "Hkv": config.Hkv, "Lq": Lq, "Lk": Lk}
    part = random_mask(rng, sizes, max(last + first_key, Lk), 2)
    if config.positions == ("none",) and config.Lq != config.Lk and uses_position(part):
        return config
    return replace(config, mask=("portion", part, first_key, first_query, Lq, Lk))


# ----------------------------------------------------------------------------------------------- everything else
def _positions(rng: Rng, s: dict[str, int], needed: bool) -> Spec:
    B, Lq, Lk = s["B"], s["Lq"], s["Lk"]
    if chance(rng, 0.5 if Lq == Lk else 0 if needed else 0.7):
        return ("none",)
    kind = pick(rng, "start", "end", "end", "end", "int", "ints", "tensor")
    if kind == "int":
        return (kind, upto(rng, Lk + 3, -3))
    if kind == "ints":
        return (kind, tuple(upto(rng, max(Lk - Lq, 0) + 2, -2) for _ in range(B)))
    if kind == "tensor":
        base = np.arange(Lq)[None] + rng.integers(-2, max(Lk - Lq, 0) + 3, (pick(rng, 1, B), 1))
        return (kind, base if chance(rng, 0.5) else rng.permuted(base, axis=1))
    return (kind,)


def _bias(rng: Rng, s: dict[str, int], dtype: str) -> tuple[Spec, ...]:
    full = (s["B"], s["Hq"], s["Lq"], s["Lk"])
    terms: list[Spec] = []
    for _ in range(pick(rng, 0, 0, 0, 0, 1, 1, 1, 2)):
        kind = pick(rng, "tensor", "tensor", "tensor", "alibi", "relative", "t5", "score_mod")
        if kind == "tensor":
            shape = pick(rng, full, full[2:], (1, *full[1:]), tuple(1 if chance(rng, 0.4) and n else n for n in full))
            terms.append((kind, shape, pick(rng, dtype, "f32") if dtype != "f64" else dtype, pick(rng, 0, 0, 0.1, 0.6)))
        elif kind == "relative":
            terms.append((kind, pick(rng, 0, 1, 4, 40)))
        elif kind == "t5":
            terms.append((kind, pick(rng, 8, 32), pick(rng, 20, 128), chance(rng, 0.5)))
        elif kind == "score_mod":
            terms.append((kind, pick(rng, 1.0, 0.5, -1.0), pick(rng, 0.0, 0.125, -0.25)))
        else:
            terms.append((kind,))
    return tuple(terms)


def _layouts(rng: Rng) -> dict[str, str]:
    common = ("dense", "dense", "transposed", "transposed", "step_rows", "step_dim", "column", "offset", "padded")
    shared = (*common, "expand_batch", "expand_heads")
    return {n: pick(rng, *(shared if n in "qkv" or n == "dout" else common)) for n in ("q", "k", "v", "dout", "mask")}


def random_config(seed: int) -> Config:
    """The configuration number `seed`, the same on every machine."""
    rng = np.random.default_rng(seed)
    s = _sizes(rng)
    dtype = pick(rng, "f32", "bf16", "f16", "f64", p=(0.36, 0.3, 0.2, 0.14))
    bias = _bias(rng, s, dtype)
    lasts = {"none": s["Lq"], "start": s["Lq"], "end": s["Lk"]}
    positions = _positions(rng, s, needed=True)
    draft = Config(seed=seed, dtype=dtype, positions=positions, bias=bias, **s)
    last = max(int(query_positions(draft).max(initial=0)), lasts.get(positions[0], 0), s["Lk"])
    mask = random_mask(rng, s, last, 2) if chance(rng, 0.8) else None
    if not uses_position(mask) and all(t[0] == "tensor" for t in bias) and chance(rng, 0.6):
        positions = ("none",)
    flavour = pick(rng, "needles", "flat", "shifted", "large", "small", p=(0.74, 0.08, 0.07, 0.06, 0.05))
    v_in_k = s["Dv"] < s["D"] and chance(rng, 0.5)
    scale = pick(rng, None, 0.0, -(s["D"] ** -0.5), 0.3, -1.25, 0.02, p=(0.7, 0.03, 0.07, 0.08, 0.06, 0.06))
    drawn = replace(
        draft,
        mask=mask,
        positions=positions,
        scale=scale,
        softcap=None if flavour == "shifted" or chance(rng, 0.8) else pick(rng, 0.5, 5.0, 20.0, 50.0),
        sinks=pick(rng, dtype, "f32") if chance(rng, 0.2) else None,
        layouts=_layouts(rng),
        v_in_k=v_in_k,
        flavour=flavour,
        poison=pick(rng, "nan", "nan", "inf", "huge", "magnet"),
        visible_nan=chance(rng, 0.04),
    )
    drawn = _of_a_larger_call(drawn, last)
    if (wide := widened(drawn)).wide is not None:
        return replace(wide, v_in_k=False)
    more = np.random.default_rng((seed, 13))  # apart: what else is drawn stays what it was
    drops = not drawn.visible_nan and flavour != "shifted" and chance(more, 0.1)
    return replace(drawn, dropout_p=pick(more, 0.1, 0.5, 0.9)) if drops else drawn
