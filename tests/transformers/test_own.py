"""Models of transformers that keep their own attention: under "qkv" they are eager's to the last bit, or say no.

Their code adds its mask to the scores. Wrong adapters that die here: one that gives every model qkv's mask (decoders
lose causality: what comes later changes what came before), one whose mask counts as numbers.
"""

from __future__ import annotations

import copy
import re
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qkv
import qkv.integrations.transformers as adapter
from qkv.integrations.transformers import askers as askers
from tests.kit import hf_models as hf

pytestmark = pytest.mark.usefixtures("one_thread")
hf.quiet()

_TINY = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "xglm": (
        "XGLMConfig",
        "XGLMForCausalLM",
        {"vocab_size": 96, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    ),
    "rembert": ("RemBertConfig", "RemBertForMaskedLM", {**_TINY, "intermediate_size": 64, "input_embedding_size": 64}),
    "trocr": (
        "TrOCRConfig",
        "TrOCRForCausalLM",
        {"vocab_size": 96, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    ),
}


def pair(name: str, implementation: str = "qkv") -> tuple[Any, Any]:
    """The model on eager, and one with its weights that is built under another name."""
    config_name, model_name, given = OWN[name]
    config, model = getattr(transformers, config_name)(**given), getattr(transformers, model_name)
    torch.manual_seed(0)
    eager = model._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    other = model._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    other.load_state_dict(eager.state_dict())
    return eager, other


def output(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


def furthest(name: str, side: str, implementation: str = "qkv") -> float:
    eager, other = pair(name, implementation)
    ids, mask = hf.tokens(2, 12), hf.padded(side, 2, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return float((output(eager, ids, mask) - output(other, ids, mask)).abs().max())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", OWN)
def test_a_model_with_its_own_attention_is_eagers_to_the_last_bit(name: str, side: str) -> None:
    assert furthest(name, side) == 0


@pytest.mark.parametrize("name", ["bloom", "mpt", "xglm"])
def test_what_comes_later_does_not_change_what_came_before(name: str) -> None:
    _, model = pair(name)
    ids = hf.tokens(2, 12)
    changed = torch.cat([ids[:, :6], ids[:, 6:].flip(1)], 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        apart = output(model, ids, None) - output(model, changed, None)
    assert apart[:, :6].abs().max() == 0
    assert apart[:, 6:].abs().max() > 1e-2


def test_greedy_tokens_with_both_kinds_of_cache() -> None:
    eager, other = pair("xglm")
    prompt = {"input_ids": hf.tokens(2, 9), "attention_mask": hf.padded("left", 2, 9)}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert torch.equal(eager.generate(**prompt, **options), other.generate(**prompt, **options))


def test_it_is_said_once_that_qkv_is_not_used() -> None:
    _, model = pair("bloom")
    askers._warned.clear()
    with pytest.warns(UserWarning, match="attention of bloom is in its own code.*changes nothing"):
        output(model, hf.tokens(2, 12), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model, hf.tokens(2, 12), None)


@pytest.mark.parametrize("name", hf.DECODERS)
def test_a_model_that_takes_attention_by_name_is_given_a_value(name: str) -> None:
    model, made = hf.build(name), []

    def watched(**given: Any) -> Any:
        made.append(adapter.model_mask(**given))
        return made[-1]

    with hf.adapted(mask=watched) as registered, hf.running(model, registered), torch.no_grad():
        hf.logits(model, hf.tokens(), None)
    assert made
    assert all(isinstance(mask, adapter.ModelMask) for mask in made)


def _git() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GitConfig(
        **_TINY, intermediate_size=96, vision_config={**vision, "image_size": 32, "patch_size": 16}
    )
    torch.manual_seed(0)
    return transformers.GitForCausalLM(config).eval()


def test_a_model_that_adds_its_mask_and_takes_other_attention_by_name_is_eagers() -> None:
    """GIT's images go by name, its text does not: a mask that counts as numbers would be silently wrong."""
    model, ids = _git(), hf.tokens(1, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        want = model(input_ids=ids).logits
        model.set_attn_implementation("qkv")
        assert torch.equal(model(input_ids=ids).logits, want)


def test_and_were_it_given_a_value_it_would_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "_NEEDS_A_TENSOR", re.compile("nothing that is there"))
    askers._of_module.cache_clear()
    model = _git()
    model.set_attn_implementation("qkv")
    try:
        with pytest.raises(qkv.UnsupportedError, match=r"must not be computed with.*eager"):
            model(input_ids=hf.tokens(1, 12))
    finally:
        askers._of_module.cache_clear()


def test_a_layer_without_a_mask_in_a_model_that_has_eager_only_sees_everything() -> None:
    """BridgeTower: its image layers say that they are causal, and are given no mask."""
    q, k, v = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    full, causal = (qkv.attention(q, k, v, mask).transpose(1, 2) for mask in (None, qkv.causal()))
    layer, other = (
        type("Layer", (types.SimpleNamespace,), {"__module__": model.__module__})(is_causal=True, training=False)
        for model in (transformers.BridgeTowerModel, transformers.LlamaModel)
    )
    assert torch.equal(adapter.attention_forward(layer, q, k, v, None)[0], full)
    assert torch.equal(adapter.attention_forward(layer, q, k, v, None, is_causal=True)[0], causal)
    assert torch.equal(adapter.attention_forward(other, q, k, v, None)[0], causal)


def test_the_class_of_a_config_says_that_its_attention_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other code asks for the mask of such a model."""
    monkeypatch.setattr(
        askers, "asking", lambda: {"__name__": "somebody", **vars(sys.modules["transformers.modeling_utils"])}
    )
    bloom = transformers.BloomConfig(**OWN["bloom"][2])
    assert askers.why_eager(bloom) == "own"
    assert askers.why_eager(hf.build("llama").config) is None
    assert askers.why_eager(None) is None


def test_code_from_elsewhere_is_asked_as_well() -> None:
    """A model of somebody's own, in no module of transformers: it has attention, and none by name."""
    module = types.ModuleType("somebodys_model")
    code = """
def ask(config, x):
    from transformers.masking_utils import create_causal_mask
    return create_causal_mask(config, x, None, None)
"""
    exec(code, vars(module))
    config, x = transformers.LlamaConfig(**_TINY, attn_implementation="qkv"), torch.zeros(2, 5, 64)
    assert isinstance(module.ask(config, x), adapter.ModelMask)
    vars(module)["SelfAttention"] = type("SelfAttention", (nn.Module,), {"__module__": "somebodys_model"})
    askers._warned.clear()
    with pytest.warns(UserWarning, match="attention of llama is in its own code"):
        found = module.ask(config, x)
    assert type(found) is Tensor
    assert found.dtype == torch.float32
    assert torch.equal(found == 0, torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5))
    vars(module)["by_name"] = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    assert isinstance(module.ask(config, x), adapter.ModelMask)


def test_a_model_that_asks_whether_its_mask_is_a_tensor_is_given_one() -> None:
    """DeepSeek V4 lengthens its mask by the keys that it adds, where it is a tensor; and serves no mask but eager's."""
    model = transformers.DeepseekV4ForCausalLM
    assert askers._of_module(model.__module__) == (False, True)
    assert askers._only_eager(askers._model(transformers.DeepseekV4Config))
    assert not askers._only_eager(askers._model(transformers.GptOssConfig))


# ------------------------------------------------------------------------------------------------- wrong adapters die
def test_a_mask_for_every_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule about who asks, and with masks that count as numbers, as it once was."""
    monkeypatch.setattr(sys.modules["qkv.integrations.transformers.mask"], "why_eager", lambda config: None)
    with pytest.raises(qkv.UnsupportedError, match="computed with"):
        furthest("bloom", "none")

    def bools(**given: Any) -> Any:
        return adapter.model_mask(**given).tensor()

    with hf.adapted(mask=bools) as registered:
        assert furthest("bloom", "none", registered) > 0.1
        assert furthest("rembert", "right", registered) > 0.1
