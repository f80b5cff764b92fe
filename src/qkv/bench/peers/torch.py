"""Ours, and PyTorch's own: SDPA, two matmuls, and compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.bench import machine
from qkv.bench.inputs import Inputs
from qkv.bench.peers.base import Prepared, Setup, Unavailable, first_line


class Qkv:
    """Ours, through the public function."""

    def __init__(self, setup: Setup, backend: str | None = None) -> None:
        self.backend = backend

    def prepare(self, inputs: Inputs) -> Prepared:
        import qkv

        case = inputs.case
        masks: dict[str, Callable[[], Any]] = {
            "full": lambda: None,
            "causal": qkv.causal,
            "window": lambda: qkv.sliding_window(case.size),
            "documents": lambda: qkv.documents(
                [min(case.size, case.Lk - i) for i in range(0, case.Lk, case.size)],
            ),
        }
        mask, backend = masks[case.mask](), self.backend

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = qkv.attention(q, k, v, mask=mask, backend=backend)  # no pair: return_lse is not set
            return out

        with torch.set_grad_enabled(case.backward):
            tensors = inputs.leaves() if case.backward else (inputs.q, *inputs.sets[0])
            plan = qkv.plan(*tensors, mask=mask, backend=backend)
        return _torch_calls(inputs, call, note=f"{plan.backend}, {plan.note}" if plan.note else plan.backend)


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention; masks it has no flag for as boolean tensors."""

    def __init__(self, setup: Setup) -> None:
        pass

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        causal = case.mask == "causal"
        mask = None if causal else case.dense_mask()
        gqa = case.Hq != case.Hkv

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)

        return _torch_calls(inputs, call)


class Matmuls:
    """Attention of one query token as two plain matmuls and a softmax, on float32 copies where its type is slower."""

    def __init__(self, setup: Setup) -> None:
        pass

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        if (case.B, case.Hkv, case.Lq, case.mask) != (1, 1, 1, "full"):
            raise Unavailable("written for one sequence, one key head and one query token")
        kind = machine.product_type(case.torch_dtype)
        note = "" if kind == case.torch_dtype else "on float32 copies"
        inputs = inputs.to("f32") if note else inputs

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.mm(q[0, :, 0] * case.scale, k[0, 0].t())
            return torch.mm(torch.softmax(scores, -1), v[0, 0])[None, :, None]

        return _torch_calls(inputs, call, note)


class Flex:
    """FlexAttention under torch.compile, with its block mask built beforehand."""

    def __init__(self, setup: Setup) -> None:
        if setup.isa:
            raise Unavailable("its generated code cannot be held to AVX2 (compiled for the native processor)")

    def prepare(self, inputs: Inputs) -> Prepared:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError as error:
            raise Unavailable(f"this torch has no FlexAttention ({error})") from None
        case = inputs.case
        size = case.size
        rules: dict[str, Callable[..., Any]] = {
            "causal": lambda b, h, i, j: j <= i,
            "window": lambda b, h, i, j: (j <= i) & (i - j < size),
            "documents": lambda b, h, i, j: i // size == j // size,
        }
        block_mask = None
        torch.compiler.reset()  # otherwise one shape more would be compiled with unknown sizes, or not at all
        try:
            if case.mask in rules:
                block_mask = create_block_mask(rules[case.mask], None, None, case.Lq, case.Lk, device="cpu")
            compiled = torch.compile(flex_attention, dynamic=False)
            gqa = case.Hq != case.Hkv

            def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
                return compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)

            call(inputs.q, *inputs.sets[0])
        except Exception as error:  # a missing compiler surfaces as any of a dozen types
            raise Unavailable(f"torch.compile failed: {first_line(error)}") from None
        return _torch_calls(inputs, call)


def _torch_calls(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor], note: str = "") -> Prepared:
    if inputs.case.backward:
        return _with_backward(inputs, call, note)
    return Prepared([partial(call, inputs.q, k, v) for k, v in inputs.sets], lambda out: out, note)


def _with_backward(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor], note: str) -> Prepared:
    tensors = inputs.leaves()

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = call(*tensors)
            return (out.detach(), *torch.autograd.grad(out, tensors, inputs.d_out))

    return Prepared([both], lambda result: result, note)
