"""`qkv bench --caches`: decoding on pages against plain tensors, sharing, 8-bit storage, latents, and the books.

What is compared with what is in `reading` and `books`; here are the rows with their sizes and targets, the run of them,
and its table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from qkv.bench.budget import Budget
from qkv.bench.caches import books, reading
from qkv.bench.caches.contest import Bench, Figure, Line
from qkv.bench.cases import Case
from qkv.bench.race import Spread
from qkv.bench.report import Columns, milliseconds

SECONDS, QUICK_SECONDS = 200.0, 45.0
_MOST = 20.0  # a contest, however much time is left
COLUMNS = Columns(
    ["case", "qkv ms", "opponent", "ms", "measured", "quartiles", "needed", "", "of limit"],
    "<><>>><<<",
    (43, 6, 14, 6, 10, 14, 8, 12, 0),
)
_MAIN = Case("bf16", 1, 4096, B=8, Hq=32, Hkv=8)
_MANY = Case("bf16", 1, 4096, B=8, Hq=32, Hkv=32)
_LATENT = Case("bf16", 1, 4096, 576, Hq=128, Hkv=1, rank=512)
_8BIT = (torch.int8, torch.float8_e4m3fn)

Contest = Callable[[Bench], list[Line]]


def contests(*, quick: bool = False) -> dict[str, Contest]:
    """The rows by name; quick: without those that have no target."""
    every: dict[str, tuple[bool, Contest]] = {
        "paged": (True, partial(reading.paged, case=_MAIN, judged=True)),
        "paged f32": (False, partial(reading.paged, case=Case("f32", 1, 4096, B=8, Hq=32, Hkv=8), judged=False)),
        "paged 1 sequence": (False, partial(reading.paged, case=Case("bf16", 1, 4096, Hq=32, Hkv=8), judged=False)),
        "paged 32/32": (False, partial(reading.paged, case=Case("bf16", 1, 1024, B=8, Hq=32, Hkv=32), judged=False)),
        "cascade 32/32": (True, partial(reading.cascade, Hq=32, Hkv=32, needed=3.0)),
        "cascade 32/8": (True, partial(reading.cascade, Hq=32, Hkv=8, needed=1.0)),
        "8 bits 32/8": (True, partial(reading.quantised, case=_MAIN, kinds=_8BIT, needed=1.6)),
        "8 bits 32/32": (True, partial(reading.quantised, case=_MANY, kinds=_8BIT, needed=1.6)),
        "8 bits f32": (
            False,
            partial(reading.quantised, case=Case("f32", 1, 4096, B=8, Hq=32, Hkv=8), kinds=(torch.int8,)),
        ),
        "latent 1": (True, partial(reading.latent, case=_LATENT, needed=1.0)),
        "latent 4": (True, partial(reading.latent, case=Case(**{**_LATENT.__dict__, "B": 4}), needed=1.0)),
        "append": (True, partial(books.append, layers=1, needed=2.0)),
        "append 16 layers": (True, partial(books.append, layers=16, needed=2.0)),
        "prefix lookup": (True, partial(books.lookup, needed=10.0)),
        "waste": (True, books.waste),
        "memory": (False, books.memory),
    }
    return {name: contest for name, (targets, contest) in every.items() if targets or not quick}


def measure(
    chosen: dict[str, Contest], bench: Bench, budget: Budget, say: Callable[[str], None], show: Callable[[Line], None]
) -> tuple[list[Line], dict[str, float]]:
    """Run contests, each for an equal share of the time that is left. Returns their lines and what each took."""
    lines: list[Line] = []
    took: dict[str, float] = {}
    for number, (name, contest) in enumerate(chosen.items()):
        if not budget.fits:
            budget.leave_out(name)
            continue
        say(f"{number + 1} of {len(chosen)}, {name}")
        begun = budget.now()
        # Some have two races, each for so long.
        bench.seconds, bench.until = budget.rounds(_MOST, 0.5), budget.until
        try:
            with torch.no_grad():
                found = contest(bench)
        except Exception as error:  # a row that fails must be reported, and not take the numbers of others with it
            found = [Line(name, problem=f"failed: {type(error).__name__}: {str(error)[:200]}")]
        gc.collect()
        budget.done()
        took[name] = budget.now() - begun
        lines += found
        for line in found:
            show(line)
    return lines, took


def line_text(line: Line) -> str:
    """A line of the table, the verdict in colour."""
    return COLUMNS.line(_cells(line))


def _cells(line: Line) -> list[str]:
    if line.problem:
        verdict = "no data" if line.problem.startswith("failed") else "wrong result"
        return [line.case, "–", line.opponent, "–", "–", "", "", verdict]
    figure, reached = line.figure, line.reached
    cells = [line.case, _ms(line.ours), line.opponent, _ms(line.theirs)]
    cells += _figure(figure) if figure else [""] * 4
    if reached:
        cells.append(f"{reached.value.median:.0%} {line.limit}")
        if reached.needed is not None:
            cells[-1] += f", ≥ {reached.needed:.0%} {reached.verdict}"
    return cells


def _ms(seconds: Spread | None) -> str:
    return milliseconds(seconds.median) if seconds else ""


def _figure(figure: Figure) -> list[str]:
    def text(x: float) -> str:
        return f"{x:,.2f}" if x < 100 and x % 1 else f"{x:,.0f}"

    median, low, high = figure.value
    between = "" if low == median == high else f"{text(low)} to {text(high)}"
    needed = ""
    if figure.needed is not None:
        needed = f"{'≤' if figure.at_most else '≥'} {figure.needed:.3g}{figure.unit}"
    return [f"{text(median)}{figure.unit}", between, needed, figure.verdict]


def summary(lines: Sequence[Line]) -> str:
    """How many targets were reached, which were not, and what to know of the figures."""
    checks = [(line, check) for line in lines for check in line.checks]
    reached = sum(check.verdict == "pass" for _, check in checks)
    text = [f"{reached} of {len(checks)} targets reached."] if checks else []
    for line, check in checks:
        if check.verdict != "pass":
            of = line.limit if check is line.reached else line.opponent
            found = f"{check.value.median:.2f}{check.unit}, needed {check.needed:.3g}"
            found += ", more than can be: something else ran at the same time" if check.verdict == "no data" else ""
            text.append(f"  {check.verdict}: {line.case}: {found} ({of})")
    text += [f"  {line.case}: {line.problem}" for line in lines if line.problem]
    text += [f"  {line.note}" for line in lines if line.note]
    if any(line.case.startswith("paged") for line in lines):
        text.append(
            "Paged decode is judged by pages that sequences took in turn, 16 tokens at a time, and by shuffled ones: "
            "pages\nin order lie in memory as plain tensors do. ≤: ours to the other's time; ≥: the other's to ours."
        )
    return "\n".join(text)


def waiting(policy: str | None) -> str:
    """What to say of PyTorch's threads, which by default spin for a while after each call of its own."""
    if (policy or "").lower() == "passive":
        return ""
    return (
        "OMP_WAIT_POLICY is not passive: PyTorch's threads spin after its own calls and take the cores from what comes "
        "next.\nCalls wait for them to sleep here; OMP_WAIT_POLICY=passive qkv bench --caches is without them at all."
    )


def as_data(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For the JSON report; times in seconds."""
    return [
        {
            "case": line.case,
            "seconds": _spread(line.ours),
            "opponent": line.opponent,
            "opponent_seconds": _spread(line.theirs),
            "measured": _data(line.figure),
            "limit": {"kind": line.limit, "reached": _data(line.reached)},
            "rounds": line.rounds,
            "note": line.note,
            "problem": line.problem,
        }
        for line in lines
    ]


def _spread(value: Spread | None) -> dict[str, float] | None:
    return value._asdict() if value else None


def _data(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    kind = {"unit": figure.unit.strip(), "needed": figure.needed, "at_most": figure.at_most}
    return {**figure.value._asdict(), **kind, "verdict": figure.verdict}
