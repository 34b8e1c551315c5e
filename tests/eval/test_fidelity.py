from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from kvant import ConfigError, EngineConfig, GenerationConfig, RequestError, pipeline
from kvant.engine.load import LoadedModel, OpenModel, open_model, start_model
from kvant.eval import runner
from kvant.eval.fidelity import FidelityRow, Plan, evaluate, make_plan
from kvant.eval.text import default_text
from kvant.formats import KVSpec
from kvant.kernels import Batch, NullBackend
from kvant.models.decoder import DecoderWeights

CONFIG = EngineConfig(dtype="float32", kv="f32")
SPECS = ("int8", "int4", "k=int8h,v=int4h+r64")
WINDOWS = {64: 3, 200: 3}


def planned(opened: OpenModel, **changes: object) -> Plan:
    options: dict[str, object] = {
        "baseline": KVSpec.parse("f32"),
        "specs": [KVSpec.parse(spec) for spec in SPECS],
        "contexts": list(WINDOWS),
        "windows": 3,
        "greedy": 12,
    }
    return make_plan(opened, default_text(), **(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def opened(tiny: str) -> OpenModel:
    return open_model(tiny, CONFIG)


@pytest.fixture(scope="module")
def weights(opened: OpenModel) -> DecoderWeights:
    return opened.weights(CONFIG)


@pytest.fixture(scope="module")
def plan(opened: OpenModel) -> Plan:
    return planned(opened)


Found = tuple[list[FidelityRow], list[int]]


@pytest.fixture(scope="module")
def found(opened: OpenModel, weights: DecoderWeights, plan: Plan) -> Found:
    """Rows, and what the progress bar was told."""
    ticks: list[int] = []
    return evaluate(opened, weights, CONFIG, plan, ticks.append), ticks


@pytest.fixture(scope="module")
def row(found: Found) -> Callable[[int, str], FidelityRow]:
    return lambda ctx, spec: next(r for r in found[0] if (r.ctx, r.kv_spec) == (ctx, spec))


def test_a_row_for_each_length_and_format(found: Found) -> None:
    specs = ["f32", *SPECS]
    assert [(r.ctx, r.kv_spec) for r in found[0]] == [(ctx, s) for ctx in WINDOWS for s in specs]
    for r in found[0]:
        assert (r.windows, r.positions) == (3, 3 * r.ctx)
        assert r.greedy is not None and len(r.greedy.first_diverging) == 3


def test_the_baseline_loses_nothing(found: Found) -> None:
    for r in found[0]:
        exact = r.kv_spec == "f32"
        assert ((r.kld, r.kld_p99, r.kld_p999, r.dppl_percent) == (0, 0, 0, 0)) == exact
        if exact:
            assert r.top1_percent == 100 and r.kld_stderr == 0 and r.worst_layers == []
            assert r.greedy is not None and r.greedy.first_diverging == [None] * 3
            assert r.k_sqnr_db == r.v_sqnr_db == [None, None]


@pytest.mark.parametrize("kv", ("f32", "int4"))
def test_perplexity_is_that_of_the_api(
    tiny: str, plan: Plan, row: Callable[[int, str], FidelityRow], kv: str
) -> None:
    with pipeline(tiny, EngineConfig(dtype="float32", kv=kv, kv_tokens=512)) as pipe:
        losses = pipe.get_ppl(plan.windows[200])
    assert row(200, kv).ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def logits_of(tiny: str, kv: str, plan: Plan) -> list[np.ndarray]:
    """By position, of all windows."""
    rows: list[np.ndarray] = []
    with pipeline(tiny, EngineConfig(dtype="float32", kv=kv, kv_tokens=512)) as pipe:
        for ids in plan.windows[200]:
            pipe.run([pipe.score_request(ids, lambda _, part: rows.extend(part))])
    return [x.astype(np.float64) for x in rows]


def test_divergence_is_that_of_the_logits(
    tiny: str, plan: Plan, row: Callable[[int, str], FidelityRow]
) -> None:
    """KL divergence and top-1 from logits that the API returns, computed the long way."""
    logits = {"f32": logits_of(tiny, "f32", plan), "int4": logits_of(tiny, "int4", plan)}
    kld, same = [], []
    for base, other in zip(logits["f32"], logits["int4"], strict=True):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (base, other))
        kld.append((p * np.log(p / q)).sum())
        same.append(base.argmax() == other.argmax())
    found = row(200, "int4")
    assert found.kld == pytest.approx(np.mean(kld), rel=1e-5)
    assert found.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-5)
    assert found.kld_p999 == pytest.approx(np.quantile(kld, 0.999), rel=1e-5)
    assert found.top1_percent == pytest.approx(100 * np.mean(same), rel=1e-5)


def test_greedy_texts_are_those_of_the_api(
    tiny: str, plan: Plan, row: Callable[[int, str], FidelityRow]
) -> None:
    texts: dict[str, list[list[int]]] = {}
    for kv in ("f32", "int4"):
        config = EngineConfig(dtype="float32", kv=kv, kv_tokens=1024)
        gen = GenerationConfig(max_new_tokens=12, ignore_eos=True)
        with pipeline(tiny, config) as pipe:
            requests = [
                r for ids in plan.windows[200] for r in pipe.generate_requests(ids[:100], gen)
            ]
            texts[kv] = [response.token_ids for response in pipe.run(requests)]
    first = [
        next((i for i in range(12) if a[i] != b[i]), None)
        for a, b in zip(texts["f32"], texts["int4"], strict=True)
    ]
    greedy = row(200, "int4").greedy
    assert greedy is not None and greedy.first_diverging == first and set(first) != {None}
    ends = sorted(12 if index is None else index for index in first)
    assert greedy.median == ends[1] and greedy.same_percent == round(100 * first.count(None) / 3, 2)
    assert greedy.q25 == (ends[0] + ends[1]) / 2 and greedy.q75 == (ends[1] + ends[2]) / 2


def test_sizes_are_those_of_the_spec(
    opened: OpenModel, row: Callable[[int, str], FidelityRow]
) -> None:
    for text in SPECS:
        spec = KVSpec.parse(text)
        shape = opened.config.kv_shape
        assert row(64, text).bits_per_element == spec.bits_per_element(shape, 4096)
        assert row(64, text).bytes_per_token == spec.bytes_per_token(shape)


def test_more_bits_keep_more(row: Callable[[int, str], FidelityRow]) -> None:
    for ctx in WINDOWS:
        fine, coarse = row(ctx, "int8"), row(ctx, "int4")
        assert (fine.kld or 0) < (coarse.kld or 0)
        assert all(
            (a or 0) > (b or 0) + 12 for a, b in zip(fine.k_sqnr_db, coarse.k_sqnr_db, strict=True)
        )
        sides = {"k": coarse.k_sqnr_db, "v": coarse.v_sqnr_db}
        worst = [each.sqnr_db for each in coarse.worst_layers]
        every = [db or 0 for side in sides.values() for db in side]
        assert worst == sorted(every)[:3]
        assert all(sides[each.side][each.layer] == each.sqnr_db for each in coarse.worst_layers)


def test_progress_ends_at_all(found: Found, plan: Plan) -> None:
    assert sum(found[1]) == plan.num_tokens


def test_prompts_of_ones_own(opened: OpenModel, weights: DecoderWeights) -> None:
    """Through the chat template, once for all context lengths."""
    plan = planned(
        opened,
        prompts=["hello", [{"role": "user", "content": "hello"}]],
        contexts=[64, 128],
        windows=1,
        specs=[KVSpec.parse("int4")],
    )
    (prompts,) = set(plan.prompts.values())
    assert prompts[0] == prompts[1]
    assert bytes(prompts[0]) != b"" and len(prompts[0]) == len("[user]hello[assistant]")
    ticks: list[int] = []
    rows = evaluate(opened, weights, CONFIG, plan, ticks.append)
    assert sum(ticks) == plan.num_tokens == 2 * (64 + 128 + 2 * (22 + 12))
    assert rows[1].greedy == rows[3].greedy and rows[1].greedy is not None


class Broken(NullBackend):
    """Attends to nothing that is a number."""

    def attend(self, layer: int, q: Any, batch: Batch, **_: Any) -> Any:
        return q * float("nan")


def test_a_format_that_breaks_has_no_figures_and_spoils_no_other(
    opened: OpenModel, weights: DecoderWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(opened: OpenModel, weights: DecoderWeights, config: EngineConfig) -> LoadedModel:
        model = start_model(opened, weights, config)
        if str(config.kv) == "int8":
            model.engine.backend = Broken(model.engine.memory)
        return model

    monkeypatch.setattr(runner, "start_model", start)
    plan = planned(opened, specs=[KVSpec.parse("int8"), KVSpec.parse("bf16")], contexts=[64])
    base, broken, fine = evaluate(opened, weights, CONFIG, plan)
    assert broken.ppl is None and broken.kld is None and broken.kld_p99 is None
    assert broken.greedy is None and broken.top1_percent == 0
    assert base.greedy is not None and fine.greedy is not None and fine.kld is not None
    json.dumps([asdict(row) for row in (base, broken, fine)], allow_nan=False)


def test_end_tokens_do_not_end_a_greedy_text(
    opened: OpenModel,
    weights: DecoderWeights,
    row: Callable[[int, str], FidelityRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opened.tokenizer, "eos_ids", tuple(range(opened.config.vocab_size)))
    plan = planned(opened, specs=[KVSpec.parse("int4")], contexts=[200])
    assert evaluate(opened, weights, CONFIG, plan)[1].greedy == row(200, "int4").greedy


def test_signal_to_noise_is_of_the_first_window(
    opened: OpenModel, weights: DecoderWeights, row: Callable[[int, str], FidelityRow]
) -> None:
    plan = planned(opened, specs=[KVSpec.parse("int4")], contexts=[200], windows=1, greedy=0)
    found = evaluate(opened, weights, CONFIG, plan)[1]
    assert (found.k_sqnr_db, found.v_sqnr_db) == (
        row(200, "int4").k_sqnr_db, row(200, "int4").v_sqnr_db
    )  # fmt: skip


def test_no_greedy_texts(opened: OpenModel, weights: DecoderWeights) -> None:
    plan = planned(opened, greedy=0, contexts=[64], windows=1)
    assert plan.num_tokens == 4 * 64
    assert {row.greedy for row in evaluate(opened, weights, CONFIG, plan)} == {None}


def test_what_is_asked_for_twice_is_computed_once(opened: OpenModel) -> None:
    specs = [KVSpec.parse(text) for text in ("int8", "f32", "int8")]
    plan = planned(opened, specs=specs, contexts=[64, 64])
    assert [str(spec) for spec in plan.specs] == ["f32", "int8"] and list(plan.windows) == [64]


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"contexts": [63]}, "ctx=63 must be from 64 to 16384"),
        ({"contexts": [64, 16385]}, "ctx=16385 must be from 64 to 16384"),
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"greedy": -1}, "greedy=-1 at least 0"),
        ({"greedy": 16384}, "the longest prompt has 100 tokens, and greedy=16384"),
        ({"prompts": ["x", ""]}, "the prompt is empty"),
        ({"prompts": ["x" * 16370]}, "the longest prompt has 16387 tokens"),
    ),
)
def test_what_cannot_be_planned(opened: OpenModel, changes: dict[str, object], said: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=said):
        planned(opened, **changes)


def test_logits_that_do_not_fit_the_memory(
    opened: OpenModel, weights: DecoderWeights, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "free_memory", lambda: 64 * 258 * 4 - 1)
    with pytest.raises(ConfigError, match=r"ctx=64 tokens take 0\.00 GiB .* lower ctx"):
        evaluate(opened, weights, CONFIG, plan)
