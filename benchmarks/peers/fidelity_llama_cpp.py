"""llama.cpp's quantized KV caches against kvant's f32 reference, through llama-cpp-py-sync.

    python benchmarks/peers/fidelity_llama_cpp.py --data DATA --output RESULTS.json

The model is a GGUF with float32 tensors, so that no weight arithmetic is compared. Flash attention
is on (a quantized V needs it). llama.cpp writes keys and values into the cache before it attends,
so every query meets quantized keys and values, its own token's included, in chunks of any size. Its
CPU attention also rounds the query to the type that is multiplied with K: q8_0 for q8_0, q4_0, q5_0
(q8_1 for q4_1, q5_1), float16 for f16. That is part of the cost of such a cache and is in the row.

Since April 2026 (pull request 21038) K and V are rotated by a Hadamard matrix before they are
written, in a quantized type. ``:norot`` rows set LLAMA_ATTN_ROT_DISABLE=1.

A row is K/V types: ``q8_0``, ``q8_0/q4_0``, ``q4_0:norot``.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, parser, store, windows
from llama_cpp_py_sync import __llama_cpp_tag__
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from numpy.typing import NDArray

BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
"""Blocks of 32 elements: the codes, a float16 scale and, for _1, a float16 minimum."""
DEFAULT = "f16,f32,q8_0,q4_0,q4_1,q5_1,q8_0/q4_0,q8_0:norot,q4_0:norot"

ffi, lib = get_ffi(), get_lib()
messages: list[str] = []


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def on_message(_level: int, text: Any, _user: Any) -> None:
    messages.append(ffi.string(text).decode(errors="replace"))


def load(path: Path) -> Any:
    lib.llama_log_set(on_message, ffi.NULL)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, "".join(messages[-5:])
    return model


def new_context(model: Any, kv: str, tokens: int, chunk: int, threads: int) -> Any:
    types, _, rotation = kv.partition(":")
    k, _, v = types.partition("/")
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1" if rotation == "norot" else "0"
    params = lib.llama_context_default_params()
    params.n_ctx = tokens
    params.n_batch = params.n_ubatch = chunk
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = getattr(lib, f"GGML_TYPE_{k.upper()}")
    params.type_v = getattr(lib, f"GGML_TYPE_{(v or k).upper()}")
    context = lib.llama_init_from_model(model, params)
    assert context, "".join(messages[-5:])
    return context


def decode(context: Any, batch: Any, ids: NDArray[np.int64], start: int, vocab: int) -> Any:
    """Logits [len(ids), vocabulary] of one chunk; valid until the next one."""
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i] = int(token), start + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    assert lib.llama_decode(context, batch) == 0
    logits = ffi.buffer(lib.llama_get_logits(context), len(ids) * vocab * 4)
    return np.frombuffer(logits, np.float32).reshape(len(ids), vocab)


def main() -> None:
    args = parser(__doc__, DEFAULT).parse_args()
    ids = windows(args.data)
    model = load(args.data / "model-f32.gguf")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(args.chunk, 0, 1)
    own = args.data / "llama.cpp"
    for kv in args.kv.split(","):
        messages.clear()
        context = new_context(model, kv, ids.shape[1], args.chunk, args.threads)
        row = Row(args.data, own, write=kv == "f16")
        for window in range(args.windows):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            for start in range(0, ids.shape[1], args.chunk):
                part = ids[window, start : start + args.chunk]
                row.add(window, start, decode(context, batch, part, start, vocab))
        lib.llama_free(context)
        k, _, v = kv.split(":")[0].partition("/")
        store(
            row.result(
                "llama.cpp",
                f"{__llama_cpp_tag__} (llama-cpp-py-sync {version('llama-cpp-py-sync')})",
                kv,
                (BITS[k] + BITS[v or k]) / 2,
                f"float32 weights, flash attention, chunks of {args.chunk}; own baseline: f16",
            ),
            args.output,
        )


if __name__ == "__main__":
    main()
