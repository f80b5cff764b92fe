"""A model of each type that can be built, and inputs for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from tests.gates.hf_sweep.small import CHOICES, keywords

LENGTH = 20
_FIRST = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_CTC_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "MODEL_MAPPING",
)  # fmt: skip


@dataclass
class Subject:
    """A model on `eager`, and what it is called with."""

    model: Any
    config: Any
    inputs: dict[str, Any]
    choice: str

    @property
    def is_text(self) -> bool:
        return "input_ids" in self.inputs


class Unbuilt(Exception):
    """No way to be small suited the type."""


def types() -> list[str]:
    """All model types that have a model class."""
    mappings = [getattr(modeling_auto, name)._model_mapping for name in _FIRST if hasattr(modeling_auto, name)]
    return [name for name in CONFIG_MAPPING if any(name in mapping for mapping in mappings)]


def classes(name: str) -> Iterator[Any]:
    """The type's model classes, those with logits first."""
    config_class = CONFIG_MAPPING[name]
    seen = set()
    for mapping_name in _FIRST:
        mapping = getattr(modeling_auto, mapping_name, None)
        if mapping is None:
            continue
        try:
            found = mapping.get(config_class, None)
        except Exception:  # something it needs is not installed
            continue
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if one is not None and one not in seen:
                seen.add(one)
                yield one


def construct(model_class: Any, config: Any, implementation: str) -> Any:
    """The model with the weights of seed 0, raised where they make scores."""
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not bool(torch.isfinite(parameter).all()) or (
                float(parameter.std(correction=0)) < 1e-3 and parameter.ndim > 1
            ):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
            elif parameter.ndim > 1 and float(parameter.std(correction=0)) < 0.05:
                parameter.mul_(0.1 / float(parameter.std(correction=0)))  # no logits of 1e-3
            if any(part in _SCORES for part in key.split(".")):
                parameter.mul_(2.5)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = 0
        generation.eos_token_id = None
        generation.max_length = None
        generation.forced_bos_token_id = generation.forced_eos_token_id = None
        generation.suppress_tokens = generation.begin_suppress_tokens = None
        if getattr(config, "is_encoder_decoder", False) and generation.decoder_start_token_id is None:
            generation.decoder_start_token_id = 1
    return model


_SCORES = {
    "q_proj", "k_proj", "query", "key", "q", "k", "wq", "wk", "qkv", "query_key_value", "c_attn", "in_proj", "Wqkv",
    "qkv_proj", "q_b_proj", "q_lin", "k_lin", "q_norm", "k_norm",
}  # fmt: skip


def build(name: str, limit: float = 80e6) -> Subject:
    """The first of the type's classes and ways to be small that runs on `eager`. Raises Unbuilt with the reasons."""
    reasons: list[str] = []
    for model_class in classes(name):
        said: list[str] = []
        for choice in CHOICES:
            try:
                config = CONFIG_MAPPING[name](**keywords(CONFIG_MAPPING[name], choice))
                _check_size(model_class, config, limit)
                model = construct(model_class, config, "eager")
                try:
                    return _called(Subject(model, config, inputs(model, config), choice.name))
                except Exception:
                    given = inputs(model, config, everything=True)
                    if given.keys() == inputs(model, config).keys():
                        raise
                    return _called(Subject(model, config, given, choice.name))
            except Exception as error:
                said.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
                reasons.append(f"{model_class.__name__}, {choice.name}: {said[-1]}")
                if isinstance(error, ImportError) or said.count(said[-1]) == 3:  # sizes do not matter to it
                    break
    raise Unbuilt(reasons[0] if reasons else "no model class", reasons)


def _check_size(model_class: Any, config: Any, limit: float) -> None:
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
    if size > limit:
        raise ValueError(f"{size / 1e6:.0f} million parameters")


def _called(subject: Subject) -> Subject:
    """The subject, if it runs and its output says something."""
    with torch.no_grad():
        torch.manual_seed(0)
        found = result(subject.model(**subject.inputs))
    if not bool(torch.isfinite(found).all()) or found.numel() < 2 or float(found.std()) < 1e-5:
        raise ValueError(f"an output of std {float(found.std()):.1e}")
    return subject


def result(output: Any) -> Tensor:
    """The tensor that is compared: logits, or hidden states."""
    if isinstance(output, Tensor):
        return output
    for name in (
        "logits",
        "last_hidden_state",
        "prediction_logits",
        "logits_per_image",
        "pred_logits",
        "encoder_last_hidden_state",
    ):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    values = output.values() if hasattr(output, "values") else output
    for found in values:
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    raise ValueError("no tensor in the output")


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(model: Any, config: Any, everything: bool = False) -> dict[str, Any]:
    """What the model's forward needs, by the names of its parameters; or all that it takes."""
    names = inspect.signature(model.forward).parameters
    g = torch.Generator().manual_seed(2)

    def number(*keys: str, default: int) -> int:
        for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
            for key in keys:
                value = getattr(part, key, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    main = getattr(model, "main_input_name", "input_ids")
    given: dict[str, Any] = {}
    if "input_ids" in names:
        given["input_ids"] = tokens()
    channels, size = (
        number("num_channels", "in_channels", "in_chans", default=3),
        number("image_size", "img_size", default=32),
    )
    patch, mels = (
        number("patch_size", default=8),
        number("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", default=80),
    )
    if "grid_thw" in names:
        time = number("temporal_patch_size", default=2)
        grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
        width = channels * patch * patch * (time if hasattr(config, "temporal_patch_size") else 1)
        first = "hidden_states" if "hidden_states" in names else "pixel_values" if "pixel_values" in names else main
        return {first: noise(int(grid.prod(1).sum()), width), "grid_thw": grid}
    images = {"pixel_values": (2, channels, size, size)}
    required = {
        name
        for name, p in names.items()
        if p.default is inspect.Parameter.empty and p.kind.name not in ("VAR_KEYWORD", "VAR_POSITIONAL")
    }
    for name in names:
        paired = everything or hasattr(model, "logit_scale")
        wanted = name in required or name in (main, "bbox") or (paired and name in _TOGETHER)
        if not wanted or name in given:
            continue
        if name in images:
            given[name] = noise(*images[name])
            if (
                "num_frames" in vars(config)
                or "video" in type(model).__name__.lower()
                or "tubelet_size" in vars(config)
            ):
                given[name] = noise(2, number("num_frames", "frames_per_clip", default=4), channels, size, size)
        elif name in ("pixel_values_videos", "pixel_values_video"):
            given[name] = noise(2, number("num_frames", "frames_per_clip", default=4), channels, size, size)
        elif name == "input_features":
            time = 2 * number("max_source_positions", default=32)
            whisper = (
                "max_source_positions" in vars(config) and "num_mel_bins" in vars(config) and hasattr(model, "generate")
            )
            given[name] = (
                noise(2, mels, time) if whisper and "Speech2Text" not in type(model).__name__ else noise(2, time, mels)
            )
        elif name in ("input_values", "audio_values"):
            given[name] = noise(2, 3200)
            if "num_mel_bins" in vars(config) and "max_length" in vars(config):
                given[name] = noise(2, config.max_length, config.num_mel_bins)
        elif name in ("past_values",):
            given[name] = noise(
                2, number("context_length", default=32), number("num_input_channels", "input_size", default=1)
            )
        elif name in ("inputs_embeds", "hidden_states"):
            given[name] = noise(2, LENGTH, number("hidden_size", "d_model", default=64))
        elif name in ("decoder_input_ids", "labels", "src_tokens"):
            given[name] = tokens(seed=3)
        elif name == "bbox":
            given[name] = torch.zeros(
                2, LENGTH, 4, dtype=torch.int64 if "Layout" in type(model).__name__ else torch.float32
            )
        elif name in ("pixel_mask", "padding_mask"):
            given[name] = torch.ones(2, size, size, dtype=torch.int64)
        elif name in ("query_embeds",):
            given[name] = noise(2, 12, number("hidden_size", default=64))
        elif name == "attention_mask":
            given[name] = torch.ones(2, LENGTH, dtype=torch.int64)
    if (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in names
        and "decoder_input_ids" not in given
    ):
        given["decoder_input_ids"] = tokens(seed=3)
    return given


_TOGETHER = ("pixel_values", "pixel_mask", "input_features", "input_values", "bbox", "attention_mask")


def quiet() -> None:
    transformers.logging.set_verbosity(50)
