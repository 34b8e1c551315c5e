"""docs/server.md says what there is: its tables are compared with the code, in both directions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvant import EngineConfig, pipeline
from kvant.server.config import ServerConfig
from kvant.server.schema import ChatRequest, CompletionRequest, GenerateRequest
from tests.server.conftest import Served, serving, wait_until

DOC = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
ENDPOINTS: dict[str, type[BaseModel]] = {
    "C": ChatRequest,
    "T": CompletionRequest,
    "G": GenerateRequest,
}


def rows(title: str) -> Iterator[list[str]]:
    """The cells of the first table under a title, without its head."""
    section = DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[2:], 2) if line.startswith("|--")), len(lines))
    for line in lines[2:end]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_options() -> None:
    documented = {name: row[1] for row in rows("Options") for name in names(row[0])}
    shown = {"None": "none", "True": "on", "False": "off"}
    defaults = {field.name: str(field.default) for field in dataclasses.fields(ServerConfig)}
    assert documented == {
        "--" + name.replace("_", "-"): shown.get(default, default)
        for name, default in defaults.items()
    }


def test_further_names_of_options() -> None:
    documented = {
        names(row[0])[0]: sorted(names(row[2].split("Also")[1]))
        for row in rows("Options")
        if "Also" in row[2]
    }
    assert documented == {
        "--" + field.name.replace("_", "-"): sorted(f"--{each}" for each in aliases)
        for field in dataclasses.fields(ServerConfig)
        if (aliases := field.metadata.get("aliases"))
    }


def test_endpoints(tiny_server: Served) -> None:
    documented = {name for row in rows("Endpoints") for name in names(row[0])}
    paths = tiny_server.get("/openapi.json").json()["paths"]
    actual = {f"{verb.upper()} {path}" for path, verbs in paths.items() for verb in verbs}
    assert documented == actual | {"GET /"}


def test_which_endpoints_need_a_key(tiny: str) -> None:
    pipe = pipeline(tiny, EngineConfig(kv_tokens=256))
    with serving(pipe, api_keys=["secret"]) as served, served.client() as client:
        for endpoint, key, _ in rows("Endpoints"):
            verb, path = names(endpoint)[0].split()
            refused = client.request(verb, path).status_code == 401
            assert refused == (key == "yes"), path


def test_parameters() -> None:
    documented: dict[str, set[str]] = {}
    for cells in rows("Parameters"):
        for name in names(cells[0]):
            documented[name] = set(cells[1].split())
    actual: dict[str, set[str]] = {}
    for letter, schema in ENDPOINTS.items():
        for name in schema.model_fields:
            actual.setdefault(name, set()).add(letter)
    assert documented == actual


def test_statuses(tiny_server: Served) -> None:
    documented = {int(row[0]) for row in rows("Errors")}
    paths = tiny_server.get("/openapi.json").json()["paths"]
    actual = {
        int(status)
        for verbs in paths.values()
        for operation in verbs.values()
        for status in operation["responses"]
        if int(status) >= 400
    }
    assert actual - {422} <= documented


def test_fields_of_the_cache(tiny_server: Served) -> None:
    def found() -> dict[str, Any]:
        document: dict[str, Any] = tiny_server.get("/kv").json()
        return document

    documented = {name for row in rows("/kv") for name in names(row[0])}
    assert documented == set(found())
    inner = {names(row[0])[0]: names(row[1]) for row in rows("/kv")}
    for field in ("kv", "pages"):
        assert set(inner[field]) == set(found()[field])
    assert set(inner["tokens"]) == set(found()["tokens"])


def test_fields_of_a_request(tiny_server: Served) -> None:
    documented = names(DOC.split("Each of `requests` has")[1].split("\n## ")[0])
    found: list[Any] = []

    def is_seen() -> bool:
        found[:] = tiny_server.get("/kv").json()["requests"]
        return bool(found)

    ask = {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with tiny_server.client() as client, client.stream("POST", "/generate", json=ask):
        wait_until(is_seen)
    assert set(documented) == set(found[0])
