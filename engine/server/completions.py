"""POST /v1/completions: texts that go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Receive

from ..async_engine import Stream
from ..outputs import RequestOutput, StepOutput
from .errors import APIError
from .events import DONE, EventStream, frame
from .logprobs import CompletionLogprobsWriter
from .protocol import CompletionRequest
from .responses import Completion, CompletionChoice, CompletionLogprobs
from .served_model import ServedModel, UsageSum, sound_events


async def complete(body: CompletionRequest, served: ServedModel, receive: Receive) -> Completion | EventStream:
    head = served.head(body.model, "cmpl") | {"object": "text_completion"}
    if body.echo and body.stream and body.logprobs is not None:
        raise APIError(400, "echo with logprobs is not supported in a stream", param="echo")
    changes: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo:
        changes["prompt_logprobs"] = body.logprobs
    if _echo_only(body):
        changes["max_tokens"] = 1  # the engine generates something; it is not shown
    params = body.all_params(**changes)
    stream = await served.submit(body.prompt, params, "prompt")
    answer = _Answer(body, served, stream, head, len(params))
    if body.stream:
        return EventStream(stream, answer.events())
    outputs = await served.outputs(stream, receive)
    if body.logprobs is not None:  # of many tokens this is too much to write for the event loop
        return await asyncio.to_thread(answer.whole, outputs)
    return answer.whole(outputs)


def _echo_only(body: CompletionRequest) -> bool:
    """Whether nothing is generated; APIError where nothing is echoed either."""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if getattr(body, name) != 0:
        return False
    if not body.echo:
        raise APIError(400, f"{name}=0 needs echo to be true", param=name)
    return True


class _Answer:
    """n: answers to each prompt"""

    def __init__(self, body: CompletionRequest, served: ServedModel, stream: Stream, head: dict[str, Any], n: int):
        self._body, self._tokenizer, self._stream, self._head, self._n = body, served.tokenizer, stream, head, n
        self._generated = not _echo_only(body)
        self._usage = UsageSum(n, generated=self._generated)

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        choices = []
        for index, output in enumerate(outputs):
            self._usage.add(index, output)
            echoed = self._echoed(index)
            text = echoed + (output.text if self._generated else "")
            logprobs = self._logprobs(index, output, len(echoed))
            choices.append(self._choice(index, text, logprobs, self._reason(output)))
        return Completion(**self._head, choices=choices, usage=self._usage.body())

    async def events(self) -> AsyncIterator[bytes]:
        count = len(self._stream.prompts) * self._n
        writers = [CompletionLogprobsWriter(self._tokenizer) for _ in range(count)]
        unseen = set(range(count))
        nothing = {"usage": None} if self._body.wants_usage else {}
        async for events in sound_events(self._stream):
            frames = []
            for index, event in events:
                if event.output is not None:
                    self._usage.add(index, event.output)
                reason = self._reason(event.output)
                text = event.text if self._generated else ""
                if index in unseen:
                    unseen.remove(index)
                    text = self._echoed(index) + text
                choice = self._choice(index, text, self._token_logprobs(writers[index], event), reason)
                frames.append(frame(Completion(**self._head, choices=[choice], **nothing)))
            yield b"".join(frames)
        if self._body.wants_usage:
            yield frame(Completion(**self._head, choices=[], usage=self._usage.body()))
        yield DONE

    @staticmethod
    def _choice(index: int, text: str, logprobs: CompletionLogprobs | None, reason: str | None) -> CompletionChoice:
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    def _reason(self, output: RequestOutput | None) -> str | None:
        """Of what is shown; the token that an echo generates may be a text's last one."""
        if output is None or self._generated or output.finish_reason != "stop":
            return output and output.finish_reason
        return "length"

    def _echoed(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompt[index // self._n]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt) if self._tokenizer is not None else ""

    def _logprobs(self, index: int, output: RequestOutput, echoed: int) -> CompletionLogprobs | None:
        """echoed: characters of the prompt before the generated text"""
        if self._body.logprobs is None:
            return None
        shown = None
        if self._body.echo:
            i = index // self._n
            writer = CompletionLogprobsWriter(self._tokenizer, prompt=self._body.prompt[i])
            shown = writer.write(self._stream.prompts[i], output.prompt_logprobs)
        if self._generated:
            writer = CompletionLogprobsWriter(self._tokenizer, before=echoed)
            shown = writer.write(output.token_ids, output.logprobs, shown)
        return shown

    def _token_logprobs(self, writer: CompletionLogprobsWriter, event: StepOutput) -> CompletionLogprobs | None:
        if self._body.logprobs is None or event.logprobs is None:
            return None
        return writer.write([event.token_id], [event.logprobs])
