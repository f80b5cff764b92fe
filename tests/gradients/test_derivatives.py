"""Second derivatives, forward mode and torch.func: against numerical differentiation and the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv.backends.tiled import second as tiled_second
from qkv.call.problem import Options
from qkv.call.validate import validate
from qkv.errors import UnsupportedError

F64 = torch.float64
NATIVE = None  # whatever attention() takes by itself
BACKENDS = ("tiled", NATIVE)
SEED = 20


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = SEED, dtype: torch.dtype = F64) -> Tensor:
    """A fixed standard normal tensor; the shape is part of the seed, so that no two arguments are alike."""
    gen = torch.Generator().manual_seed(seed + sum(n * 31**i for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=gen, dtype=F64).to(dtype)


def qkv_of(B: int = 1, Hq: int = 2, Hkv: int = 1, Lq: int = 3, Lk: int = 4, D: int = 2, Dv: int = 3) -> list[Tensor]:
    return [normal(B, Hq, Lq, D), normal(B, Hkv, Lk, D, seed=1), normal(B, Hkv, Lk, Dv, seed=2)]


CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "masks and groups": (
        lambda q, k, v, backend: qkv.attention(
            q, k, v, mask=qkv.causal() | qkv.prefix(1), positions=0, return_lse=True, backend=backend
        ),
        qkv_of(),
    ),
    "softcap and sinks": (
        lambda q, k, v, sinks, backend: qkv.attention(
            q, k, v, softcap=1.5, sinks=sinks, scale=0.7, return_lse=True, backend=backend
        ),
        [*qkv_of(), normal(2)],
    ),
    "bias": (
        lambda q, k, v, bias, slopes, table, backend: qkv.attention(
            q, k, v, positions="end", mask=qkv.sliding_window(2),
            bias=bias + qkv.alibi(slopes) + qkv.relative(table), return_lse=True, backend=backend,
        ),
        [*qkv_of(), normal(2, 1, 4), normal(2), normal(2, 5)],
    ),
    "score_mod": (
        lambda q, k, v, bias, backend: qkv.attention(
            q, k, v, positions=0, bias=qkv.score_mod(lambda s, b, h, p, j: s * torch.tanh(s) + 0.1 * j) + bias,
            softcap=4.0, return_lse=True, backend="tiled",
        ),
        [*qkv_of(), normal(3, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_numerical_differentiation(case: str, backend: str | None) -> None:
    """Forward mode, double backward and forward over backward, each against differences."""
    fn, given = CASES[case]
    leaves = [x.clone().requires_grad_() for x in given]

    def call(*tensors: Tensor) -> Any:
        return tuple(fn(*tensors, backend=backend))

    options = dict(check_undefined_grad=False, fast_mode=True)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, **options)


def both(fn: Callable[..., Any], given: list[Tensor], tangents: list[Tensor], towards: list[Tensor]) -> list[Tensor]:
    """The tangent of fn's outputs and the tangent of its gradients, by reverse mode only, for any backend."""
    leaves = [x.detach().requires_grad_() for x in given]
    grads = torch.autograd.grad(fn(*leaves), leaves, towards, create_graph=True)
    lifted = [torch.zeros_like(t, requires_grad=True) for t in towards]
    pulled = torch.autograd.grad(fn(*leaves), leaves, lifted, create_graph=True)
    along = torch.autograd.grad(pulled, lifted, tangents)
    return [*along, *torch.autograd.grad(grads, leaves, tangents)]


BIG = dict(B=2, Hq=4, Hkv=2, Lq=150, Lk=300, D=8, Dv=5)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_many_tiles_against_the_definition(dtype: torch.dtype) -> None:
    """Several tiles of queries and keys, some empty, some full, against autograd through the definition."""
    q, k, v = (x.to(dtype) for x in qkv_of(**BIG))
    q = q * 3  # logits of std 4 and more: a flat softmax hides a wrong tile
    bias, sinks = normal(4, 1, 300).to(dtype), normal(4).to(dtype)
    mask = (qkv.sliding_window(40) | qkv.prefix(3)) & qkv.padding([300, 170])
    given = [q, k, v, bias, sinks]
    tangents = [normal(*x.shape, seed=5).to(dtype) for x in given]
    towards = [
        normal(2, 4, 150, 5, seed=6).to(dtype),
        normal(2, 4, 150, seed=7).to(F64 if dtype == F64 else torch.float32),
    ]

    def call(backend: str) -> Callable[..., Any]:
        return lambda q, k, v, bias, sinks: tuple(
            qkv.attention(
                q, k, v, mask=mask, positions=150, bias=bias, sinks=sinks, softcap=20.0, return_lse=True,
                backend=backend,
            )
        )  # fmt: skip

    got = both(call("tiled"), given, tangents, towards)
    exact = [x.to(F64) for x in given]
    want = both(call("reference"), exact, [t.to(F64) for t in tangents], [t.to(F64) for t in towards])
    names = ("out'", "lse'", "dq'", "dk'", "dv'", "dbias'", "dsinks'")
    # Sums of up to 300 terms that cancel: errors are judged by the largest number of each result. Measured: a third.
    bound = {F64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 0.03}[dtype]
    for name, x, y in zip(names, got, want, strict=True):
        assert x.dtype == (towards[1].dtype if name == "lse'" else dtype), name
        error = float((x.to(F64) - y).abs().max() / y.abs().max())
        assert error <= bound, f"{name}: {error:.3g} (seed {SEED})"


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [2.0**12, 2.0**60])
def test_saturated_rows(dtype: torch.dtype, scale: float) -> None:
    """Scores of 1e4 and more, exact in every dtype, with ties: a row's weight is on one key, or shared by equals."""
    gen = torch.Generator().manual_seed(SEED)
    q, k = (torch.randint(-2, 3, (1, H, 40, 4), generator=gen).to(dtype) for H in (2, 1))
    given = [q, k, normal(1, 1, 40, 3).to(dtype), (torch.randint(-3, 4, (2, 40, 40), generator=gen) * scale).to(dtype)]
    tangents = [normal(*x.shape, seed=5).to(dtype) for x in given]
    towards = [normal(1, 2, 40, 3, seed=6).to(dtype), normal(1, 2, 40).to(F64 if dtype == F64 else torch.float32)]

    def call(backend: str) -> Callable[..., Any]:
        return lambda q, k, v, bias: tuple(
            qkv.attention(q, k, v, bias=bias, scale=scale, return_lse=True, backend=backend)
        )

    got = both(call("tiled"), given, tangents, towards)
    want = both(
        call("reference"), [x.to(F64) for x in given], [t.to(F64) for t in tangents], [t.to(F64) for t in towards]
    )
    bound = {F64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for name, x, y in zip(("out'", "lse'", "dq'", "dk'", "dv'", "dbias'"), got, want, strict=True):
        error = float((x.to(F64) - y).abs().max() / y.abs().max())
        assert error <= bound, f"{name}: {error:.3g}"


def problem_of(q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor | None = None) -> Any:
    return validate("test", q, k, v, mask, Options(positions=0, sinks=sinks, return_lse=True))


def second(q: Any, k: Any, v: Any, mask: Any, tangents: Any, d_out: Tensor) -> list[Tensor]:
    problem, inputs = problem_of(q, k, v, mask)
    t = tiled_second.Tangents(*tangents, None, ())
    found = tiled_second.curved(problem, inputs, d_out, torch.zeros_like(d_out[..., 0]), t)
    return [*tiled_second.along(problem, inputs, t), found.q, found.k, found.v]


def test_hidden_bytes_change_no_bit() -> None:
    q, k, v = qkv_of(B=1, Lq=5, Lk=9, D=4)
    mask = qkv.padding([6]) & ~qkv.window(0, 0)
    tangents = [normal(*x.shape, seed=3) for x in (q, k, v)]
    d_out = normal(1, 2, 5, 3, seed=4)
    clean = second(q, k, v, mask, tangents, d_out)
    for poison in (torch.nan, torch.inf, 1e300):
        dirty = [x.clone() for x in (k, v, tangents[1], tangents[2])]
        for x in dirty:
            x[:, :, 6:] = poison
        got = second(q, dirty[0], dirty[1], mask, [tangents[0], *dirty[2:]], d_out)
        for x, y in zip(got, clean, strict=True):
            assert torch.equal(x, y)
    # A visible NaN reaches its row and what its row sees, nothing else.
    q[0, 0, 2, 1] = torch.nan
    t_out, _, dq, dk, dv = second(q, k, v, mask, tangents, d_out)
    assert t_out[0, 0, 2].isnan().all()
    assert dq[0, 0, 2].isnan().all()
    assert not t_out[0, 0, [0, 1, 3, 4]].isnan().any()
    assert not dq[0, 0, [0, 1, 3, 4]].isnan().any()
    for x in (dk, dv):
        assert x[0, 0, [0, 1, 3, 4, 5]].isnan().all()
        assert x[0, 0, 2].isfinite().all()
        assert not x[0, 0, 6:].any()


def test_rows_without_keys() -> None:
    """Such a row is a constant: no tangent enters or leaves it; with a sink, lse moves with the sink alone."""
    q, k, v = qkv_of(Lq=3, Lk=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = qkv.attention(*leaves, mask=qkv.prefix(0), return_lse=True, backend="tiled")
    grads = torch.autograd.grad(out, leaves, normal(*out.shape), create_graph=True)
    again = torch.autograd.grad(grads, leaves, [normal(*g.shape, seed=3) for g in grads])
    assert not any(g.any() for g in (*grads, *again))
    sinks = normal(2)
    (out, lse), (t_out, t_lse) = torch.func.jvp(
        lambda q, s: tuple(qkv.attention(q, k, v, mask=qkv.prefix(0), sinks=s, return_lse=True)),
        (q.detach(), sinks),
        (normal(*q.shape, seed=3), torch.tensor([2.0, -3.0], dtype=F64)),
    )
    assert torch.equal(lse, sinks[None, :, None].expand(1, 2, 3))
    assert not t_out.any()
    assert torch.equal(t_lse, torch.tensor([2.0, -3.0], dtype=F64)[None, :, None].expand(1, 2, 3))


@pytest.mark.parametrize("empty", ["B", "Hq", "Lq", "Lk", "Dv"])
def test_empty_dimensions(empty: str) -> None:
    sizes = dict(B=2, Hq=2, Hkv=1, Lq=3, Lk=4, D=2, Dv=3) | {empty: 0}
    if empty == "Hq":
        sizes["Hkv"] = 0
    leaves = [x.requires_grad_() for x in qkv_of(**sizes)]
    out, lse = qkv.attention(*leaves, return_lse=True)
    grads = torch.autograd.grad(
        [out, lse.where(lse.isfinite(), 0)], leaves, [normal(*out.shape), normal(*lse.shape)], create_graph=True
    )
    again = torch.autograd.grad(grads, leaves, [normal(*g.shape, seed=3) for g in grads])
    assert [g.shape for g in again] == [x.shape for x in leaves]
    assert all(g.isfinite().all() for g in again)
    if empty != "Dv":  # without values lse still has curvature
        assert not any(g.any() for g in again)
    t_out = torch.func.jvp(lambda q: qkv.attention(q, *leaves[1:]), (leaves[0],), (leaves[0],))[1]
    assert t_out.shape == out.shape
    assert not t_out.any()


def test_no_quadratic_memory() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(found):
                if isinstance(x, Tensor) and x.untyped_storage().nbytes() // x.element_size() > self.numel:
                    self.numel = x.untyped_storage().nbytes() // x.element_size()
            return found

    L = 2048
    q, k, v = (normal(1, 1, L, 4).float() for _ in range(3))
    problem, inputs = problem_of(q, k, v, qkv.sliding_window(100))
    t = tiled_second.Tangents(q, k, v, None, ())
    with Largest() as largest:
        tiled_second.curved(problem, inputs, v, torch.zeros(1, 1, L), t)
    assert largest.numel <= 128 * 256 * 4, largest.numel  # one tile of scores, a copy for each thread and its neighbour


def test_the_third_derivative_is_refused() -> None:
    q, k, v = qkv_of()
    found = q.requires_grad_()
    for _ in range(2):
        out = qkv.attention(q, k, v) if found is q else found
        (found,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="reference"):
        torch.autograd.grad(found.square().sum(), q)
    q = q.detach()
    with pytest.raises(UnsupportedError, match="forward mode over forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda q: qkv.attention(q, k, v)))(q)


# ------------------------------------------------------------------------------------------------------ torch.func
def reverse_hessian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(fn, x)


def test_hessian_and_jacobians() -> None:
    q, k, v = qkv_of()
    c = normal(1, 2, 3, 3, seed=8)
    loss = lambda backend: lambda x: (qkv.attention(x, k, v, mask=qkv.prefix(3), backend=backend) * c).square().sum()  # noqa: E731
    want = reverse_hessian(loss("reference"), q)
    for outer, inner in (
        (torch.func.jacfwd, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
    ):
        got = outer(inner(loss(None)))(q)
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12), (outer.__name__, inner.__name__)
    jacobian = torch.autograd.functional.jacobian(lambda x: qkv.attention(x, k, v, backend="reference"), q)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(lambda x: qkv.attention(x, k, v))(q), jacobian, rtol=1e-10, atol=1e-12)


TWO_ROWS = qkv.padding([2, 5])
PLAIN_Q, PLAIN_K, PLAIN_V = normal(2, 4, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 4)
Q, K, V = normal(3, 2, 4, 5, 3), normal(3, 2, 2, 5, 3, seed=1), normal(3, 2, 2, 5, 4, seed=2)
MAPPED: dict[str, tuple[Callable[..., Any], list[Tensor], tuple[int | None, ...]]] = {
    "all": (lambda q, k, v: qkv.attention(q, k, v, mask=qkv.causal()), [Q, K, V], (0, 0, 0)),
    "queries": (qkv.attention, [Q.movedim(0, 2), PLAIN_K, PLAIN_V], (2, None, None)),
    "values": (qkv.attention, [PLAIN_Q, PLAIN_K, V.movedim(0, -1)], (None, None, -1)),
    "rows of their own": (lambda q, k, v: qkv.attention(q, k, v, mask=TWO_ROWS), [Q, PLAIN_K, V], (0, None, 0)),
    "starts of their own": (
        lambda q, k, v: qkv.attention(q, k, v, mask=qkv.causal(), positions=[0, 2]), [Q, K, V], (0, 0, 0),
    ),
    "sinks": (lambda q, k, v, s: qkv.attention(q, k, v, sinks=s), [Q, K, V, normal(4)], (0, 0, 0, None)),
    "own sinks": (
        lambda q, k, v, s: qkv.attention(q, k, v, sinks=s), [PLAIN_Q, PLAIN_K, PLAIN_V, normal(3, 4)],
        (None, None, None, 0),
    ),
    "own bias": (
        lambda q, k, v, b: qkv.attention(q, k, v, bias=b), [PLAIN_Q, PLAIN_K, V, normal(3, 5, 5)], (None, None, 0, 0),
    ),
    "shared bias": (
        lambda q, k, v, b: qkv.attention(q, k, v, bias=b), [Q, PLAIN_K, PLAIN_V, normal(5, 5)], (0, None, None, None),
    ),
    "bias a batch row": (
        lambda q, k, v, b: qkv.attention(q, k, v, bias=b), [Q, K, PLAIN_V, normal(2, 1, 5, 5)], (0, 0, None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPED)
def test_vmap(case: str) -> None:
    """A mapped call, and its gradient for each sample, are those of the samples one by one."""
    fn, given, dims = MAPPED[case]
    samples = [[x if d is None else x.select(d, n) for x, d in zip(given, dims, strict=True)] for n in range(3)]
    want = torch.stack([fn(*s) for s in samples])
    got = torch.vmap(fn, in_dims=dims)(*given)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    c = normal(*want.shape[1:], seed=9)
    every = tuple(range(len(given)))

    def one(*tensors: Tensor) -> Tensor:
        return (fn(*tensors) * c).sum()

    per_sample = torch.vmap(torch.func.grad(one, argnums=every), in_dims=dims)(*given)
    for n, s in enumerate(samples):
        leaves = [x.clone().requires_grad_() for x in s]
        for x, y in zip(per_sample, torch.autograd.grad(fn(*leaves), leaves, c), strict=True):
            assert torch.allclose(x[n], y, rtol=1e-11, atol=1e-13), n


def test_vmap_over_masks_and_positions() -> None:
    q, k, v = qkv_of(Lq=4, Lk=4)
    masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(SEED)) > 0.4
    got = torch.vmap(lambda m: qkv.attention(q, k, v, mask=qkv.causal() & qkv.dense(m)))(masks)
    assert torch.equal(got, torch.stack([qkv.attention(q, k, v, mask=qkv.causal() & qkv.dense(m)) for m in masks]))
    with pytest.raises(UnsupportedError, match="positions"):
        torch.vmap(lambda p: qkv.attention(q, k, v, mask=qkv.causal(), positions=p))(
            torch.zeros(3, 1, 4, dtype=torch.int64)
        )


def test_constants_inside_of_transforms() -> None:
    """What no transform follows is computed as outside, and autograd outside still sees it."""
    q, k, v = qkv_of()
    leaf = q.clone().requires_grad_()
    for backend in ("reference", "tiled", None):
        want = qkv.attention(leaf, k, v, softcap=2.0, backend=backend)
        got = torch.vmap(lambda x, b=backend: x * qkv.attention(leaf, k, v, softcap=2.0, backend=b))(torch.ones(2))
        assert torch.equal(got, torch.stack([want, want]))
        for x, y in zip(*(torch.autograd.grad(o.sum(), leaf) for o in (got, 2 * want)), strict=True):
            assert torch.allclose(x, y, rtol=1e-12)
    with pytest.raises(UnsupportedError, match="weights"):
        torch.vmap(lambda x: qkv.weights(x, k))(torch.stack([q, q]))


def test_vmap_of_no_samples() -> None:
    q, k, v = qkv_of(Lq=4, Lk=4)
    for sinks in (None, normal(2)):
        got = torch.vmap(lambda x, s=sinks: qkv.attention(x, k, v, sinks=s))(q.new_zeros(0, *q.shape))
        assert got.shape == (0, 1, 2, 4, 3)


def test_dropout_under_transforms() -> None:
    """The same draw for every derivative, and for every sample with randomness="same"."""
    q, k, v = qkv_of(Lq=6, Lk=9)
    call = lambda x: qkv.attention(x, k, v, dropout_p=0.4)  # noqa: E731
    torch.manual_seed(SEED)
    out, t_out = torch.func.jvp(call, (q,), (normal(*q.shape, seed=3),))
    torch.manual_seed(SEED)
    assert torch.equal(call(q), out)
    h = 1e-6
    moved = []
    for sign in (h, -h):
        torch.manual_seed(SEED)
        moved.append(call(q + sign * normal(*q.shape, seed=3)))
    assert torch.allclose((moved[0] - moved[1]) / (2 * h), t_out, atol=1e-7)  # h^2 times a third derivative
    torch.manual_seed(SEED)
    mapped = torch.vmap(call, randomness="same")(torch.stack([q, q]))
    assert torch.equal(mapped, torch.stack([out, out]))


def test_forward_mode_follows_only_tangents() -> None:
    """A plain call inside of dual_level stays plain; one with a tangent is not answered from the cache of calls."""
    from torch.autograd import forward_ad

    q, k, v = qkv_of(Lq=4, Lk=4)
    plain = qkv.attention(q, k, v)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(qkv.attention(q, k, v)).tangent is None
        for name in ("q", "k", "v"):
            given = dict(q=q, k=k, v=v)
            given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            found = forward_ad.unpack_dual(qkv.attention(**given))
            assert torch.allclose(found.primal, plain, rtol=1e-12)
            assert found.tangent is not None
