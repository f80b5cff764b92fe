"""Attention layers for tests: float64, every parameter random, in every configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.nn import Attention
from qkv.rotary import Rotary

# Every comparison in float64: a few hundred roundings of 2.2e-16 on numbers of this size, with room.
CLOSE = 1e-12
LAYERS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA": {"num_kv_heads": 2},
    "MQA": {"num_kv_heads": 1},
    "sizes": {"num_kv_heads": 2, "head_dim": 6, "value_dim": 5},
    # A key's bias alone adds the same to all scores of a query, so its gradient is 0: rotary tells them apart.
    "bias": {"bias": True, "rotary": Rotary(8, 50.0)},
    "out_bias": {"bias": True, "out_bias": False, "rotary": Rotary(8, 50.0)},
    "only out_bias": {"out_bias": True},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 2},
    "rotary": {"rotary": Rotary(8, 50.0)},
    "interleaved": {"rotary": Rotary(8, 50.0, interleaved=True), "num_kv_heads": 2},
    "partial": {"rotary": Rotary(4, 50.0), "qk_norm": True},
    "gate": {"gate": True, "num_kv_heads": 2, "value_dim": 3},
    "headwise": {"gate": "headwise", "bias": True, "qk_norm": True},
    "sinks": {"sinks": True, "num_kv_heads": 1},
    "scores": {"softcap": 3.0, "scale": 0.7},
    "all": {
        "num_kv_heads": 2, "head_dim": 6, "value_dim": 5, "bias": True, "qk_norm": True, "gate": True, "sinks": True,
        "rotary": Rotary(4, 50.0, interleaved=True), "softcap": 5.0, "scale": 0.9,
    },
}  # fmt: skip


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(*args: Any, seed: int = 0, **options: Any) -> Attention:
    """A float64 layer whose scores have a standard deviation of 4 and whose every parameter is random."""
    layer = Attention(*args, **{"dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            gain = 2.0 if name in ("q_proj.weight", "k_proj.weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size * gain)
    return layer


def close(got: Tensor, want: Tensor, tolerance: float = CLOSE) -> None:
    worst = (got - want).abs().max().item() if got.numel() else 0.0
    assert got.shape == want.shape
    assert worst <= tolerance * (1 + want.abs().max().item()), f"off by {worst}"


def turn(x: Tensor, rotary: Rotary, p: Any) -> Tensor:
    """x (L, D): pairs as complex numbers times exp(i p theta)."""
    theta = [float(rotary.base) ** (-2 * i / rotary.dim) for i in range(rotary.dim // 2)]
    columns = list(x.unbind(-1))
    for i, t in enumerate(theta):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + len(theta))
        angle = torch.tensor([float(n) * t for n in p], dtype=torch.float64)
        z = torch.complex(columns[a], columns[b]) * torch.polar(torch.ones_like(angle), angle)
        columns[a], columns[b] = z.real, z.imag
    return torch.stack(columns, dim=-1)
