"""Kernels with one mistake each, and the proof that the gate sees it.

    python -m tests.gates.mutants            # the table: every mutant, and the configuration that killed it

A Python mutant is the plain implementation of `plain.py` with one line wrong. A native mutant is the shipped kernel
with a mistake of `native_mutants.py`, compiled from a copy in which a run-time number switches one of them on
(`_native_mutants`, absent from what is shipped). Both face the gate's own checks on the gate's own configurations; no
mutant has a test of its own. A native one that is still alive then faces the configurations of `view_calls` and the
sums of `saturated`, and those of `glue.GLUE_MUTANTS`, mistakes between a view and its kernels, face these alone. A
mistake of statistics, which changes no output, faces the same calls and views looked at (`tests.kit.looks`).
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.gates import calls, glue, view_calls
from tests.gates.calls import CALLS
from tests.gates.view_calls import VIEWS
from tests.kit import backends, looks, private, saturated
from tests.kit.cases import CASES, Config
from tests.kit.gate import Gate
from tests.kit.generator import random_config
from tests.kit.native_mutants import LOOKS, MUTANTS, set_mutant
from tests.kit.plain import PYTHON_MUTANTS, Plain
from tests.kit.views import ViewConfig

PAGED = 60  # configurations on pages
LOOKED_AT = 60  # random calls whose statistics are asked for, after the named cases; and half as many views
AnyQuestion = calls.Question | view_calls.Question


@dataclass(frozen=True)
class Trial:
    """One mutant before the gate."""

    kind: str
    name: str
    seed: int | None  # the configuration that killed it, None for a survivor
    fault: str
    asked: int


def questions(configs: Sequence[Config]) -> list[calls.Question]:
    return [CALLS.question(config) for config in configs]


@cache
def view_questions() -> tuple[view_calls.Question, ...]:
    return tuple(VIEWS.question(VIEWS.random(seed)) for seed in range(PAGED))


def try_python(bug: str, asked: Iterable[calls.Question]) -> Trial:
    """Ask until a check fails. `bug` "" is the implementation without a mistake."""
    count = 0
    for count, question in enumerate(asked, 1):
        outcome = CALLS.ask(question, "python", lambda inputs: Plain(inputs, bug)())
        if outcome.faults:
            return Trial("python", bug, question.config.seed, outcome.faults[0], count)
    return Trial("python", bug, None, "", count)


def try_glue(name: str) -> Trial:
    """The views' questions to qkv with a mistake of `GLUE_MUTANTS`, on the best and on a copying backend."""
    found = glue.killer(name, view_questions(), (None, "tiled"))
    if found is None:
        return Trial("glue", name, None, "", PAGED)
    return Trial("glue", name, found[0].config.seed, found[1], view_questions().index(found[0]) + 1)


# ----------------------------------------------------------------------------------------------------- native ones
def native_mutants() -> Any:
    """The module of mutated kernels, or None where it was not built."""
    try:
        return importlib.import_module("_native_mutants")
    except ImportError:
        return None


@cache
def looked_at() -> tuple[looks.Look, ...]:
    """Calls and views whose statistics the kernels find, and the truth about them."""
    calls_ = [config for config in fixed_configs(LOOKED_AT) if not backends.may_refuse("cpu", config)]
    return tuple(looks.looks(calls_, [VIEWS.random(seed) for seed in range(LOOKED_AT // 2)]))


def _look(isas: Sequence[str]) -> tuple[int | None, str]:
    """The first fault of statistics, and the seed of the call that has it."""
    for question in looked_at():
        for isa in isas:
            if faults := question.faults(isa):
                return question.config.seed, f"{isa}: {faults[0]}"
    for isa in isas:
        if fault := looks.saturated(isa):
            return -1, f"{isa}: {fault}"
    return None, ""


def try_native(number: int, name: str, asked: Sequence[calls.Question], isas: Sequence[str]) -> Trial:
    """Ask the native backends with mistake `number` switched on; 0 is none."""
    module = native_mutants()
    count = 0
    set_mutant(module, number)
    try:
        with private.native_kernels(module):
            if not name or name.startswith(LOOKS):
                seed, fault = _look(isas)
                if name or fault:
                    return Trial("native", name, seed, fault, 0)
            for count, question in enumerate([*asked, *view_questions()], 1):
                for isa in isas:
                    outcome = _gate_of(question).ask(question, isa)
                    if outcome.faults:
                        return Trial("native", name, question.config.seed, f"{isa}: {outcome.faults[0]}", count)
            for isa in isas:
                if fault := saturated.fault(isa):
                    return Trial("native", name, -1, f"{isa}: {fault}", 0)
    finally:
        set_mutant(module, 0)
    return Trial("native", name, None, "", count)


def _gate_of(question: AnyQuestion) -> Gate[Any, Any]:
    return VIEWS if isinstance(question.config, ViewConfig) else CALLS


def _child(pipe: Connection, number: int, name: str, asked: Sequence[calls.Question], isas: Sequence[str]) -> None:
    torch.set_num_threads(1)
    pipe.send(try_native(number, name, asked, isas))


def try_native_apart(number: int, name: str, asked: Sequence[calls.Question], isas: Sequence[str]) -> Trial:
    """The same in a forked process, so that a mutant that crashes or hangs is a killed mutant and nothing worse."""
    view_questions(), looked_at()  # prepared once, here
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads is what is meant here
        child = context.Process(target=_child, args=(theirs, number, name, asked, isas))
        child.start()
    theirs.close()
    try:
        if mine.poll(120):
            return mine.recv()
        fault = "hangs"
    except EOFError:
        child.join()
        fault = f"crashes with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return Trial("native", name, -1, fault, 0)


def fixed_configs(count: int) -> list[Config]:
    """The named cases and the first random ones: the same list in every run."""
    return [*CASES, *(random_config(seed) for seed in range(count))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gates.mutants", description="Show that the gate kills every mutant."
    )
    parser.add_argument("--configs", type=int, default=300, help="random configurations after the named cases")
    parser.add_argument("--only", choices=("python", "glue", "native"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"mutants: preparing {args.configs} configurations", flush=True)
    asked = questions(fixed_configs(args.configs))
    trials: list[Trial] = []

    def tell(trial: Trial, faced: Sequence[AnyQuestion]) -> None:
        trials.append(trial)
        name = trial.name.split(":")[0] or "(no mistake)"
        result = "survived" if trial.seed is None else f"killed by {_named(faced, trial.asked)}"
        print(f"{trial.kind:<7} {name:<20} {result:<36} {trial.fault[:90]}", flush=True)

    if args.only in (None, "python"):
        kept = [q for q in asked if not q.config.dropout_p]  # `Plain` drops nothing
        for bug in ("", *PYTHON_MUTANTS):
            tell(try_python(bug, kept), kept)
    if args.only in (None, "glue"):
        for name in ("", *glue.GLUE_MUTANTS):
            tell(try_glue(name), view_questions())
    module = native_mutants()
    if args.only in (None, "native") and module is not None:
        isas = [name for name in backends.available() if name.startswith("cpu")]
        native = [q for q in asked if not backends.may_refuse("cpu", q.config)]
        for number, name in enumerate(("", *(mutant.name for mutant in MUTANTS))):
            tell(try_native_apart(number, name, native, isas), [*native, *view_questions()])
    elif args.only in (None, "native"):
        print("native  _native_mutants is not built here (make gate builds it): nothing says that they die")
        return 1
    wrong = [t for t in trials if (t.seed is None) != (t.name == "")]
    killed = sum(t.seed is not None for t in trials if t.name)
    print(f"mutants: {killed} of {sum(bool(t.name) for t in trials)} killed, {len(wrong)} wrong verdicts")
    return 1 if wrong else 0


def _named(faced: Sequence[AnyQuestion], at: int) -> str:
    """What killed a mutant: the last question it faced."""
    config = faced[at - 1].config if at else None
    if config is None:
        return "its crash, weights or statistics"
    if isinstance(config, Config):
        return f"case {config.name!r}" if config.name else f"seed {config.seed}"
    return f"views seed {config.seed}"


if __name__ == "__main__":
    sys.exit(main())
