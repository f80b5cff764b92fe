"""A small oracle: attention row by row in NumPy, sharp inputs for it, and one call that takes every gradient.

The gate has a bigger one. Inputs are sharp (logits of std >= 4, planted needles): kernels that return mean(V) pass
tests with flat softmaxes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import qkv

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
