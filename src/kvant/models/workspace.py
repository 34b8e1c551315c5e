"""How much of a GPU's memory a step needs beside weights and pages."""

from __future__ import annotations

from bisect import bisect_left

import torch

from kvant.formats import PAGE_TOKENS
from kvant.kernels.triton.backend import STAGE_BYTES
from kvant.kernels.triton.plan import num_splits
from kvant.models.config import DecoderConfig
from kvant.models.graphs import ROWS
from kvant.models.logits import CHOICE_BYTES

__all__ = ["workspace_bytes"]

_LIBRARIES = 128 << 20
"""cuBLAS's workspaces, 32 MiB for each stream on an H100, and machine code loaded on demand."""


def workspace_bytes(
    config: DecoderConfig,
    dtype: torch.dtype,
    *,
    max_step_tokens: int,
    max_batch_size: int,
    longest: int,
    graphs: bool,
) -> int:
    """An estimate from above of what a step allocates, with all it computes with counted as if it
    were there at the same time. Graphs of several sizes may take more: each counts what the
    largest of them takes.

    Args:
        config: the model's shape.
        dtype: of its activations.
        max_step_tokens: most rows of a step.
        max_batch_size: most sequences that run at a time.
        longest: the longest context in tokens.
        graphs: whether decode steps are captured; their memory is their own.
    """
    decodes = min(max_step_tokens, max_batch_size)
    total = _activations(config, dtype, max_step_tokens) + _partials(config, decodes, longest)
    if graphs:
        rows = ROWS[min(bisect_left(ROWS, decodes), len(ROWS) - 1)]
        total += _activations(config, dtype, rows) + _partials(config, rows, longest)
        total += ROWS[-1] * config.hidden_size * dtype.itemsize
    prompts = 2 * max_step_tokens * config.num_heads * _partial(config)
    # Scoring asks for the logits of every row.
    logits = 4 * max_step_tokens * config.vocab_size + CHOICE_BYTES
    expanded = 2 * config.hidden_size * config.intermediate_size * dtype.itemsize
    staged = STAGE_BYTES * dtype.itemsize // 2
    tables = 4 * longest * config.head_dim
    return total + prompts + logits + expanded + staged + tables + _LIBRARIES


def _activations(config: DecoderConfig, dtype: torch.dtype, rows: int) -> int:
    """Of one layer and its neighbours: four arrays of hidden states; queries as they come, rotated
    twice (once as float32) and attended, beside new keys and values, of which a step may hold one
    layer as float32; gates, what they are for, and both as one."""
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    elements = 4 * config.hidden_size + 4 * queries + 2 * keys + 3 * config.intermediate_size
    return rows * (elements * dtype.itemsize + 4 * queries + 8 * keys)


def _partials(config: DecoderConfig, decodes: int, longest: int) -> int:
    """Of decodes whose contexts are cut into splits, one more for finer pages."""
    splits = num_splits(-(-longest // PAGE_TOKENS)) + 1
    return decodes * config.num_heads * splits * _partial(config)


def _partial(config: DecoderConfig) -> int:
    """A sum of values, in a power of two of dimensions, the largest score and the sum of weights,
    all float32."""
    return 4 * ((1 << (config.head_dim - 1).bit_length()) + 2)
