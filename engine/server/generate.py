"""POST /generate and /generate_stream: the engine's own request, without OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Receive

from ..async_engine import Stream
from ..outputs import RequestOutput
from .events import DONE, EventStream, frame
from .protocol import GenerateRequest
from .responses import Generated, GeneratedEnd, GeneratedList, GeneratedToken, usage_body
from .served_model import ServedModel, sound_events


async def generate(body: GenerateRequest, served: ServedModel, receive: Receive) -> Generated | GeneratedList:
    outputs = await served.outputs(await _submit(body, served), receive)
    results = [Generated(text=output.text, **_end(output)) for output in outputs]
    return results[0] if body.prompts is None else GeneratedList(results=results)


async def generate_stream(body: GenerateRequest, served: ServedModel) -> EventStream:
    stream = await _submit(body, served)
    return EventStream(stream, _events(stream))


async def _submit(body: GenerateRequest, served: ServedModel) -> Stream:
    served.check_name(body.model)
    field = "prompt" if body.prompts is None else "prompts"
    return await served.submit(body.all_prompts(), [body.sampling_params()], field)


async def _events(stream: Stream) -> AsyncIterator[bytes]:
    async for events in sound_events(stream):
        for index, event in events:
            if event.output is None:
                yield frame(GeneratedToken(index=index, token_id=event.token_id, text=event.text))
            else:
                yield frame(GeneratedEnd(index=index, text=event.text, **_end(event.output)))
    yield DONE


def _end(output: RequestOutput) -> dict[str, Any]:
    usage = output.usage
    return {
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "usage": usage_body(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
    }
