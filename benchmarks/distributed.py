"""Ranks beside one process: forward and backward of causal attention, timed in turn, after all agree on the result.

    python benchmarks/distributed.py 16384                       # two ranks of one thread, one process of two
    python benchmarks/distributed.py 32768 --only ring,ring-silent
    python benchmarks/distributed.py --memory 1000000            # a window of 1,024: peaks of one process, of 4 ranks

Ranks are pinned to a processor each. `ring-silent` sends nothing and computes the same with zeros: what it is faster by
is what messages cost beside the work. `gather+sdpa` is what one would write with PyTorch alone: all keys on every rank,
and scaled_dot_product_attention on each of the rank's two ranges with a bool mask. `context_parallel` is PyTorch's own,
or the error that it ends with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import qkv
from qkv.distributed import Shards, attention
from qkv.distributed.transport import Group, Pending

HEADS, DIM, WINDOW = 8, 128, 1024
WAYS = ("ring", "ring-silent", "allgather", "ulysses", "gather+sdpa", "context_parallel")


def drawn(length: int) -> list[Tensor]:
    """q, k, v and the gradient of the output: the same in every process."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=g) for _ in range(4)]


def timed(forward: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> tuple[float, float, list[float]]:
    """Seconds forward and backward, and sums that say what came out."""
    begin = time.perf_counter()
    out = forward()
    between = time.perf_counter()
    grads = torch.autograd.grad(out, leaves, d_out)
    end = time.perf_counter()
    return between - begin, end - between, [float(x.detach().double().abs().sum()) for x in (out, *grads)]


def alone(pipe: Connection, length: int, threads: int) -> None:
    """One process with all threads."""
    torch.set_num_threads(threads)
    q, k, v, d_out = drawn(length)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    while pipe.recv() != "end":
        pipe.send(timed(lambda: qkv.attention(q, k, v, qkv.causal()), leaves, d_out))


class Gathered(torch.autograd.Function):
    """All rows on every rank, in order; gradients go back to who holds the rows."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, x: Tensor) -> Tensor:
        ctx.shards = shards
        parts = [torch.empty_like(x) for _ in range(shards.ranks)]
        dist.all_gather(parts, x.contiguous())
        return shards.put(parts)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        parts = torch.stack([ctx.shards.take(d, rank) for rank in range(ctx.shards.ranks)])
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts)
        return None, got.sum(0)


_exchange = Group.exchange


def silent(group: Group, what: str, arrivals: Any, departures: Any, tag: int = 0, counted: bool = True) -> Pending:
    """`Group.exchange` without messages, but for the few by which ranks agree."""
    if not counted:
        return _exchange(group, what, arrivals, departures, tag, counted)
    for _, x in arrivals:
        x.zero_()
    return Pending(group, what, [], [], [])


class Rank:
    """One rank, and the ways in which it can compute."""

    def __init__(self, rank: int, ranks: int, length: int, store: str) -> None:
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        self.mesh, self.shards, self.rank = init_device_mesh("cpu", (ranks,)), Shards.zigzag(length, ranks), rank
        q, k, v, self.d_out = (self.shards.take(x, rank).contiguous() for x in drawn(length))
        self.leaves = [x.requires_grad_() for x in (q, k, v)]
        self.length, self.masks = length, dict[tuple[int, int], Tensor]()

    def measure(self, way: str) -> tuple[float, float, list[float]]:
        if way == "context_parallel":
            return self.context_parallel()
        if way == "gather+sdpa":
            return timed(self.gather, self.leaves, self.d_out)
        if way == "ring-silent":
            Group.exchange = silent  # type: ignore[method-assign, assignment]
        try:
            method = way.removesuffix("-silent")
            return timed(
                lambda: attention(*self.leaves, qkv.causal(), mesh=self.mesh, shards=self.shards, method=method),
                self.leaves, self.d_out,
            )  # fmt: skip
        finally:
            Group.exchange = _exchange  # type: ignore[method-assign]

    def gather(self) -> Tensor:
        q, k, v = self.leaves
        k, v = Gathered.apply(self.shards, k), Gathered.apply(self.shards, v)
        parts, at = [], 0
        for a, b in self.shards.ranges[self.rank]:
            mask = self.masks.setdefault((a, b), torch.arange(b)[None] <= torch.arange(a, b)[:, None])
            rows = q[:, :, at : at + b - a]
            parts.append(functional.scaled_dot_product_attention(rows, k[:, :, :b], v[:, :, :b], attn_mask=mask))
            at += b - a
        return torch.cat(parts, 2)

    def context_parallel(self) -> tuple[float, float, list[float]]:
        from torch.distributed.tensor.experimental import context_parallel

        buffers = drawn(self.length)
        with context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[2] * 4, no_restore_buffers=set(buffers)):
            leaves = [x.clone().requires_grad_() for x in buffers[:3]]
            return timed(lambda: functional.scaled_dot_product_attention(*leaves, is_causal=True), leaves, buffers[3])


def ranked(pipe: Connection, rank: int, ranks: int, length: int, store: str) -> None:
    own = Rank(rank, ranks, length, store)
    while (way := pipe.recv()) != "end":
        dist.barrier()
        try:
            pipe.send(own.measure(way))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    os._exit(0)


def peak() -> float:
    """MiB that were in memory at once since the last time that this was reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def held(pipe: Connection, rank: int, ranks: int, length: int, store: str) -> None:
    """The peak of a windowed forward pass, tensors and all, beyond what there was after init_process_group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh, shards = init_device_mesh("cpu", (ranks,)), Shards.contiguous(length, ranks)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before, g = peak(), torch.Generator().manual_seed(rank)
    q, k, v = (torch.empty(1, HEADS, shards.rows(rank), DIM) for _ in range(3))
    for x in (q, k, v):
        for head in x[0]:
            head.normal_(generator=g)
    mask = qkv.sliding_window(WINDOW)
    out = qkv.attention(q, k, v, mask) if ranks == 1 else attention(q, k, v, mask, mesh=mesh, shards=shards)
    pipe.send((peak() - before, out.shape[2]))


def started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    mine, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that one that ends is noticed
    return process, mine


def memory(length: int) -> None:
    peaks = {}
    for ranks in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            running = [started(held, rank, ranks, length, f"{folder}/store") for rank in range(ranks)]
            peaks[ranks] = max(pipe.recv()[0] for _, pipe in running)
            for process, _ in running:
                process.join()
        print(f"{ranks} process{'es' * (ranks > 1)}: the largest peak is {peaks[ranks]:,.0f} MiB", flush=True)
    print(
        f"{length:,} rows, window {WINDOW}: one process holds {peaks[1] / peaks[4]:.2f} times as much as a rank of four"
    )


def race(length: int, ranks: int, rounds: int, ways: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = started(alone, length, ranks)
        others = [started(ranked, rank, ranks, length, f"{folder}/store") for rank in range(ranks)]

        def ask(way: str) -> Any:
            if way == "one process":
                whole[1].send("go")
                return whole[1].recv()
            for _, pipe in others:
                pipe.send(way)
            found = [pipe.recv() for _, pipe in others]
            if any(isinstance(x, str) for x in found):
                return next(x for x in found if isinstance(x, str))
            sums = [sum(x) for x in zip(*(x[2] for x in found), strict=True)]
            return max(x[0] for x in found), max(x[1] for x in found), sums

        known = ask("one process")[2]
        runs = ["one process"]
        for way in ways:  # the first time of each: does it give the same?
            found = ask(way)
            if isinstance(found, str):
                print(f"{way}: {found}")
                continue
            wrong = max(abs(a - b) / b for a, b in zip(found[2], known, strict=True))
            if wrong > 1e-5 and way != "ring-silent":
                print(f"{way}: not the same result (sums differ by {wrong:.1e}), not ranked")
                continue
            runs.append(way)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in runs}
        for _ in range(rounds):
            for way in runs:
                times[way].append(ask(way)[:2])
        whole[1].send("end")
        for _, pipe in others:
            pipe.send("end")
        base = statistics.median(sum(x) for x in times["one process"])
        print(f"{HEADS} heads, D = {DIM}, float32, causal, {length:,} rows, {ranks} ranks, median of {rounds}")
        for way in runs:
            forward, backward = (statistics.median(x[n] for x in times[way]) for n in range(2))
            both = statistics.median(sum(x) for x in times[way])
            print(f"{way:<17}forward {forward:7.3f} s  backward {backward:7.3f} s  {base / both:.3f} of one process")
        for process, _ in (whole, *others):
            process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("length", type=int, nargs="?", default=16384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--memory", type=int, metavar="ROWS")
    args = parser.parse_args()
    if args.memory:
        memory(args.memory)
    else:
        race(args.length, args.ranks, args.rounds, args.only.split(","))
