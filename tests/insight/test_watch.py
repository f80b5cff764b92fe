"""Watching a live model changes nothing: every bit of its training and evaluation is as without.

Wrong code that dies here: a watcher with hooks on modules (PyTorch's fast path closes, with other bits), one that draws
from torch's generator or keeps a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.lm.decoder import KINDS, Config, Decoder
from tests.kit.watched import MODELS, encoder, made, same, trained


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_keeps_every_bit(name: str, autocast: bool) -> None:
    x = torch.randn(2, 12, 16)
    with torch.autocast("cpu", enabled=autocast):
        want = trained(made(name), x)
        model = made(name)
        with qkv.watch(model) as w:
            found = trained(model, x)
    assert same(want, found)
    assert w.steps == 3
    assert not w.errors
    assert not w.not_seen, w.not_seen
    assert {line["step"] for line in w.lines} == {0, 1, 2}


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_keeps_every_bit(name: str, grad: Any) -> None:
    model, x = made(name).eval(), torch.randn(2, 12, 16)
    with grad():
        torch.manual_seed(3)
        want = model(x)
        torch.manual_seed(3)
        with qkv.watch(model) as w:
            found = model(x)
    assert torch.equal(want, found)
    assert w.lines
    assert not w.errors
    assert not w.not_seen, w.not_seen


class Counted:
    __name__ = "counted"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.function(*args)


def test_the_fast_path_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation PyTorch's layers run one fused function; a hook on any of their modules would close that path."""
    for model in (encoder().eval(), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()):
        calls = Counted(torch._transformer_encoder_layer_fwd)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", calls)
        with torch.no_grad(), qkv.watch(model) as w:
            model(torch.randn(2, 12, 16))
        monkeypatch.undo()
        assert calls.count
        assert {line["via"] for line in w.lines} == {"torch.nn.TransformerEncoderLayer"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_decoder(kind: str) -> None:
    """In training, and in generation over a cache on pages: each new token is a step."""
    config = Config(attention=kind, dim=32, layers=2, heads=2, window=6)
    tokens = torch.randint(256, (2, 11))

    def run(watched: bool) -> tuple[list[Tensor], Any]:
        model = Decoder(config)
        w = qkv.watch(model)
        if watched:
            w.start()
        out = model(tokens)
        out.logsumexp(-1).sum().backward()
        found = [out, *(p.grad for p in model.parameters() if p.grad is not None)]
        cache = model.cache(pages=8)
        seqs = [cache.add() for _ in tokens]
        with torch.inference_mode():
            found += [model(part, cache.step(seqs, T=part.shape[1])) for part in tokens.split([8, 1, 2], 1)]
        w.stop()
        return found, w

    want, _ = run(False)
    found, w = run(True)
    assert same(want, found)
    assert w.steps == 4
    assert not w.errors
    assert list(w.layers) == ["blocks.0.attention", "blocks.1.attention"]
    keys = [line["shape"]["Lk"] for line in w.lines if line["number"] == 0]
    assert keys == [11, 8, 9, 11]
    assert not any(line["nan"]["rows"] for line in w.lines)


def test_ragged_steps_have_no_rows_of_their_own_making() -> None:
    """Sequences of unequal lengths are packed: what pads them is no NaN."""
    model = Decoder(Config(dim=32, layers=1, heads=2))
    cache = model.cache(pages=8)
    seqs = [cache.add(), cache.add()]
    with torch.inference_mode(), qkv.watch(model) as w:
        model(torch.randint(256, (1, 9)), cache.step(seqs, lengths=[7, 2]))
    assert not w.errors
    assert w.lines[0]["nan"] == {"rows": 0, "of": 9 * 2, "first": None}
