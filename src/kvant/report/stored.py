"""Stored results: which files there are, of which kind each is, and what the report reads of it.

The records list only what the report needs; further keys of a file are passed over, so results of
an older or newer kvant are read as long as these keys are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvant.errors import RequestError

__all__ = [
    "Attention",
    "AttentionRow",
    "Comparison",
    "Fidelity",
    "FidelityRow",
    "Found",
    "Greedy",
    "Latency",
    "LatencyRow",
    "Linear",
    "Machine",
    "Metric",
    "Serving",
    "Source",
    "Speed",
    "Stored",
    "TaskRow",
    "Tasks",
    "Throughput",
    "Tune",
    "read_results",
]


_MOST = 1e20  # no figure is larger; what is computed from them stays finite


class _Record(BaseModel):
    """A JSON object: further keys are passed over, NaN and absurd numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _sane(cls, value: object) -> object:
        each = [*value, *value.values()] if isinstance(value, Mapping) else [value]
        if any(isinstance(number, int | float) and abs(number) > _MOST for number in each):
            raise ValueError(f"it is larger than {_MOST:g}")
        return value


class Machine(_Record):
    """What a figure was measured on (:func:`kvant.machine.machine`)."""

    cpu: str
    date: date
    cores: int | None = None
    isa: tuple[str, ...] = ()
    python: str | None = None
    versions: Mapping[str, str | None] = Field(default_factory=dict)


class Stored(_Record):
    """What every result begins with."""

    machine: Machine
    command: str


class _Text(_Record):
    source: str
    sha256: str


class Greedy(_Record):
    """How long greedy texts stay the same, in tokens."""

    tokens: int
    median: float
    q25: float
    q75: float
    same_percent: float


class FidelityRow(_Record):
    """A format at a context length; :class:`kvant.eval.fidelity.FidelityRow` says what is what."""

    kv_spec: str
    ctx: int
    windows: int
    positions: int
    bits_per_element: float = Field(ge=0.01)
    bytes_per_token: float = Field(ge=0.01)
    ppl: float | None
    dppl_percent: float | None
    kld: float | None
    kld_stderr: float | None
    kld_p99: float | None
    top1_percent: float | None
    greedy: Greedy | None = None


class Fidelity(Stored):
    """Of ``kvant eval fidelity``."""

    model: str
    dtype: str
    weight_dtype: str | None = None
    baseline: str
    text: _Text
    results: tuple[FidelityRow, ...] = Field(min_length=1)


class Metric(_Record):
    """A share or another figure, and its standard error."""

    value: float | None
    stderr: float | None = None


class TaskRow(_Record):
    """A format on a data set; ``value``, ``stderr`` and ``chance`` are shares from 0 to 1."""

    kv_spec: str
    bits_per_element: float = Field(ge=0.01)
    bytes_per_token: float = Field(ge=0.01)
    task: str
    num_fewshot: int | None
    prompt_tokens: float | None = None
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    items: int = Field(gt=0)
    of: int | None
    items_sha256: str
    metrics: Mapping[str, Metric] = Field(default_factory=dict)
    lengths: Mapping[int, float] | None = None


class Comparison(_Record):
    """A format against the baseline on the same items of a data set."""

    kv_spec: str
    task: str
    difference: float
    stderr: float | None
    gained: int
    lost: int
    p_value: float | None
    test: str


class Tasks(Stored):
    """Of ``kvant eval tasks``."""

    model: str
    dtype: str
    weight_dtype: str
    data: str
    harness: Mapping[str, str | None]
    chat_template: bool = False
    baseline: str
    results: tuple[TaskRow, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...]


class Tune(Stored):
    """Of ``kvant eval tune``."""

    model: str
    dtype: str
    text: _Text
    budget_bits: float
    kv: str
    bits_per_element: float
    kld: float
    uniform_kv: str | None
    uniform_bits_per_element: float | None
    uniform_kld: float | None


class Speed(_Record):
    """A format under a load. Rates are per second, times in milliseconds."""

    kv_spec: str
    weight_dtype: str
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    median_tpot_ms: float | None
    p99_tpot_ms: float | None
    mean_concurrency: float
    num_preemptions: int
    kv_tokens: int


class Throughput(Stored):
    """Of ``kvant bench throughput``."""

    model: str
    dtype: str
    workload: Mapping[str, Any]
    results: tuple[Speed, ...] = Field(min_length=1)


class LatencyRow(Speed):
    """A format and a case: so many requests at once of these lengths."""

    concurrency: int = Field(gt=0)
    prompt_tokens: int = Field(gt=0)
    completion_tokens: int = Field(gt=0)


class Latency(Stored):
    """Of ``kvant bench latency``."""

    model: str
    dtype: str
    results: tuple[LatencyRow, ...] = Field(min_length=1)


class AttentionRow(_Record):
    """A case of a kernel. ``times_first`` is its time over that of the first format."""

    what: str
    shape: str | None = None
    batch: int | None = None
    context: int | None = None
    kv: str | None = None
    seconds: float | None = None
    times_first: float | None = None


class Attention(Stored):
    """Of ``kvant bench attention``."""

    results: tuple[AttentionRow, ...] = Field(min_length=1)


class _LinearRow(_Record):
    kind: str
    shape: str
    rows: int
    seconds: float
    operations_per_second: float


class Linear(Stored):
    """Of ``kvant bench linear``."""

    results: tuple[_LinearRow, ...] = Field(min_length=1)


class _ServingRow(_Record):
    request_rate: float | str | None
    completed: int
    failed: int
    request_throughput: float
    output_throughput: float
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    median_itl_ms: float | None
    p99_itl_ms: float | None


class Serving(Stored):
    """Of ``kvant bench serving``."""

    model: str
    workload: Mapping[str, Any]
    results: tuple[_ServingRow, ...] = Field(min_length=1)


_Object = dict[str, Any]

# What tells a kind: keys of the object, and of its rows. The first that fits holds.
_KINDS: tuple[tuple[type[Stored], set[str], set[str]], ...] = (
    (Tasks, {"comparisons", "results"}, set()),
    (Fidelity, {"baseline", "text", "results"}, set()),
    (Tune, {"budget_bits"}, set()),
    (Serving, {"url", "workload"}, set()),
    (Latency, {"workload"}, {"kv_spec", "prompt_tokens"}),
    (Throughput, {"workload"}, {"kv_spec"}),
    (Attention, set(), {"what", "times_first"}),
    (Linear, set(), {"operations_per_second"}),
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A file: its name, which is without folders, and what it holds. Equal to itself only."""

    name: str
    stored: Stored

    @property
    def date(self) -> date:
        """When it was measured."""
        return self.stored.machine.date


@dataclass(frozen=True, slots=True)
class Found:
    """The results, oldest first, and the names of files that hold something else."""

    sources: tuple[Source, ...]
    others: tuple[str, ...]


def read_results(paths: Sequence[Path]) -> Found:
    """Read files, and of folders the files that end in .json.

    Raises:
        RequestError: a path that is not there, a damaged file, one without a key that its kind
            has, or nothing of a known kind.
    """
    files = dict.fromkeys(file.resolve() for path in paths for file in _files(path))
    read = {file: _read(file) for file in files}
    sources = [Source(file.name, stored) for file, stored in read.items() if stored is not None]
    if not sources:
        raise RequestError(
            f"{', '.join(map(str, paths))}: no result of kvant eval or kvant bench in "
            f"{len(files)} .json files; store one with --output FILE.json"
        )
    return Found(
        sources=tuple(sorted(sources, key=lambda source: (source.date, source.name))),
        others=tuple(sorted(file.name for file, stored in read.items() if stored is None)),
    )


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return sorted(path.glob("*.json"))
    if path.is_file():
        return [path]
    raise RequestError(
        f"{path} is neither a file nor a folder; name results of kvant eval or bench"
    )


def _read(path: Path) -> Stored | None:
    """What a file holds, None if it is of no kind that the report shows."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON ({error}); measure again, or leave it out") from None
    if not isinstance(found, dict):
        return None
    rows = found.get("results")
    each = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    in_rows = {key for row in each for key in row}
    for kind, keys, row_keys in _KINDS:
        if keys <= found.keys() and row_keys <= in_rows:
            return _checked(kind, found, path)
    return None


def _checked(kind: type[Stored], found: _Object, path: Path) -> Stored:
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        what = "is missing" if problem["type"] == "missing" else f"is wrong: {problem['msg']}"
        about = (kind.__doc__ or "").removeprefix("Of ").rstrip(".").replace("``", "")
        raise RequestError(
            f'{path} looks like a result of {about}, but its "{where}" {what}; measure again, or '
            "leave it out"
        ) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")
