"""OpenVINO GenAI's continuous batching as a worker of ``throughput.py``.

The model is what openvino_genai makes of the float16 GGUF file, computed in bfloat16 where the CPU
has it. Its pool has as many blocks of 32 tokens as the requests need; their size fits keys
quantized by channel and block, values by token, scale and zero float32: 9.5 bits per element with
u8, 5.5 with u4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from throughput_worker import Ids, Worker, options, serve

BLOCK = 32
parser = options(__doc__)
parser.add_argument("--chunk", type=int, default=512, help="most tokens of a step")
args = parser.parse_args()


def converted(folder: Path, gguf: Path) -> Path:
    """The model and its tokenizer as OpenVINO IR; made on first use."""
    if not (folder / "openvino_tokenizer.xml").exists():
        folder.mkdir(exist_ok=True)
        link = folder / gguf.name
        link.symlink_to(gguf.resolve())
        genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        link.unlink()
    return folder


def start() -> Worker:
    model = converted(args.data / "openvino-genai", args.data / "model-f16.gguf")
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = args.requests
    scheduler.max_num_batched_tokens = args.chunk
    scheduler.num_kv_blocks = args.requests * (-(-args.tokens // BLOCK) + 1)
    precision = (
        "bf16" if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    )
    properties = {
        "KV_CACHE_PRECISION": args.kv,
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": args.threads,
    }
    tokenizer = genai.Tokenizer(str(model))
    pipe = genai.ContinuousBatchingPipeline(str(model), tokenizer, scheduler, "CPU", **properties)

    def run(prompts: Ids, new: int) -> Ids:
        gen = genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        tensors = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
        found = pipe.generate(tensors, [gen] * len(prompts))
        return [list(each.m_generation_ids[0]) for each in found]

    about = f"continuous batching, chunks of {args.chunk}"
    return Worker({args.kv: run}, genai.get_version(), precision, about)


serve(start)
