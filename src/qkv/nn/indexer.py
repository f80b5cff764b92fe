"""The indexer of DeepSeek's sparse attention: a few light heads that choose the keys that a layer attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkv.checks import integer
from qkv.indexing import index_scores
from qkv.masks import Mask
from qkv.nn.layer import check_rotary, check_tokens
from qkv.rotary import Rotary, as_positions

_CALL = "qkv.nn.Indexer()"


class Indexer(nn.Module):
    """Choose the tokens that each token of a `qkv.nn.LatentAttention` attends to, by the scores of a few light heads.

    ::

        q = c_q W_Q                       (B, Hi, L, Di)   the first dr numbers turned by rotary; c_q: the query latent
        k = layernorm(x W_K)              (B, 1, L, Di)    likewise; one key for all heads
        w = x W_w / sqrt(Hi Di)           (B, L, Hi)
        I[t, s] = sum over h of w[t, h] relu(q[t, h] . k[s]), and token t attends to the top_k tokens s of largest I

    Parameters
    ----------
    dim : int
        Width of x.
    num_heads, head_dim : int
        Hi and Di.
    top_k : int
        Tokens that each token attends to.
    q_lora_rank : int or None
        The query latent's size; None: queries are made of x itself.
    rope_dim : int
        dr, at most Di.
    rotary : qkv.rotary.Rotary
        Of dim dr; Rotary(dr) unless given, as in DeepSeek-V3.2, whose indexer pairs halves. GLM's is interleaved.
        A scaling must be that of the layer.
    norm_eps : float
        Of the layer norm of keys.
    device, dtype : of the parameters

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes that do not fit, or an argument of another type.

    Notes
    -----
    The choice has no gradient. DeepSeek first trains the indexer alone, under full attention, then with the model,
    which then attends to the chosen tokens; the indexer's inputs are detached, and its loss is KL(p, softmax(I)), where
    p are the probabilities of attention, summed over heads and divided by their sum: `LatentAttention.index_loss`.
    The published model turns q and k by a Hadamard matrix and rounds them to 8 bits; a rotation of both changes no
    product, so neither is here.

    Names are those of Hugging Face's DeepSeek-V3.2 and GLM, so their state dicts load as they are:

    ==============  ============================
    wq_b            W_Q (Hi Di, Rq or dim)
    wk              W_K (Di, dim)
    k_norm          the layer norm, with bias
    weights_proj    W_w (Hi, dim)
    ==============  ============================

    Cost: 2 Hi Di FLOPs a visible pair, with 64 heads of 128 a seventeenth of what DeepSeek's attention in the absorbed
    form costs, and Di numbers a token in a cache, its `index_dim`.
    Source: DeepSeek-AI (2025), DeepSeek-V3.2, arXiv 2512.02556, section 2.1.

    Examples
    --------
    >>> import torch, qkv
    >>> indexer = Indexer(64, num_heads=4, head_dim=16, top_k=3, q_lora_rank=24, rope_dim=4)
    >>> layer = qkv.nn.LatentAttention(64, 4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    ...                                v_head_dim=8, mask=qkv.causal(), indexer=indexer)
    >>> x = torch.randn(2, 10, 64)
    >>> out, seen = layer(x, return_mask=True)
    >>> seen.tensor(10, 10, B=2).sum(-1)[0, 0].tolist()
    [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        top_k: int,
        *,
        q_lora_rank: int | None,
        rope_dim: int,
        rotary: Rotary | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = integer(_CALL, "dim", dim, low=1), integer(_CALL, "num_heads", num_heads, low=1)
        self.head_dim, self.top_k = integer(_CALL, "head_dim", head_dim, low=2), integer(_CALL, "top_k", top_k, low=1)
        self.q_lora_rank = None if q_lora_rank is None else integer(_CALL, "q_lora_rank", q_lora_rank, low=1)
        self.rope_dim = integer(_CALL, "rope_dim", rope_dim, low=2, high=self.head_dim)
        self.rotary = Rotary(self.rope_dim) if rotary is None else rotary
        check_rotary(_CALL, self.rotary, "rope_dim", self.rope_dim, f"Rotary({self.rope_dim})")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.wq_b = nn.Linear(self.q_lora_rank or self.dim, self.num_heads * self.head_dim, bias=False, **made)
        self.wk = nn.Linear(self.dim, self.head_dim, bias=False, **made)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=norm_eps, **made)
        self.weights_proj = nn.Linear(self.dim, self.num_heads, bias=False, **made)

    def forward(
        self, x: Tensor, q_latent: Tensor | None = None, *, positions: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `qkv.select_tokens` and `qkv.index_scores` take.

        Parameters
        ----------
        x : Tensor, shape (B, L, dim)
        q_latent : Tensor, shape (B, L, q_lora_rank)
            The layer's normed query latent, `LatentAttention.query_latent(x)`; x itself where there is none.
        positions : int, or int Tensor (L,) or (B or 1, L)
            For rotary, as in `LatentAttention`.

        Returns
        -------
        q : Tensor, shape (B, Hi, L, Di)
        k : Tensor, shape (B, 1, L, Di)
        weights : Tensor, shape (B, L, Hi)
            In float32, or float64 for float64.
        """
        call = "qkv.nn.Indexer.forward()"
        check_tokens(call, "x", x, "dim", self.dim)
        source = x if q_latent is None else q_latent
        check_tokens(call, "q_latent", source, "q_lora_rank", self.q_lora_rank or self.dim)
        at = 0 if positions is None else as_positions(call, positions, x.shape[0], x.shape[1])
        wide = torch.promote_types(x.dtype, torch.float32)
        tables = self.rotary.tables(at, x.shape[1], device=x.device, dtype=wide)
        q = self.wq_b(source).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.wk(x)).unsqueeze(1)
        weights = self.weights_proj(x.to(self.weights_proj.weight.dtype)).to(wide)
        turned = [self._turned(part.to(q.dtype), *tables) for part in (q, k)]  # autocast leaves norms in float32
        return turned[0], turned[1], weights * (self.num_heads * self.head_dim) ** -0.5

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((self.rotary.apply(first, cos, sin), rest), dim=-1)

    def scores(
        self,
        x: Tensor,
        q_latent: Tensor | None = None,
        *,
        positions: int | Tensor | None = None,
        rows: Any = None,
        keys: Tensor | None = None,
        mask: Mask | Tensor | None = None,
    ) -> Tensor:
        """I of chosen rows, differentiable: `qkv.index_scores` of what `forward` gives.

        Parameters
        ----------
        x, q_latent, positions
            As for `forward`; detach x and q_latent to train the indexer alone.
        rows, keys, mask
            As in `qkv.index_scores`. The mask speaks of the places 0 .. L - 1 in x.

        Returns
        -------
        Tensor, shape (B, rows, L or n)
        """
        q, k, weights = self(x, q_latent, positions=positions)
        return index_scores(q, k, weights, rows=rows, keys=keys, mask=mask)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as construction does."""
        for module in (self.wq_b, self.wk, self.k_norm, self.weights_proj):
            module.reset_parameters()

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        sizes = f"{self.dim}, {self.num_heads}, {self.head_dim}, {self.top_k}, q_lora_rank={self.q_lora_rank}"
        return f"{sizes}, rope_dim={self.rope_dim}, rotary={self.rotary!r}"
