"""What an engine is measured on: requests of known lengths, from a file or at random.

    ShareGPT   conversations; first question and the length of its answer, as LMDeploy reads them
    Random     lengths from ranges
    Trace      lengths that a service logged, prompts at random; with common beginnings if logged

Making one reads and checks its file; :meth:`draw` makes requests for a tokenizer, or for
:class:`Words` where there is none. The same seed gives the same requests.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.bench.metrics import check_counts
from kvant.errors import ConfigError, RequestError

__all__ = ["Codec", "Dataset", "Random", "ShareGPT", "Trace", "Vocabulary", "Words", "Work"]

# What LMDeploy's and vLLM's benchmarks keep of ShareGPT: at least 4 tokens of question and answer,
# at most 1024 of question and 2048 of both.
_SHORTEST, _LONGEST_PROMPT, _LONGEST = 4, 1024, 2048
_HUMANS = ("human", "user")

_CSV_COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))
_BLOCK = 512
"""Tokens that an id of ``hash_ids`` stands for."""


_WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
"""


class Work(NamedTuple):
    """One request: its prompt and how many tokens are generated."""

    prompt: list[int]
    output_len: int


class Codec(Protocol):
    """What data sets need of a tokenizer."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...


class Words:
    """Stands in for a tokenizer that is not known: an id is a common word, which most models
    have as one token."""

    _LIST = _WORDS.split()

    vocab_size = len(_LIST)
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:  # noqa: ARG002
        raise ConfigError("texts of this data set must be counted in tokens; give a tokenizer")

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:  # noqa: ARG002
        return " ".join(self._LIST[token] for token in ids)

    def token_text(self, token_id: int) -> str:
        return f" {self._LIST[token_id]}"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model. ``size`` is that of its logits. ``as_text``: random prompts will be
    sent as text, so they are made of tokens that are whole words; others may become more or fewer
    when they are read back."""

    tokenizer: Codec
    size: int
    as_text: bool = False

    def ordinary(self) -> NDArray[np.int64]:
        """The ids of random prompts: none of them a special token."""
        known = np.arange(min(self.size, self.tokenizer.vocab_size))
        ids = np.setdiff1d(known, list(self.tokenizer.special_ids))
        return self._words(ids) if self.as_text else ids

    def _words(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that are a space and letters, or if there are none, letters."""
        texts = [self.tokenizer.token_text(token) for token in ids.tolist()]
        letters = np.array([text.isascii() and text.strip().isalpha() for text in texts], bool)
        small = letters & np.array([text.islower() for text in texts], bool)
        spaced = small & np.array([text.startswith(" ") for text in texts], bool)
        return next((ids[chosen] for chosen in (spaced, small, letters) if chosen.any()), ids)


class Dataset(Protocol):
    """A source of requests."""

    def draw(self, count: int, vocabulary: Vocabulary, seed: int) -> list[Work]:
        """``count`` requests.

        Raises:
            ConfigError: it has fewer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Random tokens; lengths uniform between ``range_ratio`` times a length and the length.

    Raises:
        ConfigError: a value out of range.
    """

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_counts(input_len=self.input_len, output_len=self.output_len)
        if not 0 <= self.range_ratio <= 1:
            raise ConfigError(
                f"range_ratio={self.range_ratio:g} must be from 0 to 1; 1 is lengths as given"
            )

    def draw(self, count: int, vocabulary: Vocabulary, seed: int) -> list[Work]:
        rng, ids = np.random.default_rng(seed), vocabulary.ordinary()
        inputs, outputs = (
            rng.integers(max(1, math.floor(self.range_ratio * most)), most, count, endpoint=True)
            for most in (self.input_len, self.output_len)
        )
        return [
            Work(rng.choice(ids, length).tolist(), int(output))
            for length, output in zip(inputs, outputs, strict=True)
        ]


class ShareGPT:
    """Conversations ``[{"conversations": [{"from": "human", "value": ...}, ...]}, ...]``: the
    first question as it is, without chat template, and as many tokens as the answer to it has.

    Kept are questions of 4 to ``max_input_len`` (1024) tokens whose answers have 4 to
    ``max_output_len`` (or as many as both make 2048).

    Args:
        path: the JSON file, may be .gz.
        output_len: the length of all outputs; needed where a file has no answers.

    Raises:
        RequestError: the file cannot be read or is of another kind.
        ConfigError: a value out of range, or no answers and no ``output_len``.
    """

    def __init__(
        self,
        path: Path,
        *,
        output_len: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
    ) -> None:
        check_counts(
            output_len=output_len, max_input_len=max_input_len, max_output_len=max_output_len
        )
        self._path = path
        self._output_len, self._max_output = output_len, max_output_len
        self._max_input = max_input_len or _LONGEST_PROMPT
        turns = [_first_turns(path, *item) for item in enumerate(_read_json(path))]
        self._turns = [(asked, said) for asked, said in turns if asked and (said or output_len)]
        if not self._turns and output_len is None:
            raise ConfigError(f"{path} has no answers whose lengths to take; give output_len")

    def draw(self, count: int, vocabulary: Vocabulary, seed: int) -> list[Work]:
        drawn: list[Work] = []
        for index in np.random.default_rng(seed).permutation(len(self._turns)):
            if len(drawn) == count:
                break
            if work := self._work(vocabulary.tokenizer, *self._turns[index]):
                drawn.append(work)
        if len(drawn) < count:
            raise ConfigError(
                f"{self._path} has {len(drawn)} questions of {_SHORTEST} to {self._max_input} "
                f"tokens with answers that are not too long, and num_prompts={count}; lower it"
            )
        return drawn

    def _work(self, tokenizer: Codec, asked: str, said: str | None) -> Work | None:
        prompt = tokenizer.encode(asked)
        if not _SHORTEST <= len(prompt) <= self._max_input:
            return None
        if self._output_len is not None:
            return Work(prompt, self._output_len)
        output = len(tokenizer.encode(said or "", add_special=False))
        most = self._max_output or _LONGEST - len(prompt)
        return Work(prompt, output) if _SHORTEST <= output <= most else None


class _Logged(NamedTuple):
    """A request of a trace. Equal ``blocks`` are equal tokens; ``stamp`` is when it came, as the
    log has it."""

    input_len: int
    output_len: int
    stamp: Any = None
    blocks: tuple[int, ...] = ()


class Trace:
    """Lengths from a log, one request a row:

        .csv     ContextTokens, GeneratedTokens (Azure) or num_prefill_tokens, num_decode_tokens
        .jsonl   input_length, output_length and, if logged, hash_ids (Mooncake)

    Lengths are cut to ``max_input_len`` and ``max_output_len``: that leaves the shorter ones, most
    of a trace, as they are, while dividing all by the same number would make them tiny. Requests
    are drawn without replacement; with hash_ids a run of consecutive ones is taken, as what
    requests share is near in time, and so it is if ``consecutive``, for :meth:`arrivals`.

    Raises:
        RequestError: the file cannot be read or is of another kind.
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        consecutive: bool = False,
    ) -> None:
        check_counts(max_input_len=max_input_len, max_output_len=max_output_len)
        self._path, self._consecutive = path, consecutive
        self._most = (max_input_len or math.inf, max_output_len or math.inf)
        readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
        suffix = Path(path.name.removesuffix(".gz")).suffix
        if suffix not in readers:
            raise RequestError(f"the trace {path} must end in .csv or .jsonl, or in these and .gz")
        self._rows = list(readers[suffix](path))
        if not self._rows:
            raise RequestError(f"the trace {path} has no requests; give another file")

    def draw(self, count: int, vocabulary: Vocabulary, seed: int) -> list[Work]:
        chosen, ids = self._chosen(count, seed), vocabulary.ordinary()
        return [self._work(self._rows[index], index, ids, seed) for index in chosen]

    def arrivals(self, count: int, seed: int) -> list[float]:
        """When the requests that :meth:`draw` makes came: seconds since the first of them.

        Raises:
            ConfigError: the trace has fewer requests.
            RequestError: it has no time stamps (TIMESTAMP, a date, or timestamp, milliseconds)
                or they go backwards.
        """
        times = [_seconds(self._path, self._rows[at].stamp) for at in self._chosen(count, seed)]
        if any(later < sooner for sooner, later in pairwise(times)):
            raise RequestError(f"the time stamps of the trace {self._path} go backwards; sort it")
        return [time - times[0] for time in times]

    def _chosen(self, count: int, seed: int) -> Sequence[int]:
        """The rows to draw."""
        rows = self._rows
        if count > len(rows):
            raise ConfigError(
                f"the trace {self._path} has {len(rows)} requests, and num_prompts={count}; "
                "lower it"
            )
        rng = np.random.default_rng(seed)
        if rows[0].blocks or self._consecutive:
            start = int(rng.integers(len(rows) - count, endpoint=True))
            return range(start, start + count)
        return sorted(rng.choice(len(rows), count, replace=False).tolist())

    def _work(self, row: _Logged, index: int, ids: NDArray[np.int64], seed: int) -> Work:
        most_input, most_output = self._most
        length = int(min(row.input_len, most_input))
        if row.blocks:
            needed = row.blocks[: -(-length // _BLOCK)]
            parts = [np.random.default_rng((seed, block)).choice(ids, _BLOCK) for block in needed]
            prompt = np.concatenate(parts)[:length]
        else:
            prompt = np.random.default_rng((seed, index)).choice(ids, length)
        return Work(prompt.tolist(), int(min(row.output_len, most_output)))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the data set {path}: {error}") from None


def _read_json(path: Path) -> list[Any]:
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, list):
        raise RequestError(f"{path} holds no list of conversations, but a {type(found).__name__}")
    return found


def _first_turns(path: Path, index: int, item: Any) -> tuple[str | None, str | None]:
    """The first question of a conversation and the answer to it; None for what is missing."""
    try:
        turns = [(str(turn["from"]), str(turn["value"])) for turn in item["conversations"]]
    except (TypeError, KeyError):
        raise RequestError(
            f'{path}, entry {index}: not {{"conversations": [{{"from": ..., "value": ...}}, ...]}}'
        ) from None
    asked = next((at for at, (who, _) in enumerate(turns) if who in _HUMANS), len(turns))
    question, answer = (*turns[asked : asked + 2], None, None)[:2]
    said = answer[1] if answer is not None and answer[0] not in _HUMANS else None
    return (question[1] if question is not None else None), said


def _csv_rows(path: Path) -> Iterator[_Logged]:
    rows = csv.DictReader(_read(path).splitlines())
    found = rows.fieldnames or ()
    columns = next((pair for pair in _CSV_COLUMNS if set(pair) <= set(found)), None)
    if columns is None:
        wanted = " or ".join(" and ".join(pair) for pair in _CSV_COLUMNS)
        raise RequestError(f"the trace {path} has no columns {wanted}")
    for row in rows:
        logged = _logged(path, rows.line_num, row, columns, int)
        yield logged._replace(stamp=row.get("TIMESTAMP"))


def _jsonl_rows(path: Path) -> Iterator[_Logged]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"the trace {path}, line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise RequestError(f"the trace {path}, line {number}, is no object")
        logged = _logged(path, number, row, ("input_length", "output_length"), _whole)
        blocks, needed = row.get("hash_ids", ()), -(-logged.input_len // _BLOCK)
        numbers = isinstance(blocks, Sequence) and all(type(each) is int for each in blocks)
        if not numbers or 0 < len(blocks) < needed:
            raise RequestError(
                f"the trace {path}, line {number}: hash_ids must be {needed} whole numbers, one "
                f"for every {_BLOCK} tokens of input_length={logged.input_len}"
            )
        yield logged._replace(blocks=tuple(blocks), stamp=row.get("timestamp"))


def _seconds(path: Path, stamp: Any) -> float:
    """A time stamp of a trace: a date, or milliseconds."""
    try:
        if isinstance(stamp, str):
            date = datetime.fromisoformat(stamp)
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        return _number(stamp) / 1000
    except (TypeError, ValueError):
        raise RequestError(
            f"the trace {path} cannot say when requests came: the time stamp {stamp!r} is no date "
            "(TIMESTAMP of .csv) and no number of milliseconds (timestamp of .jsonl)"
        ) from None


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _logged(
    path: Path,
    line: int,
    row: Mapping[str, Any],
    columns: tuple[str, str],
    read: Callable[[Any], int],
) -> _Logged:
    def length(name: str) -> int:
        try:
            found = read(row.get(name))
        except (TypeError, ValueError):
            found = 0
        if found < 1:
            raise RequestError(
                f"the trace {path}, line {line}: {name}={row.get(name)!r} must be a whole number "
                "of at least 1"
            )
        return found

    return _Logged(length(columns[0]), length(columns[1]))
