"""Local data sets become the rows that lm-eval's tasks read, and damaged ones a clear error."""

from __future__ import annotations

import ast
import bz2
import gzip
import importlib.util
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.errors import RequestError
from kvant.eval.tasks.files import (
    Subsets,
    group_race,
    read_arc_challenge,
    read_arc_easy,
    read_ceval,
    read_gsm8k,
    read_hellaswag,
    read_humaneval,
    read_lambada,
    read_mmlu,
    read_piqa,
    read_race_high,
    read_race_middle,
    read_triviaqa,
    read_winogrande,
)
from kvant.eval.tasks.retrieval import read_essays

DATA = Path(__file__).parents[4] / "shared/data"

Reader = Callable[[Path], Subsets]

READERS: dict[str, Reader] = {
    "arc_challenge": read_arc_challenge,
    "arc_easy": read_arc_easy,
    "ceval": read_ceval,
    "gsm8k": read_gsm8k,
    "hellaswag": read_hellaswag,
    "humaneval": read_humaneval,
    "lambada": read_lambada,
    "mmlu": read_mmlu,
    "piqa": read_piqa,
    "race_high": read_race_high,
    "race_middle": read_race_middle,
    "triviaqa": read_triviaqa,
    "winogrande": read_winogrande,
}


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _arc(key: str, *labels: str) -> dict[str, Any]:
    choices = [{"text": f"choice {label}", "label": label} for label in labels]
    return {"id": "q1", "question": {"stem": "Why?", "choices": choices}, "answerKey": key}


def _race(article: str, question: str, answer: str = "B") -> dict[str, Any]:
    return {
        "example_id": f"{article}.txt",
        "article": f"It's {article}.",
        "answer": answer,
        "question": question,
        "options": ["it's", 'a "b"', "c", "d\n"],
    }


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
CEVAL = "id,question,A,B,C,D,answer"
UNPACKED = {
    "arc/ARC-Easy-Test.jsonl": _lines(_arc("B", "A", "B", "C"), _arc("3", "1", "2", "3", "4")),
    "arc/ARC-Challenge-Test.jsonl": _lines(_arc("E", "A", "B", "C", "D", "E")),
    "ceval/val/logic_val.csv": f'{CEVAL}\r\n0,"一、\r\n二",甲,"乙,丙",丁,戊,D\r\n',
    "ceval/dev/logic_dev.csv": f"{CEVAL},explanation\r\n1,问,甲,乙,丙,丁,A,因为\r\n",
    "gsm8k/test.jsonl": _lines({"question": "1+1?\u2028Say.", "answer": "It is\n#### 2"}),
    "gsm8k/train.jsonl": _lines({"question": "2+2?", "answer": "#### 4"}),
    "hellaswag/hellaswag_val_full.txt": "Roof: A man. he\n3\nends.\nfalls  off.\njumps.\nstays.\n",
    "humaneval/HumanEval.jsonl": _lines(HUMANEVAL),
    "lambada/lambada_test.jsonl": _lines({"text": "\u201cAll of it\u201d is one text"}),
    "mmlu/test/astronomy_test.csv": '"What is ""it""?\nSay.",1,2,"3, or 4",5,C\n',
    "mmlu/dev/astronomy_dev.csv": "Which?,w,x,y,z,A\n",
    "mmlu/README.txt": "not a subject",
    "piqa/valid.jsonl": _lines(*({"goal": g, "sol1": "a", "sol2": "b"} for g in ("to", "fro"))),
    "piqa/valid-labels.lst": "1\n0\n",
    "race/test/high.jsonl": _lines(_race("a", "1?"), _race("a", "2  _  ."), _race("b", "3?", "D")),
    "race/test/middle.jsonl": _lines(_race("c", "4?")),
    "triviaqa/trivia-dev.qa.csv": "Who?\t['A ''s', 'B']\nIs \"it\" so?\t\"['\"\"C\"\"']\"\n",
    "triviaqa/trivia-test.qa.csv": "When?\t['1999']\n",
    "winogrande/dev.jsonl": _lines(
        {"sentence": "So _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    ),
}
ROWS: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "arc_easy": {
        "": {
            "test": [
                {
                    "id": "q1",
                    "question": "Why?",
                    "choices": {"text": [f"choice {x}" for x in labels], "label": list(labels)},
                    "answerKey": key,
                }
                for key, labels in (("B", "ABC"), ("3", "1234"))
            ]
        }
    },
    "ceval": {
        "logic": {
            "val": [
                {"id": 0, "question": "一、\r\n二", "A": "甲", "B": "乙,丙", "C": "丁", "D": "戊"}
                | {"answer": "D", "explanation": ""}
            ],
            "dev": [
                {"id": 1, "question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁"}
                | {"answer": "A", "explanation": "因为"}
            ],
        }
    },
    "gsm8k": {
        "": {
            "test": [{"question": "1+1?\u2028Say.", "answer": "It is\n#### 2"}],
            "train": [{"question": "2+2?", "answer": "#### 4"}],
        }
    },
    "hellaswag": {
        "": {
            "validation": [
                {
                    "query": "Roof: A man. he",
                    "choices": ["ends.", "falls  off.", "jumps.", "stays."],
                    "label": 3,
                }
            ]
        }
    },
    "humaneval": {"": {"test": [HUMANEVAL]}},
    "lambada": {"": {"test": [{"text": "\u201cAll of it\u201d is one text"}]}},
    "mmlu": {
        "astronomy": {
            "test": [
                {"question": 'What is "it"?\nSay.', "subject": "astronomy", "answer": 2}
                | {"choices": ["1", "2", "3, or 4", "5"]}
            ],
            "dev": [
                {"question": "Which?", "subject": "astronomy", "answer": 0}
                | {"choices": ["w", "x", "y", "z"]}
            ],
        }
    },
    "piqa": {
        "": {
            "validation": [
                {"goal": "to", "sol1": "a", "sol2": "b", "label": 1},
                {"goal": "fro", "sol1": "a", "sol2": "b", "label": 0},
            ]
        }
    },
    "triviaqa": {
        "": {
            "validation": [
                {"question": "Who?", "answer": {"aliases": ["A s", "B"], "value": "A s"}},
                {"question": 'Is "it" so?', "answer": {"aliases": ['"C"'], "value": '"C"'}},
            ],
            "train": [{"question": "When?", "answer": {"aliases": ["1999"], "value": "1999"}}],
        }
    },
    "winogrande": {
        "": {
            "validation": [
                {"sentence": "So _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"}
            ]
        }
    },
}


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def _packed(folder: Path, pack: Callable[[bytes], bytes], suffix: str) -> Path:
    """The data in archives, and single files compressed."""
    for task, prefix in (("mmlu", "data/"), ("ceval", "")):
        (folder / task).mkdir()
        with zipfile.ZipFile(folder / task / f"{task}.zip", "w") as archive:
            for name, text in UNPACKED.items():
                if name.startswith(f"{task}/"):
                    archive.writestr(prefix + name.removeprefix(f"{task}/"), text)
    for name, text in UNPACKED.items():
        if not name.startswith(("mmlu/", "ceval/")):
            path = folder / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(text.encode()))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path, UNPACKED)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, data: Path) -> None:
    assert READERS[name](data) == ROWS[name]


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
@pytest.mark.parametrize("name", READERS)
def test_packed_files_are_the_same(
    name: str, pack: Callable[[bytes], bytes], suffix: str, tmp_path: Path
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    _write(plain, UNPACKED)
    packed.mkdir()
    assert READERS[name](_packed(packed, pack, suffix)) == READERS[name](plain)


def test_the_layout_of_opencompass(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "opencompass"
    moved = {n.replace("ceval/", "ceval/formal_ceval/"): text for n, text in UNPACKED.items()}
    _write(other, moved)
    assert read_ceval(other) == read_ceval(data)


def test_race_has_a_row_for_each_article(data: Path) -> None:
    rows = read_race_high(data)[""]["test"]
    assert [row["article"] for row in rows] == ["It's a.", "It's b."]
    first, second = (ast.literal_eval(row["problems"]) for row in rows)
    assert [each["question"] for each in first] == ["1?", "2  _  ."]
    assert second == [
        {"question": "3?", "options": ["it's", 'a "b"', "c", "d\n"], "answer": "D"},
    ]


def test_race_has_one_article_of_an_id(data: Path) -> None:
    rows = [_race("a", "1?"), _race("a", "2?") | {"article": "b"}]
    with pytest.raises(RequestError, match=r"RACE has two different articles of example_id a\.txt"):
        group_race(rows)
    (data / "race/test/high.jsonl").write_text(_lines(*rows))
    with pytest.raises(RequestError, match=r"high\.jsonl has two different articles"):
        read_race_high(data)


# What lm-eval makes of the rows. Its files are read, not imported: that takes seconds.


def _lm_eval() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm_eval is not installed")
    return Path(spec.origin).parent / "tasks"


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("arc_challenge", "arc/arc_easy.yaml"),
        ("arc_easy", "arc/arc_easy.yaml"),
        ("ceval", "ceval/_default_ceval_yaml"),
        ("gsm8k", "gsm8k/gsm8k.yaml"),
        ("humaneval", "humaneval/humaneval.yaml"),
        ("lambada", "lambada/lambada_openai.yaml"),
        ("mmlu", "mmlu/default/_default_template_yaml"),
        ("piqa", "piqa/piqa.yaml"),
        ("triviaqa", "triviaqa/default.yaml"),
    ],
)
def test_rows_have_the_fields_of_lm_evals_templates(name: str, task: str, data: Path) -> None:
    import jinja2
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    config = yaml.load((_lm_eval() / task).read_text(), Loader)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    for splits in READERS[name](data).values():
        for row in (row for rows in splits.values() for row in rows):
            for field in ("doc_to_text", "doc_to_target"):
                template = config[field]
                assert template in row or environment.from_string(template).render(**row).strip()


def test_rows_of_race_are_read_by_lm_eval(data: Path) -> None:
    race = _module(_lm_eval() / "race/preprocess_race.py")
    row = read_race_high(data)[""]["test"][0]
    assert race.doc_to_text(row) == 'Article: It\'s a.\n\nQuestion: 1?\nAnswer: a "b"\n2  _  .'
    assert race.doc_to_choice(row)[race.doc_to_target(row)] == 'a "b"'


def test_rows_of_winogrande_are_read_by_lm_eval(data: Path) -> None:
    winogrande = _module(_lm_eval() / "winogrande/preprocess_winogrande.py")
    row = read_winogrande(data)[""]["validation"][0]
    assert winogrande.doc_to_choice(row)[winogrande.doc_to_text(row)] == "So Bo"


# Damaged data


@pytest.mark.parametrize("name", READERS)
def test_data_that_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        READERS[name](tmp_path)
    message = str(caught.value)
    assert re.match(rf"no data of {name.partition('_')[0]} in .*: expected {name[:3]}", message)
    assert "leave --data out" in message and "\n" not in message


DAMAGED: list[tuple[str, str, str | bytes, str]] = [
    # reader, file, content, what the error says after the file's name
    ("arc_easy", "arc/ARC-Easy-Test.jsonl", _lines(_arc("D", "A", "B")), "line 1: answerKey is"),
    ("arc_easy", "arc/ARC-Easy-Test.jsonl", _lines(_arc("A", "A", "A")), "two choices of one"),
    ("arc_easy", "arc/ARC-Easy-Test.jsonl", _lines(_arc("A")), "line 1: no choices"),
    ("arc_easy", "arc/ARC-Easy-Test.jsonl", _lines({"question": "?"}), "question is missing or no"),
    ("ceval", "ceval/val/logic_val.csv", f"{CEVAL}\r\n0,q,a,b,c,d,E\r\n", 'line 2: answer is "E"'),
    ("ceval", "ceval/val/logic_val.csv", f"{CEVAL}\r\n0,q,a,b,c\r\n", "line 2: 5 columns"),
    ("ceval", "ceval/val/logic_val.csv", f"{CEVAL}\r\nx,q,a,b,c,d,A\r\n", "line 2: id is"),
    ("ceval", "ceval/val/logic_val.csv", f"{CEVAL}\r\n", "has no rows"),
    ("ceval", "ceval/val/logic_val.csv", "id,question\r\n0,q\r\n", "line 2: A is missing"),
    ("gsm8k", "gsm8k/test.jsonl", "", "has no rows"),
    (
        "gsm8k",
        "gsm8k/test.jsonl",
        '{"question": "?", "answer": "2"}\n',
        "line 1: the answer has no",
    ),
    ("gsm8k", "gsm8k/test.jsonl", '{"question": "\\ud800", "answer": "####"}\n', "surrogate"),
    ("gsm8k", "gsm8k/train.jsonl", '{"question": "?"}\n', "line 1: answer is missing"),
    ("gsm8k", "gsm8k/train.jsonl", '{"a": 1}\n{"b"\n', "line 1: answer is missing"),
    ("gsm8k", "gsm8k/train.jsonl", "{\n", "line 1: not JSON: "),
    ("gsm8k", "gsm8k/train.jsonl", "[1]\n", "line 1: not a JSON object"),
    ("gsm8k", "gsm8k/train.jsonl", "[" * 100_000, "line 1: not JSON"),
    ("gsm8k", "gsm8k/test.jsonl", b'{"question": "a"}\n\xff', "line 2: not UTF-8"),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt", "q\n3\na\nb\nc\n", "5 lines, no multiple"),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt", "q\n4\na\nb\nc\nd\n", 'label is "4"'),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt", "q\n1\na\n\nc\nd\n", "line 1: 1 is empty"),
    ("humaneval", "humaneval/HumanEval.jsonl", _lines(HUMANEVAL | {"entry_point": "a()"}), "entry"),
    ("lambada", "lambada/lambada_test.jsonl", _lines({"text": "one"}), "one word only"),
    ("lambada", "lambada/lambada_test.jsonl", '{"text": 3}', "line 1: text is missing or no text"),
    ("mmlu", "mmlu/dev/astronomy_dev.csv", "q,a,b,c,d,A\n\nq,a,b,c,d,B\n", "line 2: 0 columns"),
    ("mmlu", "mmlu/dev/astronomy_dev.csv", "q,a,b,c,d,A\nq,a,b,c,d,e\n", 'line 2: answer is "e"'),
    ("mmlu", "mmlu/dev/astronomy_dev.csv", 'q,a,b,c,d,A\n"q,a,b,c,d,B\n', "line 2: unexpected end"),
    ("mmlu", "mmlu/dev/astronomy_dev.csv", "", "has no rows"),
    ("piqa", "piqa/valid-labels.lst", "1\n", "1 labels for the 2 questions"),
    ("piqa", "piqa/valid-labels.lst", "1\n01\n", 'line 2: label is "01"'),
    ("race_high", "race/test/high.jsonl", _lines(_race("a", "1", "E")), 'answer is "E"'),
    ("race_high", "race/test/high.jsonl", _lines(_race("a", "1") | {"options": ["x"]}), "4 texts"),
    ("triviaqa", "triviaqa/trivia-dev.qa.csv", "Who? ['A']\n", "line 1: 1 columns"),
    ("triviaqa", "triviaqa/trivia-dev.qa.csv", "Who?\topen('x')\n", "no Python list"),
    ("triviaqa", "triviaqa/trivia-dev.qa.csv", "Who?\t[]\n", "list of some texts"),
    ("triviaqa", "triviaqa/trivia-dev.qa.csv", "Who?\t['a', 1]\n", r"aliases\[1\] is missing"),
    (
        "winogrande",
        "winogrande/dev.jsonl",
        _lines({"sentence": "So.", "option1": "a", "option2": "b", "answer": "1"}),
        "no _ to be filled",
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), DAMAGED)
def test_damaged_rows(name: str, file: str, content: str | bytes, message: str, data: Path) -> None:
    (data / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RequestError, match=message) as caught:
        READERS[name](data)
    assert str(data / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
def test_damaged_archives_of_one_file(
    pack: Callable[[bytes], bytes], suffix: str, data: Path
) -> None:
    path = data / "winogrande/dev.jsonl"
    whole = pack(path.read_bytes())
    path.unlink()
    packed = path.with_name(path.name + suffix)
    for broken in (whole[: len(whole) // 2], b"no archive", whole[:-6] + b"\0\1\2\3\4\5"):
        packed.write_bytes(broken)
        with pytest.raises(RequestError, match=f"cannot read .*dev.jsonl{suffix}: "):
            read_winogrande(data)


def test_damaged_archives_of_many_files(data: Path) -> None:
    path = data / "mmlu/mmlu.zip"
    path.write_bytes(b"no archive")
    with pytest.raises(RequestError, match=r"cannot read .*mmlu\.zip: "):
        read_mmlu(data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("elsewhere/a_test.csv", "q,a,b,c,d,A\n")
    with pytest.raises(RequestError, match=r"mmlu\.zip has no files test/SUBJECT_test\.csv"):
        read_mmlu(data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/test/law_test.csv", "q,a,b,c,d,A\n" * 9)
        archive.writestr("data/dev/law_dev.csv", "q,a,b,c,d,A\n")
    path.write_bytes(path.read_bytes().replace(b"q,a", b"q,b", 1))  # its checksum is another now
    with pytest.raises(RequestError, match=r"cannot read data/(dev|test)/law.*mmlu\.zip: Bad CRC"):
        read_mmlu(data)


def test_an_archive_names_the_member_of_an_error(data: Path) -> None:
    with zipfile.ZipFile(data / "ceval/ceval.zip", "w") as archive:
        archive.writestr("val/law_val.csv", f"{CEVAL}\n0,q,a,b,c,d,A\n")
        archive.writestr("dev/law_dev.csv", f"{CEVAL}\n0,q,a,b,c,d,A\n1,q,a,b,c,d,\n")
    with pytest.raises(
        RequestError, match=r"ceval\.zip: dev/law_dev\.csv, line 3: answer is empty"
    ):
        read_ceval(data)


def test_a_subject_needs_all_splits(data: Path) -> None:
    (data / "mmlu/dev/astronomy_dev.csv").rename(data / "mmlu/dev/law_dev.csv")
    with pytest.raises(RequestError, match=r"has no (law_test|astronomy_dev)\.csv beside it"):
        read_mmlu(data)


# The data sets as they were published


@pytest.mark.skipif(not DATA.exists(), reason=f"the data sets are not in {DATA}")
@pytest.mark.parametrize(
    ("name", "subsets", "sizes"),
    [
        ("arc_challenge", 1, {"test": 1172}),
        ("arc_easy", 1, {"test": 2376}),
        ("ceval", 52, {"val": 1346, "dev": 260}),
        ("gsm8k", 1, {"test": 1319, "train": 7473}),
        ("hellaswag", 1, {"validation": 10042}),
        ("humaneval", 1, {"test": 164}),
        ("lambada", 1, {"test": 5153}),
        ("mmlu", 57, {"test": 14042, "dev": 285}),
        ("piqa", 1, {"validation": 1838}),
        ("race_high", 1, {"test": 1045}),
        ("race_middle", 1, {"test": 362}),
        ("triviaqa", 1, {"validation": 8837, "train": 11313}),
        ("winogrande", 1, {"validation": 1267}),
    ],
)
def test_published_sizes(name: str, subsets: int, sizes: dict[str, int]) -> None:
    found = READERS[name](DATA)
    assert len(found) == subsets
    assert {split: sum(len(s[split]) for s in found.values()) for split in sizes} == sizes
    assert all(set(splits) == set(sizes) for splits in found.values())


@pytest.mark.skipif(not DATA.exists(), reason=f"the data sets are not in {DATA}")
def test_all_questions_of_race_are_kept() -> None:
    for read, questions in ((read_race_middle, 1436), (read_race_high, 3498)):
        rows = read(DATA)[""]["test"]
        assert sum(len(ast.literal_eval(row["problems"])) for row in rows) == questions


@pytest.mark.skipif(not DATA.exists(), reason=f"the data sets are not in {DATA}")
def test_subjects_are_those_of_lm_eval() -> None:
    tasks = _lm_eval()
    mmlu = {
        path.stem.removeprefix("mmlu_") for path in (tasks / "mmlu/default").glob("mmlu_*.yaml")
    }
    ceval = {p.stem.removeprefix("ceval-valid_") for p in (tasks / "ceval").glob("ceval-*.yaml")}
    assert set(read_mmlu(DATA)) == mmlu and set(read_ceval(DATA)) == ceval


@pytest.mark.skipif(not DATA.exists(), reason=f"the data sets are not in {DATA}")
def test_published_essays() -> None:
    assert 640_000 < len(read_essays(DATA)) < 650_000


def test_essays(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no data of needle in .*PaulGrahamEssays\.zip"):
        read_essays(tmp_path)
    _write(tmp_path, {f"needle/PaulGrahamEssays/{n}.txt": f"Essay {n}.\n" for n in "ba"})
    unpacked = read_essays(tmp_path)
    assert unpacked == "Essay a.\n\nEssay b."
    with zipfile.ZipFile(tmp_path / "needle/PaulGrahamEssays.zip", "w") as archive:
        for n in "ab":
            archive.writestr(f"PaulGrahamEssays/{n}.txt", f"Essay {n}.\n")
    assert read_essays(tmp_path) == unpacked
