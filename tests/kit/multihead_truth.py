"""torch.nn.MultiheadAttention beside ours: two layers with the same parameters, their inputs, and the comparison."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qkv.nn.multihead import MultiheadAttention

N, H, L, S, E = 3, 4, 5, 6, 16
EXACT = 1e-12  # float64 sums of at most 100 terms of size below 10, in two orders
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 10, "vdim": 12, "batch_first": True},
    "other widths, both keys, no bias": {"kdim": 10, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = ["none", "pad", "pad float", "2d", "2d float", "3d", "3d float", "pad and 2d", "pad and 3d float"]


def pair(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """PyTorch's layer and ours with the same parameters, biases included."""
    theirs = torch.nn.MultiheadAttention(E, H, dtype=dtype, **kwargs)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (E**0.25 if p.dim() == 2 else 1.0))
    ours = MultiheadAttention(E, H, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(layer: Any, seed: int = 1, batch: int | None = N, lengths: tuple[int, int] = (L, S)) -> list[Tensor]:
    """query, key and value for the layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((lengths[0], layer.embed_dim), (lengths[1], layer.kdim), (lengths[1], layer.vdim))
    dtype = layer.out_proj.weight.dtype
    made = []
    for length, width in sizes:
        shape = (
            (length, width)
            if batch is None
            else (batch, length, width)
            if layer.batch_first
            else (length, batch, width)
        )
        made.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    return made


def masks(kind: str, batch: int | None = N, dtype: torch.dtype = torch.float64, seed: int = 2) -> dict[str, Tensor]:
    """The arguments of a call; no row is hidden throughout, because there PyTorch has no answer."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 1] = False
        if "float" not in kind:
            return hidden
        return torch.randn(shape, generator=generator).masked_fill(hidden, -math.inf).to(dtype)

    found = {}
    if "pad" in kind:
        found["key_padding_mask"] = one((S,) if batch is None else (N, S))
    if "2d" in kind:
        found["attn_mask"] = one((L, S))
    if "3d" in kind:
        found["attn_mask"] = one(((batch or 1) * H, L, S))
    return found


def same(a: Tensor, b: Tensor, note: str, atol: float = EXACT) -> None:
    assert a.shape == b.shape, note
    a, b = a.detach(), b.detach()
    wrong = ~((a - b).abs() <= atol)
    assert not wrong.any(), f"{note}: off by {float((a - b).abs().max())} at {wrong.nonzero()[0].tolist()}"


def compare(theirs: Any, ours: Any, inputs: list[Tensor], note: str, their_kwargs: Any = None, **kwargs: Any) -> None:
    """Outputs, weights, and the gradients of both towards inputs, float masks and parameters."""
    found = []
    for layer, given in ((theirs, kwargs if their_kwargs is None else their_kwargs), (ours, kwargs)):
        distinct = {id(x): x.clone().requires_grad_() for x in inputs}
        added = {
            n: x.clone().requires_grad_() for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        out, p = layer(*(distinct[id(x)] for x in inputs), **(given | added))
        generator = torch.Generator().manual_seed(3)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        if p is not None:
            loss = loss + (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum()
        leaves = {f"input {i}": x for i, x in enumerate(distinct.values())}
        leaves |= dict(layer.named_parameters()) | (added if their_kwargs is None else {})
        grads = torch.autograd.grad(loss, list(leaves.values()))
        found.append({"out": out, "p": p} | dict(zip(leaves, grads, strict=True)))
    for name, a in found[0].items():
        b = found[1][name]
        assert (a is None) == (b is None), f"{note}: {name}"
        if a is not None:
            same(a, b, f"{note}: {name}", 100 * EXACT if name != "out" else EXACT)  # gradients are 100 times larger
