"""Random calls on ranks: the gate's configurations by every method, sharded at random places."""

from __future__ import annotations

import pytest

from tests.gates.gate import fresh_seed
from tests.gates.rank_calls import METHODS, RANK_CALLS

pytestmark = pytest.mark.xdist_group("ranks")

CONFIGS = 20


@pytest.mark.parametrize("method", METHODS)
def test_random_calls(method: str) -> None:
    faults = []
    first = fresh_seed()
    for seed in range(first, first + CONFIGS):
        outcome = RANK_CALLS.ask(RANK_CALLS.question(RANK_CALLS.random(seed)), method)
        if outcome.faults or outcome.refused:
            again = f"python -m tests.gates.gate ranks --replay {seed} --backends {method}"
            faults.append(f"{again}: {outcome.refused or outcome.faults}")
    assert not faults, "\n".join(faults)
