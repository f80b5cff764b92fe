"""Predicted and measured: calls of qkv.distributed on local processes, beside what `qkv.distributed.plan` says of them.

    python benchmarks/distributed_plan.py [--ranks 2,4] [--turns 7] [--json FILE]

Every rank has one thread. Figures are those of this machine: a rank computes as `qkv.plan` predicts of one thread,
divided where ranks share processors, and bandwidth and latency are measured between neighbours (`Machine.measured`).
Methods take turns; of each the least time counts, for what else the machine does only adds, and a call is as slow as
its slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qkv
from qkv.distributed import Machine, attention, plan, shard, shards
from qkv.plans import choose

HEADS, D = 8, 128
CASES: dict[str, tuple[int, Any]] = {
    "causal 4k": (4096, qkv.causal()),
    "full 2k": (2048, None),
    "window 256 of 8k": (8192, qkv.sliding_window(256)),
    "documents of 6k": (6144, qkv.documents([2048, 256, 1536, 512, 1792]) & qkv.causal()),
}
METHODS = ("ring", "allgather", "ulysses")


def measured(mesh: Any, length: int, mask: Any, turns: int) -> list[dict[str, Any]]:
    """One case on this rank: of each method the seconds of both directions, predicted and measured."""
    held = shards(length, mesh, mask)
    whole = [torch.randn(1, HEADS, length, D, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    q, k, v = (shard(x, held, mesh).requires_grad_() for x in whole)
    one = torch.empty(1, HEADS, length, D, device="meta", requires_grad=True)
    machine = speeds(mesh, plan(one, one, one, mask, mesh=mesh).problem)
    predicted = plan(one, one, one, mask, mesh=mesh, shards=held, machine=machine)
    taken: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for turn in range(turns + 1):
        for method in METHODS:
            times = both(mesh, q, k, v, mask, held, method)
            if turn:  # the first prepares
                taken[method].append(times)
    rows = []
    for method in METHODS:
        cost = predicted.costs[method]
        rank = cost.ranks[mesh.get_local_rank()]
        rows.append({
            "method": method, "chosen": predicted.method,
            "forward": min(a for a, _ in taken[method]), "backward": min(b for _, b in taken[method]),
            "predicted_forward": rank.forward.seconds, "predicted_backward": rank.backward.seconds,
            "received": rank.traffic.received + rank.traffic.back_received,
            "flops": machine.flops, "bandwidth": machine.bandwidth, "latency": machine.latency,
        })  # fmt: skip
    return rows


def both(mesh: Any, q: Any, k: Any, v: Any, mask: Any, held: Any, method: str) -> tuple[float, float]:
    """Seconds forward, and of the gradients."""
    dist.barrier()
    start = time.perf_counter()
    out = attention(q, k, v, mask, mesh=mesh, shards=held, method=method)
    forward = time.perf_counter() - start
    seed = torch.ones_like(out)
    dist.barrier()
    start = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), seed)
    return forward, time.perf_counter() - start


def speeds(mesh: Any, problem: Any) -> Machine:
    """What a rank computes and moves here, with as many ranks as there are."""
    alone = choose(problem, None).chosen
    here = Machine.here(problem, alone, 1e9, 1e-4)
    share = min(1.0, (os.cpu_count() or 1) / mesh.size())
    backward = (here.backward or here.flops) * share
    return Machine.measured(mesh, replace(here, flops=here.flops * share, backward=backward, row=here.row / share))


def serve(rank: int, ranks: int, store: str, turns: int, queue: Any) -> None:
    """One rank of all cases."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    mesh = init_device_mesh("cpu", (ranks,))
    for name, (length, mask) in CASES.items():
        for row in measured(mesh, length, mask, turns):
            every: list[Any] = [None] * ranks
            dist.all_gather_object(every, row)
            if rank == 0:
                worst = {key: max(one[key] for one in every) for key in row if isinstance(row[key], float)}
                queue.put({"case": name, "ranks": ranks, **row, **worst})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    head = f"{'forward ms':>11}{'said':>9}{'ratio':>7}{'backward ms':>13}{'said':>9}{'ratio':>7}"
    print(f"{'case':<20}{'ranks':>6}  {'method':<10}{head}")
    context, rows = torch.multiprocessing.get_context("spawn"), []
    for ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            queue = context.SimpleQueue()
            given = (ranks, os.path.join(folder, "store"), args.turns, queue)
            running = torch.multiprocessing.start_processes(serve, given, ranks, join=False, start_method="spawn")
            while not running.join(timeout=0.2):
                while not queue.empty():
                    rows.append(queue.get())
                    print(told(rows[-1]), flush=True)
            while not queue.empty():
                rows.append(queue.get())
                print(told(rows[-1]), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def told(row: dict[str, Any]) -> str:
    said = f"{row['case']:<20}{row['ranks']:>6}  {row['method']:<10}"
    for way, width in (("forward", 11), ("backward", 13)):
        real, guess = row[way], row[f"predicted_{way}"]
        said += f"{1e3 * real:>{width}.1f}{1e3 * guess:>9.1f}{guess / real:>7.2f}"
    return said + ("  chosen" if row["method"] == row["chosen"] else "")


if __name__ == "__main__":
    main()
