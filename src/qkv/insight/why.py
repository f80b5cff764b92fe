"""`qkv.why(topic)`: the questions that everyone asks about attention, each answered by a small experiment."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.insight.answer import Answer
from qkv.insight.trained import trained

# topic -> (module in qkv.insight.experiments, the question in a few words)
TOPICS = {
    "lookup": ("lookup", "What do queries, keys and values do? A dictionary whose == is soft"),
    "names": ("names", "Which one is Q, which is K, which is V, in which field's words?"),
    "scale": ("scale", "Why divide by the square root of d, and not by nothing or by d?"),
    "same-qk": ("same_qk", "Why are a query and a key two different things?"),
    "projections": ("projections", "What do W_Q, W_K and W_V each buy, and what does folding them cost?"),
}


def why(topic: str, *, seed: int = 0) -> Answer:
    """Run the experiment that answers a question about attention, and return what it found.

    Topics: "lookup", "names", "scale", "same-qk" and "projections". Every number is computed by this call, in well
    under a second, and the verdict is derived from the numbers. Stored is only what `trained` says: what the same
    change cost small models that were trained (docs/training.md).

    Parameters
    ----------
    topic : str
        One of the names above.
    seed : int
        Seed of the experiment's own random generator; torch's global generator is neither used nor changed.

    Returns
    -------
    Answer
        Fields topic, question, numbers, picture, verdict, sources, trained; `print` it to read it.

    Raises
    ------
    ArgumentError
        For a topic that does not exist (the message lists those that do), or a seed outside 0 .. 2**63 - 1.
    ArgumentTypeError
        For a topic that is not a string or a seed that is not an integer.

    Examples
    --------
    >>> import qkv
    >>> answer = qkv.why("lookup")
    >>> answer.question
    'What do queries, keys and values do?'
    >>> [round(w, 4) for w in answer.numbers["weight on the right key"]]
    [0.0625, 0.1534, 0.33, 0.7845, 0.995, 1.0]
    """
    names = ", ".join(f'"{name}"' for name in TOPICS)
    if not isinstance(topic, str):
        rule = "topic must be a string"
        raise ArgumentTypeError.of("qkv.why()", rule, f"a {type(topic).__name__}", f"Use one of {names}")
    if topic not in TOPICS:
        raise ArgumentError.of("qkv.why()", "no such topic", repr(topic), f"Use one of {names}")
    seed = integer("qkv.why()", "seed", seed, high=2**63 - 1)
    experiment = import_module(f"qkv.insight.experiments.{TOPICS[topic][0]}")
    with torch.device("cpu"):  # whatever the program's default is: the numbers are those of the page
        answer: Answer = experiment.run(seed)
    return replace(answer, trained=trained(topic))
