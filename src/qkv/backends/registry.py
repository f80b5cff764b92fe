"""Where each backend lives. Nothing is imported before its first use."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from qkv.backends.base import Backend
from qkv.backends.isas import ISAS

_PLACES = {
    "reference": ("qkv.backends.reference", "ReferenceBackend"),
    "tiled": ("qkv.backends.tiled.forward", "TiledBackend"),
    "sdpa": ("qkv.backends.sdpa", "SdpaBackend"),
    "cpu": ("qkv.backends.cpu", "CpuBackend"),
}
NAMES = (*_PLACES, *(f"cpu:{isa}" for isa in ISAS))


@cache
def load(name: str) -> Backend:
    """The backend called `name`, one of NAMES."""
    base, _, isa = name.partition(":")
    module, attribute = _PLACES[base]
    factory = getattr(import_module(module), attribute)
    backend: Backend = factory(isa=isa) if isa else factory()
    return backend
