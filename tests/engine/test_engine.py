"""The engine on a mock model, in milliseconds. Each test says which failure it rules out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvant.config import GenerationConfig
from kvant.engine.engine import Engine
from kvant.engine.sampler import Logits
from kvant.errors import RequestError
from kvant.kernels.backend import Backend, Batch
from kvant.models import logits as device
from kvant.models.logits import DeviceLogits
from kvant.request import Output, Request, Status
from tests.engine.mock import SPECS, VOCAB, continuation, make_engine


@dataclass
class Client:
    """Submits to an engine and remembers what each request got."""

    engine: Engine
    outputs: dict[int, list[Output]] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)

    def submit(
        self,
        prompt: list[int],
        new: int,
        gen: GenerationConfig | None = None,
        *,
        leader: Request | None = None,
        common: int | None = None,
        fork_at: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> Request:
        request_id = len(self.requests)
        self.outputs[request_id] = []
        request = Request(
            id=request_id,
            tokens=list(prompt),
            num_prompt=len(prompt),
            gen=gen or GenerationConfig(),
            max_tokens=min(len(prompt) + new, self.engine.session_len),
            deliver=self.outputs[request_id].append,
            leader=leader,
            common=(len(prompt) if leader else 0) if common is None else common,
            fork_at=fork_at,
            stop_ids=stop_ids,
            seed=seed,
        )
        self.requests[request_id] = request
        self.engine.submit(request)
        return request

    def run(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.engine.step()
        pytest.fail(f"still work after {limit} steps")

    def tokens(self, request: Request) -> list[int]:
        return [token for output in self.outputs[request.id] for token in output.token_ids]

    def reason(self, request: Request) -> str | None:
        reasons = [o.finish_reason for o in self.outputs[request.id] if o.finish_reason]
        assert len(reasons) <= 1, "a request ended twice"
        return reasons[0] if reasons else None


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("budget", [1, 17, 64, 512])
def test_text_does_not_depend_on_the_chunking(spec: str, length: int, budget: int) -> None:
    """Page borders and chunk borders of every kind."""
    client = Client(make_engine(spec, max_step_tokens=budget))
    request = client.submit(prompt_of(length), 70)
    client.run()
    assert client.tokens(request) == continuation(prompt_of(length), 70)
    assert client.reason(request) == "length"


@pytest.mark.parametrize("spec", SPECS)
def test_a_prefix_hit_gives_the_same_text(spec: str) -> None:
    """The second request finds the full pages of the first and recomputes the rest."""
    client = Client(make_engine(spec))
    prompt = prompt_of(200)
    first = client.submit(prompt, 20)
    client.run()
    second = client.submit(prompt, 20)
    client.run()
    assert first.cached_tokens == 0
    assert second.cached_tokens == 192
    assert client.tokens(first) == client.tokens(second) == continuation(prompt, 20)


def test_an_evicted_sink_is_recomputed_and_a_lone_request_always_goes_on() -> None:
    """Two recent pages are enough for one sequence at a time, whatever sinks are cached."""
    client = Client(make_engine("int4h+s64r64", num_recent=2))
    for prompt, hit in ((200, 0), (200, 192), (210, 0), (200, 0)):
        request = client.submit(prompt_of(prompt, seed=prompt), 70)
        client.run()
        assert request.cached_tokens == hit
        assert client.tokens(request) == continuation(prompt_of(prompt, seed=prompt), 70)


@pytest.mark.parametrize(("spec", "most"), [("int8", 4), ("int4h+r64", 3), ("int4h+s64r64", 1)])
def test_no_more_requests_run_than_have_recent_pages(spec: str, most: int) -> None:
    """Three of them: with a sink each needs two, so that none is preempted for want of one."""
    client = Client(make_engine(spec, num_recent=3, max_batch_size=4))
    for seed in range(5):
        client.submit(prompt_of(10, seed), 70)
    client.engine.step()
    assert client.engine.stats().running == most
    client.run()
    assert client.engine.stats().preemptions == 0


@pytest.mark.parametrize("spec", ["int8", "int4h+r64", "int4h+s64r64"])
def test_a_cleared_prefix_cache_finds_nothing(spec: str) -> None:
    client = Client(make_engine(spec))
    client.submit(prompt_of(200), 1)
    client.run()
    client.engine.clear_prefix_cache()
    again = client.submit(prompt_of(200), 1)
    client.run()
    assert again.cached_tokens == 0
    short = client.submit(prompt_of(70), 1)  # as far as the first group
    client.run()
    assert short.cached_tokens == 64


def test_a_turn_finds_the_pages_of_the_answer_before() -> None:
    """Generated tokens are cached like prompts: the next turn of a chat starts behind them."""
    client = Client(make_engine())
    first = client.submit(prompt_of(60), 80)
    client.run()
    longer = [*prompt_of(60), *client.tokens(first), 1, 2, 3]
    second = client.submit(longer, 5)
    client.run()
    assert second.cached_tokens == 128
    assert client.tokens(second) == continuation(longer, 5)


def test_a_prompt_that_is_cached_to_the_last_token_is_still_answered() -> None:
    """A hit must leave the last token to compute: its logits are needed."""
    client = Client(make_engine())
    for _ in range(2):
        request = client.submit(prompt_of(128), 3)
        client.run()
        assert client.tokens(request) == continuation(prompt_of(128), 3)
    assert request.cached_tokens == 64


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 2, 64, 65, 100, 128, 129])
def test_siblings_share_the_prompt_and_copy_before_they_write(spec: str, length: int) -> None:
    """n completions: the prompt is computed once; a shared open page is never overwritten."""
    client = Client(make_engine(spec, num_pages=16))
    leader = client.submit(prompt_of(length), 40)
    siblings = [client.submit(prompt_of(length), 40, leader=leader) for _ in range(3)]
    client.run()
    for request in (leader, *siblings):
        assert client.tokens(request) == continuation(prompt_of(length), 40)
    if spec == "int8":
        assert all(s.cached_tokens == length - 1 for s in siblings)


def test_siblings_outlive_an_aborted_leader() -> None:
    """They waited for it to compute their prompt; nobody waits for ever."""
    client = Client(make_engine(max_step_tokens=16))
    leader = client.submit(prompt_of(100), 5)
    sibling = client.submit(prompt_of(100), 5, leader=leader)
    client.engine.step()
    client.engine.abort(leader.id)
    client.run()
    assert client.reason(leader) == "abort"
    assert client.tokens(sibling) == continuation(prompt_of(100), 5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fork", [1, 63, 64, 65, 100, 128, 200])
@pytest.mark.parametrize("budget", [7, 512])
def test_requests_part_where_they_differ(spec: str, fork: int, budget: int) -> None:
    """What they begin with is computed once, in the middle of a page or not, and nobody writes
    into what another reads."""
    client = Client(make_engine(spec, num_pages=40, num_recent=16, max_step_tokens=budget))
    head, tails = prompt_of(fork), [prompt_of(9 + 20 * i, seed=i + 1) for i in range(4)]
    leader = client.submit([*head, *tails[0]], 30, fork_at=fork)
    followers = [client.submit([*head, *t], 30, leader=leader, common=fork) for t in tails[1:]]
    computed = 0
    while client.engine.has_work:
        plan = client.engine.step()
        assert plan is not None
        computed += sum(part.end - part.start for part in plan.slices)
    for request, tail in zip((leader, *followers), tails, strict=True):
        assert client.tokens(request) == continuation([*head, *tail], 30)
    once = fork + sum(map(len, tails)) + 4 * 29
    if budget == 512:
        assert computed == once
    else:  # a leader that goes on while there is no row for followers leaves them its full pages
        assert once <= computed <= once + 3 * 63


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_followers_outlive_their_leader(spec: str, steps: int) -> None:
    """Aborted before, at or after its halt."""
    client = Client(make_engine(spec, num_pages=40, num_recent=16, max_step_tokens=40))
    head = prompt_of(100)
    leader = client.submit([*head, 1, 2, 3], 5, fork_at=100)
    followers = [client.submit([*head, n], 5, leader=leader, common=100) for n in (4, 5)]
    for _ in range(steps):
        client.engine.step()
    client.engine.abort(leader.id)
    client.run()
    for request, last in zip(followers, (4, 5), strict=True):
        assert client.tokens(request) == continuation([*head, last], 5)


@pytest.mark.parametrize("spec", SPECS)
def test_groups_under_one_header_with_too_few_pages(spec: str) -> None:
    """Chains of leaders, preempted and waiting: nothing is lost, nobody waits for ever."""
    client = Client(make_engine(spec, num_pages=7, num_recent=16, max_step_tokens=90))
    header, work, before = prompt_of(130), [], None
    for group in range(12):
        context = [*header, *prompt_of(20 + group, seed=group + 1)]
        first = client.submit(
            [*context, 1], 50, leader=before, common=128 if before else 0, fork_at=len(context)
        )
        work.append((first, [*context, 1]))
        for last in (2, 3):
            ids = [*context, last]
            work.append((client.submit(ids, 50, leader=first, common=len(context)), ids))
        before = first
    client.run()
    for request, ids in work:
        assert client.tokens(request) == continuation(ids, 50)
    assert client.engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("spec", "prefix_caching"), [("int8", True), ("int4h+r64", False), ("int4h+s64r64", True)]
)
def test_a_thousand_requests_through_a_pool_ten_times_too_small(
    spec: str, prefix_caching: bool
) -> None:
    """Preemption loses no token, starves nobody and leaks no page."""
    rng = random.Random(1)
    shared = prompt_of(150, seed=99)
    work = [
        (
            (shared[: rng.randrange(150)] if rng.random() < 0.5 else [])
            + prompt_of(rng.randint(1, 120), seed=i),
            rng.randint(1, 200),
        )
        for i in range(1000)
    ]
    # 64 running sequences of about 200 tokens want some 250 pages
    engine = make_engine(
        spec,
        num_pages=25,
        num_recent=32,
        max_batch_size=64,
        max_step_tokens=256,
        prefix_caching=prefix_caching,
        check=False,
    )
    client = Client(engine)
    requests = [client.submit(prompt, new) for prompt, new in work]
    while engine.has_work:
        for _ in range(100):
            engine.step()
        engine.scheduler.check()
    assert engine.stats().preemptions > 0
    for request, (prompt, new) in zip(requests, work, strict=True):
        assert client.tokens(request) == continuation(prompt, new)
    assert engine.stats().pages_held == 0


def test_requests_start_in_order_of_arrival() -> None:
    """A stream of short prompts cannot keep a long one out."""
    client = Client(make_engine(num_pages=6, max_batch_size=2))
    long = client.submit(prompt_of(300), 10)
    shorts = [client.submit(prompt_of(10, seed=i), 30) for i in range(10)]
    finished: list[int] = []
    while client.engine.has_work:
        client.engine.step()
        for request in (long, *shorts):
            if client.reason(request) and request.id not in finished:
                finished.append(request.id)
    assert finished[0] == long.id


@pytest.mark.parametrize("spec", SPECS)
def test_abort_at_any_step_frees_everything(spec: str) -> None:
    """Waiting, mid-prefill, decoding, preempted: pages come back within the step."""
    for when in range(12):
        client = Client(make_engine(spec, num_pages=4, num_recent=2, max_step_tokens=32))
        requests = [client.submit(prompt_of(90, seed=i), 20) for i in range(4)]
        for _ in range(when):
            client.engine.step()
        for request in requests:
            client.engine.abort(request.id)
        assert all(client.reason(r) in ("abort", "length") for r in requests)
        assert client.engine.stats().pages_held == 0
        assert not client.engine.has_work
        client.engine.scheduler.check()


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    expected = continuation(prompt_of(20), 50)
    client = Client(make_engine())
    request = client.submit(prompt_of(20), 50, stop_ids=frozenset({expected[10]}))
    client.run()
    assert client.tokens(request) == expected[: expected.index(expected[10])]
    assert client.reason(request) == "stop"


def test_min_new_tokens_bans_the_stop_token_until_then() -> None:
    client = Client(make_engine())
    gen = GenerationConfig(min_new_tokens=30)
    request = client.submit(prompt_of(20), 50, gen, stop_ids=frozenset(range(VOCAB - 1)))
    client.run()
    assert len(client.tokens(request)) >= 30


def test_the_session_limit_ends_a_text_and_never_fails() -> None:
    client = Client(make_engine(num_pages=2))
    request = client.submit(prompt_of(100), 1000)
    client.run()
    assert client.reason(request) == "length"
    assert client.tokens(request) == continuation(prompt_of(100), 28)


def test_prompts_that_cannot_be_served_are_refused_with_the_limit() -> None:
    engine = make_engine(num_pages=2)
    with pytest.raises(RequestError, match=r"128 tokens.*limit is 128"):
        engine.validate(prompt_of(128))
    with pytest.raises(RequestError, match="empty"):
        engine.validate([])
    engine.validate(prompt_of(127))


def test_not_a_number_ends_its_own_request_only() -> None:
    """Other requests of the batch go on; the broken one is told why."""
    client = Client(make_engine())
    model = client.engine._model
    forward = model.forward

    def broken(batch: Batch, backend: Backend) -> Logits:
        logits = forward(batch, backend)
        logits.fetch(slice(1))[:] = np.nan  # a view
        return logits

    model.forward = broken  # type: ignore[method-assign]
    first, second = client.submit(prompt_of(5), 9), client.submit(prompt_of(6), 9)
    client.engine.step()
    model.forward = forward  # type: ignore[method-assign]
    client.run()
    assert client.reason(first) == "error"
    assert "not finite" in str(client.outputs[first.id][-1].error)
    assert client.tokens(second) == continuation(prompt_of(6), 9)
    assert client.engine.stats().pages_held == 0


def test_logits_may_stay_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and logits are the same, and a step copies token ids to the host once; more only for
    a receiver of logits, or rows with penalties."""
    copies: list[int] = []
    to_host = device._to_host
    monkeypatch.setattr(device, "_to_host", lambda x: copies.append(x.ndim) or to_host(x))

    def run(*, on_device: bool) -> tuple[list[list[int]], dict[int, list[float]]]:
        client = Client(make_engine())
        forward = client.engine._model.forward

        def elsewhere(batch: Batch, backend: Backend) -> Logits:
            return DeviceLogits(torch.from_numpy(forward(batch, backend).fetch(slice(None))))

        if on_device:
            monkeypatch.setattr(client.engine._model, "forward", elsewhere)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 9}
        requests = [
            client.submit(prompt_of(7), 3, GenerationConfig(repetition_penalty=0.01)),
            client.submit(prompt_of(6), 5, GenerationConfig(output_logits="all")),
            client.submit(prompt_of(5), 7),
            client.submit(prompt_of(5), 7, GenerationConfig(**drawn), seed=5),
        ]
        seen: dict[int, list[float]] = {}
        requests[1].logits_sink = lambda start, rows: seen.update(enumerate(rows.tolist(), start))
        client.run()
        return [client.tokens(request) for request in requests], seen

    expected = run(on_device=False)
    assert not copies
    assert run(on_device=True) == expected
    assert copies == [2, 1, 2] * 3 + [2, 1] * 2 + [1] * 2
    assert expected[0][2] == continuation(prompt_of(5), 7) != expected[0][3]
    assert sorted(expected[1]) == list(range(10))


@pytest.mark.parametrize("who", ["deliver", "logits_sink"])
def test_a_receiver_that_raises_loses_its_own_request_only(who: str) -> None:
    """A bug in one client must not end the others, nor the engine."""

    def explode(*arguments: object) -> None:
        raise RuntimeError("client bug")

    client = Client(make_engine())
    broken = client.submit(prompt_of(10), 9, GenerationConfig(output_logits="all"))
    setattr(broken, who, explode)
    other = client.submit(prompt_of(20), 9)
    client.run()
    assert broken.status is Status.FINISHED
    if who == "logits_sink":
        assert client.reason(broken) == "error"
    assert client.tokens(other) == continuation(prompt_of(20), 9)
    client.engine.scheduler.check()
    assert client.engine.stats().pages_held == 0


def test_a_detokenizer_that_raises_loses_its_own_request_only() -> None:
    class Broken:
        stopped = None

        def push(self, token: int) -> str:
            raise RuntimeError("push")

        def finish(self) -> str:
            raise RuntimeError("finish")

    client = Client(make_engine())
    broken, other = client.submit(prompt_of(10), 9), client.submit(prompt_of(20), 9)
    broken.text = Broken()  # type: ignore[assignment]
    client.run()
    assert client.reason(broken) == "error"
    assert client.tokens(other) == continuation(prompt_of(20), 9)


@pytest.mark.parametrize("what", ["deliver", "logits_sink"])
def test_a_receiver_may_abort_the_others(what: str) -> None:
    """Requests that end in the middle of a step are left out of the rest of it."""
    client = Client(make_engine())
    requests = [
        client.submit(prompt_of(10, seed=i), 9, GenerationConfig(output_logits="all"))
        for i in range(4)
    ]

    def abort_all(*arguments: object) -> None:
        for request in requests[1:]:
            client.engine.abort(request.id)

    setattr(requests[1], what, abort_all)
    client.run()
    assert client.tokens(requests[0]) == continuation(prompt_of(10, seed=0), 9)
    assert all(r.status is Status.FINISHED for r in requests)
    assert client.reason(requests[3]) == "abort"
    client.engine.scheduler.check()
    assert client.engine.stats().pages_held == 0


@pytest.mark.parametrize("token", [-1, VOCAB, 10**9, 1.5, "a"])
def test_token_ids_that_the_model_does_not_know_are_refused(token: object) -> None:
    """They would fail in the embedding, on the engine's thread, for everybody."""
    with pytest.raises(RequestError, match="token id"):
        make_engine().validate([1, token])  # type: ignore[list-item]


def test_preemption_does_not_count_as_a_cache_hit() -> None:
    """Its own pages, found again, were not cached for it."""
    client = Client(make_engine(num_pages=4, max_batch_size=4))
    requests = [client.submit(prompt_of(60, seed=i), 100) for i in range(3)]
    client.run()
    assert client.engine.stats().preemptions > 0
    assert [r.cached_tokens for r in requests] == [0, 0, 0]


class EngineMachine(RuleBasedStateMachine):
    """Submit, step, abort, forget caches, in any order, over a pool that is too small."""

    spec = "int8"
    num_recent = 3

    def __init__(self) -> None:
        super().__init__()
        engine = make_engine(
            self.spec,
            num_pages=6,
            num_recent=self.num_recent,
            max_batch_size=4,
            max_step_tokens=70,
        )
        self.client = Client(engine)
        self.work: dict[int, tuple[list[int], int]] = {}

    @rule(length=st.integers(1, 250), seed=st.integers(0, 2), new=st.integers(1, 90))
    def submit(self, length: int, seed: int, new: int) -> None:
        request = self.client.submit(prompt_of(length, seed), new)
        self.work[request.id] = prompt_of(length, seed), new

    @precondition(lambda self: self.client.requests)
    @rule(data=st.data(), new=st.integers(1, 90))
    def submit_sibling(self, data: st.DataObject, new: int) -> None:
        leader = self.client.requests[data.draw(st.sampled_from(sorted(self.client.requests)))]
        prompt = leader.tokens[: leader.num_prompt]
        request = self.client.submit(prompt, new, leader=leader)
        self.work[request.id] = prompt, new

    @rule(steps=st.integers(1, 30))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.client.engine.step()
            self.client.engine.scheduler.check()

    @precondition(lambda self: self.client.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.client.requests)))
        self.client.engine.abort(request_id)
        assert self.client.requests[request_id].status is Status.FINISHED

    @rule()
    def forget_caches(self) -> None:
        self.client.engine.clear_prefix_cache()

    @invariant()
    def check(self) -> None:
        self.client.engine.scheduler.check()

    def teardown(self) -> None:
        self.client.run()
        assert self.client.engine.stats().pages_held == 0
        for request_id, (prompt, new) in self.work.items():
            request = self.client.requests[request_id]
            count = min(new, self.client.engine.session_len - len(prompt))
            text, expected = self.client.tokens(request), continuation(prompt, count)
            if self.client.reason(request) == "abort":
                assert text == expected[: len(text)]
            else:
                assert self.client.reason(request) == "length"
                assert text == expected


class RecentEngineMachine(EngineMachine):
    """The same with a recent part."""

    spec = "int4h+r64"


class SinkEngineMachine(EngineMachine):
    """The same with a sink, for up to three sequences at a time."""

    spec = "int4h+s64r64"
    num_recent = 6


for _machine in (EngineMachine, RecentEngineMachine, SinkEngineMachine):
    _machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestEngineMachine = EngineMachine.TestCase
TestRecentEngineMachine = RecentEngineMachine.TestCase
TestSinkEngineMachine = SinkEngineMachine.TestCase
