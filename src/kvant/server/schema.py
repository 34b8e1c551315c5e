"""What clients may send, and what they get. Names are OpenAI's; where it has none, vLLM's.

Types are strict and unknown fields are errors: what is accepted is honoured. Fields that ask for
nothing (``store: false``, ``user``) are taken, so that clients which always send them work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

__all__ = [
    "FIELDS",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerateRequest",
    "Sampling",
    "StreamOptions",
    "TokenizeRequest",
]

Probability = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_SEED_BITS = 63
_MOST_FIELDS = 100
_MOST_MESSAGES = 10_000


def _few(most: int) -> BeforeValidator:
    """Look at the length of an object first: millions of members are millions of errors."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"{len(value)} members are given, and the limit is {most}")
        return value

    return BeforeValidator(check)


# Lists fail at the first wrong element, for the same reason.
Words = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > _MOST_FIELDS:
            raise ValueError(
                f"{len(data)} parameters are given, and no more than {_MOST_FIELDS} are known"
            )
        return data

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """A field that is null asks for nothing, also one that is not known."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(_Strict):
    """What a stream has beside text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None


class StructuredOutputs(_Strict):
    """vLLM's constraints; one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Words | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(_Strict):
    """How to generate; the same for all endpoints."""

    model: str | None = Field(
        None, description="the model's name; by default the one that there is"
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1")
    top_p: Probability | None = Field(None, description="default 1")
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 or -1 for all, the default")
    min_p: Probability | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _few(10_000)] | None
    ) = Field(None, description="token id (as text, as JSON has it) to what is added to its logit")
    seed: Annotated[int, Field(ge=-(2**_SEED_BITS), lt=2**_SEED_BITS)] | None = None
    stop: (
        Annotated[str, StringConstraints(max_length=1000)]
        | Annotated[list[Stop], Field(fail_fast=True)]
        | None
    ) = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=64, fail_fast=True)] | None = None
    min_tokens: int | None = Field(None, ge=0, description="no end before this many")
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Words | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(None, description="taken, not used")


class Message(BaseModel):
    """One of a conversation; further fields are the chat template's."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Objects | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    name: str | None = None


class JsonSchema(_Strict):
    """A named schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """OpenAI's ``text``, ``json_object``, ``json_schema``; LMDeploy's ``regex_schema``."""

    type: Literal["text", "json_object", "json_schema", "regex_schema"]
    json_schema: JsonSchema | None = None
    regex_schema: str | None = None


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)
    ]
    max_tokens: int | None = Field(None, ge=1, description="default: what the context holds")
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description="given to the chat template")
    enable_thinking: bool | None = Field(None, description="given to the chat template")
    include_reasoning: bool | None = True
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], _few(_MOST_FIELDS)] | None = Field(
        None, description="taken, not used"
    )
    safety_identifier: str | None = Field(None, description="taken, not used")
    prompt_cache_key: str | None = Field(None, description="taken, not used")
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        str | Words | TokenIds | Annotated[list[TokenIds], Field(max_length=1024, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, description="default 16; 0 with echo")
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1, description="generate as many, answer the n likeliest")
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is less than n={self.n or 1}")
        if self.best_of is not None and self.stream and self.best_of > (self.n or 1):
            raise ValueError("best_of cannot be streamed: the best is known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true; there is nothing to answer otherwise")
        return self


class GenerateRequest(Sampling):
    """``POST /generate``: token ids or text in, token ids and text out."""

    prompt: str | None = None
    input_ids: TokenIds | None = None
    max_tokens: int | None = Field(None, ge=1, description="default 128")
    return_logprob: bool | None = False

    @model_validator(mode="after")
    def _check(self) -> GenerateRequest:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give one of prompt and input_ids")
        return self


class TokenizeRequest(_Strict):
    """``POST /tokenize``: a prompt, or messages as the chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=_MOST_MESSAGES, fail_fast=True)] | None = (
        None
    )
    add_special_tokens: bool | None = True
    add_generation_prompt: bool | None = True

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeRequest(_Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = False


_BODIES = ChatRequest, CompletionRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)
"""Names of what requests may have."""


# ---------------------------------------------------------------------------------------- answers


class PromptTokensDetails(BaseModel):
    """``cached_tokens`` were found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """``arguments`` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``; a stream has the same in pieces (SSE)."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """One entry of each list for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n answers to one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The answer of ``/v1/completions``; a stream has the same in pieces (SSE)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class GeneratedMeta(BaseModel):
    """About a generated sequence."""

    finish_reason: dict[str, str]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    output_token_logprobs: list[list[float]] | None = None


class Generated(BaseModel):
    """The answer of ``/generate``."""

    text: str
    output_ids: list[int]
    meta_info: GeneratedMeta


class Tokens(BaseModel):
    """The answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The answer of ``/detokenize``."""

    prompt: str


class Error(BaseModel):
    """What is wrong with a request. ``param`` names the field."""

    message: str
    type: str
    param: str | None
    code: str | int | None
    request_id: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: Error


class Health(BaseModel):
    """The answer of ``/health``. ``step_seconds``: the engine is at a step for so long."""

    status: str
    model: str
    running: int | None = None
    waiting: int | None = None
    step_seconds: float | None = None
    error: str | None = None


class Ready(BaseModel):
    """The answer of ``/ready``."""

    status: str


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class Models(BaseModel):
    """The answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[Model]
