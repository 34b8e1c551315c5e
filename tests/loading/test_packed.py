"""AWQ, GPTQ and compressed-tensors checkpoints, written by the definition of their formats.

Packers here go code by code; no code is shared with the reader.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant import EngineConfig, pipeline
from kvant.engine.load import open_checkpoint
from kvant.errors import ModelError
from tests.models.tiny_models import (
    SHAPE,
    TOLERANCE,
    error,
    exact,
    oracle,
    random_ids,
    save,
    score,
    tiny_model,
)

IDS = random_ids(60)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, Tensor]
Codes = NDArray[np.int64]


def pack(codes: Codes, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Rows of codes as rows of int32 words."""
    share = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // share), np.uint32)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for place, which in enumerate(order or range(share)):
                code = int(codes[row, word * share + which])
                assert 0 <= code < 2**bits
                words[row, word] |= np.uint32(code << (bits * place))
    return torch.from_numpy(words.view(np.int32))


@dataclass
class Quantized:
    """A weight [out, in]: codes, and scales and zeros [out, groups] by the group of each input."""

    codes: Codes
    scale: NDArray[np.float16]
    zeros: Codes
    groups: Codes

    @property
    def weight(self) -> Tensor:
        out = np.empty(self.codes.shape, np.float32)
        for o in range(out.shape[0]):
            for i in range(out.shape[1]):
                g = self.groups[i]
                out[o, i] = np.float32(self.scale[o, g]) * (self.codes[o, i] - self.zeros[o, g])
        return torch.from_numpy(out)


def quantize(weight: Tensor, bits: int, group: int, *, sym: bool, scattered: bool) -> Quantized:
    """Plain rounding; ``scattered`` puts inputs into groups at random."""
    w = weight.double().numpy()
    inputs, most = w.shape[1], 2**bits - 1
    groups = np.arange(inputs) // group
    if scattered:
        groups = np.random.default_rng(inputs).permutation(groups)
    shape = (w.shape[0], int(groups.max()) + 1)
    scale, zeros = np.empty(shape, np.float16), np.empty(shape, np.int64)
    codes = np.empty(w.shape, np.int64)
    for g in range(shape[1]):
        part = w[:, groups == g]
        if sym:
            scale[:, g] = np.abs(part).max(1) * 2 / most
            zeros[:, g] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale[:, g] = (high - low) / most
            zeros[:, g] = np.clip(np.round(-low / scale[:, g]), 0, most)
        zeros[0, g] = zeros[0, g] if sym else 0  # codes of zeros less one borrow from the next
        found = np.round(part / scale[:, g : g + 1]) + zeros[:, g : g + 1]
        codes[:, groups == g] = np.clip(found, 0, most)
    return Quantized(codes, scale, zeros, groups)


def less_one(words: Tensor, bits: int) -> Tensor:
    """Words as whole numbers, less one in each code: what the first GPTQ format has of zeros."""
    ones = sum(1 << at for at in range(0, 32, bits))
    return torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))


def store_awq(q: Quantized, bits: int) -> Tensors:
    return {
        "qweight": pack(q.codes.T, bits, AWQ_ORDER),
        "qzeros": pack(q.zeros.T, bits, AWQ_ORDER),
        "scales": torch.from_numpy(q.scale.T.copy()),
    }


def store_gptq_v2(q: Quantized, bits: int) -> Tensors:
    return {
        "qweight": pack(q.codes, bits).T.contiguous(),
        "qzeros": pack(q.zeros.T, bits),
        "scales": torch.from_numpy(q.scale.T.copy()),
        "g_idx": torch.from_numpy(q.groups.astype(np.int32)),
    }


def store_gptq(q: Quantized, bits: int) -> Tensors:
    parts = store_gptq_v2(q, bits)
    return parts | {"qzeros": less_one(parts["qzeros"], bits)}


def store_packed(q: Quantized, bits: int) -> Tensors:
    parts = {
        "weight_packed": pack(q.codes, bits),
        "weight_scale": torch.from_numpy(q.scale),
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if (q.zeros != 2 ** (bits - 1)).any():
        parts["weight_zero_point"] = pack(q.zeros.T, bits).T.contiguous()
    if (np.diff(q.groups) < 0).any():
        parts["weight_g_idx"] = torch.from_numpy(q.groups.astype(np.int32))
    return parts


def store_int(q: Quantized, bits: int) -> Tensors:
    codes = torch.from_numpy((q.codes - 128).astype(np.int8))
    return {"weight": codes, "weight_scale": torch.from_numpy(q.scale)}


def compressed(form: str, bits: int, group: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    part = {"weights": {**weights, "group_size": group}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": part},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    store: Callable[[Quantized, int], Tensors]
    bits: int = 4
    group: int = 32
    sym: bool = False
    scattered: bool = False


AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
WHOLE = 10**6  # one group of all inputs
CASES = {
    "awq": Case({**AWQ, "group_size": 32}, store_awq),
    "awq-16": Case({**AWQ, "group_size": 16, "version": "GEMM"}, store_awq, group=16),
    "awq-whole": Case({**AWQ, "group_size": -1}, store_awq, group=WHOLE),
    "gptq": Case({**GPTQ, "group_size": 32}, store_gptq),
    "gptq-sym": Case({**GPTQ, "group_size": 32, "sym": True}, store_gptq, sym=True),
    "gptq-8bit": Case({**GPTQ, "bits": 8, "group_size": 32}, store_gptq, bits=8),
    "gptq-whole": Case({**GPTQ, "group_size": -1}, store_gptq, group=WHOLE),
    "gptq-part": Case({**GPTQ, "group_size": 40}, store_gptq, group=40),
    "gptq-v2": Case({**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}, store_gptq_v2),
    "gptq-act-order": Case(
        {**GPTQ, "group_size": 32, "desc_act": True}, store_gptq, scattered=True
    ),
    "packed": Case(compressed("pack-quantized", 4, 32), store_packed, sym=True),
    "packed-zeros": Case(compressed("pack-quantized", 4, 32, False), store_packed),
    "packed-8bit": Case(
        compressed("pack-quantized", 8, None), store_packed, bits=8, group=WHOLE, sym=True
    ),
    "packed-act-order": Case(
        compressed("pack-quantized", 4, 32), store_packed, sym=True, scattered=True
    ),
    "w8a8": Case(compressed("int-quantized", 8, None), store_int, bits=8, group=WHOLE, sym=True),
}


def write(case: Case, folder: Path, family: str = "llama") -> tuple[Any, Path]:
    """A checkpoint and the transformers model with the weights that its codes stand for."""
    configs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    model = tiny_model(configs[family](**SHAPE))
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in list(tensors):
        if not name.endswith("_proj.weight"):
            continue
        weight = tensors.pop(name)
        made = quantize(weight, case.bits, case.group, sym=case.sym, scattered=case.scattered)
        stem = name.removesuffix(".weight")
        parts = {f"{stem}.{part}": x for part, x in case.store(made, case.bits).items()}
        tensors |= {part: x.contiguous() for part, x in parts.items()}
        state[name].copy_(made.weight)
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, case.config)
    return model, folder


def set_quantization(folder: Path, found: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": found}))
    return folder


@pytest.fixture(scope="module", params=CASES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Any, Path]:
    case = CASES[request.param]
    return case, *write(case, tmp_path_factory.mktemp(request.param))


def test_tensors_and_codes_are_the_weights(written: tuple[Case, Any, Path]) -> None:
    """Bit for bit; scattered groups are no codes."""
    case, model, folder = written
    checkpoint, state = open_checkpoint(folder), model.state_dict()
    assert checkpoint.quantized
    for ours, theirs in (("q", "self_attn.q"), ("v", "self_attn.v"), ("down", "mlp.down")):
        weight = state[f"model.layers.1.{theirs}_proj.weight"]
        name = f"{ours}.weight"
        assert checkpoint.has(name, 1) and torch.equal(checkpoint.tensor(name, 1), weight)
        codes = checkpoint.codes(name, 1)
        if case.scattered:
            assert codes is None
        else:
            assert codes is not None and torch.equal(codes.dequantize(), weight)
            assert codes.bits == case.bits
            assert codes.group == min(case.group, weight.shape[1])
            assert (codes.offset is None) == case.sym
    for plain in ("embedding.weight", "head.weight"):
        assert checkpoint.codes(plain) is None
    assert checkpoint.codes("attention_norm.weight", 0) is None


def test_logits_are_those_of_the_weights(
    written: tuple[Case, Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Exactly where codes are expanded, nearly where activations are rounded to multiply them."""
    case, model, folder = written
    expected = oracle(model, IDS)
    with caplog.at_level(logging.WARNING, "kvant"), exact(folder, backend="reference") as pipe:
        assert error(score(pipe, IDS), expected) <= TOLERANCE
    assert len([r for r in caplog.records if "act-order" in r.message]) == int(case.scattered)
    with exact(folder) as pipe:
        assert error(score(pipe, IDS), expected) <= (TOLERANCE if case.scattered else 0.1)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_biases_stay_as_they_are(tmp_path: Path, name: str) -> None:
    """Qwen2's, of codes that are fused."""
    model, folder = write(CASES[name], tmp_path, "qwen2")
    with exact(folder, backend="reference") as pipe:
        assert error(score(pipe, IDS), oracle(model, IDS)) <= TOLERANCE


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_other_precisions_are_made_of_the_weights(tmp_path: Path, weight_dtype: str) -> None:
    model, folder = write(CASES["gptq-act-order"], tmp_path)
    with exact(folder, backend="reference", weight_dtype=weight_dtype) as pipe:
        found = error(score(pipe, IDS), oracle(model, IDS))
    assert TOLERANCE < found <= {"int8": 0.05, "int4": 0.5}[weight_dtype]


# ---------------------------------------------------------------------------------------- refusals


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        pipeline(str(folder), EngineConfig(kv_tokens=256)).close()
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(CASES["gptq"], tmp_path_factory.mktemp("source"))[1]


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A GPTQ checkpoint to spoil."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({**AWQ, "version": "gemv", "group_size": 32}, '"awq gemv" with 4 bits'),
        ({**AWQ, "backend": "llm-awq", "group_size": 32}, '"awq llm-awq"'),
        ({**AWQ, "bits": 8, "group_size": 32}, '"awq" with 8 bits'),
        ({**GPTQ, "bits": 3, "group_size": 32}, '"gptq" with 3 bits'),
        ({**GPTQ, "group_size": 32, "checkpoint_format": "marlin"}, '"gptq marlin"'),
        ({**GPTQ, "group_size": 32, "is_marlin_format": True}, '"gptq marlin"'),
        ({**GPTQ, "group_size": 12}, "groups of 12 inputs"),
        ({**GPTQ, "group_size": "32"}, "groups of '32' inputs"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, '"bitsandbytes"'),
        ({"quant_method": "fp8"}, '"fp8"'),
        (compressed("float-quantized", 8, None), '"float-quantized" with 8 bits'),
        (compressed("pack-quantized", 2, 32), '"pack-quantized" with 2 bits'),
        ({"quant_method": "compressed-tensors"}, "not of one kind"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "not understood"),
        ({}, '"None"'),
        ([], "not understood"),
        ("awq", "not understood"),
    ],
)
def test_unknown_quantization(folder: Path, found: object, named: str) -> None:
    message = refusal(set_quantization(folder, found))
    assert named in message and "kvant reads awq" in message


STEM = "model.layers.1.self_attn.k_proj"


def spoil(folder: Path, part: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    found = change(tensors.pop(f"{STEM}.{part}"))
    if found is not None:
        tensors[f"{STEM}.{part}"] = found.contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_part(folder: Path, part: str) -> None:
    assert f'layer "{STEM}" has no {part}' in refusal(spoil(folder, part, lambda x: None))


def test_missing_codes(folder: Path) -> None:
    message = refusal(spoil(folder, "qweight", lambda x: None))
    assert f'tensor "{STEM}.weight" is missing' in message


def test_without_groups_of_inputs_they_are_in_order(folder: Path) -> None:
    """Some quantizers leave a trivial g_idx out."""
    spoil(folder, "g_idx", lambda x: None)
    assert open_checkpoint(folder).codes("k.weight", 1) is not None


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("scales", lambda x: x[:1], "scales or zeros"),
        ("scales", lambda x: x[:, :-8], "scales or zeros"),
        ("qzeros", lambda x: x[:, :-1], "scales or zeros"),
        ("qweight", lambda x: x[:-1], "g_idx"),
        ("qweight", lambda x: x.short(), "torch.int16"),
        ("qweight", lambda x: x.flatten(), "not a matrix of torch.int32"),
        ("g_idx", lambda x: x[:-1], "g_idx"),
        ("g_idx", lambda x: x * 0, "g_idx"),
        ("g_idx", lambda x: x + 1, "g_idx"),
    ],
)
def test_parts_that_do_not_fit(
    folder: Path, part: str, change: Callable[[Tensor], Tensor], named: str
) -> None:
    message = refusal(spoil(folder, part, change))
    assert f'layer "{STEM}" has ' in message and named in message


def test_another_group_size_in_the_config(folder: Path) -> None:
    assert "scales or zeros" in refusal(set_quantization(folder, {**GPTQ, "group_size": 16}))


def test_scales_that_are_not_finite(folder: Path) -> None:
    spoil(folder, "scales", lambda x: x.fill_(float("nan")))
    assert "tensor k.weight of layer 1 has values that are not finite" in refusal(folder)
