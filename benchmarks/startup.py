"""Time to import kvant, and from the command line to the first token.

    python benchmarks/startup.py --output benchmarks/results/startup-DATE.json

Medians of interleaved repeats of fresh processes, files in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import record

IMPORT = [sys.executable, "-c", "import kvant; kvant.EngineConfig"]
GENERATE = [sys.executable, "-m", "kvant", "generate", "smollm2-135m", "Hello, who are you?"]


def seconds_to_exit() -> float:
    """A process that imports kvant, less one that does nothing."""
    times = []
    for command in ([sys.executable, "-c", "pass"], IMPORT):
        start = time.perf_counter()
        subprocess.run(command, check=True)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def seconds_to_first_token() -> float:
    start = time.perf_counter()
    with subprocess.Popen(
        [*GENERATE, "--max-new-tokens", "4", "--quiet"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    imports, tokens = [], []
    for _ in range(args.repeats):
        imports.append(round(seconds_to_exit(), 3))
        tokens.append(round(seconds_to_first_token(), 2))
    results = [
        {"what": "import kvant", "median_s": statistics.median(imports), "all_s": imports},
        {"what": "first token", "median_s": statistics.median(tokens), "all_s": tokens},
    ]
    record(results, args.output)


if __name__ == "__main__":
    main()
