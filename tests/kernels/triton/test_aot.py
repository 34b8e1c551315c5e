"""Every kernel of the triton backend compiles for every architecture, without a GPU, within the
limits of spills and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from kvant.errors import ConfigError
from kvant.formats import FORMATS, KVSpec
from kvant.kernels.triton import aot


def test_all_kernels_stay_within_the_limits_of_all_architectures() -> None:
    """All kernels for all architectures, each format for one of them at least (``--quick``). In a
    process where Triton compiles: here it may interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kvant.kernels.triton.aot", "--quick", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    names = {arch: {k["name"] for k in kernels if k["arch"] == arch} for arch in aot.ARCHITECTURES}
    for arch, found in names.items():
        assert found == names[80], arch
    assert len(names[80]) >= 9
    assert {k["kv"] for k in kernels} == {case.kv for case in aot.CASES}


def test_the_cases_have_every_format() -> None:
    specs = [KVSpec.parse(case.kv) for case in aot.CASES]
    found = {fmt.name for spec in specs for fmt in (spec.k, spec.v, *(spec.recent or ()))}
    assert found == set(FORMATS)


def test_limits_are_stated_and_checked() -> None:
    kernel = aot.Kernel(80, "int8", 128, "attend", 255, 0, 1024, 4)
    assert kernel.problem() is None
    spilled = aot.Kernel(80, "int8", 128, "attend", 255, 10**6, 1024, 4)
    assert "spills 1000000 bytes" in str(spilled.problem())
    wide = aot.Kernel(75, "int8", 128, "attend", 255, 0, 65537, 4)
    assert wide.problem() == "takes 65537 bytes of shared memory, and a block has 65536"


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="unset it"), aot.compiling(80):
        pass
