"""A mask for a part of a call: what it shows, of any part, is what the whole shows there.

That portions are values, count and bound their keys and are lowered as any mask is asked with all kinds of masks:
`tests.kit.mask_specs` draws them. Here is what is theirs alone.
"""

from __future__ import annotations

import pickle
import random

import pytest
import torch

import qkv
from qkv.masks import Mask, Sizes, portion
from qkv.masks.shares import keys_seen
from tests.kit.mask_specs import KINDS, Sizes as Drawn, draw_positions, draw_sizes, expression, leaf, seeds


def cut(rng: random.Random, mask: Mask, s: Drawn) -> tuple[Mask, range, range]:
    """A portion at a random place, its queries and its keys."""
    i, j = rng.randint(0, s.Lq), rng.randint(0, s.Lk)
    queries, keys = range(i, rng.randint(i, s.Lq)), range(j, rng.randint(j, s.Lk))
    return portion(mask, first_key=j, first_query=i, Lq=s.Lq, Lk=s.Lk), queries, keys


def check_slice(rng: random.Random, mask: Mask, s: Drawn, text: str) -> None:
    positions, at = draw_positions(rng, s)
    table = mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq)
    part, queries, keys = cut(rng, mask, s)
    there = torch.tensor(at, dtype=torch.int64).view(s.B, s.Lq)[:, queries.start : queries.stop] - keys.start
    found = part.tensor(len(queries), len(keys), there, s.B, s.Hq)
    assert torch.equal(found, table[:, :, queries.start : queries.stop, keys.start : keys.stop]), f"{text} {part} {at}"


@pytest.mark.parametrize("kind", KINDS)
@seeds(8)
def test_a_portion_of_each_mask_is_a_slice_of_it(kind: str, seed: int) -> None:
    rng = random.Random(f"portion {kind} {seed}")
    s = draw_sizes(rng)
    spec = leaf(rng, s, kind)
    check_slice(rng, spec.mask, s, spec.text)


@seeds(100)
def test_a_portion_of_an_expression_is_a_slice_of_it(seed: int) -> None:
    rng = random.Random(f"portion {seed}")
    s = draw_sizes(rng, 24)
    spec = expression(rng, s, rng.randint(1, 3), KINDS)
    check_slice(rng, spec.mask, s, spec.text)


@seeds(60)
def test_the_keys_of_a_block_that_a_portion_shows(seed: int) -> None:
    rng = random.Random(f"portion keys seen {seed}")
    s, block = draw_sizes(rng, 24), rng.choice([1, 4, 7])
    part, queries, keys = cut(rng, expression(rng, s, rng.randint(0, 2), KINDS).mask, s)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    i, p = torch.arange(len(queries)), torch.arange(len(queries)) + rng.randint(-9, 9)
    shown = part.tensor(len(queries), len(keys), p[None], s.B, s.Hq)[b, h]
    want = torch.nn.functional.pad(shown, (0, -len(keys) % block)).unflatten(1, (-1, block)).sum(-1)
    assert torch.equal(keys_seen(part, i, p, block, Sizes(s.B, s.Hq, len(queries), len(keys)), b, h), want)


def of(mask: Mask, first_key: int = 3, first_query: int = 2, Lq: int = 8, Lk: int = 9) -> Mask:
    return portion(mask, first_key=first_key, first_query=first_query, Lq=Lq, Lk=Lk)


def test_masks_that_look_at_distances_alone_are_the_same_in_every_part() -> None:
    distances = [qkv.causal(), qkv.sliding_window(3), qkv.window(None, None), qkv.strided(3, 1), qkv.dilated(2, 2)]
    distances.append(qkv.per_head([~distances[0] & distances[3], distances[1] | distances[4]]))
    for mask in distances:
        assert of(mask) is mask
    for mask in (qkv.prefix(3), qkv.chunked(2), qkv.causal() & qkv.prefix(3), qkv.per_head([qkv.prefix(2)])):
        assert of(mask) is not mask


def test_a_portion_is_a_value_of_all_its_numbers() -> None:
    mask = of(qkv.prefix(5) & qkv.causal())
    assert mask == of(qkv.prefix(5) & qkv.causal())
    assert hash(mask) == hash(of(qkv.prefix(5) & qkv.causal()))
    for change in ({"first_key": 2}, {"first_query": 1}, {"Lq": 9}, {"Lk": 10}):
        assert of(qkv.prefix(5) & qkv.causal(), **change) != mask
    assert of(qkv.prefix(4) & qkv.causal()) != mask
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert repr(mask) == "portion(prefix(5) & causal(), first_key=3, first_query=2, Lq=8, Lk=9)"
    assert repr(~mask & qkv.causal()) == f"~{mask!r} & causal()"
    assert mask.words() == f"{(qkv.prefix(5) & qkv.causal()).words()}, where keys count from 3"
    assert not mask.fits_any_length


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 1, 6, 7), "within the keys of the whole. Got 7 keys from number 3 on and 9 of the whole. Pass at most 6"),
        ((1, 1, 7, 6), "within the queries of the whole. Got 7 queries from number 2 on and 8 of the whole"),
        ((1, 1, 0, 7), "within the keys"),
    ],
)
def test_a_part_beyond_the_whole_is_refused(sizes: tuple[int, int, int, int], words: str) -> None:
    mask = of(qkv.prefix(5))
    mask.check("f()", Sizes(1, 1, 6, 6))
    with pytest.raises(qkv.ShapeError, match="a portion of a mask must lie") as told:
        mask.check("f()", Sizes(*sizes))
    assert words in str(told.value)


def test_what_the_part_checks_it_checks_of_the_whole() -> None:
    t = torch.ones(8, 9, dtype=torch.bool)
    for mask in (qkv.dense(t), qkv.documents([4, 5]), qkv.documents([8], [9]), qkv.padding([9]), qkv.blocks(t, 1)):
        of(mask).check("f()", Sizes(1, 1, 6, 6))
        with pytest.raises(qkv.ShapeError):
            of(mask, Lq=9, Lk=8).check("f()", Sizes(1, 1, 5, 5))
    held = of(qkv.dense(t))
    t[0, 0] = False
    for use in (lambda: held.check("f()", Sizes(1, 1, 6, 6)), lambda: held.tensor(6, 6)):
        with pytest.raises(qkv.ArgumentError, match="changed in place"):
            use()


@pytest.mark.parametrize("name", ["first_key", "first_query", "Lq", "Lk"])
def test_numbers_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(qkv.ArgumentError, match=f"{name}=-1"):
        of(qkv.prefix(1), **{name: -1})
    with pytest.raises(qkv.ArgumentTypeError, match=name):
        of(qkv.prefix(1), **{name: 1.5})  # type: ignore[arg-type]
