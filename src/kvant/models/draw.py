"""One draw from a row of logits on the host: the reference for draws on a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draw", "draw"]

Row = NDArray[np.float32]

_FIRST_SORTED = 64  # tokens that are sorted for top-p at first; then times as many


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw a token: ``temperature`` above 0, ``top_k`` (0 for all), then ``top_p`` of what
    that leaves, then ``min_p`` relative to the likeliest; ``uniform`` in [0, 1) decides."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def draw(row: Row, how: Draw) -> int:
    """A token drawn from the softmax of ``row [V]``, whose maximum must be finite.

    The order of the inverse distribution function is that of token ids if all tokens can be drawn,
    else the likeliest first and ties by token id.
    """
    kept, weights, mass = _likely(row, how)
    # A token is kept while the tokens before it have less than top_p of the total.
    nucleus = (weights.cumsum() - weights) < how.top_p * mass
    nucleus &= weights >= how.min_p * weights.max()
    nucleus[weights.argmax()] = True
    total = np.where(nucleus, weights, 0).cumsum()
    place = int(np.searchsorted(total, how.uniform * total[-1], side="right"))
    return int(kept[min(place, int(nucleus.nonzero()[0][-1]))])


def _likely(row: Row, how: Draw) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Tokens that can be drawn, their weights, and the weight of all that top-k leaves. They are
    in order, most likely first and ties by token id, where top-p needs it; no more than that are
    sorted, which of a whole vocabulary would take longer than a step of a small model."""
    best = row.max()

    def weigh(tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        tokens = tokens[np.lexsort((tokens, -row[tokens]))]
        return tokens, np.exp((row[tokens] - best).astype(np.float64) / how.temperature)

    if 0 < how.top_k < len(row):
        kept, weights = weigh(_largest(row, how.top_k))
        return kept, weights, float(weights.sum())
    every = np.exp((row - best).astype(np.float64) / how.temperature)
    mass = float(every.sum())
    if how.top_p == 1:
        return np.arange(len(row)), every, mass
    count = _FIRST_SORTED
    while count < len(row):
        kept, weights = weigh(np.argpartition(row, -count)[-count:])
        above = weights[weights > weights[-1]]  # all of them; of equal ones some may be missing
        if len(above) and above.sum() >= how.top_p * mass:
            return kept, weights, mass
        count *= _FIRST_SORTED
    return *weigh(np.arange(len(row))), mass


def _largest(row: Row, count: int) -> NDArray[np.int64]:
    """The ``count`` largest; of those that equal the last one, the lowest ids."""
    last = np.partition(row, -count)[-count]
    above = np.flatnonzero(row > last)
    return np.concatenate((above, np.flatnonzero(row == last)[: count - len(above)]))
