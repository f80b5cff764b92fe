"""The runner of PyTorch's own tests: what it reads from its page, what it calls red, and that it puts qkv in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gates import foreign
from tests.gates.foreign import Found, Run

ONE = Run("test_it.py", "", "patch_sdpa", 2)


def found(collected: int = 2, **outcomes: str) -> Found:
    return Found(collected, outcomes, dict.fromkeys(outcomes, "E  it says why"), "", "log")


def test_a_failure_is_red_unless_it_is_listed_or_pytorchs_own() -> None:
    red, notes = foreign.judge(ONE, found(a="passed", b="failed"), set(), set())
    assert red == ["fails: b: E  it says why"]
    assert not notes
    assert foreign.judge(ONE, found(a="passed", b="failed"), {"b"}, set()) == ([], [])
    red, notes = foreign.judge(ONE, found(a="passed", b="failed"), set(), {"b"})
    assert not red
    assert notes == ["fails without qkv as well: b"]
    assert foreign.judge(ONE, found(a="passed", bb="failed"), {"b"}, set())[0]  # names match exactly


def test_fewer_tests_than_the_page_says_are_red() -> None:
    assert not foreign.judge(ONE, found(2), set(), set())[0]
    assert "1 tests collected, 2 are to be" in foreign.judge(ONE, found(1), set(), set())[0][0]


def test_a_listed_test_that_passes_or_is_gone_is_reported() -> None:
    _, notes = foreign.judge(ONE, found(a="passed"), {"a", "gone"}, set())
    assert notes == ["is listed and passes: a", "is listed and was not run: gone"]


def test_the_page_is_read_row_by_row_and_names_are_spelled_out() -> None:
    runs, listed = foreign.tables(foreign.PAGE.read_text())
    assert {run.file for run in runs} == {"test_multihead_attention.py", "test_transformers.py", "test_nn.py"}
    assert {run.replaced for run in runs} == {"patch_sdpa", "MultiheadAttention"}
    assert all(run.at_least > 10 for run in runs)
    assert {(row.file, row.replaced) for row in listed} <= {(run.file, run.replaced) for run in runs}
    assert len(set(listed)) == len(listed)
    assert all("::" in row.test and not set("{},* ") & set(row.test) for row in listed)
    assert foreign.expanded("a{1,2}b{,c}") == ["a1b", "a1bc", "a2b", "a2bc"]


FILE = """
import torch
from torch.nn import MultiheadAttention
from torch.nn.functional import scaled_dot_product_attention

def test_ours():
    assert scaled_dot_product_attention.__module__.startswith("qkv")
    assert MultiheadAttention.__module__.startswith("qkv")
    assert torch.nn.TransformerEncoderLayer(8, 2).self_attn.__class__ is MultiheadAttention
    q = torch.randn(1, 2, 3, 8)
    scaled_dot_product_attention(q, q, q)

def test_theirs():
    assert not scaled_dot_product_attention.__module__.startswith("qkv")

def test_nobodys():
    raise KeyError("whatever is there")
"""

PAGE = """
| file | tests | replaced | at least |
|---|---|---|---|
| `test_it.py` | | MultiheadAttention | {least} |

| test | file | replaced | why |
|---|---|---|---|
| `{listed}` | `test_it.py` | MultiheadAttention | because |
"""


@pytest.mark.parametrize(
    ("least", "listed", "code", "words"),
    [
        (3, "test_theirs", 0, ["1 passed, 2 failed, 0 skipped of 3", "without qkv as well: test_nobodys", "1 call of"]),
        (4, "test_ours", 1, ["3 tests collected, 4 are", "RED  fails: test_theirs", "listed and passes: test_ours"]),
    ],
)
def test_a_file_runs_with_qkv_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], least: int, listed: str,
    code: int, words: list[str],
) -> None:  # fmt: skip
    (tmp_path / "test_it.py").write_text(FILE)
    (tmp_path / "test_other.py").write_text("raise KeyError")  # files beside it are not loaded
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(least=least, listed=listed))
    monkeypatch.setattr(foreign, "PAGE", page)
    assert foreign.main([str(tmp_path)]) == code
    said = capsys.readouterr().out
    for part in words:
        assert part in said
    (tmp_path / "test_it.py").unlink()
    assert foreign.main([str(tmp_path)]) == 1
