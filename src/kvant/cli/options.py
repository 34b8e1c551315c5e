"""Command-line options made from the fields of the configs: one field, one place.

Type, help and default come from the dataclass. Only what the user gave is passed on, and the
dataclass checks it, so the command line has no rules of its own. ``--quant-policy`` and
``--quant_policy`` are the same option.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from kvant.config import EngineConfig
from kvant.errors import ConfigError, did_you_mean
from kvant.formats import KVSpec, is_auto

__all__ = ["Parser", "add_options", "read_options", "split_specs"]

T = TypeVar("T")

# How the second half of a pair of formats, and a layer behind another, begin in a list.
_SIDE = re.compile(r"\s*[kv]\s*=", re.IGNORECASE)
_LAYER = re.compile(r"\s*-?\d+\s*(=|$)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, so one line; options may stand anywhere
    between the positional words."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            **arguments,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            ConfigError: an unknown option, naming the nearest one, or a word that is no value.
        """
        options, rest = _split(words)
        self._check_names(options)
        namespace, extra = self.parse_known_intermixed_args([*options, *rest])
        if extra:
            self.error(f"unexpected {' '.join(map(repr, extra))}")
        return namespace

    def _check_names(self, words: Sequence[str]) -> None:
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(
                    f'no option "{name}"{did_you_mean(name, known)} Put -- before '
                    "prompts that begin with dashes"
                )


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before ``--``, spelled with dashes, and ``--`` with what follows."""
    end = list(words).index("--") if "--" in words else len(words)
    return [_spell(word) for word in words[:end]], list(words[end:])


def _spell(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def add_options(
    parser: argparse.ArgumentParser, config: type[Any], title: str, *, without: Collection[str] = ()
) -> None:
    """Add an option for each field of a config dataclass, except those in ``without``."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in without:
            group.add_argument(
                *(f"--{name.replace('_', '-')}" for name in _names(field)),
                dest=field.name,
                default=argparse.SUPPRESS,
                help=_help(field),
                **_kind(hints[field.name]),
            )


def read_options(options: argparse.Namespace, config: type[T]) -> T:
    """The config that was asked for.

    Raises:
        ConfigError, RequestError: what the config says to its values.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: value for name, value in vars(options).items() if name in names})


def split_specs(text: str) -> list[KVSpec]:
    """The KV specs of a comma list; a spec may hold commas itself, as ``k=int8h,v=int4h`` and
    ``int8;0,1=f16`` do.

    Raises:
        ConfigError: an entry is empty or no spec.
    """
    entries: list[str] = []
    for piece in text.split(","):
        if entries and (_LAYER.match(piece) or _is_second_side(piece, entries[-1])):
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    if not all(entry.strip() for entry in entries):
        raise ConfigError(f'the list of KV formats "{text}" has an empty entry; leave it out')
    if any(is_auto(entry) for entry in entries):
        raise ConfigError('"auto" depends on the model and cannot be compared; name formats')
    return [EngineConfig(kv=entry.strip()).kv_spec() for entry in entries]


def _is_second_side(piece: str, before: str) -> bool:
    """Whether ``before`` ends in one side of a pair and ``piece`` begins with the other."""
    pair = before.rpartition(";")[2].rpartition(":")[2]
    _, equals, rest = pair.partition("=")
    if equals and not _SIDE.match(pair):  # "0,1=k=int8h"
        pair = rest
    return bool(_SIDE.match(piece) and _SIDE.match(pair)) and "," not in pair


def _names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    return (field.name, *field.metadata.get("aliases", ()))


def _help(field: dataclasses.Field[Any]) -> str:
    text, default = str(field.metadata.get("help", "")), field.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    if default is not None and "default" not in text:
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type; ``X | None`` is read as X."""
    if isinstance(hint, UnionType):
        kind, *others = (kind for kind in get_args(hint) if kind is not type(None))
    else:
        kind, others = hint, []
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Mapping:
        return {"type": _reader(*get_args(kind)), "metavar": "JSON"}
    if get_origin(kind) is not None:  # Sequence[X]: give the option several times
        return {"action": "append", "type": get_args(kind)[0], "metavar": "X"}
    if others:  # several spellings, such as a size in bytes or "4GiB"
        return {"type": str, "metavar": "X"}
    return {"type": kind, "metavar": {int: "N", float: "R"}.get(kind, "X")}


def _reader(key: type[Any], _: Any) -> Callable[[str], dict[Any, Any]]:
    """How a JSON object with keys of one type is read; JSON itself has only texts for keys."""

    def read(text: str) -> dict[Any, Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
        if not isinstance(found, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, as {{...}}")
        try:
            return {key(name): value for name, value in found.items()}
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must have keys of type {key.__name__}"
            ) from None

    return read
