"""SentencePiece BPE models as ``tokenizers`` pipelines, from tokenizer.model or GGUF metadata.

The few fields of the protobuf that matter are read here: the alternative is two dependencies
(sentencepiece and protobuf) for one file that older checkpoints ship.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvant.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

__all__ = ["TokenKind", "SentencePiece", "add_tokens", "read_sentencepiece"]

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space


class TokenKind(enum.IntEnum):
    """Token types of SentencePiece, which GGUF uses for every kind of tokenizer."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A SentencePiece BPE model.

    ``prefix`` says where a space is put before text: ``"always"`` before every stretch between
    added tokens, ``"first"`` only at the very beginning and unless there is one, or ``"never"``.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    prefix: Literal["always", "first", "never"] = "always"
    collapse_spaces: bool = False
    charsmap: bytes = b""

    def build(self, added: Mapping[int, AddedToken]) -> Backend:
        """The same as a ``tokenizers`` pipeline. Tokens of ``added`` replace pieces by id."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers

        tokens = {**self._added(), **added}
        pieces = dict(enumerate(self.pieces)) | {i: token.content for i, token in tokens.items()}
        unknown = [piece for i, piece in pieces.items() if self._kind(i) == TokenKind.UNKNOWN]
        backend = Backend(
            models.BPE(
                vocab={piece: i for i, piece in pieces.items()},
                merges=self._merges(without=tokens),
                unk_token=unknown[0] if unknown else None,
                fuse_unk=True,
                byte_fallback=TokenKind.BYTE in self.kinds,
            )
        )
        backend.normalizer = self._normalizer()
        if self.prefix == "first":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement=_SPACE, prepend_scheme="first", split=False
            )
        backend.decoder = self._decoder()
        add_tokens(backend, tokens)
        return backend

    def _kind(self, token_id: int) -> int:
        return self.kinds[token_id] if token_id < len(self.kinds) else TokenKind.CONTROL

    def _added(self) -> dict[int, AddedToken]:
        """Pieces that are matched in the text as a whole, before anything else."""
        from tokenizers import AddedToken

        return {
            i: AddedToken(
                piece.replace(_SPACE, " ") if kind == TokenKind.USER_DEFINED else piece,
                normalized=False,
                special=kind != TokenKind.USER_DEFINED,
            )
            for i, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True))
            if kind in (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.USER_DEFINED)
        }

    def _merges(self, without: Container[int]) -> list[tuple[str, str]]:
        """Every way to make a piece of two others, the pieces with the best score first.
        Ids in ``without`` take no part.

        SentencePiece has no merges: it joins the neighbours that make the best piece, leftmost
        first. Ranked pairs do the same except where two ways to make one piece overlap in the
        text, which takes an irregular repetition such as ``a aa a``.
        """
        usable = {
            piece: score
            for i, (piece, score) in enumerate(zip(self.pieces, self.scores, strict=True))
            if self.kinds[i] in (TokenKind.NORMAL, TokenKind.UNUSED) and i not in without
        }
        return [
            (piece[:cut], piece[cut:])
            for piece in sorted(usable, key=usable.__getitem__, reverse=True)
            for cut in range(1, len(piece))
            if piece[:cut] in usable and piece[cut:] in usable
        ]

    def _normalizer(self) -> Any:
        from tokenizers import Regex, normalizers

        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.collapse_spaces:
            steps.append(normalizers.Replace(Regex(r"\A +"), ""))
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if self.prefix == "always":
            steps.append(normalizers.Prepend(_SPACE))
        steps.append(normalizers.Replace(" ", _SPACE))
        if self.collapse_spaces:
            steps.append(normalizers.Replace(Regex(_SPACE + r"+\z"), ""))
        return normalizers.Sequence(steps)

    def _decoder(self) -> Any:
        from tokenizers import decoders

        steps: list[Any] = [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        if self.prefix != "never":
            steps.append(decoders.Strip(" ", 1, 0))
        return decoders.Sequence(steps)


def add_tokens(backend: Backend, tokens: Mapping[int, AddedToken]) -> None:
    """Add special and ordinary tokens to a pipeline."""
    backend.add_special_tokens([token for token in tokens.values() if token.special])
    backend.add_tokens([token for token in tokens.values() if not token.special])


def read_sentencepiece(path: Path) -> SentencePiece:
    """Read the parts of a ``ModelProto`` that matter for encoding."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _protobuf(path.read_bytes()):
            if number == 1:
                piece = dict(_protobuf(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                kinds.append(piece.get(3, TokenKind.NORMAL))
            elif number == 2:
                trainer = dict(_protobuf(value))
            elif number == 3:
                normalizer = dict(_protobuf(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces:
        raise ModelError(f"{path} is not a SentencePiece model; give the model's tokenizer.json")
    if trainer.get(3, 1) != 2 or trainer.get(24, 0) or not normalizer.get(5, 1):
        raise ModelError(
            f"{path} is not a plain SentencePiece BPE model; give the model's tokenizer.json"
        )
    return SentencePiece(
        pieces,
        scores,
        kinds,
        prefix="always" if normalizer.get(3, 1) else "never",
        collapse_spaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
    )


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: (number, value), an int for a varint, else bytes.

    Raises:
        ValueError: the data is not a protobuf message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, len(data) + 1)
        if at + size > len(data):
            raise ValueError("truncated message")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
