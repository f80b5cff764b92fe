"""The memory of this process: its peak during a call, and how much more it may take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc/self")


def available() -> int:
    """Bytes that a process may still take: what the system and this group of processes have free; 2 GiB if unknown."""
    found = []
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(text.partition("MemAvailable:")[2].split()[0]) << 10)
    except (OSError, ValueError, IndexError):
        found.append(2 << 30)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found))


def reset() -> int:
    """Let the peak begin anew; returns what is resident now."""
    with suppress(OSError):  # elsewhere the peak is that of the whole run
        (_PROC / "clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A size of this process in bytes; 0 where the system does not say."""
    try:
        text = (_PROC / "status").read_text(encoding="utf-8")
        return int(text.partition(f"{name}:")[2].split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return 0
