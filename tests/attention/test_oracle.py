"""attention() against the oracle: outputs, lse, gradients, edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from tests.kit.sharp import BACKENDS, DTYPES, inputs, run
from tests.kit.truth import Truth

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": dict(sizes=dict(Lq=1, Lk=1)),
    "gqa": dict(sizes=dict(Hq=6, Hkv=2)),
    "mqa": dict(sizes=dict(Hq=3, Hkv=1, Dv=5)),
    "cross": dict(sizes=dict(Lq=5, Lk=300, D=16, Dv=3)),
    "decode": dict(sizes=dict(Lq=1, Lk=2100, Hq=2, Hkv=1)),
    "causal": dict(mask=lambda: qkv.causal(), positions="end"),
    "causal tiles": dict(mask=lambda: qkv.causal(), positions="end", sizes=dict(Lq=140, Lk=270)),
    "dead rows": dict(mask=lambda: qkv.causal(), positions=-3),
    "window": dict(mask=lambda: qkv.sliding_window(3), positions="end"),
    "prefix": dict(mask=lambda: qkv.causal() | qkv.prefix([2, 5]), positions="start", sizes=dict(B=2)),
    "padding": dict(mask=lambda: qkv.padding([0, 4]), sizes=dict(B=2)),
    "documents": dict(mask=lambda: qkv.documents([4, 5]) & qkv.causal(), sizes=dict(Lq=9)),
    "positions per row": dict(mask=lambda: qkv.causal(), positions=[3, -1], sizes=dict(B=2)),
    "positions tensor": dict(mask=lambda: qkv.sliding_window(4), positions=torch.tensor([[8, 1, 2, 3, 0, 5, -2]])),
    "dense": dict(mask=lambda: torch.rand(1, 2, 7, 9, generator=torch.Generator().manual_seed(3)) > 0.5),
    "per head": dict(mask=lambda: qkv.per_head([qkv.causal(), ~qkv.causal()]), positions="start"),
    "mask_mod": dict(mask=lambda: qkv.mask_mod(lambda b, h, p, j: (p + j + h) % 2 == 0), positions="end"),
    "scale": dict(scale=-0.7),
    "no scale": dict(scale=0),
    "softcap": dict(softcap=2.5),
    "sinks": dict(sinks=True, mask=lambda: qkv.causal(), positions=-2),
    "bias": dict(bias=(1, 2, 7, 9)),
    "bias row": dict(bias=(9,)),
    "bias head": dict(bias=(2, 1, 1)),
    "all": dict(
        bias=(7, 1),
        sinks=True,
        softcap=3.0,
        scale=0.5,
        mask=lambda: qkv.sliding_window(5),
        positions="end",
        sizes=dict(Hq=4),
    ),
}


def runs_in(case: str, dtype: torch.dtype) -> bool:
    """The long cases run in two dtypes only: they take long."""
    long = max(CASES[case].get("sizes", {}).values(), default=0) > 200
    return not long or dtype in (torch.float32, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c}-{str(d)[6:]}") for c in CASES for d in DTYPES if runs_in(c, d)],
)
def test_against_the_oracle(case: str, backend: str, dtype: torch.dtype) -> None:
    c = CASES[case]
    sizes = c.get("sizes", {})
    q, k, v = inputs(dtype=dtype, grad=True, seed=len(case), **sizes)
    gen = torch.Generator().manual_seed(5)
    extra: dict[str, Any] = {name: c[name] for name in ("positions", "scale", "softcap") if name in c}
    mask = c["mask"]() if "mask" in c else None
    if "bias" in c:
        bias = torch.randn(c["bias"], generator=gen, dtype=torch.float64)
        bias.view(-1)[1] = -torch.inf if len(c["bias"]) == 4 else 1
        extra["bias"] = bias.to(dtype).requires_grad_()
    if c.get("sinks"):
        extra["sinks"] = torch.randn(q.shape[1], generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    out, lse, d_out, d_lse = run(backend, q, k, v, mask=mask, **extra)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    B, Hq, Lq, Lk = (*q.shape[:3], k.shape[2])
    seen = None
    if isinstance(mask, torch.Tensor):
        seen = mask
    elif mask is not None:
        seen = mask.tensor(Lq, Lk, positions=extra.get("positions", "start"), B=B, Hq=Hq)
    numbers = {name: extra[name] for name in ("scale", "softcap") if name in extra}
    truth = Truth(q, k, v, seen, extra.get("bias"), sinks=extra.get("sinks"), d_out=d_out, d_lse=d_lse, **numbers)
    truth.check(out, lse)
    leaves = {"q": q, "k": k, "v": v} | {name: extra[name] for name in ("bias", "sinks") if name in extra}
    assert all(t.grad.dtype == t.dtype for t in leaves.values())
    truth.check_gradients(**{name: t.grad for name, t in leaves.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e4, 1e12])
def test_large_and_small_magnitudes(backend: str, magnitude: float) -> None:
    q, k, v = inputs(Lq=5, Lk=6)
    q, v = q * magnitude, v * magnitude
    out, lse = qkv.attention(q, k, v, return_lse=True, backend=backend)
    Truth(q, k, v).check(out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-1e5, -1e30, 3e4])
def test_scores_far_from_zero(backend: str, shift: float) -> None:
    """A finite sentinel for hidden keys would win, or lose to, such scores."""
    q, k, v = inputs(Lq=4, Lk=6)
    bias = torch.full((4, 6), shift)
    mask = qkv.causal()
    out = qkv.attention(q, k, v, mask=mask, positions="end", bias=bias, backend=backend)
    Truth(q, k, v, mask.tensor(4, 6, positions="end"), bias).check(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_needles(backend: str) -> None:
    """Each query matches one key, at tile edges too, and its output must be that key's value."""
    Lk = 600
    k = torch.nn.functional.normalize(torch.randn(1, 1, Lk, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    v = torch.arange(Lk, dtype=torch.float32)[None, None, :, None].expand(1, 1, Lk, 3)
    wanted = [0, 1, 127, 128, 255, 256, 257, 511, 512, Lk - 1]
    out = qkv.attention(k[:, :, wanted] * 400, k, v, scale=1.0, backend=backend)
    assert torch.allclose(out[0, 0, :, 0], torch.tensor(wanted, dtype=torch.float32), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["B", "H", "Lq", "Lk", "Dv"])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_dimensions(empty: str, backend: str, sinks: bool) -> None:
    sizes = dict(B=2, Hq=2, Hkv=2, Lq=3, Lk=3, D=4, Dv=4)
    sizes |= {"Hq": 0, "Hkv": 0} if empty == "H" else {empty: 0}
    q, k, v = inputs(grad=True, **sizes)
    s = torch.ones(sizes["Hq"], requires_grad=True) if sinks else None
    out, lse, *_ = run(backend, q, k, v, mask=qkv.causal(), positions="end", sinks=s)
    assert out.shape == (sizes["B"], sizes["Hq"], sizes["Lq"], sizes["Dv"])
    assert lse.shape == out.shape[:3]
    if empty == "Lk":
        assert not out.any()
        assert (lse == (1.0 if sinks else -torch.inf)).all()
    for t in (q, k, v):
        assert t.grad.shape == t.shape
        assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [False, True])
def test_dead_rows(backend: str, sinks: bool) -> None:
    """Rows without a visible key: out 0, lse -inf or the sink, no gradient but the sink's; live rows as if alone."""
    q, k, v = inputs(B=2, Lq=6, Lk=6, grad=True)
    s = torch.tensor([0.5, -1.0], requires_grad=True) if sinks else None
    mask = qkv.padding([0, 6])
    out, lse = qkv.attention(q, k, v, mask=mask, sinks=s, return_lse=True, backend=backend)
    assert not out[0].any()
    assert (lse[0] == (s.detach()[:, None] if sinks else -torch.inf)).all()
    alone = qkv.attention(q[1:], k[1:], v[1:], sinks=s, backend=backend)
    assert torch.equal(out[1:], alone)
    d_lse = torch.ones_like(lse) if sinks else torch.where(torch.isfinite(lse), 1.0, 0.0)
    torch.autograd.backward([out, lse], [torch.randn_like(out), d_lse])
    for t in (q, k, v):
        assert not t.grad[0].any()
        assert torch.isfinite(t.grad).all()
    if sinks:
        s.grad = None
        _, lse = qkv.attention(q[:1], k[:1], v[:1], mask=qkv.padding([0]), sinks=s, return_lse=True, backend=backend)
        lse.sum().backward()
        assert torch.equal(s.grad, torch.full((2,), 6.0))
