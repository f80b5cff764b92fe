"""`qkv mask`: a mask written as an expression, drawn at any length, and what a call with it costs."""

from __future__ import annotations

import argparse
import json

import torch

from qkv.checks import short
from qkv.cli.expression import CALL, CONSTRUCTORS, parse, positions_of
from qkv.cli.plan import as_json
from qkv.errors import ArgumentError
from qkv.insight.terminal import paint
from qkv.masks import Mask
from qkv.plans import Plan, plan

_DTYPES = {short(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_BLIND = 1 << 24  # pairs up to which queries that see nothing are looked for


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv mask` to the command line."""
    parser = subparsers.add_parser(
        "mask",
        help="draw a mask written as an expression, and say what it costs",
        description="Draw a mask at any length, and say what a call with it would cost. An expression calls mask "
        "constructors with literal arguments and joins them with & | ~ ; the constructors are "
        f"{', '.join(sorted(CONSTRUCTORS))}.",
    )
    parser.add_argument("expression", metavar="EXPRESSION", help='such as "causal() & sliding_window(4)"')
    parser.add_argument("--q", type=int, default=8, metavar="Lq", help="number of queries (default 8)")
    parser.add_argument("--k", type=int, metavar="Lk", help="number of keys (default: as many)")
    parser.add_argument("--positions", metavar="P", help="where the queries stand: start, end, or query 0's position")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="batch rows, for padding([…]) (default 1)")
    parser.add_argument("--heads", type=int, default=1, metavar="Hq", help="query heads, for per_head([…]) (default 1)")
    parser.add_argument("--b", type=int, default=0, help="the batch row to draw (default 0)")
    parser.add_argument("--h", type=int, default=0, help="the head to draw (default 0)")
    parser.add_argument("--d", type=int, default=64, metavar="D", help="head size of the call (default 64)")
    parser.add_argument("--dtype", default="float32", choices=list(_DTYPES), help="of the call (default float32)")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the mask, say how much it leaves and what a call with it costs; return the exit code."""
    mask, positions = parse(args.expression), positions_of(CALL, args.positions)
    Lq, Lk = args.q, args.q if args.k is None else args.k
    picture = mask.picture(Lq, Lk, positions, B=args.batch, Hq=args.heads, b=args.b, h=args.h)
    if args.d < 1:
        raise ArgumentError.of(CALL, "--d must be at least 1", str(args.d), "Leave it out for 64")
    q, k = (torch.zeros((), dtype=_DTYPES[args.dtype]).expand(args.batch, args.heads, n, args.d) for n in (Lq, Lk))
    found = plan(q, k, k, mask, positions=positions)
    if args.json:
        print(json.dumps({**as_json(found), "picture": picture.splitlines()}))
        return 0
    print(paint(repr(mask), "bold"))
    print(picture)
    print(_seen(mask, found, positions, args.b, args.h))
    heads = f"{args.heads} head{'s' * (args.heads > 1)}"
    rows = f"{args.batch} batch rows, " if args.batch > 1 else ""
    print(paint(f"as a call of {rows}{heads}, D {args.d}, {args.dtype}, on the {found.backend} backend:", "dim"))
    print("\n".join(found.costs()))
    return 0


def _seen(mask: Mask, found: Plan, positions: str | int | None, b: int, h: int) -> str:
    """Visible pairs of the drawn head, of all heads where that would be much to look at; and queries that see none."""
    p = found.problem
    every, blind = p.Lq * p.Lk, 0
    if every * p.B * p.Hq <= _BLIND:
        seen = mask.tensor(p.Lq, p.Lk, positions, B=p.B, Hq=p.Hq)[b if p.B > 1 else 0, h if p.Hq > 1 else 0]
        visible, blind = f"{int(seen.sum()):,}", int((~seen.any(-1)).sum())
        share = int(seen.sum()) / max(every, 1)
    else:
        (least, most), every = found.visible, found.dense.pairs
        visible, share = f"{most:,}" if least == most else f"{least:,} to {most:,}", most / every
    part = f" ({share:.1%})" if every else ""
    sees = "query sees" if blind == 1 else "queries see"
    return f"{visible} of {every:,} pairs visible{part}" + (
        f"; {blind:,} {sees} no key: out 0, lse -inf" if blind else ""
    )
