"""attention() against an independent row-by-row computation in NumPy: outputs, lse, gradients, edge cases, errors.

The oracle here is small and its own; the gate has a bigger one. Inputs are sharp (logits of std >= 4, planted needles):
kernels that return mean(V) pass tests with flat softmaxes.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, UnsupportedError

BACKENDS = ("reference", "tiled")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().numpy().astype(np.longdouble)


class Oracle:
    """One row at a time, visible keys only, in extended precision; and the error bound of every number."""

    def __init__(self, q, k, v, seen=None, bias=None, scale=None, softcap=None, sinks=None, d_out=None, d_lse=None):
        self.dtype = q.dtype
        self.eps = torch.finfo(q.dtype).eps
        self.eps_acc = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
        self.floor = FLOOR[q.dtype]
        q, k, v = map(array, (q, k, v))
        B, Hq, Lq, D = q.shape
        Hkv, Lk, Dv = k.shape[1], k.shape[2], v.shape[3]
        scale = 1 / math.sqrt(D) if scale is None else scale
        zeros = np.zeros((B, Hq, Lq, Lk), np.longdouble)
        bias = zeros if bias is None else zeros + array(bias)
        seen = np.ones(zeros.shape, bool) if seen is None else np.broadcast_to(seen.numpy(), zeros.shape)
        self.out, self.out_abs = np.zeros((2, B, Hq, Lq, Dv), np.longdouble)
        self.lse = np.full((B, Hq, Lq), -np.inf, np.longdouble)
        self.S = np.zeros((B, Hq, Lq), np.longdouble)
        self.vmax = float(np.abs(v[np.isfinite(v)]).max(initial=0))
        g = dict(
            q=np.zeros_like(q),
            k=np.zeros_like(k),
            v=np.zeros_like(v),
            bias=zeros.copy(),
            sinks=np.zeros(Hq, np.longdouble),
        )
        self.grads, self.bounds = g, {name: np.zeros_like(x) for name, x in g.items()}
        do = array(d_out) if d_out is not None else np.zeros_like(self.out)
        dl = array(d_lse) if d_lse is not None else np.zeros_like(self.lse)
        for b in range(B):
            for h in range(Hq):
                kv = h // (Hq // Hkv)
                for i in range(Lq):
                    js = np.nonzero(seen[b, h, i] & (bias[b, h, i] > -np.inf))[0]
                    kk, vv, qi = k[b, kv, js], v[b, kv, js], q[b, h, i]
                    x = scale * (kk @ qi)
                    s = x if softcap is None else softcap * np.tanh(x / softcap)
                    slope = np.ones_like(x) if softcap is None else 1 / np.cosh(x / softcap) ** 2
                    s = s + bias[b, h, i, js]
                    S = np.max(abs(scale) * (np.abs(kk) @ np.abs(qi)) + np.abs(bias[b, h, i, js]), initial=0)
                    sink = -np.inf if sinks is None else float(sinks[h].detach())
                    m = max(np.max(s, initial=-np.inf), sink)
                    if m == -np.inf:
                        continue
                    e, es = np.exp(s - m), np.exp(sink - m)
                    total = e.sum() + es
                    p, ps = e / total, es / total
                    o = p @ vv
                    self.S[b, h, i], self.out[b, h, i], self.out_abs[b, h, i] = S, o, p @ np.abs(vv)
                    self.lse[b, h, i] = m + np.log(total)
                    d = do[b, h, i]
                    delta = d @ o - dl[b, h, i]
                    delta_abs = np.abs(d) @ (p @ np.abs(vv)) + abs(dl[b, h, i])
                    ds, ds_abs = p * (vv @ d - delta), p * (np.abs(vv) @ np.abs(d) + delta_abs)
                    r = 2 * self.eps + 8 * self.eps_acc * (1 + S)
                    w = self.bounds
                    g["q"][b, h, i] = scale * ((ds * slope) @ kk)
                    w["q"][b, h, i] = r * abs(scale) * ((ds_abs * slope) @ np.abs(kk))
                    for name, value, bound in (
                        ("k", scale * np.outer(ds * slope, qi), r * abs(scale) * np.outer(ds_abs * slope, np.abs(qi))),
                        ("v", np.outer(p, d), r * np.outer(p, np.abs(d))),
                    ):
                        np.add.at(g[name][b, kv], js, value)
                        np.add.at(w[name][b, kv], js, bound)
                    g["bias"][b, h, i, js], w["bias"][b, h, i, js] = ds, r * ds_abs
                    g["sinks"][h] -= ps * delta
                    w["sinks"][h] += r * ps * delta_abs

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        r = 2 * self.eps + 4 * self.eps_acc * (1 + self.S[..., None])
        self._within("out", out, self.out, r * self.out_abs + self.floor * (1 + self.vmax))
        if lse is not None:
            dead = self.lse == -np.inf
            assert np.array_equal(lse.detach().numpy() == -np.inf, dead)
            safe = np.where(dead, 0, self.lse)
            got = torch.where(torch.from_numpy(dead), 0.0, lse)
            self._within("lse", got, safe, 4 * self.eps_acc * (1 + self.S + np.abs(safe)))

    def check_gradient(self, name: str, got: torch.Tensor) -> None:
        want, bound = self.grads[name], self.bounds[name]
        if name == "bias":  # in its own shape: sum what was broadcast
            want, bound = ((array_sum(x, got.shape)) for x in (want, bound))
        self._within(f"d{name}", got, want, bound + self.floor * (1 + np.abs(want)))

    @staticmethod
    def _within(name: str, got: torch.Tensor, want: np.ndarray, bound: np.ndarray) -> None:
        error = np.abs(array(got) - want)
        assert not np.isnan(error).any(), f"{name} holds NaN"
        worst = float((error / np.maximum(bound, np.finfo(np.longdouble).tiny)).max(initial=0))
        assert worst <= 1, f"{name}: error is {worst:.3g} of its bound"


def array_sum(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(d for d in range(x.ndim) if shape[d] == 1 and x.shape[d] != 1)
    return x.sum(axes, keepdims=True).reshape(shape) if axes else x.reshape(shape)


def inputs(B=1, Hq=2, Hkv=2, Lq=7, Lk=9, D=8, Dv=8, dtype=torch.float32, seed=0, grad=False):
    """q and k whose logits have std 4, values with distinct rows, and needles: some queries match one edge key."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, L, D, generator=gen, dtype=torch.float64) * 2 for H, L in ((Hq, Lq), (Hkv, Lk)))
    v = torch.randn(B, Hkv, Lk, Dv, generator=gen, dtype=torch.float64) + torch.arange(Lk)[:, None] / max(Lk, 1)
    for i, j in enumerate((0, Lk - 1, Lk // 2)):
        if 0 <= j < Lk and i < Lq and Hkv:
            q[:, :, i] = k[:, :, j].repeat_interleave(Hq // Hkv, 1) * 3
    return tuple(x.to(dtype).requires_grad_(grad) for x in (q, k, v))


def run(backend, q, k, v, *, with_grad=True, bias=None, sinks=None, **kwargs):
    """out, lse and the gradients of everything that requires one; out gradients are random, never a sum()."""
    out, lse = qkv.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend=backend, **kwargs)
    gen = torch.Generator().manual_seed(99)
    d_out, d_lse = (torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    if with_grad:
        live = torch.isfinite(lse)
        torch.autograd.backward([out, lse], [d_out, torch.where(live, d_lse, 0.0)])
    return out, lse, d_out, d_lse


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
    oracle = Oracle(q, k, v, seen, extra.get("bias"), sinks=extra.get("sinks"), d_out=d_out, d_lse=d_lse, **numbers)
    oracle.check(out, lse)
    for name, t in (("q", q), ("k", k), ("v", v), *((n, extra[n]) for n in ("bias", "sinks") if n in extra)):
        assert t.grad.dtype == t.dtype
        assert t.grad.shape == t.shape
        oracle.check_gradient(name, t.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e4, 1e12])
def test_large_and_small_magnitudes(backend: str, magnitude: float) -> None:
    q, k, v = inputs(Lq=5, Lk=6)
    q, v = q * magnitude, v * magnitude
    out, lse = qkv.attention(q, k, v, return_lse=True, backend=backend)
    Oracle(q, k, v).check(out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-1e5, -1e30, 3e4])
def test_scores_far_from_zero(backend: str, shift: float) -> None:
    """A finite sentinel for hidden keys would win, or lose to, such scores."""
    q, k, v = inputs(Lq=4, Lk=6)
    bias = torch.full((4, 6), shift)
    mask = qkv.causal()
    out = qkv.attention(q, k, v, mask=mask, positions="end", bias=bias, backend=backend)
    Oracle(q, k, v, mask.tensor(4, 6, positions="end"), bias).check(out)


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


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other places of memory."""
    B, H, L, D = x.shape
    wide = torch.full((B, H, 2 * L, D + 3), torch.nan, dtype=x.dtype)
    wide[:, :, ::2, 2:-1] = x
    offset = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return {
        "BLHD": x.transpose(1, 2).contiguous().transpose(1, 2),
        "LBHD": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "D first": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "step 2": wide[:, :, ::2, 2:-1],
        "offset": offset,
        "negated": torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype == torch.float32 else x,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["BLHD", "LBHD", "D first", "step 2", "offset", "negated"])
def test_strides_change_no_bit(layout: str, backend: str) -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=5, Lk=6)
    mask = qkv.causal()
    want = qkv.attention(q, k, v, mask=mask, positions="end", backend=backend)
    moved = [layouts(x)[layout] for x in (q, k, v)]
    got = qkv.attention(*moved, mask=mask, positions="end", backend=backend)
    assert torch.equal(got, want)

    grads = []
    for tensors in ((q, k, v), moved):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = qkv.attention(*leaves, mask=mask, positions="end", backend=backend)
        d_out = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).cos()
        grads.append(torch.autograd.grad(out, leaves, d_out))
        strided = layouts(d_out)[layout]
        again = torch.autograd.grad(
            qkv.attention(*leaves, mask=mask, positions="end", backend=backend), leaves, strided
        )
        assert all(torch.equal(a, b) for a, b in zip(grads[-1], again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_expanded_inputs() -> None:
    q, k, v = inputs(B=1, Hq=2, Hkv=1)
    wide = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    want = qkv.attention(q, k, v)
    assert torch.equal(qkv.attention(*wide), want.expand(3, -1, -1, -1))
    leaf = k.clone().requires_grad_()
    qkv.attention(wide[0], leaf.expand(3, -1, -1, -1), wide[2]).backward(torch.ones(3, *want.shape[1:]))
    assert leaf.grad.shape == k.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_keeps_the_order_of_q(backend: str) -> None:
    q, k, v = inputs(B=2, Hq=4, Hkv=4, Lq=5, Lk=6, Dv=3)
    moved = q.transpose(1, 2).contiguous().transpose(1, 2)
    for grad in (False, True):
        out = qkv.attention(moved.requires_grad_(grad), k, v, backend=backend)
        assert out.transpose(1, 2).is_contiguous()
    assert qkv.attention(q, k, v, backend=backend).is_contiguous()
    assert qkv.attention(q.expand(2, -1, -1, -1), k, v, backend=backend).is_contiguous()
    assert qkv.attention(q[:1].expand(2, -1, -1, -1), k, v, backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_view_of_the_keys(backend: str) -> None:
    """MLA's absorbed decode: v is the leading columns of k."""
    q, latent, _ = inputs(Hq=4, Hkv=1, Lq=1, Lk=40, D=12)
    out = qkv.attention(q, latent, latent[..., :8], backend=backend)
    assert torch.equal(out, qkv.attention(q, latent, latent[..., :8].clone(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_of_heads_reads_the_right_values(backend: str) -> None:
    v = torch.arange(3.0)[None, :, None, None].expand(1, 3, 5, 2)
    out = qkv.attention(torch.randn(1, 6, 4, 8), torch.randn(1, 3, 5, 8), v, backend=backend)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([0.0, 0, 1, 1, 2, 2]))


# ---- positions ----


def test_positions_have_to_be_said() -> None:
    q, k, v = inputs(Lq=3, Lk=5)
    with pytest.raises(ArgumentError, match="positions=") as error:
        qkv.attention(q, k, v, mask=qkv.causal())
    text = str(error.value)
    assert 'positions="start" (p = i)' in text
    assert 'positions="end" (p = i + 2)' in text
    assert "■ ■ ■ · ·" in text
    with pytest.raises(ArgumentError, match="alibi"):
        qkv.attention(q, k, v, bias=qkv.alibi([1.0, 1.0]))
    qkv.attention(q, k, v, mask=qkv.padding([4]))  # does not look at positions
    qkv.attention(q, k[:, :, :3], v[:, :, :3], mask=qkv.causal())  # one length: no doubt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "form",
    ["end", 4, np.int64(4), torch.tensor(4), [4, 4], (4, 4), torch.tensor([4, 4]), np.array([4, 4]),
     torch.tensor([[4, 5, 6]]), torch.tensor([[4, 5, 6]], dtype=torch.int32), [[4, 5, 6], [4, 5, 6]]],
    ids=str,
)  # fmt: skip
def test_forms_of_positions(form: Any, backend: str) -> None:
    q, k, v = inputs(B=2, Lq=3, Lk=7)
    want = qkv.attention(q, k, v, mask=torch.ones(3, 7).tril(4).bool(), backend=backend)
    assert torch.equal(qkv.attention(q, k, v, mask=qkv.causal(), positions=form, backend=backend), want)


def test_chunks_agree_with_the_whole() -> None:
    q, k, v = inputs(Lq=20, Lk=20)
    mask = qkv.causal() & qkv.sliding_window(6)
    whole = qkv.attention(q, k, v, mask=mask)
    for cut in range(0, 21, 5):
        part = qkv.attention(q[:, :, cut:], k, v, mask=mask, positions=cut)
        assert torch.allclose(part, whole[:, :, cut:], atol=1e-5)


# ---- masked means unread ----


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_bytes_change_no_bit(backend: str, dtype: torch.dtype, poison: float) -> None:
    """Keys hidden from all rows, or from some: rows that do not see them keep their bits, gradients too."""
    q, k, v = inputs(B=2, Hq=4, Lq=150, Lk=300, dtype=dtype)
    seen = torch.rand(150, 300, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[:, 17] = seen[:, 299] = False
    seen[5] = False
    some = torch.arange(150) % 3 == 0  # the rows that see key 40, which is poisoned as well
    seen[:, 40] = some
    dirty_k, dirty_v = k.clone(), v.clone()
    for j in (17, 299, 40):
        dirty_k[:, :, j], dirty_v[:, :, j] = poison, poison
    results = []
    for kk, vv in ((k, v), (dirty_k, dirty_v)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, kk, vv)]
        out, lse = qkv.attention(*leaves, mask=seen, return_lse=True, backend=backend)
        # Rows that see the poison take no part in the loss.
        d_out = torch.where(some[:, None], 0.0, torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).to(
            dtype
        )
        d_lse = torch.where(some, 0.0, torch.where(torch.isfinite(lse), 1.0, 0.0))
        dq, dk, dv = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
        results.append((out[:, :, ~some], lse[:, :, ~some], dq[:, :, ~some]))
        assert not dk[:, :, 17].any()
        assert not dv[:, :, 299].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_poison_leaves_every_gradient_alone(backend: str) -> None:
    q, k, v = inputs(B=2, Lq=9, Lk=9)
    results = []
    for number in (0.0, torch.nan):
        leaves = [x.clone() for x in (q, k, v)]
        for x in leaves:
            x[0, :, 6:] = number
        leaves = [x.requires_grad_() for x in leaves]
        mask = qkv.padding([6, 9]) & qkv.causal() & qkv.documents([6, 3])
        out = qkv.attention(*leaves, mask=mask, backend=backend)
        d_out = torch.ones_like(out)
        d_out[0, :, 6:] = number  # those rows are dead: not even a NaN gradient of theirs may leak
        results.append((out, *torch.autograd.grad(out, leaves, d_out)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_visible_nan_and_inf(backend: str) -> None:
    q, k, v = inputs(Lq=4, Lk=4)
    nan = k.clone()
    nan[0, 0, 2, 0] = torch.nan
    out, lse = qkv.attention(q, nan, v, mask=qkv.causal(), return_lse=True, backend=backend)
    assert out[0, 0, 2:].isnan().all()
    assert lse[0, 0, 2:].isnan().all()
    assert torch.isfinite(out[0, 0, :2]).all()
    assert torch.isfinite(out[0, 1]).all()
    plus = torch.zeros(4, 4)
    plus[1, 2], plus[2, 0] = torch.inf, -torch.inf
    out, lse = qkv.attention(q, k, v, bias=plus, return_lse=True, backend=backend)
    assert out[0, :, 1].isnan().all()
    assert lse[0, :, 1].isnan().all()
    Oracle(q[:, :, 2:3], k, v, bias=plus[2:3]).check(out[:, :, 2:3])
    out, lse = qkv.attention(q, k, v, bias=torch.full((4, 4), -torch.inf), return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    value = v.clone()
    value[0, 0, 3, 1] = torch.inf
    out = qkv.attention(q, k, value, mask=qkv.causal(), backend=backend)
    assert out[0, 0, 3, 1] == torch.inf
    assert torch.isfinite(out[0, 0, :3]).all()
    assert torch.isfinite(out[0, 0, 3, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_minus_infinity_hides(backend: str) -> None:
    q, k, v = inputs(Lq=4, Lk=5)
    bias = torch.zeros(5)
    bias[2] = -torch.inf
    want = qkv.attention(q, k, v, bias=bias, backend=backend)
    k[:, :, 2], v[:, :, 2] = torch.nan, torch.nan
    assert torch.equal(qkv.attention(q, k, v, bias=bias, backend=backend), want)


# ---- gradients ----


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
        oracle = Oracle(q, k, v, scale=1.0, softcap=1.0, d_out=torch.ones_like(out))
        oracle.check_gradient("q", grad)


def test_changed_inputs_raise() -> None:
    for name in ("q", "k", "v", "out"):
        q, k, v = inputs(grad=True)
        tensors = dict(q=q * 1, k=k * 1, v=v * 1)
        out = qkv.attention(**tensors)
        (tensors | {"out": out})[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(torch.ones_like(out))


def test_twice_differentiable_or_an_error() -> None:
    q, k, v = inputs(Lq=2, Lk=2, dtype=torch.float64, grad=True)
    for backend in BACKENDS:
        out = qkv.attention(q, k, v, backend=backend)
        (dq,) = torch.autograd.grad(out, q, torch.ones_like(out), create_graph=True)
        if backend == "reference":
            dq.sum().backward()
        else:
            with pytest.raises(UnsupportedError, match="differentiates once"):
                dq.sum().backward()


def test_autocast_does_not_lower_precision() -> None:
    q, k, v = inputs(Lq=5, Lk=6, grad=True)
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = qkv.attention(q, k, v, backend=backend)
            grad = torch.autograd.grad(out, q, torch.ones_like(out))[0]
        Oracle(q, k, v).check(out)
        plain = torch.autograd.grad(qkv.attention(q, k, v, backend=backend), q, torch.ones_like(out))[0]
        assert torch.equal(grad, plain)


# ---- dropout ----


def test_dropout_is_one_mask_for_every_tiling() -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=150, Lk=300, grad=True)
    results = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        out, lse = qkv.attention(q, k, v, dropout_p=0.4, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), torch.cos(out.detach() * 9))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)
    torch.manual_seed(7)
    assert torch.equal(qkv.attention(q, k, v, dropout_p=0.4), results[1][0])
    assert not torch.equal(qkv.attention(q, k, v, dropout_p=0.4), results[1][0])
    assert torch.allclose(results[0][1], qkv.attention(q, k, v, return_lse=True)[1], atol=1e-5)


def test_dropout_keeps_the_stated_share() -> None:
    from qkv.numerics import dropout_keep

    n = 1000
    i = torch.arange(n)
    for p in (0.1, 0.5, 0.9):
        kept = dropout_keep(123, p, *(torch.tensor(x) for x in (0, 0)), i[:, None], i)
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n**2)
        other = dropout_keep(124, p, torch.tensor(0), torch.tensor(0), i[:, None], i)
        assert abs((kept == other).double().mean() - (p * p + (1 - p) ** 2)) < 0.01


def test_dropout_gradient_agrees_with_autograd() -> None:
    q, k, v = inputs(Lq=3, Lk=4, D=3, Dv=2, dtype=torch.float64, grad=True)

    def call(q, k, v):
        torch.manual_seed(3)
        return qkv.attention(q, k, v, dropout_p=0.3, backend="tiled")

    assert torch.autograd.gradcheck(call, (q, k, v))


# ---- weights ----


@pytest.mark.parametrize("rows", [slice(None), slice(1, 6, 2), 3, -1, [4, 0], torch.tensor([2, 2]), []], ids=str)
def test_weights(rows: Any) -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=7, Lk=9)
    bias, mask = torch.randn(7, 9), torch.rand(2, 1, 7, 9) > 0.4
    sinks = torch.zeros(4)
    p = qkv.weights(q, k, rows=rows, mask=mask, bias=bias, softcap=3.0, sinks=sinks)
    picked = (
        list(range(7))[rows]
        if isinstance(rows, slice)
        else torch.arange(7)[
            rows if isinstance(rows, torch.Tensor) else torch.tensor(rows, dtype=torch.int64).reshape(-1)
        ].tolist()
    )
    assert p.shape == (2, 4, len(picked), 9)
    out = qkv.attention(q, k, v, mask=mask, bias=bias, softcap=3.0, sinks=sinks)[:, :, picked]
    assert torch.allclose(p @ v.repeat_interleave(2, 1), out, atol=1e-5)
    assert (p.sum(-1) < 1).all()


def test_weights_of_a_long_sequence_stay_small() -> None:
    q, k = torch.randn(1, 1, 100_000, 8), torch.randn(1, 1, 100_000, 8)
    p = qkv.weights(q, k, rows=slice(99_990, None), mask=qkv.causal() & qkv.sliding_window(4))
    assert p.shape == (1, 1, 10, 100_000)
    assert ((p > 0).sum(-1) == 4).all()
    with pytest.raises(ArgumentError, match="rows"):
        qkv.weights(q, k, rows=100_000)
    with pytest.raises(ArgumentTypeError, match="rows"):
        qkv.weights(q, k, rows="all")


# ---- the plan ----


def test_plan_says_what_runs() -> None:
    q, k, v = inputs(Lq=512, Lk=512)
    plan = qkv.plan(q, k, v, mask=qkv.causal(), backend="tiled")
    assert plan.backend == "tiled"
    assert {name for name, _ in plan.refused} == {"cpu", "sdpa", "reference"}
    assert (plan.tiles.visible, plan.tiles.full, plan.tiles.total) == (2 * 6, 2 * 2, 2 * 8)
    assert plan.flops == 2 * 2 * 8 * 12 * 128 * 256
    text = str(plan)
    assert "tiled" in text
    assert "12 of 16" in text
    assert "causal()" in text
    assert qkv.plan(q, k).problem.Dv == 8
    assert qkv.plan(q, k, v, softcap=1.0, backend="reference").backend == "reference"
    with pytest.raises(UnsupportedError, match="softcap"):
        qkv.plan(q, k, v, softcap=1.0, backend="sdpa")
    meta = torch.empty(1, 8, 4096, 64, device="meta")
    assert qkv.plan(meta, meta, meta, mask=qkv.causal()).problem.Lq == 4096


def test_a_plan_of_a_million_tokens_is_cheap() -> None:
    import time

    q = torch.zeros(1, 1, 1, 64).expand(1, 8, 1_000_000, 64)
    best, threads = math.inf, torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for a core that another test has is not our time
    try:
        for _ in range(5):
            start = time.process_time()
            plan = qkv.plan(q, q, q, mask=qkv.sliding_window(4096))
            assert 0 < plan.tiles.visible < plan.tiles.total / 100
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert best < 0.03  # 10 ms on an idle machine


SHUFFLED = torch.randint(-5, 90, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "positions", ["start", "end", -7, [3, 50], SHUFFLED], ids=["start", "end", "-7", "rows", "shuffled"]
)
def test_counted_tiles_are_those_of_the_mask(positions: Any) -> None:
    from qkv.tiling import Schedule, View, count_tiles
    from qkv.validation import normalise_positions

    Lq, Lk, T, K = 40, 70, 8, 16
    mask = (qkv.causal() & qkv.sliding_window(20)) | qkv.prefix(3)
    dense = mask.tensor(Lq, Lk, positions=positions, B=2)
    reading, tensor = normalise_positions("test", positions, 2, Lq, torch.device("cpu"))
    visible = full = 0
    for b in range(2):
        blocks = [[dense[b, 0, i : i + T, j : j + K] for j in range(0, Lk, K)] for i in range(0, Lq, T)]
        offset = (
            {"start": 0, "end": Lk - Lq}.get(reading, 0)
            if isinstance(reading, str)
            else reading[b if len(reading) > 1 else 0]
        )
        view = View(b, 0, offset, None if tensor is None else tensor[b])
        schedule = Schedule(mask, [view], Lq, Lk, T, K)
        for t, row in enumerate(blocks):
            found = {key.start // K: key.full for key in schedule.keys(t)}
            for j, block in enumerate(row):
                if tensor is None:  # exact for consecutive positions
                    assert (j in found) == bool(block.any())
                    assert found.get(j, False) == bool(block.all())
                else:
                    assert j in found or not block.any()
                    assert bool(block.all()) or not found.get(j, False)
        count = count_tiles(mask, [view], Lq, Lk, T, K)
        assert count.visible == sum(len(list(schedule.keys(t))) for t in range(len(blocks)))
        assert count.full == sum(key.full for t in range(len(blocks)) for key in schedule.keys(t))
        visible, full = visible + count.visible, full + count.full
    assert visible >= full


def test_a_missing_native_backend_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from qkv import functional, planning

    real = planning.base.load

    def load(name: str) -> Any:
        if name.startswith("cpu"):
            raise ImportError("no module")
        return real(name)

    monkeypatch.setattr(planning.base, "load", load)
    monkeypatch.setattr(planning, "_warned", False)
    monkeypatch.setattr(functional, "_ENTRIES", {})
    monkeypatch.setattr(functional, "_FAST", {})
    q, k, v = inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qkv.attention(q, k, v)
        qkv.attention(q, k, v, mask=qkv.causal(), positions="end")
    assert len(caught) == 1
    assert "native" in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    with pytest.raises(UnsupportedError, match="native"):
        qkv.attention(q, k, v, backend="cpu:avx2")


# ---- the fast path ----


class _Prepared:
    """A stand-in for the native backend, to test the door alone."""

    name = "cpu"
    differentiable = False

    def __init__(self) -> None:
        self.prepared = self.ran = 0

    def supports(self, problem: Any) -> str | None:
        return "no dropout" if problem.dropout_p else None

    def run(self, problem: Any, given: Any) -> Any:
        raise AssertionError("prepared calls go first")

    def tile(self, problem: Any) -> tuple[int, int]:
        return 64, 64

    def note(self, problem: Any) -> str:
        return ""

    def prepare(self, problem: Any, given: Any) -> Any:
        from qkv.backends.tiled import TiledBackend
        from qkv.spec import Inputs

        self.prepared += 1
        bias = given.bias

        def execute(q, k, v, positions, tensors, sinks, return_lse):
            self.ran += 1
            terms = bias.with_tensors(tensors) if bias is not None else None
            return tuple(TiledBackend().run(problem, Inputs(q, k, v, positions, terms, sinks)))

        return execute


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> _Prepared:
    from qkv import functional, planning

    native, real = _Prepared(), planning.base.load
    monkeypatch.setattr(planning.base, "load", lambda name: native if name == "cpu" else real(name))
    monkeypatch.setattr(functional, "_ENTRIES", {})
    monkeypatch.setattr(functional, "_FAST", {})
    return native


def test_one_plan_serves_many_calls(door: _Prepared) -> None:
    from qkv import functional

    q, k, v = inputs(Lq=9)
    for _ in range(3):
        want = qkv.attention(q, k, v, mask=qkv.causal(), backend="tiled")
        assert torch.equal(qkv.attention(q, k, v, mask=qkv.causal()), want)
    assert (door.prepared, door.ran) == (1, 3)
    assert len(functional._FAST) == 1
    qkv.attention(q.requires_grad_(), k, v, mask=qkv.causal()).sum().backward()
    assert (door.prepared, door.ran) == (2, 4)
    with torch.no_grad():
        qkv.attention(q, k, v, mask=qkv.causal())
    assert (door.prepared, door.ran) == (2, 5)
    qkv.attention(q.detach(), k, k, mask=qkv.causal())  # v shares k's storage: a plan of its own
    assert door.prepared == 3
    qkv.attention(q.detach(), k, v, mask=qkv.causal(), dropout_p=0.5)
    assert door.prepared == 3


def test_a_hit_is_no_licence(door: _Prepared) -> None:
    """What equals a good argument without being one still raises after the good one was cached."""
    q, k, v = inputs(Lq=9)
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(scale=1.0), dict(scale=True)),
        (dict(softcap=1.0), dict(softcap=True)),
        (dict(positions=1), dict(positions=True)),
        (dict(return_lse=True), dict(return_lse=1)),
        (dict(dropout_p=0.0), dict(dropout_p=False)),
        (dict(backend=None), dict(backend="none")),
        (dict(scale=0.5), dict(scale=torch.tensor(0.5))),
    ]
    for good, bad in calls:
        qkv.attention(q, k, v, **good)
        qkv.attention(q, k, v, **good)
        with pytest.raises(QKVError):
            qkv.attention(q, k, v, **bad)
    with pytest.raises(ArgumentTypeError, match="dtype"):
        qkv.attention(q, k.double(), v)
    step = torch.complex(q, -q).conj().imag
    assert torch.equal(qkv.attention(step, k, v), qkv.attention(q, k, v))


def test_data_is_looked_at_in_every_call(door: _Prepared) -> None:
    q, k, v = inputs(Lq=9)
    mask = torch.ones(9, 9, dtype=torch.bool)
    qkv.attention(q, k, v, mask=mask)
    mask[:, 3] = False
    assert torch.equal(qkv.attention(q, k, v, mask=mask), qkv.attention(q, k, v, mask=mask.clone()))
    held = qkv.dense(mask)
    qkv.attention(q, k, v, mask=held)
    mask[:, 3] = True
    with pytest.raises(ArgumentError, match="in place"):
        qkv.attention(q, k, v, mask=held)
    p = torch.arange(9)[None]
    first = qkv.attention(q, k, v, mask=qkv.causal(), positions=p)
    p += 2
    assert not torch.equal(qkv.attention(q, k, v, mask=qkv.causal(), positions=p), first)
    with pytest.raises(ArgumentError, match="magnitude"):
        qkv.attention(q, k, v, mask=qkv.causal(), positions=p + 2**60)


def test_caches_are_bounded_and_hold_no_user_tensors(door: _Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from qkv import functional

    q, k, v = inputs(Lq=9)
    monkeypatch.setattr(door, "prepare", lambda problem, given: lambda q, *rest: (q, None), raising=False)
    for n in range(1, 270):
        qkv.attention(q, k, v, mask=qkv.sliding_window(n))
    assert len(functional._FAST) <= 256
    assert len(functional._ENTRIES) <= 256
    mask = torch.ones(9, 9, dtype=torch.bool)
    alive = weakref.ref(mask)
    qkv.attention(q, k, v, mask=mask)
    big = torch.randn(1, 2, 9, 8)
    alive_q = weakref.ref(big)
    qkv.attention(big, k, v)
    del mask, big
    gc.collect()
    assert alive() is None
    assert alive_q() is None


def test_threads_share_the_door(door: _Prepared) -> None:
    q, k, v = inputs(Lq=9)
    want = {n: qkv.attention(q, k, v, mask=qkv.sliding_window(n), backend="tiled") for n in range(1, 9)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(40):
            n = (seed + step) % 8 + 1
            if not torch.equal(qkv.attention(q, k, v, mask=qkv.sliding_window(n)), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- sdpa ----


def test_sdpa_when_nothing_is_lacking() -> None:
    q, k, v = inputs(Hq=4, Hkv=2, Lq=6, Lk=6, grad=True)
    for mask in (None, qkv.causal()):
        out = qkv.attention(q, k, v, mask=mask, backend="sdpa")
        want = qkv.attention(q, k, v, mask=mask)
        assert torch.allclose(out, want, atol=1e-5)
        grads = (torch.autograd.grad(x, (q, k, v), torch.ones_like(x)) for x in (out, want))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert "not promised" in str(qkv.plan(q, k, v, backend="sdpa"))
    for lacking in (
        dict(softcap=2.0),
        dict(return_lse=True),
        dict(mask=qkv.prefix(2)),
        dict(sinks=torch.zeros(4)),
        dict(dropout_p=0.1),
    ):
        with pytest.raises(UnsupportedError, match="sdpa"):
            qkv.attention(q, k, v, backend="sdpa", **lacking)


# ---- errors ----

T = torch.zeros


def bad_calls() -> dict[str, tuple[type[QKVError], str, Any]]:
    q = T(2, 4, 5, 8)

    def call(**change: Any) -> Any:
        return lambda: qkv.attention(**({"q": q, "k": q, "v": q} | change))

    return {
        "q is a list": (ArgumentTypeError, "q must be a tensor", call(q=[1])),
        "v left out": (ArgumentTypeError, "cache's view", call(v=None)),
        "q int": (ArgumentTypeError, "float64, float32", call(q=q.long())),
        "mixed dtypes": (ArgumentTypeError, "one dtype", call(k=q.double())),
        "meta key": (ArgumentTypeError, "one device", call(k=q.to("meta"))),
        "all meta": (UnsupportedError, "meta", call(q=q.to("meta"), k=q.to("meta"), v=q.to("meta"))),
        "sparse": (ArgumentTypeError, "strided", call(q=q.to_sparse())),
        "3-D": (ShapeError, "4 dimensions", call(q=q[0])),
        "batch": (ShapeError, "batch size", call(k=T(1, 4, 5, 8))),
        "D": (ShapeError, "head size D", call(k=T(2, 4, 5, 7))),
        "D 0": (ShapeError, "at least 1", call(q=q[..., :0], k=q[..., :0])),
        "Lk": (ShapeError, "one length Lk", call(v=T(2, 4, 6, 8))),
        "Hkv": (ShapeError, "same heads", call(v=T(2, 2, 5, 8))),
        "multiple": (ShapeError, r"Hkv in \{1, 2, 4\}", call(k=T(2, 3, 5, 8), v=T(2, 3, 5, 8))),
        "no kv heads": (ShapeError, "multiple", call(k=T(2, 0, 5, 8), v=T(2, 0, 5, 8))),
        "float mask": (ArgumentTypeError, "bias=", call(mask=T(5, 5))),
        "mask str": (ArgumentTypeError, "causal", call(mask="causal")),
        "mask shape": (ShapeError, "broadcast", call(mask=torch.ones(5, 6).bool())),
        "bias int": (ArgumentTypeError, "bias", call(bias=T(5, 5).long())),
        "bias bool": (ArgumentTypeError, "mask=", call(bias=torch.ones(5, 5).bool())),
        "bias dtype": (ArgumentTypeError, "q's dtype or float32", call(bias=T(5, 5).double())),
        "bias shape": (ShapeError, "broadcast", call(bias=T(5, 6))),
        "bias 5-D": (ShapeError, "broadcast", call(bias=T(1, 1, 1, 5, 5))),
        "bias fn": (ArgumentTypeError, "score_mod", call(bias=lambda s: s)),
        "alibi heads": (ShapeError, "slope", call(bias=qkv.alibi([1.0]))),
        "table heads": (ShapeError, "row a query head", call(bias=qkv.relative(T(3, 5)))),
        "scale nan": (ArgumentError, "finite", call(scale=math.nan)),
        "scale inf": (ArgumentError, "finite", call(scale=-math.inf)),
        "scale huge": (ArgumentError, "finite", call(scale=10**400)),
        "scale tensor": (ArgumentTypeError, "number", call(scale=torch.tensor(1.0))),
        "scale bool": (ArgumentTypeError, "number", call(scale=True)),
        "scale str": (ArgumentTypeError, "number", call(scale="1")),
        "scale complex": (ArgumentTypeError, "number", call(scale=1j)),
        "softcap 0": (ArgumentError, "> 0", call(softcap=0)),
        "softcap negative": (ArgumentError, "> 0", call(softcap=-1.0)),
        "softcap nan": (ArgumentError, "finite", call(softcap=math.nan)),
        "softcap bool": (ArgumentTypeError, "number", call(softcap=True)),
        "dropout 1": (ArgumentError, r"\[0, 1\)", call(dropout_p=1.0)),
        "dropout negative": (ArgumentError, r"\[0, 1\)", call(dropout_p=-0.1)),
        "dropout nan": (ArgumentError, "finite", call(dropout_p=math.nan)),
        "dropout none": (ArgumentTypeError, "number", call(dropout_p=None)),
        "sinks list": (ArgumentTypeError, "sinks", call(sinks=[0.0] * 4)),
        "sinks int": (ArgumentTypeError, "sinks", call(sinks=torch.zeros(4).long())),
        "sinks shape": (ShapeError, r"\(Hq,\)", call(sinks=T(5))),
        "sinks device": (ArgumentTypeError, "device", call(sinks=T(4, device="meta"))),
        "positions str": (ArgumentError, "start", call(positions="middle")),
        "positions float": (ArgumentTypeError, "positions", call(positions=1.5)),
        "positions bool": (ArgumentTypeError, "positions", call(positions=True)),
        "positions count": (ShapeError, "each batch row", call(positions=[1, 2, 3])),
        "positions shape": (ShapeError, "B or 1, Lq", call(positions=torch.zeros(2, 4).long())),
        "positions floats": (ArgumentTypeError, "integers", call(positions=torch.zeros(2, 5))),
        "positions huge": (ArgumentError, "magnitude", call(positions=2**50)),
        "return_lse 1": (ArgumentTypeError, "bool", call(return_lse=1)),
        "return_lse None": (ArgumentTypeError, "bool", call(return_lse=None)),
        "backend unknown": (ArgumentError, "reference, tiled, sdpa, cpu", call(backend="cuda")),
        "backend type": (ArgumentTypeError, "name", call(backend=1)),
        "backend list": (ArgumentTypeError, "name", call(backend=["tiled"])),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors(name: str) -> None:
    kind, text, call = bad_calls()[name]
    with pytest.raises(kind, match=text) as error:
        call()
    assert type(error.value) is kind
    assert isinstance(error.value, (ValueError, TypeError))
    assert str(error.value).startswith("qkv.attention(): ")
    assert " Got " in str(error.value)


def test_the_message_of_the_design() -> None:
    with pytest.raises(ShapeError) as error:
        qkv.attention(T(2, 10, 64, 64), T(2, 4, 64, 64), T(2, 4, 64, 64))
    assert str(error.value) == (
        "qkv.attention(): query heads must be a multiple of key/value heads. Got q (2, 10, 64, 64) → Hq=10 and "
        "k (2, 4, 64, 64) → Hkv=4. Use Hkv in {1, 2, 5, 10}, or check that q is (B, H, L, D)."
    )


def test_functorch_is_refused_by_name() -> None:
    q = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda x: qkv.attention(x, x, x))(q)
