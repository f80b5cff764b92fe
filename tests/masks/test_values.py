"""A mask is a value: equal, hashable, picklable, written as its constructor, unchangeable, and drawn on request."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkv
import qkv.distributed
from qkv.execute import users_own
from qkv.masks import Mask
from tests.kit.mask_specs import KINDS, Sizes, drawn, leaf, seeds


@seeds(40)
def test_equal_masks_are_equal_values(seed: int) -> None:
    kinds = [k for k in KINDS if k not in ("dense", "selected_blocks", "mask_mod")]
    first, s, _ = drawn(seed, depth=2, kinds=kinds)
    second, _, _ = drawn(seed, depth=2, kinds=kinds)
    assert first.mask == second.mask
    assert hash(first.mask) == hash(second.mask)
    assert {first.mask: 1}[second.mask] == 1
    assert repr(first.mask) == repr(second.mask)
    again = pickle.loads(pickle.dumps(first.mask))
    assert again == first.mask
    assert hash(again) == hash(first.mask)
    assert copy.deepcopy(first.mask) is first.mask
    assert torch.equal(again.tensor(s.Lq, s.Lk, "start", s.B, s.Hq), first.mask.tensor(s.Lq, s.Lk, "start", s.B, s.Hq))


def test_different_masks_are_different_values() -> None:
    t, n = torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    masks = [
        *(qkv.causal(), qkv.sliding_window(2), qkv.sliding_window(3), qkv.window(1, 0), qkv.window(None, 0)),
        *(qkv.prefix(1), qkv.prefix([1]), qkv.prefix([2]), qkv.padding([1]), qkv.padding([1], side="left")),
        *(qkv.documents([1, 1]), qkv.documents([2]), qkv.documents([1, 1], [1, 1])),
        *(qkv.documents(segment_ids=[0, 1]), qkv.documents(segment_ids=[0, 1], k_segment_ids=[0, 1])),
        *(qkv.chunked(2), qkv.strided(2), qkv.strided(2, 1), qkv.dilated(1, 2), qkv.dilated(2, 1)),
        *(qkv.global_tokens([1]), qkv.global_tokens([]), qkv.random_blocks(1, 2, 0), qkv.random_blocks(1, 2, 1)),
        *(qkv.blocks(t, 1), qkv.blocks(t, 2), qkv.blocks(~t, 1), qkv.blocks(t[None, None], 3)),
        *(qkv.selected_blocks(n, 1), qkv.selected_blocks(n, 2), qkv.selected_blocks(n.clone(), 1)),
        *(qkv.selected_blocks(n, 1, queries=2), qkv.selected_blocks(n, 2, queries=1) & qkv.causal()),
        *(qkv.per_head([qkv.causal()]), qkv.per_head([qkv.causal()] * 2), qkv.dense(t), qkv.dense(t.clone())),
        *(qkv.causal() & qkv.prefix(1), qkv.prefix(1) & qkv.causal(), qkv.causal() | qkv.prefix(1), ~qkv.causal()),
        *(qkv.mask_mod(lambda b, h, p, j: j <= p), qkv.mask_mod(lambda b, h, p, j: j <= p)),
    ]
    assert len(set(masks)) == len(masks)
    for i, a in enumerate(masks):
        assert [a == b for b in masks] == [i == k for k in range(len(masks))]
        assert a != "a mask"
    assert qkv.dense(t) == qkv.dense(t)
    assert qkv.selected_blocks(n, 1) == qkv.selected_blocks(n, 1)
    assert qkv.strided(4, -1) == qkv.strided(4, 7)
    assert qkv.global_tokens([3, 1, 3]) == qkv.global_tokens(torch.tensor([1, 3]))


def test_repr_is_the_constructor_call() -> None:
    for text in [
        "causal()",
        "sliding_window(4)",
        "window(None, 3)",
        "prefix(4)",
        "prefix([1, 2])",
        "padding([3, 5], side='left')",
        "documents([3, 5]) & causal()",
        "documents([3, 5], [4, 4])",
        "documents(segment_ids=[0, 0, -1])",
        "documents(segment_ids=[0], k_segment_ids=[[0, 1], [1, 1]])",
        "(causal() | prefix(2)) & ~chunked(4)",
        "~(causal() & strided(3, 1))",
        "dilated(2, 3) | global_tokens([0, 9]) | random_blocks(1, 8, 0)",
        "per_head([causal(), sliding_window(2)])",
    ]:
        mask = eval(text, dict(vars(qkv.masks)))
        assert repr(mask) == text
        assert len(repr(qkv.documents(range(1000)))) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_change(kind: str) -> None:
    rng = random.Random(kind)
    spec = leaf(rng, Sizes(2, 2, 8, 8), kind)
    for name in (*spec.mask.__dict__, "anything"):
        with pytest.raises(AttributeError):
            setattr(spec.mask, name, 1)


def test_arguments_are_copied() -> None:
    lengths, ids, at = torch.tensor([3, 5]), torch.tensor([0, 0, 1]), torch.tensor([0, 2])
    table = torch.eye(2, dtype=torch.bool)
    masks = [qkv.padding(lengths), qkv.documents(lengths), qkv.documents(segment_ids=ids), qkv.global_tokens(at)]
    masks += [qkv.blocks(table, 4), qkv.prefix(lengths)]
    before = [(repr(m), hash(m), m.tensor(8, 8, B=2) if "segment" not in repr(m) else m.tensor(3, 3)) for m in masks]
    for t in (lengths, ids, at):
        t.zero_()
    table.fill_(True)
    for mask, (text, code, seen) in zip(masks, before, strict=True):
        assert repr(mask) == text
        assert hash(mask) == code
        assert torch.equal(mask.tensor(*seen.shape[2:], B=seen.shape[0]), seen)


def selected(t: torch.Tensor) -> Mask:
    return qkv.selected_blocks(t, 2, queries=2)


@pytest.mark.parametrize(
    ("make", "t", "changed", "shown"),
    [
        (qkv.dense, torch.ones(4, 4, dtype=torch.bool), (1, 2), (0, 0, 1, 2)),
        (selected, torch.tensor([[0, 1], [0, 1]])[None, None], (0, 0, 0, 1), (0, 0, 1, 2)),
    ],
    ids=["dense", "selected_blocks"],
)
def test_a_tensor_is_held_and_guarded(
    make: Callable[[torch.Tensor], Any], t: torch.Tensor, changed: tuple[int, ...], shown: tuple[int, ...]
) -> None:
    t = t.clone()
    mask = make(t)
    assert mask.t is t
    other = mask & qkv.window(None, None)
    assert other.tensor(4, 4)[shown]
    assert mask.program() is not None
    again = pickle.loads(pickle.dumps(mask))
    assert again != mask
    assert torch.equal(again.tensor(4, 4), mask.tensor(4, 4))
    t[changed] = 0
    for use in (
        lambda: mask.tensor(4, 4),
        lambda: other.tensor(4, 4),
        lambda: mask.program(),
        lambda: mask.check("f()", qkv.masks.Sizes(1, 1, 4, 4)),
    ):
        with pytest.raises(qkv.ArgumentError, match="changed in place"):
            use()
    assert make(t) != mask
    assert not make(t).tensor(4, 4)[shown]
    with torch.inference_mode():
        unversioned = t.clone().fill_(1)
    assert make(unversioned).tensor(4, 4)[0, 0, 3, 3]


def test_bool_tensors_combine_on_either_side() -> None:
    t = torch.eye(3, dtype=torch.bool)
    for mask in (t | qkv.prefix(1), qkv.prefix(1) | t):
        assert torch.equal(mask.tensor(3, 3)[0, 0], t | (torch.arange(3) < 1))
    for mask in (t & qkv.prefix(1), qkv.prefix(1) & t):
        assert torch.equal(mask.tensor(3, 3)[0, 0], t & (torch.arange(3) < 1))
    assert qkv.masks.as_mask(t) == qkv.dense(t)
    assert qkv.masks.as_mask(None) is None


@pytest.mark.parametrize(
    ("mask", "position", "batch", "head"),
    [
        (qkv.causal(), True, False, False),
        (qkv.window(None, None), False, False, False),
        (qkv.prefix(3), False, False, False),
        (qkv.prefix([3, 4]), False, True, False),
        (qkv.padding([3, 4]), False, True, False),
        (qkv.documents([3, 4]), True, False, False),
        (qkv.documents([3, 4], [1, 1]), False, False, False),
        (qkv.documents(segment_ids=[[0, 1], [1, 1]]), True, True, False),
        (qkv.documents(segment_ids=[0, 1], k_segment_ids=[0]), False, False, False),
        (qkv.dense(torch.ones(1, 1, 3, 3).bool()), False, False, False),
        (qkv.dense(torch.ones(2, 2, 3, 3).bool()), False, True, True),
        (qkv.blocks(torch.ones(2, 3, 1, 1).bool(), 9), True, True, True),
        (qkv.selected_blocks(torch.ones(2, 3, 1, 1).int(), 9), False, True, True),
        (qkv.selected_blocks(torch.ones(1, 1, 1, 1).int(), 9), False, False, False),
        (qkv.per_head([qkv.prefix(1), qkv.prefix(2)]), False, False, True),
        (qkv.per_head([qkv.prefix(1), qkv.prefix(1)]), False, False, False),
        (~qkv.chunked(2) & qkv.padding([1, 2]), True, True, False),
    ],
    ids=repr,
)
def test_what_a_mask_depends_on(mask: Mask, position: bool, batch: bool, head: bool) -> None:
    assert (mask.depends_on_position, mask.varies_by_batch, mask.varies_by_head) == (position, batch, head)


# Pictures.


def test_picture() -> None:
    assert qkv.causal().picture(2, 3, positions="end") == "p/j 0 1 2\n  1 ■ ■ ·\n  2 ■ ■ ■"
    assert qkv.causal().picture(0, 0) == "p/j"
    assert qkv.sliding_window(1).picture(1, 12, positions=-1).splitlines() == [
        "p/j 0         5         10",
        " -1 " + " ".join("·" * 12),
    ]
    head = qkv.per_head([qkv.causal(), ~qkv.causal()])
    assert head.picture(2, 2, Hq=2, h=1) == "p/j 0 1\n  0 · ■\n  1 · ·"
    rows = qkv.padding([1, 2])
    assert rows.picture(1, 2, B=2, b=0) == "p/j 0 1\n  0 ■ ·"
    assert rows.picture(1, 2, B=2, b=1) == "p/j 0 1\n  0 ■ ■"


def test_a_large_picture_is_drawn_in_blocks() -> None:
    lines = qkv.causal().picture(480, 480).splitlines()
    assert len(lines) == 1 + 48 + 1
    assert lines[2].split() == ["10", "■", "▒", *"·" * 46]
    assert "10 x 10" in lines[-1]
    assert "1234567" in qkv.causal().picture(2, 2, positions=1234567)


@pytest.mark.parametrize("name", ["causal", "longformer", "bigbird", "global_tokens", "documents", "per_head", "dense"])
def test_what_a_mask_has_computed_is_not_the_users_own(name: str) -> None:
    """What is kept for calls goes by it: a mask that were taken for one of a user's tensors would be prepared anew."""
    table = torch.ones(40, 40, dtype=torch.bool)
    mask = {
        "causal": qkv.causal(), "longformer": qkv.longformer(8, [0, 5]), "bigbird": qkv.bigbird(4),
        "global_tokens": qkv.global_tokens([1, 7]) & qkv.causal(), "documents": qkv.documents([15, 25]),
        "per_head": qkv.per_head([qkv.causal(), qkv.sliding_window(3)]), "dense": qkv.dense(table),
    }[name]  # fmt: skip
    before = len(users_own(mask))
    assert before == (name == "dense")
    q = torch.randn(1, 2, 40, 8)
    qkv.attention(q, q, q, mask=mask)
    str(qkv.plan(q, q, q, mask=mask))
    qkv.distributed.shards(40, 4, mask, heads=2)
    assert len(users_own(mask)) == before
