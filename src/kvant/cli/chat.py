"""Talk to a model.

A line is a turn; end it with a backslash to go on in the next. /help lists the commands. When
input is no terminal, each line of it is a turn and the answers are printed one after another.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from kvant.cli.options import add_options, read_options
from kvant.cli.terminal import Speed, add_template_option, kv_text, open_pipeline
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import ModelError, RequestError

if TYPE_CHECKING:
    from kvant.api import Pipeline, Response, Session

__all__ = ["configure", "run"]

_HELP = """\
/clear  (or: end)         forget the conversation
/stats                    speed of the last answer, context and KV cache
/exit   (or: /quit, exit) leave; so do Ctrl-D, and Ctrl-C when nothing is being answered
/help                     this list
A backslash at the end of a line continues it. Ctrl-C stops an answer."""


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant chat``."""
    parser.usage = "kvant chat MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a hub name")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_template_option(parser)
    # A conversation has one answer per turn, and shows its text only.
    hidden = ("n", "logprobs", "output_logits")
    add_options(parser, GenerationConfig, "generation", without=hidden)
    add_options(parser, EngineConfig, "engine")


def run(options: Namespace) -> int:
    """Talk until the input ends; the exit code is 1 if a scripted turn failed."""
    gen, config = read_options(options, GenerationConfig), read_options(options, EngineConfig)
    with open_pipeline(options.model, config, options.chat_template) as pipe:
        if pipe.tokenizer.chat is None and options.chat_template is None:
            raise ModelError(
                f"{options.model} has no chat template, so it cannot chat; give one with "
                "--chat-template, or use kvant generate"
            )
        chat = _Chat(pipe, gen, options.system, interactive=sys.stdin.isatty())
        chat.talk()
    return 1 if chat.failed and not chat.interactive else 0


class _Chat:
    """A conversation, its commands and its answers."""

    def __init__(
        self, pipe: Pipeline, gen: GenerationConfig, system: str | None, *, interactive: bool
    ) -> None:
        self.interactive = interactive
        self.failed = False
        self._pipe, self._gen, self._system = pipe, gen, system
        self._speed = Speed()
        self._session = self._new_session()
        self._commands = {
            "/help": lambda: print(_HELP),
            "/clear": self._clear,
            "end": self._clear,
            "/stats": self._print_stats,
        }

    def talk(self) -> None:
        """Answer turn after turn."""
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  (gives input() its history)
            print(f"{kv_text(self._pipe)}. /help lists the commands.")
        for turn in _turns(interactive=self.interactive):
            if turn in ("/exit", "/quit", "exit"):
                return
            if command := self._commands.get(turn):
                command()
            elif turn.startswith("/") and not turn[1:].count("/") and " " not in turn:
                self.failed = True
                self._say(f"no command {turn}; /help lists them")
            elif turn:
                self._answer(turn)

    def _new_session(self) -> Session:
        session = self._pipe.session()
        if self._system is not None:
            session.messages = [{"role": "system", "content": self._system}]
        return session

    def _clear(self) -> None:
        self._session = self._new_session()
        self._say("the conversation starts anew")

    def _answer(self, turn: str) -> None:
        before = self._session.messages
        self._speed = Speed()
        whole: Response | None = None
        text = ""
        try:
            for piece in self._pieces(turn):
                text += piece.text
                whole = replace(piece, text=text)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            said = [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
            self._session.messages = [*before, *said] if text else before
            print("\n[stopped]")
            return
        except RequestError as error:
            self._fail(str(error))
            return
        print()
        if whole is not None:
            self._remark(whole, before)

    def _pieces(self, turn: str) -> Iterator[Response]:
        """The pieces of the answer, printed and timed."""
        pieces = cast(
            "Iterator[Response]",
            self._pipe.chat(turn, self._session, self._gen, stream_response=True),
        )
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                self._speed.add(piece)
                print(piece.text, end="", flush=True)
                yield piece

    def _remark(self, answer: Response, before: list[Any]) -> None:
        """Say why an answer ended, unless the model ended it."""
        limit = self._pipe.model.engine.session_len
        if answer.finish_reason == "error":
            self._session.messages = before
            self._fail(str(answer.error_message))
        elif answer.input_token_len + answer.generate_token_len >= limit:
            self._say(f"the context of {limit} tokens is full; /clear starts a new conversation")
        elif answer.finish_reason == "length":
            self._say(f"the answer was cut at max_new_tokens={self._gen.max_new_tokens}")

    def _fail(self, error: str) -> None:
        self.failed = True
        self._say(f"{error}; /clear starts a new conversation")

    def _say(self, text: str) -> None:
        """A remark that is no part of the answers."""
        print(f"[{text}]", file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def _print_stats(self) -> None:
        # Nothing runs between turns, so the engine's thread leaves these numbers alone.
        stats = self._pipe.model.engine.stats()
        print(f"last answer: {self._speed}")
        print(
            f"pages: {stats.pages_held} held and {stats.pages_cached} cached of "
            f"{stats.pages_total}; {kv_text(self._pipe)}"
        )


def _turns(*, interactive: bool) -> Iterator[str]:
    """What the user says, turn by turn, until the input ends."""
    while True:
        lines: list[str] = []
        while True:
            line = _read_line("... " if lines else ">>> ", interactive=interactive)
            if line is None:
                if interactive:  # Ctrl-C drops a turn that is half typed
                    lines = []
                break
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        if not lines:
            return
        yield "\n".join(lines).strip()


def _read_line(prompt: str, *, interactive: bool) -> str | None:
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
