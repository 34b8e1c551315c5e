"""The options that choose a data set, and reading what they name."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.bench.metrics import check_counts
from kvant.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from kvant.bench.workload import Dataset

__all__ = ["Source", "add_dataset", "find_source"]

# The options of each kind of data set.
_OPTIONS = {
    "sharegpt": ("output_len", "max_input_len", "max_output_len"),
    "random": ("input_len", "output_len", "range_ratio"),
    "trace": ("max_input_len", "max_output_len"),
}
_SUFFIXES = {".json": "sharegpt", ".csv": "trace", ".jsonl": "trace"}


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that was asked for: its kind, its file if it has one, and the lengths that were
    given."""

    kind: str
    path: str | None
    count: int
    given: dict[str, Any]

    def read(self, **more: Any) -> Dataset:
        """Read and check the file; ``more`` arguments are the data set's own.

        Raises:
            RequestError: it cannot be read or is of another kind.
            ConfigError: a length out of range.
        """
        from kvant.bench.workload import Random, ShareGPT, Trace

        if self.path is None:
            return Random(**self.given)
        kind = ShareGPT if self.kind == "sharegpt" else Trace
        return kind(Path(self.path), **self.given, **more)

    def describe(self) -> dict[str, Any]:
        """For JSON; the lengths, which go last, are not in it."""
        return {"dataset": self.kind, "dataset_path": self.path, "num_prompts": self.count}


def add_dataset(parser: ArgumentParser) -> None:
    """Add ``--dataset``, ``--num-prompts`` and the options of lengths."""
    add = parser.add_argument
    add(
        "--dataset",
        "--dataset-name",
        metavar="X",
        default="random",
        help="sharegpt, random, trace, or a file, whose name tells: .json is sharegpt, .csv and "
        ".jsonl are traces; all may be .gz (default: random)",
    )
    add("--dataset-path", metavar="FILE", help="the file of sharegpt or trace")
    add("--num-prompts", metavar="N", type=int, default=100, help="requests (default: 100)")
    add("--input-len", metavar="N", type=int, help="random: tokens of prompts (default: 1024)")
    add(
        "--output-len",
        metavar="N",
        type=int,
        help="random: tokens to generate (default: 128); sharegpt: instead of the answers' lengths",
    )
    add(
        "--range-ratio",
        metavar="R",
        type=float,
        help="random: lengths from R times the length to the length (default: 1)",
    )
    add(
        "--max-input-len",
        metavar="N",
        type=int,
        help="trace: prompts are cut to it; sharegpt: longer ones are left out (default: 1024)",
    )
    add(
        "--max-output-len",
        metavar="N",
        type=int,
        help="trace: outputs are cut to it; sharegpt: longer answers are left out",
    )


def find_source(options: Namespace) -> Source:
    """The data set that was asked for, not yet read.

    Raises:
        ConfigError: options that do not go together, or a count out of range.
    """
    check_counts(num_prompts=options.num_prompts)
    kind, path = _kind(options)
    return Source(kind, path, options.num_prompts, _given(options, kind))


def _kind(options: Namespace) -> tuple[str, str | None]:
    kind, path = options.dataset, options.dataset_path
    if kind not in _OPTIONS:
        suffix = Path(kind.removesuffix(".gz")).suffix
        if suffix not in _SUFFIXES:
            raise ConfigError(
                f'no data set "{kind}"{did_you_mean(kind, _OPTIONS)} Data sets: '
                f"{', '.join(_OPTIONS)}, or a .json, .csv or .jsonl file"
            )
        if path is not None:
            raise ConfigError("both --dataset and --dataset-path name a file; use one of them")
        kind, path = _SUFFIXES[suffix], kind
    if (path is None) != (kind == "random"):
        what = "takes no" if kind == "random" else "needs a"
        raise ConfigError(f"--dataset {kind} {what} file in --dataset-path")
    return kind, path


def _given(options: Namespace, kind: str) -> dict[str, Any]:
    """The lengths that the user gave."""
    names = dict.fromkeys(name for some in _OPTIONS.values() for name in some)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in _OPTIONS[kind]:
            raise ConfigError(
                f"{_option(name)} does not go with --dataset {kind}, which takes "
                f"{', '.join(map(_option, _OPTIONS[kind]))}"
            )
    return given


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
