"""Watching a live model: it changes nothing, tells the truth, and puts everything back.

Wrong code that dies here: a watcher with hooks on modules (PyTorch's fast path closes, with other bits), one that draws
from torch's generator or keeps a graph, numbers of the wrong head, row or scale, a patched function that stays after an
exception, a step that is looked at out of turn, a failure while looking that reaches the model.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv.call.problem import Options
from qkv.call.watchers import WATCHERS
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.insight.watch import SCHEMA, hooks as hooked, points, steps
from qkv.insight.watch.calls import Call as WatchedCall
from qkv.insight.watch.findings import FIXES
from qkv.insight.watch.numbers import few_rows, look
from qkv.lm.decoder import KINDS, Config, Decoder

BOUND = scaled_dot_product_attention  # a name of this module for PyTorch's function
SDPA = torch.nn.functional.scaled_dot_product_attention


class Bound(nn.Module):
    """A layer that calls PyTorch's function by a name bound at import."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.into, self.options = nn.Linear(16, 48), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Bound(is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return found


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Weighed(nn.Module):
    """PyTorch's layer asked for its weights, which it then computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        gone = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        found: Tensor = self.attention(x, x, x, attn_mask=gone)[0]
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qkv.nn.Attention": lambda: qkv.nn.Attention(16, 4, num_kv_heads=2, mask=qkv.causal(), sinks=True, dropout_p=0.2),
    "qkv.nn.MultiheadAttention": lambda: _Self(qkv.nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True)),
    "a bound name": lambda: Bound(is_causal=True),
    "dropout": lambda: Bound(dropout_p=0.3),
    "checkpointed": Checkpointed,
    "TransformerEncoder": lambda: encoder(dropout=0.1),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    "norm first": lambda: encoder(norm_first=True),
    "weights asked for": Weighed,
    "TransformerDecoderLayer": lambda: _Cross(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)),
}


class _Self(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return found


class _Cross(_Self):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, x[:, :7])
        return found


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradients and weights of three steps, and what the generator gives next."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), []
    torch.manual_seed(5)
    for _ in range(3):
        out = model(x)
        optimizer.zero_grad()
        out.square().sum().backward()
        found += [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *(p.detach().clone() for p in model.parameters()), torch.rand(4)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    assert all(t.isfinite().all() for t in one)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------------- it changes nothing
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


# ------------------------------------------------------------------------------------------------- it tells the truth
def dense(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Any:
    """Weights with a last column for the sink, and scores, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.double().mT * scale
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = s.masked_fill(~visible, -torch.inf)
    sink = torch.full((q.shape[1],), -torch.inf, dtype=s.dtype) if sinks is None else sinks.double()
    p = torch.cat([s, sink[None, :, None, None].expand(*s.shape[:3], 1)], -1).softmax(-1)
    return p, s


class Call(nn.Module):
    """One call of qkv.attention with these arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = qkv.attention(q, k, v, **self.options)
        return found


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


# ------------------------------------------------------------------------------------------------- it puts things back
def places() -> list[Any]:
    """Everything that watching may assign."""
    return [
        SDPA, torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward,
        torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention, scaled_dot_product_attention,
        tuple(WATCHERS), points._users, tuple(points._points), tuple(steps.HERE.steps), steps.HERE.inside,
        torch.backends.mha.get_fastpath_enabled(), nn.TransformerEncoderLayer.forward, dict(hooked._Around._known),
    ]  # fmt: skip


def hooks(model: nn.Module) -> list[Any]:
    return [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._forward_hooks_always_called), "forward" in vars(m))
        for m in model.modules()
    ]


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error, self.fails = Bound(), error, True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.fails:
            raise self.error
        return y


@pytest.mark.parametrize("error", [ValueError("the model's"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_exceptions_leave_nothing_behind(error: BaseException) -> None:
    model, x = Failing(error), torch.randn(1, 4, 16)
    before, own = places(), hooks(model)
    with pytest.raises(type(error)), qkv.watch(model):
        model(x)
    assert places() == before
    assert hooks(model) == own
    with pytest.raises(ZeroDivisionError), qkv.watch(model):
        raise ZeroDivisionError
    assert places() == before
    with qkv.watch(model) as w:  # an exception in one step does not spoil the next
        with pytest.raises(type(error)):
            model(x)
        made("a bound name")(x)  # is no part of the step that was interrupted
        model.fails = False
        model(x)
    assert (w.steps, [line["step"] for line in w.lines]) == (2, [0, 1])
    assert isinstance(error, KeyboardInterrupt) or "2 steps, 2 looked at" in str(w)
    assert places() == before


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_back_afterwards(name: str) -> None:
    model, before = made(name), places()
    own = hooks(model)
    w = qkv.watch(model).start()
    assert places() != before
    w.stop()
    w.stop()
    assert places() == before
    assert hooks(model) == own


def test_patches_of_others_are_left_alone() -> None:
    """Inside and around a block of patch_sdpa, and with a function that someone else has assigned meanwhile."""
    model, x, before = encoder(), torch.randn(1, 5, 16), places()
    with qkv.compat.patch_sdpa() as patched, qkv.watch(model) as w:
        model(x)
    assert places() == before
    assert sum(patched.calls.values()) == len(w.lines) == 2
    with qkv.watch(model) as w, qkv.compat.patch_sdpa() as patched:
        model(x)
    assert places() == before
    assert sum(patched.calls.values()) == len(w.lines) == 2
    theirs = lambda *a, **b: SDPA(*a, **b)  # noqa: E731
    with qkv.watch(model):
        torch.nn.functional.scaled_dot_product_attention = theirs  # type: ignore[assignment]
    assert torch.nn.functional.scaled_dot_product_attention is theirs
    torch.nn.functional.scaled_dot_product_attention = SDPA
    assert places() == before


def test_nothing_of_the_model_is_kept() -> None:
    model = made("a bound name")
    x = torch.randn(1, 4, 16)
    with qkv.watch(model) as w:
        out = model(x)
        kept = [weakref.ref(out), weakref.ref(x)]
        del out, x
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
    assert w.lines


@pytest.mark.parametrize("name", ["a bound name", "TransformerEncoderLayer", "qkv.nn.Attention"])
def test_copies_and_pickles_are_not_watched(name: str) -> None:
    """An average of weights is a copy that is made in training, and a checkpoint may be the whole model."""
    model, x = made(name).eval(), torch.randn(1, 4, 16)
    with torch.no_grad(), qkv.watch(model) as w:
        copied = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        read = torch.load(stream, weights_only=False)
        for parameter in model.parameters():
            parameter.add_(1.0)
        want = model(x)
        for other in (copied, read, copy.copy(model)):
            assert torch.equal(other(x), want) == (other not in (copied, read))
    assert w.steps == 1
    assert len(w.lines) == 1
    assert all(torch.equal(copied(x), other(x)) for other in (read, copied))


def test_a_failure_while_looking_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("a bound name"), torch.randn(1, 4, 16)
    want, before = model(x), places()
    monkeypatch.setattr("qkv.insight.watch.look", lambda call: 1 / 0)
    w = qkv.watch(model).start()
    assert torch.equal(model(x), want)
    model(x)
    with pytest.warns(UserWarning, match=r"failed 2 times while looking.*ZeroDivisionError"):
        w.stop()
    assert list(w.errors) == ["ZeroDivisionError: division by zero"] * 2
    assert "looking failed 2 times" in str(w)
    assert places() == before


def test_several_watches_at_once() -> None:
    """Nested, of one model and of a part of it, left in any order."""
    model, tokens, before = Decoder(Config(dim=32, layers=2, heads=2)), torch.randint(256, (1, 6)), places()
    whole, again, part = qkv.watch(model), qkv.watch(model, every=2), qkv.watch(model.blocks[1])
    for w in (whole, again, part):
        w.start()
    model(tokens)
    whole.stop()
    model(tokens)
    again.stop()
    model(tokens)
    part.stop()
    assert [w.steps for w in (whole, again, part)] == [1, 2, 3]
    assert [len(w.lines) for w in (whole, again, part)] == [2, 2, 3]
    assert list(part.layers) == ["attention"]
    assert places() == before
    with pytest.raises(ArgumentError, match="entered once"), whole, whole:
        pass
    assert places() == before


def test_threads_see_their_own_calls() -> None:
    models = [Decoder(Config(dim=32, layers=layers, heads=2)) for layers in (1, 3)]
    tokens, before = torch.randint(256, (1, 6)), places()
    watches = [qkv.watch(model) for model in models]

    def run(model: nn.Module) -> None:
        for _ in range(20):
            model(tokens)

    for w in watches:
        w.start()
    threads = [threading.Thread(target=run, args=(model,)) for model in (*models, models[1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for w in watches:
        w.stop()
    assert [w.steps for w in watches] == [20, 40]
    assert [len(w.lines) for w in watches] == [20, 120]
    assert [len(w.layers) for w in watches] == [1, 3]
    assert sorted({line["step"] for line in watches[1].lines}) == list(range(40))
    assert places() == before


# ------------------------------------------------------------------------------------------------- what it writes
def test_lines_are_strict_json(tmp_path: Path) -> None:
    """NaN and infinity are null; a file that is there is added to, a writer is the user's to close."""
    model, path, stream = Call(), tmp_path / "watch.jsonl", io.StringIO()
    q = torch.randn(1, 2, 5, 8)
    broken = q.clone()
    broken[..., 0] = torch.nan
    for to in (path, str(path), stream):
        with qkv.watch(model, to=to) as w:
            model(q, q, q)
            model(broken, q, q)
            model(q[:, :, :0], q, q)
        assert not w.errors
    texts = [path.read_text().splitlines(), stream.getvalue().splitlines()]
    assert [len(lines) for lines in texts] == [6, 3]

    def refuse(text: str) -> None:
        raise ValueError(text)

    found = [json.loads(line, parse_constant=refuse) for line in texts[1]]
    assert found[1]["entropy"] == [None, None]
    assert found[1]["nan"] == {"rows": 10, "of": 10, "first": {"batch": 0, "head": 0, "row": 0}}
    assert {(line["schema"], line["layer"]) for line in found} == {(1, "")}
    assert set(found[0]) == DOCUMENTED


DOCUMENTED = {
    "schema", "step", "layer", "number", "module", "via", "shape", "dtype", "heads", "entropy", "tokens", "logit",
    "weight", "sure", "sink", "first", "away", "nan", "nan_values", "dead", "uniform_heads", "sink_heads",
    "saturated_heads", "duplicate_heads", "warnings",
}  # fmt: skip


def test_scalars_for_a_board() -> None:
    class Writer:
        def __init__(self) -> None:
            self.found: dict[tuple[str, int], float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.found[name, step] = value

    model, writer = Decoder(Config(dim=32, layers=1, heads=2)), Writer()
    with qkv.watch(model, every=2, tensorboard=writer) as w:
        for _ in range(3):
            model(torch.randint(256, (1, 6)))
    line = w.lines[0]
    assert writer.found["attention/blocks.0.attention/entropy", 0] == sum(line["entropy"]) / 2
    assert writer.found["attention/blocks.0.attention/logit", 0] == max(line["logit"])
    assert {step for _, step in writer.found} == {0, 2}
    assert all(math.isfinite(x) for x in writer.found.values())


def test_a_board_that_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError, match=r"TensorBoard must be installed.*pip install tensorboard"):
        qkv.watch(nn.Linear(2, 2), tensorboard=tmp_path)


@pytest.mark.parametrize("layers", [0, 1, 3, 60])
def test_the_summary_is_one_screen(layers: int) -> None:
    model = nn.Sequential(*(made("a bound name") for _ in range(layers)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_name_that_is_longer_than_its_column = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in model:
                x = layer(x)
                x = x * torch.nan if layer is model[len(model) // 2] else x
            return x

    watched = Model()
    with qkv.watch(watched) as w:
        watched(torch.randn(1, 9, 16))
    lines = str(w).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "1 steps" in lines[0]
    if layers == 60:
        assert any("more" in line for line in lines)
        assert any("layers without warnings" in line for line in lines)


# ------------------------------------------------------------------------------------------------- what is not seen
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


# ------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ArgumentError, "every is an int >= 1"),
        ({"every": 1.5}, ArgumentError, "every is an int >= 1"),
        ({"first": 0}, ArgumentError, "first is an int"),
        ({"heads": "some"}, ArgumentTypeError, "heads are"),
        ({"heads": [-1]}, ArgumentTypeError, "heads are"),
        ({"layers": []}, ArgumentTypeError, "layers are"),
        ({"layers": [1.5]}, ArgumentTypeError, "layers are"),
        ({"to": 3}, ArgumentTypeError, "to must be"),
        ({"tensorboard": 3}, ArgumentTypeError, "tensorboard must be"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        qkv.watch(nn.Linear(2, 2), **options)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"model must be a torch\.nn\.Module"):
        qkv.watch(copy)  # type: ignore[arg-type]


def test_the_schema_is_documented() -> None:
    """Each name of a line stands in the table of docs/watch.md, and every kind of warning in its text."""
    page = (Path(__file__).resolve().parents[2] / "docs/watch.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    named = {name.strip() for row in rows for name in row.split(",")}
    assert named >= DOCUMENTED - {"schema"}
    assert "`schema`, is 1" in page
    assert SCHEMA == 1
    assert all(f"`{kind}`" in page for kind in FIXES)
