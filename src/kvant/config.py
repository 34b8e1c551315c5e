"""What a user may set: :class:`EngineConfig` and :class:`GenerationConfig`.

Names and defaults are LMDeploy's where it has the option. Both are frozen and checked when made;
an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvant.errors import ConfigError, KvantError, RequestError, did_you_mean
from kvant.formats import KVSpec, is_auto, resolve_spec

__all__ = ["EngineConfig", "GenerationConfig", "option", "parse_bytes"]

T = TypeVar("T")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2**power for unit, power in zip("kmgt", (10, 20, 30, 40), strict=True)}


def option(default: Any, help: str, *, aliases: Sequence[str] = ()) -> Any:
    """A dataclass field with the help text that the CLI and the docs show, and further names by
    which the command line knows it."""
    return dataclasses.field(default=default, metadata={"help": help, "aliases": tuple(aliases)})


def _strict(error: type[KvantError]) -> Any:
    """Make unknown keyword arguments of a dataclass an ``error`` that names the nearest field."""

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

        def checked_init(self: Any, **values: Any) -> None:
            for key in values:
                if key not in known:
                    raise error(
                        f'{cls.__name__} has no option "{key}"{did_you_mean(key, known)} '
                        f"Options: {', '.join(known)}"
                    )
            init(self, **values)

        cls.__init__ = checked_init  # type: ignore[method-assign]
        return cls

    return decorate


def parse_bytes(value: int | str) -> int:
    """``4GiB``, ``512MB``, ``1.5g`` or a number of bytes, as bytes.

    Raises:
        ConfigError: not a positive size.
    """
    text = str(value).strip().lower().removesuffix("b")
    number = text.rstrip("kmgti")
    try:
        size = int(float(number) * _UNITS[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{value!r} is not a size; write it like 4GiB, 512MB or 1073741824")
    return size


@_strict(ConfigError)
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine.

    Raises:
        ConfigError: an unknown option or a value out of range.
    """

    kv: KVSpec | str | None = option(
        None,
        "KV cache format: a preset (k8v8, k8v4, k5v4, k4v4, ...), int8, k=int8h,v=int4h, a file of "
        "kvant eval tune, auto, ... (default 16 bit)",
    )
    quant_policy: int | None = option(
        None, "LMDeploy's name for the KV format: 0 (16 bit), 8 (int8), 16 (fp8) or 4 (k4v4)"
    )
    dtype: str = option(
        "auto",
        "weights and activations: auto (bfloat16; float16 on GPUs without it), bfloat16, float16 "
        "or float32",
    )
    weight_dtype: str = option(
        "auto",
        "linear layers: auto (dtype; the codes of AWQ, GPTQ and compressed-tensors checkpoints), "
        "int8 or int4; codes that a checkpoint stores in that many bits are kept as they are",
        aliases=("weights",),
    )
    session_len: int | None = option(None, "longest context in tokens (default: the model's)")
    max_batch_size: int = option(128, "most sequences that run at a time")
    cache_max_entry_count: float = option(
        0.8,
        "share of the memory (a GPU's, if it computes) left free after loading the weights that "
        "the KV cache may take",
    )
    kv_memory: int | str | None = option(None, 'KV cache size in bytes, as "4GiB"')
    kv_tokens: int | None = option(None, "KV cache size in tokens")
    enable_prefix_caching: bool = option(True, "share the pages of common prompt beginnings")
    max_prefill_token_num: int = option(1024, "most tokens that one step computes")
    backend: str = option(
        "auto", "who computes: auto (a GPU if there is one), cpu, triton (GPUs) or reference"
    )
    eager_mode: bool = option(False, "on a GPU: launch kernels one by one, without CUDA graphs")
    num_threads: int | None = option(None, "CPU threads (default: all cores)")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    download_dir: str | None = option(None, "folder for files from the hub")
    check: bool = option(False, "verify the cache's invariants after every step (slow)")

    def __post_init__(self) -> None:
        spec = self.kv_spec()
        if isinstance(self.kv, str) and not is_auto(self.kv):  # a file is read once
            object.__setattr__(self, "kv", spec)
        dtypes = ("auto", "bfloat16", "float16", "float32")
        if self.dtype not in dtypes:
            raise ConfigError(f'dtype "{self.dtype}" is unknown; use one of {", ".join(dtypes)}')
        kinds = ("auto", "int8", "int4")
        if self.weight_dtype not in kinds:
            raise ConfigError(
                f'weight_dtype "{self.weight_dtype}" is unknown; use one of {", ".join(kinds)}'
            )
        for name in (
            "session_len",
            "max_batch_size",
            "kv_tokens",
            "max_prefill_token_num",
            "num_threads",
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        share = self.cache_max_entry_count
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise ConfigError(
                f"cache_max_entry_count={share!r} must lie between 0 and 1 (a share of the free "
                "memory); to set a size use kv_memory or kv_tokens"
            )
        if self.kv_memory is not None:
            parse_bytes(self.kv_memory)
            if self.kv_tokens is not None:
                raise ConfigError("both kv_memory and kv_tokens are given; use one of them")

    def kv_spec(self, architecture: str = "unknown") -> KVSpec:
        """The KV formats asked for; ``auto`` depends on the model's architecture."""
        return resolve_spec(self.kv, self.quant_policy, dtype=self.dtype, architecture=architecture)


@_strict(RequestError)
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate. Greedy unless ``do_sample``.

    Order: penalties, ``logit_bias``, banned tokens and ``response_format``, temperature, top-k,
    top-p, min-p. Log-probabilities are the model's own, before all of these. ``stop_words`` may
    span several tokens. What follows a complete ``response_format`` is not generated, also with
    ``ignore_eos``. With ``output_logits`` "all" the response carries the logits at every prompt
    position too.

    Raises:
        RequestError: an unknown option or a value out of range.
    """

    n: int = option(1, "completions per prompt")
    max_new_tokens: int = option(512, "most tokens to generate")
    min_new_tokens: int | None = option(None, "do not stop on an end token before this many")
    do_sample: bool = option(False, "sample instead of taking the most likely token")
    temperature: float = option(0.8, "0 to 2; 0 is greedy")
    top_k: int = option(50, "sample among the k most likely tokens; 0 for all")
    top_p: float = option(1.0, "sample among the most likely tokens of this total probability")
    min_p: float = option(0.0, "drop tokens less likely than this times the most likely")
    repetition_penalty: float = option(1.0, "above 1 discourages tokens seen in prompt or output")
    presence_penalty: float = option(0.0, "subtracted from logits of tokens in the output")
    frequency_penalty: float = option(0.0, "subtracted once per occurrence in the output")
    random_seed: int | None = option(None, "same seed, same tokens, whatever else runs")
    ignore_eos: bool = option(False, "go on after an end token")
    stop_words: Sequence[str] | None = option(None, "strings that end the text")
    stop_token_ids: Sequence[int] | None = option(None, "tokens that end the text")
    bad_words: Sequence[str] | None = option(
        None, "words whose token sequences, at the start of a text and after a space, are banned"
    )
    bad_token_ids: Sequence[int] | None = option(None, "tokens never to generate")
    logit_bias: Mapping[int, float] | None = option(
        None, "JSON object from token id to what is added to its logit, -100 to 100"
    )
    response_format: Mapping[str, Any] | None = option(
        None,
        'what the text must be, as {"type": "json_object"}; types: text, json_object, json_schema, '
        "regex (regex_schema), choice, grammar",
    )
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = option(False, "keep the stop word in the text")
    logprobs: int | None = option(None, "log-probabilities of this many tokens per position")
    output_logits: str | None = option(None, "all or generation: return logits")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n", 1, 128),
            ("max_new_tokens", 1, None),
            ("min_new_tokens", 0, None),
            ("temperature", 0, 2),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("logprobs", 0, 1024),
        ):
            _check_range(name, getattr(self, name), low, high)
        if self.random_seed is not None and type(self.random_seed) is not int:
            raise RequestError(f"random_seed={self.random_seed!r} must be a whole number")
        if self.output_logits not in (None, "all", "generation"):
            raise RequestError(
                f"output_logits={self.output_logits!r} must be all, generation or None"
            )
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        for name in ("stop_words", "bad_words", "stop_token_ids", "bad_token_ids"):
            _check_list(name, getattr(self, name), str if name.endswith("words") else int)
        _check_bias(self.logit_bias)
        _check_format(self.response_format)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return not self.do_sample or self.temperature == 0 or self.top_k == 1


_MOST_BIASES = 1024

# What a response format of each type has beside its type.
_FORMATS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex_schema": ("regex_schema",),
    "regex": ("regex",),
    "choice": ("choice",),
    "grammar": ("grammar",),
}

_INTEGERS = {"n", "max_new_tokens", "min_new_tokens", "top_k", "logprobs"}


def _check_range(name: str, value: Any, low: float, high: float | None) -> None:
    if value is None and name in ("min_new_tokens", "logprobs"):
        return
    wanted = int if name in _INTEGERS else int | float
    limits = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise RequestError(f"{name}={value!r} must be a number {limits}")
    if not low <= value <= (math.inf if high is None else high):
        raise RequestError(f"{name}={value!r} must be {limits}")


def _check_list(name: str, values: Any, kind: type) -> None:
    if values is None:
        return
    wrong = isinstance(values, str) or not isinstance(values, Collection)
    if wrong or not all(isinstance(v, kind) and v != "" for v in values):
        raise RequestError(f"{name}={values!r} must be a list of non-empty {kind.__name__}s")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping) or not all(type(token) is int for token in bias):
        raise RequestError("logit_bias must map token ids, whole numbers, to numbers")
    if len(bias) > _MOST_BIASES:
        raise RequestError(
            f"logit_bias has {len(bias)} entries, and the limit is {_MOST_BIASES}; give fewer"
        )
    for token, value in bias.items():
        _check_range(f"logit_bias of token {token}", value, -100, 100)


def _check_format(form: Any) -> None:
    if form is None:
        return
    if not isinstance(form, Mapping) or not isinstance(form.get("type"), str):
        raise RequestError('response_format must be an object with a type, as {"type": "text"}')
    kind = form["type"]
    if kind not in _FORMATS:
        raise RequestError(
            f'response_format.type "{kind}" is unknown{did_you_mean(kind, _FORMATS)} '
            f"Types: {', '.join(_FORMATS)}"
        )
    fields = _FORMATS[kind]
    for name in fields:
        if name not in form:
            raise RequestError(f"response_format of type {kind} needs the field {name}")
    _refuse_others(form, {"type", *fields}, "response_format")
    if kind == "json_schema":
        _check_schema(form[kind])
    elif kind == "choice":
        _check_list("response_format.choice", form[kind], str)
        if not form[kind]:
            raise RequestError("response_format.choice is empty; give at least one text")
    elif fields and (not isinstance(form[kind], str) or not form[kind]):
        raise RequestError(f"response_format.{kind} must be a text that is not empty")


def _check_schema(wanted: Any) -> None:
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("schema"), Mapping):
        raise RequestError(
            'response_format.json_schema must be an object like {"name": "x", "schema": {...}}'
        )
    _refuse_others(
        wanted, {"name", "description", "schema", "strict"}, "response_format.json_schema"
    )


def _refuse_others(form: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for name in form:
        if name not in known:
            raise RequestError(
                f'{where} has an unknown field "{name}"{did_you_mean(str(name), known)} '
                f"Fields: {', '.join(sorted(known))}"
            )
