"""A mask as integers and tensors, and back: how it passes through a graph that knows neither lengths nor contents.

`mask.program` lowers a mask for a kernel and may look into its tensors. This form never does, so a tracer can follow
it: the tensors stay inputs of the graph, and other lengths, windows or documents of the same kind need no new graph.

The integers are in prefix order; tensors are taken from their list in order of appearance.

=========  ==  ===========================================================================
WINDOW      1  left, right; -1 = unbounded
PREFIX      2  n; or -1 and a tensor (B,)
PADDING     3  0 right, 1 left; a tensor (B,)
DOCUMENTS   4  0 lengths, 1 ids; 1 if the keys have their own; one or two tensors
CHUNKED     5  n
STRIDED     6  n, offset
DILATED     7  window, step
GLOBAL      8  a tensor of indices
RANDOM      9  per_row, block, seed
BLOCKS     10  block; a tensor (B or 1, Hq or 1, nq, nk)
DENSE      11  a tensor (Lq, Lk) or (B, Hq, Lq, Lk)
AND        12  the number of parts, then each
OR         13  the number of parts, then each
NOT        14  the part
PER_HEAD   15  the number of masks, then each
=========  ==  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

from torch import Tensor

from qkv.checks import Operand
from qkv.errors import UnsupportedError, describe
from qkv.masks import (
    And,
    Mask,
    Or,
    blocks,
    causal,
    chunked,
    dense,
    dilated,
    documents,
    global_tokens,
    padding,
    per_head,
    prefix,
    random_blocks,
    sliding_window,
    strided,
    window,
)
from qkv.masks.base import Not
from qkv.masks.segments import Axis, Documents, Padding
from qkv.masks.shapes import Chunked, Dilated, GlobalTokens, Prefix, Strided, Window
from qkv.masks.sparse import Blocks, PerHead, RandomBlocks
from qkv.masks.tensor import Dense

WINDOW: Final = 1
PREFIX: Final = 2
PADDING: Final = 3
DOCUMENTS: Final = 4
CHUNKED: Final = 5
STRIDED: Final = 6
DILATED: Final = 7
GLOBAL: Final = 8
RANDOM: Final = 9
BLOCKS: Final = 10
DENSE: Final = 11
AND: Final = 12
OR: Final = 13
NOT: Final = 14
PER_HEAD: Final = 15


def encode(call: str, mask: Mask, words: list[int], tensors: list[Tensor]) -> None:
    """Append a mask's integers and tensors; raises UnsupportedError for a mask that is a Python function.

    >>> import qkv
    >>> words, tensors = [], []
    >>> encode("f()", qkv.causal() & qkv.prefix(2), words, tensors)
    >>> words, decode(words, tensors)
    ([12, 2, 1, -1, 0, 2, 2], causal() & prefix(2))
    """
    # A chain of isinstance, not methods or a table: a tracer follows it without a guard on anything else.
    if isinstance(mask, Window):
        words += [WINDOW, -1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right]
    elif isinstance(mask, And):
        words += [AND, len(mask.parts)]
        for part in mask.parts:
            encode(call, part, words, tensors)
    elif isinstance(mask, Or):
        words += [OR, len(mask.parts)]
        for part in mask.parts:
            encode(call, part, words, tensors)
    elif isinstance(mask, Not):
        words += [NOT]
        encode(call, mask.part, words, tensors)
    elif isinstance(mask, Prefix):
        if isinstance(mask.n, Operand):
            words += [PREFIX, -1]
            tensors += [mask.n.tensor]
        else:
            words += [PREFIX, mask.n]
    elif isinstance(mask, Padding):
        words += [PADDING, 1 if mask.side == "left" else 0]
        tensors += [mask.lengths.tensor]
    elif isinstance(mask, Documents):
        words += [DOCUMENTS, 0 if mask.queries.ids is None else 1, 1 if mask.by_index else 0]
        tensors += [_held(mask.queries)]
        if mask.by_index:
            tensors += [_held(mask.keys)]
    elif isinstance(mask, Dense):
        words += [DENSE]
        tensors += [mask.t]
    else:
        _encode_rarer(call, mask, words, tensors)


def _encode_rarer(call: str, mask: Mask, words: list[int], tensors: list[Tensor]) -> None:
    if isinstance(mask, Chunked):
        words += [CHUNKED, mask.n]
    elif isinstance(mask, Strided):
        words += [STRIDED, mask.n, mask.offset]
    elif isinstance(mask, Dilated):
        words += [DILATED, mask.window, mask.step]
    elif isinstance(mask, GlobalTokens):
        words += [GLOBAL]
        tensors += [mask.indices.tensor]
    elif isinstance(mask, RandomBlocks):
        words += [RANDOM, mask.per_row, mask.block, mask.seed]
    elif isinstance(mask, Blocks):
        words += [BLOCKS, mask.block]
        tensors += [mask.map.tensor]
    elif isinstance(mask, PerHead):
        words += [PER_HEAD, len(mask.masks)]
        for part in mask.masks:
            encode(call, part, words, tensors)
    else:
        rule = "a mask that is a Python function cannot be part of a graph"
        fix = "Build it from qkv's masks, pass a bool tensor, or call attention outside of the traced function"
        raise UnsupportedError(describe(call, rule, f"{type(mask).__name__} while tracing", fix))


def _held(axis: Axis) -> Tensor:
    held = axis.lengths if axis.ids is None else axis.ids
    assert held is not None
    return held.tensor


def decode(words: Sequence[int], tensors: Sequence[Tensor]) -> Mask | None:
    """The mask that `encode` was given, None for no integers.

    Cost: a copy and a hash of the tensors, except of a dense mask's; without tensors a table lookup.
    """
    if not words:
        return None
    return _without_tensors(tuple(words)) if not tensors else _decode(iter(words), iter(tensors))


@lru_cache(maxsize=256)
def _without_tensors(words: tuple[int, ...]) -> Mask:
    return _decode(iter(words), iter(()))


def _decode(words: Iterator[int], tensors: Iterator[Tensor]) -> Mask:
    op = next(words)
    if op == WINDOW:
        left, right = next(words), next(words)
        if right == 0:  # by the constructors that people use: a message or a plan then names what they wrote
            return causal() if left < 0 else sliding_window(left + 1)
        return window(None if left < 0 else left, None if right < 0 else right)
    if op in (AND, OR, PER_HEAD):
        parts = tuple(_decode(words, tensors) for _ in range(next(words)))
        return per_head(parts) if op == PER_HEAD else And(parts) if op == AND else Or(parts)
    if op == NOT:
        return ~_decode(words, tensors)
    if op == PREFIX:
        n = next(words)
        return prefix(next(tensors) if n < 0 else n)
    if op == PADDING:
        return padding(next(tensors), side="left" if next(words) else "right")
    if op == DOCUMENTS:
        by_ids, own_keys = next(words), next(words)
        given = [next(tensors) for _ in range(2 if own_keys else 1)]
        if by_ids:
            return documents(segment_ids=given[0], k_segment_ids=given[1] if own_keys else None)
        return documents(*given)
    if op == DENSE:
        return dense(next(tensors))
    if op == GLOBAL:
        return global_tokens(next(tensors))
    if op == BLOCKS:
        return blocks(next(tensors), next(words))
    if op == RANDOM:
        return random_blocks(next(words), next(words), next(words))
    if op == CHUNKED:
        return chunked(next(words))
    assert op in (STRIDED, DILATED), op
    return strided(next(words), next(words)) if op == STRIDED else dilated(next(words), next(words))


def depends_on_position(words: Sequence[int]) -> bool:
    """Whether the encoded mask looks at where the queries stand, as far as that can be told without its tensors."""
    rest = iter(words)
    return _looks(rest)


def _looks(words: Iterator[int]) -> bool:
    op = next(words)
    if op in (AND, OR, PER_HEAD):
        return any([_looks(words) for _ in range(next(words))])
    if op == NOT:
        return _looks(words)
    arguments = [next(words) for _ in range(_ARGUMENTS.get(op, 0))]
    if op == WINDOW:
        return arguments[0] >= 0 or arguments[1] >= 0
    if op == DOCUMENTS:
        return arguments[1] == 0
    return op not in (PREFIX, PADDING, DENSE)


_ARGUMENTS = {WINDOW: 2, PREFIX: 1, PADDING: 1, DOCUMENTS: 2, CHUNKED: 1, STRIDED: 2, DILATED: 2, RANDOM: 3, BLOCKS: 1}
