"""Faults that are planted in a model are found, where they are, and nothing is found in a sound one.

Wrong code that dies here: findings of another head or layer, a NaN said to begin where it only arrives, an alarm on any
head that looks at one key or at all, trends without a memory, duplicates found between heads that agree on a sink.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.insight.watch.findings import FIXES
from qkv.lm.decoder import Config, Decoder

LAYERS, HEADS, DIM = 3, 4, 64
SIZE = DIM // HEADS
LISTS = ("uniform_heads", "sink_heads", "saturated_heads", "duplicate_heads")


def decoder(gain: float = 1.5, **options: Any) -> Decoder:
    """A sound one: scores of a standard deviation of about 2, and heads that were drawn apart."""
    model = Decoder(Config(dim=DIM, layers=LAYERS, heads=HEADS, **options))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_proj.weight.mul_(gain)
            block.attention.k_proj.weight.mul_(gain)
    return model


def watched(model: nn.Module, steps: int = 1, length: int = 40, **options: Any) -> qkv.watch:
    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), qkv.watch(model, **options) as w:
        for _ in range(steps):
            model(tokens)
    assert not w.errors
    return w


def rows(model: Decoder, layer: int, name: str, head: int) -> Tensor:
    """The weights of a head's projection."""
    weight: Tensor = getattr(model.blocks[layer].attention, name).weight.data
    return weight[head * SIZE : (head + 1) * SIZE]


def kinds(w: qkv.watch) -> set[tuple[str, str]]:
    return {(warning["layer"], warning["kind"]) for warning in w.warnings}


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa", "window"])
@pytest.mark.parametrize("gain", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("length", [1, 3, 12, 60])
def test_no_alarm_on_a_sound_model(attention: str, gain: float, length: int) -> None:
    w = watched(decoder(gain, attention=attention, window=9), steps=3, length=length)
    assert w.warnings == []
    assert w.nan is None
    assert not any(line[name] for line in w.lines for name in LISTS if name != "sink_heads" or length > 12)
    assert "!" not in str(w)


def test_no_alarm_in_training_and_generation() -> None:
    model = Decoder(Config(dim=32, layers=2, heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    with qkv.watch(model) as w:
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cache = model.cache(pages=8)
        seqs = [cache.add()]
        with torch.inference_mode():
            for part in tokens[:1].split([5, *([1] * 28)], 1):
                model(part, cache.step(seqs, T=part.shape[1]))
    assert w.steps == 34
    assert [line["warnings"] for line in w.lines if line["warnings"]] == []


def test_a_uniform_head() -> None:
    model = decoder()
    rows(model, 1, "q_proj", 2).zero_()
    w = watched(model)
    assert [line["uniform_heads"] for line in w.lines] == [[], [2], []]
    assert kinds(w) == {("blocks.1.attention", "uniform")}
    (warning,) = w.warnings
    assert warning["heads"] == [2]
    assert warning["fix"] == FIXES["uniform"]
    assert "blocks.1.attention: head 2 weighs all keys alike" in str(w)


def test_a_duplicate_head() -> None:
    model = decoder()
    for name in ("q_proj", "k_proj"):
        rows(model, 2, name, 3).copy_(rows(model, 2, name, 0))
    w = watched(model)
    found = w.lines[2]["duplicate_heads"]
    assert [pair[:2] for pair in found] == [[0, 3]]
    assert found[0][2] == pytest.approx(1)
    assert kinds(w) == {("blocks.2.attention", "duplicate")}
    assert not w.lines[0]["duplicate_heads"]
    # Heads that share keys, and ask the same: the same fault in grouped heads.
    model = decoder(attention="mqa")
    rows(model, 0, "q_proj", 2).copy_(rows(model, 0, "q_proj", 1) * 1.01)
    assert [pair[:2] for pair in watched(model).lines[0]["duplicate_heads"]] == [[1, 2]]


class Planted(nn.Module):
    """One call on the tensors that it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        found: Tensor = qkv.attention(q, k, v, mask=qkv.causal(), sinks=sinks)
        return found


def looked(q: Tensor, k: Tensor, v: Tensor | None = None, sinks: Tensor | None = None) -> dict[str, Any]:
    model = Planted()
    with qkv.watch(model) as w:
        model(q, k, k if v is None else v, sinks)
    assert not w.errors
    return dict(w.lines[0])


def test_sink_heads() -> None:
    """A key that all queries of a head want is a sink and no fault, nor are two heads with one duplicates."""
    q, k = torch.randn(2, 2, 4, 40, 16)
    for head in (1, 3):
        q[:, head, :, 0] = 9.0
        k[:, head, :, 0] = 0.0
        k[:, head, 0, 0] = 9.0
    line = looked(q, k)
    assert line["sink_heads"] == [1, 3]
    assert [round(line["first"][h], 2) for h in (1, 3)] == [1, 1]
    assert line["saturated_heads"] == [1, 3]
    assert line["duplicate_heads"] == []
    assert line["warnings"] == []
    line = looked(*torch.randn(2, 2, 4, 40, 16), sinks=torch.tensor([9.0, -9.0, 0.0, -torch.inf]))
    assert line["sink"][0] > 0.95
    assert line["sink"][1] < 0.01
    assert line["sink"][3] == 0
    assert line["sink_heads"] == []


def test_saturated_heads() -> None:
    """Each query of one head wants the key of its own place."""
    q, k = torch.randn(2, 1, 3, 40, 64)
    k[:, 1] = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1) * 16
    q[:, 1] = k[:, 1]
    line = looked(q, k)
    assert line["saturated_heads"] == [1]
    assert line["sure"][1] > 0.99
    assert line["sink_heads"] == line["uniform_heads"] == []


class Poison(nn.Module):
    """Writes a NaN into one row of what passes."""

    def __init__(self, batch: int, row: int) -> None:
        super().__init__()
        self.at, self.on = (batch, row), False

    def forward(self, x: Tensor) -> Tensor:
        if self.on:
            x = x.clone()
            x[self.at[0], self.at[1], 5] = torch.nan
        return x


@pytest.mark.parametrize(("layer", "batch", "row"), [(0, 0, 0), (1, 1, 13), (2, 0, 39)])
def test_where_nan_begins(layer: int, batch: int, row: int) -> None:
    """In the layer, row, batch row and step in which it was planted, though later layers have it as well."""
    model = decoder()
    poison = Poison(batch, row)
    model.blocks[layer].before_attention = nn.Sequential(model.blocks[layer].before_attention, poison)
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad(), qkv.watch(model) as w:
        for step in range(4):
            poison.on = step == 2
            model(tokens)
    name = f"blocks.{layer}.attention"
    assert w.nan == {"step": 2, "layer": name, "batch": batch, "head": 0, "row": row}
    line = next(line for line in w.lines if line["nan"]["rows"])
    assert (line["step"], line["layer"]) == (2, name)
    assert line["nan"]["rows"] == (40 - row) * HEADS  # of every later row the key is visible
    assert f"! {name}: NaN from step 2, row {row} of head 0" in str(w)
    assert all(not line["nan"]["rows"] for line in w.lines if line["step"] != 2)


def test_nan_in_one_query_one_key_one_value() -> None:
    q, k, v = torch.randn(3, 2, 4, 40, 16)
    q[1, 2, 7, 3] = torch.nan
    line = looked(q, k, v)
    assert line["nan"] == {"rows": 1, "of": 320, "first": {"batch": 1, "head": 2, "row": 7}}
    assert [w["kind"] for w in line["warnings"]] == ["nan"]
    q = torch.randn(2, 4, 40, 16)
    k[0, 3, 30, 1] = torch.nan
    assert looked(q, k, v)["nan"] == {"rows": 10, "of": 320, "first": {"batch": 0, "head": 3, "row": 30}}
    v[1, 1, 4, 2] = torch.nan
    line = looked(q, torch.randn(2, 4, 40, 16), v)
    assert line["nan"]["rows"] == 0
    assert line["nan_values"] == {"keys": 1, "first": {"batch": 1, "head": 1, "row": 4}}
    assert [w["kind"] for w in line["warnings"]] == ["nan values"]


def test_a_mask_that_hides_everything() -> None:
    class Hidden(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            found: Tensor = qkv.attention(q, q, q, mask=torch.zeros(5, 5, dtype=torch.bool))
            return found

    model = Hidden()
    with qkv.watch(model) as w:
        model(torch.randn(1, 2, 5, 8))
    assert kinds(w) == {("", "dead")}
    assert w.lines[0]["entropy"] == [None, None]


def test_logits_that_grow_and_entropy_that_collapses() -> None:
    """Only what has become large is said: not what was so at first, and not in a head that was sharp before."""
    model = decoder()
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad(), qkv.watch(model) as w:
        for _ in range(4):
            model(tokens)
            rows(model, 1, "q_proj", 2).mul_(8.0)
    found = [{one["kind"] for one in line["warnings"]} for line in w.lines if line["number"] == 1]
    assert found[0] == set()
    assert found[3] == {"logit", "collapse"}
    assert all(one["heads"] == [2] for one in w.warnings)
    assert {one["layer"] for one in w.warnings} == {"blocks.1.attention"}
    assert all(one["fix"] == FIXES[one["kind"]] for one in w.warnings)
    with torch.no_grad(), qkv.watch(model) as w:  # as sharp as before, from its first step on
        for _ in range(3):
            model(tokens)
    assert w.warnings == []
