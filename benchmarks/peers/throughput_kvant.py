"""kvant as a worker of ``throughput.py``: an engine for each row, weights of a kind read once.

``--rows`` is a comma list of ``WEIGHTS/KV`` (weights bf16, int8 or int4); a bare KV has bf16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from throughput_worker import Ids, Run, Worker, options, serve

from kvant import EngineConfig, GenerationConfig
from kvant.api import Pipeline
from kvant.cli.options import split_specs
from kvant.engine.load import open_model, start_model
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.machine import package_version

parser = options(__doc__, formats=False)
parser.add_argument("--rows", required=True)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--backend", default="auto")
args = parser.parse_args()


def rows(text: str) -> Iterator[tuple[str, KVSpec]]:
    """Weights and KV of each; a KV spec may hold commas itself."""
    before, *named = re.split(r"(?:^|,)(bf16|int8|int4)/", text)
    groups = [("bf16", before), *zip(named[::2], named[1::2], strict=True)]
    for weights, kvs in groups:
        for number, spec in enumerate(split_specs(kvs) if kvs else []):
            yield (weights if number == 0 else "bf16"), spec


def runner(pipe: Pipeline) -> Run:
    def run(prompts: Ids, new: int) -> Ids:
        gen = GenerationConfig(max_new_tokens=new, ignore_eos=True)
        responses = pipe.run([r for ids in prompts for r in pipe.generate_requests(ids, gen)])
        return [response.token_ids for response in responses]

    return run


def start() -> Worker:
    pages = args.requests * (-(-args.tokens // PAGE_TOKENS) + 1)
    configs = {
        (weights, spec.label): EngineConfig(
            weight_dtype="auto" if weights == "bf16" else weights,
            kv=spec,
            kv_tokens=pages * PAGE_TOKENS,
            max_batch_size=args.requests,
            enable_prefix_caching=False,
            backend=args.backend,
            num_threads=args.threads,
        )
        for weights, spec in rows(args.rows)
    }
    first = next(iter(configs.values()))
    opened = open_model(args.model, first)
    kinds = {weights: config for (weights, _), config in configs.items()}
    read = {weights: opened.weights(config) for weights, config in kinds.items()}
    pipes = {
        f"{weights}/{kv}": Pipeline(start_model(opened, read[weights], config))
        for (weights, kv), config in configs.items()
    }
    backend = next(iter(pipes.values())).model.engine.backend.name
    about = f"backend {backend}, chunks of {first.max_prefill_token_num}"
    runs = {row: runner(pipe) for row, pipe in pipes.items()}
    return Worker(runs, str(package_version("kvant")), about)


serve(start)
