"""From a budget to pages: never over it, never under what the error message promises."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.cache.paged import Holding, PagedCache
from kvant.cache.sizing import (
    CacheSize,
    free_memory,
    recent_per_sequence,
    size_for_bytes,
    size_for_tokens,
)
from kvant.errors import ConfigError
from kvant.formats import KVShape, KVSpec

specs = st.sampled_from(
    ["f32", "int8", "k=int8h,v=int4h", "int4h+r64", "int4+r64:f32", "int4h+s64r64"]
).map(KVSpec.parse)
shapes = st.builds(
    KVShape,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from((64, 128)),
)


@given(spec=specs, shape=shapes, budget=st.integers(0, 2**24), sequences=st.integers(1, 300))
def test_a_budget_is_used_up_and_kept(
    spec: KVSpec, shape: KVShape, budget: int, sequences: int
) -> None:
    """Held down: scales and recent pages that come on top of what the user allowed."""
    base, fine = spec.page_bytes(shape), spec.fine.page_bytes(shape)
    try:
        size = size_for_bytes(spec, shape, budget, sequences)
    except ConfigError as error:
        needed = re.search(r"at least (\d+) bytes", str(error))
        assert needed
        assert int(needed[1]) > budget
        size_for_bytes(spec, shape, int(needed[1]), sequences)  # the remedy is one
        return
    assert size.nbytes == size.num_pages * base + size.num_recent * fine
    assert budget - base < size.nbytes <= budget
    each = recent_per_sequence(spec)
    assert each == (spec.recent is not None) + spec.sink
    assert each <= size.num_recent <= each * sequences + spec.sink * budget // base // 32


@given(spec=specs, shape=shapes, tokens=st.integers(1, 10_000), sequences=st.integers(1, 300))
def test_so_many_tokens_fit(spec: KVSpec, shape: KVShape, tokens: int, sequences: int) -> None:
    size = size_for_tokens(spec, shape, tokens, sequences)
    assert tokens <= size.num_tokens < tokens + 64
    spare = size.num_pages // 32 if spec.sink else 0  # for the sinks of cached prompts
    assert size.num_recent == sequences * ((spec.recent is not None) + spec.sink) + spare


def test_a_server_of_one_sequence_keeps_the_sinks_of_several_prompts() -> None:
    """Held down: a prefix cache of thousands of pages that nothing is found in, because a prompt's
    first page had to make room for the next one's."""
    spec, shape = KVSpec.parse("k4v4"), KVShape(num_layers=1, num_kv_heads=1, head_dim=64)
    size = size_for_tokens(spec, shape, 64_000, 1)
    cache = PagedCache(size.num_pages, size.num_recent, sink=True, prefix_caching=True)
    prompts = [[letter] * 640 for letter in range(4)]
    for seen in (0, 576, 576):
        for tokens in prompts:
            holding = Holding()
            assert cache.adopt_prefix(holding, tokens, len(tokens) - 1) == seen
            cache.reserve(holding, seen, 640)
            cache.commit(holding, tokens, 640)
            cache.release(holding)


def test_free_memory_is_some() -> None:
    assert free_memory() > 0


@pytest.mark.parametrize("pages", [0, 1, 7])
def test_tokens_are_those_of_base_pages(pages: int) -> None:
    assert CacheSize(pages, 5, 0).num_tokens == 64 * pages
