"""What a model's forward pass returns: logits on the host, or on a device where tokens are chosen
with one copy of token ids to the host.

Probabilities on a device are whole numbers: multiples of a power of two so small that those of a
vocabulary fit into 62 bits. Their sums are exact in any order, so a row's token depends on nothing
but its row, whatever kernels a library picks for a batch's shape. The order of draws is that of
:mod:`kvant.models.draw`, so tokens differ from those of the host only where the rounding of a sum
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.models.draw import Draw, draw

__all__ = ["CHOICE_BYTES", "DeviceLogits", "HostLogits"]

F32 = NDArray[np.float32]

_CANDIDATES = 1024  # tokens that are ranked at first: a nucleus or top_k is rarely wider
_ELEMENTS = 1 << 22  # logits that are weighed at a time
CHOICE_BYTES = 24 * _ELEMENTS
"""About what they take meanwhile: float64 weights, whole numbers and their sums."""
_NOT_FINITE, _WIDER = -1, -2  # in place of a token: it has none; its candidates were too few


class HostLogits:
    """Logits float32 ``[R, V]`` in memory of the host."""

    def __init__(self, logits: F32) -> None:
        self._logits = logits

    def fetch(self, rows: slice | Sequence[int]) -> F32:
        """``[n, V]`` of some rows; a slice is not copied."""
        return self._logits[rows]

    def choose(self, rows: Sequence[int], draws: Sequence[Draw | None]) -> list[int | None]:
        """See :class:`kvant.engine.sampler.Logits`."""
        every = len(rows) == len(self._logits) and list(rows) == list(range(len(rows)))
        logits = self._logits if every else self._logits[rows]
        best = logits.argmax(axis=-1)
        return [
            _token(row, int(top), how) for row, top, how in zip(logits, best, draws, strict=True)
        ]


def _token(row: F32, best: int, how: Draw | None) -> int | None:
    if not np.isfinite(row[best]):  # argmax finds a NaN first
        return None
    return best if how is None else draw(row, how)


class DeviceLogits:
    """Logits float32 ``[R, V]`` on any device, and the choice of tokens there.

    To choose copies a few numbers of each row to the device without waiting for it, and token ids
    back, once. Rare rows, whose nucleus is wider than 1024 tokens, take a second round with their
    vocabulary sorted, and so one more copy.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def fetch(self, rows: slice | Sequence[int]) -> F32:
        """``[n, V]`` of some rows, in one copy."""
        return _to_host(self._logits[rows])

    @torch.inference_mode()
    def choose(self, rows: Sequence[int], draws: Sequence[Draw | None]) -> list[int | None]:
        """See :class:`kvant.engine.sampler.Logits`."""
        vocab = self._logits.shape[1]
        tokens = self._round(rows, draws, [_method(how, vocab) for how in draws])
        wider = [place for place, token in enumerate(tokens) if token == _WIDER]
        if wider:
            some, how = [rows[place] for place in wider], [draws[place] for place in wider]
            for place, token in zip(
                wider, self._round(some, how, [_among_all] * len(wider)), strict=True
            ):
                tokens[place] = token
        return [None if token == _NOT_FINITE else token for token in tokens]

    def _round(
        self, rows: Sequence[int], draws: Sequence[Draw | None], methods: Sequence[Method]
    ) -> list[int]:
        """Tokens of ``rows``, each by its method; rows of the same one are computed together."""
        vocab = self._logits.shape[1]
        groups: dict[Method, list[int]] = {}
        for place, method in enumerate(methods):
            groups.setdefault(method, []).append(place)
        order = [place for places in groups.values() for place in places]
        settings = _to_device(
            [_settings(rows[place], draws[place], vocab) for place in order], self._logits.device
        )
        found: list[Tensor] = []
        done, most = 0, max(1, _ELEMENTS // vocab)
        for method, places in groups.items():
            for first in range(0, len(places), most):
                some = [rows[place] for place in places[first : first + most]]
                own = settings[done : done + len(some)]
                found.append(method(self._select(some, own), own[:, 1:]))
                done += len(some)
        tokens = [0] * len(rows)
        for place, token in zip(order, _to_host(torch.cat(found)).tolist(), strict=True):
            tokens[place] = token
        return tokens

    def _select(self, rows: list[int], settings: Tensor) -> Tensor:
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self._logits[rows[0] : rows[0] + len(rows)]
        return self._logits.index_select(0, settings[:, 0].long())


def _settings(row: int, how: Draw | None, vocab: int) -> tuple[float, ...]:
    if how is None:
        return (row, 1, vocab, 1, 0, 0)
    return (row, how.temperature, _kept(how, vocab), how.top_p, how.min_p, how.uniform)


def _kept(how: Draw, vocab: int) -> int:
    return how.top_k if 0 < how.top_k < vocab else vocab


def _to_device(settings: list[tuple[float, ...]], device: torch.device) -> Tensor:
    """float64 ``[n, 6]``; a GPU copies from pinned memory, which the host need not wait for."""
    found = torch.tensor(settings, dtype=torch.float64)
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


def _to_host(values: Tensor) -> NDArray[Any]:
    """The only place that waits for the device. Always a copy: what was given may be reused."""
    found: NDArray[Any] = values.to("cpu", copy=True).numpy()
    return found


# From logits [n, V] and settings float64 [n, 5] to tokens int64 [n], or a reason for none.
Method = Callable[[Tensor, Tensor], Tensor]


def _method(how: Draw | None, vocab: int) -> Method:
    if how is None:
        return _likeliest
    top_k = _kept(how, vocab)
    if top_k == vocab:
        return _by_token if how.top_p == 1 else _among_nucleus
    return _among_top_k if top_k <= _CANDIDATES else _among_all


def _likeliest(logits: Tensor, _: Tensor) -> Tensor:
    best, token = logits.max(dim=1)  # documented: the first of equal ones; a NaN before others
    return _finite(best, token)


def _by_token(logits: Tensor, settings: Tensor) -> Tensor:
    """Draws among all tokens that ``min_p`` leaves."""
    temperature, _, _, min_p, uniform = settings.T.unsqueeze(2)
    best = logits.amax(dim=1, keepdim=True)
    weights = _weights(logits, best, temperature)
    running = _whole(weights.masked_fill_(weights < min_p, 0), logits.shape[1]).cumsum_(dim=1)
    token = _place(running, running[:, -1:], uniform)
    return _finite(best, token).squeeze(1)


def _among_top_k(logits: Tensor, settings: Tensor) -> Tensor:
    return _ranked(logits, settings, min(_CANDIDATES, logits.shape[1]))


def _among_all(logits: Tensor, settings: Tensor) -> Tensor:
    return _ranked(logits, settings, logits.shape[1])


def _among_nucleus(logits: Tensor, settings: Tensor) -> Tensor:
    best = logits.amax(dim=1, keepdim=True)
    mass = _whole(_weights(logits, best, settings[:, :1]), logits.shape[1]).sum(1, keepdim=True)
    return _ranked(logits, settings, min(_CANDIDATES, logits.shape[1]), mass)


def _ranked(logits: Tensor, settings: Tensor, width: int, mass: Tensor | None = None) -> Tensor:
    """Draws among the ``width`` likeliest, in their order. ``mass [n, 1]`` is the weight of all
    that top-k leaves, if those are more."""
    temperature, top_k, top_p, min_p, uniform = settings.T.unsqueeze(2)
    best = logits.amax(dim=1, keepdim=True)
    # Values only: which of equal logits topk finds, and in what order, is its own business.
    values = logits.topk(width, dim=1).values
    weights = _weights(values, best, temperature)
    within = torch.arange(width, device=logits.device) < top_k
    counts = _whole(weights.where(within, 0), logits.shape[1])
    running = counts.cumsum(dim=1)
    if mass is None:
        mass = running[:, -1:]
    kept = within & (weights >= min_p) & ((running - counts) < top_p * mass)
    size = kept.sum(dim=1, keepdim=True).clamp(min=1)  # each condition keeps a beginning
    place = _place(running, running.gather(1, size - 1), uniform).minimum(size - 1)
    value = values.gather(1, place)
    token = _nth_equal(logits, value, place - (values > value).sum(dim=1, keepdim=True))
    token = token.masked_fill((size == width) & (top_k > width), _WIDER)
    return _finite(best, token).squeeze(1)


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """float64; that of ``best`` is 1."""
    return logits.sub(best).double().div_(temperature).exp_()


def _whole(weights: Tensor, vocab: int) -> Tensor:
    """``weights`` of at most 1, which are overwritten, as int64: a vocabulary's sum has 62 bits."""
    bits = min(52, 62 - (vocab - 1).bit_length())
    return weights.mul_(2.0**bits).round_().long()


def _place(running: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """The first place ``[n, 1]`` whose ``running`` sum exceeds ``uniform`` of ``total``."""
    target = (uniform * total).long().minimum(total - 1)
    return torch.searchsorted(running, target, right=True)


def _nth_equal(logits: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """The token ``[n, 1]`` with the ``nth`` lowest id, from 0, of those with logit ``value``."""
    running = (logits == value).cumsum(dim=1, dtype=torch.int32)
    return torch.searchsorted(running, nth.int(), right=True)


def _finite(best: Tensor, token: Tensor) -> Tensor:
    """``token`` where the ``best`` logit is finite, which a NaN is before any other."""
    return token.where(best.isfinite(), _NOT_FINITE)
