"""Masked means unread: whatever lies where nothing may read, the bits of every result stay the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import qkv
from tests.gates.calls import run
from tests.kit import backends, skips
from tests.kit.bits import exact
from tests.kit.cases import Config
from tests.kit.inputs import Inputs, materialise

DTYPES = ("f32", "bf16", "f16", "f64")
POISONS = ("nan", "inf", "huge", "magnet")
pytestmark = pytest.mark.usefixtures("one_thread")
PROMISING = backends.promising()

_SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 19, "Lk": 70, "D": 16, "Dv": 24, "positions": ("end",)}
_STRIDED = {"q": "padded", "k": "step_rows", "v": "padded", "dout": "step_dim", "mask": "step_dim"}
_rng = np.random.default_rng(5)
_half = _rng.random((2, 4, 19, 70)) < 0.1
_half[:, :, :, 20:44] = False

CONFIGS = {
    "causal": Config(**_SIZES | {"Lk": 40, "positions": ("start",)}, mask=("causal",)),
    "window": Config(**_SIZES, mask=("window", 9, 2)),
    "sliding window": Config(**_SIZES | {"Lq": 1, "Lk": 600, "B": 1}, mask=("sliding_window", 90)),
    "prefix": Config(**_SIZES, mask=("prefix", (5, 0))),
    "padding": Config(**_SIZES, mask=("padding", (70, 33), "left")),
    "documents": Config(**_SIZES, mask=("documents", (4, 6, 9), (30, 0, 40))),
    "segments": Config(**_SIZES, mask=("segments", _rng.integers(-1, 4, (2, 70)), None)),
    "chunked": Config(**_SIZES, mask=("chunked", 24)),
    "strided": Config(**_SIZES | {"Lq": 2}, mask=("strided", 7, 0)),
    "blocks": Config(**_SIZES, mask=("blocks", _rng.random((2, 1, 5, 5)) < 0.3, 16)),
    "selected": Config(**_SIZES, mask=("selected_blocks", _rng.integers(-1, 5, (2, 2, 10, 2)), 16, 2)),
    "dense": Config(**_SIZES, mask=("dense", _half)),
    "function": Config(**_SIZES | {"Lq": 3}, mask=("mask_mod", "hollow")),
    "per head": Config(**_SIZES, mask=("per_head", ("causal",), ("prefix", 3), ("chunked", 64), ("window", 0, 0))),
    "composition": Config(**_SIZES, mask=("and", ("causal",), ("or", ("prefix", 4), ("sliding_window", 20)))),
    "bias of -inf": Config(**_SIZES, bias=(("tensor", (2, 1, 1, 70), "f32", 0.6),)),
    "gaps only": Config(**_SIZES),
    "sinks and softcap": Config(**_SIZES, mask=("padding", (0, 9), "right"), sinks="f32", softcap=20.0),
}


@cache
def inputs_of(kind: str, dtype: str, poison: str) -> Inputs:
    return materialise(replace(CONFIGS[kind], dtype=dtype, layouts=_STRIDED, seed=11, poison=poison))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("backend", PROMISING)
def test_hidden_slots_and_gaps_are_unread(backend: str, kind: str, dtype: str) -> None:
    config = CONFIGS[kind]
    if backends.may_refuse(backend, config):
        with pytest.raises(qkv.UnsupportedError):
            run(inputs_of(kind, dtype, "nan"), backend)
        return
    clean = run(inputs_of(kind, dtype, "zero"), backend)
    for poison in POISONS:
        dirty = run(inputs_of(kind, dtype, poison), backend)
        changed = [name for name in clean if exact(clean[name]) != exact(dirty[name])]
        assert not changed, f"{poison} in hidden slots changed {changed} of {config}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("backend", PROMISING)
def test_rows_that_do_not_see_a_broken_key_keep_their_exact(backend: str, where: str, value: float) -> None:
    """A key that some rows see and others do not: the others are as if it were 0."""
    at, total = 37, 64
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        q, k, v, dout = (torch.randn(1, 2, total, 16).mul(2).to(dtype) for _ in range(4))
        found = []
        for fill in (0.0, value):
            tensors = {"q": q, "k": k.clone(), "v": v.clone()}
            tensors[where][:, 1, at] = fill
            for x in tensors.values():
                x.requires_grad_()
            out, lse = qkv.attention(**tensors, mask=qkv.sliding_window(9), return_lse=True, backend=backend)
            found.append([out, lse, torch.autograd.grad(out, tensors["q"], dout)[0]])
        rows = [i for i in range(total) if not at <= i < at + 9]
        for name, clean, dirty in zip(("out", "lse", "dq"), *found, strict=True):
            assert exact(clean[:, :, rows]) == exact(dirty[:, :, rows]), f"{name} {dtype}"
            assert exact(clean[:, 0]) == exact(dirty[:, 0]), f"{name} of the other head, {dtype}"


_GUARDED = """
import ctypes, mmap, sys, torch, qkv
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
keep = []
def guarded(*shape, dtype):
    # the tensor's last byte is the last one before a page that may not be touched
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    assert libc.mprotect(ctypes.addressof(view) + pages * page, page, 0) == 0
    keep.append((memory, view))
    x = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=pages * page - size)
    return x.view(shape).copy_(torch.randn(shape))
for backend in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for Lq, Lk, D, Dv in (
            (1, 1, 1, 1), (1, 33, 7, 5), (3, 65, 31, 80), (17, 49, 80, 33), (50, 513, 24, 40), (1, 1030, 72, 8)
        ):
            for mask in (None, qkv.causal(), qkv.dense(torch.rand(Lq, Lk) < 0.5)):
                q, k, v = (guarded(1, 2, *s, dtype=dtype) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
                bias = guarded(Lq, Lk, dtype=dtype)
                out = qkv.attention(q, k, v, mask, positions="end", bias=bias, backend=backend)
                assert out.isfinite().all()
print("read nothing past the end")
"""


def test_nothing_is_read_past_the_end_of_a_tensor() -> None:
    """Each tensor ends at a page that kills whoever touches it. In its own process, for that reason."""
    skips.on_linux_only()
    command = [sys.executable, "-c", _GUARDED, *PROMISING]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert "read nothing past the end" in ran.stdout, f"exit code {ran.returncode}\n{ran.stderr[-2000:]}"
