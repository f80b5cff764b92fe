"""Traces in files: JSON that any language reads, and npz as NumPy reads it, both without NumPy."""

from __future__ import annotations

import ast
import base64
import ctypes
import io
import json
import math
import os
import sys
import zipfile
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkv.call.statistics import Statistics
from qkv.errors import ArgumentError
from qkv.insight.heads import completed
from qkv.insight.record import Pages, Record, Shapes

FORMAT = "qkv trace"
VERSION = 1
_KINDS = {
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32,
    "|u1": torch.uint8, "|b1": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _KINDS.items()}
_LEFT = ("statistics", "held", "table", "warnings", "verdict")  # written otherwise, or found anew
_TENSORS = ("cover", "visible", "sampled", "positions", "sinks", "key_norms", "value_norms")

R = TypeVar("R", bound=Record)


def save(trace: Record, path: str | os.PathLike[str]) -> None:
    """Write a trace to a .json or .npz file."""
    call, name = "Trace.save()", os.fspath(path)
    plain, arrays = _parts(trace)
    if name.endswith(".json"):
        held = {key: {"dtype": _name(t), "shape": list(t.shape), "base64": _base64(t)} for key, t in arrays.items()}
        document = {**plain, "heads_at_a_glance": _glance(trace), "arrays": held}
        with open(name, "w", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=True, allow_nan=False)
    elif name.endswith(".npz"):
        with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, t in arrays.items():
                archive.writestr(f"{key}.npy", _npy(t))
            words = torch.frombuffer(bytearray(json.dumps(plain, allow_nan=False).encode()), dtype=torch.uint8)
            archive.writestr("trace.npy", _npy(words))
    else:
        raise ArgumentError.of(call, "a trace is written as .json or .npz", repr(name), 'Use "trace.json"')


def load(kind: type[R], path: str | os.PathLike[str]) -> R:
    """Read a trace that `save` wrote."""
    call, name = "Trace.load()", os.fspath(path)
    fix = "Give it a file that Trace.save() wrote"
    try:
        if name.endswith(".npz"):
            with zipfile.ZipFile(name) as archive:
                arrays = {key[:-4]: _from_npy(archive.read(key)) for key in archive.namelist()}
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
    return plain, {name: t.detach().cpu() for name, t in arrays.items() if t is not None}


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
    statistics = Statistics(**{name: arrays.get(f"statistics.{name}") for name in Statistics._fields})  # type: ignore[arg-type]
    return kind(statistics=statistics, **given)


def _glance(trace: Record) -> list[list[dict[str, Any]]]:
    """The heads in plain numbers, for people and programs that read no arrays; NaN as null."""

    def plain(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return [[{key: plain(x) for key, x in head._asdict().items()} for head in heads] for heads in trace.table]


def _name(t: Tensor) -> str:
    return _NAMES[t.dtype]


def _bytes(t: Tensor) -> bytes:
    """Little-endian, row by row."""
    whole = t.contiguous()
    raw = ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""
    if sys.byteorder == "big":  # each number's bytes the other way round
        size = t.element_size()
        raw = b"".join(raw[x : x + size][::-1] for x in range(0, len(raw), size))
    return raw


def _base64(t: Tensor) -> str:
    return base64.b64encode(_bytes(t)).decode("ascii")


def _tensor(raw: bytes, kind: str, shape: list[int]) -> Tensor:
    dtype = _KINDS[kind]
    if not raw:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape).clone()


def _decoded(value: dict[str, Any]) -> Tensor:
    return _tensor(base64.b64decode(value["base64"], validate=True), value["dtype"], value["shape"])


def _npy(t: Tensor) -> bytes:
    """One array in NumPy's format, version 1.0 (numpy.lib.format describes it)."""
    shape = f"({t.shape[0]},)" if t.dim() == 1 else str(tuple(t.shape))
    header = f"{{'descr': '{_name(t)}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    file = io.BytesIO()
    file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1"))
    file.write(_bytes(t))
    return file.getvalue()


def _from_npy(data: bytes) -> Tensor:
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not an array of NumPy's format 1.0")
    size = int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10 : 10 + size].decode("latin1"))
    if header["fortran_order"]:
        raise ValueError("an array in Fortran's order")
    return _tensor(data[10 + size :], header["descr"], list(header["shape"]))
