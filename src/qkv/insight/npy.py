"""Arrays of NumPy's files, read and written without NumPy: numpy.lib.format describes them."""

from __future__ import annotations

import ast
import ctypes
import os
import sys
import zipfile

import torch
from torch import Tensor

KINDS = {
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32,
    "|u1": torch.uint8, "|b1": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in KINDS.items()}
_MAGIC = b"\x93NUMPY\x01\x00"


def kind_of(t: Tensor) -> str:
    """The tensor's dtype as NumPy writes it."""
    return _NAMES[t.dtype]


def raw(t: Tensor) -> bytes:
    """Its numbers, little-endian, row by row."""
    whole = t.contiguous()
    data = ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""
    if sys.byteorder == "big":  # each number's bytes the other way round
        size = t.element_size()
        data = b"".join(data[x : x + size][::-1] for x in range(0, len(data), size))
    return data


def tensor(data: bytes, kind: str, shape: list[int]) -> Tensor:
    """The way back. Raises ValueError for data of another size, KeyError for a type that is none of KINDS."""
    dtype = KINDS[kind]
    if not data:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape).clone()


def write(t: Tensor) -> bytes:
    """One array as a file of version 1.0."""
    shape = f"({t.shape[0]},)" if t.dim() == 1 else str(tuple(t.shape))
    header = f"{{'descr': '{kind_of(t)}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return _MAGIC + len(header).to_bytes(2, "little") + header.encode("latin1") + raw(t)


def read(data: bytes) -> Tensor:
    """The array of such a file. Raises ValueError or KeyError where it is none, or of a type that is not taken."""
    if data[:8] != _MAGIC:
        raise ValueError("not an array of NumPy's format 1.0")
    size = int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10 : 10 + size].decode("latin1"))
    shape = list(header["shape"])
    if header["fortran_order"]:
        return tensor(data[10 + size :], header["descr"], shape[::-1]).permute(*range(len(shape))[::-1])
    return tensor(data[10 + size :], header["descr"], shape)


def read_all(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The arrays of an .npz file by name. Raises what `read` does, and zipfile.BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        return {name[:-4]: read(archive.read(name)) for name in archive.namelist() if name.endswith(".npy")}
