"""The processor's name, as its system reports it."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path


def cpuinfo() -> str:
    """What Linux says of its processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name(text: str | None = None) -> str:
    """The name in `text`, as of /proc/cpuinfo; None: of this processor."""
    text = cpuinfo() if text is None else text
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    if found:
        return found.group(1).strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        if name := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return name
    return platform.processor() or platform.machine()
