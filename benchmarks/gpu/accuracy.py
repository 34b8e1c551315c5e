"""The packaged model on the GPU against the reference backend on the CPU, in the same run.

    python benchmarks/gpu/accuracy.py [--model smollm2-135m] [--budget SECONDS] [--output ROWS.json]

Baseline: the reference backend, float32, an f32 cache. For each format the divergence of the next
token, KL(baseline || format) in nats, of the reference and of the GPU (float16, and bfloat16 where
there is one), over a window of text; between GPU and reference, that and the positions with the
same most likely token; and greedy continuations of both.

What the rounding of 16-bit activations may cost is measured, too: torch's own run in the same type
("torch", the reference backend over the same format). A format holds if
- the GPU's divergence is at most ``FACTOR`` times the larger one of the reference's and torch's,
- its divergence from the reference is at most ``TIMES`` that of torch from it, or that of the
  reference from the baseline,
- it has the reference's most likely token as often as torch has, but for ``TOP1`` percent, and
- where a greedy text parts from the reference's, the reference had both tokens within ``GAP`` times
  the root mean square difference of their logits: a tie, as far as 16 bits can tell.
To each bound that of float32 sums in another order, ``FLOOR``, is added.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from clock import Deadline
from report import Row, Rows, options, run

from kvant.config import EngineConfig
from kvant.engine.load import open_model
from kvant.eval.metrics import Comparison, first_difference, number
from kvant.eval.runner import F32, Prompts, Runner
from kvant.eval.text import cut_windows, default_text
from kvant.formats import KVSpec

FACTOR, TIMES, TOP1, GAP = 1.1, 2.0, 2.0, 6.0
FLOOR = 1e-4
"""Nats, and units of a logit."""
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
    found = [(kv, "float16") for kv in ("f16", "int8", "int4h", "k4v4", "int4", "fp8")]
    if torch.cuda.get_device_capability() >= (8, 0):
        found[1:1] = [("bf16", "bfloat16"), ("k4v4", "bfloat16")]
    return found


@dataclass(frozen=True)
class Trial:
    """What formats are tried on: the reference, a window of text and its logits in float32, and
    prompts that are continued by ``greedy`` tokens."""

    reference: Runner
    ids: list[int]
    exact: F32
    prompts: Prompts
    greedy: int

    def kld(self, logits: F32) -> float:
        """From the baseline, in nats."""
        return float(compared(self.ids, self.exact, logits).kld.mean())

    def fidelity(self, kv: str, torch16: Runner, device: Runner) -> Row:
        """The figures of one format."""
        spec = KVSpec.parse(kv)
        expected, torchs, found = (
            logits_of(runner, spec, self.ids) for runner in (self.reference, torch16, device)
        )
        between, rounding = (compared(self.ids, expected, x) for x in (found, torchs))
        klds = [self.kld(x) for x in (expected, torchs, found)]
        tops = [100 * float(each.same_top.mean()) for each in (rounding, between)]
        gap_bound = GAP * float(np.sqrt(np.mean((found - expected) ** 2))) + FLOOR
        texts = [r.generate(spec, self.prompts, self.greedy) for r in (self.reference, device)]
        parts = [first_difference(one, other) for one, other in zip(*texts, strict=True)]
        gaps = [self._gap(spec, *each) for each in zip(self.prompts, *texts, parts, strict=True)]
        bounds = {
            "baseline": klds[2] <= FACTOR * max(klds[:2]) + FLOOR,
            "reference": between.kld.mean() <= max(TIMES * rounding.kld.mean(), klds[0]) + FLOOR,
            "top1": tops[1] >= tops[0] - TOP1,
            "greedy": max(gaps) <= gap_bound,
        }
        return {
            "positions": len(self.ids),
            "kld_reference": number(klds[0]),
            "kld_torch": number(klds[1]),
            "kld_gpu": number(klds[2]),
            "kld_torch_to_reference": number(float(rounding.kld.mean())),
            "kld_gpu_to_reference": number(float(between.kld.mean())),
            "top1_torch_percent": number(tops[0]),
            "top1_percent": number(tops[1]),
            "greedy_tokens": self.greedy,
            "first_diverging": parts,
            "gaps": [number(gap) for gap in gaps],
            "gap_bound": number(gap_bound),
            "text": device.opened.tokenizer.decode(texts[1][0]),
            "fails": [name for name, held in bounds.items() if not held],
            "holds": all(bounds.values()),
        }

    def _gap(
        self, spec: KVSpec, prompt: Sequence[int], mine: list[int], its: list[int], at: int | None
    ) -> float:
        """How much likelier the reference held its own token than the other's, where they part."""
        if at is None:
            return 0.0
        last = logits_of(self.reference, spec, [*prompt, *mine[:at]])[-1]
        return float(last[mine[at]] - last[its[at]])


def trial_of(model: str, *, smoke: bool) -> Trial:
    reference = runner_of(model, "reference", "float32")
    context, prompt, greedy = (80, 16, 3) if smoke else (CONTEXT, PROMPT, GREEDY)
    ids = list(cut_windows(default_text(), reference.opened.tokenizer, context, 1)[0])
    prompts = tuple(tuple(ids[i * prompt : (i + 1) * prompt]) for i in range(PROMPTS))
    exact = logits_of(reference, KVSpec.parse("f32"), ids)
    return Trial(reference, ids, exact, prompts, greedy)


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    trial = trial_of(args.model, smoke=args.smoke)

    @cache
    def runner(backend: str, dtype: str) -> Runner:
        return runner_of(args.model, backend, dtype)

    for kv, dtype in cases(smoke=args.smoke):
        if deadline.passed():
            rows.add({"what": "deadline", "note": f"accuracy ends before {kv}"})
            break

        def one(kv: str = kv, dtype: str = dtype) -> list[Row]:
            torch16, device = (runner(backend, dtype) for backend in ("reference", "triton"))
            return [trial.fidelity(kv, torch16, device)]

        rows.attempt({"what": "accuracy", "model": args.model, "kv": kv, "dtype": dtype}, one)
        gc.collect()


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    sys.exit(run(program, parser.parse_args()))
