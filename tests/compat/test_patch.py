"""qkv.compat.patch_sdpa: it comes, nests and goes, and PyTorch's own modules compute the same under it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.compat import patch_sdpa, sdpa
from tests.kit import compat_truth
from tests.kit.compat_truth import COUNTING, MODULE, TORCH

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


README = {"d_model": 256, "nhead": 8, "batch_first": True}  # the layer that README shows


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_pytorchs_layers_run_on_qkv_in_training_and_in_evaluation(counted: list[int], mode: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(**README)
    encoder = torch.nn.TransformerEncoder(layer, 2).train(mode == "train")
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).train(mode == "train")
    x, y = torch.randn(2, 16, 256), torch.randn(2, 16, 32)
    pad = torch.arange(16) >= torch.tensor([[16], [9]])
    with contextlib.ExitStack() as stack:
        if mode in ("no_grad", "inference_mode"):
            stack.enter_context(getattr(torch, mode)())
        plain = [attention(y, y, y, need_weights=False)[0], encoder(x, src_key_padding_mask=pad), encoder(x)]
        with patch_sdpa() as block:
            made = [attention(y, y, y, need_weights=False)[0], encoder(x, src_key_padding_mask=pad), encoder(x)]
    assert len(counted) == 5
    assert sum(block.calls.values()) == 5
    assert "PyTorch" not in block.calls
    assert torch.backends.mha.get_fastpath_enabled()
    if mode != "train":  # there dropout draws its own weights
        made[1], plain[1] = (z[~pad] for z in (made[1], plain[1]))
        for a, b in zip(made, plain, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_the_fast_path_is_closed_inside_and_comes_back() -> None:
    mha = torch.backends.mha
    try:
        for before in (True, False):
            mha.set_fastpath_enabled(before)
            with patch_sdpa():
                assert not mha.get_fastpath_enabled()
                with contextlib.suppress(KeyError), patch_sdpa():
                    assert not mha.get_fastpath_enabled()
                    raise KeyError
                assert not mha.get_fastpath_enabled()
            assert mha.get_fastpath_enabled() is before
        with patch_sdpa():
            mha.set_fastpath_enabled(True)  # somebody's wish, inside of the block: theirs to keep
        assert mha.get_fastpath_enabled()
    finally:
        mha.set_fastpath_enabled(True)


# ------------------------------------------------------------------------------------------ how many calls went where
def test_a_block_says_how_many_calls_went_where_and_why() -> None:
    q = torch.randn(1, 2, 5, 8)
    with patch_sdpa() as block:
        for _ in range(3):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        F.scaled_dot_product_attention(q.to("meta"), q.to("meta"), q.to("meta"))
        torch.vmap(sdpa)(q, q, q)  # called by its own name, it counts as well
        torch.compile(F.scaled_dot_product_attention, backend="eager")(q, q, q)
    sdpa(q, q, q)  # after the block
    planned = qkv.plan(q, q, q, qkv.causal(), positions="start")
    assert block.calls == {planned.backend: 4, "PyTorch": 1, "graph": 1}
    lines = str(block).splitlines()
    assert lines[0] == "6 calls of torch.nn.functional.scaled_dot_product_attention"
    assert lines[1].split()[:2] == ["4", planned.backend]
    assert any("1  PyTorch  query is on meta" in line for line in lines)
    assert any("1  graph    recorded by a tracer" in line for line in lines)


def test_a_call_that_is_not_native_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkv.backends import registry

    monkeypatch.setattr(COUNTING, "_plans", {})
    monkeypatch.setattr(registry.load("cpu"), "supports", lambda problem: "it is Sunday", raising=False)
    q = torch.randn(1, 2, 5, 8)
    with patch_sdpa() as block:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(5, 5))
    assert block.calls == {"tiled": 1}
    assert "not the native kernel: it is Sunday" in str(block)


def test_blocks_count_what_is_called_inside_of_them() -> None:
    q = torch.randn(1, 2, 5, 8)
    outer, inner = patch_sdpa(), patch_sdpa()
    assert "nothing called it" in str(outer)
    with outer:
        F.scaled_dot_product_attention(q, q, q)
        with inner, outer:  # entered again while it is open: each call is one call
            F.scaled_dot_product_attention(q, q, q)
    with inner:
        F.scaled_dot_product_attention(q, q, q)
    assert (sum(outer.calls.values()), sum(inner.calls.values())) == (2, 2)
    assert "\n" in str(inner)


def test_every_thread_is_counted() -> None:
    q = torch.randn(1, 2, 5, 8)
    with patch_sdpa() as block:
        workers = [
            threading.Thread(target=lambda: [F.scaled_dot_product_attention(q, q, q) for _ in range(200)])
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert sum(block.calls.values()) == 800


def test_compiled_calls_do_not_compile_again_for_the_count() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    q = torch.randn(1, 2, 5, 8)
    with patch_sdpa() as block:
        compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), fullgraph=True, backend="eager")
        for _ in range(4):
            compiled(q)
            F.scaled_dot_product_attention(q, q, q)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert block.calls["graph"] == 1
    assert sum(block.calls.values()) == 5
    torch._dynamo.reset()
