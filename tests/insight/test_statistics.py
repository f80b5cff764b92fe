"""Statistics of a call's weights against the oracle's rows, on random calls of every feature."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.backends.tiled import statistics as tiled
from qkv.backends.tiled.walk import Walk
from qkv.call.problem import Options
from qkv.call.statistics import Wanted
from qkv.observation import observe
from tests.kit.cases import DTYPES
from tests.kit.generator import random_config
from tests.kit.inputs import Inputs, materialise
from tests.kit.statistics_truth import Truth, faults

OPTIONS = ("positions", "bias", "scale", "softcap", "sinks", "dropout_p")


def observed(inputs: Inputs, backend: str | None, wanted: Wanted):
    given = inputs.call()
    options = Options(**{name: given[name] for name in OPTIONS if name in given})
    return observe("qkv.see()", given["q"], given["k"], given["v"], given.get("mask"), options, backend, wanted)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed: int) -> None:
    """Every feature at once, hidden slots poisoned; the largest, the most and the fewest bins."""
    config = random_config(seed)
    inputs = materialise(config)
    wanted = Wanted(top=5, mass=True, bins=(min(7, config.Lq), min(9, config.Lk)), distance=True)
    found = observed(inputs, "tiled", wanted)
    wrong = faults(Truth.of(inputs.oracle), found.statistics, wanted, DTYPES[config.dtype])
    assert not wrong, f"seed {seed}: {config}: {wrong}"


@pytest.mark.parametrize("sizes", [(7, 24, 1 << 8), (256, 8192, 1 << 22)])
@pytest.mark.parametrize("seed", range(100, 112))
def test_any_tiles(seed: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other devices, and small odd ones, whose seams fall everywhere."""
    monkeypatch.setattr(tiled, "Walk", lambda problem, inputs, _: Walk(problem, inputs, sizes))
    config = random_config(seed)
    inputs = materialise(config)
    wanted = Wanted(top=3, mass=True, bins=(min(5, config.Lq), min(6, config.Lk)), distance=True)
    wrong = faults(Truth.of(inputs.oracle), observed(inputs, "tiled", wanted).statistics, wanted, DTYPES[config.dtype])
    assert not wrong, f"seed {seed}: {config}: {wrong}"


@pytest.mark.parametrize("backend", [None, "tiled", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_changes_nothing(backend: str | None, dtype: torch.dtype) -> None:
    """The observed output is bitwise the unobserved one, for many rows and for one."""
    for Lq in (1, 5, 200):
        q, k, v = (torch.randn(2, h, n, 24, dtype=dtype) for h, n in ((4, Lq), (2, 200), (2, 200)))
        mask = qkv.causal()
        plain = qkv.attention(q, k, v, mask, positions="end", backend=backend) if backend != "sdpa" else None
        if plain is None:
            mask, plain = None, qkv.attention(q, k, v, backend=backend)
        options = Options(positions=None if mask is None else "end")
        found = observe("qkv.see()", q, k, v, mask, options, backend, Wanted(3, True, (4, 4), True))
        assert torch.equal(found.out, plain)
