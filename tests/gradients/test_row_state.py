"""What a backend's forward pass leaves for its own backward pass arrives there, whatever differentiates.

The backend here computes with `tiled` and leaves sums of its inputs as the state of a row, so that its backward pass
can say whether the state that it was given belongs to the rows that it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.backends.tiled import backward, forward
from qkv.call.problem import Inputs, Output, Problem
from tests.kit import private

SEED = 5


class Stateful(forward.TiledBackend):
    name = "cpu"
    has_backward = True

    def __init__(self) -> None:
        self.made: list[bool] = []
        self.used = 0

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        self.made.append(problem.needs_grad)
        found = super().run(problem, inputs)
        return found._replace(state=_state(inputs)) if problem.needs_grad else found

    def no_backward(self, problem: Problem) -> str | None:
        return "not with a softcap" if problem.softcap is not None else None

    def backward(self, problem: Problem, inputs: Inputs, output: Output, d_out: Tensor, d_lse: Tensor) -> Any:
        state = output.state
        assert state is not None
        assert state.shape == (2, problem.B, problem.Hq, problem.Lq)
        assert torch.equal(state, _state(inputs))
        self.used += 1
        return backward.backward(problem, inputs, d_out, d_lse)


def _state(inputs: Inputs) -> Tensor:
    q, k = inputs.q.double().sum(-1), inputs.k.double().sum((-1, -2))
    return torch.stack((q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None].expand_as(q))).float()


@pytest.fixture
def stateful(monkeypatch: pytest.MonkeyPatch, nothing_kept: None) -> Stateful:
    mine = Stateful()
    private.use_backend(monkeypatch, "cpu", mine)
    return mine


def tensors(*lead: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(SEED)
    sizes = ((2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 3), (2, 4, 5, 3))
    q, k, v, towards = (torch.randn(*lead, *size, generator=g) for size in sizes)
    return q, k, v, towards


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return qkv.attention(q, k, v, mask=qkv.causal(), backend="cpu")


def loss(q: Tensor, k: Tensor, v: Tensor, towards: Tensor) -> Tensor:
    return (attend(q, k, v) * towards).sum((-1, -2, -3, -4))


def by_autograd(q: Tensor, k: Tensor, v: Tensor, towards: Tensor, run: Callable[..., Tensor] = attend) -> Any:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(run(*leaves), leaves, towards)


def wanted(q: Tensor, k: Tensor, v: Tensor, towards: Tensor) -> Any:
    return by_autograd(q, k, v, towards, lambda *x: qkv.attention(*x, mask=qkv.causal(), backend="tiled"))


def test_autograd_brings_it(stateful: Stateful) -> None:
    q, k, v, towards = tensors()
    want = wanted(q, k, v, towards)
    for x, y in zip(by_autograd(q, k, v, towards), want, strict=True):
        assert torch.equal(x, y)
    assert (stateful.made, stateful.used) == ([True], 1)


def test_nobody_makes_it_who_does_not_differentiate(stateful: Stateful) -> None:
    q, k, v, _ = tensors()
    attend(q, k, v)
    with torch.no_grad():
        attend(q.requires_grad_(), k, v)
    qkv.attention(q.detach(), k, v, return_lse=True, backend="cpu")
    assert stateful.made == [False] * 3


def test_a_backward_pass_of_another_backend_needs_none(stateful: Stateful) -> None:
    q, k, v, towards = tensors()
    got = by_autograd(q, k, v, towards, partial(qkv.attention, softcap=3.0, backend="cpu"))
    want = by_autograd(q, k, v, towards, partial(qkv.attention, softcap=3.0, backend="tiled"))
    assert stateful.used == 0
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_transforms_bring_it(stateful: Stateful) -> None:
    """grad, and grad of samples: mapped tensors join the batch, or run one by one beside what they share."""
    q, k, v, towards = tensors()
    want = wanted(q, k, v, towards)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v, towards), want, strict=True):
        assert torch.equal(x, y)
    mapped = tensors(3)
    each = [wanted(*(x[n] for x in mapped)) for n in range(3)]
    for dims in ((0, 0, 0, 0), (1, 0, 2, 0), (None, 0, 0, 0)):
        given = [x[0] if d is None else x.movedim(0, d) for x, d in zip(mapped, dims, strict=True)]
        each = [
            wanted(*(x if d is None else x.select(d, n) for x, d in zip(given, dims, strict=True))) for n in range(3)
        ]
        got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*given)
        for n, sample in enumerate(each):
            for x, y in zip(got, sample, strict=True):
                assert torch.allclose(x[n], y, atol=1e-6)
    assert stateful.used >= 4

    def with_sinks(sinks: Tensor, *given: Tensor) -> Tensor:
        return (qkv.attention(*given[:3], sinks=sinks, backend="cpu") * given[3]).sum()

    sinks = torch.zeros(3, 4)
    got = torch.vmap(torch.func.grad(with_sinks))(sinks, *mapped)
    for n in range(3):
        assert torch.allclose(got[n], torch.func.grad(with_sinks)(sinks[n], *(x[n] for x in mapped)), atol=1e-6)


def test_forward_mode_and_second_derivatives_pass_it_by(stateful: Stateful) -> None:
    q, k, v, towards = tensors()
    other = tensors(1)[0][0]
    out, tangent = torch.func.jvp(lambda q: attend(q, k, v), (q,), (other,))
    _, want = torch.func.jvp(lambda q: qkv.attention(q, k, v, mask=qkv.causal(), backend="tiled"), (q,), (other,))
    assert torch.equal(tangent, want)
    hvp = torch.func.jvp(lambda q: torch.func.grad(loss)(q, k, v, towards), (q,), (other,))[1]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    (dq,) = torch.autograd.grad(attend(*leaves), leaves[0], towards, create_graph=True)
    (twice,) = torch.autograd.grad(dq, leaves[0], other)
    assert torch.allclose(hvp, twice, atol=1e-5)
    assert stateful.used >= 2
    assert out.shape == towards.shape


def test_checkpointing_brings_it(stateful: Stateful) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v, towards = tensors()
    for reentrant in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        checkpoint(attend, *leaves, use_reentrant=reentrant).backward(towards)
        for x, y in zip(leaves, wanted(q, k, v, towards), strict=True):
            assert torch.equal(x.grad, y)
    assert stateful.used == 2


@pytest.mark.parametrize("how", ["op", "mode", "make_fx", "compile"])
def test_a_graph_brings_it(stateful: Stateful, how: str) -> None:
    q, k, v, towards = tensors()
    want = wanted(q, k, v, towards)
    if how == "op":
        static = dict(
            words=[], kinds=[], reading="", offsets=[], scale=None, softcap=None, dropout_p=0.0, backend="cpu"
        )
        words: list[int] = []
        from qkv.masks.portable import encode

        encode("test", qkv.causal(), words, [])
        got = by_autograd(
            q, k, v, towards,
            lambda *x: torch.ops.qkv.attention(*x, None, None, None, [], [], **static | {"words": words})[0],
        )  # fmt: skip
    elif how == "mode":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return func(*args, **(kwargs or {}))

        with Watch():
            got = by_autograd(q, k, v, towards)
    elif how == "make_fx":
        from torch.fx.experimental.proxy_tensor import make_fx

        got = make_fx(partial(by_autograd, run=attend))(q, k, v, towards)(q, k, v, towards)
    else:
        got = by_autograd(q, k, v, towards, torch.compile(attend, backend="aot_eager"))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert stateful.used == (2 if how == "make_fx" else 1)


def test_mapped_gradients_of_a_graph_bring_it(stateful: Stateful) -> None:
    """Per-sample gradients of the op itself, as compiled torch.func code has them."""
    mapped = tensors(3)
    static = dict(words=[], kinds=[], reading="", offsets=[], scale=None, softcap=None, dropout_p=0.0, backend="cpu")

    def of_op(q: Tensor, k: Tensor, v: Tensor, towards: Tensor, sinks: Tensor | None = None) -> Tensor:
        return (torch.ops.qkv.attention(q, k, v, sinks, None, None, [], [], **static)[0] * towards).sum()

    for sinks in (None, torch.zeros(4)):
        got = torch.vmap(torch.func.grad(of_op, argnums=(0, 1, 2)), in_dims=(0, 0, 0, 0, None))(*mapped, sinks)
        for n in range(3):
            q, k, v, towards = (x[n] for x in mapped)
            want = by_autograd(q, k, v, towards, partial(qkv.attention, sinks=sinks, backend="tiled"))
            for x, y in zip(got, want, strict=True):
                assert torch.allclose(x[n], y, atol=1e-6)
    assert stateful.used == 4  # once for all, and once a sample where they share sinks


def test_the_op_keeps_its_promised_sizes(stateful: Stateful) -> None:
    """Also of a backend that makes no state."""
    q, k, v, _ = tensors()
    static = dict(words=[], kinds=[], reading="", offsets=[], scale=None, softcap=None, dropout_p=0.0)
    for backend in ("cpu", "tiled"):
        for grad in (False, True):
            for state in (False, True):
                given = (q.requires_grad_(grad), k, v, None, None, None, [], [])
                found = torch.ops.qkv.attention(*given, **static, backend=backend, state=state)[2]
                assert found.shape == (2 if state else 0, 2, 4, 5)
                assert not found.requires_grad


def test_a_state_is_no_part_of_what_a_plan_is_asked_for() -> None:
    q, k, v, _ = tensors()
    wanted = qkv.plan(q, k, v)
    found = qkv.plan(q.requires_grad_(), k, v)
    assert (found.backend, found.reason) == (wanted.backend, wanted.reason)
    assert replace(found.problem, needs_grad=False) == wanted.problem, "lse is asked for by the caller alone"
