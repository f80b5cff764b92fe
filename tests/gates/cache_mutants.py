"""Caches with one mistake each, and the proof that the tests see it.

    python -m tests.gates.cache_mutants            # the table: every mutant, and what killed it

A mutant is one method of the real classes with a few words of its source replaced, so a mutant that no longer
applies says so. Each faces the seeded driver of `cache_model.py`; the few that no stream of operations can tell, the
order of eviction and interruptions among them, face the named test that is there for them.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qkv.cache import base, ledger, paged, pool, prefix, ring, storage, summaries
from tests.gates import cache_model

OPERATIONS = 8000


@dataclass(frozen=True)
class Mutant:
    """`old` of the method's source becomes `new`, everywhere in it."""

    name: str
    owner: Any
    method: str
    old: str
    new: str
    kind: str | None = None  # of cache, where only one shows it
    test: str = ""  # module.function of tests/cache in place of the driver

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = inspect.getattr_static(self.owner, self.method)
        function = before.fget if isinstance(before, property) else before
        source = textwrap.dedent(inspect.getsource(function))
        if self.old not in source:
            raise LookupError(f"{self.name}: {self.old!r} is no longer in {self.method}")
        body = textwrap.indent(source.replace(self.old, self.new), "    ")
        code = f"from __future__ import annotations\ndef make(__class__):\n{body}\n    return {self.method}\n"
        names = dict(inspect.getmodule(function).__dict__)
        exec(compile(code, "<mutant>", "exec"), names)
        changed = names["make"](self.owner)
        try:
            setattr(self.owner, self.method, changed)
            yield
        finally:
            setattr(self.owner, self.method, before)


Paged, Pool, Index, Cache = paged.PagedCache, pool.PagePool, prefix.PrefixIndex, base.Cache
MUTANTS = (
    # who uses a page
    Mutant("a fork is not counted", Pool, "share", "self.refs[page] += 1", "pass"),
    Mutant("a page is given back by the last but one", Pool, "release", "if self.refs[page]:",
           "if self.refs[page] > 1:"),
    Mutant("a page is freed twice", Pool, "release", "self.free.append(page)", "self.free += [page, page]"),
    Mutant("a page is not given back", Cache, "_trim", "self._dropped(dropped)", "pass"),
    Mutant("no copy on write", Paged, "_count", "if users > 1:", "if False:"),
    Mutant("no copy on write between two", Paged, "_count", "if users > 1:", "if users > 2:"),
    Mutant("both writers copy", Paged, "_count", "left[page] = users - 1", "pass"),
    Mutant("a fork writes into the same table", Paged, "fork", "seq._table[:], seq._gone", "seq._table, seq._gone"),
    Mutant("a fork shares the list of tokens", Paged, "fork", "seq._tokens[:]", "seq._tokens"),
    Mutant("truncate poisons a shared page", Cache, "_poison_tail", "self._pool.refs[page] == 1 and ", ""),
    Mutant("rollback keeps the pages", Cache, "_undo", "self._trim(seq)", "pass"),
    Mutant("pages are taken before they are counted", Paged, "_refuse", "pool = self._pool",
           "pool = self._pool; pool.take(1)"),
    Mutant("used pages are not refused", Paged, "_count", "if need > self._pool.available:", "if False:"),
    # prefixes
    Mutant("a digest is trusted for its tokens", Index, "match", "entry.tokens == chunk and ", "", "paged"),
    Mutant("a digest is trusted for what came before", Index, "match", " and _follows(entry.parent, parent)",
           "", "paged"),
    Mutant("salt and adapter are not in the key", Index, "root", "(salt, adapter)", "()"),
    Mutant("the adapter is not in the key", Paged, "add", 'typed(call, "adapter", adapter)',
           'typed(call, "adapter", None)'),
    Mutant("salt 1 is salt '1'", paged, "typed", "return kind.__name__, value", 'return "str", str(value)', "paged"),
    Mutant("an evicted page is found", Pool, "_drop", "self.unregister(page)", "pass"),
    Mutant("a page that is written anew is found", Paged, "_count", " or entries[page] is not None", ""),
    Mutant("the last token is found, too", Paged, "add", "len(known) - 1", "len(known)"),
    Mutant("tokens past a truncation stay known", Paged, "_shorten", "del seq._tokens[length:]", "pass"),
    Mutant("the chain goes on after a truncation", Paged, "_shorten", "seq._chain = seq._chain.parent", "pass",
           test="test_isolation.test_a_truncated_page_that_is_written_again_is_not_what_it_was"),
    Mutant("tokens after a gap are believed", Paged, "_fold", "end - len(row) <= len(known) < end", "len(known) < end"),
    Mutant("nothing is ever found", Index, "match", "matched.append(entry)", "break"),
    Mutant("the most recent page is evicted", Pool, "_drop", "last=False", "last=True",
           test="test_isolation.test_the_least_recently_used_goes_first"),
    Mutant("the head of a prefix is evicted first", Cache, "_give_back", "reversed(list(pages))", "list(pages)",
           test="test_isolation.test_the_end_of_a_chain_goes_before_its_beginning"),
    Mutant("identity and dtype are not in the key", Index, "__init__", "framed(names)", "b''",
           test="test_isolation.test_identity_and_dtype_are_in_the_key"),
    # windows
    Mutant("a page is released too early", Paged, "_release_passed", "self.window + 1)",
           "self.window + 1 + self.page_size)"),
    Mutant("released for the query to come", Paged, "_release_passed", "seq._length - count", "seq._length"),
    Mutant("sinks are released", Paged, "_release_passed", "max(seq._gone, self._pinned)", "seq._gone"),
    Mutant("nothing is released", Paged, "_release_passed", "if stop > gone:", "if False:"),
    Mutant("a ring names what it overwrote", ring.RingCache, "_claim", "table[past] = -1", "pass", "ring"),
    Mutant("a ring is a page too short", ring.RingCache, "__init__", "(window + self.chunk - 2) // P) + 1",
           "(window + self.chunk - 2) // P)", "ring"),
    # steps and views
    Mutant("the clock stands still", Cache, "_tick", "self.clock.now += 1", "pass"),
    Mutant("layouts outlive what they tell", Cache, "_tick", "self._recent = []", "pass"),
    Mutant("a layout is kept for layers that have less", Cache, "view", "(layer < step.next) != included", "False"),
    Mutant("a layer shows what it does not have", Cache, "_layout", "if layer < step.next:", "if True:"),
    Mutant("a layer may be left out", Cache, "_going_on", "step.next == layer", "step.next <= layer"),
    Mutant("rows run past their page", Cache, "_places", "min(end, at - at % P + P)", "end"),
    Mutant("tokens and heads are mixed up", storage.Plane, "write", "rows(H, P, by_token)", "rows(H, P, False)"),
    # copies
    Mutant("a copy on write leaves the scales", storage.Storage, "copy_pages", "in self._tensors():",
           "in (plane.pages for plane in self._planes()):"),
    Mutant("a copy on write is of one layer", storage.Storage, "copy_pages", "in self._tensors():",
           "in list(self._tensors())[: len(self.planes[0])]:"),
    Mutant("pages come back in another order", Paged, "swap_in", "zip(missing, pages", "zip(missing, pages[::-1]"),
    Mutant("pages come back to other places", Paged, "swap_in", "table[host.places[at]]", "table[at]", "paged"),
    Mutant("growing forgets", storage.Storage, "grown", "fresh.raw[:, :, : self.page_size] = old.raw", "pass", "dense"),
    # summaries
    Mutant("a block that was begun before has its old summary", summaries.Filled, "__init__", "range(length // block,",
           "range(-(-length // block),"),
    Mutant("summaries stay where the keys were", storage.Storage, "_tensors", "yield from kept.by_page()", "pass"),
    Mutant("only the first layer is summarised", storage.Storage, "write", "if filled is not None:",
           "if filled is not None and layer == 0:"),
    Mutant("summaries are of numbers without scales", summaries.Summaries, "fill", "* scales[at][..., None]", "* 1",
           test="test_summaries.test_they_are_of_what_attention_reads"),
    Mutant("summaries of another head", summaries.Summaries, "fill", "x.transpose(0, 1)", "x.transpose(0, 1).flip(0)"),
    Mutant("growing forgets the summaries", storage.Storage, "grown", "to.grow_from(kept)", "pass", "dense"),
    Mutant("poison in what a block before has", summaries.Summaries, "poison_slots", "first // self.block :", "0:"),
    # poison, figures
    Mutant("freed pages keep their numbers", Cache, "_give_back", "if self.debug and freed:", "if False:"),
    Mutant("evicted pages keep their numbers", Paged, "_take", "if self.debug:", "if False:"),
    Mutant("no waste is reported", Paged, "_empty_slots", "return empty", "return 0"),
    # interruptions
    Mutant("an interrupted append is not repaired", Cache, "append", "self._repair()", "self._dirty = False",
           test="test_faults.mutant_append"),
    Mutant("an interrupted change is not repaired", ledger._Change, "__exit__", "self._ledger._repair()", "pass",
           test="test_faults.mutant_free"),
    Mutant("a repair forgets the counts", Cache, "_repair", "self._pool.rebuild", "(lambda owned: None)",
           test="test_faults.mutant_append"),
    Mutant("a commit is not taken up again", Cache, "_repair", "self._advance(step)", "pass",
           test="test_faults.mutant_commit"),
)  # fmt: skip


def named(test: str) -> Callable[[], None]:
    """The run of a test function of tests/cache."""
    module, function = test.split(".")
    run: Callable[..., None] = getattr(importlib.import_module(f"tests.cache.{module}"), function)
    if "monkeypatch" not in inspect.signature(run).parameters:
        return run

    def patched() -> None:
        with pytest.MonkeyPatch.context() as patch:
            run(patch)

    return patched


def kill(mutant: Mutant, operations: int = OPERATIONS) -> str:
    """What broke, in a line; "" for a survivor."""
    run = (
        named(mutant.test) if mutant.test else None
    )  # before anything is broken: a test that is not there kills nothing
    with mutant.applied():
        try:
            if run is not None:
                run()
                return ""
            seed = 0
            while operations > 0:
                cache_model.run_episode(seed, min(operations, cache_model.EPISODE), mutant.kind)
                operations, seed = operations - cache_model.EPISODE, seed + 1
        except cache_model.Failed as error:
            first = str(error).splitlines()
            after = next(line for line in first if line.startswith("  after operation"))
            return f"{after.split(':')[0].strip()}: {first[0]}"
        except (Exception, KeyboardInterrupt) as error:
            return f"{mutant.test}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def unharmed() -> list[Mutant]:
    """Every method that is changed, compiled anew as it is: replacing the source alone must break nothing."""
    return [
        Mutant("no mistake", owner, method, " ", " ") for owner, method in {(m.owner, m.method): 0 for m in MUTANTS}
    ]


def tried(given: tuple[int, int]) -> str:
    """What broke under one of them or of the mutants, by its number."""
    at, operations = given
    torch.set_num_threads(1)
    mutant = [*unharmed(), *MUTANTS][at]
    try:
        return kill(mutant, operations)
    except LookupError as error:
        print(f"GONE    {error}", flush=True)
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every cache with a mistake must die.")
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    survivors = []
    start = time.perf_counter()
    same = unharmed()
    work = [(at, cache_model.EPISODE) for at in range(len(same))]
    work += [(len(same) + at, given.operations) for at in range(len(MUTANTS))]
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for mutant, how in zip([*same, *MUTANTS], pool.imap(tried, work), strict=True):
            if mutant.name == "no mistake":
                if how:
                    print(f"{mutant.method} compiled anew without a mistake: {how}")
                    return 1
                continue
            print(f"{'killed' if how else 'ALIVE '}  {mutant.name:<46} {how[:110]}", flush=True)
            if not how:
                survivors.append(mutant.name)
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} killed, {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
