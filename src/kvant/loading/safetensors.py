"""A Hugging Face folder: config.json, safetensors shards, tokenizer files."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvant.errors import ModelError
from kvant.loading.checkpoint import their_name
from kvant.loading.packed import Read, find_packing
from kvant.loading.tokenizer import Tokenizer
from kvant.models.codes import Codes
from kvant.models.families import find_family

__all__ = ["SafetensorsCheckpoint"]

T = TypeVar("T")

_log = logging.getLogger("kvant")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not an object; download it again")
    return found


def _open_shards(folder: Path) -> dict[str, Any]:
    """Tensor name -> opened file that has it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise ModelError(
                f"{index} has no weight_map of file names; download it again"
            ) from None
    else:  # Mistral's own format lies beside the other in some repositories
        files = sorted(set(folder.glob("*.safetensors")) - set(folder.glob("consolidated*")))
    if not files:
        raise ModelError(
            f"no *.safetensors in {folder}; kvant reads safetensors and GGUF, "
            "convert other checkpoints first"
        )
    found: dict[str, Any] = {}
    for file in files:
        try:
            shard = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged or cut short ({error}); download it again"
            ) from None
        found.update(
            dict.fromkeys(
                shard.keys(),  # type: ignore[no-untyped-call]
                shard,
            )
        )
    return found


class SafetensorsCheckpoint:
    """See :class:`kvant.loading.checkpoint.Checkpoint`.

    Raises:
        ModelError: config.json or the weights are missing, damaged or unsupported.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        raw = _read_json(folder / "config.json")
        family = find_family(raw)
        try:
            self.config = family.config(raw)
        except KeyError as error:
            raise ModelError(
                f"{folder / 'config.json'} has no {error}; take the one that came with the model"
            ) from None
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ModelError(
                f"{folder / 'config.json'} has a value of a wrong kind ({error}); "
                "take the one that came with the model"
            ) from None
        self.quantized = find_packing(raw)
        self._warned = threading.Lock()  # held from the first warning on
        self._names = family.names
        self._shards = _open_shards(folder)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer from the folder's files."""
        return Tokenizer.from_folder(self._folder)

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether a shard has our tensor ``name``, or the codes of it."""
        theirs = their_name(self._names, name, layer)
        return theirs in self._shards or self._is_packed(theirs)

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Read our tensor ``name``; as float32 if it is stored as codes."""
        theirs = their_name(self._names, name, layer)
        if self.quantized is None or not self._is_packed(theirs):
            return self._read(theirs)
        return self._unpack(theirs, self.quantized.dequantize)

    def codes(self, name: str, layer: int | None = None) -> Codes | None:
        """The codes of our weight ``name``; None if it has none, or their groups are scattered."""
        theirs = their_name(self._names, name, layer)
        if self.quantized is None or not self._is_packed(theirs):
            return None
        if self._unpack(theirs, self.quantized.order) is None:
            return self._unpack(theirs, self.quantized.codes)
        if self._warned.acquire(blocking=False):
            _log.warning(
                "%s is quantized with act-order (desc_act): its weights are expanded to floats and "
                "quantized anew with --weights int4 or int8, as groups of scattered inputs would "
                "be slow; a model quantized without act-order keeps its codes",
                self._folder,
            )
        return None

    def _is_packed(self, theirs: str | None) -> bool:
        stem, _, kind = (theirs or "").rpartition(".")
        packing = self.quantized
        return packing is not None and kind == "weight" and f"{stem}.{packing.mark}" in self._shards

    def _unpack(self, theirs: str | None, do: Callable[[Read], T]) -> T:
        """What ``do`` makes of the parts of a layer."""
        stem = (theirs or "").removesuffix(".weight")

        def read(part: str) -> Tensor | None:
            name = f"{stem}.{part}"
            return self._read(name) if name in self._shards else None

        try:
            return do(read)
        except ValueError as error:
            raise ModelError(
                f'layer "{stem}" {error}; config and weights are not of the same model, or '
                f"{self._folder} is incomplete: download it again"
            ) from None

    def _read(self, theirs: str | None) -> Tensor:
        if theirs not in self._shards:
            raise ModelError(
                f'tensor "{theirs}" is missing in {self._folder}; '
                "the checkpoint is incomplete (a shard may be missing), download it again"
            )
        try:
            tensor: Tensor = self._shards[theirs].get_tensor(theirs)
        except SafetensorError as error:
            raise ModelError(
                f'tensor "{theirs}" cannot be read ({error}); download {self._folder} again'
            ) from None
        return tensor
