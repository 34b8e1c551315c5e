"""Where a model runs, in what dtype, and how much memory its cache may take there."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvant import EngineConfig, kernels
from kvant.engine import load
from kvant.errors import ConfigError
from kvant.formats import KVShape, KVSpec
from kvant.kernels import check_backend, make_memory
from kvant.kernels.triton import pool
from kvant.models.config import DecoderConfig
from kvant.models.workspace import workspace_bytes

GPU = torch.device("cuda", 0)
MODEL = DecoderConfig(
    architecture="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    max_positions=64,
    norm_eps=1e-5,
    windows=(None,),
)


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 7.0 and 2 GiB free."""
    monkeypatch.setattr(kernels, "_has_gpu", lambda: True)
    monkeypatch.setattr(pool, "find_device", lambda: GPU)
    monkeypatch.setattr(pool, "free_memory", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that kernels could run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    assert check_backend("auto") == "cpu"
    monkeypatch.setattr(kernels, "_has_gpu", lambda: True)
    monkeypatch.setattr(pool, "find_device", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert check_backend("auto") == "triton"


@pytest.fixture
def pascal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU of compute capability 6.1, its driver, and nothing said yet."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GeForce GTX 1080")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels._tell.cache_clear()
    yield
    kernels._tell.cache_clear()


def test_a_gpu_too_old_for_triton(pascal: None, caplog: pytest.LogCaptureFixture) -> None:
    said = r"capability 7\.0 or more, and GeForce GTX 1080 has 6\.1; take backend=\"cpu\""
    with pytest.raises(ConfigError, match=said):
        check_backend("triton")
    with caplog.at_level(logging.WARNING, logger="kvant"):
        assert [check_backend("auto") for _ in range(3)] == ["cpu"] * 3
    (line,) = caplog.messages
    assert "the GPU is left alone" in line and "GeForce GTX 1080 has 6.1" in line


def test_a_gpu_without_triton(
    pascal: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING, logger="kvant"):
        assert [check_backend("auto") for _ in range(3)] == ["cpu"] * 3
    (line,) = caplog.messages
    assert "the GPU is left alone" in line and "install kvant[gpu]" in line


def test_auto_is_not_what_is_interpreted(pascal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (check_backend("auto"), check_backend("triton")) == ("cpu", "triton")


@pytest.mark.parametrize("what", [check_backend, lambda name: load.open_model("x", _on(name))])
def test_without_a_gpu_there_is_another_backend(no_gpu: None, what: Any) -> None:
    with pytest.raises(ConfigError, match=r'backend="triton" needs an NVIDIA GPU.*backend="cpu"'):
        what("triton")


def _on(name: str, **options: Any) -> EngineConfig:
    return EngineConfig(backend=name, **options)


def test_without_triton_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert check_backend("auto") == "cpu"
    with pytest.raises(ConfigError, match=r"install kvant\[gpu\]"):
        check_backend("triton")


def test_sixteen_bits_are_those_of_the_gpu(volta: None) -> None:
    """float16 where there is no bfloat16, for weights and cache."""
    assert load._dtype(EngineConfig()) == torch.float16
    assert str(load._kv_spec(EngineConfig(), MODEL)) == "f16"
    assert str(load._kv_spec(EngineConfig(dtype="float32"), MODEL)) == "bf16"
    assert str(load._kv_spec(EngineConfig(kv="k4v4"), MODEL)) == str(KVSpec.parse("k4v4"))
    assert load._dtype(EngineConfig(backend="cpu")) == torch.bfloat16
    assert str(load._kv_spec(EngineConfig(backend="cpu"), MODEL)) == "bf16"
    with pytest.raises(ConfigError, match=r"Tesla V100 has 7\.0; take dtype=float16"):
        load._dtype(EngineConfig(dtype="bfloat16"))


def test_the_cache_is_a_share_of_gpu_memory(volta: None) -> None:
    spec = KVSpec.parse("int8")
    size = load.cache_size(EngineConfig(cache_max_entry_count=0.5), spec, MODEL)
    page = spec.page_bytes(MODEL.kv_shape)
    assert 2**30 - page < size.nbytes <= 2**30
    with pytest.raises(ConfigError, match=r"3\.00 GiB and 2\.00 GiB of GPU memory are free"):
        load.cache_size(EngineConfig(kv_memory="3GiB"), spec, MODEL)


def test_a_step_finds_its_memory(volta: None) -> None:
    """A share takes what a step leaves; sizes that leave less are refused, and so is a GPU that
    has no room for both."""
    spec, free = KVSpec.parse("int8"), 2**31
    needed = load._workspace(EngineConfig(), MODEL, GPU)
    page = spec.page_bytes(MODEL.kv_shape)
    assert 2**28 < needed < 2**30
    size = load.cache_size(EngineConfig(cache_max_entry_count=0.99), spec, MODEL, free)
    assert free - needed - page < size.nbytes <= free - needed
    exact = EngineConfig(kv_memory=free - needed)
    assert load.cache_size(exact, spec, MODEL, free).nbytes <= free - needed
    said = r"2\.00 GiB of GPU memory are free, of which a step needs up to 0\.\d\d GiB; .*kv_memory"
    for options in ({"kv_memory": free - needed + page}, {"kv_tokens": 64 * (free // page)}):
        with pytest.raises(ConfigError, match=said + ".*lower max_prefill_token_num"):
            load.cache_size(EngineConfig(**options), spec, MODEL, free)
    with pytest.raises(ConfigError, match=r"needs up to 0\.\d\d GiB and 0\.25 GiB.*lower max_pre"):
        load.cache_size(EngineConfig(), spec, MODEL, 2**28)
    on_cpu = EngineConfig(backend="cpu", cache_max_entry_count=0.99)
    assert load.cache_size(on_cpu, spec, MODEL, 2**28).nbytes > 0.98 * 2**28


def test_the_workspace_grows_with_what_it_is_for() -> None:
    """By what is certain: rows of logits, contexts' tables, graphs; twice the bytes as float32."""
    model = replace(
        MODEL, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_heads=32,
        num_kv_heads=32, head_dim=128,
    )  # fmt: skip
    usual: dict[str, Any] = {"max_step_tokens": 1024, "max_batch_size": 64, "longest": 4096}
    usual |= {"graphs": False, "dtype": torch.bfloat16}

    def more(**options: Any) -> int:
        return workspace_bytes(model, **(usual | options)) - workspace_bytes(model, **usual)

    assert more(max_step_tokens=2048) > 1024 * (4 * 32000 + 2 * 3 * 11008)
    assert more(longest=8192) >= 4096 * 128 * 4
    assert more(max_batch_size=65) >= 32 * 16 * 128 * 4  # 16 splits of 4 pages
    assert more(max_batch_size=2048) == more(max_batch_size=1024)  # a row each
    assert more(graphs=True) > 64 * 2 * 3 * 11008
    assert more(dtype=torch.float32) > 2**28


def test_a_pool_on_a_device() -> None:
    found = pool.DevicePool(5, 96, torch.device("cpu"))
    assert (found.nbytes, found.pages.shape) == (480, (5, 96))
    assert not found.pages.any()
    found.pages[:] = torch.arange(480).view(5, 96) % 251
    before = found.pages.clone()
    found.copy(3, 1)
    assert torch.equal(found.pages[1], before[3])
    assert torch.equal(found.pages[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    read = found.read(np.array([4, 1]), 10, 30)
    assert np.array_equal(read, before[[4, 3], 10:30].numpy())
    found.pages[:] = 0
    assert read.any()


@pytest.mark.parametrize("num_pages", [2**40, 2**62])
def test_a_pool_that_does_not_fit_is_refused(num_pages: int) -> None:
    with pytest.raises(ConfigError, match=rf"the GPU refuses.* {num_pages * 4096} bytes") as found:
        pool.DevicePool(num_pages, 4096, torch.device("cpu"))
    assert "give less with kv_memory" in str(found.value) and "\n" not in str(found.value)


def test_pools_are_where_the_backend_works(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KVShape(num_layers=1, num_kv_heads=1, head_dim=16)

    def pages(name: str) -> Any:
        return make_memory(name, KVSpec.parse("int8"), shape, 2, 0, 64).base.pages

    assert isinstance(pages("cpu"), np.ndarray)
    assert torch.as_tensor(pages("triton")).device == pool.find_device()
