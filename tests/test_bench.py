"""The benchmark's own honesty: it notices wrong results, interleaves, ranks fairly, and tells what it could not run."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from qkv.cli import bench
from qkv.cli.benching import chart, ggml, machine, markdown, memory, report, sweep
from qkv.cli.benching.cases import Case, build
from qkv.cli.benching.peers import Matmuls, Prepared, Roster, Sdpa, Setup, Unavailable
from qkv.cli.benching.rows import BEST, BEST_BUT_GGML, LIMIT, Row, Target, all_rows
from qkv.cli.benching.runner import Clock, Runner, Spread, Timing, interleave, judge, ratio, spread, take_turn
from qkv.errors import ArgumentError

CACHE = 32 << 20
SMALL = Case("f32", 40, 40, 16, Hq=4, Hkv=2, mask="causal")


class FakeClock(Clock):
    """Time that only moves when a fake call says so."""

    def __init__(self) -> None:
        self.time = 0.0
        super().__init__(now=lambda: self.time, cpu=lambda: 0.0, sleep=lambda s: None)

    def settle(self, longest: float = 0.05) -> None:
        pass

    def call(self, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        def run() -> None:
            self.time += seconds
            if log is not None:
                log.append(name)

        return run


def naive(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head: Callable[[int], int],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    mask = case.dense_mask() if mask is None else mask
    outs = []
    for h in range(case.Hq):
        scores = q[:, h].double() @ k[:, head(h)].double().transpose(1, 2) * case.scale
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        outs.append(scores.softmax(-1) @ v[:, head(h)].double())
    return torch.stack(outs, 1)


# --- statistics and interleaving


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError):
        spread([])


def test_ratios_are_taken_within_a_round():
    # The machine became ten times slower half way; each round still says "twice".
    ours = {0: 1.0, 1: 10.0, 2: 10.0}
    theirs = {0: 2.0, 1: 20.0, 2: 20.0, 3: 99.0}
    assert ratio(theirs, ours) == Spread(2.0, 2.0, 2.0)
    assert ratio({5: 1.0}, ours) is None


def test_turns_alternate_and_end_in_time():
    clock, log = FakeClock(), []
    calls = {name: [clock.call(0.1, log, name)] for name in "ab"}
    taken = interleave(calls, {"a": 0.1, "b": 0.1}, seconds=1.0, rounds=(3, 15), clock=clock)
    assert "".join(log) == "abbaabbaab"
    assert list(taken["a"]) == [0, 1, 2, 3, 4]
    assert taken["a"][0] == pytest.approx(0.1)
    log.clear()
    interleave(calls, {"a": 0.1, "b": 0.1}, seconds=0.0, rounds=(3, 15), clock=clock)
    assert len(log) == 6, "never fewer rounds than the least"


def test_contenders_that_cannot_win_leave_unless_kept():
    clock = FakeClock()
    times = {"ours": 1.0, "fast": 1.0, "slow": 4.0, "hopeless": 20.0, "named": 50.0}
    taken = interleave(
        {name: [clock.call(seconds)] for name, seconds in times.items()},
        times,
        seconds=0.0,
        rounds=(4, 4),
        keep={"ours", "named"}.__contains__,
        clock=clock,
    )
    played = {name: len(rounds) for name, rounds in taken.items()}
    assert played == {"ours": 4, "fast": 4, "slow": 2, "hopeless": 1, "named": 4}


def test_a_cold_turn_passes_over_every_set_and_a_warm_one_repeats_the_first():
    clock, log = FakeClock(), []
    sets = [clock.call(0.01 * (n + 1), log, str(n)) for n in range(3)]
    assert take_turn(sets, 0.01, cold=True, clock=clock) == pytest.approx(0.02)
    assert "".join(log) == "2012"
    log.clear()
    assert take_turn(sets, 0.01, cold=False, clock=clock) == pytest.approx(0.01)
    assert set(log) == {"0"}
    log.clear()
    assert take_turn([clock.call(1e-5, log, "x")], 1e-5, cold=False, clock=clock) == pytest.approx(1e-5)
    assert len(log) > 100, "calls of microseconds are timed in batches"


def test_the_clock_waits_for_spinning_threads():
    spins = iter([0.0, 0.001, 0.001, 0.002, 0.002, 0.002])
    naps: list[float] = []
    time = [0.0]

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        time[0] += seconds

    Clock(now=lambda: time[0], cpu=lambda: next(spins), sleep=sleep).settle()
    assert len(naps) == 3


# --- cases and the agreement check


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
def test_ranges_dense_masks_and_expected_rows_agree(mask):
    case = replace(SMALL, mask=mask, size=7)
    dense = case.dense_mask()
    for i in range(case.Lq):
        lo, hi = case.visible(i)
        if dense is not None:
            assert dense[i].nonzero().flatten().tolist() == list(range(lo, hi))
    inputs = build(case)
    good = naive(case, inputs.q, *inputs.sets[0], head=lambda h: h // 2)
    assert inputs.error(good) < 1e-12
    assert case.pairs == (case.Lq * case.Lk if dense is None else int(dense.sum()))


def test_the_check_catches_peers_that_are_wrong():
    inputs = build(SMALL)
    q, (k, v) = inputs.q, inputs.sets[0]
    good = naive(SMALL, q, k, v, head=lambda h: h // 2)
    wrong = {
        "mean of v": v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, SMALL.Lq, -1),
        "wrong head map": naive(SMALL, q, k, v, head=lambda h: h % 2),
        "no mask": naive(replace(SMALL, mask="full"), q, k, v, head=lambda h: h // 2),
        "one key more": naive(SMALL, q, k, v, lambda h: h // 2, torch.ones(40, 40).tril(1).bool()),
        "one key less": naive(
            SMALL, q, k, v, lambda h: h // 2, torch.eye(40).bool() | torch.ones(40, 40).tril(-2).bool()
        ),
        "scale 1/D": naive(SMALL, q / 4, k, v, head=lambda h: h // 2),
        "a window": naive(SMALL, q, k, v, lambda h: h // 2, torch.ones(40, 40).tril().triu(-38).bool()),
        "NaN": good * math.nan,
        "another shape": good.transpose(1, 2),
    }
    assert inputs.error(good) < 1e-12
    for name, out in wrong.items():
        assert inputs.error(out) > 0.05, name


def test_every_cold_set_has_the_same_answer_in_other_memory():
    case = Case("bf16", 1, 64, 16, Hq=4, Hkv=4, cold=True)
    inputs = build(case, sets=3)
    assert len({k.data_ptr() for k, _ in inputs.sets}) == 3
    for k, v in inputs.sets:
        assert inputs.error(naive(case, inputs.q, k, v, head=lambda h: h)) < 1e-9
    assert case.cold_sets(CACHE) * case.kv_bytes >= 4 * CACHE


def test_latent_values_are_a_view_of_the_keys():
    case = Case("bf16", 1, 48, 24, Hq=8, Hkv=1, rank=16)
    inputs = build(case)
    for given in (inputs, inputs.to("f16")):
        k, v = given.sets[0]
        assert v.data_ptr() == k.data_ptr()
        assert v.shape[-1] == 16
    for peer in (Matmuls, Sdpa):
        ready = peer(Setup(1)).prepare(inputs)
        assert inputs.error(ready.read(ready.calls[0]())) < 0.04


class FakePeer:
    def __init__(self, out: Callable[..., torch.Tensor]) -> None:
        self.out = out

    def prepare(self, inputs: Any) -> Prepared:
        q = inputs.q
        return Prepared([lambda k=k, v=v: self.out(inputs.case, q, k, v) for k, v in inputs.sets], lambda out: out)


class FakeRoster(Roster):
    """Ours is right; `peers` are what the test says."""

    def __init__(self, **peers: Callable[..., torch.Tensor]) -> None:
        super().__init__(Setup(1))
        self.ours = FakePeer(peers.pop("qkv", right))
        self._made = {name: FakePeer(out) for name, out in peers.items()}


def right(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return naive(case, q, k, v, head=lambda h: h // (case.Hq // case.Hkv)).to(q.dtype)


def mean_of_v(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.mean(2, keepdim=True).repeat_interleave(case.Hq // case.Hkv, 1).expand(-1, -1, case.Lq, -1)


def crash(*_: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel\nsecond line")


def test_a_wrong_peer_is_shown_but_neither_timed_nor_ranked():
    row = Row("r", SMALL, ("sdpa", "jax", "openvino"), (Target("jax", 1.0), Target(BEST, 0.0)), limit="gemm")
    result = Runner(FakeRoster(sdpa=right, jax=mean_of_v, openvino=crash), CACHE, clock=Clock()).run(row, 0.0)
    assert not result.timings["jax"].agrees
    assert not result.timings["jax"].rounds
    assert "no such kernel" in result.timings["openvino"].unavailable
    assert result.best_peer == "sdpa"
    assert [check.verdict for check in result.checks] == ["no data", "pass"]
    assert result.limit_seconds > 0
    assert result.of_limit is not None
    text = report.table_text([result]) + report.summary([result])
    assert "disagrees with float64: jax on r" in text
    assert "openvino: failed" in text


def test_a_wrong_result_of_ours_is_never_a_pass():
    row = Row("r", SMALL, ("sdpa",), (Target("sdpa", 0.0),))
    result = Runner(FakeRoster(qkv=mean_of_v, sdpa=right), CACHE).run(row, 0.0)
    assert result.ratio is None
    assert [check.verdict for check in result.checks] == ["wrong result"]


# --- verdicts


def timings(**seconds: float) -> dict[str, Timing]:
    return {name.replace("_", " "): Timing(name, {n: s for n in range(3)}) for name, s in seconds.items()}


def test_the_best_peer_computes_in_the_rows_type():
    row = Row(
        "r",
        SMALL,
        ("sdpa", "ggml", "ggml f16"),
        (Target(BEST, 2.0), Target(BEST_BUT_GGML, 3.0), Target("ggml f16", 1.5)),
    )
    result = judge(row, timings(qkv=1.0, sdpa=4.0, ggml=2.0, ggml_f16=1.0), 1)
    assert result.best_peer == "ggml"
    assert result.ratio == Spread(2.0, 2.0, 2.0)
    assert [(c.opponent, c.verdict) for c in result.checks] == [
        ("ggml", "pass"),
        ("sdpa", "pass"),
        ("ggml f16", "miss"),
    ]


def test_verdicts_near_and_limit():
    noisy = timings(qkv=1.0, sdpa=1.0)
    noisy["sdpa"].rounds = {0: 0.8, 1: 0.95, 2: 1.2}
    assert judge(Row("r", SMALL, ("sdpa",), (Target("sdpa", 1.0),)), noisy, 1).checks[0].verdict == "near"
    row = Row("r", SMALL, (), (Target(LIMIT, 0.85),), limit="read")
    reads = timings(qkv=1.0, read_f32=0.9, read_i64=0.95)
    assert judge(row, reads, 1).checks[0].verdict == "pass"
    assert judge(row, reads, 1).of_limit.median == pytest.approx(0.9)


def test_microseconds_are_excused_only_below_ten():
    row = Row("r", SMALL, ("sdpa",), (Target("sdpa", 1.0, slack_us=3.0),))
    assert judge(row, timings(qkv=10e-6, sdpa=8e-6), 1).checks[0].verdict == "pass"
    assert judge(row, timings(qkv=12e-6, sdpa=8e-6), 1).checks[0].verdict == "miss"
    assert judge(row, timings(qkv=22e-6, sdpa=20e-6), 1).checks[0].verdict == "miss"


def test_every_promised_ratio_is_a_row():
    rows = {row.name: row for row in all_rows(CACHE)}
    promised = {
        ("full 2048 d128 bf16", BEST): 1.1,
        ("full 2048 d64 f32", BEST): 1.0,
        ("causal 2048 d128 bf16", BEST): 2.0,
        ("causal 2048 d64 f32", BEST): 1.3,
        ("causal 512 d128 bf16", "sdpa"): 3.0,
        ("causal 512 d64 f32", "sdpa"): 1.8,
        ("causal 2048 d128 f16", "qkv f32"): 1 / 1.3,
        ("gqa 8/2 causal 2048 d128 bf16", "qkv 8/8"): 1.0,
        ("window 256 of 2048 d128 bf16", "flex"): 4.5,
        ("window 256 of 2048 d128 f32", "flex"): 1.8,
        ("documents 256 of 4096 d64 bf16", "sdpa"): 25.0,
        ("documents 256 of 4096 d64 f32", "sdpa"): 14.0,
        ("decode 32/8 bf16 warm", BEST_BUT_GGML): 12.0,
        ("decode 32/8 bf16 warm", "ggml f16"): 4.0,
        ("decode 32/32 bf16 warm", BEST_BUT_GGML): 6.5,
        ("decode 32/32 bf16 warm", "ggml f16"): 1.0,
        ("decode 8x32/8 bf16 warm", "sdpa"): 22.0,
        ("decode 8x32/8 bf16 warm", "ggml f16"): 3.0,
        ("decode 32/8 f32 warm", BEST): 2.0,
        ("decode 32/32 f32 warm", BEST): 0.95,
        ("decode 8x32/8 f32 warm", "sdpa"): 3.0,
        ("decode 32/8 bf16 cold", LIMIT): 0.85,
        ("decode 32/32 f32 cold", LIMIT): 0.85,
        ("mla 128 heads 4096 bf16", "matmuls"): 1.0,
        ("tiny 1x4x32x32 f32", "sdpa"): 1.0,
    }
    for (name, against), needed in promised.items():
        assert {t.against: t.needed for t in rows[name].targets}[against] == pytest.approx(needed), name
    held = {row.name: row.avx2 for row in rows.values() if row.avx2}
    assert held["full 2048 d128 f32"] == (Target(BEST, 1.0),)
    assert held["causal 2048 d128 f32"] == (Target(BEST, 1.3),)
    assert held["decode 32/8 bf16 warm"] == (Target("sdpa", 3.0),)
    assert all(peer.split()[0] in Roster.KNOWN for row in rows.values() for peer in row.peers)


# --- peers that are not there


def test_absent_peers_are_reported_with_the_reason(monkeypatch, tmp_path):
    roster = Roster(Setup(2), only={"sdpa", "ggml"})
    with pytest.raises(Unavailable, match="left out"):
        roster.get("openvino")
    monkeypatch.setattr(ggml, "find_libraries", lambda: iter(()))
    with pytest.raises(Unavailable, match="llama-cpp-python"):
        roster.get("ggml")
    assert "ggml" in roster.missing
    monkeypatch.setitem(Roster.KNOWN, "sdpa", ("qkv.cli.benching.peers", "Sdpa", "no-such-distribution"))
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
    head, line = report.table_text(finished()).splitlines()
    assert head.split() == ["case", "qkv", "ms", "opponent", "ms", "ratio", "needed", "of", "limit"]
    assert " ".join(line.split()) == "causal 2048 d128 bf16 20.0 openvino 30.0 1.50× ≥ 2× miss 0% GEMM"
    text = report.summary(finished())
    assert "0 of 1 targets reached" in text
    assert "jax: jax is not installed (causal 2048 d128 bf16)" in text


def test_the_json_has_every_median_and_no_name_of_the_machine():
    import platform

    document = json.loads(json.dumps(written(), allow_nan=False))
    assert document["schema"] == report.SCHEMA
    assert set(document) >= {"date", "machine", "versions", "settings", "seconds", "rows"}
    (row,) = document["rows"]
    assert set(row) == {"name", "case", "flops", "kv_bytes", "contenders", "best_peer", "ratio", "limit", "targets"}
    assert row["contenders"]["qkv"]["seconds"] == {"median": 0.02, "low": 0.02, "high": 0.02}
    assert row["contenders"]["jax"] == {"unavailable": "jax is not installed"}
    assert row["targets"][0]["verdict"] == "miss"
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(document)


def test_the_chart_is_well_formed_and_knows_both_themes():
    text = chart.svg(written())
    root = ElementTree.fromstring(text)
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert [e.get("class") for e in bars] == ["q", "o", "o"]
    widths = [float(e.get("width")) for e in bars]
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(8 * widths[0], rel=0.01), "ten times as long is cut at eight"
    assert "prefers-color-scheme:dark" in text


def test_the_readme_table_goes_between_its_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{markdown.START}\nold\n{markdown.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        markdown.write(path, written())
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{markdown.START}\n")
    assert text.endswith(f"{markdown.END}\nafter\n")
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


# --- the command


def test_two_tiny_cases_run_from_start_to_end(tmp_path, capsys):
    files = {"json": tmp_path / "out.json", "chart": tmp_path / "out.svg"}
    code = bench.main(
        ["--only", "^tiny", "--peers", "sdpa", "--seconds", "0.1", "--backend", "tiled", "--threads", "1"]
        + [str(part) for key, path in files.items() for part in (f"--{key}", path)]
    )
    document = json.loads(files["json"].read_text(encoding="utf-8"))
    assert code == 0
    assert [row["name"] for row in document["rows"]] == ["tiny 1x4x32x32 f32", "tiny 1x4x32x32 bf16"]
    assert all(row["contenders"]["sdpa"]["rounds"] >= 3 for row in document["rows"])
    assert document["machine"]["threads"] == 1
    ElementTree.fromstring(files["chart"].read_text(encoding="utf-8"))
    assert "tiny 1x4x32x32 bf16" in capsys.readouterr().out


def test_avx2_begins_anew_with_every_library_held(monkeypatch):
    seen: dict[str, Any] = {}

    def fake(command: list[str], env: dict[str, str], check: bool) -> Any:
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert bench.main(["--isa", "avx2", "--quick", "--threads", "1", "--json", "x.json", "--no-memory"]) == 3
    assert {
        key: seen["env"][key] for key in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    } == {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    options = seen["command"][3:]
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
    ],
)
def test_requests_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        bench.main(options)


def test_the_list_names_rows_and_measures_nothing(capsys):
    assert bench.main(["--list", "--only", "mla"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["mla", "128"]
