"""Scores of any magnitude, exact in the accumulation type: "wide" configurations of the gates.

The error rule's S is the rounding of the scores; at scores of 1e12 its bound forgives anything, even the mean of V.
Here every score is exact, so S is 0 and the bound is as tight as for scores of 1. A query is one-hot, +-2^a; keys are
whole numbers times 2^b; the scale is a power of two; biases, tables, slopes and sinks are whole numbers of the unit
u = 2^g that scale, query and key make together. All may be shifted by 2^t units, which costs lse its last digits. Two
more kinds: scores of +- the largest number of the accumulation type, and a scale of 1e10.

    wide = (kind, a, b, t, digits, ones)     t < 0: no shift; digits: the largest whole number; ones: V is 1
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tests.kit.cases import DTYPES
from tests.kit.oracle import Spec

Array = NDArray[Any]
Rng = np.random.Generator
C = TypeVar("C", bound=Any)

LARGEST = {"f64": float(np.finfo(np.float64).max)}
EDGE = 40  # where scores are the largest numbers, queries are +-2^EDGE
SHARE = 0.12  # of the configurations
# By dtype: the exponents of q and k, and those that a score, a scale and a gradient before it is rounded may have.
RANGES = {"f16": (-6, 8, 126), "bf16": (-30, 50, 126), "f32": (-30, 50, 126), "f64": (-200, 400, 1000)}


def largest(dtype: str) -> float:
    """The largest number of the accumulation type."""
    return LARGEST.get(dtype, float(np.finfo(np.float32).max))


def widened(config: C, plain: bool = True) -> C:
    """The configuration with wide scores, one in eight; the others as they are. `plain`: keys are stored in dtype."""
    rng = np.random.default_rng((config.seed, 11))
    if rng.random() > SHARE or 0 in (config.D, config.Hq):
        return config
    draw = rng.random()
    kind = "decimal" if draw < 0.1 else "edge" if draw < 0.25 and plain and config.dtype in ("f32", "f64") else "units"
    digits, t, g = int(rng.choice([1, 1, 3, 15])), -1, _unit(config.dtype, rng)
    accumulate = "f64" if config.dtype == "f64" else "f32"
    bias: list[Spec] = []
    for term in config.bias:
        if kind == "decimal" or config.softcap is not None or term[0] == "score_mod":
            continue  # their sums would be rounded
        if kind == "edge" and (term[0] != "tensor" or bias):
            continue
        bias.append((*term[:2], accumulate, *term[3:]) if term[0] == "tensor" else term)
    a = b = e = 0
    if kind == "units":
        low, high, most = RANGES[config.dtype if plain or config.dtype == "f16" else "f32"]
        g = min(g, most - 8)
        if config.softcap is not None:
            g = max(g, 16)  # c * tanh(x / c) is exactly c there
        if config.D > 1 and plain and rng.random() < 0.5:
            t = int(rng.integers(8, 17))
        if t >= 0 or any(term[0] == "alibi" for term in bias):
            g = min(g, most - 19)
        for _ in range(1000):
            a, b = (int(x) for x in rng.integers(low, high + 1, 2))
            t = min(t, 15 - b) if config.dtype == "f16" else t
            e = g - a - b
            if abs(e) <= most - 6 and max(g - a, g - b) <= most - 16:
                break
        else:
            a = b = 0
            g = e = min(g, most - 16)
    scale = 1e10 if kind == "decimal" else 2.0**e
    # Ones: not where long sums of weights that are no whole numbers would round away from 1, each order otherwise.
    length = max(config.lengths) if hasattr(config, "lengths") else config.Lk
    whole = config.softcap is None and config.dtype != "f64" and (kind != "units" or g >= 6)  # weights of 0 and 1
    ones = rng.random() < 0.4 and (length <= 64 or whole)
    return replace(
        config, flavour="wide", wide=(kind, a, b, t, digits, bool(ones)), scale=scale, bias=tuple(bias),
        sinks=config.sinks and accumulate,
    )  # fmt: skip


def _unit(dtype: str, rng: Rng) -> int:
    """The exponent of the unit: where weights are mixed, where lse is coarse, and up to the top."""
    top = RANGES[dtype][2] - 8
    low, high = ((-3, 2), (2, 24), (24, top), (24, top))[int(rng.integers(4))]
    return int(rng.integers(low, high + 1))


def unit(config: Any) -> float:
    kind, a, b = config.wide[:3]
    return config.scale * (2.0 ** (a + b) if kind == "units" else 1.0)


def _whole(config: Any, rng: Rng, shape: Any) -> Array:
    digits = config.wide[4]
    if config.wide[0] == "decimal":
        return rng.choice([-4.0, -1.0, 0.0, 1.0, 2.0], shape)
    return rng.integers(-digits, digits + 1, shape).astype(np.float64)


def keys(config: Any, rng: Rng, shape: tuple[int, ...]) -> Array:
    kind, _, b, t, *_ = config.wide
    if kind == "edge":
        top = largest(config.dtype)  # divided, so that a sum of gradients does not overflow before it cancels
        return rng.choice([0.0, 1.0, top, -top, top / 2], shape) * 2.0**-EDGE
    k = _whole(config, rng, shape) * 2.0**b
    if t >= 0:
        k[..., -1] = 2.0 ** (b + t)
    return k


def queries(config: Any, rng: Rng, shape: tuple[int, ...]) -> Array:
    """One-hot rows; with a shift, the last column adds it to every score of the row."""
    kind, a, _, t, *_ = config.wide
    a = EDGE if kind == "edge" else a
    q, D = np.zeros(shape), shape[-1]
    hot = rng.integers(0, max(1, D - 1 if t >= 0 else D), shape[:-1])
    np.put_along_axis(q, hot[..., None], rng.choice([-1.0, 1.0], (*shape[:-1], 1)) * 2.0**a, -1)
    if t >= 0:
        q[..., -1] = rng.choice([-1.0, 1.0, 1.0]) * 2.0**a
    if kind == "edge" and config.bias:
        q[:] = 0  # the bias alone makes the scores
    return q


def values(config: Any, rng: Rng, shape: tuple[int, ...]) -> Array:
    return np.ones(shape) if config.wide[5] else rng.normal(size=shape)


def bias(config: Any, rng: Rng, spec: Spec) -> torch.Tensor:
    """A term's tensor, in whole units."""
    kind, wide = spec[0], torch.float64 if config.dtype == "f64" else torch.float32
    if kind == "alibi":
        return torch.from_numpy(unit(config) * rng.integers(1, 4, config.Hq)).to(wide)
    if kind == "tensor":
        x = _whole(config, rng, spec[1]) * unit(config)
        if config.wide[0] == "edge":
            top = largest(config.dtype)
            x = rng.choice([top, -top, -top, 0.0], spec[1])
            if x.ndim > 1 and x.shape[-2] > 1:
                x[..., 0, :] = -top  # a padded row, as others write it
        x[rng.random(spec[1]) < spec[3]] = -np.inf
        return torch.from_numpy(x).to(DTYPES[spec[2]])
    columns = 2 * spec[1] + 1 if kind == "relative" else spec[1]
    return torch.from_numpy(_whole(config, rng, (config.Hq, columns)) * unit(config)).to(wide)


def sinks(config: Any, rng: Rng) -> Array:
    """Whole units, near the scores; some are absent."""
    kind, t = config.wide[0], config.wide[3]
    x = _whole(config, rng, config.Hq) * unit(config)
    if kind == "edge":
        x = rng.choice([largest(config.dtype), -largest(config.dtype), 0.0], config.Hq)
    if t >= 0:
        x = x + rng.choice([-1.0, 0.0, 1.0], config.Hq) * 2.0**t * unit(config)
    x[rng.random(config.Hq) < 0.15] = -np.inf
    return x
