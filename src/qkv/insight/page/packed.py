"""Numbers in few letters: arrays as base64, little-endian, as `unpack` of page.js reads them."""

from __future__ import annotations

import base64
import ctypes
import sys

import torch
from torch import Tensor

SHIFT = 1024.0
"""Weights are stored as halves of this multiple: 6e-8 is still a normal number then."""


def packed(values: Tensor, dtype: torch.dtype) -> str:
    """The numbers of a tensor in a dtype, row by row.

    >>> packed(torch.tensor([1.0, 2.0]), torch.float16)
    'ADwAQA=='
    """
    stored = values.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if stored.numel() == 0:
        return ""
    raw = bytearray(ctypes.string_at(stored.data_ptr(), stored.numel() * stored.element_size()))
    if sys.byteorder == "big" and dtype.itemsize > 1:
        for at in range(0, len(raw), dtype.itemsize):
            raw[at : at + dtype.itemsize] = raw[at : at + dtype.itemsize][::-1]
    return base64.b64encode(raw).decode()


def halves(weights: Tensor) -> str:
    """Weights to three digits."""
    return packed((weights.double() * SHIFT).clamp(max=65504), torch.float16)


def codes(weights: Tensor) -> str:
    """Weights in one byte, to 3 %: 0 is below 1e-6, and 1 .. 255 are equal steps of the logarithm from there to 1."""
    return packed(_codes(weights), torch.uint8)


def _codes(weights: Tensor) -> Tensor:
    logs = torch.log10(weights.double().clamp(min=1e-12))
    return torch.nan_to_num(torch.where(weights > 1e-6, (1 + (logs + 6) / 6 * 254).round().clamp(1, 255), 0.0))


def as_stored(weights: Tensor, kind: str) -> Tensor:
    """The weights that a reader of `halves` ("f16") or `codes` ("u8") finds."""
    if kind == "f16":
        return (weights.double() * SHIFT).clamp(max=65504).half().double() / SHIFT
    code = _codes(weights)
    return torch.where(code > 0, 10 ** ((code - 1) / 254 * 6 - 6), 0.0)


def edges(length: int, bins: int) -> list[int]:
    """Where the bins of `length` things begin, and the end of the last: thing i is in bin i * bins // length."""
    return [-(-r * length // bins) for r in range(bins + 1)] if bins else [0]
