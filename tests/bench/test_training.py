"""`qkv bench --training`: its rows, its gradients in float64, the wrong ones it notices, and its memory."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.bench import gradients, memory, report, results, session, training
from qkv.bench.calls import all_rows
from qkv.bench.cases import TOLERANCE, Row, Target
from qkv.bench.inputs import Inputs, build
from qkv.bench.peers.base import Prepared, Setup
from qkv.bench.peers.torch import Qkv, Sdpa
from qkv.bench.race import Runner
from qkv.bench.training import training_rows
from qkv.cli.bench.calls import seconds
from qkv.lm.decoder import Config
from tests.kit.bench_fakes import CACHE, SMALL, FakeRoster, command, naive

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = replace(SMALL, backward=True)


def by_autograd(inputs: Inputs) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in float64, from the plain formula and PyTorch's own differentiation."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, *inputs.sets[0]))
    case = inputs.case
    assert inputs.d_out is not None
    with torch.enable_grad():
        out = naive(case, q, k, v, head=lambda h: h // (case.Hq // case.Hkv))
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.d_out.double()))


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("rows", [256, 16])  # of a float64 tile: more than all queries, and not a divisor of 40
def test_expected_gradients_are_those_of_autograd(mask: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_ROWS", rows)
    inputs = build(replace(CASE, mask=mask, size=7, B=2))
    assert inputs.gradients is not None
    assert max(inputs.gradients.errors(by_autograd(inputs)[1:]).values()) < 1e-12
    checked = {(b, head) for b, head, _ in inputs.gradients.keys}
    assert {(0, 0), (1, 1)} <= checked
    for head in checked:
        assert {0, 39} <= {j for b, h, j in inputs.gradients.keys if (b, h) == head}


def test_the_cotangent_is_random() -> None:
    """Under out.sum() every ds is 0, and a kernel without one would agree."""
    inputs = build(CASE)
    assert inputs.d_out is not None
    assert inputs.d_out.std() > 0.9
    assert abs(inputs.d_out.mean()) < 0.1
    assert inputs.to("bf16").d_out.dtype == torch.bfloat16  # type: ignore[union-attr]


@dataclass
class Step:
    """Forward and backward by the formulas, with places for mistakes."""

    inputs: Inputs
    mask: Callable[[Tensor], Tensor] = lambda seen: seen
    head: Callable[[int], int] = lambda h: h // 2
    delta: float = 1.0
    d_out: Callable[[Tensor], Tensor] = lambda d: d
    ds: Callable[[Tensor, Tensor], Tensor] = lambda ds, p: ds
    weights: Callable[[Tensor], Tensor] = lambda p: p
    overwrite: bool = False

    def __call__(self) -> tuple[Tensor, ...]:
        case, inputs = self.inputs.case, self.inputs
        q, k, v = (x.double() for x in (inputs.q, *inputs.sets[0]))
        d_out = self.d_out(inputs.d_out.double())  # type: ignore[union-attr]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        hidden = ~self.mask(torch.ones(case.Lq, case.Lk).tril().bool())
        for h in range(case.Hq):
            g = self.head(h)
            p = (q[:, h] @ k[:, g].mT * case.scale).masked_fill(hidden, -math.inf).softmax(-1)
            dp = d_out[:, h] @ v[:, g].mT
            ds = self.ds(p * (dp - self.delta * (p * dp).sum(-1, keepdim=True)), p)
            if self.overwrite:
                dk[:, g] = dv[:, g] = 0
            dq[:, h] = case.scale * ds @ k[:, g]
            dk[:, g] += case.scale * ds.mT @ q[:, h]
            dv[:, g] += self.weights(p).mT @ d_out[:, h]
        return by_autograd(inputs)[0], dq, dk, dv


def wrong_steps(inputs: Inputs) -> dict[str, Callable[[], tuple[Any, ...]]]:
    out, dq, dk, dv = Step(inputs)()
    j, own = torch.arange(CASE.Lk), torch.eye(CASE.Lk).bool()
    first, last = (j == 0)[:, None], (j == CASE.Lk - 1)[:, None]
    return {
        "zeros": lambda: (out, dq * 0, dk * 0, dv * 0),
        "NaN": lambda: (out, dq * math.nan, dk, dv),
        "NaN in dv": lambda: (out, dq, dk, dv * math.nan),
        "another layout": lambda: (out, dq.transpose(1, 2), dk, dv),
        "dk and dv exchanged": lambda: (out, dq, dv, dk),
        "no delta": Step(inputs, delta=0.0),
        "half delta": Step(inputs, delta=0.5),
        "the gradient of out.sum()": Step(inputs, d_out=torch.ones_like),
        "dq unscaled": lambda: (out, dq / CASE.scale, dk, dv),
        "dk unscaled": lambda: (out, dq, dk / CASE.scale, dv),
        "dk scaled twice": lambda: (out, dq, dk * CASE.scale, dv),
        "the sign of dq": lambda: (out, -dq, dk, dv),
        "head map": Step(inputs, head=lambda h: h % 2),
        "the last head of a group only": Step(inputs, overwrite=True),
        "no mask": Step(inputs, mask=torch.ones_like),
        "one key more": Step(inputs, mask=lambda seen: torch.ones_like(seen).tril(1)),
        "one key less": Step(inputs, mask=lambda seen: seen.tril(-2) | own),
        "the last key's dk": lambda: (out, dq, dk.masked_fill(last, 0), dv),
        "the first key's dv": lambda: (out, dq, dk, dv.masked_fill(first, 0)),
        "the first key is never read": Step(inputs, mask=lambda seen: seen & (j > 0) | own),
        "p left out of ds": Step(inputs, ds=lambda ds, p: ds / p.clamp(min=0.05)),
        "weights squared in dv": Step(inputs, weights=lambda p: p * p),
        "weights not normalised in dv": Step(inputs, weights=lambda p: p / p.amax(-1, keepdim=True)),
        "the cotangent of the row before": Step(inputs, d_out=lambda d: d.roll(1, 2)),
        "the cotangent of the head before": Step(inputs, d_out=lambda d: d.roll(1, 1)),
    }


def test_the_check_catches_wrong_gradients() -> None:
    """Each is worse than the widest tolerance, and the plain step itself is right."""
    inputs = build(CASE)
    assert inputs.error(Step(inputs)()) < 1e-12
    for name, step in wrong_steps(inputs).items():
        found = inputs.errors(step())
        assert found["out"] < 1e-12, name
        assert inputs.error(step()) > 2 * TOLERANCE["bf16"], (name, found)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_right_gradients_in_every_type_are_accepted(mask: str, dtype: str) -> None:
    inputs = build(replace(CASE, mask=mask, size=7, dtype=dtype))
    for peer in (Qkv(Setup(1), "tiled"), Sdpa(Setup(1))):
        with torch.no_grad():  # as the runner does
            ready = peer.prepare(inputs)
            found = inputs.errors(ready.read(ready.calls[0]()))
        assert set(found) == {"out", "dq", "dk", "dv"}
        assert max(found.values()) < TOLERANCE[dtype] / 2, (type(peer).__name__, found)
    assert not any(t.requires_grad for t in (inputs.q, *inputs.sets[0]))


class Trainer:
    """A peer whose step is what the test says."""

    def __init__(self, step: Callable[[Inputs], tuple[Any, ...]]) -> None:
        self.step = step

    def prepare(self, inputs: Inputs) -> Prepared:
        return Prepared([lambda: self.step(inputs)], lambda result: result)


def trainers(**steps: Callable[[Inputs], tuple[Any, ...]]) -> FakeRoster:
    roster = FakeRoster()
    roster.ours = Trainer(steps.pop("qkv", by_autograd))  # type: ignore[assignment]
    roster._made = {name: Trainer(step) for name, step in steps.items()}
    return roster


def no_delta(inputs: Inputs) -> tuple[Any, ...]:
    return Step(inputs, delta=0.0)()


def test_a_contender_with_wrong_gradients_is_named_and_not_ranked() -> None:
    row = Row("r", CASE, ("sdpa", "jax"), (Target("sdpa", 0.0), Target("jax", 0.0)))
    result = Runner(trainers(sdpa=lambda i: wrong_steps(i)["dk unscaled"](), jax=by_autograd), CACHE).run(row, 0.0)
    assert not result.timings["sdpa"].agrees
    assert not result.timings["sdpa"].rounds
    assert result.best_peer == "jax"
    assert [check.verdict for check in result.checks] == ["no data", "pass"]
    text = report.summary([result])
    assert "disagrees with float64: sdpa on r (relative error" in text
    assert " of dk)" in text
    ours = Runner(trainers(qkv=no_delta, sdpa=by_autograd), CACHE).run(row, 0.0)
    assert ours.ratio is None
    assert {check.verdict for check in ours.checks} == {"wrong result"}


def test_every_promised_training_ratio_is_a_row() -> None:
    rows = {row.name: row for row in training_rows()}
    promised = {
        "training causal 2048 d128 bf16": 2.0,
        "training causal 2048 d128 f32": 1.1,
        "training causal 512 d128 bf16": 2.0,
        "training causal 512 d128 f32": 1.4,
        "training causal 512 d64 bf16": 2.0,
        "training causal 512 d64 f32": 1.4,
        "training window 256 of 2048 d128 bf16": 4.0,
        "training window 256 of 2048 d128 f32": 4.0,
    }
    assert {name: row.targets for name, row in rows.items() if row.targets} == {
        name: (Target("sdpa", needed),) for name, needed in promised.items()
    }
    shape = {"B": 1, "Hq": 8, "Hkv": 8, "Lq": 2048, "Lk": 2048, "D": 128, "mask": "causal", "backward": True}
    assert shape.items() <= rows["training causal 2048 d128 bf16"].case.__dict__.items()
    assert {row.peers for row in rows.values()} == {("sdpa",)}
    for row in all_rows(CACHE):  # every cell that SDPA has, with the types of all three columns
        if "sdpa" in row.peers and row.case.Lq > 1:
            assert rows[f"training {row.name}"].case == replace(row.case, backward=True)
    assert {name.rpartition(" ")[2] for name in rows} == {"f32", "bf16", "f16"}
    assert len(rows) % 3 == 0
    assert not any(row.case.backward for row in all_rows(CACHE))
    quick = [row for row in rows.values() if row.quick]
    assert {"training causal 2048 d128 bf16", "training window 256 of 2048 d128 f32"} <= {row.name for row in quick}
    assert len(quick) < 10


def test_memory_of_a_long_step_is_beyond_inputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {case.dtype for case in memory.TRAINING.values()} == {"f32", "bf16"}
    for case in memory.TRAINING.values():
        assert (case.Lq, case.Lk, case.D, case.mask, case.size, case.backward) == (
            32768,
            32768,
            64,
            "window",
            1024,
            True,
        )
        assert memory.allowed(case, 2) == 10**9
    sizes = {"VmRSS": 5_000_000, "VmHWM": 9_000_000}
    monkeypatch.setattr(memory, "status", sizes.__getitem__)
    monkeypatch.setattr(memory.Path, "write_text", lambda path, text: len(text))
    taken = memory._extra(CASE, "tiled")  # the gradients of q (4 heads), k and v (2 heads each)
    assert taken == 4_000_000 - (4 + 2 + 2) * 40 * 16 * 4
    monkeypatch.setattr("qkv.bench.peers.torch.Qkv", lambda *_: Trainer(no_delta))
    with pytest.raises(SystemExit, match="wrong result: relative error"):
        memory._extra(CASE, None)


def test_the_extras_of_training_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(name: str, threads: int, backend: str | None, seconds: float) -> memory.Memory:
        asked.append(name)
        return memory.Memory(name, 0, 10**9, f"{memory.WRONG}: relative error 1.0" if len(asked) == 2 else "")

    step = training.Step(256, 8, 1.0, 2.0, 1.0, (1.0, 2.0, 3.0))
    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(training, "measure", lambda say, seconds: [step])
    args = argparse.Namespace(training=True, no_memory=False, quick=False, only=None, sweep=False, seconds=None)
    shares = seconds(args)
    assert set(shares) == {"rows", "memory", "decoder"}
    shown: list[str] = []
    found = session.measure_extras(
        FakeRoster(), shares, backward=True, quick=False, say=lambda text: None, show=shown.append
    )
    assert asked == list(memory.TRAINING)
    assert found.wrong
    text, decoder = (part.strip() for part in shown)
    assert decoder == training.summary([step])
    assert found.data["decoder"] == training.as_data([step])
    assert text.startswith("Memory of forward + backward beyond inputs and gradients:")
    assert "1000.0 MB  pass" in text


def test_a_tiny_step_is_timed_from_start_to_end(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--training", "--only", "tiny.* (f32|bf16)$", "--seconds", "20", "--backend", "tiled"]
    assert command([*options, "--threads", "1", "--json", str(path)]) == 0
    document = results.read(path)["training"]
    assert document["settings"]["training"] is True
    assert [row["name"] for row in document["rows"]] == ["training tiny 1x4x32x32 f32", "training tiny 1x4x32x32 bf16"]
    for row in document["rows"]:
        assert row["case"]["backward"] is True
        assert row["contenders"]["sdpa"]["agrees"]
        assert row["contenders"]["qkv"]["error_of"] in ("out", "dq", "dk", "dv")
    assert "training tiny 1x4x32x32 bf16" in capsys.readouterr().out


def test_the_list_of_training_names_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--list", "--training"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(training_rows())
    assert all(line.split()[0] == "training" and line.split()[-1] == "sdpa" for line in lines)


def test_the_example_decoder_is_timed_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", ((8, 2, 1.0), (16, 1, 1e9)))
    said: list[str] = []
    steps = training.measure(said.append, rounds=3, size=Config(dim=16, layers=1, heads=2, context=8))
    assert [(step.context, step.batch) for step in steps] == [(8, 2), (16, 1)]
    assert said == ["decoder, context 8", "decoder, context 16"]
    assert all(step.ours > 0 and step.theirs > 0 and step.ratio[0] <= step.ratio[1] <= step.ratio[2] for step in steps)
    assert steps[1].verdict == "miss"
    assert dataclasses.replace(steps[0], ratio=(0.9, 1.1, 1.2)).verdict == "pass"
    assert dataclasses.replace(steps[0], ratio=(0.9, 0.95, 1.2)).verdict == "near"
    assert "tokens/s" in training.summary(steps)
    assert training.as_data(steps)[0]["verdict"] == steps[0].verdict
