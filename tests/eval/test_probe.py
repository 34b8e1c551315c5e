"""What the probe says against encoding and decoding the same vectors directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvant import EngineConfig, Pipeline
from kvant.engine.load import open_model, start_model
from kvant.eval.probe import Probe, read_pages
from kvant.formats import FORMATS, KVFormat, KVShape, KVSpec
from kvant.kernels import KVMemory, make_backend
from kvant.kernels.backend import Batch, BatchSequence
from tests.byte_model import HEAD_DIM, LAYERS, VOCAB

F64 = np.float64


class Recorder(Probe):
    """Keeps what it was given, too."""

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        self.written: dict[int, list[np.ndarray]] = getattr(self, "written", {})
        self.written.setdefault(layer, []).append(np.stack((k.float().numpy(), v.float().numpy())))
        super().write(layer, k, v, batch)


def kept(fmt: KVFormat, x: np.ndarray) -> np.ndarray:
    out: np.ndarray = fmt.decode(fmt.encode(x), x.shape[-1])
    return out


def ratio(exact: np.ndarray, stored: np.ndarray) -> float:
    noise = np.square(exact.astype(F64) - stored).sum()
    return float(10 * np.log10(np.square(exact.astype(F64)).sum() / noise))


@pytest.mark.parametrize("chunk", (17, 48, 64, 512))
@pytest.mark.parametrize("kv", ("bf16", "int8", "k=int8h,v=int4h", "int4h+r64"))
def test_sqnr_is_that_of_encoding_directly(tiny: str, kv: str, chunk: int) -> None:
    config = EngineConfig(kv=kv, dtype="float32", kv_tokens=256, max_prefill_token_num=chunk)
    opened = open_model(tiny, config)
    ids = np.random.default_rng(2).integers(0, VOCAB - 2, 200).tolist()
    with Pipeline(start_model(opened, opened.weights("float32"), config)) as pipe:
        probe = Recorder.install(pipe.model.engine)
        assert isinstance(probe, Recorder)
        pipe.run([pipe.score_request(ids, lambda *_: None)])
    spec = KVSpec.parse(kv)
    for layer in range(LAYERS):
        k, v = np.concatenate(probe.written[layer], axis=1)[:, :192]  # three full groups
        for side, (fmt, x) in enumerate(((spec.k, k), (spec.v, v))):
            once = x if spec.recent is None else kept(spec.recent, x)
            assert probe.sqnr_db()[side, layer] == pytest.approx(
                ratio(x, kept(fmt, once)), abs=1e-3
            )


def test_an_exact_cache_has_no_noise(tiny: str) -> None:
    config = EngineConfig(kv="f32", dtype="float32", kv_tokens=256)
    opened = open_model(tiny, config)
    with Pipeline(start_model(opened, opened.weights("float32"), config)) as pipe:
        probe = Probe.install(pipe.model.engine)
        assert pipe.model.engine.backend is probe and probe.name == "reference"
        pipe.run([pipe.score_request([1] * 100, lambda *_: None)])
    assert (probe.signal > 0).all() and not probe.noise.any()
    assert (probe.sqnr_db() == np.inf).all()


@pytest.mark.parametrize("name", FORMATS)
def test_pages_are_read_as_they_were_written(name: str) -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_dim=HEAD_DIM)
    memory = KVMemory.allocate(KVSpec.parse(name), shape, 5, 0, 512)
    backend = make_backend("reference", memory)
    k, v = np.random.default_rng(1).standard_normal((2, 128, 2, HEAD_DIM)).astype(np.float32)
    pages = np.array([4, 1])
    positions = np.arange(128)
    sequence = BatchSequence(0, 0, 128, pages, np.empty(0, np.int64))
    backend.write(2, k, v, Batch(positions, positions, (sequence,), positions[-1:]))
    for found, x, fmt in zip(
        read_pages(memory, 2, pages), (k, v), (memory.spec.k, memory.spec.v), strict=True
    ):
        assert found.shape == x.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, kept(fmt, x), rtol=0, atol=2e-6)
    assert not any(part.any() for part in read_pages(memory, 1, pages))
