"""Text to token ids and back, from a Hugging Face folder, a SentencePiece model or GGUF metadata.

All three end in one :class:`Tokenizer`: a ``tokenizers`` pipeline, which ids mark the beginning
and the end of a text, and the chat template. Importing this module is cheap: ``tokenizers`` is
imported when the first tokenizer is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvant.errors import ModelError, RequestError, did_you_mean
from kvant.loading.chat import ChatTemplate
from kvant.loading.sentencepiece import (
    SentencePiece,
    TokenKind,
    add_tokens,
    read_sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

__all__ = ["Tokenizer"]

T = TypeVar("T")

_MANY_TOKENS = 1024


class Tokenizer:
    """One model's tokenizer. Threads may share it.

    ``vocab_size`` counts added tokens (a model's logits may be wider); no token stands for more
    than ``longest_token`` characters. ``lead`` and ``trail`` are the ids that :meth:`encode` puts
    before and after a text. ``eos_ids`` are all the ids that end an output; ``chat`` is None when
    the model has no chat template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        lead: Sequence[int] = (),
        trail: Sequence[int] = (),
        chat: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._texts: dict[int, str] = {}  # remembered by token_text
        vocabulary = backend.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.longest_token = max(map(len, vocabulary), default=0)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.lead = tuple(lead)
        self.trail = tuple(trail)
        self.chat = chat

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of ``text``. The text of a special token in it becomes that token, always;
        ``add_special`` says whether the model's BOS and EOS, if it wants any, are added around.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            # As a batch: that alone lets other threads run meanwhile.
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
            ids: list[int] = encoding.ids
        except TypeError:
            raise RequestError(
                "the text holds an unpaired surrogate (U+D800 to U+DFFF); send valid Unicode"
            ) from None
        return [*self.lead, *ids, *self.trail] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary,
        which padded models can produce, become nothing."""
        if len(ids) > _MANY_TOKENS:  # as a batch: that lets other threads run meanwhile
            (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special)
            return str(text)
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def to_json(self) -> str:
        """The pipeline as the text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def is_special(self, text: str) -> bool:
        """Whether ``text`` is exactly one special token."""
        return self._backend.token_to_id(text) in self.special_ids

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text that goes before it (a leading space included)."""
        if token_id not in self._texts:
            alone = self.decode([token_id], skip_special=False)
            both = self.decode([token_id, token_id], skip_special=False)
            self._texts[token_id] = both[len(alone) :]
        return self._texts[token_id]

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json``, or else ``tokenizer.model``, and the files beside it.

        What the post-processor of a ``tokenizer.json`` adds to a text stays; ``add_bos_token``
        and ``add_eos_token`` of the config can only add to it.

        Raises:
            ModelError: there is neither, or a file is damaged or of an unsupported kind.
        """
        folder = _Folder(path)
        if (path / "tokenizer.json").is_file():
            backend, lead, trail = _from_json(path / "tokenizer.json")
            add_bos, bos, eos = folder.config.get("add_bos_token"), "", ""
        elif (path / "tokenizer.model").is_file():
            backend, lead, trail = folder.sentencepiece(), [], []
            add_bos, bos, eos = folder.config.get("add_bos_token", True), "<s>", "</s>"
        else:
            raise ModelError(
                f"{path} has no tokenizer.json and no tokenizer.model; "
                "copy the model's tokenizer files there"
            )
        bos, eos = folder.special("bos_token") or bos, folder.special("eos_token") or eos
        _make_special(backend, [token for token in (bos, eos) if token])
        bos_id, eos_id = backend.token_to_id(bos), backend.token_to_id(eos)
        if add_bos and bos_id is not None and bos_id not in lead:
            lead = [bos_id, *lead]
        if folder.config.get("add_eos_token") and eos_id is not None and eos_id not in trail:
            trail = [*trail, eos_id]
        chat = folder.chat_template()
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=([] if eos_id is None else [eos_id]) + folder.eos_ids(),
            lead=lead,
            trail=trail,
            chat=ChatTemplate(chat, bos, eos) if chat else None,
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, object]) -> Tokenizer:
        """Build from decoded GGUF metadata (keys ``tokenizer.*``; other keys are ignored).

        Raises:
            ModelError: a key is missing or malformed, or the kind of tokenizer is not supported.
        """
        gguf = _GGUFFields(fields)
        kind = gguf.get("model", str)
        if kind == "llama":
            backend, add_bos = _sentencepiece_of(gguf).build({}), True
            bos_id, eos_id = gguf.token_id("bos", 1), gguf.token_id("eos", 2)
        elif kind == "gpt2":
            split = _split_of(gguf.get("pre", str, "default"))
            backend, add_bos = _byte_level(gguf, split), split.add_bos
            bos_id, eos_id = gguf.token_id("bos"), gguf.token_id("eos")
        else:
            raise ModelError(
                f'GGUF tokenizer model "{kind}" is not supported; kvant knows "llama" and "gpt2"'
            )
        ends = [eos_id, gguf.token_id("eot"), gguf.token_id("eom")]
        leads = [bos_id] if gguf.get("add_bos_token", bool, add_bos) else []
        trails = [eos_id] if gguf.get("add_eos_token", bool, False) else []
        chat = fields.get("tokenizer.chat_template")
        texts = ["" if i is None else gguf.tokens[i] for i in (bos_id, eos_id)]
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=[i for i in ends if i is not None],
            lead=[i for i in leads if i is not None],
            trail=[i for i in trails if i is not None],
            chat=ChatTemplate(chat, *texts) if isinstance(chat, str) else None,
        )


def _make_special(backend: Backend, tokens: Sequence[str]) -> None:
    """Have the texts of ``tokens`` that are in the vocabulary read as special tokens."""
    from tokenizers import AddedToken

    known = [token for token in tokens if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in known])


# ------------------------------------------------------------------ a folder in Hugging Face form


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not an object; download it again")
    return found


def _from_json(path: Path) -> tuple[Backend, list[int], list[int]]:
    """The pipeline, and the ids that its post-processor puts before and after a text."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} cannot be read ({reason}); download it again") from None
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a").ids
    for start in range(len(full) - len(bare) + 1):
        end = start + len(bare)
        if full[start:end] == bare:
            return backend, full[:start], full[end:]
    return backend, [], []


class _Folder:
    """The files beside the vocabulary of a model in Hugging Face form."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = _read_json(path / "tokenizer_config.json")
        self._special = _read_json(path / "special_tokens_map.json")

    def special(self, name: str) -> str:
        """The text of a named special token, or an empty string."""
        found = self.config.get(name) or self._special.get(name)
        if isinstance(found, Mapping):
            found = found.get("content")
        return found if isinstance(found, str) else ""

    def eos_ids(self) -> list[int]:
        """The ids that end a generation; the model's config says it where nothing else does."""
        path = self._path / "generation_config.json"
        found = _read_json(path if path.is_file() else self._path / "config.json")
        ids = found.get("eos_token_id")
        return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]

    def chat_template(self) -> str | None:
        """The default chat template; a file of its own goes before one in the config."""
        path = self._path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = self.config.get("chat_template")
        if isinstance(found, list):
            named = [each for each in found if isinstance(each, Mapping)]
            found = {each.get("name"): each.get("template") for each in named}.get("default")
        return found if isinstance(found, str) else None

    def sentencepiece(self) -> Backend:
        """Build from ``tokenizer.model``, with the tokens that the config adds to it."""
        model = read_sentencepiece(self._path / "tokenizer.model")
        prefix = self.config.get("add_prefix_space")
        if model.prefix == "never" if prefix is None else not prefix:
            model = replace(model, prefix="never")
        else:  # "legacy" is transformers' name for SentencePiece's own behaviour
            legacy = self.config.get("legacy", True)
            model = replace(model, prefix="first" if legacy is False else "always")
        try:
            added = self._added_tokens()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModelError(
                f"{self._path} has a tokenizer_config.json with a malformed added_tokens_decoder; "
                "download it again"
            ) from None
        return model.build(added)

    def _added_tokens(self) -> dict[int, AddedToken]:
        from tokenizers import AddedToken

        return {
            int(token_id): AddedToken(
                token["content"],
                lstrip=token.get("lstrip", False),
                rstrip=token.get("rstrip", False),
                single_word=token.get("single_word", False),
                normalized=False,
                special=token.get("special", False),
            )
            for token_id, token in self.config.get("added_tokens_decoder", {}).items()
        }


# ------------------------------------------------------------------------------------------ GGUF


class _GGUFFields:
    """Checked access to the keys ``tokenizer.ggml.*``."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields
        self.tokens: list[str] = self.get("tokens", list)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key. Raises ModelError if it is missing or not a ``kind``."""
        key = f"tokenizer.ggml.{name}"
        found = self._fields.get(key, default)
        if found is None:
            raise ModelError(f'the GGUF file has no "{key}"; convert the model again')
        if not isinstance(found, kind):
            raise ModelError(
                f'"{key}" of the GGUF file is a {type(found).__name__}, not a {kind.__name__}; '
                "convert the model again"
            )
        return found

    def kinds(self) -> list[int]:
        """The type of every token."""
        return self.per_token("token_type", [TokenKind.NORMAL] * len(self.tokens))

    def per_token(self, name: str, default: list[T] | None = None) -> list[T]:
        """A list with one value for every token."""
        found: list[T] = self.get(name, list, default)
        if len(found) != len(self.tokens):
            raise ModelError(
                f"the GGUF file has {len(self.tokens)} tokens but {len(found)} of "
                f'"tokenizer.ggml.{name}"; convert the model again'
            )
        return found

    def token_id(self, name: str, default: int | None = None) -> int | None:
        """The id of a named special token, None if the file names none."""
        found = self._fields.get(f"tokenizer.ggml.{name}_token_id", default)
        if found is None:
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise ModelError(
                f"the GGUF file's {name}_token_id {found} is not one of its {len(self.tokens)} "
                "tokens; convert the model again"
            )
        return found


def _sentencepiece_of(gguf: _GGUFFields) -> SentencePiece:
    return SentencePiece(
        gguf.tokens,
        gguf.per_token("scores"),
        gguf.kinds(),
        prefix="always" if gguf.get("add_space_prefix", bool, True) else "never",
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """How text is cut into words before byte-level BPE, and what goes with it.

    ``pattern`` None is GPT-2's; ``digits`` cuts every digit out first. With ``whole_words`` a
    word that is a token is not built by merges.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos=True,
)
_QWEN2 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
)
_SPLITS = {
    "default": _Split(),
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": replace(_QWEN2, nfc=False),
}


def _split_of(name: str) -> _Split:
    if name not in _SPLITS:
        raise ModelError(
            f'GGUF pre-tokenizer "{name}" is not supported; kvant knows {", ".join(_SPLITS)}'
            + did_you_mean(name, _SPLITS)
        )
    return _SPLITS[name]


def _byte_level(gguf: _GGUFFields, split: _Split) -> Backend:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    merges = [tuple(merge.split(" ", 1)) for merge in gguf.get("merges", list)]
    vocab = {token: i for i, token in enumerate(gguf.tokens)}
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    except Exception as error:  # tokenizers raises nothing more specific
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the GGUF file's merges are damaged ({reason}); download it again"
        ) from None
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    tokens = {
        i: AddedToken(token, normalized=False, special=kind == TokenKind.CONTROL)
        for i, (token, kind) in enumerate(zip(gguf.tokens, gguf.kinds(), strict=True))
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED)
    }
    add_tokens(backend, tokens)
    return backend
