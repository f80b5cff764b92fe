"""`qkv bench --models` on a model of toy size: what is compared, what is noticed, and what is written."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import qkv.integrations.transformers as adapter
from qkv.bench import models, results, turns
from qkv.bench.budget import Budget
from qkv.bench.turns import Terms
from qkv.errors import ArgumentError
from tests.kit import hf_models as hf
from tests.kit.bench_fakes import FakeClock, command

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()
TOY = models.Shape(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=64, vocabulary=32)


def test_caches_are_filled_and_as_before_after_a_run() -> None:
    contest = models.Contest(TOY, torch.float32)
    caches = {kind: contest.filled(kind, 20, room=5) for kind in models.CACHES}
    with torch.inference_mode():
        for kind, cache in caches.items():
            keys = cache.layers[1].keys[:, :, :20].clone()
            contest.decode("qkv", cache, 20, 4)
            assert int(cache.get_seq_length()) == 20, kind
            assert torch.equal(cache.layers[1].keys[:, :, :20], keys)
        seen = torch.ones(1, 21, dtype=torch.int64)
        a, b, c = (contest.step(cache, contest.token, seen) for cache in caches.values())
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(a, c)


def test_contenders_are_compared() -> None:
    found = models.Contest(TOY).compare(30, Terms(rounds=3), 2)
    assert [(one.context, one.cache, one.rounds) for one in found] == [(30, kind, 3) for kind in models.CACHES]
    assert all(one.agrees and one.ours > 0 and one.theirs > 0 for one in found)
    assert all(low <= middle <= high for one in found for low, middle, high in (one.ratio, one.to_default))
    assert found[0].ratio == found[0].to_default


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_of_the_keys(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
        n = k.shape[2] // 2
        return adapter.attention_forward(module, q, k[:, :, n:], v[:, :, n:], None, **given)

    contest = models.Contest(TOY)
    monkeypatch.setitem(AttentionInterface._global_mapping, "qkv", half_of_the_keys)
    assert {one.verdict for one in contest.compare(30, Terms(rounds=1), 1)} == {"wrong result"}


@pytest.mark.parametrize(
    ("to_default", "verdict"),
    [((2.4, 2.6, 2.7), "pass"), ((2.4, 2.45, 2.6), "near"), ((2.0, 2.1, 2.2), "miss")],
)
def test_verdicts(to_default: tuple[float, float, float], verdict: str) -> None:
    one = models.Decoding(8192, "DynamicCache", 100.0, 250.0, (1.0, 1.0, 1.0), to_default, 0.01, 3)
    assert one.verdict == verdict
    assert f"≥ 2.5×  {verdict}" in str(one)
    assert models.Decoding(16, "StaticCache", 1.0, 1.0, to_default, to_default, 0.01, 3).verdict == ""


def test_the_model_is_in_float32_where_its_layers_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.machine, "product_type", lambda dtype, rows: torch.float32 if rows == 1 else dtype)
    assert models.Contest(TOY).model.dtype == torch.float32


def test_models_keep_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(turns.time, "perf_counter", clock.now)
    decode = models.Contest.decode

    def slow(self: models.Contest, name: str, cache: Any, context: int, count: int) -> float:
        seconds = decode(self, name, cache, context, count)
        clock.call(1.0)()
        return seconds + 1.0

    monkeypatch.setattr(models.Contest, "decode", slow)
    shown: list[str] = []
    budget = Budget(40.0, 6, clock.now)
    contexts = (8, 9, 10, 11, 12, 13)
    measurement = models.measurement(shape=TOY, contexts=contexts, count=2)
    which = measurement.calls(False)
    found = turns.measure(measurement, which, Terms(rounds=7), budget, lambda text: None, shown.append)
    assert 24.0 <= clock.now() <= 48.0
    assert [str(one) for one in found] == shown[1:]
    assert {one.rounds for one in found} == {1}
    assert len(found) // 3 + len(budget.names) == len(contexts)


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "QUICK_CONTEXTS", (24,))
    monkeypatch.setattr(models, "measurement", partial(models.measurement, shape=TOY, contexts=(24, 48)))
    path = tmp_path / "models.json"
    assert command(["--models", "--quick", "--threads", "1", "--json", str(path)]) == 0
    document = results.read(path)["models"]
    assert [row["cache"] for row in document["models"]] == list(models.CACHES)
    assert "transformers" in document["versions"]
    assert "24 tokens, StaticCache" in capsys.readouterr().out


@pytest.mark.parametrize("other", [["--training"], ["--only", "x"], ["--chart", "x.svg"], ["--isa", "avx512"]])
def test_other_measurements_are_another_run(other: list[str]) -> None:
    with pytest.raises(ArgumentError, match="Make two runs"):
        command(["--models", *other])
