"""Every argument changes the result as the oracle says, or the call raises. Nothing is accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from tests.gates.calls import CALLS, Question
from tests.kit import backends, judge
from tests.kit.cases import Config
from tests.kit.inputs import materialise
from tests.kit.oracle import visible

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = Config(seed=41, B=2, Hq=4, Hkv=2, Lq=12, Lk=20, D=16, Dv=16, mask=("causal",), positions=("end",))
_rng = np.random.default_rng(9)

# argument: the call changed in that argument alone. Each must differ from BASE, by the oracle and by every backend.
CHANGES: dict[str, dict[str, Any]] = {
    "mask: window": {"mask": ("sliding_window", 5)},
    "mask: window right": {"mask": ("window", None, 3)},
    "mask: none": {"mask": None},
    "mask: prefix": {"mask": ("or", ("causal",), ("prefix", 15))},
    "mask: prefix by row": {"mask": ("or", ("causal",), ("prefix", (15, 0)))},
    "mask: padding": {"mask": ("and", ("causal",), ("padding", (20, 7), "right"))},
    "mask: padding left": {"mask": ("and", ("causal",), ("padding", (20, 7), "left"))},
    "mask: documents": {"mask": ("documents", (6, 14), None)},
    "mask: documents of q and k": {"mask": ("documents", (6, 6), (3, 17))},
    "mask: segments": {"mask": ("segments", _rng.integers(-1, 3, (2, 20)), None)},
    "mask: chunked": {"mask": ("chunked", 6)},
    "mask: strided": {"mask": ("strided", 3, 0)},
    "mask: strided offset": {"mask": ("strided", 3, 1)},
    "mask: dilated": {"mask": ("dilated", 2, 2)},
    "mask: global": {"mask": ("or", ("causal",), ("global_tokens", (17,)))},
    "mask: random": {"mask": ("random_blocks", 2, 4, 1)},
    "mask: random seed": {"mask": ("random_blocks", 2, 4, 2)},
    "mask: blocks": {"mask": ("blocks", _rng.random((5, 5)) < 0.5, 4)},
    "mask: per head": {"mask": ("per_head", ("causal",), ("prefix", 3), ("chunked", 4), ("causal",))},
    "mask: selected": {"mask": ("selected_blocks", _rng.integers(-1, 5, (2, 2, 12, 2)), 4, 1)},
    "mask: dense": {"mask": ("dense", _rng.random((2, 4, 12, 20)) < 0.5)},
    "mask: mod": {"mask": ("mask_mod", "checker")},
    "mask: bigbird": {"mask": ("bigbird", 2, 1, 1, 1, 0)},
    "mask: longformer": {"mask": ("longformer", 4, (3,), 1)},
    "mask: not": {"mask": ("not", ("causal",))},
    "positions: start": {"positions": ("start",)},
    "positions: int": {"positions": ("int", 3)},
    "positions: negative": {"positions": ("int", -4)},
    "positions: by row": {"positions": ("ints", (8, 2))},
    "positions: tensor": {"positions": ("tensor", _rng.permutation(20)[None, :12])},
    "bias: tensor": {"bias": (("tensor", (2, 4, 12, 20), "f32", 0),)},
    "bias: own dtype": {"bias": (("tensor", (2, 4, 12, 20), "own", 0),)},
    "bias: broadcast": {"bias": (("tensor", (1, 4, 1, 20), "f32", 0),)},
    "bias: -inf": {"bias": (("tensor", (2, 1, 1, 20), "f32", 0.4),)},
    "bias: alibi": {"bias": (("alibi",),)},
    "bias: relative": {"bias": (("relative", 4),)},
    "bias: t5": {"bias": (("t5", 8, 20, True),)},
    "bias: t5 one way": {"bias": (("t5", 8, 20, False),)},
    "bias: score_mod": {"bias": (("score_mod", 0.5, 0.25),)},
    "bias: sum": {"bias": (("alibi",), ("tensor", (12, 20), "f32", 0))},
    "scale": {"scale": 0.4},
    "scale: negative": {"scale": -0.25},
    "scale: 0": {"scale": 0.0},
    "softcap": {"softcap": 3.0},
    "softcap: large": {"softcap": 20.0},
    "sinks": {"sinks": "f32"},
    "sinks: bf16": {"sinks": "bf16"},
}
_PAIRS = {"mask: random seed": "mask: random", "mask: padding left": "mask: padding", "softcap: large": "softcap",
          "bias: t5 one way": "bias: t5", "mask: strided offset": "mask: strided"}  # fmt: skip


@cache
def question(change: str, dtype: str) -> Question:
    """The base call (change "") or a changed one, over the same q, k and v."""
    fields = dict(CHANGES.get(change, {}), dtype=dtype, flavour="flat", poison="zero")
    terms = fields.get("bias", ())
    fields["bias"] = tuple((*t[:2], dtype, *t[3:]) if t[0] == "tensor" and t[2] == "own" else t for t in terms)
    config = replace(BASE, **fields)
    built, plain = materialise(config), materialise(replace(BASE, dtype=dtype, flavour="flat", poison="zero"))
    # every call has the base call's q, k, v (times what makes scores spread), whatever its own mask would plant
    for name, factor in (("q", 6.0), ("k", 3.0), ("v", 1.0)):
        tensor = (plain.leaves[name].detach() * factor).clone()
        setattr(built, name, tensor)
        built.leaves[name] = tensor
        setattr(built.oracle, name, judge.numbers(tensor).astype(built.oracle.q.dtype))
    built.hidden[:] = False
    return CALLS.question(config, built)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", backends.available())
def test_argument_matters_or_raises(backend: str, change: str, dtype: str) -> None:
    base, changed = question(_PAIRS.get(change, ""), dtype), question(change, dtype)
    different = abs(base.truth.out - changed.truth.out).max()
    assert different > 0.05, "by the oracle the argument does nothing: the test would prove nothing"
    outcome = CALLS.ask(changed, backend)
    if not outcome.refused:
        assert not outcome.faults, outcome.faults
    else:
        assert backends.may_refuse(backend, changed.config), outcome.refused


@pytest.mark.parametrize("backend", backends.available())
def test_tensors_matter(backend: str) -> None:
    """q, k and v themselves, element by element of a row, key and value."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) * 2 for _ in range(3))
    before = qkv.attention(q, k, v, backend=backend)
    for at, name in enumerate(("q", "k", "v")):
        for dim in range(8):
            tensors = [q, k, v]
            tensors[at] = tensors[at].clone()
            tensors[at][0, 1, 3, dim] += 1
            after = qkv.attention(*tensors, backend=backend)
            rows = [3] if name == "q" else list(range(5))
            same = torch.equal(before[0, 0], after[0, 0]) and (before[0, 1, rows] != after[0, 1, rows]).any(-1).all()
            assert same, f"{name}[..., {dim}]"


@pytest.mark.parametrize("backend", backends.available())
def test_return_lse_matters_or_raises(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    assert isinstance(qkv.attention(q, k, v, backend=backend), torch.Tensor)
    try:
        _, lse = qkv.attention(q, k, v, return_lse=True, backend=backend)
    except qkv.UnsupportedError:
        assert backend == "sdpa"
        return
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 8**0.5, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", backends.available())
def test_dropout_matters_or_raises(backend: str, dtype: torch.dtype) -> None:
    """Values are unit vectors, so `out` shows every weight: dropped, or kept and grown, as the oracle's are."""
    rate, length = 0.3, 96
    torch.manual_seed(5)
    q, k = (torch.randn(2, 3, length, 16).to(dtype) for _ in range(2))
    v = torch.eye(length, dtype=dtype).expand(2, 3, length, length)
    seen = torch.from_numpy(np.tri(length, dtype=bool))

    def run(seed: int, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return qkv.attention(q, k, v, qkv.causal(), dropout_p=p, return_lse=True, backend=backend)

    if backend == "sdpa":
        with pytest.raises(qkv.UnsupportedError):
            run(1, rate)
        return
    weights, lse = run(1, 0.0)
    dropped, dropped_lse = run(1, rate)
    assert torch.equal(lse, dropped_lse), "dropout does not change lse"
    kept = dropped != 0
    grown = weights.float() / (1 - rate)
    close = (dropped.float() - grown).abs() <= 2 * torch.finfo(dtype).eps * grown + 1e-30
    assert close[kept].all()
    alive = (weights > 0) & seen
    share, count = float((~kept & alive).sum() / alive.sum()), int(alive.sum())
    assert abs(share - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    assert torch.equal(dropped, run(1, rate)[0]), "the same seed gives the same mask"
    assert not torch.equal(dropped, run(2, rate)[0])
    heads = kept.unflatten(0, (2, 1)).flatten(0, 2)[:, seen].float()
    correlation = torch.corrcoef(heads) - torch.eye(len(heads))
    assert correlation.abs().max() < 5 / heads.shape[1] ** 0.5, "heads and batch rows drop independently"


# ------------------------------------------------------------------------------------------- weights, plan, merge
@pytest.mark.parametrize("change", ["", *CHANGES])
def test_weights_take_the_same_arguments(change: str) -> None:
    """p @ v is the oracle's output, hidden keys have weight 0, and rows= picks rows."""
    asked = question(change, "f64")
    call = asked.inputs.call()
    del call["v"]
    p = qkv.weights(**call)
    group = asked.config.group
    v = asked.inputs.v.repeat_interleave(group, 1)
    torch.testing.assert_close(p @ v, torch.from_numpy(asked.truth.out.astype(float)), rtol=1e-9, atol=1e-9)
    assert not p[~asked.inputs.visible()].any()
    for rows in (slice(3, 9, 2), [11, 0, -1]):
        torch.testing.assert_close(qkv.weights(**call, rows=rows), p[:, :, rows], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", backends.available())
def test_plan_says_what_attention_does(backend: str) -> None:
    def outcome(function: Callable[..., Any], call: dict[str, Any]) -> str:
        try:
            function(**call, backend=backend)
        except qkv.UnsupportedError as error:
            return str(error).split(": ", 1)[1]
        return "runs"

    for change in CHANGES:
        call = question(change, "f32").inputs.call()
        done = outcome(qkv.attention, call)
        assert outcome(qkv.plan, call) == done
        if done == "runs":
            plan = qkv.plan(**call, backend=backend)
            assert plan.backend == backend
            assert backend in str(plan)


def test_merge_uses_all_four() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    whole, whole_lse = qkv.attention(q, k, v, return_lse=True, backend="reference")
    parts = [
        qkv.attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend="reference") for s in (slice(3), slice(3, 7))
    ]
    out, lse = qkv.merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)
    given = [*parts[0], *parts[1]]
    for n in range(4):
        changed = [x + (i == n) for i, x in enumerate(given)]
        assert not torch.allclose(qkv.merge(*changed)[0], out), f"argument {n} of merge does nothing"
    empty = torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf)
    for a, b in (((whole, whole_lse), empty), (empty, (whole, whole_lse))):
        out, lse = qkv.merge(*a, *b)
        assert torch.equal(out, whole)
        assert torch.equal(lse, whole_lse)


def test_base_call_sees_what_it_says() -> None:
    """The oracle of this file, checked once by hand: causal from the end, 12 queries over 20 keys."""
    inputs = question("", "f32").inputs
    assert torch.equal(inputs.visible()[0, 0], torch.from_numpy(np.tri(12, 20, 8, dtype=bool)))
    row = visible(("sliding_window", 5), 0, 0, 0, 8, np.arange(20), inputs.oracle.geo)
    assert np.flatnonzero(row).tolist() == [4, 5, 6, 7, 8]
