"""Memory for the pools of a cache."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes; below, ordinary memory
_ALIGNED = 2 << 20


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; a large one on the CPU asks Linux for pages of 2 MB.

    Sequences lie on a pool's pages in any order. On memory pages of 4 KB each of them is then looked up anew, which was
    measured to cost up to a fifth of a decoding step.
    """
    nbytes = math.prod(size) * dtype.itemsize
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or nbytes < _LARGE or huge is None:
        return torch.zeros(size, dtype=dtype, device=device)
    try:
        # Private, unlike mmap's default: a forked child must not write into its parent's cache.
        memory = mmap.mmap(-1, nbytes + _ALIGNED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(f"no memory of {nbytes:,} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(huge)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _ALIGNED
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=first).view(dtype).view(size)
