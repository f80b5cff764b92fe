"""Small decoders that see everything, a window, BigBird's blocks, or the blocks that each query selects.

    python benchmarks/sparse_study.py train [TEXT] [--seeds 0 1 2] [--threads 1] [--kinds window bigbird]
    python benchmarks/sparse_study.py steps [--threads 2]
    python benchmarks/sparse_study.py report [--json benchmarks/results/sparse_study.jsonl]

The runs have the same weights at the start, the same text, order of batches and number of steps. `train` leaves a JSON
file in --results as each run ends and makes none again that is there; `steps` times one training step of every kind at
growing contexts, in turn; `report` prints the tables of docs/sparse.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from qkv.bench.results import rounded
from qkv.lm.comparison import step_times
from qkv.lm.data import read_corpus
from qkv.lm.decoder import Config
from qkv.lm.training import Run, Settings

BASE = Config(dim=128, layers=3, heads=4, context=2048, window=256)
KINDS = {"full": "mha", "window": "window", "BigBird-like": "bigbird", "selected": "selected"}
STEPS, BATCH, EVERY = 300, 2, 50
CONTEXTS = (2048, 4096, 8192, 16384)


def train(args: argparse.Namespace) -> None:
    """Make the runs that are missing."""
    corpus = read_corpus(args.text, BASE.context)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.kinds:
            path = args.results / f"{name}.{seed}.json"
            if path.exists():
                continue
            config = replace(BASE, attention=KINDS[name])
            run = Run(config, Settings(steps=args.steps, batch=BATCH, seed=seed), corpus)
            run.evaluate()
            run.go(args.steps, EVERY, lambda _: None)
            found = {
                "kind": name, "seed": seed, "text": corpus.name, "sha256": corpus.sha256, "config": asdict(config),
                "settings": asdict(run.settings), "bits": run.record.held[-1][1], "held": run.record.held,
                "step_ms": run.record.step_time(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            }  # fmt: skip
            path.write_text(json.dumps(found), encoding="utf-8")
            print(f"{path.name}: {found['bits']:.4f} bits per byte", file=sys.stderr, flush=True)


def steps(args: argparse.Namespace) -> None:
    """Time a step of each kind in turn, one sequence at each context."""
    args.results.mkdir(parents=True, exist_ok=True)
    for context in CONTEXTS:
        configs = {name: replace(BASE, attention=kind, context=context) for name, kind in KINDS.items()}
        found = {"context": context, "steps": step_times(configs, 1, args.rounds), "threads": torch.get_num_threads()}
        (args.results / f"steps.{context}.json").write_text(json.dumps(found), encoding="utf-8")
        print(f"{context} bytes: {', '.join(tables([found])[2:])}", file=sys.stderr, flush=True)


def report(args: argparse.Namespace) -> None:
    """Print the tables; with --json also gather what they are made of."""
    if args.results.is_file():
        found = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    else:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.results.glob("*.json"))]
    if args.json:
        lines = (json.dumps(rounded(one, 7)) for one in found)
        args.json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print("\n".join(tables(found)))


def tables(found: list[dict[str, Any]]) -> list[str]:
    """Bits per byte of the runs, and milliseconds of a step by context."""
    runs = [one for one in found if "kind" in one]
    timed = {one["context"]: one["steps"] for one in sorted((x for x in found if "context" in x), key=_context)}
    head = [f"{context:,}" for context in timed]
    lines = [
        f"| attention | bits per byte, held out | {' | '.join(f'ms a step at {name}' for name in head)} |",
        "|---|---|" + "---|" * len(head),
    ]
    for name in KINDS:
        bits = sorted(one["bits"] for one in runs if one["kind"] == name)
        some = "not run"
        if bits:
            some = f"{statistics.fmean(bits):.3f} ({bits[0]:.3f} to {bits[-1]:.3f}, {len(bits)} seeds)"
        times = [
            f"{statistics.median(step[name]):.0f} ({statistics.median(map(truediv, step['full'], step[name])):.2f}×)"
            for step in timed.values()
        ]
        lines.append(f"| {' | '.join([name, some, *times])} |")
    return lines


def _context(one: dict[str, Any]) -> int:
    return int(one["context"])


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "steps", "report"))
    parser.add_argument("text", nargs="?", help="a file (default: Python's language reference)")
    parser.add_argument("--results", type=Path, default=Path("build/sparse_study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    {"train": train, "steps": steps, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
