"""Talk to a model, here or with --server behind an OpenAI-compatible server.

A line is a turn; end it with a backslash to go on in the next. /help lists the commands. When
input is no terminal, each line of it is a turn and the answers are printed one after another.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from kvant.cli.options import add_options, read_options
from kvant.cli.partner import LocalModel, Message, Partner, Piece, ServerError, open_server
from kvant.cli.terminal import Speed, add_template_option, open_pipeline
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import ConfigError, ModelError, RequestError

__all__ = ["configure", "run"]

_HELP = """\
/clear  (or: end)         forget the conversation
/stats                    speed of the last answer, context and KV cache
/exit   (or: /quit, exit) leave; so do Ctrl-D, and Ctrl-C when nothing is being answered
/help                     this list
A backslash at the end of a line continues it. Ctrl-C stops an answer."""


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant chat``."""
    parser.usage = "kvant chat MODEL [options]\n       kvant chat --server URL [MODEL] [options]"
    add = parser.add_argument
    about = (
        "a folder, a .gguf file or a hub name; with --server its name there (default: the first)"
    )
    add("model", metavar="MODEL", nargs="?", help=about)
    add("--server", metavar="URL", help="let a server answer, as that of kvant serve")
    add("--api-key", metavar="KEY", help="the server's key (default: that in OPENAI_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_template_option(parser)
    # A conversation has one answer per turn, and shows its text only.
    hidden = ("n", "logprobs", "output_logits")
    add_options(parser, GenerationConfig, "generation", without=hidden)
    add_options(parser, EngineConfig, "engine")


def run(options: Namespace) -> int:
    """Talk until the input ends; the exit code is 1 if a scripted turn failed."""
    with _partner(options) as partner:
        chat = _Chat(partner, options.system, interactive=sys.stdin.isatty())
        chat.talk()
    return 1 if chat.failed and not chat.interactive else 0


@contextmanager
def _partner(options: Namespace) -> Iterator[Partner]:
    """Whoever answers."""
    if options.server is not None:
        with open_server(options) as model:
            yield model
        return
    if options.model is None:
        raise ConfigError("which MODEL? Name one, or a server with --server URL")
    if options.api_key is not None:
        raise ConfigError("--api-key goes with --server URL only")
    gen, config = read_options(options, GenerationConfig), read_options(options, EngineConfig)
    with open_pipeline(options.model, config, options.chat_template) as pipe:
        if pipe.tokenizer.chat is None and options.chat_template is None:
            raise ModelError(
                f"{options.model} has no chat template, so it cannot chat; give one with "
                "--chat-template, or use kvant generate"
            )
        yield LocalModel(pipe, gen)


class _Chat:
    """A conversation, its commands and its answers."""

    def __init__(self, partner: Partner, system: str | None, *, interactive: bool) -> None:
        self.interactive = interactive
        self.failed = False
        self._partner = partner
        self._start: list[Message] = [] if system is None else [_message("system", system)]
        self._messages = self._start
        self._speed = Speed()
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
            print(f"{self._partner.about}. /help lists the commands.")
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

    def _clear(self) -> None:
        self._messages = self._start
        self._say("the conversation starts anew")

    def _answer(self, turn: str) -> None:
        asked = [*self._messages, _message("user", turn)]
        self._speed = Speed()
        text = ""
        try:
            for piece in self._pieces(asked):
                text += "" if piece.thought else piece.text
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            if text:
                self._messages = [*asked, _message("assistant", text)]
            print("\n[stopped]")
            return
        except (RequestError, ServerError) as error:
            remedy = "; /clear starts a new conversation" if isinstance(error, RequestError) else ""
            self._fail(f"{error}{remedy}")
            return
        print()
        self._messages = [*asked, _message("assistant", text)]
        if remark := self._partner.remark():
            self._say(remark)

    def _pieces(self, messages: list[Message]) -> Iterator[Piece]:
        """The pieces of the answer, printed and timed."""
        thinking = False
        with closing(self._partner.answer(messages)) as pieces:
            for piece in pieces:
                self._speed.add(piece.tokens)
                if thinking and not piece.thought and piece.text:
                    print("\n")
                thinking = piece.thought or (thinking and not piece.text)
                print(piece.text, end="", flush=True)
                yield piece

    def _fail(self, error: str) -> None:
        self.failed = True
        if self._speed.first is not None:  # the answer had begun
            print()
        self._say(error)

    def _say(self, text: str) -> None:
        """A remark that is no part of the answers."""
        print(f"[{text}]", file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def _print_stats(self) -> None:
        print(f"last answer: {self._speed}")
        print(self._partner.stats())


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


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
