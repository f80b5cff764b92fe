"""The options of `qkv bench`, and which of them exclude each other."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from qkv.backends.isas import ISAS, SHARED
from qkv.errors import ArgumentError

DESCRIPTION = (
    "Time attention in qkv, PyTorch, and OpenVINO, ONNX Runtime, JAX and llama.cpp's ggml where "
    "installed (pip install 'qkv[bench]' llama-cpp-python). Results are checked against float64 first, calls are "
    "interleaved, ratios are medians over rounds. About six minutes; --quick about one. With --training: forward "
    "and backward together against PyTorch's attention, gradients checked first, and the memory of a long step."
)
CALLS_ONLY = ("sweep", "mla", "chart", "markdown")  # options of the forward calls
# Another measurement -> the rule, and the options it does not take with what they are of.
ALONE = {
    "models": (
        "--models measures decoding in a model only",
        ("training", "caches", "insight", "sparse", "only", "peers", "list", "isa", "backend", *CALLS_ONLY),
        "of single calls",
    ),
    "caches": (
        "--caches measures caches only",
        ("training", "insight", "sparse", "peers", "no_memory", *CALLS_ONLY),
        "of other calls",
    ),
    "sparse": (
        "--sparse measures masks only",
        ("training", "caches", "models", "insight", "peers", "no_memory", *CALLS_ONLY),
        "of other calls",
    ),
    "insight": (
        "--insight measures what looking at a call costs",
        ("training", "caches", "models", "peers", "no_memory", *CALLS_ONLY),
        "of other calls",
    ),
    "training": ("--training measures forward + backward only", CALLS_ONLY, "of forward calls"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    give = parser.add_argument
    give("--quick", action="store_true", help="the main rows and fewer peers, under 90 seconds")
    give("--training", action="store_true", help="forward + backward against PyTorch, instead of forward")
    give(
        "--models",
        action="store_true",
        help="decoding in a Hugging Face model instead, about ten minutes (--quick: two)",
    )
    give(
        "--caches",
        action="store_true",
        help="decoding on pages, shared prefixes, 8-bit storage and a cache's books instead, about four minutes",
    )
    give(
        "--insight",
        action="store_true",
        help="what it costs to look at a call instead: statistics of its weights, about seven minutes (--quick: one)",
    )
    give(
        "--sparse",
        action="store_true",
        help="masks instead: their time beside that without one and FlexAttention's, and decode with selected blocks; "
        "about fifteen minutes (--quick: one and a half)",
    )
    give("--only", metavar="REGEX", help="rows whose name matches")
    give("--peers", metavar="NAMES", help="these peers only, such as sdpa,openvino")
    give("--list", action="store_true", help="name the rows and their peers, and measure nothing")
    give("--sweep", action="store_true", help="also 200 shapes against PyTorch; any slower is listed")
    give("--mla", action="store_true", help="also latent decode with 16 to 64 heads and longer caches")
    give("--no-memory", action="store_true", help="leave out the memory of a call")
    give("--isa", choices=tuple(ISAS), help=f"hold qkv to an instruction set; {SHARED} holds the peers too")
    give("--backend", help="a backend of qkv by name (default: the one that qkv.plan() chooses)")
    give("--threads", type=int, metavar="N", help="threads of every contender (default: PyTorch's)")
    give(
        "--seconds",
        type=float,
        metavar="S",
        help="time for the whole run, kept within a fifth; what has no room is left out and named "
        "(default: 360, --quick 70, --caches 200, --insight 420, --models 600, --sparse 900)",
    )
    give("--json", type=Path, metavar="FILE", help="write every number as JSON lines; another run's part of FILE stays")
    give("--chart", type=Path, metavar="FILE.svg", help="draw the README's chart")
    give("--markdown", type=Path, metavar="FILE.md", help="write the README's table, between its marks")


def kind(args: argparse.Namespace) -> str:
    """The measurement that is asked for, which is also the part of a file of results that it writes."""
    return next((name for name in ALONE if getattr(args, name)), "calls")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be met."""
    if args.threads is not None and args.threads < 1:
        raise _refusal("threads must be at least 1", f"--threads {args.threads}", "Use --threads 2")
    if args.isa and args.backend:
        fix = f"Use --backend cpu:{args.isa}"
        raise _refusal("an instruction set is part of the backend's name", "both", fix)
    for name, (rule, other, what) in ALONE.items():
        others = [f"--{option.replace('_', '-')}" for option in other if getattr(args, option)]
        if getattr(args, name) and others:
            raise _refusal(rule, f"{', '.join(others)}, {what}", "Make two runs")
    try:
        re.compile(args.only or "")
    except re.error as error:
        raise _refusal("--only is a regular expression", repr(args.only), f"{error}") from None
    for path in (args.json, args.chart, args.markdown):
        if path and not path.resolve().parent.is_dir():
            raise _refusal("the folder must exist", str(path), "Make it first")


def _refusal(rule: str, given: str, fix: str) -> ArgumentError:
    return ArgumentError.of("qkv bench", rule, given, fix)
