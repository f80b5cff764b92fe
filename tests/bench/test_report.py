"""What `qkv bench` writes: the machine, the table, JSON, the chart, the README's table, the sweep and the memory."""

from __future__ import annotations

import json
import platform
import subprocess
from typing import Any
from xml.etree import ElementTree

import pytest

from qkv.bench import machine, memory, readme, report, results, sweep
from qkv.bench.cases import BEST, Case, Row, Target
from qkv.bench.race import Spread, Timing, judge
from qkv.errors import ArgumentError
from tests.kit.bench_fakes import CACHE, SMALL, timings

# --- the machine


def test_the_processor_is_named_from_cpuinfo():
    text = "vendor_id\t: X\nmodel name\t: Some CPU 9000\nflags\t\t: fpu avx2 avx512f\n"
    assert machine.cpu_name(text) == "Some CPU 9000"
    assert machine.instruction_sets(text) == ["avx512f", "avx2"]


def test_the_last_level_cache_is_summed_over_its_instances(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, level, kind, size, who in ((0, 1, "Data", "48K", str(cpu)), (3, 3, "Unified", "16384K", shared)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", who)):
                (folder / name).write_text(f"{text}\n")
    assert machine.last_level_cache(tmp_path) == 2 * (16 << 20)
    assert machine.last_level_cache(tmp_path / "none") == 32 << 20


# --- reports


def finished() -> list[Any]:
    row = Row("causal 2048 d128 bf16", SMALL, ("sdpa", "openvino"), (Target(BEST, 2.0),), limit="gemm")
    known = timings(qkv=0.020, sdpa=0.200, openvino=0.030, gemm=0.001)
    known["jax"] = Timing("jax", unavailable="jax is not installed")
    return [judge(row, known, SMALL.flops * 10)]


def written() -> dict[str, Any]:
    about = machine.describe(2, CACHE)
    return report.document(finished(), about, versions={"openvino": "1"}, settings={}, seconds=1.0)


def test_the_table_has_one_line_a_row_and_the_verdict():
    (result,) = finished()
    columns = report.columns([result.row.name])
    head, line = columns.head, report.lines(result, columns)
    assert head.split() == ["case", "qkv", "ms", "opponent", "ms", "ratio", "needed", "of", "limit"]
    assert " ".join(line.split()) == "causal 2048 d128 bf16 20.0 openvino 30.0 1.50× ≥ 2× miss 0% GEMM"
    text = report.summary(finished())
    assert "0 of 1 targets reached" in text
    assert "jax: jax is not installed (causal 2048 d128 bf16)" in text


def test_the_json_has_every_median_and_no_name_of_the_machine():
    document = json.loads(json.dumps(written(), allow_nan=False))
    assert document["schema"] == report.SCHEMA
    assert set(document) >= {"date", "machine", "versions", "settings", "seconds", "rows"}
    (row,) = document["rows"]
    assert set(row) == {"name", "case", "flops", "kv_bytes", "contenders", "best_peer", "ratio", "limit", "targets"}
    assert row["contenders"]["qkv"]["seconds"] == {"median": 0.02, "low": 0.02, "high": 0.02}
    assert row["contenders"]["jax"] == {"unavailable": "jax is not installed"}
    assert row["targets"][0]["verdict"] == "miss"
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(document)


def test_a_file_of_results_is_a_row_a_line_and_keeps_other_parts(tmp_path):
    path, document = tmp_path / "x.jsonl", written() | {"memory": [{"name": "m", "bytes": 123456789, "s": 1.23456}]}
    for part in ("calls", "training", "calls"):
        results.write(path, part, document)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["part"], line.get("of")) for line in lines] == [
        (part, of) for part in ("training", "calls") for of in (None, "rows", "memory")
    ]
    assert lines[-1] == {"part": "calls", "of": "memory", "name": "m", "bytes": 123456789, "s": 1.235}
    read = results.read(path)
    assert read["calls"] == read["training"] == results.rounded(document)
    assert results.read(tmp_path / "none.jsonl") == {}


def test_a_file_of_results_is_of_one_processor_and_instruction_set(tmp_path):
    path, about = tmp_path / "x.jsonl", written()["machine"]
    results.write(path, "calls", written() | {"settings": {"isa": "avx2"}})
    results.check(path, "caches", about, "avx2")
    results.check(path, "calls", {"cpu": "another"}, None)  # its only part will be replaced
    for machine_now, isa in (({"cpu": "another"}, "avx2"), (about, None)):
        with pytest.raises(ArgumentError, match="one processor and instruction set"):
            results.check(path, "caches", machine_now, isa)
    path.write_text('{\n "schema": 1\n}\n', encoding="utf-8")
    with pytest.raises(ArgumentError, match="JSON lines"):
        results.check(path, "calls", about, None)


def test_the_chart_is_well_formed_and_knows_both_themes():
    text = readme.svg(written())
    root = ElementTree.fromstring(text)
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert [e.get("class") for e in bars] == ["q", "o", "o"]
    widths = [float(e.get("width")) for e in bars]
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(8 * widths[0], rel=0.01), "ten times as long is cut at eight"
    assert "prefers-color-scheme:dark" in text


def test_the_readme_table_goes_between_its_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.START}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        readme.write(path, [written()])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{readme.START}\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    assert text.count("| causal, 2,048 tokens, D 128, bfloat16 | 20.0 | 200 | 30.0 (OpenVINO) | 1.5× |") == 1


def test_sweep_shapes_cover_the_space_and_losers_are_listed():
    cases = list(sweep.shapes())
    assert len(cases) == 200
    assert cases == list(sweep.shapes())
    assert {case.dtype for case in cases} == {"f32", "bf16", "f16", "f64"}
    assert (min(case.Lk for case in cases), max(case.Lk for case in cases)) == (1, 4096)
    lost = sweep.Swept(cases[0], 2.0, 1.0, Spread(0.5, 0.5, 0.5), agrees=True, slower=True)
    won = sweep.Swept(cases[1], 1.0, 2.0, Spread(2.0, 2.0, 2.0), agrees=True, slower=False)
    text = sweep.summary([lost, won])
    assert text.startswith("1 of 2 shapes slower")
    assert text.count("slower:") == 1
    assert json.dumps(sweep.as_data([lost, won]))


def test_memory_bounds_and_problems_are_told(monkeypatch):
    assert memory.allowed(Case("f32", 8, 1024, 64, Hq=2, Hkv=2), 2) == 2 * 2 * 1024 * 64 * 4 + 2 * (4 << 20)
    name = next(iter(memory.CASES))
    answers = {"returncode": 0, "stdout": "noise\n123\n", "stderr": ""}
    monkeypatch.setattr(memory.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, **answers))
    assert memory.measure(name, 2, None).extra_bytes == 123
    answers.update(returncode=1, stderr="Traceback\nOSError: broken")
    broken = memory.measure(name, 2, None)
    assert not broken.fits
    assert "OSError: broken" in memory.summary([broken])
