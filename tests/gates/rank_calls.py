"""The gate of calls on ranks: the configurations of `calls`, sharded at random places, on 2 to 4 gloo processes.

Each method is a backend here. Ranks make the inputs from the configuration, take their rows, and return what they
found; what is judged is put together from it, with the same bounds as on one process.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from qkv.call.problem import empty_output
from qkv.scores import as_bias
from tests.gates.calls import Calls, Question
from tests.kit.cases import Config
from tests.kit.gate import Tensors
from tests.kit.generator import Rng, random_config
from tests.kit.inputs import Inputs, materialise
from tests.kit.ranks import on_ranks

METHODS = ("ring", "allgather", "ulysses", "hybrid")


class RankCalls(Calls):
    """Calls on tensors that ranks hold together."""

    name = "ranks"
    starts_processes = True

    def random(self, seed: int) -> Config:
        # Dropout draws by the indices of a call, which are those of its parts here.
        return replace(random_config(seed), dropout_p=0.0)

    def backends(self) -> tuple[str, ...]:
        return METHODS

    def answer(self, question: Question, backend: str | None) -> Tensors:
        assert backend is not None
        return answered(question.config, question.inputs, backend)


def answered(config: Config, inputs: Inputs, method: str, backend: str | None = None) -> Tensors:
    """out, lse and the gradients of all leaves by some ranks."""
    rng = np.random.default_rng([config.seed, METHODS.index(method)])
    ranks = 4 if method == "hybrid" else int(rng.integers(2, 5))
    shards = random_shards(rng, config.Lq, ranks)
    few = max(map(shards.rows, range(ranks))) <= 1 < config.Lq  # a bias of one row is then taken for one of a query's
    if method in ("ulysses", "hybrid") and _has_rows(config, few):
        method, ranks = "ring", 2  # rows of a bias stay with their queries
        shards = random_shards(rng, config.Lq, ranks)
    key_shards = shards if config.Lq == config.Lk and rng.random() < 0.7 else random_shards(rng, config.Lk, ranks)
    found = on_ranks(ranks, on_rank, config, shards, key_shards, method, backend)
    answer = {name: shards.put([rank[name] for rank in found]) for name in ("out", "lse")}
    for name, leaf in inputs.leaves.items():
        answer[f"d{name}"] = sum(rank[f"d{name}"].double() for rank in found).to(leaf.dtype)
    answer["out"] = empty_output(inputs.q, config.Dv).copy_(answer["out"])  # a rank's order in memory is its own q's
    return answer


def _has_rows(config: Config, few: bool) -> bool:
    return any(spec[0] == "tensor" and len(spec[1]) > 1 and (few or spec[1][-2] > 1) for spec in config.bias)


def random_shards(rng: Rng, length: int, ranks: int) -> Any:
    """Cut anywhere, tile edges more often, and dealt to ranks: some hold nothing, some several ranges."""
    from qkv.distributed import Shards

    kind = rng.choice(["contiguous", "zigzag", "cut", "cut"])
    if kind != "cut":
        return getattr(Shards, kind)(length, ranks)
    pieces = int(rng.integers(1, 2 * ranks + 1))
    ends = rng.integers(0, length + 1, pieces - 1)
    near = rng.random(pieces - 1) < 0.4
    ends = np.where(near, np.clip(ends // 16 * 16 + rng.integers(-1, 2, pieces - 1), 0, length), ends)
    cuts = [0, *sorted(int(x) for x in ends), length]
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for start, stop in pairwise(cuts):
        if start < stop:
            held[int(rng.integers(ranks))].append((start, stop))
    return Shards(held)


_grids: dict[int, Any] = {}


def _grid(mesh: Any, method: str) -> Any:
    if method != "hybrid":
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    if 4 not in _grids:
        _grids[4] = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("ring", "heads"))
    return _grids[4]


def on_rank(
    mesh: Any, config: Config, shards: Any, key_shards: Any, method: str, backend: str | None
) -> dict[str, torch.Tensor]:
    """One rank's part of a call, forward and backward."""
    from qkv.distributed import attention, shard

    mesh, inputs = _grid(mesh, method), materialise(config)
    for leaf in inputs.leaves.values():
        leaf.requires_grad_()
    call = inputs.call()
    rank = 0
    for at, size in zip(mesh.get_coordinate(), mesh.mesh.shape, strict=True):
        rank = rank * size + at
    for name, of in (("q", shards), ("k", key_shards), ("v", key_shards)):
        call[name] = shard(call[name], of, mesh)
    if "bias" in call:
        call["bias"] = _rows(call["bias"], shards, rank)
    out, lse = attention(
        **call, mesh=mesh, shards=shards, key_shards=key_shards, method=method, backend=backend, return_lse=True
    )
    leaves = list(inputs.leaves.values())
    given = (shards.take(inputs.dout, rank), shards.take(inputs.dlse, rank))
    grads = torch.autograd.grad((out, lse), leaves, given, materialize_grads=True, allow_unused=True)
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": grad for name, grad in zip(inputs.leaves, grads, strict=True)
    }


def _rows(bias: Any, shards: Any, rank: int) -> Any:
    """The rank's own rows of bias tensors that have one a query."""
    term = as_bias(bias)
    assert term is not None
    found: Any = None
    for one in term.terms:
        if one.kind == "tensor":
            (t,) = one.tensors()
            if t.dim() > 1 and t.shape[-2] > 1:
                one = as_bias(shards.take(t, rank, t.dim() - 2))
        found = one if found is None else found + one
    return found


RANK_CALLS = RankCalls()
