from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvant import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from kvant.cli.terminal import open_pipeline
from tests.cli.conftest import Run

SMALL = ("--kv-tokens", "512", "--max-new-tokens", "8")
KEYS = [
    "index", "prompt", "text", "finish_reason", "input_token_len", "generate_token_len",
    "cached_tokens", "token_ids",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny: str) -> Iterator[Pipeline]:
    """The oracle: the Python API."""
    with pipeline(tiny, EngineConfig(kv_tokens=512)) as pipe:
        yield pipe


def answer(pipe: Pipeline, prompt: str, *, raw: bool = False) -> Response:
    response = pipe(prompt, GenerationConfig(max_new_tokens=8), do_preprocess=not raw)
    assert isinstance(response, Response)
    return response


def test_one_prompt_is_its_text(run: Run, tiny: str, pipe: Pipeline) -> None:
    done = run("generate", tiny, "hello", *SMALL)
    assert (done.code, done.out) == (0, answer(pipe, "hello").text + "\n")
    assert "8 tokens in" in done.err and "tokens/s" in done.err
    assert "KV bf16, 128 bytes/token" in done.err


def test_raw_leaves_the_template_out(run: Run, tiny: str, pipe: Pipeline) -> None:
    done = run("generate", tiny, "hello", *SMALL, "--raw", "--json", "--quiet")
    (row,) = done.rows
    assert done.err == ""
    assert row["input_token_len"] == 5
    assert row["token_ids"] == answer(pipe, "hello", raw=True).token_ids


def test_several_prompts_have_titles(run: Run, tiny: str, pipe: Pipeline) -> None:
    done = run("generate", tiny, "hello", "--quiet", "there", *SMALL)
    texts = [answer(pipe, prompt).text for prompt in ("hello", "there")]
    assert done.out == f">>> hello\n{texts[0]}\n\n>>> there\n{texts[1]}\n"


def test_json_rows(run: Run, tiny: str, pipe: Pipeline, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "there"}]
    (tmp_path / "p.jsonl").write_text('"hello"\n' + json.dumps({"messages": messages}))
    done = run("generate", tiny, "--file", str(tmp_path / "p.jsonl"), *SMALL, "--json")
    assert [list(row) for row in done.rows] == [KEYS, KEYS]
    assert [row["prompt"] for row in done.rows] == ["hello", messages]
    for index, prompt in enumerate(("hello", "there")):
        expected = answer(pipe, prompt)
        row = done.rows[index]
        assert row["index"] == index
        assert row["token_ids"] == expected.token_ids and row["text"] == expected.text
        assert row["generate_token_len"] == 8 and row["finish_reason"] == "length"


def test_logprobs_are_a_key_when_asked_for(run: Run, tiny: str) -> None:
    (row,) = run("generate", tiny, "hello", *SMALL, "--json", "--logprobs", "2").rows
    assert list(row) == [*KEYS, "logprobs"]
    assert isinstance(row["logprobs"], list) and len(row["logprobs"]) == 8
    assert all(value is None or value <= 0 for at in row["logprobs"] for value in at.values())


def test_completions_of_a_prompt_stand_together(run: Run, tiny: str) -> None:
    done = run("generate", tiny, "a", "b", *SMALL, "--json", "--n", "3", "--do-sample")
    assert [(row["index"], row["prompt"]) for row in done.rows] == list(enumerate("aaabbb"))


def test_one_prompt_several_times_is_not_interleaved(run: Run, tiny: str, pipe: Pipeline) -> None:
    text = answer(pipe, "hello").text
    done = run("generate", tiny, "hello", *SMALL, "--n", "2")
    assert done.out == f"{text}\n\n{text}\n"


def test_a_prompt_that_cannot_be_served_loses_no_other(run: Run, tiny: str, pipe: Pipeline) -> None:
    words = ("a", "x" * 600, "", "\udcff", "b")
    done = run("generate", tiny, *words, *SMALL, "--json", "--quiet", "--n", "2")
    reasons = [(row["index"], row["finish_reason"]) for row in done.rows]
    assert reasons == [
        (0, "length"), (1, "length"), (2, "error"), (4, "error"), (6, "error"),
        (8, "length"), (9, "length"),
    ]  # fmt: skip
    assert "limit is 512" in str(done.rows[2]["error_message"])
    assert list(done.rows[2]) == [*KEYS, "error_message"]
    assert done.rows[5]["token_ids"] == answer(pipe, "b").token_ids
    done.assert_error(1, "3 of 7 failed", "number 2")


def test_all_prompts_may_fail(run: Run, tiny: str) -> None:
    done = run("generate", tiny, "", "", *SMALL, "--quiet")
    assert done.out.count("[error: the prompt is empty") == 2
    done.assert_error(1, "2 of 2 failed")


def test_the_only_prompt_fails_as_the_command(run: Run, tiny: str) -> None:
    done = run("generate", tiny, "", *SMALL)
    done.assert_error(2, "the prompt is empty")
    assert done.out == ""


def test_output_goes_to_a_file(run: Run, tiny: str, pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    done = run("generate", tiny, "hello", *SMALL, "--output", str(file), "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert file.read_text() == answer(pipe, "hello").text + "\n"
    run("generate", tiny, "x", "--output", str(tmp_path / "no" / "file")).assert_error(1, "no/file")


def test_a_template_from_a_file(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    words = ("generate", tiny, "hello", *SMALL, "--json", "--chat-template")
    (row,) = run(*words, str(tmp_path / "t.jinja")).rows
    assert row["input_token_len"] == 6
    run(*words, str(tmp_path / "none")).assert_error(2, "cannot read the chat template")


def test_an_engine_that_fails_is_an_error(
    run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("out of ideas")

    monkeypatch.setattr("kvant.models.decoder.Decoder.forward", broken)
    for words in (("a",), ("a", "b", "--json")):
        run("generate", tiny, *words, *SMALL, "--quiet").assert_error(1, "out of ideas")


def test_an_interrupted_command_closes_its_engine(tiny: str) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        open_pipeline(tiny, EngineConfig(kv_tokens=64)) as pipe,
    ):
        raise KeyboardInterrupt
    with pytest.raises(kvant_error(), match="closed"):
        pipe("hello")


def kvant_error() -> type[Exception]:
    from kvant import EngineDeadError

    return EngineDeadError
