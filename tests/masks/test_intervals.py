"""Key ranges of query tiles against the mask drawn in full: exact where promised, on the safe side elsewhere."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
import torch
from torch import Tensor

import qkv
from qkv import masks
from qkv.masks import Intervals, Tile
from tests.kit.mask_specs import EXACT_KINDS, KINDS, Sizes, Spec, draw_sizes, drawn, expression, leaf, seeds


def covered(start: Tensor, stop: Tensor, count: Tensor, Lk: int) -> Tensor:
    """The ranges as bool (T, Lk), after checking that they are what they say they are."""
    seen = torch.zeros(count.numel(), Lk, dtype=torch.bool)
    assert start.shape == stop.shape
    assert start.shape[0] == count.numel()
    assert start.dtype == stop.dtype == count.dtype == torch.int64
    for t in range(count.numel()):
        before = -1
        for r in range(start.shape[1]):
            a, b = int(start[t, r]), int(stop[t, r])
            if r >= count[t]:
                assert a == b == 0
                continue
            assert before < a < b <= Lk, "sorted, not empty, apart from each other, inside the keys"
            seen[t, a:b] = True
            before = b
    return seen


def tiles(rng: random.Random, s: Sizes) -> tuple[list[int], list[int], list[int]]:
    """Positions of the first and last row and the index of the first row, for tiles in and around the keys."""
    kind = rng.choice(["start", "end", "shifted", "scattered"])
    first, last, index = [], [], []
    if kind == "scattered":
        for _ in range(rng.randint(0, 6)):
            size = rng.randint(0, 9)
            i = rng.randint(0, s.Lq)
            p = rng.randint(-8, s.Lk + 8)
            first.append(p)
            last.append(p + size - 1)
            index.append(i)
    else:
        shift = {"start": 0, "end": s.Lk - s.Lq, "shifted": rng.randint(-30, 30)}[kind]
        size = rng.choice([1, 2, 5, 8, 64])
        for i in range(0, s.Lq, size):
            first.append(i + shift)
            last.append(min(i + size, s.Lq) - 1 + shift)
            index.append(i)
    return first, last, index


def check_intervals(spec: Spec, s: Sizes, rng: random.Random) -> None:
    first, last, index = tiles(rng, s)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    as_tensors = [torch.tensor(x, dtype=torch.int64) for x in (first, last, index)]
    found = spec.mask.intervals(
        as_tensors[0], as_tensors[1], i_first=as_tensors[2], b=b, h=h, Lq=s.Lq, Lk=s.Lk, Hq=s.Hq
    )
    visible = covered(*found[:3], s.Lk)
    full = covered(*found[3:], s.Lk)
    for t in range(len(first)):
        name = f"{spec.text} {s} tile {first[t]}..{last[t]} i={index[t]} b={b} h={h}"
        rows = range(last[t] - first[t] + 1)
        if not rows:
            assert not visible[t].any()
            assert not full[t].any()
            continue
        if spec.tensors and index[t] + len(rows) > s.Lq:
            continue  # a tensor is defined by index, and these rows do not exist
        seen = torch.tensor(
            [[spec.sees(b, h, index[t] + r, first[t] + r, j) for j in range(s.Lk)] for r in rows], dtype=torch.bool
        ).view(len(rows), s.Lk)
        if spec.exact:
            assert torch.equal(visible[t], seen.any(0)), name
            assert torch.equal(full[t], seen.all(0)), name
        else:
            assert not (seen.any(0) & ~visible[t]).any(), name
            assert not (full[t] & ~seen.all(0)).any(), name


@pytest.mark.parametrize("kind", KINDS)
@seeds(15)
def test_each_mask(kind: str, seed: int) -> None:
    rng = random.Random(f"intervals {kind} {seed}")
    s = draw_sizes(rng)
    check_intervals(leaf(rng, s, kind), s, rng)


@seeds(500)
def test_compositions_of_the_exact_family(seed: int) -> None:
    spec, s, rng = drawn(seed + 20_000, kinds=EXACT_KINDS)
    assert spec.exact
    check_intervals(spec, s, rng)


@seeds(250)
def test_compositions_of_all_masks_keep_their_promises(seed: int) -> None:
    spec, s, rng = drawn(seed + 30_000, most=24)
    check_intervals(spec, s, rng)


@seeds(20)
def test_deep_compositions(seed: int) -> None:
    rng = random.Random(seed)
    s = Sizes(2, 2, 30, 30)
    check_intervals(expression(rng, s, 5, EXACT_KINDS), s, rng)


def test_tile_states_of_known_masks() -> None:
    first = torch.arange(0, 256, 64)
    found = qkv.causal().intervals(first, first + 63, Lq=256, Lk=256)
    assert found.visible_stop[:, 0].tolist() == [64, 128, 192, 256]
    assert found.full_stop[:, 0].tolist() == [1, 65, 129, 193]
    found = (qkv.documents([100, 156]) & qkv.causal()).intervals(first, first + 63, Lq=256, Lk=256)
    assert found.visible_start[:, 0].tolist() == [0, 0, 100, 100]
    assert found.visible_stop[:, 0].tolist() == [64, 128, 192, 256]
    assert found.full_count.tolist() == [1, 0, 1, 1]
    assert found.full_start[2:, 0].tolist() == [100, 100]
    assert found.full_stop[2:, 0].tolist() == [129, 193]
    found = (qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(32))).intervals(
        first[3:], first[3:] + 63, Lq=256, Lk=256
    )
    assert (found.visible_start.tolist(), found.visible_stop.tolist()) == ([[0, 161]], [[4, 256]])
    assert (found.full_start.tolist(), found.full_stop.tolist()) == ([[0]], [[4]])


def test_positions_without_index_are_positions_from_the_start() -> None:
    mask = qkv.documents([3, 5], [4, 4])
    first, last = torch.tensor([0, 4]), torch.tensor([3, 7])
    one = mask.intervals(first, last, Lq=8, Lk=8)
    two = mask.intervals(first, last, i_first=first, Lq=8, Lk=8)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_tiles_may_continue_in_position_and_jump_in_index() -> None:
    mask = qkv.documents([4, 4, 4], [2, 3, 4]) & qkv.window(100, 100)
    first, i_first = torch.tensor([0, 4, 8]), torch.tensor([0, 8, 4])
    found = mask.intervals(first, first + 3, i_first=i_first, Lq=12, Lk=9)
    for ranges in (found[:3], found[3:]):
        assert [x.tolist() for x in ranges] == [[[0], [5], [2]], [[2], [9], [5]], [1, 1, 1]]


def test_huge_windows_and_positions() -> None:
    far = 2**48
    found = qkv.window(far, far).intervals(torch.tensor([far - 1]), torch.tensor([far]), Lq=2, Lk=10)
    assert (found.visible_start.tolist(), found.visible_stop.tolist()) == ([[0]], [[10]])
    found = qkv.sliding_window(far).intervals(torch.tensor([-far]), torch.tensor([-far + 3]), Lq=4, Lk=10)
    assert found.visible_count.tolist() == [0]


def test_masks_that_bound_only_still_skip() -> None:
    """A mask that only bounds what is inside still tells what lies outside, and keeps the limits of its partner."""
    first = torch.tensor([512])
    found = (qkv.strided(8) & qkv.sliding_window(100)).intervals(first, first + 63, Lq=1024, Lk=1024)
    assert (found.visible_start.tolist(), found.visible_stop.tolist()) == ([[413]], [[576]])
    assert found.full_count.tolist() == [0]
    found = qkv.dilated(4, 3).intervals(first, first + 63, Lq=1024, Lk=1024)
    assert (found.visible_start.tolist(), found.visible_stop.tolist()) == ([[500]], [[588]])
    found = qkv.bigbird(64, global_blocks=1, random_blocks=2).intervals(first, first + 63, Lq=4096, Lk=4096)
    visible = int((found.visible_stop - found.visible_start).sum())
    assert visible <= 64 + (96 + 64 + 96) + 2 * 64


BIG = 800_000
LENGTHS = [BIG // 32 + (11 if d % 2 else -11) for d in range(32)]


@pytest.mark.parametrize(
    ("mask", "L"),
    [
        (qkv.sliding_window(4096), 1_000_000),
        (qkv.causal(), 1_000_000),
        (qkv.documents(LENGTHS), BIG),
        (qkv.documents(LENGTHS) & qkv.causal(), BIG),
        (qkv.documents(segment_ids=torch.arange(32).repeat_interleave(torch.tensor(LENGTHS))) & qkv.causal(), BIG),
        (qkv.chunked(8192) & qkv.causal(), 1_000_000),
    ],
    ids=lambda x: f"{x!r:.40}",
)
def test_long_sequences_cost_in_proportion_to_tiles(mask: qkv.Mask, L: int) -> None:
    first = torch.arange(0, L, 64)
    last = (first + 63).clamp(max=L - 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = 1.0
    try:
        for _ in range(20):  # the processor time of one thread: what else the machine does is not counted
            begin = time.thread_time()
            found = mask.intervals(first, last, Lq=L, Lk=L)
            best = min(best, time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    sample = range(0, first.numel(), 6007)
    for t in sample:
        check_tile(mask, found, t, int(first[t]), int(last[t]), L)
    assert sum(x.numel() for x in found) <= 12 * first.numel()
    assert best < 0.010, f"{best * 1e3:.1f} ms"
    largest = largest_tensor(lambda: mask.intervals(first, last, Lq=L, Lk=L))
    assert largest <= 16 * (first.numel() + 64), f"a tensor of {largest} elements for {first.numel()} tiles"


def check_tile(mask: qkv.Mask, found: Intervals, t: int, first: int, last: int, L: int) -> None:
    at = torch.arange(first, last + 1)[:, None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    seen = mask.visible(Tile.pairs(zero, zero, at, at, torch.arange(L)), masks.Sizes(1, 1, L, L))
    for name, start, stop, count in (("any", *found[:3]), ("all", *found[3:])):
        ranges = torch.zeros(L, dtype=torch.bool)
        for r in range(int(count[t])):
            ranges[start[t, r] : stop[t, r]] = True
        assert torch.equal(ranges, seen.any(0) if name == "any" else seen.all(0))


def largest_tensor(call) -> int:  # type: ignore[no-untyped-def]
    """The number of elements of the largest tensor made by the call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.most = max(self.most, x.numel())
            return out

    with Watch() as watch:
        call()
    return watch.most


def test_no_python_object_is_made_for_each_row_or_tile() -> None:
    first = torch.arange(0, 1_000_000, 64)
    mask = qkv.sliding_window(4096)
    mask.intervals(first, first + 63, Lq=1_000_000, Lk=1_000_000)
    tracemalloc.start()
    mask.intervals(first, first + 63, Lq=1_000_000, Lk=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_too_many_random_or_mapped_blocks_are_only_bounded() -> None:
    """Blocks of one token would need a piece a row: the answer stays small, and on the safe side."""
    first = torch.arange(0, 100_000, 64)
    found = qkv.random_blocks(2, 1, 0).intervals(first, first + 63, Lq=100_000, Lk=100_000)
    assert found.visible_start.shape[1] == 1
    assert (found.visible_stop == 100_000).all()
    assert (found.full_count == 0).all()
