"""From a row of logits to a token. Each draw depends on the request's seed and the index of the
token only, so results do not change with the batch, preemption or the rest of the load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.models.draw import Draw, draw
from kvant.request import Request

__all__ = ["Logits", "Sampled", "sample"]

Row = NDArray[np.float32]


class Logits(Protocol):
    """Logits float32 ``[R, V]`` of a step, wherever they are."""

    def fetch(self, rows: slice | Sequence[int]) -> NDArray[np.float32]:
        """``[n, V]`` of some rows on the host; they may be a view, so they are not written to."""
        ...

    def choose(self, rows: Sequence[int], draws: Sequence[Draw | None]) -> list[int | None]:
        """A token for each of ``rows``: the likeliest, of equal ones that of the lowest id, or one
        drawn as ``draws`` says; None where the row's maximum is not finite or a logit is a NaN.
        It depends on the row and its draw only."""
        ...


class Sampled(NamedTuple):
    """``token`` is None if the logits were not finite or every token was forbidden."""

    token: int | None
    logprobs: dict[int, float] | None = None


def sample(logits: Logits, rows: Sequence[int], requests: Sequence[Request]) -> list[Sampled]:
    """Pick the next token of each request from its row of ``logits``. Only rows that penalties,
    bans, biases or guides change, or that log-probabilities are wanted of, come to the host."""
    banned = [_banned(request) for request in requests]
    whole = [_wants_row(request, bans) for request, bans in zip(requests, banned, strict=True)]
    plain = [place for place, wanted in enumerate(whole) if not wanted]
    other = [place for place, wanted in enumerate(whole) if wanted]
    found: dict[int, Sampled] = {}
    if plain:
        draws = [_draw_of(requests[place]) for place in plain]
        tokens = logits.choose([rows[place] for place in plain], draws)
        found.update(zip(plain, map(Sampled, tokens), strict=True))
    if other:
        fetched = logits.fetch([rows[place] for place in other])
        for place, row, best in zip(other, fetched, fetched.argmax(axis=-1), strict=True):
            found[place] = _sample_row(row, int(best), requests[place], banned[place])
    return [found[place] for place in range(len(requests))]


def _wants_row(request: Request, banned: set[int]) -> bool:
    """Whether a token takes more than the logits as they are and one draw."""
    return request.gen.logprobs is not None or _changes(request, banned)


def _changes(request: Request, banned: set[int]) -> bool:
    return bool(banned or _penalizes(request) or request.gen.logit_bias or request.guide)


def _penalizes(request: Request) -> bool:
    gen = request.gen
    return bool(gen.repetition_penalty != 1 or gen.presence_penalty or gen.frequency_penalty)


def _sample_row(row: Row, best: int, request: Request, banned: set[int]) -> Sampled:
    if not np.isfinite(row[best]):  # argmax finds a NaN first
        return Sampled(None)
    changed = row
    if _changes(request, banned):
        changed = _process(row, request, banned)
        best = int(changed.argmax())
        if changed[best] == -np.inf:
            return Sampled(None)
    how = _draw_of(request)
    token = best if how is None else draw(changed, how)
    if request.gen.logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprobs(row, token, request.gen.logprobs))


def _process(row: Row, request: Request, banned: set[int]) -> Row:
    """Logits after penalties, biases, bans and the request's guide."""
    gen = request.gen
    row = row.copy()
    if _penalizes(request):
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


def _draw_of(request: Request) -> Draw | None:
    """None is the likeliest token."""
    gen = request.gen
    if gen.greedy:
        return None
    return Draw(gen.temperature, gen.top_k, gen.top_p, gen.min_p, _uniform(request))


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
