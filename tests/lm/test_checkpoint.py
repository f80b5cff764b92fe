"""Checkpoints of `qkv train`: a run goes on to the same bits, and what is no checkpoint is refused unread."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qkv.errors import ArgumentError
from qkv.lm import checkpoint, training
from qkv.lm.data import Corpus
from qkv.lm.decoder import Config, Decoder
from tests.kit.training import SETTINGS, TINY, corpus, letters, trained

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_a_run_that_was_stopped_continues_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    whole = training.Run(Config(attention=kind, **TINY), SETTINGS, corpus(letters(2000)))
    whole.go(8, 2, lambda _: None)
    trained(tmp_path / "a", kind)
    again = training.resumed(checkpoint.load(tmp_path / "a"), corpus(letters(2000)))
    assert again.step == 5
    again.go(8, 2, lambda _: None, save=tmp_path / "b")
    assert again.record.losses == whole.record.losses
    assert dict(again.record.held).items() >= dict(whole.record.held).items()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    whole.save(tmp_path / "c")
    saved = [checkpoint.load(tmp_path / name) for name in "bc"]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    for name, tensor in saved[0].tensors.items():
        assert torch.equal(tensor, saved[1].tensors[name]), name


def test_a_checkpoint_holds_weights_moments_and_generator_and_nothing_else(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    saved = checkpoint.load(tmp_path / "a")
    parameters = dict(run.model.named_parameters())
    want = {"rng.batches"} | {f"model.{name}" for name in parameters}
    want |= {f"optimizer.{kind}.{name}" for name in parameters for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert set(saved.tensors) == want
    assert saved.notes["config"] == {**TINY, "attention": "mha", "tied": False, "op": "qkv"}
    assert saved.notes["step"] == 5
    assert not list(tmp_path.glob("*.part"))


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": Touch(str(trap))}, tmp_path / "torch")
    (tmp_path / "plain").write_bytes(pickle.dumps(Touch(str(trap))))
    for name in ("torch", "plain"):
        with pytest.raises(ArgumentError, match="pickles are never read"):
            checkpoint.load(tmp_path / name)
    assert not trap.exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    save_file({"x": torch.zeros(2)}, tmp_path / "notes", metadata={"format": checkpoint.FORMAT, "notes": "[1]"})
    save_file({"x": torch.zeros(2)}, tmp_path / "json", metadata={"format": checkpoint.FORMAT, "notes": "{"})
    for name in ("cut", "empty", "foreign", "notes", "json", "none"):
        with pytest.raises(ArgumentError, match="Name a file that qkv train wrote"):
            checkpoint.load(tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "bare", metadata={"format": checkpoint.FORMAT, "notes": "{}"})
    with pytest.raises(ArgumentError, match="config and settings"):
        training.configured(checkpoint.load(tmp_path / "bare"))


def test_tensors_that_do_not_fit_are_refused_and_copy_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    saved = checkpoint.load(tmp_path / "a")
    name = "model.blocks.1.attention.q_proj.weight"
    whole = saved.tensors[name]
    wrong: dict[str, dict[str, torch.Tensor]] = {
        r"must be \(32, 32\) torch.float32": {name: whole[:, :16]},
        "torch.int32": {name: whole.int()},
        "torch.float64": {name: whole.double()},
        "unknown ..blocks.9.x": {"model.blocks.9.x": whole},
    }
    for words, change in wrong.items():
        model = Decoder(Config(**TINY), seed=9)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        bad = checkpoint.Saved(saved.path, {**saved.tensors, **change}, saved.notes)
        with pytest.raises(ArgumentError, match=words):
            checkpoint.copy_exactly(bad, "model", model.state_dict())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for missing in (name, "rng.batches", f"optimizer.exp_avg.{name[6:]}"):
        bad = checkpoint.Saved(saved.path, {k: v for k, v in saved.tensors.items() if k != missing}, saved.notes)
        with pytest.raises(ArgumentError, match="exactly"):
            training.resumed(bad, corpus(letters(2000)))
    other = Corpus("other", *(torch.zeros(500, dtype=torch.uint8),) * 2, "1" * 64)
    with pytest.raises(ArgumentError, match="the text it began with"):
        training.resumed(saved, other)
