"""The caches against a dictionary of lists: Hypothesis looks for a few operations after which they differ.

The machine and its checks are those of `cache_model.py`; `python -m tests.gates.cache_model` runs 100,000 operations.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.gates import cache_model, cache_mutants
from tests.gates.cache_model import Dice, Machine, draw_config

pytestmark = pytest.mark.usefixtures("one_thread")


def dice_of(data: st.DataObject) -> Dice:
    return Dice(lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0)


class Story(RuleBasedStateMachine):
    """Each rule is an operation of the machine; Hypothesis draws its arguments and shortens what fails."""

    machine: Machine

    @initialize(data=st.data(), kind=st.sampled_from(["paged"] * 4 + ["dense", "ring", "latent paged", "latent dense"]))
    def make(self, data: st.DataObject, kind: str) -> None:
        self.machine = Machine(draw_config(dice_of(data), kind))

    @invariant()
    def promises(self) -> None:
        if hasattr(self, "machine"):
            self.machine.check()

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            for line in self.machine.log:
                print(line)


def _rule(name: str) -> Any:
    def operation(self: Story, data: st.DataObject) -> None:
        getattr(self.machine, name)(dice_of(data))

    operation.__name__ = name
    return rule(data=st.data())(operation)


for _name, _weight in cache_model.OPERATIONS:
    setattr(Story, _name, _rule(_name))


def test_no_operations_break_a_promise() -> None:
    run_state_machine_as_test(
        Story,
        settings=settings(
            max_examples=80,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kind", ["paged", "dense", "ring", "latent paged", "latent dense"])
def test_random_operations(kind: str) -> None:
    """The seeded driver in small: one cache of each class and a few more of pages."""
    for seed in range(6 if kind == "paged" else 2):
        machine = cache_model.run_episode(seed, 150, kind)
        assert sum(machine.count.values()) >= 150


def test_the_driver_reaches_what_it_is_for() -> None:
    """Hits, forks, exhaustion, swaps and unfinished steps happen, and often."""
    total = cache_model.run(2000, 7)
    for name in ("hits", "exhausted", "fork", "swap", "rollback", "go_on", "truncate", "evict", "keep", "misuse"):
        assert total[name] >= 5, f"{name}: {total[name]} times"


def test_every_mutant_still_applies() -> None:
    """`python -m tests.gates.cache_mutants` kills them; here only that the source has the words they change."""
    assert len(cache_mutants.MUTANTS) >= 15
    for mutant in cache_mutants.MUTANTS:
        with mutant.applied():
            pass


def test_a_cache_with_a_mistake_dies() -> None:
    for name in ("a fork is not counted", "the clock stands still", "rows run past their page"):
        mutant = next(m for m in cache_mutants.MUTANTS if m.name == name)
        assert cache_mutants.kill(mutant, 2000), f"nothing noticed that {name}"
