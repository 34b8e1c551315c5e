"""The example that kvant was asked for runs as it was written, on InternLM2 in miniature."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

import kvant

EXAMPLE = """\
from kvant import pipeline, EngineConfig, GenerationConfig
pipe = pipeline("internlm/internlm2-chat-7b", backend_config=EngineConfig(quant_policy=8))
response = pipe(["Hi, pls intro yourself", "Shanghai is"])
print(response)
"""

# What the test wants to know about the process that ran it.
REPORT = """
import json
special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
print("\\n" + json.dumps({
    "types": [type(each).__name__ for each in response],
    "key_format": pipe.model.kv_spec.k.name,
    "value_format": pipe.model.kv_spec.v.name,
    "input_lens": [each.input_token_len for each in response],
    "generated": [each.token_ids for each in response],
    "reasons": [each.finish_reason for each in response],
    "texts": [each.text for each in response],
    "special": {text: pipe.tokenizer.encode(text, add_special=False) for text in special},
    "eos": pipe.tokenizer.eos_ids,
}))
"""

PROMPTS = ["Hi, pls intro yourself", "Shanghai is"]
TEMPLATE = (  # internlm2-chat-7b's
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 2, 4, 2, 32, 64, 96


def train_tokenizer() -> bytes:
    """A SentencePiece model with bytes to fall back on and, as InternLM2's has, two spare pieces
    at its end that tokenizer_config.json turns into ChatML's marks."""
    words = "Shanghai is a city by the sea, the user asks and the assistant answers. " * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words.split(".")),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[UNUSED_TOKEN_144]", "[UNUSED_TOKEN_145]"],
        minloglevel=2,
    )
    return model.getvalue()


def token(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True, **flags}


def weights(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        noise = torch.randn(rows, columns, generator=generator) / columns**0.5
        return noise.to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.ones(HIDDEN, dtype=torch.bfloat16)

    tensors = {
        "model.tok_embeddings.weight": matrix(vocabulary, HIDDEN),
        "model.norm.weight": norm(),
        "output.weight": matrix(vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        tensors |= {
            name + "attention_norm.weight": norm(),
            name + "attention.wqkv.weight": matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            name + "attention.wo.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            name + "ffn_norm.weight": norm(),
            name + "feed_forward.w1.weight": matrix(INNER, HIDDEN),
            name + "feed_forward.w2.weight": matrix(HIDDEN, INNER),
            name + "feed_forward.w3.weight": matrix(INNER, HIDDEN),
        }
    return tensors


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer())


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, pieces: sentencepiece.SentencePieceProcessor
) -> Path:
    """A folder with ``internlm/internlm2-chat-7b`` in it."""
    root = tmp_path_factory.mktemp("seed")
    model = root / "internlm/internlm2-chat-7b"
    model.mkdir(parents=True)
    start, end = (pieces.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (144, 145))
    added = {0: "<unk>", 1: "<s>", 2: "</s>", start: "<|im_start|>", end: "<|im_end|>"}
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 32768,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": pieces.vocab_size(),
    }
    tokenizer_config = {
        "added_tokens_decoder": {str(i): token(text) for i, text in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": named,
        "generation_config.json": {"eos_token_id": [2, end], "pad_token_id": 2},
    }
    for name, content in files.items():
        (model / name).write_text(json.dumps(content), encoding="utf-8")
    (model / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    save_file(weights(pieces.vocab_size()), model / "model.safetensors")
    return root


def chatml_length(pieces: sentencepiece.SentencePieceProcessor, text: str) -> int:
    """Tokens of <s><|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n, a mark being
    one and SentencePiece itself encoding the text between them."""
    between = (f"user\n{text}", "\n", "assistant\n")
    marks = 4
    return marks + sum(len(pieces.encode(part)) for part in between)


def run(code: str, folder: Path) -> str:
    """What a script prints that runs in ``folder``. It ends well, and complains of nothing."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(kvant.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_example_runs_verbatim(folder: Path) -> None:
    """Its pipeline is never closed: the process must end well all the same."""
    printed = run(EXAMPLE, folder)
    assert printed.startswith("[Response(text=")
    assert printed.count("Response(text=") == len(PROMPTS)


def test_the_example_does_what_it_says(
    folder: Path, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    found = json.loads(run(EXAMPLE + REPORT, folder).rstrip().rsplit("\n", 1)[1])
    assert found["types"] == ["Response", "Response"]
    assert (found["key_format"], found["value_format"]) == ("int8", "int8")
    assert found["input_lens"] == [chatml_length(pieces, prompt) for prompt in PROMPTS]
    start, end = (pieces.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (144, 145))
    assert found["special"] == {
        "<s>": [1],
        "</s>": [2],
        "<|im_start|>": [start],
        "<|im_end|>": [end],
    }
    assert found["eos"] == [2, end]
    for ids, reason, text in zip(found["generated"], found["reasons"], found["texts"], strict=True):
        assert reason == "stop" or (reason == "length" and len(ids) == 512)
        assert not {2, end} & set(ids)
        assert "<|im_" not in text
