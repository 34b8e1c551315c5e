"""Answer two prompts with three KV caches and show what each costs. Run by ``make demo``."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table

from kvant import EngineConfig, GenerationConfig, KvantError, pipeline
from kvant.api import Response

MODEL = "smollm2-135m"
PROMPTS = ["Hi, please introduce yourself.", "What is the capital of France, and why is it famous?"]
FORMATS = ["bf16", "int8", "k4v4"]
GENERATION = GenerationConfig(max_new_tokens=64)


def main() -> int:
    console = Console()
    table = Table(title=f"{MODEL}: {len(PROMPTS)} prompts, KV cache of 32 MiB")
    for column in ("KV format", "bits/element", "bytes/token", "tokens in 32 MiB", "tokens/s"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name in FORMATS:
        with pipeline(MODEL, EngineConfig(kv=name, kv_memory="32MiB")) as pipe:
            start = time.perf_counter()
            responses = pipe(PROMPTS, GENERATION)
            seconds = time.perf_counter() - start
            model = pipe.model
        assert isinstance(responses, list)
        console.rule(f"KV cache: {name}")
        for prompt, response in zip(PROMPTS, responses, strict=True):
            console.print(f"> {prompt}", style="bold", markup=False, highlight=False)
            console.print(f"{response.text}\n", markup=False, highlight=False)
        table.add_row(
            name,
            f"{model.kv_spec.bits_per_element(model.config.kv_shape):.2f}",
            f"{model.kv_spec.bytes_per_token(model.config.kv_shape):,.0f}",
            f"{model.cache.num_tokens:,}",
            f"{_generated(responses) / seconds:.1f}",
        )
    console.print(table)
    return 0


def _generated(responses: list[Response]) -> int:
    return sum(response.generate_token_len for response in responses)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KvantError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
