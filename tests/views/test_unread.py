"""Masked means unread, on pages: no slot, scale, page or table entry past what is seen changes a bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.kit import backends, skips, views
from tests.kit.bits import bits, differ
from tests.kit.view_variants import run
from tests.kit.views import ViewConfig, ViewInputs, random_view_config

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = backends.promising()
POISONS = ("nan", "inf", "huge", "magnet")

_TWO = {"lengths": (70, 37), "queries": (19, 19), "Hq": 4, "Hkv": 2, "D": 16, "Dv": 24, "pools": ("padded", "slots")}
_LONG = {"lengths": (1100, 1030, 700), "queries": (1, 1, 1), "share": ((0, 0), (0, 64), (1, 40)), "Hq": 2, "Hkv": 1}
CONFIGS = {
    "causal": ViewConfig(**_TWO),
    "pages of five": ViewConfig(**_TWO | {"P": 5}),
    "window": ViewConfig(**_TWO, mask=("sliding_window", 9)),
    "released": ViewConfig(**_TWO | {"P": 3}, held=("or", ("window", 8, None), ("prefix", 2))),
    "none visible": ViewConfig(**_TWO, mask=("padding", (0, 0), "right")),
    "padding": ViewConfig(**_TWO, mask=("and", ("causal",), ("padding", (30, 11), "left"))),
    "bias of -inf": ViewConfig(**_TWO | {"lengths": (40, 40)}, bias=(("tensor", (2, 1, 1, 40), "f32", 0.6),)),
    "function": ViewConfig(**_TWO | {"queries": (3, 3)}, mask=("mask_mod", "hollow")),
    "ragged": ViewConfig(**_TWO | {"queries": (1, 7)}, ragged=True, sinks="f32", softcap=20.0),
    "decode": ViewConfig(**_TWO | {"queries": (1, 1)}, mask=("chunked", 24)),
    "chunks in common": ViewConfig(**_LONG, mask=("sliding_window", 600)),
    "latent": ViewConfig(lengths=(70, 37), queries=(2, 2), Hq=12, D=40, Dv=32, latent=True, held=("window", 30, None)),
}
KINDS = [("f32", "plain"), ("bf16", "plain"), ("f16", "plain"), ("f64", "plain"), ("bf16", "int8"), ("f32", "f8")]


@cache
def inputs_of(kind: str, dtype: str, storage: str, poison: str) -> ViewInputs:
    return views.materialise(replace(CONFIGS[kind], dtype=dtype, storage=storage, seed=12, poison=poison))


@pytest.mark.parametrize(("dtype", "storage"), KINDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_slots_are_unread(kind: str, dtype: str, storage: str) -> None:
    """The bits are those of zeros in all hidden slots, hidden scales and gaps of the pools."""
    for backend in BACKENDS:
        if backends.may_refuse(backend, CONFIGS[kind]):
            continue
        clean = run(inputs_of(kind, dtype, storage, "zero"), backend)
        for poison in POISONS:
            dirty = run(inputs_of(kind, dtype, storage, poison), backend)
            changed = differ(clean, dirty)
            assert not changed, f"{backend}: {poison} in hidden slots changed {changed} of {CONFIGS[kind]}"


def test_random_configurations_are_the_same_with_any_poison() -> None:
    for seed in range(40):
        config = replace(random_view_config(seed), visible_nan=False)
        clean = views.materialise(replace(config, poison="zero"))
        for poison in POISONS[seed % 2 :: 2]:
            dirty = views.materialise(replace(config, poison=poison))
            for backend in BACKENDS[1:]:
                if backends.may_refuse(backend, config):
                    continue
                changed = differ(run(clean, backend), run(dirty, backend))
                assert not changed, f"{backend}: {poison} changed {changed}; seed {seed}: {config}"


def test_a_seen_nan_spoils_its_rows_only() -> None:
    """A key of one sequence is NaN: rows that see it are NaN, all others keep their bits, those in its shares too."""
    for storage in ("plain", "int8"):
        config = replace(CONFIGS["chunks in common"], storage=storage, seed=3, mask=("causal",), poison="zero")
        for backend in BACKENDS:
            inputs = views.materialise(config)
            clean = run(inputs, backend)
            at = inputs.view.layout.tables[inputs.view.layout.starts[1] + 64]  # of sequence 1 alone: after 64 in common
            bad = inputs.view.k if inputs.view.k_scale is None else inputs.view.k_scale
            bad[at, 0, 3] = float("nan")
            dirty = run(inputs, backend)
            seen = [
                i for i in range(3) if at in inputs.view.layout.tables[slice(*inputs.view.layout.starts[i : i + 2])]
            ]
            assert seen == [1]
            for i in range(3):
                for name in clean:
                    if i in seen:
                        assert dirty[name][i].isnan().all(), f"{backend} {name}"
                    else:
                        assert bits(clean[name][i]) == bits(dirty[name][i]), f"{backend} {name}"


_GUARDED = """
import ctypes, mmap, sys, torch, qkv
torch.set_num_threads(1)
from array import array
from qkv.call.keys import Clock, KVLayout, KVView
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
keep = []
def guarded(x):
    # between two pages of memory that may not be touched: the last byte lies before one, the first begins after one
    size = x.numel() * x.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    window = (ctypes.c_char * len(memory)).from_buffer(memory)
    for at in (0, (pages + 1) * page):
        assert libc.mprotect(ctypes.addressof(window) + at, page, 0) == 0
    keep.append((memory, window))
    to = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=(pages + 1) * page - size)
    to.copy_(x.contiguous().view(torch.uint8).flatten())
    return to.view(x.dtype).view(x.shape)
for backend in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for storage in (None, torch.int8, torch.float8_e4m3fn):
            if dtype == torch.float64 and storage is not None:
                continue
            for T, L, P, D, Dv in (
                (1, 1, 1, 1, 1), (1, 33, 7, 7, 5), (3, 64, 16, 32, 32), (17, 49, 5, 80, 33), (50, 513, 16, 24, 40),
                (1, 1030, 16, 72, 8), (1, 1037, 24, 64, 64),
            ):
                used = -(-L // P)
                q = guarded(torch.randn(1, 2, T, D).to(dtype))
                pools = [torch.randn(used, 2, P, d).mul(1 if storage is None else 40) for d in (D, Dv)]
                k, v = (guarded(x.to(storage or dtype)) for x in pools)
                ks, vs = (None if storage is None else guarded(torch.rand(used, 2, P) / 40) for _ in range(2))
                # the last page in memory is the last of the table, the first is the first
                layout = KVLayout(array("i", range(used)), array("q", [0, used]), array("q", [L]), None, Clock())
                for mask in (None, qkv.causal(), qkv.sliding_window(20)):
                    out = qkv.attention(q, KVView(k, v, ks, vs, dtype, layout, None), mask=mask, backend=backend)
                    assert out.isfinite().all()
                # released pages have no memory at all: with -1 for all but the last, one page of pool will do
                lone = [None if x is None else guarded(x[-1:].clone()) for x in (k, v, ks, vs)]
                tail = L - (used - 1) * P
                if used > 1 and tail >= T:
                    table = array("i", [-1] * (used - 1) + [0])
                    gone = KVLayout(table, array("q", [0, used]), array("q", [L]), None, Clock())
                    held = qkv.window(tail - T, None)
                    view = KVView(lone[0], lone[1], lone[2], lone[3], dtype, gone, held)
                    assert qkv.attention(q, view, mask=qkv.causal(), backend=backend).isfinite().all()
print("read nothing past the end")
"""


def test_nothing_is_read_outside_of_the_pools() -> None:
    """Pools, scales and queries lie between memory that kills who touches it. In its own process, for that reason."""
    skips.on_linux_only()
    command = [sys.executable, "-c", _GUARDED, *(name for name in BACKENDS if name != "reference")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert "read nothing past the end" in ran.stdout, f"exit code {ran.returncode}\n{ran.stderr[-2000:]}"
