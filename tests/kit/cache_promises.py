"""A cache and the plain model of it, and every promise that is checked after each operation of `cache_model.py`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache
from qkv.call.keys import KVView
from qkv.errors import QKVError
from tests.kit.cache_reading import Code, audit, cached_pages, numbers, slots, tables_of

PAGED = ("paged", "latent paged")


class Dice:
    """Where the arguments of operations come from."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self.below = below  # an int in [0, n)

    def pick(self, of: Sequence[Any]) -> Any:
        return of[self.below(len(of))]

    def chance(self, one_in: int) -> bool:
        return self.below(one_in) == 0

    def some(self, of: Sequence[Any], most: int) -> list[Any]:
        """1 to `most` different ones."""
        left = list(of)
        return [left.pop(self.below(len(left))) for _ in range(1 + self.below(min(most, len(left))))]


def seeded(seed: int) -> Dice:
    rng = random.Random(seed)
    return Dice(lambda n: int(rng.random() * n))


@dataclass(frozen=True)
class Config:
    """One cache to be made."""

    kind: str
    layers: int = 1
    heads: int = 1
    D: int = 6
    Dv: int = 6
    page_size: int = 4
    pages: int = 16
    sequences: int = 4
    capacity: int | None = None
    window: int | None = None
    sinks: int = 0
    chunk: int = 1
    dtype: torch.dtype = torch.float64
    storage: torch.dtype | None = None
    debug: bool = False
    digest: str = "keyed"  # "constant": every page has the same one; "weak": one of three
    summaries: int | None = None

    def cache(self) -> Any:
        heads: dict[str, Any] = {"num_kv_heads": self.heads, "head_dim": self.D, "value_dim": self.Dv}
        both: dict[str, Any] = {
            "layers": self.layers, "dtype": self.dtype, "storage": self.storage, "debug": self.debug,
            "summaries": self.summaries,
        }  # fmt: skip
        pool: dict[str, Any] = {"pages": self.pages, "page_size": self.page_size}
        rows: dict[str, Any] = {"sequences": self.sequences, "capacity": self.capacity}
        if self.kind == "paged":
            made = PagedCache(**pool, **heads, **both, window=self.window, sinks=self.sinks)
            if self.digest == "constant":
                made._index.digest = lambda parent, tokens: bytes(32)
            elif self.digest == "weak":
                made._index.digest = lambda parent, tokens: bytes([sum(parent + tokens) % 3])
            return made
        if self.kind == "dense":
            return DenseCache(**rows, **heads, **both)
        if self.kind == "ring":
            ring = {"window": self.window, "sinks": self.sinks, "chunk": self.chunk, "page_size": self.page_size}
            return RingCache(sequences=self.sequences, **ring, **heads, **both)
        latent = {"rank": self.Dv, "rope_dim": self.D - self.Dv}
        return LatentCache(**latent, **(pool if self.kind == "latent paged" else rows), **both)


def draw_config(dice: Dice, kind: str | None = None) -> Config:
    kind = kind or dice.pick(("paged",) * 7 + ("dense", "ring", "latent paged", "latent dense"))
    storage = dice.pick((None, None, None, torch.int8, torch.float8_e4m3fn))
    wide = 7 if storage == torch.float8_e4m3fn else 5  # so that the digits of an id have room
    latent = kind.startswith("latent")
    windowed = kind == "ring" or (kind == "paged" and dice.chance(3))
    page_size = dice.pick((1, 2, 3, 4, 4, 8))
    dense = kind in ("dense", "latent dense")
    blocks = (1, 3, 4) if dense else tuple(n for n in (1, 2, 3, 4, 8) if page_size % n == 0)
    return Config(
        kind=kind,
        layers=dice.pick((1, 1, 2, 3)),
        heads=1 if latent else dice.pick((1, 2, 3)),
        D=wide + (dice.pick((1, 2, 3)) if latent else 0),
        Dv=wide + (0 if latent else dice.pick((0, 0, 2))),
        page_size=page_size,
        pages=dice.pick((3, 8, 16, 32, 48, 64)),
        sequences=dice.pick((1, 3, 5)),
        capacity=dice.pick((None, None, 1, 7, 20)),
        window=1 + dice.below(9) if windowed else None,
        sinks=dice.pick((0, 0, 1, 3, 5)) if windowed else 0,
        chunk=dice.pick((1, 3, 8)),
        dtype=dice.pick((torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        storage=storage,
        debug=dice.chance(2),
        digest=dice.pick(("keyed", "keyed", "constant", "weak")),
        summaries=dice.pick(blocks) if dice.chance(2) else None,
    )


@dataclass(eq=False)
class Held:
    """What one sequence must hold."""

    seq: Any
    ids: list[int]  # the write behind each key of finished steps
    nodes: list[int | None]  # for each: the place of its tokens in the trie, None where they are unknown
    space: int  # the root of its salt and adapter
    prompt: list[int] = field(default_factory=list)  # tokens given to add(); those past the length are to come
    who: tuple[Any, Any] = (None, None)  # salt and adapter
    first: int = 0  # the position of the earliest query that may still be asked
    swapped: bool = False
    step: list[int] = field(default_factory=list)  # the writes of an unfinished step
    step_nodes: list[int | None] = field(default_factory=list)
    step_tokens: list[int] | None = None
    handle: Any = None  # the Step through which it goes, where it does
    done: int = 0  # layers that have it
    fresh: bool = True  # no step yet
    returned: bool = False  # was swapped out once

    def twin(self, seq: Any) -> Held:
        """What a fork of it must hold."""
        lists = {"ids": list(self.ids), "nodes": list(self.nodes), "prompt": list(self.prompt)}
        return replace(self, seq=seq, step=[], step_nodes=[], step_tokens=None, handle=None, done=0, **lists)

    def at(self, layer: int) -> list[int]:
        return self.ids + self.step if layer < self.done else self.ids


@dataclass
class Kept:
    """Views that a person holds on to, and what they showed: as long as they are not stale they must show it."""

    views: list[KVView]
    ids: list[list[np.ndarray]]
    owners: list[Held]


class Ledger:
    """A cache, the model of it, and the promises."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = config.cache()
        self.paged = config.kind in PAGED
        self.latent = config.kind.startswith("latent")
        self.code = Code(config.layers, config.heads, config.D, config.Dv, config.storage, self.latent)
        self.rows: list[Held] = []
        self.gone: list[Any] = []
        self.past: list[tuple[list[int], tuple[Any, Any]]] = []  # tokens of sequences that were freed or cut, and whose
        self.kept: list[Kept] = []
        self.steps: list[list[Held]] = []  # unfinished ones
        self.trie: dict[tuple[int, Any], int] = {}
        self.node_of: list[int | None] = []  # of each write
        self.writes: Counter[int | None] = Counter()  # how often each node was written
        self.count: Counter[str] = Counter()
        self.log: list[tuple[Any, ...]] = []
        self.left_alone: set[int] = set()  # pages that may hold forgotten tokens: shared ones when they were truncated

    # ------------------------------------------------------------------------------------------------- small parts
    def end_step(self, rows: list[Held], finished: bool) -> None:
        """The rows of a step go on with what it wrote, or forget it."""
        self.steps = [one for one in self.steps if one is not rows]
        for r in rows:
            n, end = len(r.ids), len(r.ids) + len(r.step)
            if finished:
                if r.step_tokens is not None and n <= len(r.prompt) < end:
                    r.prompt = r.prompt + r.step_tokens[len(r.prompt) - n :]
                r.first, r.fresh = (n, False) if r.step else (r.first, r.fresh)
                r.ids, r.nodes = r.ids + r.step, r.nodes + r.step_nodes
            r.step, r.step_nodes, r.step_tokens, r.handle, r.done = [], [], None, None, 0

    def node(self, parent: int | None, token: Any) -> int | None:
        if parent is None or token is None:
            return None
        return self.trie.setdefault((parent, token), len(self.trie) + 1)

    def write(self, nodes: Sequence[int | None]) -> list[int]:
        """New ids, one a token that is written."""
        start = len(self.node_of)
        self.node_of.extend(nodes)
        self.writes.update(nodes)
        assert len(self.node_of) < self.code.most, "the episode is too long for its code"
        return list(range(start, len(self.node_of)))

    def live(self, finished: bool = True) -> list[Held]:
        return [r for r in self.rows if not r.swapped and not (finished and r.done)]

    def stats(self) -> Any:
        return self.cache.stats()

    def refused(self, call: Callable[[], Any]) -> None:
        """The call must raise, and change nothing."""
        before = self.stats()
        try:
            call()
        except QKVError:
            assert self.stats() == before, "a refused call changed the cache"
            return
        raise AssertionError("a malformed call was taken")

    # ---------------------------------------------------------------------------------- what one operation must do
    def space(self, salt: Any, adapter: Any) -> int:
        key = (-1, (type(salt).__name__, salt, type(adapter).__name__, adapter))
        return self.trie.setdefault(key, len(self.trie) + 1)

    def adopt(self, row: Held, cached: int) -> None:
        """Found tokens must be numbers that these very tokens wrote under this very salt and adapter."""
        view = self.cache.view([row.seq])
        where, stored = slots(view), numbers(view)
        here = where.page >= 0
        ids = np.full(cached, -1)
        ids[here] = self.code.ids(stored.k[where.page[here], :, where.slot[here]], 0)
        node: int | None = row.space
        for j, one in enumerate(ids.tolist()):
            node = self.node(node, row.prompt[j])
            if here[j]:
                assert one >= 0, f"token {j} of a found prefix was never written"
                assert self.node_of[one] == node, f"token {j} was written by other tokens, or for another salt"
            row.ids.append(one)
            row.nodes.append(node)
        row.first = cached
        self.count["hits"] += 1

    def must_hit(self, row: Held) -> None:
        """Whole pages that a living sequence holds under the same salt are found, all but the last token at most.

        Only what was written once: of two pages with the same tokens the cache may forget one. And nothing that was
        swapped, because what comes back need not be offered again.
        """
        if not self.paged or self.config.window is not None:
            return
        node, chain, longest = row.space, [], 0
        for token in row.prompt:
            if (node, token) not in self.trie or self.writes[self.trie[node, token]] != 1:
                break
            node = self.trie[node, token]
            chain.append(node)
        for other in self.live(finished=False):
            if other is not row and not other.returned:
                same = 0
                while same < min(len(chain), len(other.nodes)) and chain[same] == other.nodes[same]:
                    same += 1
                longest = max(longest, same)
        P = self.config.page_size
        whole = min(longest // P * P, (len(row.prompt) - 1) // P * P)
        assert row.seq.cached_tokens >= whole, f"{row.seq.cached_tokens} tokens found where {whole} are held"
        self.count["must hit"] += whole > 0

    def pages_needed(self, rows: list[Held], counts: list[int]) -> tuple[int, int]:
        """The least and the most pages that a step may take, copies on write included."""
        if not self.paged or self.config.window is not None:
            return 0, 1 << 30
        P = self.config.page_size
        names = Counter(p for r in self.live(finished=False) for p in set(r.seq.pages))
        new = partial = 0
        writers: Counter[int] = Counter()
        for r, t in zip(rows, counts, strict=True):
            n = len(r.ids)
            new += -(-(n + t) // P) - -(-n // P)
            if t and n % P:
                partial += 1
                writers[r.seq.pages[n // P]] += 1
        copies = sum(w if names[p] > w else w - 1 for p, w in writers.items())
        return new + copies, new + partial

    # -------------------------------------------------------------------------------------------------- invariants
    def check(self, thorough: bool = True) -> None:
        """Everything a cache promises. `thorough`: the old views too."""
        live = self.live(finished=False)
        seqs = [r.seq for r in live]
        for r in self.rows:
            assert r.seq.length == len(r.ids), f"length {r.seq.length} where {len(r.ids)} tokens were stored"
            assert list(r.seq.tokens or ()) == r.prompt, f"tokens {r.seq.tokens}, not {r.prompt}"
        views = [self.cache.view(seqs, layer=i) for i in range(self.config.layers)] if seqs else []
        wheres = [slots(view) for view in views]
        for layer, (view, where) in enumerate(zip(views, wheres, strict=True)):
            expected = [r.at(layer) for r in live]
            assert list(view.layout.lengths) == [len(e) for e in expected], "lengths of a view"
            self.compare(view, where, np.array([i for e in expected for i in e], dtype=np.int64), layer)
            if self.config.summaries is not None:
                self.summarised(seqs, view, where, layer)
        if views:
            self.given_back(live, views[0], wheres[0])
        self.figures(live, views, wheres)
        if self.paged:
            audit(self.cache)
        if thorough:
            for kept in list(self.kept):
                layout = kept.views[0].layout
                if layout.alive_at != layout.clock.now:
                    self.kept.remove(kept)
                    continue
                for layer, (view, ids) in enumerate(zip(kept.views, kept.ids, strict=True)):
                    self.compare(view, slots(view), np.concatenate(ids).astype(np.int64), layer)

    def compare(self, view: KVView, where: Any, ids: np.ndarray, layer: int) -> None:
        stored = numbers(view)
        here = where.page >= 0
        k, v = self.code.rows(ids[here], layer)
        got_k, got_v = (x[where.page[here], :, where.slot[here]] for x in stored)
        for name, got, want in (("k", got_k, k), ("v", got_v, v)):
            if not (got == want).all():
                at = int(np.flatnonzero((got != want).any((1, 2)))[0])
                owner, key = where.sequence[here][at], where.key[here][at]
                raise AssertionError(
                    f"layer {layer}, {name} of key {key} of sequence {owner} of the view reads "
                    f"{got[at].tolist()}, not {want[at].tolist()} (write {ids[here][at]})"
                )

    def summarised(self, seqs: list[Any], view: KVView, where: Any, layer: int) -> None:
        """The summaries of full blocks are those of the keys that are stored, in the view and as copies."""
        block, copies, keys = self.config.summaries, self.cache.summaries(seqs, layer), numbers(view).k
        assert block is not None
        assert view.summaries is not None
        each = view.k.shape[2] // block
        in_place = [x.double().numpy() for x in view.summaries[:3]]  # (Hkv, N, each, D)
        assert all(x.shape[:3] == (self.config.heads, len(keys), each) for x in in_place)
        copied = [x.double().numpy() for x in copies[:3]]  # (sequences, Hkv, blocks, D)
        for i, length in enumerate(view.layout.lengths):
            full = length // block
            assert copies.full[i] == full
            mine = where.sequence == i
            pages, places = (x[mine][: full * block].reshape(full, block) for x in (where.page, where.slot))
            whole = (pages >= 0).all(1)
            assert not any(x[i, :, :full][:, ~whole].any() for x in copied), (
                f"a summary of a block of {np.flatnonzero(~whole)}, which were given back"
            )
            pages, places = pages[whole], places[whole]
            rows = keys[pages, :, places]  # (blocks, block, heads, D)
            for n, name in enumerate(("mean", "min", "max")):
                want = getattr(rows, name)(1).swapaxes(0, 1)
                kept, copy = in_place[n][:, pages[:, 0], places[:, 0] // block], copied[n][i, :, :full][:, whole]
                for got in (kept, copy):
                    right = abs(got - want) <= 1e-6 + 1e-6 * abs(want)
                    assert right.all(), (
                        f"layer {layer}, {name} of blocks {np.flatnonzero(whole)[~right.all((0, 2))]} of sequence {i}: "
                        f"{got[~right]}, not {want[~right]}"
                    )

    def given_back(self, live: list[Held], view: KVView, where: Any) -> None:
        """Keys may be gone only where no query to come sees them, and then they are gone within a step."""
        if self.config.window is None:
            assert (where.page >= 0).all(), "a page was given back that has no window to leave"
            return
        first = np.array([r.first for r in live], dtype=np.int64)[where.sequence]
        seen = (where.key > first - self.config.window) | (where.key < self.config.sinks)
        assert (where.page[seen] >= 0).all(), "a key that a query to come sees was given back"
        if self.paged:
            P = self.config.page_size
            for r, table in zip(live, tables_of(view), strict=True):
                wide = self.config.window + len(r.at(0)) - r.first
                most = -(-self.config.sinks // P) + wide // P + 3
                assert len([p for p in table if p >= 0]) <= most or r.fresh, "pages that left the window are kept"

    def figures(self, live: list[Held], views: list[KVView], wheres: list[Any]) -> None:
        """stats() against the tables, waste, and NaN wherever nothing is held."""
        stats, P = self.stats(), self.config.page_size
        held = [self.held_slots(*one) for one in zip(views, wheres, strict=True)]
        if self.paged:
            names = Counter(p for r in live for p in set(r.seq.pages) if p >= 0)
            assert stats.pages == self.config.pages
            assert stats.pages_used == len(names), f"{stats.pages_used} pages used, {len(names)} in tables"
            assert stats.pages_shared == sum(n > 1 for n in names.values())
            assert stats.pages_free + stats.pages_used + stats.pages_cached == stats.pages, f"pages are lost: {stats}"
            if not self.steps and held:
                assert stats.tokens == int(held[0].sum()), f"{stats.tokens} tokens, {int(held[0].sum())} slots held"
            if not self.steps:
                assert stats.waste_tokens == stats.pages_used * P - stats.tokens
                assert stats.waste_tokens <= len(live) * (P - 1), "a sequence wastes a page"
        assert stats.sequences == len(self.rows)
        if self.config.debug and views:
            filed = cached_pages(self.cache) if self.paged else []
            self.left_alone &= {p for r in live for p in r.seq.pages} | set(filed)
            cached = [*filed, *self.left_alone]
            for view, mine in zip(views, held, strict=True):
                stored = numbers(view)
                bare = np.isnan(stored.k).all((1, 3)) & np.isnan(stored.v).all((1, 3))
                mine[cached] = True
                assert (bare | mine).all(), (
                    f"slots that nobody holds are not NaN: {np.argwhere(~bare & ~mine).tolist()}"
                )

    def held_slots(self, view: KVView, where: Any) -> np.ndarray:
        """bool (N, P): slots that some sequence holds."""
        mask = np.zeros((view.k.shape[0], view.k.shape[2]), dtype=bool)
        here = where.page >= 0
        mask[where.page[here], where.slot[here]] = True
        return mask
