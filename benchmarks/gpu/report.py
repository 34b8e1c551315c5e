"""How a GPU benchmark hands over its rows: one JSON file, written again after every row, so that
what was measured outlives a deadline or a crash."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clock import Deadline, is_out_of_memory

Row = dict[str, Any]


class Rows(list[Row]):
    """Rows of results, and the file that they are kept in."""

    def __init__(self, output: Path | None) -> None:
        super().__init__()
        self._output = output

    def add(self, row: Row) -> None:
        """Keep and print a row."""
        self.append(row)
        print(json.dumps(row), flush=True)
        if self._output:
            self._output.write_text(json.dumps(list(self), indent=2) + "\n")

    def attempt(self, case: Row, work: Callable[[], Iterable[Row]]) -> None:
        """Add the rows of a case, each once it is made; if it fails, one that says how. No room on
        the device is no failure."""
        try:
            for row in work():
                self.add(case | row)
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            if is_out_of_memory(error):
                self.add(case | {"note": f"left out: {said}"})
            else:
                traceback.print_exc()
                self.add(case | {"error": f"{type(error).__name__}: {said}"})


def options(about: str | None) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=600, help="seconds to end within")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser


def run(
    program: Callable[[argparse.Namespace, Rows, Deadline], None], args: argparse.Namespace
) -> int:
    """Run a program; the exit status is 1 if a row has an error or does not hold."""
    rows = Rows(args.output)
    program(args, rows, Deadline(args.budget))
    return int(any("error" in row or row.get("holds") is False for row in rows))
