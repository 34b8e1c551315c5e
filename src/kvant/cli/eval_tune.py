"""Find the KV formats of each layer that lose least for a budget of bits.

Layers and sides (K, V) are measured one by one on a text, which takes twice as many runs as the
model has layers. The file that --output names is a KV format: pass it to --kv.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvant.cli import eval as shared
from kvant.cli import measuring
from kvant.errors import ConfigError

if TYPE_CHECKING:
    from kvant.eval.tune import Policy

__all__ = ["configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant eval tune``."""
    parser.add_argument(
        "--budget-bits",
        metavar="B",
        type=float,
        default=4.5,
        help="most bits per element, all bytes of 4096 tokens counted (default: 4.5)",
    )
    shared.add_measuring(parser, ctx="1024", windows=1)


def run(options: Namespace) -> int:
    """Tune, print and store."""
    config = shared.read_config(options)
    contexts = shared.contexts(options.ctx)
    measuring.check_targets(options)
    if options.output is not None and not options.output.endswith(".json"):
        raise ConfigError(f"--output {options.output} must end in .json, by which --kv knows it")
    text = shared.open_text(options)
    opened = measuring.find_model(options, config)
    from kvant.eval.fidelity import make_plan
    from kvant.eval.runner import Runner
    from kvant.eval.tune import check_tuning, num_tokens, tune

    baseline = config.kv_spec()
    plan = make_plan(
        opened,
        text,
        baseline=baseline,
        specs=(),
        contexts=contexts,
        windows=options.windows,
        greedy=0,
    )
    shape = opened.config.kv_shape
    windows = [ids for each in plan.windows.values() for ids in each]
    check_tuning(shape, windows, options.budget_bits)
    shared.note_text(options, plan.windows)
    weights = measuring.load_weights(options, config, opened)
    with measuring.ticking("tuning", num_tokens(shape, windows), shown=not options.json) as tick:
        policy = tune(Runner(opened, weights, config, tick), baseline, windows, options.budget_bits)
    found = {
        "budget_bits": options.budget_bits,
        "ctx": contexts,
        "windows": len(windows),
        **asdict(policy),
    }
    stored = shared.store(options, config, text, found)
    print(stored if options.json else _text(policy))
    return 0


def _text(policy: Policy) -> str:
    lines = [
        f"kv      {policy.kv}",
        f"bits    {policy.bits_per_element:.2f} per element",
        f"KL      {policy.kld} measured, {policy.expected_kld} estimated",
    ]
    if policy.uniform_kv is not None:
        lines.append(
            f"beside  {policy.uniform_kv}: {policy.uniform_bits_per_element:.2f} bits, "
            f"KL {policy.uniform_kld}"
        )
    return "\n".join(lines)
