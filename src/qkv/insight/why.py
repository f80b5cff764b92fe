"""`qkv.why(topic)`: the questions that everyone asks about attention, each answered by a small experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.insight.answer import Answer
from qkv.insight.given import given
from qkv.insight.topics import TOPICS, meant
from qkv.insight.trained import trained
from qkv.masks import Mask

_CALL = "qkv.why()"


def why(
    topic: str,
    *,
    seed: int = 0,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    positions: str | int | Sequence[int] | Tensor | None = None,
    scale: float | None = None,
    head: int | None = None,
    batch: int = 0,
) -> Answer:
    """Run the experiment that answers a question about attention, and return what it found.

    Every number is computed by this call, in well under a second, and the verdict is derived from the numbers: where
    they come out the other way it says so. Stored is only what `trained` says: what the same change cost small models
    that were trained (docs/training.md). `qkv why` lists the questions. The topics, those marked * on your own tensors
    where you pass them::

        the lookup        lookup, softmax, names, cross
        shapes            shapes, softmax-axis, order*
        which is which    same-qk, reformer, projections
        scale             scale*, gradient*
        masks             causal, mask-polarity, mask-alignment*, dead-rows*
        heads             heads*, thin-heads, split-heads
        sharing keys      kv-cache, gqa*, latent
        long inputs       long-context*, sink*, sparse
        speed and memory  cost, flash*, paged
        reading weights   explanation*

    Parameters
    ----------
    topic : str
        One of the names above.
    seed : int
        Seed of the experiment's own random generator; torch's global generator is neither used nor changed.
    q : Tensor, shape (B, Hq, Lq, D)
        Your queries, with k; without tensors the experiment makes its own.
    k : Tensor, shape (B, Hkv, Lk, D)
    v : Tensor, shape (B, Hkv, Lk, Dv)
        Needed by "order", "gqa", "flash" and "explanation".
    mask, positions, scale
        As in `attention`.
    head : int
        The query head that is looked at; all of them by default (one row of the first, where a row is followed).
    batch : int
        The batch row that is looked at.

    Returns
    -------
    Answer
        Fields topic, question, numbers, picture, verdict, sources, trained, short, data; `print` it to read it.

    Raises
    ------
    ArgumentError
        For a topic that does not exist (the message lists those that do), a seed outside 0 .. 2**63 - 1, and tensors
        for a topic that takes none.
    ArgumentTypeError
        For a topic that is not a string, a seed that is not an integer, or a tensor that the topic needs and has not.
    ShapeError
        Tensors whose sizes do not fit together.

    Notes
    -----
    Of your tensors at most 256 rows of a head are looked at, evenly spaced, and fewer (16 at least) of long inputs, one
    head at a time.

    Examples
    --------
    >>> import torch, qkv
    >>> answer = qkv.why("lookup")
    >>> answer.question
    'What do queries, keys and values do?'
    >>> [round(w, 4) for w in answer.numbers["weight on the right key"]]
    [0.0625, 0.1534, 0.33, 0.7845, 0.995, 1.0]

    On your own tensors:

    >>> q = k = torch.zeros(1, 2, 4, 8)
    >>> qkv.why("dead-rows", q=q, k=k, mask=~qkv.causal()).numbers["rows that see no key"]
    2.0
    """
    names = ", ".join(f'"{name}"' for name in TOPICS)
    if not isinstance(topic, str):
        rule = "topic must be a string"
        raise ArgumentTypeError.of(_CALL, rule, f"a {type(topic).__name__}", f"Use one of {names}")
    if topic not in TOPICS:
        near = " or ".join(f'"{name}"' for name in meant(topic))
        fix = f"Did you mean {near}? Use one of {names}" if near else f"Use one of {names}"
        raise ArgumentError.of(_CALL, "no such topic", repr(topic), fix)
    seed = integer(_CALL, "seed", seed, high=2**63 - 1)
    tensors = {"q": q, "k": k, "v": v, "mask": mask, "positions": positions, "scale": scale, "head": head}
    passed = {name: value for name, value in tensors.items() if value is not None}
    experiment = import_module(f"qkv.insight.experiments.{TOPICS[topic].module}")
    with torch.device("cpu"):  # whatever the program's default is: the numbers are those of the page
        if passed or batch:
            return _on(topic, experiment, passed, batch)
        answer: Answer = experiment.run(seed)
    return replace(answer, trained=trained(topic), data=f"seed {seed}")


def _on(topic: str, experiment: Any, passed: dict[str, Any], batch: int) -> Answer:
    """The same experiment on the caller's tensors."""
    needs = TOPICS[topic].needs
    told = ", ".join(passed) or f"batch={batch}"
    if not needs:
        takers = ", ".join(f'"{name}"' for name, other in TOPICS.items() if other.needs)
        fix = f"Leave them out, or ask one of {takers}"
        raise ArgumentError.of(_CALL, f'"{topic}" makes its own tensors and takes none', told, fix)
    if "v" in needs and passed.get("v") is None:
        raise ArgumentTypeError.of(_CALL, f'"{topic}" measures outputs, so it needs v', told, "Pass v= as well")
    mine = given(_CALL, passed, batch)
    answer: Answer = experiment.on(mine)
    return replace(answer, data=str(mine))
