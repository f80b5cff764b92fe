"""Checkpoints in parts: a directory that several processes write and read together, by torch.distributed.checkpoint.

    DIR/checkpoint.json              what the checkpoint says of itself, and which folder holds its tensors
    DIR/step-000250/shard-*.safetensors     of each rank that wrote it, what that rank had

The text is replaced whole, once all tensors of a step are on disk, and then earlier folders go: a run that is killed
leaves the step before. PyTorch's own files describe their contents by pickle; these are safetensors, and nothing in
them runs when they are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.errors import ArgumentError, QKVError, UnsupportedError

FORMAT = "qkv decoder 1, in parts"
INDEX = "checkpoint.json"
_FOLDER = re.compile(r"step-\d+(-again)?")
_FIX = "Name a directory that qkv train wrote"


def need_safetensors() -> None:
    """Raise UnsupportedError where the package is missing."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        rule, fix = "checkpoints are safetensors files", "Use pip install safetensors"
        raise UnsupportedError.of("qkv train", rule, "a Python without safetensors", fix) from None


def check_target(path: Path, may_exist: bool) -> None:
    """Refuse, before any work is done, a path that no checkpoint in parts could or should be written to."""
    need_safetensors()
    if path.exists() and not path.is_dir():
        fix = "Name a directory with --out; one process goes on writing the file"
        raise ArgumentError.of("qkv train", "several ranks write a directory", f"the file {str(path)!r}", fix)
    if path.is_dir() and not (may_exist and (path / INDEX).is_file()) and any(path.iterdir()):
        rule, fix = "a directory is not overwritten by a new run", f"Continue it with --resume {path}, or name another"
        raise ArgumentError.of("qkv train", rule, repr(str(path)), fix)
    if not os.access(path if path.is_dir() else path.parent, os.W_OK):
        fix = "Name a directory in one that exists and that you may write"
        raise ArgumentError.of("qkv train", "the checkpoint cannot be written", repr(str(path)), fix)


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    *,
    group: Any = None,
    first: bool = True,
    together: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> None:
    """Write a checkpoint; it is replaced whole or not at all.

    Parameters
    ----------
    path : Path
        The directory; made where there is none.
    tensors : mapping of names to tensors
        DTensors of which every rank writes its own part, or tensors that all ranks have.
    notes : mapping
        What can be JSON.
    group : ProcessGroup
        The ranks that write together, each calling this; None for one process.
    first : bool
        Whether this one sees to the directory.
    together : function
        Calls the function that it is given on every rank, and returns once all have; an error on one is one on all.

    Raises
    ------
    ArgumentError
        If a part cannot be written.
    RankError
        If that is so on another rank.
    UnsupportedError
        If safetensors is not installed.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    fix = "Name a directory that all ranks may write"

    def begin() -> Path:
        need_safetensors()
        name = f"step-{int(notes['step']):06d}"
        folder = path / (f"{name}-again" if _folder_of(path) == name else name)
        with _refused(path, "written", fix):
            if first:
                path.mkdir(exist_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
        return folder

    def end() -> None:
        with _refused(path, "written", fix):
            text = {"format": FORMAT, "tensors": folder.name, "notes": dict(notes)}
            _replace(path / INDEX, json.dumps(text, sort_keys=True))
            for old in path.iterdir():
                if _FOLDER.fullmatch(old.name) and old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    folder = together(begin)
    with _refused(path, "written", fix):
        owned = {key: t.detach() for key, t in tensors.items()}
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save_parts(owned, storage_writer=writer, process_group=group, no_dist=group is None)
    together(end if first else lambda: None)


def notes_of(path: Path) -> dict[str, Any]:
    """What a checkpoint in parts says of itself.

    Raises
    ------
    ArgumentError
        If the directory holds none.
    """
    return _index(path)[1]


def fill(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    group: Any = None,
    together: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> None:
    """Read a checkpoint into tensors, or into the parts of DTensors that this rank has.

    Parameters
    ----------
    path, group, together
        As for `save`; the number of ranks may be another one.
    tensors : mapping of names to tensors
        All that the checkpoint must hold, and no more.

    Raises
    ------
    ArgumentError
        For a missing or unknown tensor, one of another shape or dtype, one with a part missing, or broken files; the
        first three before anything is read.
    UnsupportedError
        If safetensors is not installed.
    """
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = together(lambda: check(path, tensors))
    with _refused(path, "read", _FIX):
        load_parts(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)


def check(path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """What reads the tensors; an error, as of `fill`, where the checkpoint does not hold them."""
    reader, known = _reader(path)
    if set(known) != set(tensors):
        missing, unknown = sorted(set(tensors) - set(known)), sorted(set(known) - set(tensors))
        given = f"{path} with missing {missing[:3]} and unknown {unknown[:3]}"
        raise _unfit("a checkpoint must hold exactly the tensors of its run", given)
    for name, target in tensors.items():
        if known[name] != (target.shape, target.dtype):
            given = f"{name} {tuple(known[name][0])} {known[name][1]}"
            raise _unfit(f"{name} must be {tuple(target.shape)} {target.dtype}", given)
    return reader


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint in parts, whole, and its notes.

    Raises
    ------
    ArgumentError
        If the directory holds none, or a broken one.
    UnsupportedError
        If safetensors is not installed.
    """
    known = _reader(path)[1]
    tensors = {name: torch.empty(size, dtype=dtype, device="cpu") for name, (size, dtype) in known.items()}
    fill(path, tensors)
    return tensors, notes_of(path)


def _reader(path: Path) -> tuple[Any, dict[str, tuple[torch.Size, torch.dtype]]]:
    """What reads the tensors, and the size and dtype of each; an error where a part of one is missing."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    need_safetensors()
    folder = path / _index(path)[0]
    with _refused(path, "read", _FIX):
        reader = HuggingFaceStorageReader(str(folder))
        held: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    known = {}
    for name, entry in held.items():
        numbers, wanted = sum(_numbers(chunk.sizes) for chunk in entry.chunks), _numbers(entry.size)
        if numbers != wanted:
            given = f"{folder}, {numbers} of the {wanted} numbers of {name}"
            raise ArgumentError.of("qkv train", "all parts of a checkpoint must be there", given, _FIX)
        known[name] = (entry.size, entry.properties.dtype)
    return reader, known


def _numbers(size: Iterable[int]) -> int:
    count = 1
    for n in size:
        count *= n
    return count


def _index(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of the folder of tensors, and the notes."""
    if not (path / INDEX).is_file():
        raise ArgumentError.of("qkv train", "no such checkpoint", f"{str(path)!r} without {INDEX}", _FIX)
    try:
        text = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if text["format"] != FORMAT or not _FOLDER.fullmatch(text["tensors"]) or not isinstance(text["notes"], dict):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"{INDEX} must say format={FORMAT!r}, a folder of tensors, and hold notes"
        raise ArgumentError.of("qkv train", rule, f"{path} ({type(error).__name__}: {error})", _FIX) from None
    return text["tensors"], text["notes"]


def _folder_of(path: Path) -> str | None:
    try:
        return _index(path)[0]
    except QKVError:
        return None


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextmanager
def _refused(path: Path, what: str, fix: str) -> Iterator[None]:
    """Errors of files and of PyTorch's checkpoints as ours."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # one process is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.9's writer asks for one
            yield
    except CheckpointException as error:
        told = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise ArgumentError.of("qkv train", f"the checkpoint cannot be {what}", f"{path} ({told})", fix) from None
    except (OSError, ValueError, KeyError, AssertionError, SafetensorError) as error:
        given = f"{path} ({type(error).__name__}: {error})"
        raise ArgumentError.of("qkv train", f"the checkpoint cannot be {what}", given, fix) from None


def _unfit(rule: str, given: str) -> ArgumentError:
    fix = "Use the settings that the checkpoint was made with (qkv train --resume reads them from it)"
    return ArgumentError.of("qkv train", rule, given, fix)
