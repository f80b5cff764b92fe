"""Checks of sequences and layers that are passed to a cache."""

from __future__ import annotations

from typing import Any

from qkv.cache.books import Books
from qkv.cache.sequence import Sequence
from qkv.checks import shown
from qkv.errors import ArgumentError, ArgumentTypeError, describe


def check_seqs(home: Books, call: str, seqs: Any, swapped: bool = False) -> tuple[Sequence, ...]:
    if seqs.__class__ is not list and seqs.__class__ is not tuple:
        given = f"seqs={shown(seqs)} ({type(seqs).__name__})"
        fix = "Pass [seq]" if isinstance(seqs, Sequence) else "Pass a list of what cache.add() returned"
        raise ArgumentTypeError(describe(call, "seqs must be a list of sequences", given, fix))
    names = tuple(seqs)
    for seq in names:
        if seq.__class__ is not Sequence:
            given = f"an entry {shown(seq)} ({type(seq).__name__})"
            fix = "Pass a list of what cache.add() returned"
            raise ArgumentTypeError(describe(call, "seqs must hold sequences", given, fix))
        if seq._live is not home:
            _refuse_state(home, call, seq, swapped)
    if len(names) > 1 and len(set(names)) != len(names):
        twice = next(seq for seq in names if names.count(seq) > 1)
        fix = "Pass each sequence once; cache.fork(seq) makes another one of the same tokens"
        raise ArgumentError(describe(call, "a sequence may be in a call only once", f"{twice!r} twice", fix))
    return names


def _refuse_state(home: Books, call: str, seq: Sequence, swapped: bool) -> None:
    if seq._home is not home:
        fix = "Pass it to the cache that made it"
        raise ArgumentError(describe(call, "the sequence must be of this cache", f"{seq!r} of another one", fix))
    if seq._host is None:
        fix = "Add a new one with cache.add()"
        raise ArgumentError(describe(call, "the sequence must not have been freed", repr(seq), fix))
    if not swapped:
        fix = "Bring it back with cache.swap_in(seq)"
        raise ArgumentError(describe(call, "the sequence must not be swapped out", repr(seq), fix))


def refuse_open(home: Books, call: str, names: tuple[Sequence, ...]) -> None:
    for seq in names:
        if seq._step is not None:
            given = f"{seq!r} with layer {seq._step.next} of {home.layers} to come"
            fix = "Append the layers that are missing, or forget the step with cache.rollback(seqs)"
            raise ArgumentError(describe(call, "the sequence is in an unfinished step", given, fix))


def refuse_layer(home: Books, method: str, layer: Any) -> None:
    call = f"{home._name}.{method}()"
    if layer.__class__ is not int:
        given = f"layer={shown(layer)} ({type(layer).__name__})"
        raise ArgumentTypeError(describe(call, "layer must be an int", given, f"Pass 0 .. {home.layers - 1}"))
    rule = f"layer must be one of the cache's {home.layers}"
    raise ArgumentError(describe(call, rule, f"layer={layer}", f"Pass 0 .. {home.layers - 1}"))
