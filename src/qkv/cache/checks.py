"""Checks of what users pass to caches: the public call reads each value once, and what is below trusts it."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence as Ordered
from typing import Any

import torch
from torch import Tensor

from qkv.checks import DTYPES, flag, given_as, integer, no_tensor, short, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
LARGEST = {INT8: 127.0, FLOAT8: 448.0}  # of the storages in 8 bits, which need scales
_MAX_SIZE = 2**31 - 1  # page numbers are int32 in tables


def size(call: str, name: str, value: Any, low: int = 1) -> int:
    return integer(call, name, value, low=low, high=_MAX_SIZE)


def float_dtype(call: str, value: Any) -> torch.dtype:
    """The dtype of given keys, of queries and of outputs."""
    if isinstance(value, torch.dtype) and value in DTYPES:
        return value
    fix = "Use one of float64, float32, bfloat16, float16; int8 and float8_e4m3fn are storage="
    raise ArgumentTypeError.of(call, "dtype must be a floating dtype of attention", f"dtype={shown(value)}", fix)


def storage_dtype(call: str, value: Any) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value in LARGEST):
        return value
    fix = "Leave it out to store as dtype, or pass torch.int8 or torch.float8_e4m3fn"
    rule = "storage must be None, torch.int8 or torch.float8_e4m3fn"
    raise ArgumentTypeError.of(call, rule, f"storage={shown(value)}", fix)


def real_device(call: str, value: Any) -> torch.device:
    if not isinstance(value, (str, torch.device)):
        given = given_as("device", value)
        raise ArgumentTypeError.of(call, "device must be a name or a torch.device", given, 'Pass "cpu"')
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ArgumentError.of(call, "device must be one that torch knows", f"device={value!r}", 'Pass "cpu"') from None
    if device.type == "meta":
        raise ArgumentError.of(call, "a cache needs memory", "device='meta'", "Pass a device that holds data")
    if device.type != "cpu" and device.index is None:  # "cuda" is the current one, and its tensors say which that is
        return torch.empty(0, device=device, dtype=torch.float32).device
    return device


def one_kind(
    call: str, cache: str, pages: Any, sequences: Any, *, of_pages: dict[str, Any], of_dense: dict[str, Any]
) -> None:
    """A cache is on pages or dense, and takes no option of the other kind: given with their values, None for none."""
    if (pages is None) == (sequences is None):
        given = "neither" if pages is None else f"pages={pages!r} and sequences={sequences!r}"
        fix = "Pass pages=, or sequences= for a dense one"
        raise ArgumentError.of(call, f"a {cache} cache is on pages or dense", given, fix)
    other = of_pages if pages is None else of_dense
    wrong = [f"{name}={x!r}" for name, x in other.items() if x is not None]
    if wrong:
        what = "a cache on pages" if pages is None else "a dense cache"
        rule = f"{' and '.join(other)} {'are' if len(other) > 1 else 'is'} of {what}"
        swap = "pages= in place of sequences=" if pages is None else "sequences= in place of pages="
        fix = f"Leave {'them' if len(wrong) > 1 else 'it'} out, or pass {swap}"
        raise ArgumentError.of(call, rule, ", ".join(wrong), fix)


def common(
    call: str, layers: Any, dtype: Any, storage: Any, device: Any, debug: Any
) -> tuple[int, torch.dtype, torch.dtype, torch.device, bool]:
    """What all caches take, as `Spec` takes it."""
    layers, dtype = size(call, "layers", layers), float_dtype(call, dtype)
    return layers, dtype, storage_dtype(call, storage) or dtype, real_device(call, device), flag(call, "debug", debug)


def counts(call: str, name: str, value: Any, n: int) -> tuple[int, ...]:
    """The entries of lengths=, one a sequence."""
    if value.__class__ is not list and value.__class__ is not tuple:
        if not isinstance(value, Tensor) or value.ndim != 1:
            rule = f"{name} must be a list of integers, one a sequence"
            raise ArgumentTypeError.of(call, rule, given_as(name, value), "Pass a list such as [3, 1, 1]")
        value = list(value)
    if len(value) != n:
        given = f"{len(value)} lengths for {n} sequence{'s' * (n != 1)}"
        raise ShapeError.of(call, f"{name} must have one entry a sequence", given, f"Pass {n} of them")
    for x in value:
        if x.__class__ is not int or x < 0:
            return tuple([integer(call, f"an entry of {name}", y) for y in value])
    return tuple(value)


def token_array(call: str, name: str, value: Any) -> array[int]:
    """Token ids, a list or 1-D integer tensor, as int64."""
    if isinstance(value, Tensor):
        return _from_tensor(call, name, value)
    fix = "Pass a list of token ids, or a 1-D integer tensor"
    if isinstance(value, (str, bytes, dict, set)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise ArgumentTypeError.of(call, f"{name} must be a list of integers", given_as(name, value), fix)
    try:
        ids = array("q", value)
    except (TypeError, ValueError, RuntimeError):
        wrong = next((x for x in value if not isinstance(x, int)), value)
        given = f"{name} with an entry {shown(wrong)} ({type(wrong).__name__})"
        raise ArgumentTypeError.of(call, f"{name} must hold integers", given, fix) from None
    except OverflowError:
        rule = f"{name} must hold 64-bit integers"
        raise ArgumentError.of(call, rule, f"{name}={shown(value)}", "Pass token ids of the vocabulary") from None
    if bool in set(map(type, value)):
        raise ArgumentTypeError.of(call, f"{name} must hold integers", f"{name} with bools", fix)
    return _not_negative(call, name, ids)


def _from_tensor(call: str, name: str, value: Tensor) -> array[int]:
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        fix = "Convert it with .to(torch.int64)"
        raise ArgumentTypeError.of(call, f"{name} must hold integers", f"{name} as {shown(value)}", fix)
    if value.ndim != 1:
        rule = f"{name} of one sequence must have one dimension"
        raise ShapeError.of(call, rule, f"{name} as {shown(value)}", "Pass tokens[0], or add sequences one by one")
    if value.is_meta:
        raise ArgumentError.of(call, f"{name} must have values", "a meta tensor", "Pass a tensor that holds data")
    plain = value.detach().to("cpu", torch.int64).contiguous()
    ids = array("q")
    if plain.numel():
        ids.frombytes(ctypes.string_at(plain.data_ptr(), plain.numel() * 8))
    return _not_negative(call, name, ids)


def _not_negative(call: str, name: str, ids: array[int]) -> array[int]:
    if ids and min(ids) < 0:
        rule = f"{name} must hold token ids >= 0"
        given = f"{name} with {min(ids)}"
        raise ArgumentError.of(call, rule, given, "Leave padding out: each sequence has its own length")
    return ids


def step_tokens(call: str, value: Any, n: int, T: int, lengths: tuple[int, ...] | None) -> list[array[int]]:
    """tokens= of a step: n rows of T, or with lengths= one packed list."""
    if lengths is None:
        if not isinstance(value, (list, tuple)) and not (isinstance(value, Tensor) and value.ndim == 2):
            given = given_as("tokens", value)
            rule = "tokens of a step must be a list of rows, one a sequence, or a (n, T) tensor"
            raise ArgumentTypeError.of(call, rule, given, "Pass [[ids of sequence 0], [ids of sequence 1], ...]")
        if len(value) != n:
            given = f"{len(value)} rows of tokens for {n} sequences"
            raise ShapeError.of(call, "tokens must have one row a sequence", given, f"Pass {n} rows")
        rows = [token_array(call, "tokens", row) for row in value]
        for row in rows:
            if len(row) != T:
                given = f"a row of {len(row)} tokens and T={T}"
                raise ShapeError.of(call, "each row of tokens must have T ids", given, f"Pass {T} ids a sequence")
        return rows
    packed = token_array(call, "tokens", value)
    if len(packed) != sum(lengths):
        given = f"{len(packed)} tokens and lengths that sum to {sum(lengths)}"
        fix = "Pass one flat list, sequence after sequence"
        raise ShapeError.of(call, "packed tokens must be as many as the lengths say", given, fix)
    rows, start = [], 0
    for length in lengths:
        rows.append(packed[start : start + length])
        start += length
    return rows


def check_index(call: str, index: Any, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless the index keys of a step, None or (n, 1, T, index_dim), are those that the cache was built for."""
    if size[-1] == 0:
        rule, given = "only a cache with index_dim= holds index keys", f"index={shown(index)} and index_dim=0"
        raise ArgumentError.of(call, rule, given, "Leave index out, or build the cache with index_dim=")
    if index is None:
        rule, given = "a cache with index_dim= takes index keys in every step", f"none and index_dim={size[-1]}"
        raise ArgumentError.of(call, rule, given, f"Pass index=, one key a token: (n, 1, T, {size[-1]})")
    check_rows(call, [("index", index)], [size], dtype, device)


def check_rows(
    call: str,
    named: Ordered[tuple[str, Any]],
    sizes: Ordered[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Explain what is wrong with the tensors of a step; says nothing where nothing is."""
    for (name, x), want in zip(named, sizes, strict=True):
        shape = f"({', '.join('T' if size < 0 else str(size) for size in want)})"  # -1: k has no length to compare with
        letters = f"{name} {shape}"
        if not isinstance(x, Tensor):
            raise no_tensor(call, name, x, f"Pass {letters}")
        if x.layout != torch.strided:
            rule = f"{name} must be a dense tensor"
            raise ArgumentTypeError.of(call, rule, f"{name} of layout {x.layout}", "Call .to_dense()")
        if x.dtype != dtype:
            fix = f"Convert it with .to(torch.{short(dtype)}), or build the cache with dtype=torch.{short(x.dtype)}"
            given = f"{name} {short(x.dtype)}, cache {short(dtype)}"
            raise ArgumentTypeError.of(call, "tensors must be in the cache's dtype", given, fix)
        if x.device != device:
            given = f"{name} on {x.device}, cache on {device}"
            rule = "tensors must be on the cache's device"
            raise ArgumentTypeError.of(call, rule, given, f'Move it with .to("{device}")')
        if tuple(x.shape) != want:
            fix = f"Pass {letters}; with lengths= all tokens are packed into a batch of 1"
            raise ShapeError.of(call, f"{name} must be {shape} here", f"{name} {tuple(x.shape)}", fix)
