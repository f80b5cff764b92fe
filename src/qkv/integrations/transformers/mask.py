"""What a model passes from its mask function to its attention layers: a mask of qkv and where the queries stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkv import _torch
from qkv.errors import ArgumentTypeError, UnsupportedError
from qkv.integrations.transformers.askers import asking, say_own, takes_attention_by_name, why_eager
from qkv.integrations.transformers.parts import (
    Frame,
    MaskFunction,
    Node,
    Parts,
    Window,
    quadratic,
    reach,
    real_keys,
    translate,
)
from qkv.masks import Mask

_CALL = "attn_implementation='qkv'"


# What may be done to the tensor of a mask without taking its truth values for numbers. Its shape and its logic:
_SHAPE = {
    "__and__", "__contains__", "__deepcopy__", "__format__", "__getitem__", "__invert__", "__len__", "__or__",
    "__rand__", "__repr__", "__ror__", "__xor__", "all", "any", "as_subclass", "bitwise_and", "bitwise_not",
    "bitwise_or", "broadcast_to", "cat", "chunk", "clone", "concat", "contiguous", "cpu", "cuda", "data_ptr",
    "detach", "dim", "element_size", "equal", "expand", "expand_as", "flatten", "flip", "gather",
    "index_select", "is_contiguous", "is_floating_point", "is_inference", "logical_and", "logical_not",
    "logical_or", "narrow", "numel", "pad", "permute", "repeat", "repeat_interleave", "reshape", "roll",
    "select", "size", "split", "squeeze", "stack", "stride", "tolist", "transpose", "tril", "triu", "unbind",
    "unflatten", "unsqueeze", "untyped_storage", "view", "view_as",
}  # fmt: skip
# It decides what becomes of numbers: True = may attend, as in `sdpa`, where code was written for that.
_CONDITION = {"bool", "masked_fill", "masked_fill_", "to", "where"}


class ModelMask:
    """A mask for one forward pass of a model, as a value.

    Attributes
    ----------
    mask : Mask or None
        Which of the first `keys` keys each query may attend to; None = all of them.
    start : int
        The position of query 0 among the keys.
    keys : int
        No query sees a key from here on: a StaticCache's part that is not filled yet.
    shape : (B, 1, Lq, Lk), as that of the tensor it stands for

    It passes through what models do with masks (dicts by layer type, `.to(device)`, `.contiguous()`, checkpointing).
    Where a model cuts or combines masks it becomes the bool tensor that `sdpa` would have had, with one warning:
    True = may attend. It is never a number: what adds it to scores, multiplies or converts it means the float mask of
    `eager` (0 and the smallest number), for which 1 and 0 would be silently wrong, and is an UnsupportedError.
    """

    ndim = 4
    dtype = torch.bool
    requires_grad = False

    def __init__(
        self, mask: Mask | None, start: int, keys: int, shape: tuple[int, int, int, int], device: torch.device
    ) -> None:
        self.mask, self.start, self.keys = mask, start, keys
        self.shape = torch.Size(shape)
        self.device = device

    def tensor(self) -> Tensor:
        """The mask as a bool tensor (B, 1, Lq, Lk), True = may attend. Cost: B Lq Lk bytes."""
        B, _, Lq, _ = self.shape
        seen = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if self.mask is None:
            seen[..., : self.keys] = True
        else:
            seen[..., : self.keys] = self.mask.tensor(Lq, self.keys, positions=self.start, B=B)
        return seen

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def to(self, *args: Any, **kwargs: Any) -> ModelMask:
        """Itself: it has nothing on a device. What asks for another dtype asks for numbers."""
        if not _dtypes(args, kwargs):
            return self
        _check_use("to", args, kwargs)
        return self

    def contiguous(self, **kwargs: Any) -> ModelMask:
        return self

    def __getitem__(self, index: Any) -> Any:
        """Itself where the index takes everything (models cut masks to the keys' length); else of the tensor."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= 4 and all(_whole(part, n) for part, n in zip(parts, self.shape, strict=False)):
            return self
        return self._as_tensor("an index")[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _check_use(name)
        return getattr(self._as_tensor(f".{name}"), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "a function")

        def plain(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(plain, x))
            return x._as_tensor(name) if isinstance(x, ModelMask) else x

        _check_use(name, args, kwargs or {})
        return func(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    def _as_tensor(self, use: str) -> Tensor:
        if self.shape[2] > 1:
            quadratic(f"the model uses its attention mask as a tensor ({use})")
        return self.tensor().as_subclass(MaskTensor)

    def __and__(self, other: Any) -> Any:
        return self._as_tensor("&") & other

    def __or__(self, other: Any) -> Any:
        return self._as_tensor("|") | other

    def __invert__(self) -> Any:
        return ~self._as_tensor("~")

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        fix = "Test for a mask with `is None`"
        raise ArgumentTypeError.of(_CALL, "a mask is neither true nor false", repr(self), fix)

    def __repr__(self) -> str:
        return f"ModelMask({self.mask!r}, start={self.start}, keys={self.keys}, shape={tuple(self.shape)})"


def _refused(name: str) -> Callable[..., Any]:
    def operator(self: ModelMask, *others: Any) -> Any:
        raise _no_number(name)

    operator.__name__ = name
    return operator


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "lt", "le", "gt", "ge"):
    setattr(ModelMask, f"__{_name}__", _refused(f"__{_name}__"))
    if _name not in ("lt", "le", "gt", "ge"):
        setattr(ModelMask, f"__r{_name}__", _refused(f"__r{_name}__"))
for _name in ("neg", "float", "int"):
    setattr(ModelMask, f"__{_name}__", _refused(f"__{_name}__"))


class MaskTensor(Tensor):
    """The bool tensor of a ModelMask (True = may attend), which like it is not to be taken for numbers.

    Its shape may be changed, it may be joined with other masks, and code that takes attention by name, and so was
    written for the bool masks of `sdpa`, may choose by it (`where`, `masked_fill`). All else is an UnsupportedError.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "a function")
        _check_use(name, args, kwargs or {})

        def plain(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(plain, x))
            return x.as_subclass(Tensor) if isinstance(x, MaskTensor) else x

        def guarded(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(guarded, x)) if type(x) in (tuple, list) else x
            return x.as_subclass(MaskTensor) if type(x) is Tensor and x.dtype == torch.bool and x.ndim else x

        if name == "as_subclass":
            return func(*args, **(kwargs or {}))
        with _torch.without_torch_function():
            found = func(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})
            return guarded(found) if name in _SHAPE or name == "to" else found


def _dtypes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.dtype]:
    """The dtypes that a call of `.to` asks for; that of another tensor (or mask) among them."""
    given = [*args, *kwargs.values()]
    return [x if isinstance(x, torch.dtype) else x.dtype for x in given if isinstance(x, (torch.dtype, Tensor))]


def _check_use(name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
    """Refuse to be a number. `name` is that of a method or function of torch."""
    if name in _SHAPE or name in ("__get__", "__set__"):
        return
    if name == "to":
        wanted = _dtypes(args[1:] if args and isinstance(args[0], MaskTensor) else args, kwargs or {})
        if not wanted or (all(x == torch.bool for x in wanted) and takes_attention_by_name(asking())):
            return
    elif name in _CONDITION and not _chosen(name, args) and takes_attention_by_name(asking()):
        return
    raise _no_number(name)


def _chosen(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the mask is among the numbers of which one is chosen, and so would be one."""
    numbers = args[1:] if name == "where" else (*args[:1], *args[2:]) if name.startswith("masked_fill") else ()
    return any(isinstance(x, (ModelMask, MaskTensor)) for x in numbers)


def _no_number(name: str) -> UnsupportedError:
    rule = "a mask must not be computed with: the model's code means the float mask of another implementation"
    fix = "Use attn_implementation='eager' in this model, or for its part, such as {'text_config': 'eager'}"
    return UnsupportedError.of(_CALL, rule, f"{name} of an attention mask", fix)


def _whole(part: Any, size: int) -> bool:
    if part is Ellipsis:
        return True
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    return part.start in (None, 0) and (part.stop is None or (isinstance(part.stop, int) and part.stop >= size))


@cache
def _parts() -> Parts:
    from transformers import masking_utils

    return Parts(masking_utils)


def _model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Any = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> ModelMask | Tensor | None:
    """The mask function of attn_implementation="qkv", as transformers calls it: everything by keyword.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
    q_offset, kv_offset : int or Tensor ()
        The absolute positions of query 0 and key 0.
    mask_function : (batch, head, query, key) -> bool, at absolute positions; causal unless given
    attention_mask : bool Tensor (B, L), True = a real token, at absolute positions; or a ModelMask made before
    config : the model's config

    What tells `sdpa` when it needs no mask (local_size, allow_is_causal_skip, ...) has no meaning here.

    Returns
    -------
    ModelMask, without a tensor of Lq x Lk unless `mask_function` is one nobody knows. Where the code that asks computes
    attention itself (it takes none by name, or transformers says so of the model's class): the mask of `eager`.

    Cost: O(B Lk) where there is padding, else nothing that grows.
    """
    why = why_eager(config)
    if why is not None:
        if why == "own":
            say_own(config)
        elif q_length > 1:
            quadratic("the model's code asks for a mask that is a tensor")
        given = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
        given |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "use_vmap": use_vmap, "device": device}
        if mask_function is not None:
            given["mask_function"] = mask_function
        return _eager_mask(given, config=config, **others)
    if isinstance(attention_mask, ModelMask):  # generate() makes the masks of a StaticCache before it calls the model
        return attention_mask
    at, device = int(q_offset), torch.device(device)
    parts = _parts()
    node: Node = Window(None, 0) if mask_function is None else parts.parse(mask_function)
    begin = int(kv_offset)
    # Keys that no query can see are left out here, and the call is one of fewer keys.
    seen = max(1, min(kv_length, at - begin + q_length + reach(node)))
    frame = Frame(batch_size, q_length, seen, at, begin, use_vmap, device)
    mask = translate(node, frame, parts)
    if attention_mask is not None:
        real = attention_mask[:, begin : begin + seen].to(torch.bool)
        if real.shape[1] < seen:
            real = torch.nn.functional.pad(real, (0, seen - real.shape[1]))
        hidden = real_keys(real, frame)
        mask = hidden if mask is None else mask if hidden is None else mask & hidden
    return ModelMask(mask, frame.first, seen, (batch_size, 1, q_length, kv_length), device)


def _eager_mask(given: dict[str, Any], dtype: torch.dtype = torch.float32, **others: Any) -> Tensor | None:
    from transformers.masking_utils import eager_mask

    made = given["attention_mask"]
    if not isinstance(made, ModelMask):
        found: Tensor | None = eager_mask(**given, dtype=dtype, **others)
        return found
    low = torch.finfo(dtype).min  # generate() made it before it called the model
    return torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill(~made.tensor(), low)


# A tracer must not look inside: it would fix every number of this step. torch.compile breaks its graph here.
model_mask: Callable[..., Any] = torch.compiler.disable(_model_mask)
