"""What the benchmark is tested with: a clock that only fakes move, a plain attention, and peers that say what they are
told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qkv.bench.cases import Case
from qkv.bench.peers import Roster
from qkv.bench.peers.base import Prepared, Setup
from qkv.bench.race import Clock, Timing
from qkv.cli.main import build_parser

CACHE = 32 << 20
SMALL = Case("f32", 40, 40, 16, Hq=4, Hkv=2, mask="causal")


def command(options: list[str]) -> int:
    """`qkv bench` with options; errors come through, as the command line's own `main` would not let them."""
    args = build_parser("bench").parse_args(["bench", *options])
    return int(args.run(args))


class FakeClock(Clock):
    """Time that only moves when a fake call says so."""

    def __init__(self) -> None:
        self.time = 0.0
        super().__init__(now=lambda: self.time, cpu=lambda: 0.0, sleep=lambda s: None)

    def settle(self, longest: float = 0.05) -> None:
        pass

    def call(self, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        def run() -> None:
            self.time += seconds
            if log is not None:
                log.append(name)

        return run


def naive(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head: Callable[[int], int],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    mask = case.dense_mask() if mask is None else mask
    outs = []
    for h in range(case.Hq):
        scores = q[:, h].double() @ k[:, head(h)].double().transpose(1, 2) * case.scale
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        outs.append(scores.softmax(-1) @ v[:, head(h)].double())
    return torch.stack(outs, 1)


class FakePeer:
    def __init__(self, out: Callable[..., torch.Tensor]) -> None:
        self.out = out

    def prepare(self, inputs: Any) -> Prepared:
        q = inputs.q
        return Prepared([lambda k=k, v=v: self.out(inputs.case, q, k, v) for k, v in inputs.sets], lambda out: out)


class FakeRoster(Roster):
    """Ours is right; `peers` are what the test says."""

    def __init__(self, **peers: Callable[..., torch.Tensor]) -> None:
        super().__init__(Setup(1))
        self.ours = FakePeer(peers.pop("qkv", right))
        self._made = {name: FakePeer(out) for name, out in peers.items()}


def right(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return naive(case, q, k, v, head=lambda h: h // (case.Hq // case.Hkv)).to(q.dtype)


def mean_of_v(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.mean(2, keepdim=True).repeat_interleave(case.Hq // case.Hkv, 1).expand(-1, -1, case.Lq, -1)


def crash(*_: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel\nsecond line")


def timings(**seconds: float) -> dict[str, Timing]:
    return {name.replace("_", " "): Timing(name, {n: s for n in range(3)}) for name, s in seconds.items()}
