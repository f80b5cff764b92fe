"""What a watch says of a call is true: numbers against dense float64, which rows are dead, which calls are looked at.

Wrong code that dies here: numbers of the wrong head, row or scale, a step that is looked at out of turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.call.problem import Options
from qkv.insight.watch.calls import Call as WatchedCall
from qkv.insight.watch.numbers import few_rows, look
from qkv.lm.decoder import Config, Decoder
from tests.kit.watched import SDPA, Call


def dense(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Any:
    """Weights with a last column for the sink, and scores, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.double().mT * scale
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = s.masked_fill(~visible, -torch.inf)
    sink = torch.full((q.shape[1],), -torch.inf, dtype=s.dtype) if sinks is None else sinks.double()
    p = torch.cat([s, sink[None, :, None, None].expand(*s.shape[:3], 1)], -1).softmax(-1)
    return p, s


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Lq", [1, 5, 40])
def test_numbers_are_those_of_dense_float64(Lq: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, h, n, 8).to(dtype) * 2 for h, n in ((6, Lq), (2, 40), (2, 40)))
    sinks = torch.linspace(-1, 4, 6)
    visible = torch.ones(Lq, 40, dtype=torch.bool).tril(40 - Lq)
    model = Call(mask=qkv.causal(), positions="end", scale=0.7, softcap=6.0, sinks=sinks)
    with qkv.watch(model, first=3) as w:
        model(q, k, v)
    (line,) = w.lines
    p, s = dense(q, k, visible, 0.7, 6.0, sinks)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    largest = p[..., :-1].amax(-1)
    want = {
        "entropy": entropy.mean((0, 2)), "tokens": entropy.exp().mean((0, 2)), "logit": s.amax((0, 2, 3)),
        "weight": largest.mean((0, 2)), "sure": (largest > 0.99).double().mean((0, 2)), "sink": p[..., -1].mean((0, 2)),
    }  # fmt: skip
    for name, value in want.items():
        assert torch.allclose(torch.tensor(line[name], dtype=torch.float64), value, atol=2e-5), name
    rows = torch.linspace(Lq - 1, 0, min(16, Lq)).round().long().flip(0)
    rows = rows[visible[rows].sum(-1) >= 4]
    few = p[:, :, rows, :-1]
    share = few / few.sum(-1, keepdim=True)
    flat = visible[rows] / visible[rows].sum(-1, keepdim=True)
    for name, value in {
        "first": few[..., :3].sum(-1).mean((0, 2)),
        "away": (share - flat).abs().sum(-1).mean((0, 2)) / 2,
    }.items():
        assert torch.allclose(torch.tensor(line[name], dtype=torch.float64), value, atol=2e-5), name
    assert line["shape"] == {"B": 2, "Hq": 6, "Hkv": 2, "Lq": Lq, "Lk": 40, "D": 8}
    assert line["nan"]["rows"] == line["dead"]["rows"] == 0


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "gqa", "three", "two"])
def test_calls_of_torch_mean_the_same(kind: str) -> None:
    """Masks and shapes as PyTorch's function takes them; the entropy is that of its own weights."""
    shapes = {"three": (3, 9, 8), "two": (9, 8), "gqa": (2, 4, 9, 8)}
    q = torch.randn(*shapes.get(kind, (2, 4, 9, 8)), dtype=torch.float64)
    k = torch.randn_like(q)[:, :2] if kind == "gqa" else torch.randn_like(q)
    some = torch.rand(9, 9) > 0.4
    some[:, 0] = True
    options: dict[str, Any] = {
        "bool": {"attn_mask": some},
        "float": {"attn_mask": torch.randn(2, 1, 9, 9, dtype=torch.float64).masked_fill(~some, -torch.inf)},
        "causal": {"is_causal": True, "scale": 0.9},
        "gqa": {"enable_gqa": True, "is_causal": True},
    }.get(kind, {})

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    model = Model()
    with qkv.watch(model) as w:
        model(q, k, k)
    eye = torch.eye(9, dtype=torch.float64).expand(*k.shape[:-1], 9)  # weights, as outputs
    p = SDPA(q, k, eye, **options)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    entropy = entropy.reshape(-1, *((1, 9) if q.dim() == 2 else entropy.shape[-2:])).mean((0, 2))
    (line,) = w.lines
    assert torch.allclose(torch.tensor(line["entropy"], dtype=torch.float64), entropy, atol=1e-10)
    assert not w.errors


def test_long_contexts_are_looked_at_in_little_memory() -> None:
    """Of 100,000 keys and 8 heads the single weights of a few rows, not of 16."""
    q, k = torch.randn(1, 8, 2, 16), torch.randn(1, 2, 100_000, 16)
    found = few_rows(look(WatchedCall("", q, k, k, None, Options())))
    assert found.p.numel() <= 1 << 22
    assert found.p.shape[:2] == (1, 8)


def test_dead_rows_and_their_place() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril(1)
    mask[1, :, 2] = False
    model, (q, k, v) = Call(mask=mask), torch.randn(3, 2, 4, 6, 8)
    with qkv.watch(model) as w:
        model(q, k, v)
    p, _ = dense(q, k, mask, 8**-0.5, None, None)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)  # NaN of the dead row: it is no part of a mean
    entropy = entropy.nanmean((0, 2))
    assert torch.allclose(torch.tensor(w.lines[0]["entropy"]).double(), entropy, atol=1e-5)
    assert w.lines[0]["dead"] == {"rows": 4, "of": 48, "first": {"batch": 1, "head": 0, "row": 2}}
    assert not w.warnings


def test_layers_heads_and_steps_are_chosen() -> None:
    model, tokens = Decoder(Config(dim=32, layers=3, heads=4)), torch.randint(256, (1, 12))
    for layers, wanted in (
        (["blocks.[02].*"], ["blocks.0.attention", "blocks.2.attention"]),
        ([1], ["blocks.1.attention"]),
        ("blocks.1.attention", ["blocks.1.attention"]),
    ):
        with qkv.watch(model, layers, every=2, heads=[3, 1]) as w:
            for _ in range(5):
                model(tokens)
        assert w.steps == 5
        assert [line["step"] for line in w.lines] == [n for n in (0, 2, 4) for _ in wanted]
        assert list(w.layers) == wanted
        assert all(line["heads"] == [3, 1] and len(line["entropy"]) == 2 for line in w.lines)
        assert not w.not_seen
    with qkv.watch(model) as w:
        model(tokens)
    every = next(iter(w.lines))["entropy"]
    with qkv.watch(model, heads=[3, 1]) as w:
        model(tokens)
    assert next(iter(w.lines))["entropy"] == [every[3], every[1]]
