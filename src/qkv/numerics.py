"""Small numerical pieces that masks and the PyTorch backends share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def no_autocast(device: str) -> AbstractContextManager[None]:
    """Autocast would run our float32 products in a half type: the accumulation type is ours to choose."""
    return torch.autocast(device_type=device, enabled=False)


def steady_matmul(a: Tensor, b: Tensor, *, a_t: bool = False, b_t: bool = False) -> Tensor:
    """a @ b, or with the transposes of dense batches of matrices, in bits that no number of threads changes on a CPU.

    MKL splits a single product over threads, with other roundings, when there are fewer matrices than threads, and
    takes another path for one matrix. Repeating the batch keeps each product on one thread and costs no time: the
    threads that compute the copies would have been idle. A transposed operand stays a view: a copied one rounds
    differently.
    """
    lead = a.shape[:-2]
    count = lead.numel()
    wanted = max(2, torch.get_num_threads()) if a.device.type == "cpu" else 0
    if 0 < count < wanted:
        times = -(-wanted // count)
        a, b = (x.flatten(0, -3).repeat(times, 1, 1) for x in (a, b))
    product = (a.transpose(-1, -2) if a_t else a) @ (b.transpose(-1, -2) if b_t else b)
    return product[:count].view(*lead, *product.shape[-2:]) if 0 < count < wanted else product


class _Finite(torch.autograd.Function):
    """Zeros for NaN and inf, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.where(torch.isfinite(x), x, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


def finite(x: Tensor) -> Tensor:
    """x with zeros for NaN and inf; the gradient passes as if they were not replaced."""
    zeros: Tensor = _Finite.apply(x)
    return zeros


class _Softcap(torch.autograd.Function):
    """c * tanh(x / c), with a derivative that keeps its relative precision where the cap saturates."""

    @staticmethod
    def forward(ctx, x: Tensor, c: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.c = c
        return c * torch.tanh(x / c)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad * softcap_slope(x, ctx.c), None


def softcap(x: Tensor, c: float) -> Tensor:
    """c * tanh(x / c)."""
    capped: Tensor = _Softcap.apply(x, c)
    return capped


def softcap_slope(x: Tensor, c: float) -> Tensor:
    """The derivative of softcap at x: 1 / cosh(x / c)^2, where 1 - tanh^2 would cancel to noise beyond |x| = 4c."""
    e = torch.exp(-2.0 / c * x.abs())
    return 4.0 * e / (1.0 + e) ** 2


def scrambled(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors; products wrap, right shifts are made logical."""
    x = (x ^ shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if unsigned."""
    found: Tensor = (x >> bits) & ((1 << (64 - bits)) - 1)
    return found


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15


def dropout_keep(seed: int, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which weights survive dropout: a pure function of (seed, b, h, i, j), so any tiling draws the same mask.

    b, h, i, j are int64 tensors that broadcast (query head h, query index i, key index j).
    """
    x = torch.full((), seed, dtype=torch.int64, device=j.device)
    for index in (b, h, i, j):
        x = scrambled(x + (index + 1) * _GOLDEN)
    return shifted(x, 11) >= round(dropout_p * 2**53)
