"""A pool on pages under random traffic, and whatever interrupts it: it stays valid."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qkv.cache import PagesExhausted
from tests.kit.cache_truth import Mirror, check_books, contents, paged

pytestmark = pytest.mark.usefixtures("one_thread")


def _random_step(m: Mirror, generator: random.Random, out: list[Any]) -> None:
    cache, live = m.cache, [seq for seq in m.kept if seq not in out]
    roll = generator.random()
    some = generator.sample(live, generator.randrange(1, len(live) + 1)) if live else []
    try:
        if roll < 0.18 or not live:
            if len(m.kept) < 9:
                m.add()
        elif roll < 0.50:
            m.append(some, T=generator.choice([1, 1, 1, 2, 5]))
        elif roll < 0.62:
            m.append(some, lengths=[generator.randrange(0, 6) for _ in some])
        elif roll < 0.70:
            if len(m.kept) < 9:
                m.fork(some[0])
        elif roll < 0.80:
            m.truncate(some[0], generator.randrange(max(0, some[0].length - 5), some[0].length + 1))
        elif roll < 0.88:
            m.free(some[0])
        elif roll < 0.94:
            cache.swap_out(some[0])
            out.append(some[0])
        elif out:
            cache.swap_in(out[-1])
            out.pop()
    except PagesExhausted:
        m.free(generator.choice(live))


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(seed: int) -> None:
    generator = random.Random(seed)
    m = paged(pages=18, page_size=generator.choice([1, 3, 4]), layers=1 + seed % 2, num_kv_heads=1)
    out: list[Any] = []
    for count in range(350):
        _random_step(m, generator, out)
        out = [seq for seq in out if seq in m.kept]
        check_books(m.cache)
        if count % 5 == 0:
            m.check()
    m.check()
    for seq in list(m.kept):
        m.free(seq)
    assert m.cache.stats().pages_free == 18
    assert m.cache._storage.planes[0][0].data.isnan().all()


# ---- interruptions


POOL = 11  # pages: so few that a step has to evict


class _Stop(KeyboardInterrupt):
    pass


def _interrupted(call: Callable[[], Any], after: int) -> bool:
    """Run `call`, with an interrupt at the `after`-th line of code in qkv/cache. Whether there were so many lines."""
    left = after

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if "/qkv/cache/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise _Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except _Stop:
        return True
    finally:
        sys.settrace(before)
    return False


def _scene() -> tuple[Mirror, dict[str, Any]]:
    """A pool of which every kind of page and sequence has some: a copy, an eviction and a release are due."""
    m = paged(pages=POOL, page_size=2, num_kv_heads=1, head_dim=2, value_dim=2, window=6, layers=1)
    prompt = list(range(7))
    old = m.add(tokens=[90, 91, 92, 93, 94])
    m.append([old], T=5)
    m.free(old)
    a = m.add(tokens=prompt)
    m.append([a], T=7)
    twin = m.fork(a)
    m.append([a], T=3)
    b = m.add(m.kept[a], tokens=[*prompt, 9])
    out = m.fork(a)
    m.cache.swap_out(out)
    m.append([a])
    m.fork(a)  # a has to copy its last page before it appends
    return m, {"a": a, "twin": twin, "b": b, "out": out}


def _actions() -> dict[str, Callable[[Mirror, dict[str, Any]], Callable[[], Any]]]:
    def append(m: Mirror, s: dict[str, Any]) -> Callable[[], Any]:
        k, v = m.make(1, 7)
        tokens = [1, 2, 3, 6, 9, 5, 7]
        return lambda: m.cache.append([s["a"], s["b"], s["twin"]], k, v, lengths=[3, 3, 1], tokens=tokens)

    return {
        "append": append,
        "add": lambda m, s: lambda: m.cache.add(tokens=[0, 1, 2, 3, 4, 5, 6, 7]),
        "fork": lambda m, s: lambda: m.cache.fork(s["a"]),
        "free": lambda m, s: lambda: m.cache.free([s["b"], s["out"], s["a"]]),
        "truncate": lambda m, s: lambda: m.cache.truncate(s["a"], s["a"].length - 1),
        "truncate a twin": lambda m, s: lambda: m.cache.truncate(s["twin"], 3),
        "swap out": lambda m, s: lambda: m.cache.swap_out(s["b"]),
        "swap in": lambda m, s: lambda: m.cache.swap_in(s["out"]),
        "evict": lambda m, s: lambda: m.cache.evict(1),
    }


def _state(cache: Any, seqs: dict[str, Any]) -> dict[str, Any]:
    """What a user can see of each sequence."""
    seen: dict[str, Any] = {}
    for name, seq in seqs.items():
        if seq._live is None:
            seen[name] = "freed" if seq._host is None else "out"
        else:
            k, v, index = contents(cache.view([seq]), 0)
            seen[name] = (seq.length, index[-1:], k[:, -3:].tolist(), v[:, -3:].tolist())
    return seen


@pytest.mark.parametrize("action", list(_actions()))
def test_an_interrupt_anywhere_leaves_a_valid_pool(action: str) -> None:
    """At every line of every call: afterwards the call was done or it was not, for each sequence."""
    make = _actions()[action]
    m, seqs = _scene()
    before = _state(m.cache, seqs)
    make(m, seqs)()
    done = _state(m.cache, seqs)
    lines = 0
    while True:
        m, seqs = _scene()
        call = make(m, seqs)
        if not _interrupted(call, lines):
            break
        cache = m.cache
        cache._mend()
        check_books(cache)
        after = _state(cache, seqs)
        if action == "append":
            assert after in (before, done), f"after line {lines}: a part of the step"
        else:
            assert all(after[name] in (before[name], done[name]) for name in seqs), f"after line {lines}"
        # And it goes on: everything can be freed, and all pages come back.
        cache.free([seq for seq in cache._seqs])
        again = cache.add()
        cache.append([again], *m.make(1, 2 * POOL))
        assert contents(cache.view([again]), 0)[2] == list(range(2 * POOL))
        cache.free(again)
        cache.evict()
        assert len(cache._pool.free) == POOL
        lines += 1
    assert lines > 15


def test_an_interrupt_between_layers_leaves_the_step_open() -> None:
    lines = 0
    while True:
        m = paged(pages=12, layers=2, page_size=2)
        a, b = m.add(), m.add()
        m.append([a, b], T=3)
        k, v = m.make(2, 2)
        m.cache.append([a, b], k, v)
        if not _interrupted(lambda m=m, a=a, b=b, k=k, v=v: m.cache.append([a, b], k, v, layer=1), lines):
            break
        m.cache._mend()
        assert (a.length, b.length) in ((3, 3), (5, 5))
        if a.length == 3:
            m.cache.append([a, b], k, v, layer=1)
        for i, seq in enumerate((a, b)):
            for layer in range(2):
                m.kept[seq][layer] += [(k[i, :, t], v[i, :, t]) for t in range(2)]
        m.check()
        check_books(m.cache)
        lines += 1
    assert lines > 15


def test_an_interrupt_of_the_repair_is_repaired_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    m, seqs = _scene()
    before = _state(m.cache, seqs)

    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(m.cache._storage, "write", broken)
        patch.setattr(m.cache._pool.__class__, "rebuild", broken)
        with pytest.raises(MemoryError):
            _actions()["append"](m, seqs)()
        assert m.cache._dirty
    assert _state(m.cache, seqs) == before
    check_books(m.cache)


@pytest.mark.parametrize("site", ["write", "copy_pages", "take", "release", "restore", "read", "index_copy_"])
def test_failing_allocations(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkv.cache.pool import PagePool
    from qkv.cache.storage import Storage

    owner = {"take": PagePool, "release": PagePool, "index_copy_": torch.Tensor}.get(site, Storage)
    tried = 0
    for action, make in _actions().items():
        for nth in range(3):
            m, seqs = _scene()
            before = _state(m.cache, seqs)
            call = make(m, seqs)
            real, left = getattr(owner, site), nth

            def failing(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise MemoryError("no memory for a temporary")
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, site, failing)
                try:
                    call()
                    continue
                except MemoryError:
                    tried += 1
            check_books(m.cache)
            after = _state(m.cache, seqs)
            if action == "append" and site != "release":
                assert after == before
            m.cache.free([seq for seq in m.cache._seqs])
            m.cache.evict()
            assert len(m.cache._pool.free) == POOL
    assert tried
