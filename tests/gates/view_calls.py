"""The gate of calls on a cache's views: every backend against the oracle, and sameness.

Each configuration also runs again on one native backend, with its pages in another order, on pages of their own where
they were shared, each sequence alone, with two threads, and on contiguous keys: the bits have to stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kit import backends, gate, judge, views
from tests.kit.cases import DTYPES
from tests.kit.gate import Outcome, Tensors
from tests.kit.judge import Verdict
from tests.kit.view_variants import run, variants
from tests.kit.views import ViewConfig, ViewInputs, random_view_config

Question = gate.Question[ViewConfig, ViewInputs]


class ViewCalls(gate.Gate[ViewConfig, ViewInputs]):
    """Calls on views. PyTorch's own kernel promises no bound, so it is not asked."""

    name = "views"

    def random(self, seed: int) -> ViewConfig:
        return random_view_config(seed)

    def question(self, config: ViewConfig) -> Question:
        inputs = views.materialise(config)
        truth = inputs.truth()
        if config.storage != "plain" and config.dtype == "bf16":  # the floor of scaled weights, see views.py
            truth.max_v = np.maximum(truth.max_v, views.LARGEST[config.storage])
        return gate.Question(config, inputs, truth)

    def backends(self) -> tuple[str, ...]:
        return backends.promising()

    def answer(self, question: Question, backend: str | None) -> Tensors:
        return run(question.inputs, backend)

    def judge(self, question: Question, outcome: Outcome, answer: Tensors) -> None:
        dtype = DTYPES[question.config.dtype]
        outcome.verdicts += judge.judge_forward(dtype, question.truth, answer["out"], answer["lse"])
        outcome.verdicts += gate.order_in_memory(question.inputs.q, answer["out"])

    def watched(self, question: Question) -> dict[str, Any]:
        view = question.inputs.view
        tensors = {"q": question.inputs.q, **dict(zip(("k", "v", "k_scale", "v_scale"), view, strict=False))}
        tables = {"the page tables": view.layout.tables}
        return {name: x for name, x in tensors.items() if x is not None} | tables

    def ask_more(self, question: Question, outcomes: list[Outcome]) -> None:
        """Its sameness on one of the native backends, and what runs where one that was named refuses."""
        native = [o for o in outcomes if o.backend.startswith("cpu") and not o.refused]
        if any(o.refused for o in outcomes):
            outcomes.append(self.ask(question, None))
        if native:
            chosen = native[question.config.seed % len(native)]
            if not any(v.quantity == "raised" for v in chosen.verdicts):
                chosen.verdicts += sameness(question, chosen.backend)


def sameness(question: Question, backend: str) -> list[Verdict]:
    """A fault for everything that changed bits."""
    faults = []
    for name, check in variants(question.inputs, backend):
        changed = check()
        if changed:
            faults.append(Verdict("same", np.inf, f"other bits in {changed}: {name}"))
    return faults


VIEWS = ViewCalls()
