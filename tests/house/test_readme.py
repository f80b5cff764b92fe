"""The README's table of names is read and every row is run: shapes, bytes, and the result itself."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import qkv

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
NAMES = (
    "self-attention",
    "cross-attention",
    "multi-head (MHA)",
    "multi-query (MQA)",
    "grouped-query (GQA)",
    "multi-head latent (MLA)",
    "masked",
    "sparse",
    "Flash",
    "paged",
)
COLUMNS = ["name", "code", "Q", "K", "V", "out", "K, V bytes per token", "paper"]

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


def _table() -> list[dict[str, str]]:
    """Return the rows of the table under "The field's names"."""
    section = README.partition("## The field's names")[2].partition("\n## ")[0]
    section = re.sub(r"\[([^\]]+)\]\(docs/[^)]+\)", r"\1", section)  # a name leads to its page
    lines = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]] == COLUMNS
    return [dict(zip(COLUMNS, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]


def _shape(cell: str) -> tuple[int, ...]:
    return tuple(int(size) for size in cell.split("×"))


def _bytes(cell: str) -> int:
    found = re.match(r"[\d,]+", cell)
    assert found is not None
    return int(found[0].replace(",", ""))


ROWS = _table()


def test_the_table_has_every_name() -> None:
    for name in NAMES:
        assert sum(row["name"].startswith(name) for row in ROWS) == 1, name
    assert len(ROWS) == len(NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"].partition(":")[0].split(",")[0])
def test_row(row: dict[str, str]) -> None:
    q_shape, k_shape, v_shape, out_shape = (_shape(row[column]) for column in ("Q", "K", "V", "out"))
    assert re.fullmatch(r"(\[[^]]+ \d{4}\]\(https://arxiv\.org/abs/\d{4}\.\d{4,5}\)(, )?)+", row["paper"])
    latent = "k[..., :512]" in row["code"]
    kept = k_shape[1] * (k_shape[3] + (0 if latent else v_shape[3])) * torch.bfloat16.itemsize
    assert _bytes(row["K, V bytes per token"]) == kept

    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).to(torch.bfloat16) for shape in (q_shape, k_shape, v_shape))
    code = row["code"].strip("`")
    cache = qkv.cache.PagedCache(pages=4, num_kv_heads=k_shape[1], head_dim=k_shape[3])
    seq = cache.add()
    if row["name"].startswith("paged"):
        cache.append([seq], k, v)
    out = eval(code, {"qkv": qkv}, {"q": q, "k": k, "v": v, "cache": cache, "seq": seq})
    assert tuple(out.shape) == out_shape
    if latent:
        v = k[..., :512]
        assert v.shape == v_shape
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), _expected(q, k, v, code), rtol=0.02, atol=0.02)


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, code: str) -> torch.Tensor:
    """Attention by the textbook, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 192**-0.5 if "192" in code else 1 / math.sqrt(q.shape[3])
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    mask = {"causal": qkv.causal(), "bigbird": qkv.bigbird(8)}
    for name, value in mask.items():
        if name in code:
            scores = scores.masked_fill(~value.tensor(q.shape[2], k.shape[2], positions="end"), -math.inf)
    return torch.softmax(scores, -1) @ v


def test_the_two_commands_come_first() -> None:
    first = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)


def test_two_plain_pip_lines() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    pip = [block.split("\n")[:-1] for block in blocks if "pip install" in block]
    assert pip == [["pip install torch", 'pip install ".[demo]"']]


def test_the_benchmark_section_can_be_filled() -> None:
    start, end = README.index("<!-- bench:start -->"), README.index("<!-- bench:end -->")
    assert start < end


def test_commands_in_the_readme_exist() -> None:
    from qkv.cli.main import COMMANDS

    shown = re.findall(r"`qkv (\w+)", README)
    assert {"demo", "doctor", "mask", "why"} <= set(shown) <= set(COMMANDS)


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 140
    assert README.count("<!-- bench:start -->") == 1, "one table of speed; the others are in docs/speed.md"
