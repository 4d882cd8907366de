"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

MAX_LOGPROBS = 100
"""Log-probabilities that one token can report: more would be a sort of the vocabulary in disguise."""

MAX_SCHEMA_LENGTH = 1 << 16
"""Characters of a schema: to compile one takes up to a quarter of a second."""

MAX_TOP_K = (1 << 31) - 1
"""More than any vocabulary, and an integer that a tensor can hold."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be.

    high:        None is no bound
    open_below:  `low` itself is not allowed
    """

    low: float
    high: float | None = None
    open_below: bool = False


INTEGERS = {
    "max_tokens": Bounds(1),
    "top_k": Bounds(0, MAX_TOP_K),
    "min_tokens": Bounds(0),  # up to max_tokens
    "seed": Bounds(-(1 << 63), (1 << 63) - 1),
    "logprobs": Bounds(0, MAX_LOGPROBS),
    "prompt_logprobs": Bounds(0, MAX_LOGPROBS),
}
NUMBERS = {
    "temperature": Bounds(0.0, 1e5),
    "top_p": Bounds(0.0, 1.0, open_below=True),
    "min_p": Bounds(0.0, 1.0),
    "repetition_penalty": Bounds(0.01, 100.0),
    "presence_penalty": Bounds(-2.0, 2.0),
    "frequency_penalty": Bounds(-2.0, 2.0),
}
BIAS = Bounds(-100.0, 100.0)
"""Of a token in `logit_bias`."""

OPTIONAL = ("seed", "logprobs", "prompt_logprobs")
"""What may be None."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Validated when made; a ValueError names the field, the value and what is allowed.

    max_tokens:          tokens to generate at most; fewer where the model's longest text ends
    temperature:         0 takes the likeliest token, 1 draws from the model's own distribution, and 100000, which is
                         the most, from all tokens alike
    top_k:               draw among the k likeliest; 0 is off
    top_p:               draw among the fewest likeliest whose probability reaches p; 1 is off
    min_p:               draw among those at least min_p times as likely as the likeliest; 0 is off
    repetition_penalty:  divides positive and multiplies negative logits of tokens seen so far (arXiv:1909.05858), from
                         0.01 to 100, so that no logit becomes infinite
    presence_penalty, frequency_penalty:  taken from the logit of a token in the output, once and once an occurrence
    logit_bias:          {token id: what is added to its logit}
    seed:                with it, token i is a function of the logits, the seed and i alone; None takes a fresh one
    min_tokens:          the request does not stop before so many tokens
    stop:                a string or several that end the text, which is shown up to there
    stop_token_ids:      tokens that end the text besides the model's end-of-sequence; neither is shown
    ignore_eos:          go on after the model's end-of-sequence
    logprobs:            report the sampled token's log-probability and the n likeliest; None is off
    prompt_logprobs:     the same for the prompt's tokens
    json_schema:         the text is JSON that follows this schema, a mapping or its JSON text, and ends where it is
                         complete, whatever min_tokens says; {"type": "object"} is any JSON object. Other ends
                         (max_tokens, stop, stop_token_ids) leave it incomplete.
    Log-probabilities are those of the model, before penalties, bias, schema and temperature.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self):
        for name, bounds in {**INTEGERS, "min_tokens": Bounds(0, self.max_tokens)}.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                _integer(name, getattr(self, name), bounds)
        for name, bounds in NUMBERS.items():
            _number(name, getattr(self, name), bounds)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _integer("a token id of logit_bias", token, Bounds(0))
            _number(f"logit_bias[{token}]", bias, BIAS)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop={self.stop!r} must be a string or several, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.stop_token_ids, (tuple, list)):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} must be a list of token ids")
        for token in self.stop_token_ids:
            _integer("a token of stop_token_ids", token, Bounds(0))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
            if self.ignore_eos:
                raise ValueError("ignore_eos=True must be False with json_schema, whose text has an end")

    @classmethod
    def of(cls, **options: Any) -> SamplingParams:
        """SamplingParams(**options), where an unknown option is a ValueError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name}={options[name]!r}; the options are {', '.join(known)}")
        return cls(**options)

    def check_tokens(self, vocab_size: int) -> None:
        """ValueError where a token id lies outside the vocabulary."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise ValueError(f"token id {token} of {name} must be under the vocabulary's size, {vocab_size}")


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, (str, Mapping)):
        raise ValueError(f"json_schema={schema!r} must be a mapping or a JSON text")
    if isinstance(schema, Mapping):
        try:
            schema = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json_schema=… must be JSON: {error}") from None
    if len(schema) > MAX_SCHEMA_LENGTH:
        raise ValueError(f"json_schema=… has {len(schema)} characters and must have at most {MAX_SCHEMA_LENGTH}")
    return schema


def _integer(name: str, value: Any, bounds: Bounds) -> None:
    low, high = bounds.low, bounds.high
    inside = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not inside:
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}={value!r} must be {allowed}")


def _number(name: str, value: Any, bounds: Bounds) -> None:
    low, high = bounds.low, bounds.high
    # An integer beyond the largest float is as little a number here as infinity.
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or value < low or (high is not None and value > high) or (bounds.open_below and value == low):
        above = f"{'over' if bounds.open_below else 'at least'} {low:g}"
        raise ValueError(f"{name}={value!r} must be a number {above}{'' if high is None else f' and at most {high:g}'}")
