"""The cpu backend besides its arithmetic: instruction sets, threads, layouts of tensors, sizes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.errors import ConfigError
from kvant.formats import KVShape, KVSpec
from kvant.kernels import Batch, KVMemory, cpu
from kvant.kernels.cpu import CPUBackend, available_isas, chosen_isa
from tests.kernels.driver import Driver, Sequence, assert_accurate

KV = ("f16", "int8h", "k4v4")


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn."""
    monkeypatch.setenv("KVANT_ISA", request.param)
    return str(request.param)


def _size_pools(monkeypatch: pytest.MonkeyPatch, pages: int, recent: int, scratch: int) -> None:
    """Give the pools of later drivers so many pages."""
    for name, size in (("PAGES", pages), ("RECENT", recent), ("SCRATCH", scratch)):
        monkeypatch.setattr(f"tests.kernels.driver.NUM_{name}", size)


@pytest.fixture
def long_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers with room for thousands of tokens."""
    _size_pools(monkeypatch, 50, 6, 50)


@pytest.fixture
def many_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers with room for two hundred sequences."""
    _size_pools(monkeypatch, 400, 450, 20)


def _memory(head_dim: int = 64, kv: str = "f32") -> KVMemory:
    shape = KVShape(num_layers=1, num_kv_heads=2, head_dim=head_dim)
    return KVMemory.allocate(KVSpec.parse(kv), shape, 2, 0, 0)


def _driver(kv: str, threads: int, **options: Any) -> Driver:
    driver = Driver("cpu", kv, **options)
    driver.backend = CPUBackend(driver.memory, num_threads=threads)
    return driver


def _write(driver: Driver, seq: Sequence, count: int) -> Batch:
    """Write ``count`` tokens of a sequence; nothing is attended."""
    slices, batch, _ = driver.begin([(seq, count)])
    for layer in range(driver.shape.num_layers):
        driver.backend.write(layer, seq.k[layer, :count], seq.v[layer, :count], batch)
    seq.computed = slices[0][2]
    driver.cache.commit(seq.holding, seq.tokens, seq.computed)
    return batch


# The instruction set.


@pytest.mark.parametrize("forced", (None, ""))
def test_the_best_instruction_set_is_taken(
    forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVANT_ISA", raising=False)
    if forced is not None:
        monkeypatch.setenv("KVANT_ISA", forced)
    assert available_isas()[0] == "scalar"
    assert CPUBackend(_memory()).isa == chosen_isa() == available_isas()[-1]


def test_the_environment_forces_an_instruction_set(isa: str) -> None:
    assert CPUBackend(_memory()).isa == isa


@pytest.mark.parametrize("forced", ("nonsense", "AVX2", "avx512 ", "neon"))
def test_an_instruction_set_that_is_not_there_is_refused(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held down: a silent return to another one, or to the best."""
    monkeypatch.setenv("KVANT_ISA", forced)
    with pytest.raises(ConfigError) as caught:
        CPUBackend(_memory())
    message = str(caught.value)
    assert f'KVANT_ISA is "{forced}"' in message and "\n" not in message
    assert ", ".join(available_isas()) in message and "unset it" in message


def test_an_instruction_set_of_another_processor_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in the build, but not here: as if it were unknown."""
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar", "avx2"))
    monkeypatch.setenv("KVANT_ISA", "avx512")
    with pytest.raises(ConfigError, match=r'"avx512".*: scalar, avx2; unset it for the best$'):
        CPUBackend(_memory())


@pytest.mark.parametrize("head_dim", (4, 12, 60, 260, 264, 512))
def test_a_head_dim_without_kernels_is_refused(head_dim: int) -> None:
    with pytest.raises(ConfigError) as caught:
        CPUBackend(_memory(head_dim))
    message = str(caught.value)
    assert f"has {head_dim};" in message and 'backend="reference"' in message
    assert "multiple of 8 up to 256" in message and "\n" not in message


# Threads.


@pytest.mark.parametrize("window", (None, 1500))
@pytest.mark.parametrize("kv", KV)
@pytest.mark.usefixtures("long_pools")
def test_threads_leave_no_trace_in_a_decode(isa: str, kv: str, window: int | None) -> None:
    """Splits of a long context are shared out, and whoever is last merges them."""
    outputs, pages = [], []
    for threads in (1, 2, 3):
        driver = _driver(kv, threads, heads=12, kv_heads=4, head_dim=128, window=window)
        seq = driver.add(3003)
        _write(driver, seq, 3000)
        driver.run(seq, driver.add(5), chunks=(1, 3))
        outputs.append(seq.out[:, 3000:])
        pages.append(driver.base_bytes(seq))
    assert np.isfinite(outputs[0]).all()
    for output, written in zip(outputs[1:], pages[1:], strict=True):
        np.testing.assert_array_equal(output, outputs[0])
        np.testing.assert_array_equal(written, pages[0])


@pytest.mark.parametrize("kv", KV)
def test_threads_leave_no_trace_in_a_prefill(isa: str, kv: str) -> None:
    outputs, pages, recent = [], [], []
    for threads in (1, 2, 3):
        driver = _driver(kv, threads, layers=2)
        sequences = [driver.add(length) for length in (300, 77)]
        driver.run(*sequences, chunks=(290, 77))
        outputs.append(np.concatenate([seq.out for seq in sequences], axis=1))
        pages.append([driver.base_bytes(seq) for seq in sequences])
        recent.append([driver.recent_vectors(seq) for seq in sequences])
    for each in (outputs, pages, recent):
        for other in each[1:]:
            for ours, first in zip(other, each[0], strict=True):
                np.testing.assert_array_equal(ours, first)


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """A Python thread runs until it gives the GIL up itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("long_pools", "no_forced_switches")
def test_other_python_threads_run_during_attention() -> None:
    """Held down: an engine's step that stops the server's event loop. Nothing else between the
    two looks at the counter gives the GIL up."""
    driver = _driver("int8", 1, heads=16, head_dim=128)
    seq = driver.add(2048)
    batch = _write(driver, seq, 2048)
    count, stop, started = 0, False, threading.Event()

    def work() -> None:
        nonlocal count
        while not stop:
            started.set()
            count += 1
            time.sleep(0)  # without the GIL

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        before, attempts = count, 0
        while count == before and attempts < 100:  # of a tenth of a second or so
            driver.backend.attend(0, seq.q[0], batch, scale=0.1)
            attempts += 1
        assert count > before
    finally:
        stop = True
        thread.join()


@pytest.mark.parametrize("threads", (1, 2))
def test_backends_at_work_at_once_do_not_meet(isa: str, threads: int) -> None:
    """Two engines of a process have their own memory and scratch memory."""

    def work(kv: str) -> NDArray[Any]:
        driver = _driver(kv, threads, heads=8, layers=2)
        sequences = [driver.add(length) for length in (700, 65, 3)]
        driver.run(*sequences, chunks=(300, 1, 70))
        return np.concatenate([seq.out for seq in sequences], axis=1)

    specs = ("int8h", "k4v4") * 2
    alone = [work(kv) for kv in specs[:2]] * 2
    with ThreadPoolExecutor(len(specs)) as pool:
        for found, expected in zip(pool.map(work, specs), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("asked", "threads"),
    (
        *((None, 5), ("", 5), ("3", 3), ("1", 1), ("4,2", 4)),
        *(("0", 5), ("-2", 5), ("two", 5), ("2.5", 5), (",", 5), ("0x2", 5)),
    ),
)
def test_how_many_threads_there_are(
    asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``OMP_NUM_THREADS``, of whose list by nesting the first; nonsense counts as unset, as it
    does for OpenMP."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    cores = SimpleNamespace(environ=os.environ, sched_getaffinity=lambda _: set(range(5)))
    monkeypatch.setattr(cpu, "os", cores)
    assert cpu.default_threads() == threads


# Layouts of tensors.


def _every_other(x: Any) -> Any:
    """The last dimension is not dense."""
    return x.repeat_interleave(2, -1)[..., ::2]


def _transposed(x: Any) -> Any:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _columns_first(x: Any) -> Any:
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def _part_of_more(x: Any) -> Any:
    """Rows and heads are apart, and the address is odd for vectors."""
    whole = x.new_full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3), float("nan"))
    view = whole[1:, 1:-1, 1:-2]
    view.copy_(x)
    return view


LAYOUTS: tuple[Callable[[Any], Any], ...] = (
    _every_other,
    _transposed,
    _columns_first,
    _part_of_more,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("head_dim", (24, 64))
def test_a_tensor_may_lie_in_memory_as_it_likes(
    isa: str, head_dim: int, dtype: str, layout: Callable[[Any], Any]
) -> None:
    import torch

    found, pages = [], []
    for arrange in (lambda x: x, layout):
        driver = _driver("k4v4", 1, head_dim=head_dim)
        seq = driver.add(140)
        batch = driver.begin([(seq, 140)]).batch
        given = [torch.from_numpy(x[0]).to(getattr(torch, dtype)) for x in (seq.q, seq.k, seq.v)]
        q, k, v = map(arrange, given)
        driver.backend.write(0, k, v, batch)
        out = driver.backend.attend(0, q, batch, scale=0.1)
        assert torch.equal(q, given[0]), "an input changed"
        assert (out.dtype, out.shape) == (q.dtype, q.shape)
        assert out.isfinite().all()
        found.append(out)
        pages.append(driver.memory.base.pages.copy())
    assert torch.equal(*found)
    np.testing.assert_array_equal(pages[0], pages[1])


@pytest.mark.parametrize("head_dim", (24, 64, 80, 256))
def test_bfloat16_queries_are_as_good_as_float32_ones(isa: str, head_dim: int) -> None:
    """Where they are multiplied by pairs with keys, the result is that of float32 but for the last
    bit of some bfloat16 outputs."""
    import torch

    driver = _driver("bf16", 1, head_dim=head_dim)
    seq = driver.add(140)
    batch = driver.begin([(seq, 140)]).batch
    q, k, v = (torch.from_numpy(x[0]) for x in (seq.q, seq.k, seq.v))
    q = q.bfloat16()
    driver.backend.write(0, k, v, batch)
    found = driver.backend.attend(0, q, batch, scale=0.1)
    expected = driver.backend.attend(0, q.float(), batch, scale=0.1).bfloat16()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", ("float64", "int32"))
def test_other_types_are_taken_as_float32(dtype: str) -> None:
    import torch

    driver = _driver("int8", 1)
    seq = driver.add(70)
    batch = driver.begin([(seq, 70)]).batch
    q, k, v = (torch.from_numpy(4 * x[0]).to(getattr(torch, dtype)) for x in (seq.q, seq.k, seq.v))
    driver.backend.write(0, k, v, batch)
    found = driver.backend.attend(0, q, batch, scale=0.1)
    same = driver.backend.attend(0, q.float(), batch, scale=0.1)
    assert torch.equal(found, same.to(q.dtype))


def _backwards(x: NDArray[Any]) -> NDArray[Any]:
    return x[::-1, ::-1].copy()[::-1, ::-1]


@pytest.mark.parametrize(
    "layout",
    (
        np.asfortranarray,
        _backwards,
        lambda x: x[..., ::-1].copy()[..., ::-1],
        lambda x: np.repeat(x, 2, -1)[..., ::2],
        lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
    ),
)
def test_an_array_may_lie_in_memory_as_it_likes(
    isa: str, layout: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    found, pages = [], []
    for arrange in (np.ascontiguousarray, layout):
        driver = _driver("int8h", 1)
        seq = driver.add(140)
        batch = driver.begin([(seq, 140)]).batch
        q, k, v = (arrange(x[0]) for x in (seq.q, seq.k, seq.v))
        driver.backend.write(0, k, v, batch)
        found.append(driver.backend.attend(0, q, batch, scale=0.1))
        pages.append(driver.memory.base.pages.copy())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(pages[0], pages[1])


# Sizes.


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("kv", ("int8", "k4v4"))
def test_a_batch_of_nothing_does_nothing(isa: str, kv: str, threads: int) -> None:
    import torch

    driver = _driver(kv, threads)
    none = np.zeros(0, np.int64)
    batch = Batch(none, none, (), none)
    pools = [pool.pages for pool in (driver.memory.base, driver.memory.recent)]
    before = [pages.copy() for pages in pools]
    q, kv_rows = np.zeros((0, 4, 64), np.float32), np.zeros((0, 2, 64), np.float32)
    for convert in (np.asarray, torch.from_numpy):
        driver.backend.write(0, convert(kv_rows), convert(kv_rows), batch)
        out = driver.backend.attend(0, convert(q), batch, scale=1.0)
        assert tuple(out.shape) == q.shape and type(out) is type(convert(q))
    for pages, was in zip(pools, before, strict=True):
        np.testing.assert_array_equal(pages, was)
    seq = driver.add(70)
    driver.run(seq)
    assert_accurate(driver, seq)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.usefixtures("many_pools")
def test_two_hundred_sequences(isa: str, kv: str) -> None:
    """Each has the outputs that it has alone."""
    driver = _driver(kv, 2)
    sequences = [driver.add(60 + i % 17) for i in range(200)]
    driver.step([(seq, len(seq.tokens) - 3) for seq in sequences])
    driver.run(*sequences, chunks=(1,))
    assert_accurate(driver, *sequences[:20], *sequences[-3:])
    for seq in sequences[::9]:
        alone = _driver(kv, 1)
        again = alone.replay(seq)
        alone.run(again)
        np.testing.assert_array_equal(seq.out, again.out)


@pytest.mark.parametrize("kv", KV)
def test_a_long_chunk(isa: str, kv: str) -> None:
    """Seven hundred rows at once, some before."""
    driver = _driver(kv, 2)
    seq = driver.add(750)
    driver.run(seq, chunks=(50, 700))
    assert_accurate(driver, seq)
