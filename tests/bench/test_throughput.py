from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest

import kvant.bench.throughput as module
from kvant.bench.latency import Case, cases, measure
from kvant.bench.throughput import Bench, check_fit, closed_loop, num_tokens
from kvant.bench.workload import Random, Vocabulary, Work
from kvant.config import EngineConfig
from kvant.engine.engine import Engine
from kvant.engine.load import LoadedModel, OpenModel, open_model, start_model
from kvant.errors import ConfigError, KvantError
from kvant.formats import KVSpec
from kvant.models.decoder import DecoderWeights

CONFIG = EngineConfig(kv_tokens=2048, dtype="float32", num_threads=1, check=True)
SPECS = [KVSpec.parse(name) for name in ("f32", "int4", "k4v4")]


@pytest.fixture(scope="module")
def opened(tiny: str) -> OpenModel:
    return open_model(tiny, CONFIG)


@pytest.fixture(scope="module")
def weights(opened: OpenModel) -> DecoderWeights:
    return opened.weights(CONFIG)


@pytest.fixture
def bench(opened: OpenModel, weights: DecoderWeights) -> Bench:
    return Bench(opened=opened, weights=weights, config=CONFIG, tick=lambda _: None)


def some_work(opened: OpenModel, count: int, **lengths: Any) -> list[Work]:
    vocabulary = Vocabulary(opened.tokenizer, opened.config.vocab_size)
    return Random(**{"input_len": 40, "output_len": 9, "range_ratio": 0.2} | lengths).draw(
        count, vocabulary, 0
    )


def an_engine(bench: Bench, **changes: Any) -> LoadedModel:
    return start_model(bench.opened, bench.weights, replace(CONFIG, **changes))


@pytest.mark.parametrize("concurrency", (1, 3, 50))
def test_all_requests_end_at_their_lengths_and_never_too_many_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    work = some_work(bench.opened, 20)
    model, ticks = an_engine(bench), [0]
    inside: list[int] = []
    step = Engine.step

    def counted(engine: Engine) -> Any:
        inside.append(engine.stats().running + engine.stats().waiting)
        return step(engine)

    def tick(count: int) -> None:
        ticks[0] += count

    monkeypatch.setattr(Engine, "step", counted)
    run = closed_loop(model.engine, model.tokenizer, work, concurrency, tick)
    assert [len(line.arrivals) for line in run.timelines] == [output for _, output in work]
    assert all(
        times == sorted(times) and line.submitted < times[0]
        for line in run.timelines
        for times in [line.arrivals]
    )
    assert max(inside) == min(concurrency, len(work)) >= run.max_running
    assert 0 < run.mean_running <= run.max_running
    assert ticks[0] == num_tokens(work) == run.input_tokens + run.output_tokens
    assert run.steps == len(inside) and 0 < run.kv_usage <= 1
    assert not model.engine.has_work


def test_too_little_room_preempts_and_still_ends(bench: Bench) -> None:
    work = some_work(bench.opened, 6, input_len=60, output_len=100, range_ratio=1)
    model = an_engine(bench, kv_tokens=256)
    run = closed_loop(model.engine, model.tokenizer, work, 6, lambda _: None)
    assert run.preemptions > 0 and run.kv_usage > 0.7 and run.max_running < 6
    assert [len(line.arrivals) for line in run.timelines] == [100] * 6


def test_shared_beginnings_are_found(bench: Bench) -> None:
    prompt = some_work(bench.opened, 1, input_len=200, range_ratio=1)[0].prompt
    for caching in (True, False):
        model = an_engine(bench, enable_prefix_caching=caching)
        run = closed_loop(model.engine, model.tokenizer, [Work(prompt, 2)] * 3, 1, lambda _: None)
        assert run.cached_tokens == (2 * 192 if caching else 0)


def test_a_request_that_fails_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    model = an_engine(bench)
    monkeypatch.setattr(module, "TextStream", lambda *_: _Text())
    with pytest.raises(KvantError, match="no such token"):
        closed_loop(model.engine, model.tokenizer, some_work(bench.opened, 3), 2, lambda _: None)
    assert not model.engine.has_work


class _Text:
    stopped = None

    def push(self, token: int) -> str:
        raise ValueError("no such token")

    def finish(self) -> str:
        return ""


def test_formats_take_turns_and_leave_nothing_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    alive: list[weakref.ref[Engine]] = []

    def started(opened: OpenModel, weights: DecoderWeights, config: EngineConfig) -> LoadedModel:
        assert not any(engine() for engine in alive), "two pools at a time"
        model = start_model(opened, weights, config)
        order.append(model.kv_spec.label)
        alive.append(weakref.ref(model.engine))
        return model

    monkeypatch.setattr(module, "start_model", started)
    work = some_work(bench.opened, 5)
    runs = bench.compare(SPECS, work, 2, 2)
    assert order == ["f32", "int4", "k4v4"] * 2
    gc.collect()
    assert not any(engine() for engine in alive)
    rows = [bench.row(spec, each, runs[0]) for spec, each in zip(SPECS, runs, strict=True)]
    assert [row["kv"] for row in rows] == ["f32", "int4", "k4v4"]
    assert rows[0]["speed_of_first"] == 1 and len(rows[1]["all_duration_s"]) == 2
    assert len({tuple(row) for row in rows}) == 1
    for row in rows:
        assert row["completed"] == 5 and row["weight_dtype"] == "float32"
        tokens = row["total_input_tokens"], row["total_output_tokens"]
        assert tokens == (sum(len(p) for p, _ in work), sum(n for _, n in work))
        assert row["total_throughput"] == pytest.approx(
            row["input_throughput"] + row["output_throughput"], rel=1e-3
        )
        assert row["max_concurrency"] == 2 and row["peak_rss_bytes"] > 2**20
        assert row["cached_tokens"] == 0  # nor from the warm-up


def test_what_does_not_fit_is_refused(bench: Bench) -> None:
    work = some_work(bench.opened, 2, input_len=2048, range_ratio=1)
    with pytest.raises(ConfigError, match=r"a request takes 2057 tokens .* the limit is 2048"):
        check_fit(bench.opened, CONFIG, SPECS[0], work, 2)
    with pytest.raises(ConfigError, match="a request takes 2057 tokens"):
        bench.run(SPECS[0], work, 2)
    check_fit(bench.opened, replace(CONFIG, kv_tokens=4096), SPECS[0], work, 2)
    with pytest.raises(ConfigError, match="the limit is 100"):
        check_fit(bench.opened, replace(CONFIG, session_len=100), SPECS[0], work, 2)


def test_a_grid_of_static_batches(bench: Bench) -> None:
    vocabulary = Vocabulary(bench.opened.tokenizer, bench.opened.config.vocab_size)
    grid = cases((1, 3), (8, 20), (1, 4))
    assert len(grid) == 8 and grid[0] == Case(1, 8, 1)
    rows = measure(bench, SPECS[:2], {case: case.work(vocabulary, 0) for case in grid}, 1)
    names = ("concurrency", "prompt_tokens", "completion_tokens")
    assert [tuple(row[name] for name in names) for row in rows[::2]] == grid
    for row in rows:
        batch, prompt, output = (row[name] for name in names)
        assert row["total_input_tokens"] == batch * prompt
        assert row["total_output_tokens"] == batch * output
        assert row["prefill_throughput"] > 0
        assert (row["decode_throughput"] is None) == (output == 1)
