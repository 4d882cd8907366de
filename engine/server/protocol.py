"""The bodies of requests. null is as good as absent, and what is not known is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...model.sampling_params import INTEGERS, MAX_TOP_K, NUMBERS, Bounds, SamplingParams
from .description import within
from .errors import APIError
from .fields import (
    Bias,
    Choices,
    Integer,
    Limit,
    LimitOrNothing,
    OneOrSeveralPrompts,
    OnePrompt,
    SeveralPrompts,
    Stops,
    StopTokenIds,
    TokenIds,
    TopCount,
    at_most,
    or_say,
)

MAX_FIELDS = 256
"""Of a JSON object; no more than sixty are known."""

WITHOUT_EFFECT = ("metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Parameters that change nothing in an answer here, whatever they say."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Parameters that are not supported, with the values that ask for nothing."""


def _only_what_is_known(schema: dict[str, Any]) -> None:
    known = schema["properties"]
    for name in WITHOUT_EFFECT:
        known.setdefault(name, {"description": "Taken, and without effect here."})
    for name, values in NEUTRAL.items():
        known.setdefault(name, {"enum": [*values, None], "description": "Not supported: only what asks for nothing."})
    schema["additionalProperties"] = False


def _one_of(name: str, other: str) -> Callable[[dict[str, Any]], None]:
    """What is known, and of two fields the one or the other."""

    def only(field: str, not_this: str) -> dict[str, Any]:
        return {"required": [field], "properties": {field: {"not": {"type": "null"}}, not_this: {"type": "null"}}}

    def describe(schema: dict[str, Any]) -> None:
        _only_what_is_known(schema)
        schema["oneOf"] = [only(name, other), only(other, name)]

    return describe


class Object(BaseModel):
    """A JSON object, whose numbers are numbers and whose strings are strings.

    A body of megabytes can be wrong in a million places, and listing them would hold the event loop up for seconds: so
    lists fail fast, and objects are counted before they are looked into.
    """

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return at_most(MAX_FIELDS)(value)


class Body(Object):
    model_config = ConfigDict(json_schema_extra=_only_what_is_known)

    model: str | None = None
    """What /v1/models lists; the answer is the same without."""

    def refuse_unsupported(self) -> None:
        """APIError where it asks for what this server does not do."""
        for name, value in (self.model_extra or {}).items():
            asks_for_nothing = value is None or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ()))
            if name not in WITHOUT_EFFECT and not asks_for_nothing:
                raise APIError(400, f"{name} is not supported", param=name, code="unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    """As JSON has it, where true is not 1."""
    return type(value) is type(other) and value == other


class StreamOptions(Object):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    """Whether an event without choices, with the usage, comes before the end."""
    include_obfuscation: Literal[False] | None = None
    """Not supported: only what asks for nothing."""


class Sampling(Body):
    """How an answer is drawn and when it ends; `SamplingParams` says what is allowed."""

    defaults: ClassVar[dict[str, Any]] = {}
    """What is not asked for and is not SamplingParams' own default."""

    max_tokens: Limit | None = None
    """Tokens to generate at most; fewer where the model's longest text ends."""
    temperature: Annotated[float, within(NUMBERS["temperature"])] | None = None
    """0 takes the likeliest token, 1 draws from the model's own distribution."""
    top_p: Annotated[float, within(NUMBERS["top_p"])] | None = None
    """Draw among the fewest likeliest whose probability reaches p; 1 is off."""
    top_k: Annotated[Integer, within(Bounds(-1, MAX_TOP_K))] | None = None
    """Draw among the k likeliest; 0 and -1 are off."""
    min_p: Annotated[float, within(NUMBERS["min_p"])] | None = None
    """Draw among those at least min_p times as likely as the likeliest; 0 is off."""
    stop: Stops | None = None
    """A string or several that end the text, which is shown up to there."""
    stop_token_ids: StopTokenIds | None = None
    """Tokens that end the text besides the model's end-of-sequence."""
    ignore_eos: bool | None = None
    """Whether to go on after the model's end-of-sequence."""
    min_tokens: Annotated[Integer, within(INTEGERS["min_tokens"])] | None = None
    """The answer does not stop before so many tokens; max_tokens at most."""
    seed: Annotated[Integer, within(INTEGERS["seed"])] | None = None
    """The same seed draws the same tokens."""
    presence_penalty: Annotated[float, within(NUMBERS["presence_penalty"])] | None = None
    """Taken from the logit of a token that is in the answer already."""
    frequency_penalty: Annotated[float, within(NUMBERS["frequency_penalty"])] | None = None
    """The same, once for each time that it is there."""
    repetition_penalty: Annotated[float, within(NUMBERS["repetition_penalty"])] | None = None
    """Divides positive and multiplies negative logits of tokens seen so far, those of the prompt included."""
    logit_bias: Bias | None = None
    """Token ids, as strings, and what is added to their logits."""

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """APIError names the field that is wrong."""
        self.refuse_unsupported()
        names = Sampling.model_fields.keys() - Body.model_fields.keys()
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        options = self.defaults | asked | changes
        if options.get("top_k") == -1:
            options["top_k"] = 0
        try:
            return SamplingParams(**options)
        except ValueError as error:
            raise APIError.of(error) from None


class OpenAISampling(Sampling):
    """What both kinds of completion take."""

    max_completion_tokens: Limit | None = None
    """The newer name of max_tokens, which it overrides."""
    n: Choices | None = None
    """Answers to each prompt; with a seed, answer i is drawn with seed + i."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events, one a token."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    user: str | None = None
    """Taken and not used."""

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


A_TEXT = "The capital of France is"


class CompletionRequest(OpenAISampling):
    """Texts to go on with, 16 tokens long and drawn at temperature 1 where nothing else is asked for."""

    defaults: ClassVar[dict[str, Any]] = {"max_tokens": 16, "temperature": 1.0}

    prompt: OneOrSeveralPrompts = Field(examples=[A_TEXT])
    """A text, its token ids, or several of either."""
    max_tokens: LimitOrNothing | None = None
    """Tokens to generate at most; 0 only with `echo`."""
    max_completion_tokens: LimitOrNothing | None = None
    """The newer name of max_tokens, which it overrides."""
    echo: bool | None = None
    """Whether the prompt comes before its completion."""
    logprobs: TopCount | None = None
    """Report the log-probability of each token and of the so many likeliest; with `echo`, of the prompt's too."""


class TextPart(Object):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


NOTHING = (None, [], "")


def _nothing_else(schema: dict[str, Any]) -> None:
    schema["properties"]["type"] = {"enum": ["text", *NOTHING]}
    schema["additionalProperties"] = {"enum": list(NOTHING)}


class Message(Object):
    """A turn of a conversation; a developer's message is a system message."""

    model_config = ConfigDict(json_schema_extra=_nothing_else)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)],
        or_say('a string or a list of text parts, {"type": "text", "text": "…"}, and of no others'),
    ]
    parsed: Any = None
    """What OpenAI's client has read out of the content, and sends back with it; without effect."""

    def for_template(self) -> dict[str, str]:
        for name, value in (self.model_extra or {}).items():
            if value not in NOTHING and (name, value) != ("type", "text"):  # lm-eval's
                raise APIError(400, f"{name} of a message is not supported", param="messages")
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content}


class TextFormat(Object):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]

    def schema_to_follow(self) -> None:
        return None


class JSONObjectFormat(Object):
    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]

    def schema_to_follow(self) -> dict[str, Any]:
        return {"type": "object"}


class NamedSchema(Object):
    model_config = ConfigDict(extra="forbid")

    name: str
    """Taken and not used."""
    description: str | None = None
    """Taken and not used."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """A JSON schema of what llguidance supports, at most 65536 characters long."""
    strict: bool | None = None
    """The schema is followed, whatever this says."""


class JSONSchemaFormat(Object):
    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def schema_to_follow(self) -> dict[str, Any]:
        return self.json_schema.schema_


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]

Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class ChatRequest(OpenAISampling):
    """A conversation to be answered in the model's own template, at temperature 1 where nothing else is asked for, and
    without a max_tokens for as long as fits.
    """

    defaults: ClassVar[dict[str, Any]] = {"temperature": 1.0}

    messages: Messages = Field(examples=[[{"role": "user", "content": "What is a GPU?"}]])
    logprobs: bool | None = Field(None, examples=[True])
    """Whether to report the log-probability of each token."""
    top_logprobs: TopCount | None = None
    """And of the so many likeliest; only with `logprobs`."""
    response_format: ResponseFormat | None = None
    """What the answer is, if it is not cut off: a text, a JSON object, or JSON that follows a schema."""

    def chat(self) -> list[dict[str, str]]:
        return [message.for_template() for message in self.messages]


class GenerateRequest(Sampling):
    """A prompt to go on with or several, greedily and for 256 tokens where nothing else is asked for."""

    model_config = ConfigDict(json_schema_extra=_one_of("prompt", "prompts"))

    prompt: OnePrompt | None = Field(None, examples=[A_TEXT])
    """A text or its token ids."""
    prompts: SeveralPrompts | None = None
    """Instead of `prompt`: several, of which each is answered."""

    def all_prompts(self) -> list[str | list[int]]:
        """APIError where there are none."""
        if (self.prompt is None) == (self.prompts is None):
            raise APIError(400, "give either a prompt or prompts", param="prompt")
        return [self.prompt] if self.prompts is None else self.prompts


class TokenizeRequest(Body):
    """A text or a conversation, one of them."""

    model_config = ConfigDict(json_schema_extra=_one_of("prompt", "messages"))

    prompt: str | None = Field(None, examples=[A_TEXT])
    add_special_tokens: bool | None = None
    """Whether a text's tokens come after those that the model's texts begin with; true if not given."""
    messages: Messages | None = None

    def text_or_chat(self) -> str | list[dict[str, str]]:
        self.refuse_unsupported()
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "give either a prompt or messages", param="prompt")
        return self.prompt if self.prompt is not None else [message.for_template() for message in self.messages]


class DetokenizeRequest(Body):
    tokens: TokenIds
