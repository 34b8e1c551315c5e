"""Blocks of GGUF files as codes: the values that the gguf package decodes them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from kvant.engine.load import open_checkpoint
from kvant.loading.checkpoint import load_weights
from kvant.models.codes import quantize_int8
from tests.loading.test_checkpoints import write_gguf
from tests.models.tiny_models import SHAPE, TOLERANCE, error, exact, oracle, random_ids, score
from tests.models.tiny_models import tiny_model as make_model

WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 512}
BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q4_K: 4, Type.Q8_0: 8}
OTHERS = (Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K, Type.BF16, Type.F16)
# Where numbers of 16 bits are in a block; other bytes may be anything.
HALVES = {Type.Q4_0: 1, Type.Q4_1: 2, Type.Q4_K: 2, Type.Q8_0: 1}


def random_blocks(kind: Type, outputs: int, inputs: int) -> NDArray[np.uint8]:
    """Rows of any codes, with any scales and minima, negative ones too."""
    random = np.random.default_rng(kind)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (outputs, inputs // per_block, size), dtype=np.uint8)
    halves = random.normal(size=(*blocks.shape[:2], HALVES[kind])).astype(np.float16)
    blocks[..., : 2 * HALVES[kind]] = halves.view(np.uint8)
    return blocks.reshape(outputs, -1)


def blocks_of(weight: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):  # the package cannot encode these
        size = gguf.GGML_QUANT_SIZES[kind][1]
        random = np.random.default_rng(kind)
        blocks = random.integers(0, 256, (len(weight), weight.shape[1] // 256, size), np.uint8)
        scales = (-2,) if kind == Type.Q6_K else (0, 2)
        for at in scales:
            half = np.full((*blocks.shape[:2], 1), 0.002, np.float16).view(np.uint8)
            blocks[..., at : at + 2 or None] = half
        return blocks.reshape(len(weight), -1)
    return quantize(weight, kind)


class QuantizedWriter(gguf.GGUFWriter):
    """Writes matrices of layers as blocks of one type."""

    kinds: dict[str, Type]
    random = False

    def add_tensor(self, name: str, tensor: Any, *rest: Any, **more: Any) -> None:  # type: ignore[override]
        kind = next((kind for part, kind in self.kinds.items() if part in name), None)
        if kind is None or tensor.ndim != 2:
            super().add_tensor(name, tensor, *rest, **more)
        elif self.random and kind in HALVES:
            super().add_tensor(name, random_blocks(kind, *tensor.shape), raw_dtype=kind)
        else:
            super().add_tensor(name, blocks_of(tensor, kind), raw_dtype=kind)


def write(
    path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, Type], *, random: bool = False
) -> tuple[Any, Path]:
    """A tiny Llama whose layers are of the types ``kinds`` by part of their names."""
    model = make_model(transformers.LlamaConfig(**WIDE))
    monkeypatch.setattr(QuantizedWriter, "kinds", kinds, raising=False)
    monkeypatch.setattr(QuantizedWriter, "random", random)
    monkeypatch.setattr(gguf, "GGUFWriter", QuantizedWriter)
    return model, write_gguf(path / "tiny.gguf", model)


@pytest.mark.parametrize("kind", BITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("random", [False, True], ids=["quantized", "random"])
def test_codes_are_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type, random: bool
) -> None:
    """Rows of queries and keys in order too."""
    _, path = write(tmp_path, monkeypatch, {"blk": kind}, random=random)
    checkpoint = open_checkpoint(path)
    for stem in ("q", "k", "v", "output", "gate", "up", "down"):
        codes = checkpoint.codes(f"{stem}.weight", 0)
        assert codes is not None and (codes.bits, codes.group) == (BITS[kind], 32)
        tensor, found = checkpoint.tensor(f"{stem}.weight", 0), codes.dequantize()
        if kind in (Type.Q4_0, Type.Q8_0):
            assert torch.equal(found, tensor)
        else:  # an offset is rounded once
            bound = 1e-6 * float(codes.scale.abs().max() * 16)
            torch.testing.assert_close(found, tensor, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_other_types_have_no_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type
) -> None:
    _, path = write(tmp_path, monkeypatch, {"blk": kind})
    assert open_checkpoint(path).codes("q.weight", 0) is None
    assert open_checkpoint(path).codes("embedding.weight") is None


def load_oracle(model: Any, path: Path) -> Any:
    """The same model with the weights that the file's blocks stand for."""
    checkpoint = open_checkpoint(path)
    parts = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    parts |= {"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    parts["down"] = "mlp.down_proj"
    state = model.state_dict()
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in parts.items():
            state[f"model.layers.{layer}.{theirs}.weight"].copy_(
                checkpoint.tensor(f"{ours}.weight", layer)
            )
    return model


@pytest.mark.parametrize(
    ("kinds", "weight_dtype"),
    [
        ({"blk": Type.Q4_0}, "int4"),
        ({"attn": Type.Q4_1, "ffn": Type.Q4_0}, "int4"),
        ({"blk": Type.Q8_0}, "int8"),
    ],
)
def test_stored_codes_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, Type], weight_dtype: str
) -> None:
    """A whole model: only its head is quantized anew, to 8 bits."""
    model, path = write(tmp_path, monkeypatch, kinds)
    ids = random_ids(40)
    expected = oracle(load_oracle(model, path), ids)
    with exact(path) as pipe:
        assert error(score(pipe, ids), expected) <= TOLERANCE
    with exact(path, backend="reference", weight_dtype=weight_dtype) as pipe:
        assert error(score(pipe, ids), expected) <= 0.01


class Keep:
    """Makes no layers: their weights are."""

    def linear(self, weight: Any, bias: Any = None, *, gated: bool = False) -> Any:
        return weight

    def place(self, x: Any) -> Any:
        return x

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        raise AssertionError


def test_what_is_fused_with_codes_is_quantized_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in llama.cpp's mixtures (Q4_K_M): values in more bits than queries and keys."""
    kinds = {"attn_v": Type.Q8_0, "blk": Type.Q4_0}
    _, path = write(tmp_path, monkeypatch, kinds)
    checkpoint = open_checkpoint(path)
    fused: Any = load_weights(checkpoint, torch.bfloat16, "int4", Keep()).layers[0].qkv
    rows = torch.cat([checkpoint.tensor(f"{stem}.weight", 0) for stem in "qkv"])
    kept = sum(checkpoint.tensor(f"{stem}.weight", 0).shape[0] for stem in "qk")
    assert torch.equal(fused.dequantize()[:kept], rows[:kept])
    assert 0 < float((fused.dequantize() - rows)[kept:].abs().max()) < 0.1


def test_what_cannot_be_fused_with_codes_is_made_anew_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 32 inputs, and values that get one scale for all inputs."""
    kinds = {"attn_v": Type.Q4_0, "blk": Type.Q8_0}
    _, path = write(tmp_path, monkeypatch, kinds)
    checkpoint = open_checkpoint(path)
    fused: Any = load_weights(checkpoint, torch.bfloat16, "int8", Keep()).layers[0].qkv
    rows = torch.cat([checkpoint.tensor(f"{stem}.weight", 0) for stem in "qkv"])
    assert torch.equal(fused.dequantize(), quantize_int8(rows).dequantize())


@pytest.mark.parametrize("kind", OTHERS[:4], ids=lambda kind: kind.name)
def test_dequantize_is_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type
) -> None:
    _, path = write(tmp_path, monkeypatch, {"ffn_down": kind})
    reader = gguf.GGUFReader(path)
    found = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    expected = torch.from_numpy(dequantize(found.data, kind))
    assert torch.equal(open_checkpoint(path).tensor("down.weight", 0), expected)
