"""README's layer under `patch_sdpa`, beside itself without: `python benchmarks/patched_layer.py`.

`torch.nn.TransformerEncoderLayer(256, 8, batch_first=True)`, in training (forward and backward, dropout 0.1, as the
layer is made) and in evaluation (inference mode, where PyTorch alone takes its fused path). Each round runs both once,
in an order that changes; what is compared is the processor's time of a round's two runs, which neighbours on the
machine disturb less than the wall's. A ratio below 1 means that the patched layer took less.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch

import qkv.compat

SIZES = ((8, 32), (2, 64), (4, 256), (2, 1024))  # batch, tokens


def step(layer: torch.nn.Module, x: torch.Tensor, *, train: bool) -> None:
    """One run of the layer, with its gradients in training."""
    if train:
        layer(x).sum().backward()
    else:
        with torch.inference_mode():
            layer(x)


def seconds(run: Callable[[], None], patched: bool, times: int) -> float:
    """The processor's time of some runs."""
    with qkv.compat.patch_sdpa() if patched else contextlib.nullcontext():
        start = time.process_time()
        for _ in range(times):
            run()
        return time.process_time() - start


def paired(run: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Medians: milliseconds of the plain and of the patched run, and their ratio round by round."""
    for patched in (False, True):
        seconds(run, patched, 2)
    times = max(1, round(0.05 / max(seconds(run, False, 1), 1e-4)))
    plain, ours = [], []
    for turn in range(rounds):
        for patched in (False, True) if turn % 2 else (True, False):
            (ours if patched else plain).append(seconds(run, patched, times) / times)
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    return statistics.median(plain) * 1e3, statistics.median(ours) * 1e3, ratio


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {given.threads} threads, processor time, medians of {given.rounds} rounds")
    print("| mode | batch × tokens | PyTorch, ms | patched, ms | ratio |\n|---|---:|---:|---:|---:|")
    for train in (True, False):
        layer = torch.nn.TransformerEncoderLayer(256, 8, batch_first=True).train(train)
        for batch, tokens in SIZES:
            x = torch.randn(batch, tokens, 256)
            plain, ours, ratio = paired(lambda x=x, layer=layer, train=train: step(layer, x, train=train), given.rounds)
            name = "train" if train else "eval"
            print(f"| {name} | {batch} × {tokens:,} | {plain:.3g} | {ours:.3g} | {ratio:.2f} |", flush=True)
    with qkv.compat.patch_sdpa() as patched:
        step(torch.nn.TransformerEncoderLayer(256, 8, batch_first=True), torch.randn(2, 64, 256), train=True)
    print(f"\none training step: {patched}")


if __name__ == "__main__":
    main()
