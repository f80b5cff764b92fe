"""Arguments that other libraries have and this one writes differently: each error says how."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkv.checks import shown
from qkv.errors import ArgumentTypeError

# What users of PyTorch's SDPA and FlexAttention, flash-attn, xFormers, JAX, Keras and transformers type.
_LEAVE = "Leave it out: "
_HEADS = f"{_LEAVE}heads are counted in the tensors, query head h reads key/value head h // (Hq / Hkv)"
_DOCUMENTS = (
    "Pack the sequences as (1, H, T, D) and pass mask=qkv.documents(lengths), where lengths = cu_seqlens.diff(); "
    "& qkv.causal() if it is causal"
)
_PROBABILITIES = (
    "Call qkv.weights(q, k, rows=...) for the probabilities, qkv.see(q, k, v) for what they come to at any length; "
    "return_lse=True gives their denominators"
)
_FIXED: dict[str, str] = {
    "attention_mask": "Pass mask=attention_mask.bool()[:, None, None, :], or qkv.padding(lengths)",
    "key_padding_mask": "Pass mask=~key_padding_mask[:, None, None, :]: there True hides, here it shows",
    "score_mod": "Pass bias=qkv.score_mod(fn), with fn(s, b, h, p, j)",
    "mask_mod": "Pass mask=qkv.mask_mod(fn), with fn(b, h, p, j)",
    "block_mask": "Pass mask=qkv.mask_mod(block_mask.mask_mod), or better the mask that it stands for: qkv.causal(), "
    "qkv.sliding_window(n), qkv.documents(lengths)",
    "attn_bias": "Pass bias=; for a causal one mask=qkv.causal()",
    "dropout": "Pass dropout_p=",
    "dropout_rate": "Pass dropout_p=",
    "softmax_scale": "Pass scale=",
    "sm_scale": "Pass scale=",
    "scaling": "Pass scale=",
    "soft_cap": "Pass softcap=",
    "logits_soft_cap": "Pass softcap=",
    "alibi_slopes": "Pass bias=qkv.alibi(slopes)",
    "enable_gqa": _HEADS,
    "num_heads": _HEADS,
    "num_kv_heads": _HEADS,
    "return_softmax_lse": "Pass return_lse=True",
    "return_aux": "Pass return_lse=True",
    "return_attn_probs": _PROBABILITIES,
    "return_weights": _PROBABILITIES,
    "need_weights": _PROBABILITIES,
    "output_attentions": _PROBABILITIES,
    "cu_seqlens": _DOCUMENTS,
    "cu_seqlens_q": _DOCUMENTS,
    "cu_seqlens_k": _DOCUMENTS,
    "max_seqlen": _DOCUMENTS,
    "max_seqlen_q": _DOCUMENTS,
    "max_seqlen_k": _DOCUMENTS,
    "cache_seqlens": "Pass a cache's view in place of k and v: qkv.cache; or mask=qkv.padding(lengths)",
    "block_table": "Pass qkv.cache.stored(k_pages, v_pages, table, lengths) in place of k and v",
    "page_table": "Pass qkv.cache.stored(k_pages, v_pages, table, lengths) in place of k and v",
    "s_aux": "Pass sinks=, one number a query head",
    "learnable_sink": "Pass sinks=, one number a query head",
    "deterministic": f"{_LEAVE}the same call gives the same bits",
    "kernel_options": "Pass backend=, one that qkv.plan names",
    "past_key_value": "Pass cache=, one layer of a cache's step: qkv.cache",
    "past_key_values": "Pass cache=, one layer of a cache's step: qkv.cache",
    "position_ids": "Pass positions=",
    "heads": "Slice q and k, or call qkv.weights(q, k, heads=...) for the probabilities",
}


def _causal(name: str, value: Any) -> str:
    if value is False or value is None:
        return f"{_LEAVE}without a mask every query sees every key"
    corner = '"start"' if name == "is_causal" else '"end"'
    return f"Pass mask=qkv.causal(), with positions={corner} where Lq != Lk"


def _attn_mask(name: str, value: Any) -> str:
    if value is None:
        return f"{_LEAVE}there is no mask unless one is given"
    if isinstance(value, Tensor) and value.dtype != torch.bool:
        return f"Pass bias={name}: it is added to the scores; a mask of bools is mask="
    return f"Pass mask={name}, where True = may attend; a float mask is bias="


def _window_size(name: str, value: Any) -> str:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        if tuple(value) == (-1, -1):
            return f"{_LEAVE}without a mask every query sees every key"
        left, right = (None if n < 0 else n for n in value)
        return f"Pass mask=qkv.window({left}, {right})"
    if isinstance(value, int):
        return f"Pass mask=qkv.sliding_window({value}): each query sees itself and the {value - 1} before"
    return "Pass mask=qkv.window(left, right), or qkv.sliding_window(n)"


_BY_VALUE: dict[str, Callable[[str, Any], str]] = {
    "is_causal": _causal,
    "causal": _causal,
    "attn_mask": _attn_mask,
    "window_size": _window_size,
    "window": _window_size,
    "sliding_window": _window_size,
    "local_window_size": _window_size,
}


def unknown(call: str, given: dict[str, Any], known: Callable[..., Any]) -> ArgumentTypeError:
    """The error for keywords that `known` does not have; the first of them is named, with what to write instead.

    >>> raise unknown("qkv.attention()", {"is_causal": True}, lambda q, mask=None: None)
    Traceback (most recent call last):
    qkv.errors.ArgumentTypeError: qkv.attention(): there is no argument is_causal. Got is_causal=True. Pass \
mask=qkv.causal(), with positions="start" where Lq != Lk.
    """
    name, value = next(iter(given.items()))
    code = known.__code__
    names = [n for n in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if n != "self"]
    if name in _BY_VALUE:
        fix = _BY_VALUE[name](name, value)
    elif name in _FIXED:
        fix = _FIXED[name]
    else:
        close = difflib.get_close_matches(name, names, 1, 0.7)
        fix = f"Did you mean {close[0]}=" if close else f"The arguments are {', '.join(names)}"
    return ArgumentTypeError.of(call, f"there is no argument {name}", f"{name}={shown(value)}", fix)
