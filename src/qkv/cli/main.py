"""The command line: `qkv COMMAND …`; a command's module is imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from qkv.errors import QKVError

# command -> what `qkv --help` says of it; the module is qkv.cli.<command>
COMMANDS = {
    "demo": "answer a question from a text by attention, and show every step",
    "why": "settle a question about attention by an experiment",
    "see": "look at what a call, or a head of a model, attends to",
    "plan": "say what a call of given shapes would run and cost",
    "mask": "draw a mask written as an expression",
    "doctor": "say what was detected here, and which path calls take",
    "train": "train a small decoder on a text, and measure it",
    "bench": "time qkv against the other libraries on this machine",
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen command's module is imported, the others are named for the help text."""
    from qkv import __version__

    parser = argparse.ArgumentParser(prog="qkv", description="Exact attention for PyTorch: see it, draw it, time it.")
    parser.add_argument("--version", action="version", version=f"qkv {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == chosen:
            importlib.import_module(f"qkv.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 for a request that cannot be met (with the reason)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):  # a console without unicode shows "?" rather than stopping half way
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{message}\n"  # without source lines
    try:
        args = build_parser(chosen).parse_args(argv)
        return int(args.run(args))
    except QKVError as error:
        print(f"qkv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qkv: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough; keep Python quiet about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        warnings.formatwarning = usual
