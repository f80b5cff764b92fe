"""`qkv train` as a command from end to end, the continuation of prompts, and the tables that many runs make."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from qkv.cli.main import main
from qkv.errors import ArgumentError
from qkv.lm import checkpoint
from qkv.lm.generation import continue_prompt
from tests.kit.training import corpus, letters, trained

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]


# ---- the command

SIZES = {"dim": 32, "layers": 1, "heads": 2, "context": 32, "steps": 12, "batch": 2, "threads": 1, "every": 4}
OPTIONS = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]


def test_the_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, whole, parts, alone = (tmp_path / name for name in ("t.txt", "whole", "parts", "alone"))
    text.write_bytes(b"\n\n".join(letters(60, n) for n in range(100)))
    assert main(["train", str(text), *OPTIONS, "--out", str(whole), "--export", str(alone)]) == 0
    out, err = capsys.readouterr()
    bits = re.search(r"bits per byte, held out +(\d\.\d{4}) after 12 steps", out)
    assert bits
    assert "key/value bytes a token      128 in bfloat16, over 1 layers" in out
    assert re.search(r"time a step +\d+ ms, median, 1 threads", out)
    assert "held out (the last tenth, from the next blank line on)" in err
    assert "step 12 of 12" in err

    assert main(["train", str(text), *OPTIONS, "--out", str(parts), "--stop", "5"]) == 0
    assert "after 5 steps" in capsys.readouterr().out
    assert main(["train", str(text), "--resume", str(parts), "--threads", "1"]) == 0
    assert bits[0] in capsys.readouterr().out
    a, b = checkpoint.load(whole), checkpoint.load(parts)
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())

    exported = checkpoint.load(alone)
    assert {t.dtype for t in exported.tensors.values()} == {torch.bfloat16}
    assert alone.stat().st_size < 2 * sum(t.numel() for t in exported.tensors.values()) + 8000
    for path in (whole, alone):
        said = continue_prompt("abcabc", 20, seed=3, path=path)
        assert said == continue_prompt("abcabc", 20, seed=3, path=path)
        assert len(said.text.encode(errors="replace")) >= 20
        assert 0 < said.bits < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "a", "--steps", "3"], "Leave out --steps"),
        (["--resume", "none"], "no such checkpoint"),
        (["--out", "a"], "not overwritten"),
        (["--out", "no/where"], "cannot be written"),
        (["--attention", "mhq"], "attention is one of mha, gqa, mqa, window, mla, bigbird, selected, shared-qk"),
        (["--every", "0"], "--every is >= 1"),
        (["--context", "5000"], "longer than the context of 5,000 bytes"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_bytes(letters(3000))
    if "a" in arguments:
        trained(tmp_path / "a")
    assert main(["train", "t", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == (["a", "t"] if "a" in arguments else ["t"])


@pytest.mark.parametrize("given", [("", 5, 1.0), ("x", -1, 1.0), ("x", 5, -1.0), ("x", 5, float("nan"))])
def test_prompts_that_cannot_be_continued(given: tuple[str, int, float]) -> None:
    with pytest.raises(ArgumentError, match="a prompt has at least one byte"):
        continue_prompt(given[0], given[1], temperature=given[2])


def test_a_continuation_takes_the_likeliest_byte_at_temperature_0(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    tokens = list(b"abcdefgh" * 6)  # longer than the context of 32
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(run.model(torch.tensor([tokens[-32:]]))[0, -1].argmax()))
    said = continue_prompt("abcdefgh" * 6, 6, temperature=0, path=tmp_path / "a")
    assert said.text == bytes(tokens[48:]).decode(errors="replace")


# ---- the tables


def test_the_tables_are_made_in_pieces_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Path(__file__).parents[2] / "benchmarks" / "train_tables.py"
    spec = importlib.util.spec_from_file_location("train_tables", where)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "SIZES", {"dim": 16, "layers": 1, "heads": 2, "context": 16})
    monkeypatch.setattr(tables, "EVERY", 1)
    monkeypatch.setattr(tables, "read_corpus", lambda path, context: corpus(letters(600)))

    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_tables.py", *arguments, "--results", str(tmp_path / "r")])
        tables.main()

    for part in ("1/2", "2/2", "1/1"):
        command("variants", "play.txt", "--seeds", "0", "1", "--steps", "2", "--part", part)
    made = capsys.readouterr().err
    assert made.count("play.mha.qkv.0.json") == 1  # the third call found all of them made
    assert len(list((tmp_path / "r").iterdir())) == 2 * len(tables.VARIANTS)
    command("ablations", "--seeds", "0", "--steps", "2")
    command("report", "--json", str(tmp_path / "all.jsonl"))
    printed = capsys.readouterr().out
    assert "| mla | " in printed
    assert "from one seed 0.00" in printed
    assert all(rule in printed for rule in tables.RULES.values())
    trained(tmp_path / "a").export(tmp_path / "b")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "b")
    command("card", str(tmp_path / "a"))
    told = capsys.readouterr().out
    assert "| size | 2 layers of 32, 2 heads, context 32 bytes" in told
    assert re.search(r"\*\*\d\.\d{3} bits per byte\*\* .* float32, \d\.\d{3} as stored", told)
    runs, timings = tables.read(tmp_path / "all.jsonl")
    assert tables.tables(runs, timings) == printed.strip(), "the one file says what the folder says"
    assert len(runs) == 2 * len(tables.VARIANTS) + len(tables.RULES)
