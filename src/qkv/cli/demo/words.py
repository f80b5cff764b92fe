"""The words of a text, counted: by their stems, and by pieces of four letters of the longer ones."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from qkv.cli.demo.passages import Passage

PIECE = 0.15  # what a four-letter piece counts, against a word's 1

Counts = dict[str, float]  # feature -> how often, pieces counting less

_WORD = re.compile(r"[^\W_]+")
_COMMON = frozenset(
    """
    a about an and any are as at be been but by can could did do does for from had has have how i if in
    into is it its may me my no of on or say says should so than that the their them then there these
    they this to was we were what when where which while who whom whose why will with would you your
    """.split()  # noqa: SIM905 - a list of quoted words reads worse
)
_ENDINGS = ("ingly", "edly", "ments", "ment", "ings", "ing", "ies", "ied", "ers", "er", "ed", "es", "ly", "s", "e")


def stem(word: str) -> str:
    """Cut an English word's ending off, roughly.

    >>> [stem(w) for w in ("evaluated", "evaluation", "copies", "copy", "running", "is")]
    ['evaluat', 'evaluation', 'copy', 'copy', 'run', 'is']
    """
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)] + ("y" if ending in ("ies", "ied") else "")
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def count(text: str) -> Counts:
    """Count the features of a text: stems of all but the commonest words, and pieces of the longer ones (marked "~").

    >>> sorted(count("The loop loops").items())
    [('loop', 2.0), ('~^loo', 0.15), ('~loop', 0.15), ('~oops', 0.15), ('~ops$', 0.15)]
    """
    counts: Counts = defaultdict(float)
    for word in _WORD.findall(text.lower()):
        if word in _COMMON:
            continue
        counts[stem(word)] += 1.0
        if len(word) >= 5:
            marked = f"^{word}$"
            for first in range(len(marked) - 3):
                counts["~" + marked[first : first + 4]] += PIECE
    return counts


def spellings(passages: Sequence[Passage]) -> dict[str, str]:
    """Return, for each stem, the spelling that the text uses most."""
    forms: dict[str, Counter[str]] = {}
    for passage in passages:
        for word in _WORD.findall(passage.text):
            forms.setdefault(stem(word.lower()), Counter())[word.lower()] += 1
    return {root: found.most_common(1)[0][0] for root, found in forms.items()}
