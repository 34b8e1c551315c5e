"""``kv="auto"``: the most compact preset whose measured loss is under a bound."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BOUND", "MEASURED", "Choice", "choose_preset"]

BOUND = 0.0075
"""Mean KL divergence of the next token, nats, from an exact cache, that ``auto`` accepts."""

# By architecture: preset -> mean KL divergence, from kvant eval fidelity on WikiText-2, 6 windows
# of 2048 tokens: benchmarks/results/fidelity-presets-smollm2-2026-11-23.json, and for k3v3
# fidelity-formats-smollm2-2026-11-23.json there.
MEASURED: dict[str, dict[str, float]] = {
    "llama": {
        "k8v8": 1.56e-05,
        "k8v4": 0.000833,
        "k5v4": 0.00163,
        "k4v4": 0.00474,
        "k4v3": 0.00801,
        "k3v3": 0.0239,
    }
}

_UNMEASURED = "k8v8"


class Choice(NamedTuple):
    """A preset, and why."""

    preset: str
    reason: str


def choose_preset(architecture: str) -> Choice:
    """The preset for a model of this architecture; presets are ordered from large to small."""
    family = architecture.removesuffix("ForCausalLM").lower()  # "LlamaForCausalLM", GGUF: "llama"
    measured = MEASURED.get(family, {})
    within = [preset for preset, kld in measured.items() if kld <= BOUND]
    if not within:
        return Choice(
            _UNMEASURED,
            f"no preset was measured to stay under a KL divergence of {BOUND} for {family} "
            "models; measure smaller ones with kvant eval fidelity",
        )
    best = within[-1]
    return Choice(
        best,
        f"the smallest preset measured to stay under a KL divergence of {BOUND} for {family} "
        f"models ({measured[best]:.2g} on WikiText-2)",
    )
