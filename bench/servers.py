"""Our server and its peer, each as a process of its own on a free port of this machine."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from microvllm.model.checkpoint import resolve

from .client import Endpoint
from .engines import MAX_BATCH_SIZE, OURS, VLLM_ENVIRONMENT, Model

HOST = "127.0.0.1"
POLL = 0.25
"""Seconds between two looks at a server that starts."""
GRACE = 30.0
"""Seconds that a server has to end after it was asked to."""
LOG_LINES, LOG_BYTES = 30, 2**16
"""At most, of a server's last words, in an error."""
OUR_PROGRAM = "import sys; from microvllm.engine.cli import main; sys.exit(main())"
VLLM_PROGRAM = ["-m", "vllm.entrypoints.cli.main"]


class Server:
    """A process that serves; a context manager, on leaving which it has ended with all its children.

    environment: variables that the process has where this one has none of that name
    """

    def __init__(
        self, name: str, command: Sequence[str], url: str, environment: Mapping[str, str] = MappingProxyType({})
    ):
        self.name, self.endpoint = name, Endpoint(url)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # A group of its own, so that the processes that a server starts end with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**environment, **os.environ},
            start_new_session=True,
        )

    def wait(self, timeout: float) -> None:
        """Returns when /health says 200; RuntimeError where it does not in `timeout` seconds or the process ends."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.endpoint.get("/health", timeout=5.0)[0] == 200:
                    return
            time.sleep(POLL)
        raise RuntimeError(f"{self.name} was not healthy after {timeout:g} s{self._last_words()}")

    def check(self, patience: float = 0.0) -> None:
        """RuntimeError where the process has ended, or does within `patience` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
            raise RuntimeError(f"{self.name} ended with exit code {self._process.returncode}{self._last_words()}")

    def _last_words(self) -> str:
        log = self._log.fileno()
        # Not by seek and read: the process shares the position, and would write there.
        tail = os.pread(log, LOG_BYTES, max(0, os.fstat(log).st_size - LOG_BYTES))
        lines = tail.decode(errors="replace").splitlines()[-LOG_LINES:]
        return "; it said last:\n" + "\n".join(lines) if lines else ", and said nothing"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # no child is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def start(name: str, model: Model, share: float | None) -> Server:
    """Starts the server of this name on a model.   share: of the GPU's memory; None leaves it to the server"""
    port = free_port()
    options = {"--host": HOST, "--port": port, "--served-model-name": model.name, "--dtype": model.dtype}
    options |= {"--max-model-len": model.max_model_len, "--max-num-seqs": MAX_BATCH_SIZE}
    options |= {"--load-format": model.load_format} if model.load_format != "auto" else {}
    options |= {"--gpu-memory-utilization": share} if share is not None else {}
    # Every turn must compute its prompts: a cached prefix would be a win of another kind.
    words = [*(str(word) for option in options.items() for word in option), "--no-enable-prefix-caching"]
    if name == OURS:
        command = [sys.executable, "-c", OUR_PROGRAM, "serve", model.place, *words]
        return Server(name, command, f"http://{HOST}:{port}")
    place = str(resolve(model.place, model.load_format))
    # A shape alone has no tokenizer; nor does our server then make text of its tokens.
    words += ["--skip-tokenizer-init"] if model.load_format == "dummy" else []
    command = [sys.executable, *VLLM_PROGRAM, "serve", place, *words]
    return Server(name, command, f"http://{HOST}:{port}", VLLM_ENVIRONMENT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
