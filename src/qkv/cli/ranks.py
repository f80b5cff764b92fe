"""`qkv plan --distributed`: what a call would cost on the ranks of a mesh, by each method."""

from __future__ import annotations

import argparse
import json
import re
from math import prod
from typing import Any

from torch import Tensor

from qkv.errors import ArgumentError
from qkv.masks import Mask

_CALL = "qkv plan --distributed"
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_PARTS = {"ns": 1e9, "us": 1e6, "µs": 1e6, "ms": 1e3, "s": 1.0}  # of a second
_EXAMPLE = "qkv plan --distributed --shape hq=32,hkv=8,lq=1000000,d=128 --mask 'causal()' --ranks 8"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `qkv plan` takes for several ranks."""
    group = parser.add_argument_group("on several ranks", f"for example: {_EXAMPLE} --bandwidth 25GB/s --latency 10us")
    group.add_argument("--distributed", action="store_true", help="plan qkv.distributed.attention: lq is all rows")
    group.add_argument(
        "--ranks",
        metavar="N",
        help="ranks of the mesh; RxH for hybrid: rings of R, heads over H; several, with commas, make a table",
    )
    group.add_argument("--bandwidth", metavar="X", help="bytes a second that a rank receives, such as 25GB/s")
    group.add_argument("--latency", metavar="X", help="time of an empty message, such as 10us")
    group.add_argument("--flops", metavar="X", help="what a rank computes, such as 400T; measured here unless given")
    group.add_argument("--method", metavar="NAME", help="ring, allgather, ulysses or hybrid; the cheapest unless given")
    group.add_argument("--gradients", action="store_true", help="plan the backward pass, too")


def run(args: argparse.Namespace, tensors: tuple[Tensor, Tensor, Tensor], mask: Mask | None, positions: Any) -> int:
    """Print the plan; return the exit code."""
    from qkv.distributed import plan
    from qkv.distributed.telling import sweep

    if args.backend is not None:
        raise ArgumentError.of(_CALL, "each rank chooses its backend", f"--backend {args.backend}", "Leave it out")
    q, k, v = tensors
    q = q.detach().requires_grad_(args.gradients)
    meshes = [mesh_of(text) for text in (args.ranks or "").split(",")]
    machine = _machine(args, q, k, v, mask, positions)
    found = [
        plan(q, k, v, mask, mesh=mesh, method=args.method, positions=positions, machine=machine) for mesh in meshes
    ]
    if args.json:
        print("\n".join(json.dumps(as_json(each)) for each in found))
    else:
        print(found[0] if len(found) == 1 else "\n".join(sweep(found)))
    return 0


def mesh_of(text: str) -> tuple[int, ...]:
    """The sizes of --ranks.

    >>> mesh_of("8"), mesh_of("512x8")
    ((8,), (512, 8))
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        rule = "--ranks takes a number, or two as RxH; or several of these, with commas"
        raise ArgumentError.of(_CALL, rule, repr(text) if text else "no --ranks", f"Try {_EXAMPLE}")
    return tuple(map(int, parts))


def amount_of(option: str, text: str, units: str, example: str) -> float:
    """A number with a prefix and, if any, its unit.

    >>> amount_of("--bandwidth", "25GB/s", "B/s", "25GB/s"), amount_of("--flops", "3.5 T", "FLOP/s", "400T")
    (25000000000.0, 3500000000000.0)
    """
    found = re.fullmatch(rf"([0-9.]+(?:e[+-]?\d+)?)\s*([kKMGTP]?)(?:{units}|{units[:-2]})?", text.strip())
    try:
        value = float(found[1]) * _PREFIXES[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ArgumentError.of(_CALL, f"{option} takes a number of {units}", repr(text), f"Try {option} {example}")
    return value


def time_of(text: str) -> float:
    """The seconds of --latency.

    >>> time_of("10us"), time_of("2 ms")
    (1e-05, 0.002)
    """
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*(ns|us|µs|ms|s)", text.strip())
    try:
        return float(found[1]) / _PARTS[found[2]] if found else float("")
    except ValueError:
        rule = "--latency takes a number with its unit: ns, us, ms or s"
        raise ArgumentError.of(_CALL, rule, repr(text), "Try --latency 10us") from None


def _machine(args: argparse.Namespace, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, positions: Any) -> Any:
    from qkv.distributed import Machine
    from qkv.plans import plan

    usual = Machine.usual("cpu")
    bandwidth = amount_of("--bandwidth", args.bandwidth, "B/s", "25GB/s") if args.bandwidth else usual.bandwidth
    latency = time_of(args.latency) if args.latency else usual.latency
    if args.flops:
        return Machine(bandwidth, latency, amount_of("--flops", args.flops, "FLOP/s", "400T"))
    alone = plan(q, k, v, mask, positions=positions)
    return Machine.here(alone.problem, alone.chosen, bandwidth, latency)


def as_json(found: Any) -> dict[str, Any]:
    """The plan's numbers: of each method, and of the ranks that were looked at."""
    m = found.machine
    return {
        "mesh": list(found.mesh), "ranks": prod(found.mesh), "method": found.method, "refused": dict(found.refused),
        "seconds": found.seconds, "seconds_of_one_rank": found.alone,
        "machine": {"bandwidth": m.bandwidth, "latency": m.latency, "flops": m.flops},
        "methods": {
            name: [
                {"rank": r.rank, "rows": r.rows, "pairs": r.pairs, "flops": r.flops, **r.traffic._asdict(),
                 "forward": r.forward._asdict(), "backward": r.backward._asdict(), "memory": r.memory,
                 "back_memory": r.back_memory, "stages": [stage._asdict() for stage in r.stages]}
                for r in cost.ranks
            ]
            for name, cost in found.costs.items()
        },
    }  # fmt: skip
