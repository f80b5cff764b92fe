"""`qkv see`: what a call, or a layer of a model, attends to."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from qkv.cli.expression import parse
from qkv.cli.progress import Progress
from qkv.errors import ArgumentError, UnsupportedError
from qkv.insight import Trace, npy
from qkv.insight.see import see
from qkv.lm.capture import Captured, hugging_face, shipped

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
        trace = trace_of(args)
        if args.save is not None:
            trace.save(args.save)
        if args.html is not None:
            progress.say("drawing")
            trace.html(args.html, rows=args.row)
    print(trace.text(ascii=args.ascii))
    for i in args.row or ():
        print()
        print(trace.row(i).text(ascii=args.ascii))
    for path in filter(None, (args.save, args.html)):
        print(f"wrote {path}")
    return 0


def trace_of(args: argparse.Namespace) -> Trace:
    """The trace of whatever SOURCE is."""
    if args.source is None:
        return _of_call(shipped(args.prompt, args.layer), args)
    source = Path(args.source)
    if source.is_dir():
        return _of_call(hugging_face(source, args.prompt, args.layer), args)
    if not source.is_file():
        fix = "Give a .safetensors, .npz or .json file, or a model's folder"
        raise ArgumentError.of(_CALL, "SOURCE must be a file or a folder", repr(args.source), fix)
    if source.suffix == ".json":
        return Trace.load(source)
    tensors = _read(source)
    return Trace.load(source) if "trace" in tensors else _of_tensors(tensors, args)


def _of_tensors(tensors: dict[str, Tensor], args: argparse.Namespace) -> Trace:
    missing = [name for name in "qkv" if name not in tensors]
    if missing:
        given = f"{', '.join(sorted(tensors)[:12])}"
        raise ArgumentError.of(
            _CALL, f"the file must hold {', '.join(missing)}", given, "Save them under the names q, k, v"
        )
    q, k, v = (tensors[name] if tensors[name].dim() == 4 else tensors[name][None] for name in "qkv")
    mask = tensors.get("mask") if args.mask is None else parse(args.mask)
    positions: Any = args.positions
    if positions not in (None, "start", "end"):
        try:
            positions = int(positions)
        except ValueError:
            rule, fix = "--positions must be start, end or an integer", "Try --positions end"
            raise ArgumentError.of(_CALL, rule, repr(positions), fix) from None
    return see(
        q, k, v, mask, positions=positions, bias=tensors.get("bias"), sinks=tensors.get("sinks"), heads=args.head
    )


def _of_call(call: Captured, args: argparse.Namespace) -> Trace:
    o = call.options
    tokens = call.tokens if call.tokens is None or len(call.tokens) == call.k.shape[2] else None
    return see(
        call.q, call.k, call.v, call.mask, tokens=tokens, heads=args.head, positions=o.positions, bias=o.bias,
        scale=o.scale, softcap=o.softcap, sinks=o.sinks,
    )  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if path.suffix == ".npz":
        try:
            return npy.read_all(path)
        except (ValueError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
            fix = "Write it with numpy.savez(file, q=q, k=k, v=v), as float16, float32 or float64"
            raise ArgumentError.of(
                _CALL, "the file must be an .npz of plain numbers", f"{path} ({error})", fix
            ) from error
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            rule, fix = "a .safetensors file needs safetensors", "pip install safetensors, or save an .npz"
            raise UnsupportedError.of(_CALL, rule, str(error), fix) from error
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            fix = "Write it with safetensors.torch.save_file"
            raise ArgumentError.of(_CALL, "the file must be safetensors", f"{path} ({error})", fix) from error
    fix = "Give a .safetensors, .npz or .json file, or a model's folder"
    raise ArgumentError.of(_CALL, "SOURCE ends in .safetensors, .npz or .json", repr(str(path)), fix)
