"""PyTorch's own scaled_dot_product_attention, for calls that need nothing it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qkv.masks import causal
from qkv.spec import Inputs, Output, Problem, empty_output


class SdpaBackend:
    """torch.nn.functional.scaled_dot_product_attention, with its own autograd."""

    name = "sdpa"
    differentiable = True

    def supports(self, problem: Problem) -> str | None:
        p = problem
        if p.device == "meta":
            return "a meta tensor holds no data to compute with"
        lacks = {
            "a log-sum-exp": p.needs_lse,
            "softcap": p.softcap is not None,
            "sinks": p.has_sinks,
            "score terms": bool(p.bias),
            "dropout that is the same for every tiling": p.dropout_p > 0,
            "empty dimensions": 0 in (p.B, p.Hq, p.Lq, p.Lk, p.Dv),
            # Its CPU kernel scales the -inf of hidden scores too: negative makes them +inf (torch 2.13).
            "causal mask with a scale that is not positive": p.mask is not None and p.scale <= 0,
            "grouped heads before torch 2.5": p.group > 1 and not _GROUPED,
        }
        missing = [name for name, wanted in lacks.items() if wanted]
        if p.mask is not None and not (p.mask == causal() and _starts(p)):
            missing.append("masks other than causal() from position 0, without reading what they hide")
        return f"it has no {', no '.join(missing)}" if missing else None

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        # Some of its CPU kernels read a last dimension whose stride is not 1 wrongly (pytorch#187506, 2026).
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
        options: dict[str, Any] = {"is_causal": problem.mask is not None, "scale": problem.scale}
        if problem.group > 1:
            options["enable_gqa"] = True
        with torch.autocast(device_type=problem.device, enabled=False):
            out = scaled_dot_product_attention(q, k, v, **options)
        return Output(empty_output(inputs.q, problem.Dv).copy_(out), None)

    def tile(self, problem: Problem) -> tuple[int, int]:
        return 64, 64

    def note(self, problem: Problem) -> str:
        return (
            "PyTorch's kernel: not promised are the error bound, the same bits for any thread count and batch "
            "neighbour, and that a NaN in a hidden key or value stays unread"
        )


def _starts(problem: Problem) -> bool:
    at = [problem.offset(b) for b in range(problem.B)] if problem.positions != "tensor" else [-1]
    return all(p == 0 for p in at)


_GROUPED = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 5)
