"""What machine this is, as far as results depend on it: processor, instruction sets, caches. No host name, no paths."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qkv.backends import chip
from qkv.backends.chip import cpu_name

_CACHES = Path("/sys/devices/system/cpu")
_DEFAULT_CACHE = 32 << 20
_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def instruction_sets(text: str | None = None) -> list[str]:
    """Those that matter to attention, widest first."""
    text = chip.cpuinfo() if text is None else text
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [flag for flag in _FLAGS if flag in present]


def last_level_cache(root: Path = _CACHES) -> int:
    """Bytes of last-level cache of all the processors this process may run on; 32 MB where the system does not say."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        allowed = set(range(os.cpu_count() or 1))
    instances: dict[tuple[int, str], int] = {}
    for cpu in sorted(allowed):
        for index in sorted((root / f"cpu{cpu}" / "cache").glob("index*")):
            try:
                if (index / "type").read_text().strip() == "Instruction":
                    continue
                level = int((index / "level").read_text())
                shared = (index / "shared_cpu_list").read_text().strip()
                instances[(level, shared)] = _size((index / "size").read_text().strip())
            except (OSError, ValueError):
                continue
    if not instances:
        return _DEFAULT_CACHE
    last = max(level for level, _ in instances)
    return sum(size for (level, _), size in instances.items() if level == last)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """PyTorch with so many threads for a while, None for as many as it has; gives their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


_PROBE = 256  # rows and columns of the matrices: 0.1 s where a half type has no product of its own, else far less


@cache
def product_type(dtype: torch.dtype, rows: int = _PROBE) -> torch.dtype:
    """The type whose matrix product is the limit of a call in `dtype`: float32 where that is much faster.

    Products of float16 are slower than those of float32 on most processors. Those of bfloat16 are faster with AVX-512,
    but with AVX2 `torch.mm` of it is a plain loop at a fraction of one GFLOP/s: not what the machine can do.
    """
    if dtype == torch.float16:
        return torch.float32
    if dtype != torch.bfloat16:
        return dtype
    slow = product_seconds(dtype, rows) > 3 * product_seconds(torch.float32, rows)
    return torch.float32 if slow else dtype


def product_seconds(dtype: torch.dtype, rows: int) -> float:
    """Seconds of a small product in one thread, the least of a few."""
    a, b = torch.ones(rows, _PROBE, dtype=dtype), torch.ones(_PROBE, _PROBE, dtype=dtype)
    taken = []
    with threads(1):  # threads that are not there, since others have them, would slow the faster type alone
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            taken.append(time.perf_counter() - start)
    return min(taken[1:])


def describe(threads: int, cache_bytes: int) -> dict[str, Any]:
    """The machine's entry in the JSON report."""
    return {
        "cpu": cpu_name(),
        "instruction_sets": instruction_sets(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "last_level_cache_bytes": cache_bytes,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }
