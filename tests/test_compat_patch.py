"""qkv.compat.patch_sdpa: it comes, nests and goes, and PyTorch's own modules compute the same under it."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.compat import patch_sdpa, sdpa
from tests import compat_truth
from tests.compat_truth import MODULE, TORCH

pytestmark = compat_truth.MARKS
restored = compat_truth.restored


# ---------------------------------------------------------------------------------------------------------------- patch
def test_the_patch_comes_and_goes() -> None:
    with patch_sdpa():
        assert F.scaled_dot_product_attention is sdpa
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(KeyError), patch_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH


def test_the_patch_nests_and_one_object_serves_again() -> None:
    one = patch_sdpa()
    with one:
        with one, patch_sdpa():
            assert F.scaled_dot_product_attention is sdpa
        assert F.scaled_dot_product_attention is sdpa
    assert F.scaled_dot_product_attention is TORCH
    with one:
        assert F.scaled_dot_product_attention is sdpa


def test_the_backend_sdpa_keeps_pytorchs_function() -> None:
    """Loaded inside the patch it would call us, and we it: in a fresh process the first call is under the patch."""
    code = """
import torch, qkv, qkv.compat
F, q = torch.nn.functional, torch.randn(1, 2, 5, 8)
plain = F.scaled_dot_product_attention
F.scaled_dot_product_attention = qkv.compat.sdpa
out = qkv.attention(q, q, q, backend="sdpa")
import qkv.backends.sdpa as backend
assert backend.scaled_dot_product_attention is plain
assert torch.equal(out, plain(q, q, q))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_patch_as_a_decorator() -> None:
    @patch_sdpa()
    def depth(n: int) -> int:
        assert F.scaled_dot_product_attention is sdpa
        return depth(n - 1) + 1 if n else 0

    assert depth(3) == 3
    assert F.scaled_dot_product_attention is TORCH


def test_other_assignments_are_kept() -> None:
    def other(*args: Any, **kwargs: Any) -> Tensor:
        return TORCH(*args, **kwargs)

    try:
        F.scaled_dot_product_attention = other  # type: ignore[assignment]
        with patch_sdpa():
            assert F.scaled_dot_product_attention is sdpa
        assert F.scaled_dot_product_attention is other
        F.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
        with patch_sdpa():
            pass
        assert F.scaled_dot_product_attention is sdpa
        F.scaled_dot_product_attention = TORCH
        with patch_sdpa():
            F.scaled_dot_product_attention = other  # type: ignore[assignment]
            with patch_sdpa():
                assert F.scaled_dot_product_attention is sdpa
            assert F.scaled_dot_product_attention is other
        assert F.scaled_dot_product_attention is other
    finally:
        F.scaled_dot_product_attention = TORCH


def test_the_last_thread_restores() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[Any] = []

    def worker() -> None:
        with patch_sdpa():
            inside.set()
            leave.wait(10)
            seen.append(F.scaled_dot_product_attention)

    thread = threading.Thread(target=worker)
    with patch_sdpa():
        thread.start()
        assert inside.wait(10)
    seen.append(F.scaled_dot_product_attention)  # the first one left, the worker is still inside
    leave.set()
    thread.join()
    assert seen == [sdpa, sdpa]
    assert F.scaled_dot_product_attention is TORCH


# ------------------------------------------------------------------------------------------------- modules that call it
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that qkv computed."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return qkv.attention(*args, **kwargs)

    monkeypatch.setattr(MODULE, "attention", count)
    return calls


def _both(model: torch.nn.Module, inputs: Any, kwargs: Any, seed: int = 0) -> list[list[Tensor]]:
    """Outputs and all gradients without and with the patch."""
    found = []
    for patched in (False, True):
        x = [t.clone().requires_grad_() for t in inputs]
        if patched:
            with patch_sdpa():
                out = model(*x, **kwargs)
        else:
            out = model(*x, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(out, [*x, *model.parameters()], cotangent, allow_unused=True)
        found.append([out.detach(), *(g for g in grads if g is not None)])
    return found


def _close(found: list[list[Tensor]]) -> None:
    theirs, ours = found
    assert len(theirs) == len(ours) > 3
    for a, b in zip(theirs, ours, strict=True):
        assert ((a - b).abs() <= 2e-5 * (1 + a.abs().max())).all()  # two float32 orders of a few hundred terms


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "bool", "float 3-D"])
def test_multihead_attention_under_the_patch(counted: list[int], mask: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 6, 24)
    kwargs: dict[str, Any] = {"need_weights": False}
    if mask == "causal":
        kwargs |= {"attn_mask": torch.nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True}
    elif mask == "padding":
        kwargs["key_padding_mask"] = torch.arange(6) >= torch.tensor([[6], [4]])
    elif mask == "bool":
        kwargs["attn_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(2)
    elif mask == "float 3-D":
        kwargs["attn_mask"] = torch.randn(6, 6, 6)
    found = _both(model, (x, x.roll(1, 1), x.roll(2, 1)), kwargs)
    assert len(counted) == 1
    _close(found)


def test_encoder_layer_under_the_patch(counted: list[int]) -> None:
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 6, 24), torch.arange(6) >= torch.tensor([[6], [4]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    _close(_both(model, (x,), {"src_mask": causal, "is_causal": True}))
    _close(_both(model, (x,), {"src_key_padding_mask": padding}))
    assert len(counted) == 2


def test_the_fast_path_of_pytorch_goes_around_the_patch(counted: list[int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 6, 24)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.no_grad(), patch_sdpa():
            torch.backends.mha.set_fastpath_enabled(True)
            fast = layer(x)
            assert not counted
            torch.backends.mha.set_fastpath_enabled(False)
            slow = layer(x)
            assert len(counted) == 1
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
