"""Caches against a dictionary of lists: random operations, and every promise checked after each.

    python -m tests.gates.cache_model --operations 100000 --seed 1     # what `make gate` runs
    python -m tests.gates.cache_model --seed 1000017 --episodes 1      # one episode again, as a failure prints it

`Machine` holds a cache and the plain model of it: for each sequence the list of writes that it must hold. Every
operation draws its arguments from a `Dice`, which is a seeded `random.Random` here and Hypothesis in
`test_cache_model.py`, so both run the same rules and the same checks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qkv.errors import ArgumentError, PagesExhausted, QKVError
from tests.kit.cache_promises import Dice, Held, Kept, Ledger, draw_config, seeded

SALTS: tuple[Any, ...] = (None, None, None, "1", 1, b"1", "b")
ADAPTERS: tuple[Any, ...] = (None, None, None, "x", 1)
ALIKE: dict[Any, tuple[Any, ...]] = {1: ("1", b"1"), "1": (1, b"1"), b"1": (1, "1"), None: ("None", "")}
MOST_SEQUENCES = 9


class Machine(Ledger):
    """The operations, on the cache and on the model of it."""

    def add(self, dice: Dice) -> None:
        if len(self.rows) >= (MOST_SEQUENCES if self.paged else self.config.sequences):
            if not self.paged and len(self.rows) == self.config.sequences:
                self.refused(self.cache.add)
            return self.free(dice)
        known = [(r.prompt, r.who) for r in self.rows if r.prompt] + self.past
        if not self.paged or dice.chance(4):
            salt = adapter = None
            seq, row_space, tokens = self.cache.add(), self.space(None, None), []
            self.log.append(("add",))
        else:
            salt, adapter = dice.pick(SALTS), dice.pick(ADAPTERS)
            tokens = []
            if known and not dice.chance(4):
                tokens, who = dice.pick(known)
                tokens = tokens[: 1 + dice.below(len(tokens))] if dice.chance(3) else tokens
                if tokens and dice.chance(4):
                    at = dice.below(len(tokens))
                    tokens = [*tokens[:at], 1 - tokens[at], *tokens[at + 1 :]]
                if not dice.chance(4):
                    salt, adapter = who
                    if dice.chance(4):
                        salt, adapter = dice.pick([(s, adapter) for s in ALIKE.get(salt, SALTS)] + [(adapter, salt)])
            tokens = tokens + [dice.below(2) for _ in range(dice.below(3 * self.config.page_size + 2))]
            self.log.append(("add", tokens, salt, adapter))
            given = dice.pick((tokens, tuple(tokens), torch.tensor(tokens, dtype=torch.int64)))
            seq = self.cache.add(tokens=given, salt=salt, adapter=adapter)
            row_space = self.space(salt, adapter)
        row = Held(seq, [], [], row_space, tokens, (salt, adapter))
        self.rows.append(row)
        cached = seq.cached_tokens
        assert seq.length == cached, "a new sequence has the tokens that were found and no others"
        assert cached <= max(len(tokens) - 1, 0), "the last token is to be computed, its logits are needed"
        if cached:
            self.adopt(row, cached)
        self.must_hit(row)
        return None

    def append(self, dice: Dice) -> None:
        live = self.live()
        if not live:
            return self.add(dice)
        rows = dice.some(live, 4)
        P = self.config.page_size
        sizes = (1, 1, 1, 1, 2, 3, P, P + 1, 2 * P + 1, 0)
        if self.config.kind == "ring":
            sizes = tuple(min(n, self.config.chunk) for n in sizes)
        ragged = dice.chance(3)
        counts = [dice.pick(sizes) for _ in rows] if ragged else [dice.pick(sizes)] * len(rows)
        left = len(rows[0].prompt) - len(rows[0].ids)
        if left > 0 and not dice.chance(4):  # a prompt is written at once, as a rule
            rows, counts = rows[:1], [left]
        tokens: list[list[int]] | None = None
        if self.paged and not dice.chance(3):
            tokens = [self.tokens_to_come(dice, r, t) for r, t in zip(rows, counts, strict=True)]
        for i, (r, t) in enumerate(zip(rows, counts, strict=True)):
            node: int | None = r.nodes[-1] if r.nodes else r.space
            r.step_nodes = []
            for n in range(t):
                at = len(r.ids) + n
                token = tokens[i][n] if tokens else (r.prompt[at] if at < len(r.prompt) else None)
                node = self.node(node, token)
                r.step_nodes.append(node)
            r.step = self.write(r.step_nodes)
            r.step_tokens = tokens[i] if tokens else None
        self.log.append(("append", [self.rows.index(r) for r in rows], counts, ragged, tokens))
        before = self.stats()
        low, high = self.pages_needed(rows, counts)
        room = before.pages_free + before.pages_cached if self.paged else 0
        lengths = counts if ragged else None
        given = None if tokens is None else ([t for row in tokens for t in row] if ragged else tokens)
        try:
            self.put(rows, 0, lengths, given, dice)
        except QKVError as error:
            after = self.stats()
            assert after == before, f"an append that failed changed {before} to {after}"
            if self.paged and isinstance(error, PagesExhausted):
                assert high > room, f"no pages for {high} where {room} are free or cached"
            elif self.config.capacity is None or "capacity" not in str(error):
                raise
            self.end_step(rows, finished=False)
            self.count["exhausted"] += 1
            return None if dice.chance(4) else self.free(dice)
        assert low <= room or not self.paged, "pages from nowhere"
        self.steps.append(rows)
        for r in rows:
            r.done = 1
            if self.config.kind == "ring" and r.step:
                r.first = len(r.ids)  # slots are overwritten already
        last = self.config.layers - (dice.below(self.config.layers) if dice.chance(6) else 0)
        for layer in range(1, last):
            self.put(rows, layer, lengths, None if dice.chance(2) else given, dice)
            for r in rows:
                r.done = layer + 1
        self.finish(rows)
        return None

    def tokens_to_come(self, dice: Dice, row: Held, count: int) -> list[int]:
        """Those of the prompt first, then any."""
        left = row.prompt[len(row.ids) :][:count]
        return left + [dice.below(2) for _ in range(count - len(left))]

    @staticmethod
    def laid_out(x: torch.Tensor, how: int) -> torch.Tensor:
        """The same numbers, otherwise in memory."""
        if how == 0:
            return x.contiguous()
        if how == 1:  # rows of a wider tensor
            return torch.cat([x.new_full((*x.shape[:-1], 1), torch.nan), x], -1)[..., 1:]
        if how == 2:
            with torch.inference_mode():
                return x + 0
        return x  # heads after tokens

    def put(self, rows: list[Held], layer: int, lengths: list[int] | None, tokens: Any, dice: Dice) -> None:
        ids = [i for r in rows for i in r.step]
        k, v = self.code.tensors(ids, layer, 1 if lengths is not None else len(rows), self.config.dtype)
        if self.latent:
            k, v = k[:, 0, :, : self.config.Dv], k[:, 0, :, self.config.Dv :]
        k, v = (self.laid_out(x, dice.below(4)) for x in (k, v))
        seqs = [r.seq for r in rows]
        if layer == 0 and dice.chance(3):
            count = {"lengths": lengths} if lengths is not None else {"T": len(rows[0].step)}
            more = {} if tokens is None else {"tokens": tokens}
            rows[0].handle = self.cache.step(seqs, **count, **more)
            want = [list(range(len(r.ids), len(r.ids) + len(r.step))) for r in rows]
            flat = [[p for row in want for p in row]] if lengths is not None else want
            assert rows[0].handle.positions.tolist() == flat, "positions of a step"
        if rows[0].handle is not None and (layer == 0 or dice.chance(2)):
            rows[0].handle.layer(layer).append(k, v)
        else:
            self.cache.append(seqs, k, v, layer, lengths=lengths, tokens=tokens)

    def finish(self, rows: list[Held]) -> None:
        if rows[0].done == self.config.layers:
            self.end_step(rows, finished=True)
            for r in rows:
                assert r.seq.length == len(r.ids), f"length {r.seq.length} after a step to {len(r.ids)}"

    def go_on(self, dice: Dice) -> None:
        """The next layer of an unfinished step, or its end."""
        if not self.steps:
            return self.append(dice)
        rows = dice.pick(self.steps)
        self.log.append(("go on", [self.rows.index(r) for r in rows]))
        ragged = rows[0].seq._step.lengths is not None
        self.put(rows, rows[0].done, [len(r.step) for r in rows] if ragged else None, None, dice)
        for r in rows:
            r.done += 1
        self.finish(rows)
        return None

    def fork(self, dice: Dice) -> None:
        rows = self.live(finished=False)
        if not self.paged or not rows or len(self.rows) >= MOST_SEQUENCES:
            return self.append(dice)
        row = dice.pick(rows)
        self.log.append(("fork", self.rows.index(row)))
        if row.done:
            return self.refused(lambda: self.cache.fork(row.seq))
        seq = self.cache.fork(row.seq)
        assert seq is not row.seq
        assert seq.length == len(row.ids)
        self.rows.append(row.twin(seq))
        return None

    def remember(self, row: Held) -> None:
        """Prompts of the past are asked for again."""
        if row.prompt:
            self.past = [*self.past[-7:], (row.prompt, row.who)]

    def drop(self, row: Held) -> None:
        """Forget an unfinished step of a row, for all its rows."""
        for rows in [rows for rows in self.steps if row in rows]:
            self.end_step(rows, finished=False)

    def free(self, dice: Dice) -> None:
        if not self.rows:
            return self.add(dice)
        rows = dice.some(self.rows, dice.pick((1, 1, 1, 3)))
        self.log.append(("free", [self.rows.index(r) for r in rows]))
        self.cache.free(rows[0].seq if len(rows) == 1 and dice.chance(2) else [r.seq for r in rows])
        for r in rows:
            self.drop(r)
            self.remember(r)
            self.rows.remove(r)
            self.gone.append(r.seq)
        self.gone = self.gone[-3:]
        self.must_be_stale(rows)
        return None

    def must_be_stale(self, rows: list[Held]) -> None:
        """Views that show something of these sequences."""
        for kept in self.kept:
            shown = [r for r, ids in zip(kept.owners, kept.ids[0], strict=True) if len(ids)]
            layout = kept.views[0].layout
            if any(r in rows for r in shown):
                assert layout.alive_at != layout.clock.now, "a view of what is gone is alive"

    def evict(self, dice: Dice) -> None:
        if not self.paged:
            return self.append(dice)
        before = self.stats()
        pages = None if dice.chance(2) else dice.below(4)
        self.log.append(("evict", pages))
        self.cache.evict() if pages is None else self.cache.evict(pages)
        after = self.stats()
        want = before.pages_cached if pages is None else min(pages, before.pages_cached)
        assert before.pages_cached - after.pages_cached == want, f"{want} pages were to be evicted"
        assert after.pages_free - before.pages_free == want
        return None

    def swap(self, dice: Dice) -> None:
        """Out to host memory, or back."""
        out = self.live()
        back = [r for r in self.rows if r.swapped]
        if not self.paged or not (out or back):
            return self.append(dice)
        row = dice.pick(back if back and (not out or dice.chance(2)) else out)
        self.log.append(("swap", self.rows.index(row), "in" if row.swapped else "out"))
        if not row.swapped:
            self.cache.swap_out(row.seq)
            row.swapped = True
            self.must_be_stale([row])
            return None
        before = self.stats()
        try:
            self.cache.swap_in(row.seq)
        except PagesExhausted:
            assert self.stats() == before, "a swap_in that failed changed something"
            need = -(-len(row.ids) // self.config.page_size)
            assert need > before.pages_free + before.pages_cached, "there was room to swap in"
            self.count["no room to swap in"] += 1
            return None
        row.swapped, row.returned = False, True
        if row.ids and row.seq.pages[-1] >= 0:
            self.left_alone.add(row.seq.pages[-1])  # it comes back as it was, forgotten tokens included
        return None

    def truncate(self, dice: Dice) -> None:
        live = self.live()
        if not live:
            return self.add(dice)
        row = dice.pick(live)
        n = len(row.ids)
        length = max(0, n - dice.below(4)) if dice.chance(2) else dice.below(n + 1)
        self.log.append(("truncate", self.rows.index(row), length))
        if self.paged and length % self.config.page_size:
            page, pool = row.seq.pages[length // self.config.page_size], self.cache._pool
            if page >= 0 and (pool.refs[page] > 1 or pool.entries[page] is not None):
                self.left_alone.add(page)
        before = self.stats()
        try:
            self.cache.truncate(row.seq, length)
        except ArgumentError:
            assert self.config.window is not None
            assert length < row.first, "the tokens of the last step can always be taken back"
            assert self.stats() == before, "a refused truncate changed something"
            self.count["too far back"] += 1
            return None
        self.remember(row)
        del row.ids[length:], row.nodes[length:]
        row.prompt = row.prompt[:length]
        row.first = min(row.first, length)
        assert row.seq.length == length
        if length < n:
            self.must_be_stale([row])
        return None

    def rollback(self, dice: Dice) -> None:
        if not self.steps:
            return self.truncate(dice)
        rows = dice.pick(self.steps)
        self.log.append(("rollback", [self.rows.index(r) for r in rows]))
        self.cache.rollback([r.seq for r in rows])
        self.drop(rows[0])
        if any(kept for kept in self.kept):
            self.must_be_stale([])
        return None

    def misuse(self, dice: Dice) -> None:
        """One of the mistakes people make; nothing may change."""
        cache, layers, live = self.cache, self.config.layers, self.live()
        wrong: list[tuple[str, Callable[[], Any]]] = [("add", lambda: cache.add(tokens=["a"]))]
        for seq in self.gone[-1:]:
            wrong += [
                ("free again", lambda seq=seq: cache.free(seq)),
                ("use what was freed", lambda seq=seq: self.use(seq)),
            ]
        for row in [r for r in self.rows if r.swapped][:1]:
            wrong += [("use what is swapped", lambda row=row: self.use(row.seq))]
        for row in live[:1]:
            wrong += [
                ("view twice", lambda row=row: cache.view([row.seq, row.seq])),
                ("truncate to more", lambda row=row: cache.truncate(row.seq, len(row.ids) + 1)),
            ]
            if layers > 1:
                wrong += [("begin in the middle", lambda row=row: self.wrong_layer([row], layers - 1))]
        for rows in self.steps[:1]:
            wrong += [("a layer again", lambda rows=rows: self.wrong_layer(rows, rows[0].done - 1))]
            if rows[0].done + 1 < layers:
                wrong += [("leave a layer out", lambda rows=rows: self.wrong_layer(rows, rows[0].done + 1))]
        name, call = wrong[-1] if dice.chance(3) else dice.pick(wrong)
        self.log.append(("misuse", name))
        self.refused(call)

    def use(self, seq: Any) -> None:
        self.cache.truncate(seq, 0)

    def wrong_layer(self, rows: list[Held], layer: int) -> None:
        """An append in the wrong layer, and else as it should be."""
        step = rows[0].seq._step
        lengths = [len(r.step) for r in rows] if step is not None and step.lengths is not None else None
        T = sum(lengths) if lengths is not None else len(rows[0].step) or 1
        k, v = self.code.tensors(
            np.zeros(T if lengths else T * len(rows)), layer, 1 if lengths else len(rows), self.config.dtype
        )
        if self.latent:
            k, v = k[:, 0, :, : self.config.Dv], k[:, 0, :, self.config.Dv :]
        self.cache.append([r.seq for r in rows], k, v, layer, lengths=lengths)

    def keep(self, dice: Dice) -> None:
        """Hold on to the views of some sequences."""
        live = self.live(finished=False)
        if not live:
            return self.add(dice)
        rows = dice.some(live, 3)
        self.log.append(("keep", [self.rows.index(r) for r in rows]))
        views = [self.cache.view([r.seq for r in rows], layer=i) for i in range(self.config.layers)]
        ids = [[np.array(r.at(i)) for r in rows] for i in range(self.config.layers)]
        self.kept = [*self.kept[-2:], Kept(views, ids, rows)]
        return None


OPERATIONS: tuple[tuple[str, int], ...] = (
    ("add", 10), ("append", 34), ("fork", 9), ("free", 8), ("evict", 3), ("swap", 7),
    ("truncate", 8), ("rollback", 4), ("go_on", 7), ("misuse", 4), ("keep", 6),
)  # fmt: skip
WEIGHED = tuple(name for name, weight in OPERATIONS for _ in range(weight))
EPISODE = 400  # operations on one cache


class Failed(AssertionError):
    """A promise was broken; the message says how to see it again."""


def run_episode(seed: int, operations: int = EPISODE, kind: str | None = None) -> Machine:
    """One cache from its first operation to its last. Raises Failed at the first operation that breaks a promise."""
    dice = seeded(seed)
    machine = Machine(draw_config(dice, kind))
    at = 0
    try:
        for at in range(operations):
            name = dice.pick(WEIGHED)
            getattr(machine, name)(dice)
            machine.count[name] += 1
            machine.check(thorough=at % 3 == 0)
    except Exception as error:
        story = "\n".join(f"    {entry}" for entry in machine.log[-25:])
        raise Failed(
            f"{type(error).__name__}: {error}\n  after operation {at} of episode {seed}: {machine.config}\n{story}\n"
            f"  again: python -m tests.gates.cache_model --seed {seed} --episodes 1"
        ) from error
    return machine


def run(operations: int, seed: int) -> Counter[str]:
    """Episodes from `seed` on, until so many operations were done."""
    total: Counter[str] = Counter()
    for episode, at in enumerate(range(0, operations, EPISODE), seed):
        total += run_episode(episode, min(EPISODE, operations - at)).count
    return total


CHUNK = 10 * EPISODE


def _chunk(given: tuple[int, int]) -> tuple[int, Counter[str], str]:
    """Some episodes of one process: how many operations, their counts, and what was broken."""
    seed, operations = given
    torch.set_num_threads(1)
    try:
        return operations, run(operations, seed), ""
    except Failed as error:
        return operations, Counter(), str(error)


def run_in(processes: int, operations: int, seed: int) -> Counter[str]:
    """The same episodes as those of `run`, in some processes, with a line now and then."""
    work = [(seed + at // EPISODE, min(CHUNK, operations - at)) for at in range(0, operations, CHUNK)]
    total: Counter[str] = Counter()
    done, start, end = 0, time.perf_counter(), "" if sys.stdout.isatty() else "\n"
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for size, counts, fault in pool.imap_unordered(_chunk, work):
            if fault:
                raise Failed(fault)
            total += counts
            done += size
            print(
                f"\r{done:,} of {operations:,} operations, {time.perf_counter() - start:.0f} s  ", end=end, flush=True
            )
    print("\n" + ", ".join(f"{name} {n:,}" for name, n in sorted(total.items())))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random operations on caches against a plain model.")
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episodes", type=int, help="stop after so many caches")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    operations = given.operations if given.episodes is None else given.episodes * EPISODE
    try:
        run_in(given.processes, operations, given.seed)
    except Failed as error:
        print(f"\n{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
