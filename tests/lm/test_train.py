"""`qkv train`: the split of the text and the loop, by entropies known by construction, and by bits where promised."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.errors import ArgumentError
from qkv.lm import training
from qkv.lm.comparison import step_times
from qkv.lm.data import Corpus, read_corpus
from qkv.lm.decoder import PLAIN, Config, Decoder
from qkv.lm.variants import SdpaAttention
from tests.kit.training import SETTINGS, TINY, corpus, letters

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]


# ---- the text


def test_the_reference_is_split_into_parts_that_share_no_paragraph() -> None:
    found = read_corpus(None, 256)
    train, held = (bytes(part.tolist()).decode() for part in (found.train, found.held))
    pieces = [{" ".join(p.split()) for p in re.split(r"\n\s*\n", part) if p.strip()} for part in (train, held)]
    assert min(map(len, pieces)) > 50
    assert not pieces[0] & pieces[1]
    assert 0.08 < len(held) / (len(train) + len(held)) <= 0.1
    assert "\n   " in train  # the text itself, not its words
    assert found.sha256 == read_corpus(None, 16).sha256


def test_a_file_is_cut_once_at_a_blank_line_and_nothing_is_lost(tmp_path: Path) -> None:
    data = b"".join(b"%d %s\n\n" % (n, letters(n % 50, n)) for n in range(200))
    path = tmp_path / "text"
    path.write_bytes(data)
    found = read_corpus(str(path), 32)
    train, held = (bytes(part.tolist()) for part in (found.train, found.held))
    assert train + held == data
    assert train.endswith(b"\n\n")
    assert 0 <= len(data) // 10 - len(held) < 60
    assert found.train.untyped_storage().data_ptr() != found.held.untyped_storage().data_ptr()
    path.write_bytes(bytes(range(256)) * 4)  # neither text nor blank lines
    assert len(read_corpus(str(path), 32).held) == 102


def test_batches_come_from_the_training_part_only_and_from_all_of_it() -> None:
    found = corpus(bytes(range(100)), b"\xff" * 50)
    batches = found.batches(16, 8, torch.Generator().manual_seed(0))
    seen: set[int] = set()
    for _ in range(40):
        inputs, targets = next(batches)
        assert torch.equal(inputs + 1, targets)
        seen |= set(inputs.flatten().tolist()) | set(targets.flatten().tolist())
    assert seen == set(range(100))


@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 50])
def test_each_held_out_byte_but_the_first_is_asked_once(length: int) -> None:
    found = corpus(b"x" * 100, bytes(range(length)))
    pairs = list(found.held_out(2, 8))
    assert torch.cat([inputs.flatten() for inputs, _ in pairs]).tolist() == list(range(length - 1))
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == list(range(1, length))
    assert max(inputs.shape[1] for inputs, _ in pairs) <= 8


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x" * 2000)
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "a directory"), (short, "2,000 bytes")):
        with pytest.raises(ArgumentError, match=words):
            read_corpus(str(path), 256)


# ---- the loop


def repeated(blocks: int, seed: int) -> bytes:
    """Eight letters of 16, drawn anew for each block and said eight times: only the byte eight back tells the next."""
    return b"".join(letters(8, seed * 100_000 + n) * 8 for n in range(blocks))


LEARN = training.Settings(steps=150, batch=8, warmup=10, rate=1e-2, seed=1)
SMALL: dict[str, Any] = {"dim": 32, "layers": 1, "heads": 2, "context": 64}


def learned(config: Config, text: Corpus) -> float:
    run = training.Run(config, LEARN, text)
    run.go(LEARN.steps, LEARN.steps, lambda _: None)
    return run.record.held[-1][1]


def test_attention_learns_what_only_attention_can(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(repeated(300, 1), repeated(30, 2))
    # Unpredictable are 8 of 64 bytes, and those that a window's start hides: 4 bits each. Blind to other places, every
    # byte takes close to 4 bits.
    assert learned(Config(**SMALL), text) < 2.0
    monkeypatch.setattr(qkv.nn.Attention, "forward", lambda self, x, **_: torch.zeros_like(x))
    assert learned(Config(**SMALL), text) > 3.5


def test_noise_stays_noise_unless_the_mask_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(letters(30_000, 1), letters(3_000, 2))
    assert learned(Config(**SMALL), text) > 3.98  # 16 letters by chance: no model that is blind to them goes below 4
    monkeypatch.setattr(Config, "mask", property(lambda self: None))
    assert learned(Config(**SMALL), text) < 3.5


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = training.Settings(steps=1000, rate=0.5, warmup=100)
    rates = [settings.rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[49] == pytest.approx(0.25)
    assert max(rates) == pytest.approx(0.5) == rates[100]
    assert rates[550] == pytest.approx(0.05 + 0.45 / 2)  # half way down
    assert rates[999] == pytest.approx(0.05, abs=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert training.Settings(steps=1).rate_at(0) == training.Settings().rate


def test_a_step_has_its_own_rate_and_a_gradient_of_norm_1_at_most() -> None:
    settings = training.Settings(steps=40, batch=4, warmup=4, rate=2e-3)
    run = training.Run(Config(**TINY), settings, corpus(letters(2000)))
    run.rng.set_state(torch.Generator().manual_seed(7).get_state())
    inputs, targets = next(corpus(letters(2000)).batches(4, 32, torch.Generator().manual_seed(7)))
    twin = Decoder(Config(**TINY), settings.seed)
    torch.nn.functional.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.advance()
    raw, clipped = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (twin, run.model)
    )
    assert raw.norm() > 1.01  # else nothing would be clipped
    assert torch.allclose(clipped, raw / raw.norm(), rtol=1e-4, atol=1e-7)
    # Adam's first step has the size of the rate in every weight, here a quarter of the peak.
    moved = (run.model.norm.weight.detach() - before["norm.weight"]).abs()
    assert torch.allclose(moved, torch.full_like(moved, 5e-4), rtol=1e-2)


def test_settings_that_do_not_fit() -> None:
    for given in ({"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"seed": -1}, {"warmup": 1.5}):
        with pytest.raises(ArgumentError, match="Got"):
            training.Settings(**given)  # type: ignore[arg-type]


def test_a_seed_decides_and_another_decides_otherwise() -> None:
    text = corpus(letters(2000))
    losses = []
    for seed in (1, 1, 2):
        run = training.Run(Config(**TINY), training.Settings(steps=3, batch=2, seed=seed), text)
        torch.rand(seed)  # the global generator changes nothing
        losses.append([run.advance() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_with_pytorchs_attention_the_losses_are_the_same_but_for_rounding() -> None:
    text = corpus(letters(2000))
    for kind in PLAIN:
        curves = []
        for op in ("qkv", "sdpa"):
            run = training.Run(Config(attention=kind, op=op, **TINY), SETTINGS, text)
            assert any(isinstance(module, SdpaAttention) for module in run.model.modules()) == (op == "sdpa")
            curves.append([run.advance() for _ in range(4)])
        # Adam's first steps have the size of the rate whatever the gradient: they can double a rounding, not hide a
        # wrong gradient, which moves the loss by hundredths within these steps.
        assert np.allclose(curves[0], curves[1], rtol=0, atol=2e-4), (kind, curves)


def test_steps_are_timed_in_turn() -> None:
    found = step_times({op: Config(op=op, **TINY) for op in ("qkv", "sdpa")}, 2, rounds=3)
    assert {op: len(times) for op, times in found.items()} == {"qkv": 3, "sdpa": 3}
    assert all(t > 0 for times in found.values() for t in times)
