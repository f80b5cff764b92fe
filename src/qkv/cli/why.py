"""`qkv why`: the experiments of `qkv.why`, printed."""

from __future__ import annotations

import argparse

from qkv.insight.terminal import paint
from qkv.insight.topics import GROUPS, TOPICS
from qkv.insight.why import why


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv why` to the command line."""
    parser = subparsers.add_parser(
        "why",
        help="settle a question about attention by an experiment",
        description="Run a small experiment that settles a question about attention. Without a topic, list them.",
    )
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the experiment's random numbers (default 0)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--full", action="store_true", help="with the table of every number that was measured")
    form.add_argument("--json", action="store_true", help="as JSON, every number included")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the experiment, or the list of topics; return the exit code."""
    if args.topic is None:
        print(listed())
        return 0
    answer = why(args.topic, seed=args.seed)
    print(answer.json() if args.json else answer.full() if args.full else answer)
    return 0


def listed() -> str:
    """The topics in the order in which a learner meets them, under the heads of their groups."""
    wide = max(map(len, TOPICS))
    lines = ["qkv why TOPIC [--seed N] [--full | --json]"]
    for group, topics in GROUPS.items():
        lines.append(paint(group, "bold"))
        lines += [f"  {name:<{wide}}  {topic.about}" for name, topic in topics.items()]
    return "\n".join(lines)
