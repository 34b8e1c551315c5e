"""The machine that a figure was measured on, for whoever stores figures."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["cpu", "isa", "machine", "package_version"]

_PACKAGES = ("kvant", "torch", "numpy", "tokenizers", "safetensors", "gguf")
_ISA = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile",
    "amx_int8", "amx_bf16",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets that matter here, versions and date, for JSON."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "isa": isa(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "date": date.today().isoformat(),
    }


def package_version(package: str) -> str | None:
    """The version of an installed package, None if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name", platform.processor() or platform.machine())


def isa() -> list[str]:
    """The instruction sets found, of those that make a difference to kvant."""
    facts = _cpuinfo()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return [flag for flag in _ISA if flag in flags]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
