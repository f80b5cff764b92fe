"""Masks given as a tensor or as a Python function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.checks import readable, shown
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, describe, from_function
from qkv.masks.base import Mask
from qkv.masks.program import Builder, Op


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A bool tensor as a mask; made by `dense`."""

    t: Tensor
    version: int | None

    @property
    def varies_by_batch(self) -> bool:
        return self.t.ndim == 4 and self.t.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.t.ndim == 4 and self.t.shape[1] > 1

    def check(self, call: str, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        self._unchanged(call)
        sizes = (B, Hq, Lq, Lk)[-self.t.ndim :]
        if any(have not in (1, want) for have, want in zip(self.t.shape, sizes, strict=True)):
            names = ("B", "Hq", "Lq", "Lk")[-self.t.ndim :]
            want = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
            rule = f"a mask tensor must broadcast to ({', '.join(names)})"
            fix = f"Pass a bool tensor of shape {sizes}, with 1 where it is shared"
            raise ShapeError(describe(call, rule, f"mask {tuple(self.t.shape)} and {want}", fix))
        device = torch.device(device)
        mine = self.t.device
        if mine.type != device.type or (None not in (mine.index, device.index) and mine.index != device.index):
            rule = "a mask tensor must be on the device of the queries"
            raise ArgumentError(describe(call, rule, f"a mask on {mine} and queries on {device}", "Move it with .to()"))

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        self._unchanged("dense()")
        at = (b, h, i, j)[-self.t.ndim :]
        if self.t.numel() == 0:
            return torch.zeros(torch.broadcast_shapes(*(x.shape for x in at)), dtype=torch.bool, device=self.t.device)
        return self.t[tuple(torch.zeros_like(x) if n == 1 else x for x, n in zip(at, self.t.shape, strict=True))]

    def _unchanged(self, call: str) -> None:
        if self.version is not None and self.t._version != self.version:
            rule = "a mask tensor must not be changed in place after the mask was made"
            given = f"{self!r} changed {self.t._version - self.version} time(s)"
            raise ArgumentError(describe(call, rule, given, "Make a new mask from it with dense(t), or pass a copy"))

    def _device(self) -> torch.device:
        return self.t.device

    def _lower(self, builder: Builder) -> None:
        self._unchanged("dense()")
        strides = [0 if n == 1 else s for n, s in zip(self.t.shape, self.t.stride(), strict=True)]
        builder.emit(Op.DENSE, builder.operand(self.t), *([0] * (4 - self.t.ndim)), *strides)

    def _key(self) -> tuple[Any, ...]:
        # The tensor is held, so its id is not given to another one while this mask lives.
        return id(self.t), self.version

    def __reduce__(self) -> tuple[Any, ...]:
        return dense, (self.t,)

    def __repr__(self) -> str:
        return f"dense({shown(self.t).split(' ', 1)[1]})"


def dense(t: Tensor) -> Dense:
    """A bool tensor as a mask: query i sees key j where t[b, h, i, j], by index and whatever the positions.

    Parameters
    ----------
    t : bool tensor of shape (Lq, Lk) or (B, Hq, Lq, Lk), each size 1 or the full one. It is held by reference and not
        copied: changing it in place afterwards is an error at the next use.

    Raises ArgumentTypeError for other types (a float mask is a `bias=`), ShapeError for other numbers of dimensions.
    Cost: Lq Lk bytes are read; nothing is skipped unless another mask says so.

    >>> import torch, qkv
    >>> t = torch.eye(3, dtype=torch.bool)
    >>> print((qkv.dense(t) | qkv.prefix(1)).picture(3, 3))
    p/j 0 1 2
      0 ■ · ·
      1 ■ ■ ·
      2 ■ · ■
    """
    call = "qkv.dense()"
    if not isinstance(t, Tensor) or t.dtype != torch.bool:
        given = shown(t) if isinstance(t, Tensor) else f"{shown(t)} ({type(t).__name__})"
        fix = "Write t != 0 or t.bool(); a float mask that is added to the scores is bias="
        raise ArgumentTypeError(describe(call, "a mask tensor must be a bool tensor, True = may attend", given, fix))
    if t.ndim not in (2, 4):
        rule = "a mask tensor must be (Lq, Lk) or (B, Hq, Lq, Lk)"
        raise ShapeError(describe(call, rule, shown(t), "Add dimensions of size 1, e.g. t[:, None] for (B, Lq, Lk)"))
    if t.is_meta or t.layout != torch.strided:
        given = f"{shown(t)} on {t.device}, {t.layout}"
        raise ArgumentError(describe(call, "a mask tensor must hold its values in a strided tensor", given, "Fill it"))
    # A tensor made in inference mode keeps no version; its changes cannot be noticed.
    return Dense(t, None if not readable(t) or t.is_inference() else t._version)


@dataclass(frozen=True, eq=False, repr=False)
class MaskMod(Mask):
    """A Python function as a mask; made by `mask_mod`."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    @property
    def depends_on_position(self) -> bool:
        return True

    @property
    def varies_by_batch(self) -> bool:
        return True

    @property
    def varies_by_head(self) -> bool:
        return True

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        call = repr(self)
        try:
            seen = self.fn(b, h, p, j)
        except (QKVError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise from_function(call, "fn(b, h, p, j)", error) from error
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            fix = "Return a comparison of its arguments, e.g. j <= p"
            raise ArgumentTypeError(describe(call, "the function must return a bool tensor", shown(seen), fix))
        shape = torch.broadcast_shapes(b.shape, h.shape, p.shape, j.shape)
        if seen.ndim > len(shape) or any(
            n not in (1, m) for n, m in zip(reversed(seen.shape), reversed(shape), strict=False)
        ):
            rule = "the function's result must broadcast to its arguments"
            given = f"a result {tuple(seen.shape)} for arguments that broadcast to {tuple(shape)}"
            raise ShapeError(describe(call, rule, given, "Compute it elementwise from b, h, p and j"))
        return seen

    def _lower(self, builder: Builder) -> None:
        builder.supported = False

    def _key(self) -> tuple[Any, ...]:
        return (id(self.fn),)

    def __repr__(self) -> str:
        return f"mask_mod({getattr(self.fn, '__name__', type(self.fn).__name__)})"


def mask_mod(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> MaskMod:
    """A function as a mask: key j is visible where fn(b, h, p, j) is True.

    Parameters
    ----------
    fn : called with int64 tensors that broadcast (batch row, query head, query position, key position), once a tile;
        returns a bool tensor that broadcasts with them. It must depend on its arguments only. Two masks are equal
        where the function is the same object.

    Raises ArgumentTypeError for what cannot be called, and at use for a result that is not a bool tensor.
    Cost: fn runs in PyTorch on every tile that other masks leave; compiled kernels do not take it.

    >>> import qkv
    >>> def even_keys(b, h, p, j):
    ...     return j % 2 == 0
    >>> print((qkv.mask_mod(even_keys) & qkv.causal()).picture(3, 3))
    p/j 0 1 2
      0 ■ · ·
      1 ■ · ·
      2 ■ · ■
    """
    if not callable(fn):
        fix = "Pass a function of four tensors, e.g. lambda b, h, p, j: j <= p"
        given = f"{shown(fn)} ({type(fn).__name__})"
        raise ArgumentTypeError(describe("qkv.mask_mod()", "fn must be a function fn(b, h, p, j)", given, fix))
    return MaskMod(fn)


def as_mask(x: Any, call: str = "qkv.attention()") -> Mask | None:
    """What a user may write for `mask=` as a mask: a mask, a bool tensor, or None for none.

    >>> import torch
    >>> as_mask(torch.ones(2, 2, dtype=torch.bool))
    dense(bool tensor of shape (2, 2))
    """
    if x is None or isinstance(x, Mask):
        return x
    rule = "a mask must be a qkv mask or a bool tensor, True = may attend"
    if isinstance(x, Tensor):
        if x.dtype == torch.bool:
            return dense(x)
        if x.is_floating_point():
            fix = "Pass it as bias=, which is added to the scores; or write t == 0 if it holds 0 and -inf"
        else:
            fix = "Write t != 0 if 1 means may attend"
        raise ArgumentTypeError(describe(call, rule, shown(x), fix))
    fix = "Write qkv.causal(), qkv.sliding_window(n), ...; make an array a tensor with torch.from_numpy(x)"
    if callable(x):
        fix = "Wrap the function: qkv.mask_mod(fn), or call the constructor: qkv.causal()"
    elif isinstance(x, str):
        fix = f"Write it as a call, e.g. qkv.{x}()" if x.isidentifier() else "Write qkv.causal(), ..."
    raise ArgumentTypeError(describe(call, rule, f"{shown(x)} ({type(x).__name__})", fix))
