"""FLOP counters see the private ops: forward, backward, masks, modules, compiled calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import qkv

pytestmark = pytest.mark.usefixtures("one_thread")
B, Hq, Hkv, D, Dv = 2, 4, 2, 8, 6
FORWARD, BACKWARD = 2 * (D + Dv), 2 * (3 * D + 2 * Dv)


def given(Lq: int, Lk: int, *, learns: bool = False) -> list[Tensor]:
    sizes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    return [torch.randn(size, requires_grad=learns) for size in sizes]


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backend", [None, "tiled", "sdpa", "reference"])
def test_a_call_counts_once_whoever_computes(backend: str | None) -> None:
    q, k, v = given(12, 17, learns=True)
    assert counted(lambda: qkv.attention(q, k, v, backend=backend)) == FORWARD * B * Hq * 12 * 17

    def both() -> None:
        out = qkv.attention(q, k, v, backend=backend)
        out.backward(torch.ones_like(out))

    assert counted(both) == (FORWARD + BACKWARD) * B * Hq * 12 * 17


MASKS: dict[str, Any] = {
    "causal": qkv.causal(),
    "window": qkv.sliding_window(3),
    "streaming": qkv.causal() & (qkv.prefix(2) | qkv.sliding_window(4)),
    "chunked": qkv.chunked(5) & ~qkv.prefix(1),
    "heads": qkv.per_head([qkv.causal(), qkv.prefix(3), qkv.window(1, 1), qkv.chunked(4)]),
}


@pytest.mark.parametrize("positions", ["start", "end", 3, [0, 4]], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_numbers_counts_what_it_shows(name: str, positions: Any) -> None:
    q, k, v = given(12, 17, learns=True)
    shown = int(MASKS[name].tensor(12, 17, positions=positions, B=B, Hq=Hq).expand(B, Hq, 12, 17).sum())
    assert 0 < shown < B * Hq * 12 * 17

    def both() -> None:
        out = qkv.attention(q, k, v, MASKS[name], positions=positions)
        out.backward(torch.ones_like(out))

    assert counted(both) == (FORWARD + BACKWARD) * shown


def test_what_is_not_known_without_looking_counts_every_pair() -> None:
    q, k, v = given(12, 12)
    every = FORWARD * B * Hq * 12 * 12
    ids, hidden = torch.arange(12) // 4, torch.zeros(12, 12, dtype=torch.bool)
    for mask in (qkv.strided(2), qkv.documents(segment_ids=ids), hidden, qkv.padding([3, 5]) & qkv.causal()):
        assert counted(lambda m=mask: qkv.attention(q, k, v, m)) == every
    assert counted(lambda: qkv.attention(q, k, v, qkv.causal(), positions=torch.arange(12)[None])) == every
    assert counted(lambda: qkv.attention(q[:, :, :0], k, v)) == 0


def test_modules() -> None:
    x = torch.randn(2, 12, 16)
    linear = 4 * 2 * 2 * 12 * 16 * 16
    for module in (qkv.nn.Attention(16, 4), qkv.nn.MultiheadAttention(16, 4, batch_first=True)):
        call = (
            (lambda m=module: m(x))
            if isinstance(module, qkv.nn.Attention)
            else (lambda m=module: m(x, x, x, need_weights=False))
        )
        assert counted(call) == linear + 2 * (4 + 4) * 2 * 4 * 12 * 12


def test_compiled_calls_and_tensors_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = given(12, 12)
    shown = B * Hq * 12 * 13 // 2
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: qkv.attention(*x, mask=qkv.causal()), backend="aot_eager")
    compiled(q, k, v)
    assert counted(lambda: compiled(q, k, v)) == FORWARD * shown
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert counted(lambda: qkv.attention(*fakes, mask=qkv.causal())) == FORWARD * shown
    torch._dynamo.reset()


def test_transforms_count_every_sample() -> None:
    q, k, v = given(12, 12)
    several = [torch.stack([x, x, x]) for x in (q, k, v)]
    assert counted(lambda: torch.vmap(qkv.attention)(*several)) == 3 * FORWARD * B * Hq * 12 * 12
