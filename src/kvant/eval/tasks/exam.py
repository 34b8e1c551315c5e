"""A benchmark's questions, asked of several KV formats, and what their answers are worth.

Questions are built once and asked of each format; so all formats see the same texts.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from kvant.errors import ConfigError, RequestError
from kvant.eval.tasks import files, retrieval
from kvant.eval.tasks.catalogue import BENCHMARKS, Benchmark
from kvant.eval.tasks.files import Rows, Splits
from kvant.eval.tasks.sandbox import run_programs

__all__ = ["Exam", "Metrics", "Options", "open_exam"]

_SEED = 1234  # of few-shot examples, where a task draws them: lm-eval's default
_DEPTHS = 10
_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # after a function: Chen et al.

_EXAMPLES = "examples"
_FIRST = {"fewshot_config": {"sampler": "first_n"}}  # the same for each question

Metrics = dict[str, float]
"""Of one question. Shares are 0 or 1; "perplexity" is the log-likelihood in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to ask.

    data           folder of local data sets; None for the hub
    limits         most questions of a benchmark by its name; all of others
    num_fewshot    instead of each benchmark's own
    chat           makes a prompt of messages; None for plain text
    lengths        tokens of the prompts of needle and passkey, at most ``longest``
    longest        tokens of the longest sequence
    encode         a text to token ids
    """

    data: Path | None
    limits: Mapping[str, int] = field(default_factory=dict)
    num_fewshot: int | None = None
    chat: Callable[..., str] | None = None
    lengths: Sequence[int] = (1024, 2048, 4096)
    longest: int
    encode: Callable[[str], Sequence[int]]

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if limit < 1:
                raise ConfigError(f"limit={limit} of {name} must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot} must be at least 0")

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, with those of the chat template."""
        if self.chat is not None:
            text = self.chat([{"role": "user", "content": text}])
        return len(self.encode(text))

    def checked_lengths(self) -> Sequence[int]:
        """``lengths``.

        Raises:
            ConfigError: one is longer than a sequence can be, or named twice.
        """
        for length in self.lengths:
            if length > self.longest:
                raise ConfigError(
                    f"lengths={length} is more than the longest sequence of {self.longest} tokens; "
                    "leave it out, or raise session_len if the model can"
                )
            if self.lengths.count(length) > 1:
                raise ConfigError(f"lengths={length} is there twice; leave one out")
        return self.lengths


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions of one benchmark.

    of             questions of the whole data set
    digest         of all prompts: which questions, in which order, asked how
    prompt_tokens  mean over questions, with the first choice
    """

    name: str
    bench: Benchmark
    tasks: Sequence[ConfigurableTask]
    of: int
    digest: str
    prompt_tokens: float

    @property
    def instances(self) -> list[Instance]:
        """All requests: one a question, or one for each of its choices."""
        return [instance for task in self.tasks for instance in task.instances]

    @property
    def questions(self) -> int:
        """How many there are."""
        return len({(each.task_name, each.doc_id) for each in self.instances})

    def ask(self, lm: LM) -> list[Metrics]:
        """The metrics of each question, in order."""
        requests = [each for each in self.instances for _ in range(each.repeats or 1)]
        for each in requests:
            each.resps, each.filtered_resps = [], {}
        answers = getattr(lm, requests[0].request_type)(requests)
        for each, answer in zip(requests, answers, strict=True):
            each.resps.append(answer)
        return [metrics for task in self.tasks for metrics in _grade(task)]

    def lengths(self) -> list[int | None]:
        """The context length of each question, in tokens, where it is part of the task."""
        docs = {(each.task_name, each.doc_id): each.doc for each in self.instances}
        return [doc.get("length") for doc in docs.values()]


def _grade(task: ConfigurableTask) -> list[Metrics]:
    """The metrics of each question of a task whose instances have responses."""
    task.apply_filters()
    by_doc: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        by_doc[instance.doc_id].append(instance)
    names = list(task.instances[0].filtered_resps)
    graded = []
    for instances in by_doc.values():
        metrics: Metrics = {}
        for name in names:
            answers = [each.filtered_resps[name] for each in instances]
            found = task.process_results(instances[0].doc, answers)
            suffix = f",{name}" if len(names) > 1 else ""
            metrics |= {f"{metric}{suffix}": float(value) for metric, value in found.items()}
        graded.append(metrics)
    return graded


def open_exam(name: str, options: Options) -> Exam:
    """Read a benchmark's data and build its prompts.

    Raises:
        RequestError: the data is missing or damaged, or the hub cannot be reached.
        ConfigError: fewer solved examples than ``num_fewshot``.
    """
    bench = BENCHMARKS[name]
    if options.num_fewshot is not None:
        bench = replace(bench, shots=options.num_fewshot)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = _OWN[name](options) if name in _OWN else _load(name, bench, options)
    sizes = [len(task.eval_docs) for task in tasks]
    chosen = _spread(sizes, options.limits.get(name))
    asked = {task: samples for task, samples in zip(tasks, chosen, strict=True) if samples}
    for task, samples in asked.items():
        _check_shots(name, task, bench.shots)
        task.set_fewshot_seed(_SEED)
        with redirect_stderr(io.StringIO()):  # a bar for each of 57 subjects
            task.build_all_requests(
                samples=samples if len(samples) < len(task.eval_docs) else None,
                apply_chat_template=options.chat is not None,
                fewshot_as_multiturn=True,
                chat_template=options.chat,
            )
    prompts, tokens = hashlib.sha256(), []
    for task in asked:
        for instance in task.instances:
            prompts.update(json.dumps(instance.args, ensure_ascii=True).encode())
            if instance.idx == 0:
                texts = [text for text in instance.args if isinstance(text, str)]
                tokens.append(len(options.encode("".join(texts))))
    return Exam(
        name, bench, list(asked), sum(sizes), prompts.hexdigest(), sum(tokens) / len(tokens)
    )


def _check_shots(name: str, task: ConfigurableTask, shots: int) -> None:
    if not shots:
        return
    apart = task.config.fewshot_config.split is not None or task.has_training_docs()
    there = len(list(task.fewshot_docs())) if apart else 0
    if shots > there:
        raise ConfigError(
            f"num_fewshot={shots} of {name}: there are {there} solved examples besides the "
            "questions; ask with fewer"
        )


def _spread(sizes: Sequence[int], limit: int | None) -> list[list[int]]:
    """At most ``limit`` of all questions, spread over subsets of these sizes: indices of each.
    Those of a smaller limit are among those of a larger one, so that more can be asked later.

    Multiples of the golden ratio fill the unit interval evenly; a question's place in it decides.
    """
    total = sum(sizes)
    places = np.arange(total) * ((math.sqrt(5) - 1) / 2) % 1
    kept = np.zeros(total, np.bool_)
    kept[np.argsort(places)[: total if limit is None else limit]] = True
    parts = np.split(kept, np.cumsum(sizes)[:-1])
    return [np.flatnonzero(part).tolist() for part in parts]


def _load(name: str, bench: Benchmark, options: Options) -> list[ConfigurableTask]:
    """lm-eval's tasks with the rows of local files, or of the hub."""
    assert bench.folder is not None
    folder = Path(lm_eval.tasks.__file__).parent / bench.folder
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    changes = {**_FIRST, **bench.changes, "num_fewshot": bench.shots}
    names = _named(manager.all_subtasks, bench.task)
    if options.data is None:
        members = [{"task": task, **changes} for task in names]
    else:
        assert bench.read is not None
        found = {bench.task.format(x): rows for x, rows in bench.read(options.data).items()}
        _check_subjects(name, found, names)
        if bench.shots and all(len(splits) == 1 for splits in found.values()):
            found = {task: _set_apart(name, rows, bench.shots) for task, rows in found.items()}
            changes["fewshot_split"] = _EXAMPLES
        members = [
            {"task": task, **changes, **bench.local,
             "custom_dataset": partial(_dataset, splits)}
            for task, splits in found.items()
        ]  # fmt: skip
    try:
        loaded = manager.load([{"group": f"kvant-{name}", "task": members}])
    except Exception as error:  # of the hub and its libraries: what they raise is not settled
        if options.data is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            f"the data of {name} cannot be had from the hub ({reason}); give a folder with --data"
        ) from error
    return list(loaded["tasks"].values())


def _set_apart(name: str, splits: Splits, shots: int) -> Splits:
    """The last questions of a data set of one split as solved examples, which are not asked."""
    ((split, rows),) = splits.items()
    if shots >= len(rows):
        raise ConfigError(
            f"num_fewshot={shots} of {name} leaves no question of {len(rows)}; ask with fewer"
        )
    return {split: rows[:-shots], _EXAMPLES: rows[-shots:]}


def _check_subjects(name: str, found: Collection[str], expected: Collection[str]) -> None:
    """A part of a data set must not pass for all of it."""
    for what, tasks in (
        ("are missing", sorted(set(expected) - set(found))),
        ("are not of this data set", sorted(set(found) - set(expected))),
    ):
        if tasks:
            raise RequestError(
                f"the data of {name} has {len(found)} of {len(expected)} subjects: "
                f"{', '.join(tasks[:5])}{', ...' if len(tasks) > 5 else ''} {what}"
            )


def _named(tasks: Sequence[str], pattern: str) -> list[str]:
    """lm-eval's tasks of a benchmark: one, or all of a pattern that are subjects."""
    before, placeholder, _ = pattern.partition("{}")
    return [task for task in tasks if task == pattern or (placeholder and task.startswith(before))]


def _dataset(splits: Splits, **_: object) -> Mapping[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


def _own_task(
    name: str,
    rows: Rows,
    right: Callable[[dict[str, Any], Any], bool],
    *,
    target: str,
    until: Sequence[str],
    tokens: int,
    **config: Any,
) -> list[ConfigurableTask]:
    """A task of kvant's own, in lm-eval's terms: texts of at most so many tokens up to a stop text,
    and whether the answer to a row is right."""
    metric = BENCHMARKS[name].metric
    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": partial(_dataset, {"test": rows}),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": target,
            "num_fewshot": 0,
            "generation_kwargs": {"until": until, "max_gen_toks": tokens, "do_sample": False},
            "process_results": lambda doc, answers: {metric: float(right(doc, answers[0]))},
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
            **config,
        }
    )
    return [task]


def _need_data(name: str, options: Options) -> Path:
    if options.data is None:
        raise RequestError(f"the task {name} needs local files; give their folder with --data")
    return options.data


def _humaneval(options: Options) -> list[ConfigurableTask]:
    """As lm-eval's task of this name, whose own file downloads code; here the programs that the
    answers make run in a sandbox."""
    rows = files.read_humaneval(_need_data("humaneval", options))[""]["test"]

    def run(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[bool]]:
        programs = [
            f"{doc['prompt']}{answer[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
            for answer, doc in zip(answers, docs, strict=True)
        ]
        return [[verdict.passed] for verdict in run_programs(programs)]

    return _own_task(
        "humaneval",
        rows,
        lambda _, verdicts: bool(verdicts[0]),
        target="{{canonical_solution}}",
        until=_STOPS,
        tokens=512,
        filter_list=[{"name": "run", "filter": [{"function": "custom", "filter_fn": run}]}],
    )


def _needle(options: Options) -> list[ConfigurableTask]:
    essays = retrieval.read_essays(_need_data("needle", options))
    rows = retrieval.needle_rows(essays, options.count_tokens, options.checked_lengths(), _DEPTHS)
    return _own_task(
        "needle",
        rows,
        lambda row, answer: retrieval.needle_found(answer, row),
        target="{{target}}",
        until=["\n\n"],
        tokens=retrieval.NEEDLE_TOKENS,
    )


def _passkey(options: Options) -> list[ConfigurableTask]:
    rows = retrieval.passkey_rows(options.count_tokens, options.checked_lengths(), _DEPTHS)
    return _own_task(
        "passkey",
        rows,
        lambda row, answer: retrieval.passkey_found(answer, row["target"]),
        target="{{target}}",
        until=["\n"],
        tokens=retrieval.PASSKEY_TOKENS,
    )


_OWN = {"humaneval": _humaneval, "needle": _needle, "passkey": _passkey}
