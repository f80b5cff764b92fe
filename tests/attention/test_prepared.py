"""The fast path: one plan serves many calls, and a hit in the cache skips no check."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import qkv
from qkv.backends.base import Backend, Prepared
from qkv.backends.tiled.forward import TiledBackend
from qkv.call.problem import Inputs
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError
from tests.kit import private
from tests.kit.sharp import inputs


class _Native(Backend):
    """A stand-in for the native backend, to test what runs before it alone."""

    name = "cpu"

    def __init__(self) -> None:
        self.prepared = self.ran = 0

    def supports(self, problem: Any) -> str | None:
        return "no dropout" if problem.dropout_p else None

    def run(self, problem: Any, given: Any) -> Any:
        raise AssertionError("prepared calls go first")

    def tile(self, problem: Any) -> tuple[int, int]:
        return 64, 64

    def prepare(self, problem: Any, given: Any) -> Any:
        self.prepared += 1
        return _Ready(self, problem)


class _Ready(Prepared):
    def run(self, *given: Any) -> Any:
        self.backend.ran += 1  # type: ignore[attr-defined]
        return TiledBackend().run(self.problem, Inputs(*given))


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch, nothing_kept: None) -> _Native:
    backend = _Native()
    private.use_backend(monkeypatch, "cpu", backend)
    return backend


def test_one_plan_serves_many_calls(native: _Native) -> None:
    q, k, v = inputs(Lq=9)
    for _ in range(3):
        want = qkv.attention(q, k, v, mask=qkv.causal(), backend="tiled")
        assert torch.equal(qkv.attention(q, k, v, mask=qkv.causal()), want)
    assert (native.prepared, native.ran) == (1, 3)
    assert len([kept for kept in private.ready().values() if kept.value.backend is native]) == 1
    qkv.attention(q.requires_grad_(), k, v, mask=qkv.causal()).sum().backward()
    assert (native.prepared, native.ran) == (2, 4)
    with torch.no_grad():
        qkv.attention(q, k, v, mask=qkv.causal())
    assert (native.prepared, native.ran) == (2, 5)
    qkv.attention(q.detach(), k, k, mask=qkv.causal())  # v shares k's storage: a plan of its own
    assert native.prepared == 3
    qkv.attention(q.detach(), k, v, mask=qkv.causal(), dropout_p=0.5)
    assert native.prepared == 3


def test_a_kept_call_excuses_no_wrong_argument(native: _Native) -> None:
    """What equals a good argument without being one still raises after the good one was cached."""
    q, k, v = inputs(Lq=9)
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(scale=1.0), dict(scale=True)),
        (dict(softcap=1.0), dict(softcap=True)),
        (dict(positions=1), dict(positions=True)),
        (dict(return_lse=True), dict(return_lse=1)),
        (dict(dropout_p=0.0), dict(dropout_p=False)),
        (dict(backend=None), dict(backend="none")),
        (dict(scale=0.5), dict(scale=torch.tensor(0.5))),
    ]
    for good, bad in calls:
        qkv.attention(q, k, v, **good)
        qkv.attention(q, k, v, **good)
        with pytest.raises(QKVError):
            qkv.attention(q, k, v, **bad)
    with pytest.raises(ArgumentTypeError, match="dtype"):
        qkv.attention(q, k.double(), v)
    step = torch.complex(q, -q).conj().imag
    assert torch.equal(qkv.attention(step, k, v), qkv.attention(q, k, v))


def test_data_is_looked_at_in_every_call(native: _Native) -> None:
    q, k, v = inputs(Lq=9)
    mask = torch.ones(9, 9, dtype=torch.bool)
    qkv.attention(q, k, v, mask=mask)
    mask[:, 3] = False
    assert torch.equal(qkv.attention(q, k, v, mask=mask), qkv.attention(q, k, v, mask=mask.clone()))
    held = qkv.dense(mask)
    qkv.attention(q, k, v, mask=held)
    mask[:, 3] = True
    with pytest.raises(ArgumentError, match="in place"):
        qkv.attention(q, k, v, mask=held)
    p = torch.arange(9)[None]
    first = qkv.attention(q, k, v, mask=qkv.causal(), positions=p)
    p += 2
    assert not torch.equal(qkv.attention(q, k, v, mask=qkv.causal(), positions=p), first)
    with pytest.raises(ArgumentError, match="magnitude"):
        qkv.attention(q, k, v, mask=qkv.causal(), positions=p + 2**60)


def test_caches_are_bounded_and_hold_no_user_tensors(native: _Native, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    q, k, v = inputs(Lq=9)
    monkeypatch.setattr(_Ready, "run", lambda self, q, *rest: (q, None, None))
    for n in range(1, 600):
        qkv.attention(q, k, v, mask=qkv.sliding_window(n))
    assert len(private.ready()) == private.ready().most <= 512
    mask = torch.ones(9, 9, dtype=torch.bool)
    alive = weakref.ref(mask)
    qkv.attention(q, k, v, mask=mask)
    big = torch.randn(1, 2, 9, 8)
    alive_q = weakref.ref(big)
    qkv.attention(big, k, v)
    del mask, big
    gc.collect()
    assert alive() is None
    assert alive_q() is None


def test_threads_share_what_is_kept(native: _Native) -> None:
    q, k, v = inputs(Lq=9)
    want = {n: qkv.attention(q, k, v, mask=qkv.sliding_window(n), backend="tiled") for n in range(1, 9)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(40):
            n = (seed + step) % 8 + 1
            if not torch.equal(qkv.attention(q, k, v, mask=qkv.sliding_window(n)), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
