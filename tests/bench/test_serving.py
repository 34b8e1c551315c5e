from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.bench.metrics import Timeline
from kvant.bench.serving import (
    Exchange,
    Load,
    Run,
    Server,
    Slo,
    Transcript,
    arrival_times,
    find_model,
    measure,
    open_loop,
)
from kvant.bench.workload import Words, Work
from kvant.errors import ConfigError, KvantError
from tests.bench.fake_openai import FakeOpenAI, serve

CODEC = Words()


def load(count: int, *, output_len: int = 4, every: float = 0.0) -> Load:
    work = [Work([number % 9] * 3, output_len) for number in range(count)]
    return Load(work=work, times=[every * number for number in range(count)])


def server_of(fake: FakeOpenAI, **options: Any) -> Server:
    return Server(url=fake.url, model="fake", **options)


def run_of(fake: FakeOpenAI, some: Load, most: int | None = None, **options: Any) -> Run:
    return asyncio.run(open_loop(server_of(fake, **options), some, CODEC, most))


def chunk(text: str = "x", *, finish: str | None = None, **more: object) -> bytes:
    choices = [{"text": text, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, "usage": None, **more}).encode() + b"\n\n"


def usage(output: int, **more: object) -> bytes:
    return chunk("", usage={"prompt_tokens": 7, "completion_tokens": output, **more})


def transcript(*pieces: tuple[float, bytes]) -> Transcript:
    found = Transcript()
    for now, data in pieces:
        found.feed(data, now)
    return found


def test_arrivals_are_a_poisson_process_that_a_seed_decides() -> None:
    times = arrival_times(20_000, 5, seed=1)
    assert times == arrival_times(20_000, 5, seed=1) != arrival_times(20_000, 5, seed=2)
    gaps = np.diff(times)
    assert times[0] == 0 and gaps.min() >= 0
    # The mean of a Poisson process's gaps is their standard deviation.
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.03)


def test_another_rate_stretches_the_same_arrivals() -> None:
    assert arrival_times(50, 2) == pytest.approx([4 * time for time in arrival_times(50, 8)])
    assert arrival_times(3, math.inf) == [0, 0, 0] and arrival_times(1, 7) == [0]


def test_burstiness_changes_the_spread_of_gaps_and_not_the_rate() -> None:
    def spread(burstiness: float) -> float:
        gaps = np.diff(arrival_times(20_000, 10, burstiness=burstiness))
        assert gaps.mean() == pytest.approx(0.1, rel=0.1)
        return float(gaps.std())

    assert spread(0.2) > 1.5 * spread(1) > 4 * spread(100)


@pytest.mark.parametrize("rate", (0, -1, math.nan))
def test_rates_that_are_none(rate: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        arrival_times(3, rate)
    with pytest.raises(ConfigError, match="must be above 0"):
        arrival_times(3, 1, burstiness=rate)


def test_a_chunk_is_a_token_where_the_server_counts_so_many() -> None:
    seen = transcript((1, chunk()), (2, chunk()), (4, chunk() + chunk("", finish="length")),
                      (5, usage(3)), (6, b"data: [DONE]\n\n"))  # fmt: skip
    assert seen.done and seen.usage() == {
        "prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": None,
    }  # fmt: skip
    line = seen.timeline(0.5, 3)
    assert (line.ttft, line.itl, line.tpot, line.e2e) == (0.5, [1, 2], [1.5], 3.5)


def test_tokens_that_share_a_chunk_share_the_time_before_it() -> None:
    line = transcript((1, chunk()), (3, chunk()), (6, chunk())).timeline(0, 5)
    assert line.arrivals == [1, 2, 3, 4.5, 6]
    assert (line.ttft, line.e2e, line.tpot) == (1, 6, [5 / 4])


def test_more_chunks_than_tokens() -> None:
    line = transcript(*((now, chunk()) for now in (1, 2, 3, 4, 5))).timeline(0, 3)
    assert line.arrivals == [1, 3, 5]


def test_tokens_of_a_single_chunk_have_no_time_between_them() -> None:
    line = transcript((3, chunk())).timeline(1, 8)
    assert (line.ttft, line.e2e, line.itl, line.tpot) == (2, 2, [], [])


def test_tokens_at_the_end_that_have_no_text_take_time_too() -> None:
    seen = transcript((1, chunk()), (2, chunk()), (5, chunk("", finish="length")))
    assert seen.timeline(0, 3).arrivals == [1, 3, 5]
    silent = transcript((2, chunk("")), (5, chunk("", finish="length")))
    assert silent.times == [] and silent.timeline(1, 6).arrivals == [5]


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=20).map(sorted),
    st.integers(2, 60),
)
def test_tokens_stay_between_the_first_and_the_last_chunk(times: list[float], count: int) -> None:
    arrivals = transcript(*((now, chunk()) for now in times)).timeline(0, count).arrivals
    assert len(arrivals) == count
    assert (arrivals[0], arrivals[-1]) == pytest.approx((times[0], times[-1]))
    assert all(later >= sooner - 1e-9 for sooner, later in pairwise(arrivals))


@pytest.mark.parametrize(
    ("delta", "counts"),
    (
        ({"content": "x"}, 1),
        ({"content": " "}, 1),
        ({"content": ""}, 0),
        ({"content": None}, 0),
        ({"role": "assistant", "content": ""}, 0),
        ({"reasoning_content": "hm", "content": None}, 1),
        ({"content": 'a "text": "b", "usage": {"c": 1}, "finish_reason": "d"'}, 1),
        ({"content": "", "note": 'a "text": "b"'}, 0),
    ),
)
def test_which_chunks_have_text(delta: dict[str, Any], counts: int) -> None:
    for separators in ((",", ":"), (", ", ": ")):
        event = json.dumps({"choices": [{"delta": delta}]}, separators=separators)
        seen = transcript((1, f"data: {event}\n\n".encode()))
        assert len(seen.times) == counts and seen.usage() is None


def test_broken_usage_is_none() -> None:
    for broken in ({"prompt_tokens": 3}, {"prompt_tokens": 3, "completion_tokens": "x"}):
        event = json.dumps({"usage": broken}).encode()
        assert transcript((1, b"data: " + event + b"\n\n")).usage() is None
    cached = transcript((1, usage(3, prompt_tokens_details={"cached_tokens": 5}))).usage()
    assert cached is not None and cached["cached_tokens"] == 5
    nothing = transcript((1, usage(3, prompt_tokens_details=None))).usage()
    assert nothing is not None and nothing["cached_tokens"] is None


def test_limits_of_good_requests() -> None:
    slo = Slo.parse("ttft:500, tpot:100,e2e:2000")
    assert slo.limits == {"ttft": 500, "tpot": 100, "e2e": 2000}
    assert slo.met_by(Timeline(0, [0.5, 0.55, 0.7]))
    assert not slo.met_by(Timeline(0, [0.51, 0.55]))
    assert not slo.met_by(Timeline(0, [0.1, 0.3]))
    assert not slo.met_by(Timeline(0, [0.4 + 0.09 * number for number in range(20)]))
    assert slo.met_by(Timeline(0, [0.5]))  # nothing to have a TPOT


@pytest.mark.parametrize(
    "text", ("", "ttft", "ttft:x", "ttft:0", "itl:5", "ttft:5;tpot:3", "e2e:inf")
)
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="must be ttft, tpot or e2e"):
        Slo.parse(text)


def exchange(due: float, *times: float, output_len: int = 3) -> Exchange:
    pieces = [(due + time, chunk()) for time in times]
    ended = due + times[-1]
    return Exchange(
        work=Work([1, 2], output_len), due=due, ready=due, sent=due, ended=ended,
        transcript=transcript(*pieces, (ended, usage(len(times)))),
    )  # fmt: skip


def test_rates_goodput_and_concurrency() -> None:
    slow, quick = exchange(10, 1, 2, 4), exchange(11, 0.5, 0.75, 1, output_len=9)
    lost = exchange(12, 8)
    lost.fail("timeout", "no end")
    lost.ready, lost.sent = 12.25, 13
    row = Run(start=10, exchanges=[slow, quick, lost]).row(Slo.parse("ttft:600"))
    assert (row["completed"], row["failed"], row["failures"]) == (2, 1, {"timeout": 1})
    assert row["first_error"] == "no end" and row["offered_rate"] == 1
    assert row["duration_s"] == 10  # the one that failed has kept the server busy
    assert row["request_throughput"] == 0.2 and row["goodput"] == 0.1
    assert row["slo_attainment"] == pytest.approx(1 / 3, rel=1e-4)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (14, 6)
    assert row["short_outputs"] == 1 and row["total_throughput"] == 2
    assert (row["median_ttft_ms"], row["median_e2e_ms"]) == (750, 2500)
    assert (row["mean_concurrency"], row["max_concurrency"]) == ((4 + 1 + 7) / 10, 2)
    assert row["max_lag_ms"] == 250


def test_a_run_in_which_nothing_ended_well_has_counts_only() -> None:
    lost = exchange(0, 1)
    lost.fail("connection", "refused")
    row = Run(start=0, exchanges=[lost]).row(Slo.parse("e2e:5"))
    assert (row["completed"], row["request_throughput"], row["goodput"]) == (0, 0, 0)
    assert row["median_ttft_ms"] is None and row["offered_rate"] is None
    assert json.dumps(row, allow_nan=False)
    without = Run(start=0, exchanges=[lost]).row()
    assert without["goodput"] is without["slo_attainment"] is None


def test_a_server_that_waits_for_all_requests_gets_them() -> None:
    """A closed loop would wait for ever: nothing is answered before the last one is there."""
    with serve(FakeOpenAI(gate=12)) as fake:
        run = run_of(fake, load(12, every=0.01), timeout=30)
    assert fake.most_here == 12 and all(each.failure is None for each in run.exchanges)
    row = run.row()
    assert (row["completed"], row["max_concurrency"]) == (12, 12)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (36, 48)


def test_requests_go_out_in_order_and_not_before_they_are_due() -> None:
    with serve() as fake:
        run = run_of(fake, load(5, every=0.05))
    sent = [each.sent for each in run.exchanges]
    assert sent == sorted(sent)
    assert all(each.ready >= each.due for each in run.exchanges)
    due = [each.due - run.start for each in run.exchanges]
    assert due == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_who_waits_for_a_slot_counts_from_when_it_was_due() -> None:
    with serve() as fake:
        run = run_of(fake, load(6), 2)
    assert fake.most_here <= 2
    assert {each.due for each in run.exchanges} == {run.start}
    assert run.exchanges[-1].sent >= min(each.ended for each in run.exchanges)
    row, waits = run.row(), [each.sent - each.due for each in run.exchanges]
    assert row["max_concurrency"] == 2
    assert row["mean_ttft_ms"] >= 0.999 * 1e3 * sum(waits) / len(waits)


def test_what_fails_is_counted_by_kind_and_the_others_go_on() -> None:
    plan: Sequence[str | int] = (429, "cut", "ok", "error", "unfinished", 500, "hang", "ok", 429)
    with serve(FakeOpenAI(plan=list(plan))) as fake:
        run = run_of(fake, load(10, every=0.02), timeout=3)
    assert [each.failure for each in run.exchanges] == [
        "http_429", "broken_stream", None, "broken_stream", "broken_stream", "http_500",
        "timeout", None, "http_429", None,
    ]  # fmt: skip
    row = run.row()
    assert (row["completed"], row["failed"]) == (3, 7) and row["total_output_tokens"] == 12
    assert row["failures"] == {"http_429": 2, "broken_stream": 3, "http_500": 1, "timeout": 1}
    said = [each.message for each in run.exchanges]
    assert said[0] == row["first_error"] == "HTTP 429: scripted 429; try again in 7 s"
    assert (said[3], said[4]) == ("out of pages", "the stream ended without [DONE]")
    assert said[6] == "no end after 3 s"


def test_a_server_that_is_gone_is_a_failed_connection() -> None:
    with serve() as fake:
        pass
    run = run_of(fake, load(2))
    assert [each.failure for each in run.exchanges] == ["connection"] * 2


def test_several_tokens_in_a_chunk_and_no_usage() -> None:
    with serve(FakeOpenAI(tokens_per_chunk=3, cached_tokens=2)) as fake:
        row = run_of(fake, load(4, output_len=9)).row()
    assert (row["total_output_tokens"], row["short_outputs"], row["without_usage"]) == (36, 0, 0)
    assert row["cached_tokens"] == 8
    with serve(FakeOpenAI(tokens_per_chunk=3, usage=False)) as fake:
        row = run_of(fake, load(4, output_len=9)).row()
    # A chunk is a token then, and the prompt has the length that it should have.
    assert (row["total_output_tokens"], row["short_outputs"], row["without_usage"]) == (12, 4, 4)
    assert row["total_input_tokens"] == 12 and row["cached_tokens"] is None


def test_answers_without_any_text() -> None:
    with serve(FakeOpenAI(plan=["mute"])) as fake:
        row = run_of(fake, load(1)).row()
    assert (row["completed"], row["total_output_tokens"]) == (1, 4)
    assert row["median_ttft_ms"] == row["median_e2e_ms"] > 0 and row["median_tpot_ms"] is None


def test_how_servers_are_asked() -> None:
    key = {"Authorization": "Bearer secret"}
    with serve(FakeOpenAI(key="secret")) as fake:
        for options in ({}, {"chat": True}, {"prompt_ids": True}):
            run = run_of(fake, load(1), headers=key, **options)
            assert run.exchanges[0].failure is None
        extra = {"max_tokens": 2, "top_k": 1}
        run_of(fake, load(1), headers=key, ignore_eos=False, extra=extra)
        assert run_of(fake, load(1)).exchanges[0].failure == "http_401"
    text, chat, ids, more = fake.bodies[:4]
    assert text == {
        "model": "fake", "prompt": "time time time", "max_tokens": 4, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert fake.paths[:2] == ["/v1/completions", "/v1/chat/completions"]
    assert chat["messages"] == [{"role": "user", "content": "time time time"}]
    assert "prompt" not in chat and ids["prompt"] == [0, 0, 0]
    assert "ignore_eos" not in more and (more["max_tokens"], more["top_k"]) == (2, 1)


def test_the_model_is_the_first_that_the_server_lists() -> None:
    with serve() as fake:
        assert asyncio.run(find_model(Server(url=fake.url), None)).model == "fake"
        assert asyncio.run(find_model(Server(url=fake.url), "mine")).model == "mine"
    for other in (FakeOpenAI(models=()), FakeOpenAI(key="secret")):
        with serve(other), pytest.raises(KvantError, match=r"lists no model|HTTP 401: wrong key"):
            asyncio.run(find_model(Server(url=other.url), None))
    with pytest.raises(KvantError, match=f"no server answers at {other.url}"):
        asyncio.run(find_model(Server(url=other.url), None))


def test_a_short_request_goes_first_and_must_succeed() -> None:
    ticks: list[int] = []
    with serve() as fake:
        rows = asyncio.run(measure(server_of(fake), [load(3), load(2)], CODEC, tick=ticks.append))
    assert [row["completed"] for row in rows] == [3, 2] and sum(ticks) == 5
    assert len(fake.bodies) == 6
    with serve(FakeOpenAI(plan=[400])) as fake, pytest.raises(KvantError, match="HTTP 400"):
        asyncio.run(measure(server_of(fake), [load(3)], CODEC))
