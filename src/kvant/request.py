"""One sequence on its way through the engine, and what comes out of it."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.cache.paged import Holding
from kvant.config import GenerationConfig

if TYPE_CHECKING:
    from kvant.engine.guide import Guide
    from kvant.engine.text import TextStream

__all__ = ["FinishReason", "LogitsSink", "Output", "Request", "Status"]

FinishReason = Literal["stop", "length", "error", "abort"]


class LogitsSink(Protocol):
    """Receives the logits ``[n, V]`` of positions ``[start, start + n)`` as they are made."""

    def __call__(self, start: int, logits: NDArray[np.float32]) -> None: ...


class Status(enum.Enum):
    """Where a request is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request. The last one has a ``finish_reason``."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


def _discard(output: Output) -> None:
    """Deliver to nobody."""


@dataclass(slots=True, eq=False)
class Request:
    """A sequence: its tokens, how many of them are computed, and the pages it holds.

    ``computed`` tokens have their keys and values in pages and a step closes part of the gap to
    ``len(tokens)``; there is no other notion of prompt and decode phase.

    ``leader`` is a request that begins with the same ``common`` tokens, whose pages are shared
    once it has computed them; a leader makes a halt at ``fork_at`` tokens, so that others can part
    from it there. If ``logits_sink`` wants all logits it gets those of positions from
    ``logits_from`` on.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    gen: GenerationConfig
    max_tokens: int
    deliver: Callable[[Output], None] = _discard
    stop_ids: frozenset[int] = frozenset()
    bad_sequences: Sequence[Sequence[int]] = ()
    seed: int = 0
    text: TextStream | None = None
    logits_sink: LogitsSink | None = None
    guide: Guide | None = None
    logits_from: int = 0
    leader: Request | None = None
    common: int = 0
    fork_at: int = 0

    status: Status = Status.WAITING
    computed: int = 0
    holding: Holding = field(default_factory=Holding)
    cached_tokens: int = 0
    num_preemptions: int = 0
    started: float | None = None
    """When the first step with it began, in seconds of ``time.perf_counter``."""

    counts: Counter[int] = field(init=False)
    """How often each token was generated."""
    seen: set[int] = field(init=False)
    """Tokens of prompt and output."""

    def __post_init__(self) -> None:
        self.counts = Counter(self.tokens[self.num_prompt :])
        self.seen = set(self.tokens)

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.counts[token] += 1
        self.seen.add(token)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def wants_all_logits(self) -> bool:
        """Whether logits of every position from ``logits_from`` on go to ``logits_sink``, not only
        those that tokens are sampled from."""
        return self.logits_sink is not None and self.gen.output_logits == "all"

    @property
    def adoptable(self) -> int:
        """How many of the first tokens need not be computed but can be found in the cache: the
        last one's logits are wanted at least."""
        last = len(self.tokens) - 1
        return min(last, self.logits_from) if self.wants_all_logits else last
