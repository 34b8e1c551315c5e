"""Tasks that grow with the context: a fact is hidden in a long text and asked for at its end.

    passkey  a number in repeated filler: Mohtashami and Jaggi, arXiv 2305.16300; the words are
             those of the sample in KIVI's repository
    needle   a sentence in Paul Graham's essays: gkamradt's LLMTest_NeedleInAHaystack

The text is cut, or repeated as RULER (arXiv 2404.06654) does, until a prompt fits its length.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvant.errors import ConfigError
from kvant.eval.tasks.files import Rows, read_members

__all__ = [
    "NEEDLE_TOKENS",
    "PASSKEY_TOKENS",
    "needle_found",
    "needle_rows",
    "passkey_found",
    "passkey_rows",
    "read_essays",
]

PASSKEY_TOKENS = 16
"""Tokens that an answer with a pass key needs at the most."""
NEEDLE_TOKENS = 48
"""Tokens for an answer in a sentence."""

CountTokens = Callable[[str], int]

_FIRST_TRY = 100  # words: enough to learn their size, few where a script has no spaces

_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s)""")

_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"

_NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day."
)
_NEEDLE_FACTS = ("sandwich", "Dolores Park")
_NEEDLE_QUESTION = (
    "\n\nQuestion: What is the best thing to do in San Francisco? Don't give information outside "
    "the document or repeat your findings.\nAnswer: The best thing to do in San Francisco is"
)


def passkey_rows(
    count_tokens: CountTokens,
    lengths: Sequence[int],
    depths: int,
    reserve: int = PASSKEY_TOKENS,
) -> Rows:
    """Prompts that hide a number of five digits, which length and depth determine.

    Args:
        count_tokens: the tokens of a prompt, with those that the model wants around it.
        lengths: contexts in tokens; a prompt and its answer take as much of each as they can.
        depths: prompts of each length, with the number at depths spread evenly from the beginning
            of the text to its end; a single one has it in the middle.
        reserve: tokens of a length that are left for the answer.

    Returns:
        Rows of prompt, target (the number), length and depth_percent; length by length.

    Raises:
        ConfigError: a value that is not positive, or a length without room for the task.
    """
    hay = _Hay(_FILLER, between="\n")
    rows: Rows = []
    for length, percents in _grid(lengths, depths, reserve):
        for percent in percents:
            key = str(random.Random(f"{length} {percent}").randint(10000, 99999))
            told = f"The pass key is {key}. Remember it. {key} is the pass key."
            frame = _Frame("passkey", _PASSKEY_TASK, told, _PASSKEY_QUESTION, percent)
            rows.append(_row(frame, hay, count_tokens, length, reserve, key))
    return rows


def passkey_found(answer: str, target: str) -> bool:
    """Whether an answer has the number: these digits and none around them."""
    return re.search(rf"(?<!\d){re.escape(target)}(?!\d)", answer) is not None


def needle_rows(
    essays: str,
    count_tokens: CountTokens,
    lengths: Sequence[int],
    depths: int,
    reserve: int = NEEDLE_TOKENS,
) -> Rows:
    """Prompts that hide one sentence among others, at the end of a sentence. As in RULER the
    answer is begun for the model, so that one without instruction tuning can be asked, too.

    Args:
        essays: the text to hide it in, :func:`read_essays`.
        count_tokens: see :func:`passkey_rows`, as for the other arguments and errors.
        lengths: contexts in tokens.
        depths: prompts of each length.
        reserve: tokens left for the answer.

    Returns:
        Rows of prompt, target (the facts that an answer must name), length and depth_percent.

    Raises:
        ConfigError: as :func:`passkey_rows`; or a text without words.
    """
    hay = _Hay(essays, between="\n\n")
    rows: Rows = []
    for length, percents in _grid(lengths, depths, reserve):
        for percent in percents:
            frame = _Frame("needle", "", _NEEDLE, _NEEDLE_QUESTION, percent)
            rows.append(_row(frame, hay, count_tokens, length, reserve, list(_NEEDLE_FACTS)))
    return rows


def needle_found(answer: str, row: dict[str, Any]) -> bool:
    """Whether an answer names all facts of the row's target, in any case and order. The original
    has GPT-4 grade answers from 1 to 10; this asks for the two facts of its top grade and takes
    no other wording for them, so it is the same each time and needs no second model."""
    said = " ".join(answer.split()).casefold()
    return all(fact.casefold() in said for fact in row["target"])


def read_essays(data: Path) -> str:
    """Paul Graham's essays of the folder ``data``, in order of their names, between empty lines:
    ``needle/PaulGrahamEssays.zip`` or the same unpacked.

    Raises:
        RequestError: they are missing or cannot be read.
    """
    pattern, example = r"(?:PaulGrahamEssays/)?[^/]+\.txt", "PaulGrahamEssays/NAME.txt"
    found = read_members(data, "needle", "PaulGrahamEssays.zip", pattern, example)
    return "\n\n".join("\n".join(file.lines()) for _, file in found)


def _grid(lengths: Sequence[int], depths: int, reserve: int) -> list[tuple[int, list[float]]]:
    """The depths of each length, in percent."""
    for name, values in (("lengths", lengths), ("depths", [depths]), ("reserve", [reserve])):
        if not values or min(values) < 1:
            raise ConfigError(f"{name}={','.join(map(str, values))}: expected numbers from 1")
    if depths == 1:
        return [(length, [50.0]) for length in lengths]
    percents = [round(100 * index / (depths - 1), 1) for index in range(depths)]
    return [(length, percents) for length in lengths]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a prompt has besides the text that hides something, and where it hides it."""

    task: str
    beginning: str
    hidden: str
    question: str
    percent: float

    def around(self, text: str) -> str:
        """The prompt: what is hidden is a line of its own, after the last sentence that ends
        before its depth."""
        cut = _cut(text, self.percent)
        parts = (text[:cut].rstrip(), self.hidden, text[cut:].lstrip())
        return self.beginning + "\n".join(part for part in parts if part) + self.question


def _cut(text: str, percent: float) -> int:
    """Where the last sentence ends that is not beyond a share of the text's characters, which are
    a fair measure of its tokens; the whole text has no rest, even if its last sentence has one."""
    most = round(len(text) * percent / 100)
    if most == len(text):
        return most
    return max((each.end() for each in _SENTENCE_END.finditer(text, 0, most + 1)), default=0)


@dataclass(slots=True)
class _Hay:
    """A text of any number of words: the first of it, or all of it again and again. ``between``
    stands between repetitions."""

    text: str
    between: str
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = [word.end() for word in _WORD.finditer(self.text)]
        if not self._ends:
            raise ConfigError("the text to hide something in has no words; give another")

    def words(self, count: int) -> str:
        """The first ``count`` words."""
        times, rest = divmod(count, len(self._ends))
        begun = [self.text[: self._ends[rest - 1]]] if rest else []
        return self.between.join([self.text] * times + begun)


def _row(
    frame: _Frame,
    hay: _Hay,
    count_tokens: CountTokens,
    length: int,
    reserve: int,
    target: str | list[str],
) -> dict[str, Any]:
    """The longest prompt that leaves ``reserve`` tokens of ``length``."""

    def spare(words: int) -> int:
        return length - reserve - count_tokens(frame.around(hay.words(words)))

    if (most := spare(0)) < 0:
        raise ConfigError(
            f"a length of {length} tokens is too short for the task {frame.task}: without any "
            f"text around, prompt and answer take {length - most}; give a longer one"
        )
    return {
        "prompt": frame.around(hay.words(_fill(spare, most))),
        "target": target,
        "length": length,
        "depth_percent": frame.percent,
    }


def _fill(spare: Callable[[int], int], most: int) -> int:
    """About the largest number of words that leaves tokens to spare, from a few prompts counted:
    each corrects the tokens that a word takes. ``most`` are those to spare without any words."""
    best, words = 0, min(most, _FIRST_TRY)
    tried = {0}
    while words not in tried:
        tried.add(words)
        left = spare(words)
        if left >= 0:
            best = max(best, words)
        each = max((most - left) / words, 0.1)
        words = max(0, words + math.floor(left / each))
    return best
