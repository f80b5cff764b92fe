"""Attention from its definition, one row at a time: the judge of every backend.

Nothing here is shared with qkv: the masks have their own predicates (`tests.kit.masks`), and the
arithmetic is NumPy in float64 (longdouble when the call is float64). For every row the visible keys are gathered
first, so a hidden byte cannot take part. Beside each result stand the magnitudes that the error rule asks for:

    out   S_i = max over visible j of |scale| * sum |q_d k_d| + |bias_ij|      and      P @ |V|
          (0 where the caller knows that all scores are exact in the accumulation type)
    grad  the formula of the gradient with every factor replaced by its absolute value
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.kit.masks import KINDS, Array, Geometry as Geometry, Row as Row, Spec as Spec

# ---------------------------------------------------------------------------------------------------------- masks
_PREDICATES: dict[str, Callable[..., Array]] = {
    **{kind.name: kind.see for kind in KINDS},
    "per_head": lambda r, *masks: _see(r, masks[r.h]),
    "portion": lambda r, part, *place: _see(_whole(r, *place), part),
    "and": lambda r, a, b: _see(r, a) & _see(r, b),
    "or": lambda r, a, b: _see(r, a) | _see(r, b),
    "not": lambda r, a: ~_see(r, a),
}


def _see(r: Row, spec: Spec) -> Array:
    return _PREDICATES[spec[0]](r, *spec[1:])


def _whole(r: Row, first_key: int, first_query: int, Lq: int, Lk: int) -> Row:
    """The query and the keys of a part of a call as the whole counts them."""
    geo = r.geo._replace(Lq=Lq, Lk=Lk)
    return r._replace(i=r.i + first_query, p=r.p + first_key, j=r.j + first_key, geo=geo)


def visible(spec: Spec | None, b: int, h: int, i: int, p: int, j: Array, geo: Geometry) -> Array:
    """Which of the keys `j` the mask lets query (b, h, i) at position p attend to."""
    return np.ones(j.shape, bool) if spec is None else _see(Row(b, h, i, p, j, geo), spec)


# ----------------------------------------------------------------------------------------------------------- bias
def t5_bucket(distance: Array, buckets: int, max_distance: int, bidirectional: bool) -> Array:
    """Bucket of distance j - p: exact up to half of the buckets, logarithmic to max_distance, shared beyond."""
    base = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = np.where(distance > 0, buckets, 0)
        distance = abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # in float32 like the checkpoints: at the borders of the buckets its rounding decides
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (ratio * np.float32(buckets - exact)).astype(np.int64), buckets - 1)
    return base + np.where(distance < exact, distance, far)


class Term(NamedTuple):
    """What one bias term does to the scores of a row: s -> gain * s + add, with add = factor * tensor[index]."""

    gain: float
    add: Array
    index: tuple[Any, ...] | None = None
    factor: Any = 1


def term_of(spec: Spec, r: Row) -> Term:
    """A bias term on the keys of a row."""
    kind = spec[0]
    if kind == "tensor":
        t = spec[1].reshape((1,) * (4 - spec[1].ndim) + spec[1].shape)
        index = tuple(x if n > 1 else 0 for x, n in zip((r.b, r.h, r.i), t.shape[:3], strict=True))
        where = (*index, r.j if t.shape[3] > 1 else np.zeros_like(r.j))
        return Term(1.0, t[where], where)
    if kind == "alibi":
        return Term(1.0, -spec[1][r.h] * abs(r.p - r.j), (np.full_like(r.j, r.h),), -abs(r.p - r.j))
    if kind == "relative":
        radius = spec[1].shape[1] // 2
        column = np.clip(r.j - r.p, -radius, radius) + radius
        return Term(1.0, spec[1][r.h, column], (r.h, column))
    if kind == "t5":
        column = t5_bucket(r.j - r.p, spec[1].shape[1], spec[2], spec[3])
        return Term(1.0, spec[1][r.h, column], (r.h, column))
    assert kind == "score_mod", kind
    return Term(spec[1] * (1 + 0.25 * r.h), spec[2] * (r.j - r.p))


# ------------------------------------------------------------------------------------------------------- the rows
@dataclass
class Call:
    """One attention call in the oracle's own precision."""

    q: Array
    k: Array
    v: Array
    positions: Array  # (B, Lq)
    scale: float
    mask: Spec | None = None
    bias: tuple[Spec, ...] = ()
    softcap: float | None = None
    sinks: Array | None = None
    exact: bool = False  # no score is rounded in the accumulation type, whatever its magnitude
    dropout_p: float = 0.0
    seed: int = 0
    _keys: dict[tuple[int, int, int], Array] = field(default_factory=dict)

    @property
    def geo(self) -> Geometry:
        return Geometry(len(self.q), self.q.shape[1], self.q.shape[2], self.k.shape[2])

    def keys(self, b: int, h: int, i: int) -> Array:
        """The keys that query (b, h, i) sees: those the mask shows and no bias of -inf hides."""
        if (b, h, i) not in self._keys:
            self._keys[b, h, i] = self._find(b, h, i)
        return self._keys[b, h, i]

    def _find(self, b: int, h: int, i: int) -> Array:
        p = int(self.positions[b, i])
        j = np.flatnonzero(visible(self.mask, b, h, i, p, np.arange(self.geo.Lk), self.geo))
        for spec in self.bias:
            if len(j) and spec[0] != "score_mod":
                j = j[term_of(spec, Row(b, h, i, p, j, self.geo)).add != -np.inf]
        return j


@dataclass
class Grad:
    """A gradient and its two magnitudes: plain, and weighted by 1 + S of the row."""

    value: Array
    plain: Array
    weighted: Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: Any) -> Grad:
        return cls(*(np.zeros(shape, dtype) for _ in range(3)))

    def add(self, where: Any, value: Array, plain: Array, weighted: Array, repeats: bool = False) -> None:
        for mine, more in zip((self.value, self.plain, self.weighted), (value, plain, weighted), strict=True):
            if repeats:  # one entry may be named more than once: a bias broadcast over keys, a clamped distance
                np.add.at(mine, where, more)
            else:
                mine[where] += more


@dataclass
class Result:
    out: Array
    lse: Array
    spread: Array  # S_i, (B, Hq, Lq)
    weight_v: Array  # P @ |V|
    max_v: Array  # max |v| that the row can see, (B, Hq, Lq)
    seen: Array  # number of visible keys, (B, Hq, Lq)
    grads: dict[str, Grad] = field(default_factory=dict)  # q k v sinks bias0 bias1 ...


class _Row(NamedTuple):
    """Everything about one row that its gradient needs as well."""

    at: tuple[Any, ...]  # where its keys stand in k and v
    k: Array
    v: Array
    abs_k: Array
    abs_v: Array
    p: Array
    sink: Any
    spread: Any
    slope: Array  # d(s after softcap) / d(scale * q.k)
    slope_size: Array
    terms: list[Term]
    kept: Array  # what dropout multiplies each weight by
    far: Any  # how far below the maximum each key's score is, where it has weight: what exp() may round


def attention(call: Call, dout: Array | None = None, dlse: Array | None = None) -> Result:
    """The definition, and the gradients of sum(out * dout) + sum(lse * dlse) when dout is given."""
    Hq, Dv, kind = call.geo.Hq, call.v.shape[3], call.q.dtype
    row_shape = call.geo[:3]
    res = Result(
        np.zeros((*row_shape, Dv), kind),
        np.full(row_shape, -np.inf, kind),
        np.zeros(row_shape, kind),
        np.zeros((*row_shape, Dv), kind),
        np.zeros(row_shape, kind),
        np.zeros(row_shape, np.int64),
    )
    if dout is not None:
        shapes = {"q": call.q.shape, "k": call.k.shape, "v": call.v.shape}
        shapes |= {f"bias{n}": s[1].shape for n, s in enumerate(call.bias) if s[0] != "score_mod"}
        shapes |= {} if call.sinks is None else {"sinks": call.sinks.shape}
        res.grads = {name: Grad.zeros(shape, kind) for name, shape in shapes.items()}
    group = max(1, Hq // max(1, call.k.shape[1]))
    sizes = abs(call.k), abs(call.v)
    with np.errstate(all="ignore"):
        for b, h, i in np.ndindex(row_shape):
            row = _forward_row(call, res, b, h, i, h // group, sizes)
            if dout is not None and dlse is not None:
                _backward_row(call, res, row, (b, h, i), dout[b, h, i], dlse[b, h, i])
    return res


def _forward_row(call: Call, res: Result, b: int, h: int, i: int, g: int, sizes: tuple[Array, Array]) -> _Row:
    j, q = call.keys(b, h, i), call.q[b, h, i]
    where = (b, g, j if len(j) < call.geo.Lk else slice(None))  # all of them need no copy
    k, v, abs_k, abs_v = (x[where] for x in (call.k, call.v, *sizes))
    s = (k @ q) * call.scale
    size = (abs_k @ abs(q)) * abs(call.scale)
    slope = slope_size = np.ones_like(s)
    if call.softcap is not None:
        t = np.tanh(s / call.softcap)
        s, slope, slope_size = call.softcap * t, 1 / np.cosh(s / call.softcap) ** 2, 1 + t * t
    terms = [term_of(spec, Row(b, h, i, int(call.positions[b, i]), j, call.geo)) for spec in call.bias]
    for term in terms:
        s, size = s * term.gain + term.add, size * abs(term.gain) + abs(term.add)
    sink = -np.inf if call.sinks is None else call.sinks[h]
    at = (b, h, i)
    res.seen[at] = len(j)
    p, sink_p = np.zeros_like(s), s.dtype.type(0)
    kept = _kept(call, (b, h, i), j, s.dtype)
    if np.any(np.isnan(s) | (s == np.inf)):
        p[:] = res.out[at] = res.lse[at] = np.nan
        sink_p = sink_p + np.nan
    else:
        top = max(s.max(initial=-np.inf), sink)
        if top > -np.inf:
            e, sink_e = np.exp(s - top), np.exp(sink - top)
            total = e.sum() + sink_e
            p, sink_p = e / total, sink_e / total
            alive = s > -np.inf  # a score of -inf has weight 0, whatever its value holds
            res.out[at] = (p * kept)[alive] @ v[alive]
            res.lse[at] = top + np.log(total)
            res.weight_v[at] = (p * kept)[alive] @ abs_v[alive]
    # Where the best key's value is 0, or its weight dropped, what is left are weights far below it. The rounding of
    # their distance from the maximum is theirs; S, where it counts, is at least half of that distance.
    apart = call.exact or call.dropout_p > 0
    far = np.where(p > 0, s.max(initial=sink) - s, 0) if apart else 0
    if apart:  # weights below the smallest number of the accumulation may be lost as a whole
        far[far > (700 if s.dtype == np.longdouble else 85)] = 1e18
    res.spread[at] = 0 if call.exact else size[np.isfinite(size)].max(initial=0)
    if apart:
        res.weight_v[at] += (p * kept * far / (1 + res.spread[at])) @ np.where(np.isfinite(v), abs_v, 0)
    res.max_v[at] = abs_v[np.isfinite(v)].max(initial=0)
    return _Row(where, k, v, abs_k, abs_v, p, sink_p, res.spread[at], slope, slope_size, terms, kept, far)


def _kept(call: Call, at: tuple[int, int, int], j: Array, kind: Any) -> Array:
    """1 / (1 - p) where a weight is kept, 0 where it is dropped: by a hash of seed, batch row, head, query and key."""
    if not call.dropout_p:
        return np.ones(len(j), kind)
    x = np.full(len(j), call.seed, np.int64).astype(np.uint64)
    for index in (*at, j):
        x = x + (np.asarray(index).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(11)) >= np.uint64(round(call.dropout_p * 2**53))) / (1 - kind.type(call.dropout_p))


def _backward_row(call: Call, res: Result, row: _Row, at: tuple[int, int, int], do: Array, dlse: Any) -> None:
    h, k, v, p = at[1], row.k, row.v, row.p
    q, weight, grads = call.q[at], 1 + row.spread + row.far, res.grads
    dp, dp_size = row.kept * (v @ do), row.kept * (row.abs_v @ abs(do))
    mean, mean_size = p @ dp, p @ dp_size
    ds, ds_size = p * (dp - mean + dlse), p * (dp_size + mean_size + abs(dlse))
    mean_far = p @ (dp_size * row.far)
    if call.sinks is not None:
        size, far = row.sink * (mean_size + abs(dlse)), -np.log(row.sink) if call.exact and row.sink > 0 else 0
        grads["sinks"].add((h,), row.sink * (dlse - mean), size, size * (1 + row.spread + far) + row.sink * mean_far)
    if not len(k):
        return
    share = p * row.kept
    grads["v"].add(row.at, share[:, None] * do, share[:, None] * abs(do), (share * weight)[:, None] * abs(do))
    ds_weighted = ds_size * weight + p * mean_far
    for n in reversed(range(len(row.terms))):  # backwards through s -> gain * s + add
        term = row.terms[n]
        if term.index is not None:
            index = term.index[-grads[f"bias{n}"].value.ndim :]
            size = abs(term.factor)
            grads[f"bias{n}"].add(index, ds * term.factor, ds_size * size, ds_weighted * size, repeats=True)
        ds, ds_size, ds_weighted = ds * term.gain, ds_size * abs(term.gain), ds_weighted * abs(term.gain)
    dr, dr_size, dr_weighted = ds * row.slope, ds_size * row.slope, ds_weighted * row.slope_size
    scale, scale_size = call.scale, abs(call.scale)
    grads["q"].value[at] = scale * (dr @ k)
    grads["q"].plain[at] = scale_size * (dr_size @ row.abs_k)
    grads["q"].weighted[at] = scale_size * (dr_weighted @ row.abs_k)
    outer = scale_size * abs(q)
    grads["k"].add(row.at, dr[:, None] * (scale * q), dr_size[:, None] * outer, dr_weighted[:, None] * outer)
