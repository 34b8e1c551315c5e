from __future__ import annotations

import csv
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kvant.bench.attention
import kvant.bench.sdpa
import kvant.bench.timing
from tests.bench.fake_openai import FakeOpenAI, serve
from tests.cli.conftest import Run, finish, start

SMALL = ("--num-prompts", "5", "--concurrency", "2", "--input-len", "20", "--output-len", "3")
SMALL += ("--kv-tokens", "2048")
GRID = ("--concurrency", "1,2", "--prompt-tokens", "8,70", "--completion-tokens", "2")
GRID += ("--kv-tokens", "2048", "--repeats", "1")
HEADS = ("--shapes", "2/1/16", "--contexts", "128,192,256", "--batch", "1,2", "--repeats", "1")
HEADS += ("--cold", "64KiB", "--max-bytes", "4MiB", "--layers", "2")
LAYERS = ("--shapes", "24x16,8x40", "--rows", "1,3", "--repeats", "1", "--cold", "1KiB")
MACHINE = {"cpu", "cores", "isa", "python", "versions", "date"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings and chunks of sizes that take no time."""
    monkeypatch.setattr(kvant.bench.timing, "_READ_BYTES", 2**16)
    monkeypatch.setattr(kvant.bench.timing, "_SIDE", 64)
    monkeypatch.setattr(kvant.bench.timing, "_MIN_SAMPLE", 1e-6)
    for module in (kvant.bench.attention, kvant.bench.sdpa):
        monkeypatch.setattr(module, "CHUNK", 128)
        monkeypatch.setattr(module, "HISTORY", 128)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("kvant.engine.load.load_weights", read)


def bench(run: Run, *words: str) -> dict[str, Any]:
    """The JSON, which is all that is printed."""
    done = run("bench", *words, "--json")
    assert (done.code, done.err) == (0, ""), done
    found: dict[str, Any] = json.loads(done.out)
    assert set(found["machine"]) == MACHINE and found["command"].startswith("kvant")
    return found


def documented(*titles: str) -> set[str]:
    """The keys in tables below some headings of docs/bench.md."""
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    rows = [
        line.split("|")[1]
        for title in titles
        for line in sections[title].split("| key | meaning |")[1:]
        for line in line.splitlines()
        if line.startswith("| `")
    ]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def keys(rows: list[dict[str, Any]]) -> set[str]:
    return {key for row in rows for key in row}


def test_throughput(run: Run, tiny: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "png")}
    found = bench(
        run, "throughput", tiny, *SMALL, "--kv", "f32,k=int8h,v=int4,k4v4", "--repeats", "2",
        "--output", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
    )  # fmt: skip
    assert found == json.loads(files["json"].read_text())
    assert found["model"] == tiny and found["workload"] == {
        "dataset": "random", "dataset_path": None, "num_prompts": 5, "concurrency": 2,
        "repeats": 2, "seed": 0, "input_len": 20, "output_len": 3,
    }  # fmt: skip
    rows = found["results"]
    assert [row["kv"] for row in rows] == ["f32", "k=int8h,v=int4", "k4v4"]
    assert rows[2]["kv_spec"] == "k=int4c,v=int4m+s64r64"
    assert rows[0]["kv_bytes_per_token"] > 2 * rows[1]["kv_bytes_per_token"]
    for row in rows:
        assert (row["total_input_tokens"], row["total_output_tokens"]) == (100, 15)
        assert row["max_concurrency"] == 2 and len(row["all_duration_s"]) == 2
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [line["kv_spec"] for line in lines] == [row["kv_spec"] for row in rows]
    assert set(lines[0]) == set(rows[0])
    assert float(lines[1]["p99_ttft_ms"]) == rows[1]["p99_ttft_ms"]


def test_documented_keys_are_those_that_are_emitted(run: Run, tiny: str) -> None:
    of_both = documented("Keys of throughput and latency")
    more = {"concurrency", "prompt_tokens", "completion_tokens"}
    more |= {"prefill_throughput", "decode_throughput"}
    assert more < of_both
    assert keys(bench(run, "throughput", tiny, *SMALL)["results"]) == of_both - more
    assert keys(bench(run, "latency", tiny, *GRID)["results"]) == of_both
    assert keys(bench(run, "linear", *LAYERS)["results"]) == documented("linear")
    words = ("--prompt", "512", "--model-repeats", "1", "--contexts", "128,192,1024,65536")
    measured = bench(run, "attention", tiny, *HEADS, *words, "--kv", "bf16,int4")["results"]
    assert keys(measured) == documented("attention")
    with serve(FakeOpenAI(cached_tokens=1, plan=["ok", 429])) as server:
        words = ("--url", server.url, "--num-prompts", "3", "--slo", "e2e:1")
        assert keys(bench(run, "serving", *words)["results"]) == documented("serving")


def test_the_table_of_throughput(run: Run, tiny: str) -> None:
    done = run("bench", "throughput", tiny, *SMALL, "--quant-policy", "0,8", "--repeats", "2")
    assert (done.code, done.err) == (0, "")
    assert "5 requests, 2 at a time: 100 tokens in, 15 out; bfloat16 weights" in done.out
    assert "medians of 2 runs" in done.out and "speed, bf16 = 1" in done.out
    assert re.search(r"^ +bf16 +int8$", done.out, flags=re.MULTILINE)
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        assert done.out.count(f"\n{name} (") == 5
    assert "KV cache in use, most" in done.out and "peak memory, MiB" in done.out


def test_data_sets(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ContextTokens,GeneratedTokens\n30,2\n9,3\n500,2\n")
    talk = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": talk}] * 3))
    words = ("throughput", tiny, "--num-prompts", "3", "--kv-tokens", "4096")
    trace = (*words, "--max-input-len", "40", "--dataset")
    one = bench(run, *trace, str(tmp_path / "t.csv"))
    two = bench(run, *trace, "trace", "--dataset-path", str(tmp_path / "t.csv"))
    for found in (one, two):
        assert found["workload"]["dataset"] == "trace"
        assert found["workload"]["dataset_path"] == str(tmp_path / "t.csv")
        assert found["results"][0]["total_input_tokens"] == 30 + 9 + 40
        assert found["results"][0]["total_output_tokens"] == 7
    said = bench(
        run, *words, "--dataset-name", "sharegpt", "--dataset-path", str(tmp_path / "s.json")
    )
    assert said["results"][0]["total_output_tokens"] == 3 * len("an answer")
    given = bench(run, *words, "--dataset", str(tmp_path / "s.json"), "--output-len", "4")
    assert given["results"][0]["total_output_tokens"] == 12


def test_latency(run: Run, tiny: str, tmp_path: Path) -> None:
    words = (*GRID, "--kv", "f32,int4", "--plot", str(tmp_path / "a.svg"))
    done = run("bench", "latency", tiny, *words)
    assert (done.code, done.err) == (0, "") and "</svg>" in (tmp_path / "a.svg").read_text()
    assert done.out.count("\nf32 ") == done.out.count("\nint4 ") == 4
    assert "prefill tokens/s" in done.out and "speed: f32 = 1" in done.out


def test_attention(run: Run, tmp_path: Path) -> None:
    words = (*HEADS, "--kv", "bf16,int4,k4v4", "--parts", "decode,sdpa", "--sdpa-shapes", "4/2/16")
    done = run("bench", "attention", *words, "--plot", str(tmp_path / "a.png"))
    assert done.code == 0 and "torch: " in done.out and "time of first" in done.out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    rows = bench(run, "attention", *words, "--parts", "decode")["results"]
    assert [row["what"] for row in rows] == ["decode"] * 18 + ["slope"] * 6
    assert rows[0]["kv"] == "bf16" and rows[0]["times_first"] == 1
    # One layer, one KV head, keys and values of 16 dimensions in 2 bytes.
    assert rows[0]["bytes"] == 128 * 2 * 16 * 2


def test_linear(run: Run, tiny: str, tmp_path: Path) -> None:
    words = (*LAYERS, "--plot", str(tmp_path / "a.png"))
    done = run("bench", "linear", *words)
    assert (done.code, done.err) == (0, "") and (tmp_path / "a.png").stat().st_size > 10_000
    assert "speed: torch bfloat16 = 1" in done.out
    rows = bench(run, "linear", *words, "--kinds", "kvant int8,torch codes")["results"]
    cases = [(row["shape"], row["rows"], row["kind"]) for row in rows]
    assert cases[:3] == [("24x16", 1, "kvant int8"), ("24x16", 1, "torch codes"),
                         ("24x16", 3, "kvant int8")]  # fmt: skip
    assert len(cases) == 8 and rows[1]["bytes"] == 24 * 16
    model = bench(run, "linear", tiny, "--rows", "1", "--repeats", "1", "--cold", "1KiB")["results"]
    shapes = dict.fromkeys(row["shape"] for row in model)
    assert list(shapes) == ["64x32", "32x32", "128x32", "32x64", "258x32"]


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--kv", "int8,int3"), "int3"),
        (("--kv", "int8", "--quant-policy", "8"), "use one of them"),
        (("--quant-policy", "0,5"), "quant_policy=5"),
        (("--quant-policy", "x"), '--quant-policy "x" must be whole numbers'),
        (("--num-prompts", "0"), "num_prompts=0 must be at least 1"),
        (("--concurrency", "-1"), "concurrency=-1 must be at least 1"),
        (("--concurrency", "many"), "--concurrency"),
        (("--repeats", "0"), "repeats=0 must be at least 1"),
        (("--seed", "-1"), "seed=-1 must be at least 0"),
        (("--tp", "2"), "tp=2: an engine is one process so far"),
        (("--input-len", "0"), "input_len=0 must be at least 1"),
        (("--range-ratio", "1.1"), "range_ratio=1.1 must be from 0 to 1"),
        (("--input-len", "20000"), "a request takes 20128 tokens"),
        (("--kv-tokens", "64"), "the limit is 64"),
        (("--dataset", "shargpt"), 'did you mean "sharegpt"'),
        (("--dataset", "trace"), "needs a file in --dataset-path"),
        (("--dataset", "random", "--dataset-path", "a.json"), "takes no file"),
        (("--dataset", "a.csv", "--dataset-path", "b.csv"), "use one of them"),
        (
            ("--dataset", "a.csv", "--input-len", "3"),
            "--input-len does not go with --dataset trace",
        ),
        (("--max-input-len", "3"), "--max-input-len does not go with --dataset random"),
        (("--dataset", "no-such.json"), "cannot read the data set no-such.json"),
        (("--dataset", "no-such.jsonl.gz"), "cannot read the data set no-such.jsonl.gz"),
        (("--output", "."), "--output . is a folder"),
        (("--csv", "no/such/folder.csv"), "--csv no/such/folder.csv"),
        (("--plot", "a.txt"), "must end in .png"),
        (("--max-batch-size", "3"), 'no option "--max-batch-size"'),
        (("--weights", "int5"), "int5"),
    ),
)
@pytest.mark.usefixtures("no_weights")
def test_wrong_words(run: Run, tiny: str, words: tuple[str, ...], said: str) -> None:
    run("bench", "throughput", tiny, *words).assert_error(2, said)


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("latency", "MODEL", "--concurrency", "1,0"), "concurrency=0 must be at least 1"),
        (("latency", "MODEL", "--prompt-tokens", "x"), '--prompt-tokens "x" must be'),
        (("latency", "MODEL", "--prompt-tokens", "20000"), "a request takes 20128 tokens"),
        (("attention", "--parts", "decode,reed"), 'no part "reed"'),
        (("attention", "--parts", "write"), "the part write runs a model"),
        (("attention", "--contexts", "100"), "context=100 must be a multiple of 64 from 128"),
        (("attention", "--batch", "0"), "batch=0 must be at least 1"),
        (("attention", "--shapes", "3/2/64"), 'heads "3/2/64" must be'),
        (("attention", "--shapes", "64"), 'heads "64" must be'),
        (("attention", "--shapes", "2/1/17"), "head_dim"),
        (("attention", "--cold", "much"), "'much' is not a size"),
        (("attention", "--prompt", "100"), "prompt=100 must be a multiple of 512"),
        (("attention", "--backend", "fast"), "fast"),
        (("attention", "--backend", "triton"), "scripts/gpu-gate"),
        (("attention", "--num-threads", "0"), "num_threads=0"),
        (("attention", "--kv", "int8,"), "empty entry"),
        (("attention", "--num-threads", "100000"), "num_threads=100000 exceeds"),
        (("linear", "--shapes", "64"), 'shape "64" must be OUTxIN'),
        (("linear", "--shapes", "64x12"), "a multiple of 8"),
        (("linear", "--rows", "0"), "rows=0 must be at least 1"),
        (("linear", "--kinds", "kvant int3"), "kvant int4"),
    ),
)
@pytest.mark.usefixtures("no_weights")
def test_wrong_words_of_other_tasks(run: Run, tiny: str, words: tuple[str, ...], said: str) -> None:
    run("bench", *(tiny if word == "MODEL" else word for word in words)).assert_error(2, said)


@pytest.mark.usefixtures("no_weights")
def test_wrong_tasks_and_models(run: Run, tiny: str) -> None:
    run("bench").assert_error(2, "throughput")
    run("bench", "throghput", tiny).assert_error(2, 'did you mean "throughput"', "latency")
    run("bench", "throughput").assert_error(2, "MODEL")
    run("bench", "throughput", "no-such-model").assert_error(3, "no-such-model")
    run("bench", "linear", "no-such-model").assert_error(3, "no-such-model")


def test_a_plot_without_matplotlib(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("bench", "throughput", tiny, *SMALL, "--plot", str(tmp_path / "a.png"))
    done.assert_error(2, 'pip install "kvant[eval]"')


def test_ctrl_c_ends_it(tiny: str) -> None:
    process = start("bench", "throughput", tiny, "--output-len", "15000", "--kv-tokens", "300000")
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.out, done.err) == (130, "", "")
