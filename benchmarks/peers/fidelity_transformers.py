"""transformers' QuantizedCache (quanto, HQQ and FP8 backends) against kvant's f32 reference.

    python benchmarks/peers/fidelity_transformers.py --data DATA --output RESULTS.json

How the test is kept honest: transformers attends to the exact keys and values of the forward call
it is in, and a QuantizedCache returns the last tokens (up to ``residual_length``) exactly. A window
in one call would so never meet a quantized key. Here a window is fed in chunks of 64 tokens. With
the default residual length of 128 the cache then quantizes after every second chunk, and a query
sees 0 to 128 exact tokens, 64 on average, as a decode with this cache does, and everything before
them as quantized. ``-exact0`` rows set the residual length to 1: exact is only the chunk itself.

The cache re-quantizes everything, from its dequantized values, each time the residual is full.
Settings are the defaults of the class (q_group_size 64, residual_length 128); axes are those of the
documentation: 0 for quanto, 1 for HQQ, both of which make a group from 64 neighbouring elements,
here one token of one head. Scales and zeros are float32 here as the model is; bits per element
count them, and the residual, at 16 bit, as in a 16-bit model.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from common import Row, amortised_bits, parser, store, windows
from transformers import AutoModelForCausalLM, Cache, DynamicCache, QuantizedCache

DEFAULT = "f32,quanto-int4,hqq-int4,quanto-int4-exact0,quanto-int2,hqq-int2,hqq-int8"
GROUP = 64


def new_cache(kv: str, config: Any) -> Cache:
    if kv == "f32":
        return DynamicCache(config=config)
    if kv == "fp8":
        return QuantizedCache("fp8", config)
    backend, bits, *rest = kv.split("-")
    axis = {"quanto": 0, "hqq": 1}[backend]
    return QuantizedCache(
        backend,
        config,
        nbits=int(bits.removeprefix("int")),
        axis_key=axis,
        axis_value=axis,
        q_group_size=GROUP,
        residual_length=1 if rest else 128,
    )


def bits_per_element(kv: str) -> float:
    if kv in ("f32", "fp8"):
        return {"f32": 32.0, "fp8": 8.0}[kv]
    _, bits, *rest = kv.split("-")
    quantized = int(bits.removeprefix("int")) + 2 * 16 / GROUP
    return amortised_bits(quantized, 0 if rest else 64, 16)


def main() -> None:
    args = parser(__doc__, DEFAULT).parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.data / "hf", dtype=torch.float32).eval()
    ids = torch.from_numpy(windows(args.data))
    for kv in args.kv.split(","):
        row = Row(args.data)
        for window in range(args.windows):
            cache = new_cache(kv, model.config)
            for start in range(0, ids.shape[1], args.chunk):
                part = ids[window : window + 1, start : start + args.chunk]
                with torch.inference_mode():
                    logits = model(part, past_key_values=cache, use_cache=True).logits[0]
                row.add(window, start, logits.numpy())
        note = f"float32 weights, chunks of {args.chunk}"
        if kv.startswith(("quanto", "hqq")):
            backend = {"quanto": "optimum-quanto", "hqq": "hqq"}[kv.split("-")[0]]
            residual = 1 if kv.endswith("exact0") else 128
            note += f", {backend} {version(backend)}, group {GROUP}, residual_length {residual}"
        elif kv == "fp8":
            note += ", e4m3 with one scale per layer frozen at the first chunk, no residual"
        store(
            row.result("transformers", version("transformers"), kv, bits_per_element(kv), note),
            args.output,
        )


if __name__ == "__main__":
    main()
