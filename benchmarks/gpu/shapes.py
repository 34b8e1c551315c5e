"""Models of known shapes with random weights: throughput does not depend on their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvant.engine.load import OpenModel
from kvant.kernels.triton.pool import find_device
from kvant.loading.packed import Packing
from kvant.models.codes import Codes
from kvant.models.config import DecoderConfig, RopeConfig

_STD = 0.02


def _shape(
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    positions: int,
    theta: float,
    **others: Any,
) -> DecoderConfig:
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        max_positions=positions,
        norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        windows=(None,) * layers,
        **({"head_dim": 128} | others),
    )


SHAPES = {
    "llama-2-7b": _shape(32000, 4096, 11008, 32, (32, 32), 4096, 1e4),
    "llama-2-13b": _shape(32000, 5120, 13824, 40, (40, 40), 4096, 1e4),
    "internlm2-7b": _shape(92544, 4096, 14336, 32, (32, 8), 32768, 1e6),
    "llama-3-8b": _shape(128256, 4096, 14336, 32, (32, 8), 131072, 5e5),
    "qwen2.5-7b": _shape(152064, 3584, 18944, 28, (28, 4), 32768, 1e6, qkv_bias=True),
    "smoke": _shape(256, 32, 32, 1, (2, 1), 4096, 1e4, head_dim=16),
}


class RandomCheckpoint:
    """A :class:`kvant.loading.checkpoint.Checkpoint` whose tensors are made where they are used."""

    quantized: Packing | None = None

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        c = config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self._shapes = {
            "embedding": (c.vocab_size, c.hidden_size),
            "head": (c.vocab_size, c.hidden_size),
            "q": (q, c.hidden_size),
            "k": (kv, c.hidden_size),
            "v": (kv, c.hidden_size),
            "output": (c.hidden_size, q),
            "gate": (c.intermediate_size, c.hidden_size),
            "up": (c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }

    def tokenizer(self) -> Any:
        return Numbers(self.config.vocab_size)

    def has(self, name: str, layer: int | None = None) -> bool:  # noqa: ARG002
        return name.partition(".")[0] in self._shapes or "norm" in name

    def tensor(self, name: str, layer: int | None = None) -> Tensor:  # noqa: ARG002
        stem, _, kind = name.rpartition(".")
        if stem.endswith("norm"):
            return torch.ones(self.config.hidden_size, device=find_device())
        shape = self._shapes[stem]
        if kind == "bias":
            return torch.zeros(shape[0], device=find_device())
        made = torch.empty(shape, dtype=torch.bfloat16, device=find_device())
        return made.normal_(std=_STD / math.sqrt(2 * self.config.num_layers))

    def codes(self, name: str, layer: int | None = None) -> Codes | None:  # noqa: ARG002
        return None


class Numbers:
    """A tokenizer whose tokens are numbers: what a benchmark needs of one."""

    special_ids: frozenset[int] = frozenset()
    eos_ids: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    bos_id = chat = None
    longest_token = 7

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:  # noqa: ARG002
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:  # noqa: ARG002
        return "".join(f" {number}" for number in ids)

    def token_text(self, token_id: int) -> str:
        return f" {token_id}"


def open_random(name: str) -> OpenModel:
    """One of :data:`SHAPES`, its weights not made yet."""
    checkpoint = RandomCheckpoint(SHAPES[name])
    return OpenModel(name=name, checkpoint=checkpoint, tokenizer=checkpoint.tokenizer())
