"""Checkpoints as safetensors: tensors and a text of metadata, nothing that could run when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv._torch import is_distributed
from qkv.errors import ArgumentError
from qkv.lm import parts

FORMAT = "qkv decoder 1"


@dataclass(frozen=True)
class Saved:
    """What a file holds: tensors by name, and what was written beside them (plain JSON)."""

    path: Path
    tensors: dict[str, Tensor]
    notes: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with `prefix.`, under the rest of their names."""
        start = f"{prefix}."
        return {name[len(start) :]: t for name, t in self.tensors.items() if name.startswith(start)}


def check_target(path: Path, may_exist: bool) -> None:
    """Refuse, before any work is done, a path that a checkpoint could not or should not be written to."""
    _safetensors("save_file")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fix = "Name a file in a directory that exists and that you may write"
        raise ArgumentError.of("qkv train", "the checkpoint cannot be written", repr(str(path)), fix)
    if path.exists() and not may_exist:
        rule, fix = "a file is not overwritten by a new run", f"Continue it with --resume {path}, or name another"
        raise ArgumentError.of("qkv train", rule, repr(str(path)), fix)


def save(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file is replaced whole or not at all.

    Raises
    ------
    UnsupportedError
        If safetensors is not installed.
    ArgumentError
        If the file cannot be written.
    """
    from_package = _safetensors("save_file")
    # safetensors refuses tensors that share memory (a tied head, a view): each name gets its own bytes
    owned = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    beside = path.with_name(f"{path.name}.part")
    try:
        from_package(owned, beside, metadata={"format": FORMAT, "notes": json.dumps(dict(notes), sort_keys=True)})
        beside.chmod(0o644)  # safetensors writes files that only their owner may read
        os.replace(beside, path)
    except (OSError, _error()) as error:
        fix = "Name a file in a directory that exists and that you may write"
        raise ArgumentError.of("qkv train", "the checkpoint cannot be written", f"{path} ({error})", fix) from None


def load(path: str | Path) -> Saved:
    """Read a checkpoint, a file or in parts; pickles, other safetensors and broken files are refused.

    Raises
    ------
    UnsupportedError
        If safetensors is not installed.
    ArgumentError
        If there is no such file, or it is not a checkpoint of this program.
    """
    opened = _safetensors("safe_open")
    if Path(path).is_dir():
        return Saved(Path(path), *parts.load(Path(path)))
    fix = "Name a file that qkv train wrote"
    if not Path(path).is_file():
        raise ArgumentError.of("qkv train", "no such checkpoint", repr(str(path)), fix)
    try:
        with opened(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        notes = json.loads(metadata["notes"]) if metadata.get("format") == FORMAT else None
    except (OSError, ValueError, KeyError, _error()) as error:
        rule = "a checkpoint is a safetensors file (pickles are never read)"
        raise ArgumentError.of("qkv train", rule, f"{path} ({error})", fix) from None
    if not isinstance(notes, dict):
        rule = f"the metadata of a checkpoint must say format={FORMAT!r} and hold notes"
        raise ArgumentError.of("qkv train", rule, f"{path}, metadata {sorted(metadata)}", fix)
    return Saved(Path(path), tensors, notes)


def copy_exactly(saved: Saved, prefix: str, wanted: Mapping[str, Tensor]) -> None:
    """Copy the tensors under `prefix` into those given; a half type may fill a float32, nothing else is converted.

    Raises
    ------
    ArgumentError
        For a missing or unknown tensor, or one of another shape or dtype; then nothing was copied.
    """
    found = saved.part(prefix)
    if set(found) != set(wanted):
        missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        given = f"{saved.path} with missing {missing[:3]} and unknown {unknown[:3]}"
        raise _unfit(f"a checkpoint must hold exactly the model's tensors under {prefix!r}", given)
    for name, target in wanted.items():
        source = found[name]
        half = target.dtype == torch.float32 and source.dtype in (torch.bfloat16, torch.float16)
        if source.shape != target.shape or not (source.dtype == target.dtype or half):
            given = f"{prefix}.{name} {tuple(source.shape)} {source.dtype}"
            raise _unfit(f"{prefix}.{name} must be {tuple(target.shape)} {target.dtype}", given)
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(_as_divided(found[name], target))


def _as_divided(source: Tensor, target: Tensor) -> Tensor:
    """What a rank has of the source, where the target is divided among ranks; each of them has read all of it."""
    if not is_distributed(target):
        return source
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(source.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None)


def _unfit(rule: str, given: str) -> ArgumentError:
    fix = "Use the settings that the checkpoint was made with (qkv train --resume reads them from it)"
    return ArgumentError.of("qkv train", rule, given, fix)


def _safetensors(name: str) -> Any:
    parts.need_safetensors()
    import safetensors
    import safetensors.torch

    return getattr(safetensors if name == "safe_open" else safetensors.torch, name)


def _error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
