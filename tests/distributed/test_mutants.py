"""Wrong shardings, made on purpose: the gate's configurations have to notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qkv.distributed import exchange, heads, parts, ring
from qkv.scores.base import TensorBias
from tests.gates import rank_calls
from tests.gates.rank_calls import METHODS, RANK_CALLS
from tests.kit.cases import Config
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

MOST = 60  # configurations that may pass before one notices
Patch = Callable[[Any], None]


class Patches:
    """Attributes replaced, and put back."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)


def _trimmed(p: Patches, start: int, stop: int) -> None:
    original = exchange.Exchange.pieces

    def pieces(self: Any, rank: int, keys: Any) -> Any:
        if keys != self.keys.ranges[rank]:
            keys = tuple((a + start, b - stop) for a, b in keys if b - stop > a + start)
        return original(self, rank, keys)

    p.set(exchange.Exchange, "pieces", pieces)


def _first_key_of_an_arrival_lost(p: Patches) -> None:
    _trimmed(p, 1, 0)


def _last_key_of_an_arrival_lost(p: Patches) -> None:
    _trimmed(p, 0, 1)


def _stale_values(p: Patches) -> None:
    original = ring.Mailbox.keys

    def keys(self: Any) -> Any:
        found = original(self)
        found.v = [v.roll(1, 2) for v in found.v]
        return found

    p.set(ring.Mailbox, "keys", keys)


def _twice(p: Patches) -> None:
    original = parts.Joined.add

    def add(self: Any, rows: slice, found: Any) -> None:
        original(self, rows, found)
        if rows.start:
            original(self, rows, found)

    p.set(parts.Joined, "add", add)


def _last_rank_one_off(p: Patches) -> None:
    original = parts.Whole.problem_of

    def problem_of(self: Any, piece: Any) -> Any:
        from dataclasses import replace

        found = original(self, piece)
        if piece.queries[1] == self.problem.Lq and piece.queries[0] and isinstance(found.positions, tuple):
            return replace(found, positions=tuple(x + 1 for x in found.positions))
        return found

    p.set(parts.Whole, "problem_of", problem_of)


def _portion(p: Patches, **wrong: int) -> None:
    original = parts.portion
    p.set(parts, "portion", lambda mask, **given: original(mask, **given | wrong))


def _queries_counted_anew(p: Patches) -> None:
    _portion(p, first_query=0)


def _not_rescaled(p: Patches) -> None:
    original = parts.Joined.__init__

    def made(self: Any, problem: Any, rows: int, device: Any, unit: float) -> None:
        original(self, problem, rows, device, 0.0)

    p.set(parts.Joined, "__init__", made)


def _sinks_twice(p: Patches) -> None:
    original = parts.Joined.add_sinks

    def twice(self: Any, sinks: Any) -> None:
        original(self, sinks)
        original(self, sinks)

    p.set(parts.Joined, "add_sinks", twice)


def _a_parts_own_state(p: Patches) -> None:
    original = parts.Whole.gradients

    def gradients(self: Any, problem: Any, inputs: Any, whole: Any, *given: Any) -> Any:
        return original(self, problem, inputs, self.run(problem, inputs), *given)

    p.set(parts.Whole, "gradients", gradients)


def _returned_gradients_lost(p: Patches) -> None:
    p.set(ring._Gradients, "_take", lambda self, pending, box: pending.wait())


def _bias_from_the_first_column(p: Patches) -> None:
    original = TensorBias.cut
    p.set(TensorBias, "cut", lambda self, rows, keys: original(self, rows, slice(0, keys.stop - keys.start)))


def _rows_as_they_came(p: Patches) -> None:
    p.set(heads, "in_order", lambda parts, ranges, dim: torch.cat(list(parts), dim))


def _heads_of_the_first_rank(p: Patches) -> None:
    from qkv.masks.base import Composed, Dense
    from qkv.masks.sparse import Blocks, PerHead

    for kind in (Composed, PerHead, Dense, Blocks):
        original = kind.of_heads
        p.set(kind, "of_heads", lambda self, start, stop, Hq, original=original: original(self, 0, stop - start, Hq))


def _shared_heads_not_summed(p: Patches) -> None:
    original = heads.Swap.to_rows

    def to_rows(self: Any, x: Any, count: int) -> Any:
        if sum(b - a for a, b in self.heads) == count:
            return original(self, x, count)
        return original(self, x, count) / 2

    p.set(heads.Swap, "to_rows", to_rows)


MUTANTS: dict[str, tuple[tuple[str, ...], Callable[[Patches], None]]] = {
    "first key of an arrival lost": (("ring", "allgather"), _first_key_of_an_arrival_lost),
    "last key of an arrival lost": (("ring", "allgather"), _last_key_of_an_arrival_lost),
    "stale values": (("ring",), _stale_values),
    "a piece counted twice": (("ring",), _twice),
    "the last rank's queries one further": (("ring",), _last_rank_one_off),
    "queries counted anew in each piece": (("ring",), _queries_counted_anew),
    "parts not rescaled": (("ring",), _not_rescaled),
    "sinks counted twice": (("ring",), _sinks_twice),
    "gradients from a part's own state": (("ring",), _a_parts_own_state),
    "returned gradients lost": (("ring",), _returned_gradients_lost),
    "a bias from its first column": (("ring",), _bias_from_the_first_column),
    "rows in the order in which they came": (("ulysses", "hybrid"), _rows_as_they_came),
    "masks of the first heads": (("ulysses",), _heads_of_the_first_rank),
    "gradients of shared heads not summed": (("ulysses",), _shared_heads_not_summed),
}


def broken(mesh: Any, name: str, *given: Any) -> dict[str, torch.Tensor]:
    """`rank_calls.on_rank` with a mutant in place."""
    patches = Patches()
    try:
        MUTANTS[name][1](patches)
        return rank_calls.on_rank(mesh, *given)
    finally:
        patches.undo()


@pytest.mark.parametrize("name", MUTANTS)
def test_it_dies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(n: int, function: Any, *args: Any) -> Any:
        assert function is rank_calls.on_rank
        return on_ranks(n, broken, name, *args)

    monkeypatch.setattr(rank_calls, "on_ranks", asked)
    for seed in range(MOST):
        config: Config = RANK_CALLS.random(seed)
        if config.Lq * config.Lk > 40_000 or config.dtype in ("bf16", "f16"):
            continue
        question = RANK_CALLS.question(config)
        for method in MUTANTS[name][0]:
            outcome = RANK_CALLS.ask(question, method)
            if outcome.faults:
                assert "RanksFailed" not in outcome.faults[0], outcome.faults[0]
                return
    raise AssertionError(f"{name} passed {MOST} configurations")


def test_all_methods_are_broken() -> None:
    assert {method for broken_methods, _ in MUTANTS.values() for method in broken_methods} == set(METHODS)
