"""kvant's scores beside those of lm-eval's own hf model: same weights, same items, 16-bit cache.

    python benchmarks/lm_eval_agreement.py --data ../shared/data --limit 200

Both answer the same lm-eval requests. For each task: both scores with standard errors, the share of
items with the same outcome and with the same choice of an answer. Prints one JSON object; --output
stores it. hf reads the GGUF file through transformers, expanded to the same values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvant import EngineConfig, pipeline
from kvant.eval.tasks.exam import Exam, Options, open_exam
from kvant.eval.tasks.harness import KvantLM
from kvant.eval.tasks.results import score
from kvant.loading.resolve import resolve_model


def reference(model: str, dtype: str) -> HFLM:
    """lm-eval's hf model of the same file or folder."""
    path = Path(resolve_model(model))
    file = {"gguf_file": path.name} if path.is_file() else {}
    folder = str(path.parent if path.is_file() else path)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **file)
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    return HFLM(pretrained=weights, tokenizer=tokenizer, batch_size=16, device="cpu")


def choices(exam: Exam) -> list[Any]:
    """What was answered: the likeliest choice, whether the target is greedy, or the text."""
    asked: dict[tuple[str, int], list[Any]] = {}
    for each in exam.instances:
        asked.setdefault((each.task_name, each.doc_id), []).append(each.resps[0])
    found = []
    for answers in asked.values():
        scored = isinstance(answers[0], tuple)
        many = scored and len(answers) > 1
        found.append(
            int(np.argmax([a[0] for a in answers])) if many else answers[0][1] if scored
            else answers[0]
        )  # fmt: skip
    return found


def compare(exam: Exam, ours: KvantLM, theirs: HFLM) -> dict[str, Any]:
    metric = exam.bench.metric
    row: dict[str, Any] = {"task": exam.name, "metric": metric, "items": exam.questions}
    outcomes, chosen = [], []
    for name, lm in (("kvant", ours), ("hf", theirs)):
        began = time.perf_counter()
        values = [each[metric] for each in exam.ask(lm)]
        outcomes.append(values)
        chosen.append(choices(exam))
        row[name] = score(metric, values).as_json()
        row[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
    for name, pair in (("same_outcome", outcomes), ("same_answer", chosen)):
        same = [a == b for a, b in zip(*pair, strict=True)]
        row[f"{name}_percent"] = round(100 * sum(same) / len(same), 2)
    gap = abs(row["kvant"]["value"] - row["hf"]["value"])
    stderr = row["hf"]["stderr"]
    row["difference_in_stderr"] = round(gap / stderr, 3) if stderr else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="hellaswag,arc-easy,piqa,lambada")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--dtype", default="bfloat16", help="of both models")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    theirs = reference(args.model, args.dtype)
    rows = []
    with pipeline(args.model, EngineConfig(kv=args.kv, dtype=args.dtype)) as pipe:
        for name in args.tasks.split(","):
            options = Options(
                data=args.data,
                limits={name: args.limit},
                longest=pipe.model.engine.session_len,
                encode=pipe.tokenizer.encode,
            )
            rows.append(compare(open_exam(name, options), KvantLM(pipe), theirs))
            print(json.dumps(rows[-1]), file=sys.stderr)
    record(
        [{"model": args.model, "kv": args.kv, "dtype": args.dtype, **row} for row in rows],
        args.output,
    )


if __name__ == "__main__":
    main()
