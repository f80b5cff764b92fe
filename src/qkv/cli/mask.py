"""`qkv mask`: a mask written as an expression, drawn."""

from __future__ import annotations

import argparse
from typing import Any

from qkv.cli.expression import CALL, CONSTRUCTORS, parse, positions_of
from qkv.insight.terminal import paint


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv mask` to the command line."""
    parser = subparsers.add_parser(
        "mask",
        help="draw a mask written as an expression",
        description="Draw a mask. An expression calls mask constructors with literal arguments and joins them with "
        f"& | ~ ; the constructors are {', '.join(sorted(CONSTRUCTORS))}.",
    )
    parser.add_argument("expression", metavar="EXPRESSION", help='such as "causal() & sliding_window(4)"')
    parser.add_argument("--q", type=int, default=8, metavar="Lq", help="number of queries (default 8)")
    parser.add_argument("--k", type=int, metavar="Lk", help="number of keys (default: as many)")
    parser.add_argument("--positions", metavar="P", help="where the queries stand: start, end, or query 0's position")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="batch rows, for padding([…]) (default 1)")
    parser.add_argument("--heads", type=int, default=1, metavar="Hq", help="query heads, for per_head([…]) (default 1)")
    parser.add_argument("--b", type=int, default=0, help="the batch row to draw (default 0)")
    parser.add_argument("--h", type=int, default=0, help="the head to draw (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the mask and say how much it leaves; return the exit code."""
    mask = parse(args.expression)
    positions = positions_of(CALL, args.positions)
    keys = args.q if args.k is None else args.k
    lengths: dict[str, Any] = {"positions": positions, "B": args.batch, "Hq": args.heads}
    picture = mask.picture(args.q, keys, **lengths, b=args.b, h=args.h)
    seen = mask.tensor(args.q, keys, **lengths)[args.b if args.batch > 1 else 0, args.h if args.heads > 1 else 0]
    print(paint(repr(mask), "bold"))
    print(picture)
    blind = int((~seen.any(-1)).sum())
    share = f" ({int(seen.sum()) / seen.numel():.1%})" if seen.numel() else ""
    print(
        f"{int(seen.sum()):,} of {seen.numel():,} pairs visible{share}"
        + (f"; {blind:,} {'query sees' if blind == 1 else 'queries see'} no key: out 0, lse -inf" if blind else "")
    )
    return 0
