"""Pools of processes that are the ranks of a gloo world: started once a run, and asked as often as tests like.

`on_ranks(n, function, *args)` runs `function(mesh, *args)` on n of them and returns what each returned. The function
has to be found by its module's name, and what it is given and returns goes by pickle. A pool in which something failed
is thrown away: what its ranks wait for would reach the next test.

There is a pool for each number of ranks, and all of its processes answer each time: torch names a new group by how many
a process has made, and ranks of which some had made more would wait for each other.

Tests that use it carry `pytestmark = pytest.mark.xdist_group("ranks")`, so that the same pools serve all of them.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

MOST = 4
TIMEOUT = 30.0  # seconds of the process groups, and of what a test may take on top


class RanksFailed(AssertionError):
    """What happened on the ranks, each with its traceback."""


class _Pool:
    """Ranks 0 .. n - 1 of one world."""

    def __init__(self, ranks: int, timeout: float = TIMEOUT, run: Callable[..., None] | None = None) -> None:
        context, self.timeout = get_context("spawn"), timeout
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            store = os.path.join(self.folder.name, "store")
            process = context.Process(target=run or _serve, args=(theirs, rank, ranks, store, timeout), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def ask(self, n: int, function: Callable[..., Any], args: tuple[Any, ...], lost: Sequence[int] = ()) -> list[Any]:
        for pipe in self.pipes[:n]:
            pipe.send((function, args))
        found: dict[int, Any] = {}
        said: dict[int, str] = {}
        left = dict(zip(self.pipes[:n], range(n), strict=True))
        while left:
            ready = wait(list(left), self.timeout + 60)
            if not ready:
                said |= dict.fromkeys(left.values(), "no answer: it hangs")
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = left.pop(pipe)
                try:
                    fine, value = pipe.recv()
                except (EOFError, OSError):
                    self.processes[rank].join(10)
                    fine, value = rank in lost, f"the process ended with {self.processes[rank].exitcode}"
                    value = None if fine else value
                (found if fine else said)[rank] = value
        if said:
            self.stop()
            raise RanksFailed("\n".join(f"rank {rank} of {n}: {text}" for rank, text in sorted(said.items())))
        return [found[rank] for rank in range(n)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


_pools: dict[int, _Pool] = {}


def on_ranks(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(mesh, *args)` returns on each of n ranks of a 1-D mesh."""
    assert 1 <= n <= MOST
    if n not in _pools:
        if not _pools:
            atexit.register(_end)
        _pools[n] = _Pool(n)
    try:
        return _pools[n].ask(n, function, args)
    except BaseException:
        _pools.pop(n).stop()
        raise


def on_own_ranks(
    n: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    lost: Sequence[int] = (),
    backend: str | None = "gloo",
) -> list[Any]:
    """The same on processes of their own, for functions that end or stop one, with a timeout of their groups.

    `lost`: the ranks whose processes may end; they return None. `backend`: what init_process_group is given."""
    pool = _Pool(n, timeout, partial(_serve, backend=backend))
    try:
        return pool.ask(n, function, args, lost)
    finally:
        pool.stop()


def _end() -> None:
    while _pools:
        _pools.popitem()[1].stop()


def _serve(pipe: Connection, rank: int, ranks: int, store: str, timeout: float, backend: str | None = "gloo") -> None:
    """One rank, until the pipe closes."""
    import warnings

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    warnings.simplefilter("error")
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = (True, function(mesh, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:  # who asked is gone
            return
        except Exception:
            pipe.send((False, traceback.format_exc()))
