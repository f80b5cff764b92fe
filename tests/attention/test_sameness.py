"""The same bits for any number of threads, batch neighbour, place in the batch, strides and repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import qkv
from tests.gates.calls import run
from tests.kit import backends
from tests.kit.bits import exact
from tests.kit.cases import Config, qkv_bias
from tests.kit.inputs import Inputs, lay, materialise

pytestmark = pytest.mark.usefixtures("one_thread")
PROMISING = backends.promising()

CALLS = {
    "prefill": Config(B=3, Hq=2, Hkv=1, Lq=131, Lk=131, D=64, Dv=64, mask=("causal",)),
    "full": Config(B=3, Hq=3, Hkv=1, Lq=49, Lk=200, D=40, Dv=24),
    "decode": Config(B=3, Hq=5, Hkv=1, Lq=1, Lk=1100, D=64, Dv=64, mask=("causal",), positions=("end",)),
    "window": Config(B=3, Hq=2, Hkv=2, Lq=70, Lk=70, D=32, Dv=32, mask=("sliding_window", 31), softcap=20.0),
    "dense": Config(B=3, Hq=2, Hkv=1, Lq=50, Lk=90, D=16, Dv=16, mask=("mask_mod", "hollow"), positions=("end",)),
    "bias and sinks": Config(
        B=3, Hq=4, Hkv=2, Lq=33, Lk=97, D=32, Dv=32, sinks="f32",
        bias=(("tensor", (3, 4, 33, 97), "f32", 0.1), ("alibi",)), positions=("end",),
    ),
}  # fmt: skip


@cache
def inputs_of(name: str, dtype: str, backend_is_native: bool) -> Inputs:
    config = replace(CALLS[name], dtype=dtype, seed=21)
    if name == "dense":  # a mask of one's own, as a function where functions run and as a tensor elsewhere
        seen = materialise(config).visible().numpy() if backend_is_native else None
        config = replace(config, mask=config.mask if seen is None else ("dense", seen))
    return materialise(config)


def call_of(inputs: Inputs, rows: slice, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The same call on some batch rows, with every tensor passed through `change`."""
    copied: dict[int, torch.Tensor] = {}

    def fresh(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in copied:
            by_batch = x.ndim == 4 and x.shape[0] == inputs.config.B
            copied[id(x)] = change((x[rows] if by_batch else x).detach())
        return copied[id(x)]

    leaves = {name: fresh(x) for name, x in inputs.leaves.items()}
    terms = [qkv_bias(spec, leaves.get(f"bias{n}")) for n, spec in enumerate(inputs.config.bias)]
    mask = fresh(inputs.mask) if isinstance(inputs.mask, torch.Tensor) else inputs.mask
    return replace(
        inputs, q=leaves["q"], k=leaves["k"], v=leaves["v"], leaves=leaves, bias=terms, mask=mask,
        dout=change(inputs.dout[rows].detach()), dlse=inputs.dlse[rows],
    )  # fmt: skip


EVERY = slice(None)
# Gradients that add up over the batch change with it; the others may not.
SHARED = ("dbias1", "dsinks")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], skip: tuple[str, ...] = ()) -> None:
    changed = [name for name in one if name not in skip and exact(one[name]) != exact(two[name])]
    assert not changed, f"other bits in {changed}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Every call in the two common dtypes, two of them in all
KINDS = [(name, dtype) for name in CALLS for dtype in ("f32", "bf16")]
KINDS += [(name, dtype) for name in ("prefill", "decode") for dtype in ("f16", "f64")]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@pytest.mark.parametrize("backend", PROMISING)
class TestSame:
    def test_threads(self, backend: str, name: str, dtype: str) -> None:
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append(run(inputs, backend))
        same(found[0], found[1])
        same(found[0], found[2])

    def test_neighbours_and_place_in_the_batch(self, backend: str, name: str, dtype: str) -> None:
        """Row 1 of three, alone, and as rows 0, 1 and 2 of another batch."""
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        whole = {n: x for n, x in run(inputs, backend).items() if n not in SHARED}
        alone = run(call_of(inputs, slice(1, 2), torch.clone), backend)
        for n, x in whole.items():
            assert exact(x[1:2]) == exact(alone[n]), f"{n} of a row changes with its neighbours"
        turned = run(call_of(inputs, EVERY, lambda x: x.roll(1, 0) if x.ndim == 4 else x.clone()), backend)
        for n in ("out", "lse"):
            assert exact(whole[n]) == exact(turned[n].roll(-1, 0)), f"{n} changes with the place in the batch"

    def test_strides(self, backend: str, name: str, dtype: str) -> None:
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        plain = run(call_of(inputs, EVERY, torch.clone), backend)
        layouts = ("transposed", "step_dim", "column", "padded")
        for layout in (*layouts, "step_rows", "offset") if dtype == "f32" else layouts:
            same(plain, run(call_of(inputs, EVERY, lambda x, to=layout: lay(x, to)), backend))

    def test_expanded(self, backend: str, name: str, dtype: str) -> None:
        """Keys and values shared by stride 0 are as if they were copied."""
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        for layout in ("expand_batch", "expand_heads"):
            shared = call_of(inputs, EVERY, torch.clone)
            for key in ("k", "v"):
                setattr(shared, key, lay(shared.leaves[key], layout))
                shared.leaves[key] = getattr(shared, key)
            copied = call_of(shared, EVERY, lambda x: x.clone(memory_format=torch.contiguous_format))
            same(run(copied, backend), run(shared, backend))

    def test_repetition(self, backend: str, name: str, dtype: str) -> None:
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        first = run(inputs, backend)
        for _ in range(2):
            same(first, run(inputs, backend))

    def test_observed_or_not(self, backend: str, name: str, dtype: str) -> None:
        """return_lse and autograd change nothing in out."""
        inputs = inputs_of(name, dtype, backend.startswith("cpu"))
        seen = run(inputs, backend)
        kwargs: dict[str, Any] = inputs.call()
        bare = qkv.attention(**kwargs, backend=backend)
        assert exact(seen["out"]) == exact(bare), "return_lse changes out"
        grads = torch.autograd.grad(bare, [inputs.q, inputs.v], inputs.dout)
        out, lse = qkv.attention(**kwargs, return_lse=True, backend=backend)
        again = torch.autograd.grad((out, lse), [inputs.q, inputs.v], (inputs.dout, torch.zeros_like(lse)))
        assert [exact(g) for g in grads] == [exact(g) for g in again], "a gradient of 0 through lse changes the others"
        with torch.no_grad():
            quiet, quiet_lse = qkv.attention(**kwargs, return_lse=True, backend=backend)
            only = qkv.attention(**kwargs, backend=backend)
        assert exact(seen["out"]) == exact(quiet) == exact(only), "autograd changes out"
        assert exact(seen["lse"]) == exact(quiet_lse)
