"""What each KV format changes, teacher-forced and greedy, through the real engine and cache.

All formats and the baseline share the weights. Windows of text are taken one after another: the
baseline computes one and its logits stay in memory while each format computes the same window,
so nothing is stored on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvant.api import Prompt, encode_prompt
from kvant.config import EngineConfig
from kvant.engine.load import OpenModel
from kvant.errors import ConfigError, EngineDeadError, KvantError, RequestError
from kvant.eval.metrics import Comparison, block_error, first_difference, number
from kvant.eval.runner import CONTEXT, Prompts, Runner, Tick
from kvant.eval.text import Text, cut_windows
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.models.decoder import DecoderWeights

__all__ = ["FidelityRow", "Greedy", "Layer", "Plan", "evaluate", "make_plan"]

F64 = NDArray[np.float64]

_PROMPT = 256  # tokens of a window that are continued greedily, at most half of it
_WORST = 3
_LABEL = 40  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """How long greedy continuations agree with the baseline's.

    tokens           generated for each prompt, end tokens ignored
    first_diverging  for each prompt the index of the first other token, None if there is none
    q25, median, q75 quartiles of these, ``tokens`` where there is none
    same_percent     share of prompts that never diverge
    """

    tokens: int
    first_diverging: list[int | None]
    q25: float
    median: float
    q75: float
    same_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The keys ("k") or values ("v") of one layer and their SQNR in dB."""

    layer: int
    side: str
    sqnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityRow:
    """One format at one context length. None stands for what is not a finite number.

    kv_spec           the format's spelling
    ctx               tokens of a window
    windows           windows of text; positions = ctx * windows
    bits_per_element  all bytes of a sequence of 4096 tokens, metadata and finer groups included
    bytes_per_token   of the whole model's cache
    ppl               perplexity of the tokens that follow; dppl_percent: against the baseline
    kld               mean over positions of KL(baseline || format) of the next token, nats;
                      kld_stderr: its standard error; kld_p99, kld_p999: percentiles
    top1_percent      positions where both have the same most likely token
    greedy            :class:`Greedy`; None if not asked for, or if the format breaks generation
    k_sqnr_db         by layer, dB: signal to quantization noise ratio of the keys in full pages
                      of the first window; None where nothing is lost; v_sqnr_db: of the values
    worst_layers      the three :class:`Layer` of least SQNR, worst first
    """

    kv_spec: str
    ctx: int
    windows: int
    positions: int
    bits_per_element: float
    bytes_per_token: float
    ppl: float | None
    dppl_percent: float | None
    kld: float | None
    kld_stderr: float | None
    kld_p99: float | None
    kld_p999: float | None
    top1_percent: float | None
    greedy: Greedy | None
    k_sqnr_db: list[float | None]
    v_sqnr_db: list[float | None]
    worst_layers: list[Layer]

    @property
    def label(self) -> str:
        """The format for the eye: a preset's name, cut short if many layers differ."""
        label = KVSpec.parse(self.kv_spec).label
        return label if len(label) <= _LABEL else label[: _LABEL - 3] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compute. ``specs`` begin with the baseline and differ from each other. ``windows``
    and ``prompts`` (empty without greedy generation) are token ids by context length; each prompt
    is continued by ``greedy`` tokens."""

    specs: tuple[KVSpec, ...]
    windows: Mapping[int, list[list[int]]]
    prompts: Mapping[int, Prompts]
    greedy: int

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in all."""
        scored = sum(len(ids) for windows in self.windows.values() for ids in windows)
        prompts = [ids for prompts in set(self.prompts.values()) for ids in prompts]
        return len(self.specs) * (scored + sum(len(ids) + self.greedy for ids in prompts))


def make_plan(
    opened: OpenModel,
    text: Text,
    *,
    baseline: KVSpec,
    specs: Sequence[KVSpec],
    contexts: Sequence[int],
    windows: int,
    greedy: int,
    prompts: Sequence[Prompt] | None = None,
) -> Plan:
    """Check everything that can be checked before weights are read.

    Args:
        opened: the model.
        text: what windows are cut from.
        baseline: the format that the others are compared with.
        specs: the others.
        contexts: lengths of windows, in tokens.
        windows: most windows of each length; fewer if the text is short.
        greedy: tokens to generate for each prompt, 0 for none.
        prompts: to continue; without them, the beginnings of the windows.

    Raises:
        ConfigError: a number out of range, or a format that the model's vectors do not fit.
        RequestError: the text is too short, or a prompt is malformed or too long.
    """
    limit = opened.config.max_positions
    for ctx in contexts:
        if not PAGE_TOKENS <= ctx <= limit:
            raise ConfigError(
                f"ctx={ctx} must be from {PAGE_TOKENS} to {limit}, the model's context; change it"
            )
    if windows < 1 or greedy < 0:
        raise ConfigError(f"windows={windows} must be at least 1, and greedy={greedy} at least 0")
    for spec in (baseline, *specs):
        spec.check(opened.config.kv_shape)
    contexts = tuple(dict.fromkeys(contexts))
    cut = {ctx: cut_windows(text, opened.tokenizer, ctx, windows) for ctx in contexts}
    if prompts is None:
        begun = {
            ctx: tuple(tuple(ids[: min(_PROMPT, ctx // 2)]) for ids in cut[ctx]) for ctx in contexts
        }
    else:
        chat = opened.tokenizer.chat
        encoded = tuple(tuple(encode_prompt(opened.tokenizer, each, chat)) for each in prompts)
        begun = dict.fromkeys(contexts, encoded)
    longest = max(len(ids) for each in begun.values() for ids in each)
    if greedy and longest + greedy > limit:
        raise RequestError(
            f"the longest prompt has {longest} tokens, and greedy={greedy} more exceed the model's "
            f"context of {limit}; shorten it, or lower greedy"
        )
    return Plan(
        specs=tuple(dict.fromkeys((baseline, *specs))),
        windows=cut,
        prompts=begun if greedy else {},
        greedy=greedy,
    )


def evaluate(
    opened: OpenModel,
    weights: DecoderWeights,
    config: EngineConfig,
    plan: Plan,
    tick: Tick = lambda _: None,
) -> list[FidelityRow]:
    """Compute a plan. For each context length a row for the baseline, then one for each format.

    Args:
        opened: the model.
        weights: its weights, in the dtype of all computations.
        config: the engines' options; the KV format and the cache's size are the plan's.
        plan: what to compute.
        tick: told about progress.

    Raises:
        ConfigError: the logits of a window, or a cache, do not fit into the memory.
    """
    run = Runner(opened, weights, config, tick)
    greedy = {
        prompts: _greedy(run, plan.specs, prompts, plan.greedy)
        for prompts in dict.fromkeys(plan.prompts.values())
    }
    rows: list[FidelityRow] = []
    for ctx, windows in plan.windows.items():
        continued = greedy.get(plan.prompts.get(ctx, ()), {})
        scores = _score(run, plan.specs, windows)
        rows += [
            _row(score, opened, baseline_ppl=scores[0].ppl, greedy=continued.get(score.spec))
            for score in scores
        ]
    return rows


@dataclass(slots=True)
class _Score:
    """The comparisons of one format, window by window; SQNR ``[2, layers]`` of the first."""

    spec: KVSpec
    windows: list[Comparison] = field(default_factory=list)
    sqnr_db: F64 = field(default_factory=lambda: np.empty((2, 0)))

    @property
    def ppl(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(np.concatenate([each.nll for each in self.windows]).mean()))


def _row(
    score: _Score, opened: OpenModel, *, baseline_ppl: float, greedy: Greedy | None
) -> FidelityRow:
    """The figures of one format."""
    windows = [each.kld for each in score.windows]
    kld = np.concatenate(windows)
    p99, p999 = np.quantile(kld, (0.99, 0.999))
    same_top = np.concatenate([each.same_top for each in score.windows])
    k, v = ([number(db, 4) for db in side] for side in score.sqnr_db)
    return FidelityRow(
        kv_spec=str(score.spec),
        ctx=len(windows[0]),
        windows=len(windows),
        positions=len(kld),
        bits_per_element=score.spec.bits_per_element(opened.config.kv_shape, CONTEXT),
        bytes_per_token=score.spec.bytes_per_token(opened.config.kv_shape),
        ppl=number(score.ppl),
        dppl_percent=number(100 * (score.ppl / baseline_ppl - 1)),
        kld=number(kld.mean()),
        kld_stderr=number(block_error(windows), 3),
        kld_p99=number(p99),
        kld_p999=number(p999),
        top1_percent=number(100 * same_top.mean()),
        greedy=greedy,
        k_sqnr_db=k,
        v_sqnr_db=v,
        worst_layers=_worst({"k": k, "v": v}),
    )


def _worst(sides: Mapping[str, Sequence[float | None]]) -> list[Layer]:
    layers = [
        Layer(layer=layer, side=side, sqnr_db=db)
        for side, by_layer in sides.items()
        for layer, db in enumerate(by_layer)
        if db is not None
    ]
    return sorted(layers, key=lambda each: each.sqnr_db)[:_WORST]


def _score(run: Runner, specs: Sequence[KVSpec], windows: list[list[int]]) -> list[_Score]:
    """Compare all formats with the first on each window."""
    reference = run.room(len(windows[0]))
    scores = [_Score(spec) for spec in specs]
    for ids in windows:
        for score in scores:
            compute = run.reference if score is scores[0] else run.compare
            comparison, sqnr_db = compute(score.spec, ids, reference)
            if not score.windows:
                score.sqnr_db = sqnr_db
            score.windows.append(comparison)
    return scores


def _greedy(
    run: Runner, specs: Sequence[KVSpec], prompts: Prompts, count: int
) -> dict[KVSpec, Greedy | None]:
    """Where the continuations under each format leave those under the first."""
    expected = run.generate(specs[0], prompts, count)
    out: dict[KVSpec, Greedy | None] = {specs[0]: _divergence(expected, expected, count)}
    for spec in specs[1:]:
        try:
            out[spec] = _divergence(expected, run.generate(spec, prompts, count), count)
        except (ConfigError, RequestError, EngineDeadError):
            raise
        except KvantError:  # its logits are not finite; the other formats have figures
            out[spec] = None
    return out


def _divergence(expected: list[list[int]], found: list[list[int]], count: int) -> Greedy:
    first = [first_difference(a, b) for a, b in zip(expected, found, strict=True)]
    agreed = [count if index is None else index for index in first]
    q25, median, q75 = (float(q) for q in np.quantile(agreed, (0.25, 0.5, 0.75)))
    return Greedy(
        tokens=count,
        first_diverging=first,
        q25=q25,
        median=median,
        q75=q75,
        same_percent=round(100 * first.count(None) / len(first), 2),
    )
