"""The gate of calls on another device than the CPU: every backend that takes such tensors, against the oracle.

The error rule is that of the CPU. It is asked with PyTorch's defaults for float32 products: TF32 off.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import torch

import qkv
from tests.gates.calls import SDPA_SLACK, Calls, Question, run
from tests.kit import gate, judge
from tests.kit.cases import CASES, DTYPES, Config
from tests.kit.device import OnDevice, moved
from tests.kit.gate import Outcome, Tensors
from tests.kit.inputs import Inputs, materialise
from tests.kit.oracle import attention

BACKENDS = ("tiled", "reference", "sdpa", "by default", "by default, out")
PLAIN_FLAVOURS = ("needles", "flat", "small")


class DeviceCalls(Calls):
    """Random calls on tensors of a device."""

    name = "generated calls"

    def __init__(self, device: str, tf32: bool = False) -> None:
        self.device, self.tf32 = device, tf32

    def backends(self) -> tuple[str, ...]:
        return BACKENDS

    def question(self, config: Config, inputs: Inputs | None = None) -> Question:
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")  # a process of its own has the default
        asked = super().question(config, materialise(config) if inputs is None else inputs)
        return gate.Question(config, moved(asked.inputs, self.device), asked.truth)

    def ask(self, question: Question, backend: str | None, answer: Any = None) -> Outcome:
        if backend in ("sdpa", "by default, out") and self._beyond(question.inputs):
            return Outcome(question.config.seed, backend, question.config.dtype, refused="scores of any magnitude")
        outcome = super().ask(question, backend, answer)
        for fault in outcome.faults:
            if "CUDA error" in fault or "device-side assert" in fault:  # this process can use the device no more
                print(f"{question.config}: {backend}: {fault}", file=sys.stderr, flush=True)
                os._exit(13)
        return outcome

    def _beyond(self, inputs: Inputs) -> bool:
        """Whether the scores are of a magnitude that PyTorch's kernels for GPUs do not promise, as the plan notes."""
        return self.device != "cpu" and inputs.config.wide is not None and chosen(inputs) == "sdpa"

    def answer(self, question: Question, backend: str | None) -> Tensors:
        inputs = question.inputs
        if backend == "sdpa" or (backend == "by default, out" and chosen(inputs) == "sdpa"):
            return _by_torch(inputs, None if backend == "by default, out" else backend)
        if backend == "by default, out":
            torch.manual_seed(inputs.config.seed)
            with torch.no_grad():
                return {"out": qkv.attention(**inputs.call())}
        return run(inputs, None if backend == "by default" else backend)

    def judge(self, question: Question, outcome: Outcome, answer: Tensors) -> None:
        dtype, truth = DTYPES[question.config.dtype], question.truth
        if outcome.backend not in ("sdpa", "by default, out"):
            super().judge(question, outcome, answer)
        elif outcome.backend == "sdpa" or chosen(question.inputs) == "sdpa":
            outcome.verdicts.append(judge.judge_output(dtype, truth, answer["out"], SDPA_SLACK))
            outcome.verdicts += _of_torch(question, answer)
        else:
            outcome.verdicts.append(judge.judge_output(dtype, truth, answer["out"]))


class DeviceCases(DeviceCalls):
    """The named cases, by their place in the list."""

    name = "named cases"

    def random(self, seed: int) -> Config:
        return replace(CASES[seed], seed=seed)


def chosen(inputs: Inputs) -> str:
    """The backend that a call takes by itself where only `out` is wanted."""
    with torch.no_grad():
        return qkv.plan(**inputs.call()).backend


def _by_torch(inputs: Inputs, backend: str | None) -> Tensors:
    """PyTorch's own kernel on clean inputs: out, and gradients where they can be judged."""
    leaves = dict(zip("qkv", inputs.clean(), strict=True))
    if inputs.config.flavour not in PLAIN_FLAVOURS or inputs.config.visible_nan:
        return {"out": qkv.attention(**inputs.call() | leaves, backend=backend).detach()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = qkv.attention(**inputs.call() | leaves, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout, materialize_grads=True)
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def _of_torch(question: Question, answer: Tensors) -> list[judge.Verdict]:
    """The verdicts on gradients of PyTorch's own kernel, which has no lse."""
    if "dq" not in answer:
        return []
    inputs, dtype = question.inputs, DTYPES[question.config.dtype]
    assert isinstance(inputs, OnDevice)
    dout, dlse = judge.numbers(inputs.dout), 0 * judge.numbers(inputs.dlse)
    kind = inputs.oracle.q.dtype
    truth = attention(inputs.oracle, dout.astype(kind), dlse.astype(kind))
    sizes = judge.Sizes.of(inputs.oracle, dout, dlse, inputs.hidden)
    found = []
    for name in "qkv":
        grad = truth.grads[name]
        bound = judge.gradient_bound(inputs.oracle, sizes, dtype, grad, 2 * judge.eps(dtype), judge.TINY[dtype])
        found.append(judge.compare(f"d{name}", answer[f"d{name}"], grad.value, SDPA_SLACK * bound, dtype))
    return found
