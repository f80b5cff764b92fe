"""The gate fails for every kernel with a mistake, and for none without: its table is `tests.gates.mutants`."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.gates import calls, mutants
from tests.kit import backends, native_mutants, skips
from tests.kit.plain import PYTHON_MUTANTS

# one process prepares the questions for all of them
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("mutants")]
CONFIGS = 60  # random ones after the named cases
CSRC = Path(__file__).parents[2] / "csrc"


@cache
def asked() -> list[calls.Question]:
    return [q for q in mutants.questions(mutants.fixed_configs(CONFIGS)) if not q.config.dropout_p]


def test_tests_of_a_group_share_a_process(request: pytest.FixtureRequest) -> None:
    """xdist goes by the group in a test's name, and prepares the same twice where it is not there."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@mutants")


def test_the_implementation_without_a_mistake_passes() -> None:
    trial = mutants.try_python("", asked())
    assert trial.seed is None, trial.fault


@pytest.mark.parametrize("bug", PYTHON_MUTANTS)
def test_python_mutant_is_killed(bug: str) -> None:
    assert mutants.try_python(bug, asked()).seed is not None, f"nothing noticed: {PYTHON_MUTANTS[bug]}"


def test_every_native_mutant_has_its_place_in_the_kernels() -> None:
    texts = native_mutants.mutated(CSRC)
    for number, mutant in enumerate(native_mutants.MUTANTS, 1):
        for edit in mutant.edits:
            assert f"{native_mutants.SWITCH} == {number})" in texts[edit.file], mutant.name
    assert len({mutant.name for mutant in native_mutants.MUTANTS}) == len(native_mutants.MUTANTS)


@pytest.mark.parametrize(
    ("place", "times"), [("«no such text»", 0), ("«const» Attention&", None)], ids=["is not there", "is there twice"]
)
def test_a_mutant_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch, place: str, times: int | None) -> None:
    first = native_mutants.MUTANTS[0]
    wrong = replace(first, edits=(replace(first.edits[0], place=place),))
    monkeypatch.setattr(native_mutants, "MUTANTS", (wrong,))
    with pytest.raises(ValueError, match=f"holds {'[0-9]+' if times is None else times} times, not once: «"):
        native_mutants.mutated(CSRC)


def test_native_mutants_are_killed() -> None:
    """Where the build of the mutants is there. It is not shipped; `make gate` makes it and asks far more."""
    module = mutants.native_mutants()
    if module is None:
        pytest.skip(skips.NO_MUTANTS)
    questions = [q for q in asked() if not backends.may_refuse("cpu", q.config)]
    trials = list(mutants.tried_apart(mutants.native_asks(questions), 2))
    right, wrong = [t for t in trials if not t.name], [t for t in trials if t.name]
    assert not [trial.fault for trial in right if trial.seed is not None]
    assert not [trial.name for trial in wrong if trial.seed is None], "survivors"


def test_the_shipped_build_cannot_be_told_to_be_wrong() -> None:
    if "cpu:portable" in backends.required():
        from qkv import _native

        assert not hasattr(ctypes.CDLL(_native.__file__), native_mutants.SWITCH)
