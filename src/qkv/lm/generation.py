"""What the shipped model writes after a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qkv.errors import ArgumentError, UnsupportedError
from qkv.lm import checkpoint, training
from qkv.lm.decoder import Decoder
from qkv.lm.serving import one_thread, pick

SHIPPED = Path(__file__).with_name("model") / "reference.safetensors"


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model wrote after it."""

    prompt: str
    text: str  # bytes that are no UTF-8 stand as the replacement character
    bits: float  # mean surprise of the model at the prompt's own bytes after the first, bits per byte (nan if none)


def continue_prompt(
    prompt: str, length: int = 200, *, temperature: float = 0.7, seed: int = 0, path: Path | None = None
) -> Continuation:
    """Let the shipped model continue a prompt.

    Parameters
    ----------
    prompt : str
        At least one byte; the model sees at most its context of the last bytes.
    length : int
        Bytes to write.
    temperature : float
        0 takes the likeliest byte each time; 1 samples from the model's own probabilities.
    seed : int
        Of the sampling; the same call writes the same text.
    path : Path
        Another checkpoint or export of `qkv train`.

    Raises
    ------
    ArgumentError
        For an empty prompt, a negative length or temperature.
    UnsupportedError
        If this installation carries no model, or safetensors is not installed.

    Notes
    -----
    Cost: a pass over the prompt, then one over each byte written, with the others' keys and values in a cache. Past
    the model's context the window of the last bytes moves on, and each byte takes a pass over `context` bytes.
    """
    tokens = list(prompt.encode())
    if not tokens or length < 0 or not 0 <= temperature < float("inf"):
        given = f"a prompt of {len(tokens)} bytes, length={length}, temperature={temperature}"
        rule, fix = "a prompt has at least one byte, length and temperature are >= 0", "Use a word as the prompt"
        raise ArgumentError.of("qkv demo", rule, given, fix)
    model = load(path)
    rng = torch.Generator().manual_seed(seed)
    context, start = model.config.context, len(tokens)
    cache = model.cache(pages=-(-context // 16)) if model.config.caches else None
    seq = None if cache is None else cache.add()
    with torch.inference_mode(), one_thread():
        bits = _surprise(model, tokens[-context:])
        for _ in range(length):
            if cache is None or seq is None or len(tokens) > context:
                logits = model(torch.tensor([tokens[-context:]]))[0, -1]
            else:
                new = tokens[seq.length :]
                logits = model(torch.tensor([new]), cache.step([seq], T=len(new)))[0, -1]
            tokens.append(pick(logits, temperature, rng))
    return Continuation(prompt, bytes(tokens[start:]).decode(errors="replace"), bits)


def load(path: Path | None = None) -> Decoder:
    """Return the shipped model, or that of another checkpoint or export of `qkv train`.

    Raises
    ------
    UnsupportedError
        If this installation carries no model, or safetensors is not installed.
    """
    if path is None and not SHIPPED.exists():
        rule, fix = "the shipped model is part of the package", "Train one with qkv train, and pass its path"
        raise UnsupportedError.of("qkv demo", rule, f"no {SHIPPED.name}", fix)
    return training.decoder(checkpoint.load(path or SHIPPED))


def _surprise(model: Decoder, tokens: list[int]) -> float:
    if len(tokens) < 2:
        return float("nan")
    window = torch.tensor([tokens])
    return training.held_out_bits(model, iter([(window[:, :-1], window[:, 1:])]))
