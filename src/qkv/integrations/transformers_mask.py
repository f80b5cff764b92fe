"""What a model passes from its mask function to its attention layers: a mask of qkv and where the queries stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkv.errors import ArgumentTypeError, describe
from qkv.integrations.transformers_parts import (
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
    Where a model computes with it as with a tensor it becomes the bool tensor that `sdpa` would have had, with one
    warning: True = may attend.
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
        """Itself: it has nothing on a device. What asks for another dtype asks for a tensor."""
        wanted = [*args, *kwargs.values()]
        if any(isinstance(x, torch.dtype) and x != torch.bool for x in wanted):
            return self._as_tensor(".to(dtype)").to(*args, **kwargs)  # type: ignore[return-value]
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
        return getattr(self._as_tensor(f".{name}"), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(plain, x))
            return x._as_tensor(getattr(func, "__name__", "a function")) if isinstance(x, ModelMask) else x

        return func(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    def _as_tensor(self, use: str) -> Tensor:
        if self.shape[2] > 1:
            quadratic(f"the model uses its attention mask as a tensor ({use})")
        return self.tensor()

    def __and__(self, other: Any) -> Any:
        return self._as_tensor("&") & other

    def __or__(self, other: Any) -> Any:
        return self._as_tensor("|") | other

    def __invert__(self) -> Any:
        return ~self._as_tensor("~")

    def __add__(self, other: Any) -> Any:
        return self._as_tensor("+") + other

    def __mul__(self, other: Any) -> Any:
        return self._as_tensor("*") * other

    __rand__, __ror__, __radd__, __rmul__ = __and__, __or__, __add__, __mul__

    def __bool__(self) -> bool:
        fix = "Test for a mask with `is None`"
        raise ArgumentTypeError(describe(_CALL, "a mask is neither true nor false", repr(self), fix))

    def __repr__(self) -> str:
        return f"ModelMask({self.mask!r}, start={self.start}, keys={self.keys}, shape={tuple(self.shape)})"


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
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Any = None,
    *,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> ModelMask:
    """The mask function of attn_implementation="qkv", as transformers calls it: everything by keyword.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
    q_offset, kv_offset : int or Tensor ()
        The absolute positions of query 0 and key 0.
    mask_function : (batch, head, query, key) -> bool, at absolute positions; causal unless given
    attention_mask : bool Tensor (B, L), True = a real token, at absolute positions; or a ModelMask made before
    cache_position : Tensor (Lq,), in place of q_length and q_offset in transformers 4

    What tells `sdpa` when it needs no mask (local_size, allow_is_causal_skip, ...) has no meaning here.

    Returns
    -------
    ModelMask, never a tensor of Lq x Lk unless `mask_function` is one nobody knows.

    Cost: O(B Lk) where there is padding, else nothing that grows.
    """
    if isinstance(attention_mask, ModelMask):  # generate() makes the masks of a StaticCache before it calls the model
        return attention_mask
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    assert q_length is not None
    assert kv_length is not None
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


# A tracer must not look inside: it would fix every number of this step. torch.compile breaks its graph here.
model_mask: Callable[..., ModelMask] = torch.compiler.disable(_model_mask)
