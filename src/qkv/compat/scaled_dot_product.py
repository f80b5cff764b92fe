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

import math
from typing import Any

import torch
from torch import Tensor

from qkv import _torch
from qkv.checks import DTYPES, flag, given_as, short
from qkv.compat import counting
from qkv.compat.arguments import (
    CALL,
    TorchArgumentError,
    TorchShapeError,
    as_dropout,
    as_scale,
    cast,
    check_tensors,
    fitted,
    folded,
    refuse_other_types,
)
from qkv.compat.attribute import aside, torch_sdpa
from qkv.errors import ArgumentTypeError
from qkv.functional import attention
from qkv.graph import eager
from qkv.masks import causal

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


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
    Everything plain on the CPU runs in qkv, or is an error: no path of quadratic memory is taken, and values at hidden
    keys are never read, so NaN there does no harm, which PyTorch does not promise. That holds for calls that are
    compiled, exported, mapped (torch.vmap), differentiated by torch.func or in forward mode, checkpointed or watched by
    a mode as well: they are `qkv.attention`'s, as often differentiable as its own, and what sees operators sees
    `torch.ops.qkv.attention`. `torch.nn.attention.sdpa_kernel` chooses among PyTorch's kernels; it is not asked.

    Handed to PyTorch's own function, which then decides on memory and speed, and to the `__torch_function__` of a
    class as without qkv:

    * any of the tensors not on the CPU, nested, sparse, of a subclass (CausalBias runs here; what stands for a plain
      tensor while a graph is made is one), or of a dtype not listed above;
    * while torch.jit.trace or torch.onnx record the call: what they write down has no operators of ours.

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
        if torch.overrides.has_torch_function((query, key, value)):  # a stand-in for a tensor, such as torch.fx's
            return _by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        refuse_other_types(query=query, key=key, value=value)
    for name, x in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        flag(CALL, name, x)
    corner = _causal_bias(attn_mask)
    if attn_mask is not None and is_causal:
        rule = "Explicit attn_mask should not be set when is_causal=True"  # PyTorch's words, for who looks for them
        if corner is not None:
            rule = "CausalBias should not be used with causal=True"
        fix = "Leave out is_causal and write it into the mask (attn_mask.tril()), or leave out attn_mask"
        raise TorchArgumentError.of(CALL, rule, "both", fix)
    why = _torchs(query, key, value, attn_mask if corner is None else None)
    if why is not None:
        counting.count("PyTorch", why)
        if corner is not None:  # it stands for a mask and holds none: only its own class may answer
            function = torch.nn.functional.scaled_dot_product_attention
            options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
            out: Tensor = corner.__torch_function__(function, (type(corner),), (query, key, value, corner), options)
            return out
        return _by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.is_autocast_enabled("cpu"):
        to = torch.get_autocast_dtype("cpu")
        query, key, value = cast(query, to), cast(key, to), cast(value, to)
        attn_mask = cast(attn_mask, to) if corner is None and attn_mask is not None else attn_mask
    check_tensors(query, key, value, attn_mask if corner is None else None)
    p, factor = as_dropout(dropout_p), as_scale(scale)

    q, k, v, lead = folded(query, key, value, enable_gqa)
    mask: Any = None
    bias: Tensor | None = None
    positions = "start"
    if corner is not None:
        mask, positions = causal(), _alignment(corner, q.shape[2], k.shape[2])
    elif is_causal:
        mask = causal()
    elif attn_mask is not None:
        fit = fitted(attn_mask, (*lead, q.shape[2], k.shape[2]))
        mask, bias = (fit, None) if fit.dtype == torch.bool else (None, fit)
    if q.shape[3] == 0:  # every score is 0: one coordinate of zeros says the same
        q, k, factor = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    elif factor is not None and not -math.inf < factor < math.inf:
        q, factor = q * factor, 1.0  # the scores, and so the rows, become NaN or infinite as they do in PyTorch
    if p == 1:
        out = _nothing(q, k, v, bias)
    else:
        out = attention(q, k, v, mask, positions=positions, bias=bias, scale=factor, dropout_p=p)
        counting.count_attention(q, k, v, mask, positions=positions, bias=bias, scale=factor, dropout_p=p)
    return out.reshape(*lead, q.shape[2], v.shape[3]) if len(lead) != 2 else out


# ----------------------------------------------------------------------------------------- what is handed to PyTorch
def _torchs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why the call is PyTorch's to answer, or None where it is ours; the docstring of `sdpa` lists the reasons."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None:
            continue
        if type(x) not in _PLAIN and not _torch.for_graph(x):
            return f"{name} is a {type(x).__name__}"
        if x.is_nested or x.layout is not torch.strided:
            return f"{name} is {'nested' if x.is_nested else str(x.layout).removeprefix('torch.')}"
        if not x.is_cpu and x.device.type != "cpu":
            return f"{name} is on {x.device.type}"
        if x is not attn_mask and x.dtype not in DTYPES:
            return f"{name} is {short(x.dtype)}"
    if _torch.jit_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()):
        return "torch.jit and ONNX know only PyTorch's own operators"
    return None


def _by_torch(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> Tensor:
    """PyTorch's own function, as its caller would have met it without us."""
    answering = {type(x) for x in (query, key, value, attn_mask) if torch.overrides.has_torch_function((x,))}
    if not answering:
        return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.compiler.is_dynamo_compiling():
        if all(kind.__module__.startswith("torch.") for kind in answering):  # they ask for the builtin by its own name
            return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return eager(_by_torch)(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    with aside(sdpa):
        return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _causal_bias(attn_mask: Any) -> Any:
    """attn_mask as a CausalBias, or None: it holds no data, only the alignment of a causal mask."""
    if attn_mask is None or type(attn_mask) in _PLAIN:
        return None
    if not isinstance(attn_mask, Tensor):
        fix = "Pass a bool or floating tensor; a qkv mask goes to qkv.attention(mask=)"
        raise ArgumentTypeError.of(CALL, "attn_mask must be a tensor", given_as("attn_mask", attn_mask), fix)
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
        raise TorchShapeError.of(CALL, "a lower-right causal bias is made for its lengths", given, fix)
    return "end"


def _nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What is left when every weight is dropped: zeros, that pass zeros as gradients to everything."""
    given = (q, k, v) if bias is None else (q, k, v, bias)
    nil = torch.stack([x.flatten()[:0].sum(dtype=q.dtype) for x in given]).sum()
    return q.new_zeros(*q.shape[:3], v.shape[3]) + nil
