"""Questions, which of them are asked, and what answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from kvant.errors import ConfigError, KvantError, RequestError
from kvant.eval.tasks.catalogue import BENCHMARKS, find_benchmarks
from kvant.eval.tasks.exam import Exam, Options, _spread, open_exam
from tests.eval.tasks.conftest import subjects, write_data

DATA = Path(__file__).parents[4] / "shared/data"


class Student(LM):
    """Knows the right answers to every other question, or to all."""

    def __init__(self, exam: Exam, *, all_right: bool) -> None:
        super().__init__()
        docs = dict.fromkeys((each.task_name, each.doc_id) for each in exam.instances)
        self._known = set(list(docs)[:: 1 if all_right else 2])
        self._task = {task.task_name: task for task in exam.tasks}

    def _right(self, each: Instance) -> Any:
        assert each.task_name is not None
        task = self._task[each.task_name]
        target = task.doc_to_text(each.doc) if task.multiple_input else task.doc_to_target(each.doc)
        if each.task_name == "needle":
            return " and ".join(target)
        if isinstance(target, str) and task.OUTPUT_TYPE == "multiple_choice":
            return int(target)
        return target

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        found = []
        for each in requests:
            target = self._right(each)
            right = each.idx == target if isinstance(target, int) else True
            known = (each.task_name, each.doc_id) in self._known
            found.append((-1.0 if right == known else -50.0, right == known))
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        texts = []
        for each in requests:
            target = self._right(each)
            text = target[0] if isinstance(target, list) else str(target)
            known = (each.task_name, each.doc_id) in self._known
            texts.append(text if known else "    pass #### 0")
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise NotImplementedError


def _open(name: str, data: Path, **options: Any) -> Exam:
    how = Options(data=data, longest=4096, encode=lambda text: range(len(text) // 4), **options)
    return open_exam(name, how)


@pytest.mark.parametrize("name", ["mmlu", "ceval", "arc-easy", "lambada", "gsm8k", "passkey"])
@pytest.mark.parametrize("all_right", [True, False])
def test_right_answers_are_right_and_others_are_not(name: str, all_right: bool, data: Path) -> None:
    exam = _open(name, data, lengths=(300,))
    answers = exam.ask(Student(exam, all_right=all_right))
    right = [each[exam.bench.metric] for each in answers]
    assert len(right) == exam.questions == exam.of
    assert right == [1.0 if all_right or n % 2 == 0 else 0.0 for n in range(len(right))]


@pytest.mark.usefixtures("permitted")
def test_programs_are_judged_by_running_them(data: Path) -> None:
    exam = _open("humaneval", data)
    assert exam.ask(Student(exam, all_right=True)) == [{"pass@1": 1.0}] * 2
    assert exam.ask(Student(exam, all_right=False)) == [{"pass@1": 1.0}, {"pass@1": 0.0}]


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"humaneval"}))
def test_real_data_sets(name: str) -> None:
    """Every benchmark loads, and right answers are counted as right."""
    if not DATA.is_dir():
        pytest.skip("needs the data sets of ../shared/data")
    exam = _open(name, DATA, limits={name: 12}, lengths=(2048,))
    right = exam.ask(Student(exam, all_right=True))
    assert [each[exam.bench.metric] for each in right] == [1.0] * len(right)
    assert len(right) == min(12, exam.of)
    assert exam.bench.metric in right[0] and exam.digest == _open(
        name, DATA, limits={name: 12}, lengths=(2048,)
    ).digest  # fmt: skip


def test_formats_are_asked_the_same_questions(data: Path) -> None:
    """Answers to one do not remain for the next."""
    exam = _open("mmlu", data)
    first = exam.ask(Student(exam, all_right=False))
    assert exam.ask(Student(exam, all_right=True)) != first
    assert exam.ask(Student(exam, all_right=False)) == first


def test_shots_are_solved_examples_before_the_question(data: Path) -> None:
    prompts = [_open("mmlu", data, num_fewshot=n).instances[0].args[0] for n in (0, 2, 5)]
    assert [text.count("\nAnswer:") for text in prompts] == [1, 3, 6]
    heads = {each.args[0][:300] for each in _open("gsm8k", data).instances}
    assert len(heads) == 1  # so that it is computed once


def test_examples_of_a_single_split_are_not_asked(data: Path) -> None:
    plain, exam = _open("arc-easy", data), _open("arc-easy", data, num_fewshot=3)
    questions = {each.doc["question"] for each in exam.instances}
    assert (plain.of, exam.of) == (20, 17)
    assert {each.doc["id"] for each in exam.instances} == {str(n) for n in range(17)}
    (head,) = {each.args[0].rpartition("\n\n")[0] for each in exam.instances}
    assert head.count("Question:") == 3 and exam.prompt_tokens > 2 * plain.prompt_tokens
    assert not any(text in head for text in questions - {d["question"] for d in _last(plain, 3)})


def _last(exam: Exam, count: int) -> list[dict[str, Any]]:
    return list({each.doc["id"]: each.doc for each in exam.instances}.values())[-count:]


def test_prompts_of_a_chat(data: Path) -> None:
    def chat(messages: Sequence[dict[str, str]], **_: object) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    (text, *_) = (each.args[0] for each in _open("gsm8k", data, chat=chat).instances)
    assert text.count("<user>") == 6 and text.endswith("<assistant>")


def test_other_questions_have_another_digest(data: Path) -> None:
    found = {
        _open("mmlu", data, **options).digest
        for options in ({}, {"num_fewshot": 1}, {"limits": {"mmlu": 5}}, {"limits": {"mmlu": 6}})
    }
    assert len(found) == 4


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 700))
def test_a_part_of_all_questions(sizes: list[int], limit: int) -> None:
    chosen = _spread(sizes, limit)
    assert sum(map(len, chosen)) == min(limit, sum(sizes))
    for size, indices in zip(sizes, chosen, strict=True):
        assert indices == sorted(set(indices)) and set(indices) <= set(range(size))
    fewer = _spread(sizes, max(limit // 2, 1))
    assert all(set(a) <= set(b) for a, b in zip(fewer, chosen, strict=True))


def test_a_part_is_spread_evenly() -> None:
    chosen = _spread([200] * 50, 1000)
    assert {len(each) for each in chosen} <= set(range(18, 23))


def test_subjects_on_the_hub() -> None:
    assert (len(subjects("mmlu")), len(subjects("ceval"))) == (57, 52)


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_a_part_of_the_subjects_does_not_pass_for_all(name: str, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    gone = list((data / name).rglob("*law*.csv"))
    for path in gone:
        path.rename(path.with_name(path.name.replace("law", "cooking")))
    with pytest.raises(RequestError, match=f"{name} has .* subjects: .*law are missing"):
        _open(name, data)
    for path in gone:
        path.write_bytes(path.with_name(path.name.replace("law", "cooking")).read_bytes())
    with pytest.raises(RequestError, match=r"cooking.* are not of this data set"):
        _open(name, data)


def test_examples_do_not_depend_on_what_else_is_asked(data: Path) -> None:
    """So that answers to a few questions are found again among those to more."""
    few, more = (_open("gsm8k", data, limits={"gsm8k": n}) for n in (5, 15))
    assert {each.args[0] for each in few.instances} < {each.args[0] for each in more.instances}


def test_lengths_that_no_sequence_has(data: Path) -> None:
    with pytest.raises(ConfigError, match="lengths=5000 is more than the longest sequence of 4096"):
        _open("passkey", data, lengths=(1000, 5000))
    with pytest.raises(ConfigError, match="lengths=500 is there twice"):
        _open("passkey", data, lengths=(500, 500))


def test_the_chat_template_counts(data: Path) -> None:
    def chat(messages: Sequence[dict[str, str]], **_: object) -> str:
        return "x" * 400 + messages[0]["content"]

    plain = [each.args[0] for each in _open("passkey", data, lengths=(600,)).instances]
    asked = [each.args[0] for each in _open("passkey", data, lengths=(600,), chat=chat).instances]
    assert all(0 <= len(a) - len(b) < 100 for a, b in zip(plain, asked, strict=True))


def test_names() -> None:
    assert find_benchmarks("mmlu, gsm8k") == ["mmlu", "gsm8k"]
    with pytest.raises(KvantError, match='no task "gsm"; did you mean "gsm8k"'):
        find_benchmarks("gsm")
