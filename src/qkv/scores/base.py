"""What a score term is, sums of terms, and tensors as terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.checks import DTYPES, no_dtensor, short
from qkv.errors import ArgumentTypeError, ShapeError
from qkv.masks import Sizes, Tile


class TermSpec(NamedTuple):
    """What a backend may know of a term before it runs: the kind, and the tensor's metadata (empty for score_mod)."""

    kind: str  # "tensor", "alibi", "relative" or "score_mod"
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class ScoreTerm:
    """One term, or a sum of terms, of `bias=`. Immutable; `a + b` applies a, then b."""

    __slots__ = ()
    kind = ""
    depends_on_position = True

    @property
    def terms(self) -> tuple[ScoreTerm, ...]:
        return (self,)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the term holds, in a fixed order."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        """The same term over other tensors of the same metadata."""
        return self

    def lowered(self, device: torch.device) -> ScoreTerm:
        """The plain form that backends take; differentiable towards the tensors given by the user."""
        return self.with_tensors([t.resolve_neg() for t in self.tensors()])

    def check(self, call: str, sizes: Sizes) -> None:
        """Raise a typed error unless the term fits the call."""

    def cut(self, rows: slice, keys: slice) -> ScoreTerm:
        """The term for some of a call's queries and keys, where positions count from the first of these keys.

        What looks at p - j alone stays as it is."""
        return self

    def of_heads(self, heads: slice) -> ScoreTerm:
        """The term for some of a call's query heads."""
        return self.with_tensors([t[heads] for t in self.tensors()])

    def specs(self) -> tuple[TermSpec, ...]:
        return tuple(TermSpec(t.kind, *_metadata(t.tensors())) for t in self.terms)

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        """The additive value on a tile, broadcastable to the tile's 4-D shape."""
        raise NotImplementedError

    def new_gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Zeroed buffers that `add_gradients` adds to, in the shapes of `tensors()`."""
        # Sums over many scores run in float64: a float32 sum of 10^5 terms alone could break the error bound.
        return tuple(torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in self.tensors())

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        """Add a 4-D tile of score gradients."""

    def __add__(self, other: Any) -> ScoreTerm:
        term = as_bias(other, "qkv score terms")
        return self if term is None else Sum((*self.terms, *term.terms))

    def __radd__(self, other: Any) -> ScoreTerm:
        term = as_bias(other, "qkv score terms")
        return self if term is None else Sum((*term.terms, *self.terms))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # torch.compile asks here where one side of + is a tensor; every other torch function refuses a term.
        if func not in (Tensor.add, torch.add, Tensor.__add__) or len(args) != 2:
            return NotImplemented
        terms = [as_bias(x, "qkv score terms") for x in args]
        return Sum(tuple(part for term in terms if term is not None for part in term.terms))


def _metadata(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (tuple(tensors[0].shape), tensors[0].stride(), tensors[0].dtype) if tensors else ()


def _select(t: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    if t.shape[dim] == 1:
        return t
    if isinstance(where, slice):
        return t.narrow(dim, where.start, where.stop - where.start)
    return t.index_select(dim, where)


class Sum(ScoreTerm):
    """Several terms, applied from left to right."""

    __slots__ = ("_terms",)
    kind = "sum"

    def __init__(self, terms: tuple[ScoreTerm, ...]) -> None:
        self._terms = terms

    @property
    def terms(self) -> tuple[ScoreTerm, ...]:
        return self._terms

    @property
    def depends_on_position(self) -> bool:  # type: ignore[override]
        return any(t.depends_on_position for t in self._terms)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for t in self._terms for x in t.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        rest, terms = list(tensors), []
        for term in self._terms:
            count = len(term.tensors())
            terms.append(term.with_tensors(rest[:count]))
            rest = rest[count:]
        return Sum(tuple(terms))

    def cut(self, rows: slice, keys: slice) -> ScoreTerm:
        return Sum(tuple(t.cut(rows, keys) for t in self._terms))

    def of_heads(self, heads: slice) -> ScoreTerm:
        return Sum(tuple(t.of_heads(heads) for t in self._terms))

    def lowered(self, device: torch.device) -> ScoreTerm:
        return Sum(tuple(t.lowered(device) for t in self._terms))

    def check(self, call: str, sizes: Sizes) -> None:
        for term in self._terms:
            term.check(call, sizes)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._terms))


class OfTensor(ScoreTerm):
    """A term that one tensor says."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._tensor,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return type(self)(tensors[0])


class TensorBias(OfTensor):
    """A tensor that broadcasts to (B, Hq, Lq, Lk), indexed by query index. -inf hides."""

    __slots__ = ()
    kind = "tensor"
    depends_on_position = False

    def check(self, call: str, sizes: Sizes) -> None:
        t = self._tensor
        if t.dtype not in (sizes.dtype, torch.float32):
            rule = "a bias tensor must have q's dtype or float32"
            given = f"bias {short(t.dtype)} and q {short(sizes.dtype)}"
            raise ArgumentTypeError.of(call, rule, given, "Convert it with .to()")
        check_device(call, "bias", t, sizes)
        full = (sizes.B, sizes.Hq, sizes.Lq, sizes.Lk)
        padded = (1,) * (4 - t.dim()) + tuple(t.shape)
        if t.dim() > 4 or any(size not in (1, whole) for size, whole in zip(padded, full, strict=True)):
            rule = "a bias tensor must broadcast to (B, Hq, Lq, Lk)"
            raise ShapeError.of(call, rule, f"bias {tuple(t.shape)} for {full}", "Give each dimension its size or 1")

    def cut(self, rows: slice, keys: slice) -> ScoreTerm:
        t = self._view(self._tensor)
        return TensorBias(_select(_select(t, 2, rows), 3, keys))

    def of_heads(self, heads: slice) -> ScoreTerm:
        return TensorBias(_select(self._view(self._tensor), 1, heads))

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        t = self._view(self._tensor)
        for dim, where in enumerate((at.batch, at.heads, at.rows, at.keys)):
            t = _select(t, dim, where)
        return t.to(dtype)

    def new_gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        t = self._tensor
        reduced = t.dim() < 4 or 1 in t.shape
        return (torch.zeros(t.shape, dtype=torch.float64 if reduced else dtype, device=t.device),)

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        buffer = self._view(buffers[0])
        for dim, where in enumerate((at.batch, at.heads, at.rows, at.keys)):
            buffer = _select(buffer, dim, where)
        shared = [dim for dim in range(4) if buffer.shape[dim] == 1 and ds.shape[dim] != 1]
        buffer += ds.sum(shared, keepdim=True, dtype=buffer.dtype) if shared else ds

    @staticmethod
    def _view(t: Tensor) -> Tensor:
        return t[(None,) * (4 - t.dim())]

    def __repr__(self) -> str:
        return f"tensor {tuple(self._tensor.shape)}"


def check_device(call: str, name: str, t: Tensor, sizes: Sizes) -> None:
    no_dtensor(call, name, t)
    if t.device != sizes.device:
        given = f"{name} on {t.device} and q on {sizes.device}"
        raise ArgumentTypeError.of(call, f"{name} must be on q's device", given, "Move it with .to(q.device)")


def check_parameter(call: str, name: str, t: Any, dims: int, shape: str) -> None:
    if not isinstance(t, Tensor) or t.dtype not in DTYPES:
        got = f"{short(t.dtype)} tensor" if isinstance(t, Tensor) else type(t).__name__
        raise ArgumentTypeError.of(call, f"{name} must be a floating tensor", got, f"Give a tensor of shape {shape}")
    if t.dim() != dims:
        rule = f"{name} must have shape {shape}"
        raise ShapeError.of(call, rule, f"{tuple(t.shape)}", f"Give a tensor of shape {shape}")


def as_bias(x: Any, call: str = "qkv.attention()") -> ScoreTerm | None:
    """`bias=` as a term: None stays None, a floating tensor becomes a TensorBias, a term stays itself."""
    if x is None or isinstance(x, ScoreTerm):
        return x
    if isinstance(x, Tensor):
        if type(x).__name__ == "CausalBias":  # torch.nn.attention.bias has it: it holds no data, memory would be read
            fix = 'Pass mask=qkv.causal(), with positions="start" for the upper left corner, "end" for the lower right'
            raise ArgumentTypeError.of(call, "bias must hold what is added to the scores", "a CausalBias", fix)
        if x.dtype in DTYPES:
            return TensorBias(x)
        fix = "Pass a bool tensor as mask= (True = may attend)" if x.dtype == torch.bool else "Convert it to q's dtype"
        rule = "bias must be a floating tensor or a score term"
        raise ArgumentTypeError.of(call, rule, f"a {short(x.dtype)} tensor", fix)
    fix = "Pass a tensor, qkv.alibi, qkv.relative, qkv.score_mod or a sum of them"
    if callable(x):
        fix = "Wrap a function as qkv.score_mod(fn)"
    elif hasattr(x, "__array__"):
        fix = "Make a tensor of it with torch.from_numpy(bias)"
    raise ArgumentTypeError.of(call, "bias must be a floating tensor or a score term", type(x).__name__, fix)
