"""`qkv see`: what a call, or a layer of a model, attends to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qkv.cli.expression import parse, positions_of
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError
from qkv.insight import Trace
from qkv.insight.see import see
from qkv.lm.sources import Captured, hugging_face, read_tensors, shipped

_CALL = "qkv see"
_PROMPT = "The with statement wraps a block of code. The with statement is closed at its end"  # it repeats itself


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv see` to the command line."""
    parser = subparsers.add_parser(
        "see",
        help="look at what a call, or a head of a model, attends to",
        description="Exact statistics of attention's weights, and a page that shows them. SOURCE is a file with q, k "
        "and v (.safetensors or .npz; mask, bias and sinks are taken too), a saved trace (.json, .npz), or the "
        "folder of a Hugging Face model. Without one the model that ships with qkv reads the prompt.",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a file of tensors, a saved trace, or a model's folder")
    add("--prompt", default=_PROMPT, metavar="TEXT", help="what a model reads")
    add(
        "--layer",
        type=int,
        default=0,
        metavar="N",
        help="the layer of a model, from the end where negative (default 0)",
    )
    add("--head", type=int, action="append", metavar="H", help="a query head; may be repeated (default: all)")
    add("--row", type=int, action="append", metavar="I", help="a query to print number by number; may be repeated")
    add("--mask", metavar="EXPRESSION", help='for tensors, such as "causal() & sliding_window(4)"')
    add("--positions", metavar="P", help="for tensors: start, end, or query 0's position")
    add("--html", type=Path, metavar="FILE", help="write the page")
    add("--save", type=Path, metavar="FILE", help="write the trace as .json or .npz")
    add("--ascii", action="store_true", help="draw with ASCII alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the trace, and write what was asked for; return the exit code."""
    with Progress("see") as progress:
        progress.say("looking")
        trace = trace_of(args, progress)
        if args.save is not None:
            trace.save(args.save)
        if args.html is not None:
            progress.say("drawing")
            trace.html(args.html, rows=args.row or ())
    print(trace.text(ascii=args.ascii))
    for i in args.row or ():
        print()
        print(trace.row(i).text(ascii=args.ascii))
    for path in filter(None, (args.save, args.html)):
        print(f"wrote {path}")
    return 0


def trace_of(args: argparse.Namespace, progress: Progress) -> Trace:
    """The trace of whatever SOURCE is."""
    if args.source is None:
        return _of_call(shipped(args.prompt, args.layer), args, progress)
    source = Path(args.source)
    if source.is_dir():
        return _of_call(hugging_face(source, args.prompt, args.layer), args, progress)
    if not source.is_file():
        fix = "Give a .safetensors, .npz or .json file, or a model's folder"
        raise ArgumentError.of(_CALL, "SOURCE must be a file or a folder", repr(args.source), fix)
    if source.suffix == ".json":
        return Trace.load(source)
    tensors = read_tensors(source)
    return Trace.load(source) if "trace" in tensors else _of_tensors(tensors, args, progress)


def _told(progress: Progress) -> Callable[[float], None]:
    """What is done, at each tenth."""
    last = 0

    def tell(part: float) -> None:
        nonlocal last
        if int(10 * part) > last:
            last = int(10 * part)
            progress.say(f"looking, {last}0 %")

    return tell


def _of_tensors(tensors: dict[str, Tensor], args: argparse.Namespace, progress: Progress) -> Trace:
    missing = [name for name in "qkv" if name not in tensors]
    if missing:
        given = f"{', '.join(sorted(tensors)[:12])}"
        raise ArgumentError.of(
            _CALL, f"the file must hold {', '.join(missing)}", given, "Save them under the names q, k, v"
        )
    q, k, v = (tensors[name] if tensors[name].dim() == 4 else tensors[name][None] for name in "qkv")
    mask = tensors.get("mask") if args.mask is None else parse(args.mask)
    positions = positions_of(_CALL, args.positions)
    return see(
        q,
        k,
        v,
        mask,
        positions=positions,
        bias=tensors.get("bias"),
        sinks=tensors.get("sinks"),
        heads=args.head,
        progress=_told(progress),
    )


def _of_call(call: Captured, args: argparse.Namespace, progress: Progress) -> Trace:
    o = call.options
    tokens = call.tokens if call.tokens is None or len(call.tokens) == call.k.shape[2] else None
    return see(
        call.q, call.k, call.v, call.mask, tokens=tokens, heads=args.head, positions=o.positions, bias=o.bias,
        scale=o.scale, softcap=o.softcap, sinks=o.sinks, progress=_told(progress),
    )  # fmt: skip
