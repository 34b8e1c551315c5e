"""scripts/gpu-gate as far as a machine without a GPU can see it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvant.bench.metrics import Timeline
from kvant.bench.throughput import Run
from kvant.kernels.triton.pool import find_device

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
        run.unpack([tmp_path / "packed" / str(number)])
    assert run.packaged().read_bytes() == data


def test_every_program_and_row_file_is_one_that_the_gate_calls(load: Any) -> None:
    gate = load("gate")
    for name in gate.WEIGHTS:
        assert hasattr(gate.Gate, name) or (FOLDER / f"{name}.py").exists()


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


def test_slopes_are_over_the_contexts_of_both(load: Any) -> None:
    growth = load("growth")
    first = {1024: 1.0, 2048: 2.0, 4096: 4.0}
    (bf16,) = growth.slope_rows("bf16", 1, first, first)
    assert bf16["times_16bit"] == 1 and "meets_target" not in bf16
    longer = {context: took / 2 for context, took in first.items()} | {65536: 1000.0}
    (int8,) = growth.slope_rows("int8", 1, longer, first)
    assert int8["contexts"] == [1024, 2048, 4096]
    assert int8["times_16bit"] == pytest.approx(0.5) and int8["meets_target"]
    assert growth.slope_rows("int4", 1, {1024: 1.0, 2048: 2.0, 8192: 3.0}, first) == []


def test_tests_are_compiled_and_on_the_gpu_or_fail(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = load("gate")
    run = gate.Gate(tmp_path, budget=100)
    assert run.env["TRITON_INTERPRET"] == "0"
    monkeypatch.setattr(gate, "ask", lambda *_: "interpreted on the CPU")
    step = gate.attempt("tests", run.tests)
    assert not step.held and step.results == [{"kernels": "interpreted on the CPU"}]

    def passes(command: Any, env: Any, timeout: float) -> Any:
        assert env["TRITON_INTERPRET"] == "0"
        assert all((gate.ROOT / path).exists() for path in gate.TESTS)
        return gate.subprocess.CompletedProcess(command, 0, "9 passed")

    monkeypatch.setattr(gate, "ask", lambda *_: "compiled on NVIDIA H100")
    monkeypatch.setattr(gate, "call", passes)
    step = gate.attempt("tests", run.tests)
    assert step.held
    assert step.results == [{"kernels": "compiled on NVIDIA H100"}, {"summary": "9 passed"}]


def test_the_interpreter_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for interpret, device in (("1", "cpu"), ("0", "cuda")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert find_device().type == device


def test_setup_installs_what_is_missing_and_other_sources_again(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = load("gate")
    (tmp_path / "gguf-1-py3-none-any.whl").touch()
    (tmp_path / "site").mkdir()  # by another call, to which the wheel had not travelled
    installed: list[str] = []
    missing = ["gguf"]

    def install(self: Any, command: list[str]) -> None:
        installed.append(command[-1])
        missing.clear()

    def has(self: Any, module: str, folder: Path) -> bool:
        folder.mkdir(exist_ok=True)
        return str(gate.ROOT) in " ".join(installed) or folder.name == "kvant-old"

    monkeypatch.setattr(gate.Gate, "_install", install)
    monkeypatch.setattr(gate.Gate, "_missing", lambda self: list(missing))
    monkeypatch.setattr(gate.Gate, "_has", has)
    monkeypatch.setattr(gate, "digest", lambda: "old")
    run = gate.Gate(tmp_path, budget=100)
    assert gate.attempt("setup", run.setup).held
    assert installed == [str(tmp_path / "gguf-1-py3-none-any.whl")]
    monkeypatch.setattr(gate, "digest", lambda: "new")
    step = gate.attempt("setup", run.setup)
    assert step.results == [{"sources": "new"}] and len(installed) == 2


def test_results_of_a_day_stand_side_by_side(load: Any, tmp_path: Path) -> None:
    gate = load("gate")
    machine = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2026-11-23"}
    names = [gate.new_result(tmp_path, machine).name for _ in range(2)]
    assert names == ["gpu-h100-80gb-hbm3-2026-11-23.json", "gpu-h100-80gb-hbm3-2026-11-23-2.json"]


def test_shares_are_of_the_steps_that_are_left(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = load("gate")
    run = gate.Gate(tmp_path, budget=480)
    shares = []
    monkeypatch.setattr(gate.Gate, "setup", lambda self, step: shares.append(self.share))
    monkeypatch.setattr(gate.Gate, "tests", lambda self, step: shares.append(self.share))
    written: list[int] = []
    run.record = lambda steps: written.append(len(steps))
    run.run(["setup", "tests"])
    assert shares == [pytest.approx(160, abs=1), pytest.approx(480, abs=1)]
    assert written == [0, 1, 2]


def test_rates_are_of_the_time_that_all_requests_are_there(load: Any) -> None:
    """Four requests, two at a time, of three tokens each; one token at every second."""
    throughput = load("throughput")
    lines = [Timeline(start, [start + n for n in (1, 2, 3)]) for start in (0.0, 0.0, 3.0, 3.0)]
    lines[1].arrivals[-1] = 4.0
    lines[3] = Timeline(4.0, [5.0, 6.0, 7.0])
    run = Run(start=0, duration=7, timelines=lines, input_tokens=4, cached_tokens=0, steps=7,
              preemptions=0, mean_running=2, max_running=2, kv_usage=0)  # fmt: skip
    # from the first end, at 3, to the last start, at 4: one token each of two requests
    assert throughput.held_rate(run, 2) == pytest.approx(2 / 3)
    assert throughput.held_rate(run, 4) is None
    row = throughput.row("int8", run, run, throughput.TABLE[0], 2)
    assert row["times_16bit"] == 1 and row["meets_target"] is None
    count, formats = throughput.affordable(200, 4, 10)
    assert (count, formats) == (960, 1)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "kvs"), [("attention", ["f16", "int8"]), ("growth", ["int8"]), ("throughput", ["f16"])]
)
def test_programs_run(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kvs: list[str]
) -> None:
    """Tiny sizes and few formats, by the interpreter; figures mean nothing there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report, program = load("report"), load(name)
    monkeypatch.setattr(program, "specs", lambda: kvs)
    args = report.options("x").parse_args(["--smoke", "--output", str(tmp_path / "rows.json")])
    args = argparse.Namespace(**vars(args), compile=None, models=[], formats=[])
    with torch.inference_mode():
        status = report.run(program.program, args)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert status == 0, rows
    assert set(kvs) <= {row.get("kv") for row in rows}
