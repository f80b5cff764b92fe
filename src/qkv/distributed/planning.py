"""What each method would cost on the ranks of a mesh, and which one runs: `method=None` and `plan` ask one function.

The rule: of the methods that can run the call, the one whose slowest rank is ready first; of those within 2 % of it the
first of ring, allgather, ulysses, which is the order of the memory that they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from qkv.call.problem import Options, Problem
from qkv.call.validate import validate
from qkv.checks import integer, shown
from qkv.distributed import telling
from qkv.distributed.balance import balance
from qkv.distributed.costs import Cost, cost, sight_of
from qkv.distributed.machine import Machine, known_of
from qkv.distributed.remembered import remembered
from qkv.distributed.shards import Shards
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.masks import as_mask

CALL = "qkv.distributed.plan()"
METHODS = ("ring", "allgather", "ulysses", "hybrid")
_ALIKE = 0.02
_PIECES = 1 << 14  # of a rank; of more the calls of kernels cost more than what they compute


@dataclass(frozen=True)
class DistributedPlan:
    """What each method costs, and which one runs. `print` it; `method=None` runs what it has chosen.

    A value, equal on all ranks for equal arguments: nothing is measured to make it.
    """

    problem: Problem
    shards: Shards
    key_shards: Shards
    mesh: tuple[int, ...]
    machine: Machine
    asked: str | None = None

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Of each method that can run the call."""
        return {
            name: cost(self.problem, self.shards, self.key_shards, self.mesh, name, self.machine)
            for name in METHODS
            if self.lacking(name) is None
        }

    def lacking(self, method: str) -> str | None:
        """Why a method cannot run the call.

        Parameters
        ----------
        method : str

        Returns
        -------
        str or None
        """
        return lacking(self.problem, self.mesh, method, _few(self.shards))

    @cached_property
    def method(self) -> str:
        """What runs: what was asked for, else the cheapest."""
        if self.asked is not None:
            return self.asked
        quick = {name: found for name, found in self.costs.items() if name not in self._scattered}
        return _first(quick or self.costs, self.problem.needs_grad)

    @cached_property
    def _scattered(self) -> dict[str, str]:
        """Why methods are slow that compute each range of a rank's rows with each range of keys, where there are many.

        Seconds do not say it: they count pairs and rows, and what a piece costs besides depends on the backend."""
        rows, keys = max(map(len, self.shards.ranges)), sum(map(len, self.key_shards.ranges))
        if rows * keys <= _PIECES:
            return {}
        return dict.fromkeys(("ring", "allgather"), f"{rows} ranges of rows by {keys} of keys are as many pieces")

    @property
    def cost(self) -> Cost:
        """Of what runs."""
        return self.costs[self.method]

    @property
    def seconds(self) -> float:
        """Until the slowest rank has its part of the result, and of the gradients, if any are wanted."""
        return self.cost.seconds(self.problem.needs_grad)

    @cached_property
    def alone(self) -> float:
        """The same call on one rank."""
        one = Shards.contiguous(self.problem.Lq, 1), Shards.contiguous(self.problem.Lk, 1)
        return cost(self.problem, *one, (1,), "ring", self.machine).seconds(self.problem.needs_grad)

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """(method, why it does not run) for every other one."""
        return tuple((name, why) for name in METHODS if name != self.method for why in [self._why(name)])

    def _why(self, name: str) -> str:
        if (why := self.lacking(name)) is not None:
            return why
        if self.asked is not None:
            return f"{self.asked!r} was asked for"
        if name in self._scattered:
            return self._scattered[name]
        return telling.compared(self.costs[name], self.cost, self.problem)

    def __str__(self) -> str:
        return "\n".join(telling.lines(self))


def lacking(problem: Problem, mesh: tuple[int, ...], method: str, few: bool = False) -> str | None:
    """Why `plan` does not take a method for a call on a mesh of this shape. `few`: as of `_rowwise`."""
    if (method == "hybrid") != (len(mesh) == 2):
        return "it takes a mesh of two dimensions" if method == "hybrid" else "the mesh has two dimensions"
    if method == "ulysses" and mesh[-1] > problem.Hq:
        return f"it has no work for more ranks than heads: {mesh[-1]} and {problem.Hq}"
    return _rowwise(problem, method, few)


def stays(problem: Problem, method: str, rows: Shards) -> str | None:
    """Why a bias keeps a method from running, as far as this rank's own rows of it say.

    Those of ranks with one row say nothing, so that where all have as few it is not known."""
    return _rowwise(problem, method, max(rows.rows(rank) for rank in range(rows.ranks)) <= 1 < rows.length)


def _rowwise(problem: Problem, method: str, few: bool) -> str | None:
    """`few`: a rank may have no more than one row, whose part of a bias says as little as one for all rows."""
    if method in ("ulysses", "hybrid") and any(
        term.kind == "tensor" and len(term.shape) > 1 and (few or term.shape[-2] != 1) for term in problem.bias
    ):
        return "a bias tensor with a row a query stays with its queries, and ulysses and hybrid move those"
    return None


def _few(rows: Shards) -> bool:
    return min(rows.rows(rank) for rank in range(rows.ranks)) <= 1


def _first(costs: dict[str, Cost], backward: bool) -> str:
    best = min(found.seconds(backward) for found in costs.values())
    return next(name for name, found in costs.items() if found.seconds(backward) <= best * (1 + _ALIKE))


def choose(problem: Problem, rows: Shards, keys: Shards, mesh: Sequence[int], machine: Machine | None = None) -> str:
    """The method that `attention(method=None)` runs.

    Parameters
    ----------
    problem : Problem
        The whole call: Lq and Lk are all queries and keys.
    rows, keys : Shards
    mesh : sequence of int
        Sizes of the mesh's one or two dimensions.
    machine : Machine, optional
        `machine.known(groups)`, or None: then the usual figures of the device.

    Returns
    -------
    str
        One of METHODS. Kept for calls that are alike; the same on all ranks, as long as these make the same call.
    """
    shape = tuple(mesh)
    if len(shape) == 2:
        return "hybrid"
    if shape[0] == 1:
        return "ring"
    alike = replace(problem, call="", scale=1.0, softcap=None, has_sinks=False, dropout_p=0.0)
    return _chosen(alike, rows, keys, shape, machine or Machine.usual(problem.device))


@remembered(16)
def _chosen(problem: Problem, rows: Shards, keys: Shards, mesh: tuple[int, ...], machine: Machine) -> str:
    return DistributedPlan(problem, rows, keys, mesh, machine).method


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    mask: Any = None,
    *,
    mesh: Any,
    shards: Shards | None = None,
    key_shards: Shards | None = None,
    method: str | None = None,
    positions: Any = None,
    bias: Any = None,
    machine: Machine | None = None,
) -> DistributedPlan:
    """Say what `qkv.distributed.attention` would cost by each method, without data, processes or messages.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
        All queries of the sequence; no data is read, so `torch.empty(..., device="meta")` will do. If it requires a
        gradient, the backward pass counts, too.
    k : Tensor, shape (B, Hkv, Lk, D)
        All keys.
    v : Tensor, shape (B, Hkv, Lk, Dv)
        All values; like k unless given.
    mask, positions, bias
        As in `qkv.distributed.attention`.
    mesh : int, (int, int) or DeviceMesh
        How many ranks; of two dimensions, (ring, heads).
    shards, key_shards : Shards
        Who holds which rows; `qkv.distributed.shards(length, mesh, mask)` unless given.
    method : str
        What runs; the cheapest unless given.
    machine : Machine
        Speeds of a rank and of the network. Unless given, what `attention` goes by: those that `Machine.measured` found
        for this DeviceMesh, else those of `Machine.usual`.

    Returns
    -------
    DistributedPlan
        Print it: the method and why each other does not run; for each rank FLOPs, bytes received and sent, memory and
        seconds. The same as fields: method, refused, costs, seconds.

    Raises
    ------
    QKVError
        What `attention` would raise; shards for another length or number of ranks.

    Notes
    -----
    Seconds are predicted from the machine's figures, with what is received overlapped by what is computed meanwhile.
    Cost: milliseconds. Of more than 16 ranks some are looked at, and the plan says which.

    Examples
    --------
    >>> import torch, qkv
    >>> q = torch.empty(1, 32, 1_000_000, 128, device="meta")
    >>> found = qkv.distributed.plan(q, q, q, qkv.sliding_window(4096), mesh=8)
    >>> found.method, max(rank.traffic.received for rank in found.cost.ranks) == 4095 * 32 * 256 * 4
    ('ring', True)
    """
    shape = _shape(mesh)
    q, k, v = (_stand_in(x) for x in (q, k, k if v is None else v))
    problem, _ = validate(CALL, q, k, v, as_mask(mask, CALL), Options(positions, bias))
    ranks = prod(shape)
    shards = shards or _balanced(problem, ranks)
    key_shards = key_shards or (shards if problem.Lk == problem.Lq else Shards.contiguous(problem.Lk, ranks))
    for name, given, length in (("shards", shards, problem.Lq), ("key_shards", key_shards, problem.Lk)):
        if not isinstance(given, Shards) or given.ranks != ranks or given.length != length:
            fix = "Make them with qkv.distributed.shards(length, mesh, mask), or leave them out"
            rule = f"{name} must be Shards of {length} rows on {ranks} ranks"
            raise ArgumentError.of(CALL, rule, shown(given), fix)
    machine = machine or known_of(mesh) or Machine.usual(problem.device)
    return checked(DistributedPlan(problem, shards, key_shards, shape, machine, method))


def _stand_in(x: Any) -> Any:
    """A tensor without data as one that has it, so that masks and positions may have theirs."""
    if not isinstance(x, torch.Tensor) or not x.is_meta:
        return x
    return torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape).requires_grad_(x.requires_grad)


def checked(found: DistributedPlan) -> DistributedPlan:
    """The plan, if its method can run."""
    asked = found.asked
    if asked is None:
        why_not = {name: found.lacking(name) for name in METHODS}
        if all(why_not.values()):
            told = "; ".join(f"{name}: {why}" for name, why in why_not.items())
            rule, fix = (
                "some method must be able to run the call",
                "Use a mesh of one dimension: a ring takes any call",
            )
            raise UnsupportedError.of(CALL, rule, told, fix)
        return found
    if asked not in METHODS:
        raise ArgumentError.of(CALL, f"method must be one of {METHODS}", f"method={shown(asked)}", "Or leave it out")
    if (why := found.lacking(asked)) is not None:
        shape = " x ".join(map(str, found.mesh))
        raise ArgumentError.of(CALL, f"{asked!r} cannot run this call: {why}", f"a mesh of {shape}", "Leave method out")
    return found


def _balanced(problem: Problem, ranks: int) -> Shards:
    if problem.Lq != problem.Lk:
        return Shards.contiguous(problem.Lq, ranks)
    return balance(sight_of(problem), ranks, 0.25).shards


def _shape(mesh: Any) -> tuple[int, ...]:
    """The sizes of a mesh's dimensions."""
    fix = "Pass a number of ranks, (ring, heads), or a DeviceMesh of one or two dimensions"
    if isinstance(mesh, int) and not isinstance(mesh, bool):
        return (integer(CALL, "mesh", mesh, low=1),)
    if not isinstance(mesh, (tuple, list)):
        sizes = getattr(mesh, "shape", None)
        if not isinstance(sizes, tuple):
            raise ArgumentTypeError.of(CALL, "mesh must be sizes or a DeviceMesh", f"mesh={shown(mesh)}", fix)
        mesh = sizes
    if len(mesh) not in (1, 2):
        raise ArgumentError.of(CALL, "a mesh has one dimension, or two for hybrid", f"mesh={shown(mesh)}", fix)
    return tuple(integer(CALL, "mesh", size, low=1) for size in mesh)
