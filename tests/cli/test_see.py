"""`qkv see` and `qkv plan`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qkv
from qkv.cli.main import main
from qkv.insight import Trace, npy
from qkv.insight.terminal import cells

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


def saved(folder: Path, **more: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal((h, 40, 16)).astype("f4") for n, h in (("q", 4), ("k", 2), ("v", 2))} | more
    np.savez(folder / "x.npz", **arrays)
    return str(folder / "x.npz"), arrays


def test_tensors_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed and saved is what qkv.see finds; lines fit 80 columns."""
    path, arrays = saved(tmp_path)
    assert main(["see", path, "--mask", "causal()", "--head", "3", "--row", "9", "--save", f"{tmp_path}/t.npz"]) == 0
    shown = capsys.readouterr().out
    assert "itself and the keys before it" in shown
    assert "query 9 at position 9, head 3" in shown
    assert max(map(cells, shown.split("\n")[:-3])) <= 80
    q, k, v = (torch.from_numpy(arrays[n])[None] for n in "qkv")
    assert Trace.load(tmp_path / "t.npz").equals(qkv.see(q, k, v, mask=qkv.causal(), heads=[3]))
    assert main(["see", f"{tmp_path}/t.npz"]) == 0  # a saved trace is shown as it was
    assert capsys.readouterr().out.startswith("call     4 heads, 2 of keys and values")
    assert main(["see", path, "--html", f"{tmp_path}/t.html"]) == 0
    assert "Content-Security-Policy" in (tmp_path / "t.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["see", path, "--ascii"]) == 0
    assert capsys.readouterr().out.isascii()


def test_masks_and_sinks_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved(tmp_path, mask=np.tri(40, dtype=bool), sinks=np.zeros(4, "f4"))
    assert main(["see", path]) == 0
    shown = capsys.readouterr().out
    assert "a tensor (40, 40) allows" in shown
    assert "learned sinks" in shown


def test_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = pytest.importorskip("safetensors.torch").save_file
    x = torch.randn(1, 2, 8, 4)
    save({"q": x, "k": x.clone(), "v": x.clone()}, tmp_path / "x.safetensors")
    assert main(["see", str(tmp_path / "x.safetensors")]) == 0
    assert "2 heads, 8 queries" in capsys.readouterr().out


def test_the_shipped_model_reads_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    assert main(["see", "--prompt", "My lord, my lord", "--layer", "-1", "--row", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "16 queries, 16 keys" in shown
    assert "query 15 'd'" in shown
    assert main(["see", "--layer", "6"]) == 2
    assert "--layer 0 to 5" in capsys.readouterr().err
    assert main(["see", "--prompt", ""]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "must be a file or a folder"),
        (b"", "an .npz of plain numbers"),
        ({"q": np.zeros((1, 2, 3), "f4")}, "must hold k, v"),
        ({"q": np.zeros(2, "complex64")}, "an .npz of plain numbers"),
        ({"q": np.array([None])}, "an .npz of plain numbers"),
    ],
)
def test_files_that_cannot_be_seen(
    tmp_path: Path, content: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    assert main(["see", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_numpy_arrays_of_either_order(tmp_path: Path) -> None:
    x = np.arange(24, dtype="f8").reshape(2, 3, 4)
    np.savez(tmp_path / "x.npz", c=x, f=np.asfortranarray(x), one=x[0, 0], none=x[:0], number=np.float32(3))
    read = npy.read_all(tmp_path / "x.npz")
    for name, want in (("c", x), ("f", x), ("one", x[0, 0]), ("none", x[:0]), ("number", np.float32(3))):
        assert np.array_equal(read[name].numpy(), want), name


def test_a_plan_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    """2,000,000 tokens: a tensor of these sizes would not fit."""
    shape = "b=8,hq=32,hkv=8,lq=2000000,d=128"
    assert main(["plan", "--shape", shape, "--mask", "sliding_window(4096)", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "4 query heads share a head" in shown
    assert "the last 4,096 keys up to itself" in shown
    assert "4.00 KiB  of keys and values" in shown
    assert main(["plan", "--shape", "hq=2,lq=3,lk=5,d=8", "--mask", "causal()", "--positions", "end", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == {"b": 1, "hq": 2, "hkv": 2, "lq": 3, "lk": 5, "d": 8, "dv": 8}
    assert (
        found["backend"] == qkv.plan(*(torch.zeros(1, 2, n, 8) for n in (3, 5, 5)), mask=None, positions="end").backend
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "hq=2"], "no lq, no d"),
        (["--shape", "hq=2,lq=x,d=4"], "'lq=x'"),
        (["--shape", "hq=2,hq=2,lq=1,d=4"], "each once"),
        (["--shape", "hq=3,hkv=2,lq=1,d=4"], "multiple"),
        (["--shape", "hq=2,lq=2,lk=5,d=4", "--mask", "causal()"], "positions"),
        (["--shape", "hq=2,lq=2,d=4", "--positions", "x"], "--positions"),
    ],
)
def test_plans_that_cannot_be_made(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err
