"""`qkv bench` as a command: options, refusals, peers that are not there, and a run from start to end."""

from __future__ import annotations

import subprocess
from typing import Any
from xml.etree import ElementTree

import pytest

from qkv.bench import results
from qkv.bench.peers import Roster, ggml
from qkv.bench.peers.base import Setup, Unavailable
from qkv.errors import ArgumentError
from tests.kit.bench_fakes import command

# --- peers that are not there


def test_absent_peers_are_reported_with_the_reason(monkeypatch, tmp_path):
    roster = Roster(Setup(2), only={"sdpa", "ggml"})
    with pytest.raises(Unavailable, match="left out"):
        roster.get("openvino")
    monkeypatch.setattr(ggml, "find_libraries", lambda: iter(()))
    with pytest.raises(Unavailable, match="llama-cpp-python"):
        roster.get("ggml")
    assert "ggml" in roster.missing
    monkeypatch.setitem(Roster.KNOWN, "sdpa", ("torch", "Sdpa", "no-such-distribution"))
    with pytest.raises(Unavailable, match="no-such-distribution is not installed"):
        roster.get("sdpa")


def test_ggml_is_looked_for_where_the_user_says(monkeypatch, tmp_path):
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(b"not a library")
    monkeypatch.setenv("QKV_GGML", str(tmp_path))
    assert next(ggml.find_libraries()) == library.resolve()
    monkeypatch.setattr(ggml, "find_libraries", lambda: iter([library]))
    with pytest.raises(Unavailable, match=r"libggml-cpu\.so"):
        ggml.Ggml(Setup(1))


# --- the command


def test_two_tiny_cases_run_from_start_to_end(tmp_path, capsys):
    files = {"json": tmp_path / "out.json", "chart": tmp_path / "out.svg"}
    code = command(
        ["--only", "^tiny", "--peers", "sdpa", "--seconds", "20", "--backend", "tiled", "--threads", "1"]
        + [str(part) for key, path in files.items() for part in (f"--{key}", path)]
    )
    document = results.read(files["json"])["calls"]
    assert code == 0
    assert [row["name"] for row in document["rows"]] == ["tiny 1x4x32x32 f32", "tiny 1x4x32x32 bf16"]
    assert all(row["contenders"]["sdpa"]["rounds"] >= 3 for row in document["rows"])
    assert document["machine"]["threads"] == 1
    ElementTree.fromstring(files["chart"].read_text(encoding="utf-8"))
    assert "tiny 1x4x32x32 bf16" in capsys.readouterr().out


def test_avx2_begins_anew_with_every_library_held(monkeypatch):
    seen: dict[str, Any] = {}

    def fake(given: list[str], env: dict[str, str], check: bool) -> Any:
        seen.update(command=given, env=env)
        return subprocess.CompletedProcess(given, 3)

    monkeypatch.setattr("qkv.cli.bench.subprocess.run", fake)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert command(["--isa", "avx2", "--quick", "--threads", "1", "--json", "x.json", "--no-memory"]) == 3
    assert {
        key: seen["env"][key] for key in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    } == {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert seen["command"][1:4] == ["-m", "qkv.cli", "bench"]
    options = seen["command"][4:]
    assert set(options) == {"--isa", "avx2", "--quick", "--threads", "1", "--json", "x.json", "--no-memory"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "threads must be at least 1"),
        (["--only", "("], "regular expression"),
        (["--only", "no such row"], "no row has such a name"),
        (["--peers", "sdpa,nonsense"], "peers go by their names"),
        (["--isa", "avx512", "--backend", "tiled"], "exclude each other|instruction set"),
        (["--json", "/no/such/folder/x.json"], "folder must exist"),
        (["--training", "--sweep", "--mla"], "--sweep, --mla, of forward calls"),
        (["--training", "--chart", "x.svg"], "--chart, of forward calls"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        command(options)


def test_the_list_names_rows_and_measures_nothing(capsys):
    assert command(["--list", "--only", "mla"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["mla", "128"]
