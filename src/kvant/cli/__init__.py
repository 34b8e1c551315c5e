"""The command line: ``kvant generate``, ``kvant chat``, ``kvant info``, ``kvant eval``."""

from kvant.cli.program import main

__all__ = ["main"]
