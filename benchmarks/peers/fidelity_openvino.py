"""OpenVINO's quantized KV caches (CPU plugin, stateful model) against kvant's f32 reference.

    python benchmarks/peers/fidelity_openvino.py --data DATA --output RESULTS.json

openvino_genai converts the GGUF file; it reads no float32 tensors, so this is the float16 one, and
what that rounding costs is the row f32. Computation is in float32, without the quantization of
activations that OpenVINO uses by default on CPUs.

A call with an empty cache attends to its own exact keys and values; every later call reads the
quantized cache, its own tokens included. So of chunks of 64 only the first is seen exactly, and
only by itself. (With the window in one call no query meets a quantized key.)

Keys are quantized by token, the default (KEY_CACHE_QUANT_MODE). Scale and zero point are float32,
one pair for each token and head, or for 32 elements of it in rows with ``:g32``
(KEY_CACHE_GROUP_SIZE, VALUE_CACHE_GROUP_SIZE).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
from common import Row, parser, store, windows

HEAD_DIM = 64
DEFAULT = "f32,u8,u4,u4:g32"


def converted(data: Path) -> Path:
    """The model as OpenVINO IR, written beside the GGUF file on first use."""
    model = data / "openvino_model.xml"
    if not model.exists():
        openvino_genai.LLMPipeline(str(data / "model-f16.gguf"), "CPU", enable_save_ov_model=True)
    return model


def bits_per_element(precision: str, group: int) -> float:
    bits = int(precision[1:])
    return bits + 2 * 32 / (group or HEAD_DIM) if precision.startswith("u") else bits


def main() -> None:
    args = parser(__doc__, DEFAULT).parse_args()
    ids = windows(args.data)
    core = ov.Core()
    model = core.read_model(converted(args.data))
    length = ids.shape[1]
    for kv in args.kv.split(","):
        precision, _, suffix = kv.partition(":g")
        group = int(suffix or 0)
        options = {
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": args.threads,
        }
        if group:
            options |= {"KEY_CACHE_GROUP_SIZE": group, "VALUE_CACHE_GROUP_SIZE": group}
        compiled = core.compile_model(model, "CPU", options)
        assert compiled.get_property("KEY_CACHE_GROUP_SIZE") == group
        assert compiled.get_property("VALUE_CACHE_GROUP_SIZE") == group
        request = compiled.create_infer_request()
        row = Row(args.data, args.data / "openvino", write=kv == "f32")
        for window in range(args.windows):
            request.reset_state()
            for start in range(0, length, args.chunk):
                stop = min(start + args.chunk, length)
                found = request.infer(
                    {
                        "input_ids": ids[window : window + 1, start:stop],
                        "attention_mask": np.ones((1, stop), np.int64),
                        "position_ids": np.arange(start, stop)[None],
                        "beam_idx": np.zeros(1, np.int32),
                    }
                )
                row.add(window, start, found[0][0])
        note = f"float16 weights, float32 computation, chunks of {args.chunk}; own baseline: f32"
        version = ov.get_version().split("-")[0]
        store(
            row.result("openvino", version, kv, bits_per_element(precision, group), note),
            args.output,
        )


if __name__ == "__main__":
    main()
