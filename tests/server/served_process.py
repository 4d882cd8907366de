"""`micro-vllm serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("micro-vllm"))]


class ServedProcess:
    """Returns when it serves; its log is a file, which never fills up as a pipe does."""

    def __init__(self, model: str, *arguments: str, program: list[str] = COMMAND):
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 — for the life of the process
        self.process = subprocess.Popen(
            [*program, "serve", model, "--port", "0", *arguments],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        deadline = time.monotonic() + 60
        while not (found := re.search(r"serving \S+ at (http://127\.0\.0\.1:(\d+))", self.log())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        self.url, self.port = found[1], int(found[2])

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def stop(self) -> int:
        """→ the exit code"""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
