"""The gate in small, and checks of the judge itself. `python -m tests.gates.gate` is the whole of it."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from tests.gates import gate
from tests.gates.calls import CALLS
from tests.kit import backends, judge, oracle
from tests.kit.cases import CASES, Config
from tests.kit.generator import random_config
from tests.kit.inputs import Inputs, materialise

FIXED, FRESH = 240, 60  # random configurations: the same in every run, and new ones


def test_every_backend_this_machine_can_run_is_there() -> None:
    missing = set(backends.required()) - set(backends.available())
    assert not missing, f"no {sorted(missing)}: what follows would judge less than it says"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_named_cases(case: Config) -> None:
    outcomes = CALLS.ask_all(case, backends.available())
    faults = [f"{o.backend}: {fault}" for o in outcomes for fault in o.faults]
    assert not faults, f"{case}\n" + "\n".join(faults)


def test_random_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    """Forward and gradients on every backend, under the error rule."""
    seed = gate.fresh_seed()
    seeds = [*range(FIXED), *range(seed, seed + FRESH)]

    def show(line: str) -> None:
        if sys.__stdout__.isatty() or line.startswith(f"{len(seeds)}/"):
            with capsys.disabled():
                print(f"\r  {line}", end="", flush=True)

    statistics = CALLS.run(seeds, backends.available(), 2, show)
    faults = gate.told(CALLS, statistics)
    assert not faults, f"{len(faults)} faults from seed {seed}\n" + "\n".join(faults[:20])


# ------------------------------------------------------------------------------------------------ the judge, judged
def definition(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Attention by torch in float64, with autograd: slow, quadratic and unlike the oracle in every line."""
    c, call = inputs.config, inputs.oracle
    leaves = {name: x.double() for name, x in zip("qkv", inputs.clean(), strict=True)}
    leaves |= {
        n: x.detach().double().nan_to_num(0, None, -torch.inf) for n, x in inputs.leaves.items() if n not in "qkv"
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    heads = torch.arange(c.Hq) // c.group
    k, v = leaves["k"][:, heads], leaves["v"][:, heads]
    s = torch.einsum("bhid,bhjd->bhij", leaves["q"], k) * c.real_scale
    if c.softcap is not None:
        s = c.softcap * torch.tanh(s / c.softcap)
    p, j = torch.from_numpy(call.positions)[:, None, :, None], torch.arange(c.Lk)
    for n, spec in enumerate(c.bias):
        values = leaves.get(f"bias{n}")
        if spec[0] == "tensor":
            s = s + values
        elif spec[0] == "alibi":
            s = s - values[:, None, None] * (p - j).abs()
        elif spec[0] == "relative":
            s = s + values[torch.arange(c.Hq)[:, None, None], (j - p).clamp(-spec[1], spec[1]) + spec[1]]
        elif spec[0] == "t5":
            column = torch.from_numpy(oracle.t5_bucket((j - p).numpy(), spec[1], spec[2], spec[3]))
            s = s + values[torch.arange(c.Hq)[:, None, None], column]
        else:
            s = s * (spec[1] * (1 + 0.25 * torch.arange(c.Hq)[:, None, None])) + spec[2] * (j - p)
    s = s.masked_fill(~inputs.visible(), -torch.inf)
    if "sinks" in leaves:
        s = torch.cat([s, leaves["sinks"][:, None, None].expand(c.B, c.Hq, c.Lq, 1)], -1)
    weights = torch.softmax(s, -1)
    out = weights[..., : c.Lk] @ v
    lse = torch.logsumexp(s, -1)
    loss = (out * inputs.dout.double()).sum() + (lse * inputs.dlse.double()).sum()
    return (
        out,
        lse,
        dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True)),
    )


def test_oracle_agrees_with_autograd_of_the_definition() -> None:
    """Over configurations without dead rows and NaN, which autograd through a softmax does not have."""
    checked = 0
    for seed in itertools.count():
        if checked == 40:
            break
        config = random_config(seed)
        if (
            config.visible_nan
            or config.dropout_p  # `test_dropout` has its hash
            or config.flavour in ("large", "wide")
            or 0 in (config.B, config.Hq, config.Lq, config.Lk, config.Dv)
        ):
            continue
        inputs = materialise(config)
        dout, dlse = (judge.numbers(x).astype(inputs.oracle.q.dtype) for x in (inputs.dout, inputs.dlse))
        truth = oracle.attention(inputs.oracle, dout, dlse)
        if (truth.seen == 0).any():
            continue
        checked += 1
        out, lse, grads = definition(inputs)
        pairs = [(out, truth.out, abs(truth.out)), (lse, truth.lse, abs(truth.lse))]
        pairs += [(g, truth.grads[n].value, truth.grads[n].plain) for n, g in grads.items()]
        rounding = 1e-14 * (1 + truth.spread.max())
        for got, want, size in pairs:
            assert abs(judge.numbers(got) - want).max(initial=0) <= rounding * (1 + size.max(initial=0)), str(config)


def test_configurations_replay() -> None:
    for seed in (3, 14, 159):
        one, two = materialise(random_config(seed)), materialise(random_config(seed))
        assert str(one.config) == str(two.config)
        for name, leaf in one.leaves.items():
            assert leaf.stride() == two.leaves[name].stride()
            assert np.array_equal(judge.numbers(leaf), judge.numbers(two.leaves[name]), equal_nan=True)


def test_the_generator_covers_what_it_promises() -> None:
    """Every kind of mask, bias, layout and dtype, needles with nearly all the weight, dead rows and hidden NaN."""
    configs = [random_config(seed) for seed in range(400)]
    text = " ".join(map(repr, configs))
    for kind in oracle._PREDICATES:
        assert f"('{kind}'" in text, kind
    for kind in (
        "tensor",
        "alibi",
        "relative",
        "t5",
        "score_mod",
        "expand_batch",
        "expand_heads",
        "step_dim",
        "column",
    ):
        assert f"'{kind}'" in text, kind
    assert {c.dtype for c in configs} == {"f64", "f32", "bf16", "f16"}
    assert any(0 in (c.Lk, c.B, c.Dv) for c in configs)
    assert {c.wide[0] for c in configs if c.wide} == {"units", "edge", "decimal"}
    needles = dead = hidden = 0
    for config in configs[:60]:
        inputs = materialise(config)
        call, rows = inputs.oracle, np.ndindex(*inputs.oracle.geo[:3])
        hidden += bool(inputs.hidden.any() and not np.isfinite(call.k[inputs.hidden]).all())
        dead += any(not len(call.keys(*at)) for at in np.ndindex(*call.geo[:3]))
        needles += any(top_weight(call, at) > 0.999 for at in rows)
    assert min(needles, dead, hidden) >= 10, (needles, dead, hidden)


def top_weight(call: oracle.Call, at: tuple[int, ...]) -> float:
    """The largest weight of a row that sees four keys and more, before biases and caps."""
    b, h, i = at
    keys = call.keys(b, h, i)
    if len(keys) < 4:
        return 0.0
    group = call.geo.Hq // call.k.shape[1]
    scores = call.k[b, h // group, keys] @ call.q[b, h, i] * call.scale
    return float(1 / np.exp(scores - scores.max()).sum())
