"""`qkv why`: the experiments of `qkv.why`, printed."""

from __future__ import annotations

import argparse

from qkv.insight.terminal import table
from qkv.insight.why import TOPICS, why


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv why` to the command line."""
    parser = subparsers.add_parser(
        "why",
        help="settle a question about attention by an experiment",
        description="Run a small experiment that settles a question about attention. Without a topic, list them.",
    )
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the experiment's random numbers (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the experiment, or the list of topics; return the exit code."""
    if args.topic is None:
        print(table([[f"qkv why {name}", question] for name, (_, question) in TOPICS.items()]))
    else:
        print(why(args.topic, seed=args.seed))
    return 0
