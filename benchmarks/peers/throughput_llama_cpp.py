"""llama.cpp's server (xllamacpp) as a worker of ``throughput.py``.

Continuous batching over as many slots as there are requests, flash attention, no reuse of prompts.
"""

from __future__ import annotations

import json
import urllib.request

import xllamacpp
from throughput_worker import Ids, Worker, options, serve

parser = options(__doc__)
parser.add_argument("--chunk", type=int, default=512, help="tokens of a micro-batch")
parser.add_argument("--weights", default="bf16", help="bf16 or f16")
args = parser.parse_args()


def server() -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(args.data / f"model-{args.weights}.gguf")
    params.n_parallel = args.requests
    params.n_ctx = args.requests * (-(-args.tokens // 256) * 256)
    params.n_ubatch = args.chunk
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.cache_type_k = params.cache_type_v = getattr(
        xllamacpp.ggml_type, f"GGML_TYPE_{args.kv.upper()}"
    )
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cache_ram_mib = 0
    params.port = 0
    params.verbosity = 1
    return xllamacpp.Server(params)


def start() -> Worker:
    running = server()

    def run(prompts: Ids, new: int) -> Ids:
        work = {
            "prompt": prompts,
            "n_predict": new,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "samplers": ["top_k"],
            "top_k": 1,
        }
        request = urllib.request.Request(
            f"{running.listening_address}/completion",
            json.dumps(work).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
        found = found if isinstance(found, list) else [found]
        return [each["tokens"] for each in sorted(found, key=lambda each: each["index"])]

    built = xllamacpp.get_system_info()
    isa = next(name for name in ("AVX512_BF16", "AVX512", "AVX2", "") if f"{name} = 1" in built)
    about = f"server, micro-batches of {args.chunk}, built for {isa}"
    return Worker({args.kv: run}, f"xllamacpp {xllamacpp.__version__}", args.weights, about)


serve(start)
