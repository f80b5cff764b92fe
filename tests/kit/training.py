"""What `qkv train` is tested with: texts of a few kilobytes, a decoder of two narrow layers, a run of five steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qkv.lm import training
from qkv.lm.data import Corpus
from qkv.lm.decoder import Config

TINY: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "context": 32, "window": 8}
SETTINGS = training.Settings(steps=8, batch=4, warmup=2)


def corpus(data: bytes, held: bytes | None = None) -> Corpus:
    cut = len(data) - len(data) // 10
    train, held = (data, held) if held is not None else (data[:cut], data[cut:])
    first, last = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held))
    return Corpus("test", first, last, "0" * 64)


def letters(count: int, seed: int = 0, symbols: int = 16) -> bytes:
    return bytes(np.random.default_rng(seed).integers(97, 97 + symbols, count, dtype=np.uint8))


def trained(path: Path, kind: str = "mha") -> training.Run:
    run = training.Run(Config(attention=kind, **TINY), SETTINGS, corpus(letters(2000)))
    run.go(5, 2, lambda _: None, save=path)
    return run
