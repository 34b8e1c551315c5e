"""The packaged model on the GPU against the reference backend on the CPU, in the same run.

    python benchmarks/gpu/accuracy.py [--model smollm2-135m] [--budget SECONDS] [--output ROWS.json]

Baseline: the reference backend, float32, an f32 cache. For each format the divergence of the next
token, KL(baseline || format) in nats, of the reference and of the GPU (float16, and bfloat16 where
there is one), over a window of text; positions where GPU and reference have the same most likely
token; and where greedy continuations part. A format holds if the GPU's divergence is at most
``FACTOR`` times the reference's and the rounding of 16-bit activations (``ROUNDING``) more.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence

import torch
from clock import Deadline
from report import Row, Rows, options, run

from kvant.config import EngineConfig
from kvant.engine.load import open_model
from kvant.eval.metrics import Comparison, first_difference, number
from kvant.eval.runner import F32, Prompts, Runner
from kvant.eval.text import cut_windows, default_text
from kvant.formats import KVSpec

FACTOR = 1.1
ROUNDING = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 1e-2}
"""Nats of divergence that the rounding of activations may add."""
CONTEXT, PROMPT, PROMPTS, GREEDY = 512, 64, 2, 24
"""Tokens of the window and of a prompt; prompts; tokens of a continuation."""


def logits_of(runner: Runner, spec: KVSpec, ids: Sequence[int]) -> F32:
    """Logits of all positions of a window, ``[ctx, V]``."""
    room = runner.room(len(ids))

    def keep(start: int, logits: F32) -> None:
        room[start : start + len(logits)] = logits

    with runner.pipeline(spec, [len(ids)]) as pipe:
        pipe.run([pipe.score_request(list(ids), keep)])
    return room


def compared(ids: Sequence[int], reference: F32, logits: F32) -> Comparison:
    comparison = Comparison(ids, reference)
    comparison(0, logits)
    return comparison


def runner_of(model: str, backend: str, dtype: str) -> Runner:
    config = EngineConfig(backend=backend, dtype=dtype)
    opened = open_model(model, config)
    return Runner(opened, opened.weights(config), config, lambda _: None)


def cases(*, smoke: bool) -> list[tuple[str, str]]:
    """Formats and types of the GPU."""
    if smoke:
        return [("int8", "float32")]
    found = [(kv, "float16") for kv in ("f16", "int8", "int4", "k4v4")]
    if torch.cuda.get_device_capability() >= (8, 0):
        found.append(("bf16", "bfloat16"))
    return found


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    reference = runner_of(args.model, "reference", "float32")
    tokenizer = reference.opened.tokenizer
    context, prompt, greedy = (80, 16, 3) if args.smoke else (CONTEXT, PROMPT, GREEDY)
    ids = cut_windows(default_text(), tokenizer, context, 1)[0]
    prompts = tuple(tuple(ids[i * prompt : (i + 1) * prompt]) for i in range(PROMPTS))
    exact = logits_of(reference, KVSpec.parse("f32"), ids)
    runners: dict[str, Runner] = {}
    for kv, dtype in cases(smoke=args.smoke):
        if deadline.passed():
            rows.add({"what": "deadline", "note": f"accuracy ends before {kv}"})
            break

        def one(kv: str = kv, dtype: str = dtype) -> list[Row]:
            if dtype not in runners:
                runners[dtype] = runner_of(args.model, "triton", dtype)
            return [fidelity(kv, dtype, reference, runners[dtype], ids, exact, prompts, greedy)]

        rows.attempt({"what": "accuracy", "model": args.model, "kv": kv, "dtype": dtype}, one)
        gc.collect()


def fidelity(
    kv: str,
    dtype: str,
    reference: Runner,
    device: Runner,
    ids: Sequence[int],
    exact: F32,
    prompts: Prompts,
    greedy: int,
) -> Row:
    """The figures of one format."""
    spec = KVSpec.parse(kv)
    expected, found = (logits_of(runner, spec, ids) for runner in (reference, device))
    kld = [float(compared(ids, exact, logits).kld.mean()) for logits in (expected, found)]
    between = compared(ids, expected, found)
    texts = [runner.generate(spec, prompts, greedy) for runner in (reference, device)]
    parts = [first_difference(one, other) for one, other in zip(*texts, strict=True)]
    return {
        "positions": len(ids),
        "kld_reference": number(kld[0]),
        "kld_gpu": number(kld[1]),
        "kld_gpu_to_reference": number(float(between.kld.mean())),
        "top1_percent": number(100 * float(between.same_top.mean())),
        "greedy_tokens": greedy,
        "first_diverging": parts,
        "text": device.opened.tokenizer.decode(texts[1][0]),
        "holds": bool(kld[1] <= FACTOR * kld[0] + ROUNDING[dtype]),
    }


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    sys.exit(run(program, parser.parse_args()))
