"""vLLM's CPU backend as a worker of ``throughput.py``, in the worker's own process.

KV types: ``auto`` (bfloat16), ``fp8_e4m3``, ``fp8_e5m2``. Weights: ``bf16``, ``int8`` (W8A8: a
scale for each output channel, activations quantized by token), ``int4`` (W4A16 in groups of 32).
"""

from __future__ import annotations

import os
from importlib.metadata import version

from throughput_worker import Ids, Worker, options, serve

parser = options(__doc__)
parser.add_argument("--chunk", type=int, default=2048, help="most tokens of a step")
parser.add_argument("--cache", type=int, default=2, help="GiB of the KV cache")
parser.add_argument("--bind", default="nobind", help="VLLM_CPU_OMP_THREADS_BIND")
parser.add_argument("--eager", action="store_true", help="without torch.compile")
args = parser.parse_args()

os.environ |= {
    "OMP_NUM_THREADS": str(args.threads),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(args.cache),
    "VLLM_CPU_OMP_THREADS_BIND": args.bind,
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def start() -> Worker:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        str(args.data / ("hf" if args.weights == "bf16" else f"hf-{args.weights}")),
        dtype="bfloat16",
        kv_cache_dtype=args.kv,
        max_model_len=args.tokens,
        max_num_batched_tokens=args.chunk,
        max_num_seqs=args.requests,
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        generation_config="vllm",
    )

    def run(prompts: Ids, new: int) -> Ids:
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found = llm.generate(asked, sampling, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found]

    how = "eager" if args.eager else "compiled"
    zen = ", zentorch" if current_platform.is_zen_cpu() else ""
    about = f"{how}, chunks of {args.chunk}{zen}"
    return Worker({f"{args.weights}/{args.kv}": run}, version("vllm-cpu"), about)


serve(start)
