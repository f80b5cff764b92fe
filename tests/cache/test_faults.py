"""Faults at every site: whatever fails in the middle, the pool is consistent and the operation can be done again.

Each operation runs on a fresh scene with the first, the second, the third ... torch call failing, before it does
anything and after it did it; then with the hash failing; then with KeyboardInterrupt at every line of the package.
Afterwards every sequence holds what it held before or what it was to hold, the figures add up, and the operation can
be done again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qkv.cache
from qkv.cache import PagedCache
from tests.kit.cache_reading import Code, audit, contents

pytestmark = pytest.mark.usefixtures("one_thread")
P, LAYERS, H, D = 2, 2, 1, 6
PACKAGE = str(Path(qkv.cache.__file__).parent)


class Boom(RuntimeError):
    """A fault of ours, so that no other error passes for it."""


class BoomMemory(MemoryError):
    pass


class BoomInterrupt(KeyboardInterrupt):
    pass


class TorchFault(TorchDispatchMode):
    """Fails at the n-th torch operation, before it or after it."""

    def __init__(self, at: int, error: type[BaseException], after: bool) -> None:
        super().__init__()
        self.left, self.error, self.after, self.hit = at, error, after, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1 and not self.after:
            self.hit = True
            raise self.error("injected")
        result = func(*args, **(kwargs or {}))
        if self.left == -1:
            self.hit = True
            raise self.error("injected")
        return result


class LineFault:
    """Fails at the n-th line of the package that is run."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.hit, self.where = at, error, False, ""
        self.seen: list[str] = []

    def __enter__(self) -> LineFault:
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(self.seen) == self.left + 1:
                self.hit, self.where = True, self.seen[-1]
                raise self.error("injected")
        return self.line


class HashFault:
    """Fails at the n-th digest."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.hit = at, error, False

    def arm(self, cache: Any) -> None:
        real = cache._index.digest

        def digest(parent: bytes, tokens: bytes) -> bytes:
            self.left -= 1
            if self.left == -1:
                self.hit = True
                raise self.error("injected")
            return real(parent, tokens)

        cache._index.digest = digest

    def __enter__(self) -> HashFault:
        return self

    def __exit__(self, *_: Any) -> None: ...


# ------------------------------------------------------------------------------------------------------- the scene
@dataclass
class Scene:
    """A small pool in a state where every operation has something to do."""

    cache: Any
    code: Code
    seqs: dict[str, Any] = field(default_factory=dict)
    made: Any = None  # what the operation returned

    def put(self, names: str, ids: list[int], layers: Iterable[int] | None = None, tokens: Any = None) -> None:
        seqs = [self.seqs[n] for n in names]
        for layer in range(self.code.layers) if layers is None else layers:
            k, v = self.code.tensors(ids, layer, len(seqs), torch.float32)
            self.cache.append(seqs, k, v, layer, tokens=tokens)


def scene(debug: bool = False, storage: Any = None, layers: int = LAYERS) -> Scene:
    cache = PagedCache(
        pages=9,
        page_size=P,
        num_kv_heads=H,
        head_dim=D,
        layers=layers,
        dtype=torch.float32,
        debug=debug,
        storage=storage,
    )
    s = Scene(cache, Code(layers, H, D, D, storage))
    s.seqs["a"] = cache.add(tokens=[1, 2, 3, 4, 5], salt="s")
    s.put("a", [1, 2, 3])
    s.seqs["b"] = cache.fork(s.seqs["a"])  # shares a whole page and a half one
    s.seqs["c"] = cache.add()
    s.put("c", [4])
    s.seqs["w"] = cache.add(tokens=[7, 7, 7])
    s.put("w", [5, 6, 7])
    cache.swap_out(s.seqs["w"])
    old = cache.add(tokens=[8, 8, 8, 9])
    s.seqs["o"] = old
    s.put("o", [8, 9, 10, 11])
    cache.free(old)  # two cached pages that nobody uses
    del s.seqs["o"]
    if layers > 1:
        s.seqs["s"], s.seqs["t"] = cache.add(), cache.add(tokens=[6, 6, 6])
        s.put("st", [12, 13, 14, 15], (0,), [[9, 9], [6, 6]])  # in the middle of a step
    return s


def do_add(s: Scene) -> None:
    s.made = s.cache.add(tokens=[1, 2, 3, 4, 5], salt="s")


def do_fork(s: Scene) -> None:
    s.made = s.cache.fork(s.seqs["a"])


OPERATIONS: dict[str, Callable[[Scene], None]] = {
    "add": do_add,
    "append": lambda s: s.put("abc", [20, 21, 22, 23, 24, 25, 26, 27, 28], (0,)),
    "append with tokens": lambda s: s.put("a", [20, 21, 22], (0,), [[4, 5, 6]]),
    "append that evicts": lambda s: s.put("c", [20, 21, 22, 23, 24, 25, 26, 27], (0,)),
    "the last layer": lambda s: s.put("st", [12, 13, 14, 15], (1,)),
    "fork": do_fork,
    "free": lambda s: s.cache.free(s.seqs["a"]),
    "free two": lambda s: s.cache.free([s.seqs["a"], s.seqs["b"]]),
    "truncate": lambda s: s.cache.truncate(s.seqs["a"], 1),
    "rollback": lambda s: s.cache.rollback([s.seqs["s"]]),
    "swap out": lambda s: s.cache.swap_out(s.seqs["b"]),
    "swap in": lambda s: s.cache.swap_in(s.seqs["w"]),
    "evict": lambda s: s.cache.evict(),
}


def reading(s: Scene) -> dict[str, Any]:
    """What each sequence holds, layer by layer; "gone" for a freed one, "swapped" for one in host memory."""
    live = {name: seq for name, seq in s.seqs.items() if seq._live is s.cache}
    layers = [contents(s.cache, list(live.values()), s.code, [layer]) for layer in range(s.code.layers)]
    found: dict[str, Any] = {name: "gone" if seq._host is None else "swapped" for name, seq in s.seqs.items()}
    return found | {name: [layer[i] for layer in layers] for i, name in enumerate(live)}


def settle(s: Scene) -> None:
    """Give everything back: no page may be lost, and none be there twice."""
    for name, what in reading(s).items():
        if what != "gone":
            s.cache.free(s.seqs[name])
    if s.made is not None:
        s.cache.free(s.made)
    audit(s.cache)
    stats = s.cache.stats()
    assert stats.pages_free + stats.pages_cached + stats.pages_used == stats.pages
    return stats


@cache
def before_and_after(name: str, make: Callable[[], Scene]) -> tuple[dict[str, Any], dict[str, Any]]:
    s = make()
    old = reading(s)
    OPERATIONS[name](s)
    return old, reading(s)


def try_fault(name: str, make: Callable[[], Scene], fault: Any, orphans: bool = False) -> bool:
    """One operation under one fault. False where the fault was never reached."""
    operation, (old, new) = OPERATIONS[name], before_and_after(name, make)
    s = make()
    views = [(s.cache.view([q]), [contents(s.cache, [q], s.code, [0])[0]]) for n, q in s.seqs.items() if n in "abc"]
    raised = False
    if isinstance(fault, HashFault):
        fault.arm(s.cache)
    try:
        with fault:
            operation(s)
    except (Boom, BoomMemory, BoomInterrupt):
        raised = True
    if not fault.hit:
        return False
    audit(s.cache)
    now = reading(s)
    at = getattr(fault, "where", "")
    if name == "free two":
        assert all(now[n] in (old[n], new[n]) for n in now), f"{at}: {now} is neither {old} nor {new}"
    else:
        assert now in (old, new), f"{at}: {now} is neither {old} nor {new}"
    for view, was in views:
        if view.layout.alive_at == view.layout.clock.now:
            assert shown(view, s.code) == was, f"{at}: a view that is not stale shows something else"
    if raised and now == old and s.made is None:
        stats = s.cache.stats()
        operation(s)
        assert reading(s) == new, f"{at}: the operation done again gives {reading(s)}, not {new}"
        assert s.cache.stats().sequences - stats.sequences in (-2, -1, 0, 1)
    if s.made is not None and name in ("add", "fork"):
        want = [1, 2] if name == "add" else [1, 2, 3]
        assert contents(s.cache, [s.made], s.code)[0] == want
    stats = settle(s)
    assert stats.pages_used == 0 or orphans, f"{at}: {stats.pages_used} pages are lost"
    return True


def shown(view: Any, code: Code) -> list[list[int]]:
    class Fixed:
        @staticmethod
        def view(*_: Any, **__: Any) -> Any:
            return view

    return contents(Fixed, [None], code, [0])


def debug_scene() -> Scene:
    return scene(debug=True)


def single_scene() -> Scene:
    return scene(debug=True, layers=1)


def int8_scene() -> Scene:
    return scene(storage=torch.int8)


SCENES: dict[str, Callable[[], Scene]] = {"debug": debug_scene, "int8": int8_scene}
ERRORS = (Boom, BoomMemory, BoomInterrupt)


@pytest.mark.parametrize("kind", ["debug", "int8"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_torch_call_fails(name: str, kind: str) -> None:
    make = SCENES[kind]
    tried = 0
    for after in (False, True) if kind == "debug" else (True,):
        n = 0
        while try_fault(name, make, TorchFault(n, ERRORS[n % 3], after)):
            n += 1
            tried += 1
    if name.startswith(("append", "the last", "swap")):
        assert tried >= 2, "no torch call was reached: this test has nothing to say"


@pytest.mark.parametrize("name", ["add", "append with tokens", "the last layer", "swap in"])
def test_the_hash_fails(name: str) -> None:
    n = 0
    while try_fault(name, scene, HashFault(n, ERRORS[n % 3])):
        n += 1
    if name == "add":
        assert n, "no hash was reached: this test has nothing to say"


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_every_line(name: str) -> None:
    """A sequence whose add() or fork() was interrupted as it was handed over has no owner; all else goes back."""
    walk_lines(name, debug_scene)


@pytest.mark.parametrize("name", ["append", "append with tokens", "append that evicts"])
def test_an_interrupt_at_every_line_with_one_layer(name: str) -> None:
    """Where a step is taken and finished in one call."""
    walk_lines(name, single_scene)


def walk_lines(name: str, make: Callable[[], Scene]) -> None:
    """Each line that the operation runs, in its first and its last turn."""
    watch, s = LineFault(-1, BoomInterrupt), make()
    with watch:
        OPERATIONS[name](s)
    turns: dict[str, list[int]] = {}
    for n, where in enumerate(watch.seen):
        turns.setdefault(where, []).append(n)
    chosen = sorted({n for at in turns.values() for n in (at[0], at[-1])})
    assert len(chosen) > 3, "no line was reached: this test has nothing to say"
    for n in chosen:
        assert try_fault(name, make, LineFault(n, BoomInterrupt), orphans=name in ("add", "fork"))


def mutant_append() -> None:
    """What `cache_mutants.py` asks of a cache that does not repair itself."""
    walk_lines("append", debug_scene)
    walk_lines("append", single_scene)


def mutant_commit() -> None:
    walk_lines("the last layer", debug_scene)


def mutant_free() -> None:
    walk_lines("free", debug_scene)
