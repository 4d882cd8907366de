"""POST /generate and /generate_stream: the engine's own request, without OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.types import Receive

from ..async_engine import Stream
from ..outputs import RequestOutput
from .events import DONE, EventStream, frame
from .protocol import GenerateRequest
from .responses import Generated, GeneratedToken, usage_body
from .served_model import ServedModel, sound_events


async def generate(body: GenerateRequest, served: ServedModel, receive: Receive) -> Generated:
    stream = await served.submit([body.prompt], [body.sampling_params()], "prompt")
    (output,) = await served.outputs(stream, receive)
    return _generated(output, output.text)


async def generate_stream(body: GenerateRequest, served: ServedModel) -> EventStream:
    stream = await served.submit([body.prompt], [body.sampling_params()], "prompt")
    return EventStream(stream, _events(stream))


async def _events(stream: Stream) -> AsyncIterator[bytes]:
    async for events in sound_events(stream):
        for _, event in events:
            if event.output is None:
                yield frame(GeneratedToken(token_id=event.token_id, text=event.text))
            else:
                yield frame(_generated(event.output, event.text))
    yield DONE


def _generated(output: RequestOutput, text: str) -> Generated:
    usage = output.usage
    return Generated(
        text=text,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        usage=usage_body(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
    )
