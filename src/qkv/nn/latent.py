"""Multi-head latent attention (MLA): keys and values compressed into one small vector a token."""

from __future__ import annotations

from array import array
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkv.call import keywords
from qkv.call.keys import Clock, IndexedLayerCache, KVLayout, KVView, LayerCache
from qkv.call.view import gathered
from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.graph import eager
from qkv.indexing import index_scores, select_tokens
from qkv.masks import Mask, as_mask
from qkv.nn.divided import FIX, Divided, by_head, divided, joined
from qkv.nn.indexer import Indexer
from qkv.nn.layer import (
    GATHER,
    Across,
    Layer,
    RMSNorm,
    check_rotary,
    check_step,
    check_tokens,
    matrix_of,
    stand,
    whole_only,
)
from qkv.probabilities import weights
from qkv.rotary import Rotary, as_positions

_CALL = "qkv.nn.LatentAttention()"
_FORWARD = "qkv.nn.LatentAttention.forward()"


class LatentAttention(Layer):
    """Attend as DeepSeek-V2 and V3 do: each token keeps R + dr numbers, from which all heads' keys and values follow.

    ::

        c_q  = norm(x W_DQ)                    (B, L, Rq)         query latent; x itself where q_lora_rank is None
        q    = c_q [W_UQ | W_QR]               (B, H, L, dn + dr) the last dr turned by rotary
        c    = norm(x W_DKV)                   (B, L, R)          key/value latent
        k_r  = rotary(x W_KR)                  (B, 1, L, dr)      one for all heads
        k    = [c W_UK | k_r],  v = c W_UV     (B, H, L, dn + dr), (B, H, L, dv)
        out  = attention(q, k, v) W_O          scale 1 / sqrt(dn + dr)

    Parameters
    ----------
    dim, num_heads : int
        Width of x, and H.
    q_lora_rank : int or None
        Rq, the query latent's size; None: one q_proj instead of compression.
    kv_lora_rank : int
        R, the key/value latent's size.
    qk_nope_head_dim, qk_rope_head_dim : int
        dn and dr, numbers of a query and key without and with a position.
    v_head_dim : int
        dv, numbers of a value.
    rotary : qkv.rotary.Rotary
        Of dim dr; Rotary(dr, interleaved=True) unless given, as in the published weights. With a YaRN that has
        mscale_all_dim, the scale grows by (0.1 mscale_all_dim ln(factor) + 1)^2.
    bias : bool
        Whether q_a_proj, kv_a_proj_with_mqa and o_proj have a bias (`attention_bias` of the published configs).
    absorb : bool or None
        The form to compute in, see Notes; None takes the one of fewer FLOPs. Over a cache, which holds latents, it is
        the absorbed form. Only a matrix can be absorbed: a kv_b_proj that is no plain Linear is called, whatever
        `absorb` says.
    indexer : qkv.nn.Indexer
        Each token attends only to the tokens that it chooses, as in DeepSeek-V3.2: of those that masks show, the
        top_k. It has this layer's dim and q_lora_rank. None: to all that masks show.
    norm_eps : float
    mask, softcap, scale, dropout_p, backend
        As in `qkv.nn.Attention`.
    device, dtype : of the parameters

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes that do not fit, or an argument of another type.

    Notes
    -----
    Absorption. A score is q_n . (c W_UK) + q_r . k_r, and q_n . (c W_UK) = (q_n W_UK^T) . c. Folding W_UK (dn, R) of
    each head into its query leaves one key for all heads, the latent, and W_UV can wait until after the sum:

    ==================  ================================  ===================================================
    .                   materialised (absorb=False)       absorbed (absorb=True)
    ==================  ================================  ===================================================
    queries             (B, H, L, dn + dr)                [q_n W_UK^T | q_r]  (B, H, L, R + dr)
    keys                (B, H, L, dn + dr)                [c | k_r]           (B, 1, L, R + dr)
    values              (B, H, L, dv)                     c, a view of the keys  (B, 1, L, R)
    heads' outputs      (B, H, L, dv)                     (B, H, L, R), then W_UV to (B, H, L, dv)
    FLOPs a pair        2 H (dn + dr + dv)                2 H (2 R + dr)
    FLOPs of W_UK W_UV  2 H R (dn + dv) a key             2 H R (dn + dv) a query
    ==================  ================================  ===================================================

    They are equal but for rounding. In training every token is a query and a key, so the projections cost the same,
    and a pair costs 2 H 320 FLOPs against 2 H 1088 with DeepSeek's sizes (dn 128, dr 64, dv 128, R 512): materialise.
    In decoding one query meets many keys, and materialising would compute all their heads anew, or keep them: the
    absorbed form reads R + dr = 576 numbers a token where 128 heads of keys and values are 40,960. Those R + dr
    numbers, 1,152 bytes in bfloat16, are all that a cache holds for a token.

    The absorbed form takes kv_b_proj apart, so it is for a `torch.nn.Linear` without bias, hooks or a forward of its
    own. Whatever else stands there (an adapter, a quantised layer, one with a hook) is called on the latents, in
    training and over a cache, and gets its gradients; a cached step then costs 2 H R (dn + dv) FLOPs and keeps
    H (dn + dr + dv) numbers for every key of its sequences while it runs. Merge an adapter into the weight to have
    the absorbed form back.

    Names are those of Hugging Face's DeepSeek, so its state dicts load as they are:

    ====================  ==============================  ==========================
    here                  the paper                       weight
    ====================  ==============================  ==========================
    q_a_proj              W_DQ                            (Rq, dim)
    q_a_layernorm         RMSNorm of c^Q                  (Rq,)
    q_b_proj or q_proj    W_UQ and W_QR, head by head     (H (dn + dr), Rq or dim)
    kv_a_proj_with_mqa    W_DKV and W_KR                  (R + dr, dim)
    kv_a_layernorm        RMSNorm of c^KV                 (R,)
    kv_b_proj             W_UK and W_UV, head by head     (H (dn + dv), R)
    o_proj                W_O                             (dim, H dv)
    ====================  ==============================  ==========================

    Cost: 2 FLOPs a weight and token, and the above for each visible pair.
    Source: DeepSeek-AI (2024), DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; V3: arXiv 2412.19437.

    Examples
    --------
    >>> import torch, qkv
    >>> layer = LatentAttention(64, 4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    ...                         v_head_dim=8, mask=qkv.causal(), dtype=torch.float64)
    >>> x = torch.randn(2, 10, 64, dtype=torch.float64)
    >>> layer(x).shape, layer.latent(x).shape
    (torch.Size([2, 10, 64]), torch.Size([2, 1, 10, 20]))
    >>> materialised = layer(x)
    >>> layer.absorb = True
    >>> torch.allclose(layer(x), materialised, atol=1e-12)
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rotary: Rotary | None = None,
        bias: bool = False,
        absorb: bool | None = None,
        indexer: Indexer | None = None,
        norm_eps: float = 1e-6,
        mask: Mask | Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = integer(_CALL, "dim", dim, low=1), integer(_CALL, "num_heads", num_heads, low=1)
        self.q_lora_rank = None if q_lora_rank is None else integer(_CALL, "q_lora_rank", q_lora_rank, low=1)
        self.kv_lora_rank = integer(_CALL, "kv_lora_rank", kv_lora_rank, low=1)
        self.qk_nope_head_dim = integer(_CALL, "qk_nope_head_dim", qk_nope_head_dim, low=1)
        self.qk_rope_head_dim = integer(_CALL, "qk_rope_head_dim", qk_rope_head_dim, low=2)
        self.v_head_dim = integer(_CALL, "v_head_dim", v_head_dim, low=1)
        dr, right = self.qk_rope_head_dim, f"Rotary({self.qk_rope_head_dim}, interleaved=True)"
        self.rotary = Rotary(dr, interleaved=True) if rotary is None else rotary
        check_rotary(_CALL, self.rotary, "qk_rope_head_dim", dr, right)
        self._check_indexer(indexer)
        if absorb not in (None, False, True):
            fix = "Pass True, False, or None for the cheaper form"
            raise ArgumentError.of(_CALL, "absorb is a bool or None", f"absorb={absorb!r}", fix)
        self.absorb = absorb
        self._hold(_CALL, mask, softcap, scale, dropout_p, backend)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        H, R, D = self.num_heads, self.kv_lora_rank, self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(self.dim, H * D, bias=False, **made)
        else:
            self.q_a_proj = nn.Linear(self.dim, self.q_lora_rank, bias=bias, **made)
            self.q_a_layernorm = RMSNorm(self.q_lora_rank, norm_eps, **made)
            self.q_b_proj = nn.Linear(self.q_lora_rank, H * D, bias=False, **made)
        self.kv_a_proj_with_mqa = nn.Linear(self.dim, R + self.qk_rope_head_dim, bias=bias, **made)
        self.kv_a_layernorm = RMSNorm(R, norm_eps, **made)
        self.kv_b_proj = nn.Linear(R, H * (self.qk_nope_head_dim + self.v_head_dim), bias=False, **made)
        self.o_proj = nn.Linear(H * self.v_head_dim, self.dim, bias=bias, **made)
        self.indexer = indexer

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        positions: int | Tensor | None = None,
        cache: LayerCache | None = None,
        return_mask: bool = False,
        across: Across | None = None,
        **unknown: Any,
    ) -> Any:
        """Attend within x.

        Parameters
        ----------
        x : Tensor, shape (B, L, dim)
        mask : Mask or bool Tensor
            Which tokens each token may see (True = may), with the layer's own mask by &. Masks speak of the places
            0 .. L - 1 in x.
        positions : int, or int Tensor (L,) or (B or 1, L)
            The tokens' positions for rotary, the first one's or each one's; 0 unless given.
        cache : qkv.call.problem.LayerCache
            One layer of a step of a `qkv.cache.LatentCache` with rank R and rope_dim dr: `cache.step(seqs, T=...)
            .layer(i)`. x is (n, T, dim), the next T tokens of each sequence, or ragged (1, sum T, dim). Their latents
            are stored, and each token attends to what its sequence holds; masks and rotary read its position there.
            For inference only. With an indexer the cache holds its keys, too: index_dim=indexer.head_dim.
        return_mask : bool
            Return (out, mask) with the mask that attention ran with, the chosen tokens in it: a layer without an
            indexer that takes it as `mask=` attends to the same ones, as every other layer of GLM does.
        across : qkv.distributed.Context
            As in `qkv.nn.Attention`: x is this rank's rows. Not with an indexer, which chooses among all keys.

        Returns
        -------
        Tensor, shape (B, L, dim)
            A token that sees none gets o_proj's bias, or 0.

        Raises
        ------
        ShapeError, ArgumentError, ArgumentTypeError
            Inputs that do not fit the layer or each other.
        UnsupportedError
            A cache and gradients, dropout, or a rotary scaling whose frequencies have changed since keys were stored;
            `across` with a cache, an indexer, or positions of each token and a scaling that looks at the length.
        PagesExhausted
            A cache without room for the step; nothing was changed.

        Examples
        --------
        >>> import torch, qkv
        >>> layer = LatentAttention(64, 4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        ...                         v_head_dim=8, mask=qkv.causal())
        >>> cache = qkv.cache.LatentCache(rank=16, rope_dim=4, pages=8, dtype=torch.float32)
        >>> seqs, x = [cache.add(), cache.add()], torch.randn(2, 7, 64)
        >>> with torch.inference_mode():
        ...     prompt = layer(x[:, :6], cache=cache.step(seqs, T=6).layer(0))
        ...     last = layer(x[:, 6:], cache=cache.step(seqs, T=1).layer(0))
        ...     torch.allclose(last, layer(x)[:, 6:], atol=1e-5)
        True
        """
        if unknown:
            raise keywords.unknown(_FORWARD, unknown, LatentAttention.forward)
        plain = cache is None and self.indexer is None
        run = LatentAttention._forward if plain else eager(LatentAttention._forward)
        out, seen = run(self, x, mask, positions, cache, across)
        return (out, as_mask(seen, _FORWARD)) if return_mask else out

    def _forward(
        self,
        x: Tensor,
        mask: Mask | Tensor | None,
        positions: int | Tensor | None,
        cache: LayerCache | None,
        across: Across | None,
    ) -> tuple[Tensor, Mask | Tensor | None]:
        at: int | Tensor
        length: int | None = None
        seen = self._seen(mask)
        whole_only(_FORWARD, None if cache is None else across, "a cache's step", "Leave cache out, or across")
        whole_only(_FORWARD, None if self.indexer is None else across, "an indexer's choice", GATHER)
        matrix: Tensor | None = None  # W_UK and W_UV, of the absorbed form
        if cache is None:
            at, length = stand(_FORWARD, x, self._positions(x, positions), self.rotary, across)
            if self._absorbed_is_cheaper() if self.absorb is None else self.absorb:
                matrix = matrix_of(self.kv_b_proj)
        else:
            check_tokens(_FORWARD, "x", x, "dim", self.dim)
            at = check_step(_FORWARD, self, x, positions, self.rotary, cache)
            self._check_cache(cache)
            seen, matrix = as_mask(seen, _FORWARD), matrix_of(self.kv_b_proj)
        c_q = self.query_latent(x)
        q_nope, q_rope, latent = self._project(x, c_q, at, length)
        ranks = self._ranks(q_nope)
        view, seen = self._stored(x, c_q, latent, at, seen, cache, q_nope.shape[1])
        keys: Tensor | KVView
        values: Tensor | None = None
        if matrix is None:
            if view is None:
                keys, values = self._materialised(latent, q_nope.shape[1], ranks)
            else:
                keys = self._materialised_view(view, q_nope.shape[1])
        else:
            latent = latent if ranks is None or view is not None else ranks.summed(latent)
            keys, values = (latent, latent[..., : self.kv_lora_rank]) if view is None else (view, None)
            self._check_expanded(matrix.shape[0], q_nope.shape[1])
            heads = matrix.unflatten(0, (q_nope.shape[1], -1))
            w_uk, w_uv = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
            q_nope = q_nope @ w_uk  # (B, H, L, dn) @ (H, dn, R)
        out = self._attend(torch.cat((q_nope, q_rope), dim=-1), keys, values, seen, across, scale=self._scale())
        if matrix is not None:
            out = out @ w_uv.transpose(1, 2)  # (B, H, L, R) @ (H, R, dv)
        return joined(_FORWARD, self, ranks, out.transpose(1, 2)), seen

    def _ranks(self, q: Tensor) -> Divided | None:
        """The ranks among which the heads of queries (B, heads here, ...) are divided."""
        return divided(_FORWARD, self, "q_proj" if self.q_lora_rank is None else "q_b_proj", q.shape[1])

    def _stored(
        self, x: Tensor, c_q: Tensor, latent: Tensor, at: int | Tensor, seen: Any, cache: LayerCache | None, heads: int
    ) -> tuple[KVView | None, Mask | Tensor | None]:
        """What a cache holds once it has the step, None without one; and of what is seen what the indexer chooses."""
        index = None if self.indexer is None else self.indexer(x, c_q, positions=at)
        view: KVView | None = None
        keys: Tensor | KVView | None = None if index is None else index[1]
        if cache is not None:
            parts = latent[:, 0].split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            if index is None:
                cache.append(*parts)
            else:
                own = cast("IndexedLayerCache", cache)
                own.append(parts[0], parts[1], index[1])
                keys = own.index_view()
            view = cache.view()
        if self.indexer is None or index is None or keys is None:
            return view, seen
        top_k = self.indexer.top_k
        return view, select_tokens(index[0], keys, index[2], top_k, mask=seen, heads=heads)

    def index_loss(
        self,
        x: Tensor,
        *,
        rows: Any = None,
        mask: Mask | Tensor | None = None,
        positions: int | Tensor | None = None,
        full: bool = False,
    ) -> Tensor:
        """How far the indexer is from this layer's attention: what it learns from, and nothing else does.

        KL(p, softmax(I)) in nats, the mean over the rows, where p are the probabilities of attention, the mean over
        heads. x, p and the query latent are detached, so only the indexer gets gradients.

        Parameters
        ----------
        x, mask, positions
            As for `forward`.
        rows : slice, int, or ints
            The tokens that count; all by default.
        full : bool
            Compare over all tokens that masks show, as while the indexer is trained under full attention; else over
            those that it chooses, as the layer attends.

        Returns
        -------
        Tensor, a scalar

        Raises
        ------
        ArgumentError
            A layer without an indexer, or a mask that differs by head.

        Notes
        -----
        Cost: the scores of both for the rows, twice, and 4 (H + 2) bytes for each row and token: take some rows a step.
        Source: DeepSeek-AI (2025), DeepSeek-V3.2, arXiv 2512.02556, equations 3 and 4.
        """
        if self.indexer is None:
            fix = "Build the layer with indexer=qkv.nn.Indexer(...)"
            raise ArgumentError.of("qkv.nn.LatentAttention.index_loss()", "it is the indexer's loss", "none", fix)
        at = self._positions(x, positions)
        with torch.no_grad():
            c_q = self.query_latent(x)
            q_nope, q_rope, latent = self._project(x, c_q, at)
            ranks = self._ranks(q_nope)
            keys, _ = self._materialised(latent, q_nope.shape[1], ranks)
        q, k, each = self.indexer(x.detach(), c_q, positions=at)
        seen = as_mask(self._seen(mask), _FORWARD)
        if not full:
            seen = select_tokens(q, k, each, self.indexer.top_k, mask=seen)
        main = torch.cat((q_nope, q_rope), dim=-1)
        p = weights(main, keys, rows=rows, mask=seen, scale=self._scale(), softcap=self.softcap).mean(1)
        if ranks is not None:
            p = ranks.mean(p)
        log = index_scores(q, k, each, rows=rows, mask=seen).log_softmax(-1)
        far = torch.where(p > 0, p * (p.log() - log), 0.0)
        return far.sum(-1).mean()

    def _scale(self) -> float:
        """Of the head sizes, in both forms: the absorbed query is longer but means the same."""
        if self.scale is not None:
            return self.scale
        own = 1.0 if self.rotary.scaling is None else self.rotary.scaling.latent_scale
        return own * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5  # type: ignore[no-any-return]

    def query_latent(self, x: Tensor) -> Tensor:
        """What queries are made of: the normed query latent, or x itself where there is no compression.

        Parameters
        ----------
        x : Tensor, shape (B, L, dim)

        Returns
        -------
        Tensor, shape (B, L, Rq or dim)
        """
        check_tokens(_FORWARD, "x", x, "dim", self.dim)
        found: Tensor = x if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))
        return found

    def latent(self, x: Tensor, *, positions: int | Tensor | None = None) -> Tensor:
        """What a cache keeps of each token: the normed latent and the rotated key, [c | k_r].

        Parameters
        ----------
        x, positions
            As for `forward`.

        Returns
        -------
        Tensor, shape (B, 1, L, R + dr)
            The one key of the absorbed form; its first R columns are the value.
        """
        at = self._positions(x, positions)
        return self._latent(x, *self._tables(x, at))

    def _latent(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_rope = self.rotary.apply(k_rope.unsqueeze(1), cos, sin)
        return torch.cat((self.kv_a_layernorm(c).unsqueeze(1), k_rope), dim=-1)

    def _project(
        self, x: Tensor, c_q: Tensor, at: int | Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, dn) and (B, H, L, dr), and what a cache keeps of each token."""
        dn, dr = self.qk_nope_head_dim, self.qk_rope_head_dim
        cos, sin = self._tables(x, at, length)
        q: Tensor = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(c_q)
        name = "q_proj" if self.q_lora_rank is None else "q_b_proj"
        q_nope, q_rope = by_head(_FORWARD, name, q, dn + dr, self.num_heads).transpose(1, 2).split([dn, dr], dim=-1)
        return q_nope, self.rotary.apply(q_rope, cos, sin), self._latent(x, cos, sin)

    def _materialised(self, latent: Tensor, heads: int, ranks: Divided | None = None) -> tuple[Tensor, Tensor]:
        """Keys (B, H, L, dn + dr) and values (B, H, L, dv) of the heads here, by calling kv_b_proj on latents."""
        R, dn, dv = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        kv = self.kv_b_proj(latent[:, 0, :, :R])
        want = (latent.shape[0], latent.shape[2], heads * (dn + dv))
        if not isinstance(kv, Tensor) or kv.shape != want or kv.dtype != latent.dtype:
            rule = "kv_b_proj must give (B, L, H (dn + dv)) in its input's dtype"
            got = f"{tuple(kv.shape)} {kv.dtype}" if isinstance(kv, Tensor) else f"a {type(kv).__name__}"
            given = f"{got} from {type(self.kv_b_proj).__name__} for H={heads}, dn={dn}, dv={dv}"
            raise ShapeError.of(_FORWARD, rule, given, f"Make it return {want} {latent.dtype}")
        k_nope, v = kv.unflatten(-1, (heads, dn + dv)).transpose(1, 2).split([dn, dv], dim=-1)
        k_rope = latent[..., R:] if ranks is None else ranks.summed(latent[..., R:])  # one for the heads of all ranks
        return torch.cat((k_nope, k_rope.expand(-1, heads, -1, -1)), dim=-1), v

    def _materialised_view(self, view: KVView, heads: int) -> KVView:
        """The keys and values of the heads here in place of a cache's latents: a page for each sequence."""
        n, longest = len(view.layout.lengths), max(view.layout.lengths, default=0)
        k, v = self._materialised(gathered(view, max(longest, 1))[0], heads)
        table, starts = array("i", range(n)), array("q", range(n + 1))
        layout = KVLayout(table, starts, view.layout.lengths, view.layout.queries, Clock(), view.layout.most)
        return KVView(k, v, None, None, view.dtype, layout, view.held)

    def _absorbed_is_cheaper(self) -> bool:
        """Whether the absorbed form costs fewer FLOPs: with as many keys as queries, the pairs decide."""
        pair = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return 2 * self.kv_lora_rank + self.qk_rope_head_dim < pair

    def _tables(self, x: Tensor, at: int | Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.rotary.tables(at, x.shape[1], length=length, device=x.device, dtype=dtype)

    def _positions(self, x: Tensor, positions: Any) -> int | Tensor:
        check_tokens(_FORWARD, "x", x, "dim", self.dim)
        return 0 if positions is None else as_positions(_FORWARD, positions, x.shape[0], x.shape[1])

    def _check_expanded(self, numbers: int, heads: int) -> None:
        """kv_b_proj's rows must be of the heads that queries are of."""
        each = self.qk_nope_head_dim + self.v_head_dim
        if numbers != heads * each:
            rule, given = "kv_b_proj must give the heads that are here", f"{numbers} rows for {heads} heads of {each}"
            raise ShapeError.of(_FORWARD, rule, given, FIX)

    def _check_indexer(self, indexer: Any) -> None:
        if indexer is None:
            return
        if not isinstance(indexer, Indexer):
            fix = "Pass qkv.nn.Indexer(dim, num_heads, head_dim, top_k, ...), or leave it out"
            raise ArgumentTypeError.of(_CALL, "indexer must be a qkv.nn.Indexer", f"{type(indexer).__name__}", fix)
        if (indexer.dim, indexer.q_lora_rank) != (self.dim, self.q_lora_rank):
            given = f"dim={indexer.dim}, q_lora_rank={indexer.q_lora_rank} and {self.dim}, {self.q_lora_rank}"
            rule = "an indexer must have the dim and the q_lora_rank of its layer"
            raise ArgumentError.of(_CALL, rule, given, "Build both with the same sizes")

    def _check_cache(self, cache: Any) -> None:
        """A cache must be able to hold index keys before a step is begun that has some."""
        if self.indexer is not None and not callable(getattr(cache, "index_view", None)):
            rule, given = "a layer with an indexer needs a cache that holds index keys", type(cache).__name__
            fix = f"Build it as qkv.cache.LatentCache(..., index_dim={self.indexer.head_dim})"
            raise ArgumentTypeError.of(_FORWARD, rule, given, fix)

    def extra_repr(self) -> str:
        """The sizes and options, for `print`."""
        sizes = f"{self.dim}, {self.num_heads}, q_lora_rank={self.q_lora_rank}, kv_lora_rank={self.kv_lora_rank}"
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary", "absorb")
        own = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join([sizes, *own, *self._options()])
