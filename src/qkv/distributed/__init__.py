"""Attention over sequences that several processes hold together: context parallel on torch.distributed."""

from qkv.distributed.balance import shards as shards
from qkv.distributed.shards import Shards as Shards

__all__ = ["Shards", "shards"]
