from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvant import EngineConfig, GenerationConfig, Pipeline, Session, pipeline
from tests.byte_model import write_config, write_tokenizer, write_weights
from tests.cli.conftest import Done, Run, Terminal

SMALL = ("--kv-tokens", "512", "--max-new-tokens", "8")
GEN = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def pipe(tiny: str) -> Iterator[Pipeline]:
    with pipeline(tiny, EngineConfig(kv_tokens=512)) as pipe:
        yield pipe


@pytest.fixture
def talk(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Chat with these lines as input."""

    def talk(lines: str, *words: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", tiny, *SMALL, *words)

    return talk


def answers(pipe: Pipeline, *turns: str, system: str | None = None) -> list[str]:
    session = pipe.session()
    session.messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for turn in turns:
        assert isinstance(pipe.chat(turn, session, GEN), Session) and session.response
        texts.append(session.response.text)
    return texts


def test_turns_build_on_each_other(talk: Run, pipe: Pipeline) -> None:
    done = talk("one\ntwo\n")
    assert done.code == 0
    assert done.out == "".join(f"{text}\n" for text in answers(pipe, "one", "two"))
    assert done.err.count("cut at max_new_tokens=8") == 2


def test_a_system_message_stays_after_clear(talk: Run, pipe: Pipeline) -> None:
    (text,) = answers(pipe, "one", system="be kind")
    assert answers(pipe, "one") != [text]
    for clear in ("/clear", "end"):
        assert talk(f"one\n{clear}\none\n", "--system", "be kind").out == f"{text}\n{text}\n"


def test_a_backslash_continues_a_line(talk: Run, pipe: Pipeline) -> None:
    (text,) = answers(pipe, "one\ntwo")
    assert talk("one\\\ntwo\n").out == f"{text}\n"
    assert talk("one\\\ntwo\\\n").out == f"{text}\n"


@pytest.mark.parametrize("leave", ("/exit", "/quit", "exit"))
def test_leaving(talk: Run, leave: str) -> None:
    done = talk(f"\n  \n{leave}\nnever said\n")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_help_and_stats(talk: Run) -> None:
    done = talk("/help\n/stats\none\n/stats\n", "--kv", "int8")
    for word in ("/clear", "/stats", "/exit", "backslash", "Ctrl-C"):
        assert word in done.out
    assert "last answer: 0 tokens" in done.out and "last answer: 8 tokens in" in done.out
    assert "held and" in done.out and "of 8; KV int8, 80 bytes/token" in done.out


def test_a_full_context_is_explained_and_the_conversation_goes_on(talk: Run) -> None:
    done = talk("one\n" + "x" * 600 + "\n/clear\none\n")
    first, second = done.out.split("\n")[:2]
    assert first == second
    assert "600" not in first and "the limit is 512" in done.err
    assert "/clear starts a new conversation" in done.err
    assert done.code == 1


def test_an_answer_that_fills_the_context_says_so(talk: Run) -> None:
    assert "the context of 512 tokens is full" in talk("x" * 490 + "\n").err


def test_unknown_commands_are_not_sent_to_the_model(talk: Run) -> None:
    done = talk("/clera\n")
    assert (done.code, done.out) == (1, "")
    assert "no command /clera" in done.err


def test_a_failed_answer_leaves_no_trace_in_the_conversation(
    talk: Run, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvant.engine.engine as engine
    from kvant.engine.sampler import Sampled

    sample, failures = engine.sample, iter([True])

    def failing(*arguments: object) -> list[Sampled]:
        sampled = sample(*arguments)  # type: ignore[arg-type]
        return [Sampled(None, None)] if next(failures, False) else sampled

    monkeypatch.setattr(engine, "sample", failing)
    done = talk("lost\none\n")
    assert done.out == f"\n{answers(pipe, 'one')[0]}\n"
    assert "no token can be chosen" in done.err and done.code == 1


def test_a_model_without_template_cannot_chat(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    write_weights(tmp_path)
    write_tokenizer(tmp_path, template=None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    run("chat", str(tmp_path), *SMALL).assert_error(3, "has no chat template", "kvant generate")


def test_ctrl_c_stops_an_answer_and_then_the_program(tiny: str) -> None:
    terminal = Terminal("chat", tiny, "--kv-tokens", "16384", "--ignore-eos",
                        "--max-new-tokens", "16000")  # fmt: skip
    terminal.wait_for(">>> ")
    terminal.say("hello\n")
    terminal.wait_for("hello\r\n", least=20)
    terminal.process.send_signal(signal.SIGINT)
    assert "Traceback" not in terminal.wait_for("[stopped]\r\n>>> ", timeout=5)
    terminal.say("/stats\n")
    assert "tokens/s" in terminal.wait_for(">>> ")
    time.sleep(0.5)  # readline overlooks a signal between its prompt and its wait for a key
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.leave() == 0
