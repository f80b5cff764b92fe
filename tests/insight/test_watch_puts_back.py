"""A watch puts everything back, and a failure of its own never reaches the model.

Wrong code that dies here: a patched function that stays after an exception, a copy that is watched, a call of another
thread that is seen.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.call.watchers import WATCHERS
from qkv.errors import ArgumentError
from qkv.insight.watch import hooks as hooked, points, steps
from qkv.lm.decoder import Config, Decoder
from tests.kit import watched
from tests.kit.watched import MODELS, SDPA, Bound, encoder, made


def places() -> list[Any]:
    """Everything that watching may assign."""
    return [
        SDPA, torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward,
        torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention, watched.scaled_dot_product_attention,
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
