"""What a call's weights come to, row by row and key by key, without the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Wanted(NamedTuple):
    """What is to be found beyond lse, score, weight and entropy, which the softmax gives away."""

    top: int = 0
    """Keys of each row's largest weights."""
    mass: bool = False
    """What each key receives from all rows."""
    bins: tuple[int, int] | None = None
    """Rows and columns of the pooled map: at most Lq and Lk."""
    distance: bool = False
    progress: Callable[[float], None] | None = None
    """Called now and then, from any thread, with the part that is done, from 0 to 1."""

    @property
    def weights(self) -> bool:
        """Whether weights are needed, which are known only when a row's keys have all been seen: a second pass."""
        return self.top > 0 or self.mass or self.bins is not None or self.distance


class Statistics(NamedTuple):
    """What the weights p of a call come to; H query heads, numbers in the accumulation dtype unless said.

    Weights are those before dropout. A row that is NaN is NaN in everything of its own, has keys of -1, and adds
    nothing to `mass` and `map`.
    """

    lse: Tensor
    """(B, H, Lq), as `attention` returns it."""
    score: Tensor
    """(B, H, Lq): the largest visible score, scale, softcap and bias included; -inf where nothing is visible."""
    weight: Tensor
    """(B, H, Lq): the largest weight of a key; 0 where nothing is visible."""
    entropy: Tensor
    """(B, H, Lq): nats; a learned sink is one more outcome. 0 where nothing is visible."""
    distance: Tensor | None = None
    """(B, H, Lq): sum_j p_ij |p_i - j| / sum_j p_ij, in tokens; 0 where nothing is visible."""
    top_keys: Tensor | None = None
    """int64 (B, H, Lq, top): the keys of the largest scores, the largest first, of equal ones the lower key first;
    -1 past those that are visible."""
    top_weights: Tensor | None = None
    """(B, H, Lq, top): their weights."""
    mass: Tensor | None = None
    """float64 (B, H, Lk): sum_i p_ij, what key j receives."""
    map: Tensor | None = None
    """float64 (B, H, rows, columns): p summed over bins; query i is in row i * rows // Lq, key j in column
    j * columns // Lk."""
