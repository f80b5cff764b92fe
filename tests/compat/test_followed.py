"""qkv.compat.sdpa where somebody follows the call: compilers, export, torch.func, forward mode, modes, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import qkv
from qkv.compat import patch_sdpa, sdpa
from tests.kit import compat_truth
from tests.kit.compat_truth import MODULE, TORCH, bool_mask, draw, drawn, float_mask, truth

pytestmark = compat_truth.MARKS
restored, own = compat_truth.restored, compat_truth.own


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # what a version of ours with other operators left in the caches on disk is not to be found
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def lengths(n: int) -> dict[str, Tensor]:
    return draw((2, 4, n, 8), (2, 4, n + 2, 8), (2, 4, n + 2, 6), seed=n)


def patched(*args: Any, **kwargs: Any) -> Tensor:
    """The call as somebody's model makes it."""
    return F.scaled_dot_product_attention(*args, **kwargs)


# every kind of call, made for n queries and n + 2 keys: the tensors, and how `truth` is told the same
KINDS: dict[str, Callable[[int], tuple[dict[str, Any], dict[str, Any]]]] = {
    "plain": lambda n: ({}, {}),
    "causal": lambda n: ({"is_causal": True}, {"causal": True}),
    "scale": lambda n: ({"scale": 0.2}, {"scale": 0.2}),
    "bool mask": lambda n: ({"attn_mask": bool_mask((2, 1, n, n + 2), n)}, {}),
    "float mask": lambda n: ({"attn_mask": float_mask((4, n, n + 2), torch.float32, n)}, {}),
    "upper left": lambda n: ({"attn_mask": causal_upper_left(n, n + 2)}, {"causal": True}),
}


def close(mine: dict[str, Tensor], wanted: dict[str, Any], note: str) -> None:
    for name, found in mine.items():
        value, bound = wanted[name]
        assert found.shape == value.shape, (note, name)
        wrong = ~((found.double() - value).abs() <= bound)
        assert not wrong.any(), f"{note}: {name} is off at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "aot_eager") for kind in KINDS), ("float mask", "inductor")])
def test_compiled_it_is_one_graph_with_qkvs_operator(own: None, kind: str, backend: str) -> None:
    graphs: list[str] = []
    inner = torch._dynamo.lookup_backend(backend)

    def recorded(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return inner(graph, inputs)

    with patch_sdpa() as block:
        compiled = torch.compile(
            lambda q, k, v, **kw: patched(q, k, v, **kw) * 2, fullgraph=True, dynamic=True, backend=recorded
        )
        for count, n in enumerate((5, 9, 6) if kind != "upper left" else (5,)):
            given = lengths(n)
            kwargs, told = KINDS[kind](n)
            leaves = [x.requires_grad_() for x in given.values()]
            mask = kwargs.get("attn_mask")
            if type(mask) is Tensor:
                given["mask"] = mask
                leaves += [mask.requires_grad_()] if mask.is_floating_point() else []
            with torch._dynamo.config.patch(error_on_recompile=count > 0):
                out = compiled(*list(given.values())[:3], **kwargs)
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(n))
            grads = torch.autograd.grad(out, leaves, cotangent / 2)
            names = ["q", "k", "v", "mask"][: len(leaves)]
            mine = dict(zip(names, grads, strict=True)) | {"out": out.detach() / 2}
            close(mine, truth(given, cotangent, **told), f"{kind}, {n} queries")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "torch.ops.qkv.attention" in graphs[-1]
    assert set(block.calls) == {"graph"}


def test_compiled_dropout_drops_what_it_says(own: None) -> None:
    q, k, _ = draw((2, 4, 16, 8), (2, 4, 16, 8), (1,)).values()
    v = torch.eye(16).expand(2, 4, 16, 16)
    full = torch.softmax((q.double() @ k.double().mT) / 8**0.5, -1)
    out = torch.compile(lambda q: sdpa(q, k, v, dropout_p=0.3), fullgraph=True, backend="aot_eager")(q)
    kept = out != 0
    assert ((out.double() - full / 0.7).abs() <= 1e-5 * full / 0.7 + 1e-30)[kept].all()
    assert abs(int(kept.sum()) - 0.7 * kept.numel()) < 5 * (0.21 * kept.numel()) ** 0.5


def test_compiled_under_autocast(own: None) -> None:
    given = drawn()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v, is_causal=True)

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, call(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_qkvs_operator_for_any_length(own: None, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return sdpa(q, k, v, mask) + sdpa(q, k, v, is_causal=True)

    n, m = torch.export.Dim("n", min=2), torch.export.Dim("m", min=2)
    shapes = ({2: n}, {2: m}, {2: m}, {0: n, 1: m})
    given = (*lengths(5).values(), bool_mask((5, 7)))
    with patch_sdpa():
        program = torch.export.export(Model(), given, dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("qkv.attention.default") == 2
    assert not any("scaled_dot_product" in name for name in targets)
    other = (*lengths(9).values(), bool_mask((9, 11)))
    for call in (given, other):
        assert torch.equal(program.module()(*call), Model()(*call))


def test_made_into_a_graph_of_fake_tensors(own: None) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda q, k, v: sdpa(q, k, v, is_causal=True), tracing_mode=mode)(*drawn())
        assert "torch.ops.qkv.attention" in graph.code
        assert torch.equal(graph(*drawn()), sdpa(*drawn(), is_causal=True))


def test_onnx_and_jit_record_pytorchs_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(_Module(lambda q: sdpa(q, k, v)), (q,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("scaled_dot_product" in name for name in targets)
    assert not any("qkv" in name for name in targets)


class _Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(*args)


# ------------------------------------------------------------------------------------------------- torch.func and modes
def _hidden_nan() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = drawn()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, 4:] = False
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.inf
    return q, k, v, mask


def _modes() -> dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]]:
    """Ways to follow f(q): each gives f(q), or something made of it that must be finite."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def within(mode: Callable[[], Any]) -> Callable[[Callable[..., Tensor], Tensor], Tensor]:
        def run(f: Callable[..., Tensor], q: Tensor) -> Tensor:
            with mode():
                return f(q)

        return run

    return {
        "eager": lambda f, q: f(q),
        "aot_eager": lambda f, q: torch.compile(f, backend="aot_eager", fullgraph=True)(q),
        "vmap": lambda f, q: torch.vmap(f)(q[None])[0],
        "func.vjp": lambda f, q: torch.func.vjp(f, q)[0],
        "func.jvp": lambda f, q: torch.func.jvp(f, (q,), (q,))[0],
        "FlopCounterMode": within(lambda: FlopCounterMode(display=False)),
        "a mode that watches": within(Watch),
        "checkpoint": lambda f, q: checkpoint(f, q.requires_grad_(), use_reentrant=False).detach(),
    }


@pytest.mark.parametrize("how", _modes())
def test_what_holds_eagerly_holds_followed(own: None, how: str) -> None:
    q, k, v, mask = _hidden_nan()
    wanted = sdpa(q, k, v, mask)
    assert wanted.isfinite().all()
    follow = _modes()[how]
    assert torch.equal(follow(lambda q: sdpa(q, k, v, mask), q), wanted)
    clean = drawn()[1:]
    wanted = sdpa(q, *clean, is_causal=True)
    for bias in (causal_upper_left(5, 7), causal_upper_left(7, 7)):  # of which only the kind counts
        assert torch.equal(follow(lambda q, bias=bias: sdpa(q, *clean, bias), q), wanted)
    last = causal_lower_right(5, 7)
    found = follow(lambda q: sdpa(q, *clean, last), q)
    assert torch.equal(found, qkv.attention(q, *clean, mask=qkv.causal(), positions="end"))
    for both in (mask, last):
        with pytest.raises((RuntimeError, qkv.ArgumentError)):
            follow(lambda q, both=both: sdpa(q, *clean, both, is_causal=True), q)


def test_gradients_at_hidden_nan_are_finite_however_taken(own: None) -> None:
    q, k, v, mask = _hidden_nan()
    cotangent = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    weigh = lambda q: (sdpa(q, k, v, mask) * cotangent).sum()  # noqa: E731
    wanted = torch.func.grad(weigh)(q)
    assert wanted.isfinite().all()
    assert wanted.any()
    leaf = q.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(weigh(leaf), leaf)[0], wanted)
    compiled = torch.compile(weigh, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], wanted)


def test_derivatives_of_every_order_and_direction(own: None) -> None:
    q, k, v = (x.double() / 2 for x in drawn())
    t = torch.randn(q.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden = torch.ones(5, 7).tril().bool().logical_not()

    def dense(q: Tensor) -> Tensor:
        return ((q @ k.mT) * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v

    def ours(q: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    wanted = torch.func.jvp(dense, (q,), (t,))[1]
    assert ((torch.func.jvp(ours, (q,), (t,))[1] - wanted).abs() <= 1e-12).all()
    with torch.autograd.forward_ad.dual_level(), patch_sdpa():
        dual = torch.autograd.forward_ad.make_dual(q, t)
        tangent = torch.autograd.forward_ad.unpack_dual(patched(dual, k, v, is_causal=True)).tangent
    assert ((tangent - wanted).abs() <= 1e-12).all()

    def penalty(f: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad((first * t).sum(), leaf)[0]

    assert ((penalty(ours) - penalty(dense)).abs() <= 1e-10).all()


@pytest.mark.parametrize("mapped", ["q", "k and v", "all", "bool mask", "float mask"])
def test_mapped_it_is_a_call_a_sample(own: None, mapped: str) -> None:
    parts = [draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), seed=n) for n in range(3)]
    q, k, v = (torch.stack([p[n] for p in parts]) for n in "qkv")
    masks = torch.stack([bool_mask((3, 5, 7), n) for n in range(3)])
    if mapped == "float mask":
        masks = torch.zeros(masks.shape).masked_fill(~masks, -math.inf) + torch.randn(3, 1, 1, 1)
    dims = {"q": (0, None, None, None), "k and v": (None, 0, 0, None), "all": (0, 0, 0, 0)}.get(
        mapped, (None, None, None, 0)
    )
    given = [x if d == 0 else x[0] for x, d in zip((q, k, v, masks), dims, strict=True)]
    found = torch.vmap(sdpa, in_dims=dims)(*given)
    for n in range(3):
        one = [x[n] if d == 0 else x for x, d in zip(given, dims, strict=True)]
        assert torch.equal(found[n], sdpa(*one))


def test_modes_that_watch_operations_see_them(own: None) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        sdpa(*drawn())
    assert "qkv.attention.default" in seen


def test_selective_checkpointing_keeps_or_recomputes_it(own: None) -> None:
    """A policy sees qkv's operator; a causal bias keeps its meaning, which once was lost there."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    q, k, v = drawn()
    seen = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(op)
        return (
            CheckpointPolicy.MUST_SAVE if op is torch.ops.qkv.attention.default else CheckpointPolicy.PREFER_RECOMPUTE
        )

    leaf, bias = q.clone().requires_grad_(), causal_upper_left(5, 7)
    with patch_sdpa():
        out = checkpoint(
            lambda q: patched(q * 1.0, k, v, bias), leaf, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
    assert torch.ops.qkv.attention.default in seen
    wanted = truth({"q": q, "k": k, "v": v}, cotangent, causal=True)
    close({"out": out.detach(), "q": grad}, wanted, "checkpointed")


def test_fake_tensors_are_followed(own: None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in drawn())
        out = sdpa(q, k, v, is_causal=True)
    assert type(out) is type(q)
    assert out.shape == (2, 3, 5, 8)
    assert MODULE.sdpa is sdpa
    assert TORCH is not sdpa
