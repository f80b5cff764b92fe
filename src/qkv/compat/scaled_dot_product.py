"""`torch.nn.functional.scaled_dot_product_attention` on top of `qkv.attention`, and the patch that puts it in place.

| PyTorch | here |
|---|---|
| `is_causal=True`, top-left whatever the lengths | `mask=qkv.causal(), positions="start"` |
| bool `attn_mask`, True = attend | `mask=` |
| float `attn_mask`, added to the scores | `bias=` |
| `torch.nn.attention.bias.causal_lower_right(Lq, Lk)` | `mask=qkv.causal(), positions="end"` |
| any number of leading dimensions that broadcast | one batch dimension and one of heads |
| `enable_gqa=True`, head h reads key head h // (Hq / Hk) | Hq != Hkv |
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from numbers import Real
from types import TracebackType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import qkv.backends.sdpa  # noqa: F401  it binds PyTorch's function when it loads: that must be before any patch of ours
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, describe
from qkv.functional import attention
from qkv.masks import Mask, causal
from qkv.masks.arguments import shown

# The builtin itself and not the attribute of torch.nn.functional: that one may be patched, by us or by others.
_torch_sdpa: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention

_CALL = "qkv.compat.sdpa()"
_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class TorchShapeError(ShapeError, RuntimeError):
    """Sizes that do not fit together, where PyTorch raises a RuntimeError."""


class TorchArgumentError(ArgumentError, RuntimeError):
    """A value outside its range or a forbidden combination, where PyTorch raises a RuntimeError."""


class TorchArgumentTypeError(ArgumentTypeError, RuntimeError):
    """A dtype that the function does not take, where PyTorch raises a RuntimeError."""


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what `torch.nn.functional.scaled_dot_product_attention` computes, with the same arguments, by qkv.

    ::

        torch.nn.functional.scaled_dot_product_attention = qkv.compat.sdpa      # everywhere, or
        with qkv.compat.patch_sdpa(): ...                                       # for a while

    Parameters
    ----------
    query : Tensor, shape (..., Hq, Lq, D)
        float64, float32, bfloat16 or float16. Two or more dimensions; those before Lq broadcast with key's and value's.
    key : Tensor, shape (..., H, Lk, D)
    value : Tensor, shape (..., H, Lk, Dv)
    attn_mask : Tensor, broadcastable to (..., Hq, Lq, Lk)
        bool: True = attend. Floating, in query's dtype or float32: added to the scores, -inf hides, with a gradient.
        A `torch.nn.attention.bias.CausalBias` is causal attention in either alignment.
    dropout_p : float
        Probability in [0, 1] that a weight is dropped, applied whatever the mode of any module. Seeded from torch's
        generator, but not the weights that PyTorch's kernels drop.
    is_causal : bool
        Query i sees keys j <= i, also where Lq != Lk (top-left). Not together with attn_mask.
    scale : float
        1/sqrt(D) unless given; any float, also 0 and negative.
    enable_gqa : bool
        Dimension -3 may be smaller in key and in value, each dividing query's; query head h reads key head
        h // (Hq / Hk) and value head h // (Hq / Hv).

    Returns
    -------
    out : Tensor, shape (..., Hq, Lq, Dv)
        In query's dtype (autocast's, where autocast is on, for all but float64). A row that sees no key is 0, and so
        are its gradients: that is also what PyTorch 2.13 gives on the CPU, in its math and its fused path.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
        Arguments that do not fit; where PyTorch raises a RuntimeError, they are one as well. attn_mask together with
        is_causal is refused always: PyTorch documents the error, but its fused CPU path lets it pass.

    Notes
    -----
    Passed on to PyTorch's own function, which then decides on memory and speed:

    * any of the tensors not on the CPU, nested, sparse, of a subclass (FakeTensor and DTensor among them; CausalBias
      runs here), or of a dtype not listed above;
    * while torch.compile, torch.export or torch.jit.trace record the call, inside torch.func transforms and
      torch.vmap, for tangents of forward-mode AD, and while a TorchDispatchMode is active: they see only operations
      that go through the dispatcher.

    Everything else runs in qkv, or is an error: no path of quadratic memory is taken. `torch.nn.attention.sdpa_kernel`
    chooses among PyTorch's kernels and has no say here. Values at hidden keys are never read, so NaN there does no
    harm, which PyTorch does not promise. Differentiable as often as `qkv.attention`.

    Cost: that of `attention`; copies are made only of tensors that broadcast along one of several batch dimensions,
    and of keys or values whose numbers of heads differ from each other.
    Source: the reference code in the documentation of torch.nn.functional.scaled_dot_product_attention, PyTorch 2.13.

    Examples
    --------
    >>> import torch, qkv.compat
    >>> q, k, v = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 9, 64), torch.randn(2, 2, 9, 32)
    >>> qkv.compat.sdpa(q, k, v, is_causal=True, enable_gqa=True).shape
    torch.Size([2, 8, 5, 32])
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        _refuse_other_types(query=query, key=key, value=value)
    if is_causal.__class__ is not bool or enable_gqa.__class__ is not bool:
        _refuse_other_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    corner = _causal_bias(attn_mask)
    if _is_torchs(query, key, value, attn_mask if corner is None else None):
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )  # fmt: skip
    if attn_mask is not None and is_causal:
        fix = "Leave out is_causal and write it into the mask (attn_mask.tril()), or leave out attn_mask"
        raise TorchArgumentError(describe(_CALL, "attn_mask and is_causal exclude each other", "both", fix))
    if torch.is_autocast_enabled("cpu"):
        to = torch.get_autocast_dtype("cpu")
        query, key, value = _cast(query, to), _cast(key, to), _cast(value, to)
        attn_mask = _cast(attn_mask, to) if corner is None and attn_mask is not None else attn_mask
    _check_tensors(query, key, value, attn_mask if corner is None else None)
    p, factor = _dropout(dropout_p), _scale(scale)

    q, k, v, lead = _folded(query, key, value, enable_gqa)
    mask: Mask | Tensor | None = None
    bias: Tensor | None = None
    positions = "start"
    if corner is not None:
        mask, positions = causal(), _alignment(corner, q.shape[2], k.shape[2])
    elif is_causal:
        mask = causal()
    elif attn_mask is not None:
        fitted = _fitted(attn_mask, (*lead, q.shape[2], k.shape[2]))
        mask, bias = (fitted, None) if fitted.dtype == torch.bool else (None, fitted)
    if q.shape[3] == 0:  # every score is 0: one coordinate of zeros says the same
        q, k, factor = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    elif factor is not None and not math.isfinite(factor):
        q, factor = q * factor, 1.0  # the scores, and so the rows, become NaN or infinite as they do in PyTorch
    if p == 1:
        out = _nothing(q, k, v, bias)
    else:
        out = attention(q, k, v, mask, positions=positions, bias=bias, scale=factor, dropout_p=p)
    return out.reshape(*lead, q.shape[2], v.shape[3]) if len(lead) != 2 else out


# ----------------------------------------------------------------------------------------- what is passed on to PyTorch
def _is_torchs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether the call is PyTorch's own to answer; the docstring of `sdpa` lists the reasons."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if _foreign(query) or _foreign(key) or _foreign(value) or (attn_mask is not None and _foreign(attn_mask)):
        return True
    if query.dtype not in _DTYPES or key.dtype not in _DTYPES or value.dtype not in _DTYPES:
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return False
    given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(x) or forward_ad.unpack_dual(x).tangent is not None for x in given)


def _foreign(x: Tensor) -> bool:
    return type(x) not in _PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_nested


def _causal_bias(attn_mask: Any) -> Any:
    """attn_mask as a CausalBias, or None: it holds no data, only the alignment of a causal mask."""
    if attn_mask is None or type(attn_mask) in _PLAIN:
        return None
    if not isinstance(attn_mask, Tensor):
        given = f"attn_mask={shown(attn_mask)} ({type(attn_mask).__name__})"
        fix = "Pass a bool or floating tensor; a qkv mask goes to qkv.attention(mask=)"
        raise ArgumentTypeError(describe(_CALL, "attn_mask must be a tensor", given, fix))
    from torch.nn.attention.bias import CausalBias  # loads on first use: hardly anyone passes one

    return attn_mask if isinstance(attn_mask, CausalBias) else None


def _alignment(corner: Any, Lq: int, Lk: int) -> str:
    """Where a CausalBias puts the queries."""
    from torch.nn.attention.bias import CausalVariant

    made_for = (corner.seq_len_q, corner.seq_len_kv)
    if corner.variant == CausalVariant.UPPER_LEFT or made_for[0] == made_for[1]:
        return "start"  # as PyTorch: the lengths it was made for play no part
    if made_for != (Lq, Lk):
        given = f"causal_lower_right{made_for}, Lq={Lq} and Lk={Lk}"
        fix = f"Use causal_lower_right({Lq}, {Lk})"
        raise TorchShapeError(describe(_CALL, "a lower-right causal bias is made for its lengths", given, fix))
    return "end"


# --------------------------------------------------------------------------------------------------------------- checks
def _refuse_other_types(**given: Any) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            got = f"{name}={shown(x)} ({type(x).__name__})"
            raise ArgumentTypeError(describe(_CALL, f"{name} must be a tensor", got, "Pass a tensor (..., H, L, D)"))


def _refuse_other_flags(**given: Any) -> None:
    for name, x in given.items():
        if not isinstance(x, bool):
            got = f"{name}={shown(x)} ({type(x).__name__})"
            raise ArgumentTypeError(describe(_CALL, f"{name} must be a bool", got, "Pass True or False"))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    if not query.dtype == key.dtype == value.dtype:
        given = ", ".join(f"{n} {_short(x)}" for n, x in (("query", query), ("key", key), ("value", value)))
        fix = "Convert them with .to(query.dtype)"
        raise TorchArgumentTypeError(describe(_CALL, "query, key and value must share one dtype", given, fix))
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        rule = "query, key and value must have at least 2 dimensions"
        raise TorchShapeError(describe(_CALL, rule, _sizes(query, key, value), "Pass (..., H, L, D)"))
    if query.shape[-1] != key.shape[-1]:
        fix = "Project both to one head size"
        raise TorchShapeError(
            describe(_CALL, "query and key must have one last dimension D", _sizes(query, key, value), fix)
        )
    if key.shape[-2] != value.shape[-2]:
        fix = "Every key has one value: give them the same tokens"
        raise TorchShapeError(describe(_CALL, "key and value must have one length Lk", _sizes(query, key, value), fix))
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        given = f"attn_mask {_short(attn_mask)} and query {_short(query)}"
        fix = "Convert it with .to(query.dtype) where it is added, with .bool() where it says who may attend"
        raise TorchArgumentTypeError(describe(_CALL, "attn_mask must be bool, float32 or of query's dtype", given, fix))


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _real(name: str, x: Any, fix: str) -> float:
    if not isinstance(x, Real) and not (isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex()):
        given = f"{name}={shown(x)} ({type(x).__name__})"
        raise ArgumentTypeError(describe(_CALL, f"{name} must be a number", given, fix))
    return float(x)


def _dropout(x: Any) -> float:
    fix = "Use 0 for no dropout"
    p = _real("dropout_p", x, fix)
    if not 0 <= p <= 1:
        raise TorchArgumentError(describe(_CALL, "dropout_p must be in [0, 1]", f"dropout_p={p}", fix))
    return p


def _scale(x: Any) -> float | None:
    return None if x is None else _real("scale", x, "Leave it out for 1/sqrt(D)")


def _cast(x: Tensor, to: torch.dtype) -> Tensor:
    """What autocast does to an argument: floating tensors change their dtype, float64 stays."""
    return x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x


# --------------------------------------------------------------------------------------------------------------- shapes
def _folded(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), and the leading dimensions that B and Hq stand for."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, tuple(query.shape[:2])
    shapes: list[tuple[int, ...]] = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if gqa:
        key, value = _same_heads(query, key, value)
        shapes = [tuple(query.shape[:-2]), (*key.shape[:-3], 1), (*value.shape[:-3], 1)]
    try:
        lead = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        rule = "the dimensions before L must broadcast"
        fix = "Give each its size or 1"
        if not gqa and all(x.dim() > 2 for x in (query, key, value)) and query.shape[-3] != key.shape[-3]:
            fix += "; for fewer key/value heads than query heads pass enable_gqa=True"
        raise TorchShapeError(describe(_CALL, rule, _sizes(query, key, value), fix)) from None
    B, Hq = math.prod(lead[:-1]), lead[-1] if lead else 1
    Hk, Hv = (x.shape[-3] if x.dim() > 2 else 1 for x in (key, value))
    Hkv = Hk if Hk == Hv and (gqa or Hq) else Hq  # one head shared by all stays one
    return _fold(query, lead, B, Hq), _fold(key, lead, B, Hkv), _fold(value, lead, B, Hkv), lead


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with one number of heads, that query's is a multiple of."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        given, fix = _sizes(query, key, value), "Pass (..., H, L, D)"
        raise TorchShapeError(describe(_CALL, "enable_gqa needs a dimension of heads", given, fix))
    Hq, Hk, Hv = (x.shape[-3] for x in (query, key, value))
    if not Hq == Hk == Hv and (not Hk or not Hv or Hq % Hk or Hq % Hv or not Hq):
        given = f"{_sizes(query, key, value)} → Hq={Hq}, Hk={Hk}, Hv={Hv}"
        fix = "Use numbers of heads that divide Hq, or check that the heads are dimension -3"
        raise TorchShapeError(describe(_CALL, "query heads must be a multiple of key and of value heads", given, fix))
    if Hk != Hv:
        heads = math.lcm(Hk, Hv)
        key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    return key, value


def _fold(x: Tensor, lead: tuple[int, ...], B: int, H: int) -> Tensor:
    """x (..., h, L, D) as (B, H, L, D): a view, unless it broadcasts along some of several batch dimensions."""
    L, D = x.shape[-2:]
    h = x.shape[-3] if x.dim() > 2 else 1
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, h, L, D).expand(B, H, L, D)
    return x.expand(*lead[:-1], H, L, D).reshape(B, H, L, D)


def _fitted(attn_mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """attn_mask, which broadcasts to `full` = (..., Hq, Lq, Lk), in 4 dimensions that broadcast to (B, Hq, Lq, Lk)."""
    shape = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        given = f"attn_mask {tuple(attn_mask.shape)} for {full}"
        fix = "Give each dimension its size or 1"
        raise TorchShapeError(describe(_CALL, "attn_mask must broadcast to (..., Hq, Lq, Lk)", given, fix))
    shape = (1,) * (4 - len(shape)) + shape
    batch, rest = shape[:-3], shape[-3:]
    if all(n == 1 for n in batch):
        return attn_mask.reshape(1, *rest)
    return attn_mask.reshape(shape).expand(*full[:-3], *rest).reshape(math.prod(full[:-3]), *rest)


def _nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What is left when every weight is dropped: zeros, that pass zeros as gradients to everything."""
    given = (q, k, v) if bias is None else (q, k, v, bias)
    nil = torch.stack([x.flatten()[:0].sum(dtype=q.dtype) for x in given]).sum()
    return q.new_zeros(*q.shape[:3], v.shape[3]) + nil


# ---------------------------------------------------------------------------------------------------------------- patch
class _Level:
    """One assignment of `sdpa` to torch.nn.functional: what was there before, and how many contexts rely on it."""

    def __init__(self, before: Any) -> None:
        self.before, self.users = before, 1


_levels: list[_Level] = []
_lock = threading.Lock()


class patch_sdpa(contextlib.ContextDecorator):
    """Make `torch.nn.functional.scaled_dot_product_attention` mean `qkv.compat.sdpa` inside a block or a function.

    `torch.nn.MultiheadAttention`, `torch.nn.Transformer*` and every model that calls the function through the module
    then run on qkv. What was there before comes back when the block ends, also by an exception. Blocks nest, and one
    object may be entered again.

    Notes
    -----
    * Names bound before the patch (`from torch.nn.functional import scaled_dot_product_attention`) are not changed,
      nor is `torch._C._nn.scaled_dot_product_attention`.
    * In evaluation without gradients, `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` run fused
      code of PyTorch that never calls the function. `torch.backends.mha.set_fastpath_enabled(False)` sends them
      through it.
    * The attribute of a module belongs to the whole process: while any thread is inside a block, all threads use qkv,
      and the last one to leave restores. A function that someone else assigns meanwhile stays in place.
    * As a decorator it covers the call of a function; what a generator or coroutine runs later is outside.
    * torch.jit.script reads the function's source and cannot compile `sdpa`: script outside of the block.

    Cost: about a microsecond to enter and leave.

    Examples
    --------
    >>> import torch, qkv.compat
    >>> layer = torch.nn.MultiheadAttention(32, 4)
    >>> x = torch.randn(10, 2, 32)
    >>> with qkv.compat.patch_sdpa():
    ...     out, _ = layer(x, x, x, need_weights=False)
    >>> out.shape
    torch.Size([10, 2, 32])

    >>> @qkv.compat.patch_sdpa()
    ... def step(model, x):
    ...     return model(x)
    """

    def __enter__(self) -> None:
        with _lock:
            found = torch.nn.functional.scaled_dot_product_attention
            if _levels and found is sdpa:
                _levels[-1].users += 1
                return
            _levels.append(_Level(found))
            torch.nn.functional.scaled_dot_product_attention = sdpa  # type: ignore[assignment]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            level = _levels[-1]
            level.users -= 1
            if level.users == 0:
                _levels.pop()
                # An assignment that someone made inside the block is not ours to undo.
                if torch.nn.functional.scaled_dot_product_attention is sdpa:
                    torch.nn.functional.scaled_dot_product_attention = level.before
