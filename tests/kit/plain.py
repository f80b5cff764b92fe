"""Attention in plain NumPy that can be told to be wrong: the Python mutants.

Without a mistake it passes the gate. With one, named in `PYTHON_MUTANTS`, it is what a kernel with that bug would
compute. `tests/gates/mutants.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.kit.cases import DTYPES
from tests.kit.inputs import Inputs
from tests.kit.oracle import Call, Row, Spec, Term, term_of, visible

Array = NDArray[Any]
TILE = 64  # keys a tile

# name: what is wrong
PYTHON_MUTANTS: dict[str, str] = {
    "last key": "the last key is never read",
    "first key": "the first key is never read",
    "tile edge": "the last key of every tile is never read",
    "past the end": "one key past the end, a copy of the last, is read too",
    "head map": "query head h reads key head h % Hkv",
    "odd group": "the last head of an odd group reads the next key head",
    "stale maximum": "the output is not rescaled when the maximum grows",
    "stale sum": "the sum is not rescaled when the maximum grows",
    "no maximum": "exp(s) without subtracting the maximum",
    "mean at large scores": "beyond 1e9 a row's weights are all equal",
    "best weight lost": "the maximum is rounded after the factor log2 e: beyond 1e9 the best key has weight 0",
    "difference overflows": "beyond a third of the largest number the factor log2 e makes scores infinite",
    "scale 1/D": "scores are divided by D, not by its root",
    "scale sign": "a negative scale loses its sign",
    "mean of v": "q and k are ignored",
    "zeros": "the output is zeros",
    "tile twice": "the last key tile is merged twice",
    "coarse exp": "exp with 11 correct bits",
    "half scores": "scores are rounded to bfloat16",
    "half sums": "the output is kept in the call's dtype between tiles",
    "cap after mask": "the mask is applied before softcap, so hidden keys get -c",
    "no cap": "softcap is ignored",
    "bias before cap": "bias is added before softcap",
    "bias of head 0": "every head gets the first head's bias",
    "bias of batch 0": "every batch row gets the first row's bias",
    "window + 1": "a sliding window sees one key more",
    "window right": "a window's right end is off by one",
    "strictly causal": "j < p instead of j <= p",
    "start for end": 'positions="end" is read as "start"',
    "query index": "masks get the query's index for its position",
    "padding side": "left padding is read as right padding",
    "prefix of batch 0": "every batch row gets the first row's prefix",
    "padding of batch 0": "every batch row gets the first row's length",
    "mask of head 0": "every head gets the first head's mask",
    "mask of batch 0": "every batch row gets the first row's dense mask",
    "not ignored": "~ is dropped",
    "or for and": "& is read as |",
    "hidden in sum": "hidden keys take part in the denominator",
    "finite sentinel": "hidden scores are -5e4, not -inf",
    "dead row mean": "a row that sees nothing is the mean of v",
    "dead row lse": "a row that sees nothing has lse 0",
    "first tile hidden": "a hidden first tile leaves NaN: exp(-inf - -inf)",
    "0 * NaN": "hidden values are multiplied by 0 instead of left out",
    "bias -inf": "a bias of -inf is clamped to the lowest number",
    "lse base 2": "lse is a base-2 logarithm",
    "lse maximum": "lse lacks the maximum",
    "lse rounded": "lse is rounded to bfloat16",
    "sink twice": "the sink is counted once a key tile",
    "sink in lse": "lse lacks the sink",
    "sink of head 0": "every head has the first head's sink",
    "d mean": "the gradient of softmax lacks its mean term",
    "d lse": "the gradient through lse is dropped",
    "dk scale": "dk lacks the scale",
    "dk group": "dk and dv keep only the last head of a group",
    "dq tile": "dq lacks the last key tile",
    "d lse rounded": "weights are recomputed from lse, rounded to the accumulation type",
    "dv weights": "dv uses weights that are not normalised by the sink",
    "d cap": "the derivative of softcap is dropped",
    "d sink": "the gradient of the sinks lacks its lse term",
    "d bias": "the gradient of a broadcast bias is not summed",
    "d bias scale": "the gradient of the bias is scaled like q's",
}


def _map(spec: Spec | None, change: Callable[[Spec], Spec]) -> Spec | None:
    """The description of a mask with every part changed."""
    if spec is None:
        return None
    if spec[0] in ("and", "or", "not", "per_head"):
        spec = (spec[0], *(_map(part, change) for part in spec[1:]))
    return change(spec)


def _wrong_mask(bug: str, spec: Spec | None) -> Spec | None:
    first = {"prefix of batch 0": "prefix", "padding of batch 0": "padding"}.get(bug)

    def change(s: Spec) -> Spec:
        kind = s[0]
        if bug == "window + 1" and kind == "sliding_window":
            return (kind, s[1] + 1)
        if bug == "window right" and kind == "window" and s[2] is not None:
            return (kind, s[1], s[2] + 1)
        if bug == "strictly causal" and kind == "causal":
            return ("and", s, ("not", ("window", 0, 0)))
        if bug == "padding side" and kind == "padding":
            return (kind, s[1], "right")
        if kind == first and isinstance(s[1], tuple):
            return (kind, s[1][:1] * len(s[1]), *s[2:])
        if bug == "mask of head 0" and kind == "per_head":
            return (kind, *(s[1],) * (len(s) - 1))
        if bug == "mask of batch 0" and kind == "dense" and s[1].ndim == 4:
            return (kind, s[1][:1])
        if bug == "not ignored" and kind == "not":
            return s[1]
        return ("or", *s[1:]) if bug == "or for and" and kind == "and" else s

    return _map(spec, change)


# ------------------------------------------------------------------------------------- the implementation to break
class Plain:
    """Attention in key tiles with an online softmax and an explicit backward, in the accumulation dtype."""

    def __init__(self, inputs: Inputs, bug: str = "") -> None:
        self.inputs, self.bug, self.config = inputs, bug, inputs.config
        c, call = self.config, inputs.oracle
        self.kind = np.float64 if c.dtype == "f64" else np.float32
        positions = call.positions
        if (bug == "start for end" and c.positions[0] == "end") or bug == "query index":
            positions = np.broadcast_to(np.arange(c.Lq), (c.B, c.Lq))
        self.call = Call(call.q, call.k, call.v, positions, call.scale, _wrong_mask(bug, call.mask), call.bias)
        self.seen = np.zeros(call.geo, bool)
        for b, h, i in np.ndindex(*call.geo[:3]):
            self.seen[b, h, i] = visible(self.call.mask, b, h, i, int(positions[b, i]), np.arange(c.Lk), call.geo)
        self.scale = self.kind(call.scale)
        if bug == "scale 1/D":
            self.scale = self.kind(call.scale / c.D**0.5)
        if bug == "scale sign":
            self.scale = abs(self.scale)

    def __call__(self) -> dict[str, torch.Tensor]:
        inputs, kind = self.inputs, self.kind
        names = inputs.leaves
        self.grads = {name: np.zeros(tuple(leaf.shape), kind) for name, leaf in names.items()}
        geo = inputs.oracle.geo
        out, lse = np.zeros((*geo[:3], self.config.Dv), kind), np.zeros(geo[:3], kind)
        dout, dlse = (x.detach().double().numpy().astype(kind) for x in (inputs.dout, inputs.dlse))
        with np.errstate(all="ignore"):
            for b, h in np.ndindex(geo.B, geo.Hq):
                self._head(b, h, out[b, h], lse[b, h], dout[b, h], dlse[b, h])
        order = sorted(range(4), key=lambda d: -inputs.q.stride(d))
        rounded = torch.from_numpy(out).to(DTYPES[self.config.dtype]).permute(order).contiguous()
        rounded = rounded.permute([order.index(d) for d in range(4)])
        grads = {f"d{n}": torch.from_numpy(g).to(names[n].dtype) for n, g in self.grads.items()}
        return {"out": rounded, "lse": torch.from_numpy(lse)} | grads

    def _kv_head(self, h: int) -> int:
        c = self.config
        if self.bug == "head map":
            return h % c.Hkv
        g = h // c.group
        if self.bug == "odd group" and c.group % 2 and c.group > 1 and h % c.group == c.group - 1:
            return min(g + 1, c.Hkv - 1)
        return g

    def _bias(self, b: int, h: int) -> list[list[Term]]:
        """The terms of every row of a head, over all keys."""
        if self.bug == "bias of head 0":
            h = 0
        if self.bug == "bias of batch 0":
            b = 0
        rows, keys = range(self.config.Lq), np.arange(self.config.Lk)
        return [
            [term_of(s, Row(b, h, i, int(self.call.positions[b, i]), keys, self.call.geo)) for s in self.call.bias]
            for i in rows
        ]

    def _head(self, b: int, h: int, out: Array, lse: Array, dout: Array, dlse: Array) -> None:
        c, bug, kind, inputs = self.config, self.bug, self.kind, self.inputs
        g = self._kv_head(h)
        q, k, v = (x.astype(kind) for x in (inputs.oracle.q[b, h], inputs.oracle.k[b, g], inputs.oracle.v[b, g]))
        if bug != "0 * NaN":
            v = np.nan_to_num(v, nan=0, posinf=0, neginf=0)
        seen = self.seen[b, h].copy()
        rows, terms = c.Lq, self._bias(b, h)
        raw = (q @ k.T) * self.scale
        if bug == "half scores":
            raw = torch.from_numpy(raw).bfloat16().to(torch.from_numpy(raw).dtype).numpy()
        s, slope = raw, np.ones_like(raw)
        if bug == "bias before cap":
            s = self._add(s, terms, seen)
        if bug == "cap after mask":
            s = np.where(seen, s, -np.inf)
        if c.softcap is not None and bug != "no cap":
            t = np.tanh(s / kind(c.softcap))
            s, slope = kind(c.softcap) * t, 1 - t * t
        if bug != "bias before cap":
            s = self._add(s, terms, seen)
        if bug == "d cap":
            slope = np.ones_like(raw)
        s = np.where(seen, s, kind(-5e4) if bug == "finite sentinel" else -np.inf).astype(kind)
        if bug == "cap after mask" and c.softcap is not None:
            s = np.where(seen, s, -kind(c.softcap))
        self._drop(s)
        if bug == "past the end" and c.Lk:
            s, v = np.concatenate([s, s[:, -1:]], 1), np.concatenate([v, v[-1:]])
        sink = (
            kind(-np.inf)
            if inputs.oracle.sinks is None
            else kind(inputs.oracle.sinks[0 if bug == "sink of head 0" else h])
        )
        out[:], lse[:], sink_p = self._softmax(raw, s, v, sink, seen, rows)
        if bug == "mean of v" and c.Lk:
            out[:] = np.where(seen.any(1)[:, None], v[: c.Lk].mean(0), 0)
        if bug == "zeros":
            out[:] = 0
        self._backward(
            b, h, g, (q, np.nan_to_num(k), v[: c.Lk]), s[:, : c.Lk], slope, terms, (out, lse, sink_p, dout, dlse)
        )

    def _add(self, s: Array, terms: list[list[Term]], seen: Array) -> Array:
        """Bias terms in order; -inf hides."""
        s = s.copy()
        for i, row in enumerate(terms):
            for term in row:
                add = np.asarray(term.add, self.kind)
                if self.bug == "bias -inf":
                    add = np.where(add == -np.inf, np.float32(-3e4), add)
                seen[i] &= add != -np.inf
                s[i] = s[i] * self.kind(term.gain) + add
        return s

    def _drop(self, s: Array) -> None:
        keys = {"last key": [-1], "first key": [0], "tile edge": range(TILE - 1, s.shape[1], TILE)}.get(self.bug, ())
        if s.shape[1]:
            s[:, list(keys)] = -np.inf

    def _softmax(self, raw: Array, s: Array, v: Array, sink: Any, seen: Array, rows: int) -> tuple[Array, Array, Array]:
        """Online softmax over key tiles: out, lse and the sink's weight."""
        bug, kind = self.bug, self.kind
        m = np.full(rows, sink, kind)
        l = np.where(m > -np.inf, 1, 0).astype(kind)
        o = np.zeros((rows, v.shape[1]), kind)
        starts = list(range(0, s.shape[1], TILE))
        for start in starts + starts[-1:] * (bug == "tile twice"):
            tile = s[:, start : start + TILE]
            new = np.maximum(m, tile.max(1))
            if bug == "no maximum":
                new = np.where(new > -np.inf, 0, new).astype(kind)
            base = new if bug == "first tile hidden" else np.where(new == -np.inf, 0, new)
            p, keep = np.exp(tile - base[:, None]), np.exp(m - base)
            large = (abs(base) > 1e9)[:, None]
            if bug == "mean at large scores":
                p = np.where(large & (tile > -np.inf), 1, p)
            if bug == "best weight lost":
                p = np.where(large & (tile == base[:, None]), 0, p)
            if bug == "difference overflows":
                p = np.exp((tile * kind(np.log2(np.e)) - (base * kind(np.log2(np.e)))[:, None]) * kind(np.log(2)))
            if bug == "no maximum" and start == 0:
                keep = np.where(sink > -np.inf, np.exp(sink), 0) * np.ones_like(keep)
            if bug == "coarse exp":
                p = p * (1 + kind(2.0**-11) * np.sin(tile * 50))
            total = p.sum(1)
            if bug == "hidden in sum":
                hidden = np.where(seen[:, start : start + TILE], -np.inf, raw[:, start : start + TILE])
                total = total + np.nan_to_num(np.exp(np.minimum(hidden - base[:, None], 0))).sum(1)
            if bug == "sink twice" and start and sink > -np.inf:
                total = total + np.exp(sink - base)
            l = l * (1 if bug == "stale sum" and start else keep) + total
            o = (o if bug == "stale maximum" else o * keep[:, None]) + p @ v[start : start + TILE]
            if bug == "half sums":
                o = torch.from_numpy(o).to(DTYPES[self.config.dtype]).to(torch.from_numpy(o).dtype).numpy()
            m = new
        out = np.where(l[:, None] == 0, 0, o / np.where(l == 0, 1, l)[:, None])
        lse = np.where(l == 0, -np.inf, m + np.log(l)).astype(kind)
        self.state = np.where(m == -np.inf, 0, m), np.where(l == 0, 1, l)
        sink_p = np.exp(sink - self.state[0]) / self.state[1] if sink > -np.inf else np.where(np.isnan(l), l, 0)
        dead = (s == -np.inf).all(1)
        if bug == "dead row mean" and len(v):
            out = np.where(dead[:, None], v.mean(0), out)
        if bug == "dead row lse":
            lse = np.where(dead & (lse == -np.inf), 0, lse).astype(kind)
        if bug == "lse base 2":
            lse = lse / kind(np.log(2))
        if bug == "lse maximum":
            lse = np.where(l == 0, -np.inf, np.log(l)).astype(kind)
        if bug == "lse rounded":
            lse = torch.from_numpy(lse).bfloat16().to(torch.from_numpy(lse).dtype).numpy()
        if bug == "sink in lse" and sink > -np.inf:
            lse = (lse + np.log1p(-sink_p)).astype(kind)
        return out, lse, sink_p

    def _backward(self, b: int, h: int, g: int, qkv: Any, s: Array, slope: Array, terms: Any, rest: Any) -> None:
        """The gradients of one head, from the rows' maxima and sums."""
        bug, (q, k, v), (out, lse, sink_p, dout, dlse) = self.bug, qkv, rest
        alive = (s > -np.inf) | np.isnan(s)
        m, l = (x[:, None] for x in self.state)
        p = np.where(alive, np.exp(s - lse[:, None]) if bug == "d lse rounded" else np.exp(s - m) / l, 0)
        mean = (dout * out).sum(1, keepdims=True) * (bug != "d mean")
        through = dlse[:, None] * (bug != "d lse")
        ds = np.where(alive, p * (dout @ v.T - mean + through), 0)
        if "sinks" in self.grads:
            lost = 0 if bug == "d sink" else dlse
            self.grads["sinks"][h] += np.where(sink_p > 0, sink_p * (lost - (dout * out).sum(1)), 0 * sink_p).sum()
        if bug == "dv weights":
            p = p / np.maximum(1 - sink_p, 1e-30)[:, None]
        for i, row in enumerate(terms):
            for n in reversed(range(len(row))):
                term = row[n]
                if term.index is not None:
                    target = self.grads[f"bias{n}"]
                    index = term.index[-target.ndim :]
                    value = ds[i] * np.asarray(term.factor, self.kind)
                    if bug == "d bias scale":
                        value = value * self.scale
                    if bug == "d bias":
                        target[index] = value
                    else:
                        np.add.at(target, index, value)
                ds[i] *= self.kind(term.gain)
        dr = np.where(alive, ds * slope, 0)
        end = (s.shape[1] - 1) // TILE * TILE if bug == "dq tile" else s.shape[1]
        self.grads["q"][b, h] = self.scale * (dr[:, :end] @ k[:end])
        dk, dv = dr.T @ np.nan_to_num(q) * (1 if bug == "dk scale" else self.scale), p.T @ dout
        fresh = bug == "dk group"
        self.grads["k"][b, g] = dk + (0 if fresh else self.grads["k"][b, g])
        self.grads["v"][b, g] = dv + (0 if fresh else self.grads["v"][b, g])
