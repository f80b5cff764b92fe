"""What `qkv train` is made of: the text, the loop, the checkpoints, the ablations and the comparison with PyTorch."""

from __future__ import annotations
