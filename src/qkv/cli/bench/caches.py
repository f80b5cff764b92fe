"""`qkv bench --caches`: decoding on pages, shared prefixes, 8-bit storage, and a cache's books."""

from __future__ import annotations

import argparse
import os
import re

from qkv.bench import caches
from qkv.bench.budget import Budget
from qkv.bench.caches.contest import Bench
from qkv.cli.bench.begun import begun
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code is 1 if a result was wrong or a row failed, else 0, fast or not."""
    chosen = caches.contests(quick=args.quick)
    if args.only:
        chosen = {name: contest for name, contest in chosen.items() if re.search(args.only, name)}
    if not chosen:
        fix = "See qkv bench --caches --list"
        raise ArgumentError.of("qkv bench --caches", "no row has such a name", f"--only {args.only}", fix)
    if args.list:
        print("\n".join(chosen))
        return 0
    with begun(args) as job:
        bench = Bench(job.cache_bytes, job.backend)
        seconds = args.seconds or (caches.QUICK_SECONDS if args.quick else caches.SECONDS)
        with Progress("qkv bench --caches") as progress:
            progress.show("\n" + caches.COLUMNS.head)
            budget = Budget(seconds, len(chosen), bench.clock.now)
            lines, took = caches.measure(
                chosen, bench, budget, progress.say, lambda line: progress.show(caches.line_text(line))
            )
    policy = os.environ.get("OMP_WAIT_POLICY")
    said = [caches.summary(lines), budget.said(), caches.waiting(policy), f"{job.spent:.0f} s"]
    print("\n" + "\n\n".join(text for text in said if text))
    settings = {"caches": True, "quick": args.quick, "only": args.only, "isa": args.isa, "backend": bench.backend}
    settings |= {"omp_wait_policy": policy, "seconds": {name: round(s, 1) for name, s in took.items()}}
    job.write(settings, {"caches": caches.as_data(lines)})
    if args.json:
        print(f"\nwrote {args.json}")
    return 1 if any(line.problem for line in lines) else 0
