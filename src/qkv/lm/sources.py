"""What can be looked at: a file's tensors, a layer of the model that ships or of a local folder's, of any model."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.call.keys import KVView
from qkv.call.problem import Options
from qkv.call.watchers import WATCHERS
from qkv.errors import ArgumentError, QKVError, UnsupportedError
from qkv.insight import npy
from qkv.lm.generation import load

_CALL = "qkv see"


class Captured(NamedTuple):
    """What `attention` was called with."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: Options
    tokens: tuple[str, ...] | None


def captured(run: Callable[[], Any], layer: int, tokens: tuple[str, ...] | None = None) -> Captured:
    """Run a model, and return the call of attention number `layer` of those that it makes on plain tensors.

    Other calls' tensors are not kept; of a negative number those of the last few are.
    """
    kept: dict[int, Captured] = {}
    count = 0

    def tell(via: str, q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> None:
        nonlocal count
        if isinstance(k, KVView):
            return
        if layer < 0 or count == layer:
            kept[count] = Captured(q, k, v, mask, options, tokens)
            kept.pop(count + layer if layer < 0 else -1, None)
        count += 1

    WATCHERS.append(tell)
    try:
        with torch.no_grad():
            run()
    finally:
        WATCHERS.remove(tell)
    found = kept.get(layer if layer >= 0 else count + layer)
    if found is None:
        fix = f"Use --layer 0 to {count - 1}" if count else "It may run attention without qkv"
        raise ArgumentError.of(_CALL, "the model must have that layer", f"layer {layer} of {count} calls", fix)
    return found


def shipped(prompt: str, layer: int) -> Captured:
    """A layer of the model that ships, which reads bytes."""
    model = load()
    data = prompt.encode()[-model.config.context :]
    if not data:
        raise ArgumentError.of(_CALL, "a prompt has at least one letter", repr(prompt), "Pass --prompt TEXT")
    tokens = tuple(chr(byte) if byte < 128 else f"<{byte:02x}>" for byte in data)
    return captured(lambda: model(torch.tensor([list(data)])), layer, tokens)


def hugging_face(folder: Path, prompt: str, layer: int) -> Captured:
    """A layer of a model of transformers from a local folder, run on qkv; nothing is downloaded."""
    try:
        import transformers

        import qkv.integrations.transformers as integration
    except (ImportError, QKVError) as error:
        fix = "pip install transformers, or save q, k and v to a file"
        raise UnsupportedError.of(_CALL, "a model's folder needs transformers", str(error), fix) from error
    integration.register()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="qkv")
    except (OSError, ValueError, KeyError, ImportError) as error:
        fix = "Give the folder that save_pretrained() wrote, with its tokenizer"
        told = str(error).strip().split("\n")[0][:200]
        raise ArgumentError.of(_CALL, "the folder must hold a model and its tokenizer", told, fix) from error
    encoded = tokenizer(prompt, return_tensors="pt")
    tokens = tuple(tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist()))
    known = {
        name: value for name, value in encoded.items() if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    return captured(lambda: model.eval()(**known), layer, tokens)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if path.suffix == ".npz":
        try:
            return npy.read_all(path)
        except (ValueError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
            fix = "Write it with numpy.savez(file, q=q, k=k, v=v), as float16, float32 or float64"
            raise ArgumentError.of(
                _CALL, "the file must be an .npz of plain numbers", f"{path} ({error})", fix
            ) from error
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            rule, fix = "a .safetensors file needs safetensors", "pip install safetensors, or save an .npz"
            raise UnsupportedError.of(_CALL, rule, str(error), fix) from error
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            fix = "Write it with safetensors.torch.save_file"
            raise ArgumentError.of(_CALL, "the file must be safetensors", f"{path} ({error})", fix) from error
    fix = "Give a .safetensors, .npz or .json file, or a model's folder"
    raise ArgumentError.of(_CALL, "SOURCE ends in .safetensors, .npz or .json", repr(str(path)), fix)
