"""How long an event loop stands still."""

from __future__ import annotations

import asyncio
import time


class Stalls:
    """longest: seconds between two turns of the loop that runs `watch`, which goes on until it is cancelled."""

    def __init__(self):
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.monotonic() - before)
