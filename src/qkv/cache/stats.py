"""The figures of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkv.checks import short


@dataclass(frozen=True)
class Stats:
    """What a cache holds, and what of it is used; `print(stats)` shows a table.

    Parameters
    ----------
    cache : str
        The class.
    pages, page_size : int
        Of the pool, and tokens of a page.
    pages_used, pages_shared, pages_cached, pages_free : int
        Pages in sequences, in two or more of them, in none but kept for a prefix to come, and free.
    sequences : int
        Those that are swapped out among them.
    tokens, waste_tokens : int
        Slots of the pages in use, a shared page counted once: those that hold a token and those that do not, so
        pages_used * page_size = tokens + waste_tokens.
    waste_bytes : int
    hits, lookups : int
        Pages that were shared, and asked for, by `add`.
    bytes, bytes_per_token : int
        Of all tensors; of a token in all layers, its scales among them.
    dtype, storage : torch.dtype
        Of given keys; of what is stored, read off the tensors.
    """

    cache: str
    pages: int
    page_size: int
    pages_used: int
    pages_shared: int
    pages_cached: int
    pages_free: int
    sequences: int
    tokens: int
    waste_tokens: int
    waste_bytes: int
    hits: int
    lookups: int
    bytes: int
    bytes_per_token: int
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
