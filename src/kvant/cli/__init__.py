"""The command line: ``kvant generate``, ``kvant chat``, ``kvant info``."""

from kvant.cli.program import main

__all__ = ["main"]
