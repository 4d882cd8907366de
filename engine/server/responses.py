"""The bodies of answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "abort"]


class CachedTokens(BaseModel):
    cached_tokens: int


class UsageBody(BaseModel):
    """Tokens: a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """One entry a token in each list, the first of a prompt being null; text_offset counts characters."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Also each event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Generated(BaseModel):
    """The answer to a prompt of /generate."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: UsageBody


class GeneratedList(BaseModel):
    """In the order of the prompts."""

    results: list[Generated]


class GeneratedToken(BaseModel):
    """A token of the answer to the prompt number `index`, counted from 0."""

    index: int
    token_id: int
    text: str


class GeneratedEnd(Generated):
    """The last event of an answer; `text` is what its last token adds."""

    index: int


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """null where the model has no such token."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


class Version(BaseModel):
    version: str


class RequestView(BaseModel):
    """id: its place in the order of arrival;   blocks: of the cache, shared ones included"""

    id: int
    state: Literal["waiting", "prefill", "decode"]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    blocks: int


class EngineView(BaseModel):
    """Two of them make rates: what `…_tokens`, `steps` and `preemptions` count never falls, and `clock` is in seconds.

    running:  all, by arrival
    waiting:  the first 32 of `num_waiting`, by arrival
    blocks:   the state of each block, as the base64 of 16-bit little-endian numbers: 0 free, 1 cached and unused,
              2 shared by several requests, 3 + i used by running[i] alone
    """

    clock: float
    steps: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    running: list[RequestView]
    num_waiting: int
    waiting: list[RequestView]
    block_size: int
    blocks: str


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> UsageBody:
    return UsageBody(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens),
    )
