"""What was made in inference mode (masks, positions, tables) serves training as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.rotary import DynamicNTK, Rotary
from tests.kit.layers import sample

pytestmark = pytest.mark.usefixtures("one_thread")

Q, K, V = sample(2, 4, 12, 8), sample(2, 2, 12, 8, seed=1), sample(2, 2, 12, 7, seed=2)
X, D_OUT = sample(2, 12, 32, seed=3), sample(2, 4, 12, 7, seed=4)
SEEN = [[j <= i for j in range(12)] for i in range(12)]


def _looked_up() -> Any:
    table = torch.tensor(SEEN)
    return qkv.mask_mod(lambda b, h, p, j: table[p, j])


def _scored() -> Any:
    slopes = torch.linspace(0.1, 0.4, 4, dtype=torch.float64)
    return qkv.score_mod(lambda s, b, h, p, j: s - slopes[h] * j)


MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "positions": lambda: {"positions": torch.arange(2, 14)[None] + 0, "mask": qkv.causal()},
    "first positions": lambda: {"positions": torch.tensor([2, 3]), "mask": qkv.causal()},
    "documents": lambda: {"mask": qkv.documents([5, 7]) & qkv.causal()},
    "positions of documents": lambda: {
        "mask": qkv.documents([5, 7], [6, 6]),
        "positions": qkv.documents([5, 7], [6, 6]).positions("end"),
    },
    "segment ids": lambda: {"mask": qkv.documents(segment_ids=torch.tensor([[0] * 5 + [1] * 7] * 2))},
    "padding": lambda: {"mask": qkv.padding([12, 5])},
    "prefix": lambda: {"mask": qkv.causal() | qkv.prefix(torch.tensor([3, 5]))},
    "global": lambda: {"mask": qkv.longformer(4, [0])},
    "blocks": lambda: {"mask": qkv.blocks(torch.ones(2, 2).tril().bool(), 6)},
    "selected": lambda: {"mask": qkv.selected_blocks(torch.arange(12).view(1, 1, 12, 1) // 4, 3)},
    "bool": lambda: {"mask": torch.tensor(SEEN)},
    "dense": lambda: {"mask": ~qkv.dense(torch.tensor(SEEN)) | qkv.causal()},
    "mask_mod": lambda: {"mask": _looked_up()},
    "alibi": lambda: {"bias": qkv.alibi([0.1, 0.2, 0.3, 0.4])},
    "alibi tensor": lambda: {"bias": qkv.alibi(sample(4, seed=5))},
    "relative": lambda: {"bias": qkv.relative(sample(4, 7, seed=6))},
    "t5": lambda: {"bias": qkv.relative(sample(4, 8, seed=7), buckets="t5", max_distance=9)},
    "tensor bias": lambda: {"bias": sample(4, 12, 12, seed=8)},
    "score_mod": lambda: {"bias": _scored()},
    "sinks": lambda: {"sinks": sample(4, seed=9)},
}


def trained(given: dict[str, Any], backend: str | None) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    out = qkv.attention(*leaves, **given, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, D_OUT))


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
@pytest.mark.parametrize("name", MADE)
def test_what_was_made_in_inference_mode_serves_training(name: str, backend: str | None) -> None:
    with torch.inference_mode():
        given = MADE[name]()
        qkv.attention(Q, K, V, **given, backend=backend)
    for got, want in zip(trained(given, backend), trained(MADE[name](), backend), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["documents", "positions of documents", "padding", "prefix", "global", "blocks"])
def test_and_a_compiled_one(name: str) -> None:
    """Masks and positions that the library made; a user's own inference tensor is refused there by PyTorch."""
    with torch.inference_mode():
        given = MADE[name]()
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: qkv.attention(q, k, v, **given), backend="aot_eager", fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    found = torch.autograd.grad(compiled(*leaves), leaves, D_OUT)
    for got, want in zip(found, trained(MADE[name](), None)[1:], strict=True):
        assert torch.equal(got, want)


def test_second_derivatives_of_a_call_with_positions_of_inference_mode() -> None:
    with torch.inference_mode():
        positions = torch.arange(2, 14)[None] + 0
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        qkv.attention(q, K, V, qkv.causal(), positions=positions), q, D_OUT, create_graph=True
    )
    (second,) = torch.autograd.grad(first, q, Q)
    assert second.isfinite().all()
    assert second.abs().max() > 0


@pytest.mark.parametrize("positions", ["none", "one row", "rows"])
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "latent"])
def test_a_layer_that_was_first_used_in_inference_mode_trains(latent: bool, positions: str) -> None:
    """Its tables, its mask and the positions were all made there."""
    sizes: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    base = 10_000.0 + len(positions) + latent  # tables of its own
    torch.manual_seed(0)
    layer: Any
    with torch.inference_mode():
        mask = qkv.causal() & qkv.documents([5, 7])
        at = {"none": None, "one row": torch.arange(3, 15), "rows": torch.arange(3, 15).repeat(2, 1)}[positions]
    if latent:
        turn = Rotary(4, base, interleaved=True)
        layer = qkv.nn.LatentAttention(32, 2, q_lora_rank=None, **sizes, rotary=turn, mask=mask, dtype=torch.float64)
    else:
        scaled = Rotary(8, base, scaling=DynamicNTK(2.0, 4))
        layer = qkv.nn.Attention(32, 4, num_kv_heads=2, rotary=scaled, mask=mask, qk_norm=True, dtype=torch.float64)
    with torch.inference_mode():
        want = layer(X, positions=at)
    x = X.clone().requires_grad_()
    got = layer(x, positions=at)
    assert torch.equal(got, want)
    got.backward(X)
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in (x, *layer.parameters()))
