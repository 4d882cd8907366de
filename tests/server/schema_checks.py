"""What schemathesis checks of every answer beside its own checks; it imports this module."""

from __future__ import annotations

import re

import schemathesis

BEYOND_A_SCHEMA = [
    r"^(prompt|text) .* is empty: it has no tokens",
    r"is too long",
    r"^token id \d+ (of the prompt )?must be",
    r"^token id \d+ of (logit_bias|stop_token_ids) must be under the vocabulary's size",
    r"^min_tokens=\d+ must be an integer from 0 to \d+$",
    r"^(stream_options needs stream|max_(completion_)?tokens=0 needs echo|top_logprobs needs logprobs)",
    r"^echo with logprobs is not supported in a stream$",
    r"^json_schema=.* (is not valid|cannot be followed): ",
    r"^ignore_eos=True must be False with json_schema",
]
"""Why a body that its schema allows may be refused all the same: by the model, or by another of its fields."""


@schemathesis.check
def valid_bodies_are_taken(ctx, response, case) -> None:
    if case.meta.generation.mode.is_positive and 400 <= response.status_code < 500 and response.status_code != 405:
        message = response.json()["error"]["message"]
        assert any(re.search(reason, message) for reason in BEYOND_A_SCHEMA), message


@schemathesis.check
def errors_are_of_openais_shape(ctx, response, case) -> None:
    if response.status_code >= 400:
        body = response.json()
        assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
