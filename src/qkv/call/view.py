"""A call whose keys are a cache's view: its checks, the problems it stands for, and its keys as plain tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Problem
from qkv.call.validate import check_storage, checked, named, refuse_dtype
from qkv.checks import DTYPES, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError
from qkv.masks import Mask, as_mask
from qkv.scores import as_bias


class Group(NamedTuple):
    """Sequences with equal numbers of queries and keys: one problem."""

    Lq: int
    Lk: int
    sequences: tuple[int, ...]


def check_view(call: str, q: Any, view: KVView, v: Any, options: Options) -> None:
    """Raise unless the queries fit the view, and it is still what the cache holds."""
    layout = view.layout
    if v is not None:
        fix = f"Call {call.replace('()', '')}(q, view) without v"
        raise ArgumentError.of(call, "a cache's view holds keys and values", f"v={shown(v)} with a view", fix)
    if options.positions is not None:
        rule = "a cache's view says where the queries stand: they are its last tokens"
        raise ArgumentError.of(call, rule, f"positions={shown(options.positions)} with a view", "Leave positions out")
    if layout.clock.now != layout.alive_at:
        rule = "a view lives until its cache gives pages back or writes over them"
        given = "a view from before a free, truncate, eviction, swap, copy on write or overwritten window"
        raise ArgumentError.of(call, rule, given, "Ask the cache for a new view")
    _check_layout(call, view)
    _check_queries(call, q, view)
    if options.dropout_p != 0:
        rule, fix = "a cache is for inference, without dropout", "Leave dropout_p out"
        raise UnsupportedError.of(call, rule, f"dropout_p={shown(options.dropout_p)} with a view", fix)
    learned = (q, options.sinks, *(as_bias(options.bias, call).tensors() if options.bias is not None else ()))  # type: ignore[union-attr]
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in learned):
        rule = "a cache's keys have no gradients, so none are computed through a view"
        fix = "Call it under torch.inference_mode() or torch.no_grad(); for training pass k and v"
        raise UnsupportedError.of(call, rule, "tensors that require grad", fix)


def _check_layout(call: str, view: KVView) -> None:
    """What a cache makes is right; what others make by hand may not be. The pages are looked at once."""
    layout, P = view.layout, view.k.shape[2]
    n, starts = len(layout.lengths), layout.starts
    sizes = f"{n} lengths, {len(starts)} starts"
    if len(starts) != n + 1 or (layout.queries is not None and len(layout.queries) != n):
        rule, fix = "a layout has n lengths, n + 1 starts and n queries", "Take views from a cache or qkv.cache.stored"
        raise ShapeError.of(call, rule, sizes, fix)
    pool = (view.k.shape[0], P)
    for i, length in enumerate(layout.lengths if layout.fits != pool else ()):
        table = layout.tables[max(starts[i], 0) : max(starts[i + 1], 0)]
        used = table[: length // P + (length % P > 0)] if length >= 0 else table
        if length < 0 or starts[i] < 0 or len(used) * P < length or min(used, default=0) < -1:
            given = f"sequence {i} of length {length} with {len(table)} pages of {P}"
            fix = "Take views from a cache or qkv.cache.stored"
            raise ArgumentError.of(call, "a page table has a page for every key", given, fix)
        if max(used, default=-1) >= view.k.shape[0]:
            given = f"page {max(used)} of sequence {i}, and {view.k.shape[0]} pages"
            raise ArgumentError.of(call, "a page table names pages of its pool", given, "Check the table")
    layout.fits = pool
    if layout.queries is not None and min(layout.queries, default=0) < 0:
        raise ArgumentError.of(call, "numbers of queries are >= 0", f"queries {list(layout.queries)}", "Check lengths=")
    scales = (view.k_scale, view.v_scale)
    if any(s is not None for s in scales) and len({None if s is None else s.stride() for s in scales}) > 1:
        given = f"k_scale and v_scale with strides {[None if s is None else s.stride() for s in scales]}"
        raise ArgumentError.of(call, "both scales have the same strides", given, "Make both contiguous")


def _check_queries(call: str, q: Any, view: KVView) -> None:
    if not isinstance(q, Tensor) or q.layout != torch.strided or q.is_nested:
        given = f"q={shown(q)} ({type(q).__name__})"
        raise ArgumentTypeError.of(call, "q must be a plain tensor", given, "Pass a tensor (n, Hq, T, D)")
    if q.dtype != view.dtype:
        rule, fix = "q must have the dtype of its cache", "Convert q with .to(), or make the cache with q's dtype"
        raise ArgumentTypeError.of(call, rule, f"q {q.dtype} and a cache of {view.dtype}", fix)
    if q.dtype not in DTYPES:
        refuse_dtype(call, "q", q)
    if q.device != view.k.device:
        given = f"q on {q.device} and a cache on {view.k.device}"
        raise ArgumentTypeError.of(call, "q must be on its cache's device", given, "Move q with .to()")
    lengths, queries = view.layout.lengths, view.layout.queries
    n, Hkv, D = len(lengths), view.k.shape[1], view.k.shape[3]
    want = "(1, Hq, all queries, D) of a ragged step" if queries is not None else "(sequences, Hq, T, D)"
    if q.dim() != 4 or q.shape[0] != (1 if queries is not None else n):
        fix = "view(seqs, lengths=[...]) is for packed queries, view(seqs) for one row a sequence"
        raise ShapeError.of(call, f"q must be {want}", f"{named(q=q)} and a view of {n} sequences", fix)
    if queries is not None and sum(queries) != q.shape[2]:
        given = f"{named(q=q)} and lengths={list(queries)}, which sum to {sum(queries)}"
        raise ShapeError.of(call, "a ragged view's lengths must sum to q's rows", given, "Pack as many rows")
    if q.shape[3] != D or D == 0 or (q.shape[1] == 0) != (Hkv == 0) or (Hkv and q.shape[1] % Hkv):
        given = f"{named(q=q)} and a cache with {Hkv} heads of {D} numbers"
        rule = "q must have the cache's head size, and a multiple of its heads"
        raise ShapeError.of(call, rule, given, "Check that q is (B, H, L, D)")
    most = view.layout.most
    if most is not None and queries is None and q.shape[2] > most:
        rule, fix = (
            "what the queries see must still be stored",
            "Attend to a window's keys in the step that appends them",
        )
        raise ShapeError.of(call, rule, f"{q.shape[2]} queries, and keys for the last {most}", fix)
    for i, length in enumerate(lengths):
        rows = queries[i] if queries is not None else q.shape[2]
        if rows > length:
            rule, fix = "queries are the last tokens of their sequence", "Append their keys and values first"
            raise ShapeError.of(call, rule, f"{rows} queries for sequence {i} of length {length}", fix)
    check_storage(call, q)


def joined(call: str, mask: Any, held: Mask | None) -> Mask | None:
    """The call's mask, and what the cache still holds."""
    known = as_mask(mask, call)
    if known is None or held is None:
        return held if known is None else known
    return known & held


def groups(q: Tensor, view: KVView) -> list[Group]:
    """The sequences by their numbers of queries and keys, in order of first appearance."""
    lengths, queries = view.layout.lengths, view.layout.queries
    found: dict[tuple[int, int], list[int]] = {}
    for i, Lk in enumerate(lengths):
        found.setdefault((q.shape[2] if queries is None else queries[i], Lk), []).append(i)
    return [Group(Lq, Lk, tuple(members)) for (Lq, Lk), members in found.items()]


def longest(q: Tensor, view: KVView) -> Group:
    """All sequences as one group, with the largest sizes: for what does not depend on them."""
    lengths, queries = view.layout.lengths, view.layout.queries
    Lq = q.shape[2] if queries is None else max(queries, default=0)
    return Group(Lq, max(max(lengths, default=0), Lq), tuple(range(len(lengths))))


def problem_of(
    call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, group: Group
) -> tuple[Problem, Inputs]:
    """The problem of one group, as if all sequences were in it: batch rows keep their numbers for masks and biases."""
    size = (len(view.layout.lengths), q.shape[1], view.k.shape[1], group.Lk, view.v.shape[3])
    placed = options._replace(positions=group.Lk - group.Lq)
    return checked(call, (q, view.k, view.v), size, group.Lq, mask, placed)


def gathered(view: KVView, Lk: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys (n, Hkv, Lk, D) and values of all sequences in the view's dtype; what they do not have is 0."""
    layout, P = view.layout, view.k.shape[2]
    lengths = layout.lengths
    Lk = max(lengths, default=0) if Lk is None else Lk
    parts = []
    for pages, scale in ((view.k, view.k_scale), (view.v, view.v_scale)):
        to = pages.new_zeros((len(lengths), pages.shape[1], Lk, pages.shape[3]), dtype=view.dtype)
        for i, length in enumerate(lengths):
            n = min(length, Lk)
            table = torch.tensor(
                layout.tables[layout.starts[i] : layout.starts[i] + -(-n // P)], dtype=torch.int64, device="cpu"
            )
            table = table.to(pages.device)
            held = table >= 0
            part = pages[table.clamp(min=0)]  # (pages, Hkv, P, D)
            if scale is not None:
                part = (part.float() * scale[table.clamp(min=0)][..., None]).to(view.dtype)
            part = torch.where(held[:, None, None, None], part, 0)
            to[i, :, :n] = part.transpose(0, 1).flatten(1, 2)[:, :n]
        parts.append(to)
    return parts[0], parts[1]


def reader(view: KVView, i: int) -> Callable[[int, int], Tensor]:
    """Reads keys of sequence i: where they lie, if on one page, else copied; pages that were given back are hidden."""
    layout, P = view.layout, view.k.shape[2]
    own = layout.tables[layout.starts[i] : layout.starts[i + 1]]
    table = torch.tensor(own, dtype=torch.int64, device="cpu").clamp(min=0).to(view.k.device)
    stored = [x for x in (view.k, view.k_scale) if x is not None]

    def keys(start: int, stop: int) -> Tensor:
        first, last = start // P, (stop - 1) // P
        if first == last:
            here: Any = (max(own[first], 0), 0, slice(start - first * P, stop - first * P))
            rows, scale = view.k[here], None if len(stored) == 1 else stored[1][here]
        else:
            within, page = slice(start - first * P, stop - first * P), max(own[first], 0)
            if own[first : last + 1] == array("i", range(page, page + last + 1 - first)):  # a copy costs a tenth
                pages = [x[page : page + last + 1 - first, 0] for x in stored]
            else:
                pages = [x[:, 0].index_select(0, table[first : last + 1]) for x in stored]
            rows, scale = pages[0].flatten(0, 1)[within], None if len(pages) == 1 else pages[1].flatten()[within]
        return rows if scale is None else rows.float() * scale[:, None]

    return keys
