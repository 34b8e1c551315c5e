"""Grammars are tried in a process of their own first, because some cannot be bounded otherwise:
llguidance counts the steps of most work, but not of all (an intersection of many regexes runs for
minutes), and deep recursion ends the process. Whatever happens here happens to nobody else.

Run as a script, it reads a line that describes the tokenizer, then a grammar in each line, and
answers each with a line: an error or an empty string, as JSON. It imports nothing of kvant.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["compile_grammar", "error_of", "make_tokenizer"]

# Recursion that fits here fits the threads of the server, which have four times as much.
_STACK_BYTES = 2 << 20

_EXCERPT = re.compile(r"\s*(\d+ \||\^+\s*$)")


def make_tokenizer(tokenizer_json: str, vocab_size: int, end_ids: list[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer; takes some 0.3 s. Raises ValueError if it cannot be had."""
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=end_ids)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of a text, its first mask computed; ask :func:`error_of` it.

    Legitimate grammars need a small part of these limits; with them hostile ones stop at some
    0.1 s for a mask, rarely 0.3 s, and some 100 MB.
    """
    limits = LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, in one line; empty if it can."""
    if not matcher.is_error():
        return ""
    if matcher.stop_reason() == "NoExtensionBias" or "NoExtensionBias" in matcher.get_error():
        return "there is no text that it allows"
    lines = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    # Excerpts of the source and long words, which are source too, would hide the reason.
    words = " ".join(line for line in lines if not _EXCERPT.match(line)).split()
    text = " ".join(word if len(word) <= 60 else word[:50] + "..." for word in words)
    return text if len(text) <= 300 else f"{text[:148]} ... {text[-147:]}"


def _limit_memory(nbytes: int) -> None:
    """Let this process grow by so much, where the system can tell and limit it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + nbytes, held + nbytes))


def _try(tokenizer: LLTokenizer, grammar: str) -> str:
    errors: list[str] = []
    thread = threading.Thread(
        target=lambda: errors.append(error_of(compile_grammar(tokenizer, grammar)))
    )
    thread.start()
    thread.join()
    return errors[0] if errors else "the compiler failed"


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _main() -> None:
    setup = json.loads(sys.stdin.readline())
    tokenizer = make_tokenizer(setup["tokenizer"], setup["vocab_size"], setup["end_ids"])
    threading.stack_size(_STACK_BYTES)
    _limit_memory(setup["memory"])
    _answer("")
    for line in sys.stdin:
        _answer(_try(tokenizer, json.loads(line)))


if __name__ == "__main__":
    _main()
