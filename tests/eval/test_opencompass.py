"""The configuration for OpenCompass: what it says, and that OpenCompass, if there, takes it."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvant.client import DEFAULT_URL
from kvant.server.config import ServerConfig

CONFIG = Path(__file__).parents[2] / "examples/opencompass_kvant.py"
TABLE = ["ceval", "mmlu", "triviaqa", "gsm8k", "race-middle", "race-high"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVANT_")]:
        monkeypatch.delenv(name)


def _imports() -> dict[str, list[str]]:
    """What the configuration takes from which module of OpenCompass."""
    tree = ast.parse(CONFIG.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {str(node.module): [alias.name for alias in node.names] for node in found}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the configuration with stand-ins for OpenCompass."""
    monkeypatch.setitem(sys.modules, "opencompass", types.ModuleType("opencompass"))
    for module, names in _imports().items():
        stand_in: Any = types.ModuleType(module)
        for name in names:
            if name == "summarizer":
                setattr(stand_in, name, {"summary_groups": ["groups"]})
            elif name.endswith("_datasets"):
                setattr(stand_in, name, [{"abbr": name, "reader_cfg": {}}])
            else:
                setattr(stand_in, name, contextlib.nullcontext if name == "read_base" else name)
        monkeypatch.setitem(sys.modules, module, stand_in)
    return lambda: runpy.run_path(str(CONFIG))


def test_it_takes_the_reference_tables_data_sets() -> None:
    modules = [x.rpartition(".")[2] for x in _imports() if x.startswith("opencompass.configs.data")]
    assert sorted(modules) == [
        "ceval_gen_5f30c7",
        "gsm8k_gen_1d7fe4",
        "mmlu_gen_a484b3",
        "race_gen_69ee4f",
        "triviaqa_gen_2121ce",
    ]


def test_all_data_sets_are_evaluated_and_shown(load: Any) -> None:
    config = load()
    given = [name for names in _imports().values() for name in names if name.endswith("_datasets")]
    assert sorted(x["abbr"] for x in config["datasets"]) == sorted(given)
    assert {x["reader_cfg"]["test_range"] for x in config["datasets"]} == {"[:]"}
    assert config["summarizer"] == {"dataset_abbrs": TABLE, "summary_groups": ["groups"]}


def test_it_asks_kvant_serve_where_that_listens(load: Any) -> None:
    (model,) = load()["models"]
    server = ServerConfig()
    address = f"http://{server.server_name}:{server.server_port}"
    assert address == DEFAULT_URL
    assert model["type"] == "OpenAISDK"
    assert model["openai_api_base"] == f"{address}/v1"
    assert model["temperature"] == 0


def test_each_server_is_a_column(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVANT_SERVERS", "bf16=http://a:1/v1,int8=http://b:2/v1?x=y")
    monkeypatch.setenv("KVANT_MODEL", "m")
    monkeypatch.setenv("KVANT_TOKENIZER", "t")
    monkeypatch.setenv("KVANT_CONCURRENCY", "3")
    monkeypatch.setenv("KVANT_LIMIT", "5")
    config = load()
    found = [(x["abbr"], x["openai_api_base"]) for x in config["models"]]
    assert found == [("bf16", "http://a:1/v1"), ("int8", "http://b:2/v1?x=y")]
    keys = ("path", "tokenizer_path", "max_workers")
    assert [[x[key] for key in keys] for x in config["models"]] == [["m", "t", 3]] * 2
    assert config["datasets"][0]["reader_cfg"]["test_range"] == "[:5]"


@pytest.mark.parametrize(
    "servers",
    [
        "",
        "http://a:1/v1",
        "http://a:1/v1?x=http://b",
        "a=http://a:1,http://b:2",
        "=http://a",
        "a=b",
    ],
)
def test_a_server_without_label_is_told_at_once(
    load: Any, monkeypatch: pytest.MonkeyPatch, servers: str
) -> None:
    monkeypatch.setenv("KVANT_SERVERS", servers)
    with pytest.raises(SystemExit, match="give LABEL=http://HOST:PORT/v1") as error:
        load()
    assert f"KVANT_SERVERS is {servers!r}" in str(error.value)


def test_no_module_is_left_to_be_stored(load: Any) -> None:
    left = {k: v for k, v in load().items() if not k.startswith("__")}
    assert not [name for name, value in left.items() if isinstance(value, types.ModuleType)]


def test_opencompass_takes_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("opencompass") is None:
        pytest.skip("needs opencompass (docs/opencompass.md says how to install it)")
    code = (
        "import inspect, sys\n"
        "from mmengine.config import Config\n"
        "from opencompass.models import OpenAISDK\n"
        "Config.fromfile(sys.argv[1], format_python_code=False).dump(sys.argv[2])\n"
        "config = Config.fromfile(sys.argv[2], format_python_code=False)\n"
        "abbreviations = [x['abbr'] for x in config.datasets]\n"
        "assert len(set(abbreviations)) == len(abbreviations) == 52 + 57 + 4\n"
        "known = inspect.signature(OpenAISDK).parameters\n"
        "ours = {'type', 'abbr', 'max_out_len', 'batch_size'}\n"
        "assert not set(config.models[0]) - ours - set(known)\n"
        "groups = {x['name'] for x in config.summarizer['summary_groups']}\n"
        "assert not set(config.summarizer['dataset_abbrs']) - groups - set(abbreviations)\n"
        "print('taken')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(CONFIG), str(tmp_path / "stored.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "taken" in done.stdout, done.stderr
