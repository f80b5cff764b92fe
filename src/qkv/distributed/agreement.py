"""Whether all ranks make the same call: messages of other sizes than expected would end a process of gloo's.

It is asked before anything else is sent, by one gather of four numbers a rank: whether it can make the call at all, a
digest of what has to be the same, and how many rows it has. A rank whose own arguments are wrong says so there, and the
others need not wait for it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.checks import Operand
from qkv.distributed.transport import Group
from qkv.errors import ArgumentError, RankError, UnsupportedError
from qkv.masks import Mask
from qkv.masks.portable import encode

_LOOKED_AT = 1 << 22  # numbers of a tensor that ranks compare

_AGREED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
_NUMBERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class Told(NamedTuple):
    """What has to be the same on all ranks, in words that another process would use, too, and their digest."""

    text: str
    digest: int

    @classmethod
    def of(cls, text: str) -> Told:
        """With the words' digest."""
        return cls(text, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))


@contextmanager
def together(groups: Sequence[Group]) -> Iterator[None]:
    """What a rank does before all agree: should it fail there, the others raise an error, too.

    Where asking would wait for a GPU they do not ask in every call; there they wait until the group's timeout."""
    try:
        yield
    except Exception:
        if not any(group.waits for group in groups):
            with suppress(RankError):  # the own error says more
                _everyone(groups, (1, 0, 0, 0))
        raise


def agree(groups: Sequence[Group], told: Told, rows: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
    """Raise on every rank unless all say the same; return the rows of each, in row-major order of the mesh.

    Cost: on gloo some bytes and a tenth of a millisecond."""
    found = _everyone(groups, (0, told.digest, *rows))
    refused = [rank for rank, (status, *_) in enumerate(found) if status]
    call = groups[0].call
    if refused:
        rule, given = "all ranks must be able to make the call", f"rank(s) {refused} cannot, and this one can"
        raise RankError.of(call, rule, given, f"See the error on rank {refused[0]}")
    alike = [rank for rank, (_, digest, *_) in enumerate(found) if digest == told.digest]
    if len(alike) < len(found):
        rule = "all ranks must make the same call: mask, shards, method, sizes, dtype, options"
        shown = told.text if len(told.text) <= 600 else f"{told.text[:600]} ..."
        given = f"{shown} on rank(s) {alike} alone"
        raise ArgumentError.of(call, rule, given, "Print the arguments on two ranks and compare them")
    return [(q, k) for *_, q, k in found]


def agree_once(groups: Sequence[Group], told: Told) -> None:
    """`agree`, and number the call; where asking would wait for a GPU, before the first call of a kind alone."""
    if any(group.waits for group in groups):
        known = _AGREED.setdefault(groups[0].process_group, set())
        if told.digest in known:
            return
        agree(groups, told)
        known.add(told.digest)
        return
    last = groups[-1].process_group
    _NUMBERS[last] = number = 1 + max(before for before, _ in agree(groups, told, (_NUMBERS.get(last, 0), 0)))
    for group in groups:
        group.number, group.mesh = number, tuple(groups) if len(groups) > 1 else ()


def agree_again(group: Group, direct: bool = False) -> None:
    """Raise on all ranks of the mesh unless all run the backward pass of the same call.

    Messages of another one may have the same sizes, and would be taken for this one's. `direct`: by messages from rank
    to rank, so that an error names who is missing.

    Cost: as `agree`."""
    if not group.number:
        return
    mine = Told.of(f"the backward pass of call {group.number}")
    if direct:
        found = _each(group, mine.digest)
    else:
        found = [digest for _, digest, *_ in _everyone(group.mesh or (group,), (0, mine.digest, 0, 0))]
    alike = [rank for rank, digest in enumerate(found) if digest == mine.digest]
    if len(alike) < len(found):
        rule = "all ranks must run the same backward passes, in the same order"
        fix = "Call backward() alike on all ranks; one whose rows are in no loss adds 0 * out.sum() to its own"
        raise ArgumentError.of(group.call, rule, f"{mine.text} on rank(s) {alike} alone", fix)


def _each(group: Group, digest: int) -> list[int]:
    """What each rank of a group says, asked of one after the other."""
    found = torch.full((group.size, 1), digest, dtype=torch.int64, device=group.device)
    mine, others = found[group.rank].clone(), [rank for rank in range(group.size) if rank != group.rank]
    what, arrivals = "stage 0: which backward pass it is", [(rank, found[rank]) for rank in others]
    group.exchange(what, arrivals, [(rank, mine) for rank in others], 2, counted=False).wait()
    return [int(x) for x in found.flatten().tolist()]


def words_of(mask: Mask | None) -> str:
    """A mask as another process would tell it. It shows long lists abbreviated, so their numbers are compared, too."""
    words: list[int] = []
    tensors: list[Tensor] = []
    if mask is not None:
        try:
            encode("qkv.distributed", mask, words, tensors)
        except UnsupportedError:  # a Python function
            words = []
    return f"{mask!r} {words} {[contents(t) for t in tensors]}"


def contents(t: Tensor) -> Any:
    """What is compared of a tensor: of very large ones the sizes alone."""
    return Operand(t).digest if t.numel() <= _LOOKED_AT else (tuple(t.shape), str(t.dtype))


def _everyone(groups: Sequence[Group], mine: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """What each rank says."""
    if all(group.size == 1 for group in groups):
        return [mine]
    found = torch.tensor([mine], dtype=torch.int64, device=groups[-1].device)
    for group in reversed(groups):
        found = torch.cat(group.gather("agreeing on the call", found.to(group.device), counted=False))
    return [tuple(each) for each in found.tolist()]
