"""The native kernels as a part of a process: threads, fork, sizes that cross their tiles, and calls that must not
reach C++.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qkv
from qkv.backends.cpu import CpuBackend, instruction_sets
from qkv.call.problem import Options
from qkv.call.validate import validate
from qkv.call.view import longest, problem_of
from tests.kit import skips


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


@pytest.mark.parametrize("first", ["attention", "an operator"])
def test_a_child_forked_after_use_computes(native, first):
    """Also where PyTorch alone has used the OpenMP threads, of which the child has none."""
    run_alone(f"""
        import os, time, torch, qkv
        torch.set_num_threads(2)
        q, k, v = torch.randn(3, 1, 8, 257, 64)
        call = lambda: qkv.attention(q, k, v, mask=qkv.causal()).numpy().tobytes()
        # Compared as bytes: PyTorch's own parallel operations may hang in a forked child (GNU OpenMP), ours must not.
        want = call() if {first == "attention"} else torch.randn(1000, 1000).add(1) is None
        child = os.fork()
        if child == 0:
            mine = [call() for _ in range(20)]
            os._exit(0 if all(x == (want or mine[0]) for x in mine) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not want or call() == want
    """)


def test_a_child_that_loads_the_library_first_computes(native):
    skips.on_linux_only()
    run_alone("""
        import os, torch
        torch.set_num_threads(2)
        q, k, v = torch.randn(3, 1, 8, 257, 64)
        torch.randn(1000, 1000).add(1)
        child = os.fork()
        if child == 0:
            import qkv
            qkv.attention(q, k, v)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_calls_run_on_the_threads_of_pytorch(native):
    """None is started beside them; and none of them ends because a call has fewer tasks than there are threads."""
    skips.on_linux_only()
    run_alone("""
        import os, torch, qkv
        torch.set_num_threads(4)
        torch.randn(2000, 2000).add(1)
        threads = sorted(os.listdir("/proc/self/task"))
        for keys, heads in ((2048, 8), (700, 1), (1500, 1)):     # (700, 1): two tasks, (1500, 1): three
            q, k, v = torch.randn(1, heads, 8, 256), *torch.randn(2, 1, heads, keys, 256)
            assert qkv.plan(q, k, v).backend == "cpu"
            qkv.attention(q, k, v)
            assert sorted(os.listdir("/proc/self/task")) == threads
    """)


def run_alone(script: str) -> None:
    """In a process of its own, which has a minute, and takes its children along."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


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


def _prepared(native, **changed):
    """A call of four queries and keys in float32, prepared."""
    stride = (32, 32, 8, 1)
    call = dict(
        isa="", type=0, sizes=(1, 1, 1, 4, 4, 8, 8), q_stride=stride, k_stride=stride, v_stride=stride,
        out_stride=stride, scale=1.0, softcap=0.0, program=[], operands=[], bias=[], sinks=[], positions=[0], pages=[],
        dropout_p=0.0,
    )  # fmt: skip
    return native.Prepared(**{**call, **changed})


def _run(native, words, operands=()):
    """A call of four queries and keys with this program."""
    q, out = (torch.zeros(1, 1, 4, 8) for _ in range(2))
    given = [(x.data_ptr(), x.numel()) for x in operands]
    at = q.data_ptr()
    _prepared(native, program=words, operands=given).run(at, at, at, out.data_ptr(), 0, 1)


def nested(portions):
    words = [0]
    for _ in range(portions):
        words = [17, 1, 1, 99, 99, len(words), *words]
    return words


@pytest.mark.parametrize("part", [[0], [1, -1, 0], nested(1)])
def test_a_portion_has_to_lie_within_its_whole(native, part):
    """Before anything is read: a mask of the whole has numbers for no more queries and keys."""
    whole = [17, 3, 2, 6, 7]
    _run(native, [*whole, len(part), *part])
    for change in ([17, 4, 2, 6, 7], [17, 3, 3, 6, 7], [17, 3, 2, 5, 7], [17, 3, 2, 6, 6], [17, 0, 0, 3, 4]):
        with pytest.raises(ValueError, match="nested too deeply"):
            _run(native, [*change, len(part), *part])


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([4, 0, 0, 0, 1, 1, 7, 2, 3, 1], 7),  # documents that are not contiguous, of as many tokens
        ([12, 0, 0, 0, 7, 1], 42),  # a table
        ([16, 0, 1, 1, 1, 6, 2, 3, 1], 12),  # lists
        ([10, 0, 1, 1, 6, 7, 1], 42),  # a map
    ],
)
def test_the_part_of_a_portion_reads_the_whole_s_operands(native, words, rows):
    """One number fewer than the whole call needs, and it is refused: though this part alone would need fewer."""
    program = [17, 3, 2, 6, 7, len(words), *words]
    dtype = torch.uint8 if words[0] in (10, 12) else torch.int64
    enough = [torch.zeros(rows, dtype=dtype)] * 4
    _run(native, program, enough)
    with pytest.raises(ValueError, match="nested too deeply"):
        _run(native, program, [x[:-1] for x in enough])


def test_malformed_programs_are_refused(native):
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
        [17, 0, 0, 4, 4],
        [17, 0, 0, 4, 4, 0],
        [17, 0, 0, 4, 4, 2, 0],
        [17, 0, 0, 4, 4, 1, 13],
        [17, -1, 0, 4, 4, 1, 0],
        [17, 0, -1, 4, 4, 1, 0],
        [17, 0, 0, 2**62, 4, 1, 0],
        [17, 0, 0, 4, 4, 3, 2, 0, 7],
        nested(12),
    ):
        assert not native.program_fits(words, 0), words
        with pytest.raises(ValueError, match="nested too deeply"):
            _prepared(native, program=words)
    assert native.program_fits([1, -1, 0], 0)
    _prepared(native, program=[1, -1, 0])


class _Written:
    """A native object that writes down what it is given by place, under the names of the compiled function."""

    def __init__(self, native):
        self.native, self.given = native, {}

    def __getattr__(self, function):
        names = re.findall(r"(\w+): ", getattr(self.native.Prepared, function).__doc__)
        return lambda *given: self.given.update(zip(names, given, strict=True))


def test_what_a_call_passes_by_place_is_in_the_order_of_the_names(native):
    """With everything that a call may have, each of another address: names would cost the calls that are kept."""
    q, k, v = _inputs(6, 2, 4, 2, 3, 5, 8)
    sinks, term, rows = torch.zeros(4), torch.zeros(3, 5), torch.arange(3)[None]
    options = Options(positions=rows, bias=term, sinks=sinks, dropout_p=0.5, return_lse=True)
    problem, inputs = validate("test", q, k, v, qkv.causal(), options)
    ready = CpuBackend().prepare(replace(problem, needs_grad=True), inputs)
    ready.native = written = _Written(native)
    out, lse, state = ready.run(*inputs[:-1], seed=7)
    addresses = dict(q=q, k=k, v=v, out=out, lse=lse, sinks=sinks, positions=inputs.positions, state=state)
    want = {name: t.data_ptr() for name, t in addresses.items()}
    want |= dict(threads=torch.get_num_threads(), position_rows=1, bias=[term.data_ptr()], seed=7)
    assert written.given == want

    # `run` has no names, which makes its calls the cheapest: those of the source.
    ready = CpuBackend().prepare(*validate("test", q, k, v, None, Options()))
    by_place = []
    ready.run_plain = lambda *given: by_place.extend(given)
    out, *_ = ready.run(q, k, v)
    source = (Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text()
    names = re.findall(r"\w+(?=,|$)", re.search(r"void run\(([^)]*)\)", source)[1])
    want = {name: t.data_ptr() for name, t in dict(q=q, k=k, v=v, out=out).items()}
    assert dict(zip(names, by_place, strict=True)) == want | dict(lse=0, threads=torch.get_num_threads())


def test_what_a_call_on_pages_passes_by_place_is_in_the_order_of_the_names(native):
    cache = qkv.cache.PagedCache(
        pages=8, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32, storage=torch.int8
    )
    seqs = [cache.add(), cache.add()]
    cache.append(seqs, torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8), lengths=[3, 4])
    view, q, sinks, term = cache.view(seqs, lengths=[3, 4]), torch.randn(1, 4, 7, 8), torch.zeros(4), torch.zeros(4, 4)
    problem, _ = problem_of("test", q, view, None, Options(bias=term, sinks=sinks, return_lse=True), longest(q, view))
    ready = CpuBackend().prepare_view(replace(problem, part=True), q, view, (term,), sinks)
    written = _Written(native)
    ready.run_pages = written.run_pages
    out, lse, state = ready.run(q, view, (term,), sinks, sequences=[1])
    source = (Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text()
    lists = {of: names.split(", ") for names, of in re.findall(r"const auto& \[([^\]]*)\] = (tensors|counts);", source)}
    assert lists["counts"] == ["tables", "starts", "lengths", "queries"]
    addresses = dict(q=q, k=view.k, v=view.v, k_scale=view.k_scale, v_scale=view.v_scale, out=out, lse=lse, state=state)
    of_layout = [getattr(view.layout, name).buffer_info() for name in lists["counts"]]
    assert written.given == dict(
        tensors=[addresses[name].data_ptr() for name in lists["tensors"]], threads=torch.get_num_threads(),
        sinks=sinks.data_ptr(), bias=[term.data_ptr()], layout=[address for address, _ in of_layout],
        counts=[count for _, count in of_layout], which=[1],
    )  # fmt: skip


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
