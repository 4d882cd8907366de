"""The model that is served: its names, and what every kind of answer does with its engine."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.types import Receive

from ...model.sampling_params import SamplingParams
from ...model.tokenizer import Tokenizer
from ..async_engine import AsyncEngine, DeadError, DrainingError, OverloadedError, Stream
from ..engine import Prompt
from ..outputs import RequestOutput, StepOutput
from .errors import APIError
from .events import while_connected
from .responses import UsageBody, usage_body


class ServedModel:
    """names: what clients may call it; the first one is what it calls itself"""

    def __init__(self, engine: AsyncEngine, names: Sequence[str]):
        self.engine, self.names = engine, list(names)
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.engine.tokenizer

    def head(self, name: str | None, prefix: str) -> dict[str, Any]:
        """What an answer begins with; APIError where the model asked for is another."""
        self.check_name(name)
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name or self.names[0]}

    def check_name(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise APIError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    async def submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], field: str) -> Stream:
        """As AsyncEngine's, with APIError; field: what the prompts are called in the body"""
        try:
            return await self.engine.submit(prompts, params)
        except (ValueError, OverloadedError, DrainingError, DeadError) as error:
            raise APIError.of(error, field) from error

    async def outputs(self, stream: Stream, receive: Receive) -> list[RequestOutput]:
        """The whole answers, in the order of the requests; ClientLeft, and they are ended, when the client leaves."""
        try:
            return await while_connected(receive, _collect(stream))
        except DeadError as error:
            raise APIError.of(error) from error
        finally:
            stream.close()


async def sound_events(stream: Stream) -> AsyncIterator[list[tuple[int, StepOutput]]]:
    """The stream's items, up to a request that fails by itself, while the engine goes on: then APIError."""
    async for events in stream:
        for place, (_, event) in enumerate(events):
            if event.output is not None and event.output.error is not None:
                yield events[:place]
                raise APIError.of_failure(event.output.error)
        yield events


async def _collect(stream: Stream) -> list[RequestOutput]:
    outputs: dict[int, RequestOutput] = {}
    async for events in sound_events(stream):
        outputs |= {index: event.output for index, event in events if event.output is not None}
    return [outputs[index] for index in sorted(outputs)]


class UsageSum:
    """The usage of the n answers to each of several prompts: a prompt counts once.

    generated: whether the tokens that were generated are shown
    """

    def __init__(self, n: int, *, generated: bool = True):
        self._n, self._generated = n, generated
        self._prompt = self._completion = self._cached = 0

    def add(self, index: int, output: RequestOutput) -> None:
        if self._generated:
            self._completion += output.usage.completion_tokens
        if index % self._n == 0:
            self._prompt += output.usage.prompt_tokens
            self._cached += output.usage.cached_tokens

    def body(self) -> UsageBody:
        return usage_body(self._prompt, self._completion, self._cached)
