"""What a type checker knows of the library: a user's program under mypy --strict, and the names that dir() lists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import qkv

# Parts of PyTorch that no signature of ours names: without them a first run takes 5 seconds and not 15.
SKIPPED = """
torch._inductor torch._dynamo torch.fx torch.distributed torch._functorch torch.onnx torch.export torch._export torch.ao
torch._prims torch._refs torch._decomp torch.profiler torch.testing torch.jit torch._higher_order_ops torch.cuda
torch.distributions torch.optim torch.utils._sympy sympy numpy
"""

PROGRAM = """
import torch
import qkv

q = torch.randn(1, 4, 8, 16)
reveal_type(qkv.attention(q, q, q))  # torch._tensor.Tensor
reveal_type(qkv.attention(q, q, q, mask=qkv.causal() & qkv.documents([3, 5])))  # torch._tensor.Tensor
reveal_type(qkv.attention(q, q, q, return_lse=True).lse)  # torch._tensor.Tensor
reveal_type(qkv.plan(q, q, q).backend)  # str
reveal_type(qkv.weights(q, q, rows=[1]))  # torch._tensor.Tensor

layer = qkv.nn.Attention(64, 4, rotary=qkv.rotary.Rotary(16), mask=qkv.causal())
reveal_type(layer)  # qkv.nn.attention.Attention
reveal_type(layer.forward(torch.randn(1, 8, 64)))  # torch._tensor.Tensor
reveal_type(layer.rotary)  # qkv.rotary.Rotary | None
reveal_type(qkv.nn.MultiheadAttention(64, 4))  # qkv.nn.multihead.MultiheadAttention

cache = qkv.cache.PagedCache(pages=4, num_kv_heads=4, head_dim=16)
reveal_type(cache)  # qkv.cache.paged.PagedCache
seq = cache.add()
reveal_type(seq)  # qkv.cache.sequence.Sequence
reveal_type(cache.view([seq]))  # qkv.call.keys.KVView
reveal_type(qkv.attention(q, cache.view([seq])))  # torch._tensor.Tensor
reveal_type(cache.step([seq], T=1).layer(0))  # qkv.call.keys.LayerCache
reveal_type(cache.stats())  # qkv.cache.stats.Stats

reveal_type(qkv.compat.sdpa(q, q, q, is_causal=True))  # torch._tensor.Tensor
reveal_type(qkv.why("scale"))  # qkv.insight.answer.Answer
reveal_type(qkv.rotary.Rotary(8).rotate(q))  # torch._tensor.Tensor

qkv.atention(q, q, q)  # E: Module has no attribute "atention"
qkv.nn.Atention(64, 4)  # E: Module has no attribute "Atention"
qkv.nn.Attention(64, heads=4)  # E: Unexpected keyword argument "heads"
qkv.attention(q, q, q, scale="large")  # E: No overload variant
qkv.causal() and qkv.prefix(3)  # fine for a checker, and a TypeError as it runs
"""


def test_a_users_program(tmp_path: Path) -> None:
    """Each line's comment says the type that is revealed, or the error that is found; no other line has one."""
    program, settings = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM)
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in SKIPPED.split())
    settings.write_text(f"[mypy]\nstrict = True\n{skipped}")
    source = Path(qkv.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path, program]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(source)}, check=False
    )
    found: dict[int, str] = {}
    for line in ran.stdout.splitlines():
        if told := re.match(r".*program\.py:(\d+): (error|note): (.*)", line):
            number, kind, text = int(told[1]), told[2], told[3]
            if kind == "error" or text.startswith("Revealed"):
                found[number] = text
    assert found, ran.stdout + ran.stderr
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        code, _, wanted = line.partition("  # ")
        got = found.pop(number, None)
        if code.startswith("reveal_type"):
            assert got is not None, f"{code}: nothing"
            shown = got.split('"')[1]
            assert shown == wanted or (shown.startswith("tuple[") and shown.endswith(f"fallback={wanted}]")), code
        elif wanted.startswith("E: "):
            assert got is not None, f"{code}: not found"
            assert wanted[3:] in got, code
    assert not found, ran.stdout


def test_dir_lists_what_users_write() -> None:
    """No imported helper, no internal module; `from qkv import *` gives the same."""
    listed = set(dir(qkv))
    assert listed == {*qkv.__all__, "__version__"}
    assert {"attention", "nn", "cache", "rotary", "compat", "why", "causal", "Mask"} <= set(qkv.__all__)
    for name in qkv.__all__:
        assert not name.startswith("_")
        assert getattr(qkv, name).__doc__, name
    assert qkv.__all__ == sorted(qkv.__all__)
    star: dict[str, object] = {}
    exec("from qkv import *", star)
    assert all(star[name] is getattr(qkv, name) for name in qkv.__all__)
    assert dir(qkv.nn) == qkv.nn.__all__
