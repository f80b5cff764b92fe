"""The native kernels as a part of a process: threads, fork, sizes that cross their tiles, and calls that must not
reach C++.
"""

from __future__ import annotations

import importlib
import os
import threading
import time

import pytest
import torch

import qkv
from qkv.backends.cpu import instruction_sets


@pytest.fixture(scope="module")
def native():
    return importlib.import_module("qkv._native")  # fails where no C++20 compiler was found: these tests are about it


def _inputs(seed, B, Hq, Hkv, Lq, Lk, D, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, n, D, generator=g).mul(1.5).to(dtype) for h, n in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk))]


def test_the_portable_kernel_is_always_there(native):
    assert instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("shape", [(1, 8, 2, 1, 3000, 64), (2, 4, 4, 300, 300, 32), (1, 16, 1, 5, 700, 80)])
def test_many_python_threads_get_the_same_bits(native, shape):
    q, k, v = _inputs(1, *shape)
    want = qkv.attention(q, k, v, mask=qkv.causal(), positions="end")
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(qkv.attention(q, k, v, mask=qkv.causal(), positions="end"), want):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_child_forked_after_use_computes(native):
    q, k, v = _inputs(2, 1, 8, 8, 257, 257, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # Compared as bytes: PyTorch's own parallel operations may hang in a forked child (GNU OpenMP), ours must not.
        want = qkv.attention(q, k, v, mask=qkv.causal()).numpy().tobytes()
        child = os.fork()
        if child == 0:
            ok = all(qkv.attention(q, k, v, mask=qkv.causal()).numpy().tobytes() == want for _ in range(20))
            os._exit(0 if ok else 1)
        deadline = time.monotonic() + 60
        done, status = 0, -1
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done == child
        assert status == 0
        assert qkv.attention(q, k, v, mask=qkv.causal()).numpy().tobytes() == want
    finally:
        torch.set_num_threads(before)


def test_the_interpreter_runs_while_the_kernel_does(native):
    q, k, v = _inputs(3, 1, 8, 8, 1024, 1024, 64)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(1)
            time.sleep(0.0005)

    counter = threading.Thread(target=tick)
    counter.start()
    try:
        deadline = time.monotonic() + 30
        while len(ticks) < 10 and time.monotonic() < deadline:
            qkv.attention(q, k, v)
    finally:
        stop.set()
        counter.join()
    assert len(ticks) >= 10


def test_values_that_are_a_view_of_the_keys(native):
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, 16, 1, 576).mul(0.3).to(dtype)
        latent = torch.randn(1, 1, 1500, 576).to(dtype)
        out = qkv.attention(q, latent, latent[..., :512], scale=192**-0.5)
        copied = qkv.attention(q, latent, latent[..., :512].clone(), scale=192**-0.5)
        assert torch.equal(out, copied)
        want = qkv.attention(
            q.double(), latent.double(), latent[..., :512].double(), scale=192**-0.5, backend="reference"
        )
        assert (out - want).abs().max() < 2 * torch.finfo(dtype).eps * latent.abs().max()


def test_malformed_programs_stop_at_the_door(native):
    for words in (
        [99],
        [1, 2],
        [13],
        [0, 0],
        [15],
        [11, 2, 1, 0],
        [11, 1, 5, 0],
        [2, 0, 7],
        [3, 0, 0],
        [0] * 40,
        [-1],
        [9, 97, 4, 0],
    ):
        assert not native.program_fits(words, 0), words
        with pytest.raises((ValueError, TypeError)):
            native.Prepared("", 0, [1, 1, 1, 4, 4, 8, 8], *[[32, 32, 8, 1]] * 4, 1.0, 0.0, words, [], [], [], [0], [])
    assert native.program_fits([1, -1, 0], 0)


def test_a_mask_that_is_too_deep_for_the_kernel_says_so_and_runs_elsewhere(native):
    mask = qkv.causal()
    for n in range(1, 30):
        mask = qkv.sliding_window(n) | (qkv.chunked(n) & mask)
    q, k, v = _inputs(5, 1, 1, 1, 20, 20, 8)
    plan = qkv.plan(q, k, v, mask=mask)
    assert plan.backend == "tiled"
    assert "nested too deeply" in dict(plan.refused)["cpu"]
    with pytest.raises(qkv.UnsupportedError, match="nested too deeply"):
        qkv.attention(q, k, v, mask=mask, backend="cpu")
