"""Two network namespaces joined by a cable (veth): as near as one machine comes to two. Root and iproute2 make them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = tuple(f"qkv-{os.getpid()}-{side}" for side in "ab")
CABLES = ("qkv0", "qkv1")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextmanager
def joined() -> Iterator[list[list[str]] | None]:
    """For each namespace the words that run a command inside of it; None where none can be made."""
    try:
        yield _made()
    finally:
        for name in NAMES:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)


def _made() -> list[list[str]] | None:
    if shutil.which("ip") is None:
        return None
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("-n", NAMES[0], "link", "add", CABLES[0], "type", "veth", "peer", "name", CABLES[1], "netns", NAMES[1])
        for n, (name, cable) in enumerate(zip(NAMES, CABLES, strict=True), 1):
            _ip("-n", name, "addr", "add", f"10.77.77.{n}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except (subprocess.SubprocessError, OSError):
        return None
    return [["ip", "netns", "exec", name] for name in NAMES]
