"""What the demo measures while it runs: whether the backends agree, and how long one decoded token takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qkv.errors import QKVError
from qkv.functional import attention
from qkv.masks import causal

BACKENDS = ("reference", "tiled", "sdpa", "cpu")
KEYS, HEADS, KV_HEADS, SIZE = 4096, 32, 8, 128  # the decode step of a common 8-billion-parameter model, one layer
ROUNDS, BUDGET = 31, 3.0  # timed pairs at most, and seconds for one dtype


@dataclass(frozen=True)
class Agreement:
    """The worst error of each backend that ran, and why the others did not."""

    errors: dict[str, dict[str, float]]  # backend -> case -> largest |out - float64| / largest |float64|
    refused: dict[str, str]

    @property
    def worst(self) -> float:
        """The worst of all errors."""
        return max(error for cases in self.errors.values() for error in cases.values())


def agreement(q: Tensor, k: Tensor, v: Tensor, say: Callable[[str], None]) -> Agreement:
    """Compare each backend with the definition in float64, on the demo's own lookup and on causal self-attention."""
    few = min(k.shape[2], 256)
    heads = k[:, :, :few].reshape(1, few, 8, -1).transpose(1, 2)  # the passages attend to each other in 8 heads
    cases: dict[str, Callable[[torch.dtype, str], Tensor]] = {
        "the lookup": lambda dtype, name: attention(q.to(dtype), k.to(dtype), v.to(dtype), backend=name),
        "causal, 8 heads on 2": lambda dtype, name: attention(
            heads.to(dtype), heads[:, :2].to(dtype), heads[:, 2:4].to(dtype), mask=causal(), backend=name
        ),
    }
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for name in BACKENDS:
        say(f"comparing {name} with float64")
        for case, call in cases.items():
            exact = call(torch.float64, "reference")
            try:
                out = call(torch.float32, name)
            except QKVError as error:  # this backend does not run here, or not this case: the screen says so
                refused[name] = str(error)
                continue
            largest = exact.abs().max().item() or 1.0
            errors.setdefault(name, {})[case] = (out.double() - exact).abs().max().item() / largest
    return Agreement(errors, refused)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one decode step, by system; every pair was measured in turn, after the results were compared."""

    dtype: str
    torch: tuple[float, ...]
    qkv: tuple[float, ...]
    difference: float  # largest difference of the two results

    @property
    def medians(self) -> tuple[float, float]:
        """The median of PyTorch's and of qkv's times."""
        return statistics.median(self.torch), statistics.median(self.qkv)


def decode(dtype: str, say: Callable[[str], None], keys: int = KEYS) -> Timing:
    """Time one new token attending to `keys` keys, PyTorch's SDPA and qkv in turn."""
    say(f"timing decode over {keys:,} keys in {dtype}")
    kind = getattr(torch, dtype)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, 1, SIZE, generator=rng).to(kind)
    k, v = (torch.randn(1, KV_HEADS, keys, SIZE, generator=rng).to(kind) for _ in range(2))
    calls = {"torch": _peer(q, k, v), "qkv": lambda: attention(q, k, v)}
    with torch.inference_mode():
        first = {name: call() for name, call in calls.items()}
        difference = (first["torch"].double() - first["qkv"].double()).abs().max().item()
        times: dict[str, list[float]] = {name: [] for name in calls}
        stop = time.perf_counter() + BUDGET
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
            if time.perf_counter() > stop:
                break
    return Timing(dtype, tuple(times["torch"]), tuple(times["qkv"]), difference)


def _peer(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """PyTorch's own call."""
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)
