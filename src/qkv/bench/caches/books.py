"""Contests of `qkv bench --caches` about the books of a cache: appending, looking a prefix up, waste, and memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.bench.caches.contest import Bench, Figure, Line
from qkv.bench.caches.reading import PAGE, fill
from qkv.bench.memory import status
from qkv.bench.race import Spread, spread

_WIDEST = torch.complex128  # 16 bytes: as which rows are copied fastest


def in_turn(bench: Bench, timers: Mapping[str, Callable[[], float]]) -> dict[str, dict[int, float]]:
    """What the timers tell, round after round: as `race.interleave`, where a call must be cleaned up after."""
    taken: dict[str, dict[int, float]] = {name: {} for name in timers}
    start = bench.clock.now()
    for number in range(bench.rounds[1]):
        for name in timers if number % 2 == 0 else reversed(list(timers)):
            bench.clock.settle()
            taken[name][number] = timers[name]()
        elapsed = bench.clock.now() - start
        enough = number + 1 >= bench.rounds[0] and elapsed + elapsed / (number + 1) > bench.seconds
        if enough or bench.clock.now() + elapsed / (number + 1) > bench.until:
            break
    return taken


def append(
    bench: Bench, layers: int, *, needed: float | None, batch: int = 64, heads: int = 8, D: int = 128, steps: int = 48
) -> list[Line]:
    """Steps of one token a sequence, against only the copying: to the same places, with indices that are ready."""
    g = torch.Generator().manual_seed(0)
    pages = batch * -(-steps // PAGE)
    cache = qkv.cache.PagedCache(pages=pages, page_size=PAGE, num_kv_heads=heads, head_dim=D, layers=layers)
    seqs = [cache.add() for _ in range(batch)]
    rows = [
        tuple(torch.randn(batch, heads, 1, D, generator=g).to(torch.bfloat16) for _ in range(2)) for _ in range(steps)
    ]

    def forget() -> None:
        for seq in seqs:
            cache.truncate(seq, 0)

    def fill_up() -> float:
        start = bench.clock.now()
        for k, v in rows:
            for layer in range(layers):
                cache.append(seqs, k, v, layer)
        return (bench.clock.now() - start) / steps

    fill_up()
    table = torch.tensor([seq.pages for seq in seqs])
    pools = [x for layer in range(layers) for view in (cache.view(seqs, layer),) for x in (view.k, view.v)]
    head = torch.arange(heads)
    places = [((table[:, t // PAGE, None] * heads + head) * PAGE + t % PAGE).view(-1) for t in range(steps)]
    targets = [x.view(-1, D).view(_WIDEST) for x in pools]
    sources = [tuple(x.view(-1, D).view(_WIDEST) for x in pair) for pair in rows]

    def copy() -> float:
        start = bench.clock.now()
        for place, pair in zip(places, sources, strict=True):
            for n, target in enumerate(targets):
                target.index_copy_(0, place, pair[n % 2])
        return (bench.clock.now() - start) / steps

    problems = _not_stored("append", pools, table, rows)
    for target in targets:
        target.zero_()
    copy()
    problems += _not_stored("bare copying", pools, table, rows)
    forget()
    title = f"append, batch {batch}, {layers} layer{'s' * (layers > 1)} {heads}×{D} bf16"
    if problems:
        return [Line(title, problem="; ".join(problems))]

    def appended() -> float:
        seconds = fill_up()
        forget()
        return seconds

    taken = in_turn(bench, {"append": appended, "bare copying": copy})
    ours, bare = taken["append"], taken["bare copying"]
    beyond = spread([1e6 * (ours[n] - bare[n]) / (batch * layers) for n in ours])
    return [
        Line(
            title,
            spread(list(ours.values())),
            "bare copying",
            spread(list(bare.values())),
            Figure(beyond, " µs", needed, at_most=True),
            rounds=len(ours),
            note=f"append, {layers} layer{'s' * (layers > 1)}: microseconds a sequence and layer beyond the copying; "
            f"{layers * beyond.median:.2f} a sequence and step",
        )
    ]


def _not_stored(name: str, pools: Sequence[Tensor], table: Tensor, rows: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """What is wrong with the pools of keys and values, by layer, after `rows` were appended to the pages of `table`."""
    for n, pool in enumerate(pools):
        held = pool[table].transpose(1, 2).flatten(2, 3)[:, :, : len(rows)]
        if not torch.equal(held, torch.cat([pair[n % 2] for pair in rows], 2)):
            return [f"{name}: layer {n // 2} does not hold what was appended"]
    return []


def lookup(bench: Bench, *, needed: float | None, tokens: int = 50_000) -> list[Line]:
    """`add(tokens=...)` where all full pages of the prompt are cached, against only their digests."""
    prompt = torch.randint(128_000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = qkv.cache.PagedCache(pages=-(-tokens // PAGE), page_size=PAGE, num_kv_heads=1, head_dim=8)
    first = cache.add(tokens=prompt)
    zeros = torch.zeros(1, 1, tokens, 8, dtype=torch.bfloat16)
    cache.append([first], zeros, zeros)
    pages = first.pages
    cache.free(first)
    full = (tokens - 1) // PAGE  # the last token is left to compute
    problems: list[str] = []

    def found() -> float:
        start = bench.clock.now()
        seq = cache.add(tokens=prompt)
        seconds = bench.clock.now() - start
        if seq.cached_tokens != full * PAGE or seq.pages != pages[:full]:
            problems.append(f"{seq.cached_tokens} tokens found, of {full * PAGE}")
        cache.free(seq)
        return seconds

    data, size = torch.tensor(prompt).numpy().tobytes(), 8 * PAGE

    def digests() -> float:
        keyed = hashlib.blake2b(digest_size=32, key=bytes(64))
        start = bench.clock.now()
        parent = bytes(32)
        for at in range(0, full * size, size):
            hasher = keyed.copy()
            hasher.update(parent)
            hasher.update(data[at : at + size])
            parent = hasher.digest()
        return bench.clock.now() - start

    found()
    taken = in_turn(bench, {"lookup": found, "digests alone": digests})
    title = f"prefix lookup, {tokens:,} tokens"
    if problems:
        return [Line(title, problem=problems[0])]
    ours = spread(list(taken["lookup"].values()))
    return [
        Line(
            title,
            ours,
            "digests alone",
            spread(list(taken["digests alone"].values())),
            Figure(Spread(*(1e3 * x for x in ours)), " ms", needed, at_most=True),
            rounds=len(taken["lookup"]),
        )
    ]


def waste(bench: Bench, *, batch: int = 64, longest: int = 1000) -> list[Line]:
    """Slots of used pages that hold no token, by `stats()`, for sequences of any length and forks of them."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (batch,), generator=g).tolist()
    pages = sum(-(-n // PAGE) for n in lengths)
    cache = qkv.cache.PagedCache(pages=pages, page_size=PAGE, num_kv_heads=1, head_dim=8)
    seqs = [cache.add() for _ in lengths]
    packed = torch.zeros(1, 1, sum(lengths), 8, dtype=torch.bfloat16)
    cache.append(seqs, packed, packed, lengths=lengths)
    twins = [cache.fork(seq) for seq in seqs]  # on the same pages: no slot more
    stats = cache.stats()
    used = len({page for seq in (*seqs, *twins) for page in seq.pages})
    expected = (sum(lengths), used * PAGE - sum(lengths), used)
    if (stats.tokens, stats.waste_tokens, stats.pages_used) != expected:
        given = f"stats() counts {stats.tokens} tokens, {stats.waste_tokens} empty slots and {stats.pages_used} pages"
        return [Line("waste", problem=f"{given}; there are {', '.join(map(str, expected))}")]
    each = [len(seq.pages) * PAGE - seq.length for seq in seqs]
    title = f"waste, {batch} sequences of 1 to {longest:,} tokens, forked"
    most = float(max(each))
    figure = Figure(Spread(most, most, most), " slots", PAGE - 1, at_most=True)
    note = (
        f"waste: empty slots of a sequence, the most of {batch}; {stats.waste_tokens / batch:.1f} on average by stats()"
    )
    return [Line(title, figure=figure, note=note)]


def memory(bench: Bench, *, pages: int = 4096, heads: int = 8, D: int = 128) -> list[Line]:
    """Bytes of the tensors against those that `stats()` tells, and the rise of the process."""
    paged: dict[str, Any] = {"pages": pages, "page_size": PAGE, "num_kv_heads": heads, "head_dim": D}
    made: dict[str, Callable[[], Any]] = {
        "bf16": lambda: qkv.cache.PagedCache(**paged),
        "int8": lambda: qkv.cache.PagedCache(**paged, storage=torch.int8),
        "float8": lambda: qkv.cache.PagedCache(**paged, storage=torch.float8_e4m3fn),
        "latent bf16": lambda: qkv.cache.LatentCache(rank=4 * D, rope_dim=D // 2, pages=pages, page_size=PAGE),
    }
    lines = []
    for name, make in made.items():
        before = _resident()
        cache = make()
        rise = _resident() - before
        view = cache.view(fill(cache, _one_token(cache), "in order"))
        stats = cache.stats()
        tensors = [x for x in (view.k, view.v, view.k_scale, view.v_scale) if x is not None]
        held = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
        slots = stats.pages * stats.page_size
        title = f"memory, {name}, {slots:,} tokens"
        if not held == stats.bytes == slots * stats.bytes_per_token:
            problem = f"tensors of {held:,} bytes; stats() tells {stats.bytes:,}, {stats.bytes_per_token:,} a token"
            lines.append(Line(title, problem=problem))
            continue
        grown = f", the process grew by {rise / 1e6:.1f} MB" if rise > 0 else ""
        note = f"memory, {name}: {held / 1e6:.1f} MB of tensors, as stats() tells{grown}"
        each = float(stats.bytes_per_token)
        lines.append(Line(title, figure=Figure(Spread(each, each, each), " bytes"), note=note))
    return lines


def _one_token(cache: Any) -> tuple[Tensor, ...]:
    """Rows of one sequence with one token, for either kind of cache."""
    if isinstance(cache, qkv.cache.LatentCache):
        view = cache.view([])
        R = view.v.shape[-1]
        return tuple(torch.zeros(1, 1, width, dtype=cache.dtype) for width in (R, view.k.shape[-1] - R))
    view = cache.view([])
    return tuple(torch.zeros(1, x.shape[1], 1, x.shape[-1], dtype=cache.dtype) for x in (view.k, view.v))


def _resident() -> int:
    try:
        return status("VmRSS")
    except OSError:  # no /proc
        return 0
