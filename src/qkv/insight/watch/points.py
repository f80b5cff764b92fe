"""The places where calls that are not qkv's own are met: functions of PyTorch and of transformers, put back exactly.

| who calls | is met at |
|---|---|
| torch.nn.functional.scaled_dot_product_attention | the attribute, and names bound to the function in loaded modules |
| torch.nn.MultiheadAttention with need_weights=True | torch.nn.functional.multi_head_attention_forward |
| the fast paths of MultiheadAttention and TransformerEncoderLayer | the attributes of torch that hold them |
| transformers on "eager" or a function of the user's | ALL_ATTENTION_FUNCTIONS.get_interface |
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv._torch import FUSED, builtin_sdpa
from qkv.call.watchers import WATCHERS
from qkv.insight.watch.calls import Call, Projected, Unseen, of_projected, of_torch, of_transformers
from qkv.insight.watch.steps import HERE, met, watcher

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NOT_OURS = ("torch", "qkv._torch", "qkv.backends", "qkv.compat", "qkv.insight")
_SEEN_BELOW = ("sdpa", "qkv")  # interfaces of transformers that end in functions which are met anyway
_compiling = torch.compiler.is_dynamo_compiling
_functional = torch.nn.functional


class _Point(NamedTuple):
    """An attribute that is ours for a while."""

    holder: Any
    name: str
    before: Any
    ours: Any
    own: bool  # whether the holder itself had it, and not its class

    def put(self) -> None:
        setattr(self.holder, self.name, self.ours)

    def take_back(self) -> None:
        if vars(self.holder).get(self.name) is not self.ours:
            return  # what someone else put there meanwhile is not ours to undo
        if self.own:
            setattr(self.holder, self.name, self.before)
        else:
            delattr(self.holder, self.name)


_points: list[_Point] = []
_users = 0
_lock = threading.RLock()


def begin() -> None:
    """Meet calls from here on; the first of several to ask assigns."""
    global _users
    with _lock:
        if not _users:
            try:
                for point in _all_points():
                    _points.append(point)
                    point.put()
            except BaseException:
                _take_all_back()
                raise
            WATCHERS.append(watcher)
        _users += 1


def end() -> None:
    """The last of several to leave gives everything back."""
    global _users
    with _lock:
        _users -= 1
        if not _users:
            WATCHERS.remove(watcher)
            _take_all_back()


def _take_all_back() -> None:
    while _points:
        _points.pop().take_back()


def _all_points() -> Iterator[_Point]:
    before = _functional.scaled_dot_product_attention
    ours = _noted(before, _sdpa)
    yield _Point(_functional, "scaled_dot_product_attention", before, ours, True)
    bound = _noted(builtin_sdpa, _sdpa)
    for module, name in _bound_names(builtin_sdpa):
        yield _Point(module, name, builtin_sdpa, bound, True)
    forward = _functional.multi_head_attention_forward
    yield _Point(_functional, "multi_head_attention_forward", forward, _noted(forward, _weighed, _asks_weights), True)
    for name, read in (("layer", _fused_layer), ("attention", _fused_attention)):
        before = getattr(torch, FUSED[name])
        yield _Point(torch, FUSED[name], before, _noted(before, read), True)
    known = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if known is not None and hasattr(known, "get_interface"):
        own = "get_interface" in vars(known)
        yield _Point(known, "get_interface", known.get_interface, _interface(known.get_interface), own)


def _bound_names(function: Any) -> list[tuple[Any, str]]:
    """Modules outside of PyTorch and of qkv's backends that hold the function under a name of their own."""
    found = []
    for name, module in tuple(sys.modules.items()):
        if name.split(".")[0] in _NOT_OURS or any(name == n or name.startswith(f"{n}.") for n in _NOT_OURS):
            continue
        held = getattr(module, "__dict__", None)
        if type(held) is dict:
            found += [(module, key) for key, value in tuple(held.items()) if value is function]
    return found


def _noted(before: Callable[..., Any], read: Callable[..., Call], asked: Callable[..., bool] | None = None) -> Any:
    """The function, with a note of each call in a step that is looked at; `read` says what was called."""

    @functools.wraps(before)
    def noted(*args: Any, **options: Any) -> Any:
        if _compiling() or not HERE.steps or HERE.inside or not (asked is None or asked(*args, **options)):
            return before(*args, **options)
        given = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        if any(type(x) not in _PLAIN for x in given):
            met(before.__name__, lambda: _refused(given))
            with _aside():
                return before(*args, **options)
        HERE.inside += 1
        try:
            found = before(*args, **options)
        finally:
            HERE.inside -= 1
        met(before.__name__, lambda: read(*args, **options))
        return found

    return noted


def _refused(given: list[Tensor]) -> Call:
    raise Unseen(f"tensors are of class {next(type(x).__name__ for x in given if type(x) not in _PLAIN)}")


class _aside:
    """The attributes as they were: a class of tensors may ask which function was called, and compares."""

    def __enter__(self) -> None:
        _lock.acquire()
        for point in reversed(_points):
            point.take_back()

    def __exit__(self, *_: Any) -> None:
        for point in _points:
            point.put()
        _lock.release()


# ------------------------------------------------------------------------------------------------- what was called
def _sdpa(*args: Any, **options: Any) -> Call:
    return of_torch(*args, **options)


_FORWARD = inspect.signature(_functional.multi_head_attention_forward)


def _asks_weights(*args: Any, **options: Any) -> bool:
    """Asked for weights, PyTorch multiplies matrices by itself; else it calls its attention, which is met there."""
    try:
        return bool(_FORWARD.bind(*args, **options).arguments.get("need_weights", True))
    except TypeError:  # which the function itself will raise
        return False


def _weighed(*args: Any, **options: Any) -> Call:
    """multi_head_attention_forward(query (L, N, E), ...): its projections once more."""
    bound = _FORWARD.bind(*args, **options)
    bound.apply_defaults()
    a = bound.arguments
    if any(a[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]:
        raise Unseen("the layer has keys of its own (bias_k, static_k or add_zero_attn)")
    query, key = ((x.unsqueeze(1) if x.dim() == 2 else x).transpose(0, 1) for x in (a["query"], a["key"]))
    E, bias = query.shape[2], a["in_proj_bias"]
    if a["use_separate_proj_weight"]:
        weights = (a["q_proj_weight"], a["k_proj_weight"])
    else:
        weights = a["in_proj_weight"][:E], a["in_proj_weight"][E : 2 * E]
    biases = (None, None) if bias is None else (bias[:E], bias[E : 2 * E])
    given = Projected(query, key, weights, biases, a["num_heads"])
    hidden, added = _masks(a["attn_mask"], a["key_padding_mask"], query.shape[0], a["num_heads"])
    return of_projected("torch.nn.MultiheadAttention", given, hidden, added)


def _masks(mask: Any, padding: Any, N: int, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """What is hidden, and what is added, of the layer's masks: bool (True hides) or numbers (-inf hides)."""
    hidden: Tensor | None = None
    added: Tensor | None = None
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (N, heads))
    for x in (mask, None if padding is None else padding.reshape(N, 1, 1, -1)):
        if x is None:
            continue
        gone = x if x.dtype == torch.bool else x == -torch.inf
        hidden = gone if hidden is None else hidden | gone
        if x.dtype != torch.bool and bool((x.masked_fill(gone, 0) != 0).any()):
            added = x if added is None else added + x
    return hidden, added


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, weight: Tensor, bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> Call:  # fmt: skip
    given = Projected(
        query, key, (weight[:embed_dim], weight[embed_dim : 2 * embed_dim]),
        (bias[:embed_dim], bias[embed_dim : 2 * embed_dim]), num_head,
    )  # fmt: skip
    padding = mask if mask_type == 1 else None  # (B, L) of keys
    hidden, added = _masks(mask if padding is None else None, padding, query.shape[0], num_head)
    return of_projected("torch.nn.MultiheadAttention", given, hidden, added)


def _fused_layer(
    src: Tensor, embed_dim: int, num_heads: int, weight: Tensor, bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float, norm1_weight: Tensor, norm1_bias: Tensor, *rest: Any, **options: Any,
) -> Call:  # fmt: skip
    mask, mask_type = (*rest, options.get("mask"), options.get("mask_type"))[6:8]
    x = torch.nn.functional.layer_norm(src, (embed_dim,), norm1_weight, norm1_bias, eps) if norm_first else src
    call = _fused_attention(
        x, x, x, embed_dim, num_heads, weight, bias, proj_weight, proj_bias, mask, mask_type=mask_type
    )
    return call._replace(via="torch.nn.TransformerEncoderLayer")


def _interface(before: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' choice of a function; one that calls nothing that is met elsewhere is met here."""

    @functools.wraps(before)
    def get_interface(name: str, default: Any, *rest: Any, **more: Any) -> Any:
        found = before(name, default, *rest, **more)
        if _compiling() or not HERE.steps or name in _SEEN_BELOW:
            return found
        if name is not None and name != "eager" and found is not default and not _is_plain(name):
            return _noted(found, lambda *_, **__: _other(name))
        return _noted(found, of_transformers)

    return get_interface


def _is_plain(name: str) -> bool:
    """Whether a function of that name takes a tensor, or none, as its mask: others have ways of their own."""
    return not any(part in name for part in ("flash", "flex", "paged"))


def _other(name: str) -> Call:
    raise Unseen(f"its attention is transformers' {name!r}")
