"""vLLM's CPU backend with fp8 KV caches against kvant's f32 reference.

    python benchmarks/peers/fidelity_vllm.py --data DATA --output RESULTS.json

On a CPU vLLM 0.32 has the KV types ``auto`` (as the model), ``fp8_e4m3`` and ``fp8_e5m2`` (these
on AVX-512 or AMX only); int8_per_token_head and int4_per_token_head belong to its Triton backend,
that is to GPUs. Its CPU attention writes keys and values into the cache and then reads all of them
from there (``do_kv_cache_update`` and ``cpu_attention_with_kv_cache`` in
vllm/v1/attention/backends/cpu_attn.py), so queries of any chunk size meet quantized content.

A window is a prompt. Logits come from the model's hidden states, caught by a hook, through its own
``compute_logits``; so they are exact and cover the whole vocabulary. fp8 scales are 1, the default
without calibration. A row is KV type @ type of weights and activations.
"""

from __future__ import annotations

import gc
import os
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process, for the hook
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from common import Row, parser, store, windows
from vllm import LLM, SamplingParams

DEFAULT = "auto@float32,fp8_e4m3@float32,fp8_e5m2@float32,auto@bfloat16,fp8_e4m3@bfloat16"


def catch(hidden: list[torch.Tensor], _model: Any, _inputs: Any, output: torch.Tensor) -> None:
    hidden.append(output.clone())


def main() -> None:
    args = parser(__doc__, DEFAULT).parse_args()
    ids = windows(args.data)
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    for kv in args.kv.split(","):
        cache, _, dtype = kv.partition("@")
        llm = LLM(
            str(args.data / "hf"),
            dtype=dtype,
            kv_cache_dtype=cache,
            max_model_len=ids.shape[1] + 64,
            max_num_batched_tokens=args.chunk,
            max_num_seqs=1,
            enable_prefix_caching=False,
            enforce_eager=True,
            generation_config="vllm",
        )
        models: list[Any] = []
        llm.apply_model(models.append)
        (model,) = models
        hidden: list[torch.Tensor] = []
        handle = model.register_forward_hook(partial(catch, hidden))
        row = Row(args.data, args.data / f"vllm-{dtype}", write=cache == "auto")
        for window in range(args.windows):
            hidden.clear()
            llm.generate({"prompt_token_ids": ids[window].tolist()}, sampling, use_tqdm=False)
            states = torch.cat(hidden)[: ids.shape[1]]
            assert len(states) == ids.shape[1]
            for start in range(0, len(states), 64):
                logits = model.compute_logits(states[start : start + 64])
                row.add(window, start, logits.float().numpy())
        handle.remove()
        bits = torch.finfo(getattr(torch, dtype)).bits if cache == "auto" else 8
        note = f"CPU backend, {dtype} weights, scales 1, chunks of {args.chunk}"
        note += f"; own baseline: auto@{dtype}"
        store(row.result("vllm", version("vllm-cpu"), kv, bits, note), args.output)
        del llm, model, models
        gc.collect()


if __name__ == "__main__":
    main()
