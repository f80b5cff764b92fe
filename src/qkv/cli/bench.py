"""`qkv bench`: ours against the fastest other libraries on this machine: checked, interleaved, told with the limit."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkv.errors import ArgumentError, describe

if TYPE_CHECKING:
    from qkv.bench.budget import Budget
    from qkv.bench.peers import Roster
    from qkv.bench.progress import Progress
    from qkv.bench.rows import Row
    from qkv.bench.runner import Result, Runner

_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_ISAS = ("avx512bf16", "avx512", "avx2", "portable")
_QUICK_SECONDS = 70.0
# Where --seconds is not given: of the rows, and of what a run measures besides. Given, it is divided in the same way.
_SECONDS = {"rows": 300.0, "memory": 60.0, "decoder": 60.0, "sweep": 200.0}
_MOST_SECONDS = 12.0  # a row, however much time is left
# Compiled for the first time, FlexAttention takes longer than a quick run has.
_QUICK_PEERS = ("sdpa", "matmuls", "openvino", "onnxruntime", "ggml")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv bench` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="time qkv against the other libraries on this machine",
        description="Time attention in qkv, PyTorch, and OpenVINO, ONNX Runtime, JAX and llama.cpp's ggml where "
        "installed (pip install 'qkv[bench]' llama-cpp-python). Results are checked against float64 first, calls are "
        "interleaved, ratios are medians over rounds. About six minutes; --quick about one. With --training: forward "
        "and backward together against PyTorch's attention, gradients checked first, and the memory of a long step.",
    )
    parser.add_argument("--quick", action="store_true", help="the main rows and fewer peers, under 90 seconds")
    parser.add_argument(
        "--training", action="store_true", help="forward + backward against PyTorch, instead of forward"
    )
    parser.add_argument(
        "--models",
        action="store_true",
        help="decoding in a Hugging Face model instead, about ten minutes (--quick: two)",
    )
    parser.add_argument(
        "--caches",
        action="store_true",
        help="decoding on pages, shared prefixes, 8-bit storage and a cache's books instead, about four minutes",
    )
    parser.add_argument("--only", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--peers", metavar="NAMES", help="these peers only, such as sdpa,openvino")
    parser.add_argument("--list", action="store_true", help="name the rows and their peers, and measure nothing")
    parser.add_argument("--sweep", action="store_true", help="also 200 shapes against PyTorch; any slower is listed")
    parser.add_argument("--mla", action="store_true", help="also latent decode with 16 to 64 heads and longer caches")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of a call")
    parser.add_argument("--isa", choices=_ISAS, help="hold qkv to an instruction set; avx2 holds the peers too")
    parser.add_argument("--backend", help="a backend of qkv by name (default: the one that qkv.plan() chooses)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every contender (default: PyTorch's)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="time for the whole run, kept within a fifth; what has no room is left out and named "
        "(default: 360, --quick 70, --caches 200, --models 600)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw the README's chart")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the README's table, between its marks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `qkv bench`; the exit code is 1 if a result of ours was wrong, else 0, fast or not."""
    if args.isa == "avx2" and any(os.environ.get(key) != value for key, value in _AVX2.items()):
        return _again_as_avx2(args)
    _check(args)
    if args.models:
        from qkv.bench import models

        return models.run(args)
    if args.caches:
        from qkv.bench import caches

        return caches.run(args)
    import torch

    from qkv.bench import machine, report
    from qkv.bench.budget import Budget
    from qkv.bench.peers import Roster, Setup
    from qkv.bench.progress import Progress
    from qkv.bench.runner import Runner

    cache_bytes = machine.last_level_cache()
    rows = _choose(args, cache_bytes)
    if args.list:
        for row in rows:
            print(f"{row.name:<42} {', '.join(row.peers)}")
        return 0
    before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    threads, isa = torch.get_num_threads(), args.isa
    backend = args.backend or (f"cpu:{isa}" if isa else None)
    about = machine.describe(threads, cache_bytes)
    print(
        f"{about['cpu']}, {threads} threads, last-level cache {cache_bytes >> 20} MB, torch {torch.__version__}\n",
        flush=True,
    )
    roster = Roster(Setup(threads, "avx2" if isa == "avx2" else None), backend, _peers(args))
    settings = {"isa": isa, "backend": backend, "quick": args.quick, "only": args.only, "training": args.training}
    columns = report.columns(row.name for row in rows)
    shares = _shares(args)
    try:
        with Progress("qkv bench") as progress:

            def save(so_far: list[Result], extra: dict[str, Any] | None = None) -> dict[str, Any]:
                took = time.perf_counter() - started
                return _save(args, report.document(so_far, about, roster.versions, settings, took, extra))

            def done(so_far: list[Result]) -> None:
                progress.show(report.lines(so_far[-1], columns))
                save(so_far)  # a library that takes the process down must not take the numbers with it

            progress.show(columns.head)
            budget = Budget(shares["rows"], len(rows), time.perf_counter)
            results = _measure(rows, Runner(roster, cache_bytes), budget, progress.say, done)
            progress.show("\n" + "\n".join(filter(None, (report.summary(results), budget.said()))))
            extras = _extras(args, roster, threads, backend, progress, shares)
    finally:
        torch.set_num_threads(before)
    whole = save(results, extras["data"])
    print(f"\n{whole['seconds']:.0f} s")
    _tell(args, whole)
    wrong = [r for r in results if not r.timings["qkv"].agrees or r.timings["qkv"].unavailable]
    return 1 if wrong or extras["wrong"] else 0


def _shares(args: argparse.Namespace) -> dict[str, float]:
    """The seconds of each part of the run that is asked for."""
    whole = not (args.quick or args.only)
    parts = {
        "rows": True,
        "memory": whole and not args.no_memory,
        "decoder": whole and args.training,
        "sweep": args.sweep,
    }
    usual = {name: _SECONDS[name] for name, asked in parts.items() if asked}
    if args.quick:
        usual["rows"] = _QUICK_SECONDS
    given = args.seconds / sum(usual.values()) if args.seconds else 1.0
    return {name: seconds * given for name, seconds in usual.items()}


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise ArgumentError(
            describe("qkv bench", "threads must be at least 1", f"--threads {args.threads}", "Use --threads 2")
        )
    if args.isa and args.backend:
        raise ArgumentError(
            describe(
                "qkv bench", "an instruction set is part of the backend's name", "both", f"Use --backend cpu:{args.isa}"
            )
        )
    calls = "sweep mla chart markdown"  # options of the forward calls
    if args.models:
        other = f"training caches only peers list isa backend {calls}"
        _alone(args, "--models measures decoding in a model only", other, "of single calls")
    if args.caches:
        _alone(args, "--caches measures caches only", f"training peers no_memory {calls}", "of other calls")
    if args.training:
        _alone(args, "--training measures forward + backward only", calls, "of forward calls")
    try:
        re.compile(args.only or "")
    except re.error as error:
        raise ArgumentError(
            describe("qkv bench", "--only is a regular expression", repr(args.only), f"{error}")
        ) from None
    for path in (args.json, args.chart, args.markdown):
        if path and not path.resolve().parent.is_dir():
            raise ArgumentError(describe("qkv bench", "the folder must exist", str(path), "Make it first"))


def _alone(args: argparse.Namespace, rule: str, other: str, what: str) -> None:
    others = [f"--{name.replace('_', '-')}" for name in other.split() if getattr(args, name)]
    if others:
        raise ArgumentError(describe("qkv bench", rule, f"{', '.join(others)}, {what}", "Make two runs"))


def _peers(args: argparse.Namespace) -> set[str] | None:
    from qkv.bench.peers import Roster

    if args.peers is None:
        return set(_QUICK_PEERS) if args.quick else None
    names = {name.strip() for name in args.peers.split(",") if name.strip()}
    unknown = names - Roster.KNOWN.keys()
    if unknown:
        fix = f"Choose from {', '.join(Roster.KNOWN)}"
        raise ArgumentError(describe("qkv bench", "peers go by their names", ", ".join(sorted(unknown)), fix))
    return names


def _choose(args: argparse.Namespace, cache_bytes: int) -> list[Row]:
    from qkv.bench.peers import Roster
    from qkv.bench.rows import all_rows, training_rows

    rows = training_rows() if args.training else all_rows(cache_bytes, more_mla=args.mla)
    if args.isa == "avx2":
        rows = [replace(row, targets=row.avx2) for row in rows if row.avx2 is not None]
    if args.quick:
        absent = set() if args.peers else Roster.KNOWN.keys() - set(_QUICK_PEERS)
        rows = [
            replace(row, targets=tuple(t for t in row.targets if t.against not in absent)) for row in rows if row.quick
        ]
    if args.only:
        rows = [row for row in rows if re.search(args.only, row.name)]
    if not rows and not args.sweep:
        raise ArgumentError(
            describe("qkv bench", "no row has such a name", f"--only {args.only}", "See qkv bench --list")
        )
    return rows


def _measure(
    rows: list[Row],
    runner: Runner,
    budget: Budget,
    say: Callable[[str], None],
    done: Callable[[list[Result]], object],
) -> list[Result]:
    """Every row gets an equal share of what time is left, so a slow one shortens all later ones a little."""
    results: list[Result] = []
    for number, row in enumerate(rows):
        if not budget.fits:
            budget.leave_out(row.name)
            continue
        say(f"{number + 1} of {len(rows)}, {row.name}")
        seconds = budget.rounds(_MOST_SECONDS)
        results.append(runner.run(row, seconds, budget.until))
        budget.done()
        done(results)
    return results


def _extras(
    args: argparse.Namespace,
    roster: Roster,
    threads: int,
    backend: str | None,
    progress: Progress,
    shares: dict[str, float],
) -> dict[str, Any]:
    from qkv.bench import example, memory, sweep

    found: dict[str, Any] = {"data": {}, "wrong": False}
    if "memory" in shares:
        cases = memory.TRAINING if args.training else memory.CASES
        measured = memory.measure_all(cases, threads, backend, shares["memory"], progress.say)
        progress.show("\n" + memory.summary(measured, training=args.training))
        found["data"]["memory"] = memory.as_data(measured)
        found["wrong"] = any(m.problem.startswith(memory.WRONG) for m in measured)
    if "decoder" in shares:
        steps = example.measure(progress.say, seconds=shares["decoder"])
        progress.show("\n" + example.summary(steps))
        found["data"]["decoder"] = example.as_data(steps)
    if "sweep" in shares:
        count = 40 if args.quick else 200
        swept = sweep.sweep(roster, count=count, seconds=shares["sweep"], say=progress.say)
        progress.show("\n" + sweep.summary(swept, count))
        found["data"]["sweep"] = sweep.as_data(swept)
        found["wrong"] |= any(not shape.agrees for shape in swept)
    return found


def _save(args: argparse.Namespace, whole: dict[str, Any]) -> dict[str, Any]:
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def _tell(args: argparse.Namespace, whole: dict[str, Any]) -> None:
    from qkv.bench import chart, markdown

    if args.json:
        print(f"wrote {args.json}")
    if args.chart:
        args.chart.write_text(chart.svg(whole), encoding="utf-8")
        print(f"drew {args.chart}")
    if args.markdown:
        markdown.write(args.markdown, whole)
        print(f"wrote {args.markdown}")


def _again_as_avx2(args: argparse.Namespace) -> int:
    """The libraries read these variables when they load, so the run begins anew with them set."""
    options: list[str] = []
    for key, value in vars(args).items():
        if key in ("run", "command") or value in (None, False):
            continue
        options += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [sys.executable, "-m", "qkv.cli.bench", *options]
    return subprocess.run(command, env={**os.environ, **_AVX2}, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m qkv.cli.bench`: the same without the other commands."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args(["bench", *(sys.argv[1:] if argv is None else argv)])
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
