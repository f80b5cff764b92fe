"""What machine this is, as far as results depend on it: processor, instruction sets, caches. No host name, no paths."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_CACHES = Path("/sys/devices/system/cpu")
_DEFAULT_CACHE = 32 << 20
_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def cpu_name(cpuinfo: str | None = None) -> str:
    """The processor's name as the system reports it."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """Those that matter to attention, widest first."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
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
