"""The figures of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkv.checks import short


@dataclass(frozen=True)
class Stats:
    """What a cache holds, and what of it is used; `print(stats)` shows a table.

    `tokens` and `waste_tokens` are slots of the pages in use, a shared page counted once: those that hold a token and
    those that do not, so pages_used * page_size = tokens + waste_tokens. `dtype` is that of given keys; `storage` is
    read off the tensors.
    """

    cache: str
    pages: int
    page_size: int
    pages_used: int  # by sequences
    pages_shared: int  # by two sequences or more
    pages_cached: int  # by none, kept for a prefix to come
    pages_free: int
    sequences: int  # swapped out ones among them
    tokens: int
    waste_tokens: int
    waste_bytes: int
    hits: int  # pages
    lookups: int  # pages
    bytes: int  # of all tensors
    bytes_per_token: int  # in all layers, scales among them
    dtype: torch.dtype
    storage: torch.dtype

    @property
    def hit_rate(self) -> float:
        """hits / lookups, 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0

    def __str__(self) -> str:
        def share(part: int) -> str:
            return f"{part:>10,}  {part / self.pages:6.1%}" if self.pages else f"{part:>10,}"

        stored, given = short(self.storage), short(self.dtype)
        slots = self.tokens + self.waste_tokens
        rows = [
            ("pages", f"{self.pages:>10,}  of {self.page_size} tokens"),
            ("  used", share(self.pages_used) + f"  {self.pages_shared:,} of them shared"),
            ("  cached", share(self.pages_cached) + "  for prefixes to come"),
            ("  free", share(self.pages_free)),
            ("sequences", f"{self.sequences:>10,}"),
            ("tokens", f"{self.tokens:>10,}"),
            ("waste", f"{self.waste_tokens:>10,}  {self.waste_tokens / slots if slots else 0:6.1%}"
                      f"  of used slots, {_bytes(self.waste_bytes)}"),
            ("prefix hits", f"{self.hits:>10,}  {self.hit_rate:6.1%}  of {self.lookups:,} pages looked up"),
            ("memory", f"{_bytes(self.bytes):>10}  {self.bytes_per_token:,} bytes a token"),
            ("stored as", f"{stored:>10}" + (f"  for {given}" if stored != given else "")),
        ]  # fmt: skip
        return "\n".join([self.cache, *(f"  {name:<12}{text}" for name, text in rows)])


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
