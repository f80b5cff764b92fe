"""Calls on a cache's view: random ones, each replayable from one integer, built by hand from plain tensors.

No cache takes part: pools, page tables and scales are made here, and read here a second time, key by key, for the
oracle. Pages lie in any order, whole prefixes of a table are common to several sequences, pools have odd strides. What
no row may read holds NaN, infinities, huge numbers or magnets: slots past a length, pages in no table, hidden keys,
their scales. Table entries past the used part name pages that do not exist; pages that nothing sees may be -1.

Stored numbers times their scales, multiplied in float64, are the keys: quantisation is no error of the kernel. The
bound of the design holds for them as it is. Scores: the scale multiplies a sum of exact products once, one more
rounding of the accumulation. Values: a weight times the value's scale is narrowed to bfloat16 instead of the weight
alone, the same half an ulp; the stored number itself is exact in bfloat16. Only the floor differs there: such a product
is lost below the smallest number t, and with it t times the stored number, so max |V| counts as at least the largest
number that is stored (127 or 448).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.call.keys import Clock, KVLayout, KVView
from qkv.scores import as_bias
from tests.kit import wide
from tests.kit.cases import DTYPES, qkv_bias, qkv_mask
from tests.kit.generator import HEAD_DIMS, PRIMES, Rng, chance, pick, random_mask, upto
from tests.kit.inputs import _bias_values, lay, sinks_of
from tests.kit.oracle import Call, Geometry, Result, Row, Spec, attention, term_of, visible
from tests.kit.wide import widened

Array = NDArray[Any]
PAGE_SIZES = (1, 2, 3, 5, 8, 15, 16, 16, 17, 24, 32, 48, 64, 100, 128)
NEAR_EDGES = (1, 2, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129, 193)
FAR_EDGES = (511, 512, 513, 527, 528, 529, 1023, 1024, 1025, 1040, 1537)
STORED = {"int8": torch.int8, "f8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "f8": 448.0}
_PARTS = ("out", "lse", "spread", "weight_v", "max_v", "seen")
POOLS = ("pages", "pages", "slots", "heads", "padded", "fused", "column", "step")


@dataclass(frozen=True)
class ViewConfig:
    """One call; everything random about its values comes from `seed`."""

    seed: int = 0
    dtype: str = "f32"
    storage: str = "plain"  # plain int8 f8
    P: int = 16
    lengths: tuple[int, ...] = (40, 7)
    queries: tuple[int, ...] = (1, 1)
    ragged: bool = False
    Hq: int = 2
    Hkv: int = 1
    D: int = 16
    Dv: int = 16
    share: tuple[tuple[int, int], ...] = ()  # of each sequence: (an earlier one, pages in common with it)
    mask: Spec | None = ("causal",)
    held: Spec | None = None
    bias: tuple[Spec, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    sinks: str | None = None
    latent: bool = False  # values are the view k[..., :Dv]
    pools: tuple[str, str] = ("pages", "pages")
    q_layout: str = "dense"
    flavour: str = "needles"
    wide: Spec | None = None  # see wide.py
    poison: str = "nan"
    visible_nan: bool = False

    def __str__(self) -> str:
        plain = ViewConfig()
        parts = [
            f"{key}={str(value)[:160]}"
            for key, value in vars(self).items()
            if key in ("seed", "lengths") or repr(value) != repr(getattr(plain, key))
        ]
        return " ".join(parts)

    @property
    def n(self) -> int:
        return len(self.lengths)

    @property
    def group(self) -> int:
        return self.Hq // self.Hkv

    @property
    def real_scale(self) -> float:
        return self.D**-0.5 if self.scale is None else self.scale

    @property
    def seen_by(self) -> Spec | None:
        """The mask of the call and what the cache still holds."""
        if self.mask is None or self.held is None:
            return self.held if self.mask is None else self.mask
        return ("and", self.mask, self.held)


# ---------------------------------------------------------------------------------------------------------- sizes
def _length(rng: Rng, P: int, top: int) -> int:
    kind = pick(rng, "page", "near", "far", "any", p=(0.3, 0.25, 0.2, 0.25))
    if kind == "page":
        return min(top, max(1, P * upto(rng, max(1, top // P), 1) + pick(rng, -1, 0, 1)))
    edges = [e for e in (NEAR_EDGES if kind == "near" else FAR_EDGES) if e <= top]
    return pick(rng, *edges) if edges and kind != "any" else upto(rng, top, 1)


def _dim(rng: Rng, top: int) -> int:
    return pick(rng, *(d for d in pick(rng, HEAD_DIMS, HEAD_DIMS, PRIMES) if d <= top))


def _sizes(rng: Rng) -> dict[str, Any]:
    """Lengths by profile; the oracle walks rows, so rows times keys are bounded."""
    shares = {"tiny": 0.08, "decode": 0.17, "long": 0.12, "common": 0.18, "prompt": 0.1, "ragged": 0.12, "latent": 0.1}
    profile = pick(rng, *shares, "equal", p=(*shares.values(), 0.13))
    dense = chance(rng, 0.1)
    P = pick(rng, *PAGE_SIZES)
    n, Hkv, group = upto(rng, 7, 1), pick(rng, 1, 1, 2, 3), pick(rng, 1, 1, 2, 3, 4, 5, 8)
    D, T, top = _dim(rng, 128), pick(rng, 1, 1, 1, 2, 3, 5, 20), 260
    if profile == "tiny":
        top, D = 9, _dim(rng, 32)
    elif profile == "long":
        n, T, top, D, Hkv = upto(rng, 5, 1), pick(rng, 1, 1, 1, 2, 3), 1700, _dim(rng, 64), pick(rng, 1, 2)
    elif profile == "common":  # whole chunks in common, and few rows: what is read once for several sequences
        n, T, top, D, Hkv = upto(rng, 6, 2), pick(rng, 1, 1, 1, 2), 1700, _dim(rng, 64), pick(rng, 1, 1, 2)
        group, dense = pick(rng, 1, 1, 2, 3, 5), False
    elif profile == "prompt":
        n, T, Hkv, group = upto(rng, 3, 1), pick(rng, 5, 20, 60), pick(rng, 1, 2), pick(rng, 1, 2)
    elif profile == "latent":
        Hkv, group, T, D = 1, pick(rng, 12, 16, 24, 40), pick(rng, 1, 1, 2, 3), pick(rng, 24, 40, 72, 96)
    elif profile == "equal":
        n = upto(rng, 4, 1)
    lengths = [_length(rng, P, top) for _ in range(n)]
    if profile in ("long", "common"):
        lengths = [max(x, upto(rng, top, 513)) if chance(rng, 0.8) else x for x in lengths]
    if profile == "equal":
        lengths = lengths[:1] * n
    queries = [min(T, x) for x in lengths]
    ragged = profile == "ragged" or (profile == "long" and chance(rng, 0.2))
    if ragged:
        queries = [min(x, pick(rng, 0, 0, 1, 1, 2, 5, upto(rng, 40))) for x in lengths]
        lengths = [0 if not t and chance(rng, 0.2) else x for t, x in zip(queries, lengths, strict=True)]
    else:
        queries = [min(queries)] * n
    Dv = D if chance(rng, 0.75) else _dim(rng, 128)
    latent = profile == "latent" or chance(rng, 0.05)
    if latent:
        Dv = max(1, D - pick(rng, 1, 8, 16))
        if profile == "latent" and chance(rng, 0.1):
            D, Dv, group, lengths = 576, 512, 12, [min(x, 70) for x in lengths]
            queries = [min(t, 1) for t in queries]
    work = sum(t * (x + 40) for t, x in zip(queries, lengths, strict=True)) * Hkv * (D + Dv)
    group = max(1, min(group, int(1.5e7 / max(work, 1))))
    if work * group > 3e7:
        Hkv, queries = 1, [-(-t // 4) for t in queries]
    if dense:
        P = max(1, *lengths) + pick(rng, 0, 1, 5)
        P = -(-P // 16) * 16 if chance(rng, 0.7) else P
    return {
        "P": P, "lengths": tuple(lengths), "queries": tuple(queries), "ragged": ragged,
        "Hq": Hkv * group, "Hkv": Hkv, "D": D, "Dv": Dv, "latent": latent,
        "common": profile == "common",
    }  # fmt: skip


def _sharing(rng: Rng, P: int, lengths: tuple[int, ...], common: bool) -> tuple[tuple[int, int], ...]:
    """A tree of prefixes: pages in common with an earlier sequence, whole chunks and parts of chunks among them."""
    pages = [-(-x // P) for x in lengths]
    found = [(0, 0)]
    share = 0.95 if common else pick(rng, 0.0, 0.7, 0.95)
    for i in range(1, len(lengths)):
        parent = upto(rng, i - 1)
        most = min(pages[i], pages[parent])
        chunks = [c for c in (512 // P, 513 // P + 1, 1024 // P, 1024 // P + 1) if 0 < c <= most]
        chunk = pick(rng, *chunks) if chunks else 1
        count = pick(rng, most, max(0, most - 1), upto(rng, most), chunk, chunk + upto(rng, 3))
        found.append((parent, min(most, count) if chance(rng, share) else 0))
    return tuple(found)


# --------------------------------------------------------------------------------------------------- masks, biases
def _fitted(spec: Spec, lengths: tuple[int, ...]) -> Spec:
    """The mask, with what belongs to one length only replaced where sequences have several."""
    if spec[0] in ("and", "or", "not", "per_head"):
        return (spec[0], *(_fitted(part, lengths) for part in spec[1:]))
    if spec[0] == "padding":
        return ("padding", tuple(min(x, *lengths, 10**9) for x in spec[1]), spec[2])
    return ("sliding_window", 5) if spec[0] in ("documents", "segments", "dense") else spec


def _mask(rng: Rng, s: dict[str, Any], equal: bool, common: bool) -> Spec | None:
    near = pick(rng, 700, 1300) if common else pick(rng, 1, 3, 16, 17, 100, 513, upto(rng, 600, 1))
    window: Spec = ("sliding_window", near)
    plain = (None, ("causal",), ("causal",), ("causal",), window, ("and", ("causal",), ("or", ("prefix", 4), window)))
    plain += (("window", near, 0), ("chunked", pick(rng, 16, 100, 600)), ("prefix", near))
    if chance(rng, 0.9 if common else 0.6):
        return pick(rng, *plain)
    sizes = {"B": len(s["lengths"]), "Hq": s["Hq"], "Lq": max(s["queries"]), "Lk": max(s["lengths"])}
    mask = random_mask(rng, sizes, sizes["Lk"], 2)
    return mask if equal else _fitted(mask, s["lengths"])


def _bias(rng: Rng, s: dict[str, Any], dtype: str, equal: bool) -> tuple[Spec, ...]:
    n, Hq, Lq, Lk = len(s["lengths"]), s["Hq"], max(s["queries"]), max(s["lengths"])
    terms: list[Spec] = []
    for _ in range(pick(rng, 0, 0, 0, 0, 0, 1, 1, 2)):
        kind = pick(rng, "tensor", "tensor", "alibi", "relative", "t5", "score_mod")
        if kind == "tensor":
            shape = (n, Hq, Lq, Lk) if equal and Lq else (n, Hq, 1, 1)
            shape = tuple(1 if x and chance(rng, 0.3) else x for x in shape)
            terms.append((kind, shape, pick(rng, dtype, "f32") if dtype != "f64" else dtype, pick(rng, 0, 0.1, 0.5)))
        else:
            rest = {"relative": (pick(rng, 0, 4, 40),), "t5": (32, 100, chance(rng, 0.5)), "score_mod": (0.5, 0.125)}
            terms.append((kind, *rest.get(kind, ())))
    return tuple(terms)


def random_view_config(seed: int) -> ViewConfig:
    """The configuration number `seed`, the same on every machine."""
    rng = np.random.default_rng((seed, 3))
    s = _sizes(rng)
    common = s.pop("common")
    storage = pick(rng, "plain", "int8", "f8", p=(0.6, 0.22, 0.18))
    dtype = pick(rng, "f32", "bf16", "f16", "f64", p=(0.33, 0.37, 0.2, 0.1))
    dtype = "bf16" if dtype == "f64" and storage != "plain" and chance(rng, 0.7) else dtype
    equal = len(set(s["lengths"])) == len(set(s["queries"])) == 1 and min(s["lengths"]) > 0
    held = None
    if chance(rng, 0.2):
        held = ("window", pick(rng, 700, 1300) if common else pick(rng, 0, 7, 16, 100, 400), None)
        held = ("or", held, ("prefix", pick(rng, 1, 4, 20))) if chance(rng, 0.5) else held
    pools = (pick(rng, *POOLS), pick(rng, *POOLS))
    if "fused" in pools:
        pools = ("fused", "fused") if s["D"] == s["Dv"] and not s["latent"] else ("pages", "pages")
    drawn = ViewConfig(
        seed=seed, dtype=dtype, storage=storage, **s,
        share=_sharing(rng, s["P"], s["lengths"], common),
        mask=_mask(rng, s, equal, common), held=held,
        bias=() if common else _bias(rng, s, dtype, equal),
        scale=pick(rng, None, 0.0, -(s["D"] ** -0.5), 0.3, p=(0.8, 0.03, 0.07, 0.1)),
        softcap=pick(rng, 5.0, 30.0) if chance(rng, 0.15) else None,
        sinks=pick(rng, dtype, "f32") if chance(rng, 0.2) else None,
        pools=pools,
        q_layout=pick(rng, "dense", "dense", "transposed", "step_rows", "step_dim", "padded", "column"),
        flavour=pick(rng, "needles", "flat", "large", p=(0.85, 0.08, 0.07)),
        poison=pick(rng, "nan", "nan", "inf", "huge", "magnet"),
        visible_nan=chance(rng, 0.04),
    )  # fmt: skip
    return widened(drawn, plain=storage == "plain")


# -------------------------------------------------------------------------------------------------------- storage
def store(
    x: Array, storage: str, dtype: torch.dtype, unit: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of numbers as a pool holds them, and the scale of each row: the unit, where they are whole numbers of it."""
    if storage == "plain":
        return torch.from_numpy(x).to(dtype), None
    largest = LARGEST[storage]
    scale = (abs(x).max(-1) / largest).astype(np.float32) if unit is None else np.full(x.shape[:-1], unit, np.float32)
    with np.errstate(all="ignore"):
        ratio = torch.from_numpy(np.nan_to_num(x / scale[..., None]).clip(-largest, largest))
    kept = ratio.round().to(torch.int8) if storage == "int8" else ratio.float().to(STORED[storage])
    return kept, torch.from_numpy(scale)


def read(kept: torch.Tensor, scale: torch.Tensor | None, kind: Any = np.float64) -> Array:
    """What stored numbers stand for: exactly, or for float64 calls as they read back, a product in float32."""
    x, wide = kept.to(torch.float64).numpy(), np.float32 if kind is np.longdouble else np.float64
    with np.errstate(all="ignore"):
        return (x if scale is None else x.astype(wide) * scale.numpy().astype(wide)[..., None]).astype(kind)


def _spoil(kept: torch.Tensor, scale: torch.Tensor | None, gone: torch.Tensor, poison: str) -> None:
    """Poison where `gone`. Scales are poisoned too: 0 times NaN is not 0."""
    bad = {"nan": (torch.nan, torch.nan), "inf": (torch.inf, -torch.inf), "zero": (0.0, 0.0)}
    if scale is None:
        top = torch.finfo(kept.dtype).max
        values = torch.tensor(bad.get(poison, (top, -top / 2)), dtype=kept.dtype)
    else:
        values = torch.tensor([-128, 127] if kept.dtype == torch.int8 else [0x7F, 0xFE], dtype=torch.int16)
        values = torch.zeros(2).to(kept.dtype) if poison == "zero" else values.to(torch.uint8).view(kept.dtype)
        scale[gone] = torch.tensor(bad.get(poison, (3e38, -3e38)))[torch.arange(int(gone.sum())) % 2]
    pattern = values.view(torch.uint8).reshape(2, -1)[torch.arange(kept.shape[-1]) % 2].flatten()
    kept.view(torch.uint8)[gone] = pattern


def order(x: torch.Tensor, kind: str, poison: str) -> torch.Tensor:
    """A pool (N, H, P, D) with the same numbers in another order in memory; gaps hold NaN, or the largest number."""
    N, H, P, D = x.shape
    fill = 0 if poison == "zero" else 0x7F

    def gaps(*shape: int) -> torch.Tensor:
        return torch.full((int(np.prod(shape)) * x.element_size(),), fill, dtype=torch.uint8).view(x.dtype).view(shape)

    swapped = {"slots": (1, 2), "heads": (0, 1), "column": (2, 3)}.get(kind)
    if swapped is not None:
        return x.transpose(*swapped).contiguous().transpose(*swapped)
    if kind == "padded":
        to = gaps(N + 1, H, P + 1, D + 3)[1:, :, :P, 2 : 2 + D]
    elif kind == "step":
        to = gaps(N, H, P, 2 * D)[..., ::2]
    else:
        return x.contiguous()
    return to.copy_(x)


# --------------------------------------------------------------------------------------------------------- inputs
@dataclass
class ViewInputs:
    """One call, ready for `qkv.attention(**call())`, and the same for the oracle, a sequence at a time."""

    config: ViewConfig
    q: torch.Tensor
    view: KVView
    mask: Any
    bias: list[Any]
    sinks: torch.Tensor | None
    oracle: list[Call]

    def call(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"q": self.q, "k": self.view, "mask": self.mask}
        kwargs |= {"scale": self.config.scale, "softcap": self.config.softcap, "sinks": self.sinks}
        for term in self.bias:
            kwargs["bias"] = as_bias(term) if "bias" not in kwargs else kwargs["bias"] + term
        return {key: value for key, value in kwargs.items() if value is not None}

    def truth(self) -> Result:
        """The definition, sequence by sequence, put together as attention returns it."""
        parts = [attention(call) for call in self.oracle]
        axis = 2 if self.config.ragged else 0
        return Result(*(np.concatenate([getattr(part, name) for part in parts], axis) for name in _PARTS))


def tables_of(config: ViewConfig, rng: Rng) -> tuple[list[list[int]], int]:
    """The pages of each sequence, in no order, and the number of pages in the pool."""
    need, tables = [-(-x // config.P) for x in config.lengths], list[list[int]]()
    N = sum(need) + upto(rng, 4, 1)
    free = iter(rng.permutation(N).tolist())
    for i, count in enumerate(need):
        parent, common = config.share[i] if config.share else (0, 0)
        first = tables[parent][:common] if common else []
        tables.append([*first, *(next(free) for _ in range(count - len(first)))])
    return tables, N


def _keys(config: ViewConfig, i: int, terms: list[Spec]) -> dict[tuple[int, int, int], Array]:
    """What each query of sequence i sees. Masks know it as batch row i."""
    Lq, Lk = config.queries[i], config.lengths[i]
    geo, every = Geometry(config.n, config.Hq, Lq, Lk), np.arange(Lk)
    found = {}
    for h in range(config.Hq):
        for t in range(Lq):
            p = Lk - Lq + t
            j = np.flatnonzero(visible(config.seen_by, i, h, t, p, every, geo))
            for spec in terms:
                if len(j) and spec[0] == "tensor":
                    j = j[term_of(spec, Row(0, h, t, p, j, geo)).add != -np.inf]
            found[0, h, t] = j
    return found


def _plant(
    config: ViewConfig, rng: Rng, q: Array, k: Array, used: Array, keys: dict[tuple[int, int, int], Array]
) -> None:
    """Point half of the rows at one key: one they see, at an edge where there is one, or one that only others see."""
    if config.real_scale == 0 or config.flavour in ("flat", "wide"):
        return
    Lk, P, group = k.shape[1], config.P, config.group
    near = {0, Lk - 1, *(m * P + d for m in range(Lk // P + 1) for d in (-1, 0))}
    edges = np.array(sorted(near | {c + d for c in (16, 128, 192, 512, 1024, 1536) for d in (-1, 0)}))
    for (_, h, t), seen in keys.items():
        row, dead = q[h, t], chance(rng, 0.5)
        if not len(seen) and dead:  # it is 0 whatever its query holds
            row[:] = 0 if config.poison == "zero" else np.nan
        if not len(seen) or chance(rng, 0.5):
            continue
        others = np.setdiff1d(np.flatnonzero(used[h // group]), seen, assume_unique=True)
        beside = np.intersect1d(others, np.concatenate([seen - 1, seen + 1]))
        beside = beside if len(beside) and chance(rng, 0.6) else others
        at = np.intersect1d(seen, edges)
        own = seen[[0, -1]] if chance(rng, 0.3) or not len(at) else at
        at = beside if chance(rng, 0.3) and len(beside) else own
        key = k[h // group, pick(rng, *at)]
        if np.isfinite(key).all():
            q[h, t] = row / 2 + key * (pick(rng, 12.0, 20.0, 32.0) / (config.real_scale * max(key @ key, 1e-6)))


def _draw(c: ViewConfig, rng: Rng, N: int, used: Array) -> tuple[list[Array], Array, Array]:
    """Queries of each sequence, and pools of keys and values, before anything is planted."""
    spread = {"flat": 0.2, "large": 60.0}.get(c.flavour, pick(rng, 4.0, 5.0, 8.0))
    k_sigma = spread**0.5
    q_sigma = spread / ((abs(c.real_scale) or 1.0) * c.D**0.5 * k_sigma)
    k = rng.normal(size=(N, c.Hkv, c.P, c.D)) * k_sigma if c.wide is None else wide.keys(c, rng, (N, c.Hkv, c.P, c.D))
    v = rng.normal(size=(N, c.Hkv, c.P, c.Dv)) + pick(rng, 0, 0, 1.5) * (c.flavour == "needles" and c.real_scale != 0)
    v *= rng.choice([0.25, 1.0, 4.0], (N, c.Hkv, c.P, 1))
    v = v if c.wide is None or not c.wide[5] else np.ones(v.shape)
    shapes = [(c.Hq, t, c.D) for t in c.queries]
    q = [rng.normal(size=x) * q_sigma if c.wide is None else wide.queries(c, rng, x) for x in shapes]
    k[rng.random((N, c.Hkv, c.P)) < 0.01] = 0  # rows with scale 0
    if c.poison == "magnet" and sum(c.queries) and c.real_scale:  # finite, and far more attractive than any key
        row = np.concatenate(q, 1)[0, c.seed % sum(c.queries)]
        k[~used] = row * (60 / c.real_scale / max(row @ row, 1e-6))
        v[~used] = -3e4
    return q, k, v


def materialise(config: ViewConfig) -> ViewInputs:
    """Draw the tensors of a configuration; the same ones every time."""
    c, rng = config, np.random.default_rng((config.seed, 9))
    dtype, kind = DTYPES[c.dtype], np.longdouble if c.dtype == "f64" else np.float64
    tables, N = tables_of(c, rng)
    values = [_bias_values(c, rng, spec) for spec in c.bias]
    keys = [_keys(c, i, _own_terms(c, values, i)) for i in range(c.n)]
    for spec, x in zip(c.bias, values, strict=True):
        if spec[0] == "tensor" and x is not None:
            _poison_bias(x, keys, torch.nan if c.poison != "zero" else 0.0)
    used = np.zeros((N, c.Hkv, c.P), bool)
    for i, table in enumerate(tables):
        for (_, h, _), j in keys[i].items():
            used[np.array(table, int)[j // c.P], h // c.group, j % c.P] = True

    q, k, v = _draw(c, rng, N, used)
    tk, k_scale = store(k, c.storage, dtype, None if c.wide is None else 2.0 ** c.wide[2])
    tv, v_scale = (tk[..., : c.Dv], k_scale) if c.latent else store(v, c.storage, dtype)
    if c.visible_nan and used.any():
        _break_one(rng, used, tk, k_scale)
    if c.poison != "magnet":
        gone = torch.from_numpy(~used)
        _spoil(tk, k_scale, gone, c.poison)
        if not c.latent:
            _spoil(tv, v_scale, gone, c.poison)
    k, v = read(tk, k_scale, kind), read(tv, v_scale, kind)
    oracle = []
    for i, table in enumerate(tables):
        j = np.arange(c.lengths[i])
        at = (np.array(table, int)[j // c.P], slice(None), j % c.P)
        mine_k, mine_v = (x[at].transpose(1, 0, 2) for x in (k, v))
        _plant(c, rng, q[i], mine_k.astype(np.float64), used[at].T, keys[i])
        rounded = torch.from_numpy(q[i]).to(dtype).double().numpy().astype(kind)
        call = Call(
            rounded[None], mine_k[None], mine_v[None], np.arange(c.queries[i])[None] + c.lengths[i] - c.queries[i],
            kind(c.real_scale), c.seen_by, tuple(_own_terms(c, values, i)), c.softcap, exact=c.wide is not None,
            _keys=keys[i],
        )  # fmt: skip
        oracle.append(call)
    sinks = None if c.sinks is None else sinks_of(c, rng)
    for call in oracle:
        call.sinks = None if sinks is None else sinks.double().numpy().astype(kind)
    joined = np.concatenate(q, 1)[None] if c.ragged else np.stack(q)
    tk, tv = order(tk, c.pools[0], c.poison), tv if c.latent else order(tv, c.pools[1], c.poison)
    tv = tk[..., : c.Dv] if c.latent else tv
    if c.pools[0] == "fused":
        both = torch.stack([tk, tv], 1)
        tk, tv = both[:, 0], both[:, 1]
    if k_scale is not None and v_scale is not None and chance(rng, 0.3):
        k_scale, v_scale = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_scale, v_scale))
    view = KVView(
        tk, tv, k_scale, v_scale, dtype, _layout(c, rng, tables, keys, N),
        None if c.held is None else qkv_mask(c.held),
    )  # fmt: skip
    bias = [qkv_bias(*pair) for pair in zip(c.bias, values, strict=True)]
    return ViewInputs(
        c, lay(torch.from_numpy(joined).to(dtype), c.q_layout), view, qkv_mask(c.mask), bias, sinks, oracle
    )


def _layout(c: ViewConfig, rng: Rng, tables: list[list[int]], keys: list[Any], N: int) -> KVLayout:
    """Pages that no row sees may be given back; past the used part stand pages that do not exist."""
    flat, starts = array("i"), array("q", [0])
    for i, table in enumerate(tables):
        seen = {int(page) for j in keys[i].values() for page in np.unique(j // c.P)}
        share = 0.8 if c.held is not None else 0.2
        flat.extend(-1 if m not in seen and chance(rng, share) else page for m, page in enumerate(table))
        flat.extend([pick(rng, -7, N, 2**31 - 1, -(2**31)) for _ in range(upto(rng, 3))])
        starts.append(len(flat))
    queries = array("q", c.queries) if c.ragged else None
    return KVLayout(flat, starts, array("q", c.lengths), queries, Clock())


def _break_one(rng: Rng, used: Array, tk: torch.Tensor, scale: torch.Tensor | None) -> None:
    """A NaN in a key that rows see: they are NaN, and no other row is."""
    page, g, slot = pick(rng, *np.argwhere(used))
    (tk[page, g, slot, :1] if scale is None else scale[page, g, slot]).fill_(torch.nan)


def _own_terms(c: ViewConfig, values: list[torch.Tensor | None], i: int) -> list[Spec]:
    """The bias terms of batch row i, for the oracle."""
    found: list[Spec] = []
    for spec, x in zip(c.bias, values, strict=True):
        table = None if x is None else x.double().numpy()
        if table is not None and spec[0] == "tensor" and len(table) > 1:
            table = table[i : i + 1]
        found.append(spec if table is None else (spec[0], table, *spec[2:]))
    return found


def _poison_bias(x: torch.Tensor, keys: list[dict[tuple[int, int, int], Array]], poison: float) -> None:
    """Poison in every entry that no row and key need; entries of -inf stay."""
    needed = torch.zeros(x.shape, dtype=torch.bool)
    for i, rows in enumerate(keys):
        for (_, h, t), j in rows.items():
            at = tuple(y if size > 1 else 0 for y, size in zip((i, h, t), x.shape[:3], strict=True))
            needed[at][torch.from_numpy(j) if x.shape[3] > 1 else slice(int(len(j) > 0))] = True
    x[~needed & (x != -torch.inf)] = poison
