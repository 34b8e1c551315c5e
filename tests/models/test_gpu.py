"""The GPU's decoder and linear layers, with Triton's interpreter where there is no GPU: the same
logits as on the CPU, and decode steps in padded batches that change nothing."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvant import EngineConfig, GenerationConfig, Pipeline, pipeline
from kvant.errors import ConfigError
from kvant.kernels.triton.pool import find_device
from kvant.models.codes import quantize_int4, quantize_int8
from kvant.models.gpu import GPUDecoder, GPUOps, choose_dtype
from kvant.models.graphs import Capture, CudaCapture
from kvant.models.ops import Norm, TorchOps

# What kernels make of lanes that are masked, and of rows of padding, is of no use to anybody.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = find_device()
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
NEW = 3


def open_tiny(tiny: str, **options: Any) -> Pipeline:
    defaults: dict[str, Any] = {"backend": "triton", "dtype": "float32", "kv": "f32"}
    defaults |= {"kv_tokens": 1024, "max_batch_size": 4, "check": True}
    return pipeline(tiny, EngineConfig(**(defaults | options)))


def decoder_of(pipe: Pipeline) -> GPUDecoder:
    model = pipe.model.engine._model
    assert isinstance(model, GPUDecoder)
    return model


def generate(pipe: Pipeline) -> list[list[int]]:
    """What follows all prompts, together."""
    gen = GenerationConfig(max_new_tokens=NEW, ignore_eos=True)
    done = pipe.run([r for ids in PROMPTS for r in pipe.generate_requests(ids, gen)])
    return [each.token_ids for each in done]


def observe(pipe: Pipeline) -> tuple[list[list[int]], NDArray[np.float32]]:
    """:func:`generate`, and logits of each position of the first prompt."""
    tokens = generate(pipe)
    logits: dict[int, NDArray[np.float32]] = {}

    def sink(start: int, rows: NDArray[np.float32]) -> None:
        logits.update(enumerate(rows.copy(), start))

    pipe.run([pipe.score_request(PROMPTS[0], sink)])
    return tokens, np.stack([logits[i] for i in sorted(logits)])


@pytest.fixture(scope="module")
def expected(tiny: str) -> tuple[list[list[int]], NDArray[np.float32]]:
    with open_tiny(tiny, backend="cpu") as pipe:
        return observe(pipe)


Expected = tuple[list[list[int]], NDArray[np.float32]]


def assert_close(found: Expected, expected: Expected, tolerance: float) -> None:
    """Of the largest logit."""
    assert found[0] == expected[0]
    largest = float(np.abs(expected[1]).max())
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=tolerance * largest)


# float16 is rounded to 2 ** -11 some ten times in each of two layers.
@pytest.mark.parametrize(
    ("dtype", "kv", "tolerance"), [("float32", "f32", 1e-5), ("float16", "f16", 1e-2)]
)
def test_logits_are_those_of_the_cpu(
    tiny: str, expected: Expected, dtype: str, kv: str, tolerance: float
) -> None:
    with open_tiny(tiny, dtype=dtype, kv=kv) as pipe:
        assert decoder_of(pipe).weights.embedding.dtype == getattr(torch, dtype)
        assert_close(observe(pipe), expected, tolerance)


def test_chunks_of_which_no_logits_are_wanted(tiny: str, expected: Expected) -> None:
    with open_tiny(tiny, max_prefill_token_num=4) as pipe:
        assert_close(observe(pipe), expected, 1e-5)


def decoded(
    tiny: str, kv: str, capture: Capture | None
) -> tuple[list[list[int]], NDArray[np.float32]]:
    """Tokens, and what was written of a 32-bit cache."""
    with open_tiny(tiny, kv=kv) as pipe:
        decoder = decoder_of(pipe)
        decoder._capture = capture
        tokens = generate(pipe)
        memory = pipe.model.engine.memory
        pool = memory.recent if memory.spec.recent else memory.base
        assert (decoder._steps is None) == (capture is None)
        assert decoder._steps is None or decoder._steps[1].captured == [(4, 8)]
        return tokens, torch.as_tensor(pool.pages).cpu().numpy().view(np.float32).copy()


def assert_same_decodes(tiny: str, kv: str, one: Capture | None, other: Capture) -> None:
    """The same tokens, and the same places written, with values that differ as torch's products do
    for another number of rows."""
    (tokens, pages), (others, other_pages) = (decoded(tiny, kv, each) for each in (one, other))
    assert tokens == others
    assert np.array_equal(pages == 0, other_pages == 0) and pages.any()
    np.testing.assert_allclose(other_pages, pages, rtol=0, atol=1e-5 * np.abs(pages).max())


KVS = pytest.mark.parametrize("kv", ["f32", "int8h+r64:f32"])


@KVS
def test_padded_decode_steps_change_nothing(tiny: str, kv: str) -> None:
    """Three sequences in a step of four."""
    assert_same_decodes(tiny, kv, None, lambda work: work)


@KVS
@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are captured on GPUs")
def test_captured_decode_steps_change_nothing(tiny: str, kv: str) -> None:
    """Steps that a GPU repeats by itself, over arrays that are filled anew."""
    assert_same_decodes(tiny, kv, None, CudaCapture())


def test_whatever_stands_before_the_backend_sees_every_layer(tiny: str, expected: Expected) -> None:
    with open_tiny(tiny) as pipe:
        engine = pipe.model.engine
        backend = engine.backend
        layers: list[int] = []

        class Around:
            """Hides what it is around."""

            name = "around"

            def write(self, layer: int, *args: Any) -> None:
                layers.append(layer)
                backend.write(layer, *args)

            def attend(self, *args: Any, **options: Any) -> Any:
                return backend.attend(*args, **options)

        engine.backend = Around()
        assert_close(observe(pipe), expected, 1e-5)
        assert len(layers) > 0 and layers == [0, 1] * (len(layers) // 2)


DTYPES = (torch.float32, torch.float16)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_linear(dtype: torch.dtype, bias: bool, gated: bool) -> None:
    weight, x = values(32, 24, seed=1, dtype=dtype), values(5, 24, seed=2, dtype=dtype)
    added, norm = values(32, seed=3, dtype=dtype) if bias else None, values(24, seed=4)
    there = values(5, 16 if gated else 32, seed=5, dtype=dtype)
    found, want = (
        ops.linear(weight, added, gated=gated)(
            x.to(device), norm=Norm(norm.to(device), 1e-5), add=there.clone().to(device)
        ).cpu()
        for ops, device in ((GPUOps(DEVICE, dtype), DEVICE), (TorchOps(dtype), "cpu"))
    )
    # torch rounds after the norm, the product, the gate and the sum; so do we, once less
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, want, rtol=0, atol=6 * step * float(want.abs().max()))


def test_logits_are_wide() -> None:
    x, weight = values(3, 16, dtype=torch.float16), values(8, 16, dtype=torch.float16)
    found = GPUOps(DEVICE, torch.float16).linear(weight)(x.to(DEVICE), dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), x.float() @ weight.float().t(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_codes_without_a_product_are_expanded(
    quantize: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32, on any device; a line says so once."""
    codes, x = quantize(values(32, 64)), values(3, 64, seed=1)
    ops = GPUOps(DEVICE, torch.float32)
    with caplog.at_level(logging.WARNING, logger="kvant"):
        found, _ = (ops.linear(codes)(x.to(DEVICE)).cpu() for _ in range(2))
    torch.testing.assert_close(found, x @ codes.dequantize().t())
    (line,) = caplog.messages
    assert line.startswith(f"weights of {codes.bits} bits")
    assert "expanded to float32 and take 4 bytes each" in line and "weight_dtype=int4" in line


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch has the product on GPUs")
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_products_with_codes(rows: int, bias: bool) -> None:
    if torch.cuda.get_device_capability(DEVICE) < (8, 0):
        pytest.skip("from compute capability 8.0 on")
    codes, x = quantize_int4(values(96, 192)), values(rows, 192, seed=1, dtype=torch.bfloat16)
    added = values(96, seed=2, dtype=torch.bfloat16) if bias else None
    found = GPUOps(DEVICE, torch.bfloat16).linear(codes, added)(x.to(DEVICE)).cpu().float()
    want = x.float() @ codes.dequantize().t() + (0 if added is None else added.float())
    # scales, offsets and the result are rounded to bfloat16
    torch.testing.assert_close(found, want, rtol=0, atol=2.0**-6 * float(want.abs().max()))


def test_dtype_follows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for capability, auto in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_dtype("auto", gpu) == auto
        assert choose_dtype("float16", gpu) == torch.float16
        if auto == torch.float16:
            with pytest.raises(ConfigError, match=r"8\.0.*Tesla T4 has 7\.5; take dtype=float16"):
                choose_dtype("bfloat16", gpu)
        else:
            assert choose_dtype("bfloat16", gpu) == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
