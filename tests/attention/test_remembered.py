"""What plans keep between calls: one budget in bytes for tensors and views, the least recently used goes first."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import qkv
from qkv import execute
from qkv.execute import Remembered, now, weight
from qkv.masks.segments import Documents
from tests.kit import private

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, nothing_kept: None) -> None:
    """A budget that a few masks fill, and nothing kept from before."""
    monkeypatch.setattr(execute, "BUDGET", BUDGET)
    monkeypatch.setattr(execute, "LARGEST", BUDGET // 4)


def ids(n: int, rows: int = 2, length: int = 2000) -> torch.Tensor:
    return (torch.arange(length)[None] // (40 + torch.arange(rows)[:, None] + n)).contiguous()


def packed(n: int, backend: str | None = None, *, learns: bool = False) -> Documents:
    """A step of a trainer whose batch holds other documents than any before."""
    every = ids(n)
    mask = qkv.documents(segment_ids=every[:, -1:], k_segment_ids=every)
    k = torch.zeros(1, 1, 1, 8).expand(2, 1, 2000, 8)
    q = torch.zeros(2, 1, 1, 8, requires_grad=learns)
    qkv.attention(q, k, k, mask, positions="end", backend=backend)
    return mask


@pytest.mark.parametrize("backend", [None, "tiled"])
@pytest.mark.parametrize("learns", [False, True])
def test_changing_documents_stay_under_the_budget(backend: str | None, learns: bool) -> None:
    """Judged by what is alive, not by what the tables say."""
    alive: list[weakref.ref[torch.Tensor]] = []
    for n in range(100):
        mask = packed(n, backend, learns=learns)
        assert mask.keys.ids is not None
        alive.append(weakref.ref(mask.keys.ids.tensor))
        del mask
    gc.collect()
    left = [t for ref in alive if (t := ref()) is not None]
    assert sum(t.nbytes for t in left) <= BUDGET < sum(ids(n).nbytes for n in range(100)) / 3
    assert private.ready().held() <= BUDGET
    assert left, "the last ones are still of use"
    assert alive[-1]() is not None
    assert alive[0]() is None


def test_what_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used goes, not the oldest: the mask of every step is not planned anew among passing ones."""
    plans = private.count_plans(monkeypatch)
    for n in range(1, 60):
        packed(0)
        packed(n)
    assert len(plans) == 60


def test_a_mask_that_is_too_large_is_not_kept() -> None:
    big = qkv.documents(segment_ids=torch.arange(40_000) // 7)
    q = torch.zeros(1, 1, 1, 8).expand(1, 1, 40_000, 8)
    packed(0)
    kept = len(private.ready())
    qkv.attention(q[:, :, :1], q, q, big, positions=[0])
    assert len(private.ready()) == kept, "nor does it push out others"


def test_views_share_the_budget() -> None:
    cache = qkv.cache.PagedCache(pages=8, page_size=16, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    sequence = cache.add()
    cache.append([sequence], *torch.randn(2, 1, 1, 20, 8).unbind(0))
    alive = []
    for n in range(200):
        prefix = torch.tensor([n % 20])
        mask = qkv.prefix(prefix) | qkv.global_tokens(torch.arange(n, n + 2000))
        alive.append(weakref.ref(mask.parts[1].indices.tensor))  # type: ignore[attr-defined]
        qkv.attention(torch.zeros(1, 1, 1, 8), cache.view([sequence]), mask=mask)
        del mask
    gc.collect()
    assert sum(t.nbytes for ref in alive if (t := ref()) is not None) <= BUDGET
    assert private.ready().held() <= BUDGET


def test_what_a_call_adds_to_its_mask_is_counted() -> None:
    """A mask keeps where its documents lie once someone asked: after the entry was made."""
    table = Remembered(10)
    mask = qkv.documents(segment_ids=torch.arange(4000))
    table.put("mask", 0, (mask,))
    before = table.held()
    mask.keys.runs(0)
    table.put("next", 0, ())
    assert table.held() >= before + 3 * 4000 * 8
    assert weight((mask, mask)) == weight(mask)
    table.clear()


def test_the_number_of_entries_is_bounded_by_use() -> None:
    table = Remembered(3)
    for n in range(3):
        table.put(n, str(n))
    table[0].used = now()
    table.put(3, "3")
    assert sorted(table) == [0, 2, 3]
    table.clear()


def test_threads_put_and_find_at_once() -> None:
    table, faults = Remembered(20), []
    tensors = [torch.zeros(n % 7 * 1000) for n in range(60)]

    def work(start: int) -> None:
        try:
            for n in range(start, start + 400):
                key = n % 60
                kept = table.get(key)
                if kept is None:
                    table.put(key, key, (tensors[key],))
                else:
                    kept.used = now()
                    assert kept.value == key
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(17 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(table) <= 20
    assert table.held() <= BUDGET
    table.clear()
