"""The families: how a Hugging Face config.json and its tensor names become ours.

A family is two things, a function from config.json to :class:`DecoderConfig` and a map of
names, and nothing else. Our own names, per layer unless noted:

    embedding, norm, head (global)    attention_norm, mlp_norm
    q, k, v, output                   gate, up, down
    qkv_grouped                       instead of q, k, v: for each KV head its query heads, then
                                      its key, then its value (InternLM2's wqkv)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvant.errors import ModelError, did_you_mean
from kvant.models.config import DecoderConfig, RopeConfig

__all__ = ["FAMILIES", "Family", "find_family"]

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """``names`` maps our names to theirs, with ``{}`` where the layer's number goes."""

    config: Callable[[Json], DecoderConfig]
    names: Mapping[str, str]


def _rope(config: Json) -> RopeConfig:
    scaling = {
        "partial_rotary_factor": config.get("partial_rotary_factor", 1),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    optional = {
        ours: scaling[theirs]
        for ours, theirs in (
            ("factor", "factor"),
            ("original_max_positions", "original_max_position_embeddings"),
            ("low_freq_factor", "low_freq_factor"),
            ("high_freq_factor", "high_freq_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
            ("attention_factor", "attention_factor"),
            ("mscale", "mscale"),
            ("mscale_all_dim", "mscale_all_dim"),
        )
        if scaling.get(theirs) is not None
    }
    if scaling.get("truncate") is False or scaling.get("partial_rotary_factor", 1) != 1:
        raise ModelError(
            "rope settings truncate=false and partial_rotary_factor are not supported; "
            "use another model"
        )
    return RopeConfig(
        theta=float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=scaling.get("rope_type") or scaling.get("type") or "default",
        **optional,
    )


def _windows(config: Json, layers: int) -> tuple[int | None, ...]:
    """Sliding windows: of all layers (Mistral), or of those that ``layer_types`` or Qwen2's
    ``max_window_layers`` name; Qwen2 has a window that ``use_sliding_window`` turns off."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is None:
        return (None,) * layers
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = config.get("max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(layers))


def _decoder_config(config: Json, **differences: Any) -> DecoderConfig:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    fields = {
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "max_positions": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope": _rope(config),
        "windows": _windows(config, layers),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ModelError(f'activation "{activation}" is not supported; kvant knows silu')
    return DecoderConfig(**(fields | differences))


def _llama(config: Json) -> DecoderConfig:
    return _mistral({**config, "sliding_window": None})


def _mistral(config: Json) -> DecoderConfig:
    bias = config.get("attention_bias", False)
    return _decoder_config(
        config, qkv_bias=bias, output_bias=bias, mlp_bias=config.get("mlp_bias", False)
    )


def _qwen2(config: Json) -> DecoderConfig:
    # Qwen2's released config.json carries sliding_window with use_sliding_window false.
    off = {} if config.get("use_sliding_window", False) else {"sliding_window": None}
    return _decoder_config({**config, **off}, qkv_bias=True)


def _internlm2(config: Json) -> DecoderConfig:
    bias = config.get("bias", False)
    return _decoder_config(config, qkv_bias=bias, output_bias=bias)


_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "output": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}

_INTERNLM2_NAMES = {
    "embedding": "model.tok_embeddings",
    "norm": "model.norm",
    "head": "output",
    "attention_norm": "model.layers.{}.attention_norm",
    "qkv_grouped": "model.layers.{}.attention.wqkv",
    "output": "model.layers.{}.attention.wo",
    "mlp_norm": "model.layers.{}.ffn_norm",
    "gate": "model.layers.{}.feed_forward.w1",
    "up": "model.layers.{}.feed_forward.w3",
    "down": "model.layers.{}.feed_forward.w2",
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, _LLAMA_NAMES),
    "MistralForCausalLM": Family(_mistral, _LLAMA_NAMES),
    "Qwen2ForCausalLM": Family(_qwen2, _LLAMA_NAMES),
    "InternLM2ForCausalLM": Family(_internlm2, _INTERNLM2_NAMES),
}


def find_family(config: Json) -> Family:
    """The family that a config.json names in ``architectures``.

    Raises:
        ModelError: it names none that kvant knows.
    """
    names = config.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise ModelError(
            f'architecture "{names[0]}" is not supported; '
            f"kvant runs {', '.join(FAMILIES)}{did_you_mean(names[0], FAMILIES)}"
        )
    return FAMILIES[names[0]]
