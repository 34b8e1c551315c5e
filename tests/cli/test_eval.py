from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, finish, start

SMALL = ("--ctx", "64", "--windows", "2", "--greedy", "4")
KEYS = [
    "kv_spec", "ctx", "windows", "positions", "bits_per_element", "bytes_per_token", "ppl",
    "dppl_percent", "kld", "kld_stderr", "kld_p99", "kld_p999", "top1_percent", "greedy",
    "k_sqnr_db", "v_sqnr_db", "worst_layers",
]  # fmt: skip
GREEDY = ["tokens", "first_diverging", "q25", "median", "q75", "same_percent"]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("kvant.engine.load.load_weights", read)


def fidelity(run: Run, tiny: str, *words: str) -> dict[str, Any]:
    done = run("eval", "fidelity", tiny, *SMALL, "--json", *words)
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_json_is_all_there_is_on_stdout(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a b c d e f g " * 40)
    words = ("--kv", "int8,k=int8h,v=int4h+r64,int4", "--text", str(tmp_path / "t.txt"))
    done = run("eval", "fidelity", tiny, *SMALL, *words, "--json", "--output", tmp_path / "o.json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "o.json").read_text())
    assert set(found["machine"]) == {"cpu", "cores", "isa", "python", "versions", "date"}
    assert found["model"] == tiny and found["dtype"] == "float32" and found["baseline"] == "f32"
    assert found["text"]["source"] == str(tmp_path / "t.txt")
    assert found["text"]["characters"] == 560 and len(found["text"]["sha256"]) == 64
    rows = found["results"]
    assert [row["kv_spec"] for row in rows] == ["f32", "int8", "k=int8h,v=int4h+r64", "int4"]
    assert all(list(row) == KEYS and list(row["greedy"]) == GREEDY for row in rows)
    assert rows[0]["kld"] == 0 and rows[0]["k_sqnr_db"] == [None, None]
    assert all(row["kld"] > 0 and len(row["worst_layers"]) == 3 for row in rows[1:])
    assert list(rows[1]["worst_layers"][0]) == ["layer", "side", "sqnr_db"]


def test_the_default_text_is_named(run: Run, tiny: str) -> None:
    done = run("eval", "fidelity", tiny, *SMALL, "--json", "--kv", "int8")
    assert json.loads(done.out)["text"]["source"] == "pydoc_data.topics"
    assert "pydoc_data.topics" in done.err and done.err.count("\n") == 1


def test_less_text_than_asked_for_is_said(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 150)
    words = ("--text", str(tmp_path / "t.txt"), "--windows", "9", "--kv", "int8", "--json")
    done = run("eval", "fidelity", tiny, *SMALL, *words)
    assert "2 of 9 windows of 64 tokens" in done.err
    assert [row["windows"] for row in json.loads(done.out)["results"]] == [2, 2]


def test_options_reach_the_engine(run: Run, tiny: str) -> None:
    words = ("--baseline", "bf16", "--dtype", "bfloat16", "--kv", "int8,bf16", "--num-threads", "1")
    found = fidelity(run, tiny, *words, "--ctx", "64,128", "--max-prefill-token-num", "50")
    assert found["dtype"] == "bfloat16" and found["baseline"] == "bf16"
    rows = [(row["ctx"], row["kv_spec"], row["positions"]) for row in found["results"]]
    assert rows == [(64, "bf16", 128), (64, "int8", 128), (128, "bf16", 256), (128, "int8", 256)]


def test_the_table(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"hello"\n{"prompt": "there"}\n["no"]\n')
    words = ("--kv", "int8,int4", "--ctx", "64,128", "--plot", str(tmp_path / "a.png"))
    prompts = ("--prompts", str(tmp_path / "p.jsonl"))
    run("eval", "fidelity", tiny, *words, *prompts).assert_error(2, "line 3 is no prompt")
    (tmp_path / "p.jsonl").write_text('"hello"\n{"prompt": "there"}\n"you"\n')
    done = run("eval", "fidelity", tiny, *SMALL, *words, *prompts)
    assert done.code == 0
    assert "2 x 64 tokens, against f32; greedy: 3 x 4 tokens" in done.out
    assert done.out.count("+0.00 %") == 2 and done.out.count("\nint4  ") == 4
    assert "K of layer" in done.out and "dB" in done.out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "greedy" not in run("eval", "fidelity", tiny, *SMALL, *words, "--greedy", "0").out


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--kv", "int8,int3"), "int3"),
        (("--kv", "int8,"), "empty entry"),
        (("--baseline", "f33"), "f33"),
        (("--dtype", "float8"), "float8"),
        (("--ctx", "many"), '--ctx "many" must be whole numbers'),
        (("--ctx", "64,"), "must be whole numbers"),
        (("--ctx", "0"), "ctx=0 must be from 64 to 16384"),
        (("--ctx", "128,20000"), "ctx=20000 must be from 64 to 16384"),
        (("--windows", "0"), "windows=0"),
        (("--windows", "some"), "--windows"),
        (("--greedy", "-1"), "greedy=-1"),
        (("--greedy", "16383"), "lower greedy"),
        (("--text", "no-such-file"), "cannot read the text no-such-file"),
        (("--text", "."), "cannot read the text"),
        (("--text", sys.executable), "cannot read the text"),
        (("--prompts", "no-such-file"), "cannot read prompts from no-such-file"),
        (("--output", "."), "--output . is a folder"),
        (("--output", "no/such/folder.json"), "--output no/such/folder.json"),
        (("--plot", "no/such/folder.png"), "--plot no/such/folder.png"),
        (("--plot", "a.txt"), "must end in .png"),
        (("--kv-tokens", "100"), 'no option "--kv-tokens"'),
        (("--backend", "fast"), "fast"),
    ),
)
@pytest.mark.usefixtures("no_weights")
def test_wrong_words(run: Run, tiny: str, words: tuple[str, ...], said: str) -> None:
    run("eval", "fidelity", tiny, *words).assert_error(2, said)


@pytest.mark.usefixtures("no_weights")
def test_texts_that_are_too_short(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 63)
    words = ("eval", "fidelity", tiny, *SMALL, "--text", str(tmp_path / "t.txt"))
    run(*words).assert_error(2, "has 63 tokens", "takes 64")
    (tmp_path / "t.txt").write_text("")
    run(*words).assert_error(2, "has 0 tokens")


@pytest.mark.usefixtures("no_weights")
def test_wrong_tasks_and_models(run: Run, tiny: str) -> None:
    run("eval").assert_error(2, "MODEL")
    run("eval", tiny).assert_error(2, "fidelity")
    run("eval", "fidelty", tiny).assert_error(2, 'did you mean "fidelity"', "tune")
    run("eval", "fidelity", "no-such-model").assert_error(3, "no-such-model")


def test_a_plot_without_matplotlib(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("eval", "fidelity", tiny, *SMALL, "--plot", str(tmp_path / "a.png"))
    done.assert_error(2, 'pip install "kvant[eval]"')


def test_ctrl_c_ends_it(tiny: str) -> None:
    process = start("eval", "fidelity", tiny, "--ctx", "16384", "--greedy", "0")
    assert process.stderr is not None and b"pydoc" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.out, done.err) == (130, "", "")
