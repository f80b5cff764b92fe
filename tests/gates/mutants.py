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
import multiprocessing.connection
import resource
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
LIMIT = 120  # seconds of a processor after which a mutant hangs; of the clock five times as many, on a busy machine
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
    """The cheapest first: most mutants die of one, and the expensive ones are asked of the few that are left."""
    return [CALLS.question(config) for config in sorted(configs, key=lambda c: c.B * c.Hq * c.Lq * c.Lk)]


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


# ------------------------------------------------------------------------------------------------------ processes
@dataclass(frozen=True)
class Ask:
    """A trial to be made, and what it is of."""

    kind: str
    name: str
    run: Callable[[], Trial]


class _Child:
    """A trial in a forked process, so that a mutant that crashes or hangs is a killed mutant and nothing worse."""

    def __init__(self, at: int, ask: Ask) -> None:
        self.at, self.ask, self.since = at, ask, time.monotonic()
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads is what is meant here
            self.process = context.Process(target=self._answer, args=(theirs,))
            self.process.start()
        theirs.close()

    def _answer(self, pipe: Connection) -> None:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        try:
            pipe.send(self.ask.run())
        except Exception:  # of the gate itself: no mutant's death
            pipe.send(traceback.format_exc())

    def ended(self) -> bool:
        return self.pipe.poll() or time.monotonic() - self.since > 5 * LIMIT

    def trial(self) -> Trial:
        try:
            if self.pipe.poll():
                found: Trial | str = self.pipe.recv()
                if isinstance(found, str):
                    raise RuntimeError(f"{self.ask.kind} {self.ask.name}: {found}")
                return found
            fault = "hangs"
        except EOFError:
            self.process.join()
            fault = f"crashes with exit code {self.process.exitcode}"
        finally:
            self.process.kill()
            self.process.join()
        return Trial(self.ask.kind, self.ask.name, -1, fault, 0)


def tried_apart(asks: Sequence[Ask], processes: int) -> Iterator[Trial]:
    """What they find, in their order, each in a process of its own and so many at a time."""
    todo, running, done = deque(enumerate(asks)), list[_Child](), dict[int, Trial]()
    for at in range(len(asks)):
        while at not in done:
            while todo and len(running) < processes:
                running.append(_Child(*todo.popleft()))
            multiprocessing.connection.wait([child.pipe for child in running], timeout=1)
            for child in [child for child in running if child.ended()]:
                done[child.at] = child.trial()
                running.remove(child)
        yield done.pop(at)


def native_asks(asked: Sequence[calls.Question]) -> list[Ask]:
    """The kernels without a mistake, each instruction set by itself, and every mutant of them."""
    built = native_mutants().instruction_sets().split(",")
    isas = [name for name in backends.available() if name.removeprefix("cpu:") in built]
    view_questions(), looked_at()  # prepared once, here
    right = [Ask("native", "", partial(try_native, 0, "", asked, [isa])) for isa in isas]
    return right + [
        Ask("native", mutant.name, partial(try_native, number, mutant.name, asked, isas))
        for number, mutant in enumerate(MUTANTS, 1)
    ]


def fixed_configs(count: int) -> list[Config]:
    """The named cases and the first random ones: the same list in every run."""
    return [*CASES, *(random_config(seed) for seed in range(count))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gates.mutants", description="Show that the gate kills every mutant."
    )
    parser.add_argument("--configs", type=int, default=300, help="random configurations after the named cases")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=("python", "glue", "native"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"mutants: preparing {args.configs} configurations", flush=True)
    asked = questions(fixed_configs(args.configs))
    trials: list[Trial] = []

    def tell(asks: Sequence[Ask], faced: Sequence[AnyQuestion]) -> None:
        for trial in tried_apart(asks, args.processes):
            trials.append(trial)
            name = trial.name.split(":")[0] or "(no mistake)"
            result = "survived" if trial.seed is None else f"killed by {_named(faced, trial.asked)}"
            print(f"{trial.kind:<7} {name:<20} {result:<36} {trial.fault[:90]}", flush=True)

    if args.only in (None, "python"):
        kept = [q for q in asked if not q.config.dropout_p]  # `Plain` drops nothing
        tell([Ask("python", bug, partial(try_python, bug, kept)) for bug in ("", *PYTHON_MUTANTS)], kept)
    if args.only in (None, "glue"):
        view_questions()  # prepared once, here
        tell([Ask("glue", name, partial(try_glue, name)) for name in ("", *glue.GLUE_MUTANTS)], view_questions())
    module = native_mutants()
    if args.only in (None, "native") and module is not None:
        native = [q for q in asked if not backends.may_refuse("cpu", q.config)]
        tell(native_asks(native), [*native, *view_questions()])
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
