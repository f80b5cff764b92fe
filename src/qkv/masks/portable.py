"""A mask as integers and tensors, and back: how it passes through a graph that knows neither lengths nor contents.

`mask.program` lowers a mask for a kernel and may look into its tensors. This form never does, so a tracer can follow
it: the tensors stay inputs of the graph, and other lengths, windows or documents of the same kind need no new graph.

The first integer is 1 where the mask may depend on where the queries stand. The others are in prefix order: the opcode
of a mask, then its `_numbers` and `_tensors`, which are taken from their lists in order of appearance; the numbers of
& | and per_head are the number of parts, and the parts follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from qkv.masks import Mask
from qkv.masks.base import Dense, decoded


def encode(call: str, mask: Mask | Tensor, words: list[int], tensors: list[Tensor]) -> None:
    """Append the integers and tensors of a mask or bool tensor.

    Raises UnsupportedError for a mask that is a Python function.

    >>> import qkv
    >>> words, tensors = [], []
    >>> encode("f()", qkv.causal() & qkv.prefix(2), words, tensors)
    >>> words, decode(words, tensors)
    ([1, 13, 2, 1, -1, 0, 2, 2], causal() & prefix(2))
    """
    if isinstance(mask, Tensor):
        words += [0, Dense.op]
        tensors += [mask]
    else:
        words += [int(mask._reads_position)]
        mask._encode(call, words, tensors)


def decode(words: Sequence[int], tensors: Sequence[Tensor]) -> Mask | None:
    """The mask that `encode` was given, None for no integers.

    Cost: a copy and a hash of the tensors, except of a dense mask's; without tensors a table lookup.
    """
    if not words:
        return None
    return _without_tensors(tuple(words)) if not tensors else decoded(iter(words[1:]), iter(tensors))


@lru_cache(maxsize=256)
def _without_tensors(words: tuple[int, ...]) -> Mask:
    return decoded(iter(words[1:]), iter(()))


def depends_on_position(words: Sequence[int]) -> bool:
    """Whether the encoded mask looks at where the queries stand, as far as that can be told without its tensors."""
    return bool(words[0])
