"""What runs is what `qkv.plan` says, whoever calls: eager, a graph, a transform, a counter, over a cache's view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import qkv
from qkv import plans
from qkv.backends import registry
from qkv.errors import UnsupportedError
from tests.kit import private, skips

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 50
RUNS = ("run", "run on pages")
CAUSAL = qkv.causal()
MISSING = "the native extension was not built (emulated)"
UNTUNED = "no kernel tuned for this processor (emulated)"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + seed)) * 2


@pytest.fixture(params=["as it is", "no tuned kernel", "no extension"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This machine, one without a kernel made for it, and one on which nothing was compiled."""
    native = registry.load("cpu")
    if request.param == "no tuned kernel":
        if native.missing is not None:
            pytest.skip(skips.NO_TUNED_KERNEL)
        monkeypatch.setattr(native, "untuned", lambda: UNTUNED)
    elif request.param == "no extension":
        monkeypatch.setattr(native, "module", MISSING)
        monkeypatch.setattr(native, "missing", MISSING)
        private.warn_again(monkeypatch, never=True)
    private.forget()  # plans made for another machine
    yield request.param
    private.forget()


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(backend, method) of everything that a backend was asked to compute."""
    found: list[tuple[str, str]] = []

    def watch(ready: Any, method: str, at: tuple[str, str]) -> None:
        real = getattr(ready, method)

        def record(*given: Any, **more: Any) -> Any:
            found.append(at)
            return real(*given, **more)

        setattr(ready, method, torch.compiler.disable(record))

    for name in ("cpu", "tiled", "sdpa", "reference"):
        backend = registry.load(name)

        def prepare(*given: Any, name: str = name, real: Any = backend.prepare) -> Any:
            ready = real(*given)
            watch(ready, "run", (name, "run"))
            watch(ready, "backward", (name, "backward"))
            return ready

        def prepare_view(*given: Any, name: str = name, real: Any = backend.prepare_view) -> Any:
            ready = real(*given)
            watch(ready, "run", (name, "run on pages"))
            return ready

        monkeypatch.setattr(backend, "prepare", prepare)
        monkeypatch.setattr(backend, "prepare_view", prepare_view)
    return found


def ran(entered: list[tuple[str, str]]) -> set[str]:
    return {backend for backend, method in entered if method in RUNS}


# ---------------------------------------------------------------------------------------------- who calls
Call = Callable[..., Tensor]


def compiled(call: Call, *given: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)(*given)


def exported(call: Call, *given: Tensor) -> Any:
    class Model(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return call(*given)

    return torch.export.export(Model(), given, strict=False).module()(*given)


def watched(call: Call, *given: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return call(*given)


def traced(call: Call, *given: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(call)(*given)(*given)


def mapped(call: Call, *given: Tensor) -> Any:
    return torch.vmap(call)(*(x[None] for x in given))[0]


def along(call: Call, *given: Tensor) -> Any:
    return torch.func.jvp(call, given, given)[0]


def dual(call: Call, *given: Tensor) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(*(forward_ad.make_dual(x, x) for x in given))).primal


FORWARD = [lambda call, *given: call(*given), compiled, exported, watched, traced, mapped, along, dual]
NAMES = ["eager", "compiled", "exported", "watched", "make_fx", "vmap", "jvp", "dual"]


@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize("way", FORWARD, ids=NAMES)
def test_forward(machine: str, entered: list[tuple[str, str]], way: Callable[..., Any], backend: str | None) -> None:
    given = [normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1), normal(2, 2, 6, 8, seed=2)]
    options = dict(mask=CAUSAL, backend=backend)
    plan = qkv.plan(*given, **options)
    out = way(partial(qkv.attention, **options), *given)
    further = {"tiled"} if way in (along, dual) else set()  # the tangents, as `plan.gradients` says
    assert entered[0][0] == plan.backend
    assert ran(entered) - further == {plan.backend} - further, entered
    want = qkv.attention(*(x.double() for x in given), mask=CAUSAL, backend="reference")
    assert torch.allclose(out.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", [FORWARD[0], compiled, watched, mapped], ids=["eager", "compiled", "watched", "vmap"])
def test_what_sdpa_lacks_is_run_or_refused(
    machine: str, entered: list[tuple[str, str]], way: Callable[..., Any]
) -> None:
    given = [normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1), normal(2, 2, 6, 8, seed=2)]
    options: dict[str, Any] = dict(mask=qkv.sliding_window(3), softcap=3.0)
    plan = qkv.plan(*given, **options)
    out = way(partial(qkv.attention, **options), *given)
    assert ran(entered) == {plan.backend} != {"sdpa"}
    want = qkv.attention(*(x.double() for x in given), **options, backend="reference")
    assert torch.allclose(out.double(), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="it has no softcap, no masks other than"):
        way(partial(qkv.attention, **options, backend="sdpa"), *given)


def test_the_plan_prefers_what_it_should(machine: str) -> None:
    """PyTorch's kernel where none of ours was made for the machine and it can do the call; the reason is true."""
    q, short = normal(1, 2, 6, 8), normal(1, 2, 1, 8)
    own = registry.load("cpu").supports(qkv.plan(q, q, q, backend="tiled").problem) is None
    tuned = machine == "as it is" and own and plans.torch_first("cpu", registry.load("cpu")) is None
    rest = "cpu" if own else "tiled"
    for given, option, torchs in [
        ((q, q, q), {}, True),
        ((q, q, q), dict(mask=CAUSAL), True),
        ((q, q, q), dict(mask=CAUSAL, positions="end"), True),
        ((short, q, q), dict(mask=CAUSAL, positions="end"), True),  # a step of decode sees every key
        ((short, q, q), dict(mask=CAUSAL, positions=[5]), True),
        ((short, q, q), dict(mask=CAUSAL, positions=[4]), False),
        ((q[:, :, :2], q, q), dict(mask=CAUSAL, positions="end"), False),
        ((q, q, q), dict(mask=CAUSAL, scale=-1.0), False),
        ((q, q, q), dict(return_lse=True), False),
        ((q, q, q), dict(softcap=1.0), False),
        ((q[:, :, :0], q, q), {}, False),
    ]:
        plan = qkv.plan(*given, **option)
        assert plan.backend == ("sdpa" if torchs and not tuned else rest), option
        reasons = dict(plan.refused) | {plan.backend: plan.reason}
        assert (MISSING in reasons["cpu"]) == (machine == "no extension")
        if plan.backend == "sdpa":
            assert {"no tuned kernel": UNTUNED, "no extension": MISSING}.get(machine, "") in plan.reason
        elif not torchs:
            assert "it has no " in reasons["sdpa"]
        want = qkv.attention(*(x.double() for x in given), **option | {"return_lse": False}, backend="reference")
        out = qkv.attention(*given, **option | {"return_lse": False})
        assert torch.allclose(out.double(), want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- gradients
def by_autograd(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    leaves = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(call(*leaves), leaves, d_out)


def by_func(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    return torch.func.grad(lambda *x: (call(*x) * d_out).sum(), argnums=(0, 1, 2))(*given)


def by_graph(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    torch._dynamo.reset()
    return by_autograd(torch.compile(call, backend="aot_eager", fullgraph=True), d_out, *given)


def by_watched(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    return watched(lambda *x: by_autograd(call, d_out, *x), *given)


def by_sample(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    found = torch.vmap(torch.func.grad(lambda d, *x: (call(*x) * d).sum(), argnums=(1, 2, 3)))(
        *(x[None] for x in (d_out, *given))
    )
    return tuple(x[0] for x in found)


def by_batched(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    leaves = [x.clone().requires_grad_() for x in given]
    several = torch.stack([torch.zeros_like(d_out), d_out, d_out * 2])
    found = torch.autograd.grad(call(*leaves), leaves, several, is_grads_batched=True)
    assert all(not x[0].any() for x in found)
    return tuple(x[1] for x in found)


def by_checkpoint(call: Call, d_out: Tensor, *given: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    return by_autograd(lambda *x: checkpoint(call, *x, use_reentrant=False), d_out, *given)


BACKWARD = [by_autograd, by_func, by_graph, by_watched, by_sample, by_batched, by_checkpoint]


@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize("way", BACKWARD, ids=lambda way: way.__name__)
def test_first_derivatives(
    machine: str, entered: list[tuple[str, str]], way: Callable[..., Any], backend: str | None
) -> None:
    given = [normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1), normal(2, 2, 6, 8, seed=2)]
    d_out = normal(2, 4, 6, 8, seed=3)
    plan = qkv.plan(*given, mask=CAUSAL, backend=backend)
    found = way(partial(qkv.attention, mask=CAUSAL, backend=backend), d_out, *given)
    assert {name for name, _ in entered} == {plan.backend}, entered
    wide = [x.double() for x in given]
    want = by_autograd(partial(qkv.attention, mask=CAUSAL, backend="reference"), d_out.double(), *wide)
    for x, y in zip(found, want, strict=True):
        assert torch.allclose(x.double(), y, atol=1e-4, rtol=1e-4)


def twice(call: Call, *given: Tensor) -> Any:
    leaves = [x.clone().requires_grad_() for x in given]
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)  # type: ignore[arg-type]


def twice_by_func(call: Call, *given: Tensor) -> Any:
    def first(*x: Tensor) -> Tensor:
        found = torch.func.grad(lambda *x: call(*x).square().sum(), argnums=(0, 1, 2))(*x)
        return sum(x.square().sum() for x in found)  # type: ignore[return-value]

    return torch.func.grad(first, argnums=(0, 1, 2))(*given)


def tangent(call: Call, *given: Tensor) -> Any:
    return torch.func.jvp(call, given, tuple(x.flip(2) for x in given))[1:]


def curvature(call: Call, *given: Tensor) -> Any:
    return (torch.func.hessian(lambda q: call(q, *given[1:]).square().sum())(given[0]),)


def jacobian(call: Call, *given: Tensor) -> Any:
    return (torch.autograd.functional.jacobian(lambda q: call(q, *given[1:]), given[0], vectorize=True),)


def hessian(call: Call, *given: Tensor) -> Any:
    return (torch.autograd.functional.hessian(lambda q: call(q, *given[1:]).square().sum(), given[0], vectorize=True),)


def forward_jacobian(call: Call, *given: Tensor) -> Any:
    options: Any = dict(vectorize=True, strategy="forward-mode")
    return (torch.autograd.functional.jacobian(lambda q: call(q, *given[1:]), given[0], **options),)


FURTHER = [twice, twice_by_func, tangent, curvature, jacobian, hessian, forward_jacobian]


@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize("way", FURTHER, ids=lambda way: way.__name__)
def test_second_derivatives_and_forward_mode(machine: str, way: Callable[..., Any], backend: str | None) -> None:
    """PyTorch's own function has none of them, and where the plan chooses it nobody may notice."""
    given = [normal(2, 2, 4, 3).double(), normal(2, 1, 4, 3, seed=1).double(), normal(2, 1, 4, 3, seed=2).double()]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT / 3**0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
        return s.softmax(-1) @ v

    found = way(lambda *x: qkv.attention(*x, mask=CAUSAL, backend=backend), *given)
    for x, y in zip(found, way(dense, *given), strict=True):
        assert torch.allclose(x, y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", [None, "sdpa", "tiled"])
def test_gradcheck_with_batched_gradients(machine: str, backend: str | None) -> None:
    given = [normal(1, 2, 3, 2, seed=n).double().requires_grad_() for n in range(3)]
    assert torch.autograd.gradcheck(
        lambda *x: qkv.attention(*x, mask=CAUSAL, backend=backend), given, check_batched_grad=True
    )


def test_batched_gradients_of_everything_that_learns() -> None:
    """Sinks, biases of every kind, dropout, lse, and several older vmaps one after the other."""
    q, k, v = (normal(2, 4, 5, 3, seed=n).double().requires_grad_() for n in range(3))
    sinks, slopes = normal(4).double().requires_grad_(), normal(4, seed=5).double().requires_grad_()
    table, bias = normal(4, 5).double().requires_grad_(), normal(2, 4, 5, 5).double().requires_grad_()
    leaves = [q, k, v, sinks, slopes, table, bias]
    terms = qkv.alibi(slopes) + qkv.relative(table) + bias
    d_out, d_lse = normal(3, 2, 4, 5, 3).double(), normal(3, 2, 4, 5).double()
    for p in (0.0, 0.4):
        torch.manual_seed(SEED)
        out, lse = qkv.attention(q, k, v, CAUSAL, bias=terms, sinks=sinks, softcap=4.0, dropout_p=p, return_lse=True)
        found = torch.autograd.grad((out, lse), leaves, (d_out, d_lse), is_grads_batched=True, retain_graph=True)
        only_out = torch.autograd.grad(out, leaves, d_out, is_grads_batched=True, retain_graph=True)
        for n in range(3):
            want = torch.autograd.grad((out, lse), leaves, (d_out[n], d_lse[n]), retain_graph=True)
            for x, y in zip(found, want, strict=True):
                assert torch.allclose(x[n], y, atol=1e-12)
            want = torch.autograd.grad(out, leaves, d_out[n], retain_graph=True)
            for x, y in zip(only_out, want, strict=True):
                assert torch.allclose(x[n], y, atol=1e-12)


def test_batched_gradients_through_the_operator() -> None:
    """A graph that a mode watched: autograd's node is then the operator's."""
    given = [normal(2, 2, 5, 4, seed=n).requires_grad_() for n in range(3)]
    d_out = normal(3, 2, 2, 5, 4)
    out = watched(lambda *x: qkv.attention(*x, mask=CAUSAL), *given)
    found = torch.autograd.grad(out, given, d_out, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        for x, y in zip(found, torch.autograd.grad(out, given, d_out[n], retain_graph=True), strict=True):
            assert torch.allclose(x[n], y, atol=1e-6)


# ---------------------------------------------------------------------------------------------- views
def pages(lengths: list[int], *, storage: torch.dtype | None = None, dtype: torch.dtype = torch.float32) -> Any:
    cache = qkv.cache.PagedCache(
        pages=64, page_size=4, num_kv_heads=2, head_dim=8, dtype=dtype, **({"storage": storage} if storage else {})
    )
    sequences = [cache.add() for _ in lengths]
    for n, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        cache.append([sequence], *(normal(1, 2, length, 8, seed=7 * n + m).to(dtype) for m in range(2)))
    return cache, sequences


def paged(backend: str | None) -> Any:
    cache, sequences = pages([9, 9])
    return normal(2, 4, 1, 8), cache.view(sequences)


def uneven(backend: str | None) -> Any:
    cache, sequences = pages([5, 12, 9])
    return normal(3, 4, 1, 8), cache.view(sequences)


def chunk(backend: str | None) -> Any:
    cache, sequences = pages([9, 12])
    return normal(2, 4, 5, 8), cache.view(sequences)


def prefill(backend: str | None) -> Any:
    cache, sequences = pages([60])
    return normal(1, 4, 60, 8), cache.view(sequences)


def ragged(backend: str | None) -> Any:
    cache, sequences = pages([9, 4, 7])
    return normal(1, 4, 1 + 4 + 0, 8), cache.view(sequences, lengths=[1, 4, 0])


def stored(backend: str | None) -> Any:
    cache, sequences = pages([9, 6], storage=torch.int8, dtype=torch.bfloat16)
    return normal(2, 4, 1, 8).bfloat16(), cache.view(sequences)


def stored_wide(backend: str | None) -> Any:
    cache, sequences = pages([9], storage=torch.int8, dtype=torch.float64)
    return normal(1, 4, 1, 8).double(), cache.view(sequences)


VIEWS = [paged, uneven, chunk, prefill, ragged, stored, stored_wide]


@pytest.mark.parametrize("backend", [None, "sdpa", "tiled", "reference"])
@pytest.mark.parametrize("make", VIEWS, ids=lambda make: make.__name__)
def test_views(machine: str, entered: list[tuple[str, str]], make: Callable[..., Any], backend: str | None) -> None:
    q, view = make(backend)
    asked: list[dict[str, Any]] = [
        {},
        dict(mask=CAUSAL),
        dict(mask=qkv.mask_mod(lambda b, h, p, j: j <= p)),
        dict(mask=CAUSAL, bias=qkv.alibi(torch.arange(4.0))),
        dict(mask=CAUSAL, return_lse=True),
    ]
    for option in asked:
        options = dict(**option, backend=backend)
        refusals = [refusal(partial(f, q, view, **options)) for f in (qkv.plan, qkv.attention)]
        assert refusals[0] == refusals[1]
        if refusals[0]:
            assert backend == "sdpa"
            continue
        plan = qkv.plan(q, view, **options)
        private.forget()
        entered.clear()
        found = qkv.attention(q, view, **options)
        assert ran(entered) == {plan.backend}, (option, plan.reason, entered)
        assert ("read where they lie" in str(plan)) == any(method == "run on pages" for _, method in entered)
        want = qkv.attention(q, view, **option, backend="reference")
        for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (found, want)), strict=True):
            near = 1e-2 if q.dtype == torch.bfloat16 else 1e-5
            assert torch.allclose(x, y, atol=near, rtol=near)


def refusal(call: Callable[[], Any]) -> str:
    """Why the backend cannot run the call; empty where it can."""
    try:
        call()
    except UnsupportedError as error:
        return str(error).split("because")[1]
    return ""


def test_sdpa_computes_on_copies_of_pages() -> None:
    """What the plan said, and attention refused: 'it has no a log-sum-exp'."""
    for make in (paged, uneven, prefill, stored):
        q, view = make(None)
        assert qkv.plan(q, view, backend="sdpa").backend == "sdpa"
        assert "copied first" in str(qkv.plan(q, view, backend="sdpa"))
        out = qkv.attention(q, view, backend="sdpa")
        assert torch.allclose(out.float(), qkv.attention(q, view, backend="reference").float(), atol=2e-2)
    with pytest.raises(UnsupportedError, match="it has no log-sum-exp"):
        qkv.attention(q, view, backend="sdpa", return_lse=True)


def test_a_view_in_a_compiled_function(machine: str, entered: list[tuple[str, str]]) -> None:
    """No graph holds a cache's tables: the call is Python's, and what runs is still what the plan says."""
    q, view = paged(None)
    plan = qkv.plan(q, view, mask=CAUSAL)
    entered.clear()
    torch._dynamo.reset()
    out = torch.compile(lambda q: qkv.attention(q * 2, view, mask=CAUSAL), backend="eager")(q)
    assert ran(entered) == {plan.backend}
    want = qkv.attention(q * 2, view, mask=CAUSAL, backend="reference")
    assert torch.allclose(out, want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- patched
@pytest.mark.parametrize("way", FORWARD, ids=NAMES)
def test_patched(machine: str, entered: list[tuple[str, str]], way: Callable[..., Any]) -> None:
    """Who calls PyTorch's function in the block of `patch_sdpa` gets what the plan of the same call says."""
    given = [normal(2, 4, 6, 8), normal(2, 4, 6, 8, seed=1), normal(2, 4, 6, 8, seed=2)]
    plan = qkv.plan(*given, mask=CAUSAL, positions="start")
    want = qkv.attention(*(x.double() for x in given), mask=CAUSAL, backend="reference")
    entered.clear()
    with qkv.compat.patch_sdpa():
        out = way(lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True), *given)
    further = {"tiled"} if way in (along, dual) else set()
    assert entered[0][0] == plan.backend
    assert ran(entered) - further == {plan.backend} - further, entered
    assert torch.allclose(out.double(), want, atol=1e-5, rtol=1e-5)


def test_a_patched_training_step(machine: str, entered: list[tuple[str, str]]) -> None:
    given = [normal(2, 4, 6, 8), normal(2, 4, 6, 8, seed=1), normal(2, 4, 6, 8, seed=2)]
    plan = qkv.plan(*given, mask=CAUSAL, positions="start")
    entered.clear()
    with qkv.compat.patch_sdpa():
        by_autograd(
            partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True), torch.ones_like(given[0]), *given
        )
    assert {name for name, _ in entered} == {plan.backend}, entered
    assert [method for _, method in entered] == (["run"] if plan.backend == "sdpa" else ["run", "backward"])
