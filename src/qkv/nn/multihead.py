"""`torch.nn.MultiheadAttention` on `qkv.attention`: the same parameters, the same call, no NaN."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.call.validate import dropout as check_dropout
from qkv.checks import integer, no_tensor, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.functional import attention
from qkv.masks import Mask, causal, dense, prefix
from qkv.probabilities import weights
from qkv.scores import ScoreTerm, as_bias

_CALL = "qkv.nn.MultiheadAttention()"
_LINEAR = (torch.nn.Linear, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)


class TorchShapeError(ShapeError, AssertionError, RuntimeError):
    """Sizes that do not fit together, where PyTorch's layer fails an assertion or raises a RuntimeError."""


class TorchArgumentError(ArgumentError, AssertionError):
    """A value that is not taken, where PyTorch's layer fails an assertion."""


class TorchTypeError(ArgumentTypeError, AssertionError):
    """A dtype that is not taken, where PyTorch's layer fails an assertion."""


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
    * Bytes at hidden keys of `key` and `value` cannot reach the outputs, NaN included.
    * `is_causal=True` needs no attn_mask; together with one both apply. With PyTorch it is a hint that attn_mask is
      causal, which replaces attn_mask or is ignored, depending on the other arguments.
    * Bool and float masks may be mixed without a warning.
    * Nested tensors (N, L*, E) are taken in training and evaluation, with gradients; they need batch_first=True.
    * out_proj is called: what replaces it (an adapter, a quantised layer) and the hooks on it take part.

    `torch.nn.TransformerEncoderLayer` in evaluation without gradients runs PyTorch's fused code on the parameters and
    never calls its attention layer, unless it has hooks or another out_proj;
    `torch.backends.mha.set_fastpath_enabled(False)` makes it, and so does a `qkv.compat.patch_sdpa()` block.

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
            raise TorchArgumentError.of(_CALL, "embed_dim must be divisible by num_heads", given, fix)
        dropout = check_dropout(_CALL, "dropout", dropout)
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
            Or three nested tensors (N, L*, E), (N, S*, kdim), (N, S*, vdim): padding and masks then have the sizes of
            the longest.
        key_padding_mask : Tensor, shape (N, S), or (S,) without a batch
            bool: True = ignore this key (the opposite of `qkv.attention`). Floating: added to the scores. Nested
            tensors have none: they hold their lengths.
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
            to 1; a row that sees no key is 0, and so is one past the end of a nested query. In training with dropout
            these are the weights that made `out`, dropped ones 0 and the others divided by 1 - dropout, as PyTorch
            returns them.

        Raises
        ------
        ShapeError, ArgumentTypeError
            Inputs and masks that do not fit the layer or each other; a ShapeError is PyTorch's AssertionError as well.
        """
        if _nested(query, key, value):
            return self._over_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
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
            # The keys that are left share a row as in attention among them alone, and what they weigh together is
            # the sum of the row: no value that is hidden or dropped is read.
            among = attention(q, k, v, dense(p.detach() != 0), positions="start", bias=bias)
            out = (among * p.sum(-1, keepdim=True).to(among.dtype)).transpose(1, 2)
        else:
            out = attention(q, k, v, mask, positions="start", bias=bias, dropout_p=dropout_p).transpose(1, 2)
        out = self.out_proj(out.flatten(2))
        if p is not None:
            p = p.to(q.dtype)
            p = p.mean(dim=1) if average_attn_weights else p
        if not batched:
            return out.squeeze(0), None if p is None else p.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), p

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """PyTorch's layers ask for it before they read the weights and pass this layer by.

        What is not the plain layer that the weights belong to has to be called, and they are told no.
        """
        out_proj = self._modules.get("out_proj")  # absent while PyTorch's constructor works
        return bool(self.__dict__["_qkv_same_embed_dim"]) and (out_proj is None or type(out_proj) in _LINEAR)

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _over_nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The call on padded tensors, and its output as nested as the query."""
        _check_nested(self, query, key, value, key_padding_mask)
        parts = {id(x): x.unbind() for x in (query, key, value)}
        lengths, keys = ([len(row) for row in parts[id(x)]] for x in (query, key))
        padded = {name: torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for name, rows in parts.items()}
        q, k, v = (padded[id(x)] for x in (query, key, value))  # one tensor given three times stays one
        hidden = _beyond(keys, k)
        out, p = self.forward(q, k, v, hidden, need_weights, attn_mask, average_attn_weights, is_causal)
        rows = [row[:n] for row, n in zip(out, lengths, strict=True)]
        if p is not None:
            past = _beyond(lengths, q)
            p = p.masked_fill(past[:, :, None] if average_attn_weights else past[:, None, :, None], 0)
        if query.layout == torch.jagged:  # on the query's own offsets, so that the two add
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), query.offsets()), p  # type: ignore[attr-defined]
        return torch.nested.as_nested_tensor(rows), p

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q (N, L, E), k and v (N, S, E): one matrix product for what has one source."""
        E, W = self.embed_dim, self.in_proj_weight
        b: Tensor | None = self.in_proj_bias
        if b is not None and W is not None and b.dtype != W.dtype:  # a product in one call takes one dtype
            b = b.to(W.dtype)
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


def _nested(*given: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in given)


def _beyond(lengths: list[int], padded: Tensor) -> Tensor:
    """(N, L) bool: True past the end of a row."""
    ends = torch.tensor(lengths, dtype=torch.int64, device=padded.device)
    return torch.arange(padded.shape[1], device=padded.device) >= ends[:, None]


def _check_nested(layer: MultiheadAttention, query: Any, key: Any, value: Any, key_padding_mask: Any) -> None:
    tensors = {"query": query, "key": key, "value": value}
    given = ", ".join(
        f"{name} {x.dim()}-D {'nested' if x.is_nested else 'plain'}" if isinstance(x, Tensor) else f"{name}={shown(x)}"
        for name, x in tensors.items()
    )
    if not all(isinstance(x, Tensor) and x.is_nested for x in tensors.values()):
        fix = "Nest all three, or pad with .to_padded_tensor(0) and pass key_padding_mask"
        raise ArgumentTypeError.of(_CALL, "query, key and value must all be nested tensors or none", given, fix)
    if not query.dim() == key.dim() == value.dim() == 3:
        raise TorchShapeError.of(_CALL, _dimensions(query, key, value), given, "Nest tensors of shape (L, E)")
    if not layer.batch_first:
        fix = "Make the layer with batch_first=True"
        raise ArgumentError.of(_CALL, "nested tensors are (N, L*, E)", "batch_first=False", fix)
    if key_padding_mask is not None:
        fix = "Leave key_padding_mask out: the keys end where the nested tensor says"
        raise ArgumentError.of(_CALL, "nested tensors hold their lengths", "key_padding_mask as well", fix)
    lengths = {name: [len(row) for row in x.unbind()] for name, x in tensors.items()}
    if len(lengths["query"]) != len(lengths["key"]) or lengths["key"] != lengths["value"]:
        rule = "nested query, key and value must have one batch size N, and key and value the same lengths"
        fix = "Every key has one value: give them the same tokens"
        raise TorchShapeError.of(_CALL, rule, f"lengths {lengths}", fix)


def _dimensions(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The rule about dimensions that three tensors break, in the words of PyTorch's layer."""
    if query.dim() not in (2, 3):
        return f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
    kind = "batched (3-D)" if query.dim() == 3 else "unbatched (2-D)"
    found = f"{key.dim()}-D and {value.dim()}-D tensors respectively"
    return f"For {kind} `query`, expected `key` and `value` to be {query.dim()}-D but found {found}"


def _check_inputs(layer: MultiheadAttention, query: Any, key: Any, value: Any) -> _Sizes:
    """The sizes of a call that fits the layer."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise no_tensor(_CALL, name, x, "Pass a tensor of embeddings")
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    layout = "(N, L, E)" if layer.batch_first else "(L, N, E)"
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        fix = f"Pass all as {layout}, or all as (L, E): add or remove the dimension of the batch"
        raise TorchShapeError.of(_CALL, _dimensions(query, key, value), given, fix)
    wanted = (layer.embed_dim, layer.kdim, layer.vdim)
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != wanted:
        rule = f"query, key and value must have embed_dim={wanted[0]}, kdim={wanted[1]} and vdim={wanted[2]} features"
        raise TorchShapeError.of(_CALL, rule, given, "Pass other tensors, or give the layer kdim and vdim")
    if key.shape[:-1] != value.shape[:-1]:
        fix = "Every key has one value: give them the same tokens"
        raise TorchShapeError.of(_CALL, "key and value must have the same tokens", given, fix)
    batched = query.dim() == 3
    at, along = (0, 1) if layer.batch_first else (1, 0)
    if batched and query.shape[at] != key.shape[at]:
        fix = f"Check batch_first={layer.batch_first}: tensors are {layout}"
        raise TorchShapeError.of(_CALL, "query and key must have one batch size N", given, fix)
    if not batched:
        at, along = -1, 0
    N = query.shape[at] if batched else 1
    weight = layer.q_proj_weight if layer.in_proj_weight is None else layer.in_proj_weight
    return _Sizes(N, layer.num_heads, query.shape[along], key.shape[along], batched, weight.dtype)


def _check_mask(name: str, x: Any, sizes: _Sizes, allowed: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.bool, torch.float32, sizes.dtype):
        fix = "Use .bool() where it marks keys to ignore, .float() where it is added"
        rule = f"only bool and floating types of {name} are supported, the floating one float32 or the parameters'"
        raise TorchTypeError.of(_CALL, rule, f"{name} as {shown(x)}", fix)
    if _is_causal_bias(x):  # it holds no data: its numbers are whatever lay in memory
        fix = "Pass is_causal=True, or attn_mask=~torch.ones(L, S).tril(S - L).bool() for the lower right corner"
        raise ArgumentTypeError.of(_CALL, f"{name} must be a plain tensor", type(x).__name__, fix)
    if tuple(x.shape) not in allowed:
        given = f"{name} {tuple(x.shape)} for N={sizes.N}, H={sizes.H}, L={sizes.L}, S={sizes.S}"
        alike = [shape for shape in allowed if len(shape) == x.dim()]
        rule = f"Expected `{name}` shape to be {' or '.join(map(str, alike))}"
        if not alike:
            dims = "2-D or 3-D" if len(allowed) > 1 else f"{len(allowed[0])}-D"
            comma = "," if len(allowed) > 1 else " or"
            rule = f"expected `{name}` to be `None`{comma} {dims} but found {x.dim()}-D tensor instead"
        fix = f"Give it {' or '.join(map(str, allowed))}: check the batch and the lengths; S are the keys"
        raise TorchShapeError.of(_CALL, rule, given, fix)


def _is_causal_bias(x: Tensor) -> bool:
    if type(x) is Tensor:
        return False
    from torch.nn.attention.bias import CausalBias  # loads on first use: hardly anyone passes one

    return isinstance(x, CausalBias)
