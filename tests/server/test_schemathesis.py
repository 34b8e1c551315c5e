"""The server does what its OpenAPI document says, whatever is generated from that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from kvant import EngineConfig, pipeline
from tests.server.conftest import Served, serving
from tests.server.corpus import GOOD

# Not among them: that everything valid is accepted. A prompt may be too long for a small model.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
OPERATIONS = (
    *(("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/generate")),
    *(("POST", path) for path in ("/tokenize", "/detokenize")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/{name}")),
    *(("GET", path) for path in ("/health", "/ready", "/metrics", "/kv")),
)
_generating = settings(
    max_examples=25,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
_SECONDS = 60.0  # that an answer may take before a test gives up


@pytest.fixture(scope="module")
def server(tiny: str) -> Iterator[Served]:
    """One whose answers are short, as its context is."""
    pipe = pipeline(tiny, EngineConfig(kv_tokens=4096, session_len=48, check=True))
    with serving(pipe, tool_call_parser="hermes", access_log=False) as served:
        yield served


@pytest.fixture(scope="module")
def document(server: Served) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_operations_are_here(document: Any) -> None:
    found = {(method.upper(), path) for path in document for method in document[path]}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_what_is_generated(document: Any, operation: tuple[str, str], mode: GenerationMode) -> None:
    method, path = operation
    cases = document[path][method].as_strategy(generation_mode=mode)

    @_generating
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=_SECONDS)

    try:
        check()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # nothing is wrong where nothing is sent


@pytest.mark.parametrize("path", GOOD)
def test_what_is_answered(document: Any, path: str) -> None:
    """Few generated bodies are fit to be answered: of these, only numbers and switches are kept."""
    statuses = set()

    @_generating
    @given(case=document[path]["POST"].as_strategy())
    def check(case: schemathesis.Case) -> None:
        kept = {k: v for k, v in case.body.items() if isinstance(v, int | float | None)}
        case.body = {**kept, **GOOD[path], "n": 2} if "n" in kept else {**kept, **GOOD[path]}
        answer = case.call_and_validate(checks=CHECKS[:-2], timeout=_SECONDS)
        statuses.add(answer.status_code)

    check()
    assert 200 in statuses


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_what_covers_the_schema(document: Any, operation: tuple[str, str]) -> None:
    method, path = operation
    config = document.config.generation_for()
    cases = document.iter_coverage_cases(
        document[path][method], generation_modes=list(GenerationMode), generation_config=config
    )
    for case in cases:
        case.call_and_validate(checks=CHECKS, timeout=_SECONDS)


def test_afterwards_nothing_runs(server: Served) -> None:
    stats = server.pipe.model.engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
