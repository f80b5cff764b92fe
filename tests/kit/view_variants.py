"""What must not change a bit of attention on pages: other pages, other neighbours, contiguous keys, threads."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import qkv
from qkv.call.keys import Clock, KVLayout, KVView
from qkv.masks import as_mask
from tests.kit.bits import differ
from tests.kit.views import ViewConfig, ViewInputs


def run(inputs: ViewInputs, backend: str | None, **other: Any) -> dict[str, torch.Tensor]:
    out, lse = qkv.attention(**inputs.call() | other, return_lse=True, backend=backend)
    return {"out": out, "lse": lse}


def alone(inputs: ViewInputs, i: int) -> tuple[torch.Tensor, KVView]:
    """Sequence i by itself; for masks and biases that are the same for all."""
    c, layout = inputs.config, inputs.view.layout
    table = layout.tables[layout.starts[i] : layout.starts[i + 1]]
    first = sum(c.queries[:i])
    q = inputs.q[:, :, first : first + c.queries[i]] if c.ragged else inputs.q[i : i + 1]
    queries = array("q", c.queries[i : i + 1]) if c.ragged else None
    own = KVLayout(table, array("q", [0, len(table)]), array("q", [c.lengths[i]]), queries, Clock())
    return q, inputs.view._replace(layout=own)


def contiguous(inputs: ViewInputs, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of sequence i as plain tensors, read key by key; what is given back is poison."""
    view, (q, own) = inputs.view, alone(inputs, i)
    P, parts = view.k.shape[2], []
    for pool in (view.k, view.v):
        rows = [pool[own.layout.tables[j // P], :, j % P] for j in range(own.layout.lengths[0])]
        parts.append(torch.stack(rows, 1)[None] if rows else pool.new_zeros(1, pool.shape[1], 0, pool.shape[3]))
    return q, parts[0], parts[1]


def moved(inputs: ViewInputs, seed: int, copies: bool) -> KVView:
    """The same keys on other pages: all in another order, or (copies) each sequence on pages of its own."""
    view, rng = inputs.view, np.random.default_rng(seed)
    P, N = view.k.shape[2], view.k.shape[0]
    layout, tables = view.layout, array("i", view.layout.tables)
    used = [layout.starts[i] + m for i, x in enumerate(layout.lengths) for m in range(-(-x // P))]
    used = [at for at in used if tables[at] >= 0]
    if copies:
        source = torch.tensor([tables[at] for at in used], dtype=torch.int64)
        to = rng.permutation(len(used))
        for n, at in enumerate(used):
            tables[at] = int(to[n])
    else:
        source, to = torch.arange(N), rng.permutation(N)
        for at in used:
            tables[at] = int(to[tables[at]])
    back = source[torch.from_numpy(np.argsort(to))] if len(used) else torch.arange(1)
    pools = [None if x is None else x[back] for x in view[:4]]
    own = KVLayout(tables, layout.starts, layout.lengths, layout.queries, Clock())
    return KVView(pools[0], pools[1], pools[2], pools[3], view.dtype, own, view.held)


def _rows(found: dict[str, torch.Tensor], config: ViewConfig, i: int) -> dict[str, torch.Tensor]:
    """What belongs to sequence i."""
    if not config.ragged:
        return {name: x[i : i + 1] for name, x in found.items()}
    first = sum(config.queries[:i])
    return {name: x[:, :, first : first + config.queries[i]] for name, x in found.items()}


def _mask_by_row(spec: Any) -> bool:
    if spec is None or spec[0] in ("and", "or", "not", "per_head"):
        return any(_mask_by_row(part) for part in spec[1:]) if spec else False
    if spec[0] == "prefix":
        return not isinstance(spec[1], int)
    return spec[0] in ("padding", "segments", "blocks", "dense", "mask_mod", "selected_blocks")


def by_row(config: ViewConfig) -> bool:
    """Whether the mask or a bias may mean something else for another batch row."""
    return _mask_by_row(config.seen_by) or any(spec[0] == "tensor" and spec[1][0] > 1 for spec in config.bias)


def joined(inputs: ViewInputs) -> Any:
    """The call's mask, and what the cache still holds."""
    mask, held = as_mask(inputs.mask), inputs.view.held
    return mask if held is None else held if mask is None else mask & held


def variants(inputs: ViewInputs, backend: str | None) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """What must not change a bit: a name, and the check that tells which results it changed."""
    c, first = inputs.config, run(inputs, backend)

    def threads() -> list[str]:
        before = torch.get_num_threads()
        torch.set_num_threads(3 - min(before, 2))
        try:
            return differ(first, run(inputs, backend))
        finally:
            torch.set_num_threads(before)

    def by_itself(i: int) -> list[str]:
        q, own = alone(inputs, i)
        return differ(_rows(first, c, i), run(inputs, backend, q=q, k=own))

    def plainly(i: int) -> list[str]:
        q, k, v = contiguous(inputs, i)
        own = {"q": q, "k": k, "v": v, "mask": joined(inputs), "positions": "end"}
        return differ(_rows(first, c, i), run(inputs, backend, **own))

    yield "repetition", lambda: differ(first, run(inputs, backend))
    yield "without lse", lambda: differ({"out": first["out"]}, {"out": qkv.attention(**inputs.call(), backend=backend)})
    yield "pages in another order", lambda: differ(first, run(inputs, backend, k=moved(inputs, 1, copies=False)))
    yield "pages of one's own", lambda: differ(first, run(inputs, backend, k=moved(inputs, 2, copies=True)))
    yield "threads", threads
    for i in range(0 if by_row(c) else c.n):
        yield f"sequence {i} alone", lambda i=i: by_itself(i)  # type: ignore[misc]
        if c.storage == "plain" and c.P % 16 == 0 and c.queries[i]:
            yield f"sequence {i} on contiguous keys", lambda i=i: plainly(i)  # type: ignore[misc]
