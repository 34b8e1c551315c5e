from __future__ import annotations

import dataclasses

import pytest

from kvant.cli import generate, info
from kvant.cli.options import Parser, read_options, split_specs
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import ConfigError, KvantError
from tests.cli.conftest import Run


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="kvant generate")
    generate.configure(parser)
    return parser


def engine(parser: Parser, *words: str) -> EngineConfig:
    return read_options(parser.read(["m", *words]), EngineConfig)


def generation(parser: Parser, *words: str) -> GenerationConfig:
    return read_options(parser.read(["m", *words]), GenerationConfig)


def test_every_field_is_an_option_with_its_help(parser: Parser) -> None:
    """Held down: an option of the engine that the command line does not know."""
    text = " ".join(parser.format_help().split())
    for config in (EngineConfig, GenerationConfig):
        for field in dataclasses.fields(config):
            if field.name != "output_logits":
                assert f"--{field.name.replace('_', '-')}" in text
                assert " ".join(field.metadata["help"].split())[:30] in text
    assert "(default: 512)" in text and "(default: on)" in text and "(default: 1)" in text


def test_nothing_given_is_the_default_config(parser: Parser) -> None:
    assert engine(parser) == EngineConfig()
    assert generation(parser) == GenerationConfig()


@pytest.mark.parametrize(
    "words",
    (
        ("--quant-policy", "8"),
        ("--quant_policy", "8"),
        ("--quant_policy=8",),
    ),
)
def test_dashes_and_underscores_are_the_same(parser: Parser, words: tuple[str, ...]) -> None:
    assert engine(parser, *words) == EngineConfig(quant_policy=8)


@pytest.mark.parametrize("name", ("--weight-dtype", "--weight_dtype", "--weights"))
def test_an_option_may_have_a_short_name(parser: Parser, name: str) -> None:
    assert engine(parser, name, "int8") == EngineConfig(weight_dtype="int8")
    assert "--weight-dtype X, --weights X" in " ".join(parser.format_help().split())


def test_values_get_the_type_of_their_field(parser: Parser) -> None:
    asked = engine(
        parser, "--kv", "k=int8h,v=int4h", "--kv-memory=2GiB", "--session_len", "64",
        "--cache-max-entry-count", "0.5", "--no_enable_prefix_caching", "--check",
    )  # fmt: skip
    assert asked == EngineConfig(
        kv="k=int8h,v=int4h", kv_memory="2GiB", session_len=64, cache_max_entry_count=0.5,
        enable_prefix_caching=False, check=True,
    )  # fmt: skip
    asked_too = generation(
        parser, "--stop-words", "a_b", "--stop_words=--c_d", "--stop-token-ids", "7",
        "--do-sample", "--temperature", "0", "--random-seed", "5",
    )  # fmt: skip
    assert asked_too == GenerationConfig(
        stop_words=["a_b", "--c_d"], stop_token_ids=[7], do_sample=True, temperature=0.0,
        random_seed=5,
    )  # fmt: skip


def test_options_may_stand_between_prompts(parser: Parser) -> None:
    """Held down: argparse gives an empty list of prompts and calls the later ones unknown."""
    assert parser.read(["m", "--kv", "int8", "p", "--raw", "q"]).prompts == ["p", "q"]
    assert parser.read(["--kv", "int8", "m", "p"]).prompts == ["p"]
    assert parser.read(["m", "--raw", "--", "--under_score", "-x"]).prompts == [
        "--under_score",
        "-x",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--kv", "int4g"), ('unknown KV format "int4g"', 'did you mean "int4')),
        (("--kv", "int8", "--quant-policy", "4"), ("both kv=", "quant_policy=4")),
        (("--quant-policy", "5"), ("quant_policy=5",)),
        (("--weights", "int3"), ('weight_dtype "int3"', "int8, int4")),
        (("--kv-memory", "3XB"), ("'3XB'", "4GiB")),
        (("--max-new-tokens", "0"), ("max_new_tokens=0", "at least 1")),
        (("--max-new-tokens", "-3"), ("max_new_tokens=-3", "at least 1")),
        (("--temperature", "nan"), ("temperature=nan", "0 to 2")),
        (("--top-p", "2"), ("top_p=2.0", "0 to 1")),
        (("--top-k", "many"), ("--top-k", "'many'", "--help")),
        (("--temprature", "1"), ('no option "--temprature"', 'did you mean "--temperature"')),
        (("--quant_polcy=8",), ('did you mean "--quant-policy"',)),
        (("--zzz",), ('no option "--zzz". Put -- before',)),
        (("-x",), ("'-x'",)),
        (("--top-k",), ("--top-k", "expected one argument")),
        (("--json=yes",), ("--json",)),
    ),
)
def test_wrong_options_are_one_line_and_exit_code_2(
    run: Run, words: tuple[str, ...], said: tuple[str, ...]
) -> None:
    run("generate", "no/model/here", "prompt", *words).assert_error(2, *said)


def test_a_model_must_be_named(run: Run) -> None:
    run("generate", "--kv", "int8").assert_error(2, "MODEL")


def test_info_takes_the_options_that_change_sizes(run: Run) -> None:
    parser = Parser(prog="kvant info")
    info.configure(parser)
    text = parser.format_help()
    assert "--session-len" in text and "--num-threads" not in text
    run("info", "--num-threads", "3").assert_error(2, "--num-threads")


@pytest.mark.parametrize(
    ("text", "specs"),
    (
        ("int8", ["int8"]),
        ("int8,int4h+r64:bf16", ["int8", "int4h+r64:bf16"]),
        ("k=int8h,v=int4h", ["k=int8h,v=int4h"]),
        ("k8v4,f16", ["k=int8c,v=int4m+s64r64", "f16"]),
        (
            "k4v4;0,-1=int8h,int8;1=k=f16,v=int4,k=int8,v=int4;0,1=bf16;-1=f32,f16",
            [
                "k=int4c,v=int4m+s64r64;0,-1=int8h",
                "int8;1=k=f16,v=int4",
                "k=int8,v=int4;0,1=bf16;-1=f32",
                "f16",
            ],
        ),
        ("int4+s64r64:k=f16,v=bf16,k3v3", ["int4+s64r64:k=f16,v=bf16", "k=int3c,v=int3m+s64r64"]),
        (
            "int8, K=int8h , v=int4h+r64,int4,v=int4,k=int8,k=bf16,v=int4",
            ["int8", "k=int8h,v=int4h+r64", "int4", "k=int8,v=int4", "k=bf16,v=int4"],
        ),
    ),
)
def test_a_list_of_specs_that_hold_commas(text: str, specs: list[str]) -> None:
    assert [str(spec) for spec in split_specs(text)] == specs


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("", "empty entry"),
        ("int8,,int4", "empty entry"),
        ("int8,", "empty entry"),
        ("int8,int3", "int3"),
        ("int8,k=int8", "K and V once each"),
        ("k=int8,int4", "K and V once each"),
        ("k=int8,k=int4", "K and V once each"),
    ),
)
def test_lists_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_specs(text)


def test_options_that_are_json(parser: Parser) -> None:
    words = (
        "--response-format",
        '{"type": "json_object"}',
        "--logit_bias",
        '{"42": -100, "7": 1.5}',
    )
    found = generation(parser, *words)
    assert found.response_format == {"type": "json_object"}
    assert found.logit_bias == {42: -100, 7: 1.5}


@pytest.mark.parametrize(
    ("words", "reason"),
    (
        (("--response-format", "json"), "'json' is not JSON"),
        (("--response-format", "[1]"), "not a JSON object"),
        (("--response-format", '{"type": "xml"}'), 'type "xml" is unknown'),
        (("--logit-bias", '{"the": 1}'), "keys of type int"),
        (("--logit-bias", '{"1": "much"}'), "must be a number"),
    ),
)
def test_what_is_not_the_json_that_is_wanted(
    parser: Parser, words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(KvantError, match=reason) as error:
        generation(parser, *words)
    assert error.value.exit_code == 2
