"""The questions of `qkv.why`, in the order in which a learner meets them."""

from __future__ import annotations

import difflib
from typing import NamedTuple


class Topic(NamedTuple):
    """Where an experiment is, and what it settles."""

    module: str  # of qkv.insight.experiments
    about: str  # the question in a few words
    needs: str = ""  # of the caller's tensors: "qk", "qkv", or none can be taken


GROUPS: dict[str, dict[str, Topic]] = {
    "the lookup": {
        "lookup": Topic("lookup", "What do queries, keys and values do?"),
        "softmax": Topic("softmax", "Why a softmax, and not each score's share of their sum?"),
        "names": Topic("names", "Which one is Q, which K, which V, in which field's words?"),
        "cross": Topic("cross", "Two sequences: whose length does the output have?"),
    },
    "shapes": {
        "shapes": Topic("shapes", "A sentence walked from x to the output, every matrix"),
        "softmax-axis": Topic("softmax_axis", "Over which axis does the softmax run?"),
        "order": Topic("order", "Does attention see word order? What do rotations change?", "qkv"),
    },
    "which is which": {
        "same-qk": Topic("same_qk", "Why are a query and a key two different things?"),
        "reformer": Topic("reformer", "Then why can Reformer share Q and K?"),
        "projections": Topic("projections", "What do W_Q, W_K and W_V buy, what does folding cost?"),
    },
    "scale": {
        "scale": Topic("scale", "Why divide by √d, and not by nothing or by d?", "qk"),
        "gradient": Topic("gradient", "Vanishing gradients without the scale: true or false?", "qk"),
    },
    "masks": {
        "causal": Topic("causal", "Why may a token not see the next one?"),
        "mask-polarity": Topic("mask_polarity", "Does True keep or drop?"),
        "mask-alignment": Topic("mask_alignment", "Which keys does a causal mask show if Lq != Lk?", "qk"),
        "dead-rows": Topic("dead_rows", "What comes out of a row that sees no key?", "qk"),
    },
    "heads": {
        "heads": Topic("heads", "Why many heads, not one big one?", "qk"),
        "thin-heads": Topic("thin_heads", "How thin may a head be?"),
        "split-heads": Topic("split_heads", "Splitting heads: view then transpose, or a reshape?"),
    },
    "sharing keys": {
        "kv-cache": Topic("kv_cache", "Why are keys and values kept, and queries not?"),
        "gqa": Topic("gqa", "What do grouped and multi-query attention share?", "qkv"),
        "latent": Topic("latent", "How can 576 numbers stand for 128 heads?"),
    },
    "long inputs": {
        "long-context": Topic("long_context", "Why does a long input blur the lookup?", "qk"),
        "sink": Topic("sink", "Why do heads stare at the first token?", "qk"),
        "sparse": Topic("sparse", "What is lost if a token sees a few others only?"),
    },
    "speed and memory": {
        "cost": Topic("cost", "What does a layer cost: is it the n² of attention?"),
        "flash": Topic("flash", "How can a softmax be exact, a tile at a time?", "qkv"),
        "paged": Topic("paged", "Do pages make attention faster?"),
    },
    "reading weights": {
        "explanation": Topic("explanation", "Is a large weight an explanation?", "qkv"),
    },
}

TOPICS: dict[str, Topic] = {name: topic for group in GROUPS.values() for name, topic in group.items()}

# What else these questions are asked as.
_MEANT = {
    "alignment": "mask-alignment", "attention": "lookup", "axis": "softmax-axis", "bottleneck": "thin-heads",
    "cache": "kv-cache", "caratheodory": "explanation", "cross-attention": "cross", "dead": "dead-rows",
    "decode": "kv-cache", "dictionary": "lookup", "dim": "softmax-axis", "entropy": "long-context",
    "flash-attention": "flash", "future": "causal", "gradients": "gradient", "grouped-query": "gqa",
    "head-split": "split-heads", "importance": "explanation", "kv": "kv-cache", "long": "long-context",
    "mask": "causal", "masked": "causal", "memory": "flash", "mha": "heads", "mla": "latent", "mqa": "gqa",
    "multi-head": "heads", "multi-query": "gqa", "nan": "dead-rows", "page": "paged", "paged-attention": "paged",
    "permutation": "order", "polarity": "mask-polarity", "positions": "order", "qkv": "names", "query": "names",
    "reshape": "split-heads", "rope": "order", "rotary": "order", "self-attention": "lookup", "shape": "shapes",
    "shared-qk": "reformer", "sinks": "sink", "sliding-window": "sparse",
    "sqrt": "scale", "temperature": "scale", "transpose": "split-heads", "tied": "same-qk",
    "quadratic": "cost", "flops": "cost", "exp": "softmax",
    "vanishing": "gradient", "view": "split-heads", "weights": "explanation", "window": "sparse",
}  # fmt: skip


def meant(name: str) -> list[str]:
    """The topics that a name which is none of them may stand for, the likeliest first; at most three.

    >>> meant("rope"), meant("grdient"), meant("scales")
    (['order'], ['gradient'], ['scale'])
    """
    asked = name.strip().lower().replace("_", "-").replace(" ", "-")
    if asked in TOPICS or asked in _MEANT:
        return [_MEANT.get(asked, asked)]
    near = difflib.get_close_matches(asked, [*TOPICS, *_MEANT], n=3, cutoff=0.7)
    return list(dict.fromkeys(_MEANT.get(word, word) for word in near))
