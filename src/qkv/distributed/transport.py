"""Messages between the ranks of a process group: sent and awaited in one order, with errors that say who is missing.

All waiting is torch.distributed's own, and so is its timeout: that of the process group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qkv.errors import ArgumentError, ArgumentTypeError, RankError, UnsupportedError


@dataclass(eq=False)
class Traffic:
    """Bytes that this rank has sent to others and received from them, and messages; without the few that agree."""

    sent: int = 0
    received: int = 0
    messages: int = 0


_COUNTERS: list[Traffic] = []
_MET: weakref.WeakKeyDictionary[Any, set[torch.device]] = weakref.WeakKeyDictionary()


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What this process sends and receives inside of the block: for tests and measurements."""
    counter = Traffic()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def _count(sent: int, received: int, messages: int) -> None:
    for counter in _COUNTERS:
        counter.sent += sent
        counter.received += received
        counter.messages += messages


@dataclass(eq=False)
class Group:
    """The ranks of one dimension of a mesh."""

    call: str
    process_group: Any
    rank: int
    size: int
    number: int = 0
    """Of the call among those that its ranks have agreed on, by which they know its backward pass; 0: of none."""
    mesh: tuple[Group, ...] = ()
    """Those of both dimensions, of a call that has a number over a grid."""

    @property
    def device(self) -> torch.device:
        """Where numbers go that ranks have to look at: the CPU, if the group carries its tensors."""
        carries = devices_of(self)
        return torch.device("cpu") if "cpu" in carries else torch.device("cuda", torch.cuda.current_device())

    @property
    def waits(self) -> bool:
        """Whether looking at what was received waits for a GPU."""
        return self.device.type != "cpu"

    def connect(self, device: torch.device) -> None:
        """All ranks meet once on a device: NCCL leaves open what a first message does that not all take part in."""
        if device.type == "cpu" or self.size == 1:
            return
        met = _MET.setdefault(self.process_group, set())
        if device not in met:
            self.gather("connecting", torch.zeros(1, dtype=torch.uint8, device=device), counted=False)
            met.add(device)

    def exchange(
        self,
        what: str,
        arrivals: Sequence[tuple[int, Tensor]],
        departures: Sequence[tuple[int, Tensor]],
        tag: int = 0,
        counted: bool = True,
    ) -> Pending:
        """Begin to receive into tensors, and to send others, each with its rank; what is empty is no message.

        Messages of one tag between two ranks arrive in the order in which they were sent; NCCL knows no tags, and there
        all do."""
        operations, names, sent, received = [], [], 0, 0
        for other, x in departures:
            if x.numel():
                operations.append(
                    dist.P2POp(dist.isend, _bytes(x), group=self.process_group, group_peer=other, tag=tag)
                )
                names.append(f"send to rank {other}")
                sent += x.nbytes
        for other, x in arrivals:
            if x.numel():
                operations.append(
                    dist.P2POp(dist.irecv, _bytes(x), group=self.process_group, group_peer=other, tag=tag)
                )
                names.append(f"receive from rank {other}")
                received += x.nbytes
        if counted:
            _count(sent, received, len(operations))
        keep = [x for _, x in (*arrivals, *departures)]
        if not operations:
            return Pending(self, what, [], [], keep)
        works = self.attempt(what, ", ".join(names), lambda: dist.batch_isend_irecv(operations))
        # NCCL makes one work of all.
        return Pending(self, what, works, names if len(works) == len(names) else [", ".join(names)] * len(works), keep)

    def gather(self, what: str, x: Tensor, counted: bool = True) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; all have one shape and dtype."""
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        if self.size == 1:
            return [x]
        flat = [_bytes(t) for t in found]
        self.attempt(what, "gather", lambda: dist.all_gather(flat, _bytes(x), group=self.process_group))
        if counted:
            _count(x.nbytes * (self.size - 1), x.nbytes * (self.size - 1), 1)
        return found

    def swap(self, what: str, parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """All to all: `parts` go to the ranks in order, and of each comes a tensor of the given size."""
        like = parts[0]
        sent = torch.cat([_bytes(x.contiguous()) for x in parts])
        counts = [_number(size) * like.element_size() for size in sizes]
        got = torch.empty(sum(counts), dtype=torch.uint8, device=like.device)
        if self.size == 1:
            got = sent
        else:
            self.attempt(
                what, "all-to-all",
                lambda: dist.all_to_all_single(got, sent, counts, [x.nbytes for x in parts], group=self.process_group),
            )  # fmt: skip
        _count(sent.numel() - parts[self.rank].nbytes, got.numel() - counts[self.rank], 1)
        return [part.view(like.dtype).view(tuple(size)) for part, size in zip(got.split(counts), sizes, strict=True)]

    def attempt(self, what: str, doing: str, operation: Callable[[], Any]) -> Any:
        """The result of an operation of torch.distributed, whose errors become ours."""
        try:
            return operation()
        except RuntimeError as error:
            raise self.failed(what, doing, error) from error

    def failed(self, what: str, doing: str, error: Exception) -> RankError:
        told = str(error).strip().split("\n", 1)[0].split("] ", 1)[-1][:200]
        rule = f"rank {self.rank} of {self.size} could not finish {what}"
        fix = (
            "A rank has died, makes other calls than the others, or took longer than the group's timeout: see what it "
            "printed last; init_process_group(timeout=) sets the timeout. The group cannot be used any more"
        )
        return RankError.of(self.call, rule, f"'{told}' at: {doing}", fix)


@dataclass(eq=False)
class Pending:
    """Messages on their way."""

    group: Group
    what: str
    works: list[Any]
    names: list[str]
    keep: list[Tensor]  # what is sent may not be given back before it has left

    def wait(self) -> None:
        """Until all have arrived, and left; at most the group's timeout."""
        for work, name in zip(self.works, self.names, strict=True):
            self.group.attempt(self.what, name, work.wait)
        self.works, self.names, self.keep = [], [], []

    def leave(self) -> None:
        """The same after an error, which counts more than those that come up here: memory may not be written later, and
        what others wait for has to reach them."""
        for work in self.works:
            with suppress(RuntimeError):
                work.wait()
        self.works, self.names, self.keep = [], [], []


def groups_of(call: str, mesh: Any) -> tuple[Group, ...]:
    """One group a dimension of the mesh."""
    if not isinstance(mesh, DeviceMesh):
        fix = "Pass torch.distributed.device_mesh.init_device_mesh('cpu', (ranks,)), or a dimension of a larger mesh"
        raise ArgumentTypeError.of(call, "mesh must be a DeviceMesh", f"mesh={type(mesh).__name__}", fix)
    if mesh.ndim not in (1, 2):
        fix = "Take one or two of its dimensions: mesh['ring', 'heads']"
        raise ArgumentError.of(call, "a mesh has one dimension, or two for hybrid", f"{mesh.ndim} dimensions", fix)
    if mesh.get_coordinate() is None:
        fix = "Call it on the ranks of the mesh alone"
        raise ArgumentError.of(
            call, "only ranks of the mesh take part", f"rank {dist.get_rank()} outside of {mesh}", fix
        )
    return tuple(Group(call, mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim)) for dim in range(mesh.ndim))


def devices_of(group: Group) -> list[str]:
    """The types of devices whose tensors a group carries, such as of "cpu:gloo,cuda:nccl"."""
    parts = [part.split(":") for part in dist.get_backend_config(group.process_group).split(",")]
    # gloo is registered for GPUs, too, whose tensors it does not send to one rank.
    return [device for device, *backend in parts if device == "cpu" or backend != ["gloo"]]


def check_device(call: str, group: Group, x: Tensor) -> None:
    """Raise unless the group can move tensors of x's device."""
    carries = devices_of(group)
    if x.device.type not in carries:
        rule = f"the mesh's process group must carry {x.device.type} tensors"
        fix = "Use gloo for the CPU, nccl for CUDA, or init_process_group('cpu:gloo,cuda:nccl')"
        raise UnsupportedError.of(call, rule, f"a group for {' and '.join(carries)} tensors", fix)


def _bytes(x: Tensor) -> Tensor:
    """The tensor's memory as bytes: what is moved needs no dtype, and gloo does not know all."""
    return x.view(-1).view(torch.uint8)


def _number(size: Sequence[int]) -> int:
    n = 1
    for x in size:
        n *= x
    return n
