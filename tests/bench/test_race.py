"""The benchmark's own honesty: it notices wrong results, interleaves, ranks fairly, and keeps the promised ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qkv.bench import report
from qkv.bench.calls import AVX2, all_rows
from qkv.bench.cases import BEST, BEST_BUT_GGML, LIMIT, Case, Row, Target
from qkv.bench.inputs import build
from qkv.bench.peers import Roster
from qkv.bench.peers.base import Setup
from qkv.bench.peers.torch import Matmuls, Sdpa
from qkv.bench.race import Clock, Runner, Spread, interleave, judge, ratio, spread, take_turn
from tests.kit.bench_fakes import CACHE, SMALL, FakeClock, FakeRoster, crash, mean_of_v, naive, right, timings

pytestmark = pytest.mark.usefixtures("one_thread")

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
    text = report.lines(result, report.columns(["r"])) + report.summary([result])
    assert "disagrees with float64: jax on r" in text
    assert "openvino: failed" in text


def test_a_wrong_result_of_ours_is_never_a_pass():
    row = Row("r", SMALL, ("sdpa",), (Target("sdpa", 0.0),))
    result = Runner(FakeRoster(qkv=mean_of_v, sdpa=right), CACHE).run(row, 0.0)
    assert result.ratio is None
    assert [check.verdict for check in result.checks] == ["wrong result"]


# --- verdicts


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
    held = {row.name: row.held for row in rows.values() if row.held}
    assert held["full 2048 d128 f32"] == (Target(BEST, 1.05), Target(LIMIT, 0.93))
    assert held["causal 2048 d128 f32"] == (Target(BEST, 1.4),)
    assert set(AVX2) - set(held) == {f"decode 8x32/8 {of} cold" for of in ("f32", "bf16")}  # they fit no such cache
    assert held["decode 32/8 bf16 warm"] == (Target("sdpa", 3.0),)
    assert all(peer.split()[0] in Roster.KNOWN for row in rows.values() for peer in row.peers)
