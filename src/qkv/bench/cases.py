"""What the benchmark measures: calls of attention, their inputs, and the float64 answer on sampled rows.

Nothing here uses the library: visibility is written out again as plain key ranges, so that a wrong mask cannot agree
with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qkv.bench.gradients import Gradients, expect

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
    avx2: tuple[Target, ...] | None = None  # targets when everybody is held to AVX2; None: not a row of that mode


@dataclass
class Inputs:
    """Tensors of a case. All sets of K and V hold the same keys in another order, so every set has the same answer."""

    case: Case
    q: Tensor
    sets: list[tuple[Tensor, Tensor]]
    samples: list[tuple[int, int, int]]
    expected: Tensor = field(repr=False)
    d_out: Tensor | None = field(default=None, repr=False)  # the output's gradient, where the case has a backward
    gradients: Gradients | None = field(default=None, repr=False)

    def to(self, dtype: str) -> Inputs:
        """The same numbers in another type (for peers without ours)."""
        if dtype == self.case.dtype:
            return self
        case, kind = replace(self.case, dtype=dtype), DTYPES[dtype]
        sets = []
        for k, v in self.sets:
            k2 = k.to(kind)
            sets.append((k2, k2[..., : case.rank] if case.rank else v.to(kind)))
        d_out = None if self.d_out is None else self.d_out.to(kind)
        return Inputs(case, self.q.to(kind), sets, self.samples, self.expected, d_out, self.gradients)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as tensors that take gradients, in the same memory."""
        q, k, v = (t.detach().requires_grad_() for t in (self.q, *self.sets[0]))
        return q, k, v

    def errors(self, result: Any) -> dict[str, float]:
        """Worst relative error of the sampled rows of "out", and of "dq", "dk" and "dv" where the case has them."""
        if self.gradients is None:
            return {"out": self._error_of_out(result)}
        out, *gradients = result
        return {"out": self._error_of_out(out), **self.gradients.errors(gradients)}

    def error(self, result: Any) -> float:
        """The largest of `errors`; infinite where a shape or a value is not sane."""
        return max(self.errors(result).values())

    def _error_of_out(self, out: Tensor) -> float:
        case = self.case
        if tuple(out.shape) != (case.B, case.Hq, case.Lq, case.Dv):
            return math.inf
        rows = torch.stack([out[s].detach().to(torch.float64) for s in self.samples])
        worst = ((rows - self.expected).norm(dim=1) / self.expected.norm(dim=1)).max().item()
        return worst if math.isfinite(worst) else math.inf


def build(case: Case, sets: int = 1, seed: int = 0) -> Inputs:
    """Inputs with logits of standard deviation 4, needles at the edge of what sampled rows see, magnets beyond it."""
    g = torch.Generator().manual_seed(seed)
    kind = case.torch_dtype
    q = (4.0 * torch.randn(case.B, case.Hq, case.Lq, case.D, generator=g)).to(kind)
    k = torch.randn(case.B, case.Hkv, case.Lk, case.D, generator=g).to(kind)
    samples = _sample_rows(case, g)
    _plant(case, q, k, samples)
    v = k[..., : case.rank] if case.rank else torch.randn(case.B, case.Hkv, case.Lk, case.Dv, generator=g).to(kind)
    pairs = [(k, v)]
    for n in range(1, sets):
        k2 = k.roll(n * 97, dims=2)
        pairs.append((k2, k2[..., : case.rank] if case.rank else v.roll(n * 97, dims=2)))
    inputs = Inputs(case, q, pairs, samples, _expected(case, q, k, v, samples))
    if case.backward:
        inputs.d_out = torch.randn(case.B, case.Hq, case.Lq, case.Dv, generator=g).to(kind)
        inputs.gradients = expect(case, (q, k, v, inputs.d_out), samples, seed)
    return inputs


def _sample_rows(case: Case, g: torch.Generator, count: int = 8) -> list[tuple[int, int, int]]:
    picks = {(0, 0, 0), (case.B - 1, case.Hq - 1, case.Lq - 1)}
    for _ in range(count - 2):
        b, h, i = (int(torch.randint(n, (), generator=g)) for n in (case.B, case.Hq, case.Lq))
        picks.add((b, h, i))
    return sorted(picks)


def _plant(case: Case, q: Tensor, k: Tensor, samples: list[tuple[int, int, int]]) -> None:
    """A key of score ~14 at the first or last visible place, of ~20 at the nearest hidden ones; one row a K head."""
    done: set[tuple[int, int]] = set()
    for n, (b, h, i) in enumerate(samples):
        head = (b, h // (case.Hq // case.Hkv))
        if head in done:
            continue
        done.add(head)
        lo, hi = case.visible(i)
        row = q[b, h, i].float()
        unit = row / (case.scale * row.square().sum()).clamp(min=1e-6)
        k[head[0], head[1], lo if n % 2 else hi - 1] = (14.0 * unit).to(k.dtype)
        for j in (lo - 1, hi):
            if 0 <= j < case.Lk:
                k[head[0], head[1], j] = (20.0 * unit).to(k.dtype)


def _expected(case: Case, q: Tensor, k: Tensor, v: Tensor, samples: list[tuple[int, int, int]]) -> Tensor:
    rows = []
    for b, h, i in samples:
        head = h // (case.Hq // case.Hkv)
        lo, hi = case.visible(i)
        scores = k[b, head, lo:hi].double() @ q[b, h, i].double() * case.scale
        weights = (scores - scores.max()).exp()
        rows.append((weights / weights.sum()) @ v[b, head, lo:hi].double())
    return torch.stack(rows)
