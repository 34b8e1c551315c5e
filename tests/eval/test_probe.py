"""What the probe says against encoding and decoding the same vectors directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvant import EngineConfig, Pipeline
from kvant.engine.load import open_model, start_model
from kvant.eval.probe import Probe
from kvant.formats import PAGE_TOKENS, KVFormat, KVSpec
from kvant.kernels import check_backend
from kvant.kernels.backend import Batch
from tests.byte_model import VOCAB

F64 = np.float64


class Recorder(Probe):
    """Keeps what it was given, too."""

    def write(self, layer: int, k: Any, v: Any, batch: Batch) -> None:
        self.written: dict[int, list[np.ndarray]] = getattr(self, "written", {})
        self.written.setdefault(layer, []).append(np.stack((k.float().numpy(), v.float().numpy())))
        super().write(layer, k, v, batch)


def kept(fmt: KVFormat, x: np.ndarray) -> np.ndarray:
    """Whole groups ``[N, H, D]``, encoded and decoded."""
    groups = x.reshape(-1, PAGE_TOKENS, *x.shape[1:]).swapaxes(1, 2)
    return fmt.decode(fmt.encode(groups), x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def ratio(exact: np.ndarray, stored: np.ndarray) -> float:
    noise = np.square(exact.astype(F64) - stored).sum()
    return float(10 * np.log10(np.square(exact.astype(F64)).sum() / noise))


@pytest.mark.parametrize("chunk", (17, 48, 64, 512))
@pytest.mark.parametrize("kv", ("bf16", "int8", "int4h+r64", "k4v4", "k8v8;-1=int4m"))
def test_sqnr_is_that_of_encoding_directly(tiny: str, kv: str, chunk: int) -> None:
    config = EngineConfig(kv=kv, dtype="float32", kv_tokens=256, max_prefill_token_num=chunk)
    opened = open_model(tiny, config)
    ids = np.random.default_rng(2).integers(0, VOCAB - 2, 200).tolist()
    with Pipeline(start_model(opened, opened.weights(config), config)) as pipe:
        probe = Recorder.install(pipe.model.engine)
        assert isinstance(probe, Recorder)
        pipe.run([pipe.score_request(ids, lambda *_: None)])
    spec, shape = KVSpec.parse(kv), opened.config.kv_shape
    for layer, (at, fine) in enumerate(
        zip(spec.layout(shape), spec.fine.layout(shape), strict=True)
    ):
        written = np.concatenate(probe.written[layer], axis=1)
        k, v = written[:, spec.sink * PAGE_TOKENS : 192]  # of three full groups
        for side, (base, finer, x) in enumerate(((at.k, fine.k, k), (at.v, fine.v, v))):
            once = x if spec.recent is None else kept(finer, x)
            assert probe.sqnr_db()[side, layer] == pytest.approx(
                ratio(x, kept(base, once)), abs=1e-3
            )


def test_an_exact_cache_has_no_noise(tiny: str) -> None:
    config = EngineConfig(kv="f32", dtype="float32", kv_tokens=256)
    opened = open_model(tiny, config)
    with Pipeline(start_model(opened, opened.weights(config), config)) as pipe:
        probe = Probe.install(pipe.model.engine)
        assert pipe.model.engine.backend is probe and probe.name == check_backend("auto")
        pipe.run([pipe.score_request([1] * 100, lambda *_: None)])
    assert (probe.signal > 0).all() and not probe.noise.any()
    assert (probe.sqnr_db() == np.inf).all()
