"""Kernels run on the GPU, or in Triton's interpreter (see tests/conftest.py); without Triton not at
all."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
