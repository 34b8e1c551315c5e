"""The benchmarks of ``kvant eval tasks``: which task files of lm-eval they are, and what differs.

Prompts, filters and metrics are lm-eval's. Few-shot examples are the first ones of their split for
every question (lm-eval draws them anew for each question of gsm8k and triviaqa), so that questions
share a header whose keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvant.errors import ConfigError, did_you_mean
from kvant.eval.tasks import files
from kvant.eval.tasks.files import Subsets

__all__ = ["BENCHMARKS", "Benchmark", "find_benchmarks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A data set and how it is asked.

    metric    the metric of tables; of those with several filters "metric,filter"
    chance    what guessing gives, 0 to 1; None: nothing
    shots     solved examples before each question
    folder    of lm-eval's task files; None for a task of kvant's own
    task      lm-eval's name of the task of a subset
    read      the rows of a data folder: subset -> split -> rows, as on the hub; None: made here
    changes   of the task file, wherever the rows come from
    local     of the task file, for rows of local files
    unsafe    whether it runs code that the model writes
    """

    metric: str
    chance: float | None
    shots: int = 0
    folder: str | None = None
    task: str = "{}"
    read: Callable[[Path], Subsets] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    unsafe: bool = False


def _group_race(dataset: Any) -> Any:
    """The hub's RACE, a row a question, as lm-eval's task reads it: a row an article."""
    return type(dataset).from_list(files.group_race(list(dataset)))


BENCHMARKS: Mapping[str, Benchmark] = {
    "ceval": Benchmark(
        metric="acc", chance=0.25, shots=5, folder="ceval", task="ceval-valid_{}",
        read=files.read_ceval,
    ),
    "mmlu": Benchmark(
        metric="acc", chance=0.25, shots=5, folder="mmlu/default", task="mmlu_{}",
        read=files.read_mmlu,
    ),
    "triviaqa": Benchmark(
        metric="exact_match", chance=None, shots=5, folder="triviaqa", task="triviaqa",
        read=files.read_triviaqa, changes={"fewshot_split": "train"},
    ),
    "gsm8k": Benchmark(
        metric="exact_match,strict-match", chance=None, shots=5, folder="gsm8k", task="gsm8k",
        read=files.read_gsm8k,
    ),
    "race-middle": Benchmark(
        metric="acc", chance=0.25, folder="race", task="race", read=files.read_race_middle,
        changes={"dataset_path": "ehovy/race", "dataset_name": "middle",
                 "process_docs": _group_race},
        local={"process_docs": None},
    ),
    "race-high": Benchmark(
        metric="acc", chance=0.25, folder="race", task="race", read=files.read_race_high,
    ),
    "hellaswag": Benchmark(
        metric="acc_norm", chance=0.25, folder="hellaswag", task="hellaswag",
        read=files.read_hellaswag, local={"process_docs": None, "training_split": None},
    ),
    "arc-easy": Benchmark(
        metric="acc_norm", chance=0.25, folder="arc", task="arc_easy", read=files.read_arc_easy,
        local={"training_split": None, "validation_split": None},
    ),
    "arc-challenge": Benchmark(
        metric="acc_norm", chance=0.25, folder="arc", task="arc_challenge",
        read=files.read_arc_challenge, local={"training_split": None, "validation_split": None},
    ),
    "piqa": Benchmark(
        metric="acc_norm", chance=0.5, folder="piqa", task="piqa", read=files.read_piqa,
        local={"training_split": None},
    ),
    "winogrande": Benchmark(
        metric="acc", chance=0.5, folder="winogrande", task="winogrande",
        read=files.read_winogrande, local={"training_split": None},
    ),
    "lambada": Benchmark(
        metric="acc", chance=None, folder="lambada", task="lambada_openai",
        read=files.read_lambada,
    ),
    "humaneval": Benchmark(metric="pass@1", chance=None, read=files.read_humaneval, unsafe=True),
    "needle": Benchmark(metric="found", chance=None),
    "passkey": Benchmark(metric="found", chance=None),
}  # fmt: skip


def find_benchmarks(text: str) -> list[str]:
    """The names of a comma list.

    Raises:
        ConfigError: one is unknown or named twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(
                f'no task "{name}"{did_you_mean(name, BENCHMARKS)} Tasks: {", ".join(BENCHMARKS)}'
            )
        if names.count(name) > 1:
            raise ConfigError(f'the task "{name}" is named twice; leave one out')
    return names
