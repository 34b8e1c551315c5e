from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvant import EngineConfig
from kvant.cli.info import ABOUT
from kvant.config import parse_bytes
from kvant.formats import FORMATS, PRESETS, KVSpec
from kvant.kernels.cpu import available_isas
from tests.byte_model import write_config
from tests.cli.conftest import Run

GIB = 2**30
ALONE = [name for name, fmt in FORMATS.items() if not fmt.by_page]  # needs no recent group


def facts(run: Run, *words: str) -> dict[str, Any]:
    done = run("info", *words, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_machine(run: Run) -> None:
    done = run("info")
    assert done.code == 0
    for word in ("kvant", "torch", "numpy", "cores", "free", "reference", *ALONE, *PRESETS):
        assert word in done.out
    found = facts(run)
    assert [row["name"] for row in found["formats"]] == [*ALONE, *PRESETS]
    assert found["cores"] >= 1 and found["memory_free"] > 0
    assert "reference" in found["backends"]
    bits = {row["name"]: row["bits_64"] for row in found["formats"]}
    assert bits["int8"] == 8.5
    # 64 groups: 62 of 4.5 and 4.25 bits, two of 16 and 8.5
    assert bits["k4v4"] == (62 * (4.5 + 4.25) + 2 * (16 + 8.5)) / 2 / 64


def test_the_kernels_are_those_that_would_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVANT_ISA", raising=False)
    available = list(available_isas())
    assert facts(run)["kernels"] == {"isa": available[-1], "available": available}
    monkeypatch.setenv("KVANT_ISA", "scalar")
    assert facts(run)["kernels"] == {"isa": "scalar", "available": available}
    lines = run("info").out.splitlines()
    assert f"kernels   scalar (of {', '.join(available)}; KVANT_ISA forces one)" in lines


@pytest.mark.parametrize("words", ((), ("--json",)))
def test_kernels_that_are_not_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("KVANT_ISA", "nonsense")
    done = run("info", *words)
    done.assert_error(2, "KVANT_ISA", '"nonsense"', ", ".join(available_isas()), "unset it")
    assert done.out == ""


def test_every_format_is_described() -> None:
    assert set(ABOUT) == {*FORMATS, *PRESETS}


def test_sizes_of_a_model(run: Run, tiny: str) -> None:
    found = facts(run, tiny, "--memory", "1GiB", "--session-len", "1000")
    assert (found["num_layers"], found["num_kv_heads"], found["head_dim"]) == (2, 1, 16)
    assert found["kv"] == "bf16"
    rows = {row["name"]: row for row in found["formats"]}
    assert list(rows) == [*ALONE, *PRESETS]
    assert rows["k4v4"]["kv"] == PRESETS["k4v4"]
    row = rows["int8"]
    assert row["kv"] == "int8"
    assert row["bits_per_element"] == 10 and row["bytes_per_token"] == 80
    assert row["page_bytes"] == 80 * 64
    assert row["tokens_per_gib"] == GIB // (80 * 64) * 64
    assert row["num_tokens"] == int(0.8 * GIB) // (80 * 64) * 64
    assert row["full_length_requests"] == row["num_pages"] // 16


@pytest.mark.parametrize(("kv", "each"), (("int4h+r64", 1), ("int4h+s64r64", 2), ("k4v4", 2)))
def test_what_was_asked_for_is_a_row(run: Run, tiny: str, kv: str, each: int) -> None:
    """Requests are as many as the pages that each needs: 15 full groups, and recent pages."""
    found = facts(run, tiny, "--memory", "1GiB", "--session-len", "1000", "--kv", kv)
    rows = {row["kv"]: row for row in found["formats"]}
    assert len(rows) == len(found["formats"])
    row = rows[str(KVSpec.parse(kv))]
    assert found["kv"] == row["kv"] and row["name"] == kv
    fit = min(row["num_pages"] // (16 - each), row["num_recent"] // each, 128)
    assert row["num_recent"] >= 128 * each and row["full_length_requests"] == fit


@pytest.mark.parametrize(
    "words",
    (
        ("--kv-memory", "1MiB"),
        ("--kv-tokens", "1000"),
        ("--memory", "100MB", "--cache-max-entry-count", "0.02"),
        ("--kv-memory", "100000", "--max-batch-size", "3"),
    ),
)
@pytest.mark.parametrize("kv", ("f32", "int4h+r64", "k=int8,v=int4h+r64:bf16", "k4v4;0=int8h"))
def test_sizes_are_those_that_loading_chooses(
    run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kv: str
) -> None:
    """Held down: a second way to compute the size of a cache."""
    from kvant.engine import load

    given = dict(zip(words[::2], words[1::2], strict=True))
    options: dict[str, Any] = {"kv": kv}
    for name, convert in (("kv_memory", str), ("kv_tokens", int), ("max_batch_size", int),
                          ("cache_max_entry_count", float)):  # fmt: skip
        if (value := given.get(f"--{name.replace('_', '-')}")) is not None:
            options[name] = convert(value)
    if "--memory" in given:
        monkeypatch.setattr(load, "free_memory", lambda: parse_bytes(given["--memory"]))
    rows = {row["kv"]: row for row in facts(run, tiny, "--kv", kv, *words)["formats"]}
    cache = load.load_model(tiny, EngineConfig(**options)).cache
    row = rows[str(KVSpec.parse(kv))]
    assert (row["num_pages"], row["num_recent"], row["nbytes"], row["num_tokens"]) == (
        cache.num_pages, cache.num_recent, cache.nbytes, cache.num_tokens
    )  # fmt: skip


def test_the_weights_are_taken_off_the_free_memory(
    run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvant.cli.info.free_memory", lambda: GIB)
    found = facts(run, tiny)
    stored = Path(tiny, "model.safetensors").stat().st_size / 4  # there in float32
    assert found["weight_bytes"] / 2 == pytest.approx(stored, rel=0.05)
    assert found["memory"] == GIB - found["weight_bytes"]
    assert facts(run, tiny, "--dtype", "float32")["weight_bytes"] == 2 * found["weight_bytes"]


def matrices(model: Path) -> tuple[int, int]:
    """Weights of layers, and those of the embedding, which are as many as the head's."""
    from safetensors.torch import load_file

    sizes = {name: x.numel() for name, x in load_file(model).items() if x.ndim == 2}
    return sum(size for name, size in sizes.items() if "layers" in name), sizes.pop(
        "lm_head.weight"
    )


@pytest.mark.parametrize(("kind", "bits", "head"), (("int8", 8, 8), ("int4", 5, 8)))
def test_quantized_weights(run: Run, tiny: str, kind: str, bits: int, head: int) -> None:
    """The head keeps 8 bits; the embedding is only looked up."""
    layers, embedding = matrices(Path(tiny, "model.safetensors"))
    assert facts(run, tiny)["weights"] == "bfloat16"
    found = facts(run, tiny, "--weights", kind)
    assert found["weights"] == kind
    expected = (layers * bits + embedding * (head + 16)) / 8
    assert found["weight_bytes"] == pytest.approx(expected, rel=0.05)
    assert f"weights ({kind}) take about" in run("info", tiny, "--weights", kind).out


@pytest.mark.parametrize(
    ("method", "bits", "group", "words", "expected", "size"),
    (
        ("awq", 4, 64, (), "awq, 4 bits, groups of 64", 4.5),
        ("gptq", 8, -1, (), "gptq, 8 bits, one group", 8.5),
        ("gptq", 4, 32, ("--weights", "int4"), "gptq, 4 bits, groups of 32", 5),
        ("gptq", 4, 32, ("--weights", "int8"), "int8", 8.1),
    ),
)
def test_weights_that_a_checkpoint_stores_as_codes(
    run: Run,
    tiny: str,
    tmp_path: Path,
    method: str,
    bits: int,
    group: int,
    words: tuple[str, ...],
    expected: str,
    size: float,
) -> None:
    """Weights are not read, so the tiny model's will do."""
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    quantization = {"quant_method": method, "bits": bits, "group_size": group}
    write_config(tmp_path, quantization_config=quantization)
    layers, embedding = matrices(Path(tiny, "model.safetensors"))
    found = facts(run, str(tmp_path), *words)
    assert found["weights"] == expected
    head = 8.1 if words else 16
    total = (layers * size + embedding * (head + 16)) / 8
    assert found["weight_bytes"] == pytest.approx(total, rel=0.01)


def test_the_table(run: Run, tiny: str) -> None:
    out = run("info", tiny, "--memory", "1GiB", "--quant_policy", "4").out
    assert "LlamaForCausalLM, 2 layers, 2 heads, 1 KV heads of 16, context 16384" in out
    assert "k4v4 *" in out and "bf16 *" not in out and "s64r64 *" not in out
    assert "x 16384" in out


def test_a_cache_that_cannot_be_is_a_row_with_a_reason(run: Run, tiny: str) -> None:
    found = facts(run, tiny, "--kv-memory", "5200", "--memory", "1MiB")
    rows = {row["kv"]: row for row in found["formats"]}
    assert rows["int8"]["num_tokens"] == 64
    assert "holds no page" in rows["f32"]["problem"] and "num_tokens" not in rows["f32"]
    text = run("info", tiny, "--kv-memory", "5200", "--memory", "1MiB").out
    assert "holds no page" in text


def test_a_head_dim_that_a_format_cannot_store(run: Run, tmp_path: Path, tiny: str) -> None:
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    write_config(tmp_path, head_dim=12)
    rows = {row["kv"]: row for row in facts(run, str(tmp_path))["formats"]}
    assert "multiple of 8" in rows["int8"]["problem"]
    assert rows["bf16"]["num_tokens"] > 0
    assert run("info", str(tmp_path)).code == 0


def test_wrong_words(run: Run, tiny: str) -> None:
    run("info", tiny, "--memory", "lots").assert_error(2, "'lots'")
    run("info", "no-such-model").assert_error(3, "no-such-model")
    run("info", tiny, "--kv", "int3").assert_error(2, "int3")
