"""Tokens from logits: what a device chooses is what the host chooses, with one copy.

Without a GPU, tensors on the CPU stand for those of a device; a tensor on "meta", which has no
values, shows that nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvant.kernels.triton.pool import find_device
from kvant.models import logits as module
from kvant.models.draw import Draw
from kvant.models.logits import DeviceLogits, HostLogits

F32 = NDArray[np.float32]
DEVICE = find_device()
BOTH = pytest.mark.parametrize(
    "kind", [HostLogits, lambda x: DeviceLogits(torch.from_numpy(x).to(DEVICE))]
)

# One of each way to choose: the likeliest, by token id, top-k, a nucleus, all of them sorted.
PLAIN = (
    None,
    Draw(0.8, 0, 1.0, 0.05, 0.3),
    Draw(0.8, 50, 0.9, 0.0, 0.6),
    Draw(0.8, 0, 0.5, 0.0, 0.9),
    Draw(0.8, 1500, 1.0, 0.0, 0.2),
)


def device(logits: F32) -> DeviceLogits:
    return DeviceLogits(torch.from_numpy(logits).to(DEVICE))


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> F32:
    """Flat or steep ones, often with ties, some of them impossible, some of them broken."""
    spread = rng.choice([0.01, 1, 4, 30])
    logits = (spread * rng.standard_normal((rows, vocab))).astype(np.float32)
    if rng.random() < 0.5:
        logits = np.round(logits * 4) / 4  # zeros of either sign, too
    if rng.random() < 0.2:
        logits[rng.random((rows, vocab)) < 0.5] = -np.inf
    if rng.random() < 0.1:
        logits[rng.integers(rows), rng.integers(vocab)] = rng.choice([np.nan, np.inf])
    if rng.random() < 0.1:
        logits[rng.integers(rows)] = -np.inf
    return logits


def random_draw(rng: np.random.Generator) -> Draw | None:
    if rng.random() < 0.15:
        return None
    return Draw(
        temperature=float(rng.choice([1e-30, 1e-3, 0.3, 1, 2, 1e20])),
        top_k=int(rng.choice([0, 0, 0, 1, 2, 50, 1024, 1025, 2000, 10**6])),
        top_p=float(rng.choice([0, 0.1, 0.5, 0.9, 0.999, 1, 1, 1])),
        min_p=float(rng.choice([0, 0, 0.05, 0.3, 1])),
        uniform=float(rng.random()),
    )


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1023, 1024, 1025, 5000])
def test_a_device_chooses_what_the_host_chooses(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(60):
        logits = random_logits(rng, int(rng.integers(1, 9)), vocab)
        rows = np.flatnonzero(rng.random(len(logits)) < 0.8).tolist() or [0]
        draws = [random_draw(rng) for _ in rows]
        expected = HostLogits(logits).choose(rows, draws)
        assert device(logits).choose(rows, draws) == expected, (logits, rows, draws)


@BOTH
@pytest.mark.parametrize("how", PLAIN)
def test_rows_that_are_not_finite_have_no_token(kind: Any, how: Draw | None) -> None:
    logits = np.zeros((5, 3000), np.float32)
    logits[0, 2999] = np.nan
    logits[1, 7] = np.inf
    logits[2] = -np.inf
    logits[3] = -np.inf
    logits[3, 2000] = -5
    found = kind(logits).choose(range(5), [how] * 5)
    assert found[:4] == [None, None, None, 2000]
    assert found[4] is not None


@BOTH
def test_of_equal_logits_the_lowest_ids_come_first(kind: Any) -> None:
    """Also where top-k parts them: without this, a library's partition chooses."""
    logits = np.zeros((1, 4000), np.float32)
    logits[0, [11, 500, 3999]] = 1
    for how, expected in (
        (None, 11),
        (Draw(1.0, 4, 1.0, 0.0, 0.999), 0),
        (Draw(1.0, 3, 1.0, 0.0, 0.5), 500),
        (Draw(1.0, 2, 1.0, 0.0, 0.999), 500),
        (Draw(1.0, 1, 1.0, 0.0, 0.999), 11),
        (Draw(1.0, 0, 0.0, 0.0, 0.999), 11),
        (Draw(1.0, 0, 1.0, 1.0, 0.999), 3999),
        (Draw(1e-9, 2000, 1.0, 0.0, 0.999), 3999),
    ):
        assert kind(logits).choose([0], [how]) == [expected], how


@BOTH
@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (Draw(1.0, 0, 1.0, 0.0, 0), 5),
        (Draw(0.5, 0, 1.0, 0.0, 0), 5),
        (Draw(1.0, 3, 1.0, 0.0, 0), 3),
        (Draw(1.0, 0, 0.71, 0.0, 0), 3),
        (Draw(1.0, 0, 1.0, 0.3, 0), 3),
        (Draw(2.0, 4, 0.7, 0.1, 0), 3),  # of the square roots, 0.632 and 0.548 of 1.884
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(kind: Any, how: Draw, kept: int) -> None:
    """With evenly spaced numbers instead of random ones each count is exact to one."""
    exact = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    ids = np.array([900, 3, 1800, 0, 1234])
    logits = np.full((1, 2000), -np.inf, np.float32)
    logits[0, ids] = np.log(exact)
    wanted = exact ** (1 / how.temperature)
    wanted[kept:] = 0
    wanted *= 500 / wanted.sum()
    draws = [
        Draw(how.temperature, how.top_k, how.top_p, how.min_p, (step + 0.5) / 500)
        for step in range(500)
    ]
    found = kind(np.repeat(logits, 500, axis=0)).choose(range(500), draws)
    counts = np.bincount(found, minlength=2000)[ids]
    assert counts.sum() == 500
    assert np.all(abs(counts - wanted) <= 1)


def test_a_token_depends_on_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the others, their settings, their order, or how many are weighed at a time."""
    rng = np.random.default_rng(0)
    logits = random_logits(rng, 40, 3000)
    draws = [random_draw(rng) for _ in range(40)]
    alone = [device(logits).choose([row], [draws[row]])[0] for row in range(40)]
    for elements in (1, 9000, 1 << 22):
        monkeypatch.setattr(module, "_ELEMENTS", elements)
        for _ in range(5):
            rows = rng.permutation(40)[: rng.integers(1, 41)].tolist()
            found = device(logits).choose(rows, [draws[row] for row in rows])
            assert found == [alone[row] for row in rows]


def test_sums_of_the_largest_vocabularies_do_not_overflow() -> None:
    """All tokens of 2 ** 18 equally likely, and the smallest and largest numbers there are."""
    logits = np.zeros((3, 1 << 18), np.float32)
    last = 1 - 2.0**-53
    draws = [Draw(1.0, 0, 1.0, 0.0, last), Draw(1.0, 0, 1.0, 0.0, 0), Draw(1.0, 0, 0.5, 0.0, last)]
    assert device(logits).choose(range(3), draws) == [(1 << 18) - 1, 0, (1 << 17) - 1]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of what was copied to the host."""
    shapes: list[torch.Size] = []
    to_host = module._to_host

    def counted(values: torch.Tensor) -> Any:
        shapes.append(values.shape)
        if values.is_meta:
            return np.zeros(values.shape, np.int64)
        return to_host(values)

    monkeypatch.setattr(module, "_to_host", counted)
    return shapes


@pytest.mark.parametrize("rows", [range(10), [0, 3, 4, 5, 9]])
def test_a_step_waits_for_its_token_ids_only(rows: Sequence[int], copies: list[torch.Size]) -> None:
    """Whatever would look at a value fails on "meta"."""
    draws = [PLAIN[row % len(PLAIN)] for row in rows]
    found = DeviceLogits(torch.empty(10, 5000, device="meta")).choose(rows, draws)
    assert found == [0] * len(rows)
    assert copies == [(len(rows),)]


def test_a_wide_nucleus_takes_a_second_copy_of_its_own_token(copies: list[torch.Size]) -> None:
    rng = np.random.default_rng(0)
    logits = (0.1 * rng.standard_normal((5, 5000))).astype(np.float32)
    logits[3] *= 100
    draws = [None, *[Draw(1.0, 0, 0.9, 0.0, place) for place in (0.1, 0.5, 0.9, 0.99)]]
    assert device(logits).choose(range(5), draws) == HostLogits(logits).choose(range(5), draws)
    assert copies == [(5,), (3,)]


@BOTH
@pytest.mark.parametrize("rows", [slice(1, 3), [0, 3]])
def test_fetched_rows_are_the_logits(kind: Any, rows: slice | list[int]) -> None:
    logits = np.arange(20, dtype=np.float32).reshape(4, 5)
    assert np.array_equal(kind(logits).fetch(rows), logits[rows])


def test_fetched_rows_outlive_the_buffer_of_a_device() -> None:
    """A receiver may keep them, and the next step may write to the same memory."""
    buffer = torch.zeros(4, 5, device=DEVICE)
    found = DeviceLogits(buffer).fetch(slice(0, 2))
    buffer.fill_(1)
    assert not found.any()
