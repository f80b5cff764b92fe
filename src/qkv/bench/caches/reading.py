"""Contests of `qkv bench --caches` in which a cache is read: on pages, shared, in 8 bits, and latent.

Every contender is checked first: against float64 on sampled rows, and where the same keys only lie elsewhere, bit for
bit. A wrong one is not timed. Rounds are interleaved as in the rest of the benchmark, and the machine's own rates, of
reading and of matrix products, take part in every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qkv
from qkv.bench import machine
from qkv.bench.caches.contest import Bench, Line, Race
from qkv.bench.cases import TOLERANCE, Case
from qkv.bench.inputs import Inputs, build
from qkv.bench.race import spread

PAGE = 16
_8BIT = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
# Where a sequence's pages lie in the pool, and whether a target is judged by it: pages in order are the easy case.
PLACES = {"in order": False, "in turn": True, "shuffled": True}


# ---- filling caches


def fill(cache: Any, rows: Sequence[Tensor], how: str, seed: int = 0) -> list[Any]:
    """Sequences of a cache whose pool they fill; rows are (B, ..., L, width), keys and values or latents.

    in order: one prompt after the other. in turn: a page of each, again and again, as sequences grow together.
    shuffled: as in order, but from a pool whose free pages are in no order.
    """
    B, L, g = rows[0].shape[0], rows[0].shape[-2], torch.Generator().manual_seed(seed)
    if how == "shuffled":  # what a pool looks like that has been in use for long
        pages = cache.stats().pages
        holders = [cache.add() for _ in range(pages)]
        cache.append(holders, *(x.new_zeros(1).expand(pages, *x.shape[1:-2], 1, x.shape[-1]) for x in rows))
        for n in torch.randperm(pages, generator=g).tolist():
            cache.free(holders[n])
    seqs = [cache.add() for _ in range(B)]
    if how == "in turn":
        for at in range(0, L, PAGE):
            cache.append(seqs, *(x[..., at : at + PAGE, :] for x in rows))
    else:
        for b, seq in enumerate(seqs):
            cache.append([seq], *(x[b : b + 1] for x in rows))
    return seqs


def _pages(case: Case) -> int:
    return case.B * -(-case.Lk // PAGE)


def _paged(case: Case, storage: torch.dtype | None = None) -> Any:
    return qkv.cache.PagedCache(
        pages=_pages(case), page_size=PAGE, num_kv_heads=case.Hkv, head_dim=case.D, dtype=case.torch_dtype,
        storage=storage,
    )  # fmt: skip


# ---- checks


def wrong_results(errors: Mapping[str, float], tolerance: float) -> dict[str, str]:
    """What is to be said of those whose relative error is too large."""
    return {name: f"relative error {error:.1e}" for name, error in errors.items() if not error <= tolerance}


def differ(outs: Mapping[str, Tensor]) -> dict[str, str]:
    """Of results that must be the same bits, those that are not the first's."""
    first, *_ = outs
    return {name: f"other bits than {first}" for name in outs if not torch.equal(outs[name], outs[first])}


def row_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error of one row, out (Dv,) for q (D,), k (L, D) and v (L, Dv), in float64."""
    weights = ((k.double() @ q.double()) / math.sqrt(q.shape[0])).softmax(0)
    expected = weights @ v.double()
    error = ((out.double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf


def read_back(view: Any, b: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence and head in float32, (L, D) and (L, Dv), by the definition of the storage."""
    layout = view.layout
    length = layout.lengths[b]
    pages = torch.tensor(list(layout.tables[layout.starts[b] : layout.starts[b + 1]]))
    found = []
    for data, scale in ((view.k, view.k_scale), (view.v, view.v_scale)):
        x = data[:, head][pages].float()
        x = x if scale is None else x * scale[:, head][pages][..., None]
        found.append(x.flatten(0, 1)[:length])
    return found[0], found[1]


def _storage_error(stored: Tensor, x: Tensor, storage: torch.dtype) -> bool:
    """Whether rows in 8 bits are further from x than their rounding allows."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    allowed = top / 254 if storage == torch.int8 else torch.maximum(x.abs() / 16, top / (448 * 1024))
    return not bool(((stored - x).abs() <= allowed * (1 + 1e-3)).all())


def _of_stored(view: Any, out: Tensor, inputs: Inputs, storage: torch.dtype) -> str:
    """What is wrong with attention over 8-bit storage: its numbers, or what was made of them."""
    (k, v), group = inputs.sets[0], inputs.case.Hq // inputs.case.Hkv
    worst = 0.0
    for b, h, i in inputs.samples:
        kept = read_back(view, b, h // group)
        if any(_storage_error(got, x[b, h // group], storage) for got, x in zip(kept, (k, v), strict=True)):
            return "stored numbers are off by more than rounding"
        worst = max(worst, row_error(out[b, h, i], inputs.q[b, h, i], *kept))
    return wrong_results({"": worst}, TOLERANCE[inputs.case.dtype]).get("", "")


# ---- contests


def shape(case: Case) -> str:
    """How the table names the sizes: 8×4,096 32/8 bf16."""
    return f"{case.B}×{case.Lk:,} {case.Hq}/{case.Hkv} {case.dtype}"


def paged(bench: Bench, case: Case, *, judged: bool) -> list[Line]:
    """Pages against plain tensors of the same keys, and (where targets are judged) against gather + SDPA."""
    inputs = build(case)
    k, v = inputs.sets[0]
    q, views, tables = inputs.q, {}, {}
    for how in PLACES:
        cache = _paged(case)
        seqs = fill(cache, (k, v), how)
        views[how], tables[how] = cache.view(seqs), [seq.pages for seq in seqs]
    calls: dict[str, Callable[[], Tensor]] = {"contiguous": lambda: bench.attention(q, k, v)}
    for how, view in views.items():
        calls[how] = lambda view=view: bench.attention(q, view)  # type: ignore[misc]
    outs = {name: call() for name, call in calls.items()}
    wrong = wrong_results({name: inputs.error(out) for name, out in outs.items()}, TOLERANCE[case.dtype])
    wrong = differ({how: outs[how] for how in PLACES}) | wrong
    race = Race(bench, calls, wrong, (k, v))
    lines = [
        race.line(
            f"paged {shape(case)}, {how}",
            how,
            "contiguous",
            1.08 if judged and counts else None,
            at_most=True,
            nbytes=case.kv_bytes,
            of_read=0.85 if judged and counts else None,
        )
        for how, counts in PLACES.items()
    ]
    if not judged:
        return lines
    del outs, calls
    how, name = "shuffled", "gather + SDPA"
    pool, table = views[how], torch.tensor(tables[how])
    both = {how: lambda: bench.attention(q, pool), name: lambda: _gathered(q, pool.k, pool.v, table, case)}
    wrong |= wrong_results({name: inputs.error(both[name]())}, TOLERANCE[case.dtype])
    race = Race(bench, both, wrong, (k, v))
    return [*lines, race.line(f"paged {shape(case)}, {how}", how, name, 40.0, nbytes=case.kv_bytes)]


def _gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, case: Case) -> Tensor:
    """What PyTorch offers for pages: (B, L / P, Hkv, P, D) to (B, Hkv, L, D), then its own attention."""
    size = (case.B, case.Hkv, -1, case.D)
    k, v = (x[table].transpose(1, 2).reshape(size)[:, :, : case.Lk] for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=case.Hq != case.Hkv)


def quantised(bench: Bench, case: Case, *, kinds: Iterable[torch.dtype], needed: float | None = None) -> list[Line]:
    """8-bit storage against storage in the queries' own type; `needed` is of int8 where its keys exceed the cache."""
    inputs = build(case)
    k, v = inputs.sets[0]
    plain = f"{case.dtype} storage"
    views = {}
    for storage in (None, *kinds):
        cache = _paged(case, storage)
        views[storage] = cache.view(fill(cache, (k, v), "shuffled"))
    names = {storage: plain if storage is None else f"{_8BIT[storage]} storage" for storage in views}
    calls = {
        names[storage]: (lambda view=view: bench.attention(inputs.q, view))  # type: ignore[misc]
        for storage, view in views.items()
    }
    wrong = wrong_results({plain: inputs.error(calls[plain]())}, TOLERANCE[case.dtype])
    for storage, view in views.items():
        if storage is not None:
            problem = _of_stored(view, calls[names[storage]](), inputs, storage)
            wrong |= {names[storage]: problem} if problem else {}
    race = Race(bench, calls, wrong, (k, v))
    lines = []
    for storage, view in views.items():
        if storage is None:
            continue
        parts = (view.k, view.v, view.k_scale, view.v_scale)
        nbytes = sum(x.nbytes for x in parts)
        fits = nbytes <= bench.cache_bytes
        goal = needed if storage == torch.int8 and not fits else None
        title = f"{_8BIT[storage]} {shape(case)}{', in the cache' if fits else ''}"
        lines.append(race.line(title, names[storage], plain, goal, nbytes=nbytes))
    return lines


def cascade(
    bench: Bench,
    Hq: int,
    Hkv: int,
    *,
    needed: float | None,
    batch: int = 32,
    common: int = 4096,
    own: int = 64,
    D: int = 128,
) -> list[Line]:
    """Forks of one prompt against sequences that each have a copy of it, in one pool."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(torch.bfloat16)

    q = 4 * normal(batch, Hq, 1, D)
    first = normal(1, Hkv, common, D), normal(1, Hkv, common, D)
    after = normal(batch, Hkv, own, D), normal(batch, Hkv, own, D)
    samples = [(0, 0), (batch // 2, Hq // 2), (batch - 1, Hq - 1)]
    for n, (b, h) in enumerate(samples):  # keys that weigh much, on both sides of the seam and at the end
        needle = (12.0 * math.sqrt(D) * q[b, h, 0].float() / q[b, h, 0].float().square().sum()).to(q.dtype)
        if n != 1:
            first[0][0, h // (Hq // Hkv), -1] = needle
        after[0][b, h // (Hq // Hkv), 0] = after[0][b, h // (Hq // Hkv), -1] = needle
    pages = batch * -(-(common + own) // PAGE) + -(-common // PAGE) + batch * (-(-own // PAGE) + 1)
    cache = qkv.cache.PagedCache(pages=pages, page_size=PAGE, num_kv_heads=Hkv, head_dim=D)
    apart = [cache.add() for _ in range(batch)]
    for seq in [*apart, base := cache.add()]:
        cache.append([seq], *first)
    cache.append(apart, *after)
    forks = [cache.fork(base) for _ in range(batch)]
    cache.append(forks, *after)
    cache.free(base)
    shared, alone = cache.view(forks), cache.view(apart)
    calls = {
        "own copies": lambda: bench.attention(q, alone, mask=qkv.causal()),
        "shared": lambda: bench.attention(q, shared, mask=qkv.causal()),
    }
    outs = {name: call() for name, call in calls.items()}
    wrong: dict[str, str] = {}
    for name, out in outs.items():
        error = 0.0
        for b, h in samples:
            keys, values = (
                torch.cat((x[0, h // (Hq // Hkv)], y[b, h // (Hq // Hkv)])) for x, y in zip(first, after, strict=True)
            )
            error = max(error, row_error(out[b, h, 0], q[b, h, 0], keys, values))
        wrong |= wrong_results({name: error}, TOLERANCE["bf16"])
    wrong = differ(outs) | wrong
    if (found := cache.stats().pages_shared) != common // PAGE:
        wrong["shared"] = f"{found} pages are shared, of {common // PAGE} in common"
    page_bytes = shared.k.nbytes // pages
    some = max(1, min(pages, 4 * bench.cache_bytes // page_bytes))  # enough that it comes from memory
    flops = 4 * batch * Hq * (common + own) * D
    race = Race(bench, calls, wrong, (shared.k[:some], shared.v[:some]), flops)
    nbytes = 2 * 2 * D * Hkv * (common + batch * own)
    title = f"{batch} of {common:,} shared + {own} {Hq}/{Hkv} bf16"
    return [race.line(title, "shared", "own copies", needed, nbytes=nbytes)]


def latent(bench: Bench, case: Case, needed: float | None) -> list[Line]:
    """Latent decode on pages against its two matrix products, without the softmax, on contiguous data.

    Where the type has no fast product, they run on float32 copies.
    """
    inputs = build(case)
    k, R = inputs.sets[0][0], case.rank
    cache = qkv.cache.LatentCache(
        rank=R, rope_dim=case.D - R, pages=_pages(case), page_size=PAGE, dtype=case.torch_dtype
    )
    view = cache.view(fill(cache, (k[:, 0, :, :R], k[:, 0, :, R:]), "shuffled"))
    kind = machine.product_type(case.torch_dtype)
    q, flat = inputs.q[:, :, 0].to(kind), k[:, 0].to(kind)
    # The weights that the products would get, so that their result can be checked, too.
    p = torch.stack([(case.scale * (a.float() @ b.float().T)).softmax(-1) for a, b in zip(q, flat, strict=True)])
    p = p.to(kind)

    def one_by_one() -> Tensor:
        outs = []
        for b in range(case.B):
            torch.mm(q[b], flat[b].T)
            outs.append(torch.mm(p[b], flat[b, :, :R]))
        return torch.stack(outs)[:, :, None]

    def batched() -> Tensor:
        torch.bmm(q, flat.transpose(1, 2))
        return torch.bmm(p, flat[..., :R])[:, :, None]

    calls = {"latent": lambda: bench.attention(inputs.q, view), "two mm": one_by_one, "two bmm": batched}
    wrong = wrong_results({name: inputs.error(call()) for name, call in calls.items()}, TOLERANCE[case.dtype])
    race = Race(bench, calls, wrong, (k, k), case.flops)
    peers = [name for name in ("two mm", "two bmm") if name in race.taken] or ["two mm"]
    best = min(peers, key=lambda name: spread(list(race.taken.get(name, {0: 0.0}).values())).median)
    title = f"latent {case.B}×{case.Lk:,} {case.Hq} heads {case.D}/{R} {case.dtype}"
    return [race.line(title, "latent", best, needed, nbytes=case.kv_bytes)]
