"""What the layers share: the options of their attention, checks of inputs and of caches, the norm."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkv import _torch
from qkv.call.keys import KVView
from qkv.checks import integer, no_tensor, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError
from qkv.functional import attention
from qkv.masks import Mask, as_mask
from qkv.rotary import Rotary


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (float64 for float64).

    Half types keep x's dtype whatever the weight's, so that queries, keys and values agree under autocast.
    Source: Zhang and Sennrich (2019), arXiv 1910.07467.
    """

    def __init__(
        self, size: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Across(Protocol):
    """The rows of sequences that several ranks hold together, as `qkv.distributed.Context` says them to a layer."""

    @property
    def positions(self) -> Tensor:
        """Where this rank's rows stand in the sequence, int64 (rows,)."""

    @property
    def length(self) -> int:
        """Rows of the whole sequence."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        """`qkv.attention` over the whole sequence, of this rank's rows."""


class Layer(nn.Module):
    """A layer around `qkv.attention`: the options that all of them hand on."""

    mask: Mask | None
    scale: float | None
    dropout_p: float
    head_mesh: Any = None  # the ranks among which qkv.distributed.HeadParallel has divided the heads

    def _hold(
        self, call: str, mask: Any, softcap: float | None, scale: float | None, dropout_p: float, backend: str | None
    ) -> None:
        self.mask = as_mask(mask, call)
        self.softcap, self.scale, self.dropout_p, self.backend = softcap, scale, dropout_p, backend

    def _hold_heads(
        self,
        call: str,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        rotary: Rotary | None,
    ) -> None:
        """The sizes of query heads, of key/value heads and of what turns them."""
        self.dim, self.num_heads = integer(call, "dim", dim, low=1), integer(call, "num_heads", num_heads, low=1)
        Hkv = self.num_heads if num_kv_heads is None else integer(call, "num_kv_heads", num_kv_heads, low=1)
        if head_dim is None and self.dim % self.num_heads:
            rule, fix = "dim must be a multiple of num_heads where head_dim is left out", "Pass head_dim"
            raise ArgumentError.of(call, rule, f"dim={dim} and num_heads={num_heads}", fix)
        D = self.dim // self.num_heads if head_dim is None else integer(call, "head_dim", head_dim, low=1)
        self.num_kv_heads, self.head_dim = Hkv, D
        self.value_dim = D if value_dim is None else integer(call, "value_dim", value_dim, low=1)
        _check_heads(call, self.num_heads, Hkv, D, rotary)

    def _attend(
        self, q: Tensor, k: Tensor | KVView, v: Tensor | None, mask: Any, across: Across | None = None, **more: Any
    ) -> Tensor:
        """attention() with the layer's options; `more` are positions, scale and sinks."""
        run = attention if across is None else across.attention
        more = {"scale": self.scale, "softcap": self.softcap, "backend": self.backend, **more}
        out: Tensor = run(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0, **more)  # type: ignore[arg-type]
        return out

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as construction does: for a layer that was built on the meta device."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def _options(self, *names: str) -> list[str]:
        """The options that were given, as `extra_repr` shows them; `names` are the layer's own."""
        names = (*names, "mask", "softcap", "scale", "backend")
        shown = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None]
        return [*shown, *([f"dropout_p={self.dropout_p}"] if self.dropout_p else [])]

    def _seen(self, mask: Mask | Tensor | None) -> Mask | Tensor | None:
        """What both the layer's and the call's mask allow."""
        if self.mask is None or mask is None:
            return mask if self.mask is None else self.mask
        return self.mask & mask


def _check_heads(call: str, num_heads: int, num_kv_heads: int, head_dim: int, rotary: Any) -> None:
    """The numbers of heads must fit each other, and rotary the size of a head."""
    if num_heads % num_kv_heads:
        fits = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        rule, fix = "num_heads must be a multiple of num_kv_heads", f"Use num_kv_heads in {{{fits}}}"
        raise ArgumentError.of(call, rule, f"num_heads={num_heads} and num_kv_heads={num_kv_heads}", fix)
    if rotary is not None and _typed(call, rotary, f"Rotary({head_dim})").dim > head_dim:
        given = f"rotary.dim={rotary.dim} and head_dim={head_dim}"
        fix = f"Use Rotary({head_dim}), or fewer for a partial one"
        raise ArgumentError.of(call, "rotary turns at most head_dim numbers", given, fix)


def check_rotary(call: str, rotary: Any, name: str, size: int, right: str) -> None:
    """A rotary that turns exactly the numbers of that name; `right` is one that would do."""
    if _typed(call, rotary, right).dim != size:
        given = f"rotary.dim={rotary.dim} and {name}={size}"
        raise ArgumentError.of(call, f"rotary must turn {name} numbers", given, f"Use {right}")


def _typed(call: str, rotary: Any, right: str) -> Rotary:
    if not isinstance(rotary, Rotary):
        fix = f"Pass qkv.rotary.{right}"
        raise ArgumentTypeError.of(call, "rotary must be a Rotary", f"rotary={rotary!r}", fix)
    return rotary


def check_tokens(call: str, name: str, x: Any, width_name: str, width: int) -> None:
    """x must be (B, L, width)."""
    if not isinstance(x, Tensor):
        raise no_tensor(call, name, x, f"Pass (B, L, {width})")
    if x.dim() != 3 or x.shape[-1] != width:
        fix = (
            "Add the batch dimension with unsqueeze(0)" if x.dim() == 2 else f"Build the layer with {width_name} of it"
        )
        given = f"{name} {tuple(x.shape)} and {width_name}={width}"
        raise ShapeError.of(call, f"{name} must be (B, L, {width_name})", given, fix)


def check_step(call: str, layer: Layer, x: Tensor, positions: Any, rotary: Rotary | None, cache: Any) -> Tensor:
    """Where the step's tokens stand, int64 (B, L); an error unless x fits the layer of a cache's step.

    All that can be told before keys are stored is told here: a layer that raises has not begun its step.
    """
    at = getattr(cache, "positions", None)
    parts = getattr(cache, "append", None), getattr(cache, "view", None)
    if not isinstance(at, Tensor) or not all(map(callable, parts)):
        rule, given = "cache must be one layer of a cache's step", f"cache of type {type(cache).__name__}"
        fix = "Pass step.layer(i), of step = cache.step(seqs, T=1) or cache.step(seqs, lengths=[...])"
        raise ArgumentTypeError.of(call, rule, given, fix)
    if positions is not None:
        rule, given = "a cache says where its tokens stand", f"positions={shown(positions)} with a cache"
        raise ArgumentError.of(call, rule, given, "Leave positions out")
    if at.shape != x.shape[:2]:
        rule = "x must be the tokens of the cache's step, (n, T, dim), or packed as (1, sum T, dim) if it is ragged"
        given = f"x {tuple(x.shape)} and a step of {tuple(at.shape)} tokens"
        raise ShapeError.of(call, rule, given, "Make a step of as many tokens: cache.step(seqs, T=x.shape[1])")
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        rule, given = "a cache keeps no gradients, so nothing is trained through one", "tensors that require grad"
        fix = "Run the model under torch.inference_mode() or torch.no_grad(); for training leave cache out"
        raise UnsupportedError.of(call, rule, given, fix)
    if layer.training and layer.dropout_p:
        rule, given = "a cache is for inference, without dropout", f"dropout_p={layer.dropout_p}"
        raise UnsupportedError.of(call, rule, given, "Call model.eval() first")
    if rotary is not None and rotary.scaling is not None and rotary.scaling.depends_on_length:
        length = rotary.length(at, x.shape[1])
        if rotary.frequencies(length) != rotary.frequencies(0):
            rule = "keys that are cached must keep their frequencies while their sequence grows"
            given = f"{type(rotary.scaling).__name__} and a sequence of {length} tokens"
            fix = (
                "Stay within original_length, or use a scaling that does not look at the length (Linear, YaRN, Llama3)"
            )
            raise UnsupportedError.of(call, rule, given, fix)
    return at


def stand(
    call: str, x: Tensor, at: int | Tensor | None, rotary: Rotary | None, across: Across | None
) -> tuple[int | Tensor, int | None]:
    """Where tokens stand for rotary, and the length for scalings that look at it; None where positions say it."""
    if across is None:
        return (0 if at is None else at), None
    own = across.positions
    if x.shape[1] != own.shape[0]:
        given = f"x {tuple(x.shape)} and {own.shape[0]} of {across.length} rows here"
        raise ShapeError.of(call, "x must be this rank's rows of the sequence", given, "Take them with across.shard(x)")
    if isinstance(at, Tensor):
        if rotary is not None and rotary.scaling is not None and rotary.scaling.depends_on_length:
            rule = f"{type(rotary.scaling).__name__} needs the length, which no rank knows from its own positions"
            given = f"positions {tuple(at.shape)} with across"
            raise UnsupportedError.of(call, rule, given, "Leave positions out, or give the first token's as an int")
        return at, None
    first = at or 0
    return own.to(x.device) + first, across.length + first


def whole_only(call: str, across: Across | None, what: str, fix: str) -> None:
    """An error for what needs whole sequences, where ranks hold them together."""
    if across is not None:
        raise UnsupportedError.of(call, f"{what} is of whole sequences", "across", fix)


GATHER = "Gather the rows for this layer: across.shard(layer(across.unshard(x)))"


_LINEAR = nn.Linear.forward, nn.Linear.__call__


def matrix_of(module: nn.Module) -> Tensor | None:
    """W, where calling the module is x W^T and nothing else; None where only a call can tell what it does.

    A user may put anything in the place of a Linear: an adapter, a quantised layer, one whose hooks or whose forward
    are their own. Whoever multiplies by its weight instead of calling it would pass that over in silence.
    """
    kind = type(module)
    if (getattr(kind, "forward", None), kind.__call__) != _LINEAR or "forward" in vars(module):
        return None
    own = module.__dict__.get("head_hooks", ())  # HeadParallel's, which do what is said of the weight below
    if (
        any(hook not in own for hook in _torch.hooks_of(module))
        or module.bias is not None
        or any(map(_changes, _torch.hooks_of_all()))
    ):
        return None
    weight: Tensor = module.weight  # read once: a parametrization computes it
    # A subclass may stand for other numbers than its own, as torchao's do; those of tracers do not.
    if own and _torch.is_distributed(weight):
        return weight.to_local()  # type: ignore[attr-defined, no-any-return]  # the heads that are here
    plain = type(weight) in (Tensor, nn.Parameter) or _torch.for_graph(weight)
    return weight if plain else None


def _changes(hook: Any) -> bool:
    """Whether a hook on every module may change what one does: FLOP counters and profilers only look on."""
    return getattr(hook, "__module__", None) != "torch.utils.module_tracker"
