"""kvant as a worker of ``throughput.py``: one copy of the weights, an engine for each KV format."""

from __future__ import annotations

from throughput_worker import Ids, Run, Worker, options, serve

from kvant import EngineConfig, GenerationConfig
from kvant.api import Pipeline
from kvant.cli.options import split_specs
from kvant.engine.load import open_model, start_model
from kvant.formats import PAGE_TOKENS
from kvant.machine import package_version

parser = options(__doc__)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--backend", default="auto")
args = parser.parse_args()


def runner(pipe: Pipeline) -> Run:
    def run(prompts: Ids, new: int) -> Ids:
        gen = GenerationConfig(max_new_tokens=new, ignore_eos=True)
        responses = pipe.run([pipe.generate_request(ids, gen) for ids in prompts])
        return [response.token_ids for response in responses]

    return run


def start() -> Worker:
    pages = args.requests * (-(-args.tokens // PAGE_TOKENS) + 1)
    configs = {
        spec.label: EngineConfig(
            kv=spec,
            kv_tokens=pages * PAGE_TOKENS,
            max_batch_size=args.requests,
            enable_prefix_caching=False,
            backend=args.backend,
            num_threads=args.threads,
        )
        for spec in split_specs(args.kv)
    }
    config = next(iter(configs.values()))
    opened = open_model(args.model, config)
    weights = opened.weights(config.dtype)
    pipes = {kv: Pipeline(start_model(opened, weights, each)) for kv, each in configs.items()}
    backend = next(iter(pipes.values())).model.engine.backend.name
    about = f"backend {backend}, chunks of {config.max_prefill_token_num}"
    runs = {kv: runner(pipe) for kv, pipe in pipes.items()}
    return Worker(runs, str(package_version("kvant")), "bf16", about)


serve(start)
