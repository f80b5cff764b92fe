"""Configs of a few thousand parameters for any model type, from its config class's own names and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

VOCAB = 96
LAYERS = 2

# The first pattern that matches a whole name gives its number. `None`: leave it alone.
_RULES: list[tuple[str, int | None]] = [
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_state|ssm_state_size|state_size", 16),
    (r"rotary_dim", 8),
    (r"attention_window", 8),
    (r"index_kpool", 4),
    (r"prediction_length", 8),
    (r"(max_)?(source|target|text)?_?vocab_size\w*|unpadded_vocab_size|\w+_vocab_size", VOCAB),
    (r"num_(key_value|kv)_(heads|groups)|multi_query_group_num|n_kv_heads?|num_kv_heads|\w*_num_key_value_heads", 2),
    (r"(\w+_)?(num_)?attention_heads|n_heads?|num_heads|heads|\w+_n_heads|linear_num_\w*heads|num_\w+_heads", 4),
    (r"(swa_|global_)?head_dim|d_kv|kv_channels|linear_\w+_head_dim|attention_head_dim|dim_head|d_head", 16),
    (r"q_lora_rank", 32),
    (r"kv_lora_rank", 24),
    (r"qk_nope_head_dim|v_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"index_topk", 8),
    (r"index_head_dim", 16),
    (r"index_n_heads", 4),
    (
        r"(num_|n_)?(\w+_)?experts_per_tok|moe_k|moe_topk|top_k_experts|num_selected_experts|moe_top_k|num_experts_per_token",
        2,
    ),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts|num_routed_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"first_k_dense_replace", 1),
    (r"(moe|shared_expert|shared)_intermediate_size|expert_\w*size|moe_ffn_hidden_size", 32),
    (r"\w*intermediate_size|(\w+_)?ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|(\w+_)?ffn_embed_dim|d_inner", 64),
    (
        r"(\w+_)?num_hidden_layers|num_(\w+_)?layers|(encoder|decoder|fusion|memory)_layers|n_layers?|depth|layers|num_blocks",
        LAYERS,
    ),
    (r"num_(image|vision|text|encoder|decoder)_layers|num_encoder_blocks", LAYERS),
    (r"mtp_\w*|num_nextn_predict_layers", 0),
    (
        r"(\w+_)?hidden_size|d_model|n_embd|(\w+_)?embed_dim|dim|hidden_dim|embedding_size|(\w+_)?projection_dim|emb_dim",
        64,
    ),
    (
        r"(encoder|decoder|text|audio|vision)_hidden_dim|embedding_dim|rnn_hidden_dim|\w*_hidden_size|model_dim|d_embed",
        64,
    ),
    (r"image_size|pretrain_image_size|img_size", 32),
    (r"patch_size|encoder_stride", 8),
    (r"num_mel_bins|feature_size|n_mels", 80),
    (r"max_source_positions", 64),
    (r"sliding_window(_size)?|local_window_size|window", 7),
    (r"attention_chunk_size", 7),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_target_positions", 128),
    (r"conv_dim|pooler_output_size|classifier_proj_size|tdnn_dim|xvector_output_dim|d_rel", None),
    (r"num_queries|num_query_tokens|num_latents", 12),
    (r"num_denoising", 0),
    (r"num_codebooks|num_quantizers", None),
]
_COMPILED = [(re.compile(pattern), number) for pattern, number in _RULES]
_TOKEN = re.compile(r"\w*(token_id|token_index|token|_id)s?$")


_LAYER_COUNT = re.compile(
    r"\w*vocab_size\w*|\w*num_hidden_layers|\w+_layers|n_layers?|depth|num_layers|layers|\w*experts|\w*per_tok"
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several ways to be small; what a type refuses another may suit."""

    name: str
    changes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    only_layers: bool = False


CHOICES = (
    Choice("grouped"),
    Choice("all heads", {"num_key_value_heads": 4}),
    Choice("own head size", {"head_dim": None, "d_kv": 16}),
    Choice(
        "own heads", {"head_dim": None, "num_key_value_heads": None, "num_attention_heads": None, "hidden_size": None}
    ),
    Choice("own images", {"image_size": None, "patch_size": None, "head_dim": None}),
    Choice("wide", {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "d_model": 128}),
    Choice("heads of 128", {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}),
    Choice("own layers", {"num_hidden_layers": None, "head_dim": None}),
    Choice("fewer layers", only_layers=True),
)


def parameters(config_class: type) -> dict[str, Any]:
    """The class's keywords that are its own, and their defaults."""
    names = inspect.signature(config_class).parameters.values()
    common = {"transformers_version", "architectures", "dtype", "return_dict", "id2label", "label2id", "problem_type"}
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p.default for p in names if p.kind not in kinds and p.name not in common}


def keywords(config_class: Any, choice: Choice, depth: int = 0) -> dict[str, Any]:
    """Keywords that make a small config of this class, its parts included."""
    defaults = parameters(config_class)
    try:
        made = vars(config_class())
    except Exception:  # it cannot be made without arguments
        made = {}
    parts = dict(getattr(config_class, "sub_configs", None) or {})
    found: dict[str, Any] = {}
    tokens = iter(range(VOCAB - 2, 70, -1))
    for name, default in defaults.items():
        value = made.get(name, default)
        if name in parts and depth < 3:
            part = type(value) if hasattr(value, "to_dict") else parts[name]
            if (
                hasattr(part, "model_type")
                and hasattr(part, "to_dict")
                and part.__name__ not in ("AutoConfig", "PreTrainedConfig")
            ):
                found[name] = {**keywords(part, choice, depth + 1)}
                if getattr(part, "model_type", ""):
                    found[name]["model_type"] = part.model_type
            continue
        small = _small(name, value, choice, tokens)
        if small is not None:
            found[name] = small
    for name in ("initializer_range", "init_std"):
        if name in defaults:
            found[name] = 0.1
    for name in defaults:
        dropped = "dropout" in name or name == "drop_path_rate" or name.endswith("layerdrop")
        if dropped and isinstance(made.get(name, defaults[name]), float):
            found[name] = 0.0
    if isinstance(made.get("layer_types"), (list, tuple)) and "layer_types" in defaults:
        found["layer_types"] = _kinds(made["layer_types"], LAYERS)
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in found:
                found[name] = len(found["layer_types"])
    for name in ("mlp_layer_types", "indexer_types", "no_rope_layers"):
        if isinstance(made.get(name), (list, tuple)) and name in defaults and len(made[name]) > LAYERS:
            count = len(found.get("layer_types") or [0] * LAYERS)
            found[name] = (_kinds(made[name], count) * count)[:count]
    _rope(found, made, defaults)
    return found


def _small(name: str, value: Any, choice: Choice, tokens: Iterator[int]) -> Any:
    if isinstance(value, bool) or name in ("sampling_rate", "sample_rate"):
        return None
    if name == "use_sliding_window":
        return True
    if name in choice.changes:
        return choice.changes[name] if isinstance(value, int) or (value is None and name == "head_dim") else None
    if _TOKEN.match(name) and (isinstance(value, (int, list)) or value is None):
        known = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": VOCAB - 1}
        if name in known:
            return known[name] if not isinstance(value, list) or name != "eos_token_id" else [VOCAB - 1]
        return next(tokens) if isinstance(value, int) and value > 60 else None
    if value is None and re.fullmatch(
        r"num_experts_per_tok|n_routed_experts|n_group|topk_group|prediction_length", name
    ):
        return 8 if name == "prediction_length" else 1 if "group" in name else 2 if "per" in name else 4
    if not isinstance(value, int) or (choice.only_layers and not _LAYER_COUNT.fullmatch(name)):
        return None
    for pattern, number in _COMPILED:
        if pattern.fullmatch(name):
            return number if number is None or number < value or name in ("index_topk",) else None
    return None


def _kinds(given: Any, least: int) -> list[Any]:
    """As few layers as hold one of each kind, in the order they come in."""
    kinds: list[Any] = []
    for kind in given:
        if kind not in kinds:
            kinds.append(kind)
    return (kinds + list(given))[: max(least, len(kinds))]


def _rope(found: dict[str, Any], made: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Sections of rotary positions fit the small heads."""
    for name in ("rope_parameters", "rope_scaling"):
        given = made.get(name)
        if name in defaults and isinstance(given, dict) and "mrope_section" in given:
            half = (found.get("head_dim") or 16) // 2
            thirds = [half - 2 * (half // 3), half // 3, half // 3]
            found[name] = {**given, "mrope_section": thirds}
