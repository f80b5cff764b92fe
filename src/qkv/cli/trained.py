"""What `qkv train` says: how a run begins, how it goes, what it came to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from qkv.cli.progress import Progress
from qkv.insight.terminal import bar, is_terminal
from qkv.lm.data import SPLIT
from qkv.lm.training import Run


def opening(current: Run) -> str:
    corpus, config = current.corpus, current.config
    weights = sum(p.numel() for p in current.model.parameters())
    begun = f", continued at step {current.step:,}" if current.step else ""
    return (
        f"qkv train: {corpus.name}, {len(corpus.train):,} bytes, and {len(corpus.held):,} held out ({SPLIT})\n"
        f"qkv train: {config.attention}, {config.layers} layers of {config.dim}, {weights:,} weights, "
        f"{current.settings.steps:,} steps of {current.settings.batch} × {config.context} bytes{begun}"
    )


def result(current: Run, out: Path) -> str:
    config, (step, bits) = current.config, current.record.held[-1]
    kept = 2 * config.cached_numbers()
    bound = f", of the last {config.window} bytes only" if config.attention == "window" else ""
    rows = [
        ("bits per byte, held out", f"{bits:.4f} after {step:,} steps (a guess among 256 bytes takes 8)"),
        ("key/value bytes a token", f"{kept:,} in bfloat16, over {config.layers} layers{bound}"),
        ("checkpoint", str(out)),
    ]
    if current.record.milliseconds:
        time_a_step = f"{current.record.step_time():.0f} ms, median, {torch.get_num_threads()} threads"
        rows.insert(2, ("time a step", time_a_step))
    return "\n".join(f"{name:<28} {value}" for name, value in rows)


class Teller:
    """Says how training goes: often on a terminal, ten times in all elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.last, self.tenth = progress, 0.0, -1

    def hear(self, current: Run) -> None:
        record, steps = current.record, current.settings.steps
        now, tenth, drawn = time.perf_counter(), 10 * current.step // steps, ""
        if is_terminal(sys.stderr):
            if now - self.last < 0.2 and current.step < steps:
                return
            drawn = f"▕{bar(current.step / steps, 20)}▏ "
        elif tenth == self.tenth:
            return
        self.last, self.tenth = now, tenth
        recent = record.losses[-20:]
        held = f", {record.held[-1][1]:.3f} held out" if record.held else ""
        left = (steps - current.step) * record.step_time() / 1e3
        remaining = f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left"
        if len(record.milliseconds) < 5:  # the first steps set things up and say little of the rest
            remaining = ""
        bits = f"{sum(recent) / len(recent):.3f} bits per byte"
        self.progress.say(f"{drawn}step {current.step:,} of {steps:,}, {bits}{held}{remaining}")
