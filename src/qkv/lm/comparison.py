"""Training steps of several decoders, timed in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qkv.lm.decoder import BYTES, Config, Decoder


def step_times(
    configs: Mapping[str, Config], batch: int, rounds: int = 15, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Time training steps (forward, backward, update) of several decoders in turn.

    A round gives each one step on the same random bytes, A B C, the next C B A; two untimed rounds come first.

    Parameters
    ----------
    configs : mapping of names to Config
        All of one context, which is the length of the windows.
    batch : int
        Windows a step.
    rounds : int
        At most; at least two.
    seconds : float
        Once these are over, no further round begins.

    Returns
    -------
    dict of lists
        Milliseconds by name, one for each round: compare within a round.
    """
    context = next(iter(configs.values())).context
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(BYTES, (batch, context + 1), generator=rng)
    steps = {name: _step(config, tokens) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for turn in range(-2, rounds):
        if turn >= 2 and time.perf_counter() > end:
            break
        for name in steps if turn % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _step(config: Config, tokens: Tensor) -> Callable[[], None]:
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
