"""Checks that every mask constructor shares: it reads each value once and keeps an immutable copy."""

from __future__ import annotations

import ctypes
import hashlib
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qkv import _torch
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError

# The dtypes of queries, keys, values and outputs.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Positions and distances stay below this, so that sums of a few of them never leave int64.
LIMIT = 2**48


def short(dtype: torch.dtype) -> str:
    """A dtype as messages name it.

    >>> short(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def shown(value: Any) -> str:
    """A value as an error message names it, short whatever its size.

    >>> shown(list(range(20)))
    '[0, 1, 2, 3, ..., 19]'
    """
    if isinstance(value, Tensor):
        dtype = short(value.dtype)
        return f"{'an' if dtype.startswith('int') else 'a'} {dtype} tensor of shape {tuple(value.shape)}"
    if hasattr(value, "__array__") and hasattr(value, "shape"):  # of NumPy and its kin: never its numbers
        return f"a {getattr(value, 'dtype', '')} {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        head = ", ".join(repr(x) for x in value[:4])
        return f"[{head}, ..., {value[-1]!r}]"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def given_as(name: str, value: Any) -> str:
    """An argument of a type that is not taken, as an error message names it.

    >>> given_as("n", 1.5)
    'n=1.5 (float)'
    """
    return f"{name}={shown(value)} ({type(value).__name__})"


def whole(value: Any) -> int | None:
    """The value as an int, or None where it is not an integer (a bool is not one)."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dtype == torch.bool or value.ndim > 0)):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a meta tensor has no value to read
        return None


def integer(call: str, name: str, value: Any, low: int = 0, high: int = LIMIT) -> int:
    """An integer argument in low..high."""
    number = whole(value)
    wanted = "Pass a whole number" if low <= -LIMIT else f"Pass a whole number >= {low}"
    if number is None:
        raise ArgumentTypeError.of(call, f"{name} must be an integer", given_as(name, value), wanted)
    if number < low:
        raise ArgumentError.of(call, f"{name} must be an integer >= {low}", f"{name}={number}", wanted)
    if number > high:
        rule, fix = f"{name} must be an integer <= {high}", "Pass a smaller number"
        raise ArgumentError.of(call, rule, f"{name}={number}", fix)
    return number


def number(call: str, name: str, value: Any, fix: str) -> Any:
    """The value, which must be a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError.of(call, f"{name} must be a number", given_as(name, value), fix)
    return value


def no_tensor(call: str, name: str, value: Any, fix: str) -> ArgumentTypeError:
    """The error for a value that is not a tensor."""
    if hasattr(value, "__array__"):
        fix = f"Make a tensor of it with torch.from_numpy({name})"
    return ArgumentTypeError.of(call, f"{name} must be a tensor", given_as(name, value), fix)


def no_dtensor(call: str, name: str, x: Tensor) -> None:
    """Raise for a DTensor: it stands for parts on several processes, and has no address."""
    if hasattr(x, "to_local"):  # its class is not loaded for this question
        rule, fix = f"{name} must be a plain tensor", "Pass what its to_local() gives, or its full_tensor()"
        raise ArgumentTypeError.of(call, rule, f"a {type(x).__name__} {tuple(x.shape)}", fix)


def flag(call: str, name: str, value: Any) -> bool:
    """A bool argument."""
    if not isinstance(value, bool):
        raise ArgumentTypeError.of(call, f"{name} must be a bool", given_as(name, value), "Pass True or False")
    return value


def readable(tensor: Tensor) -> bool:
    """Whether the tensor's values can be looked at: not while torch.compile or torch.export trace a call.

    A traced call checks the values when its graph runs (`qkv.graph`).
    """
    return not torch.compiler.is_dynamo_compiling() and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


class Operand:
    """An immutable CPU copy of a small tensor, equal to another of the same bytes."""

    __slots__ = ("_devices", "digest", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._devices: dict[torch.device, Tensor] = {}
        self.digest: tuple[object, ...] = ()
        if not readable(tensor):
            self.tensor = tensor.detach()
            return
        while _torch.follows_gradient(tensor):  # inside of torch.func.grad even torch.tensor gives one
            tensor = _torch.unwrapped(tensor)
        # The clone keeps the mask a value: changing the caller's tensor later changes nothing here. A mask made in
        # inference mode serves training too, and what is made there could not be saved for a backward pass.
        with _torch.without_transforms(), torch.inference_mode(False):
            self.tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size = self.tensor.numel() * self.tensor.element_size()
        data = ctypes.string_at(self.tensor.data_ptr(), size) if size else b""
        self.digest = (tuple(tensor.shape), str(tensor.dtype), hashlib.blake2b(data, digest_size=16).digest())

    def on(self, device: torch.device) -> Tensor:
        """The copy on that device, made once."""
        if device.type == "cpu":
            tensor: Tensor = self.tensor
            return tensor
        if device not in self._devices:
            with torch.inference_mode(False):
                self._devices[device] = self.tensor.to(device)
        return self._devices[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operand) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Operand, (self.tensor,)

    def __repr__(self) -> str:
        return _listed(self.tensor)


def _listed(tensor: Tensor) -> str:
    if tensor.ndim > 1:
        rows = [_listed(row) for row in tensor[:3]]
        return f"[{', '.join(rows + ['...'] * (tensor.shape[0] > 3))}]"
    values = tensor.tolist()
    if len(values) <= 8:
        return f"[{', '.join(map(str, values))}]"
    return f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def integers(call: str, name: str, value: Any, *, low: int | None = 0, dims: tuple[int, ...] = (1,)) -> Tensor:
    """A tensor, list or array of integers as an int64 tensor with one of the given numbers of dimensions."""
    tensor = value if isinstance(value, Tensor) else _from_sequence(call, name, value)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        rule = f"{name} must hold integers"
        raise ArgumentTypeError.of(call, rule, f"{name} as {shown(tensor)}", "Convert it with .to(torch.int64)")
    if tensor.is_meta:
        rule = f"{name} must have values"
        raise ArgumentError.of(call, rule, f"{name} on the meta device", "Pass a tensor that holds data")
    if tensor.ndim not in dims:
        rule = f"{name} must have {' or '.join(str(d) for d in dims)} dimension{'s' if dims != (1,) else ''}"
        raise ShapeError.of(call, rule, f"{name} of shape {tuple(tensor.shape)}", "Reshape it")
    tensor = tensor.detach().to("cpu", torch.int64)
    if not readable(tensor):
        return tensor
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()  # one that may be saved for a backward pass
    if low is not None and tensor.numel() and int(tensor.min()) < low:
        rule = f"{name} must hold integers >= {low}"
        raise ArgumentError.of(call, rule, f"a value of {int(tensor.min())}", f"Pass values >= {low}")
    if tensor.numel() and (int(tensor.max()) > LIMIT or int(tensor.min()) < -LIMIT):
        rule = f"{name} must hold integers of magnitude <= {LIMIT}"
        raise ArgumentError.of(call, rule, f"a value of {int(tensor.abs().max())}", "Pass smaller values")
    return tensor


def _from_sequence(call: str, name: str, value: Any) -> Tensor:
    fix = "Pass a list of whole numbers or an integer tensor"
    known = isinstance(value, (list, tuple))  # of which torch 2.9 cannot trace whole()
    if not known and (
        isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__") or whole(value) is not None
    ):
        raise ArgumentTypeError.of(call, f"{name} must be a list or tensor of integers", given_as(name, value), fix)
    entries = list(value)
    if entries and all(hasattr(x, "__len__") and not isinstance(x, (str, bytes)) for x in entries):
        rows = [_from_sequence(call, name, row) for row in entries]
        if any(row.shape != rows[0].shape for row in rows):
            sizes = sorted({tuple(row.shape) for row in rows})
            rule = f"rows of {name} must have one length"
            raise ShapeError.of(call, rule, f"rows of shapes {sizes}", "Pad with a negative id")
        return torch.stack(rows)
    numbers = [whole(x) for x in entries]
    if None in numbers:
        wrong = entries[numbers.index(None)]
        given = f"an entry {shown(wrong)} ({type(wrong).__name__})"
        raise ArgumentTypeError.of(call, f"{name} must hold integers", given, fix)
    if any(abs(x) > LIMIT for x in numbers if x is not None):
        rule = f"{name} must hold integers of magnitude <= {LIMIT}"
        raise ArgumentError.of(call, rule, f"{name}={shown(value)}", "Pass smaller values")
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def lookup(table: Tensor, row: Tensor, at: Tensor, outside: int) -> Tensor:
    """table[row, at] of a (rows, n) table; `outside` where `at` is not in 0..n-1. One row serves every batch row."""
    rows, size = table.shape
    if size == 0:
        return torch.full_like(at, outside)
    inside = (at >= 0) & (at < size)
    kept = at.clamp(0, size - 1)
    found = table[0][kept] if rows == 1 else table[row, kept]
    return torch.where(inside, found, outside)
