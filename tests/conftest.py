"""Settings that must be made before torch is imported by any test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import kvant  # noqa: F401 - sets OMP_WAIT_POLICY, which libgomp reads when torch loads it
