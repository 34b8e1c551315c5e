"""kv="auto": small where that was measured to be safe, 8 bits where nothing was measured."""

from __future__ import annotations

import logging

import pytest

from kvant import EngineConfig, pipeline
from kvant.formats import PRESETS, KVSpec, resolve_spec
from kvant.formats.auto import BOUND, MEASURED, choose_preset


@pytest.mark.parametrize("architecture", ("llama", "LlamaForCausalLM"))
def test_the_smallest_preset_under_the_bound_is_chosen(architecture: str) -> None:
    preset, reason = choose_preset(architecture)
    measured = MEASURED["llama"]
    assert measured[preset] <= BOUND
    smaller = list(PRESETS)[list(PRESETS).index(preset) + 1 :]
    assert all(measured[name] > BOUND for name in smaller)
    assert str(BOUND) in reason and "llama" in reason
    assert resolve_spec("auto", None, architecture=architecture) == KVSpec.parse(preset)


def test_without_measurements_it_is_the_most_accurate_preset() -> None:
    preset, reason = choose_preset("Qwen9ForCausalLM")
    assert preset == next(iter(PRESETS))
    assert "qwen9" in reason and "kvant eval fidelity" in reason


def test_every_preset_is_measured() -> None:
    for measured in MEASURED.values():
        assert list(measured) == list(PRESETS)


def test_the_pipeline_says_what_it_took(tiny: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvant"):
        pipe = pipeline(tiny, EngineConfig(kv=" Auto ", kv_tokens=256))
    with pipe:
        preset = pipe.model.kv_spec.label
        assert preset in PRESETS
        assert any(f"kv=auto: {preset}" in message for message in caplog.messages)
        assert pipe("ab").text is not None
