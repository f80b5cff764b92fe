"""A run of `qkv bench` over calls: rows, memory, the decoder's steps and the sweep, each for its seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qkv.bench import memory, sweep, training
from qkv.bench.budget import Budget
from qkv.bench.cases import Row
from qkv.bench.peers import Roster
from qkv.bench.race import Result, Runner

# Where no seconds are given: of the rows, and of what a run measures besides. Given, they are divided in the same way.
SECONDS = {"rows": 300.0, "memory": 60.0, "decoder": 60.0, "sweep": 200.0}
QUICK_SECONDS = 70.0
_MOST_SECONDS = 12.0  # a row, however much time is left

Say = Callable[[str], None]


@dataclass
class Extras:
    """What a run measured besides its rows: lists for the report, and whether a result was wrong."""

    data: dict[str, Any] = field(default_factory=dict)
    wrong: bool = False


def shares(parts: dict[str, bool], *, quick: bool, seconds: float | None) -> dict[str, float]:
    """The seconds of each part of the run that is asked for; `seconds` are for all of them together."""
    usual = {name: SECONDS[name] for name, asked in parts.items() if asked}
    if quick:
        usual["rows"] = QUICK_SECONDS
    given = seconds / sum(usual.values()) if seconds else 1.0
    return {name: share * given for name, share in usual.items()}


def measure_rows(
    rows: list[Row], runner: Runner, budget: Budget, say: Say, done: Callable[[list[Result]], object]
) -> list[Result]:
    """Every row gets an equal share of what time is left, so a slow one shortens all later ones a little."""
    results: list[Result] = []
    for number, row in enumerate(rows):
        if not budget.fits:
            budget.leave_out(row.name)
            continue
        say(f"{number + 1} of {len(rows)}, {row.name}")
        seconds = budget.rounds(_MOST_SECONDS)
        results.append(runner.run(row, seconds, budget.until))
        budget.done()
        done(results)
    return results


def measure_extras(
    roster: Roster, seconds: dict[str, float], *, backward: bool, quick: bool, say: Say, show: Say
) -> Extras:
    """The parts of `shares` other than rows."""
    found = Extras()
    if "memory" in seconds:
        cases = memory.TRAINING if backward else memory.CASES
        measured = memory.measure_all(cases, roster.setup.threads, roster.backend, seconds["memory"], say)
        show("\n" + memory.summary(measured, training=backward))
        found.data["memory"] = memory.as_data(measured)
        found.wrong = any(m.problem.startswith(memory.WRONG) for m in measured)
    if "decoder" in seconds:
        steps = training.measure(say, seconds=seconds["decoder"])
        show("\n" + training.summary(steps))
        found.data["decoder"] = training.as_data(steps)
    if "sweep" in seconds:
        count = 40 if quick else 200
        swept = sweep.sweep(roster, count=count, seconds=seconds["sweep"], say=say)
        show("\n" + sweep.summary(swept, count))
        found.data["sweep"] = sweep.as_data(swept)
        found.wrong |= any(not shape.agrees for shape in swept)
    return found
