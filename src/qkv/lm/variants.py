"""Attention layers to compare the library's with: one thing changed (ablations), or PyTorch's kernel in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qkv.functional import attention
from qkv.masks import Mask, causal, window
from qkv.nn import Attention
from qkv.rotary import Rotary
from qkv.selection import select_blocks


@dataclass(frozen=True)
class Ablation:
    """What differs from multi-head attention, everything else being equal."""

    what: str
    shared: bool = False  # W_K is W_Q
    hide_self: bool = False  # key j = p is hidden; the first byte then sees nothing, and its attention is 0
    folded: bool = False  # one (dim, dim) matrix a head in place of W_Q and W_K
    values: str = "projected"  # "slice": head h reads its slice of x; "whole": every head reads all of x
    power: float = 0.5  # scale = D ** -power
    one_head: bool = False


# Folding: (x_i W_Q)·(x_j W_K) = x_i (W_Q W_Kᵀ) x_jᵀ, so one free matrix W a head can say all that two can, and more
# (its rank is not held to D). The key is then x itself, dim wide and the same for all heads; the query x_i W is dim
# wide in each, so a score takes heads times the multiplications, and W_Q, W_K heads / 2 times the weights. Rotary turns
# the wide vectors: between W_Q and W_K it would not fold.
# Values: W_V and W_O of a head multiply to one matrix as well, so "whole" with W_O (heads * dim, dim) loses nothing and
# pays with heads times as wide values, while "slice" can only pass on the head's own share of x.
ABLATIONS = {
    "shared-qk": Ablation("W_Q = W_K", shared=True),
    "shared-qk-no-self": Ablation("W_Q = W_K, self masked", shared=True, hide_self=True),
    "folded-qk": Ablation("W_Q folded into W_K", folded=True),
    "v-is-x": Ablation("V = X, head h its slice", values="slice"),
    "v-is-x-whole": Ablation("V = X, all of it in every head", values="whole"),
    "scale-1": Ablation("scale 1", power=0.0),
    "scale-1/d": Ablation("scale 1/d", power=1.0),
    "one-head": Ablation("one head of equal width", one_head=True),
}


class AblatedAttention(nn.Module):
    """Self-attention as `Ablation` says; with nothing changed it is rotary multi-head attention.

    Parameters
    ----------
    dim, num_heads : int
        x is (B, L, dim); heads are dim / num_heads wide.
    ablation : Ablation
    """

    def __init__(self, dim: int, num_heads: int, ablation: Ablation) -> None:
        super().__init__()
        self.ablation, self.dim = ablation, dim
        self.num_heads = 1 if ablation.one_head else num_heads
        self.head_dim = dim // self.num_heads
        wide = self.num_heads * dim
        self.q_proj = nn.Linear(dim, wide if ablation.folded else dim, bias=False)
        self.k_proj = None if ablation.shared or ablation.folded else nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False) if ablation.values == "projected" else None
        self.o_proj = nn.Linear(wide if ablation.values == "whole" else dim, dim, bias=False)
        self.rotary = Rotary(dim if ablation.folded else self.head_dim)

    def forward(self, x: Tensor, *, mask: Mask) -> Tensor:
        """Return (B, L, dim) for x (B, L, dim)."""
        changed = self.ablation
        q = self._heads(self.q_proj(x))
        k = q if self.k_proj is None else self._heads(self.k_proj(x))
        if changed.folded:
            k = x.unsqueeze(1)  # one for all heads
        q, k = self.rotary.rotate(q), self.rotary.rotate(k).expand(-1, self.num_heads, -1, -1)
        if changed.values == "whole":
            v = x.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        else:
            v = self._heads(x if self.v_proj is None else self.v_proj(x))
        if changed.hide_self:
            mask = mask & ~window(0, 0)
        out = attention(q, k, v, mask=mask, scale=q.shape[-1] ** -changed.power)
        joined: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)


class SelectedAttention(Attention):
    """Each head of each query reads the `top_k` blocks of keys whose mean is most like it, its own block among them.

    The choice follows Lu et al. 2025, "MoBA: Mixture of Block Attention" (arXiv 2502.13189); it has no gradient of its
    own, and no weights.

    Parameters
    ----------
    block : int
        Keys of a block.
    top_k : int
        Blocks that a query reads.
    *given, **more
        As in `qkv.nn.Attention`.
    """

    def __init__(self, *given: Any, block: int, top_k: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self.block, self.top_k = block, top_k

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Any = None, **unused: Any) -> Tensor:
        """Return (B, L, dim) for x (B, L, dim)."""
        assert context is None
        assert not unused
        q, k, v = self.project(x)
        chosen = select_blocks(q, k, self.block, self.top_k, mask=mask)
        joined: Tensor = self.o_proj(attention(q, k, v, mask=chosen).transpose(1, 2).flatten(2))
        return joined


class SdpaAttention(Attention):
    """The same layer with the same weights; queries, keys and values go to PyTorch's kernel."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Any = None, **unused: Any) -> Tensor:
        """Return (B, L, dim) for x (B, L, dim): causal by flag, any other mask as a bool tensor."""
        assert context is None
        assert not unused
        q, k, v = self.project(x)
        options: dict[str, Any] = {"is_causal": True} if mask == causal() else {"attn_mask": self._dense(mask, q)}
        if self.num_kv_heads != self.num_heads:
            options["enable_gqa"] = True
        out = scaled_dot_product_attention(q, k, v, **options)
        joined: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined

    def _dense(self, mask: Mask, q: Tensor) -> Tensor:
        key = (mask, q.shape[2])
        if getattr(self, "_kept", (None, None))[0] != key:  # building it is not what is compared
            self._kept = key, mask.tensor(q.shape[2], q.shape[2])
        return self._kept[1]
