"""Models that are watched in the tests: each way of this library and of PyTorch to come to attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import qkv

SDPA = torch.nn.functional.scaled_dot_product_attention


class Bound(nn.Module):
    """A layer that calls PyTorch's function by a name bound at import."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.into, self.options = nn.Linear(16, 48), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Bound(is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return found


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Weighed(nn.Module):
    """PyTorch's layer asked for its weights, which it then computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        gone = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        found: Tensor = self.attention(x, x, x, attn_mask=gone)[0]
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qkv.nn.Attention": lambda: qkv.nn.Attention(16, 4, num_kv_heads=2, mask=qkv.causal(), sinks=True, dropout_p=0.2),
    "qkv.nn.MultiheadAttention": lambda: _Self(qkv.nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True)),
    "a bound name": lambda: Bound(is_causal=True),
    "dropout": lambda: Bound(dropout_p=0.3),
    "checkpointed": Checkpointed,
    "TransformerEncoder": lambda: encoder(dropout=0.1),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    "norm first": lambda: encoder(norm_first=True),
    "weights asked for": Weighed,
    "TransformerDecoderLayer": lambda: _Cross(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)),
}


class _Self(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return found


class _Cross(_Self):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, x[:, :7])
        return found


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradients and weights of three steps, and what the generator gives next."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), []
    torch.manual_seed(5)
    for _ in range(3):
        out = model(x)
        optimizer.zero_grad()
        out.square().sum().backward()
        found += [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *(p.detach().clone() for p in model.parameters()), torch.rand(4)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    assert all(t.isfinite().all() for t in one)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Call(nn.Module):
    """One call of qkv.attention with these arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = qkv.attention(q, k, v, **self.options)
        return found
