"""`qkv plan`: the shapes of a call, what it would cost and what would run, without any data."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

import torch

from qkv.checks import short
from qkv.cli import ranks
from qkv.cli.expression import parse, positions_of
from qkv.errors import ArgumentError
from qkv.insight.cover import cover
from qkv.insight.terminal import amount, columns, paint, table
from qkv.insight.words import in_words
from qkv.plans import Plan, plan

_CALL = "qkv plan"
_NAMES = {"b": 1, "hq": None, "hkv": None, "lq": None, "lk": None, "d": None, "dv": None}
_DTYPES = {short(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_EXAMPLE = "--shape hq=32,hkv=8,lq=1,lk=4096,d=128"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="say what a call of given shapes would run and cost",
        description="Shapes, bytes and FLOPs of a call, its mask in words and as a picture, and the backend that would "
        f"run it: no data needed. For example: qkv plan {_EXAMPLE} --mask 'causal()' --positions end",
    )
    parser.add_argument(
        "--shape", required=True, metavar="SIZES",
        help="b, hq, hkv, lq, lk, d, dv as name=number,...; b is 1, hkv is hq, lk is lq and dv is d unless given",
    )  # fmt: skip
    parser.add_argument("--mask", metavar="EXPRESSION", help='such as "causal() & sliding_window(4)"')
    parser.add_argument("--positions", metavar="P", help="where the queries stand: start, end, or query 0's position")
    parser.add_argument("--dtype", default="float32", choices=list(_DTYPES))
    parser.add_argument("--backend", metavar="NAME", help="as in qkv.attention")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead")
    ranks.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; return the exit code."""
    sizes = sizes_of(args.shape)
    mask = None if args.mask is None else parse(args.mask)
    positions = positions_of(_CALL, args.positions)
    q, k, v = (
        torch.zeros((), dtype=_DTYPES[args.dtype]).expand(sizes["b"], sizes[h], sizes[n], sizes[d])
        for h, n, d in (("hq", "lq", "d"), ("hkv", "lk", "d"), ("hkv", "lk", "dv"))
    )
    if args.distributed or args.ranks is not None:
        return ranks.run(args, (q, k, v), mask, positions)
    found = plan(q, k, v, mask, positions=positions, backend=args.backend)
    if args.json:
        print(json.dumps(as_json(found)))
        return 0
    print(table(steps(found), "<<><"))
    print()
    print("\n".join(textwrap.wrap(f"mask: {in_words(found.problem.mask)}", columns())))
    if mask is not None and sizes["lq"] and sizes["lk"]:
        print("\n".join(picture(found)))
    print()
    print(found)
    return 0


def sizes_of(text: str) -> dict[str, int]:
    """The sizes of --shape.

    >>> sizes_of("hq=8,hkv=2,lq=16,d=64")
    {'b': 1, 'hq': 8, 'hkv': 2, 'lq': 16, 'lk': 16, 'd': 64, 'dv': 64}
    """
    found: dict[str, int] = {}
    for part in text.replace(" ", "").lower().split(","):
        name, _, number = part.partition("=")
        if name not in _NAMES or not number.isdecimal() or name in found:
            rule = f"--shape takes {', '.join(_NAMES)}, each once, as name=number"
            raise ArgumentError.of(_CALL, rule, repr(part), f"Try {_EXAMPLE}")
        found[name] = int(number)
    missing = [name for name in ("hq", "lq", "d") if name not in found]
    if missing:
        raise ArgumentError.of(
            _CALL, "--shape needs at least hq, lq and d", f"no {', no '.join(missing)}", f"Try {_EXAMPLE}"
        )
    found = {"b": 1, "hkv": found["hq"], "lk": found["lq"], "dv": found["d"], **found}
    return {name: found[name] for name in _NAMES}


def steps(found: Plan) -> list[list[str]]:
    """What each step of the call makes: name, shape, bytes, and what it is."""
    p = found.problem
    size, every = p.dtype.itemsize, p.B * p.Hq * p.Lq * p.Lk

    def row(name: str, shape: tuple[int, ...], bytes: int, what: str) -> list[str]:
        return [name, f"({', '.join(f'{n:,}' for n in shape)})", amount(bytes, "B", 1024), what]

    return [
        row("Q", (p.B, p.Hq, p.Lq, p.D), size * p.B * p.Hq * p.Lq * p.D, "what each query asks for"),
        row("K", (p.B, p.Hkv, p.Lk, p.D), size * p.B * p.Hkv * p.Lk * p.D, _shared(p.group, "advertises")),
        row("V", (p.B, p.Hkv, p.Lk, p.Dv), size * p.B * p.Hkv * p.Lk * p.Dv, "what each key passes on"),
        row("scores", (p.B, p.Hq, p.Lq, p.Lk), every * p.accumulate.itemsize, "if they were stored: they are not"),
        ["weights", "sum to 1 over the keys", "", f"{found.pairs:,} pairs are computed"],
        row("out", (p.B, p.Hq, p.Lq, p.Dv), size * p.B * p.Hq * p.Lq * p.Dv, f"{amount(found.flops, 'FLOP')}"),
        ["cache", "a token and layer", amount(size * p.Hkv * (p.D + p.Dv), "B", 1024), "of keys and values"],
    ]


def _shared(group: int, what: str) -> str:
    return f"what each key {what}" + (f"; {group} query heads share a head" if group > 1 else "")


def picture(found: Plan) -> list[str]:
    """The mask, at most 24 rows: queries down, keys across."""
    p = found.problem
    cells = cover(p, None if found.positions is None else found.positions.tensor, cells=24)
    return ["".join("·░█"[int(x)] * 2 for x in line) for line in cells] + [
        paint("█ visible, ░ in part, · hidden; queries down, keys across", "dim")
    ]


def as_json(found: Plan) -> dict[str, Any]:
    """The plan's numbers."""
    p = found.problem
    return {
        "shape": {"b": p.B, "hq": p.Hq, "hkv": p.Hkv, "lq": p.Lq, "lk": p.Lk, "d": p.D, "dv": p.Dv},
        "dtype": short(p.dtype), "mask": None if p.mask is None else repr(p.mask), "words": in_words(p.mask),
        "backend": found.backend, "reason": found.reason, "refused": dict(found.refused), "tile": list(found.tile),
        "tiles": found.tiles._asdict(), "flops": found.flops, "bytes": found.bytes,
        "pairs": {"visible_at_least": found.visible.least, "visible_at_most": found.visible.most,
                  "computed": found.pairs},
        "seconds": found.seconds, "gradient_seconds": found.gradient_seconds,
        "dense": {**found.dense._asdict(), "seconds": found.dense_seconds},
        "cache_bytes_per_token": p.dtype.itemsize * p.Hkv * (p.D + p.Dv),
    }  # fmt: skip
