"""GET /view: the engine as the page shows it."""

from __future__ import annotations

import base64
import struct

from ..snapshot import EngineSnapshot, RequestSnapshot
from .responses import EngineView, RequestView


def view_body(snapshot: EngineSnapshot) -> EngineView:
    """Milliseconds where there are many blocks and requests: not on the event loop."""
    stats, states = snapshot.stats, snapshot.block_states()
    return EngineView(
        clock=snapshot.clock,
        steps=stats.steps,
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        generated_tokens=stats.generated_tokens,
        preemptions=stats.preemptions,
        running=[_request(request) for request in snapshot.running],
        num_waiting=stats.waiting,
        waiting=[_request(request) for request in snapshot.waiting],
        block_size=snapshot.block_size,
        blocks=base64.b64encode(struct.pack(f"<{len(states)}H", *states)).decode(),
    )


def _request(request: RequestSnapshot) -> RequestView:
    return RequestView(**vars(request))
