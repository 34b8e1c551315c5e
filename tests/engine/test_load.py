"""Where a model runs, in what dtype, and how much memory its cache may take there."""

from __future__ import annotations

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
    assert check_backend("auto") == "triton"


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
    spec, shape = KVSpec.parse("int8"), MODEL.kv_shape
    size = load.cache_size(EngineConfig(cache_max_entry_count=0.5), spec, shape)
    page = spec.page_bytes(shape)
    assert 2**30 - page < size.nbytes <= 2**30
    with pytest.raises(ConfigError, match=r"3\.00 GiB and 2\.00 GiB of GPU memory are free"):
        load.cache_size(EngineConfig(kv_memory="3GiB"), spec, shape)


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
