"""Scored continuations against the logits of whole sequences, whatever they share."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kvant import EngineConfig, GenerationConfig, pipeline
from kvant.api import Pipeline
from kvant.errors import RequestError
from kvant.eval.scoring import Likelihood, Pair, Scorer

SPECS = ("f32", "int8", "k4v4", "k4v3", "int4c+r64")


def _expected(pipe: Pipeline, pair: Pair) -> Likelihood:
    """From the logits of every position of the sequence alone."""
    context, continuation = pair
    limit = pipe.model.engine.session_len
    ids = [*context, *continuation][-limit - 1 : -1]
    rows: dict[int, np.ndarray] = {}

    def keep(start: int, logits: np.ndarray) -> None:
        rows.update({start + i: row.copy() for i, row in enumerate(logits)})

    pipe.run([pipe.score_request(ids, keep)])
    logprob, greedy = 0.0, True
    for place, token in enumerate(continuation, start=len(ids) - len(continuation)):
        row = rows[place].astype(np.float64)
        logprob += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        greedy = greedy and int(row.argmax()) == token
    return Likelihood(float(logprob), greedy)


def _pairs(rng: random.Random) -> list[Pair]:
    """Contexts of many lengths, some under one header, some with several continuations of which
    some are single tokens, some are the beginning of others."""
    header = rng.choices(range(3, 250), k=150)
    pairs: list[Pair] = []
    for length in (1, 5, 63, 64, 65, 100, 128, 190):
        context = (header if length % 2 else []) + rng.choices(range(3, 250), k=length)
        tails = [rng.choices(range(3, 250), k=size) for size in (1, 1, 3, 40)]
        pairs += [(context, tail) for tail in (*tails, tails[-1][:7], tails[0])]
    rng.shuffle(pairs)
    return pairs


def _open(model: Path, **options: object) -> Pipeline:
    defaults = {"dtype": "float32", "session_len": 512, "kv_tokens": 8192, "check": True}
    return pipeline(str(model), EngineConfig(**{**defaults, **options}))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [33, 1024])
@pytest.mark.parametrize("pages", [640, 8192])
def test_sharing_changes_no_bit(tiny: Path, spec: str, rows: int, pages: int) -> None:
    """Also with little memory, where requests are preempted."""
    pairs = _pairs(random.Random(7))
    with _open(tiny, kv=spec, max_prefill_token_num=rows, kv_tokens=pages) as pipe:
        found = dict(Scorer(pipe).loglikelihoods(pairs))
    with _open(tiny, kv=spec, enable_prefix_caching=False) as pipe:
        expected = [_expected(pipe, pair) for pair in pairs]
    assert sorted(found) == list(range(len(pairs)))
    for index, each in enumerate(expected):
        # The bits of the logits are the same; sums of exponentials are float32 here.
        assert found[index].logprob == pytest.approx(each.logprob, rel=1e-6, abs=1e-5)
        assert found[index].greedy == each.greedy


@pytest.mark.parametrize("spec", ["f32", "k4v4"])
def test_a_header_and_contexts_are_computed_once(tiny: Path, spec: str) -> None:
    rng = random.Random(3)
    header = rng.choices(range(3, 250), k=320)
    contexts = [header + rng.choices(range(3, 250), k=40) for _ in range(20)]
    tails = [rng.choices(range(3, 250), k=10) for _ in range(4)]
    pairs: list[Pair] = [(context, tail) for context in contexts for tail in tails]
    computed = 0

    with _open(tiny, kv=spec, max_batch_size=16) as pipe:
        step = pipe.model.engine.scheduler.schedule

        def count():  # noqa: ANN202
            nonlocal computed
            plan = step()
            computed += sum(part.end - part.start for part in plan.slices) if plan else 0
            return plan

        pipe.model.engine.scheduler.schedule = count  # type: ignore[method-assign]
        assert len(list(Scorer(pipe).loglikelihoods(pairs))) == len(pairs)
    # The last token of a context is computed for each continuation: its logits are wanted.
    assert computed == len(header) + sum(39 + 4 * 10 for _ in contexts)


def test_the_beginning_of_what_is_too_long_is_left_out(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(5)
    pairs: list[Pair] = [(rng.choices(range(3, 250), k=k), [9, 8, 7]) for k in (125, 126, 127, 400)]
    with _open(tiny, session_len=128) as pipe:
        found = dict(Scorer(pipe).loglikelihoods(pairs))
        assert "2 of 4 prompts are longer than 128 tokens" in caplog.text
        for index, pair in enumerate(pairs):
            assert found[index].logprob == pytest.approx(_expected(pipe, pair).logprob, rel=1e-6)


def test_texts_are_those_of_the_pipeline(tiny: Path) -> None:
    texts = [f"{'The same header. ' * 9}Question {n % 5}:" for n in range(12)]
    gen = GenerationConfig(max_new_tokens=24)
    with _open(tiny, kv="k4v4") as pipe:
        prompts = [(pipe.prompt_ids(text, do_preprocess=False), gen) for text in texts]
        found = dict(Scorer(pipe).generate(prompts))
    with _open(tiny, kv="k4v4", enable_prefix_caching=False, max_batch_size=1) as pipe:
        expected = [pipe(text, gen, do_preprocess=False) for text in texts]
    assert [found[i] for i in range(len(texts))] == [each.text for each in expected]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (([], [1]), "empty"),
        (([1], []), "empty"),
        (([1], [2] * 200), "200 tokens, and the limit is 128"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny: Path, pair: Pair, reason: str) -> None:
    with _open(tiny, session_len=128) as pipe, pytest.raises(RequestError, match=reason):
        list(Scorer(pipe).loglikelihoods([pair]))


def test_no_room_for_a_prompt_is_refused(tiny: Path) -> None:
    prompts = [([1, 2], GenerationConfig(max_new_tokens=128))]
    with _open(tiny, session_len=128) as pipe, pytest.raises(RequestError, match="no room"):
        list(Scorer(pipe).generate(prompts))


def test_leaving_early_aborts_what_runs(tiny: Path) -> None:
    with _open(tiny) as pipe:
        results = Scorer(pipe).loglikelihoods([([5, n], [7] * 30) for n in range(100)])
        next(results)
        results.close()
        pipe.worker.call(lambda engine: None)
        assert pipe.worker.call(lambda engine: engine.stats().running) == 0
