"""Checks of sequences, layers and tokens against what a cache is doing."""

from __future__ import annotations

from typing import Any

from qkv.cache import checks
from qkv.cache.ledger import Ledger
from qkv.cache.sequence import Sequence, Unfinished
from qkv.checks import given_as, shown
from qkv.errors import ArgumentError, ArgumentTypeError


def check_seqs(home: Ledger, call: str, seqs: Any, swapped: bool = False) -> tuple[Sequence, ...]:
    if seqs.__class__ is not list and seqs.__class__ is not tuple:
        fix = "Pass [seq]" if isinstance(seqs, Sequence) else "Pass a list of what cache.add() returned"
        raise ArgumentTypeError.of(call, "seqs must be a list of sequences", given_as("seqs", seqs), fix)
    names = tuple(seqs)
    for seq in names:
        if seq.__class__ is not Sequence:
            given = f"an entry {shown(seq)} ({type(seq).__name__})"
            fix = "Pass a list of what cache.add() returned"
            raise ArgumentTypeError.of(call, "seqs must hold sequences", given, fix)
        if seq._live is not home:
            _refuse_state(home, call, seq, swapped)
    if len(names) > 1 and len(set(names)) != len(names):
        twice = next(seq for seq in names if names.count(seq) > 1)
        fix = "Pass each sequence once; cache.fork(seq) makes another one of the same tokens"
        raise ArgumentError.of(call, "a sequence may be in a call only once", f"{twice!r} twice", fix)
    return names


def _refuse_state(home: Ledger, call: str, seq: Sequence, swapped: bool) -> None:
    if seq._home is not home:
        fix = "Pass it to the cache that made it"
        raise ArgumentError.of(call, "the sequence must be of this cache", f"{seq!r} of another one", fix)
    if seq._host is None:
        fix = "Add a new one with cache.add()"
        raise ArgumentError.of(call, "the sequence must not have been freed", repr(seq), fix)
    if not swapped:
        fix = "Bring it back with cache.swap_in(seq)"
        raise ArgumentError.of(call, "the sequence must not be swapped out", repr(seq), fix)


def refuse_open(home: Ledger, call: str, names: tuple[Sequence, ...]) -> None:
    for seq in names:
        if seq._step is not None:
            given = f"{seq!r} with layer {seq._step.next} of {home.layers} to come"
            fix = "Append the layers that are missing, or forget the step with cache.rollback(seqs)"
            raise ArgumentError.of(call, "the sequence is in an unfinished step", given, fix)


def refuse_layer(home: Ledger, method: str, layer: Any) -> None:
    call = f"{home._name}.{method}()"
    if layer.__class__ is not int:
        given = given_as("layer", layer)
        raise ArgumentTypeError.of(call, "layer must be an int", given, f"Pass 0 .. {home.layers - 1}")
    rule = f"layer must be one of the cache's {home.layers}"
    raise ArgumentError.of(call, rule, f"layer={layer}", f"Pass 0 .. {home.layers - 1}")


def other_step(home: Ledger, call: str, names: tuple[Sequence, ...], layer: int, lengths: Any) -> ArgumentError:
    """Why these are not the layer, the sequences or the lengths that the unfinished step goes on with."""
    step = names[0]._step
    fix = "Append the layers of a step in order, or forget it with cache.rollback(seqs)"
    if step is None or step.next != layer:
        expected = 0 if step is None else step.next
        given = f"layer={layer}, expected layer={expected} of {home.layers}"
        return ArgumentError.of(call, "the layers of a step come in order 0, 1, ...", given, fix)
    if step.seqs != names:
        given = f"{len(names)} sequences, and {len(step.seqs)} in layer 0 (or others, or in another order)"
        return ArgumentError.of(call, "all layers of a step have the same sequences", given, fix)
    if lengths is not None:
        checks.counts(call, "lengths", lengths, len(names))
    given = f"lengths={shown(lengths)}, and {step.lengths} in layer 0"
    return ArgumentError.of(call, "all layers of a step have the same lengths", given, fix)


def check_repeated(home: Ledger, step: Unfinished, tokens: Any) -> None:
    """tokens= of a later layer: what layer 0 was given."""
    call = f"{home._name}.append()"
    again = checks.step_tokens(call, tokens, len(step.seqs), step.T, step.lengths)
    if again != step.tokens:
        rule, fix = "tokens of a step are given with layer 0", "Pass them there; further layers may leave them out"
        raise ArgumentError.of(call, rule, "other tokens, or none, in layer 0", fix)
