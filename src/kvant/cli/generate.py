"""Complete prompts, one or many.

Prompts are arguments, lines of --file, or all that is piped in. One prompt is streamed; of
several each text is printed under its prompt, in order, and one that fails does not stop the
others. Statistics go to stderr.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from kvant.cli.options import add_options, read_options
from kvant.cli.prompts import read_prompts, title_of
from kvant.cli.terminal import Speed, add_template_option, kv_text, open_pipeline, progress
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import KvantError, RequestError

if TYPE_CHECKING:
    from kvant.api import Pipeline, Prompt, Response

__all__ = ["configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant generate``."""
    parser.usage = "kvant generate MODEL [PROMPT ...] [options]"
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a hub name")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="a text to answer")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help='prompts, one a line; .jsonl: strings, {"prompt": ...} or {"messages": [...]}',
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without chat template"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to stdout")
    parser.add_argument("--quiet", action="store_true", help="no statistics on stderr")
    add_template_option(parser)
    # Logits have no place in text.
    add_options(parser, GenerationConfig, "generation", without=("output_logits",))
    add_options(parser, EngineConfig, "engine")


def run(options: Namespace) -> int:
    """Generate, print, and return the exit code."""
    gen, config = read_options(options, GenerationConfig), read_options(options, EngineConfig)
    prompts = read_prompts(options.prompts, options.file)
    many = len(prompts) > 1 or options.file is not None
    with (
        open_pipeline(options.model, config, options.chat_template) as pipe,
        _output(options.output) as out,
    ):
        batch = _Batch(pipe, prompts, gen, raw=options.raw, tolerant=many)
        if not many and gen.n == 1 and not options.json:
            _stream(batch, out)
        else:
            _print_all(batch, out, as_json=options.json, with_titles=many)
        if not options.quiet:
            print(_statistics(batch), file=sys.stderr)
    if batch.failures:
        which, why = batch.failures[0]
        raise KvantError(f"{len(batch.failures)} of {batch.size} failed; number {which}: {why}")
    return 0


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
        yield file


@dataclass(slots=True)
class _Completion:
    """One completion as it grows. ``error_message`` is set if it failed."""

    index: int
    prompt: Prompt
    text: str = ""
    finish_reason: str | None = None
    input_token_len: int = 0
    generate_token_len: int = 0
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    error_message: str | None = None

    def add(self, piece: Response) -> None:
        """Take in what is new."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or []
        self.finish_reason, self.error_message = piece.finish_reason, piece.error_message
        self.input_token_len = piece.input_token_len
        self.generate_token_len = piece.generate_token_len
        self.cached_tokens = piece.cached_tokens

    def as_json(self, *, logprobs: bool) -> str:
        """One line; the keys are always the same, but for ``logprobs`` and ``error_message``."""
        row: dict[str, Any] = {
            "index": self.index,
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "input_token_len": self.input_token_len,
            "generate_token_len": self.generate_token_len,
            "cached_tokens": self.cached_tokens,
            "token_ids": self.token_ids,
        }
        if logprobs:  # JSON has no infinity
            row["logprobs"] = [
                {str(token): value if math.isfinite(value) else None for token, value in at.items()}
                for at in self.logprobs
            ]
        if self.error_message is not None:
            row["error_message"] = self.error_message
        return json.dumps(row, ensure_ascii=False, allow_nan=False)


class _Batch:
    """Prompts on their way through a pipeline. ``tolerant`` gives a prompt that cannot be served
    a completion with an error; otherwise it raises. ``num_done`` completions have ended."""

    def __init__(
        self,
        pipe: Pipeline,
        prompts: list[Prompt],
        gen: GenerationConfig,
        *,
        raw: bool,
        tolerant: bool,
    ) -> None:
        self.pipe, self.gen = pipe, gen
        self.speed = Speed()
        self.completions: list[_Completion] = []
        self.num_done = 0
        self._raw = raw
        self._asked: list[Prompt] = []
        self._served: list[_Completion] = []
        for number, prompt in enumerate(prompts):
            self._take(number, prompt, tolerant)

    def _take(self, number: int, prompt: Prompt, tolerant: bool) -> None:
        first = number * self.gen.n
        try:
            self.pipe.prompt_ids(prompt, do_preprocess=not self._raw)
        except RequestError as error:
            if not tolerant:
                raise
            failed = _Completion(first, prompt, finish_reason="error", error_message=str(error))
            self.completions.append(failed)
            self.num_done += 1
            return
        made = [_Completion(first + offset, prompt) for offset in range(self.gen.n)]
        self._asked.append(prompt)
        self._served += made
        self.completions += made

    @property
    def size(self) -> int:
        """Completions in all."""
        return len(self.completions)

    @property
    def failures(self) -> list[tuple[int, str]]:
        """Index and message of what failed."""
        return [
            (done.index, done.error_message or "unknown error")
            for done in self.completions
            if done.finish_reason == "error"
        ]

    def __iter__(self) -> Iterator[str]:
        """Run; the new text of each step of any completion."""
        if not self._asked:
            return
        self.speed = Speed()
        pieces = self.pipe.stream_infer(self._asked, self.gen, do_preprocess=not self._raw)
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                self.speed.add(len(piece.token_ids))
                self._served[piece.index].add(piece)
                self.num_done += piece.finish_reason is not None
                yield piece.text


def _stream(batch: _Batch, out: TextIO) -> None:
    for text in batch:
        out.write(text)
        out.flush()
    out.write("\n")


def _print_all(batch: _Batch, out: TextIO, *, as_json: bool, with_titles: bool) -> None:
    """Print completions in order, each as soon as it and those before it are done."""
    printed = 0
    with progress("generating", shown=not out.isatty()) as bar:
        for _ in _and_at_the_end(batch):
            bar(batch.num_done, batch.size)
            while printed < batch.size and batch.completions[printed].finish_reason is not None:
                done = batch.completions[printed]
                if as_json:
                    out.write(done.as_json(logprobs=batch.gen.logprobs is not None) + "\n")
                else:
                    out.write(_under_title(done, first=printed == 0, with_title=with_titles))
                out.flush()
                printed += 1


def _and_at_the_end(batch: _Batch) -> Iterator[str]:
    yield from batch
    yield ""


def _under_title(done: _Completion, *, first: bool, with_title: bool) -> str:
    title = f">>> {title_of(done.prompt)}\n" if with_title else ""
    text = f"[error: {done.error_message}]" if done.finish_reason == "error" else done.text
    return ("" if first else "\n") + title + text + "\n"


def _statistics(batch: _Batch) -> str:
    prompt = sum(done.input_token_len for done in batch.completions)
    cached = sum(done.cached_tokens for done in batch.completions)
    return f"{batch.speed}; prompt {prompt} tokens, {cached} cached; {kv_text(batch.pipe)}"
