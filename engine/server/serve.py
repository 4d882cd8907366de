"""The command `micro-vllm serve`: its flags, and the server's life from the port to the last answer."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import signal
import socket
import sys

import uvicorn

from ..cli_options import load_engine
from .app import make_app
from .patience import PatientProtocol

DEATH_SECONDS = 5.0
"""How long /health says that the engine is dead before the process ends, so that whoever watches it sees why."""

LAST_WORDS_SECONDS = 5
"""For the answers that a drain has cut short to reach their clients."""


class Server(uvicorn.Server):
    """Drains the engine when it is told to stop, and stops when the engine dies."""

    def __init__(self, config: uvicorn.Config, shutdown_timeout: float, what: str):
        super().__init__(config)
        self._what = what
        self.engine = config.app.state.engine
        self._shutdown_timeout = shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"micro-vllm: serving {self._what}", file=sys.stderr, flush=True)
        self._watch = asyncio.create_task(self._stop_after_death())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch.cancel()
        drain = asyncio.create_task(self.engine.drain(self._shutdown_timeout))
        await super().shutdown(sockets)
        drain.cancel()  # it is done, unless a second Ctrl-C has cut it short

    async def _stop_after_death(self) -> None:
        await self.engine.death()
        logging.getLogger("uvicorn.error").error("The engine has died", exc_info=self.engine.error)
        await asyncio.sleep(DEATH_SECONDS)
        self.should_exit = True


def serve(options: argparse.Namespace) -> int:
    """Serves until a signal or the engine's death → the exit code.

    ValueError says what is wrong with the model or an option.
    """
    _check(options)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it a token may wait 40 ms for the one before.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Before the model is loaded, which takes a while. It does not listen yet: who comes too early is refused.
            listener.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            return _cannot_listen(options, error)
        server = _server(options, listener)
        # What is there now stays, and need not be looked through again, as it would be while a large body is parsed.
        gc.collect()
        gc.freeze()
        # uvicorn raises a signal once more after it has obeyed it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        try:
            server.run(sockets=[listener])
        except OSError as error:  # another server came to listen meanwhile
            return _cannot_listen(options, error)
        finally:
            gc.unfreeze()
    if server.engine.error is not None:
        print(f"micro-vllm: {server.engine.error}", file=sys.stderr)
        return 1
    return 0


def _cannot_listen(options: argparse.Namespace, error: OSError | OverflowError) -> int:
    reason = error.strerror if isinstance(error, OSError) else error
    print(f"micro-vllm: cannot listen at {options.host}:{options.port}: {reason}", file=sys.stderr)
    return 1


def _check(options: argparse.Namespace) -> None:
    """ValueError for what the engine does not check, or knows by another name."""
    for option in ("max_num_seqs", "max_num_batched_tokens"):
        value = getattr(options, option)
        if value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if "" in options.api_key:
        raise ValueError("--api-key '' is empty: anybody could send it")
    if not 0 <= options.shutdown_timeout < math.inf:
        raise ValueError(f"--shutdown-timeout {options.shutdown_timeout:g} must be at least 0 seconds and finite")


def _server(options: argparse.Namespace, listener: socket.socket) -> Server:
    engine = load_engine(
        options,
        load_format=options.load_format,
        max_batch_size=options.max_num_seqs,
        max_prefill_tokens=options.max_num_batched_tokens,
        interleaved_prefill_tokens=options.interleaved_prefill_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        block_size=options.block_size,
        enable_prefix_caching=options.enable_prefix_caching,
        policy=options.scheduling_policy,
        seed=options.seed,
    )
    held = engine.cache_manager.num_blocks * engine.cache_manager.block_size
    if held < engine.max_model_len - 1:  # a text's last token is never computed
        raise ValueError(
            f"the cache holds {held} tokens and a text may have {engine.max_model_len}: give --max-model-len {held}, "
            f"or a --gpu-memory-utilization over {options.gpu_memory_utilization}"
        )
    engine.grammars.load()
    names = options.served_model_name or [options.model]
    config = uvicorn.Config(
        make_app(engine, names, api_keys=options.api_key, allowed_origins=options.allowed_origins),
        http=PatientProtocol,  # h11, which it speaks, bounds the size of headers
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(options.shutdown_timeout) + LAST_WORDS_SECONDS,
    )
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
    return Server(config, options.shutdown_timeout, f"{names[0]} at {_address(listener)}")


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not what every page that is open asks for twice a second, unless it goes wrong."""
    _, _, path, _, status = record.args
    return path != "/view" or status >= 400


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
