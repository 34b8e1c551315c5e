"""InternLM2, which transformers does not have: a Llama whose q, k and v are one grouped matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant import GenerationConfig
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
    write_tokenizer,
)

# The keys of internlm2-chat-7b's config.json, without those that only its Python code reads.
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
GLOBAL = {
    "model.embed_tokens": "model.tok_embeddings",
    "model.norm": "model.norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def grouped(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """wqkv: for each KV head, its query heads, its key, its value."""
    groups = [x.view(kv_heads, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(groups, dim=1).reshape(-1, *q.shape[1:])


def as_internlm2(llama: Mapping[str, Tensor], layers: int, kv_heads: int) -> dict[str, Tensor]:
    """A Llama's tensors under InternLM2's names."""
    names = dict(GLOBAL)
    for layer in range(layers):
        names |= {f"model.layers.{layer}.{a}": f"model.layers.{layer}.{b}"
                  for a, b in IN_LAYER.items()}  # fmt: skip
    tensors = {}
    for name, tensor in llama.items():
        stem, _, kind = name.rpartition(".")
        if stem in names:
            tensors[f"{names[stem]}.{kind}"] = tensor
        elif stem.endswith("q_proj"):
            parts = [llama[f"{stem.removesuffix('q_proj')}{part}_proj.{kind}"] for part in "qkv"]
            layer_name = stem.removesuffix("self_attn.q_proj")
            tensors[f"{layer_name}attention.wqkv.{kind}"] = grouped(*parts, kv_heads)
    return tensors


def twins(folder: Path, **changes: Any) -> tuple[Any, Path, Path]:
    """A Llama in transformers, its folder, and the folder of the same model as an InternLM2."""
    config = transformers.LlamaConfig(
        **SHAPE
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
        | changes
    )
    model = tiny_model(config)
    llama, internlm2 = save(model, folder / "llama"), folder / "internlm2"
    internlm2.mkdir()
    shape = {key: getattr(config, key) for key in SHAPE if not key.endswith("_token_id")}
    raw = {**INTERNLM2, **shape, "bias": config.attention_bias}
    (internlm2 / "config.json").write_text(json.dumps(raw))
    tensors = load_file(llama / "model.safetensors")
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    save_file(as_internlm2(tensors, layers, kv_heads), internlm2 / "model.safetensors")
    return model, llama, write_tokenizer(internlm2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_same_bits_as_the_llama_it_is_made_from(tmp_path: Path, kv_heads: int, bias: bool) -> None:
    model, llama, internlm2 = twins(tmp_path, num_key_value_heads=kv_heads, attention_bias=bias)
    ids = random_ids(100)
    with exact(llama) as ours, exact(internlm2) as theirs:
        logits = score(theirs, ids)
        np.testing.assert_array_equal(logits, score(ours, ids))
        gen = GenerationConfig(max_new_tokens=8, ignore_eos=True)
        assert theirs("Shanghai is", gen) == ours("Shanghai is", gen)
    assert error(logits, oracle(model, ids)) <= TOLERANCE
