"""The error rule of the design, and nothing softer: every element has its own bound.

    out    (2 eps + 4 eps_acc (1 + S_i)) * (P @ |V|) + floor          floor = t (1 + max |V|)
    lse    4 eps_acc (1 + S_i + |lse|)
    grads  (2 eps + 8 eps_acc (1 + S_i)) times the same formula with every factor by its absolute value + floor

Beside it: the largest error in proportion to that of the naive softmax((q @ k^T) * scale) @ v in the same dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.kit.cases import DTYPES, Config
from tests.kit.inputs import Inputs
from tests.kit.oracle import Call, Grad, Result

Array = NDArray[Any]

# t: the smallest numbers that the dtype still resolves
TINY = {torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.float64: 2.0**-1022}


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def eps_acc(dtype: torch.dtype) -> float:
    return eps(torch.float64 if dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class Verdict:
    """How one quantity of one call compares with the oracle."""

    quantity: str
    ratio: float  # the worst error / bound; infinite for a broken rule that no bound covers
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault


def numbers(x: torch.Tensor) -> Array:
    """A tensor of any dtype and device as float64, exactly."""
    return x.detach().to(torch.float64).cpu().numpy()


def compare(quantity: str, got: torch.Tensor, want: Array, bound: Array, dtype: torch.dtype) -> Verdict:
    """Judge each element: within its bound, NaN exactly where the oracle is NaN, 0 where nothing contributes."""
    if tuple(got.shape) != want.shape or got.dtype != dtype:
        fault = f"{quantity} is {tuple(got.shape)} {got.dtype}, wanted {want.shape} {dtype}"
        return Verdict(quantity, np.inf, fault)
    if not want.size:
        return Verdict(quantity, 0.0)
    mine = numbers(got)
    with np.errstate(all="ignore"):
        error = abs(mine - want)
        finite = np.isfinite(want)
        ratio = np.where(finite, error / bound, np.where(np.isnan(want), np.isnan(mine), mine == want) - 1.0)
        ratio = np.where(finite & (error == 0), 0.0, ratio)
        ratio = np.where(ratio == -1.0, np.inf, ratio)  # a wrong NaN or infinity
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        # beyond the dtype's range a result may be what the dtype has instead
        ratio = np.where(finite & (abs(want) + bound > torch.finfo(dtype).max) & ~np.isnan(mine), 0.0, ratio)
    worst = float(ratio.max())
    if worst <= 1:
        return Verdict(quantity, worst)
    at = tuple(int(x) for x in np.unravel_index(int(ratio.argmax()), want.shape))
    count = int((ratio > 1).sum())
    fault = (
        f"{quantity}{list(at)} = {mine[at]:.9g}, wanted {want[at]:.9g} ± {bound[at]:.3g} ({count} of {want.size} wrong)"
    )
    return Verdict(quantity, worst, fault)


def judge_output(dtype: torch.dtype, truth: Result, out: torch.Tensor, slack: float = 1) -> Verdict:
    """`slack` is for PyTorch's own kernel alone, which promises no bound: see `SDPA_SLACK` of the gate."""
    return compare("out", out, truth.out, slack * output_bound(dtype, truth), dtype)


def output_bound(dtype: torch.dtype, truth: Result) -> Array:
    """A row that sees nothing has bound 0: it must be exactly 0."""
    relative = 2 * eps(dtype) + 4 * eps_acc(dtype) * (1 + truth.spread[..., None])
    floor = TINY[dtype] * (1 + truth.max_v)[..., None]
    return np.where(truth.seen[..., None] > 0, relative * truth.weight_v + floor, 0)


def judge_lse(dtype: torch.dtype, truth: Result, lse: torch.Tensor) -> Verdict:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    with np.errstate(invalid="ignore"):
        bound = 4 * eps(accumulate) * (1 + truth.spread + abs(truth.lse))
    return compare("lse", lse, truth.lse, bound, accumulate)


def judge_forward(dtype: torch.dtype, truth: Result, out: torch.Tensor, lse: torch.Tensor) -> list[Verdict]:
    return [judge_output(dtype, truth, out), judge_lse(dtype, truth, lse)]


@dataclass(frozen=True)
class Sizes:
    """The largest numbers of a call that a gradient's floor depends on."""

    q: float
    k: float
    v: float
    dout: float
    dlse: float

    @classmethod
    def of(cls, call: Call, dout: Array, dlse: Array, hidden: Array | None = None) -> Sizes:
        """`hidden` are slots of k and v that no row sees."""
        seen = slice(None) if hidden is None else ~hidden
        tensors = (call.q, call.k[seen], call.v[seen], dout, dlse)
        return cls(*(float(abs(x[np.isfinite(x)]).max(initial=0)) for x in tensors))


def judge_gradient(
    name: str,
    call: Call,
    sizes: Sizes,
    dtype: torch.dtype,
    truth: Grad,
    grad: torch.Tensor,
    own: torch.dtype,
    e: float = 2,
) -> Verdict:
    """The gradient of a tensor of dtype `own`; `e` is how often its numbers are rounded to it."""
    bound = gradient_bound(call, sizes, dtype, truth, e * max(eps(dtype), eps(own)), max(TINY[dtype], TINY[own]))
    return compare(f"d{name}", grad, truth.value, bound, own)


def gradient_bound(call: Call, sizes: Sizes, dtype: torch.dtype, grad: Grad, e: float, tiny: float) -> Array:
    """A gradient to which nothing contributes has bound 0: it must be exactly 0."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    group = max(1, call.geo.Hq // max(1, call.k.shape[1]))
    # weights below the smallest number of the accumulation may be lost, each times what it would have multiplied: also
    # once a small scale has made them so
    largest = max(1.0, sizes.q, sizes.k)
    reach = 1 + float(abs(call.scale)) * largest
    lost = (
        (reach + largest)
        * (1 + 2 * call.v.shape[3] * sizes.v * sizes.dout + sizes.dlse)
        * (1 + max(call.geo.Lq * group, call.geo.Lk))
    )
    bound = e * grad.plain + 8 * eps(accumulate) * grad.weighted + tiny * reach + TINY[accumulate] * lost
    return np.where(grad.weighted == 0, 0, bound)


# ------------------------------------------------------------------------------------------- beside naive PyTorch
def is_plain(config: Config) -> bool:
    """Whether naive PyTorch computes the same thing: no term but the mask, nothing planted among visible keys."""
    c = config
    return not (c.bias or c.softcap or c.sinks or c.visible_nan or c.dropout_p) and c.flavour in ("needles", "flat")


def naive_error(inputs: Inputs, truth: Result) -> float:
    """The largest error of softmax((q @ k^T) * scale) @ v in the call's own dtype."""
    q, k, v = inputs.clean()
    group = inputs.config.group
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = ((q @ k.transpose(-1, -2)) * inputs.config.real_scale).masked_fill(~inputs.visible(), -torch.inf)
    return largest_error(torch.softmax(scores, -1) @ v, truth)


def largest_error(out: torch.Tensor, truth: Result) -> float:
    """Over rows that see something. Never below the rounding of the output itself, which nobody can avoid."""
    alive = truth.seen > 0
    if not alive.any() or not truth.out.size:
        return 0.0
    error = abs(numbers(out) - truth.out)[alive].max()
    return float(np.nan_to_num(error, nan=np.inf))


def rounding(config: Config, truth: Result) -> float:
    return float(eps(DTYPES[config.dtype]) / 2 * abs(truth.out).max(initial=0))
