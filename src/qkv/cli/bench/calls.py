"""`qkv bench` and `qkv bench --training`: rows of calls, and what is measured besides."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from typing import Any

from qkv.backends.isas import SHARED
from qkv.bench import machine, readme, report, session
from qkv.bench.budget import Budget
from qkv.bench.calls import all_rows
from qkv.bench.cases import Row
from qkv.bench.peers import Roster
from qkv.bench.peers.base import Setup
from qkv.bench.race import Result, Runner
from qkv.bench.training import training_rows
from qkv.cli.bench.begun import begun
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError

# Compiled for the first time, FlexAttention takes longer than a quick run has.
QUICK_PEERS = ("sdpa", "matmuls", "openvino", "onnxruntime", "ggml")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code is 1 if a result of ours was wrong."""
    cache_bytes = machine.last_level_cache()
    rows = _choose(args, cache_bytes)
    if args.list:
        for row in rows:
            print(f"{row.name:<42} {', '.join(row.peers)}")
        return 0
    with begun(args) as job:
        print(flush=True)
        roster = Roster(Setup(job.threads, SHARED if args.isa == SHARED else None), job.backend, _peers(args))
        settings = {"isa": args.isa, "backend": job.backend, "quick": args.quick, "only": args.only}
        settings["training"] = args.training

        def save(so_far: list[Result], extra: dict[str, Any] | None = None) -> dict[str, Any]:
            return job.write(settings, extra, roster.versions, so_far)

        def done(so_far: list[Result]) -> None:
            progress.show(report.lines(so_far[-1], columns))
            save(so_far)  # a library that takes the process down must not take the numbers with it

        columns, shares = report.columns(row.name for row in rows), seconds(args)
        with Progress("qkv bench") as progress:
            progress.show(columns.head)
            budget = Budget(shares["rows"], len(rows), time.perf_counter)
            found = session.measure_rows(rows, Runner(roster, cache_bytes), budget, progress.say, done)
            progress.show("\n" + "\n".join(filter(None, (report.summary(found), budget.said()))))
            how: dict[str, Any] = {"backward": args.training, "quick": args.quick}
            extras = session.measure_extras(roster, shares, **how, say=progress.say, show=progress.show)
    whole = save(found, extras.data)
    print(f"\n{whole['seconds']:.0f} s")
    _tell(args, whole)
    wrong = [r for r in found if not r.timings["qkv"].agrees or r.timings["qkv"].unavailable]
    return 1 if wrong or extras.wrong else 0


def seconds(args: argparse.Namespace) -> dict[str, float]:
    """The seconds of each part of the run that the options ask for."""
    whole = not (args.quick or args.only)
    parts = {"rows": True, "memory": whole and not args.no_memory, "decoder": whole and args.training}
    return session.shares({**parts, "sweep": args.sweep}, quick=args.quick, seconds=args.seconds)


def _peers(args: argparse.Namespace) -> set[str] | None:
    if args.peers is None:
        return set(QUICK_PEERS) if args.quick else None
    names = {name.strip() for name in args.peers.split(",") if name.strip()}
    unknown = names - Roster.KNOWN.keys()
    if unknown:
        fix = f"Choose from {', '.join(Roster.KNOWN)}"
        raise ArgumentError.of("qkv bench", "peers go by their names", ", ".join(sorted(unknown)), fix)
    return names


def _choose(args: argparse.Namespace, cache_bytes: int) -> list[Row]:
    rows = training_rows() if args.training else all_rows(cache_bytes, more_mla=args.mla)
    if args.isa == SHARED:
        rows = [replace(row, targets=row.held) for row in rows]
    if args.quick:
        absent = set() if args.peers else Roster.KNOWN.keys() - set(QUICK_PEERS)
        quick = [row for row in rows if row.quick]
        rows = [replace(row, targets=tuple(t for t in row.targets if t.against not in absent)) for row in quick]
    if args.only:
        rows = [row for row in rows if re.search(args.only, row.name)]
    if not rows and not args.sweep:
        raise ArgumentError.of("qkv bench", "no row has such a name", f"--only {args.only}", "See qkv bench --list")
    return rows


def _tell(args: argparse.Namespace, whole: dict[str, Any]) -> None:
    if args.json:
        print(f"wrote {args.json}")
    if args.chart:
        args.chart.write_text(readme.svg(whole), encoding="utf-8")
        print(f"drew {args.chart}")
    if args.markdown:
        readme.write(args.markdown, [whole])
        print(f"wrote {args.markdown}")
