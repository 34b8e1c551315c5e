"""What a scrape of the server says, and that the page on metrics says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

import kvant
from kvant.config import GenerationConfig
from kvant.engine.engine import EngineStats
from kvant.request import FinishReason
from kvant.server.metrics import PREFIX, CacheFacts, Finished, Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
FACTS = CacheFacts(
    kv_format="K int8, V int4",
    bytes_per_token=8640.0,
    bytes_per_token_16bit=23040.0,
    page_tokens=64,
    pool_bytes=1 << 20,
    max_running=8,
    session_len=4096,
)
STATS = EngineStats(
    running=3,
    waiting=2,
    max_running=8,
    pages_total=512,
    pages_held=40,
    pages_cached=100,
    steps=77,
    preemptions=1,
    prompt_tokens=1000,
    cached_tokens=250,
    generated_tokens=5678,
)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("m")
    metrics.watch_state(lambda: "ready")
    metrics.attach(FACTS, lambda: STATS, lambda: 1.5)
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, {"model_name": "m", **labels})


def finished(reason: FinishReason = "stop", **changes: float | None) -> Finished:
    fields = {
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "generated_tokens": 11,
        "queue_s": 0.5,
        "prefill_s": 1.0,
        "decode_s": 2.0,
        "e2e_s": 3.5,
        "preemptions": 0,
        "max_tokens": 512,
        "n": 1,
    }
    return Finished(reason=reason, **(fields | changes))


def test_the_engine_is_read_when_asked(metrics: Metrics) -> None:
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "generation_tokens_total") == 5678
    assert value(metrics, "engine_heartbeat_age_seconds") == 1.5
    assert value(metrics, "kv_bytes_per_token") == 8640
    assert value(metrics, "kv_format_info", kv_format="K int8, V int4") == 1
    assert value(metrics, "kv_cache_usage_perc") == 40 / 512
    assert value(metrics, "prefix_cache_hit_rate") == 0.25


def test_pages_have_one_state_each(metrics: Metrics) -> None:
    states = [value(metrics, "kv_pages", state=state) for state in ("held", "cached", "free")]
    assert states == [40, 100, 372]
    assert value(metrics, "kv_pages_total") == 512
    assert value(metrics, "kv_tokens_available") == (100 + 372) * 64


def test_a_server_that_starts_has_a_state_only() -> None:
    metrics = Metrics("m")
    assert value(metrics, "server_state", state="starting") == 1
    assert value(metrics, "engine_up") == 0
    assert value(metrics, "kv_pages_total") is None
    assert b"kvant:" in metrics.render()[0]


@pytest.mark.parametrize(
    ("state", "up"), [("starting", 1), ("ready", 1), ("draining", 1), ("failed", 0)]
)
def test_one_state_holds(metrics: Metrics, state: str, up: int) -> None:
    metrics.watch_state(lambda: state)
    states = ("starting", "ready", "draining", "failed")
    assert [value(metrics, "server_state", state=each) for each in states] == [
        float(each == state) for each in states
    ]
    assert value(metrics, "engine_up") == up


def test_registries_are_separate(metrics: Metrics) -> None:
    metrics.first_token(1.0)
    assert value(Metrics("m"), "time_to_first_token_seconds_count") == 0
    assert not any(family.name.startswith(PREFIX) for family in REGISTRY.collect())


def test_a_finished_sequence(metrics: Metrics) -> None:
    metrics.finished(finished())
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "requests_aborted_total") == 0
    assert value(metrics, "prefix_cache_queries_total") == 100
    assert value(metrics, "prefix_cache_hits_total") == 64
    sums = {
        "request_prompt_tokens": 100,
        "request_generation_tokens": 11,
        "request_cache_hit_ratio": 0.64,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.0,
        "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 3.0,
        "request_time_per_output_token_seconds": 0.2,
        "e2e_request_latency_seconds": 3.5,
        "request_params_max_tokens": 512,
    }
    for name, total in sums.items():
        assert value(metrics, name + "_count") == 1
        assert value(metrics, name + "_sum") == pytest.approx(total)


def test_what_a_sequence_never_came_to_is_not_counted(metrics: Metrics) -> None:
    """A client that leaves the queue says nothing about prefixes or the speed of prefills."""
    never = {"queue_s": None, "prefill_s": None, "decode_s": None, "max_tokens": None}
    metrics.finished(finished("abort", **never, cached_tokens=0, generated_tokens=0))
    assert value(metrics, "requests_aborted_total") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 1
    assert value(metrics, "prefix_cache_queries_total") == 0
    for name in (
        "request_cached_tokens",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "request_params_max_tokens",
    ):
        assert value(metrics, name + "_count") == 0


def test_one_token_has_no_time_between_tokens(metrics: Metrics) -> None:
    metrics.finished(finished(generated_tokens=1, decode_s=0.0))
    assert value(metrics, "request_time_per_output_token_seconds_count") == 0


@pytest.mark.parametrize("count", [0, 1, 4])
def test_tokens_that_come_together_share_the_time(metrics: Metrics, count: int) -> None:
    metrics.tokens_came(2.0, count)
    assert value(metrics, "inter_token_latency_seconds_count") == count
    assert value(metrics, "inter_token_latency_seconds_sum") == (2.0 if count else 0.0)


def test_http_responses_are_counted_by_class(metrics: Metrics) -> None:
    route = "/v1/chat/completions"
    for status in (200, 200, 404, 429, 503, 0):
        metrics.http(route, status, 0.1)
    counts = {
        kind: value(metrics, "http_requests_total", route=route, status=kind)
        for kind in ("2xx", "4xx", "5xx", "gone")
    }
    assert counts == {"2xx": 2, "4xx": 2, "5xx": 1, "gone": 1}
    assert value(metrics, "http_request_duration_seconds_count", route=route) == 6


def test_rejections_are_there_before_the_first(metrics: Metrics) -> None:
    """Held down: an alert on a rate that has no series to begin with."""
    metrics.rejected("queue_full")
    assert value(metrics, "requests_rejected_total", reason="queue_full") == 1
    assert value(metrics, "requests_rejected_total", reason="too_large") == 0


OPENMETRICS = (
    "application/openmetrics-text",
    "application/openmetrics-text; version=1.0.0; q=0.5, text/plain;version=0.0.4;q=0.3, */*;q=0.2",
    "application/openmetrics-text;version=1.0.0;escaping=underscores,text/plain;q=0.5",
)


@pytest.mark.parametrize("accept", OPENMETRICS)
def test_both_formats_name_the_same_series(metrics: Metrics, accept: str) -> None:
    """prometheus-client writes ``kvant_`` for ``kvant:`` in OpenMetrics if it is let."""
    metrics.finished(finished())
    text, text_type = metrics.render("*/*")
    openmetrics, openmetrics_type = metrics.render(accept)
    assert text_type.startswith("text/plain; version=0.0.4")
    assert openmetrics_type.startswith("application/openmetrics-text; version=1.0.0")
    found = [
        {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("kvant")
        }
        for families in (read_text(text.decode()), read_openmetrics(openmetrics.decode()))
    ]
    assert found[0] == found[1]
    assert all(key[0].startswith(PREFIX) for key in found[0])


def test_any_model_name_can_be_a_label() -> None:
    name = 'a "model"\\ of\nmine'
    text, _ = Metrics(name).render()
    names = {
        sample.labels["model_name"]
        for family in read_text(text.decode())
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }
    assert names == {name}


def test_an_engine_that_ran(tiny: str) -> None:
    with kvant.pipeline(tiny) as pipe:
        metrics = Metrics("m")
        metrics.attach(FACTS, pipe.model.engine.stats, lambda: pipe.worker.step_seconds)
        response = pipe("Hello", gen_config=GenerationConfig(max_new_tokens=5, ignore_eos=True))
        assert value(metrics, "generation_tokens_total") == response.generate_token_len == 5
        assert value(metrics, "prompt_tokens_total") == response.input_token_len
        assert value(metrics, "kv_pages", state="held") == 0


def _rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| `")
    ]


def test_the_page_lists_what_there_is(metrics: Metrics) -> None:
    listed = sorted(tuple(row[:3]) for row in _rows())
    there = sorted(
        (family.name + "_total" * (family.type == "counter"), family.type, family.documentation)
        for family in metrics.registry.collect()
        if family.name.startswith(PREFIX)
    )
    assert listed == there


def test_the_page_describes_the_process(metrics: Metrics) -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {
        family.name + "_total" * (family.type == "counter")
        for family in metrics.registry.collect()
        if family.name.startswith("process_")
    }
    assert set(re.findall(r"`(process_\w+)`", page)) == names


def test_names_are_those_of_vllm_where_it_has_them() -> None:
    pairs = [(row[0], row[5]) for row in _rows() if row[5]]
    assert len(pairs) > 15
    assert all(theirs == ours.replace(PREFIX, "vllm:") for ours, theirs in pairs)
