"""The bodies of requests. null is as good as absent, and what is not known is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ...model.sampling_params import SamplingParams
from .errors import APIError

MAX_PROMPTS = 128
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters: what may begin a stop string is compared at each token, in the engine's thread."""
MAX_TOP_LOGPROBS = 20
"""A token; OpenAI's and vLLM's."""
MAX_TOKENS_NAMED = 1024
"""Tokens in `logit_bias` and in `stop_token_ids`."""

WITHOUT_EFFECT = ("metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Parameters that change nothing in an answer here, whatever they say."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Parameters that are not supported, with the values that ask for nothing."""


class Body(BaseModel):
    """A JSON object, whose numbers are numbers and whose strings are strings."""

    model_config = ConfigDict(extra="allow", strict=True)

    def refuse_unsupported(self) -> None:
        """APIError where it asks for what this server does not do."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in WITHOUT_EFFECT and value not in NEUTRAL.get(name, ()):
                raise APIError(400, f"{name} is not supported", param=name, code="unsupported_parameter")


class StreamOptions(BaseModel):
    """include_usage: whether an event without choices, with the usage, comes before the end"""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_one_or_several, str | list[str])]
TopCount = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TokenIds = Annotated[list[int], Field(max_length=MAX_TOKENS_NAMED)]


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ValueError("must map token ids to numbers") from None


Bias = Annotated[dict[str, float], Field(max_length=MAX_TOKENS_NAMED), AfterValidator(_token_ids)]


class Sampling(Body):
    """How an answer is drawn and when it ends; `SamplingParams` says what is allowed.

    top_k: −1 is off, as 0 is
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """What is not asked for and is not SamplingParams' own default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Bias | None = None

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """APIError names the field that is wrong."""
        self.refuse_unsupported()
        names = Sampling.model_fields
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        options = self.defaults | asked | changes
        if options.get("top_k") == -1:
            options["top_k"] = 0
        try:
            return SamplingParams(**options)
        except ValueError as error:
            raise APIError.of(error) from None


class OpenAISampling(Sampling):
    """What both kinds of completion take.

    max_completion_tokens:  the newer name of max_tokens, which it overrides
    n:                      answers to each prompt; with a seed, answer i is drawn with seed + i
    user:                   taken and not used
    """

    model: str | None = None
    max_completion_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def wants_usage(self) -> bool:
        """In the events of a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def all_params(self, **changes: Any) -> list[SamplingParams]:
        """SamplingParams of each of the n answers to a prompt; APIError."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options needs stream to be true", param="stream_options")
        if self.max_completion_tokens is not None:
            changes = {"max_tokens": self.max_completion_tokens} | changes
        params = self.sampling_params(**changes)
        if params.seed is None:
            return [params] * (self.n or 1)
        return [replace(params, seed=_wrapped(params.seed + i)) for i in range(self.n or 1)]


def _wrapped(seed: int) -> int:
    """Of 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _prompts(value: Any, check: ValidatorFunctionWrapHandler) -> list[str | list[int]]:
    """A list of prompts, whatever it was given as."""
    one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    try:
        return check([value] if one else value)
    except ValidationError:
        raise ValueError(f"must be a text, its token ids, or from 1 to {MAX_PROMPTS} of either") from None


AnyPrompts = str | list[int] | list[str] | list[list[int]]
Prompts = Annotated[
    list[str | list[int]], Field(min_length=1, max_length=MAX_PROMPTS), WrapValidator(_prompts, AnyPrompts)
]


class CompletionRequest(OpenAISampling):
    """Texts to go on with.

    prompt:    a text, its token ids, or several of either
    echo:      whether the prompt comes before its completion
    logprobs:  report the log-probability of each token and of the so many likeliest; with echo, of the prompt's too
    """

    defaults: ClassVar[dict[str, Any]] = {"max_tokens": 16, "temperature": 1.0}

    prompt: Prompts
    echo: bool | None = None
    logprobs: TopCount | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation; a developer's message is a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], "") and (name, value) != ("type", "text"):  # lm-eval's
                raise APIError(400, f"{name} of a message is not supported", param="messages")
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content}


class ChatRequest(OpenAISampling):
    """A conversation to be answered, in the model's own template.

    max_tokens:    without it, as many as fit
    logprobs:      whether to report the log-probability of each token
    top_logprobs:  and of the so many likeliest
    """

    defaults: ClassVar[dict[str, Any]] = {"temperature": 1.0}

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None

    def chat(self) -> list[dict[str, str]]:
        return [message.for_template() for message in self.messages]


class GenerateRequest(Sampling):
    """A prompt to go on with: a text or its token ids. The fields of SamplingParams, with its defaults."""

    prompt: str | Annotated[list[int], Field(min_length=1)]


class TokenizeRequest(Body):
    """A text or a conversation, one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    def text_or_chat(self) -> str | list[dict[str, str]]:
        self.refuse_unsupported()
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "give either a prompt or messages", param="prompt")
        return self.prompt if self.prompt is not None else [message.for_template() for message in self.messages]


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
