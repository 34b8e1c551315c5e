#!/usr/bin/env python
"""Write docs/formats.md from the code and from stored results.

python scripts/make_formats_doc.py          writes it
python scripts/make_formats_doc.py --check  fails if it is not what this would write
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kvant.formats import (
    ABOUT,
    FORMATS,
    PAGE_TOKENS,
    PRESETS,
    QUANT_POLICIES,
    KVShape,
    KVSpec,
    affine,
    auto,
    base,
    float8,
    hadamard,
    midpoint,
    packing,
    plain,
    spec,
)

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "formats.md"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = (
    "fidelity-presets-smollm2-2026-11-23.json",
    "fidelity-formats-smollm2-2026-11-23.json",
    "fidelity-fp8-smollm2-2026-11-23.json",
    "fidelity-tuned-4.6-smollm2-2026-11-23.json",
    "fidelity-tuned-3.7-smollm2-2026-11-23.json",
)
PEERS = "peers-fidelity-smollm2-2026-11-23.json"
KEY_BIAS = "key-bias-2026-11-23.json"
CONTEXT = 4096


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def docs_of(module: ModuleType) -> str:
    """A module's docstring as Markdown."""
    text = (module.__doc__ or "").replace("``", "`")
    for role in (":class:", ":func:", ":mod:"):
        text = text.replace(role, "")
    return text.strip()


def short(spelling: str) -> str:
    whole, *layers = KVSpec.parse(spelling).label.split(";")
    return whole + (f"; {len(layers)} groups of layers apart" if layers else "")


def presets() -> str:
    rows = []
    for name, spelling in PRESETS.items():
        kv = KVSpec.parse(name)
        shapes = (KVShape(num_layers=1, num_kv_heads=1, head_dim=dim) for dim in (64, 128))
        bits = [f"{kv.bits_per_element(shape, CONTEXT):.2f}" for shape in shapes]
        rows.append((f"`{name}`", f"`{spelling}`", *bits, ABOUT[name]))
    return table(("preset", "means", "bits, D = 64", "D = 128", "when to take it"), rows)


def formats() -> str:
    rows = [
        (
            f"`{name}`",
            f"{fmt.bits_per_element(64):.2f}",
            f"{fmt.bits_per_element(128):.2f}",
            "page" if fmt.by_page else "token",
            "yes" if fmt.rotated else "no",
            ABOUT[name],
        )
        for name, fmt in FORMATS.items()
    ]
    return table(("format", "bits, D = 64", "D = 128", "encoded by", "rotated", ""), rows)


def loss() -> str:
    parts = []
    for name in MEASURED:
        found = load(name)
        rows = [
            (
                f"`{short(row['kv_spec'])}`",
                f"{row['bits_per_element']:.2f}",
                f"{row['kld']:.2g}",
                f"{row['kld_p99']:.2g}",
                f"{row['top1_percent']:.2f} %",
                f"{row['dppl_percent']:+.2f} %",
            )
            for row in found["results"]
        ]
        head = ("KV", f"bits at {CONTEXT} tokens", "KL, mean", "99 %", "top-1", "perplexity")
        first = found["results"][0]
        parts.append(
            f"{first['windows']} x {first['ctx']} tokens, {found['machine']['cpu']}, "
            f"{found['machine']['date']}; `benchmarks/results/{name}`:\n\n"
            f"    {found['command']}\n\n" + table(head, rows)
        )
    return "\n\n".join(parts)


def peers() -> str:
    rows = [
        (
            f"{row['engine']} {row['version']}",
            f"`{row['kv']}`",
            f"{row['bits_per_element']:.2f}",
            f"{row['kld']:.2g}",
            f"{row['top1_percent']:.2f} %",
            row["windows"],
        )
        for row in load(PEERS)["results"]
    ]
    return table(("engine", "KV", "bits", "KL, mean", "top-1", "windows"), rows)


def key_bias() -> str:
    rows = [
        (f"`{row['kv']}`", f"{row['bits_per_element']:.2f}", f"{row['worst']:.2g}")
        for row in load(KEY_BIAS)["results"]
    ]
    return table(("KV", "bits, D = 128", "worst attention KL, nats"), rows)


def byte_map() -> str:
    """Where each plane of a part of 64 tokens begins."""
    rows = []
    for name, fmt in FORMATS.items():
        for dim in (64, 128):
            offset, planes = 0, []
            for plane in fmt.planes(dim):
                shape = f"{max(plane.columns, 1)} x " if plane.columns else ""
                each = "" if plane.of == "page" else f"{PAGE_TOKENS} x "
                planes.append(f"{offset}: {plane.name} ({each}{shape}{plane.dtype})")
                offset += plane.nbytes
            rows.append((f"`{name}`", dim, "; ".join(planes), offset))
    return table(("format", "D", "planes from byte", "bytes of 64 tokens"), rows)


def document() -> str:
    policies = {number: name or "16 bit" for number, name in QUANT_POLICIES.items()}
    own = textwrap.dedent(
        """\
        # KV formats

        Written by `python scripts/make_formats_doc.py` from the code and from stored results; do
        not edit.

        ## Presets

        {presets}

        Bits are per K or V element and count every byte of a sequence of {context} tokens: codes,
        scales, zeros, the recent group and the first one. 16 bits is the default everywhere;
        nothing is quantized unless you ask for it.

        `quant_policy` has LMDeploy's numbers: {policies}. 4 means `{four}`, because LMDeploy's own
        4-bit arithmetic (`int4` here, by name) loses {loss_ratio:.0f} times as much on the same
        text and destroys models with large key biases. 8 is LMDeploy's arithmetic; 16 is its
        type of numbers, but with a scale for each token and head where LMDeploy's is always 1.

        `auto` takes the smallest preset whose measured mean KL divergence is at most {bound} nats
        for the model's architecture, and says which; for an architecture without measurements it
        takes `{unmeasured}`. Run `kvant eval fidelity MODEL` for figures of your own model and
        text, and `kvant eval tune MODEL --budget-bits 4.5 --output policy.json` for formats by
        layer.

        ## Measured loss

        SmolLM2-135M-Instruct (head_dim 64), WikiText-2 raw test, weights in float32, against an
        exact cache, teacher-forced through the engine. KL divergence of the next token in nats.
        (`k4v2` in a command was a name for `k=int4c,v=int2m+s64r64`; `k3v3` took its place.)

        {loss}

        ### Other engines

        The same model, windows and reference; commands and notes in `benchmarks/peers/README.md`,
        result in `benchmarks/results/{peers_file}`.

        {peers}

        ### Keys with a large bias

        Synthetic keys like those of Qwen2.5-7B (bias norm 605 and 921), `python
        benchmarks/key_bias.py`, result in `benchmarks/results/{key_bias_file}`.

        {key_bias}

        ## Spelling

        {spelling}

        ## Building blocks

        {formats}

        """
    )
    kld = {row["kv_spec"]: row["kld"] for name in MEASURED for row in load(name)["results"]}
    four = str(QUANT_POLICIES[4])
    filled = own.format(
        presets=presets(),
        context=CONTEXT,
        policies=", ".join(f"{number} is {name}" for number, name in policies.items()),
        four=four,
        loss_ratio=kld["int4"] / kld[str(KVSpec.parse(four))],
        bound=auto.BOUND,
        unmeasured=auto.choose_preset("none").preset,
        loss=loss(),
        peers_file=PEERS,
        peers=peers(),
        key_bias_file=KEY_BIAS,
        key_bias=key_bias(),
        spelling=docs_of(spec),
        formats=formats(),
    )
    maths = "\n\n".join(
        f"## {title}\n\n{docs_of(module)}"
        for title, module in (
            ("Pages", base),
            ("int8, int4, int8h, int4h and the formats by channel", affine),
            ("Values without a zero: int4m, int3m, int2m", midpoint),
            ("fp8", float8),
            ("Rotation", hadamard),
            ("Codes as bytes", packing),
            ("f32, f16, bf16", plain),
        )
    )
    return f"{filled}{maths}\n\n## Byte map of a part\n\n{byte_map()}\n"


def main() -> int:
    text = document()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != text:
            print(f"{TARGET.name} is out of date: run python scripts/make_formats_doc.py")
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
