"""Sampling: distributions, filters, penalties, and what a draw may depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvant.config import GenerationConfig
from kvant.engine.sampler import Sampled, sample
from kvant.models.draw import Draw
from kvant.models.logits import DeviceLogits, HostLogits
from kvant.request import Request

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def request_of(tokens: list[int], num_prompt: int = 1, seed: int = 0, **options: Any) -> Request:
    return Request(
        id=0,
        tokens=tokens,
        num_prompt=num_prompt,
        gen=GenerationConfig(**options),
        max_tokens=999,
        seed=seed,
    )


def one(logits: np.ndarray[Any, Any], request: Request) -> Sampled:
    return sample(HostLogits(logits[None].astype(np.float32)), [0], [request])[0]


def draws(count: int = 4000, **options: Any) -> Counter[int | None]:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0} | options
    return Counter(
        one(LOGITS, request_of([0], seed=seed, **options)).token for seed in range(count)
    )


def test_draws_follow_the_softmax() -> None:
    """Chi-square of 4000 draws with 4 degrees of freedom; 30 has probability 5e-6, and the seeds
    are fixed."""
    counts, expected = draws(), 4000 * np.exp(LOGITS)
    chi_square = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in range(5))
    assert chi_square < 30


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of what top-k left: 0.4 + 0.3 of 0.85
        ({"top_k": 1000}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_exactly(options: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(600, **options)) == kept


def test_temperature_zero_is_greedy_whatever_the_seed() -> None:
    assert set(draws(20, temperature=0)) == {0}


def test_cold_is_sharper_than_warm() -> None:
    assert draws(2000, temperature=0.3)[0] > draws(2000)[0] > draws(2000, temperature=2.0)[0]


def test_a_draw_depends_on_seed_and_index_only() -> None:
    """Not on the other rows of the batch, nor on how often it was preempted before."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0}
    alone = one(LOGITS, request_of([0, 1, 2], seed=5, **options))
    crowd = [request_of([0, 3, 4], seed=s, **options) for s in (1, 5, 9)]
    rows = np.stack([LOGITS] * 3)
    assert sample(HostLogits(rows), range(3), crowd)[1] == alone
    longer = {one(LOGITS, request_of([0] * n, seed=5, **options)).token for n in range(1, 40)}
    assert len(longer) > 1


def test_repetition_penalty_counts_prompt_and_output() -> None:
    """Positive logits are divided, negative ones multiplied (CTRL, arXiv 1909.05858)."""
    logits = np.array([2.0, 1.5, 1.0, -1.0])
    assert one(logits, request_of([0], repetition_penalty=1.5)).token == 1
    assert one(logits, request_of([0, 1], repetition_penalty=3.0)).token == 2
    only_negative = np.array([-1.0, -1.2])
    assert one(only_negative, request_of([0], repetition_penalty=1.5)).token == 1


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = np.array([2.0, 1.5, 0.0])
    assert one(logits, request_of([0, 0, 0], num_prompt=3, presence_penalty=2)).token == 0
    assert one(logits, request_of([9, 0], num_prompt=1, presence_penalty=1)).token == 1
    assert one(logits, request_of([9, 0], num_prompt=1, frequency_penalty=0.4)).token == 0
    assert one(logits, request_of([9, 0, 0], num_prompt=1, frequency_penalty=0.4)).token == 1


def test_banned_tokens_are_never_taken() -> None:
    assert one(LOGITS, request_of([0], bad_token_ids=[0, 1])).token == 2
    assert set(draws(300, bad_token_ids=[0, 1])) == {2, 3, 4}


def test_a_bad_word_is_banned_where_it_would_be_completed() -> None:
    """Only the last token of a sequence whose beginning stands there."""
    request = request_of([3, 4])
    request.bad_sequences = [[4, 0], [2, 1]]
    assert one(LOGITS, request).token == 1
    request.tokens = [4, 3]
    assert one(LOGITS, request).token == 0


def test_nothing_left_or_not_finite_is_reported() -> None:
    assert one(LOGITS, request_of([0], bad_token_ids=list(range(5)))).token is None
    assert one(np.array([0.0, np.nan]), request_of([0])).token is None
    assert one(np.array([0.0, np.inf]), request_of([0])).token is None
    assert one(np.array([0.0, -np.inf]), request_of([0])).token == 0


def test_logprobs_are_the_models_own_and_hold_the_token() -> None:
    """Before penalties and filters, normalized, most likely first."""
    request = request_of([0], logprobs=2, bad_token_ids=[0, 1, 2])
    token, logprobs = one(LOGITS, request)
    assert token == 3
    assert logprobs is not None
    assert list(logprobs) == [0, 1, 3]
    assert list(logprobs.values()) == pytest.approx(LOGITS[[0, 1, 3]].tolist(), abs=1e-6)
    assert list(one(LOGITS, request_of([0], logprobs=0)).logprobs or {}) == [0]


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_top_p_of_a_large_vocabulary_is_that_of_all_sorted(
    spread: float, top_p: float, min_p: float
) -> None:
    """Draws against a plain nucleus: the first tokens, likeliest first and ties by id, that have
    top_p between them. Flat distributions need more tokens than are sorted at first."""
    rng = np.random.default_rng(0)
    row = (np.round(spread * rng.standard_normal(5000) * 8) / 8).astype(np.float32)  # with ties
    weights = np.exp(row.astype(np.float64) - row.max())
    order = np.lexsort((np.arange(len(row)), -row))
    before = np.cumsum(weights[order]) - weights[order]
    keep = (before < top_p * weights.sum()) & (weights[order] >= min_p)
    kept = order[keep]
    edges = np.cumsum(weights[kept])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": top_p, "min_p": min_p}
    for seed in range(50):
        request = request_of([0], seed=seed, **options)
        bits = np.random.Philox(key=seed, counter=request.num_generated)
        place = np.random.Generator(bits).random() * edges[-1]
        wanted = kept[min(int(np.searchsorted(edges, place, side="right")), len(kept) - 1)]
        found = one(row, request).token
        assert found is not None
        near = min(abs(edges - place)) < 1e-9 * edges[-1]  # a sum in another order may tip it
        assert found == wanted or near


class Counted(DeviceLogits):
    """Remembers which rows came to the host, and which stayed."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        super().__init__(torch.from_numpy(logits))
        self.fetched: list[Any] = []
        self.chosen: list[Any] = []

    def fetch(self, rows: slice | Sequence[int]) -> NDArray[np.float32]:
        self.fetched.append(rows)
        return super().fetch(rows)

    def choose(self, rows: Sequence[int], draws: Sequence[Draw | None]) -> list[int | None]:
        self.chosen.append(rows)
        return super().choose(rows, draws)


def test_only_rows_that_are_changed_or_reported_come_to_the_host() -> None:
    """In one copy; requests have the tokens that they have alone on the host."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 100)).astype(np.float32)
    drawn = {"do_sample": True, "temperature": 1.0}
    requests = [
        request_of([0]),
        request_of([0], **drawn),
        request_of([0], repetition_penalty=2.0, **drawn),
        request_of([0], seed=3, top_p=0.5, **drawn),
        request_of([0], logit_bias={5: 9.0}),
        request_of([0], logprobs=2),
        request_of([0], temperature=0, do_sample=True),
        request_of([0], bad_token_ids=[int(logits[9].argmax())]),
    ]
    rows = [0, 1, 2, 4, 6, 7, 8, 9]
    counted = Counted(logits)
    found = sample(counted, rows, requests)
    assert found == [one(logits[row], each) for row, each in zip(rows, requests, strict=True)]
    assert counted.chosen == [[0, 1, 4, 8]]
    assert counted.fetched == [[2, 6, 7, 9]]


def test_a_plain_step_fetches_nothing() -> None:
    counted = Counted(np.stack([LOGITS] * 3))
    assert [token for token, _ in sample(counted, range(3), [request_of([0])] * 3)] == [0] * 3
    assert (counted.chosen, counted.fetched) == ([[0, 1, 2]], [])
