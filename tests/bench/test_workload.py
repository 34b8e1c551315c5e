from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvant.bench.workload import Dataset, Random, ShareGPT, Trace, Vocabulary, Words, Work
from kvant.errors import ConfigError, RequestError
from kvant.loading.tokenizer import Tokenizer
from tests.byte_model import VOCAB

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023,396,109\n"
VIDUR = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.9\n7,1,8,7\n"
)


@pytest.fixture(scope="module")
def vocabulary(tiny: str) -> Vocabulary:
    """One byte is one token; 256 and 257 are special."""
    return Vocabulary(Tokenizer.from_folder(Path(tiny)), VOCAB)


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def conversations(*turns: tuple[str, ...]) -> str:
    who = ("human", "gpt")
    return json.dumps(
        [
            {"conversations": [{"from": who[i % 2], "value": x} for i, x in enumerate(each)]}
            for each in turns
        ]
    )


def lengths(work: list[Work]) -> list[tuple[int, int]]:
    return [(len(prompt), output) for prompt, output in work]


def test_random_lengths_are_exact_or_in_their_range(vocabulary: Vocabulary) -> None:
    work = Random(input_len=30, output_len=7).draw(20, vocabulary, 0)
    assert lengths(work) == [(30, 7)] * 20
    assert all(0 <= token < 256 for prompt, _ in work for token in prompt)  # nothing special
    some = lengths(Random(input_len=30, output_len=8, range_ratio=0.5).draw(300, vocabulary, 0))
    assert {length for length, _ in some} == set(range(15, 31))
    assert {output for _, output in some} == set(range(4, 9))
    none = lengths(Random(input_len=3, output_len=3, range_ratio=0).draw(100, vocabulary, 0))
    assert {length for length, _ in none} == {1, 2, 3}


@pytest.mark.parametrize("kind", ("random", "sharegpt", "trace"))
def test_a_seed_decides_everything(vocabulary: Vocabulary, tmp_path: Path, kind: str) -> None:
    questions = [(f"question {number}" * (1 + number % 7), "an answer") for number in range(50)]
    sets: dict[str, Dataset] = {
        "random": Random(input_len=9, range_ratio=0.2),
        "sharegpt": ShareGPT(write(tmp_path / "a.json", conversations(*questions))),
        "trace": Trace(
            write(tmp_path / "a.csv", AZURE + "".join(f"x,{n},9\n" for n in range(1, 50)))
        ),
    }
    first, again, other = (sets[kind].draw(10, vocabulary, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_sharegpt_takes_the_first_question_and_the_length_of_its_answer(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    turns: list[dict[str, Any]] = [
        {"from": "system", "value": "you are"},
        {"from": "human", "value": "hello there"},
        {"from": "gpt", "value": "answer"},
        {"from": "human", "value": "more"},
    ]
    path = write(tmp_path / "a.json.gz", json.dumps([{"id": "x", "conversations": turns}]))
    ((prompt, output),) = ShareGPT(path).draw(1, vocabulary, 0)
    assert (vocabulary.tokenizer.decode(prompt), output) == ("hello there", len("answer"))
    ((_, output),) = ShareGPT(path, output_len=50).draw(1, vocabulary, 0)
    assert output == 50


def test_sharegpt_keeps_what_lmdeploy_keeps(vocabulary: Vocabulary, tmp_path: Path) -> None:
    kept = [(4, 4), (1024, 1024), (1000, 1048)]
    dropped = [(3, 9), (9, 3), (1025, 9), (1024, 1025), (0, 9)]
    pairs = [("q" * asked, "a" * said) for asked, said in kept + dropped]
    path = write(tmp_path / "a.json", conversations(*pairs, ("no answer",), ()))
    assert sorted(lengths(ShareGPT(path).draw(3, vocabulary, 0))) == sorted(kept)
    with pytest.raises(ConfigError, match=r"has 3 questions .* num_prompts=4; lower it"):
        ShareGPT(path).draw(4, vocabulary, 0)
    longer = ShareGPT(path, max_input_len=2000, max_output_len=9)
    assert sorted(lengths(longer.draw(2, vocabulary, 0))) == [(4, 4), (1025, 9)]
    without = ShareGPT(path, output_len=8)  # answers are not needed then
    assert (9, 8) in lengths(without.draw(6, vocabulary, 0))


def test_a_file_without_answers_needs_a_length(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", conversations(("a question",), ("another",)))
    with pytest.raises(ConfigError, match="no answers whose lengths to take; give output_len"):
        ShareGPT(path)
    work = ShareGPT(path, output_len=5).draw(2, vocabulary, 0)
    assert sorted(lengths(work)) == [(7, 5), (10, 5)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    (
        ("a.csv", AZURE, [(374, 44), (396, 109)]),
        ("a.csv.gz", VIDUR, [(3772, 54), (7, 1)]),
        ("a.jsonl", '{"input_length": 5, "output_length": 6, "timestamp": 0}\n', [(5, 6)]),
    ),
)
def test_traces(
    vocabulary: Vocabulary, tmp_path: Path, name: str, text: str, expected: list[tuple[int, int]]
) -> None:
    trace = Trace(write(tmp_path / name, text))
    work = trace.draw(len(expected), vocabulary, 0)
    assert lengths(work) == expected
    assert all(0 <= token < 256 for prompt, _ in work for token in prompt)
    with pytest.raises(ConfigError, match=f"has {len(expected)} requests, and num_prompts=9"):
        trace.draw(9, vocabulary, 0)


def test_lengths_of_a_trace_are_cut(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", AZURE + "x,9,3\n")
    work = Trace(path, max_input_len=380, max_output_len=50).draw(3, vocabulary, 0)
    assert lengths(work) == [(374, 44), (380, 50), (9, 3)]


def test_requests_share_the_blocks_that_they_shared_in_the_log(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    rows = [(1100, [7, 8, 9]), (1536, [7, 8, 11]), (600, [7, 12]), (512, [13])]
    text = "".join(
        json.dumps({"input_length": n, "output_length": 1, "hash_ids": ids}) + "\n"
        for n, ids in rows
    )
    trace = Trace(write(tmp_path / "a.jsonl", text))
    a, b, c, d = (prompt for prompt, _ in trace.draw(4, vocabulary, 0))
    assert [len(prompt) for prompt in (a, b, c, d)] == [n for n, _ in rows]
    assert a[:1024] == b[:1024] and a[:512] == c[:512]
    assert a[1024:] != b[1024:1100] and a[512:600] != c[512:] and a[:512] != d
    consecutive = [(n, 1) for n, _ in rows]
    for seed in range(9):  # neighbours stay neighbours
        pair = lengths(trace.draw(2, vocabulary, seed))
        assert pair in [consecutive[start : start + 2] for start in range(3)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    (
        ("a.txt", "", "must end in .csv or .jsonl"),
        ("a.csv", "a,b\n1,2\n", "no columns ContextTokens and GeneratedTokens or num_prefill"),
        ("a.csv", "", "no columns"),
        ("a.csv", "ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a.csv", "ContextTokens,GeneratedTokens\n1,2\n3\n", "line 3: GeneratedTokens=None"),
        ("a.csv", "ContextTokens,GeneratedTokens\nx,2\n", "line 2: ContextTokens='x' must be"),
        ("a.csv", "ContextTokens,GeneratedTokens\n5,0\n", "GeneratedTokens='0' must be"),
        ("a.jsonl", "{\n", "line 1, is not JSON"),
        ("a.jsonl", "[1]\n", "line 1, is no object"),
        ("a.jsonl", '{"input_length": 5}\n', "line 1: output_length=None must be"),
        ("a.jsonl", '{"input_length": 1.5, "output_length": 1}\n', "input_length=1.5 must be"),
        (
            "a.jsonl",
            '{"input_length": 600, "output_length": 1, "hash_ids": [1]}\n',
            "hash_ids must be 2 whole numbers",
        ),
        (
            "a.jsonl",
            '{"input_length": 6, "output_length": 1, "hash_ids": ["a"]}\n',
            "hash_ids must be 1 whole number",
        ),
    ),
)
def test_traces_that_are_none(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("(", r"\(")) as caught:
        Trace(write(tmp_path / name, text))
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("{", "not valid JSON"),
        ('{"a": 1}', "no list of conversations"),
        ('["a"]', "entry 0: not"),
        ('[{"id": 1}]', "entry 0: not"),
        ('[{"conversations": []}, {"conversations": [{"from": "human"}]}]', "entry 1: not"),
    ),
)
def test_conversations_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ShareGPT(write(tmp_path / "a.json", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "no.csv", tmp_path / "no.jsonl"):
        with pytest.raises(RequestError, match="cannot read the data set"):
            Trace(path)
    (tmp_path / "a.csv.gz").write_bytes(b"not compressed")
    with pytest.raises(RequestError, match="cannot read the data set"):
        Trace(tmp_path / "a.csv.gz")
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="cannot read the data set"):
        ShareGPT(tmp_path / "a.json")


def test_numbers_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="input_len=0 must be at least 1"):
        Random(input_len=0)
    with pytest.raises(ConfigError, match=r"range_ratio=1.5 must be from 0 to 1"):
        Random(range_ratio=1.5)
    with pytest.raises(ConfigError, match="max_output_len=-1"):
        Trace(write(tmp_path / "a.csv", AZURE), max_output_len=-1)
    with pytest.raises(ConfigError, match="output_len=0"):
        ShareGPT(tmp_path / "none.json", output_len=0)


def test_arrivals_of_a_trace_are_those_of_the_requests_drawn(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    stamps = ["2023-11-16 18:15:46.5000000", "2023-11-16 18:15:46.7500000", "2023-11-16 18:16:00",
              "2023-11-17 00:00:00"]  # fmt: skip
    rows = "".join(f"{stamp},{9 + number},2\n" for number, stamp in enumerate(stamps))
    path = write(tmp_path / "a.csv", f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    seconds = [0, 0.25, 13.5, 20653.5]
    trace = Trace(path, consecutive=True)
    assert trace.arrivals(4, 0) == seconds
    for seed in range(9):
        first = lengths(trace.draw(2, vocabulary, seed))[0][0] - 9
        assert lengths(trace.draw(2, vocabulary, seed)) == [(9 + first, 2), (10 + first, 2)]
        assert trace.arrivals(2, seed) == [0, seconds[first + 1] - seconds[first]]


def test_milliseconds_of_a_trace(tmp_path: Path) -> None:
    rows = [{"timestamp": at, "input_length": 5, "output_length": 1} for at in (500, 500, 3500.5)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert Trace(path, consecutive=True).arrivals(3, 0) == [0, 0, 3.0005]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    (
        ("a.csv", VIDUR, "the time stamp None is no date"),
        ("a.csv", AZURE, "the time stamp '2023' is no date"),
        ("a.jsonl", '{"timestamp": true, "input_length": 5, "output_length": 6}\n', "True"),
        (
            "a.jsonl",
            '{"timestamp": 2, "input_length": 5, "output_length": 6}\n'
            '{"timestamp": 1, "input_length": 5, "output_length": 6}\n',
            "go backwards",
        ),
    ),
)
def test_traces_without_times(tmp_path: Path, name: str, text: str, said: str) -> None:
    trace = Trace(write(tmp_path / name, text), consecutive=True)
    count = text.count("\n") - (name == "a.csv")
    with pytest.raises(RequestError, match=said):
        trace.arrivals(count, 0)


def test_prompts_that_are_sent_as_text_keep_their_lengths(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    tokenizer = vocabulary.tokenizer
    spelled = Vocabulary(tokenizer, VOCAB, as_text=True)
    trace = Trace(write(tmp_path / "a.csv", AZURE))
    for dataset in (Random(input_len=50), trace):
        for prompt, _ in dataset.draw(2, spelled, 0):
            text = tokenizer.decode(prompt)
            assert text.isalpha() and tokenizer.encode(text, add_special=False) == prompt


def test_tokens_with_a_space_are_preferred() -> None:
    texts = (" a", "b", " Cd", "1", " é", "<s>", " e ")

    class Codec(Words):
        vocab_size, special_ids = len(texts), frozenset({5})

        def token_text(self, token_id: int) -> str:
            return texts[token_id]

    ids = Vocabulary(Codec(), 99, as_text=True).ordinary()
    assert [texts[token] for token in ids] == [" a", " e "]


def test_words_without_a_tokenizer() -> None:
    words = Words()
    ((prompt, output),) = Random(input_len=30, output_len=2).draw(
        1, Vocabulary(words, words.vocab_size), 0
    )
    text = words.decode(prompt)
    assert len(text.split()) == 30 and text.replace(" ", "").isalpha() and output == 2
    with pytest.raises(ConfigError, match="give a tokenizer"):
        words.encode(text)
