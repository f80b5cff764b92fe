"""Drop-ins: the interfaces of other libraries on top of `qkv.attention`.

>>> import torch, qkv.compat
>>> q = k = v = torch.randn(2, 8, 16, 64)
>>> with qkv.compat.patch_sdpa():
...     torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).shape
torch.Size([2, 8, 16, 64])
"""

from __future__ import annotations

from qkv.compat.patch import patch_sdpa
from qkv.compat.scaled_dot_product import sdpa

__all__ = ["patch_sdpa", "sdpa"]
