"""Passkey retrieval: a number hidden in filler text must be repeated.

    python benchmarks/passkey.py --kv bf16,k8v4,k4v4,int4 --lengths 1024,2048 --count 5

For each length and format: the share of prompts whose greedy answer of 8 tokens has the number. The
prompts of a length differ in the number and in its depth, spread evenly (after KIVI's sample and
Mohtashami and Jaggi, arXiv 2305.16300). Prints one JSON object; --output stores it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from record import record

from kvant import EngineConfig, GenerationConfig, pipeline
from kvant.api import Pipeline
from kvant.cli.options import split_specs

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_QUESTION = "\nWhat is the pass key? The pass key is"


def prompts(pipe: Pipeline, length: int, count: int) -> list[tuple[str, str]]:
    """Prompts of about ``length`` tokens and the keys hidden in them."""
    rng = random.Random(length)
    each = len(pipe.tokenizer.encode(_FILLER))
    fillers = (length - 100) // each
    out = []
    for index in range(count):
        key = str(rng.randint(10000, 99999))
        info = f"The pass key is {key}. Remember it. {key} is the pass key. "
        before = round(fillers * (index + 0.5) / count)
        text = _TASK + _FILLER * before + info + _FILLER * (fillers - before) + _QUESTION
        out.append((text, key))
    return out


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    lengths = [int(n) for n in args.lengths.split(",")]
    for spec in split_specs(args.kv):
        config = EngineConfig(kv=spec, kv_tokens=args.tokens, max_batch_size=4)
        with pipeline(args.model, config) as pipe:
            for length in lengths:
                began = time.perf_counter()
                asked = prompts(pipe, length, args.count)
                gen = GenerationConfig(max_new_tokens=8)
                answers = pipe([text for text, _ in asked], gen, do_preprocess=False)
                pairs = zip(asked, answers, strict=True)
                right = [key in answer.text for (_, key), answer in pairs]
                row = {
                    "kv": spec.label,
                    "length": length,
                    "prompt_tokens": max(answer.input_token_len for answer in answers),
                    "prompts": len(right),
                    "right_percent": round(100 * sum(right) / len(right), 1),
                    "seconds": round(time.perf_counter() - began, 1),
                }
                rows.append(row)
                print(json.dumps(row), [a.text for a in answers][:3], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", default="bf16,k8v4,k4v4,int4", help="KV specs")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--count", type=int, default=5, help="prompts of each length")
    parser.add_argument("--tokens", type=int, default=17000, help="size of the cache")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record(run(args), args.output)


if __name__ == "__main__":
    main()
