"""kvant as a model of EleutherAI's lm-evaluation-harness, under the name ``kvant``.

Importing this module registers it: ``lm_eval.simple_evaluate(model="kvant",
model_args="pretrained=MODEL,kv=int4h")`` works then. ``kvant lm-eval`` is the harness's own command
line with this model known; the harness has no other way for a package to add one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvant.api import Pipeline, pipeline
from kvant.config import EngineConfig, GenerationConfig
from kvant.errors import ConfigError, RequestError, did_you_mean
from kvant.eval.scoring import Likelihood, Pair, Scorer
from kvant.eval.tasks.journal import Journal, digest
from kvant.loading.chat import ChatTemplate

__all__ = ["KvantLM", "Progress"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Given a title and a total, a context whose value is told how much more is done."""

_AT_A_TIME = 4096  # requests whose tokens are in memory
_DEFAULT_TOKENS = 256  # to generate, where a task says nothing: as lm-eval's hf model
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
    "random_seed": int, "seed": int,
}  # fmt: skip


@register_model("kvant")
class KvantLM(TemplateLM):
    """A model and a KV format.

    Args:
        pretrained: a model's name, or an open pipeline, which stays its owner's.
        batch_size: most sequences at a time; "auto" for the engine's default.
        device: not used: lm-eval says "cuda:0" to whoever says nothing.
        add_bos_token: whether texts begin with BOS; None for what the tokenizer says.
        journal: answers found there are not computed again, new ones are kept there.
        progress: how to show progress; by default with tqdm.
        options: fields of :class:`kvant.EngineConfig`, as ``kv=int4h``.

    Raises:
        ConfigError: an unknown option or a value out of range.
        ModelError: the model cannot be found or read.
    """

    def __init__(
        self,
        pretrained: str | Pipeline,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,  # noqa: ARG002
        add_bos_token: bool | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            size = max_batch_size or _batch_size(batch_size)
            pretrained = pipeline(pretrained, _config(options, size))
        elif options:
            raise ConfigError(f"options {', '.join(options)} come too late for an open pipeline")
        self.pipe = pretrained
        self.scorer = Scorer(self.pipe)
        self._journal = journal if journal is not None else Journal(None, {})
        self._progress = progress or _tqdm
        tokenizer = self.pipe.tokenizer
        self._lead = tokenizer.lead if add_bos_token is None else self._bos() * add_bos_token
        self._begun = tuple(tokenizer.token_text(token) for token in self._lead)
        # Of a question's answers each is encoded behind the context, and the context again.
        self._encode = lru_cache(maxsize=2)(partial(tokenizer.encode, add_special=False))

    def _bos(self) -> tuple[int, ...]:
        bos = self.pipe.tokenizer.bos_id
        return () if bos is None else (bos,)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            RequestError: the tokenizer has none.
        """
        if not self.pipe.tokenizer.eos_ids:
            raise RequestError("the tokenizer has no end token, which an empty context needs")
        return self.pipe.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or else the end token."""
        bos = self.pipe.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its cache of requests after."""
        chat = self.pipe.chat_template
        return digest("" if chat is None else chat.source)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's chat template; None without."""
        return self._chat().source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for messages."""
        text = self._chat().render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # an answer that is to be continued
        if last not in text:
            raise ConfigError(f"the chat template changes the text {last[:40]!r}; leave it out")
        return text[: text.rindex(last) + len(last)]

    def _chat(self) -> ChatTemplate:
        if self.pipe.chat_template is None:
            raise ConfigError("this model has no chat template; leave --apply_chat_template out")
        return self.pipe.chat_template

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with BOS before them if the model wants it and the text has none."""
        lead = () if add_special_tokens is False else self._lead
        if add_special_tokens is None and lead and string.startswith(self._begun):
            lead = ()
        return [*lead, *self._encode(string)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats and whether greedy decoding writes it, of each request's
        (context, continuation)."""
        asked = [request.args for request in requests]
        return self._answer("loglikelihood", "scoring", asked, self._score_texts)

    def _score_texts(
        self, asked: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        pairs: list[Pair] = []
        for texts in asked:
            context, continuation = self._pair(*texts)
            if pairs and context == pairs[-1][0]:
                context = pairs[-1][0]  # choices of a question: many share a long one
            pairs.append((context, continuation))
        for index, found in self.scorer.loglikelihoods(pairs):
            yield index, (found.logprob, found.greedy)

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            pair: Pair = self._encode_pair(context, continuation)
            return pair
        ids = self.tok_encode(continuation, add_special_tokens=False)
        before = self.prefix_token_id
        return (ids[:1], ids[1:]) if len(ids) > 1 and ids[0] == before else ([before], ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = dict(self.scorer.loglikelihoods([(c, t) for _, c, t in requests]))
        return [(found[i].logprob, found[i].greedy) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the longest sequence."""
        asked = [request.args for request in requests]
        return self._answer("loglikelihood_rolling", "scoring texts", asked, self._roll)

    def _roll(self, asked: Sequence[tuple[str]]) -> Iterator[tuple[int, float]]:
        for index, (text,) in enumerate(asked):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scores: Iterable[tuple[int, Likelihood]] = self.scorer.loglikelihoods(pairs)
            yield index, sum(each.logprob for _, each in scores)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A continuation of each request's (context, options), up to a stop text."""
        asked = [request.args for request in requests]
        return self._answer("generate_until", "generating", asked, self._generate)

    def _generate(
        self, asked: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        prompts = [(self.tok_encode(text), generation(options)) for text, options in asked]
        for index, text in self.scorer.generate(prompts):
            until = prompts[index][1].stop_words or ()
            # The end of a text that is cut by its length may hold a stop text that detokenizing
            # completes only then.
            yield index, min((text.split(stop)[0] for stop in until), key=len, default=text)

    def _answer(
        self,
        kind: str,
        title: str,
        asked: Sequence[Any],
        compute: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]],
    ) -> list[Any]:
        """Answers in order: from the journal, or computed and kept there; each question once."""
        spec = str(self.pipe.model.kv_spec)
        keys = [digest(spec, kind, self._lead, *each) for each in _numbered(asked)]
        missing = {k: e for k, e in zip(keys, asked, strict=True) if self._journal.get(k) is None}
        names = list(missing)
        with self._progress(title, len(names)) as tick:
            for start in range(0, len(names), _AT_A_TIME):
                part = names[start : start + _AT_A_TIME]
                for index, answer in compute([missing[name] for name in part]):
                    self._journal.add(part[index], answer)
                    tick(1)
        found = [self._journal.get(key) for key in keys]
        return [tuple(each) if isinstance(each, list | tuple) else each for each in found]


def _numbered(asked: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Questions; those that are sampled and asked again have a number, as each has its answer."""
    times: Counter[str] = Counter()
    for each in asked:
        sampled = isinstance(each[-1], Mapping) and each[-1].get("do_sample")
        if sampled:
            times[digest(*each)] += 1
        yield (*each, times[digest(*each)]) if sampled else tuple(each)


def _batch_size(given: int | str | None) -> int | None:
    if given is None or str(given).startswith("auto"):
        return None
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"batch_size={given!r} must be a whole number or auto") from None


def _config(options: Mapping[str, Any], max_batch_size: int | None) -> EngineConfig:
    known = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f'kvant has no model argument "{name}"{did_you_mean(name, known)} Arguments: '
                f"pretrained, add_bos_token, {', '.join(known)}"
            )
    size = {} if max_batch_size is None else {"max_batch_size": max_batch_size}
    return EngineConfig(**{**options, **size})


def generation(options: Mapping[str, Any]) -> GenerationConfig:
    """How a task's ``generation_kwargs`` want texts.

    Raises:
        RequestError: an option that kvant does not know, or a value out of range.
    """
    left = {name: value for name, value in options.items() if value is not None}
    if left.get("num_beams") == 1:
        del left["num_beams"]
    until = left.pop("until", None) or []
    lengths = [_read(name, left.pop(name), int) for name in _LENGTHS if name in left]
    do_sample = left.pop("do_sample", None)
    sampling = {}
    for name, value in left.items():
        if name not in _SAMPLING:
            raise RequestError(
                f'generation_kwargs has "{name}"{did_you_mean(name, _SAMPLING)} kvant knows until, '
                f"do_sample, max_gen_toks, {', '.join(_SAMPLING)}"
            )
        field = "random_seed" if name == "seed" else name
        sampling[field] = _read(name, value, _SAMPLING[name])
    temperature = sampling.pop("temperature", 1.0 if do_sample else 0.0)
    return GenerationConfig(
        max_new_tokens=lengths[0] if lengths else _DEFAULT_TOKENS,
        do_sample=temperature > 0 if do_sample is None else bool(do_sample),
        temperature=temperature,
        stop_words=[until] if isinstance(until, str) else [stop for stop in until if stop],
        **sampling,
    )


def _read(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise RequestError(f"generation_kwargs: {name}={value!r} must be a number") from None


@contextmanager
def _tqdm(title: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=title) as bar:
        yield bar.update
