"""An engine for an event loop: it steps in a thread of its own, and neither waits for the other."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ..model.sampling_params import SamplingParams
from .engine import InferenceEngine, Prompt, Request
from .outputs import StepOutput
from .snapshot import EngineSnapshot
from .stats import EngineStats

T = TypeVar("T")

STOP_SECONDS = 10.0
"""How long `stop` waits for the step that runs."""


MOST_EVENTS = 64
"""In an item of a Stream, whose reader may have been away for thousands, so that an event loop can see to others."""


class OverloadedError(RuntimeError):
    """As many requests wait as may; later there is room again."""


class DrainingError(RuntimeError):
    """The engine is about to stop and takes nothing in."""


class DeadError(RuntimeError):
    """A step of the engine failed. What it was doing is lost, and it does nothing more."""


class Stream:
    """The answers to the prompts of one submission, as they are made: an asynchronous iterator.

    An item is what has come since the last one: (which request, its StepOutput) pairs, in order. It ends when every
    request has ended; DeadError where the engine dies before. Whoever stops reading must `close` it.

    prompts:    the token ids of each prompt
    requests:   all of them; those of a prompt stand together
    submitted:  time.monotonic() when it was asked for
    """

    def __init__(self, engine: AsyncEngine):
        self.prompts: list[list[int]] = []
        self.requests: list[Request] = []
        self.submitted = time.monotonic()
        self._engine = engine
        self._left = 0  # requests that have not ended
        self._events: list[tuple[int, StepOutput]] = []
        self._news = asyncio.Event()
        self._error: DeadError | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[tuple[int, StepOutput]]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        events = self._events[:MOST_EVENTS]
        del self._events[:MOST_EVENTS]
        return events

    def close(self) -> None:
        """Ends what has not ended and frees its blocks, before the engine's next step."""
        self._engine._close(self)

    def _put(self, index: int, event: StepOutput) -> None:
        self._events.append((index, event))
        self._left -= event.output is not None
        self._news.set()

    def _fail(self, error: DeadError) -> None:
        self._error, self._left = error, 0
        self._news.set()


Listener = Callable[[float, list[tuple[Stream, int, StepOutput]]], None]
"""Called on the event loop with a step's time.monotonic() and what it did: (stream, which request, StepOutput)."""


class AsyncEngine:
    """Runs an InferenceEngine, which nobody else may step, for the event loop in which `start` is called.

    Commands go to the engine's thread through a queue and are carried out between two steps; what a step has made comes
    to the event loop in one call, which gives each stream its share. Prompts are encoded in a third thread.

    max_waiting:  requests taken in beyond those that can run at once
    stats:        the engine's, after its last step
    error:        what it died of
    """

    def __init__(self, engine: InferenceEngine, *, max_waiting: int = 1024, listener: Listener | None = None):
        self.engine = engine
        self.max_open = engine.config.max_batch_size + max_waiting
        self.stats: EngineStats = engine.stats()
        self.error: DeadError | None = None
        self.draining = False
        self._stopped: DeadError | None = None
        self._listener = listener
        self._open = 0  # requests from their submission to their end
        self._streams: set[Stream] = set()
        self._snapshot: asyncio.Future[EngineSnapshot] | None = None  # while it is asked for
        self._at_rest, self._died = asyncio.Event(), asyncio.Event()
        self._at_rest.set()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._owners: dict[int, tuple[Stream, int]] = {}  # by request id, the engine thread's own
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._encoder = ThreadPoolExecutor(1, "encoder")

    # --- on the event loop ---

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the threads; what is still open fails, and so does what is asked for from now on. A step that does not
        end is left to end with the process.
        """
        self._stopped = DeadError("the engine has stopped")
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        self._encoder.shutdown(wait=False, cancel_futures=True)
        for stream in self._streams:
            stream._fail(self._stopped)
        self._fail_snapshot(self._stopped)

    async def submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Stream:
        """Takes in each prompt with each of params; request i·len(params) + j is prompt i with params j.

        All or none: ValueError where one cannot be served, OverloadedError, DrainingError or DeadError.
        """
        count = len(prompts) * len(params)
        self._check_open()
        if count > self.max_open:
            raise ValueError(f"{count} requests at once are too many: at most {self.max_open}")
        if self._open + count > self.max_open:
            raise OverloadedError(f"{self._open} requests run or wait, and {self.max_open} may")
        stream = Stream(self)
        self._reserve(count)
        try:
            for prompt in prompts:
                requests = await self._in_encoder(self._prepare, prompt, params)
                stream.prompts.append(list(requests[0].seq.token_ids))
                stream.requests += requests
            self._check_open()
        except BaseException:
            self._reserve(-count)
            raise
        stream._left = count
        self._streams.add(stream)
        self._commands.put(partial(self._begin, stream))
        return stream

    async def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The prompt's token ids; ValueError as from the engine's `encode`."""
        return await self._in_encoder(partial(self.engine.encode, prompt, add_special_tokens=add_special_tokens))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special ones by name; ValueError where one is outside the vocabulary or there is no tokenizer."""
        return await self._in_encoder(self._decode, token_ids)

    async def snapshot(self) -> EngineSnapshot:
        """The engine between two steps; DeadError where it is dead. All who wait for one get the same."""
        self._check_alive()
        if self._snapshot is None:
            self._snapshot = self._loop.create_future()
            self._commands.put(self._take_snapshot)
        return await asyncio.shield(self._snapshot)  # one who leaves does not take it from the others

    async def drain(self, timeout: float) -> None:
        """Takes nothing more in, and waits until all is answered; what is not after so many seconds is aborted."""
        self.draining = True
        try:
            await asyncio.wait_for(self._at_rest.wait(), timeout)
        except asyncio.TimeoutError:
            for stream in self._streams:
                self._commands.put(partial(self._abort, stream))

    async def death(self) -> None:
        """Returns when the engine has died."""
        await self._died.wait()

    async def _in_encoder(self, function: Callable[..., T], *arguments: object) -> T:
        if self._stopped is not None:
            raise self._stopped
        return await self._loop.run_in_executor(self._encoder, function, *arguments)

    def _check_alive(self) -> None:
        if error := self.error or self._stopped:
            raise error

    def _check_open(self) -> None:
        self._check_alive()
        if self.draining:
            raise DrainingError("the server is shutting down")

    def _reserve(self, count: int) -> None:
        if self.error is not None:  # nothing is open then
            return
        self._open += count
        if self._open:
            self._at_rest.clear()
        else:
            self._at_rest.set()

    def _close(self, stream: Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
            self._commands.put(partial(self._abort, stream))

    def _deliver(self, now: float, stats: EngineStats, events: list[tuple[Stream, int, StepOutput]]) -> None:
        self.stats = stats
        for stream, index, event in events:
            stream._put(index, event)
            if event.output is not None:
                self._reserve(-1)
                if not stream._left:
                    self._streams.discard(stream)
        if self._listener is not None:
            self._listener(now, events)

    def _show(self, snapshot: EngineSnapshot) -> None:
        if self._snapshot is not None:  # it is None where `stop` did not wait for the step that ran
            self._snapshot.set_result(snapshot)
            self._snapshot = None

    def _fail_snapshot(self, error: DeadError) -> None:
        if self._snapshot is not None:
            self._snapshot.set_exception(error)
            self._snapshot.exception()  # whoever asked for it may have left
            self._snapshot = None

    def _die(self, error: DeadError) -> None:
        self.error = error
        for stream in self._streams:
            stream._fail(error)
        self._streams.clear()
        self._fail_snapshot(error)
        self._at_rest.set()
        self._died.set()

    # --- in the encoder's thread ---

    def _prepare(self, prompt: Prompt, params: Sequence[SamplingParams]) -> list[Request]:
        prompt_ids = self.engine.encode(prompt)
        return [self.engine.prepare(prompt, each, prompt_ids=prompt_ids) for each in params]

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self.engine.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer")
        vocab_size = self.engine.model_config.vocab_size
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} must be from 0 to {vocab_size - 1}")
        return self.engine.tokenizer.spell(token_ids)

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._take_commands():
                events = [(*self._owners[event.request_id], event) for event in self.engine.step()]
                for *_, event in events:
                    if event.output is not None:
                        del self._owners[event.request_id]
                if events:
                    self._call(self._deliver, time.monotonic(), self.engine.stats(), events)
        except BaseException as error:  # the thread ends with it, whatever it is
            dead = DeadError(f"the engine has died: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._call(self._die, dead)

    def _take_commands(self) -> bool:
        """Carries out what was asked for, waiting for it where there is nothing else to do; False at the end."""
        wait = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _begin(self, stream: Stream) -> None:
        for index, request in enumerate(stream.requests):
            self._owners[self.engine.add(request)] = (stream, index)

    def _abort(self, stream: Stream) -> None:
        for request in stream.requests:
            self.engine.abort(request.seq.id)

    def _take_snapshot(self) -> None:
        self._call(self._show, EngineSnapshot.of(self.engine))

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
