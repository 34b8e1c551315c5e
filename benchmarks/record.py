"""How a benchmark reports: its figures with the machine, the versions, the date and the command."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    packages = ("kvant", "torch", "numpy", "gguf", "tokenizers")
    return {
        "cpu": cpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": date.today().isoformat(),
    }


def record(results: list[dict[str, Any]], output: Path | None) -> None:
    """Print one JSON object with the results, and store it in ``output``."""
    found = {"machine": machine(), "command": " ".join(sys.argv), "results": results}
    text = json.dumps(found, indent=2)
    if output:
        output.write_text(text + "\n")
    print(text)
