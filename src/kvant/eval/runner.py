"""Engines of one model in several KV formats: they share the weights, one is alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvant.api import Pipeline
from kvant.cache.sizing import free_memory
from kvant.config import EngineConfig, GenerationConfig
from kvant.engine.load import OpenModel, start_model
from kvant.errors import ConfigError
from kvant.eval.metrics import Comparison
from kvant.eval.probe import Probe
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.models.decoder import DecoderWeights
from kvant.request import LogitsSink

__all__ = ["CONTEXT", "Prompts", "Runner", "Tick"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Prompts = tuple[tuple[int, ...], ...]
Tick = Callable[[int], None]
"""Told the number of tokens computed since the last call."""

CONTEXT = 4096
"""Tokens over which finer groups are spread in bits per element."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs windows of text and prompts.

    Args:
        opened: the model.
        weights: its weights, in the dtype of all computations.
        config: the engines' options; the KV format and the cache's size are the runner's.
        tick: told about progress.
    """

    opened: OpenModel
    weights: DecoderWeights
    config: EngineConfig
    tick: Tick

    def pipeline(self, spec: KVSpec, lengths: Sequence[int]) -> Pipeline:
        """An engine of ``spec`` that runs sequences of these lengths together."""
        pages = sum(-(-length // PAGE_TOKENS) + 1 for length in lengths)
        config = replace(
            self.config,
            kv=spec,
            kv_tokens=pages * PAGE_TOKENS,
            max_batch_size=len(lengths),
            enable_prefix_caching=False,
        )
        return Pipeline(start_model(self.opened, self.weights, config))

    def score(self, spec: KVSpec, ids: Sequence[int], sink: LogitsSink) -> F64:
        """Hand the logits of every position of a window to ``sink``; the SQNR of keys and values
        in dB ``[2, layers]``."""

        def receive(start: int, logits: F32) -> None:
            sink(start, logits)
            self.tick(len(logits))

        with self.pipeline(spec, [len(ids)]) as pipe:
            probe = Probe.install(pipe.model.engine)
            pipe.run([pipe.score_request(list(ids), receive)])
        return probe.sqnr_db()

    def reference(self, spec: KVSpec, ids: Sequence[int], room: F32) -> tuple[Comparison, F64]:
        """Compute the baseline's logits of a window into ``room [ctx, V]``; its comparison with
        itself and its SQNR."""

        def keep(start: int, logits: F32) -> None:
            room[start : start + len(logits)] = logits

        sqnr_db = self.score(spec, ids, keep)
        comparison = Comparison(ids, room)
        comparison(0, room)
        return comparison, sqnr_db

    def compare(self, spec: KVSpec, ids: Sequence[int], reference: F32) -> tuple[Comparison, F64]:
        """Compare a format's logits of a window with the baseline's ``[ctx, V]``; and its SQNR,
        see :meth:`score`."""
        comparison = Comparison(ids, reference)
        return comparison, self.score(spec, ids, comparison)

    def generate(self, spec: KVSpec, prompts: Prompts, count: int) -> list[list[int]]:
        """Continue prompts by ``count`` tokens, all in one batch."""
        gen = GenerationConfig(max_new_tokens=count, ignore_eos=True)
        with self.pipeline(spec, [len(ids) + count for ids in prompts]) as pipe:
            done = pipe.run([r for ids in prompts for r in pipe.generate_requests(ids, gen)])
        self.tick(sum(len(ids) + count for ids in prompts))
        return [response.token_ids for response in done]

    def room(self, ctx: int) -> F32:
        """Memory for the logits of a window.

        Raises:
            ConfigError: there is not enough.
        """
        vocab_size = self.opened.config.vocab_size
        needed, free = 4 * ctx * vocab_size, free_memory()
        if needed > free:
            raise ConfigError(
                f"the baseline's logits of ctx={ctx} tokens take {needed / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are free; lower ctx"
            )
        return np.empty((ctx, vocab_size), np.float32)
