"""200 shapes against PyTorch's own attention: is any of them slower?

Shapes are drawn once from a fixed seed. A shape that looks slower is measured again, twice, with more pairs, and only
called slower if three quarters of the last pairs say so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qkv.bench.cases import TOLERANCE, Case
from qkv.bench.inputs import build
from qkv.bench.peers import Roster, describe_case
from qkv.bench.race import OURS, Clock, Spread, interleave, ratio, spread, within_slack

_SLACK_US = 3.0
_MOST_FLOPS = 12e9
_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)


@dataclass
class Swept:
    case: Case
    ours: float
    theirs: float
    ratio: Spread
    agrees: bool
    slower: bool

    def __str__(self) -> str:
        wrong = "" if self.agrees else ", results differ"
        return f"{describe_case(self.case)}: {self.ratio.median:.2f}× ({self.ours * 1e3:.4f} ms{wrong})"


def shapes(count: int = 200, seed: int = 0) -> Iterator[Case]:
    """Lengths 1 to 4,096 (even in the logarithm), heads, groups, head sizes 16 to 256, every type, full and causal."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        keys = rng.choice((1, 4096, *(round(2 ** rng.uniform(rng.choice((0, 6)), 12)) for _ in range(10))))
        queries = rng.choice((keys, keys, 1, round(2 ** rng.uniform(0, 12))))
        group = rng.choice((1, 1, 2, 4, 8))
        case = Case(
            dtype=rng.choice(("f32", "f32", "bf16", "bf16", "bf16", "f16", "f16", "f64")),
            Lq=queries,
            Lk=keys,
            D=rng.choice(_DIMS),
            B=rng.choice((1, 1, 1, 2, 8)),
            Hq=rng.choice((1, 2, 4, 8)) * group,
            Hkv=1,
            mask=rng.choice(("full", "causal")) if queries == keys else "full",
        )
        case = Case(**{**case.__dict__, "Hkv": case.Hq // group})
        if 4 * case.B * case.Hq * case.Lq * case.Lk * case.D <= _MOST_FLOPS and case.kv_bytes <= 1 << 27:
            made += 1
            yield case


def sweep(
    roster: Roster,
    *,
    count: int = 200,
    seconds: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
) -> list[Swept]:
    """Measure shapes until `seconds` are over; those with `slower` set are the ones to look at."""
    clock = clock or Clock()
    results: list[Swept] = []
    end = clock.now() + seconds
    with torch.no_grad():
        for number, case in enumerate(shapes(count)):
            if clock.now() > end:
                break
            say(f"sweep {number + 1} of {count}")
            results.append(_one(roster, case, clock))
    return results


def _one(roster: Roster, case: Case, clock: Clock) -> Swept:
    inputs = build(case)
    ready = {OURS: roster.prepare(OURS, inputs), "sdpa": roster.prepare("sdpa", inputs)}
    agrees = all(inputs.error(p.read(p.calls[0]())) <= TOLERANCE[case.dtype] for p in ready.values())
    calls = {name: p.calls for name, p in ready.items()}
    estimates = {}
    for name, (call,) in calls.items():
        start = clock.now()
        call()
        estimates[name] = max(clock.now() - start, 1e-7)
    for seconds, rounds in ((0.15, (3, 7)), (0.6, (7, 25)), (1.5, (15, 40))):
        taken = interleave(calls, estimates, seconds=seconds, rounds=rounds, keep=lambda name: True, clock=clock)
        ours, theirs = taken[OURS], taken["sdpa"]
        found = ratio(theirs, ours)
        assert found is not None  # `keep` drops neither, so both have every round
        measured = found
        excused = measured.median >= 1 or within_slack(ours, theirs, _SLACK_US)
        if excused:
            break
    slower = not excused and measured.high < 1
    return Swept(
        case, spread(list(ours.values())).median, spread(list(theirs.values())).median, measured, agrees, slower
    )


def summary(results: list[Swept], count: int | None = None) -> str:
    """The shapes that lost, then how the others fared by type; `count`: how many there were to measure."""
    slower = [r for r in results if r.slower]
    wrong = [r for r in results if not r.agrees]
    lines = [f"{len(slower)} of {len(results)} shapes slower than PyTorch's attention."]
    if count is not None and len(results) < count:
        lines.append(f"  {count - len(results)} of {count} shapes left out: --seconds has no room for them")
    lines += [f"  slower: {r}" for r in sorted(slower, key=lambda r: r.ratio.median)]
    lines += [f"  results differ: {r}" for r in wrong]
    for dtype in dict.fromkeys(r.case.dtype for r in results):
        ratios = sorted(r.ratio.median for r in results if r.case.dtype == dtype)
        middle = spread(ratios)
        lines.append(
            f"  {dtype}: {len(ratios)} shapes, ratio {ratios[0]:.2f} to {ratios[-1]:.1f}, median {middle.median:.2f}"
        )
    return "\n".join(lines)


def as_data(results: list[Swept]) -> list[dict[str, object]]:
    """For the JSON report."""
    return [
        {
            "case": describe_case(r.case),
            "seconds": r.ours,
            "sdpa_seconds": r.theirs,
            "ratio": r.ratio._asdict(),
            "agrees": r.agrees,
            "slower": r.slower,
        }
        for r in results
    ]
