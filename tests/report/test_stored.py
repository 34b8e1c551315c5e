"""Which kind a file is, and what is said of files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvant.errors import RequestError
from kvant.report.stored import (
    Attention,
    Fidelity,
    Latency,
    Linear,
    Serving,
    Tasks,
    Throughput,
    Tune,
    read_results,
)
from tests.report.results import EVERY, fidelity, machine, tune, write

KINDS = {
    "attention": Attention,
    "fidelity": Fidelity,
    "latency": Latency,
    "linear": Linear,
    "serving": Serving,
    "tasks": Tasks,
    "throughput": Throughput,
    "tune": Tune,
}
OTHERS = {
    "load": {"machine": machine(), "command": "load.py", "results": [{"server": [], "wrong": []}]},
    "startup": {"machine": machine(), "command": "startup.py", "results": [{"what": "import"}]},
    "list": [1, 2],
    "number": 3,
    "rows": {"results": 3},
}
REPO = Path(__file__).parents[2]


def test_every_kind_is_known(tmp_path: Path) -> None:
    found = read_results([write(tmp_path, **EVERY, **OTHERS)])
    kinds = {source.name.removesuffix(".json"): type(source.stored) for source in found.sources}
    assert kinds == KINDS
    assert found.others == tuple(sorted(f"{name}.json" for name in OTHERS))


def test_oldest_first_and_each_file_once(tmp_path: Path) -> None:
    write(tmp_path, a=fidelity({"f32": 0.0}, day="2026-02-01"), b=tune())
    found = read_results([tmp_path / "a.json", tmp_path])
    assert [source.name for source in found.sources] == ["b.json", "a.json"]


@pytest.mark.parametrize("text", ("", "{", '{"a": NaN}', "[" * 100_000, "\ufeff{}"))
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RequestError, match=r"bad\.json is no JSON"):
        read_results([write(tmp_path, tune=tune())])


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RequestError, match=r"bad\.json is no JSON"):
        read_results([tmp_path])


@pytest.mark.parametrize("name", EVERY)
def test_a_file_that_lacks_a_key_is_named_with_the_key(tmp_path: Path, name: str) -> None:
    found = json.loads(json.dumps(EVERY[name]))
    del found["machine"]["cpu"]
    with pytest.raises(RequestError, match=rf'{name}\.json looks like .*"machine.cpu" is missing'):
        read_results([write(tmp_path, **{name: found})])


def test_a_row_with_a_wrong_value(tmp_path: Path) -> None:
    found = fidelity({"f32": 0.0, "int8": 0.1})
    found["results"][1]["kld"] = "much"
    with pytest.raises(RequestError, match=r'"results\.1\.kld" is wrong') as caught:
        read_results([write(tmp_path, bad=found)])
    assert "kvant eval fidelity" in str(caught.value) and "\n" not in str(caught.value)


def test_infinity_in_disguise(tmp_path: Path) -> None:
    text = json.dumps(tune()).replace("0.001", "1e999")
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RequestError, match='"kld" is wrong'):
        read_results([tmp_path])


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no result of kvant eval or kvant bench in 1"):
        read_results([write(tmp_path, load=OTHERS["load"])])
    with pytest.raises(RequestError, match="neither a file nor a folder"):
        read_results([tmp_path / "gone"])


def test_the_stored_results_of_this_repository_can_be_read() -> None:
    found = read_results([REPO / "benchmarks" / "results"])
    assert {Fidelity, Latency, Throughput, Tune, Attention} <= {
        type(source.stored) for source in found.sources
    }
