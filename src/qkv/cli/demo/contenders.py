"""What `qkv demo --long` times: one sparse call by qkv, and by PyTorch with and without its mask as a tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qkv.functional import attention
from qkv.masks import causal, prefix, sliding_window

SINKS, WINDOW = 4, 4096
MASK = causal() & (prefix(SINKS) | sliding_window(WINDOW))
HEADS, SIZE, DTYPE = 2, 64, torch.bfloat16
CHUNK = 1 << 15  # queries of a step of the bar
SAMPLE = 12  # rows that are checked against float64


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1, HEADS, tokens, SIZE), the same ones each time."""
    rng = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, HEADS, tokens, SIZE, generator=rng, dtype=torch.float32, device="cpu").to(DTYPE) for _ in "qkv"
    )


def ours(q: Tensor, k: Tensor, v: Tensor, tell: Callable[[int], None]) -> Callable[[], Tensor]:
    """The call, CHUNK queries at a time, for a bar that moves."""

    def call() -> Tensor:
        out = torch.empty_like(q)
        for begin in range(0, q.shape[2], CHUNK):
            end = min(begin + CHUNK, q.shape[2])
            out[:, :, begin:end] = attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], MASK, positions=begin)
            tell(end)
        return out

    return call


def theirs(q: Tensor, k: Tensor, v: Tensor, tell: Callable[[int], None]) -> Callable[[], Tensor]:
    """PyTorch's attention with the mask that it needs, one bool for each pair; making it is not timed."""
    L = q.shape[2]
    mask = torch.empty((L, L), dtype=torch.bool, device="cpu")
    for begin in range(0, L, 256):
        end = min(begin + 256, L)
        mask[begin:end] = MASK.tensor(end - begin, L, positions=begin)[0, 0]
    return partial(scaled_dot_product_attention, q, k, v, attn_mask=mask)


def full(q: Tensor, k: Tensor, v: Tensor, tell: Callable[[int], None]) -> Callable[[], Tensor]:
    """PyTorch's causal attention over all keys, for which it needs no tensor."""
    return partial(scaled_dot_product_attention, q, k, v, is_causal=True)


def sampled(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[float, float]:
    """The largest error of some rows against float64 by the formula, and the largest number of these rows."""
    L, worst, largest = q.shape[2], 0.0, 0.0
    rows = torch.randint(0, L, (SAMPLE,), generator=torch.Generator().manual_seed(L), device="cpu").tolist()
    for p in {0, SINKS, L - 1, *rows}:
        begin = max(0, p - WINDOW + 1)
        seen = [*range(min(SINKS, begin)), *range(begin, p + 1)]
        keys, values = k[0, :, seen].double(), v[0, :, seen].double()
        scores = (keys @ q[0, :, p].double()[:, :, None])[..., 0] / SIZE**0.5
        exact = (scores.softmax(-1)[:, None] @ values)[:, 0]
        worst = max(worst, float((out[0, :, p].double() - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return worst, largest
