"""Constrained generation: which tokens ``GenerationConfig.response_format`` allows next.

A :class:`GuideFactory` compiles a format for one tokenizer, with the library llguidance; each
request gets a :class:`Guide` of its own, which follows its tokens. The set of allowed tokens
depends on the request's own output only.

Sources come from anybody, so they are bounded: in bytes here, in time and memory by a trial in
another process (:mod:`kvant.engine.guide_trial`), and while generating by llguidance's counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.config import GenerationConfig
from kvant.errors import KvantError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Guide", "GuideFactory", "GuideLimits", "GuideTokenizer"]

_START_SECONDS = 60.0  # the process for trials reads a tokenizer, on a busy machine
_KNOWN_GRAMMARS = 64  # that passed a trial and need none again

# Where JSON allows white space there is none, a space, or a line break with an indent. With any
# white space, small models write line breaks until their tokens run out.
_WHITESPACE = r" |\n[ \t]{0,20}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideLimits:
    """What a constraint may cost: bytes of its source, seconds and bytes of memory to compile."""

    max_bytes: int = 64 * 1024
    max_seconds: float = 5.0
    max_memory: int = 512 * 2**20


class GuideTokenizer(Protocol):
    """The part of a tokenizer that a factory needs."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    def to_json(self) -> str: ...


class Guide:
    """The constraint of one request, as far as its output has come.

    ``ended``: the text is complete and nothing can follow. ``error``: it cannot go on, because
    it exceeded a limit. After either, no more tokens are to be taken.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, end_ids: Sequence[int], *, may_end: bool
    ) -> None:
        self.ended = False
        self.error: str | None = None
        self._matcher = matcher
        self._size = vocab_size
        self._ends = np.array(end_ids, np.int64)
        self._may_end = may_end
        self._look()

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits ``[V]`` of all tokens that must not come next to -inf."""
        logits[~self._allowed] = -np.inf

    def take(self, token: int) -> None:
        """Go on by a token, one that was allowed and ends nothing."""
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        """Find what may come next, before it is asked for: that says whether this is the end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._allowed = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        if self._matcher.is_error():
            self.error = f"response_format: {_reason(self._matcher)}"
            return
        ends = self._allowed[self._ends]
        self._allowed[self._ends] = False
        if not self._allowed.any():
            # A grammar may name an end token itself, which then is not what accepts the text.
            self.ended = bool(ends.any()) or self._matcher.is_accepting()
            if not self.ended:
                self.error = "response_format: no token of the model continues the text"
        elif self._may_end:
            self._allowed[self._ends] = ends


class GuideFactory:
    """Makes guides for one tokenizer and a model with logits of ``vocab_size`` tokens. Costs
    nothing until the first constraint. Threads may share it; compiling takes up to twice
    ``limits.max_seconds`` in the calling thread, after those that wait before it."""

    def __init__(
        self, tokenizer: GuideTokenizer, vocab_size: int, limits: GuideLimits | None = None
    ) -> None:
        self.limits = limits or GuideLimits()
        self._tokenizer = tokenizer
        self._size = vocab_size
        self._lock = threading.Lock()
        self._parts: tuple[LLTokenizer, _Trial, list[int]] | None = None
        self._known: OrderedDict[str, None] = OrderedDict()

    def make(self, gen: GenerationConfig) -> list[Guide] | list[None]:
        """Guides for the ``gen.n`` completions of a request; None each if it asks for none.

        Raises:
            RequestError: the constraint is malformed, not supported, too large or too complex.
        """
        if gen.response_format is None or gen.response_format["type"] == "text":
            return [None] * gen.n
        kind = gen.response_format["type"]
        grammar = _grammar(gen.response_format, self.limits.max_bytes)
        tokenizer, trial, ends = self._ready()
        if kind not in ("json_object", "choice"):  # these are harmless by construction
            self._try(trial, grammar, kind)

        from kvant.engine.guide_trial import compile_grammar

        matcher = compile_grammar(tokenizer, grammar)
        if matcher.is_error():
            raise _refusal(kind, _reason(matcher))
        # Copies share what is compiled, and the count of states that limits it.
        matchers = [matcher, *(matcher.deep_copy() for _ in range(gen.n - 1))]
        guides = [Guide(each, self._size, ends, may_end=not gen.ignore_eos) for each in matchers]
        if guides[0].ended:
            raise _refusal(kind, "it allows the empty text only")
        if guides[0].error:
            raise _refusal(kind, guides[0].error)
        return guides

    def warm_up(self) -> None:
        """Do now what the first constraint would wait for.

        Raises:
            RequestError: constraints do not work with this tokenizer.
            KvantError: the second process does not start.
        """
        _, trial, _ = self._ready()
        trial.check(_json_grammar({"type": "object"}, self.limits.max_bytes))

    def _ready(self) -> tuple[LLTokenizer, _Trial, list[int]]:
        with self._lock:
            if self._parts is None:
                self._parts = self._build()
            return self._parts

    def _build(self) -> tuple[LLTokenizer, _Trial, list[int]]:
        from kvant.engine.guide_trial import make_tokenizer

        size = self._tokenizer.vocab_size
        text = self._tokenizer.to_json()
        ends = [token for token in self._tokenizer.eos_ids if token < size]
        if not ends:  # llguidance needs one: a token that no model has
            text, ends, size = _with_end_token(text, size), [size], size + 1
        # Logits may be wider than the tokenizer, or narrower.
        arguments = text, max(size, self._size), ends
        try:
            tokenizer = make_tokenizer(*arguments)
        except ValueError as error:
            raise RequestError(
                f"response_format does not work with this model's tokenizer ({error}); leave it out"
            ) from None
        trial = _Trial(*arguments, self.limits)
        return tokenizer, trial, [token for token in ends if token < self._size]

    def _try(self, trial: _Trial, grammar: str, kind: str) -> None:
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return
        if error := trial.check(grammar):
            raise _refusal(kind, error)
        with self._lock:
            self._known[grammar] = None
            if len(self._known) > _KNOWN_GRAMMARS:
                self._known.popitem(last=False)


class _Trial:
    """A process that compiles grammars before this one does, and may be killed for it. Started
    when it is first needed and again after it was killed."""

    def __init__(
        self, tokenizer_json: str, vocab_size: int, end_ids: list[int], limits: GuideLimits
    ) -> None:
        setup = {"tokenizer": tokenizer_json, "vocab_size": vocab_size, "end_ids": end_ids}
        self._setup = setup | {"memory": limits.max_memory}
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def check(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if it compiles within the limits."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            answer, late = _ask(process, grammar, self._limits.max_seconds)
            if answer is not None and not late:
                return str(answer)
            self._process = None
            self._finalizer.detach()
            _end(process)
        if late:
            return f"compiling takes more than the limit of {self._limits.max_seconds:g} s"
        return (
            "it is nested too deeply, or compiling takes more than the limit of "
            f"{self._limits.max_memory / 2**20:g} MiB"
        )

    def _start(self) -> subprocess.Popen[str]:
        from kvant.engine import guide_trial

        process = subprocess.Popen(
            [sys.executable, "-P", guide_trial.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process; that one ends with it
        )
        self._finalizer = weakref.finalize(self, _end, process)
        answer, _ = _ask(process, self._setup, _START_SECONDS)
        if answer is None:
            _end(process)
            raise KvantError(
                f"response_format needs a second process, and {sys.executable} did not start one; "
                "see that it runs and that there is memory for it"
            )
        self._process = process
        return process


def _ask(process: subprocess.Popen[str], question: Any, seconds: float) -> tuple[Any | None, bool]:
    """The answer, None if the process ended; and whether that was for the time it took."""
    assert process.stdin is not None
    assert process.stdout is not None
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it ended before it had read the question
        line = ""
    finally:
        timer.cancel()
    return (json.loads(line) if line.endswith("\n") else None), killed.is_set()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _reason(matcher: LLMatcher) -> str:
    from kvant.engine.guide_trial import error_of

    return error_of(matcher)


def _refusal(kind: str, reason: str) -> RequestError:
    return RequestError(f"response_format of type {kind} cannot be followed: {reason}")


def _with_end_token(tokenizer_json: str, token: int) -> str:
    spec = json.loads(tokenizer_json)
    added = {"id": token, "content": "<|end of output|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [*spec["added_tokens"], added | flags]
    return json.dumps(spec)


def _grammar(response_format: Mapping[str, Any], max_bytes: int) -> str:
    """A response format in llguidance's own form."""
    kind = response_format["type"]
    if kind in ("json_object", "json_schema"):
        wanted = response_format.get("json_schema", {"schema": {"type": "object"}})
        return _json_grammar(wanted["schema"], max_bytes)
    source = response_format[kind]
    text = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
    text = _bounded(text, kind, max_bytes)
    if kind in ("regex", "regex_schema"):
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":  # a terminal; its strings are written like JSON's
        text = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each) for each in source)
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _json_grammar(schema: Mapping[str, Any], max_bytes: int) -> str:
    from llguidance import LLMatcher

    if "x-guidance" in schema:
        raise _refusal("json_schema", 'kvant takes no "x-guidance"; leave it out')
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal("json_schema", f"the schema is not JSON ({error})") from None
    text = _bounded(text, "json_schema", max_bytes)
    try:
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise _refusal("json_schema", str(error)) from None


def _bounded(text: str, kind: str, max_bytes: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _refusal(
            kind, "it holds an unpaired surrogate (U+D800 to U+DFFF); send valid Unicode"
        ) from None
    if size > max_bytes:
        raise _refusal(kind, f"it has {size} bytes, and the limit is {max_bytes}; shorten it")
    return text
