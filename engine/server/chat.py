"""POST /v1/chat/completions: answers in a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Receive

from ...model.logprobs import Logprobs
from ..async_engine import Stream
from ..outputs import RequestOutput
from .errors import APIError
from .events import DONE, EventStream, frame
from .logprobs import chat_logprobs
from .protocol import ChatRequest
from .responses import AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, Delta
from .served_model import ServedModel, UsageSum, sound_events


async def complete_chat(body: ChatRequest, served: ServedModel, receive: Receive) -> ChatCompletion | EventStream:
    head = served.head(body.model, "chatcmpl")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    changes: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.response_format is not None:
        changes["json_schema"] = body.response_format.schema_to_follow()
    if body.max_tokens is None and body.max_completion_tokens is None:
        changes["max_tokens"] = served.engine.engine.max_model_len
    params = body.all_params(**changes)
    stream = await served.submit([body.chat()], params, "messages")
    answer = _Answer(body, served, stream, head, len(params))
    if body.stream:
        return EventStream(stream, answer.events())
    outputs = await served.outputs(stream, receive)
    if body.logprobs:  # of many tokens this is too much to write for the event loop
        return await asyncio.to_thread(answer.whole, outputs)
    return answer.whole(outputs)


class _Answer:
    """n: answers to the conversation"""

    def __init__(self, body: ChatRequest, served: ServedModel, stream: Stream, head: dict[str, Any], n: int):
        self._body, self._tokenizer, self._stream, self._head, self._n = body, served.tokenizer, stream, head, n
        self._usage = UsageSum(n)

    def whole(self, outputs: list[RequestOutput]) -> ChatCompletion:
        choices = []
        for index, output in enumerate(outputs):
            self._usage.add(index, output)
            choices.append(
                ChatChoice(
                    index=index,
                    message=AssistantMessage(role="assistant", content=output.text),
                    logprobs=self._logprobs(output.logprobs),
                    finish_reason=output.finish_reason,
                )
            )
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=self._usage.body())

    async def events(self) -> AsyncIterator[bytes]:
        unseen = set(range(self._n))
        async for events in sound_events(self._stream):
            frames = []
            for index, event in events:
                if event.output is not None:
                    self._usage.add(index, event.output)
                if index in unseen:
                    # With its first token, whose time a client that waits for the first event wants to know.
                    unseen.remove(index)
                    frames.append(self._chunk(index, Delta(role="assistant", content=""), None, None))
                logprobs = self._logprobs(None if event.logprobs is None else [event.logprobs])
                reason = None if event.output is None else event.output.finish_reason
                frames.append(self._chunk(index, Delta(content=event.text), logprobs, reason))
            yield b"".join(frames)
        if self._body.wants_usage:
            yield self._frame([], usage=self._usage.body())
        yield DONE

    def _chunk(self, index: int, delta: Delta, logprobs: ChatLogprobs | None, reason: str | None) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return self._frame([choice], **({"usage": None} if self._body.wants_usage else {}))

    def _frame(self, choices: list[ChatChunkChoice], **usage: Any) -> bytes:
        return frame(ChatChunk(**self._head, object="chat.completion.chunk", choices=choices, **usage))

    def _logprobs(self, entries: list[Logprobs] | None) -> ChatLogprobs | None:
        if entries is None:
            return None
        return chat_logprobs(self._tokenizer, entries, self._body.top_logprobs or 0)
