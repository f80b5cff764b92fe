"""What attention of given tensors is, by the oracle, and the judge's word on what was made of them.

For calls that are written out in a test; `Question` of the gate does the same for those of the generator.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kit import judge
from tests.kit.oracle import Call, Result, Spec, attention


class Truth:
    """The result and the gradients of sum(out * d_out) + sum(lse * d_lse), for q (B, Hq, Lq, D), k and v.

    `seen` (broadcast to (B, Hq, Lq, Lk)) is what the mask shows, `bias` a tensor. Scores are computed in float64,
    of float64 tensors in longdouble.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        d_out: Tensor | None = None,
        d_lse: Tensor | None = None,
    ) -> None:
        self.dtype, self.kind = q.dtype, np.longdouble if q.dtype == torch.float64 else np.float64
        B, Hq, Lq, D = q.shape
        mask: Spec | None = None if seen is None else ("dense", seen.expand(B, Hq, Lq, k.shape[2]).numpy())
        self.call = Call(
            *(self.array(x) for x in (q, k, v)),
            positions=np.broadcast_to(np.arange(Lq), (B, Lq)),
            scale=self.kind(1 / math.sqrt(max(1, D)) if scale is None else scale),
            mask=mask,
            bias=() if bias is None else (("tensor", self.array(bias)),),
            softcap=softcap,
            sinks=None if sinks is None else self.array(sinks),
        )
        dout = np.zeros((B, Hq, Lq, v.shape[3]), self.kind) if d_out is None else self.array(d_out)
        dlse = np.zeros((B, Hq, Lq), self.kind) if d_lse is None else self.array(d_lse)
        self.result: Result = attention(self.call, dout, dlse)
        self.sizes = judge.Sizes.of(self.call, dout, dlse)

    def array(self, x: Tensor) -> Any:
        return judge.numbers(x).astype(self.kind)

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        verdicts = [judge.judge_output(self.dtype, self.result, out)]
        if lse is not None:
            verdicts.append(judge.judge_lse(self.dtype, self.result, lse))
        told = [verdict.fault for verdict in verdicts if not verdict.passed]
        assert not told, told

    def check_gradients(self, **grads: Tensor) -> None:
        """The gradients of q, k, v, bias and sinks, each in the dtype of its tensor."""
        for name, grad in grads.items():
            known = self.result.grads["bias0" if name == "bias" else name]
            verdict = judge.judge_gradient(name, self.call, self.sizes, self.dtype, known, grad, grad.dtype)
            assert verdict.passed, verdict.fault
