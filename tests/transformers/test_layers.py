"""The name "qkv" in transformers, and the attention function that its layers call."""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, masking_utils

import qkv
import qkv.integrations.transformers as adapter
from qkv.integrations import features
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()


# ------------------------------------------------------------------------------------------------------- registration
def test_importing_registers_and_activates_nothing() -> None:
    assert AttentionInterface()["qkv"] is adapter.attention_forward
    assert AttentionMaskInterface._global_mapping["qkv"] is adapter.model_mask
    config = copy.deepcopy(hf.build("llama").config)  # from_config writes into what it is given
    assert type(config)(**{**config.to_dict()})._attn_implementation != "qkv"
    assert AutoModelForCausalLM.from_config(config, attn_implementation="qkv").config._attn_implementation == "qkv"


def test_importing_qkv_does_not_import_transformers() -> None:
    code = "import sys, qkv, qkv.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("feature", adapter.features())
def test_a_transformers_that_lacks_a_feature_is_refused_by_its_name(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module seems not to have it, as that of another release."""
    path, name = next((p, n.split(".")[0]) for _, p, n, _ in features._NEEDED if feature.startswith(f"{p}.{n} "))
    real = importlib.import_module

    def without(module: str) -> Any:
        found = real(module)
        return SimpleNamespace(**{n: x for n, x in _names(found) if n != name}) if module == path else found

    monkeypatch.setattr(features, "import_module", without)
    assert not adapter.features()[feature]
    with pytest.raises(qkv.UnsupportedError, match=rf"without .*{name}.*pip install"):
        adapter.register()


def _names(module: Any) -> Any:
    wanted = {name.split(".")[0] for _, path, name, _ in features._NEEDED if path == module.__name__}
    return [(name, getattr(module, name)) for name in wanted]


def test_a_transformers_whose_masks_are_asked_for_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in 4.57 to 5.0, where queries stood by a tensor."""
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(qkv.UnsupportedError, match=r"without transformers\.masking_utils\.sdpa_mask"):
        adapter.register()


def test_a_missing_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(qkv.UnsupportedError, match=r"must be installed.*pip install --upgrade \"qkv\[transformers\]\""):
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
        ({"block_indices": torch.zeros(1, 1, 5, 2, dtype=torch.int64)}, "eager"),
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
    call(grid_thw=torch.ones(1, 3), input_ids=torch.ones(1, 5), generation_config=SimpleNamespace())
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


# ------------------------------------------------------------------------------------------- selected keys, and sinks
def chosen(Lq: int, Lk: int, n: int, seed: int = 4, groups: int | None = None) -> torch.Tensor:
    """n different keys (or blocks) for each query."""
    shape = (2, Lq, Lk) if groups is None else (2, groups, Lq, Lk)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :n]


def truth(q: Any, k: Any, v: Any, seen: Any, sinks: Any = None) -> torch.Tensor:
    """Dense attention in float64; a query that sees nothing gets 0."""
    q, k, v = q.double(), k.double(), v.double()
    n = q.shape[1] // k.shape[1]
    s = (q @ k.repeat_interleave(n, 1).transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double().expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1).nan_to_num(0.0)[..., : k.shape[2]]
    return (p @ v.repeat_interleave(n, 1)).transpose(1, 2)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (list, tuple)) else [found]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return found


@pytest.mark.parametrize("kind", ["keys", "blocks"])
def test_nothing_of_a_selection_is_quadratic(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    module = SimpleNamespace(training=False, indexer=SimpleNamespace(block_size=4))
    given = {"indices": chosen(900, 900, 4)} if kind == "keys" else {"block_indices": chosen(900, 225, 2, groups=2)}
    with _Largest() as largest:
        call(B=2, Lq=900, Lk=900, mask=adapter.model_mask(2, 900, 900), module=module, **given)
    assert largest.numel < 2 * 900 * 100
    assert not recwarn.list


@pytest.mark.parametrize("masked", ["causal", "left padding", "bool", "nothing"])
@pytest.mark.parametrize("Lq", [7, 1])
def test_selected_keys_are_those_that_are_seen(masked: str, Lq: int) -> None:
    """DeepSeek V3.2, GLM, ...: of what the mask shows, a query sees the keys that were selected for it."""
    indices, real = chosen(Lq, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    if masked == "left padding":
        real[1, :4] = False
    p, j = torch.arange(Lq)[:, None] + 9 - Lq, torch.arange(9)
    shown: Any = (j <= p) & real[:, None, None]
    if masked in ("causal", "left padding"):
        mask: Any = adapter.model_mask(2, Lq, 9, q_offset=9 - Lq, attention_mask=real)
    else:
        shown = torch.ones(2, 1, Lq, 9, dtype=torch.bool) if masked == "nothing" else shown.expand(2, 1, Lq, 9)
        mask = None if masked == "nothing" else shown
    (q, k, v), (out, _) = call(B=2, Lq=Lq, Lk=9, mask=mask, indices=indices, is_causal=False)
    selected = torch.zeros(2, Lq, 9, dtype=torch.bool).scatter_(-1, indices, True)[:, None]
    assert (out - truth(q, k, v, shown & selected)).abs().max() < 1e-6
    assert (out - truth(q, k, v, shown.expand(2, 1, Lq, 9))).abs().max() > 1e-2  # to leave the selection out shows


def test_a_selection_of_every_key_is_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(adapter, "attention", lambda *a, **k: seen.append(a[3]) or qkv.attention(*a, **k))
    mask = adapter.model_mask(2, 6, 6)
    (q, k, v), (out, _) = call(B=2, Lq=6, Lk=6, mask=mask, indices=chosen(6, 6, 6))
    assert seen == [qkv.causal()]
    assert torch.equal(out.transpose(1, 2), qkv.attention(q, k, v, qkv.causal()))
    few = chosen(6, 6, 6)
    few[..., 2:] = -1  # as many entries as keys, and not all of them keys
    _, (out, _) = call(B=2, Lq=6, Lk=6, mask=mask, indices=few)
    selected = torch.zeros(2, 6, 7, dtype=torch.bool).scatter_(-1, few.where(few >= 0, 6), True)[:, None, :, :6]
    shown = torch.ones(6, 6, dtype=torch.bool).tril() & selected
    assert (out - truth(q, k, v, shown)).abs().max() < 1e-6


def test_selected_keys_of_a_static_cache_are_counted_from_its_beginning() -> None:
    mask = adapter.model_mask(2, 5, 12)  # keys from 5 on are not filled yet, and are cut off
    indices = chosen(5, 12, 8)
    (q, k, v), (out, _) = call(B=2, Lk=12, mask=mask, indices=indices)
    selected = torch.zeros(2, 5, 12, dtype=torch.bool).scatter_(-1, indices, True)[:, None]
    shown = (torch.arange(12) <= torch.arange(5)[:, None]) & selected
    assert (out - truth(q, k, v, shown)).abs().max() < 1e-6


def test_selected_blocks_are_those_that_are_seen() -> None:
    """MiniMax M3: blocks for each group of heads, -1 for none."""
    module = SimpleNamespace(training=False, indexer=SimpleNamespace(block_size=4))
    blocks = chosen(11, 3, 2, groups=2)
    blocks[..., 1] = blocks[..., 1].where(blocks[..., 1] != 2, -1)
    mask = adapter.model_mask(2, 11, 11)
    (q, k, v), (out, _) = call(B=2, Lq=11, Lk=11, mask=mask, block_indices=blocks, module=module)
    seen = torch.zeros(2, 2, 11, 4, dtype=torch.bool).scatter_(-1, blocks.where(blocks >= 0, 3), True)[..., :3]
    seen = seen.repeat_interleave(4, 3)[..., :11].repeat_interleave(2, 1)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    assert (out - truth(q, k, v, seen & causal)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 4, 5, 1), (1, 4, 1, 1), (4,)])
def test_a_sink_of_each_query(shape: tuple[int, ...]) -> None:
    """Inkling: it takes a part of the weights, forward and backward."""
    sinks = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    sinks.requires_grad_()
    mask = adapter.model_mask(2, 5, 5)
    (q, k, v), (out, _) = call(B=2, mask=mask, sinks=sinks)
    wide = sinks.detach().reshape(shape if len(shape) == 4 else (1, 4, 1, 1)).double().requires_grad_()
    want = truth(q, k, v, torch.ones(5, 5, dtype=torch.bool).tril(), wide)
    assert (out - want).abs().max() < 1e-6
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    assert sinks.grad is not None
    assert wide.grad is not None
    assert (sinks.grad.flatten() - wide.grad.flatten()).abs().max() < 1e-5
    assert wide.grad.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"indices": torch.zeros(2, 5, 2, dtype=torch.int64)}, r"indices must select keys for each query"),
        ({"indices": torch.zeros(1, 2, dtype=torch.int64)}, r"indices must select keys for each query"),
        ({"sinks": torch.zeros(3)}, "one a query head"),
        ({"sinks": torch.zeros(1, 4, 5, 2)}, "one a query head"),
        ({"sinks": torch.zeros(1, 4, 5, 1), "s_aux": torch.zeros(4)}, "of one kind"),
    ],
)
def test_selections_and_sinks_of_other_shapes_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(qkv.ShapeError, match=why):
        call(**given)


def test_a_mask_of_one_row_serves_every_query() -> None:
    """BridgeTower makes its mask for one query and lets it broadcast."""
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    both_ways = adapter.model_mask(
        2, 1, 5, mask_function=masking_utils.bidirectional_mask_function, attention_mask=real
    )
    (q, k, v), (out, _) = call(B=2, mask=both_ways)
    assert (out - truth(q, k, v, real[:, None, None].expand(2, 1, 5, 5))).abs().max() < 1e-6
    window = masking_utils.sliding_window_causal_mask_function(2)
    row = adapter.model_mask(2, 1, 5, q_offset=2, mask_function=window)  # what the third query of a local layer sees
    (q, k, v), (out, _) = call(B=2, mask=row)
    seen = torch.tensor([False, True, True, False, False])
    assert (out - truth(q, k, v, seen.expand(2, 1, 5, 5))).abs().max() < 1e-6


def test_a_window_of_0_in_a_config_is_none() -> None:
    (q, k, v), (out, _) = call(sliding_window=0, is_causal=True)
    assert torch.equal(out.transpose(1, 2), qkv.attention(q, k, v, qkv.causal()))
