"""How many calls of scaled_dot_product_attention went where, and why: what `print` shows of a `patch_sdpa` block."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from qkv.plans import plan

_MAX_PLANS = 256
_WITH_DATA = (Tensor, torch.nn.Parameter)


class Calls:
    """The calls that were made while it was open."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], int] = {}

    def __str__(self) -> str:
        total = sum(self.found.values())
        lines = [f"{total:,} call{'s' if total != 1 else ''} of torch.nn.functional.scaled_dot_product_attention"]
        if not total:
            lines.append("nothing called it by that name; a name bound before the block is not changed by it")
        width = max((len(f"{n:,}") for n in self.found.values()), default=0)
        for (where, why), n in sorted(self.found.items(), key=lambda item: -item[1]):
            lines.append(f"  {n:>{width},}  {where:<8} {why}")
        return "\n".join(lines)


_watching: tuple[Calls, ...] = ()
_plans: dict[Any, tuple[str, str]] = {}
_lock = threading.Lock()


def begin(calls: Calls) -> None:
    """Count into it from here on."""
    global _watching
    with _lock:
        _watching = (*_watching, calls)


def end(calls: Calls) -> None:
    """Once less, if it was begun more than once."""
    global _watching
    with _lock:
        left = list(_watching)
        left.remove(calls)
        _watching = tuple(left)


def count(where: str, why: str) -> None:
    """One call that went there, for this reason."""
    with _lock:
        for calls in {id(c): c for c in _watching}.values():
            calls.found[where, why] = calls.found.get((where, why), 0) + 1


# torch.compile calls it while it traces and does not look into it: what it read would be a guard, and each count a
# reason to compile again. The attribute is what torch.compiler.assume_constant_result sets, which loads the compiler.
count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def count_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> None:
    """One call of `qkv.attention` with these arguments, by what its plan says; nothing where nobody counts."""
    if torch.compiler.is_compiling() or type(q) not in _WITH_DATA:
        count("graph", "recorded by a tracer: qkv.attention computes it whenever the graph runs")
        return
    if not _watching:
        return
    bias = options["bias"]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    key = (
        q.shape, k.shape, v.shape, q.dtype, mask.shape if isinstance(mask, Tensor) else mask, options["positions"],
        None if bias is None else (bias.shape, bias.dtype), options["scale"], options["dropout_p"], learns,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        planned = plan(q, k, v, mask, **options)
        refused = dict(planned.refused)
        why = planned.reason if planned.backend == "cpu" else f"not the native kernel: {refused['cpu']}"
        found = planned.backend, why
        with _lock:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = found
    count(*found)
