"""Rows of `qkv bench --sparse` for decode with selected blocks, at toy sizes: what is compared, and what is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.bench import results, selection, sparse
from qkv.bench.turns import Terms, as_data
from tests.kit.bench_fakes import command

pytestmark = pytest.mark.usefixtures("one_thread")
TOY = selection.Step(4, 2, 32 * selection.BLOCK, 8)  # 2 of 32 blocks


def test_contenders_are_compared() -> None:
    (one,) = TOY.compare(Terms(rounds=1))
    assert one.agrees, one
    assert one.rounds == 3
    assert one.full > 0
    assert all(low <= middle <= high for low, middle, high in (one.mean, one.minmax, one.step))
    assert not one.held
    assert "≥" not in str(one)


def test_the_length_that_was_promised_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "LENGTH", TOY.length)
    (one,) = TOY.compare(Terms(rounds=1))
    assert one.held
    assert "(≤ 5%)" in str(one)
    assert "(≥ 8×)" in str(one)


def changed_choice(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], how: str) -> None:
    """Lists of blocks (1, 2, 1, 2) of one way to score are changed."""
    real = qkv.select_blocks

    def select(q: Tensor, view: Any, block: int, top_k: int, way: str, **given: Any) -> qkv.Mask:
        mask = real(q, view, block, top_k, way, **given)
        if way != how:
            return mask
        seen = mask.tensor(1, TOY.length, "end", 1, TOY.heads)[:, ::2, :, ::block]
        blocks = seen.nonzero()[:, 3].view(1, 2, 1, -1)
        return qkv.selected_blocks(change(blocks).sort(-1).values, block) & qkv.causal()

    monkeypatch.setattr(qkv, "select_blocks", select)


@pytest.mark.parametrize("how", selection.HOW)
@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda blocks: blocks, True),
        (lambda blocks: (blocks + 1) % 32, False),
        (lambda blocks: blocks.flip(1), False),  # another head's
        (lambda blocks: blocks[..., :1], False),  # one too few
        (lambda blocks: torch.cat([blocks, (blocks[..., :1] + 1) % 32], -1), False),
    ],
)
def test_a_wrong_choice_is_told(change: Any, right: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_choice(monkeypatch, change, how)
    (one,) = TOY.compare(Terms(rounds=1))
    assert (one.verdict == "wrong result") != right
    assert one.error <= 4e-2, "attention to wrong blocks is right"


def test_the_other_way_to_score_is_another_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = qkv.select_blocks
    monkeypatch.setattr(
        qkv, "select_blocks", lambda q, view, block, k, way, **given: real(q, view, block, k, "mean", **given)
    )
    assert TOY.compare(Terms(rounds=1))[0].verdict == "wrong result"


@pytest.mark.parametrize("dense", [False, True])
def test_a_wrong_output_is_told(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the step over all keys, and of that over the chosen ones."""
    real = qkv.attention

    def wrong(q: Tensor, view: Any, *, mask: qkv.Mask, **given: Any) -> Tensor:
        out: Tensor = real(q, view, mask=mask, **given)
        return out.roll(1, 1) if (repr(mask) == repr(qkv.causal())) == dense else out

    monkeypatch.setattr(qkv, "attention", wrong)
    (one,) = TOY.compare(Terms(rounds=1))
    assert one.verdict == "wrong result"
    assert one.astray == 0


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "pass"),
        ({"mean": (0.04, 0.055, 0.06)}, "near"),
        ({"minmax": (0.051, 0.055, 0.06)}, "miss"),
        ({"step": (7.0, 7.9, 8.1)}, "near"),
        ({"step": (7.0, 7.5, 7.9)}, "miss"),
        ({"step": (1.0, 1.5, 1.9), "held": False}, "pass"),
        ({"error": 5e-2}, "wrong result"),
        ({"astray": 1e-3}, "wrong result"),
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: str) -> None:
    one = selection.Selected("x", 30.0, (0.01, 0.02, 0.03), (0.02, 0.03, 0.05), (8.0, 9.0, 9.5), True, 1e-3, 0.0, 5)
    one = replace(one, **changed)
    assert one.verdict == verdict
    assert str(one).endswith(verdict)
    assert as_data([one])[0]["verdict"] == verdict


def test_they_are_rows_of_the_command(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [call.name for call in sparse.calls()]
    assert [name for name in names if name.startswith("decode")] == [
        "decode 32/8×131072 d128 bf16, 1/16 of the blocks",
        "decode 8/8×131072 d128 bf16, 1/16 of the blocks",
    ]
    monkeypatch.setattr(selection, "steps", lambda quick: [TOY])
    path = tmp_path / "sparse.jsonl"
    assert command(["--sparse", "--only", "decode", "--threads", "1", "--json", str(path)]) == 0
    (row,) = results.read(path)["sparse"]["sparse"]
    assert row["name"] == TOY.name
    assert TOY.name in capsys.readouterr().out
