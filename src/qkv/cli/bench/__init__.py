"""`qkv bench`: qkv against the fastest other libraries on this machine; the measurements are `qkv.bench`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module

from qkv.backends.isas import SHARED
from qkv.cli.bench import options

_HELD = {
    "ATEN_CPU_CAPABILITY": SHARED,
    "ONEDNN_MAX_CPU_ISA": SHARED.upper(),
    "MKL_ENABLE_INSTRUCTIONS": SHARED.upper(),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv bench` to the command line."""
    parser = subparsers.add_parser(
        "bench", help="time qkv against the other libraries on this machine", description=options.DESCRIPTION
    )
    options.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `qkv bench`; the exit code is 1 if a result of ours was wrong, else 0, fast or not."""
    if args.isa == SHARED and any(os.environ.get(key) != value for key, value in _HELD.items()):
        return _again_held(args)
    options.check(args)
    module = {"calls": "calls", "training": "calls", "caches": "caches"}.get(options.kind(args), "rows")
    return int(import_module(f"qkv.cli.bench.{module}").run(args))


def _again_held(args: argparse.Namespace) -> int:
    """The libraries read these variables when they load, so the run begins anew with them set."""
    given: list[str] = []
    for key, value in vars(args).items():
        if key in ("run", "command") or value in (None, False):
            continue
        given += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [sys.executable, "-m", "qkv.cli", "bench", *given]
    return subprocess.run(command, env={**os.environ, **_HELD}, check=False).returncode
