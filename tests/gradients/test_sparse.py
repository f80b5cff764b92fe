"""Gradients of calls that see little, at sizes that no tile, chunk or granule of the kernels divides.

Every kind of mask is drawn by the generator's own rules and judged row by row, as the gate does it, but for the sizes:
several chunks of keys, several tiles of rows, and heads of any width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import qkv
from tests.gates.calls import CALLS
from tests.kit import backends, generator
from tests.kit.cases import Config, case, qkv_mask
from tests.kit.masks import KINDS, Draw, Spec, pick

CPU = tuple(name for name in backends.available() if name.startswith("cpu"))
pytestmark = pytest.mark.skipif(not CPU, reason="there are no native kernels here")
SIZES = ({"B": 1, "Hq": 2, "Lq": 131, "Lk": 590}, {"B": 2, "Hq": 2, "Lq": 67, "Lk": 301})
HEADS = ((128, 128), (64, 64), (17, 40), (256, 8))


def drawn(kind: str, seed: int) -> Config:
    """A call with a mask of this kind, alone or beside another."""
    rng = np.random.default_rng([seed, *kind.encode()])
    sizes = SIZES[seed % len(SIZES)]
    last = sizes["Lk"] - 1
    near = int(rng.integers(1, 60))
    indices = tuple(int(x) for x in rng.choice(sizes["Lk"], 3, replace=False))
    mask: Spec = (kind, *next(k for k in KINDS if k.name == kind).draw(Draw(rng, sizes, last, near, indices)))
    if rng.random() < 0.5:
        other = generator.random_atom(rng, sizes, last, True)
        mask = pick(rng, ("and", mask, other), ("or", mask, other), ("and", mask, ("not", other)), ("or", other, mask))
    D, Dv = HEADS[int(rng.integers(len(HEADS)))]
    dtype = pick(rng, "f32", "bf16", "f32", "bf16", "f16", "f64")
    Hkv = pick(rng, 1, 2)
    return Config(seed=seed, **sizes, Hkv=Hkv, D=D, Dv=Dv, dtype=dtype, mask=mask, positions=("end",), poison="nan")


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
@pytest.mark.parametrize("seed", range(4))
def test_every_kind(kind: str, seed: int) -> None:
    config = drawn(kind, seed)
    outcomes = CALLS.ask_all(config, [name for name in CPU if not backends.may_refuse(name, config)])
    faults = [f"{o.backend}: {fault}" for o in outcomes for fault in o.faults]
    assert not faults, f"{config}\n" + "\n".join(faults)


@pytest.mark.parametrize("name", ["sparse blocks", "sparse steps", "sparse steps f32", "sparse globals"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    config = replace(case(name), Hq=1, Hkv=1)
    gen = torch.Generator().manual_seed(1)
    q, k, v, d_out = (
        torch.randn(1, 1, L, D, generator=gen, dtype=torch.float32).requires_grad_()
        for L, D in ((config.Lq, config.D), (config.Lk, config.D), (config.Lk, config.Dv), (config.Lq, config.Dv))
    )
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out = qkv.attention(q, k, v, mask=qkv_mask(config.mask), positions="end", backend=CPU[0])
            found.append(torch.autograd.grad(out, (q, k, v), d_out))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_gradients_reach_what_is_seen_alone() -> None:
    """Each key of a pattern's class gets gradients from its own class of rows, and no other key does."""
    L, step = 400, 7
    gen = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, L, 32, generator=gen, dtype=torch.float32).requires_grad_() for _ in range(3))
    mask = qkv.strided(step, 2) & qkv.causal()
    d_out = torch.zeros(1, 2, L, 32, dtype=torch.float32)
    d_out[:, :, 3::step] = 1.0
    for name in CPU:
        out = qkv.attention(q, k, v, mask=mask, backend=name)
        d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
        reached = torch.zeros(L, dtype=torch.bool)
        reached[(3 - 2) % step : L - 2 : step] = True
        assert (d_v.abs().amax((0, 1, 3)) > 0).equal(reached & (torch.arange(L) <= (L - 1 - 3) // step * step + 3))
        assert not d_k[:, :, ~reached].any()
        assert not d_q[:, :, [i for i in range(L) if i % step != 3]].any()
