"""One module for each question of `qkv.why`; each has `run(seed) -> Answer`."""

from __future__ import annotations
