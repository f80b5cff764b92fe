"""Mistakes between a view and its kernels, and the proof that the gate of views sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qkv import execute, plans
from qkv.call.keys import KVLayout, KVView
from qkv.masks import as_mask
from tests.gates.view_calls import VIEWS, Question
from tests.kit import private


def _held_ignored(real: Any) -> Any:
    return lambda call, mask, held: as_mask(mask, call)


def _position_off(real: Any) -> Any:
    def problem_of(call: str, q: Any, view: KVView, mask: Any, options: Any, group: Any) -> Any:
        problem, inputs = real(call, q, view, mask, options, group)
        return replace(problem, positions=(group.Lk - group.Lq - 1,)), inputs

    return problem_of


def _offsets_off(real: Any) -> Any:
    return lambda call, q, view, *rest: real(call, q.roll(1, 2) if view.layout.queries is not None else q, view, *rest)


def _which_short(real: Any) -> Any:
    def over_view(*given: Any) -> Any:
        found = real(*given)
        if not found.in_place:
            return found

        class Short:
            @staticmethod
            def prepare_view(*given: Any) -> Any:
                ready = found.plan.chosen.prepare_view(*given)
                run = ready.run

                def run_some(q: Any, view: KVView, bias: Any, sinks: Any, to: Any = None, which: Any = ()) -> Any:
                    if to is not None:
                        to.out.fill_(0)  # memory that happens to be right is no excuse
                    return run(q, view, bias, sinks, to, list(which[:-1]) or list(which))

                ready.run = run_some
                return ready

        return found._replace(plan=replace(found.plan, chosen=Short()))

    return over_view


def _one_group(real: Any) -> Any:
    def groups(q: Any, view: KVView) -> Any:
        found = real(q, view)
        return [found[0]._replace(sequences=tuple(i for group in found for i in group.sequences))]

    return groups


def _first_table(real: Any) -> Any:
    def gathered(view: KVView, *rest: Any) -> Any:
        layout, longest = view.layout, max(range(len(view.layout.lengths)), key=view.layout.lengths.__getitem__)
        starts = type(layout.starts)("q", [layout.starts[longest]] * len(layout.starts))
        own = KVLayout(layout.tables, starts, layout.lengths, layout.queries, layout.clock)
        return real(view._replace(layout=own), *rest)

    return gathered


def _values_by_key_scale(real: Any) -> Any:
    return lambda view, *rest: real(view._replace(v_scale=view.k_scale), *rest)


# name: (what is wrong, the function of qkv.execute or qkv.plans that is replaced, by what)
GLUE_MUTANTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "held ignored": ("what the cache gave back counts as visible", "joined", _held_ignored),
    "position off": ("queries of copied keys stand one place early", "problem_of", _position_off),
    "offsets off": ("rows of a ragged step are taken one place early", "_copied", _offsets_off),
    "which short": ("the last sequence of a group is left out", "over_view", _which_short),
    "one group": ("the first sequence's lengths serve all", "groups", _one_group),
    "one table": ("all sequences are read by the longest one's table", "gathered", _first_table),
    "value scale": ("stored values are multiplied by the keys' scales", "gathered", _values_by_key_scale),
}


@contextmanager
def glue_mutant(name: str) -> Iterator[None]:
    """qkv with one mistake between a view and its kernels; "" is none."""
    if not name:
        yield
        return
    _, where, wrong = GLUE_MUTANTS[name]
    modules = [m for m in (execute, plans) if hasattr(m, where)]
    real = getattr(modules[0], where)
    private.forget()
    for module in modules:
        setattr(module, where, wrong(real))
    try:
        yield
    finally:
        for module in modules:
            setattr(module, where, real)
        private.forget()


def killer(name: str, asked: Iterable[Question], names: Iterable[str | None]) -> tuple[Question, str] | None:
    """The first question that tells qkv with this mistake from qkv, and how."""
    with glue_mutant(name):
        for question in asked:
            for backend in names:
                outcome = VIEWS.ask(question, backend)
                if outcome.faults:
                    return question, f"{backend}: {outcome.faults[0]}"
    return None
