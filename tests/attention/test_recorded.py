"""What was measured on a machine (`qkv doctor --tune`) decides between the native kernel and PyTorch's, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv.backends import recorded, registry
from qkv.backends.recorded import Kind, Machine, Point, Recording
from qkv.bench import tuning
from qkv.cli import doctor
from qkv.cli.main import main
from qkv.errors import RecordingWarning

ISA = "avx2"  # what the tests say is the best here
pytestmark = pytest.mark.usefixtures("nothing_kept", "own_kernel")
Write = Callable[..., Path]


@pytest.fixture
def own_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has tuned kernels, and no recording read before."""
    native = registry.load("cpu")
    if native.missing is None:
        monkeypatch.setattr("qkv.backends.cpu.instruction_sets", lambda: (ISA, "portable"))
    recorded.forget()
    yield
    recorded.forget()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tune.json"
    monkeypatch.setenv(recorded.VARIABLE, str(path))
    return path


def point(ratio: float, kind: str = "prefill", mask: str = "full", dtype: str = "float32", **sizes: int) -> Point:
    of = {"D": 64, "group": 1, "keys": 256, **sizes}
    return Point(Kind(kind, mask, dtype), of["D"], of["group"], of["keys"], ratio)  # type: ignore[arg-type]


def recording(*points: Point, **other: Any) -> Recording:
    return Recording(Machine.here(ISA)._replace(**other), points)


def problem(
    lq: int = 256, lk: int = 256, d: int = 64, dtype: torch.dtype = torch.float32, **options: Any
) -> qkv.plans.Plan:
    q, k = torch.empty(1, 8, lq, d, dtype=dtype), torch.empty(1, 8, lk, d, dtype=dtype)
    return qkv.plan(q, k, k, **options)


def test_without_a_recording_nothing_changes(file: Path) -> None:
    own = registry.load("cpu").missing is None
    found = problem()
    assert found.backend == ("cpu" if own else "sdpa")
    assert "measured" not in found.reason


@pytest.mark.parametrize(
    ("points", "call", "backend"),
    [
        ((point(0.5),), {}, "sdpa"),
        ((point(2.0),), {}, "cpu"),
        ((point(1.01),), {}, "cpu"),
        ((point(0.5, keys=256), point(2.0, keys=2048)), {"lq": 1500, "lk": 1500}, "cpu"),
        ((point(0.5, keys=256), point(2.0, keys=2048)), {"lq": 300, "lk": 300}, "sdpa"),
        ((point(0.5, D=64), point(2.0, D=128)), {"d": 120}, "cpu"),
        ((point(0.5),), {"dtype": torch.bfloat16}, "cpu"),
        ((point(0.5),), {"lq": 2000, "lk": 2000}, "cpu"),  # too far from what was timed
        ((point(0.5),), {"d": 16}, "cpu"),
        ((point(0.5),), {"lq": 1}, "cpu"),  # decode was not timed
        ((point(0.5, "decode"),), {"lq": 1}, "sdpa"),
        ((point(0.5, "decode"),), {"lq": 1, "mask": qkv.causal(), "positions": "end"}, "sdpa"),
        ((point(0.5),), {"mask": qkv.causal()}, "cpu"),
        ((point(0.5, mask="causal"),), {"mask": qkv.causal()}, "sdpa"),
        ((point(0.5), point(0.5, mask="causal")), {"mask": qkv.sliding_window(64)}, "cpu"),
        ((point(0.5),), {"softcap": 30.0}, "cpu"),
        ((point(0.5),), {"return_lse": True}, "cpu"),
        ((point(0.5),), {"lq": 16}, "cpu"),
    ],
)
def test_the_nearest_point_decides(file: Path, points: tuple[Point, ...], call: dict[str, Any], backend: str) -> None:
    recorded.write(file, recording(*points))
    found = problem(**call)
    if registry.load("cpu").missing is not None:
        assert found.backend != "cpu"
        return
    assert found.backend == backend
    if backend == "sdpa":
        assert found.reason.startswith("measured faster here: 2.00 times as fast (")
        assert dict(found.refused)["cpu"].startswith("measured faster here")
    q, k = torch.randn(2, 1, 2, 256, 64).unbind(0)
    torch.testing.assert_close(qkv.attention(q, k, k), qkv.attention(q, k, k, backend="reference"))


def test_a_call_that_learns_is_not_decided_by_it(file: Path) -> None:
    recorded.write(file, recording(point(0.5)))
    q = torch.empty(1, 8, 256, 64, requires_grad=True)
    assert qkv.plan(q, q, q).backend == ("cpu" if registry.load("cpu").missing is None else "sdpa")


def test_a_kernel_that_nobody_measured_goes_second_until_it_is_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if registry.load("cpu").missing is not None:
        return
    monkeypatch.setattr("qkv.backends.cpu.instruction_sets", lambda: ("neon", "portable"))
    before = problem()
    assert before.backend == "sdpa"
    assert "was not measured here (qkv doctor --tune does)" in before.reason
    recorded.forget()
    recorded.write(file, recording(point(1.5), isa="neon"))
    after = problem()
    assert after.backend == "cpu"
    assert "measured faster here: 1.50 times as fast (prefill, full, float32, D 64, 256 keys)" in after.reason
    assert dict(after.refused)["sdpa"] == "the native kernel was measured faster here"
    assert problem(dtype=torch.float16).backend == "sdpa"  # of which it says nothing


@pytest.mark.parametrize(
    "other",
    [{"isa": "avx512"}, {"cpu": "another"}, {"torch": "0.0"}, {"threads": 77}],
    ids=lambda other: next(iter(other)),
)
def test_a_recording_of_something_else_says_nothing(file: Path, other: dict[str, Any]) -> None:
    recorded.write(file, recording(point(0.5), **other))
    assert "measured" not in problem().reason
    recorded.write(file, recording(point(0.5)))  # beside the other
    assert len(recorded.read(file)) == 2
    recorded.write(file, recording(point(0.25)))  # in its place
    assert [r.points[0].ratio for r in recorded.read(file)] == [0.5, 0.25]


def good() -> dict[str, Any]:
    machine = {"isa": ISA, "cpu": "x", "torch": "2", "threads": 2}
    timed = {"kind": "prefill", "mask": "full", "dtype": "float32", "D": 64, "group": 1, "keys": 256, "ratio": 0.5}
    return {"format": 1, "recordings": [{**machine, "points": [timed]}]}


def spoiled(change: Callable[[Any], Any]) -> str:
    found = good()
    change(found)
    return json.dumps(found)


MALFORMED = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no format": "{}",
    "another format": spoiled(lambda f: f.update(format=2)),
    "no recordings": spoiled(lambda f: f.pop("recordings")),
    "recordings of no list": spoiled(lambda f: f.update(recordings={})),
    "a recording of no object": spoiled(lambda f: f.update(recordings=[3])),
    "no isa": spoiled(lambda f: f["recordings"][0].pop("isa")),
    "threads of another type": spoiled(lambda f: f["recordings"][0].update(threads=True)),
    "no points": spoiled(lambda f: f["recordings"][0].update(points=None)),
    "an unknown kind": spoiled(lambda f: f["recordings"][0]["points"][0].update(kind="odd")),
    "no width": spoiled(lambda f: f["recordings"][0]["points"][0].update(D=0)),
    "a ratio of 0": spoiled(lambda f: f["recordings"][0]["points"][0].update(ratio=0)),
    "a ratio of NaN": spoiled(lambda f: f["recordings"][0]["points"][0].update(ratio=float("nan"))),
    "a ratio of text": spoiled(lambda f: f["recordings"][0]["points"][0].update(ratio="1")),
    "a ratio of 400 digits": spoiled(lambda f: f["recordings"][0]["points"][0].update(ratio=10**400)),
    "a width of 400 digits": spoiled(lambda f: f["recordings"][0]["points"][0].update(D=10**400)),
    "keys of 5000 digits": spoiled(lambda f: None).replace('"keys": 256', '"keys": ' + "9" * 5000),
    "an endless ratio": spoiled(lambda f: None).replace('"ratio": 0.5', '"ratio": Infinity'),
    "deep": "[" * 100_000,
    "large": " " * (1 << 20) + "{}",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_warned_of_once_and_ignored(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    if registry.load("cpu").missing is not None:
        return
    with pytest.warns(RecordingWarning, match="is no recording of qkv doctor --tune"):
        assert problem().backend == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k = torch.randn(2, 1, 2, 5, 8).unbind(0)
        torch.testing.assert_close(qkv.attention(q, k, k), qkv.attention(q, k, k, backend="reference"))
    assert file.read_text(encoding="utf-8") == text


def test_a_file_that_cannot_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "bytes.json"):
        recorded.forget()
        monkeypatch.setenv(recorded.VARIABLE, str(path))
        with pytest.warns(RecordingWarning):
            assert recorded.current(ISA, torch.get_num_threads()) is None


def test_a_pipe_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.warns(RecordingWarning, match="it is no file"):
        assert recorded.current(ISA, torch.get_num_threads()) is None


def test_where_the_default_place_is_out_of_reach_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv(recorded.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # NotADirectoryError
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recorded.current(ISA, torch.get_num_threads()) is None


def test_the_number_of_threads_chooses_among_recordings(file: Path) -> None:
    threads = torch.get_num_threads()
    recorded.write(file, recording(point(0.5), threads=threads))
    recorded.write(file, recording(point(2.0), threads=threads + 1))
    first = recorded.current(ISA, torch.get_num_threads())
    try:
        torch.set_num_threads(threads + 1)
        second = recorded.current(ISA, torch.get_num_threads())
    finally:
        torch.set_num_threads(threads)
    assert first is not None
    assert second is not None
    assert [first.points[0].ratio, second.points[0].ratio] == [0.5, 2.0]


def test_a_file_is_written_whole_or_not_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.write(file, recording(point(0.5)))
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        recorded.write(file, recording(point(0.25)))
    recorded.replace(file, None)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_good_file_is_read(file: Path) -> None:
    file.write_text(json.dumps(good()), encoding="utf-8")
    assert recorded.read(file) == [Recording(Machine(ISA, "x", "2", 2), (point(0.5),))]


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(recorded.VARIABLE, "")
    assert recorded.place() is None
    monkeypatch.delenv(recorded.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recorded.place() == tmp_path / "qkv" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recorded.place() == tmp_path / ".cache" / "qkv" / "tune.json"


def test_importing_reads_nothing_and_calls_read_once(file: Path) -> None:
    code = (
        "import sys, qkv, torch; assert 'qkv.backends.recorded' not in sys.modules\n"
        "x = torch.ones(1, 1, 2, 8); [qkv.attention(x[..., :n], x[..., :n], x) for n in (8, 4)]\n"
        "from qkv.backends import recorded; print(recorded.kept.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


# ---- making one


class Clock:
    """A second for each look at it: everything takes as long as everything else."""

    time = 0.0

    def now(self) -> float:
        self.time += 1
        return self.time

    def cpu(self) -> float:
        return 0.0

    def settle(self, longest: float = 0.05) -> None:
        pass


def test_a_case_is_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attention(*tensors: Any, backend: str) -> None:
        asked.append(backend)

    monkeypatch.setattr(tuning, "attention", attention)
    case = tuning.Case("decode", "full", torch.float32, 8, 4, 16)
    assert tuning.compare(case, ISA, Clock()) == 1.0  # type: ignore[arg-type]
    assert asked[:4] == [f"cpu:{ISA}", "sdpa"] * 2
    assert set(asked) == {f"cpu:{ISA}", "sdpa"}
    assert str(case.point(1.0)) == "decode, full, float32, D 8, 16 keys"


def test_cases_are_kinds_of_calls_that_plans_ask_of() -> None:
    for case in tuning.CASES:
        q = torch.empty(1, 8, 1 if case.kind == "decode" else case.keys, case.D, dtype=case.dtype)
        k = torch.empty(1, 8 // case.group, case.keys, case.D, dtype=case.dtype)
        mask = qkv.causal() if case.mask == "causal" else None
        asked = qkv.plan(q, k, k, mask, backend="reference").problem
        assert Kind.of(asked) == case.point(1.0).kind
        assert case.point(1.0).distance(asked) == 0


def test_doctor_writes_what_it_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qkv.cli.tuning.instruction_sets", lambda: (ISA,))
    monkeypatch.setattr(tuning, "compare", lambda case, isa, clock: 0.5 if case.kind == "decode" else 2.0)
    monkeypatch.setattr(tuning.rates, "measure", lambda *given, **more: tuning.rates.Rates(1e-9, 1e-8, 1e-10))
    assert main(["doctor", "--tune"]) == 0
    shown = capsys.readouterr().out
    assert f"{sum(c.kind == 'decode' for c in tuning.CASES)} of {len(tuning.CASES)}; written to {file}" in shown
    (made,) = recorded.read(file)
    assert made.machine == Machine.here(ISA)
    assert len(made.points) == len(tuning.CASES)
    assert {s[3:] for s in made.speeds} == {(1e-9, 1e-8, 1e-10)}
    assert {s[:3] for s in made.speeds} == {
        (dtype, D, backward)
        for dtype in ("float32", "bfloat16", "float16")
        for D in (64, 128)
        for backward in (False, True)
    }
    assert f"{len(tuning.CASES)} calls timed, in {file}" in doctor.report()


def test_doctor_says_why_it_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qkv.cli.tuning.instruction_sets", lambda: (ISA,))
    monkeypatch.setattr(tuning, "compare", lambda *_: 1.0)
    monkeypatch.setenv(recorded.VARIABLE, "")
    assert main(["doctor", "--tune"]) == 1
    assert "QKV_TUNE is empty" in capsys.readouterr().err
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(recorded.VARIABLE, str(tmp_path / "a file" / "tune.json"))
    assert main(["doctor", "--tune"]) == 1
    assert "cannot be written" in capsys.readouterr().err
