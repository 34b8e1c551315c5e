"""From a row of logits to a token. Each draw depends on the request's seed and the index of the
token only, so results do not change with the batch, preemption or the rest of the load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.config import GenerationConfig
from kvant.request import Request

__all__ = ["Sampled", "sample"]

Row = NDArray[np.float32]

_FIRST_SORTED = 64  # tokens that are sorted for top-p at first; then times as many


class Sampled(NamedTuple):
    """``token`` is None if the logits were not finite or every token was forbidden."""

    token: int | None
    logprobs: dict[int, float] | None = None


def sample(logits: NDArray[np.float32], requests: Sequence[Request]) -> list[Sampled]:
    """Pick the next token of each request from its row of ``logits [len(requests), V]``."""
    best = logits.argmax(axis=-1)
    return [
        _sample_row(row, int(top), request)
        for row, top, request in zip(logits, best, requests, strict=True)
    ]


def _sample_row(row: Row, best: int, request: Request) -> Sampled:
    if not np.isfinite(row[best]):  # argmax finds a NaN first
        return Sampled(None)
    gen = request.gen
    changed = _process(row, request)
    if changed is not None:
        best = int(changed.argmax())
        if changed[best] == -np.inf:
            return Sampled(None)
    token = best if gen.greedy else _draw(row if changed is None else changed, request)
    if gen.logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprobs(row, token, gen.logprobs))


def _process(row: Row, request: Request) -> Row | None:
    """Logits after penalties, biases, bans and the request's guide; None if it has none."""
    gen = request.gen
    banned = _banned(request)
    penal = gen.repetition_penalty != 1 or gen.presence_penalty or gen.frequency_penalty
    if not (banned or penal or gen.logit_bias or request.guide):
        return None
    row = row.copy()
    if penal:
        _penalize(row, request)
    if gen.logit_bias:
        tokens = np.fromiter(gen.logit_bias.keys(), np.int64)
        row[tokens] += np.fromiter(gen.logit_bias.values(), np.float32)
    row[list(banned)] = -np.inf
    if request.guide:
        request.guide.apply(row)
    return row


def _penalize(row: Row, request: Request) -> None:
    gen = request.gen
    if gen.repetition_penalty != 1:
        seen = np.fromiter(request.seen, np.int64)
        hit = row[seen]
        factor = np.float32(gen.repetition_penalty)
        row[seen] = np.where(hit > 0, hit / factor, hit * factor)
    if gen.presence_penalty or gen.frequency_penalty:
        seen = np.fromiter(request.counts.keys(), np.int64)
        counts = np.fromiter(request.counts.values(), np.float32)
        row[seen] -= gen.presence_penalty + gen.frequency_penalty * counts


def _banned(request: Request) -> set[int]:
    gen = request.gen
    banned = set(gen.bad_token_ids or ())
    if request.num_generated < (gen.min_new_tokens or 0):
        banned |= request.stop_ids
    for *before, last in request.bad_sequences:
        if request.tokens[len(request.tokens) - len(before) :] == before:
            banned.add(last)
    return banned


def _draw(row: Row, request: Request) -> int:
    """One draw from the softmax of ``row`` under temperature, top-k, top-p and min-p."""
    gen = request.gen
    kept, weights, mass = _likely(row, gen)
    # A token is kept while the tokens before it have less than top_p of the total.
    nucleus = (weights.cumsum() - weights) < gen.top_p * mass
    nucleus &= weights >= gen.min_p * weights.max()
    nucleus[weights.argmax()] = True
    total = np.where(nucleus, weights, 0).cumsum()
    place = int(np.searchsorted(total, _uniform(request) * total[-1], side="right"))
    return int(kept[min(place, int(nucleus.nonzero()[0][-1]))])


def _likely(
    row: Row, gen: GenerationConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Tokens that can be drawn, their weights, and the weight of all that top-k leaves. They are
    in order, most likely first and ties by token id, where top-p needs it; no more than that are
    sorted, which of a whole vocabulary would take longer than a step of a small model."""
    best = row.max()

    def weigh(tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        tokens = tokens[np.lexsort((tokens, -row[tokens]))]
        return tokens, np.exp((row[tokens] - best).astype(np.float64) / gen.temperature)

    if 0 < gen.top_k < len(row):
        kept, weights = weigh(np.argpartition(row, -gen.top_k)[-gen.top_k :])
        return kept, weights, float(weights.sum())
    every = np.exp((row - best).astype(np.float64) / gen.temperature)
    mass = float(every.sum())
    if gen.top_p == 1:
        return np.arange(len(row)), every, mass
    count = _FIRST_SORTED
    while count < len(row):
        kept, weights = weigh(np.argpartition(row, -count)[-count:])
        if weights[weights > weights[-1]].sum() >= gen.top_p * mass:
            return kept, weights, mass
        count *= _FIRST_SORTED
    return *weigh(np.arange(len(row))), mass


def _uniform(request: Request) -> float:
    bits: Any = np.random.Philox(key=request.seed, counter=request.num_generated)
    return float(np.random.Generator(bits).random())


def _logprobs(row: Row, token: int, count: int) -> dict[int, float]:
    """The ``count`` largest log-probabilities and that of ``token``, most likely first."""
    exact = row.astype(np.float64)
    norm = exact.max() + np.log(np.exp(exact - exact.max()).sum())
    count = min(count, len(row))
    top = np.argpartition(exact, -count)[-count:] if count else np.empty(0, np.int64)
    chosen = sorted({*top.tolist(), token}, key=lambda t: (-exact[t], t))
    return {t: float(exact[t] - norm) for t in chosen}
