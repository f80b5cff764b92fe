"""Attention over sequences that several processes hold together: context parallel on torch.distributed."""

from qkv.distributed.shards import Shards as Shards

__all__ = ["Shards"]
