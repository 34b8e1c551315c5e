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
parser.add_argument("--no-flash", action="store_true", help="without flash attention")
parser.add_argument("--batch", type=int, default=2048, help="tokens of a batch of the server")
parser.add_argument("--poll", type=int, default=50, help="how busily threads wait")
args = parser.parse_args()


def server() -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(args.data / f"model-{args.weights}.gguf")
    params.n_parallel = args.requests
    params.n_ctx = args.requests * (-(-args.tokens // 256) * 256)
    params.n_batch, params.n_ubatch = max(args.batch, args.chunk), args.chunk
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = args.threads, args.poll
    params.cache_type_k = params.cache_type_v = getattr(
        xllamacpp.ggml_type, f"GGML_TYPE_{args.kv.upper()}"
    )
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if args.no_flash
        else flash.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
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
    return Worker({f"{args.weights}/{args.kv}": run}, f"xllamacpp {xllamacpp.__version__}", about)


serve(start)
