"""Which code asks transformers for a mask, and whether it could use anything but a tensor of numbers.

A model's config says "qkv", and transformers then asks qkv for the model's mask, whether or not the model's layers ask
qkv for attention. Code that computes attention itself adds its mask to the scores: it needs the float mask of `eager`.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from functools import cache
from typing import Any

from torch import nn

# Between the function that asks and the one that answers.
_BETWEEN = re.compile(r"(torch|qkv|functools|contextlib|transformers\.(masking_utils|utils))(\.|$)")
# Code that lengthens its mask where it is a tensor, or a class that adds it to scores although others go by name.
_NEEDS_A_TENSOR = re.compile(
    r"isinstance\(\w*mask\w*, *(torch\.)?Tensor\)|^ {12,}(attention_scores|attn_scores|attn_weights) = \2 \+ \w*mask\b",
    re.MULTILINE,
)
_warned: set[str] = set()


def asking() -> dict[str, Any]:
    """The globals of the code that is asking: those of the nearest frame that is not machinery."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if not _BETWEEN.match(frame.f_globals.get("__name__", "")):
            break
        frame = frame.f_back
    return frame.f_globals


def takes_attention_by_name(module: dict[str, Any]) -> bool:
    """Whether the code of a module can ask for attention by a name: ALL_ATTENTION_FUNCTIONS is among its globals."""
    from transformers import AttentionInterface, modeling_utils

    known = (AttentionInterface, modeling_utils, modeling_utils.ALL_ATTENTION_FUNCTIONS)
    return any(x is one for x in list(module.values()) for one in known)


def why_eager(config: Any) -> str | None:
    """Why the mask that is being asked for must be the float tensor of `eager`; None where it may be a value."""
    module = asking()
    name = module.get("__name__", "")
    own, strict = _of_module(name) if name.startswith("transformers.models.") else _look(module)
    kind: Any = type(config)
    model = _model(kind)
    if own or (model is not None and _cannot(model)):
        return "own"
    return "tensor" if strict and model is not None and _only_eager(model) else None


def say_own(config: Any) -> None:
    """Warn, once for each kind of model, that its attention is not qkv's."""
    kind = str(getattr(config, "model_type", None) or type(config).__name__)
    if kind not in _warned:
        _warned.add(kind)
        text = (
            f"qkv: the attention of {kind} is in its own code, which takes no implementation by name, so "
            "attn_implementation='qkv' changes nothing there. Its mask is that of 'eager'."
        )
        warnings.warn(text, UserWarning, stacklevel=2)


@cache
def _of_module(name: str) -> tuple[bool, bool]:
    return _look(vars(sys.modules[name]))


def _look(module: dict[str, Any]) -> tuple[bool, bool]:
    """(it has attention, and none by name; a part of it needs masks that are tensors)"""
    name = module.get("__name__", "")
    if takes_attention_by_name(module):
        return False, name in sys.modules and bool(_NEEDS_A_TENSOR.search(_source(name)))
    own = (x for x in list(module.values()) if isinstance(x, type) and x.__module__ == name)
    return any(issubclass(x, nn.Module) and "Attention" in x.__name__ for x in own), False


def _source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError):  # a console, or an installation without sources
        return ""


@cache
def _model(config: type) -> Any:
    """The model's class, by its config's."""
    from transformers import MODEL_MAPPING

    try:
        found = MODEL_MAPPING.get(config, None)
    except (
        AttributeError,
        ImportError,
        KeyError,
        ValueError,
    ):  # what it needs is not installed, or it has no such class
        return None
    return found[0] if isinstance(found, (tuple, list)) else found


@cache
def _cannot(model: Any) -> bool:
    """Whether transformers finds, in the source of the model, that its attention cannot be set."""
    return bool(_source(model.__module__)) and not model._can_set_attn_implementation()


def is_only_eager(layer: Any) -> bool:
    """Whether a layer is of models that no implementation serves but `eager`: there, no mask hides nothing."""
    name = type(layer).__module__
    return name.startswith("transformers.models.") and _all_only_eager(name)


@cache
def _all_only_eager(name: str) -> bool:
    from transformers import PreTrainedModel

    own = [x for x in list(vars(sys.modules[name]).values()) if isinstance(x, type) and x.__module__ == name]
    models = [x for x in own if issubclass(x, PreTrainedModel)]
    return bool(models) and all(map(_only_eager, models))


def _only_eager(model: Any) -> bool:
    """Whether the model's class says that no implementation serves it but `eager`, which has float masks."""
    return not any(getattr(model, f"_supports_{name}", True) for name in ("sdpa", "flash_attn", "flex_attn"))
