"""OpenVINO GenAI's continuous batching as a worker of ``throughput.py``.

The model is what openvino_genai makes of a GGUF file: with weights ``bf16`` of the float16 one,
computed in bfloat16 where the CPU has it, with ``q8_0``, ``q4_1`` and ``q4_0`` of the one of that
type, whose codes it keeps. Or what nncf makes of the former: ``int8_sym`` and ``int8_asym`` with a
scale for each channel, ``int4_sym`` and ``int4_asym`` for each group of 32. What quantized weights
are multiplied with is quantized too, in groups of 32 (OpenVINO's default; ``--dynamic-group``).

The pool has as many blocks of 32 tokens as the requests need; their size fits keys quantized by
channel and block, values by token, scale and zero float32: 9.5 bits per element with u8, 5.5 with
u4.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from throughput_worker import Ids, Worker, options, serve

BLOCK = 32
GROUP = 32
parser = options(__doc__)
parser.add_argument("--chunk", type=int, default=512, help="most tokens of a step")
parser.add_argument("--dynamic-group", type=int, help="values that share a scale of activations")
args = parser.parse_args()


def read_gguf(gguf: Path, folder: Path) -> None:
    """The model of a GGUF file, weights as compressed as there, and its tokenizer."""
    folder.mkdir(exist_ok=True)
    link = folder / gguf.name
    link.symlink_to(gguf.resolve())
    genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    link.unlink()


def compress(source: Path, folder: Path, mode: str) -> None:
    """What nncf makes of the model."""
    import nncf

    group = GROUP if mode.startswith("int4") else None
    model = nncf.compress_weights(
        ov.Core().read_model(source / "openvino_model.xml"),
        mode=nncf.CompressWeightsMode[mode.upper()],
        ratio=1.0 if group else None,
        group_size=group,
    )
    folder.mkdir(exist_ok=True)
    ov.save_model(model, folder / "openvino_model.xml")
    for path in source.glob("openvino_*tokenizer.*"):
        shutil.copy(path, folder)


def converted(data: Path, weights: str) -> Path:
    """The model and its tokenizer as OpenVINO IR; made on first use."""
    plain = data / "openvino-genai"
    folder = plain if weights == "bf16" else data / f"openvino-genai-{weights}"
    if (folder / "openvino_tokenizer.xml").exists():
        return folder
    if weights.startswith("q") or weights == "bf16":
        read_gguf(data / f"model-{'f16' if weights == 'bf16' else weights}.gguf", folder)
    else:
        compress(converted(data, "bf16"), folder, weights)
    return folder


def start() -> Worker:
    model = converted(args.data, args.weights)
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
    if args.dynamic_group is not None:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = args.dynamic_group
    tokenizer = genai.Tokenizer(str(model))
    pipe = genai.ContinuousBatchingPipeline(str(model), tokenizer, scheduler, "CPU", **properties)

    def run(prompts: Ids, new: int) -> Ids:
        gen = genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        tensors = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
        found = pipe.generate(tensors, [gen] * len(prompts))
        return [list(each.m_generation_ids[0]) for each in found]

    about = f"continuous batching, chunks of {args.chunk}, {precision} arithmetic"
    return Worker({f"{args.weights}/{args.kv}": run}, genai.get_version(), about)


serve(start)
