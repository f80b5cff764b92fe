"""What qkv does about devices other than the CPU, as far as that shows on one: `make gpu-test` asks the devices.

Wrong code that dies here: rows handed to CUDA's kernels where they lie, of any alignment; negative scales with them;
a cache on "cuda" that refuses the tensors of "cuda:0".
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import qkv
from qkv.backends import sdpa
from qkv.cache import checks
from qkv.plans import choose

HALF = torch.bfloat16


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 2, 5, 8, dtype=HALF),
        torch.ones(1, 2, 5, 99, dtype=HALF),  # PyTorch pads such rows by itself
        torch.ones(1, 5, 2, 8, dtype=HALF).transpose(1, 2),
        torch.ones(1, 1, 5, 8, dtype=HALF).expand(1, 4, 5, 8),
        torch.ones(1, 1, 1, 8, dtype=HALF).as_strided((1, 1, 1, 8), (3, 5, 7, 1)),  # of one row, no step is taken
    ],
)
def test_rows_that_begin_at_16_bytes_stay_where_they_are(x: torch.Tensor) -> None:
    assert sdpa._aligned(x) is x


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(81, dtype=HALF)[1:].view(1, 2, 5, 8),
        torch.arange(1000, dtype=HALF).as_strided((1, 2, 5, 8), (90, 45, 9, 1)),
        torch.arange(1000, dtype=HALF).as_strided((1, 2, 5, 8), (90, 44, 8, 1)),
        torch.arange(160, dtype=HALF).view(1, 2, 5, 16)[..., ::2],
        torch.arange(160, dtype=HALF).view(1, 2, 8, 10).transpose(2, 3),
        torch.arange(99 * 10, dtype=HALF).view(1, 5, 2, 99).transpose(1, 2),
    ],
)
def test_other_rows_are_copied(x: torch.Tensor) -> None:
    found = sdpa._aligned(x)
    assert torch.equal(found, x)
    assert found.is_contiguous()
    assert found.data_ptr() % 16 == 0


def test_gradients_of_kernels_elsewhere_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd through `run`, and by `backward`; on the CPU nothing is copied."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(sdpa, "_aligned", lambda x: seen.append(x) or x)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    problem = qkv.plan(q, q, q, backend="sdpa").problem
    inputs = sdpa.Inputs(q, q, q)
    given = torch.randn(1, 2, 5, 8)
    backend = sdpa.SdpaBackend()
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", lambda q, k, v, **_: q + k + v)
    monkeypatch.setattr(sdpa.torch, "autocast", lambda **_: torch.enable_grad())
    for device, expected in (("cpu", 0), ("cuda", 3 + 1)):
        seen.clear()
        backend.run(replace(problem, device=device), inputs).out.backward(given)
        assert len(seen) == expected
        seen.clear()
        backend.backward(replace(problem, device=device), inputs, None, given, given[..., 0])  # type: ignore[arg-type]
        assert len(seen) == expected


def test_a_hook_may_be_called_without_a_gradient() -> None:
    assert sdpa._aligned_gradient(None) is None
    x = torch.arange(81, dtype=HALF)[1:].view(1, 2, 5, 8)
    found = sdpa._aligned_gradient(x)
    assert found is not None
    assert found.data_ptr() % 16 == 0


@pytest.mark.parametrize("mask", [None, qkv.causal()])
def test_scales_that_are_not_positive_stay_off_its_kernels_elsewhere(mask: qkv.Mask | None) -> None:
    q = torch.randn(1, 2, 5, 8)
    for scale in (-0.3, 0.0):
        problem = replace(qkv.plan(q, q, q, mask, scale=scale).problem, device="cuda")
        assert "no scale that is not positive" in str(sdpa.SdpaBackend().supports(problem))
        assert choose(problem, None).backend == "tiled"
    problem = replace(qkv.plan(q, q, q, mask).problem, device="cuda")
    plan = choose(problem, None)
    assert plan.backend == "sdpa"
    assert "scores of any magnitude" in plan.note
    assert "any magnitude" not in sdpa.SdpaBackend().note(replace(problem, device="cpu"))


def test_without_the_extension_a_plan_elsewhere_says_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 8)
    problem = replace(qkv.plan(q, q, q, return_lse=True).problem, device="cuda")
    monkeypatch.setattr("qkv.plans.find", lambda name: "the native extension was not built")
    assert dict(choose(problem, None).refused)["cpu"] == "tensors are on cuda"
    monkeypatch.setattr("qkv.plans._warned", True)
    assert "not built" in dict(choose(replace(problem, device="cpu"), None).refused)["cpu"]


def test_a_cache_names_the_device_as_its_tensors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(checks, "torch", SimpleNamespace(**{**vars(torch), "empty": lambda *_, **__: made}))
    assert checks.real_device("call", "cuda") == torch.device("cuda:1")
    assert checks.real_device("call", "cuda:0") == torch.device("cuda:0")
    assert checks.real_device("call", "cpu") == torch.device("cpu")
