"""Hugging Face transformers on qkv: importing this registers `attn_implementation="qkv"`, and changes nothing else.

>>> import qkv.integrations.transformers
>>> from transformers import AutoModelForCausalLM, LlamaConfig
>>> config = LlamaConfig(
...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
...     num_key_value_heads=2
... )
>>> model = AutoModelForCausalLM.from_config(config, attn_implementation="qkv")
>>> model.config._attn_implementation
'qkv'

`model.set_attn_implementation("qkv")` turns it on in a model that is there already, "sdpa" off again.
"""

from __future__ import annotations

import weakref
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from qkv.checks import shown
from qkv.errors import ArgumentTypeError, ShapeError, UnsupportedError
from qkv.functional import attention
from qkv.integrations.features import features
from qkv.integrations.transformers.askers import is_only_eager
from qkv.integrations.transformers.mask import MaskTensor, ModelMask, model_mask
from qkv.integrations.transformers.selection import selected
from qkv.masks import Mask, causal, documents, sliding_window, window

__all__ = [
    "NAME",
    "GrowingCache",
    "ModelMask",
    "attention_forward",
    "cache_keyword",
    "features",
    "ignore",
    "model_mask",
    "register",
]

NAME = "qkv"
_CALL = "attn_implementation='qkv'"

# Keyword arguments of a model reach its attention layers. These say nothing about what attention computes.
_IGNORED = {
    "cache_position", "deterministic", "generation_config", "grid_thw", "input_ids", "logits_to_keep",
    "max_length_k", "max_length_q", "max_seqlen_k", "max_seqlen_q", "mm_token_type_ids", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
}  # fmt: skip
# These change it, and qkv's interface for models does not have them.
_REFUSED = {
    "output_attentions": "Attention never forms its weights: use attn_implementation='eager' to see them, or "
    "qkv.weights for chosen rows",
    "head_mask": "Use attn_implementation='eager', or prune the heads",
    "cache": "Continuous batching (generate_batch) is not supported: use generate, or attn_implementation='sdpa'",
}


def ignore(*names: str) -> None:
    """Let keyword arguments of these names pass: you know that they do not change what attention computes.

    A model hands the keyword arguments it does not know to its attention layers. qkv refuses those it does not know
    either, because it cannot tell whether they matter.

    >>> from qkv.integrations.transformers import ignore
    >>> ignore("request_id")
    """
    _IGNORED.update(names)


def register(name: str = NAME) -> None:
    """Make attention and masks known to transformers under one name. Importing this file does it for "qkv".

    Raises UnsupportedError where transformers is missing, or lacks a feature that is needed (see `features`).
    Registering again changes nothing.

    >>> from qkv.integrations.transformers import register
    >>> register()
    """
    fix = 'pip install --upgrade "qkv[transformers]"'
    try:
        version = metadata.version("transformers")
        import transformers
    except ImportError as error:  # metadata.PackageNotFoundError is one
        rule = "transformers must be installed"
        raise UnsupportedError.of("qkv.integrations.transformers", rule, str(error) or "none", fix) from error
    lacking = [feature for feature, there in features().items() if not there]
    if lacking:
        given = f"transformers {version}, without {', '.join(lacking)}"
        raise UnsupportedError.of("qkv.integrations.transformers", "transformers lacks what qkv needs", given, fix)
    transformers.AttentionInterface.register(name, attention_forward)
    transformers.AttentionMaskInterface.register(name, model_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    *,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of attn_implementation="qkv", as the layers of transformers call it.

    Parameters
    ----------
    query : Tensor, shape (B, Hq, Lq, D); key : (B, Hkv, Lk, D); value : (B, Hkv, Lk, Dv)
        Keys and values are not repeated: the head counts say which query heads share them.
    attention_mask : ModelMask, or the user's own 4-D tensor that broadcasts to (B, Hq, Lq, Lk)
        A bool tensor is a mask (True = may attend). A float tensor is added to the scores; -inf and the smallest
        number of its dtype hide. None: causal where `is_causal` (or the module) says so and Lq > 1, as in `sdpa`;
        in a model that has `eager` only, where the call says so.
    scaling, softcap : the scale of the scores and their cap
    dropout : in training only
    s_aux : Tensor (Hq,), sinks
    sinks : Tensor that broadcasts to (B, Hq, Lq, 1), a sink of each query; or (Hq,), as s_aux
    indices : int Tensor (B, Lq, n), the keys that are selected for each query, of those that the mask shows
    block_indices : int Tensor (B, groups, Lq, n), blocks of keys, of the layer's indexer's size; groups divides Hq
    sliding_window : int; it is already part of a mask, and is read where `attention_mask` is None
    position_bias : Tensor that broadcasts to (B, Hq, Lq, Lk), added to the scores
    cu_seq_lens_q, cu_seq_lens_k : int Tensor (sequences + 1,), ends of sequences packed into one row
    kwargs
        None, or a name that does not matter (position_ids, use_cache, ...; see `ignore`).

    Returns
    -------
    (out, None), out of shape (B, Lq, Hq, Dv), contiguous. A query that sees no key (padding) gets 0.

    Raises
    ------
    UnsupportedError for keyword arguments that change attention and are not supported; ShapeError, ArgumentTypeError.

    Cost: as `qkv.attention`; selected keys and blocks are masks of lists, whose cost is that of what was selected.
    """
    if kwargs:
        _check_others(kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries are one for all rows
        B = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(B, -1, -1, -1) if x.shape[0] == 1 else x for x in (query, key, value))
    lengths = key.shape[2]
    positions: int | None = None
    if isinstance(attention_mask, ModelMask):
        mask, positions = _of_model(attention_mask, query, key)
        if attention_mask.keys != lengths:
            key, value = key[:, :, : attention_mask.keys], value[:, :, : attention_mask.keys]
            if position_bias is not None and position_bias.shape[-1] > 1:
                position_bias = position_bias[..., : attention_mask.keys]
    elif attention_mask is None:
        mask = _without_mask(module, query, key, is_causal, sliding_window)
    else:
        mask, added = _users_mask(attention_mask)
        position_bias = added if position_bias is None else position_bias if added is None else position_bias + added
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        mask, positions = _packed(mask, positions, query, key, cu_seq_lens_q, cu_seq_lens_k)
    chosen = selected(module, query, lengths, indices, block_indices)
    if chosen is not None:
        mask = chosen if mask is None else chosen & mask
    if sinks is not None and sinks.shape == query.shape[1:2] and s_aux is None:
        sinks, s_aux = None, sinks
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    if torch.is_autocast_enabled(query.device.type):
        to = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(to), key.to(to), value.to(to)
    dropout_p = float(dropout) if dropout and getattr(module, "training", True) else 0.0
    result: Any = attention(
        query, key, value, mask, positions=positions, bias=position_bias, scale=scaling, softcap=softcap, sinks=s_aux,
        dropout_p=dropout_p, return_lse=sinks is not None,
    )  # fmt: skip
    out: Tensor = result if sinks is None else _with_sinks(result.out, result.lse, sinks, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _of_model(made: ModelMask, query: Tensor, key: Tensor) -> tuple[Mask | Tensor | None, int | None]:
    """The mask that was made for the model's inputs, for this layer's, and where its queries stand."""
    mask, positions = made.mask, None
    if mask is not None and mask.depends_on_position:
        positions = made.start
    if key.shape[2] != made.shape[3] or made.shape[2] not in (1, query.shape[2]):
        _refuse_lengths(query, key, made)
    if made.shape[2] != query.shape[2] and positions is not None:  # one row, for every query
        assert mask is not None
        return mask.tensor(1, made.keys, positions=positions, B=made.shape[0]), None
    return mask, positions


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, s_aux: Tensor | None) -> Tensor:
    """The output beside a sink of each query: of its weights, exp(lse) of exp(lse) + exp(sink) remains."""
    B, Hq, Lq, _ = out.shape
    fits = sinks.ndim == 4 and all(a in (1, b) for a, b in zip(sinks.shape, (B, Hq, Lq, 1), strict=True))
    if s_aux is not None or not fits:
        rule = "sinks must be one a query head, (Hq,), or one a query, (B, Hq, Lq, 1), and of one kind"
        kinds = "" if s_aux is None else f", beside s_aux {shown(s_aux)}"
        fix = "Use attn_implementation='eager'"
        raise ShapeError.of(_CALL, rule, f"sinks {shown(sinks)}{kinds}; B={B}, Hq={Hq}, Lq={Lq}", fix)
    return (out * torch.sigmoid(lse[..., None] - sinks)).to(out.dtype)


def _without_mask(module: Any, query: Tensor, key: Tensor, is_causal: bool | None, sliding: int | None) -> Mask | None:
    """What a layer that was given no mask means: causal where it says so, as `sdpa` reads it.

    Where a model has no `sdpa` nor anything but `eager`, no mask hides nothing unless the call says so.
    """
    Lq, Lk = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and not is_only_eager(module)
    forward_only = is_causal
    local = bool(sliding) and sliding is not None and sliding < Lk  # a window of 0 in a config is none
    if (Lq == 1 and not local) or (not forward_only and not local):
        return None
    if Lq != Lk:
        rule = "a causal or local layer without a mask must have as many queries as keys"
        fix = "Pass the mask that transformers.masking_utils makes, or is_causal=False where every key is visible"
        raise ShapeError.of(_CALL, rule, f"Lq={Lq}, Lk={Lk} and is_causal={forward_only}", fix)
    if not local or sliding is None:
        return causal()
    return sliding_window(sliding) if forward_only else window(sliding - 1, sliding - 1)


# What the last few float masks hold, by the tensor and its version: every layer of a model is given the same one.
_seen: list[tuple[weakref.ref[Tensor], int, tuple[Tensor, Tensor | None]]] = []


def _users_mask(given: Tensor) -> tuple[Tensor, Tensor | None]:
    """(mask, bias) of a 4-D tensor that the user, or the model itself, made."""
    if not isinstance(given, Tensor) or given.ndim != 4 or not (given.dtype == torch.bool or given.is_floating_point()):
        rule = "attention_mask must reach a layer as a qkv mask or as a bool or float tensor (B, 1, Lq, Lk)"
        fix = "Pass the model a 2-D padding mask or a 4-D one; masks of other kinds are made for other attention"
        raise ArgumentTypeError.of(_CALL, rule, f"{shown(given)} ({type(given).__name__})", fix)
    if given.dtype == torch.bool:
        return (given.as_subclass(Tensor) if isinstance(given, MaskTensor) else given), None
    if torch.compiler.is_compiling() or given.is_inference():  # whose changes nobody counts
        return _read(given)
    version = given._version
    for ref, at, found in _seen:
        if ref() is given and at == version:
            return found
    found = _read(given)
    _seen.insert(0, (weakref.ref(given), version, found))
    del _seen[4:]
    return found


def _read(given: Tensor) -> tuple[Tensor, Tensor | None]:
    """A float mask is a mask where it holds 0 and the smallest numbers only; else a bias, and what it hides a mask."""
    hidden = given <= torch.finfo(given.dtype).min / 2
    # A tracer cannot look at the numbers; as a bias they are right in any case.
    if torch.compiler.is_compiling() or given.requires_grad or bool(((given != 0) & ~hidden).any()):
        return ~hidden, given
    return ~hidden, None


def _packed(
    mask: Mask | Tensor | None, positions: int | None, query: Tensor, key: Tensor, ends_q: Tensor | None, ends_k: Any
) -> tuple[Mask | Tensor | None, int | None]:
    """The mask within sequences that are packed into one row."""
    B, Lq, Lk = query.shape[0], query.shape[2], key.shape[2]
    same = ends_q is not None and (ends_k is None or torch.equal(ends_q, ends_k))
    if not same or ends_q is None or B != 1 or Lq != Lk or int(ends_q[0]) != 0 or int(ends_q[-1]) != Lq:
        rule = "packed sequences must fill one row of queries and keys, the same for both"
        given = f"cu_seq_lens of {shown(ends_q)} and {shown(ends_k)}, B={B}, Lq={Lq} and Lk={Lk}"
        fix = "Pass position_ids that begin anew in each sequence, without cu_seq_lens, or pad"
        raise ShapeError.of(_CALL, rule, given, fix)
    own = documents(ends_q.diff())
    return (own if mask is None else own & mask), 0 if positions is None else positions


def _refuse_lengths(query: Tensor, key: Tensor, mask: ModelMask) -> None:
    given = f"Lq={query.shape[2]}, Lk={key.shape[2]} and a mask for {mask.shape[2]} and {mask.shape[3]}"
    fix = "Use attn_implementation='eager' in a model that adds keys of its own"
    raise ShapeError.of(_CALL, "the mask must be made for the lengths of the layer's queries and keys", given, fix)


def _check_others(kwargs: dict[str, Any]) -> None:
    """Refuse what would be lost."""
    for name, x in kwargs.items():
        if name in _IGNORED or x is None or x is False:
            continue
        given = f"{name}={shown(x)}"
        if name in _REFUSED:
            raise UnsupportedError.of(_CALL, f"{name} is not supported", given, _REFUSED[name])
        fix = f"Do not pass it, or if it does not matter call qkv.integrations.transformers.ignore({name!r})"
        raise UnsupportedError.of(_CALL, "a keyword argument must be known not to change attention", given, fix)


register()

# It is made from a class of transformers: where there is none, register() has said so.
from qkv.integrations.transformers.cache import GrowingCache, cache_keyword  # noqa: E402
