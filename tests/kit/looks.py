"""Calls that are looked at: statistics by a backend's own passes, on tensors and on views, and the judge of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qkv import observation
from qkv.call.problem import Options
from qkv.call.statistics import Statistics, Wanted
from qkv.observation import Observed, observe
from tests.kit import backends
from tests.kit.cases import DTYPES, Config
from tests.kit.inputs import Inputs, materialise
from tests.kit.statistics_truth import Truth, faults
from tests.kit.views import ViewConfig, ViewInputs, materialise as materialise_view

_OPTIONS = ("positions", "bias", "scale", "softcap", "sinks", "dropout_p")


def look(given: dict[str, Any], backend: str | None, wanted: Wanted) -> Observed:
    """`attention`'s keyword arguments, looked at."""
    options = Options(**{name: given[name] for name in _OPTIONS if name in given})
    return observe("qkv.see()", given["q"], given["k"], given.get("v"), given.get("mask"), options, backend, wanted)


@contextmanager
def no_fallback() -> Iterator[None]:
    """An error where the backend has no statistics of its own for a call."""
    real = observation.statistics

    def refuse(*_: Any) -> Any:
        raise AssertionError("the backend left the statistics to `tiled`")

    observation.statistics = refuse
    try:
        yield
    finally:
        observation.statistics = real


def everything(config: Config) -> Wanted:
    return Wanted(top=5, mass=True, bins=(min(7, config.Lq), min(9, config.Lk)), distance=True)


def wrong(inputs: Inputs, truth: Truth, backend: str) -> list[str]:
    """What is wrong with a call's statistics."""
    wanted = everything(inputs.config)
    found = look(inputs.call(), backend, wanted).statistics
    return faults(truth, found, wanted, DTYPES[inputs.config.dtype]) + _lost_weights(truth, found)


def _lost_weights(truth: Truth, found: Statistics) -> list[str]:
    """Rows whose weights do not sum to 1. At large magnitudes a weight's bound says nothing, and this does."""
    assert found.mass is not None
    if truth.call.sinks is not None:
        return []
    seen = torch.from_numpy(truth.score > -np.inf).sum(-1)  # NaN is not
    off = (found.mass.sum(-1).cpu() - seen).abs() > 1e-4 * seen.clamp(min=1)
    return [f"weights of head {at.tolist()} do not sum to 1 a row" for at in off.nonzero()[:1]]


def wrong_on_pages(inputs: ViewInputs, truths: list[Truth], backend: str) -> list[str]:
    """The same for a view, sequence by sequence, and what stands past a sequence's rows and keys."""
    wanted = Wanted(top=5, mass=True, bins=(7, 9), distance=True)
    found = look(inputs.call(), backend, wanted).statistics
    c = inputs.config
    bad: list[str] = []
    for i, (Lq, Lk, truth) in enumerate(zip(c.queries, c.lengths, truths, strict=True)):
        bins = min(7, Lq), min(9, Lk)
        mine = {}
        for name, t in zip(Statistics._fields, found, strict=True):
            assert t is not None
            own = (Lk,) if name == "mass" else bins if name == "map" else (Lq,)
            mine[name] = t[(slice(i, i + 1), slice(None), *map(slice, own))]
            if not _nothing_past(t[i], own, -1 if name == "top_keys" else 0 if name in ("mass", "map") else None):
                bad.append(f"sequence {i}: {name} past its own rows and keys")
        slack = 4 if c.storage != "plain" else 1  # the scale of a key multiplies its scores: more roundings
        judged = faults(truth, Statistics(**mine), wanted._replace(bins=bins), DTYPES[c.dtype], slack)
        bad += [f"sequence {i}: {fault}" for fault in judged]
    return bad


def _nothing_past(t: Tensor, own: tuple[int, ...], nothing: int | None) -> bool:
    """Whether all but the first `own` of (H, ...) is `nothing`, or NaN."""
    rest = t.clone()
    rest[(slice(None), *map(slice, own))] = torch.nan if nothing is None else nothing
    return bool((rest.isnan() if nothing is None else rest == nothing).all())


def saturated(backend: str) -> str:
    """What is wrong with the weights of few rows at scores of 1e7, of which rounding leaves no digit behind the point.

    The kernel for few rows adds up in another order, so weights from its states would be off by factors.
    """
    for dtype in (torch.float32, torch.float16):
        g = torch.Generator().manual_seed(5)
        q, k = (torch.randn(1, 4, n, 48, generator=g).to(dtype) for n in (2, 700))
        found = look({"q": q, "k": k, "v": k, "scale": 1e6}, backend, Wanted(mass=True, top=1)).statistics
        assert found.mass is not None
        if (found.mass.sum(-1) - 2).abs().max() > 1e-4:
            return f"rows of {dtype} sum to {found.mass.sum(-1).tolist()} instead of 2"
    return ""


class Look(NamedTuple):
    """A call to look at, and the truth about it."""

    config: Config | ViewConfig
    faults: Callable[[str], list[str]]
    """What is wrong, by backend."""


def looks(calls: Iterable[Config], views: Iterable[ViewConfig]) -> Iterator[Look]:
    """Those that the kernels look at themselves, made ready."""
    for config in calls:
        given = materialise(config)
        yield Look(config, partial(wrong, given, Truth.of(given.oracle)))
    for view in views:
        if native_looks(view):
            pages = materialise_view(view)
            yield Look(view, partial(wrong_on_pages, pages, [Truth.of(call) for call in pages.oracle]))


def native_looks(config: ViewConfig) -> bool:
    """Whether kernels read a view's pages: they multiply stored numbers in float32, and call no Python."""
    if any(term[0] == "score_mod" for term in config.bias) or backends.mentions(config.seen_by, "mask_mod"):
        return False
    return config.storage == "plain" or config.dtype != "f64"
