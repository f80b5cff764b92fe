"""Traces in files: JSON that any language reads, and npz as NumPy reads it, both without NumPy."""

from __future__ import annotations

import base64
import json
import math
import os
import zipfile
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkv.call.statistics import Statistics
from qkv.errors import ArgumentError
from qkv.insight import npy
from qkv.insight.heads import completed
from qkv.insight.record import Pages, Record, Shapes

FORMAT = "qkv trace"
VERSION = 1
_KEYS = "statistics.top_keys"
_LEFT = ("statistics", "held", "table", "warnings", "verdict")  # written otherwise, or found anew
_TENSORS = ("cover", "visible", "sampled", "positions", "sinks", "key_norms", "value_norms")

R = TypeVar("R", bound=Record)


def save(trace: Record, path: str | os.PathLike[str]) -> None:
    """Write a trace to a .json or .npz file."""
    call, name = "Trace.save()", os.fspath(path)
    plain, arrays = _parts(trace)
    if name.endswith(".json"):
        held = {
            key: {"dtype": npy.kind_of(t), "shape": list(t.shape), "base64": _base64(t)} for key, t in arrays.items()
        }
        document = {**plain, "heads_at_a_glance": _glance(trace), "arrays": held}
        with open(name, "w", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=True, allow_nan=False)
    elif name.endswith(".npz"):
        with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, t in arrays.items():
                archive.writestr(f"{key}.npy", npy.write(t))
            words = torch.frombuffer(bytearray(json.dumps(plain, allow_nan=False).encode()), dtype=torch.uint8)
            archive.writestr("trace.npy", npy.write(words))
    else:
        raise ArgumentError.of(call, "a trace is written as .json or .npz", repr(name), 'Use "trace.json"')


def load(kind: type[R], path: str | os.PathLike[str]) -> R:
    """Read a trace that `save` wrote."""
    call, name = "Trace.load()", os.fspath(path)
    fix = "Give it a file that Trace.save() wrote"
    try:
        if name.endswith(".npz"):
            arrays = npy.read_all(name)
            plain = json.loads(bytes(arrays.pop("trace").tolist()))
        else:
            with open(name, encoding="utf-8") as file:
                plain = json.load(file)
            arrays = {key: _decoded(value) for key, value in plain.pop("arrays").items()}
        if plain["format"] != FORMAT or plain["version"] > VERSION:
            given = f"{plain['format']!r} of version {plain['version']}"
            raise ArgumentError.of(call, f"this qkv reads a {FORMAT} of version {VERSION}", given, "Use a newer qkv")
        return completed(_record(kind, plain, arrays))
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        SyntaxError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError.of(call, "the file must be a trace", f"{name!r} ({type(error).__name__})", fix) from error


def _parts(trace: Record) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is not a tensor, in types of JSON, and the tensors by name."""
    arrays = {name: getattr(trace, name) for name in _TENSORS}
    arrays |= {f"statistics.{name}": t for name, t in trace.statistics._asdict().items()}
    plain: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for f in fields(trace):
        if f.name in (*_LEFT, *_TENSORS):
            continue
        value = getattr(trace, f.name)
        if f.name == "pages" and value is not None:
            value = {"size": value.size, "pool": value.pool, "tables": [list(t) for t in value.tables]}
        plain[f.name] = value._asdict() if isinstance(value, Shapes) else value
    found = {name: t.detach().cpu() for name, t in arrays.items() if t is not None}
    if _KEYS in found and trace.shapes.Lk < 1 << 31:  # half of a file would be zeros
        found[_KEYS] = found[_KEYS].to(torch.int32)
    return plain, found


def _record(kind: type[R], plain: dict[str, Any], arrays: dict[str, Tensor]) -> R:
    known = {f.name for f in fields(Record)} - {*_LEFT, *_TENSORS}
    given: dict[str, Any] = {key: value for key, value in plain.items() if key in known}
    given |= {name: arrays.get(name) for name in _TENSORS}
    given["shapes"] = Shapes(**given["shapes"])
    given["lengths"] = tuple(tuple(pair) for pair in given["lengths"])
    if given.get("pages") is not None:
        p = given["pages"]
        given["pages"] = Pages(p["size"], p["pool"], tuple(tuple(t) for t in p["tables"]))
    for name in ("heads", "bias", "tokens", "query_tokens"):
        given[name] = None if given.get(name) is None else tuple(given[name])
    if _KEYS in arrays:
        arrays[_KEYS] = arrays[_KEYS].long()
    statistics = Statistics(**{name: arrays.get(f"statistics.{name}") for name in Statistics._fields})  # type: ignore[arg-type]
    return kind(statistics=statistics, **given)


def _glance(trace: Record) -> list[list[dict[str, Any]]]:
    """The heads in plain numbers, for people and programs that read no arrays; NaN as null."""

    def plain(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return [[{key: plain(x) for key, x in head._asdict().items()} for head in heads] for heads in trace.table]


def _base64(t: Tensor) -> str:
    return base64.b64encode(npy.raw(t)).decode("ascii")


def _decoded(value: dict[str, Any]) -> Tensor:
    return npy.tensor(base64.b64decode(value["base64"], validate=True), value["dtype"], value["shape"])
