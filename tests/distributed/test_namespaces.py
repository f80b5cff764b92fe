"""Ranks in two network namespaces, which reach each other by a cable alone: the same bits as on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import qkv
from qkv.distributed import Shards
from tests.distributed.test_faults import L, pass_both
from tests.kit import namespaces, skips
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_two_networks(ranks: int, tmp_path: Path) -> None:
    with namespaces.joined() as places:
        if places is None:
            pytest.skip(skips.NO_NAMESPACES)
        running = []
        for rank in range(ranks):
            at = rank * 2 // ranks
            command = [*places[at], sys.executable, "-m", __name__, str(rank), str(ranks), str(tmp_path)]
            environment = os.environ | {
                "GLOO_SOCKET_IFNAME": namespaces.CABLES[at], "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            }  # fmt: skip
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=120)[1] for process in running]
        assert [process.returncode for process in running] == [0] * ranks, said
    known = on_ranks(ranks, pass_both, Shards.zigzag(L, ranks), qkv.causal())
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, known[rank], strict=True))


def main(rank: int, ranks: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (ranks,))
    torch.save(pass_both(mesh, Shards.zigzag(L, ranks), qkv.causal()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
