"""Writes what the peers need, in kvant's own environment; see ``common.py`` for the files.

python benchmarks/peers/prepare.py --text wiki.test.raw.gz --data DATA
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import F32, log_softmax
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from kvant import EngineConfig, pipeline
from kvant.loading.resolve import resolve_model

if TYPE_CHECKING:
    import torch

GROUP = 32
"""Values that share a scale in 4-bit weights."""


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


def gguf_copy(source: Path, target: Path, matrices: GGMLQuantizationType) -> None:
    """A copy of a GGUF file with matrices of one type, vectors (norms) float32. As usual, 4-bit
    types leave the embedding, which is the last layer too, at 8 bits. The source's own type is a
    link to it, so its values are as published."""
    reader = GGUFReader(source)
    file_type = LlamaFileType["ALL_F32" if matrices.name == "F32" else f"MOSTLY_{matrices.name}"]
    if reader.fields["general.file_type"].contents() == file_type:
        target.symlink_to(source.resolve())
        return
    writer = GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = int(file_type) if field.name == "general.file_type" else field.contents()
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        shape = [int(n) for n in reversed(tensor.shape)]
        kind = matrices if len(shape) > 1 else GGMLQuantizationType.F32
        if tensor.name == "token_embd.weight" and kind.name.startswith("Q4"):
            kind = GGMLQuantizationType.Q8_0
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


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().char(), "weight_scale": scale}


def _int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric, a scale for each group; codes + 8, eight in an int32 from the lowest bits."""
    import torch

    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7.5
    codes = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).int() + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (codes.view(len(codes), -1, 8) << shifts).sum(2, dtype=torch.int32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def quantized_folder(source: Path, target: Path, bits: int) -> None:
    """A transformers folder with its linear layers in the format of compressed-tensors: 8 bits with
    activations of 8 bits (W8A8), or 4 bits (W4A16)."""
    from safetensors.torch import load_file, save_file

    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value.bfloat16()
            continue
        for part, tensor in (_int8 if bits == 8 else _int4)(value).items():
            floats = tensor.is_floating_point()
            tensors[name.removesuffix("weight") + part] = tensor.bfloat16() if floats else tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    common = {"num_bits": bits, "type": "int", "symmetric": True}
    if bits == 8:
        weights = {**common, "strategy": "channel", "dynamic": False}
        inputs = {**common, "strategy": "token", "dynamic": True}
    else:
        weights = {**common, "strategy": "group", "group_size": GROUP, "dynamic": False}
        inputs = None
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def peer_weights(model: str, data: Path, engine: str, weights: str) -> None:
    """Make the file that a peer's row reads, if it is not there. OpenVINO's worker makes its own,
    of the GGUF files."""
    if engine == "vllm":
        if weights != "bf16" and not (data / f"hf-{weights}" / "config.json").exists():
            quantized_folder(data / "hf", data / f"hf-{weights}", int(weights.removeprefix("int")))
        return
    if engine == "openvino" and not weights.startswith("q"):
        weights = "f16"
    path = data / f"model-{weights}.gguf"
    if not path.exists():
        gguf_copy(resolve_model(model), path, GGMLQuantizationType[weights.upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 raw test set, gzip")
    parser.add_argument("--data", type=Path, required=True, help="folder to write")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6)
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    float_folder(resolve_model(args.model), args.data / "hf")
    for weights in ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"):
        peer_weights(args.model, args.data, "llama_cpp", weights)
    for weights in ("int8", "int4"):
        peer_weights(args.model, args.data, "vllm", weights)
    text = gzip.decompress(args.text.read_bytes()).decode()
    reference(args.model, text, args.data, args.ctx, args.windows)


if __name__ == "__main__":
    main()
