"""`qkv bench --sparse`: whether a mask's time follows what it shows."""

from __future__ import annotations

import argparse
import re
import time

import torch

from qkv.bench import machine, report, results, sparse
from qkv.bench.budget import Budget
from qkv.cli.progress import Progress


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code is 1 if a result of ours was wrong, else 0, fast or not."""
    which = [call for call in sparse.calls(quick=args.quick) if not args.only or re.search(args.only, call.name)]
    if args.list:
        print("\n".join(call.name for call in which))
        return 0
    started = time.perf_counter()
    with machine.threads(args.threads) as threads:
        about = machine.describe(threads, machine.last_level_cache())
        if args.json:
            results.check(args.json, "sparse", about, args.isa)
        print(f"{about['cpu']}, {threads} threads, torch {torch.__version__}", flush=True)
        seconds = args.seconds or (sparse.QUICK_SECONDS if args.quick else sparse.SECONDS)
        budget = Budget(seconds, len(which), time.perf_counter)
        backend = args.backend or (f"cpu:{args.isa}" if args.isa else "cpu")
        flex = not args.quick and not args.isa  # its generated code cannot be held to an instruction set
        with Progress("qkv bench --sparse") as progress:
            found = sparse.measure(progress.say, progress.show, budget, backend=backend, which=which, flex=flex)
            if budget.said():
                progress.show(f"\n{budget.said()}")
    if args.json:
        settings = {"sparse": True, "quick": args.quick, "isa": args.isa, "backend": args.backend}
        data = {"sparse": sparse.as_data(found)}
        took = time.perf_counter() - started
        results.write(args.json, "sparse", report.document([], about, {}, settings, took, data))
        print(f"\nwrote {args.json}")
    return 0 if all(one.agrees for one in found) else 1
