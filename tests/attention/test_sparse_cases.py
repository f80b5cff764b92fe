"""Masks whose tiles see keys that are no neighbours: against the oracle, poisoned, with planted needles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkv
from qkv.backends import registry
from qkv.backends.cpu import CpuBackend, instruction_sets
from tests.gates.calls import Calls
from tests.kit.cases import SPARSE, case, qkv_mask

ISAS = [f"cpu:{isa}" for isa in instruction_sets()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_cases_are_right(name: str, isa: str) -> None:
    """Outputs, lse and gradients, and no NaN of a hidden key."""
    config = case(f"sparse: {name}")
    for outcome in Calls().ask_all(config, [isa]):
        assert not outcome.faults, f"{outcome.faults} of {config}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPARSE)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, isa: str) -> None:
    config = replace(case(f"sparse: {name}"), dropout_p=0.0, bias=(), sinks=None)
    mask = qkv_mask(config.mask)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(config.B, heads, length, 16, generator=generator)
        for heads, length in ((config.Hq, config.Lq), (config.Hkv, config.Lk), (config.Hkv, config.Lk))
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(qkv.attention(q, k, v, mask=mask, positions="end", backend=isa))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("mask", "most", "word"),
    [
        (qkv.strided(16) & qkv.causal(), 1.5, "every 16th"),
        (qkv.strided(16), 1.1, "every 16th"),
        (qkv.dilated(16, 16), 2.2, "every 16th"),
        (qkv.random_blocks(3, 64, 1), 1.05, "blocks of 64"),
        (qkv.random_blocks(3, 16, 1), 1.1, "blocks of 16"),
        (qkv.sliding_window(256), 1.3, ""),
    ],
)
def test_what_is_computed_is_near_what_is_visible(mask: qkv.Mask, most: float, word: str, isa: str) -> None:
    """A plan's work is counted from what the kernel says that it computes."""
    q = torch.empty(1, 2, 2048, 16)
    plan = qkv.plan(q, q, q, mask=mask, backend=isa)
    visible = int(mask.tensor(2048, 2048).sum()) * 2
    backend = registry.load(isa)
    assert isinstance(backend, CpuBackend)
    computed = backend.visited(plan.problem, None)
    assert visible <= computed <= most * visible
    assert word in plan.note
    assert ("rearranged" in plan.note) == bool(word)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mask", [qkv.strided(16) & qkv.causal(), qkv.dilated(64, 16), qkv.bigbird(64)], ids=repr)
def test_no_less_is_computed_of_many_tiles_than_is_visible(mask: qkv.Mask, isa: str) -> None:
    """A few of them are looked at: those may be the first ones of a causal mask, or miss a global token's."""
    q = torch.empty(1, 1, 1, 16).expand(1, 2, 300_000, 16)
    plan = qkv.plan(q, q, q, mask=mask, backend=isa)
    rows, keys = plan.tile
    assert plan.visible.least <= plan.pairs <= plan.tiles.visible * rows * keys


def test_a_mask_of_neighbours_rearranges_nothing() -> None:
    q = torch.empty(1, 2, 512, 16)
    for mask in (None, qkv.causal(), qkv.sliding_window(64), qkv.prefix(20)):
        note = qkv.plan(q, q, q, mask=mask, backend=ISAS[0]).note
        assert "rearranged" not in note
        assert "gathered" not in note
