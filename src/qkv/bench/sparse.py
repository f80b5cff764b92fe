"""`qkv bench --sparse`: whether a mask's time follows what it shows.

Contenders take turns in one process: our attention of the same tensors without a mask, with it, with the least mask of
whole tiles that covers it (where keys lie scattered), and compiled FlexAttention with the same rule; of gradients, the
backward pass without a mask and with it. Rows are checked against the definition in float64 first. What a pattern shows
is written out here once more, as a rule of two positions, so that a wrong mask cannot agree with itself. The rows of
decode with selected blocks are those of `selection`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.bench import selection, turns
from qkv.bench.cases import DTYPES, TOLERANCE
from qkv.bench.patterns import PATTERNS, Pattern, Rule
from qkv.bench.peers.base import first_line
from qkv.bench.turns import Quartiles, Terms

LENGTH, HEADS = 8192, 8
SLOPE, OFFSET = 1.25, 0.005
"""A mask may take SLOPE times its share of the pairs, and OFFSET, of the time without a mask."""
FLEX = {"bf16": 3.0, "f32": 2.5}
"""How many times as long as ours compiled FlexAttention has to take."""
SCATTERED, BACKWARD = 4.0, 0.8
"""How much faster than its covering tiles a scattered pattern is, and of forward's efficiency backward's."""
_SAMPLE = 24  # rows of a head that are checked
_SEED = 20260714


@dataclass(frozen=True)
class Call:
    """Self-attention of one sequence under a pattern; `backward`: its gradients instead."""

    pattern: Pattern
    dtype: str
    dim: int
    backward: bool = False
    heads: int = HEADS
    length: int = LENGTH

    @property
    def name(self) -> str:
        return f"{self.pattern.name} {self.heads}×{self.length} d{self.dim} {self.dtype}" + " backward" * self.backward

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of out."""
        g = torch.Generator().manual_seed(_SEED + self.dim)
        kind = DTYPES[self.dtype]
        return [torch.randn(1, self.heads, self.length, self.dim, generator=g).to(kind) for _ in range(4)]

    def compare(self, terms: Terms) -> list[Measured]:
        """Check the call, then time the contenders in turn."""
        return [compare(self, terms)]


def calls(*, quick: bool = False) -> Iterator[turns.Call]:
    """Every pattern in both types and widths, forward and backward, and steps of decode with selected blocks.

    Quick: one type and width, forward, and one step at a shorter length.
    """
    for dtype in ("bf16",) if quick else ("bf16", "f32"):
        for dim in (128,) if quick else (64, 128):
            for backward in (False,) if quick else (False, True):
                for pattern in PATTERNS:
                    yield Call(pattern, dtype, dim, backward)
    yield from selection.steps(quick=quick)


@dataclass(frozen=True)
class Measured:
    """One call: medians over rounds, ratios within a round as quartiles."""

    name: str
    share: float  # of the pairs that is visible
    full: float  # milliseconds without a mask
    time: Quartiles  # with it, as a part of that
    needed: float | None  # at most, of forward calls
    cover: Quartiles | None  # times of the covering tiles
    flex: Quartiles | None
    flex_needed: float | None
    efficiency: Quartiles | None  # of backward calls: of forward's efficiency
    error: float  # the worst row, relative
    tolerance: float
    rounds: int
    notes: tuple[str, ...] = field(default=())

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """As `turns.verdict` says."""
        if not self.agrees:
            return "wrong result"
        found = [] if self.needed is None else [turns.at_most(self.needed, self.time)]
        if self.cover is not None:
            found.append((SCATTERED, self.cover))
        if self.flex is not None and self.flex_needed is not None:
            found.append((self.flex_needed, self.flex))
        if self.efficiency is not None:
            found.append((BACKWARD, self.efficiency))
        return turns.verdict(found)

    def __str__(self) -> str:
        text = f"  {self.name:<44} {self.share:6.2%} visible, {self.time[1]:6.2%} of {self.full:7.1f} ms"
        text += "" if self.needed is None else f" (≤ {self.needed:.2%})"
        for what, ratio, least in (
            ("covering tiles", self.cover, SCATTERED),
            ("flex", self.flex, self.flex_needed),
            ("of forward's efficiency", self.efficiency, BACKWARD),
        ):
            text += "" if ratio is None else f"; {what} {ratio[1]:.2f}×" + f" (≥ {least})" * (least is not None)
        return f"{text}{''.join(f'; {note}' for note in self.notes)}  {self.verdict}"


def compare(call: Call, terms: Terms) -> Measured:
    """Check the call, then time the contenders in turn."""
    pattern, L, backend = call.pattern, call.length, terms.backend
    q, k, v, d_out = call.tensors()
    mask, notes = pattern.mask(L), []
    masks: dict[str, qkv.Mask | None] = {"full": None, "sparse": mask}
    if pattern.cover is not None:
        masks["cover"] = pattern.cover(L)
    error = _error(call, mask, backend, q, k, v, d_out)
    contenders: dict[str, Callable[[], object]] = {
        name: partial(_ours, (q, k, v), one, backend)
        for name, one in masks.items()
        if name != "cover" or not call.backward
    }
    if call.backward:
        for name, one in masks.items():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out = _ours(leaves, one, backend)
            contenders[f"{name} back"] = partial(torch.autograd.grad, out, leaves, d_out, retain_graph=True)
    elif terms.compiled and pattern.held:
        try:
            their = _flex(pattern, L, q, k, v)
            contenders["flex"] = their
            worst = _difference(their(), _ours((q, k, v), mask, backend))
            if not worst <= TOLERANCE[call.dtype]:
                notes.append(f"flex differs by {worst:.1e}")
        except Exception as wrong:  # a missing compiler surfaces as any of a dozen types
            contenders.pop("flex", None)
            notes.append(f"flex: {first_line(wrong)}")
    return _measured(call, turns.take_turns(contenders, terms), error, tuple(notes))


def _ours(tensors: Sequence[Tensor], mask: qkv.Mask | None, backend: str | None) -> Tensor:
    q, k, v = tensors
    out: Tensor = qkv.attention(q, k, v, mask, backend=backend)
    return out


def _measured(call: Call, taken: dict[str, list[float]], error: float, notes: tuple[str, ...]) -> Measured:
    def ratio(a: str, b: str) -> Quartiles | None:
        if a not in taken or b not in taken:
            return None
        return turns.ratios(taken[a], taken[b])

    share, back = call.pattern.share(call.length), call.backward
    end = " back" * back
    own = ratio(f"sparse{end}", f"full{end}")
    assert own is not None
    efficiency = None
    if back:
        times = zip(*(taken[name] for name in ("full", "sparse", "full back", "sparse back")), strict=True)
        efficiency = turns.quartiles(
            [(back_full / back_mine) / (full / mine) for full, mine, back_full, back_mine in times]
        )
    held = call.pattern.held and call.pattern.cover is None
    return Measured(
        call.name,
        share,
        1e3 * statistics.median(taken[f"full{end}"]),
        own,
        SLOPE * share + OFFSET if held and not back else None,
        ratio(f"cover{end}", f"sparse{end}"),
        ratio("flex", "sparse"),
        FLEX.get(call.dtype) if held else None,
        efficiency,
        error,
        TOLERANCE[call.dtype],
        len(taken["full"]),
        notes,
    )


def _flex(pattern: Pattern, L: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # otherwise one shape more would be compiled with unknown sizes, or not at all
    rule = pattern.rule(L)
    mask = create_block_mask(lambda b, h, p, j: rule(p, j), None, None, L, L, device="cpu", BLOCK_SIZE=pattern.tile)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def _error(call: Call, mask: qkv.Mask, backend: str | None, *tensors: Tensor) -> float:
    """The worst relative error of some rows of out, and of dq, dk and dv, by the definition in float64."""
    q, k, v, d_out = tensors
    if call.backward:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = _ours(leaves, mask, backend)
        found = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    else:
        found = [_ours((q, k, v), mask, backend)]
    L, rule, worst = call.length, call.pattern.rule(call.length), 0.0
    rows = torch.linspace(0, L - 1, min(_SAMPLE, L)).long()
    for h in (0, call.heads - 1):
        expected = _rows(rule, rows, *(t[0, h].double() for t in tensors), keys=call.backward)
        for t, (at, values) in zip(found, expected, strict=False):
            worst = max(worst, _difference(t[0, h][at], values))
    return worst


def _rows(
    rule: Rule, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, keys: bool
) -> list[tuple[Tensor, Tensor]]:
    """Rows of out; with `keys` also of dq, and as many of dk and dv, for which all queries are gone through."""
    L, scale = len(k), k.shape[1] ** -0.5
    j = torch.arange(L)

    def weights(p: Tensor) -> Tensor:
        s = (q[p] @ k.mT * scale).masked_fill(~rule(p[:, None], j), -torch.inf)
        return torch.nan_to_num(s.softmax(-1), 0.0)

    w = weights(rows)
    out = w @ v
    if not keys:
        return [(rows, out)]

    def scores(p: Tensor, w: Tensor) -> Tensor:
        found: Tensor = w * (d_out[p] @ v.mT - (d_out[p] * (w @ v)).sum(-1, keepdim=True)) * scale
        return found

    d_k, d_v = torch.zeros_like(k[rows]), torch.zeros_like(v[rows])
    for p in torch.arange(L).split(1024):
        some = weights(p)
        d_v += some[:, rows].mT @ d_out[p]
        d_k += scores(p, some)[:, rows].mT @ q[p]
    return [(rows, out), (rows, scores(rows, w) @ k), (rows, d_k), (rows, d_v)]


def _difference(x: Tensor, y: Tensor) -> float:
    """The largest error of a row, relative to the rows' size (2-norms)."""
    size = y.double().norm(dim=-1)
    error = (x.double() - y.double()).norm(dim=-1) / size.clamp(min=float(size.mean()) * 1e-2 + 1e-30)
    worst = float(error.max())
    return worst if math.isfinite(worst) else math.inf


def measurement() -> turns.Measurement:
    """`qkv bench --sparse`."""
    return turns.Measurement(
        "sparse",
        seconds=900.0,
        quick_seconds=90.0,
        calls=lambda quick: list(calls(quick=quick)),
        begin=lambda say: "A mask's time as a part of that without one:",
        rounds=9,
        quick_rounds=9,
    )
