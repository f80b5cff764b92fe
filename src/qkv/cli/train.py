"""`qkv train`: a small byte-level decoder trained on a text, with progress, checkpoints and a measured result."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from qkv.bench.machine import threads
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError
from qkv.insight.terminal import bar, is_terminal
from qkv.lm import checkpoint
from qkv.lm.data import SPLIT, read_corpus
from qkv.lm.decoder import Config
from qkv.lm.training import Run, Settings, configured, resumed

OUT = "decoder.safetensors"
# option -> (where it belongs, type, help); the defaults are those of Config and Settings
OPTIONS = {
    "attention": ("config", str, "mha, gqa, mqa, mla, window, or an ablation such as shared-qk (default mha)"),
    "op": ("config", str, "qkv, or sdpa: PyTorch's attention in its place, to compare"),
    "dim": ("config", int, "width of the residual stream (default 128)"),
    "layers": ("config", int, "blocks (default 6)"),
    "heads": ("config", int, "query heads (default 4)"),
    "context": ("config", int, "bytes of a training window (default 256)"),
    "window": ("config", int, "bytes that --attention window sees (default 64)"),
    "steps": ("settings", int, "training steps (default 1200)"),
    "batch": ("settings", int, "windows a step (default 8)"),
    "rate": ("settings", float, "peak learning rate (default 0.002)"),
    "seed": ("settings", int, "of the weights and the batches (default 0)"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a small decoder on a text, and measure it",
        description="Train a byte-level decoder on a text and print its bits per byte on the tenth that is held out. "
        "With the same settings, machine and threads the result is the same to the bit, interrupted or not.",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a file (default: Python's language reference)")
    for name, (_, kind, told) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)
    parser.add_argument("--tied", action="store_true", default=None, help="use the embedding as the head, transposed")
    parser.add_argument("--out", metavar="FILE", help=f"where checkpoints go, as safetensors (default {OUT})")
    parser.add_argument("--export", metavar="FILE", help="also write the trained weights alone, in bfloat16")
    parser.add_argument("--resume", metavar="FILE", help="continue a checkpoint, with the settings it was begun with")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints (default 250)")
    parser.add_argument("--stop", type=int, metavar="STEP", help="stop after this step, to be resumed later")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: PyTorch's number)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `qkv train` and return the exit code."""
    for name in ("every", "stop", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ArgumentError.of("qkv train", f"--{name} is >= 1", f"--{name} {value}", "Leave it out")
    out = Path(args.out or args.resume or OUT)
    checkpoint.check_target(out, may_exist=args.resume is not None and out == Path(args.resume))
    if args.export is not None:
        checkpoint.check_target(Path(args.export), may_exist=False)
    with threads(args.threads):
        current = _prepare(args)
        print(_opening(current), file=sys.stderr)
        steps = min(args.stop or current.settings.steps, current.settings.steps)
        with Progress("qkv train") as progress:
            current.go(steps, args.every, _Teller(progress).hear, save=out)
        if not current.record.held:
            current.evaluate()
        print(_result(current, out))
        if args.export is not None:
            current.export(Path(args.export))
            print(f"{'weights alone':<28} {args.export}")
    return 0


def _prepare(args: argparse.Namespace) -> Run:
    """Begin a run as the options say, or continue one."""
    given = {"config": {}, "settings": {}}  # type: dict[str, dict[str, object]]
    for name, (part, _, _) in {**OPTIONS, "tied": ("config", bool, "")}.items():
        if getattr(args, name) is not None:
            given[part][name] = getattr(args, name)
    if args.resume is None:
        config = Config(**given["config"])  # type: ignore[arg-type]
        settings = Settings(**given["settings"])  # type: ignore[arg-type]
        return Run(config, settings, read_corpus(args.text, config.context))
    named = [f"--{name}" for part in given.values() for name in part]
    if named:
        rule, fix = "a checkpoint brings its own settings", f"Leave out {', '.join(named)}, or begin a new run"
        raise ArgumentError.of("qkv train", rule, f"--resume and {', '.join(named)}", fix)
    saved = checkpoint.load(args.resume)
    return resumed(saved, read_corpus(args.text, configured(saved)[0].context))


def _opening(current: Run) -> str:
    corpus, config = current.corpus, current.config
    weights = sum(p.numel() for p in current.model.parameters())
    begun = f", continued at step {current.step:,}" if current.step else ""
    return (
        f"qkv train: {corpus.name}, {len(corpus.train):,} bytes, and {len(corpus.held):,} held out ({SPLIT})\n"
        f"qkv train: {config.attention}, {config.layers} layers of {config.dim}, {weights:,} weights, "
        f"{current.settings.steps:,} steps of {current.settings.batch} × {config.context} bytes{begun}"
    )


def _result(current: Run, out: Path) -> str:
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


class _Teller:
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
