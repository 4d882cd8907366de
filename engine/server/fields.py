"""The kinds of values that the bodies of requests have, with what is allowed of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ...model.sampling_params import BIAS, INTEGERS, Bounds
from .description import within

MAX_PROMPTS = 128
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters: what may begin a stop string is compared at each token, in the engine's thread."""
MAX_TOP_LOGPROBS = 20
"""A token; OpenAI's and vLLM's."""
MAX_TOKENS_NAMED = 1024
"""Tokens in `logit_bias` and in `stop_token_ids`."""


def at_most(count: int) -> Callable[[Any], Any]:
    """A validator that refuses an object of more fields before it looks into any."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"an object of {len(value)} fields: at most {count} are allowed")
        return value

    return check


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _whole(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """5.0 is an integer in JSON, and in a list too; only what is not plainly integers is looked at one by one."""
    try:
        return check(value)
    except ValidationError:
        if isinstance(value, list) and any(isinstance(each, float) for each in value):
            return check([int(each) if _is_whole(each) else each for each in value])
        if _is_whole(value):
            return check(int(value))
        raise


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def or_say(allowed: str) -> WrapValidator:
    """A union's own errors name each of its parts."""

    def check(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"must be {allowed}") from None

    return WrapValidator(check)


Integer = Annotated[int, WrapValidator(_whole)]
Limit = Annotated[int, Field(ge=INTEGERS["max_tokens"].low), WrapValidator(_whole)]
LimitOrNothing = Annotated[int, Field(ge=0), WrapValidator(_whole)]
Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH, json_schema_extra={"minLength": 1})]
SeveralStops = Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)]
Stops = Annotated[
    SeveralStops,
    BeforeValidator(_one_or_several, Stop | SeveralStops),
    or_say(f"a string or a list of strings, at most {MAX_STOPS} of at most {MAX_STOP_LENGTH} characters"),
]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), WrapValidator(_whole)]
TopCount = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WrapValidator(_whole)]
TokenId = Annotated[int, within(Bounds(0))]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), WrapValidator(_whole)]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS_NAMED), WrapValidator(_whole)]


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    if not all(re.fullmatch("[0-9]{1,10}", token) for token in bias):
        raise ValueError("must map token ids to numbers")
    return {int(token): value for token, value in bias.items()}


Bias = Annotated[
    dict[str, Annotated[float, within(BIAS)]],
    Field(max_length=MAX_TOKENS_NAMED, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
    AfterValidator(_token_ids),
    BeforeValidator(at_most(MAX_TOKENS_NAMED)),
]

ONE = "a text or its token ids"
SEVERAL = f"from 1 to {MAX_PROMPTS} of either"


def _as_several(value: Any) -> Any:
    one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) in (int, float))
    return [value] if one else value


PromptIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1), WrapValidator(_whole)]
AnyPrompts = Annotated[list[str | PromptIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
OnePrompt = Annotated[str | PromptIds, or_say(ONE)]
SeveralPrompts = Annotated[AnyPrompts, or_say(SEVERAL)]
OneOrSeveralPrompts = Annotated[
    AnyPrompts, BeforeValidator(_as_several, str | PromptIds | AnyPrompts), or_say(f"{ONE}, or {SEVERAL}")
]
