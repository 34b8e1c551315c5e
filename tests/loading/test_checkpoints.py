"""Files become weights, whatever their kind; a wrong one is refused in one line with a remedy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from kvant import EngineConfig, Pipeline, pipeline
from kvant.engine.load import open_checkpoint
from kvant.errors import ModelError
from kvant.loading.resolve import resolve_model
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

LAYERS, HEADS, KV_HEADS = 2, SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
IDS = random_ids(60)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny model with every bias that a Llama can have."""
    config = transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)
    return tiny_model(config)


@pytest.fixture(scope="module")
def source(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(path: Path) -> Pipeline:
    return pipeline(str(path), EngineConfig(kv_tokens=256))


def refusal(path: Path) -> str:
    """The one line with which a model is refused: what is wrong; what to do."""
    with pytest.raises(ModelError) as caught:
        load(path).close()
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "no remedy"
    return message


def logits(path: Path) -> NDArray[np.float32]:
    with exact(path) as pipe:
        return score(pipe, IDS)


# ------------------------------------------------------------------------------------- config.json


def set_keys(folder: Path, **keys: object) -> Path:
    """Change keys of config.json; None deletes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    return folder


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"config"', "\xff"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "rms_norm_eps"])
def test_config_without_a_key(folder: Path, key: str) -> None:
    assert f"config.json has no '{key}'" in refusal(set_keys(folder, **{key: None}))


@pytest.mark.parametrize("names", [["BertModel"], [], None])
def test_unknown_architecture(folder: Path, names: list[str] | None) -> None:
    message = refusal(set_keys(folder, architectures=names))
    assert "is not supported; kvant runs LlamaForCausalLM, " in message


def test_nearly_known_architecture(folder: Path) -> None:
    message = refusal(set_keys(folder, architectures=["Qwen3ForCausalLM"]))
    assert message.endswith('; did you mean "Qwen2ForCausalLM"?')


def test_unknown_rope_scaling(folder: Path) -> None:
    message = refusal(set_keys(folder, rope_parameters={"rope_type": "longrope", "factor": 2.0}))
    assert 'rope scaling "longrope" is not supported' in message


def test_unknown_activation(folder: Path) -> None:
    assert 'activation "gelu" is not supported' in refusal(set_keys(folder, hidden_act="gelu"))


# ------------------------------------------------------------------------------------- safetensors


def respell(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_missing_tensor(folder: Path, name: str) -> None:
    """A missing head too: only the config can say that it is the embedding."""
    message = refusal(respell(folder, lambda tensors: tensors.pop(name)))
    assert f'tensor "{name}" is missing in {folder}' in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_quantized(folder: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    respell(folder, change)
    for weight_dtype in ("int8", "int4"):
        with pytest.raises(ModelError, match=r"up\.weight of layer 1 .* not finite; download"):
            pipeline(str(folder), EngineConfig(kv_tokens=256, weight_dtype=weight_dtype))


def test_tensor_of_another_shape(folder: Path) -> None:
    message = refusal(set_keys(folder, intermediate_size=SHAPE["intermediate_size"] + 1))
    assert "tensor gate.weight of layer 0 has shape [96, 64], the config wants [97, 64]" in message


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_shard_cut_short(folder: Path, kept: float) -> None:
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept)])
    assert "damaged or cut short" in refusal(folder)


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "kvant reads safetensors and GGUF" in refusal(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "copy the model's tokenizer files there" in refusal(folder)


def test_shards_are_one_model(llama: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    llama.save_pretrained(folder, max_shard_size="250KB")
    assert (folder / "model.safetensors.index.json").exists()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2
    assert error(logits(folder), oracle(llama, IDS)) <= TOLERANCE
    shards[-1].unlink()
    assert shards[-1].name in refusal(folder)


# -------------------------------------------------------------------------------------------- GGUF


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """How llama.cpp's converter orders the rows of a Llama's q and k: pairs side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, **left_out: bool) -> Path:
    """A tiny Llama as llama.cpp's converter writes it, with a byte-level tokenizer."""
    shape = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    if not left_out.get("norm_eps"):
        writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"<word {i}>" for i in range(len(characters) + 1, shape.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*characters, "ab", *words])
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permuted(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(theirs, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama)


def test_gguf_is_the_model_it_was_made_from(llama: Any, gguf_file: Path) -> None:
    """Queries and keys are put back in order, biases too."""
    checkpoint = open_checkpoint(gguf_file)
    tensors = llama.state_dict()
    for layer in range(LAYERS):
        for ours in ("q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "up.bias"):
            stem, kind = ours.split(".")
            part = "mlp" if stem == "up" else "self_attn"
            theirs = tensors[f"model.layers.{layer}.{part}.{stem}_proj.{kind}"]
            torch.testing.assert_close(checkpoint.tensor(ours, layer), theirs, rtol=0, atol=0)
    assert error(logits(gguf_file), oracle(llama, IDS)) <= TOLERANCE
    with exact(gguf_file) as pipe:
        assert pipe.tokenizer.decode(pipe.tokenizer.encode("abc äöü\n")) == "abc äöü\n"


def test_gguf_without_a_key(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama, norm_eps=True)
    assert "attention.layer_norm_rms_epsilon" in refusal(path)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_gguf_cut_short(gguf_file: Path, tmp_path: Path, kept: float) -> None:
    data, path = gguf_file.read_bytes(), tmp_path / "model.gguf"
    path.write_bytes(data[: int(len(data) * kept)])
    assert "not a complete GGUF file" in refusal(path)


@pytest.mark.parametrize(
    "data",
    [
        b"Entry not found",
        b"<!doctype html>\n" * 100,
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
        b"GGUF" + b"\xff" * 100,
    ],
    ids=["text", "html", "magic", "version", "counts", "length", "garbage"],
)
def test_no_gguf_inside(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert "GGUF" in refusal(path)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert 'architecture "bert" is not supported; kvant runs llama' in refusal(
        tmp_path / "model.gguf"
    )


@pytest.mark.parametrize("kept", [100_000, 40_000_000])
def test_packaged_model_cut_short(tmp_path: Path, kept: int) -> None:
    """Within its metadata and within its weights."""
    try:
        whole = resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    path = tmp_path / "model.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(kept))
    assert "not a complete GGUF file" in refusal(path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "weight_map" in refusal(folder)
