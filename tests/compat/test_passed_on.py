"""qkv.compat.sdpa: the calls that stay PyTorch's, and reach it as without qkv: subclasses, nested tensors, jit."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from qkv.compat import patch_sdpa, sdpa
from tests.kit import compat_truth
from tests.kit.compat_truth import MODULE, TORCH, draw, drawn

pytestmark = compat_truth.MARKS
restored, own = compat_truth.restored, compat_truth.own


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that was passed on to PyTorch."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return TORCH(*args, **kwargs)

    monkeypatch.setattr(MODULE, "torch_sdpa", count)
    return calls


class Logged(Tensor):
    """A subclass that sees the functions it is passed to."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_passed_on(passed: list[int]) -> None:
    q, k, v = drawn()
    Logged.seen = []
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q.as_subclass(Logged), k, v)
    assert isinstance(out, Logged)
    assert TORCH in Logged.seen
    assert passed
    assert torch.equal(out.as_subclass(Tensor), TORCH(q, k, v))


def test_parameters_are_plain_tensors(own: None) -> None:
    q, k, v = (torch.nn.Parameter(x) for x in drawn())
    assert torch.equal(sdpa(q, k, v), sdpa(q.data, k.data, v.data))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_passed_on(passed: list[int], layout: torch.layout) -> None:
    parts = [torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    if layout == torch.jagged:  # the ragged dimension is stored first
        nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts], layout=layout).transpose(1, 2)
    else:
        nested = torch.nested.nested_tensor(parts, layout=layout)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(nested, nested, nested)
    assert passed
    for found, x in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(found, sdpa(x, x, x), atol=1e-5, rtol=0)


def test_tensors_without_data_are_passed_on(passed: list[int]) -> None:
    q, k, v = (x.to("meta") for x in drawn())
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa(q, k, v).device.type == "meta"
    assert len(passed) == 1


class ByAttribute(Tensor):
    """It knows the function by the attribute that its callers use, as PyTorch's CausalBias does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return "recognised"
        return super().__torch_function__(func, types, args, kwargs or {})


class ByTable(Tensor):
    """It looks the function up in a table made when its module was loaded, as most libraries do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (TORCH,):
            return "recognised"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("kind", [ByAttribute, ByTable])
def test_a_class_recognises_the_function_under_the_patch(kind: type[Tensor], where: str) -> None:
    given = dict(zip(("query", "key", "value", "attn_mask"), (*drawn(), torch.ones(5, 7).bool()), strict=True))
    given[where] = given[where].as_subclass(kind)
    assert F.scaled_dot_product_attention(**given) == "recognised"
    with patch_sdpa():
        assert F.scaled_dot_product_attention(**given) == "recognised"
        assert F.scaled_dot_product_attention is sdpa
        torch._dynamo.reset()
        assert torch.compile(lambda g: F.scaled_dot_product_attention(**g), backend="eager")(given) == "recognised"
    try:
        F.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
        assert F.scaled_dot_product_attention(**given) == "recognised"
        assert F.scaled_dot_product_attention is sdpa
    finally:
        F.scaled_dot_product_attention = TORCH


def test_a_block_may_end_while_a_class_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attribute is put aside for the class then; what was there before the block must come back, and stay."""
    asked, answer = threading.Event(), threading.Event()

    class Slow(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.set()
            assert answer.wait(10)
            return "recognised" if func is TORCH else "another function"

    q, k, v = drawn()
    got: list[Any] = []
    worker = threading.Thread(target=lambda: got.append(F.scaled_dot_product_attention(q.as_subclass(Slow), k, v)))

    def other(*args: Any, **kwargs: Any) -> Tensor:
        return TORCH(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    with patch_sdpa():
        worker.start()
        assert asked.wait(10)
        assert F.scaled_dot_product_attention is TORCH
        with patch_sdpa():
            pass
    assert F.scaled_dot_product_attention is other
    answer.set()
    worker.join()
    assert got == ["recognised"]
    assert F.scaled_dot_product_attention is other
    monkeypatch.undo()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_of_a_call_that_is_pytorchs_keeps_its_meaning(make: Any) -> None:
    """It holds no data: as a mask its uninitialised memory would be read."""
    seen: list[Any] = []

    def record(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((attn_mask, args, kwargs))
        return TORCH(query, key, value, attn_mask, *args, **kwargs)

    for shape in ((5, 5), (5, 7)):
        q, k, v = draw((2, 3, shape[0], 8), (2, 3, shape[1], 8), (2, 3, shape[1], 8)).values()
        logged = q.as_subclass(Logged)
        wanted = sdpa(q, k, v, make(*shape))
        for patched in (False, True):
            Logged.seen = []
            with pytest.MonkeyPatch.context() as context:
                context.setattr(MODULE, "torch_sdpa", record)
                seen.clear()
                with patch_sdpa() if patched else nullcontext():
                    out = sdpa(logged, k, v, make(*shape))
            torch.testing.assert_close(out.as_subclass(Tensor), wanted, atol=1e-5, rtol=0)
            assert all(type(mask) in (type(None), Tensor) for mask, _, _ in seen)
    with patch_sdpa():
        on_meta = F.scaled_dot_product_attention(q.to("meta"), k.to("meta"), v.to("meta"), make(5, 7))
    assert on_meta.shape == q.shape


def test_what_stands_for_a_tensor_is_passed_on(passed: list[int]) -> None:
    with patch_sdpa():
        traced = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert passed
    assert any(node.target is TORCH for node in traced.graph.nodes)
    q, k, v = drawn()
    assert torch.equal(traced(q, k, v), TORCH(q, k, v, is_causal=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_record_pytorchs_operation(passed: list[int]) -> None:
    q, k, v = drawn()
    with patch_sdpa():
        traced = torch.jit.trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))
    assert "scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(q, k, v), TORCH(q, k, v, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_pytorchs_to_refuse(passed: list[int], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in drawn())
    with pytest.raises(RuntimeError):
        sdpa(q, k, v)
    assert passed
