"""The installed program: `qkv demo`, `qkv why`, `qkv mask`, `qkv doctor` and `qkv bench`."""

from __future__ import annotations
