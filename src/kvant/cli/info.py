"""This machine, the KV formats, and what a model's KV cache takes in each of them.

With a model the sizes are those that loading it would choose. Its weights are not read: what
they will take is subtracted from the memory found free, unless --memory says what to assume.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvant import __version__
from kvant.cache.sizing import free_memory
from kvant.cli.options import add_options, read_options
from kvant.cli.terminal import import_engine, table
from kvant.config import EngineConfig, parse_bytes
from kvant.errors import ConfigError
from kvant.formats import FORMATS, PAGE_TOKENS, PRESETS, KVSpec
from kvant.kernels import BACKENDS
from kvant.machine import cpu, isa, package_version

if TYPE_CHECKING:
    from kvant.models.config import DecoderConfig

__all__ = ["configure", "run"]

ABOUT = {
    "f32": "exact",
    "f16": "16-bit floats of 11 bits precision, up to 65504",
    "bf16": "16-bit floats of 8 bits precision (quant_policy 0)",
    "int8": "asymmetric integers, a scale and a zero per token and head (quant_policy 8)",
    "int4": "the same with 4 bits (quant_policy 4)",
    "int8h": "int8 of Hadamard-rotated vectors",
    "int4h": "int4 of Hadamard-rotated vectors",
    "k8v4": "int8 keys, int4 values",
    "k8v4h": "int8h keys, int4h values",
}

# Options of the engine that change nothing about memory.
_UNRELATED = (
    "enable_prefix_caching",
    "max_prefill_token_num",
    "backend",
    "num_threads",
    "check",
)
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "gguf")
_GIB = 2**30

Json = dict[str, Any]


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant info``."""
    parser.usage = "kvant info [MODEL] [options]"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="show what its cache takes")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory to assume free once the weights are loaded, as 16GiB",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_options(parser, EngineConfig, "engine", without=_UNRELATED)


def run(options: Namespace) -> int:
    """Print what was asked for."""
    config = read_options(options, EngineConfig)
    memory = None if options.memory is None else parse_bytes(options.memory)
    if options.model is None:
        facts, text = _machine(), _machine_text
    else:
        facts, text = _model(options.model, config, memory), _model_text
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


def _machine() -> Json:
    return {
        "kvant": __version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "isa": isa(),
        "memory_free": free_memory(),
        "gpus": _gpus(),
        "backends": ["auto", *BACKENDS],
        "auto_backend": next(iter(BACKENDS)),
        "formats": [_format_row(name) for name in (*FORMATS, *PRESETS)],
    }


def _gpus() -> list[str]:
    """Names and memory of NVIDIA GPUs, as the driver's own program gives them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _format_row(name: str) -> Json:
    spec = KVSpec.parse(name)
    return {
        "name": name,
        "bits_64": spec.bits_per_element(64),
        "bits_128": spec.bits_per_element(128),
        "about": ABOUT.get(name, ""),
    }


def _machine_text(facts: Json) -> str:
    packages = (f"{name} {number or 'missing'}" for name, number in facts["packages"].items())
    rows = [
        (row["name"], f"{row['bits_64']:.2f}", f"{row['bits_128']:.2f}", row["about"])
        for row in facts["formats"]
    ]
    return "\n".join(
        (
            f"kvant     {facts['kvant']} on Python {facts['python']}; {', '.join(packages)}",
            f"CPU       {facts['cpu']}, {facts['cores']} cores",
            f"ISA       {' '.join(facts['isa']) or 'no known extension found'}",
            f"memory    {_gib(facts['memory_free'])} free",
            f"GPU       {'; '.join(facts['gpus']) or 'none found'}",
            f"backends  {', '.join(facts['backends'])} (auto is {facts['auto_backend']})",
            "",
            table(("KV format", "bits D=64", "D=128", ""), rows, left=(0, 3)),
            "",
            f'Bits are per element, metadata included. Also: "k=int8h,v=int4h" for keys and values '
            f'apart, "+r{PAGE_TOKENS}"',
            "for a finer format in the most recent group. kvant info MODEL shows what fits.",
        )
    )


def _model(name: str, config: EngineConfig, memory: int | None) -> Json:
    from kvant.loading.resolve import resolve_model

    path = resolve_model(name, revision=config.revision, download_dir=config.download_dir)
    import_engine()
    from kvant.engine.load import open_checkpoint

    model = open_checkpoint(path).config
    chosen = config.kv_spec()
    weights = _num_weights(model) * (4 if config.dtype == "float32" else 2)
    if memory is None:
        memory = max(free_memory() - weights, 1)
    return {
        "model": name,
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_positions": model.max_positions,
        "weight_bytes": weights,
        "memory": memory,
        "session_len": config.session_len or model.max_positions,
        "kv": str(chosen),
        "formats": [_cache_row(spec, config, model, memory) for spec in _specs(chosen)],
    }


def _specs(chosen: KVSpec) -> list[KVSpec]:
    """Every format and preset, those with 4-bit parts also with a recent group, and the one
    that was asked for."""
    specs = [KVSpec.parse(name) for name in (*FORMATS, *PRESETS)]
    recent = [KVSpec.parse(f"{spec}+r{PAGE_TOKENS}") for spec in specs if _is_coarse(spec)]
    known = [*specs, *recent]
    return known if chosen in known else [*known, chosen]


def _is_coarse(spec: KVSpec) -> bool:
    return min(spec.k.bits_per_element(128), spec.v.bits_per_element(128)) < 8


def _cache_row(spec: KVSpec, config: EngineConfig, model: DecoderConfig, memory: int) -> Json:
    """What a cache of this format takes and holds; ``problem`` says why there can be none."""
    from kvant.engine.load import cache_size

    row: Json = {"kv": str(spec)}
    shape = model.kv_shape
    try:
        spec.check_head_dim(model.head_dim)
        row["bits_per_element"] = spec.bits_per_element(model.head_dim)
        row["bytes_per_token"] = spec.bytes_per_token(shape)
        row["page_bytes"] = spec.page_bytes(shape)
        row["tokens_per_gib"] = spec.tokens_per_gib(shape)
        size = cache_size(config, spec, shape, memory)
    except ConfigError as error:
        return row | {"problem": str(error)}
    length = config.session_len or model.max_positions
    requests = size.num_pages // -(-length // PAGE_TOKENS)
    if spec.recent is not None:  # each needs a recent page; full groups leave it
        requests = min(size.num_pages // max(1, length // PAGE_TOKENS), size.num_recent)
    return row | {
        "num_pages": size.num_pages,
        "num_recent": size.num_recent,
        "nbytes": size.nbytes,
        "num_tokens": size.num_tokens,
        "full_length_requests": requests,
    }


def _num_weights(model: DecoderConfig) -> int:
    """Parameters of the matrices, which is all but a thousandth of a model."""
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (attention + 3 * model.intermediate_size)
    embeddings = 1 if model.tie_embeddings else 2
    return model.num_layers * layer + embeddings * model.vocab_size * model.hidden_size


def _model_text(facts: Json) -> str:
    head = ("KV format", "bits", "bytes/token", "page bytes", "tokens/GiB", "tokens that fit",
            f"x {facts['session_len']}")  # fmt: skip
    rows = [_cache_cells(row, chosen=row["kv"] == facts["kv"]) for row in facts["formats"]]
    problems = dict.fromkeys(row["problem"] for row in facts["formats"] if "problem" in row)
    return "\n".join(
        (
            f"{facts['model']}: {facts['architecture']}, {facts['num_layers']} layers, "
            f"{facts['num_heads']} heads, {facts['num_kv_heads']} KV heads of "
            f"{facts['head_dim']}, context {facts['max_positions']}",
            f"weights take about {_gib(facts['weight_bytes'])}; memory free beside them: "
            f"{_gib(facts['memory'])}",
            "",
            table(head, rows),
            "",
            f"* is the format of these options. x {facts['session_len']}: requests of that many "
            f"tokens that fit (with +r{PAGE_TOKENS} at most max_batch_size).",
            *problems,
        )
    )


def _cache_cells(row: Mapping[str, Any], *, chosen: bool) -> tuple[str, ...]:
    name = row["kv"] + (" *" if chosen else "")
    if "bits_per_element" not in row:
        return name, "-", "-", "-", "-", "-", "-"
    return (
        name,
        f"{row['bits_per_element']:.2f}",
        f"{row['bytes_per_token']:g}",
        str(row["page_bytes"]),
        str(row["tokens_per_gib"]),
        str(row.get("num_tokens", "-")),
        str(row.get("full_length_requests", "-")),
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
