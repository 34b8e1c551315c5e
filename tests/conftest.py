"""Settings that must be made before torch is imported by any test, and a tiny model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # a machine with a GPU says 0
if "PYTEST_XDIST_WORKER" in os.environ:  # others compute beside this process: see make test
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

import kvant  # noqa: F401 - sets OMP_WAIT_POLICY, which libgomp reads when torch loads it
from tests.byte_model import write_config, write_tokenizer, write_weights

# Hypothesis without clocks: a busy machine fails no test.
settings.register_profile(
    "untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder; one byte is one token."""
    folder = tmp_path_factory.mktemp("tiny")
    write_config(folder)
    write_weights(folder)
    write_tokenizer(folder)
    return str(folder)
