"""From the words of a command line to an exit code.

    kvant COMMAND ...    ->  kvant.cli.COMMAND: configure(parser), run(options) -> exit code
    kvant eval TASK ...  ->  kvant.cli.eval_TASK

Everything that takes time to import is imported inside commands, so that ``--help``,
``--version`` and mistyped words are answered at once. Exit codes: those of
:mod:`kvant.errors`, 130 after Ctrl-C, 141 when whoever reads the output has gone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from kvant import __version__
from kvant.cli.terminal import INTERRUPTED
from kvant.errors import ConfigError, KvantError, did_you_mean

__all__ = ["main"]

_READER_GONE = 141  # what a shell reports for SIGPIPE

COMMANDS = {
    "generate": "complete prompts, one or many",
    "chat": "talk to a model",
    "serve": "an OpenAI-compatible server, with a page to chat and watch the KV cache",
    "info": "this machine, the KV formats, and what a model's cache takes",
    "eval": "what KV formats cost on a model and a text",
    "bench": "how fast formats, models and kernels are here",
    "lm-eval": "the command line of lm_eval, with kvant among its models",
    "report": "a page of what stored results say: accuracy, memory and speed of KV formats",
}

TASKS = {
    "eval": {
        "fidelity": "perplexity, divergence, greedy agreement, signal to noise of formats",
        "tasks": "accuracy on benchmark data sets: MMLU, C-Eval, GSM8K, HellaSwag, ...",
        "tune": "the formats of each layer that lose least for a budget of bits",
    },
    "bench": {
        "throughput": "requests per second of a data set, some requests at a time",
        "latency": "static batches: a grid of batch, prompt and output lengths",
        "attention": "the pages of each format against the bandwidth of memory, and torch",
        "linear": "linear layers against the bandwidth of memory and the peak of arithmetic",
        "serving": "any OpenAI-compatible server, at request rates or the times of a log",
    },
}

_USAGE = f"""usage: kvant COMMAND [options]

LLM inference with an online-quantized paged KV cache.

commands:
{chr(10).join(f"  {name:<10} {about}" for name, about in COMMANDS.items())}

kvant COMMAND --help    lists a command's options
kvant --version         prints the version

exit codes: 0 done, 1 failed, 2 wrong option or request, 3 model missing or damaged,
130 interrupted. KVANT_DEBUG=1 adds the traceback to errors.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; ``argv`` is without the program's name, by default the process's.

    Returns:
        The exit code. An error is one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # half of a surrogate pair must not end a batch
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except SystemExit as leaving:  # argparse, after --help
        code = leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = _READER_GONE
    except (KvantError, OSError, MemoryError) as error:
        code = _report(error)
    if code in (INTERRUPTED, _READER_GONE):
        _quieten()
        if argv is None and _engine_is_busy():
            os._exit(code)
    return code


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("--version", "-V"):
        print(f"kvant {__version__}")
        return 0
    if first in ("help", "--help", "-h"):
        if first != "help" or len(words) == 1:
            print(_USAGE, end="")
            return 0
        first, words = words[1], [*words[1:], "--help"]
    if not words:
        print(_USAGE, end="", file=sys.stderr)
        return 2
    if first not in COMMANDS:
        kind = "option" if first.startswith("-") else "command"
        raise ConfigError(
            f'no {kind} "{first}"{did_you_mean(first, COMMANDS)} Commands: {", ".join(COMMANDS)}'
        )
    if first in TASKS:
        return _dispatch_task(first, words[1:])
    if first == "lm-eval":
        from kvant.cli.lm_eval import main as lm_eval

        return lm_eval(words[1:])
    return _run(first, words[1:])


def _dispatch_task(command: str, words: list[str]) -> int:
    tasks = TASKS[command]
    first = words[0] if words else ""
    if first in ("--help", "-h"):
        about = "\n".join(f"  {name:<10} {about}" for name, about in tasks.items())
        print(f"usage: kvant {command} TASK MODEL [options]\n\ntasks:\n{about}")
        return 0
    if first not in tasks:
        raise ConfigError(
            f'kvant {command} has no task "{first}"{did_you_mean(first, tasks)} '
            f"Tasks: {', '.join(tasks)}, then MODEL"
        )
    return _run(f"{command} {first}", words[1:])


def _run(name: str, words: list[str]) -> int:
    from importlib import import_module

    from kvant.cli.options import Parser

    command: ModuleType = import_module(f"kvant.cli.{name.replace(' ', '_')}")
    parser = Parser(prog=f"kvant {name}", description=command.__doc__)
    command.configure(parser)
    code: int = command.run(parser.read(words))
    return code


def _report(error: BaseException) -> int:
    if os.environ.get("KVANT_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory ({text}); give the KV cache less with --kv-memory"
    with suppress(OSError):
        print(f"kvant: error: {text}", file=sys.stderr)
    return error.exit_code if isinstance(error, KvantError) else 1


def _quieten() -> None:
    """Write what is buffered, or if that is in vain lead it nowhere, so that Python's own flush
    at exit does not complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _engine_is_busy() -> bool:
    """Whether a step still computes. It cannot be interrupted, and Python must not shut down
    under it: a thread that is killed inside of torch takes the process with it."""
    return any(thread.name == "kvant-engine" for thread in threading.enumerate())
