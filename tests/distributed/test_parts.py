"""Parts of rows' keys, computed one by one and joined: what ranks do, on every backend and in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.backends import registry
from qkv.call.problem import Options, empty_output
from qkv.distributed import Shards
from qkv.distributed.exchange import Exchange, Piece, exchange
from qkv.distributed.functional import _whole
from qkv.distributed.methods import _backend
from qkv.distributed.parts import Whole
from qkv.distributed.ring import Attend, Run
from qkv.distributed.transport import Group
from tests.gates.calls import Question
from tests.gates.rank_calls import RANK_CALLS
from tests.kit import backends
from tests.kit.cases import Config
from tests.kit.gate import Tensors
from tests.kit.inputs import Inputs


@dataclass(frozen=True)
class Cut(Exchange):
    """One rank that holds everything, and computes it in small pieces."""

    seed: int = 0

    def pieces(self, rank: int, keys: Any) -> tuple[Piece, ...]:
        rng, found = np.random.default_rng(self.seed), []
        for piece in super().pieces(rank, keys):
            queries, columns = (_cut(rng, part) for part in piece)
            found += [Piece(a, b) for a in queries for b in columns]
        return tuple(found)


def _cut(rng: np.random.Generator, part: tuple[int, int]) -> list[tuple[int, int]]:
    inside = rng.integers(part[0], part[1] + 1, int(rng.integers(0, 4))).tolist()
    ends = [part[0], *sorted(inside), part[1]]
    return [(a, b) for a, b in pairwise(ends) if a < b]


def by_parts(inputs: Inputs, backend: str | None) -> Tensors:
    for leaf in inputs.leaves.values():
        leaf.requires_grad_()
    call = inputs.call()
    q, k, v, mask = (call.pop(name, None) for name in ("q", "k", "v", "mask"))
    options, c = Options(**call, return_lse=True), inputs.config
    rows, keys = Shards([[(0, c.Lq)]]), Shards([[(0, c.Lk)]])
    problem, checked, bias = _whole(q, k, v, mask, options, rows, keys)
    plan = exchange(problem, rows, keys, checked.positions)
    name = _backend(problem, backend)
    whole = Whole(problem, options, name, bias, checked.positions, 0)
    run = Run(whole, Cut(plan.queries, plan.keys, plan.tiles, c.seed), Group("", None, 0, 1), "ring")
    tensors = () if bias is None else bias.tensors()
    out, lse = Attend.apply(run, checked.q, checked.k, checked.v, checked.sinks, checked.positions, *tensors)
    given = (inputs.dout, inputs.dlse)
    grads = torch.autograd.grad((out, lse), list(inputs.leaves.values()), given, materialize_grads=True)
    out = empty_output(q, c.Dv).copy_(out)
    return {"out": out, "lse": lse} | {f"d{n}": grad for n, grad in zip(inputs.leaves, grads, strict=True)}


class Parts(type(RANK_CALLS)):  # type: ignore[misc]
    name = "parts"

    def answer(self, question: Question, backend: str | None) -> Tensors:
        return by_parts(question.inputs, backend)


PARTS = Parts()
BACKENDS = [name for name in backends.available() if name not in ("sdpa", "reference")]


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_joined_parts_are_within_the_bounds_of_a_whole(first: int, one_thread: None) -> None:
    for seed in range(first, first + 10):
        config = PARTS.random(seed)
        question = PARTS.question(config)
        for name in ("cpu", "tiled", BACKENDS[seed % len(BACKENDS)]):
            outcome = PARTS.ask(question, name)
            assert not outcome.faults, (seed, name, outcome.faults)


def _extreme(seed: int, Lq: int) -> Config:
    """Scores of 1e5 and more, of few rows and of many."""
    base = PARTS.random(seed)
    return replace(
        base, B=1, Hq=2, Hkv=1, Lq=Lq, Lk=130, D=64, Dv=32, dtype="f32", mask=("causal",), positions=("end",), bias=(),
        softcap=None, sinks=None, scale=None, flavour="shifted", layouts={}, wide=None, visible_nan=False,
    )  # fmt: skip


@pytest.mark.parametrize("Lq", [1, 3, 40])
@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores_are_joined_by_their_states(name: str, Lq: int) -> None:
    for seed in range(6):
        outcome = PARTS.ask(PARTS.question(_extreme(seed, Lq)), name)
        assert not outcome.faults, (seed, outcome.faults)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("more", [{}, {"softcap": 3.0}, {"scale": -0.3}, {"scale": 0.0}])
def test_the_unit_of_states_is_what_the_backend_says(name: str, more: dict[str, float]) -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 33, 16, generator=g) for _ in range(3))
    problem, inputs, _ = _whole(q, k, v, None, Options(**more), Shards([[(0, 33)]]), Shards([[(0, 33)]]))
    whole = Whole(problem, Options(**more), name, None, None, 0)
    found = whole.run(*whole.inputs_of(Piece((0, 33), (0, 33)), inputs.q, inputs.k, inputs.v, slice(0, 33)))
    assert found.state is not None
    m, l = found.state
    torch.testing.assert_close(m * registry.load(name).unit(problem) + l.log(), found.lse, rtol=1e-6, atol=1e-6)
    assert qkv.attention(q, k, v, **more).shape == found.out.shape
