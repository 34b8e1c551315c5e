"""The Python API: ``pipeline(model)`` and what it answers. Names are LMDeploy's.

A pipeline owns an engine on a thread of its own and may be used from many threads. It turns
prompts into requests and outputs into responses; everything else is the engine's.
"""

from __future__ import annotations

import queue
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from kvant.config import EngineConfig, GenerationConfig
from kvant.engine.guide import GuideFactory, GuideLimits
from kvant.engine.text import TextStream
from kvant.engine.worker import EngineWorker, Stream
from kvant.errors import ConfigError, KvantError, RequestError
from kvant.loading.chat import ChatTemplate, as_messages
from kvant.request import FinishReason, LogitsSink, Output, Request

if TYPE_CHECKING:
    from kvant.engine.load import LoadedModel
    from kvant.loading.tokenizer import Tokenizer

__all__ = ["Pipeline", "Prompt", "Response", "Session", "encode_prompt", "pipeline"]

_PATIENCE = 1.0  # seconds that an interrupted program waits for the engine's step to end

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
"""A user's text, or a list of OpenAI-style messages."""


@dataclass(slots=True, kw_only=True)
class Response:
    """A completion, or with ``stream_infer`` the part of it that is new.

    ``index`` says which prompt it answers (``prompt number * n + completion number``).
    ``logprobs`` has one dict per token: token id -> log-probability. ``token_ids`` leaves the end
    token out. ``cached_tokens`` of the prompt were found in the prefix cache. ``logits`` are
    float32 ``[positions, vocabulary]`` if ``output_logits`` asked for them.
    """

    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    logits: NDArray[np.float32] | None = None
    index: int = 0
    cached_tokens: int = 0
    error_message: str | None = None

    def _add(self, output: Output) -> Response:
        """Account for an output; returns it as a response of its own."""
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        self.generate_token_len += len(output.token_ids)
        if output.logprobs:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(output.logprobs)
        self.finish_reason, self.error_message = output.finish_reason, output.error
        return replace(
            self,
            text=output.text,
            token_ids=list(output.token_ids),
            logprobs=list(output.logprobs) or None,
        )


class Session:
    """A conversation; ``messages`` is its history, ``response`` the last answer."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.response: Response | None = None


class _Logits:
    """Collects logits; positions computed again after a preemption replace the first ones."""

    def __init__(self) -> None:
        self._rows: dict[int, NDArray[np.float32]] = {}

    def __call__(self, start: int, logits: NDArray[np.float32]) -> None:
        for offset, row in enumerate(logits):
            self._rows[start + offset] = row

    def array(self) -> NDArray[np.float32] | None:
        if not self._rows:
            return None
        return np.stack([self._rows[position] for position in sorted(self._rows)])


class Pipeline:
    """A model that answers. Made by :func:`pipeline`; use as a context manager or ``close()``."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        chat_template: str | None = None,
        guide_limits: GuideLimits | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.chat_template = self.tokenizer.chat
        if chat_template is not None:
            token = self.tokenizer.token_text
            bos = "" if self.tokenizer.bos_id is None else token(self.tokenizer.bos_id)
            eos = token(self.tokenizer.eos_ids[0]) if self.tokenizer.eos_ids else ""
            self.chat_template = ChatTemplate(chat_template, bos, eos)
            self.chat_template.check()
        self.worker = EngineWorker(model.engine)
        self.guides = GuideFactory(self.tokenizer, model.config.vocab_size, guide_limits)
        # Who forgets to close a pipeline should not keep its memory. The thread and its worker
        # know nothing of the pipeline, so it can be collected.
        weakref.finalize(self, self.worker.close)

    def infer(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Response | list[Response]:
        """Complete one prompt, or several together.

        Args:
            prompts: a text, a list of messages, or a list of either.
            gen_config: for all prompts, or one for each.
            do_preprocess: apply the chat template; otherwise texts are continued as they are.

        Returns:
            A response for one prompt with n = 1, else a list in the order of the prompts, the n
            completions of each together. A request that fails has ``finish_reason`` "error".

        Raises:
            RequestError: a prompt is empty or too long; nothing was started then.
            EngineDeadError: the engine had failed or was closed before.
        """
        single = _is_single(prompts)
        requests = self._requests(prompts, gen_config, do_preprocess)
        responses = [_response(request, index) for index, request in enumerate(requests)]
        for _ in self._events(requests, responses):
            pass
        for request, response in zip(requests, responses, strict=True):
            if isinstance(request.logits_sink, _Logits):
                response.logits = request.logits_sink.array()
        return responses[0] if single and len(responses) == 1 else responses

    __call__ = infer

    def stream_infer(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Iterator[Response]:
        """Like :meth:`infer`, giving each piece of text as it is made; ``index`` says whose.
        Leaving the iterator early aborts what still runs."""
        requests = self._requests(prompts, gen_config, do_preprocess)
        _refuse_logits(requests)
        responses = [_response(request, index) for index, request in enumerate(requests)]
        return (piece for _, piece in self._events(requests, responses))

    async def stream_infer_async(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
        whole: Response | None = None,
    ) -> AsyncIterator[Response]:
        """:meth:`stream_infer` of one prompt (n = 1) for asyncio; cancelling aborts it. The
        pieces add up in ``whole`` if it is given."""
        (request,) = self._requests([prompt], _single(gen_config), do_preprocess)
        _refuse_logits([request])
        response = whole if whole is not None else Response()
        response.input_token_len = request.num_prompt
        async for output in Stream(self.worker, request):
            response.cached_tokens = request.cached_tokens
            yield response._add(output)

    async def infer_async(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Response:
        """:meth:`infer` of one prompt (n = 1) for asyncio."""
        whole = Response()
        async for _ in self.stream_infer_async(
            prompt, gen_config, do_preprocess=do_preprocess, whole=whole
        ):
            pass
        return whole

    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        stream_response: bool = False,
    ) -> Session | Iterator[Response]:
        """One turn of a conversation. Returns the session, whose ``response`` is the answer, or
        with ``stream_response`` the pieces of the answer (the session is complete when they
        end)."""
        session = session or Session()
        messages = [*session.messages, {"role": "user", "content": prompt}]
        pieces = self._turn(session, messages, gen_config)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    def session(self) -> Session:
        """A new conversation."""
        return Session()

    def get_ppl(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
        """Mean cross-entropy in nats per token of each sequence, through the engine and its
        cache (LMDeploy's name: it is the logarithm of the perplexity).

        Raises:
            RequestError: a sequence has fewer than two tokens or is too long.
        """
        single = len(input_ids) > 0 and np.ndim(input_ids[0]) == 0
        batch = cast("list[Sequence[int]]", [input_ids] if single else input_ids)
        losses = [0.0] * len(batch)
        requests = []
        for index, sequence in enumerate(batch):
            ids = np.asarray(sequence).tolist()
            if len(ids) < 2:
                raise RequestError(f"sequence {index} has {len(ids)} tokens; get_ppl needs two")
            requests.append(self.score_request(ids, _LossSink(ids, losses, index)))
        self.run(requests)
        return losses

    def score_request(self, ids: Sequence[int], sink: LogitsSink, *, first: int = 0) -> Request:
        """A request that generates nothing: ``sink(start, logits)`` receives the logits of every
        position from ``first`` on; what comes before may be found in the cache. After a preemption
        it receives them again. Run it with :meth:`run`."""
        self.model.engine.validate(ids, generate=False)
        return Request(
            id=self.worker.new_id(),
            tokens=list(ids),
            num_prompt=len(ids),
            gen=GenerationConfig(output_logits="all"),
            max_tokens=len(ids),
            logits_sink=sink,
            logits_from=first,
        )

    def generate_requests(self, ids: Sequence[int], gen: GenerationConfig) -> list[Request]:
        """``gen.n`` requests that continue token ids and share the pages of these, for
        :meth:`run` or :attr:`worker`.

        Raises:
            RequestError: the ids are none, too many or unknown, or one of ``gen`` is unknown, or
                its ``response_format`` cannot be followed.
        """
        self._check_token_ids(gen)
        self.model.engine.validate(ids)
        bad_sequences = self._bad_sequences(gen)
        requests: list[Request] = []
        for number, guide in enumerate(self.guides.make(gen)):
            request = self._request(list(ids), gen, number, requests[0] if requests else None)
            request.bad_sequences, request.guide = bad_sequences, guide
            requests.append(request)
        return requests

    def run(self, requests: list[Request]) -> list[Response]:
        """Run requests to their end; a response for each.

        Raises:
            KvantError: one of them failed or was aborted.
        """
        responses = [_response(request, index) for index, request in enumerate(requests)]
        for _ in self._events(requests, responses):
            pass
        for response in responses:
            if response.finish_reason in ("error", "abort"):
                raise KvantError(response.error_message or "the request was aborted")
        return responses

    def close(self) -> None:
        """Abort what runs and stop the engine. Safe to repeat."""
        self.worker.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt | BrokenPipeError):
            self.close()
            return
        # The step that runs may take long; whoever pressed Ctrl-C does not wait for it.
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(_PATIENCE)

    def prompt_ids(self, prompt: Prompt, *, do_preprocess: bool = True) -> list[int]:
        """The token ids of a prompt, chat template applied if there is one.

        Raises:
            RequestError: the prompt is empty, malformed or too long.
        """
        ids = encode_prompt(self.tokenizer, prompt, self.chat_template, do_preprocess=do_preprocess)
        self.model.engine.validate(ids)
        return ids

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None,
        do_preprocess: bool,
    ) -> list[Request]:
        batch = cast("list[Prompt]", [prompts] if _is_single(prompts) else list(prompts))
        if gen_config is None or isinstance(gen_config, GenerationConfig):
            configs = [gen_config or GenerationConfig()] * len(batch)
        else:
            configs = list(gen_config) if isinstance(gen_config, Sequence) else [gen_config]
        if len(configs) != len(batch):
            raise RequestError(
                f"{len(configs)} generation configs for {len(batch)} prompts; give one for all or "
                "one for each"
            )
        requests: list[Request] = []
        for prompt, gen in zip(batch, configs, strict=True):
            if not isinstance(gen, GenerationConfig):
                raise RequestError(f"gen_config={gen!r} must be a GenerationConfig")
            ids = encode_prompt(
                self.tokenizer, prompt, self.chat_template, do_preprocess=do_preprocess
            )
            requests += self.generate_requests(ids, gen)
        return requests

    def _request(
        self, ids: list[int], gen: GenerationConfig, number: int, leader: Request | None
    ) -> Request:
        seed = secrets.randbits(63) if gen.random_seed is None else gen.random_seed + number
        size = self.model.config.vocab_size
        eos = () if gen.ignore_eos else (i for i in self.tokenizer.eos_ids if i < size)
        return Request(
            id=self.worker.new_id(),
            tokens=list(ids),
            num_prompt=len(ids),
            gen=gen,
            max_tokens=min(len(ids) + gen.max_new_tokens, self.model.engine.session_len),
            stop_ids=frozenset((*eos, *(gen.stop_token_ids or ()))),
            seed=seed & (2**64 - 1),
            text=TextStream(
                self.tokenizer,
                ids,
                tuple(gen.stop_words or ()),
                gen.include_stop_str_in_output,
                gen.skip_special_tokens,
            ),
            logits_sink=_Logits() if gen.output_logits else None,
            leader=leader,
            common=0 if leader is None else len(ids),
        )

    def _check_token_ids(self, gen: GenerationConfig) -> None:
        size = self.model.config.vocab_size
        for name in ("stop_token_ids", "bad_token_ids", "logit_bias"):
            for token in getattr(gen, name) or ():
                if not 0 <= token < size:
                    raise RequestError(
                        f"{name} has {token}, and the vocabulary's ids are 0 to {size - 1}"
                    )

    def _bad_sequences(self, gen: GenerationConfig) -> list[list[int]]:
        """Token sequences of the bad words, at the start of a text and after a space."""
        words = [text for word in gen.bad_words or () for text in (word, " " + word.lstrip())]
        found = [self.tokenizer.encode(word, add_special=False) for word in words]
        return [ids for ids in found if ids and max(ids) < self.model.config.vocab_size]

    def _turn(
        self, session: Session, messages: list[Message], gen_config: GenerationConfig | None
    ) -> Iterator[Response]:
        (request,) = self._requests([messages], _single(gen_config), True)
        whole = _response(request, 0)
        for _, piece in self._events([request], [whole]):
            yield piece
        session.response = whole
        if whole.finish_reason != "error":
            session.messages = [*messages, {"role": "assistant", "content": whole.text}]

    def _events(
        self, requests: list[Request], responses: list[Response]
    ) -> Iterator[tuple[int, Response]]:
        """Run requests; (index, new piece) as outputs arrive, while ``responses`` grow."""
        arrived: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        for index, request in enumerate(requests):
            request.deliver = partial(_put, arrived, index)
        self.worker.submit(requests)
        running = dict(enumerate(requests))
        try:
            while running:
                index, output = arrived.get()
                responses[index].cached_tokens = requests[index].cached_tokens
                if output.finish_reason:
                    del running[index]
                yield index, responses[index]._add(output)
        finally:
            for request in running.values():
                self.worker.abort(request)


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, chat: ChatTemplate | None, *, do_preprocess: bool = True
) -> list[int]:
    """The token ids of a prompt, rendered with ``chat`` if there is one.

    Raises:
        RequestError: the prompt is empty or malformed.
    """
    if not isinstance(prompt, str | Sequence):
        raise RequestError(f"prompt {prompt!r} must be a text or a list of messages")
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if chat is not None and (do_preprocess or not isinstance(prompt, str)):
        # Templates write the special tokens themselves.
        return tokenizer.encode(chat.render(as_messages(prompt)), add_special=False)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    raise RequestError("this model has no chat template; give texts or a chat_template")


def _put(arrived: queue.SimpleQueue[tuple[int, Output]], index: int, output: Output) -> None:
    arrived.put((index, output))


class _LossSink:
    """Turns logits into the mean loss of a sequence, chunk by chunk."""

    def __init__(self, ids: Sequence[int], losses: list[float], index: int) -> None:
        self._ids = np.array(ids)
        self._by_position = np.zeros(len(ids) - 1)
        self._losses, self._index = losses, index

    def __call__(self, start: int, logits: NDArray[np.float32]) -> None:
        count = min(len(logits), len(self._by_position) - start)
        rows = logits[:count].astype(np.float64)
        top = rows.max(axis=-1)
        norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
        right = self._ids[start + 1 : start + 1 + count]
        self._by_position[start : start + count] = norm - rows[np.arange(count), right]
        self._losses[self._index] = float(self._by_position.mean())


def _refuse_logits(requests: list[Request]) -> None:
    for request in requests:
        if request.gen.output_logits:
            raise RequestError(
                f'output_logits="{request.gen.output_logits}" is for infer, which returns them; '
                "a stream does not"
            )


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    if not isinstance(prompts, str | Sequence):
        raise RequestError(f"prompts={prompts!r} must be a text, messages or a list of either")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


def _single(gen_config: GenerationConfig | None) -> GenerationConfig | None:
    if isinstance(gen_config, GenerationConfig) and gen_config.n != 1:
        raise RequestError(f"n={gen_config.n} must be 1 here; use infer or stream_infer for more")
    return gen_config


def _response(request: Request, index: int) -> Response:
    return Response(input_token_len=request.num_prompt, index=index)


def pipeline(
    model_path: str,
    backend_config: EngineConfig | None = None,
    *,
    chat_template: str | None = None,
    guide_limits: GuideLimits | None = None,
    on_load: Callable[[int, int], None] | None = None,
) -> Pipeline:
    """Load a model and return a :class:`Pipeline`.

    torch's threads are the process's pool: numpy's BLAS is limited to one thread from then on.

    Args:
        model_path: a local folder or GGUF file, a packaged model (``smollm2-135m``) or a hub name.
        backend_config: the engine's options.
        chat_template: a Jinja template to use instead of the model's.
        guide_limits: what a ``response_format`` may cost.
        on_load: called with (layers read, layers in all) while loading.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: the options do not fit it or the machine.
    """
    if backend_config is not None and not isinstance(backend_config, EngineConfig):
        raise ConfigError(f"backend_config={backend_config!r} must be an EngineConfig")
    from kvant.engine.load import load_model

    model = load_model(model_path, backend_config or EngineConfig(), on_load)
    return Pipeline(model, chat_template=chat_template, guide_limits=guide_limits)
