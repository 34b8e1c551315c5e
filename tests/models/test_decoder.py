"""All blocks in one native call are the loop in Python, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from kvant import GenerationConfig, Pipeline
from kvant.kernels.cpu import CPUBackend, available_isas
from kvant.models.cpu import CPUOps
from kvant.models.ops import TorchOps
from tests.models.test_internlm2 import twins
from tests.models.tiny_models import SHAPE, exact, random_ids, save, tiny_model

WINDOWED = {"sliding_window": 40, "use_sliding_window": True, "num_hidden_layers": 3}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"head_dim": 24}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-one-key": (transformers.LlamaConfig, {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-odd": (
        transformers.LlamaConfig,
        {"hidden_size": 100, "intermediate_size": 75, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama-one-layer": (transformers.LlamaConfig, {"num_hidden_layers": 1}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 40}),
    "qwen2-window": (transformers.Qwen2Config, {**WINDOWED, "max_window_layers": 2}),
}
SPECS = [
    "f32",
    "bf16",
    "int8",
    "k=int8h,v=int4m",
    "int4h+r64",
    "k4v4",
    "k=int8,v=int4h+r64:bf16;-1=int8h",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {
        name: save(tiny_model(config(**{**SHAPE, **changes})), tmp_path_factory.mktemp(name))
        for name, (config, changes) in FAMILIES.items()
    }
    return found | {"internlm2": twins(tmp_path_factory.mktemp("internlm2"))[2]}


class Calls:
    """How often all blocks ran in one call, and in a loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = self.attended = 0
        run, attend = CPUBackend.run, CPUBackend.attend

        def counted_run(*args: Any) -> Any:
            self.whole += 1
            return run(*args)

        def counted_attend(*args: Any, **options: Any) -> Any:
            self.attended += 1
            return attend(*args, **options)

        monkeypatch.setattr(CPUBackend, "run", counted_run)
        monkeypatch.setattr(CPUBackend, "attend", counted_attend)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def observe(pipe: Pipeline) -> tuple[list[NDArray[np.float32]], list[list[int]]]:
    """Logits and tokens of requests that run together: scored, generated, of one token, long
    enough for steps that want no logits; then one that finds a beginning in the cache."""
    logits: list[NDArray[np.float32]] = []

    def sink(_: int, rows: NDArray[np.float32]) -> None:
        logits.append(rows.copy())

    gen = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    prompts = [random_ids(length, seed=length) for length in (1, 3, 64, 65, 150)]
    requests = [r for ids in prompts for r in pipe.generate_requests(ids, gen)]
    requests.insert(2, pipe.score_request(random_ids(100, seed=7), sink))
    requests.insert(4, pipe.score_request(random_ids(33, seed=8), sink))
    responses = pipe.run(requests)
    responses += pipe.run(pipe.generate_requests(prompts[-1] + [5], gen))
    return logits, [response.token_ids for response in responses]


def assert_same(
    folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    seen = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(CPUOps, "fuse", lambda *_: None)
            calls.whole = calls.attended = 0
            with exact(folder, **options) as pipe:
                seen.append((observe(pipe), pipe.model.engine.memory))
        assert (calls.whole > 0, calls.attended > 0) == (fused, not fused)
    ((logits, tokens), memory), ((loop_logits, loop_tokens), loop_memory) = seen
    assert tokens == loop_tokens and len(logits) == len(loop_logits) > 0
    for found, expected in zip(logits, loop_logits, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(memory.base.pages, loop_memory.base.pages)
    np.testing.assert_array_equal(memory.recent.pages, loop_memory.recent.pages)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILIES, "internlm2"])
def test_families(
    folders: dict[str, Path], calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    assert_same(folders[name], calls, monkeypatch, dtype=dtype, kv="int8")


@pytest.mark.parametrize("chunk", [17, 512])
@pytest.mark.parametrize("kv", SPECS)
def test_formats(
    folders: dict[str, Path], calls: Calls, monkeypatch: pytest.MonkeyPatch, kv: str, chunk: int
) -> None:
    options = {"kv": kv, "max_prefill_token_num": chunk, "dtype": "bfloat16"}
    assert_same(folders["qwen2-window"], calls, monkeypatch, **options)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights(
    folders: dict[str, Path],
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    weights: str,
    isa: str,
) -> None:
    monkeypatch.setenv("KVANT_ISA", isa)
    options = {"kv": "int8", "dtype": dtype, "weight_dtype": weights}
    assert_same(folders["llama-biases"], calls, monkeypatch, **options)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(
    folders: dict[str, Path], calls: Calls, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    assert_same(folders["llama"], calls, monkeypatch, num_threads=threads)


def test_several_models_take_turns(folders: dict[str, Path]) -> None:
    """Each with memory of its own for what is between layers."""
    with exact(folders["llama"]) as one, exact(folders["qwen2-window"]) as two:
        first = [observe(pipe) for pipe in (one, two)]
    with exact(folders["llama"]) as one:
        alone = observe(one)
    assert first[0][1] == alone[1] != first[1][1]
    for found, expected in zip(first[0][0], alone[0], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_other_backends_take_the_loop(folders: dict[str, Path], calls: Calls) -> None:
    """Whatever is not the cpu backend itself, such as a recorder around it, sees every layer."""

    class Around:
        """Hides what it is around."""

        name = "around"

        def __init__(self, backend: CPUBackend) -> None:
            self.write, self.attend = backend.write, backend.attend

    with exact(folders["llama"]) as pipe:
        engine = pipe.model.engine
        expected, calls.whole = observe(pipe), 0
        assert isinstance(engine.backend, CPUBackend)
    with exact(folders["llama"]) as pipe:
        engine = pipe.model.engine
        engine.backend = Around(engine.backend)  # type: ignore[arg-type]
        found = observe(pipe)
        assert calls.whole == 0 < calls.attended
    assert found[1] == expected[1]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_torch_has_no_such_operation(folders: dict[str, Path], calls: Calls) -> None:
    with exact(folders["llama"], backend="reference") as pipe:
        observe(pipe)
    assert calls.whole == 0
    assert TorchOps(torch.float32).fuse((), pipe.model.config) is None
