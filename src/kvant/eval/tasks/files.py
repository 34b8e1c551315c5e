"""Data sets from local files, as rows with the fields of their copies on the Hugging Face hub.

One reader a data set; each takes the folder of ``--data`` and returns subsets (subjects; ``""``
where there is but one) of splits of rows. Files may be as they were published, packed (``.gz``,
``.bz2``, ``.zip``) or not; those of OpenCompass' ``data`` folder are found too.

Values are those of the files: nothing is cleaned, and no row is left out. A row that could not be
a task is an error, :class:`kvant.errors.RequestError`, that names file, line and what is wrong.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvant.errors import RequestError

__all__ = [
    "File",
    "Rows",
    "Splits",
    "Subsets",
    "group_race",
    "read_arc_challenge",
    "read_arc_easy",
    "read_ceval",
    "read_gsm8k",
    "read_hellaswag",
    "read_humaneval",
    "read_lambada",
    "read_members",
    "read_mmlu",
    "read_piqa",
    "read_race_high",
    "read_race_middle",
    "read_triviaqa",
    "read_winogrande",
]

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]
Subsets = dict[str, Splits]

_LETTERS = ("A", "B", "C", "D")
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,  # bz2: the end is missing
    RuntimeError,  # zipfile: encrypted, or a method that it does not know
    zlib.error,
    zipfile.BadZipFile,
)


# The data sets


def read_mmlu(data: Path) -> Subsets:
    """MMLU (Hendrycks et al., arXiv 2009.03300): splits test and dev of each subject. Rows:
    question, subject, choices (4), answer (0 to 3)."""
    files = _subjects(data, "mmlu", "(?:data/)?", ("test", "dev"))
    return {
        subject: {split: _mmlu(file, subject) for split, file in splits.items()}
        for subject, splits in files.items()
    }


def _mmlu(file: File, subject: str) -> Rows:
    return [
        {
            "question": row.text("question"),
            "subject": subject,
            "choices": [row.text(letter) for letter in _LETTERS],
            "answer": _LETTERS.index(row.one_of("answer", _LETTERS)),
        }
        for row in _table(file, ("question", *_LETTERS, "answer"))
    ]


def read_ceval(data: Path) -> Subsets:
    """C-Eval (Huang et al., arXiv 2305.08322): splits val and dev of each subject. Rows: id,
    question, A, B, C, D, answer (letter), explanation (empty but in dev)."""
    files = _subjects(data, "ceval", "(?:formal_ceval/)?", ("val", "dev"))
    return {
        subject: {split: _ceval(file) for split, file in splits.items()}
        for subject, splits in files.items()
    }


def _ceval(file: File) -> Rows:
    return [
        {
            "id": row.number("id"),
            **{name: row.text(name) for name in ("question", *_LETTERS)},
            "answer": row.one_of("answer", _LETTERS),
            "explanation": row.fields.get("explanation", ""),
        }
        for row in _table(file)
    ]


def read_triviaqa(data: Path) -> Subsets:
    """TriviaQA (Joshi et al., arXiv 1705.03551) without passages, as DPR split it (Karpukhin et
    al., arXiv 2004.04906). Its dev questions are the split validation, its test questions
    ``train``: for examples in prompts only. Rows: question, answer (aliases, and as value the
    first of them)."""
    splits = {"validation": "dev", "train": "test"}
    return _one_subset(
        {
            split: _triviaqa(_find(data, "triviaqa", f"trivia-{name}.qa.csv"))
            for split, name in splits.items()
        }
    )


def _triviaqa(file: File) -> Rows:
    rows: Rows = []
    for row in _table(file, ("question", "aliases"), delimiter="\t"):
        aliases = _aliases(row)
        answer = {"aliases": aliases, "value": aliases[0]}
        rows.append({"question": row.text("question"), "answer": answer})
    return rows


def _aliases(row: _Row) -> list[str]:
    try:
        aliases = ast.literal_eval(row.text("aliases"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise row.wrong("the answers are no Python list") from None
    return _Row(row.where, {"aliases": aliases}).strings("aliases")


def read_gsm8k(data: Path) -> Subsets:
    """GSM8K (Cobbe et al., arXiv 2110.14168): splits test and train. Rows: question, answer
    (ends in ``#### N``)."""

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for row in _json_lines(_find(data, "gsm8k", f"{split}.jsonl")):
            if "####" not in row.text("answer"):
                raise row.wrong("the answer has no #### before its number")
            yield row.pick("question", "answer")

    return _one_subset({split: list(rows(split)) for split in ("test", "train")})


def read_race_middle(data: Path) -> Subsets:
    """RACE (Lai et al., arXiv 1704.04683), middle schools: split test, one row an article, as
    :func:`read_race_high`."""
    return _race(data, "middle")


def read_race_high(data: Path) -> Subsets:
    """RACE (Lai et al., arXiv 1704.04683), high schools: split test, one row an article, as
    EleutherAI's copy has it. Rows: article, problems: ``repr`` of a list of question, options (4)
    and answer (letter) in the file's order; lm-eval asks the last one."""
    return _race(data, "high")


def _race(data: Path, level: str) -> Subsets:
    file = _find(data, "race", f"test/{level}.jsonl")
    rows = [_question(row) for row in _json_lines(file)]
    return _one_subset({"test": group_race(rows, file.name)})


def _question(row: _Row) -> dict[str, Any]:
    return {
        **row.pick("example_id", "article", "question"),
        "options": row.strings("options", len(_LETTERS)),
        "answer": row.one_of("answer", _LETTERS),
    }


def group_race(rows: Iterable[Mapping[str, Any]], source: str = "RACE") -> Rows:
    """Rows of RACE by article, from one a question (example_id, article, question, options,
    answer): articles in order of their first question, questions in order of the rows.
    ``source`` is for errors.

    Raises:
        RequestError: two articles have the same example_id.
    """
    articles: dict[str, str] = {}
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = row["example_id"]
        if articles.setdefault(key, row["article"]) != row["article"]:
            raise RequestError(f"{source} has two different articles of example_id {key}")
        problem = {name: row[name] for name in ("question", "options", "answer")}
        problems.setdefault(key, []).append(problem)
    return [{"article": articles[key], "problems": repr(problems[key])} for key in articles]


def read_hellaswag(data: Path) -> Subsets:
    """HellaSwag (Zellers et al., arXiv 1905.07830): split validation, of the text file that
    llama.cpp reads, whose artefacts (``[header]`` and the like) are already taken out. Rows:
    query, choices (4), label (0 to 3). Other than lm-eval's own rows, which are made of the
    original file, a context's last part has no capital put at its beginning."""
    file = _find(data, "hellaswag", "hellaswag_val_full.txt")
    names = ("query", "label", *map(str, range(4)))
    lines = file.lines()
    if len(lines) % len(names):
        raise RequestError(
            f"{file.name} has {len(lines)} lines, no multiple of the {len(names)} of a question"
        )
    rows: Rows = []
    for start in range(0, len(lines), len(names)):
        fields = dict(zip(names, lines[start : start + len(names)], strict=True))
        row = _Row(f"{file.name}, line {start + 1}", fields)
        label = int(row.one_of("label", ("0", "1", "2", "3")))
        rows.append({"query": row.text("query"), "choices": row.texts(names[2:]), "label": label})
    return _one_subset({"validation": rows})


def read_arc_easy(data: Path) -> Subsets:
    """ARC (Clark et al., arXiv 1803.05457), the easy questions: split test. Rows: id, question,
    choices (text: 3 to 5; label: letters or digits), answerKey (a label)."""
    return _arc(data, "Easy")


def read_arc_challenge(data: Path) -> Subsets:
    """ARC, the questions of its challenge; rows as those of :func:`read_arc_easy`."""
    return _arc(data, "Challenge")


def _arc(data: Path, name: str) -> Subsets:
    rows = [_arc_row(row) for row in _json_lines(_find(data, "arc", f"ARC-{name}-Test.jsonl"))]
    return _one_subset({"test": rows})


def _arc_row(row: _Row) -> dict[str, Any]:
    question = row.inner("question", row.fields.get("question"))
    choices = question.fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise row.wrong("no choices")
    asked = [row.inner("choices", choice) for choice in choices]
    labels = [choice.text("label") for choice in asked]
    if len(set(labels)) < len(labels):
        raise row.wrong(f"two choices of one label among {', '.join(labels)}")
    return {
        "id": row.text("id"),
        "question": question.text("stem"),
        "choices": {"text": [choice.text("text") for choice in asked], "label": labels},
        "answerKey": row.one_of("answerKey", labels),
    }


def read_piqa(data: Path) -> Subsets:
    """PIQA (Bisk et al., arXiv 1911.11641): split validation. Rows: goal, sol1, sol2, label (0
    or 1)."""
    file, labels = _find(data, "piqa", "valid.jsonl"), _find(data, "piqa", "valid-labels.lst")
    questions, answers = list(_json_lines(file)), labels.lines()
    if len(questions) != len(answers):
        raise RequestError(
            f"{labels.name} has {len(answers)} labels for the {len(questions)} questions of "
            f"{file.name}"
        )
    rows = [
        {
            **row.pick("goal", "sol1", "sol2"),
            "label": int(_Row(f"{labels.name}, line {n}", {"label": a}).one_of("label", "01")),
        }
        for n, (row, a) in enumerate(zip(questions, answers, strict=True), 1)
    ]
    return _one_subset({"validation": rows})


def read_winogrande(data: Path) -> Subsets:
    """WinoGrande (Sakaguchi et al., arXiv 1907.10641): split validation. Rows: sentence (with a
    ``_`` to be filled), option1, option2, answer (``1`` or ``2``)."""
    rows: Rows = []
    for row in _json_lines(_find(data, "winogrande", "dev.jsonl")):
        row.one_of("answer", ("1", "2"))
        if row.text("sentence").count("_") != 1:
            raise row.wrong("the sentence has no _ to be filled, or more than one")
        rows.append(row.pick("sentence", "option1", "option2", "answer"))
    return _one_subset({"validation": rows})


def read_lambada(data: Path) -> Subsets:
    """LAMBADA (Paperno et al., arXiv 1606.06031), OpenAI's version with its punctuation: split
    test. Rows: text, whose last word is to be said."""
    rows: Rows = []
    for row in _json_lines(_find(data, "lambada", "lambada_test.jsonl")):
        if " " not in row.text("text").strip():
            raise row.wrong("the text has one word only")
        rows.append(row.pick("text"))
    return _one_subset({"test": rows})


def read_humaneval(data: Path) -> Subsets:
    """HumanEval (Chen et al., arXiv 2107.03374): split test. Rows: task_id, prompt,
    canonical_solution, test, entry_point. Their code is not run here."""
    rows: Rows = []
    for row in _json_lines(_find(data, "humaneval", "HumanEval.jsonl")):
        if not row.text("entry_point").isidentifier():
            raise row.wrong("entry_point is no name of a function")
        rows.append(row.pick("task_id", "prompt", "canonical_solution", "test", "entry_point"))
    return _one_subset({"test": rows})


def _one_subset(splits: Splits) -> Subsets:
    return {"": splits}


# Files


@dataclass(frozen=True, slots=True)
class File:
    """What is in a file, unpacked; ``name`` is for errors: its path, and where it is the member of
    an archive, which one."""

    name: str
    content: bytes

    def text(self) -> str:
        """The content as text.

        Raises:
            RequestError: it is no UTF-8.
        """
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.content.count(b"\n", 0, error.start) + 1
            raise RequestError(f"{self.name}, line {line}: not UTF-8: {error.reason}") from None

    def lines(self) -> list[str]:
        """Its lines, without their ends.

        Raises:
            RequestError: it is no UTF-8, or empty.
        """
        text = self.text().removesuffix("\n")
        if not text.strip():
            raise RequestError(f"{self.name} has no rows")
        return text.split("\n")  # splitlines would also cut at characters of texts: U+2028


def read_members(
    data: Path, task: str, archive: str, pattern: str, example: str
) -> list[tuple[re.Match[str], File]]:
    """The files of a data set of many, sorted by name: members of the archive ``TASK/ARCHIVE``,
    or if there is none, files in the folder ``TASK``. ``pattern`` must match their whole names,
    which are relative and have ``/`` between parts; errors show it by ``example``.

    Raises:
        RequestError: none is there, or one cannot be read.
    """
    packed = data / task / archive
    named = re.compile(pattern)
    found = list(_archived(packed, named) if packed.is_file() else _loose(data / task, named))
    if not found and packed.is_file():
        raise RequestError(f"{packed} has no files {example}")
    if not found:
        raise _missing(data, task, f"{task}/{archive}, or files {task}/{example}")
    return found


def _archived(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], File]]:
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise RequestError(f"cannot read {path}: {error}") from None
    with archive:
        for name in sorted(archive.namelist()):
            if match := pattern.fullmatch(name):
                try:
                    content = archive.read(name)
                except _DAMAGED as error:
                    raise RequestError(f"cannot read {name} in {path}: {error}") from None
                yield match, File(f"{path}: {name}", content)


def _loose(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], File]]:
    for path in sorted(folder.rglob("*")):
        if match := pattern.fullmatch(path.relative_to(folder).as_posix()):
            yield match, _read(path)


def _find(data: Path, task: str, name: str) -> File:
    """A file of a data set, packed or not."""
    path = data / task / name
    for suffix in _UNPACK:
        if (packed := path.with_name(path.name + suffix)).is_file():
            return _read(packed)
    raise _missing(data, task, f"{task}/{name}, or packed as .gz or .bz2")


def _read(path: Path) -> File:
    try:
        unpack = _UNPACK.get(path.suffix, bytes)
        return File(str(path), unpack(path.read_bytes()))
    except _DAMAGED as error:
        raise RequestError(f"cannot read {path}: {error}") from None


def _missing(data: Path, task: str, expected: str) -> RequestError:
    return RequestError(
        f"no data of {task} in {data}: expected {expected}; leave --data out to read it from the "
        f"hub, or see docs/evaluation.md"
    )


def _subjects(
    data: Path, task: str, prefix: str, splits: Sequence[str]
) -> dict[str, dict[str, File]]:
    """The csv files ``SPLIT/SUBJECT_SPLIT.csv``, by subject and split."""
    pattern = rf"{prefix}({'|'.join(splits)})/([^/]+)_\1\.csv"
    found: dict[str, dict[str, File]] = {}
    example = f"{splits[0]}/SUBJECT_{splits[0]}.csv"
    for match, file in read_members(data, task, f"{task}.zip", pattern, example):
        found.setdefault(match[2], {})[match[1]] = file
    for subject, files in found.items():
        for split in splits:
            if split not in files:
                there = next(iter(files.values())).name
                raise RequestError(f"{there}: {subject} has no {subject}_{split}.csv beside it")
    return found


# Rows


@dataclass(frozen=True, slots=True)
class _Row:
    """The fields of a row, and where it is: file and line."""

    where: str
    fields: Mapping[str, Any]

    def wrong(self, what: str) -> RequestError:
        return RequestError(f"{self.where}: {what}")

    def text(self, name: str) -> str:
        """A field that must be text, and not empty."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            found = "is empty" if isinstance(value, str) else "is missing or no text"
            raise self.wrong(f"{name} {found}")
        if not _is_unicode(value):
            raise self.wrong(f"{name} has half of a surrogate pair")
        return value

    def texts(self, names: Iterable[str]) -> list[str]:
        return [self.text(name) for name in names]

    def pick(self, *names: str) -> dict[str, Any]:
        """Some fields, all of them texts."""
        return {name: self.text(name) for name in names}

    def strings(self, name: str, count: int | None = None) -> list[str]:
        """A field that must be a list of texts, of a given number or some."""
        value = self.fields.get(name)
        if not isinstance(value, list) or len(value) != (count or len(value) or 1):
            raise self.wrong(f"{name} must be a list of {count or 'some'} texts")
        each = {f"{name}[{index}]": text for index, text in enumerate(value)}
        return _Row(self.where, each).texts(each)

    def number(self, name: str) -> int:
        """A field that must be digits."""
        value = self.text(name)
        if not (value.isascii() and value.isdigit()):
            raise self.wrong(f"{name} is {_short(value)}; expected a number")
        return int(value)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """A field that must be one of some texts."""
        value = self.text(name)
        if value not in tuple(allowed):
            raise self.wrong(f"{name} is {_short(value)}; expected one of {', '.join(allowed)}")
        return value

    def inner(self, name: str, value: object) -> _Row:
        """An object that is in this row."""
        if not isinstance(value, dict):
            raise self.wrong(f"{name} is missing or no object")
        return _Row(self.where, value)


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _short(value: str) -> str:
    return json.dumps(value if len(value) <= 20 else value[:20] + "...", ensure_ascii=False)


def _json_lines(file: File) -> Iterator[_Row]:
    """The rows of a file of one JSON object a line."""
    for number, line in enumerate(file.lines(), 1):
        where = f"{file.name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RequestError(f"{where}: not a JSON object")
        yield _Row(where, fields)


def _table(file: File, columns: Sequence[str] = (), delimiter: str = ",") -> Iterator[_Row]:
    """The rows of a csv file, which names its columns in its first row if they are not given."""
    cells = _cells(file, delimiter)
    if not columns:
        _, columns = next(cells, ("", ()))
    row = None
    for where, values in cells:
        if len(values) != len(columns):
            raise RequestError(
                f"{where}: {len(values)} columns; expected {len(columns)}: {', '.join(columns)}"
            )
        row = _Row(where, dict(zip(columns, values, strict=True)))
        yield row
    if row is None:
        raise RequestError(f"{file.name} has no rows")


def _cells(file: File, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Where a row of a csv file begins, and its cells."""
    reader = csv.reader(io.StringIO(file.text(), newline=""), delimiter=delimiter, strict=True)
    while True:
        where = f"{file.name}, line {reader.line_num + 1}"
        try:
            yield where, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RequestError(f"{where}: {error}") from None
