"""What the benchmark measures: a case is a call of attention; a row is a case, its peers and its targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Largest relative error (2-norm of a row) at which a contender still counts as computing attention in this type.
TOLERANCE = {"f64": 1e-9, "f32": 1e-3, "bf16": 4e-2, "f16": 1e-2}
_MOST_COLD_BYTES = 2 << 30
BEST, BEST_BUT_GGML, LIMIT = (
    "best",
    "best but ggml",
    "limit",
)  # opponents of a target that are known only once all are timed


@dataclass(frozen=True)
class Case:
    """One call of attention. `mask` is full, causal, window or documents (of `size` tokens)."""

    dtype: str
    Lq: int
    Lk: int
    D: int = 128
    B: int = 1
    Hq: int = 8
    Hkv: int = 8
    mask: str = "full"
    size: int = 0
    rank: int = 0  # > 0: v is the view k[..., :rank] (MLA's absorbed decode)
    cold: bool = False
    backward: bool = False  # the call is forward + backward, its results out, dq, dk, dv

    @property
    def Dv(self) -> int:
        return self.rank or self.D

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.D)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def visible(self, i: int) -> tuple[int, int]:
        """The keys lo <= j < hi that query i sees."""
        if self.mask == "causal":
            return 0, min(i + 1, self.Lk)
        if self.mask == "window":
            return max(0, i + 1 - self.size), min(i + 1, self.Lk)
        if self.mask == "documents":
            lo = i // self.size * self.size
            return lo, min(lo + self.size, self.Lk)
        return 0, self.Lk

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        return sum(hi - lo for lo, hi in map(self.visible, range(self.Lq)))

    @property
    def flops(self) -> int:
        """Two for each useful multiply-add, of scores and weighted values alike; backward adds 2.5 times that."""
        forward = 2 * self.B * self.Hq * self.pairs * (self.D + self.Dv)
        return forward * 7 // 2 if self.backward else forward

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call must read (once)."""
        width = self.D if self.rank else self.D + self.Dv
        return self.B * self.Hkv * self.Lk * width * self.torch_dtype.itemsize

    def dense_mask(self) -> Tensor | None:
        """The (Lq, Lk) boolean mask, for peers that know no other form."""
        if self.mask == "full":
            return None
        i, j = torch.arange(self.Lq)[:, None], torch.arange(self.Lk)[None, :]
        if self.mask == "documents":
            return i // self.size == j // self.size
        return (j <= i) & (j > i - self.size) if self.mask == "window" else j <= i

    def cold_sets(self, cache_bytes: int) -> int:
        """How many distinct sets of K and V cover four times the last-level cache."""
        wanted = math.ceil(4 * cache_bytes / self.kv_bytes)
        return max(1, min(wanted, _MOST_COLD_BYTES // self.kv_bytes))


@dataclass(frozen=True)
class Target:
    """`needed`: how many times as long as ours the opponent's call must take (for LIMIT: the fraction of it)."""

    against: str
    needed: float
    slack_us: float = 0.0  # calls under 10 microseconds may be this much slower instead


@dataclass(frozen=True)
class Row:
    name: str
    case: Case
    peers: tuple[str, ...]  # "sdpa", or "ggml f16" where the peer takes another type than the row's
    targets: tuple[Target, ...] = ()
    own: dict[str, Case] = field(default_factory=dict, hash=False)  # other calls of ours to compare with
    limit: str = ""  # "gemm", "read" or nothing
    quick: bool = False
    held: tuple[Target, ...] = ()  # targets when everybody is held to isas.SHARED
