"""`qkv bench --insight`: what it costs to look at a call."""

from __future__ import annotations

import argparse
import re
import time

import torch

from qkv.bench import looking, machine, report, results
from qkv.bench.budget import Budget
from qkv.cli.progress import Progress


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code is 1 if a statistic of ours was wrong, else 0, fast or not."""
    which = [call for call in looking.calls(quick=args.quick) if not args.only or re.search(args.only, call.name)]
    if args.list:
        print("\n".join(call.name for call in which))
        return 0
    started = time.perf_counter()
    with machine.threads(args.threads) as threads:
        about = machine.describe(threads, machine.last_level_cache())
        if args.json:
            results.check(args.json, "insight", about, args.isa)
        print(f"{about['cpu']}, {threads} threads, torch {torch.__version__}", flush=True)
        seconds = args.seconds or (looking.QUICK_SECONDS if args.quick else looking.SECONDS)
        budget = Budget(seconds, len(which), time.perf_counter)
        backend = args.backend or (f"cpu:{args.isa}" if args.isa else "cpu")
        with Progress("qkv bench --insight") as progress:
            found = looking.measure(progress.say, progress.show, budget, backend=backend, which=which)
            if budget.said():
                progress.show(f"\n{budget.said()}")
    if args.json:
        settings = {"insight": True, "quick": args.quick, "isa": args.isa, "backend": args.backend}
        data = {"insight": looking.as_data(found)}
        results.write(
            args.json, "insight", report.document([], about, {}, settings, time.perf_counter() - started, data)
        )
        print(f"\nwrote {args.json}")
    return 0 if all(one.agrees for one in found) else 1
