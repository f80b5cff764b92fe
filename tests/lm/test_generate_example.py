"""The example of generation: what it prints is what whole passes without a cache say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from qkv.lm.generation import load
from qkv.lm.serving import Request, alone

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:qkv:UserWarning")]


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    model = load()
    for prompt, text, seq, line in zip(scope["prompts"], scope["texts"], scope["seqs"], lines, strict=False):
        written = alone(model, Request(prompt, 49))
        assert bytes(text) == prompt + written
        told = (prompt[len(scope["system"]) :] + written).decode(errors="replace")
        assert line == " ".join(told.split())
        assert seq.length == len(text) - 1  # the last byte is nobody's context yet
    stats = scope["cache"].stats()
    assert (stats.sequences, stats.pages_shared, stats.hits) == (4, 88 // 16, 3 * (88 // 16))
    assert stats.waste_tokens < 4 * stats.page_size
    assert f"{stats}" in "\n".join(lines)
    assert "".join(f"[{page:>2}*]" for page in scope["seqs"][0].pages[:5]) in lines[-5]
    assert re.fullmatch(r"used \d+ \(5 shared \*\), cached 0, free \d+", lines[-1])
