"""`torch.nn.MultiheadAttention` on `qkv.attention`: the same parameters, the same call, no NaN."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, describe
from qkv.functional import attention, weights
from qkv.masks import Mask, causal, dense, prefix
from qkv.masks.arguments import integer, shown
from qkv.scores import ScoreTerm, as_bias

_CALL = "qkv.nn.MultiheadAttention()"


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention with the constructor, parameters, call and polarities of `torch.nn.MultiheadAttention`.

    ::

        head_h = attention(query W_Q[h]ᵀ + b_Q[h], key W_K[h]ᵀ + b_K[h], value W_V[h]ᵀ + b_V[h])
        out    = concat(head_1 .. head_H) W_Oᵀ + b_O

    | ours | in "Attention Is All You Need" |
    |---|---|
    | in_proj_weight (3E, E), or q_proj_weight, k_proj_weight, v_proj_weight | W_Q, W_K, W_V of all heads, stacked |
    | out_proj.weight (E, E) | W_O |
    | bias_k, bias_v (1, 1, E) | none: one learned key and value that every query may attend to |

    A state dict of either class loads into the other, and the same seed gives the same initial parameters.

    Parameters
    ----------
    embed_dim : int
        E, the width of queries and outputs; a multiple of num_heads.
    num_heads : int
        H, with D = E / H coordinates each.
    dropout : float
        Probability in [0, 1) that a weight is dropped, in training only.
    bias : bool
        Whether the projections have biases.
    add_bias_kv : bool
        Append the learned key and value bias_k, bias_v to every sequence.
    add_zero_attn : bool
        Append a key and a value of zeros to every sequence.
    kdim, vdim : int
        Widths of key and value where they differ from E; the projections are then separate parameters.
    batch_first : bool
        Tensors are (N, L, E) instead of (L, N, E). Inputs without a batch are (L, E) either way.
    device, dtype
        Of the parameters.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Widths that do not divide, a dropout outside [0, 1).

    Notes
    -----
    The differences to PyTorch's class:

    * A query whose keys are all hidden gets weights 0 and the output b_O, and its gradients are finite. PyTorch 2.13
      gives NaN for both where need_weights=True, and b_O where it is False.
    * Bytes at hidden keys of `key` and `value` cannot reach the outputs, NaN included, unless dropout is on and weights
      are asked for.
    * `is_causal=True` needs no attn_mask; together with one both apply. With PyTorch it is a hint that attn_mask is
      causal, which replaces attn_mask or is ignored, depending on the other arguments.
    * Bool and float masks may be mixed without a warning.
    * Nested tensors are refused: pass key_padding_mask.

    `torch.nn.TransformerEncoderLayer` in evaluation without gradients runs PyTorch's fused code on the parameters and
    never calls its attention layer; `torch.backends.mha.set_fastpath_enabled(False)` makes it.

    Cost: 8 E² FLOPs a token for the projections (kdim = vdim = E) and the cost of `qkv.attention`; need_weights=True,
    which is PyTorch's default, adds `qkv.weights` for all rows: N H L S probabilities, computed in float64.
    Source: Vaswani et al. (2017); the interface of PyTorch 2.13.

    Examples
    --------
    >>> import torch, qkv.nn
    >>> layer = qkv.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(2, 6, 32)
    >>> ignore = torch.tensor([[False] * 6, [True] * 6])  # True = padding, as in PyTorch
    >>> out, p = layer(x, x, x, key_padding_mask=ignore)
    >>> out.shape, p.shape, p.sum(-1)[:, 0].round(decimals=4).tolist()
    (torch.Size([2, 6, 32]), torch.Size([2, 6, 6]), [1.0, 0.0])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, x in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if x is not None:
                integer(_CALL, name, x, low=1)
        if embed_dim % num_heads:
            given = f"embed_dim={embed_dim} and num_heads={num_heads}"
            fits = ", ".join(str(n) for n in range(1, min(embed_dim, 64) + 1) if embed_dim % n == 0)
            fix = f"Use num_heads in {{{fits}}}"
            raise ArgumentError(describe(_CALL, "embed_dim must be a multiple of num_heads", given, fix))
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            given = f"dropout={shown(dropout)} ({type(dropout).__name__})"
            raise ArgumentTypeError(describe(_CALL, "dropout must be a number", given, "Use 0 for no dropout"))
        if not 0 <= dropout < 1:
            rule = "dropout must be in [0, 1)"
            raise ArgumentError(describe(_CALL, rule, f"dropout={dropout}", "Use 0 for no dropout"))
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the keys that no mask hides; S is the number of keys given, S' of those attended.

        Parameters
        ----------
        query : Tensor, shape (L, E), (L, N, E), or (N, L, E) with batch_first
        key : Tensor, shape (S, kdim), (S, N, kdim) or (N, S, kdim)
        value : Tensor, shape (S, vdim), (S, N, vdim) or (N, S, vdim)
        key_padding_mask : Tensor, shape (N, S), or (S,) without a batch
            bool: True = ignore this key (the opposite of `qkv.attention`). Floating: added to the scores.
        need_weights : bool
            Return the probabilities as well. False is faster and takes no quadratic memory.
        attn_mask : Tensor, shape (L, S) or (N H, L, S)
            bool: True = may NOT attend. Floating: added to the scores, -inf hides. In the parameters' dtype or float32.
        average_attn_weights : bool
            Return the mean of the probabilities over the heads.
        is_causal : bool
            Query i sees the keys j <= i, and of these what the masks leave.

        Returns
        -------
        out : Tensor, shaped like query
            A query that sees no key gets out_proj.bias.
        p : Tensor, shape (N, L, S') or (N, H, L, S'), without N for inputs without a batch; None unless need_weights
            S' counts the keys of add_bias_kv and add_zero_attn, which come last and are always visible. Each row sums
            to 1; a row that sees no key is 0. In training with dropout these are the weights that made `out`, dropped
            ones 0 and the others divided by 1 - dropout, as PyTorch returns them.

        Raises
        ------
        ShapeError, ArgumentTypeError
            Inputs and masks that do not fit the layer or each other.
        """
        sizes = _check_inputs(self, query, key, value)
        parts = _Masks.read(sizes, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        k, v = self._extended(k, v, sizes.N)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask, bias = parts.joined(sizes.S, k.shape[2] - sizes.S, is_causal)

        dropout_p = self.dropout if self.training else 0.0
        p: Tensor | None = None
        if need_weights:
            p = weights(q, k, mask=mask, positions="start", bias=bias)
        if p is not None and dropout_p > 0:  # `out` must come from the very weights that are returned
            p = F.dropout(p, dropout_p)
            out = (p.to(v.dtype) @ v).transpose(1, 2)
        else:
            out = attention(q, k, v, mask, positions="start", bias=bias, dropout_p=dropout_p).transpose(1, 2)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if p is not None:
            p = p.to(q.dtype)
            p = p.mean(dim=1) if average_attn_weights else p
        if not batched:
            return out.squeeze(0), None if p is None else p.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), p

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q (N, L, E), k and v (N, S, E): one matrix product for what has one source."""
        E, W, b = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        one_source, key_is_value = query is key and key is value, key is value
        query, key, value = (self._batch_first(x) for x in (query, key, value))
        if W is None:
            three = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if b is None else b.chunk(3)
            return tuple(F.linear(x, w, c) for x, w, c in zip((query, key, value), three, biases, strict=True))
        if one_source:
            return F.linear(query, W, b).chunk(3, dim=-1)
        q = F.linear(query, W[:E], None if b is None else b[:E])
        if key_is_value:
            return q, *F.linear(key, W[E:], None if b is None else b[E:]).chunk(2, dim=-1)
        bk, bv = (None, None) if b is None else (b[E : 2 * E], b[2 * E :])
        return q, F.linear(key, W[E : 2 * E], bk), F.linear(value, W[2 * E :], bv)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, k: Tensor, v: Tensor, N: int) -> tuple[Tensor, Tensor]:
        """k and v with the learned key and the key of zeros behind them, where the layer has them."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, more.to(x.dtype).expand(N, 1, -1)), dim=1)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v


class _Sizes(NamedTuple):
    N: int
    H: int
    L: int
    S: int
    batched: bool
    dtype: torch.dtype  # of the parameters


class _Masks(NamedTuple):
    """What the two arguments hide, in 4 dimensions: bool tensors with True = hidden, and tensors to add."""

    hidden: tuple[Tensor, ...]
    added: tuple[Tensor, ...]

    @classmethod
    def read(cls, sizes: _Sizes, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> _Masks:
        """Check both arguments."""
        N, H, L, S = sizes[:4]
        found = []
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, sizes, ((N, S) if sizes.batched else (S,),))
            found.append(key_padding_mask.reshape(N, 1, 1, S))
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, sizes, ((L, S), (N * H, L, S)))
            found.append(attn_mask.reshape(N, H, L, S) if attn_mask.dim() == 3 else attn_mask[None, None])
        return cls(tuple(x for x in found if x.dtype == torch.bool), tuple(x for x in found if x.dtype != torch.bool))

    def joined(self, S: int, extra: int, is_causal: bool) -> tuple[Mask | None, ScoreTerm | None]:
        """The mask and the bias of the call; the `extra` last keys are visible to all."""
        mask: Mask | None = None
        seen: Mask
        for hidden in self.hidden:
            seen = dense(F.pad(~hidden, (0, extra), value=True))
            mask = seen if mask is None else mask & seen
        if is_causal:
            seen = causal() | ~prefix(S) if extra else causal()
            mask = seen if mask is None else mask & seen
        bias: ScoreTerm | None = None
        for added in self.added:
            term = as_bias(F.pad(added, (0, extra)))
            bias = term if bias is None or term is None else bias + term
        return mask, bias


def _check_inputs(layer: MultiheadAttention, query: Any, key: Any, value: Any) -> _Sizes:
    """The sizes of a call that fits the layer."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            given = f"{name}={shown(x)} ({type(x).__name__})"
            raise ArgumentTypeError(describe(_CALL, f"{name} must be a tensor", given, "Pass a tensor of embeddings"))
        if x.is_nested:
            fix = "Pad it with .to_padded_tensor(0) and pass key_padding_mask"
            raise ArgumentTypeError(describe(_CALL, f"{name} must be a plain tensor", f"{name} nested", fix))
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    layout = "(N, L, E)" if layer.batch_first else "(L, N, E)"
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        rule = f"query, key and value must all be {layout}, or all (L, E)"
        raise ShapeError(describe(_CALL, rule, given, "Add or remove the dimension of the batch"))
    wanted = (layer.embed_dim, layer.kdim, layer.vdim)
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != wanted:
        rule = f"query, key and value must have embed_dim={wanted[0]}, kdim={wanted[1]} and vdim={wanted[2]} features"
        raise ShapeError(describe(_CALL, rule, given, "Pass other tensors, or give the layer kdim and vdim"))
    if key.shape[:-1] != value.shape[:-1]:
        fix = "Every key has one value: give them the same tokens"
        raise ShapeError(describe(_CALL, "key and value must have the same tokens", given, fix))
    batched = query.dim() == 3
    at, along = (0, 1) if layer.batch_first else (1, 0)
    if batched and query.shape[at] != key.shape[at]:
        fix = f"Check batch_first={layer.batch_first}: tensors are {layout}"
        raise ShapeError(describe(_CALL, "query and key must have one batch size N", given, fix))
    if not batched:
        at, along = -1, 0
    N = query.shape[at] if batched else 1
    return _Sizes(N, layer.num_heads, query.shape[along], key.shape[along], batched, layer.out_proj.weight.dtype)


def _check_mask(name: str, x: Any, sizes: _Sizes, allowed: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.bool, torch.float32, sizes.dtype):
        given = f"{name} as {shown(x)}"
        fix = "Use .bool() where it marks keys to ignore, .float() where it is added"
        rule = f"{name} must be a bool tensor, or floating in the parameters' dtype or float32"
        raise ArgumentTypeError(describe(_CALL, rule, given, fix))
    if tuple(x.shape) not in allowed:
        rule = f"{name} must be {' or '.join(map(str, allowed))}"
        given = f"{name} {tuple(x.shape)} for N={sizes.N}, H={sizes.H}, L={sizes.L}, S={sizes.S}"
        raise ShapeError(describe(_CALL, rule, given, "Check the batch and the lengths; S are the keys"))
