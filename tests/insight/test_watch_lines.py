"""What a watch is asked for, and what it writes: lines of JSON, scalars, a summary."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.insight.watch import SCHEMA
from qkv.insight.watch.findings import FIXES
from qkv.lm.decoder import Config, Decoder
from tests.kit.watched import Call, made


def test_lines_are_strict_json(tmp_path: Path) -> None:
    """NaN and infinity are null; a file that is there is added to, a writer is the user's to close."""
    model, path, stream = Call(), tmp_path / "watch.jsonl", io.StringIO()
    q = torch.randn(1, 2, 5, 8)
    broken = q.clone()
    broken[..., 0] = torch.nan
    for to in (path, str(path), stream):
        with qkv.watch(model, to=to) as w:
            model(q, q, q)
            model(broken, q, q)
            model(q[:, :, :0], q, q)
        assert not w.errors
    texts = [path.read_text().splitlines(), stream.getvalue().splitlines()]
    assert [len(lines) for lines in texts] == [6, 3]

    def refuse(text: str) -> None:
        raise ValueError(text)

    found = [json.loads(line, parse_constant=refuse) for line in texts[1]]
    assert found[1]["entropy"] == [None, None]
    assert found[1]["nan"] == {"rows": 10, "of": 10, "first": {"batch": 0, "head": 0, "row": 0}}
    assert {(line["schema"], line["layer"]) for line in found} == {(1, "")}
    assert set(found[0]) == DOCUMENTED


DOCUMENTED = {
    "schema", "step", "layer", "number", "module", "via", "shape", "dtype", "heads", "entropy", "tokens", "logit",
    "weight", "sure", "sink", "first", "away", "nan", "nan_values", "dead", "uniform_heads", "sink_heads",
    "saturated_heads", "duplicate_heads", "warnings",
}  # fmt: skip


def test_scalars_for_a_board() -> None:
    class Writer:
        def __init__(self) -> None:
            self.found: dict[tuple[str, int], float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.found[name, step] = value

    model, writer = Decoder(Config(dim=32, layers=1, heads=2)), Writer()
    with qkv.watch(model, every=2, tensorboard=writer) as w:
        for _ in range(3):
            model(torch.randint(256, (1, 6)))
    line = w.lines[0]
    assert writer.found["attention/blocks.0.attention/entropy", 0] == sum(line["entropy"]) / 2
    assert writer.found["attention/blocks.0.attention/logit", 0] == max(line["logit"])
    assert {step for _, step in writer.found} == {0, 2}
    assert all(math.isfinite(x) for x in writer.found.values())


def test_a_board_that_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError, match=r"TensorBoard must be installed.*pip install tensorboard"):
        qkv.watch(nn.Linear(2, 2), tensorboard=tmp_path)


@pytest.mark.parametrize("layers", [0, 1, 3, 60])
def test_the_summary_is_one_screen(layers: int) -> None:
    model = nn.Sequential(*(made("a bound name") for _ in range(layers)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_name_that_is_longer_than_its_column = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in model:
                x = layer(x)
                x = x * torch.nan if layer is model[len(model) // 2] else x
            return x

    watched = Model()
    with qkv.watch(watched) as w:
        watched(torch.randn(1, 9, 16))
    lines = str(w).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "1 steps" in lines[0]
    if layers == 60:
        assert any("more" in line for line in lines)
        assert any("layers without warnings" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ArgumentError, "every is an int >= 1"),
        ({"every": 1.5}, ArgumentError, "every is an int >= 1"),
        ({"first": 0}, ArgumentError, "first is an int"),
        ({"heads": "some"}, ArgumentTypeError, "heads are"),
        ({"heads": [-1]}, ArgumentTypeError, "heads are"),
        ({"layers": []}, ArgumentTypeError, "layers are"),
        ({"layers": [1.5]}, ArgumentTypeError, "layers are"),
        ({"to": 3}, ArgumentTypeError, "to must be"),
        ({"tensorboard": 3}, ArgumentTypeError, "tensorboard must be"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        qkv.watch(nn.Linear(2, 2), **options)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"model must be a torch\.nn\.Module"):
        qkv.watch(copy)  # type: ignore[arg-type]


def test_the_schema_is_documented() -> None:
    """Each name of a line stands in the table of docs/watch.md, and every kind of warning in its text."""
    page = (Path(__file__).resolve().parents[2] / "docs/watch.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    named = {name.strip() for row in rows for name in row.split(",")}
    assert named >= DOCUMENTED - {"schema"}
    assert "`schema`, is 1" in page
    assert SCHEMA == 1
    assert all(f"`{kind}`" in page for kind in FIXES)
