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
from kvant.cache.sizing import free_memory, recent_per_sequence
from kvant.cli.options import add_options, read_options
from kvant.cli.terminal import import_engine, table
from kvant.config import EngineConfig, parse_bytes
from kvant.errors import ConfigError
from kvant.formats import ABOUT, FORMATS, PAGE_TOKENS, PRESETS, KVShape, KVSpec
from kvant.kernels import BACKENDS, check_backend
from kvant.kernels.cpu import available_isas, chosen_isa
from kvant.machine import cpu, isa, package_version

if TYPE_CHECKING:
    from kvant.loading.packed import Packing
    from kvant.models.config import DecoderConfig

__all__ = ["configure", "run"]

# Options of the engine that change nothing about memory.
_UNRELATED = (
    "enable_prefix_caching",
    "max_prefill_token_num",
    "backend",
    "eager_mode",
    "num_threads",
    "check",
)
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "gguf")
_GIB = 2**30
_CONTEXT = 4096  # tokens over which finer groups are spread in figures of bits
_BITS = {"int8": 8.1, "int4": 5.0}  # of a weight, with scales and offsets (models/codes.py)

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
        "kernels": {"isa": chosen_isa(), "available": available_isas()},
        "memory_free": free_memory(),
        "gpus": _gpus(),
        "backends": ["auto", *BACKENDS],
        "auto_backend": check_backend("auto"),
        "formats": [_format_row(name) for name in _names()],
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


def _names() -> list[str]:
    """Formats that can be used alone, and presets."""
    return [*(name for name, fmt in FORMATS.items() if not fmt.by_page), *PRESETS]


def _format_row(name: str) -> Json:
    spec = KVSpec.parse(name)
    shapes = {dim: KVShape(num_layers=1, num_kv_heads=1, head_dim=dim) for dim in (64, 128)}
    bits = {f"bits_{dim}": spec.bits_per_element(shapes[dim], _CONTEXT) for dim in shapes}
    return {"name": name, **bits, "about": ABOUT[name]}


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
            f"kernels   {facts['kernels']['isa']} (of {', '.join(facts['kernels']['available'])}; "
            "KVANT_ISA forces one)",
            f"memory    {_gib(facts['memory_free'])} free",
            f"GPU       {'; '.join(facts['gpus']) or 'none found'}",
            f"backends  {', '.join(facts['backends'])} (auto is {facts['auto_backend']})",
            "",
            table(("KV format", "bits D=64", "D=128", ""), rows, left=(0, 3)),
            "",
            f"Bits are per element, metadata and finer groups included, at {_CONTEXT} tokens.",
            f'Also: "k=int8h,v=int4h" for keys and values apart, "+r{PAGE_TOKENS}" for a finer '
            "format in the most",
            f'recent group, "+s{PAGE_TOKENS}r{PAGE_TOKENS}" in the first too, ";0,-1=int8h" for '
            "single layers. kvant info MODEL shows what fits.",
        )
    )


def _model(name: str, config: EngineConfig, memory: int | None) -> Json:
    from kvant.loading.resolve import resolve_model

    path = resolve_model(name, revision=config.revision, download_dir=config.download_dir)
    import_engine()
    from kvant.engine.load import open_checkpoint

    checkpoint = open_checkpoint(path)
    model = checkpoint.config
    chosen = config.kv_spec(model.architecture)
    kind, weights = _weights(model, config, checkpoint.quantized)
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
        "weights": kind,
        "weight_bytes": weights,
        "memory": memory,
        "session_len": config.session_len or model.max_positions,
        "kv": str(chosen),
        "formats": [_cache_row(spec, config, model, memory) for spec in _specs(chosen)],
    }


def _specs(chosen: KVSpec) -> list[KVSpec]:
    """Every format that can be used alone, every preset, and the one that was asked for."""
    known = [KVSpec.parse(name) for name in _names()]
    return known if chosen in known else [*known, chosen]


def _cache_row(spec: KVSpec, config: EngineConfig, model: DecoderConfig, memory: int) -> Json:
    """What a cache of this format takes and holds; ``problem`` says why there can be none."""
    from kvant.engine.load import cache_size

    row: Json = {"kv": str(spec), "name": spec.label}
    shape = model.kv_shape
    try:
        spec.check(shape)
        row["bits_per_element"] = spec.bits_per_element(shape, _CONTEXT)
        row["bytes_per_token"] = spec.bytes_per_token(shape)
        row["page_bytes"] = spec.page_bytes(shape)
        row["tokens_per_gib"] = spec.tokens_per_gib(shape)
        size = cache_size(config, spec, model, memory)
    except ConfigError as error:
        return row | {"problem": str(error)}
    length = config.session_len or model.max_positions
    requests = size.num_pages // -(-length // PAGE_TOKENS)
    if each := recent_per_sequence(spec):  # full groups leave the recent page, but for the sink
        full = length // PAGE_TOKENS - spec.sink
        most = min(size.num_recent // each, config.max_batch_size)
        requests = min(size.num_pages // max(1, full), most)
    return row | {
        "num_pages": size.num_pages,
        "num_recent": size.num_recent,
        "nbytes": size.nbytes,
        "num_tokens": size.num_tokens,
        "full_length_requests": requests,
    }


def _weights(
    model: DecoderConfig, config: EngineConfig, packing: Packing | None
) -> tuple[str, int]:
    """What linear layers are, and about how many bytes all matrices take, which is all but a
    thousandth of a model. The head has its own, also where it is made of the embedding."""
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layers = model.num_layers * model.hidden_size * (attention + 3 * model.intermediate_size)
    embedding = model.vocab_size * model.hidden_size
    kind = "bfloat16" if config.dtype == "auto" else config.dtype
    plain = 32 if kind == "float32" else 16
    bits = head = float(plain)
    if config.weight_dtype != "auto":
        kind, head = config.weight_dtype, _BITS["int8"]
        bits = _BITS[kind]
    kept = packing is not None and not packing.act_order
    if packing is not None and kept and config.weight_dtype in ("auto", f"int{packing.bits}"):
        groups = f"groups of {packing.group}" if packing.group else "one group"
        kind = f"{packing.kind}, {packing.bits} bits, {groups}"
        scales = 2 if packing.bits == 4 else 1  # most have offsets too
        bits = packing.bits + 16 * scales / (packing.group or model.hidden_size)
    return kind, int(layers * bits + embedding * (head + plain)) // 8


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
            f"weights ({facts['weights']}) take about {_gib(facts['weight_bytes'])}; memory free "
            f"beside them: {_gib(facts['memory'])}",
            "",
            table(head, rows),
            "",
            f"* is the format of these options. x {facts['session_len']}: requests of that many "
            f"tokens that fit (with +r{PAGE_TOKENS} at most max_batch_size).",
            *problems,
        )
    )


def _cache_cells(row: Mapping[str, Any], *, chosen: bool) -> tuple[str, ...]:
    name = row["name"] + (" *" if chosen else "")
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
