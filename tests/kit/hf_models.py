"""Small models of Hugging Face transformers with random weights, peaky enough that a wrong mask shows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import qkv.integrations.transformers as adapter

VOCAB, PAD = 96, 0
LENGTH = 40  # longer than every window below
# Layers read 64 channels of unit size: weights of this size give projections and logits a std of about 0.8.
_RANGE = 0.1
# What makes scores is raised further, to a std of 2 to 4: the softmax then has favourites, and a mask that is wrong by
# one key changes a logit by far more than rounding does.
_RAISED = {
    "q_proj": 2.0, "k_proj": 2.0, "query": 2.0, "key": 2.0, "q_b_proj": 9.0, "q_norm": 1.6, "k_norm": 1.6, "q": 2.5,
    "relative_attention_bias": 8.0,
}  # fmt: skip

_common = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "initializer_range": _RANGE,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_grouped = {**_common, "num_key_value_heads": 2, "head_dim": 16}

_latent = {
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _grouped),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_grouped, "sliding_window": 7}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _grouped),
    # The scale is not 1/sqrt(head_dim), and scores are far above the cap.
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_grouped,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 9,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_grouped, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_common, **_latent},
    ),
    **{
        name: (
            f"{kind}Config",
            f"{kind}ForCausalLM",
            {
                **_common,
                **_latent,
                "index_topk": 6,
                "index_n_heads": 16,  # with few, scores of 0 are frequent, and which of equal keys is taken is not said
                "index_head_dim": 16,
            },
        )
        for name, kind in (("deepseek_v32", "DeepseekV32"), ("glm_moe_dsa", "GlmMoeDsa"))
    },
    "bert": ("BertConfig", "BertForMaskedLM", {**_common, "hidden_dropout_prob": 0.0}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 8,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 8,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "eos_token_id": None,
            "dropout_rate": 0.0,
        },
    ),
}
DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")
MODELS = (*DECODERS, "bert", "t5")
INDEXED = ("deepseek_v32", "glm_moe_dsa")  # an indexer selects 6 keys for each query


@cache
def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model, in evaluation, on `eager`. The same object each time: do not train it."""
    config_name, model_name, arguments = _CONFIGS[name]
    config = getattr(transformers, config_name)(**{**arguments, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):  # as heavy as a good key
                parameter.copy_(torch.linspace(0.0, 3.0, parameter.numel()))
            for part in key.split("."):
                parameter.mul_(_RAISED.get(part, 1.0))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = PAD
    return model


@contextmanager
def running(model: Any, implementation: str) -> Iterator[Any]:
    """The model with another attention inside the block."""
    before = model.config._attn_implementation
    _set(model, implementation)
    try:
        yield model
    finally:
        _set(model, before)


def _set(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    for part in model.modules():  # the stacks of T5 have configs of their own, which earlier releases leave as they are
        if isinstance(part, transformers.PreTrainedModel) and part.config._attn_implementation != implementation:
            part.set_attn_implementation(implementation)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, batch: int = 2, length: int = LENGTH) -> Tensor | None:
    """The 2-D attention mask of a batch whose later rows are shorter."""
    if side == "none":
        return None
    real = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        missing = 5 + 3 * row
        if side == "left":
            real[row, :missing] = 0
        elif side == "right":
            real[row, -missing:] = 0
        else:  # holes
            real[row, 3:9] = 0
            real[row, 20:22] = 0
    return real


def logits(model: Any, ids: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    if model.config.model_type == "t5":
        more = {"decoder_input_ids": ids.flip(1), **more}
    found: Tensor = model(input_ids=ids, attention_mask=mask, **more).logits
    return found


def real_rows(model: Any, mask: Tensor | None, found: Tensor) -> Tensor:
    """The logits that mean something: those of real tokens. (T5's decoder row has no padding.)"""
    if mask is None or model.config.model_type == "t5":
        return found.flatten(0, 1)
    return found[mask.bool()]


@contextmanager
def adapted(attention: Callable[..., Any] | None = None, mask: Callable[..., Any] | None = None) -> Iterator[str]:
    """A name under which transformers runs these functions in place of the adapter's own."""
    name = "qkv_changed"
    AttentionInterface.register(name, attention or adapter.attention_forward)
    AttentionMaskInterface.register(name, mask or adapter.model_mask)
    try:
        yield name
    finally:
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def score_std(model: Any, ids: Tensor) -> list[float]:
    """The standard deviation of the scores of each attention layer."""
    found: list[float] = []

    def watched(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> Any:
        k_all = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = rest.get("scaling")
        s = q @ k_all.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
        found.append(float(s.std()))
        return adapter.attention_forward(module, q, k, v, mask, **rest)

    with adapted(watched) as name, running(model, name), torch.no_grad():
        logits(model, ids, None)
    return found


def greedy(model: Any, implementation: str, batch: int, side: str, **options: Any) -> Tensor:
    """The new tokens of a batch of prompts, 24 a row."""
    ids, mask = tokens(batch, 19, seed=5), padded(side, batch, 19)
    with running(model, implementation):
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=24,
            do_sample=False, **options,
        )  # fmt: skip
    return found[:, ids.shape[1] :] if model.config.model_type != "t5" else found[:, 1:]


def quiet() -> None:
    """transformers logs through its own handlers; what it says of small models is no news."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
