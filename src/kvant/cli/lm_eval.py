"""The command line of EleutherAI's lm-evaluation-harness, with kvant among its models.

The harness gives other packages no way to add a model to its own command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvant.cli.measuring import need_harness

__all__ = ["main"]

_BATCH = ("--batch_size", "auto")

_USAGE = """usage: kvant lm-eval [options of lm_eval]

The command line of lm_eval, with kvant among its models:

  kvant lm-eval --model kvant --model_args pretrained=MODEL,kv=int4h --tasks hellaswag

model_args: pretrained, add_bos_token, and the options of the engine (kvant serve --help) with
underscores, as kv=k4v4,dtype=float32,kv_memory=4GiB. lm_eval's options: kvant lm-eval run --help
"""


def main(words: Sequence[str]) -> int:
    """Run ``lm_eval`` with these words.

    Raises:
        ConfigError: it is not installed.
    """
    if not words or words[0] in ("--help", "-h"):
        print(_USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    need_harness("kvant lm-eval")
    from lm_eval.__main__ import cli_evaluate

    import kvant.eval.tasks.harness  # noqa: F401 - makes the model known

    # lm_eval says 1 to a model if nobody says anything, for models that would run out of memory.
    runs = words[0] not in ("ls", "validate")
    batch = () if {"--batch_size", "-b"} & {word.partition("=")[0] for word in words} else _BATCH
    sys.argv = ["lm_eval", *words, *(batch if runs else ())]
    cli_evaluate()
    return 0
