"""The engine's thread: nobody waits for ever, whatever happens to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from kvant.config import GenerationConfig
from kvant.engine.engine import Engine
from kvant.engine.worker import EngineWorker, Stream
from kvant.errors import EngineDeadError
from kvant.request import Output, Request
from tests.engine.mock import continuation, make_engine

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def engine() -> Engine:
    return make_engine(num_pages=16)


@pytest.fixture
def worker(engine: Engine) -> Iterator[EngineWorker]:
    with EngineWorker(engine) as worker:
        yield worker


def request_of(worker: EngineWorker, new: int = 50) -> Request:
    return Request(
        id=worker.new_id(),
        tokens=list(PROMPT),
        num_prompt=len(PROMPT),
        gen=GenerationConfig(),
        max_tokens=len(PROMPT) + new,
    )


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_streams_from_many_threads(worker: EngineWorker) -> None:
    results: list[list[int]] = []

    def client() -> None:
        results.append(tokens_of(list(Stream(worker, request_of(worker)))))

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [continuation(PROMPT, 50)] * 12


def test_async_streams_side_by_side(worker: EngineWorker) -> None:
    async def client() -> list[int]:
        return tokens_of([output async for output in Stream(worker, request_of(worker))])

    async def all_clients() -> list[list[int]]:
        return await asyncio.gather(*(client() for _ in range(5)))

    assert asyncio.run(all_clients()) == [continuation(PROMPT, 50)] * 5


def test_leaving_a_stream_aborts_and_frees(worker: EngineWorker, engine: Engine) -> None:
    stream = iter(Stream(worker, request_of(worker, 900)))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    _wait_until_idle(worker)
    assert worker.call(lambda e: e.stats()).pages_held == 0


def test_cancelling_a_task_aborts_and_frees(worker: EngineWorker) -> None:
    async def client() -> None:
        async for _ in Stream(worker, request_of(worker, 900)):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(client())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    _wait_until_idle(worker)
    assert worker.call(lambda e: e.stats()).pages_held == 0


def test_a_failing_step_fails_all_requests_and_later_ones(
    worker: EngineWorker, engine: Engine
) -> None:
    def explode(*arguments: object) -> None:
        raise RuntimeError("boom")

    engine._model.forward = explode  # type: ignore[method-assign, assignment]
    outputs = list(Stream(worker, request_of(worker)))
    assert outputs[-1].finish_reason == "error"
    assert "boom" in str(outputs[-1].error)
    assert not worker.is_alive
    with pytest.raises(EngineDeadError, match="boom"):
        Stream(worker, request_of(worker))
    with pytest.raises(EngineDeadError):
        worker.call(lambda e: e.stats())


class OutOfMemoryError(RuntimeError):
    """Of torch.cuda, which there is no GPU for."""


def test_what_helps_where_a_gpu_has_no_memory(worker: EngineWorker, engine: Engine) -> None:
    def explode(*arguments: object) -> None:
        raise OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\n"
        )

    engine._model.forward = explode  # type: ignore[method-assign, assignment]
    error = str(list(Stream(worker, request_of(worker)))[-1].error)
    assert "no memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in error
    for text in (error, str(worker.failure)):
        assert "lower cache_max_entry_count or max_prefill_token_num" in text
    with pytest.raises(EngineDeadError, match="max_prefill_token_num"):
        Stream(worker, request_of(worker))


def test_closing_ends_what_runs_and_refuses_more(engine: Engine) -> None:
    worker = EngineWorker(engine)
    streams = [Stream(worker, request_of(worker, 900)) for _ in range(3)]
    worker.close()
    worker.close()
    for stream in streams:
        assert list(stream)[-1].finish_reason in ("abort", "length")
    with pytest.raises(EngineDeadError, match="closed"):
        Stream(worker, request_of(worker))


def test_calls_run_between_steps_and_pass_errors_on(worker: EngineWorker) -> None:
    assert worker.call(lambda e: threading.current_thread().name) == "kvant-engine"
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda e: 1 // 0)
    assert worker.is_alive


def _wait_until_idle(worker: EngineWorker) -> None:
    deadline = time.monotonic() + 10
    while worker.call(lambda e: e.has_work):
        assert time.monotonic() < deadline
        time.sleep(0.005)
