"""`qkv bench --models`: decoding in a Hugging Face model."""

from __future__ import annotations

import argparse
import time
from importlib import metadata

import torch

from qkv.bench import machine, models, report, results
from qkv.bench.budget import Budget
from qkv.cli.progress import Progress


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code is 1 if the logits of ours were wrong, else 0, fast or not."""
    started = time.perf_counter()
    with machine.threads(args.threads) as threads:
        about = machine.describe(threads, machine.last_level_cache())
        if args.json:
            results.check(args.json, "models", about, None)
        print(f"{about['cpu']}, {threads} threads, torch {torch.__version__}", flush=True)
        contexts, rounds = ((512, 8192), 3) if args.quick else (models.CONTEXTS, 7)
        seconds = args.seconds or (models.QUICK_SECONDS if args.quick else models.SECONDS)
        budget = Budget(seconds, len(contexts), time.perf_counter)
        with Progress("qkv bench --models") as progress:
            found = models.measure(progress.say, progress.show, budget, contexts=contexts, rounds=rounds)
            if budget.said():
                progress.show(f"\n{budget.said()}")
    if args.json:
        versions = {"transformers": metadata.version("transformers")}
        settings, spent = {"models": True, "quick": args.quick}, time.perf_counter() - started
        data = {"models": models.as_data(found)}
        results.write(args.json, "models", report.document([], about, versions, settings, spent, data))
        print(f"\nwrote {args.json}")
    return 0 if all(one.agrees for one in found) else 1
