"""Attention over sequences that several processes hold together: context parallel on torch.distributed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkv.distributed.balance import shards as shards
from qkv.distributed.cache import ShardedCache as ShardedCache, ShardedStats as ShardedStats
from qkv.distributed.functional import attention as attention
from qkv.distributed.machine import Machine as Machine
from qkv.distributed.planning import DistributedPlan as DistributedPlan, plan as plan
from qkv.distributed.rows import shard as shard, unshard as unshard
from qkv.distributed.shards import Shards as Shards
from qkv.distributed.views import ShardedView as ShardedView

if TYPE_CHECKING:
    from qkv.distributed.context import Context as Context
    from qkv.distributed.tensor_parallel import HeadParallel as HeadParallel
    from qkv.nn.divided import key_heads as key_heads

__all__ = [
    "Context",
    "DistributedPlan",
    "HeadParallel",
    "Machine",
    "ShardedCache",
    "ShardedStats",
    "ShardedView",
    "Shards",
    "attention",
    "key_heads",
    "plan",
    "shard",
    "shards",
    "unshard",
]

# What is made of layers loads on first use, and so do DTensors.
_LAZY = {
    "Context": "qkv.distributed.context",
    "HeadParallel": "qkv.distributed.tensor_parallel",
    "key_heads": "qkv.nn.divided",
}


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(import_module(_LAZY[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'qkv.distributed' has no attribute {name!r}")
