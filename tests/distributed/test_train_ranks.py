"""Runs of several ranks: the batches, losses and weights of one process, and checkpoints for any number of ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import qkv
from qkv.cli.main import main
from qkv.errors import ArgumentError, RankError, UnsupportedError
from qkv.lm import checkpoint, parts, ranks as training_ranks
from qkv.lm.decoder import Config
from qkv.lm.ranks import ParallelRun, Ranks
from qkv.lm.training import Run, Settings, decoder, resumed
from tests.kit.ranks import on_own_ranks, on_ranks
from tests.kit.training import SETTINGS, TINY, corpus, letters

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]

TEXT = letters(2017)  # its held-out part ends in a window of 11 bytes
ROOT = Path(__file__).resolve().parents[2]


def _quiet(run: Run) -> None:
    pass


def _ranks(mesh: DeviceMesh, context: int) -> Ranks:
    if context in (1, mesh.size()):
        return Ranks(mesh, None if context == 1 else mesh)
    return Ranks(mesh, DeviceMesh("cpu", mesh.mesh.view(-1, context), mesh_dim_names=("data", "context"))["context"])


def _whole(t: Any) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _run(config: Config, ranks: Ranks | None) -> Run:
    """In float64, where the order of sums is below what Adam makes of it."""
    torch.set_default_dtype(torch.float64)
    try:
        text = corpus(TEXT)
        return Run(config, SETTINGS, text) if ranks is None else ParallelRun(config, SETTINGS, text, ranks)
    finally:
        torch.set_default_dtype(torch.float32)


def _trained(mesh: DeviceMesh, kind: str, context: int, tied: bool) -> dict[str, float]:
    """Six steps, against the same in one process: losses, held-out bits, weights and moments."""
    config = Config(attention=kind, tied=tied, **TINY)
    run = _run(config, _ranks(mesh, context))
    alone = _run(config, None)
    for each in (run, alone):
        each.go(6, 3, _quiet)
    found = {"losses": max(abs(a - b) for a, b in zip(run.record.losses, alone.record.losses, strict=True))}
    found["held"] = max(abs(a[1] - b[1]) for a, b in zip(run.record.held, alone.record.held, strict=True))
    mine, theirs = run.state(), alone.state()
    assert set(mine) == set(theirs)
    for name, t in theirs.items():
        scale = 1.0 if name.startswith("model") or not t.is_floating_point() else t.abs().max().clamp(min=1e-30).item()
        found[name] = (_whole(mine[name]).double() - t.double()).abs().max().item() / scale
    assert isinstance(mine["model.blocks.0.mlp.down.weight"], DTensor)
    return found


@pytest.mark.parametrize(
    ("count", "kind", "context", "tied"),
    [(4, "gqa", 2, False), (2, "mla", 2, True), (2, "v-is-x", 1, False), (3, "window", 3, False), (4, "mha", 1, True)],
)
def test_a_run_is_that_of_one_process(count: int, kind: str, context: int, tied: bool) -> None:
    """To 1e-9 of a loss near 5 bits, weights near 0.2, and of each moment's largest number."""
    for rank, found in enumerate(on_ranks(count, _trained, kind, context, tied)):
        far = {name: error for name, error in found.items() if not error < 1e-9}
        assert not far, f"rank {rank}: {far}"


# ---- checkpoints in parts


def _begin(mesh: DeviceMesh, path: str, context: int, steps: int) -> list[float]:
    run = ParallelRun(Config(**TINY), SETTINGS, corpus(TEXT), _ranks(mesh, context))
    run.go(steps, 2, _quiet, save=Path(path))
    return run.record.losses


def _go_on(mesh: DeviceMesh, path: str, context: int, out: str) -> tuple[list[float], list[tuple[int, float]]]:
    run = _ranks(mesh, context).resume(Path(path), lambda length: corpus(TEXT))
    assert run.step == 4
    run.go(8, 4, _quiet, save=Path(out))
    return run.record.losses, run.record.held


def _alone(path: Path | None, until: int = 8) -> Run:
    run = Run(Config(**TINY), SETTINGS, corpus(TEXT)) if path is None else resumed(checkpoint.load(path), corpus(TEXT))
    run.go(until, 4, _quiet)
    return run


def test_checkpoints_go_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    """Four ranks, then two or one; and one, then four. In float32, so losses agree to a few thousandths of a bit."""
    whole = _alone(None).record
    begun = tmp_path / "four"
    assert on_ranks(4, _begin, str(begun), 2, 4)[3] == pytest.approx(whole.losses[:4], abs=1e-5)
    assert sorted(p.name for p in begun.iterdir()) == [parts.INDEX, "step-000004"]
    for count, context in ((2, 2), (4, 1)):
        out = tmp_path / f"{count}-{context}"
        for losses, held in on_ranks(count, _go_on, str(begun), context, str(out)):
            assert losses == pytest.approx(whole.losses, abs=5e-3)
            assert [step for step, _ in held] == [2, 4, 8]
    one = _alone(begun)
    assert one.record.losses == pytest.approx(whole.losses, abs=5e-3)
    one.save(begun)  # into the directory, since that is what it was
    assert parts.notes_of(begun)["step"] == 8
    assert decoder(checkpoint.load(begun)).state_dict().keys() == one.model.state_dict().keys()
    file = tmp_path / "file"
    _alone(None, 4).save(file)
    for losses, _ in on_ranks(4, _go_on, str(file), 2, str(tmp_path / "from file")):
        assert losses == pytest.approx(whole.losses, abs=5e-3)


def test_one_rank_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Nothing is lost between: the optimizer, the generator of batches, the record."""
    whole, half = _alone(None), _alone(None, 4)
    folder = tmp_path / "parts"
    folder.mkdir()
    half.save(folder)
    rest = _alone(folder)
    assert rest.record.losses == whole.record.losses
    state = rest.state()
    assert all(torch.equal(t, state[name]) for name, t in whole.state().items())


class _Killed(BaseException):
    pass


def test_a_run_that_is_killed_while_it_saves_leaves_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _alone(None, 3)
    folder = tmp_path / "parts"
    folder.mkdir()
    run.save(folder)
    run.advance()

    def killed(*_: Any) -> None:
        raise _Killed

    monkeypatch.setattr(parts, "_replace", killed)
    with pytest.raises(_Killed):
        run.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == [parts.INDEX, "step-000003", "step-000004"]
    monkeypatch.undo()
    assert checkpoint.load(folder).notes["step"] == 3
    again = _alone(folder, 4)
    again.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == [parts.INDEX, "step-000004"]
    again.save(folder)  # of the same step: beside the one that is there
    assert sorted(p.name for p in folder.iterdir()) == [parts.INDEX, "step-000004-again"]
    assert checkpoint.load(folder).notes["step"] == 4


def test_broken_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    run, folder = _alone(None, 2), tmp_path / "parts"
    folder.mkdir()
    run.save(folder)
    file = next((folder / "step-000002").iterdir())
    held = run.state()
    with pytest.raises(ArgumentError, match="exactly the tensors"):
        parts.check(folder, {name: t for name, t in held.items() if name != "rng.batches"})
    wrong = {**held, "rng.batches": held["rng.batches"].float()}
    with pytest.raises(ArgumentError, match=r"rng.batches must be .* torch.float32"):
        parts.check(folder, wrong)
    with pytest.raises(ArgumentError, match="no such checkpoint"):
        checkpoint.load(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ArgumentError, match="cannot be read"):
        checkpoint.load(folder)
    file.unlink()
    with pytest.raises(ArgumentError, match="exactly the tensors"):
        parts.check(folder, held)
    text = json.loads((folder / parts.INDEX).read_text())
    for change in ({"tensors": "../elsewhere"}, {"format": "qkv decoder 1"}, {"notes": []}):
        (folder / parts.INDEX).write_text(json.dumps({**text, **change}))
        with pytest.raises(ArgumentError, match="must say format="):
            checkpoint.load(folder)


def _written_by_four(mesh: DeviceMesh, path: str) -> None:
    _begin(mesh, path, 1, 2)


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    """Without the last shard a tensor would be shorter, without one between a hole would keep what was there."""
    for lost in (2, 4):
        folder = tmp_path / str(lost)
        on_ranks(4, _written_by_four, str(folder))
        shards = sorted((folder / "step-000002").iterdir())
        assert len(shards) == 4
        shards[lost - 1].unlink()
        run = Run(Config(**TINY), SETTINGS, corpus(TEXT))
        with pytest.raises(ArgumentError, match=r"all parts of a checkpoint must be there|must be"):
            run.resume(checkpoint.load(folder))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = _alone(None, 2), tmp_path / "parts"
    folder.mkdir()
    run.save(folder)
    assert not [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors")]
    (folder / "step-000002" / ".metadata").write_bytes(
        b"cos\nsystem\n(S'exit 1'\ntR."
    )  # what PyTorch's own reader runs

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    assert checkpoint.load(folder).notes["step"] == 2


# ---- errors, on every rank


def _refused(mesh: DeviceMesh, path: str) -> list[str]:
    said = []
    rank = mesh.get_rank()

    def refuse(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        said.append(f"{type(caught.value).__name__}: {caught.value}")

    both, data = _ranks(mesh, 2), _ranks(mesh, 1)
    text, config = corpus(TEXT), Config(**TINY)
    refuse(ArgumentError, lambda: ParallelRun(config, Settings(batch=3), text, data))
    refuse(ArgumentError, lambda: ParallelRun(Config(**{**TINY, "context": 1}), SETTINGS, text, both))
    refuse(UnsupportedError, lambda: ParallelRun(Config(**TINY, attention="v-is-x"), SETTINGS, text, both))
    refuse(ArgumentError, lambda: data.begin(config, SETTINGS, lambda _: corpus(TEXT) if rank else _other()))
    refuse(ArgumentError, lambda: data.begin(config, Settings(seed=rank), lambda _: text))
    missing = Path(path) if rank else Path(path) / "none"
    refuse(ArgumentError if rank == 0 else RankError, lambda: data.resume(missing, lambda _: text))
    return said


def _one_ends(mesh: DeviceMesh) -> str:
    """Rank 1 ends in its third step; what rank 0 says in the next exchange."""
    run = ParallelRun(Config(**TINY), SETTINGS, corpus(TEXT), _ranks(mesh, 1))
    for _ in range(2):
        run.advance()
    if mesh.get_rank():
        os._exit(1)
    with pytest.raises(RankError) as caught, training_ranks.exchanges():
        run.go(6, 6, _quiet)
    return str(caught.value)


def test_a_rank_that_ends_is_an_error_of_the_others() -> None:
    said = on_own_ranks(2, _one_ends, lost=[1], timeout=20)
    assert "qkv train: all ranks must stay to the end. Got RuntimeError" in said[0]
    assert "--resume" in said[0]


def _other() -> Any:
    from dataclasses import replace

    return replace(corpus(TEXT), sha256="1" * 64)


def test_what_ranks_cannot_do_is_an_error_on_every_rank(tmp_path: Path) -> None:
    run = _alone(None, 2)
    folder = tmp_path / "parts"
    folder.mkdir()
    run.save(folder)
    wanted = [
        "--batch 3 and 2 of them. Use a --batch that is a multiple of 2",
        "--context 1, 2 ranks",
        "layers for comparison take whole sequences",
        "all ranks must have the same text",
        "all ranks must have the same settings",
    ]
    for rank, said in enumerate(on_ranks(2, _refused, str(folder))):
        last = (
            "no such checkpoint" if rank == 0 else "RankError: qkv train: all ranks must be able to go on. Got rank 0"
        )
        for told, want in zip(said, [*wanted, last], strict=True):
            assert want in told


@pytest.mark.parametrize(
    ("environment", "arguments", "told"),
    [
        ({}, ["--context-parallel", "2"], "torchrun starts them. Got --context-parallel 2 in one process"),
        ({"RANK": "0"}, [], "a rank needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in its environment. Got RANK=0"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ["--context-parallel", "3"],
            "Got 4 ranks and --context-parallel 3. Use --context-parallel in {1, 2, 4}",
        ),
        ({}, ["--context-parallel", "0"], "--context-parallel is >= 1"),
    ],
)
def test_ranks_that_cannot_be(
    environment: dict[str, str],
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_bytes(TEXT)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "t", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_one_rank_of_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert training_ranks.join(1) is None


# ---- the command


def _torchrun(count: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(qkv.__file__).parents[1])}
    done = [*command, "-m", "qkv.cli", "train", *arguments]
    return subprocess.run(done, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four ranks begin, one process ends, and another that was alone all the time has the same."""
    (tmp_path / "t").write_bytes(b"\n\n".join(letters(60, n) for n in range(60)))
    sizes = ["--dim", "32", "--layers", "1", "--heads", "2", "--context", "30", "--steps", "6", "--batch", "2"]
    more = ["--context-parallel", "2", "--out", "d", "--stop", "3", "--export", "e"]
    begun = _torchrun(4, ["t", *sizes, *more], tmp_path)
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.count("bits per byte, held out") == 1  # one rank speaks
    assert begun.stderr.count("held out (the last tenth") == 1
    text, folder, alone = (str(tmp_path / name) for name in ("t", "d", "one"))
    assert main(["train", text, "--resume", folder, "--threads", "1"]) == 0
    assert "continued at step 3" in capsys.readouterr().err
    assert main(["train", text, *sizes, "--out", alone, "--threads", "1"]) == 0
    one, several = checkpoint.load(alone), checkpoint.load(folder)
    for found in ("losses", "held"):
        wanted = torch.tensor(one.notes["record"][found][-1:])
        assert torch.allclose(torch.tensor(several.notes["record"][found][-1:]), wanted, atol=5e-3)
    assert several.notes["step"] == 6
    exported = checkpoint.load(tmp_path / "e")
    assert {t.dtype for t in exported.tensors.values()} == {torch.bfloat16}
    assert exported.part("model").keys() == one.part("model").keys()


def cannot_write(mesh: Any, folder: str) -> str:
    from qkv.lm import parts
    from qkv.lm.ranks import Ranks

    ranks = Ranks(mesh, None)
    try:
        parts.save(
            Path(folder) / "file" / "checkpoint", {"x": torch.zeros(2)}, {"step": 1}, group=ranks.group,
            first=ranks.first, together=ranks.together,
        )  # fmt: skip
    except qkv.QKVError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_checkpoint_that_the_first_rank_cannot_begin_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    said = on_ranks(2, cannot_write, str(tmp_path))
    assert said[0].startswith("ArgumentError: qkv train: the checkpoint cannot be written"), said
    assert said[1].startswith("RankError: qkv train: all ranks must be able to go on. Got rank 0"), said
