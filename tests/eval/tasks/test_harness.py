"""kvant inside lm-eval: the same answers as its own model of the same weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from kvant import EngineConfig, pipeline
from kvant.api import Pipeline
from kvant.errors import ConfigError, RequestError
from kvant.eval.tasks.exam import Exam, Options, open_exam
from kvant.eval.tasks.harness import KvantLM, generation
from kvant.eval.tasks.journal import Journal
from tests.byte_model import write_config, write_tokenizer, write_weights

TASKS = ("mmlu", "ceval", "arc-easy", "lambada", "gsm8k")


def _instance(kind: str, *args: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def _open(tiny: str, **options: Any) -> Pipeline:
    return pipeline(tiny, EngineConfig(**{"dtype": "float32", "kv": "f32", **options}))


def _exams(data: Path) -> list[Exam]:
    options = Options(data=data, limits={"gsm8k": 4}, longest=4096, encode=list)
    return [open_exam(name, options) for name in TASKS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's own model of the weights of ``tiny``."""
    folder = tmp_path_factory.mktemp("reference")
    write_config(folder, model_type="llama")
    write_weights(folder)
    write_tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def test_answers_are_those_of_lm_eval(tiny: str, data: Path, reference: Any) -> None:
    """Log-likelihoods to float32's rounding, texts and scores exactly."""
    for exam in _exams(data):
        with _open(tiny) as pipe:
            found = exam.ask(KvantLM(pipe))
        answers = [each.resps[0] for each in exam.instances]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = exam.ask(reference)
        for ours, theirs in zip(answers, exam.instances, strict=True):
            if isinstance(ours, str):
                assert ours == theirs.resps[0]
            else:
                assert ours[0] == pytest.approx(theirs.resps[0][0], rel=1e-5, abs=1e-4)
                assert ours[1] == theirs.resps[0][1]
        assert [f.keys() for f in found] == [e.keys() for e in expected]
        for metric in found[0].keys() - {"perplexity"}:
            assert [f[metric] for f in found] == [e[metric] for e in expected]


def test_whole_texts_are_scored_in_windows(tiny: str, reference: Any) -> None:
    texts = ["a short one", "word " * 300]
    requests = [_instance("loglikelihood_rolling", text) for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference._max_length = 200
        expected = reference.loglikelihood_rolling(requests)
        reference._max_length = None
    with _open(tiny, session_len=200) as pipe:
        assert KvantLM(pipe).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


def test_texts_that_begin_with_bos(tiny: str, reference: Any) -> None:
    requests = [_instance("loglikelihood", "a context", " and more")]
    whole = [_instance("loglikelihood_rolling", "a text")]
    with _open(tiny) as pipe:
        lm = KvantLM(pipe, add_bos_token=True)
        assert lm.tok_encode("ab") == [lm.prefix_token_id, *lm.tok_encode("ab", False)]
        assert lm.tok_encode("<s>ab") == lm.tok_encode("ab")
        found, rolled = lm.loglikelihood(requests), lm.loglikelihood_rolling(whole)
    ids = [lm.prefix_token_id, *lm.tok_encode("a text", False)]
    pairs = [(("", ""), [lm.prefix_token_id], ids)]
    expected = reference._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert rolled[0] == pytest.approx(expected[0][0], rel=1e-5)
    ids = lm.tok_encode("a context"), lm.tok_encode(" and more", False)
    expected = reference._loglikelihood_tokens([(("", ""), *ids)], disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-5)


def test_an_empty_context_is_the_models_own_prefix(tiny: str, reference: Any) -> None:
    requests = [_instance("loglikelihood", "", "something"), _instance("loglikelihood", "a", " b")]
    with _open(tiny) as pipe:
        found = KvantLM(pipe).loglikelihood(requests)
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-5)


def test_lm_eval_finds_it_by_name(tiny: str, tmp_path: Path) -> None:
    rows = [{"q": f"question {n}", "right": n % 2} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "right",
        "doc_to_choice": ["yes", "no"],
    }
    found = lm_eval.simple_evaluate(
        model="kvant", model_args=f"pretrained={tiny},kv=int4h,dtype=float32", tasks=[task],
        batch_size=8, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert found is not None and 0 <= found["results"]["made_up"]["acc,none"] <= 1


def test_an_answer_that_is_there_is_not_computed_again(tiny: str) -> None:
    requests = [_instance("loglikelihood", "context", f" {n % 3}") for n in range(6)]
    journal = Journal(None, {})
    with _open(tiny) as pipe:
        first = KvantLM(pipe, journal=journal).loglikelihood(requests)
        assert journal.found == 3 and len(first) == 6
    lm = KvantLM(pipe, journal=journal)  # whose engine is closed: it could compute nothing
    assert lm.loglikelihood(requests) == first


def test_formats_do_not_take_each_others_answers(tiny: str) -> None:
    requests = [_instance("loglikelihood", "context " * 30, " end")]
    journal, found = Journal(None, {}), []
    for kv in ("f32", "int4"):
        with _open(tiny, kv=kv) as pipe:
            found.append(KvantLM(pipe, journal=journal).loglikelihood(requests))
    assert journal.found == 2 and found[0] != found[1]


def test_sampled_texts_that_are_asked_for_again_differ(tiny: str) -> None:
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    with _open(tiny) as pipe:
        lm = KvantLM(pipe)
        texts = lm.generate_until([_instance("generate_until", "a", options)] * 5)
        greedy = lm.generate_until([_instance("generate_until", "a", {"max_gen_toks": 12})] * 2)
    assert len(set(texts)) > 1 and greedy[0] == greedy[1]


def test_prompts_of_messages(tiny: str) -> None:
    with _open(tiny) as pipe:
        lm = KvantLM(pipe)
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
        assert lm.apply_chat_template(turns[:1]) == "[user]hi[assistant]"
        assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("so")
        assert lm.chat_template(True) == pipe.chat_template.source and lm.tokenizer_name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": ["\n", ""], "do_sample": False, "temperature": 0.7}, (256, False, ["\n"])),
        ({"until": "Q:", "max_gen_toks": 5}, (5, False, ["Q:"])),
        ({"temperature": 0.5, "max_new_tokens": 7}, (7, True, [])),
        ({"num_beams": 1, "temperature": None, "max_tokens": "9"}, (9, False, [])),
    ],
)
def test_generation_options(options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    gen = generation(options)
    assert (gen.max_new_tokens, gen.do_sample, gen.stop_words) == expected


def test_sampling_is_at_temperature_1_unless_said() -> None:
    assert generation({"do_sample": True}).temperature == 1.0


def test_what_kvant_does_not_know_is_refused(tiny: str) -> None:
    with pytest.raises(RequestError, match='"top_pp"; did you mean "top_p"'):
        generation({"top_pp": 1})
    for options in ({"temperature": "hot"}, {"max_gen_toks": []}):
        with pytest.raises(RequestError, match="must be a number"):
            generation(options)
    with pytest.raises(ConfigError, match='"kv_token"; did you mean "kv_tokens"'):
        KvantLM(tiny, kv_token=64)
    with pytest.raises(ConfigError, match="batch_size='many'"):
        KvantLM(tiny, batch_size="many")
