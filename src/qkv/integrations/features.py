"""What qkv needs of the installed transformers: features, whatever the version is called."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

# (what it is, its module, its name, parameters that it must have)
_NEEDED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("attention by name", "transformers", "AttentionInterface", ()),
    ("masks by name", "transformers", "AttentionMaskInterface", ()),
    ("the table of attention functions", "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", ()),
    (
        "a class that says whether its attention can be set",
        "transformers.modeling_utils",
        "PreTrainedModel._can_set_attn_implementation",
        (),
    ),
    ("masks of chosen lengths", "transformers.masking_utils", "sdpa_mask", ("q_length", "q_offset", "use_vmap")),
    ("the float mask of eager", "transformers.masking_utils", "eager_mask", ("q_length", "q_offset", "dtype")),
    ("masks of encoders", "transformers.masking_utils", "create_bidirectional_mask", ()),
    ("caches of layers", "transformers.cache_utils", "DynamicLayer.update", ()),
)


def features() -> dict[str, bool]:
    """What is needed, by its name in transformers, and whether the installed release has it.

    >>> from qkv.integrations.transformers import features
    >>> all(features().values())
    True
    """
    return {f"{module}.{name} ({what})": _has(module, name, given) for what, module, name, given in _NEEDED}


def _has(module: str, name: str, parameters: tuple[str, ...]) -> bool:
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return not parameters or set(parameters) <= set(inspect.signature(found).parameters)
    except (AttributeError, ImportError):
        return False
