"""The name "qkv" in transformers, and the attention function that its layers call."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import qkv
import qkv.integrations.transformers as adapter
from tests import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()


# ------------------------------------------------------------------------------------------------------- registration
def test_importing_registers_and_activates_nothing() -> None:
    assert AttentionInterface()["qkv"] is adapter.attention_forward
    assert AttentionMaskInterface._global_mapping["qkv"] is adapter.model_mask
    config = hf.build("llama").config
    assert type(config)(**{**config.to_dict()})._attn_implementation != "qkv"
    assert AutoModelForCausalLM.from_config(config, attn_implementation="qkv").config._attn_implementation == "qkv"


def test_importing_qkv_does_not_import_transformers() -> None:
    code = "import sys, qkv, qkv.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("version", ["4.56.2", "4.9", "3.0"])
def test_an_old_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.metadata, "version", lambda name: version)
    with pytest.raises(qkv.UnsupportedError, match=rf"4\.57 or later. Got transformers {version}.*pip install"):
        adapter.register()


def test_a_missing_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(qkv.UnsupportedError, match=r"must be installed.*pip install \"qkv\[transformers\]\""):
        adapter.register()


# ------------------------------------------------------------------------------------------------- the function itself
def call(B: int = 1, Hq: int = 4, Hkv: int = 2, Lq: int = 5, Lk: int = 5, **given: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, n, 8, generator=g) for h, n in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk)))
    mask = given.pop("mask", None)
    module = given.pop("module", SimpleNamespace(training=False))
    return (q, k, v), adapter.attention_forward(module, q, k, v, mask, **given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"output_attentions": True}, "eager"),
        ({"head_mask": torch.ones(4)}, "prune"),
        ({"cache": object()}, "Continuous batching"),
        ({"indices": torch.zeros(1, 5, 2)}, "sdpa"),
        ({"block_indices": torch.zeros(1, 5, 2)}, "sdpa"),
        ({"sinks": torch.zeros(1)}, "s_aux"),
        ({"temperature": 2.0}, r"ignore\('temperature'\)"),
    ],
)
def test_keyword_arguments_that_matter_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(qkv.UnsupportedError, match=why):
        call(**given)


def test_a_model_that_is_asked_for_weights_says_who_has_them() -> None:
    with hf.running(hf.build("llama"), "qkv") as model, pytest.raises(ValueError, match="eager"):
        model(input_ids=hf.tokens(), output_attentions=True)


def test_keyword_arguments_that_do_not_matter_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    call(position_ids=torch.arange(5), use_cache=True, num_items_in_batch=3, head_mask=None, output_attentions=False)
    monkeypatch.setattr(adapter, "_IGNORED", set(adapter._IGNORED))
    adapter.ignore("temperature")
    call(temperature=2.0)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, qkv.ArgumentTypeError, "2-D padding mask"),
        ({"mask": torch.ones(1, 1, 5, 5, dtype=torch.int64)}, qkv.ArgumentTypeError, "bool or float"),
        ({"mask": torch.ones(1, 1, 5, 4, dtype=torch.bool)}, qkv.ShapeError, "broadcast"),
        ({"mask": adapter.model_mask(1, 5, 6)}, qkv.ShapeError, "lengths"),
        ({"mask": adapter.model_mask(1, 4, 5)}, qkv.ShapeError, "lengths"),
        ({"Lq": 3}, qkv.ShapeError, "as many queries as keys"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, qkv.ShapeError, "fill one row"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5]), "B": 2}, qkv.ShapeError, "fill one row"),
        ({"Hkv": 3}, qkv.ShapeError, "multiple"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        call(**given)


def test_a_layer_without_a_mask() -> None:
    """As sdpa reads it: causal where the call, or else the layer, says so and there is more than one query."""
    free, causal = SimpleNamespace(is_causal=False), SimpleNamespace(is_causal=True)

    def same(mask: Any, **given: Any) -> None:
        (q, k, v), (out, weights) = call(**given)
        want = qkv.attention(q, k, v, mask, positions="end")
        assert weights is None
        assert out.shape == (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        assert out.is_contiguous()
        assert torch.equal(out, want.transpose(1, 2))

    same(None, module=free)
    same(qkv.causal(), module=causal)
    same(qkv.causal(), module=SimpleNamespace())
    same(qkv.causal(), module=free, is_causal=True)
    same(None, module=causal, is_causal=False, Lq=3)
    same(None, module=causal, Lq=1)
    same(qkv.sliding_window(2), module=causal, sliding_window=2)
    same(qkv.window(1, 1), module=free, sliding_window=2)
    same(qkv.causal(), module=causal, sliding_window=5)
    same(qkv.documents([2, 3]) & qkv.causal(), module=causal, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    same(None, module=SimpleNamespace(is_causal=False, training=False), dropout=0.5)


def test_one_row_of_queries_serves_a_batch() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, 2, 3, 8, generator=g) for b in (1, 4, 4))
    out, _ = adapter.attention_forward(SimpleNamespace(is_causal=False), q, k, v, None)
    assert torch.equal(out.transpose(1, 2), qkv.attention(q.expand(4, -1, -1, -1), k, v))


def test_a_scale_that_is_a_tensor() -> None:
    (q, k, v), (out, _) = call(scaling=torch.tensor(0.7), is_causal=False)
    assert torch.allclose(out.transpose(1, 2), qkv.attention(q, k, v, scale=0.7), atol=1e-6)


def test_dropout_in_training() -> None:
    module = SimpleNamespace(training=True, is_causal=False)
    torch.manual_seed(3)
    (q, k, v), (out, _) = call(module=module, dropout=0.4)
    torch.manual_seed(3)
    want = qkv.attention(q, k, v, dropout_p=0.4)
    assert torch.equal(out.transpose(1, 2), want)
    assert not torch.allclose(want, qkv.attention(q, k, v))


def test_a_changed_float_mask_is_read_again() -> None:
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 5, 5)
    _, (before, _) = call(mask=mask)
    mask[..., 1:] = low
    (_, _, v), (after, _) = call(mask=mask)
    assert not torch.equal(before, after)
    assert torch.allclose(after[0, :, 0], v[0, 0, :1].expand(5, -1), atol=1e-6)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_what_a_float_mask_hides_is_not_read(low: float, bias: float) -> None:
    mask = torch.full((1, 1, 5, 5), bias)
    mask[..., 3:] = low
    (q, k, v), (want, _) = call(mask=mask)
    k[:, :, 3:] = v[:, :, 3:] = math.nan
    found, _ = adapter.attention_forward(SimpleNamespace(training=False), q, k, v, mask)
    assert torch.allclose(found, want, atol=1e-6)
    seen = qkv.attention(q, k[:, :, :3], v[:, :, :3])
    assert torch.allclose(found.transpose(1, 2), seen, atol=1e-6)


def test_a_position_bias_meets_masks() -> None:
    g = torch.Generator().manual_seed(2)
    position_bias = 2 * torch.randn(1, 4, 5, 9, generator=g)
    module = SimpleNamespace(training=False)
    mask = adapter.model_mask(1, 5, 9)  # causal from 0: keys from 5 on are seen by nothing
    (q, k, v), (out, _) = call(Lk=9, mask=mask, position_bias=position_bias)
    want = qkv.attention(q, k, v, qkv.causal(), positions=0, bias=position_bias)
    assert torch.allclose(out.transpose(1, 2), want, atol=1e-6)
    one = position_bias[..., :1]  # the same for all keys: moves nothing
    out, _ = adapter.attention_forward(module, q, k, v, mask, position_bias=one)
    assert torch.allclose(out.transpose(1, 2), qkv.attention(q, k, v, qkv.causal(), positions=0), atol=1e-6)
    added = torch.randn(1, 1, 5, 9, generator=g)
    out, _ = adapter.attention_forward(module, q, k, v, added, position_bias=position_bias)
    want = qkv.attention(q, k, v, bias=position_bias + added)
    assert torch.allclose(out.transpose(1, 2), want, atol=1e-6)
