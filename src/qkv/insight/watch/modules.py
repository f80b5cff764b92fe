"""The parts of a model by their names, and those that look like attention."""

from __future__ import annotations

import re

from torch import nn

_LOOKS = re.compile(r"attention|attn", re.IGNORECASE)


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules, by the names that their author knows: torch.compile puts a module around what it compiles."""
    return [
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip("."), module)
        for name, module in model.named_modules()
    ]


def compiled(model: nn.Module) -> list[str]:
    """The names of what torch.compile has made of modules."""
    found = [
        name
        for name, module in named(model)
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]
    return list(dict.fromkeys(found))


def like_attention(model: nn.Module) -> list[str]:
    """The modules that look like attention by the names of their classes, the outermost of each."""
    found: list[str] = []
    for name, module in named(model):
        if _LOOKS.search(type(module).__name__) and not any(name.startswith(f"{n}.") for n in found if n):
            found.append(name)
    return found


def within(seen: set[str], name: str) -> bool:
    """Whether a call was met in the module, or in one around it that calls a fused function."""
    return any(not one or one == name or one.startswith(f"{name}.") or name.startswith(f"{one}.") for one in seen)
