"""Whether two results are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def exact(x: torch.Tensor) -> bytes:
    """The bytes of the values: different for 0 and -0, and for two NaN that are not made alike."""
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits(x: torch.Tensor) -> bytes:
    """The bytes of the values: one NaN is as good as another, 0 is not -0."""
    return exact(x.detach().masked_fill(x.detach().isnan(), torch.nan))


def differ(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the results that are not the same."""
    return [name for name in one if bits(one[name]) != bits(two[name])]
