"""What `qkv bench --insight`, `--sparse` and `--models` share: contenders in turn, verdicts, rows within their seconds.

A measurement is a list of calls. Each checks its results, times its contenders in turn, and returns rows that say
whether they agree with the definition and whether they reached what they have to.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from qkv.bench.budget import Budget

Quartiles: TypeAlias = tuple[float, float, float]
Say: TypeAlias = Callable[[str], None]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Terms:
    """On what terms the contenders of a call meet."""

    backend: str | None = "cpu"
    rounds: int = 9
    until: float = math.inf  # a round that would end after it, as `time.perf_counter` counts, is not begun
    compiled: bool = False  # whether peers that have to be compiled take part


class Row(Protocol):
    """A dataclass of what was measured, with a line of text."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def agrees(self) -> bool:
        """Whether the result was that of the definition."""

    @property
    def verdict(self) -> str:
        """See `verdict`; "wrong result" where it does not agree."""


class Call(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...

    def compare(self, terms: Terms) -> Sequence[Row]:
        """Check the results, then time the contenders."""


@dataclass(frozen=True)
class Measurement:
    """One of `qkv bench --<kind>`, which is also the part of a file of results that it writes."""

    kind: str
    seconds: float
    quick_seconds: float
    calls: Callable[[bool], Sequence[Call]]  # of whether the run is a quick one
    begin: Callable[[Say], str]  # makes what the calls share, and returns the line above their rows
    rounds: int
    quick_rounds: int
    packages: tuple[str, ...] = ()  # whose versions the report names


def measure(one: Measurement, which: Sequence[Call], terms: Terms, budget: Budget, say: Say, show: Say) -> list[Row]:
    """Measure every call that there is time for, and show each row as soon as it is known."""
    show(one.begin(say))
    found: list[Row] = []
    for call in which:
        if not budget.fits:
            budget.leave_out(call.name)
            continue
        say(call.name)
        seconds = budget.rounds(math.inf)
        rows = call.compare(replace(terms, until=budget.now() + seconds))
        budget.done()
        for row in rows:
            show(str(row))
        found += rows
    return found


def seconds(call: Callable[[], object]) -> float:
    """What a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def take_turns(
    contenders: Mapping[Name, Callable[[], Any]], terms: Terms, clock: Callable[[Callable[[], Any]], float] = seconds
) -> dict[Name, list[float]]:
    """What `clock` says of each contender in each round; every second round goes in the other order."""
    taken: dict[Name, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for n in range(terms.rounds):
        if n and time.perf_counter() + (time.perf_counter() - started) / n > terms.until:
            break
        for name in contenders if n % 2 else reversed(list(contenders)):
            taken[name].append(clock(contenders[name]))
    return taken


def ratios(a: Iterable[float], b: Iterable[float]) -> Quartiles:
    """How many times as long a took as b, round by round."""
    return quartiles([x / y for x, y in zip(a, b, strict=True)])


def quartiles(values: Sequence[float]) -> Quartiles:
    """The lower, the middle and the upper one."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return low, middle, high


def at_most(most: float, found: Quartiles) -> tuple[float, Quartiles]:
    """For `verdict`, where less is better."""
    low, middle, high = found
    return -most, (-high, -middle, -low)


def verdict(found: Iterable[tuple[float, Quartiles]]) -> str:
    """Of what was needed at least and found: `pass`: the medians reached it. `near`: where not, it lies between the
    quartiles. `miss`: neither.

    >>> verdict([(2.0, (1.5, 2.5, 3.0)), at_most(1.0, (0.5, 1.1, 1.2))])
    'near'
    """
    found = list(found)
    if all(middle >= least for least, (_, middle, _) in found):
        return "pass"
    return "near" if all(high >= least for least, (_, _, high) in found) else "miss"


def as_data(found: Iterable[Row]) -> list[dict[str, object]]:
    """For the JSON report."""
    return [{**asdict(one), "agrees": one.agrees, "verdict": one.verdict} for one in found]
