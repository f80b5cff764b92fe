"""`qkv train`: a small byte-level decoder trained on a text, with progress, checkpoints and a measured result."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qkv.bench.machine import threads
from qkv.cli.progress import Progress
from qkv.cli.trained import Teller, opening, result
from qkv.errors import ArgumentError
from qkv.lm import checkpoint, parts
from qkv.lm.data import read_corpus
from qkv.lm.decoder import Config
from qkv.lm.training import Run, Settings, configured, resumed

if TYPE_CHECKING:
    from qkv.lm.ranks import Ranks

OUT, PARTS = "decoder.safetensors", "decoder.checkpoint"  # of one process, and the directory of several
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
        "With the same settings, machine and threads the result is the same to the bit, interrupted or not. "
        "Started by torchrun, ranks divide the batch among them, and windows with --context-parallel.",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a file (default: Python's language reference)")
    for name, (_, kind, told) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)
    parser.add_argument("--tied", action="store_true", default=None, help="use the embedding as the head, transposed")
    parser.add_argument(
        "--out", metavar="FILE", help=f"where checkpoints go, as safetensors (default {OUT}; ranks: {PARTS}/)"
    )
    parser.add_argument("--export", metavar="FILE", help="also write the trained weights alone, in bfloat16")
    parser.add_argument("--resume", metavar="FILE", help="continue a checkpoint, with the settings it was begun with")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints (default 250)")
    parser.add_argument("--stop", type=int, metavar="STEP", help="stop after this step, to be resumed later")
    parser.add_argument(
        "--context-parallel",
        type=int,
        metavar="N",
        help="under torchrun: ranks that hold a window together (default 1)",
    )
    parser.add_argument("--threads", type=int, help="threads to compute with (default: PyTorch's number)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `qkv train` and return the exit code."""
    for name in ("every", "stop", "threads", "context_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise ArgumentError.of("qkv train", f"{option} is >= 1", f"{option} {value}", "Leave it out")
    if args.context_parallel is None and not {"RANK", "WORLD_SIZE"} & set(os.environ):
        _train(args, None)
        return 0
    from qkv.lm.ranks import joined  # what a process alone has no use for

    with joined(args.context_parallel) as ranks:
        _train(args, ranks)
    return 0


def _train(args: argparse.Namespace, ranks: Ranks | None) -> None:
    first = ranks is None or ranks.first  # the one that speaks
    out = Path(args.out or args.resume or (OUT if ranks is None else PARTS))
    _check_targets(args, out, ranks)
    with threads(args.threads):
        current = _prepare(args, ranks)
        if first:
            print(opening(current), file=sys.stderr)
        steps = min(args.stop or current.settings.steps, current.settings.steps)
        with Progress("qkv train") as progress:
            current.go(steps, args.every, Teller(progress).hear if first else _quiet, save=out)
        if not current.record.held:
            current.evaluate()
        if first:
            print(result(current, out))
        if args.export is not None:
            current.export(Path(args.export))
            if first:
                print(f"{'weights alone':<28} {args.export}")


def _quiet(current: Run) -> None:
    """What the other ranks say."""


def _check_targets(args: argparse.Namespace, out: Path, ranks: Ranks | None) -> None:
    may_exist = args.resume is not None and out == Path(args.resume)

    def check() -> None:
        in_parts = ranks is not None or (may_exist and out.is_dir())
        (parts if in_parts else checkpoint).check_target(out, may_exist)
        if args.export is not None:
            checkpoint.check_target(Path(args.export), may_exist=False)

    check() if ranks is None else ranks.together(check)


def _prepare(args: argparse.Namespace, ranks: Ranks | None) -> Run:
    """Begin a run as the options say, or continue one."""
    given = {"config": {}, "settings": {}}  # type: dict[str, dict[str, object]]
    for name, (part, _, _) in {**OPTIONS, "tied": ("config", bool, "")}.items():
        if getattr(args, name) is not None:
            given[part][name] = getattr(args, name)
    named = [f"--{name}" for part in given.values() for name in part]
    if args.resume is not None and named:
        rule, fix = "a checkpoint brings its own settings", f"Leave out {', '.join(named)}, or begin a new run"
        raise ArgumentError.of("qkv train", rule, f"--resume and {', '.join(named)}", fix)
    read = partial(read_corpus, args.text)
    if args.resume is None:
        config = Config(**given["config"])  # type: ignore[arg-type]
        settings = Settings(**given["settings"])  # type: ignore[arg-type]
        return Run(config, settings, read(config.context)) if ranks is None else ranks.begin(config, settings, read)
    if ranks is not None:
        return ranks.resume(Path(args.resume), read)
    saved = checkpoint.load(args.resume)
    return resumed(saved, read(configured(saved)[0].context))
