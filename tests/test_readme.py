"""What the README says can be typed as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvant import EngineConfig, pipeline
from kvant.client import DEFAULT_URL
from kvant.errors import ModelError
from kvant.loading.resolve import resolve_model
from tests.server.conftest import serving

MODEL = "smollm2-135m"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _run(command: list[str]) -> str:
    try:
        resolve_model(MODEL)
    except ModelError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(pipeline(MODEL, EngineConfig(kv_tokens=4096)), model_name=MODEL) as served:
        yield served.url


@pytest.mark.slow
@pytest.mark.parametrize("code", _blocks("python"))
def test_python_blocks_run(code: str, request: pytest.FixtureRequest) -> None:
    if DEFAULT_URL in code:
        code = code.replace(DEFAULT_URL, request.getfixturevalue("server"))
    assert len(_run([sys.executable, "-c", code]).split()) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [line for block in _blocks("") for line in block.splitlines() if line.startswith(".venv/bin")],
)
def test_commands_run(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == ".venv/bin/kvant"
    out = _run([sys.executable, "-m", "kvant", *words[1:]])
    assert out or words[1] == "chat"  # which ends at once: there is nobody to talk to
