"""Nothing but qkv.distributed and runs of several ranks needs torch.distributed's larger parts."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

class Absent:  # as where torch was built without them
    def find_spec(self, name, path=None, target=None):
        heavy = ("tensor", "fsdp", "checkpoint")
        if name.startswith(tuple("torch.distributed." + part for part in heavy)):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch
import qkv, qkv.cache, qkv.nn, qkv.lm, qkv.rotary, qkv.compat, qkv.insight, qkv.cli.train, qkv.lm.parts
layer = qkv.nn.Attention(16, 2, qk_norm=True, sinks=True)
latent = qkv.nn.LatentAttention(16, 2, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2,
                                v_head_dim=4)
sparse = qkv.nn.SparseAttention(16, 2, block=2, stride=2, selected_block=2, top_k=3, window=2)
for one in (layer, latent, sparse):
    one(torch.randn(1, 5, 16)).sum().backward()
print([name for name in sys.modules if name.startswith("qkv.distributed")])
"""


def test_layers_and_training_work_without_distributed_tensors() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
