"""Training: forward and backward of the shapes of `calls`, and whole steps of the little decoder."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from qkv.bench import calls
from qkv.bench.cases import Row, Target
from qkv.lm.comparison import step_times
from qkv.lm.decoder import Config

# Shape -> type -> how many times as long PyTorch's forward + backward must take.
_TRAINING = {
    "causal 2048 d128": {"bf16": 2.0, "f32": 1.1},
    "causal 512 d128": {"bf16": 2.0, "f32": 1.4},
    "causal 512 d64": {"bf16": 2.0, "f32": 1.4},
    "window 256 of 2048 d128": {"bf16": 4.0, "f32": 4.0},
}
# context, windows a step, and how many times as fast as with SDPA this project set out to be
STEPS = ((256, 8, 1.0), (2048, 1, 1.2))


def training_rows() -> list[Row]:
    """Forward + backward of every shape of the forward table that has more than one query, in three types."""
    rows = {}
    for row in (*calls.prefill(), *calls.sparse(), *calls.rest()):
        shape = row.name.rpartition(" ")[0]
        for dtype in ("f32", "bf16", "f16"):
            needed = _TRAINING.get(shape, {}).get(dtype)
            name = f"training {shape} {dtype}"
            rows[name] = Row(
                name,
                replace(row.case, dtype=dtype, backward=True),
                ("sdpa",),  # what a PyTorch user trains with; FlexAttention has no backward pass on the CPU
                () if needed is None else (Target("sdpa", needed),),
                {},
                row.limit,
                quick=needed is not None and row.case.D == 128,
            )
    return list(rows.values())


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
