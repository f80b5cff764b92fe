"""What every run of `qkv bench` begins with, and how it writes what was found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qkv.bench import machine, report, results
from qkv.bench.race import Result
from qkv.cli.bench.options import kind


@dataclass(frozen=True)
class Job:
    """A run that has begun: of which options, on what, since when."""

    args: argparse.Namespace
    threads: int
    cache_bytes: int
    about: Mapping[str, Any]
    started: float

    @property
    def backend(self) -> str | None:
        """The backend that the options name, if any."""
        found: str | None = self.args.backend or (f"cpu:{self.args.isa}" if self.args.isa else None)
        return found

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.started

    def write(
        self,
        settings: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        rows: Sequence[Result] = (),
    ) -> dict[str, Any]:
        """The run as plain data, which is put into the file that --json names, if any."""
        whole = report.document(rows, self.about, versions or {}, settings, self.spent, data)
        if self.args.json:
            results.write(self.args.json, kind(self.args), whole)
        return whole


@contextmanager
def begun(args: argparse.Namespace) -> Iterator[Job]:
    """Hold the threads, refuse a file of results of another processor, and name this one."""
    started, cache_bytes = time.perf_counter(), machine.last_level_cache()
    with machine.threads(args.threads) as threads:
        about = machine.describe(threads, cache_bytes)
        if args.json:
            results.check(args.json, kind(args), about, args.isa)
        size = f"last-level cache {cache_bytes >> 20} MB"
        print(f"{about['cpu']}, {threads} threads, {size}, torch {torch.__version__}", flush=True)
        yield Job(args, threads, cache_bytes, about, started)
