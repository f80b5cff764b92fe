"""A model of each type that can be built, and inputs for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
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


class _Sizes:
    """Sizes by the names that configurations have for them, and tensors of noise."""

    def __init__(self, config: Any) -> None:
        self.config, self.generator = config, torch.Generator().manual_seed(2)
        self.channels = self.number("num_channels", "in_channels", "in_chans", default=3)
        self.size = self.number("image_size", "img_size", default=32)
        self.patch = self.number("patch_size", default=8)
        self.mels = self.number("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", default=80)

    def number(self, *keys: str, default: int) -> int:
        parts = (self.config, *(getattr(self.config, name, None) for name in ("vision_config", "backbone_config")))
        for part in parts:
            for key in keys:
                value = getattr(part, key, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def has(self, *keys: str) -> bool:
        return all(key in vars(self.config) for key in keys)

    def video(self) -> Tensor:
        frames = self.number("num_frames", "frames_per_clip", default=4)
        return self.noise(2, frames, self.channels, self.size, self.size)

    def pixels(self, model: str) -> Tensor:
        still = self.noise(2, self.channels, self.size, self.size)
        return self.video() if self.has("num_frames") or "video" in model.lower() or self.has("tubelet_size") else still

    def features(self, model: Any) -> Tensor:
        time = 2 * self.number("max_source_positions", default=32)
        whisper = self.has("max_source_positions", "num_mel_bins") and hasattr(model, "generate")
        last = whisper and "Speech2Text" not in type(model).__name__
        return self.noise(2, self.mels, time) if last else self.noise(2, time, self.mels)

    def waves(self) -> Tensor:
        found = self.noise(2, 3200)
        spectrogram = self.has("num_mel_bins", "max_length")
        return self.noise(2, self.config.max_length, self.config.num_mel_bins) if spectrogram else found

    def past(self) -> Tensor:
        length = self.number("context_length", default=32)
        return self.noise(2, length, self.number("num_input_channels", "input_size", default=1))

    def grid(self, names: Any, main: str) -> dict[str, Any]:
        """Patches of two images in one row, and the grid that they stand on."""
        time = self.number("temporal_patch_size", default=2)
        grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
        patch = self.patch * self.patch * (time if hasattr(self.config, "temporal_patch_size") else 1)
        first = "hidden_states" if "hidden_states" in names else "pixel_values" if "pixel_values" in names else main
        return {first: self.noise(int(grid.prod(1).sum()), self.channels * patch), "grid_thw": grid}


def _tensor(name: str, model: Any, sizes: _Sizes) -> Tensor | None:
    """What a parameter of a model's forward takes, by its name."""
    kind = type(model).__name__
    makers: dict[str, Callable[[], Tensor]] = {
        "pixel_values": lambda: sizes.pixels(kind),
        "pixel_values_videos": sizes.video,
        "pixel_values_video": sizes.video,
        "input_features": lambda: sizes.features(model),
        "input_values": sizes.waves,
        "audio_values": sizes.waves,
        "past_values": sizes.past,
        "inputs_embeds": lambda: sizes.noise(2, LENGTH, sizes.number("hidden_size", "d_model", default=64)),
        "decoder_input_ids": lambda: tokens(seed=3),
        "bbox": lambda: torch.zeros(2, LENGTH, 4, dtype=torch.int64 if "Layout" in kind else torch.float32),
        "pixel_mask": lambda: torch.ones(2, sizes.size, sizes.size, dtype=torch.int64),
        "query_embeds": lambda: sizes.noise(2, 12, sizes.number("hidden_size", default=64)),
        "attention_mask": lambda: torch.ones(2, LENGTH, dtype=torch.int64),
    }
    same = {"hidden_states": "inputs_embeds", "labels": "decoder_input_ids", "src_tokens": "decoder_input_ids"}
    same["padding_mask"] = "pixel_mask"
    make = makers.get(same.get(name, name))
    return None if make is None else make()


def inputs(model: Any, config: Any, everything: bool = False) -> dict[str, Any]:
    """What the model's forward needs, by the names of its parameters; or all that it takes."""
    names = inspect.signature(model.forward).parameters
    sizes, main = _Sizes(config), getattr(model, "main_input_name", "input_ids")
    if "grid_thw" in names:
        return sizes.grid(names, main)
    given: dict[str, Any] = {"input_ids": tokens()} if "input_ids" in names else {}
    catching = ("VAR_KEYWORD", "VAR_POSITIONAL")
    paired = everything or hasattr(model, "logit_scale")
    for name, p in names.items():
        required = p.default is inspect.Parameter.empty and p.kind.name not in catching
        if name in given or not (required or name in (main, "bbox") or (paired and name in _TOGETHER)):
            continue
        if (made := _tensor(name, model, sizes)) is not None:
            given[name] = made
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        given.setdefault("decoder_input_ids", tokens(seed=3))
    return given


_TOGETHER = ("pixel_values", "pixel_mask", "input_features", "input_values", "bbox", "attention_mask")


def quiet() -> None:
    transformers.logging.set_verbosity(50)
