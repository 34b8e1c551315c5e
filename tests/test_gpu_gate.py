"""scripts/gpu-gate as far as a machine without a GPU can see it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a program; others of the same names may come from elsewhere afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def test_a_failing_step_is_recorded_and_the_rest_runs(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = load("gate")

    def fails(self: Any, step: Any) -> None:
        step.results.append({"what": "half"})
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gate.Gate, "setup", fails)
    monkeypatch.setattr(gate.Gate, "tests", lambda self, step: None)
    status = gate.main(
        ["--steps", "setup", "tests", "--store", str(tmp_path / "store"), "--output", str(tmp_path)]
    )
    (stored,) = tmp_path.glob("gpu-none-*.json")
    found = json.loads(stored.read_text())
    assert status == 1
    assert found["machine"]["date"] in stored.name
    setup, tests = found["steps"]
    assert not setup["held"] and "the device is gone" in setup["error"]
    assert setup["results"] == [{"what": "half"}]
    assert tests["held"] and "error" not in tests
    assert "FAILED" in capsys.readouterr().out


def test_rows_written_before_a_timeout_are_kept(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = load("gate")
    run = gate.Gate(tmp_path, budget=1000)

    def slow(command: Any, env: Any, timeout: float) -> None:
        output = Path(command[command.index("--output") + 1])
        output.write_text('[{"what": "decode"}]')
        raise TimeoutError("did not end")

    monkeypatch.setattr(gate, "call", slow)
    (step,) = run.run(["attention"])
    assert not step.held and step.results == [{"what": "decode"}]


def test_what_outlasts_its_time_is_ended_with_what_it_started(load: Any) -> None:
    gate = load("gate")
    with pytest.raises(TimeoutError, match="begun"):
        gate.call(["sh", "-c", "echo begun; sleep 600 & wait"], dict(os.environ), timeout=0.5)


def test_no_step_begins_without_time(load: Any, tmp_path: Path) -> None:
    (step,) = load("gate").Gate(tmp_path, budget=1).run(["throughput"])
    assert not step.held and step.error == "no time was left"


def test_the_model_travels_in_parts(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = load("gate")
    data = np.random.default_rng(0).bytes(1000)
    model = tmp_path / gate.MODEL_NAME
    model.write_bytes(data)
    monkeypatch.setattr(gate, "packaged_model", lambda: model)
    monkeypatch.setattr(gate, "PART_BYTES", 400)
    monkeypatch.setattr(gate.subprocess, "run", lambda *args, **options: None)
    gate.pack(tmp_path / "packed")
    run = gate.Gate(tmp_path / "store", budget=1)
    for number in (1, 2, 3):
        assert run.packaged() is None
        run.unpack(tmp_path / "packed" / str(number))
    assert run.packaged().read_bytes() == data


def test_every_program_and_row_file_is_one_that_the_gate_calls(load: Any) -> None:
    gate = load("gate")
    for name in gate.SHARES:
        assert name == "tests" or (FOLDER / f"{name}.py").exists()


def test_a_case_that_fails_is_a_row_and_no_room_is_no_failure(load: Any, tmp_path: Path) -> None:
    report = load("report")

    def fails(said: str) -> Any:
        def work() -> Any:
            raise RuntimeError(said)

        return work

    rows = report.Rows(tmp_path / "rows.json")
    rows.attempt({"kv": "int8"}, fails("the GPU refuses a KV cache of 9 bytes (no)"))
    rows.attempt({"kv": "int4"}, fails("broken"))
    noted, failed = json.loads((tmp_path / "rows.json").read_text())
    assert "left out" in noted["note"] and "error" not in noted
    assert failed == {"kv": "int4", "error": "RuntimeError: broken"}


def test_request_lengths_have_the_means_of_the_seed(load: Any) -> None:
    throughput = load("throughput")
    work = throughput.requests(1000, 4096)
    inputs, outputs = np.array([(len(prompt), out) for prompt, out in work]).T
    assert inputs.mean() == pytest.approx(throughput.MEAN_IN, rel=0.02)
    assert outputs.mean() == pytest.approx(throughput.MEAN_OUT, rel=0.02)
    assert (inputs + outputs).max() <= throughput.LONGEST
    assert work == throughput.requests(1000, 4096)


def test_slopes_are_of_the_first_format(load: Any) -> None:
    growth = load("growth")
    first: dict[int, float] = {}
    line = [(1024, 1.0), (2048, 2.0), (4096, 4.0)]
    (bf16,) = growth.slope_rows("bf16", {1: line}, first)
    (int8,) = growth.slope_rows("int8", {1: [(n, t / 2) for n, t in line]}, first)
    assert bf16["times_16bit"] == 1 and "meets_target" not in bf16
    assert int8["times_16bit"] == pytest.approx(0.5) and int8["meets_target"]
    assert growth.slope_rows("int4", {1: line[:2]}, first) == []
