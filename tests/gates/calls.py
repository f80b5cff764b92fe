"""The gate of calls on tensors: forward and gradients of every backend against the oracle."""

from __future__ import annotations

from typing import Any

import torch

import qkv
from tests.kit import backends, gate, judge
from tests.kit.cases import DTYPES, Config
from tests.kit.gate import Outcome, Tensors
from tests.kit.generator import random_config
from tests.kit.inputs import Inputs, materialise
from tests.kit.oracle import attention

Question = gate.Question[Config, Inputs]
SDPA_SLACK = 16.0  # PyTorch's own kernel promises no bound: on clean inputs its output is held to this many of ours


class Calls(gate.Gate[Config, Inputs]):
    """Calls on tensors."""

    name = "calls"

    def random(self, seed: int) -> Config:
        return random_config(seed)

    def question(self, config: Config, inputs: Inputs | None = None) -> Question:
        inputs = materialise(config) if inputs is None else inputs
        kind = inputs.oracle.q.dtype
        dout, dlse = (judge.numbers(x).astype(kind) for x in (inputs.dout, inputs.dlse))
        truth = attention(inputs.oracle, dout, dlse)
        naive = judge.naive_error(inputs, truth) if judge.is_plain(config) else None
        return gate.Question(config, inputs, truth, naive)

    def backends(self) -> tuple[str, ...]:
        return backends.available()

    def answer(self, question: Question, backend: str | None) -> Tensors:
        """out, lse and all gradients by qkv."""
        inputs = question.inputs
        if backend == "sdpa":
            return {
                "out": qkv.attention(**inputs.call() | dict(zip("qkv", inputs.clean(), strict=True)), backend="sdpa")
            }
        return run(inputs, backend)

    def judge(self, question: Question, outcome: Outcome, answer: Tensors) -> None:
        config, inputs, truth = question.config, question.inputs, question.truth
        dtype, out = DTYPES[config.dtype], answer["out"]
        if outcome.backend == "sdpa":
            outcome.verdicts.append(judge.judge_output(dtype, truth, out, SDPA_SLACK))
        else:
            outcome.verdicts += judge.judge_forward(dtype, truth, out, answer["lse"])
            given = (judge.numbers(x) for x in (inputs.dout, inputs.dlse))
            sizes = judge.Sizes.of(inputs.oracle, *given, inputs.hidden)
            for name, leaf in inputs.leaves.items():
                grad, known = answer[f"d{name}"], truth.grads[name]
                outcome.verdicts.append(
                    judge.judge_gradient(name, inputs.oracle, sizes, dtype, known, grad, leaf.dtype)
                )
            outcome.verdicts += gate.order_in_memory(inputs.q, out)
        if question.naive is not None and out.shape == truth.out.shape:
            least = judge.rounding(config, truth)
            mine, naive = max(judge.largest_error(out, truth), least), max(question.naive, least)
            outcome.naive_ratio = mine / naive if naive else 1.0

    def watched(self, question: Question) -> dict[str, Any]:
        return dict(question.inputs.leaves)


def run(inputs: Inputs, backend: str | None) -> Tensors:
    """out, lse and the gradients of all leaves."""
    for leaf in inputs.leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(inputs.config.seed)
    out, lse = qkv.attention(**inputs.call(), return_lse=True, backend=backend)
    leaves, given = list(inputs.leaves.values()), (inputs.dout, inputs.dlse)
    grads = torch.autograd.grad((out, lse), leaves, given, materialize_grads=True)
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(inputs.leaves, grads, strict=True)}


CALLS = Calls()
