from __future__ import annotations

import csv
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fake_openai import FakeOpenAI, serve
from tests.cli.conftest import Run, finish, start


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve() as fake:
        yield fake


def bench(run: Run, fake: FakeOpenAI, *words: str) -> dict[str, Any]:
    """The JSON, which is all that is printed."""
    done = run("bench", "serving", "--url", fake.url, *words, "--json")
    assert (done.code, done.err) == (0, ""), done
    found: dict[str, Any] = json.loads(done.out)
    return found


SMALL = ("--num-prompts", "5", "--input-len", "6", "--output-len", "3")


def test_rates_get_a_row_each_and_requests_of_their_own(
    run: Run, fake: FakeOpenAI, tmp_path: Path
) -> None:
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "png")}
    found = bench(
        run, fake, *SMALL, "--request-rate", "200,0.5e3,inf", "--slo", "ttft:9000,e2e:9000",
        "--output", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
    )  # fmt: skip
    assert found == json.loads(files["json"].read_text())
    assert (found["model"], found["url"]) == ("fake", fake.url)
    assert found["workload"] == {
        "dataset": "random", "dataset_path": None, "num_prompts": 5, "seed": 0,
        "arrivals": "rate", "burstiness": 1, "speedup": None, "max_concurrency": None,
        "endpoint": "completions", "tokenizer": None, "prompt_ids": False, "ignore_eos": True,
        "extra_body": {}, "timeout_s": 600, "slo_ms": {"ttft": 9000, "e2e": 9000},
        "input_len": 6, "output_len": 3,
    }  # fmt: skip
    rows = found["results"]
    assert [row["request_rate"] for row in rows] == [200, 500, "inf"]
    for row in rows:
        assert (row["completed"], row["total_input_tokens"]) == (5, 30)
        assert row["total_output_tokens"] == 15 and row["slo_attainment"] == 1
    assert rows[1]["offered_rate"] == pytest.approx(2.5 * rows[0]["offered_rate"], rel=1e-3)
    prompts = [body["prompt"] for body in fake.bodies[1:]]
    assert len(set(prompts)) == 15 and all(len(prompt.split()) == 6 for prompt in prompts)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert set(lines[0]) == set(rows[0]) and lines[2]["request_rate"] == "inf"


def test_the_table(run: Run, fake: FakeOpenAI) -> None:
    fake.plan = ["ok", 429, "ok", "cut"]
    words = (*SMALL, "--request-rate", "900,inf", "--slo", "tpot:5000")
    done = run("bench", "serving", "--url", fake.url, *words)
    assert (done.code, done.err) == (0, "")
    assert f"fake at {fake.url}; latencies count from when a request was due" in done.out
    assert re.search(r"^request rate +900 +inf$", done.out, flags=re.MULTILINE)
    assert re.search(r"^failed +2 +0$", done.out, flags=re.MULTILINE)
    assert "good requests/s (tpot 5000 ms)" in done.out
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        assert done.out.count(f"\n{name} (") == 5
    failed = "failed at 900: 1 http_429, 1 broken_stream; the first: HTTP 429: scripted 429"
    assert failed in done.out and "failed at inf" not in done.out


def test_a_run_of_failures_is_stored_and_drawn_but_fails(
    run: Run, fake: FakeOpenAI, tmp_path: Path
) -> None:
    fake.plan = ["ok", *[500] * 5]
    file, plot = tmp_path / "a.csv", tmp_path / "a.svg"
    done = run(
        "bench", "serving", "--url", fake.url, *SMALL, "--csv", str(file), "--plot", str(plot)
    )
    assert done.code == 1 and "failed at inf: 5 http_500" in done.out
    (line,) = csv.DictReader(file.read_text().splitlines())
    assert (line["failures"], line["median_ttft_ms"]) == ("http_500=5", "")
    assert "</svg>" in plot.read_text()


def test_prompts_of_a_tokenizer(run: Run, fake: FakeOpenAI, tiny: str) -> None:
    words = ("other", *SMALL, "--tokenizer", tiny)
    assert bench(run, fake, *words)["model"] == "other"
    assert all(len(body["prompt"]) == 6 for body in fake.bodies[1:])  # one byte is one token
    assert all(body["prompt"].isalpha() for body in fake.bodies)
    before = len(fake.bodies)
    found = bench(run, fake, *words, "--prompt-ids")["results"][0]
    assert found["total_input_tokens"] == 30
    assert all(len(body["prompt"]) == 6 for body in fake.bodies[before + 1 :])
    assert all(type(token) is int for body in fake.bodies[before:] for token in body["prompt"])


def test_sharegpt(run: Run, fake: FakeOpenAI, tiny: str, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": talk}] * 3))
    words = ("--dataset", str(tmp_path / "s.json"), "--tokenizer", tiny, "--endpoint", "chat")
    bench(run, fake, *words, "--num-prompts", "3")
    for body in fake.bodies[1:]:
        assert body["messages"] == [{"role": "user", "content": "a question"}]
        assert body["max_tokens"] == len("an answer")
    again = run("bench", "serving", "--url", fake.url, *words, "--num-prompts", "2",
                "--request-rate", "1,2")  # fmt: skip
    again.assert_error(2, "num_prompts=4; lower it (each of 2 rates has 2 of its own)")


def test_arrivals_of_a_trace(run: Run, fake: FakeOpenAI, tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{n:02d}.5,{n},2\n" for n in range(10, 20))
    path = tmp_path / "t.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    words = ("--dataset", str(path), "--arrivals", "trace", "--speedup", "50")
    found = bench(run, fake, *words, "--num-prompts", "4")
    assert found["workload"]["speedup"] == 50 and found["workload"]["burstiness"] is None
    (row,) = found["results"]
    assert row["request_rate"] is None and row["offered_rate"] == 50
    lengths = [len(body["prompt"].split()) for body in fake.bodies[1:]]
    assert lengths == list(range(lengths[0], lengths[0] + 4))
    done = run("bench", "serving", "--url", fake.url, *words, "--num-prompts", "10")
    assert "as logged" in done.out


def test_what_is_sent(run: Run, fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "secret"
    done = run("bench", "serving", "--url", fake.url, *SMALL)
    done.assert_error(1, "HTTP 401: wrong key")
    secrets = ("--api-key", "secret"), ("--api_key=secret",)
    for words in secrets:
        monkeypatch.setattr(sys, "argv", ["kvant", "bench", "serving", *words, "--seed", "1"])
        found = bench(run, fake, *SMALL, *words)
        assert "secret" not in json.dumps(found) and "***" in found["command"]
        assert found["command"].endswith(" --seed 1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    more = ("--no-ignore-eos", "--extra-body", '{"top_k": 3}', "--max-concurrency", "2")
    (row,) = bench(run, fake, *SMALL, *more)["results"]
    assert row["max_concurrency"] <= 2
    assert "ignore_eos" not in fake.bodies[-1] and fake.bodies[-1]["top_k"] == 3


def test_servers_that_cannot_be_measured(run: Run, fake: FakeOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    words = ("bench", "serving", *SMALL, "--output", str(file))
    run(*words, "--url", fake.url, "third").assert_error(1, "http_404", "no model third")
    fake.plan = ["ok", "hang"]
    timed = run(*words, "--url", fake.url, "--timeout", "0.2")
    timed.assert_error(1, "fails (timeout): no end after 0.2 s")
    with serve() as gone:
        pass
    for model in ((), ("fake",)):
        done = run(*words, "--url", gone.url, *model)
        done.assert_error(1, gone.url)
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--url", "ftp://x"), '"ftp://x" is no address of a server'),
        (("--request-rate", "0"), '--request-rate "0" must be numbers above 0'),
        (("--request-rate", "1,,2"), "must be numbers above 0 with commas between"),
        (("--request-rate", "nan"), "must be numbers above 0"),
        (("--burstiness", "0"), "burstiness=0 must be above 0"),
        (("--speedup", "2"), "--speedup goes with --arrivals trace only"),
        (("--arrivals", "trace"), "--arrivals trace needs --dataset trace, not random"),
        (("--arrivals", "trace", "--request-rate", "3"), "does not go with --arrivals trace"),
        (("--arrivals", "often"), "--arrivals"),
        (("--endpoint", "words"), "--endpoint"),
        (("--max-concurrency", "0"), "max_concurrency=0 must be at least 1"),
        (("--num-prompts", "0"), "num_prompts=0 must be at least 1"),
        (("--timeout", "0"), "timeout=0 must be above 0"),
        (("--seed", "-1"), "seed=-1 must be at least 0"),
        (("--slo", "ttft=5"), 'slo "ttft=5" must be ttft, tpot or e2e'),
        (("--extra-body", "{"), "--extra-body is not JSON"),
        (("--extra-body", "[1]"), "--extra-body [1] must be an object"),
        (("--prompt-ids",), "--prompt-ids needs --tokenizer MODEL"),
        (("--prompt-ids", "--endpoint", "chat"), "--prompt-ids does not go with --endpoint chat"),
        (("--dataset", "no-such.json"), "--dataset sharegpt needs --tokenizer MODEL"),
        (("--dataset", "no-such.csv"), "cannot read the data set no-such.csv"),
        (("--range-ratio", "2"), "range_ratio=2 must be from 0 to 1"),
        (("--plot", "a.txt"), "must end in .png"),
        (("--kv", "int8"), 'no option "--kv"'),
    ),
)
def test_wrong_words(run: Run, words: tuple[str, ...], said: str) -> None:
    run("bench", "serving", "--url", "127.0.0.1:1", *words).assert_error(2, said)


def test_ctrl_c_ends_it_and_stores_nothing(fake: FakeOpenAI, tmp_path: Path) -> None:
    fake.plan = ["ok", *["slow"] * 4, *["hang"] * 4]
    file = tmp_path / "a.json"
    process = start(
        "bench", "serving", "--url", fake.url, "--num-prompts", "50", "--request-rate", "20",
        "--output", str(file),
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(fake.bodies) < 8:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=10)
    assert (done.code, done.out, done.err) == (130, "", "")
    assert not file.exists() and fake.gone.wait(10)
