"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.logprobs import Logprobs


@dataclass(frozen=True)
class Usage:
    """Tokens. cached_tokens: those of the prompt whose keys and values were in the cache already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds since the request was added.

    to_first_step:   to the step that computed the first of its tokens; None where it ended before
    to_first_token:  None where it ended without one.   total: to its end
    """

    to_first_step: float | None
    to_first_token: float | None
    total: float


class RequestError(RuntimeError):
    """A request that has failed by itself, while the engine goes on."""


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    prompt:           as it was given: text, token ids or a chat
    text, token_ids:  what was generated; a token that ended it is among the ids and not in the text
    finish_reason:    "stop": an end-of-sequence token, a stop token or a stop string; "length": max_tokens or the
                      model's longest text; "abort"; "error": `error` says what happened
    logprobs:         one entry a token, where SamplingParams.logprobs asked for them
    prompt_logprobs:  one entry a token of the prompt, None for the first, where asked for
    """

    request_id: int
    prompt: str | list[int] | list[dict]
    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    error: str | None = None


class Generations(list[RequestOutput]):
    """The outputs of `InferenceEngine.generate` in the order of its prompts."""

    def items(self) -> list[tuple[str | list[int] | list[dict], str]]:
        """(prompt, text) pairs; equal prompts stay apart."""
        return [(output.prompt, output.text) for output in self]


@dataclass(frozen=True)
class StepOutput:
    """What a step did to one request.

    token_id:  its new token; None where it ended without one
    text:      the text that became certain, possibly empty
    logprobs:  the token's, where SamplingParams.logprobs asked for them
    output:    the whole, once the request has ended
    """

    request_id: int
    token_id: int | None
    text: str
    logprobs: Logprobs | None = None
    output: RequestOutput | None = None
