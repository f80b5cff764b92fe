"""What a watch does not see is said: attention by other means, calls that cannot be looked at, compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv.lm.decoder import Config, Decoder
from tests.kit.watched import Call, made


class Own(nn.Module):
    """Attention that multiplies matrices by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class OwnAttention(Own):
    pass


def test_what_is_not_seen_is_said() -> None:
    model = nn.Sequential(OwnAttention(), made("a bound name"))
    with qkv.watch(model) as w:
        model(torch.randn(1, 5, 16))
    assert len(w.lines) == 1
    assert any(text.startswith("0: no call was met") for text in w.not_seen)
    assert "not seen: 0: no call" in str(w)
    with qkv.watch(model) as w:
        model.forward(torch.randn(1, 5, 16))
    assert "was not called" in str(w)


def test_calls_that_cannot_be_looked_at_are_counted() -> None:
    model = Call()
    q = torch.randn(3, 1, 2, 5, 8)
    with qkv.watch(model) as w:
        torch.vmap(lambda x: model(x, x, x))(q)
    assert not w.lines
    assert any("torch.func" in text for text in w.not_seen)

    class Marked(Tensor):
        pass

    layer, x = made("a bound name"), torch.randn(1, 5, 16).as_subclass(Marked)
    want = layer(x)
    with qkv.watch(layer) as w:
        found = layer(x)
    assert torch.equal(want, found)
    assert type(found) is Marked
    assert any("of class Marked" in text for text in w.not_seen)


def test_a_call_under_a_counter_is_one_call() -> None:
    """A mode makes a node of it: the call, and the node that runs, are the same."""
    model = Call(mask=qkv.causal())
    q = torch.randn(1, 2, 5, 8)
    with qkv.watch(model) as w, FlopCounterMode(display=False):
        model(q, q, q)
        model(q, q, q)
    assert [(line["step"], line["layer"]) for line in w.lines] == [(0, ""), (1, "")]


@pytest.mark.parametrize("tool", ["eager", "aot_eager"])
def test_compiled_models(tool: str) -> None:
    """qkv's calls are seen when the graph runs, without their layers; nothing is compiled because of a watch."""
    model, tokens = Decoder(Config(dim=32, layers=2, heads=2)), torch.randint(256, (1, 7))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=tool)
    want = compiled(tokens)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with qkv.watch(compiled) as w:
        found = compiled(tokens)
    assert torch.equal(want, found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert [line["via"] for line in w.lines] == ["torch.ops.qkv.attention"] * 2
    assert [line["layer"] for line in w.lines] == ["", "#1"]
    with qkv.watch(model) as plain:
        model(tokens)
    assert len(plain.lines) == 2
    for one, two in zip(plain.lines, w.lines, strict=True):
        assert one["entropy"] == pytest.approx(two["entropy"], rel=1e-5)
    assert any("is compiled" in text for text in w.not_seen)
