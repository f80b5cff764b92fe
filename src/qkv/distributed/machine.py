"""What a rank computes and moves in a second: figures that predictions are made from, given or measured.

Predictions are made from one value that is equal on all ranks. `method=None` uses the figures below for the device,
unless `Machine.measured` was asked for the mesh: so what it picks follows from the call alone, and is the same in every
run and on every rank.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from qkv.backends import rates
from qkv.backends.base import Backend
from qkv.backends.tiled.schedule import pairs_of
from qkv.call.problem import Problem
from qkv.checks import shown
from qkv.distributed.transport import Group, groups_of
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.masks.counts import Look

CALL = "qkv.distributed.Machine"
_LETTER = 1 << 23  # bytes of a message that is timed
_TURNS = 7
_COUNTED = 1 << 22  # rows of a call whose tiles are counted


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank.

    Parameters
    ----------
    bandwidth : float
        Bytes a second that a rank receives while it sends as many.
    latency : float
        Seconds until the first byte of a message arrives.
    flops : float
        Floating-point operations a second of attention, forward.
    backward : float, optional
        The same of its gradients; as forward unless given.
    row : float
        Seconds that a row of queries of one head takes besides its pairs, each time that it is computed.
    memory : float, optional
        Bytes a second that a rank reads or writes; where given, copies before and after an all-to-all count.
    """

    bandwidth: float
    latency: float
    flops: float
    backward: float | None = None
    row: float = 0.0
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "backward", "memory", "latency", "row"):
            value, zero = getattr(self, name), name in ("latency", "row")
            if value is None and name in ("backward", "memory"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                fix = (
                    f"Write it in {'seconds' if zero else 'units a second'}, such as {name}={1e-5 if zero else 25e9:g}"
                )
                raise ArgumentTypeError.of(CALL, f"{name} must be a number", f"{name}={shown(value)}", fix)
            if not (0 <= value < float("inf")) or (value == 0 and not zero):
                fix = (
                    f"Write it in {'seconds' if zero else 'units a second'}, such as {name}={1e-5 if zero else 25e9:g}"
                )
                raise ArgumentError.of(CALL, f"{name} must be finite and above 0", f"{name}={value}", fix)

    @classmethod
    def usual(cls, device: str) -> Machine:
        """The figures for a kind of device where nothing else is known.

        A CPU: 100 GFLOP/s, 1 GB/s and 100 µs, as of processes on one machine or a 10 Gbit/s network. Else: 200 TFLOP/s,
        25 GB/s and 20 µs, as of a 200 Gbit/s network.

        Parameters
        ----------
        device : str

        Returns
        -------
        Machine
        """
        return cls(1e9, 1e-4, 1e11) if device in ("cpu", "meta") else cls(25e9, 2e-5, 2e14)

    @classmethod
    def here(cls, problem: Problem, backend: Backend, bandwidth: float, latency: float) -> Machine:
        """The rates of a backend in this process, measured once (0.1 s), with a given network.

        They are for calls like the problem: of tiles that its mask cuts, hidden pairs are computed, too.
        """
        forward, back = (rates.of(backend, problem, backward) for backward in (False, True))
        if forward is None or back is None:
            usual = cls.usual(problem.device)
            return cls(bandwidth, latency, usual.flops)
        pair, gradient = products(problem)
        # What is found of a row over other keys is joined to it: three numbers read, and as many written, for each.
        row = forward.row + 6 * problem.Dv * problem.accumulate.itemsize * forward.byte
        seen = _visible(problem, backend)
        return cls(bandwidth, latency, seen * pair / forward.pair, seen * gradient / back.pair, row, 1 / forward.byte)

    @classmethod
    def measured(cls, mesh: Any, like: Machine | None = None) -> Machine:
        """Bandwidth and latency between neighbours of a mesh, measured; `method=None` uses them from then on.

        Every rank of the mesh calls it. What each found is gathered, and the slowest counts, so all get one value.

        Parameters
        ----------
        mesh : DeviceMesh
        like : Machine, optional
            Whose other figures are taken; the usual ones of the device unless given.

        Returns
        -------
        Machine

        Notes
        -----
        Cost: some messages of 8 MiB to the next rank.
        """
        groups = groups_of("qkv.distributed.Machine.measured()", mesh)
        device = torch.device(mesh.device_type)
        usual = like or cls.usual(device.type)
        found = [_timed(group, device) for group in groups if group.size > 1]
        best = [min((bytes for bytes, _ in found), default=usual.bandwidth), usual.flops]
        best += [float("inf") if x is None else x for x in (usual.backward, usual.memory)]
        worst = [max((seconds for _, seconds in found), default=usual.latency), usual.row]
        figures = torch.tensor([*best, *(-x for x in worst)], dtype=torch.float64, device=device)
        for group in reversed(groups):  # what one dimension agrees on the next one does, and so the whole mesh
            figures = torch.stack(group.gather("agreeing on the speeds of ranks", figures)).min(0).values
        bandwidth, flops, backward, memory, latency, row = figures.tolist()
        unknown = [None if x == float("inf") else x for x in (backward, memory)]
        agreed = cls(bandwidth, -latency, flops, unknown[0], -row, unknown[1])
        _KNOWN[groups[0].process_group] = (tuple(group.size for group in groups), agreed)
        return agreed

    def seconds(self, problem: Problem, pairs: Any, rows: Any, backward: bool = False) -> Any:
        """How long so many pairs take of so many rows, which count each time that they are computed."""
        forward, gradient = products(problem)
        if backward:
            return pairs * (gradient / (self.backward or self.flops)) + rows * (2 * self.row)
        return pairs * (forward / self.flops) + rows * self.row

    def swap(self, bytes: float) -> float:
        """How long an all-to-all takes: what goes is copied together, and what comes into order."""
        return float(self.transfer(bytes)) + (4 * bytes / self.memory if self.memory else 0.0)

    def transfer(self, bytes: Any) -> Any:
        """How long a message takes; nothing is no message."""
        return (bytes > 0) * self.latency + bytes / self.bandwidth


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], Machine]] = weakref.WeakKeyDictionary()


def known(groups: Sequence[Group]) -> Machine | None:
    """What was measured for a mesh."""
    found = _KNOWN.get(groups[0].process_group)
    return found[1] if found is not None and found[0] == tuple(group.size for group in groups) else None


def known_of(mesh: Any) -> Machine | None:
    """The same, of what may be sizes alone."""
    if not isinstance(mesh, DeviceMesh) or mesh.get_coordinate() is None:
        return None
    return known(groups_of(CALL, mesh))


def _visible(problem: Problem, backend: Backend) -> float:
    """The part of the pairs that a backend computes which is visible, where that is known."""
    if problem.mask is None or problem.positions == "tensor" or problem.Lq > _COUNTED:
        return 1.0
    found, computed = pairs_of(problem, None, Look(0)), backend.visited(problem, None)
    return found.least / computed if found.exact and found.least else 1.0


def products(problem: Problem) -> tuple[int, int]:
    """Operations for each pair: two products forward, five for the gradients."""
    return 2 * (problem.D + problem.Dv), 2 * (3 * problem.D + 2 * problem.Dv)


def _timed(group: Group, device: torch.device) -> tuple[float, float]:
    """Bytes a second and seconds a message between neighbours, the slowest of a group's."""
    taken = {}
    for size in (8, _LETTER):
        out, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        times = []
        for _ in range(_TURNS):
            group.gather("timing messages", torch.zeros(1, dtype=torch.uint8, device=device))
            start = time.perf_counter()
            group.exchange("timing messages", [(source, back)], [(to, out)]).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        taken[size] = median(times)
    return (_LETTER - 8) / max(taken[_LETTER] - taken[8], 1e-9), taken[8]
