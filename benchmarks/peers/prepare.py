"""Writes what the peers need, in kvant's own environment; see ``common.py`` for the files.

python benchmarks/peers/prepare.py --text wiki.test.raw.gz --data DATA
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from common import F32, log_softmax
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from kvant import EngineConfig, pipeline
from kvant.loading.resolve import resolve_model


def reference(model: str, text: str, data: Path, ctx: int, windows: int) -> None:
    """Token ids and the f32 cache's log-probabilities, as ``kvant eval fidelity`` computes them."""
    config = EngineConfig(dtype="float32", kv="f32", kv_tokens=ctx + 64, max_prefill_token_num=512)
    (data / "reference").mkdir(parents=True, exist_ok=True)
    with pipeline(model, config) as pipe:
        tokens = pipe.tokenizer.encode(text[: ctx * windows * 8])
        ids = np.array(tokens[: ctx * windows], np.int64).reshape(windows, ctx)
        np.save(data / "ids.npy", ids)
        for window in range(windows):
            out = np.lib.format.open_memmap(
                data / f"reference/{window}.npy",
                "w+",
                np.float32,
                (ctx, pipe.model.config.vocab_size),
            )

            def sink(start: int, logits: F32, out: F32 = out) -> None:
                out[start : start + len(logits)] = log_softmax(logits)

            pipe.run([pipe.score_request(ids[window].tolist(), sink)])


def float_gguf(source: Path, target: Path, matrices: GGMLQuantizationType) -> None:
    """A copy of a GGUF file whose tensors are floats, vectors (norms) always float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, sub = field.types[0], field.types[-1]
        value = field.contents()
        if field.name == "general.file_type":
            value = int(matrices)  # 0: all F32, 1: mostly F16, as the types themselves
        array = kind == GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, kind, sub_type=sub if array else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        shape = [int(n) for n in reversed(tensor.shape)]
        kind = matrices if len(shape) > 1 else GGMLQuantizationType.F32
        values = quantize(values.reshape(shape), kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def float_folder(source: Path, target: Path) -> None:
    """The GGUF file as a transformers folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **names)
    model.hf_quantizer = None  # all tensors are plain floats by now, but it forbids saving
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **names).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 raw test set, gzip")
    parser.add_argument("--data", type=Path, required=True, help="folder to write")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6)
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    source = resolve_model(args.model)
    for kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        float_gguf(source, args.data / f"model-{kind.name.lower()}.gguf", kind)
    float_folder(source, args.data / "hf")
    text = gzip.decompress(args.text.read_bytes()).decode()
    reference(args.model, text, args.data, args.ctx, args.windows)


if __name__ == "__main__":
    main()
