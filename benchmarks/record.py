"""How a benchmark reports: its figures with the machine, the versions, the date and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvant.machine import machine


def record(results: list[dict[str, Any]], output: Path | None) -> None:
    """Print one JSON object with the results, and store it in ``output``."""
    found = {"machine": machine(), "command": " ".join(sys.argv), "results": results}
    text = json.dumps(found, indent=2)
    if output:
        output.write_text(text + "\n")
    print(text)
