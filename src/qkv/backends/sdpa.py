"""PyTorch's own scaled_dot_product_attention, for calls that need nothing it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qkv._torch import with_autograd
from qkv.backends.base import Backend, Gradients
from qkv.call.problem import Inputs, Output, Problem, empty_output
from qkv.masks import causal


class SdpaBackend(Backend):
    """torch.nn.functional.scaled_dot_product_attention, with its own autograd for first derivatives."""

    name = "sdpa"
    differentiable = True
    has_backward = True

    def supports(self, problem: Problem) -> str | None:
        p = problem
        if (why := super().supports(p)) is not None:
            return why
        causal_kernel = _is_causal(p)
        lacks = {
            "log-sum-exp": p.needs_lse,
            "softcap": p.softcap is not None,
            "sinks": p.has_sinks,
            "score terms": bool(p.bias),
            "dropout that is the same for every tiling": p.dropout_p > 0,
            "empty dimensions": 0 in (p.B, p.Hq, p.Lq, p.Lk, p.Dv),
            # Its CPU kernel scales the -inf of hidden scores too: negative makes them +inf (torch 2.13). Those of CUDA
            # take the maximum before they scale, and find NaN without a mask as well (torch 2.11).
            "causal mask with a scale that is not positive": p.device == "cpu"
            and causal_kernel is True
            and p.scale <= 0,
            "scale that is not positive": p.device != "cpu" and p.scale <= 0,
            "masks other than causal() from position 0, without reading what they hide": causal_kernel is None,
        }
        missing = [name for name, wanted in lacks.items() if wanted]
        return f"it has no {', no '.join(missing)}" if missing else None

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        out = _computed(problem, inputs.q, inputs.k, inputs.v)
        if out.requires_grad and problem.device != "cpu":
            out.register_hook(_aligned_gradient)
        return Output(empty_output(inputs.q, problem.Dv).copy_(out), None)

    def backward(self, problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Gradients:
        """By autograd through `run`'s operations, computed once more: for callers that cannot keep their graph."""
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        with with_autograd():
            out = _computed(problem, *leaves)
        q, k, v = torch.autograd.grad(out, leaves, d_out if problem.device == "cpu" else _aligned(d_out))
        return Gradients(q, k, v, None, ())

    def tile(self, problem: Problem) -> tuple[int, int]:
        return 64, 64

    def note(self, problem: Problem) -> str:
        further = "" if problem.device == "cpu" else "scores of any magnitude, "
        return (
            f"PyTorch's kernel: not promised are the error bound, {further}the same bits for any thread count and "
            "batch neighbour, and that a NaN in a hidden key or value stays unread"
        )


def _computed(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Some of its CPU kernels read a last dimension whose stride is not 1 wrongly (pytorch#187506, 2026).
    on_cpu = problem.device == "cpu"
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()) if on_cpu else _aligned(x) for x in (q, k, v))
    options: dict[str, Any] = {"is_causal": _is_causal(problem) is True, "scale": problem.scale}
    if problem.group > 1:
        options["enable_gqa"] = True
    with torch.autocast(device_type=problem.device, enabled=False):
        return scaled_dot_product_attention(q, k, v, **options)


def _aligned(x: Tensor) -> Tensor:
    """x, or a dense copy where its rows do not all begin at multiples of 16 bytes.

    The fused kernels of CUDA read 16 bytes at a time, of an incoming gradient as well, and check neither: half types
    end in "misaligned address", after which the process can use the device no more (torch 2.11, H100).
    """
    steps = [n * x.element_size() for n, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and (x.is_contiguous() or not any(n % 16 for n in steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned_gradient(gradient: Tensor | None) -> Tensor | None:
    """The same for a hook, which autograd calls without a gradient where there is none."""
    return None if gradient is None else _aligned(gradient)


def _is_causal(problem: Problem) -> bool | None:
    """PyTorch's `is_causal` for the problem's mask; None where that cannot say it."""
    p = problem
    if p.mask is None:
        return False
    if p.mask != causal() or p.positions == "tensor":
        return None
    starts = {p.offset(b) for b in range(len(p.positions) if isinstance(p.positions, tuple) else 1)}
    if min(starts) >= p.Lk - 1:
        return False  # each query sees every key, as in a step of decode
    return True if starts == {0} else None
