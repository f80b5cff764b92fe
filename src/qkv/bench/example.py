"""Training steps of the example decoder, with qkv and with PyTorch's attention in turn: tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from qkv.lm.comparison import step_times
from qkv.lm.decoder import Config

# context, windows a step, and how many times as fast as with SDPA this project set out to be
STEPS = ((256, 8, 1.0), (2048, 1, 1.2))


@dataclass(frozen=True)
class Step:
    """One decoder's step: medians over rounds, ratios within a round."""

    context: int
    batch: int
    needed: float
    ours: float  # tokens per second
    theirs: float
    ratio: tuple[float, float, float]  # quartiles

    @property
    def verdict(self) -> str:
        """`pass`: the median reached it. `near`: it lies between the quartiles. `miss`: neither."""
        low, middle, high = self.ratio
        return "pass" if middle >= self.needed else "near" if low <= self.needed <= high else "miss"

    def __str__(self) -> str:
        low, middle, high = self.ratio
        return (
            f"  context {self.context:,} × {self.batch}: {self.ours:,.0f} tokens/s, with SDPA {self.theirs:,.0f}: "
            f"{middle:.2f}× ({low:.2f} to {high:.2f}), ≥ {self.needed}×  {self.verdict}"
        )


def measure(
    say: Callable[[str], None], rounds: int = 15, size: Config | None = None, seconds: float = math.inf
) -> list[Step]:
    """Time forward, backward and update of the default decoder at each context; after `seconds`, no further rounds."""
    size = size or Config()
    found: list[Step] = []
    end = time.perf_counter() + seconds
    for context, batch, needed in STEPS:
        say(f"decoder, context {context:,}")
        shape = {**asdict(size), "context": context}
        configs = {op: Config(**{**shape, "op": op}) for op in ("qkv", "sdpa")}
        share = (end - time.perf_counter()) / (len(STEPS) - len(found))
        taken = step_times(configs, batch, rounds, seconds=share)
        ratios = statistics.quantiles((b / a for a, b in zip(taken["qkv"], taken["sdpa"], strict=True)), n=4)
        ours, theirs = (1e3 * batch * context / statistics.median(taken[op]) for op in ("qkv", "sdpa"))
        found.append(Step(context, batch, needed, ours, theirs, (ratios[0], ratios[1], ratios[2])))
    return found


def summary(steps: list[Step]) -> str:
    """A line for each."""
    return "\n".join(["Training the example decoder (forward, backward, update), end to end:", *map(str, steps)])


def as_data(steps: list[Step]) -> list[dict[str, object]]:
    """For the JSON report."""
    return [{**asdict(step), "verdict": step.verdict} for step in steps]
