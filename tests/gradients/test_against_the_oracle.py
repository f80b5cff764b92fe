"""Gradients: numerical differentiation, parts of the inputs, saturation, in-place changes, autocast."""

from __future__ import annotations

import math

import pytest
import torch

import qkv
from qkv.errors import UnsupportedError
from tests.kit.sharp import BACKENDS, inputs
from tests.kit.truth import Truth


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    q, k, v = inputs(Hq=2, Hkv=1, Lq=3, Lk=4, D=3, Dv=2, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64)
    bias = torch.randn(2, 1, 4, dtype=torch.float64)
    slopes, table = torch.rand(2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    mask = qkv.causal() | qkv.prefix(1)

    def call(q, k, v, sinks, bias, slopes, table):
        terms = (
            qkv.alibi(slopes)
            + bias
            + qkv.score_mod(lambda s, b, h, p, j: s * torch.tanh(s) + 0.1 * j)
            + qkv.relative(table)
        )
        return qkv.attention(
            q * 0.3,
            k,
            v,
            mask=mask,
            positions=0,
            bias=terms,
            softcap=4.0,
            sinks=sinks,
            return_lse=True,
            backend=backend,
        )

    leaves = [x.requires_grad_() for x in (q, k, v, sinks, bias, slopes, table)]
    assert torch.autograd.gradcheck(call, leaves)


def test_only_lse_or_only_some_inputs() -> None:
    for backend in BACKENDS:
        q, k, v = inputs()
        q.requires_grad_()
        _, lse = qkv.attention(q, k, v, return_lse=True, backend=backend)
        lse.sum().backward()
        p = qkv.weights(q.detach(), k)
        assert torch.allclose(q.grad, p @ k / math.sqrt(8), atol=1e-5)
        assert k.grad is None


def test_saturated_softcap_keeps_its_gradient() -> None:
    """1 - tanh^2 in float32 is noise beyond 9 caps; the true slope there is 4 exp(-2x)."""
    q = torch.tensor([[[[9.0]]]], requires_grad=True)
    k, v = torch.tensor([[[[1.0], [0.5]]]]), torch.tensor([[[[1.0], [2.0]]]])
    for backend in BACKENDS:
        out = qkv.attention(q, k, v, scale=1.0, softcap=1.0, backend=backend)
        (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
        Truth(q, k, v, scale=1.0, softcap=1.0, d_out=torch.ones_like(out)).check_gradients(q=grad)


def test_changed_inputs_raise() -> None:
    for name in ("q", "k", "v", "out"):
        q, k, v = inputs(grad=True)
        tensors = dict(q=q * 1, k=k * 1, v=v * 1)
        out = qkv.attention(**tensors)
        (tensors | {"out": out})[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(torch.ones_like(out))


def test_three_times_differentiable_or_an_error() -> None:
    q, k, v = inputs(Lq=2, Lk=2, dtype=torch.float64, grad=True)
    for backend in (*BACKENDS, None):
        found = qkv.attention(q, k, v, backend=backend)
        for _ in range(2):
            (found,) = torch.autograd.grad(found.square().sum(), q, create_graph=True)
        if backend == "reference":
            found.square().sum().backward()
            assert q.grad.isfinite().all()
        else:
            with pytest.raises(UnsupportedError, match="differentiates twice"):
                found.square().sum().backward()


def test_autocast_does_not_lower_precision() -> None:
    q, k, v = inputs(Lq=5, Lk=6, grad=True)
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = qkv.attention(q, k, v, backend=backend)
            grad = torch.autograd.grad(out, q, torch.ones_like(out))[0]
        Truth(q, k, v).check(out)
        plain = torch.autograd.grad(qkv.attention(q, k, v, backend=backend), q, torch.ones_like(out))[0]
        assert torch.equal(grad, plain)
