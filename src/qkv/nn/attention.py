"""The attention layer: projections, rotary positions, norms, gate and sinks around `qkv.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkv.call import keywords
from qkv.call.keys import KVView, LayerCache
from qkv.checks import integer
from qkv.errors import ArgumentError, ShapeError
from qkv.graph import eager
from qkv.masks import Mask, as_mask
from qkv.nn.divided import by_head, divided, gates_of, joined, read_by
from qkv.nn.layer import Across, Layer, RMSNorm, check_step, check_tokens, stand, whole_only
from qkv.rotary import Rotary, as_positions

_CALL = "qkv.nn.Attention()"
_FORWARD = "qkv.nn.Attention.forward()"


class Attention(Layer):
    """Let each token of x gather from the tokens of x, or of a context, what its query finds there.

    ::

        q = rotary(norm(x W_Q))      k = rotary(norm(y W_K))      v = y W_V          y is x, or the context
        out = (gate(x) * attention(q, k, v, mask)) W_O

    Parameters
    ----------
    dim : int
        Width of x and of the result.
    num_heads : int
        Query heads, Hq.
    num_kv_heads : int
        Key/value heads, Hkv: Hq is multi-head (MHA, the default), 1 is multi-query (MQA), a divisor between them is
        grouped-query attention (GQA). Query head h reads key/value head h // (Hq // Hkv).
    head_dim : int
        D, numbers in a query and a key; dim / num_heads unless given.
    context_dim : int
        Width of the context, for cross-attention; dim unless given.
    value_dim : int
        Dv, numbers in a value; D unless given.
    bias, out_bias : bool
        Whether q_proj, k_proj and v_proj have a bias, and o_proj; out_bias is bias unless given.
    qk_norm : bool
        RMSNorm of every query and key over D before rotary, with one weight (D,) for all heads: as in Qwen3 and
        Gemma 3. (OLMo 2's norm runs over all heads at once; it is not this one.)
    norm_eps : float
    rotary : qkv.rotary.Rotary
        Positions turned into queries and keys; rotary.dim <= D leading numbers of a head turn.
    gate : bool or "headwise"
        Multiply the heads' outputs by sigmoid(x W_G): a number for each of their numbers (True), or one a head.
    sinks : bool
        A learned score a head that takes part in the softmax and has no value; starts at 0.
    mask : Mask or bool Tensor
        What this layer may see, such as `qkv.sliding_window(512)`; combined by & with each call's mask.
    softcap, scale, dropout_p, backend
        As in `qkv.attention`; dropout acts in training mode only.
    device, dtype : of the parameters

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes that do not fit, or an argument of another type.

    Notes
    -----
    Names. Vaswani et al. (2017) write h for num_heads, d_model for dim, d_k for D and d_v for Dv, and one W_i^Q,
    W_i^K, W_i^V for each head; here the heads' matrices lie side by side in one projection. Weights are (out, in), as
    nn.Linear has them, and carry the names of Hugging Face's Llama, so its state dicts load as they are.

    ============  =========================  =================================
    here          the paper                  weight
    ============  =========================  =================================
    q_proj        W_Q, queries               (Hq D, dim)
    k_proj        W_K, keys                  (Hkv D, context_dim)
    v_proj        W_V, values                (Hkv Dv, context_dim)
    o_proj        W_O, output                (dim, Hq Dv)
    q/k_norm      QK-norm                    (D,)
    gate_proj     W_theta of the gate        (Hq Dv or Hq, dim)
    sinks         sinks                      (Hq,)
    ============  =========================  =================================

    There is no flag for causality: it is the mask's, `mask=qkv.causal()`.

    Cost: 2 FLOPs a weight and token, and those of `qkv.attention`. A cache holds Hkv (D + Dv) numbers a token.
    Sources: Vaswani et al. (2017), arXiv 1706.03762; MQA: Shazeer (2019), arXiv 1911.02150; GQA: Ainslie et al.
    (2023), arXiv 2305.13245; QK-norm: Henry et al. (2020), arXiv 2010.04245, with RMSNorm; output gate: Qiu et al.
    (2025), arXiv 2505.06708; sinks: GPT-OSS (OpenAI, 2025), arXiv 2508.10925.

    Examples
    --------
    >>> import torch, qkv
    >>> layer = Attention(256, 8, num_kv_heads=2, rotary=qkv.rotary.Rotary(32), mask=qkv.sliding_window(64))
    >>> x = torch.randn(2, 100, 256)
    >>> layer(x).shape
    torch.Size([2, 100, 256])
    >>> cross = Attention(256, 8, context_dim=96)
    >>> cross(x, torch.randn(2, 7, 96)).shape
    torch.Size([2, 100, 256])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        gate: bool | str = False,
        sinks: bool = False,
        mask: Mask | Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._hold_heads(_CALL, dim, num_heads, num_kv_heads, head_dim, value_dim, rotary)
        self.rotary = rotary
        self.context_dim = self.dim if context_dim is None else integer(_CALL, "context_dim", context_dim, low=1)
        if gate not in (False, True, "headwise"):
            fix = 'Pass True for a gate a number, or "headwise"'
            raise ArgumentError.of(_CALL, 'gate is a bool or "headwise"', f"gate={gate!r}", fix)
        self.gate = gate
        self._hold(_CALL, mask, softcap, scale, dropout_p, backend)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        out_bias = bias if out_bias is None else out_bias
        Hq, Hkv, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim
        self.q_proj = nn.Linear(self.dim, Hq * D, bias=bias, **made)
        self.k_proj = nn.Linear(self.context_dim, Hkv * D, bias=bias, **made)
        self.v_proj = nn.Linear(self.context_dim, Hkv * Dv, bias=bias, **made)
        self.o_proj = nn.Linear(Hq * Dv, self.dim, bias=out_bias, **made)
        self.q_norm = RMSNorm(D, norm_eps, **made) if qk_norm else None
        self.k_norm = RMSNorm(D, norm_eps, **made) if qk_norm else None
        gates = {False: 0, True: Hq * Dv, "headwise": Hq}[gate]
        self.gate_proj = nn.Linear(self.dim, gates, bias=bias, **made) if gates else None
        self.sinks = nn.Parameter(torch.zeros(Hq, **made)) if sinks else None

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as construction does: for a layer that was built on the meta device."""
        super().reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        positions: int | str | Tensor | None = None,
        cache: LayerCache | None = None,
        across: Across | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Attend within x, or from x to a context.

        Parameters
        ----------
        x : Tensor, shape (B, Lq, dim)
        context : Tensor, shape (B, Lk, context_dim)
            Where keys and values come from: cross-attention. x itself unless given.
        mask : Mask or bool Tensor
            Which tokens each token may see (True = may), with the layer's own mask by &. In self-attention masks
            speak of the places 0 .. L - 1 in x, whatever `positions` says.
        positions : int, or int Tensor (Lq,) or (B or 1, Lq); with a context also "start" or "end"
            Self-attention: the tokens' positions for rotary, the first one's or each one's; 0 unless given. With a
            context: where the queries stand among its tokens, which stand on 0 .. Lk - 1, for rotary and masks;
            needed where Lq != Lk and one of them depends on it.
        cache : qkv.call.problem.LayerCache
            One layer of a step of a cache's sequences, `cache.step(seqs, T=...).layer(i)`. x is (n, T, dim), the next T
            tokens of each, or ragged (1, sum T, dim). Their keys and values are stored, and each token attends to what
            its sequence holds; masks and rotary read its position there. For inference only.
        across : qkv.distributed.Context
            x is this rank's rows of sequences that several ranks hold together. Each token attends to the whole
            sequence, and masks and rotary go by its place there. For self-attention without a cache.

        Returns
        -------
        Tensor, shape (B, Lq, dim)
            In the projections' dtype. A token that sees none gets o_proj's bias, or 0.

        Raises
        ------
        ShapeError, ArgumentError, ArgumentTypeError
            Inputs that do not fit the layer or each other.
        UnsupportedError
            A cache and gradients, dropout, or a rotary scaling whose frequencies have changed since keys were stored;
            `across` with a cache, a context, or positions of each token and a scaling that looks at the length.
        PagesExhausted
            A cache without room for the step; nothing was changed.

        Examples
        --------
        >>> import torch, qkv
        >>> layer = Attention(64, 4, num_kv_heads=2, rotary=qkv.rotary.Rotary(16), mask=qkv.causal())
        >>> cache = qkv.cache.PagedCache(pages=8, num_kv_heads=2, head_dim=16, dtype=torch.float32)
        >>> seqs, x = [cache.add(), cache.add()], torch.randn(2, 7, 64)
        >>> with torch.inference_mode():
        ...     prompt = layer(x[:, :6], cache=cache.step(seqs, T=6).layer(0))
        ...     last = layer(x[:, 6:], cache=cache.step(seqs, T=1).layer(0))
        ...     torch.allclose(last, layer(x)[:, 6:], atol=1e-5)
        True
        """
        if unknown:
            raise keywords.unknown(_FORWARD, unknown, Attention.forward)
        run = Attention._forward if cache is None else eager(Attention._forward)
        return run(self, x, context, mask, positions, cache, across)

    def _forward(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        positions: int | str | Tensor | None,
        cache: LayerCache | None,
        across: Across | None,
    ) -> Tensor:
        at: int | str | Tensor | None
        length: int | None = None
        if across is not None:
            self._check_whole(context, cache, across)
        seen = self._seen(mask)
        if cache is None:
            at = self._query_positions(x, context, positions)
            if across is not None and not isinstance(at, str):
                at, length = stand(_FORWARD, x, at, self.rotary, across)
        else:
            at = self._step_positions(x, context, positions, cache)
            seen = as_mask(seen, _FORWARD)
        q, k, v = self._project(x, context, at, length)
        ranks = divided(_FORWARD, self, "q_proj", q.shape[1])
        keys: Tensor | KVView = k
        values: Tensor | None = v
        if cache is not None:
            cache.append(k, v)
            keys, values = cache.view(), None
        where = _for_mask(at) if context is not None else None
        sinks = self.sinks if self.sinks is None or ranks is None else ranks.own(self.sinks, 0, self.num_heads)
        out = self._attend(q, keys, values, seen, across, positions=where, sinks=sinks)
        heads = out.transpose(1, 2)  # (B, Lq, heads here, Dv)
        if self.gate_proj is not None:
            width = self.value_dim if self.gate is True else 1
            gates = by_head(_FORWARD, "gate_proj", self.gate_proj(x), width, self.num_heads)
            heads = heads * gates_of(_FORWARD, self, ranks, gates, heads.shape[2]).sigmoid()
        return joined(_FORWARD, self, ranks, heads)

    def project(
        self, x: Tensor, context: Tensor | None = None, *, positions: int | str | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values that `forward` attends with, after norms and rotary.

        Parameters
        ----------
        x, context, positions
            As for `forward`.

        Returns
        -------
        q : Tensor, shape (B, Hq, Lq, D)
        k : Tensor, shape (B, Hkv, Lk, D)
        v : Tensor, shape (B, Hkv, Lk, Dv)

        Examples
        --------
        >>> import torch, qkv
        >>> layer = Attention(32, 4, num_kv_heads=1)
        >>> q, k, v = layer.project(torch.randn(1, 6, 32))
        >>> qkv.weights(q, k, rows=[5], mask=qkv.causal()).shape
        torch.Size([1, 4, 1, 6])
        """
        return self._project(x, context, self._query_positions(x, context, positions))

    def _project(
        self, x: Tensor, context: Tensor | None, at: int | str | Tensor | None, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = x if context is None else context
        q = by_head(_FORWARD, "q_proj", self.q_proj(x), self.head_dim, self.num_heads)
        k = by_head(_FORWARD, "k_proj", self.k_proj(source), self.head_dim, self.num_kv_heads)
        v = by_head(_FORWARD, "v_proj", self.v_proj(source), self.value_dim, self.num_kv_heads)
        ranks = divided(_FORWARD, self, "q_proj", q.shape[2])
        k, v = read_by(_FORWARD, self, ranks, k, v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (n(t) if ranks is None else ranks.shared(n, t) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotary is not None:
            q, k = self._rotate(q, k, context is not None, at, length)
        return q, k, v

    def _rotate(
        self, q: Tensor, k: Tensor, cross: bool, at: int | str | Tensor | None, length: int | None
    ) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        Lq, Lk = q.shape[2], k.shape[2]
        if at is None or isinstance(at, str):
            at = Lk - Lq if at == "end" else 0
        # Queries and keys share one sequence, and so one length for the scalings that look at it.
        if length is None:
            length = max(self.rotary.length(at, Lq), Lk) if cross else self.rotary.length(at, Lq)
        made: dict[str, Any] = {"device": q.device, "dtype": torch.promote_types(q.dtype, torch.float32)}
        tables = self.rotary.tables(at, Lq, length=length, **made)
        q = self.rotary.apply(q, *tables)
        return q, self.rotary.apply(k, *(self.rotary.tables(0, Lk, length=length, **made) if cross else tables))

    def _query_positions(self, x: Tensor, context: Tensor | None, positions: Any) -> int | str | Tensor | None:
        """Check the inputs; positions as given, an error where they are missing."""
        check_tokens(_FORWARD, "x", x, "dim", self.dim)
        B, Lq = x.shape[:2]
        Lk = Lq
        if context is None:
            if self.context_dim != self.dim:
                given = f"no context, dim={self.dim} and context_dim={self.context_dim}"
                rule, fix = "a layer with a context_dim of its own needs a context", "Pass context (B, Lk, context_dim)"
                raise ArgumentError.of(_FORWARD, rule, given, fix)
        else:
            check_tokens(_FORWARD, "context", context, "context_dim", self.context_dim)
            Lk = context.shape[1]
            if context.shape[0] != B:
                given = f"x {tuple(x.shape)} and context {tuple(context.shape)}"
                fix = "Expand the smaller one: context.expand(B, -1, -1) is free"
                raise ShapeError.of(_FORWARD, "x and context must have one batch size B", given, fix)
        if positions is None:
            if self.rotary is not None and Lq != Lk:
                rule = (
                    "positions= must say where the queries stand in the context when Lq != Lk and the layer is rotary"
                )
                fix = f'Pass positions="start" (0 .. {Lq - 1}), "end" ({Lk - Lq} .. {Lk - 1}), an int or a tensor'
                raise ArgumentError.of(_FORWARD, rule, f"Lq={Lq} and Lk={Lk}", fix)
            return None
        if isinstance(positions, str) and context is not None and positions in ("start", "end"):
            return positions
        return as_positions(_FORWARD, positions, B, Lq)

    def _step_positions(self, x: Tensor, context: Tensor | None, positions: Any, cache: LayerCache) -> Tensor:
        """Check the inputs; where a cache's step says that its tokens stand."""
        if context is not None:
            rule, given = "a cache holds the tokens of x, so there is none for a context", "context and cache"
            fix = "Leave cache out: keys of a context are the same in each step, project() gives them once"
            raise ArgumentError.of(_FORWARD, rule, given, fix)
        self._query_positions(x, None, None)
        return check_step(_FORWARD, self, x, positions, self.rotary, cache)

    def _check_whole(self, context: Tensor | None, cache: LayerCache | None, across: Across) -> None:
        whole_only(_FORWARD, None if cache is None else across, "a cache's step", "Leave cache out, or across")
        fix = "Leave across out, give every rank the whole context, and pass positions=across.positions"
        whole_only(_FORWARD, None if context is None else across, "a context", fix)

    def extra_repr(self) -> str:
        """The sizes and options, for `print`."""
        sizes = f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return ", ".join([sizes, *self._options("rotary")])


def _for_mask(at: int | str | Tensor | None) -> int | str | Tensor | None:
    return at[None] if isinstance(at, Tensor) and at.dim() == 1 else at
