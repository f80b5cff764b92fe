"""One sequence on several processes: python examples/ranks.py, or torchrun --nproc-per-node 4 examples/ranks.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qkv

alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
dist.init_process_group("gloo", **alone)  # "nccl" where tensors are on GPUs
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 8, 1000, 64).unbind(
    0
)  # drawn whole for the comparison below; else each rank makes its rows
mask = qkv.documents([700, 300]) & qkv.causal()
shards = qkv.distributed.shards(1000, mesh, mask=mask)  # who holds which rows, so that all have equal work
mine = [qkv.distributed.shard(x, shards, mesh).requires_grad_() for x in (q, k, v)]

out = qkv.distributed.attention(*mine, mask, mesh=mesh, shards=shards)  # this rank's rows of the result
out.sum().backward()
error = float((qkv.distributed.unshard(out.detach(), shards, mesh) - qkv.attention(q, k, v, mask)).abs().max())
if dist.get_rank() == 0:
    print(f"{mesh.size()} ranks, {shards}: largest difference from one process {error:.1e}")
dist.destroy_process_group()
