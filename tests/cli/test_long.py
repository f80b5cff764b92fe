"""`qkv demo --long`: what it measures and checks, where PyTorch stops, and what is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv.cli.demo import contenders, lengths, long, memory, plot
from qkv.cli.main import main
from qkv.insight.terminal import cells

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


def nothing(*of: Any) -> None:
    pass


def test_lengths_double() -> None:
    assert lengths.lengths(1_000_000) == [4096 << n for n in range(8)] + [1_000_000]
    assert lengths.lengths(600) == [600]


def test_a_call_in_steps_is_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHUNK", 1000)
    q, k, v = contenders.inputs(4700)
    told: list[int] = []
    out = contenders.ours(q, k, v, told.append)()
    assert told == [1000, 2000, 3000, 4000, 4700]
    want = qkv.attention(q, k, v, contenders.MASK)
    assert torch.allclose(out.float(), want.float(), atol=2**-7)
    worst, largest = contenders.sampled(q, k, v, out)
    assert worst < 0.02 * largest
    out[0, 1, 4699, 3] += 0.5
    assert contenders.sampled(q, k, v, out)[0] > 0.4, "a wrong number in a sampled row is seen"


def test_pytorch_gets_the_same_mask() -> None:
    q, k, v = contenders.inputs(600)
    mask = qkv.causal() & (qkv.prefix(2) | qkv.sliding_window(50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "MASK", mask)
        out = contenders.theirs(q, k, v, nothing)()
    want = qkv.attention(q.double(), k.double(), v.double(), mask, backend="reference")
    assert torch.allclose(out.double(), want, atol=2**-6)


@pytest.mark.parametrize(
    ("free", "before", "said"),
    [
        (1 << 40, {}, ""),
        (1 << 40, {4096: 1.0}, ""),
        (1 << 40, {4096: 16.0}, "64 s expected at 8,192, over the 60 s it is given"),
        (300 << 20, {4096: 1.0}, "0.2 GiB at 8,192 would be over 60% of the 0.3 GiB free"),
        ((208 << 20) * 5 // 3, {4096: 1.0}, ""),  # 192 MiB of mask and 8 of tensors, of 208
    ],
)
def test_pytorch_is_stopped_before_it_takes_too_much(
    free: int, before: dict[int, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: free)
    line = lengths.Line("PyTorch, this mask", dict(before))
    beyond = next(need for line, _, need in lengths.contenders() if line.name == "PyTorch, this mask")
    assert lengths._stops(line, 8192, beyond(8192)) == bool(said)
    assert line.stopped == said
    assert (line.expected is not None) == bool(said)
    assert not lengths._stops(lengths.Line("qkv", {4096: 1e9}), 8192, 1 << 60)


def test_a_contender_that_stopped_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def call(name: str) -> Any:
        def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tell: Any) -> Any:
            asked.append((name, q.shape[2]))
            return v.clone

        return prepare

    lines = [(lengths.Line(n), call(n), lambda L: 0 if L < 512 else 1 << 60) for n in ("qkv", "one", "two")]
    monkeypatch.setattr(lengths, "contenders", lambda: lines)
    monkeypatch.setattr(lengths, "FIRST", 256)
    *_, found = lengths.run(1024, nothing)
    assert {name for name, L in asked if L > 256} == {"qkv"}
    assert sorted(found.lines[0].times) == [256, 512, 1024]
    assert sorted(found.lines[1].times) == [256]
    assert all(line.stopped for line in found.lines[1:])


def test_the_command_measures_checks_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lengths, "FIRST", 512)
    monkeypatch.setattr(lengths, "predicted", lambda L: L * 1e-5)
    assert main(["demo", "--long", "--tokens", "1500", "--svg", str(tmp_path / "x-{}.svg")]) == 0
    shown = capsys.readouterr()
    assert "1,500 tokens: about 15 ms, all lengths 30 ms" in shown.out
    assert "1,500 tokens · qkv" in shown.out
    assert "rows against float64" in shown.out
    assert max(map(cells, shown.out.splitlines()[1:-1])) <= 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-dark.svg", "x-light.svg"]
    for path in tmp_path.iterdir():
        root = ET.fromstring(path.read_text(encoding="utf-8"))
        assert root.attrib["viewBox"].startswith("0 0 ")
        words = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"time of a call", "memory with inputs and output", "512", "1,500 tokens"} <= set(words)


def test_the_plots_say_where_pytorch_stops() -> None:
    ours = lengths.Line("qkv", {4096: 0.1, 8192: 0.2, 16384: 0.4}, {4096: 1 << 22, 8192: 1 << 23, 16384: 1 << 24})
    mine = lengths.Line("PyTorch", {4096: 1.0}, {4096: 1 << 26}, "9 GiB at 8,192 would be over", (8192, 4.0, 1 << 28))
    found = lengths.Found([ours, mine])
    drawn = plot.svg(found)
    assert "PyTorch stops: 9 GiB at 8,192 would be over" in drawn
    assert drawn.count('class="l1 x"') == 2
    assert "prefers-color-scheme" in drawn
    assert "prefers-color-scheme" not in plot.svg(found, "dark")
    text = "\n".join(plot.drawn(found, 80))
    assert text.count("●") == 3 + 3 + 1
    assert text.count("○") == 1 + 1 + 1
    assert max(map(cells, text.splitlines())) <= 80
    rows = [line.index("●") for line in text.split("memory")[0].splitlines() if "●" in line]
    assert rows == sorted(rows, reverse=True), "longer is higher"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--long", "--tokens", "5"], "at least 512"),
        (["--tokens", "5000"], "go with --long"),
        (["--svg", "x"], "go with --long"),
        (["--long", "--ask", "what?"], "takes no text"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_free_memory_is_said_in_bytes() -> None:
    assert 0 < memory.available() < 1 << 50
    assert memory.status("VmNothing") == 0
    assert long.TOKENS == 1_000_000
