"""Masks against a second definition in plain Python (`tests/kit/mask_specs.py`), their laws, and known counts.

Every case is named by its seed: `pytest tests/masks/test_algebra.py -k seed17`.
"""

from __future__ import annotations

import random

import pytest
import torch

import qkv
from qkv.masks import Mask
from tests.kit.mask_specs import KINDS, draw_positions, draw_sizes, drawn, drawn_blocks, expression, leaf, seeds, truth


@pytest.mark.parametrize("kind", KINDS)
@seeds(12)
def test_each_mask_is_its_definition(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    s = draw_sizes(rng)
    spec = leaf(rng, s, kind)
    positions, at = draw_positions(rng, s)
    found = spec.mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq)
    assert found.dtype == torch.bool
    assert found.shape == (s.B, s.Hq, s.Lq, s.Lk)
    assert torch.equal(found, truth(spec, s, at)), f"{spec.text} at {positions} of {s}"


@seeds(250)
def test_compositions_are_their_definition(seed: int) -> None:
    spec, s, rng = drawn(seed, most=16)
    positions, at = draw_positions(rng, s)
    assert torch.equal(spec.mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq), truth(spec, s, at)), f"{spec.text} {s}"


# Laws.


@seeds(60)
def test_laws_of_the_algebra(seed: int) -> None:
    rng = random.Random(seed)
    s = draw_sizes(rng, 12)
    a, b, c = (expression(rng, s, 1, KINDS).mask for _ in range(3))
    positions, _ = draw_positions(rng, s)

    def t(mask: Mask) -> torch.Tensor:
        return mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq)

    assert torch.equal(t(~(a & b)), t(~a | ~b))
    assert torch.equal(t(~(a | b)), t(~a & ~b))
    assert torch.equal(t(a & (b | c)), t((a & b) | (a & c)))
    assert torch.equal(t(a & b), t(a) & t(b))
    assert torch.equal(t(a | b), t(a) | t(b))
    assert torch.equal(t(~a), ~t(a))
    assert torch.equal(t(~~a), t(a))
    assert not t(a & ~a).any()
    assert t(a | ~a).all()
    assert (a & b) & c == a & (b & c)
    assert hash((a | b) | c) == hash(a | (b | c))


@pytest.mark.parametrize("w", [1, 2, 3, 5, 8, 100])
def test_how_many_keys_a_window_shows(w: int) -> None:
    # The words of other libraries differ by one here; these are the counts for query i of 8.
    count = qkv.sliding_window(w).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i + 1, w) for i in range(8)]
    count = qkv.window(w, 0).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i, w) + 1 for i in range(8)]
    count = qkv.window(w, w).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i, w) + 1 + min(7 - i, w) for i in range(8)]
    count = (qkv.causal() & qkv.chunked(w)).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [i % w + 1 for i in range(8)]


def test_streaming_llm_keeps_sinks_and_recent_tokens() -> None:
    seen = (qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(8))).tensor(64, 64)[0, 0]
    assert seen[50].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(43, 51)]
    assert seen.sum(-1).tolist() == [min(i + 1, 12) for i in range(64)]


@pytest.mark.parametrize(
    ("per_row", "block", "Lk"), [(0, 4, 40), (3, 4, 40), (3, 4, 41), (10, 4, 40), (99, 4, 40), (1, 64, 9)]
)
def test_random_blocks_are_distinct_whole_and_as_many_as_asked(per_row: int, block: int, Lk: int) -> None:
    seen = qkv.random_blocks(per_row, block, seed=5).tensor(Lk, Lk)[0, 0]
    blocks = -(-Lk // block)
    padded = torch.nn.functional.pad(seen, (0, blocks * block - Lk), value=False)[::block].view(blocks, blocks, block)
    assert (padded.any(-1).sum(-1) == min(per_row, blocks)).all()
    assert torch.equal(seen, seen[::block].repeat_interleave(block, 0)[:Lk])
    whole = padded.all(-1) | ~padded.any(-1)
    assert whole[:, : Lk // block].all()
    if 0 < per_row < blocks:
        assert not torch.equal(seen, qkv.random_blocks(per_row, block, seed=6).tensor(Lk, Lk)[0, 0])


def test_random_blocks_are_uniform_and_the_same_everywhere() -> None:
    seen = qkv.random_blocks(4, 1, seed=0).tensor(4000, 16, positions="start")[0, 0]
    # 4,000 rows of 4 in 16: each block 1,000 times, standard deviation sqrt(4000 * 3 / 16) = 27.
    assert (seen.sum(0) - 1000).abs().max() < 5 * 28
    # Other kernels and versions must draw these very blocks.
    mask = qkv.random_blocks(3, 2, seed=7)
    rows = mask.tensor(4, 20, positions="start")[0, 0, ::2, ::2]
    assert [row.nonzero()[:, 0].tolist() for row in rows] == [sorted(drawn_blocks(3, 2, 7, row, 20)) for row in (0, 1)]


def test_bigbird_and_longformer_are_compositions() -> None:
    assert qkv.bigbird(16, 3, 1, 2, seed=4) == (
        qkv.window(24, 24) | qkv.global_tokens(range(16)) | qkv.random_blocks(2, 16, 4)
    )
    assert qkv.bigbird(16, random_blocks=0, global_blocks=0) == qkv.window(24, 24)
    assert qkv.longformer(8, [3, 1]) == qkv.window(4, 4) | qkv.global_tokens([1, 3])
    assert qkv.longformer(8, dilation=3) == qkv.dilated(4, 3)
    seen = qkv.bigbird(8, seed=1).tensor(128, 128)[0, 0]
    assert seen[:16].all()
    assert seen[:, :16].all()
    assert seen.diagonal().all()
    assert seen[64].sum() >= 16 + 25
    assert not seen.all()


@pytest.mark.parametrize("seed", range(20))
def test_document_positions_align_each_document(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    mine, theirs = ([rng.randint(0, 5) for _ in range(n)] for _ in range(2))
    mask = qkv.documents(mine, theirs)
    for align in ("start", "end"):
        expected = []
        for d in range(n):
            first = sum(theirs[:d]) + (theirs[d] - mine[d] if align == "end" else 0)
            expected += [first + r for r in range(mine[d])]
        positions = mask.positions(align)
        assert positions.dtype == torch.int64
        assert positions.shape == (1, sum(mine))
        assert positions[0].tolist() == expected
        seen = (mask & qkv.causal()).tensor(sum(mine), sum(theirs), positions=positions)[0, 0]
        row = 0
        for d in range(n):
            for r in range(mine[d]):
                last = r + (theirs[d] - mine[d] if align == "end" else 0)
                keys = range(sum(theirs[:d]), sum(theirs[:d]) + max(0, min(theirs[d], last + 1)))
                assert seen[row].nonzero()[:, 0].tolist() == list(keys)
                row += 1


@pytest.mark.parametrize("entry", [-1, -2, -(2**31)])
def test_lists_that_name_nothing_show_nothing(entry: int) -> None:
    mask = qkv.selected_blocks(torch.full((1, 2, 1, 3), entry, dtype=torch.int32), 64, queries=2)
    assert not mask.tensor(2, 70, "end", 1, 4).any()
    assert (~mask).tensor(2, 70, "end", 1, 4).all()
