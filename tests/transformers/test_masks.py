"""The masks that transformers builds, as values: each must say what transformers' own bool tensor says.

The judge is `sdpa_mask` of the installed transformers, with its short cuts off. Wrong adapters that die here: a window
off by one, a window or chunks counted from the wrong end of a cache, padding on the other side, queries that stand on
0, "and" for "or", packed sequences that leak, ids taken at the wrong offset, keys cut off one too early, a mask that
is taken for numbers.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as mu

import qkv
from qkv.integrations.transformers import ModelMask, model_mask, parts
from tests.kit import skips

pytestmark = pytest.mark.usefixtures("one_thread")
B = 3


def ids(length: int, groups: int, seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, groups, (B, length), generator=torch.Generator().manual_seed(seed))


def packed(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions that begin anew in each sequence, and the ids that transformers finds in them."""
    starts = torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    starts[:, 0] = True
    starts[0, 1] = True
    at = torch.arange(length).expand(B, -1)
    position_ids = at - torch.where(starts, at, 0).cummax(1).values
    found = mu.find_packed_sequence_indices(position_ids)
    assert found is not None
    return position_ids, found


def within(function: Callable[..., Any], position_ids: Tensor, sequences: Tensor) -> Callable[..., Any]:
    """The function within packed sequences, put together as the masks of the installed transformers are."""
    if hasattr(mu, "remap_positions_for_packed_sequence"):
        function = mu.remap_positions_for_packed_sequence(function, position_ids)
    return mu.and_masks(function, mu.packed_sequence_mask_function(sequences))


# name: how many positions there are in all -> the function
FUNCTIONS: dict[str, Callable[[int], Callable[..., Any]]] = {
    "causal": lambda n: mu.causal_mask_function,
    "bidirectional": lambda n: mu.bidirectional_mask_function,
    "window of 1": lambda n: mu.sliding_window_causal_mask_function(1),
    "window of 4": lambda n: mu.sliding_window_causal_mask_function(4),
    "window of all": lambda n: mu.sliding_window_causal_mask_function(n),
    "window of all but one": lambda n: mu.sliding_window_causal_mask_function(n - 1),
    "window both ways": lambda n: mu.sliding_window_bidirectional_mask_function(3),
    "windows in windows": lambda n: mu.and_masks(
        mu.sliding_window_overlay(5), mu.sliding_window_bidirectional_overlay(2), mu.causal_mask_function
    ),
    "chunks": lambda n: mu.chunked_causal_mask_function(4, torch.zeros(B, dtype=torch.int64)),
    "chunks after padding": lambda n: mu.chunked_causal_mask_function(4, torch.tensor([0, 3, 8])),
    "blocks or causal": lambda n: mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids(n, 3, 1, low=-1))),
    "blocks or causal, in a window": lambda n: mu.and_masks(
        mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids(n, 3, 2, low=-1))), mu.sliding_window_overlay(4)
    ),
    "ids": lambda n: mu.and_masks(mu.packed_sequence_mask_function(ids(n, 3, 3, low=-1)), mu.causal_mask_function),
    "padding as a part": lambda n: mu.and_masks(mu.causal_mask_function, mu.padding_mask_function(ids(n, 2, 4).bool())),
    "or of windows": lambda n: mu.or_masks(
        mu.sliding_window_causal_mask_function(2), mu.sliding_window_bidirectional_overlay(1)
    ),
}
# (q_length, kv_length, q_offset, kv_offset): training, a prefill in a static cache, chunks of a prefill, decode
# with a growing cache, with a static one, and with one that holds a window
PLACES = [(9, 9, 0, 0), (6, 16, 0, 0), (5, 13, 8, 0), (1, 12, 11, 0), (1, 16, 7, 0), (1, 4, 9, 6), (3, 6, 9, 6)]


def expected(function: Callable[..., Any], place: tuple[int, int, int, int], padding: Tensor | None = None) -> Tensor:
    Lq, Lk, q_offset, kv_offset = place
    found: Tensor = mu.sdpa_mask(
        batch_size=B, q_length=Lq, kv_length=Lk, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
        attention_mask=padding, allow_is_causal_skip=False,
    )  # fmt: skip
    return found.expand(B, 1, Lq, Lk)


def made(function: Callable[..., Any], place: tuple[int, int, int, int], padding: Tensor | None = None) -> ModelMask:
    Lq, Lk, q_offset, kv_offset = place
    return model_mask(
        batch_size=B, q_length=Lq, kv_length=Lk, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
        attention_mask=padding, allow_is_causal_skip=True, local_size=4, dtype=torch.float32, config=None,
    )  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_function_is_read(name: str, place: tuple[int, int, int, int]) -> None:
    function = FUNCTIONS[name](max(place[1] + place[3], place[0] + place[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is evaluated into a tensor
        parts._warned = False
        found = made(function, place)
    assert torch.equal(found.tensor(), expected(function, place)), f"{found!r}"
    assert "dense" not in repr(found.mask)


def real(kind: str, length: int) -> Tensor:
    mask = torch.ones(B, length, dtype=torch.bool)
    for row, missing in enumerate((0, 2, 5)):
        if kind == "right" and missing:
            mask[row, -missing:] = False
        elif kind in ("left", "both"):
            mask[row, :missing] = False
            if kind == "both":
                mask[row, length - missing // 2 - 1 :] = False
        elif kind == "holes" and missing:
            mask[row, missing] = False
    if kind == "nothing":
        mask[1] = False
    return mask


@pytest.mark.parametrize("kind", ["all", "right", "left", "both", "holes", "nothing"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", ["causal", "bidirectional", "window of 4", "blocks or causal"])
def test_padding_is_read(name: str, place: tuple[int, int, int, int], kind: str) -> None:
    Lq, Lk, q_offset, kv_offset = place
    total = max(Lk + kv_offset, Lq + q_offset)
    function = FUNCTIONS[name](total)
    # As generate passes it: up to the newest token, and a static cache is longer.
    given = real(kind, min(q_offset + Lq, Lk + kv_offset) if name != "bidirectional" else total)
    found = made(function, place, given)
    assert torch.equal(found.tensor(), expected(function, place, given)), f"{found!r}"


@pytest.mark.parametrize("kind", ["right", "left"])
def test_padding_is_a_padding_mask(kind: str) -> None:
    found = made(mu.causal_mask_function, (9, 9, 0, 0), real(kind, 9))
    assert found.mask == qkv.causal() & qkv.padding([9, 7, 4], side=kind)
    assert found.mask != qkv.causal() & qkv.padding([9, 7, 4], side="left" if kind == "right" else "right")


def test_chunks_are_a_chunked_mask_where_they_begin_on_a_border() -> None:
    place, skipped = (9, 9, 0, 0), torch.tensor([0, 4, 8])
    assert made(mu.chunked_causal_mask_function(4, skipped), place).mask == qkv.chunked(4) & qkv.causal()
    assert "documents" in repr(made(mu.chunked_causal_mask_function(4, skipped + 1), place).mask)


@pytest.mark.parametrize("inner", ["causal", "window of 4", "chunks", "or of windows"])
@pytest.mark.parametrize("seed", range(4))
def test_packed_sequences_are_read(inner: str, seed: int) -> None:
    place = (14, 14, 0, 0)
    position_ids, sequences = packed(14, seed)
    function = within(FUNCTIONS[inner](14), position_ids, sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts._warned = False
        found = made(function, place)
    assert torch.equal(found.tensor(), expected(function, place)), f"seed {seed}: {found!r}"
    assert "dense" not in repr(found.mask)


@pytest.mark.skipif(not hasattr(mu, "remap_positions_for_packed_sequence"), reason=skips.OLDER_TRANSFORMERS)
def test_positions_that_begin_anew_are_not_read_where_the_ids_do_not_say_so() -> None:
    """Ids that leave two sequences as one: distances along the row are not those of the positions."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(B, -1)
    joined = torch.zeros(B, 7, dtype=torch.int64)
    function = within(mu.causal_mask_function, position_ids, joined)
    parts._warned = False
    with pytest.warns(UserWarning, match="remap_positions"):
        found = made(function, (7, 7, 0, 0))
    assert torch.equal(found.tensor(), expected(function, (7, 7, 0, 0)))


def odd_keys(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k % 2 == 1


@pytest.mark.parametrize("place", [p for p in PLACES if p[0] > 1], ids=str)
def test_an_unknown_function_is_evaluated_with_one_warning(place: tuple[int, int, int, int]) -> None:
    function = mu.or_masks(mu.sliding_window_causal_mask_function(3), odd_keys)
    parts._warned = False
    with pytest.warns(UserWarning, match="odd_keys.*quadratic"):
        found = made(function, place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made(function, place).tensor(), expected(function, place))
    assert torch.equal(found.tensor(), expected(function, place))


def test_a_function_that_works_on_single_indices_is_evaluated_by_vmap() -> None:
    table = torch.tensor([2, 0, 1, 3, 1])

    def ranked(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (table[k] <= table[q]) & (b < 2)

    found = model_mask(batch_size=B, q_length=5, kv_length=5, mask_function=ranked, use_vmap=True)
    want = (table[None, :] <= table[:, None])[None, None] & (torch.arange(B) < 2)[:, None, None, None]
    assert torch.equal(found.tensor(), want)


def test_a_release_that_changes_a_part_makes_it_unknown() -> None:
    """A part is known by what it does, not by its name."""

    def sliding_window_overlay(sliding_window: int) -> Callable[..., Any]:
        def inner_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k >= q - sliding_window  # one key more than today's

        return inner_mask

    changed = SimpleNamespace(**{**vars(mu), "sliding_window_overlay": sliding_window_overlay})
    changed_parts = parts.Parts(changed)
    assert isinstance(changed_parts.parse(sliding_window_overlay(3)), parts.Unknown)
    assert isinstance(changed_parts.parse(mu.causal_mask_function), parts.Window)
    assert not isinstance(parts.Parts(mu).parse(mu.sliding_window_overlay(3)), parts.Unknown)


# ------------------------------------------------------------------------------------------------------------- decode
@pytest.mark.parametrize(
    ("function", "place"),
    [
        (mu.causal_mask_function, (1, 12, 11, 0)),
        (mu.causal_mask_function, (1, 64, 11, 0)),  # a static cache
        (mu.sliding_window_causal_mask_function(4), (1, 4, 900, 897)),  # a full window cache
        (mu.sliding_window_causal_mask_function(40), (1, 12, 11, 0)),  # not full yet
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_decode_step_without_padding_needs_no_mask(function: Any, place: Any, given: bool) -> None:
    padding = torch.ones(B, place[2] + 1, dtype=torch.bool) if given else None
    found = made(function, place, padding)
    assert found.mask is None
    assert found.keys == min(place[1], place[2] - place[3] + 1)


def test_equal_steps_give_equal_masks() -> None:
    """What plans are kept by: the same step makes an equal value, another step another one."""
    a, b = (made(mu.causal_mask_function, (9, 9, 0, 0), real("left", 9)).mask for _ in range(2))
    assert a is not b
    assert a == b
    assert hash(a) == hash(b)
    assert a != made(mu.causal_mask_function, (9, 9, 0, 0), real("both", 9)).mask


# -------------------------------------------------------------------------------------------- what models do with masks
def test_a_mask_made_before_is_passed_on() -> None:
    first = made(mu.causal_mask_function, (1, 16, 7, 0))
    again = model_mask(batch_size=B, q_length=1, kv_length=16, q_offset=7, attention_mask=first)
    assert again is first


def test_a_mask_survives_handling() -> None:
    found = made(mu.sliding_window_causal_mask_function(4), (5, 13, 8, 0), real("left", 13))
    assert found.to("cpu") is found
    assert found.to(device=torch.device("cpu"), non_blocking=True) is found
    assert found.contiguous() is found
    assert found[:, :, :, :13] is found
    assert found[..., :99] is found
    assert found[:] is found
    assert len(found.shape) == found.ndim == found.dim() == 4
    assert found.size(-1) == 13
    for copied in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(copied.tensor(), found.tensor())
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(found)
    with pytest.raises(AttributeError):
        found.no_such_thing  # noqa: B018


def test_a_mask_that_is_cut_or_combined_is_the_tensor_of_sdpa() -> None:
    place = (5, 13, 8, 0)
    found = made(mu.causal_mask_function, place)
    want = expected(mu.causal_mask_function, place)
    parts._warned = False
    with pytest.warns(UserWarning, match=r"uses its attention mask as a tensor \(&\)"):
        both = found & torch.eye(5, 13, dtype=torch.bool)
    assert torch.equal(both, want & torch.eye(5, 13, dtype=torch.bool))
    assert torch.equal(found[:, :, :, :9], want[..., :9])
    assert torch.equal(found[1:2], want[1:2])
    assert torch.equal(~found, ~want)
    assert torch.equal(found | ~want, want | ~want)
    assert torch.equal(found.expand(B, 2, -1, -1), want.expand(B, 2, -1, -1))
    assert torch.equal(torch.cat([found, found], dim=-1), torch.cat([want, want], dim=-1))
    assert torch.equal(torch.nn.functional.pad(found, (0, 2)), torch.nn.functional.pad(want, (0, 2)))
    assert bool(found[..., 0].all())
    assert not bool(found[..., 12].all())


scores = torch.zeros(B, 2, 5, 13)
ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "+": lambda m: m + scores,
    "+, on the right": lambda m: scores + m,
    "+=": lambda m: scores.clone().add_(m),
    "-": lambda m: 1.0 - m,
    "*": lambda m: m * -1e9,
    "*, on the right": lambda m: scores * m,
    "/": lambda m: m / 2,
    "@": lambda m: m @ scores.transpose(2, 3),
    "torch.add": lambda m: torch.add(scores, m),
    "torch.mul": lambda m: torch.mul(m, 2),
    "masked_fill": lambda m: scores.masked_fill(m, -math.inf),
    "masked_fill_": lambda m: scores.clone().masked_fill_(m, -math.inf),
    "its masked_fill": lambda m: m.masked_fill(torch.ones(5, 13, dtype=torch.bool), 0.0),
    "where": lambda m: torch.where(m, scores, -math.inf),
    "where it is a value": lambda m: torch.where(scores == 0, m, scores),
    "its where": lambda m: m.where(m, scores),
    ".to(float32)": lambda m: m.to(torch.float32),
    ".to(dtype=)": lambda m: m.to(dtype=torch.bfloat16),
    ".to(another tensor)": lambda m: m.to(scores),
    ".to(bool)": lambda m: m.to(torch.bool),
    ".type_as": lambda m: m.type_as(scores),
    ".float()": lambda m: m.float(),
    ".bool()": lambda m: m.bool(),
    ".long()": lambda m: m.long(),
    ".sum()": lambda m: m.sum(),
    "<": lambda m: m < 0,
    "== 0": lambda m: torch.eq(m, 0),
    "softmax": lambda m: torch.softmax(m, -1),
    "scaled_dot_product_attention": lambda m: torch.nn.functional.scaled_dot_product_attention(
        torch.zeros(B, 2, 5, 4), torch.zeros(B, 2, 13, 4), torch.zeros(B, 2, 13, 4), attn_mask=m
    ),
}


@pytest.mark.parametrize("handled", ["as it is", "cut", "expanded", "inverted"])
@pytest.mark.parametrize("use", ARITHMETIC)
def test_a_mask_is_never_a_number(use: str, handled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 0 in place of 0 and -inf would be silently wrong: what a model does to its mask first does not matter."""
    monkeypatch.setattr(parts, "_warned", True)  # an index warns, once in a process
    found: Any = made(mu.causal_mask_function, (5, 13, 8, 0))
    if handled == "cut":
        found = found[:, :, -5:, :13][:, :1][:, :, 0:5]
        found = found[:1].expand(B, 1, 5, 13)
    elif handled == "expanded":
        found = found.expand(B, 2, 5, 13)
    elif handled == "inverted":
        found = ~found
    with pytest.raises(qkv.UnsupportedError, match=r"must not be computed with.*eager"):
        ARITHMETIC[use](found)


def test_code_that_takes_attention_by_name_may_choose_by_a_mask() -> None:
    """It was written for the bool masks of sdpa: Doge and the selected keys of DeepSeek do this."""
    place = (5, 13, 8, 0)
    found, want = made(mu.causal_mask_function, place), expected(mu.causal_mask_function, place)
    # In this file's own globals, it would be this file that takes attention by name.
    named = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    scope = {"torch": torch, "m": found, "s": scores, "ALL_ATTENTION_FUNCTIONS": named, "__name__": "a model"}
    for code in ("torch.where(m, s, -9.0)", "s.masked_fill(~m, -9.0)", "s.masked_fill(~m.bool(), -9.0)",
                 "s.masked_fill(~m.to(torch.bool), -9.0)"):  # fmt: skip
        assert torch.equal(eval(code, dict(scope)), torch.where(want, scores, -9.0)), code
    for code in ("s + m", "m.float()", "s.masked_fill(m < 0, 1)", "torch.where(s == 0, m, s)"):
        with pytest.raises(qkv.UnsupportedError, match="computed with"):
            eval(code, dict(scope))


# --------------------------------------------------------------------------------------------------- empty meanings
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    "function",
    [
        mu.sliding_window_causal_mask_function(0),
        mu.sliding_window_causal_mask_function(-3),
        mu.sliding_window_overlay(0),
        mu.sliding_window_overlay(-2),
        mu.sliding_window_bidirectional_mask_function(0),
        mu.sliding_window_bidirectional_mask_function(-1),
        mu.and_masks(mu.sliding_window_bidirectional_overlay(3), mu.sliding_window_overlay(-1)),
        mu.and_masks(),
        mu.or_masks(),
        mu.or_masks(mu.sliding_window_causal_mask_function(0), mu.sliding_window_causal_mask_function(3)),
    ],
)
def test_a_part_that_shows_nothing_is_read(function: Any, place: tuple[int, int, int, int]) -> None:
    """A config with use_sliding_window=False has a window of 0, and its model makes that mask and does not use it."""
    Lq, Lk, q_offset, kv_offset = place
    at = torch.arange(Lq)[:, None] + q_offset, torch.arange(Lk) + kv_offset
    want = torch.as_tensor(function(torch.tensor(0), torch.tensor(0), *at)).expand(B, 1, Lq, Lk)
    found = made(function, place)
    assert torch.equal(found.tensor(), want), f"{found!r}"
    assert "dense" not in repr(found.mask)
