"""qkv.compat.sdpa: the calls that stay PyTorch's: subclasses, nested and fake tensors, transforms, tracers, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkv.compat import patch_sdpa, sdpa
from tests import compat_truth
from tests.compat_truth import MODULE, TORCH, drawn, truth

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
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in drawn())
        assert sdpa(q, k, v).shape == (2, 3, 5, 8)
    assert len(passed) == 1
    q, k, v = (x.to("meta") for x in drawn())
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa(q, k, v).device.type == "meta"
    assert len(passed) == 2


def test_transforms_are_passed_on(passed: list[int]) -> None:
    q, k, v = drawn()
    cotangent = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    mapped = torch.vmap(sdpa)(q, k, v)
    torch.testing.assert_close(mapped, TORCH(q, k, v), atol=1e-5, rtol=0)
    found = torch.func.grad(lambda x: (sdpa(x, k, v) * cotangent).sum())(q)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x: sdpa(x, k, v), (q,), (cotangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, cotangent)
            again = torch.autograd.forward_ad.unpack_dual(sdpa(dual, k, v)).tangent
    assert len(passed) == 4
    assert ((found.double() - truth({"q": q, "k": k, "v": v}, cotangent)["q"].value).abs() <= 1e-4).all()
    step = 1e-5
    q, k, v, cotangent = (x.double() for x in (q, k, v, cotangent))
    difference = (TORCH(q + step * cotangent, k, v) - TORCH(q - step * cotangent, k, v)) / (2 * step)
    for one in (tangent, again):
        assert ((one - difference).abs() <= 1e-4).all()  # float32 tangents of magnitude 10


def test_modes_that_watch_operations_see_them(passed: list[int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = drawn()
    with Watch():
        sdpa(q, k, v)
    assert passed
    assert any("scaled_dot_product" in name for name in seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_record_pytorchs_operation(passed: list[int]) -> None:
    q, k, v = drawn()
    with patch_sdpa():
        traced = torch.jit.trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))
    assert "scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(q, k, v), TORCH(q, k, v, is_causal=True))


def test_compile_without_a_break() -> None:
    q, k, v = drawn()
    with patch_sdpa():
        compiled = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2, fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(q, k, v), TORCH(q, k, v, is_causal=True) * 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_pytorchs_to_refuse(passed: list[int], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in drawn())
    with pytest.raises(RuntimeError):
        sdpa(q, k, v)
    assert passed
