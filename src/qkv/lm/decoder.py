"""A byte-level decoder on qkv's layers: bytes in, the logits of the next byte out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkv.cache import PagedCache, Step
from qkv.cache.latent import PagedLatentCache
from qkv.call.keys import LayerCache
from qkv.errors import ArgumentError, UnsupportedError
from qkv.lm.variants import ABLATIONS, AblatedAttention, SdpaAttention, SelectedAttention
from qkv.masks import Mask, bigbird, causal, sliding_window
from qkv.nn import Attention, LatentAttention
from qkv.nn.layer import Across
from qkv.rotary import Rotary

BYTES = 256
PLAIN = ("mha", "gqa", "mqa", "window")  # qkv.nn.Attention
KINDS = (*PLAIN, "mla")  # what the library has; the rest is for comparison, and takes no cache
SPARSE = ("bigbird", "selected")  # as many keys a query as "window", in blocks of a quarter of it


@dataclass(frozen=True)
class Config:
    """All that a decoder's shapes and arithmetic depend on."""

    attention: str = "mha"
    dim: int = 128
    layers: int = 6
    heads: int = 4
    context: int = 256  # bytes of a training window; rotary positions set no limit of their own
    window: int = 64  # keys a query of attention="window" sees, and those of SPARSE
    tied: bool = False  # the head is the embedding transposed
    op: str = "qkv"  # "sdpa": PyTorch's attention in its place, for comparison

    def __post_init__(self) -> None:
        known, sizes = (*KINDS, *SPARSE, *ABLATIONS), (self.dim, self.layers, self.heads, self.context, self.window)
        if self.attention not in known:
            self._refuse(f"attention is one of {', '.join(known)}", f"attention={self.attention!r}", "Use one of them")
        if self.op not in ("qkv", "sdpa") or (self.op == "sdpa" and self.attention not in PLAIN):
            rule = f"op is 'qkv', or 'sdpa' with {', '.join(PLAIN)}"
            self._refuse(rule, f"op={self.op!r}, attention={self.attention!r}", "Use 'qkv'")
        if not all(isinstance(n, int) and n >= 1 for n in sizes):
            self._refuse("sizes are integers >= 1", f"dim, layers, heads, context, window = {sizes}", "Raise them")
        if self.dim % (4 * self.heads) or (self.attention == "gqa" and self.heads % 2):
            rule = "dim must be a multiple of 4 * heads, and heads even for gqa"
            self._refuse(rule, f"dim={self.dim}, heads={self.heads}", "Use dim=128 and heads=4")

    def _refuse(self, rule: str, given: str, fix: str) -> None:
        raise ArgumentError.of("qkv train", rule, given, fix)

    @property
    def head_dim(self) -> int:
        """Width of a query head."""
        return self.dim // self.heads

    @property
    def mask(self) -> Mask:
        """What a byte may attend to, apart from what "selected" selects."""
        if self.attention == "bigbird":  # two blocks before, one at the front, and of two drawn at random one is before
            blocks = bigbird(self.block, window_blocks=4, global_blocks=1, random_blocks=2)
            return causal() & blocks
        return sliding_window(self.window) if self.attention == "window" else causal()

    @property
    def block(self) -> int:
        """Bytes of a block of SPARSE attention."""
        return max(1, self.window // 4)

    @property
    def caches(self) -> bool:
        """Whether the layers take a cache: those of the library do, what they are compared with does not."""
        return self.attention in KINDS and self.op == "qkv"

    def cached_numbers(self) -> int:
        """Return how many numbers a decoding step must keep of each earlier byte, over all layers."""
        latent = self.head_dim * 3 // 2 + self.head_dim // 2  # the compressed part, and the rotated key
        kept = {"gqa": self.dim, "mqa": 2 * self.head_dim, "mla": latent}
        return self.layers * kept.get(self.attention, 2 * self.dim)


def attention_layer(config: Config) -> nn.Module:
    """Return the attention of one layer, called as layer(x, mask=mask), with x (B, L, dim); cache= if config.caches."""
    if config.attention in ABLATIONS:
        return AblatedAttention(config.dim, config.heads, ABLATIONS[config.attention])
    size = config.head_dim
    if config.attention == "mla":
        # DeepSeek's proportions; the queries are not compressed, as in V2-Lite
        return LatentAttention(
            config.dim,
            config.heads,
            q_lora_rank=None,
            kv_lora_rank=size * 3 // 2,
            qk_nope_head_dim=size,
            qk_rope_head_dim=size // 2,
            v_head_dim=size,
        )
    kv_heads = {"gqa": config.heads // 2, "mqa": 1}.get(config.attention, config.heads)
    if config.attention == "selected":
        return SelectedAttention(config.dim, config.heads, rotary=Rotary(size), block=config.block, top_k=4)
    if config.op == "sdpa":
        return SdpaAttention(config.dim, config.heads, num_kv_heads=kv_heads, rotary=Rotary(size))
    return Attention(config.dim, config.heads, num_kv_heads=kv_heads, rotary=Rotary(size))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), Shazeer 2020, arxiv.org/abs/2002.05202."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 16 * max(1, round(dim / 6))  # two thirds of 4 dim: as many weights as a plain MLP
        self.into = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.into(x).chunk(2, dim=-1)
        out: Tensor = self.down(nn.functional.silu(gate) * up)
        return out


class Block(nn.Module):
    """x + g attention(norm(x)), then x + g mlp(norm(x)); g keeps the sum of all branches at unit size at the start."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gain = (2 * config.layers) ** -0.5
        self.before_attention, self.before_mlp = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = attention_layer(config)
        self.mlp = SwiGLU(config.dim)

    def forward(self, x: Tensor, mask: Mask, cache: LayerCache | None = None, across: Across | None = None) -> Tensor:
        held: dict[str, Any] = {} if cache is None else {"cache": cache}
        if across is not None:
            held["across"] = across
        x = x + self.gain * self.attention(self.before_attention(x), mask=mask, **held)
        out: Tensor = x + self.gain * self.mlp(self.before_mlp(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks, norm, head. Weights are drawn from `seed` alone: N(0, 1/fan_in), norms one."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = None if config.tied else nn.Linear(config.dim, BYTES, bias=False)
        rng = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=rng)

    def cache(self, pages: int, page_size: int = 16, *, storage: torch.dtype | None = None) -> PagedCache:
        """Return a cache on pages for the keys and values of all layers.

        Raises
        ------
        UnsupportedError
            If the layers take none.
        """
        config = self.config
        if not config.caches:
            rule, given = "layers for comparison have no cache", f"attention={config.attention!r}, op={config.op!r}"
            raise UnsupportedError.of("qkv train", rule, given, f"Use op='qkv' and one of {', '.join(KINDS)}")
        weight, attention = self.embedding.weight, self.blocks[0].attention
        made: dict[str, Any] = {"pages": pages, "page_size": page_size, "layers": config.layers, "storage": storage}
        made |= {"dtype": weight.dtype, "device": weight.device}
        if isinstance(attention, LatentAttention):
            return PagedLatentCache(rank=attention.kv_lora_rank, rope_dim=attention.qk_rope_head_dim, **made)
        assert isinstance(attention, Attention)
        window = config.window if config.attention == "window" else None
        return PagedCache(num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim, window=window, **made)

    def forward(self, tokens: Tensor, step: Step | None = None, across: Across | None = None) -> Tensor:
        """Return the logits (B, L, 256) of the byte after each of `tokens`, integers (B, L).

        With a step of this decoder's cache, tokens (n, T) are the next ones of its sequences, ragged (1, sum T); what
        the cache holds of these sequences comes before them. With `across`, a `qkv.distributed.Context`, they are this
        rank's of sequences that several ranks hold together, and so are the logits.
        """
        if across is not None and not self.config.caches:
            rule, given = "layers for comparison take whole sequences", f"attention={self.config.attention!r}"
            fix = f"Use op='qkv' and one of {', '.join(KINDS)}, or no context parallelism"
            raise UnsupportedError.of("qkv train", rule, f"{given}, op={self.config.op!r}", fix)
        x = self.embedding(tokens) * self.config.dim**0.5
        for n, block in enumerate(self.blocks):
            x = block(x, self.config.mask, None if step is None else step.layer(n), across)
        x = self.norm(x)
        if self.head is None:  # scaled: x still points to its own byte's embedding, and would begin by repeating it
            return nn.functional.linear(x * self.config.dim**-0.5, self.embedding.weight)
        logits: Tensor = self.head(x)
        return logits
