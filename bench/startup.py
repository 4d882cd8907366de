"""From the start of a process to its first token.

`bench` times a process that runs this module: it loads an engine and says on standard output how far it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .engines import OURS, VLLM, Model, Ours

ALONE = {OURS: Ours, "vllm": lambda model: VLLM(model, share=0.9)}
STAGES = ("imported", "built", "first token")
CAPTURING = "capturing"
"""CUDA graphs, which is a part of what is before "built"; of an engine that tells."""
PROMPT = list(range(1, 17))


def seconds(engine: str, model: Model, caches: Path) -> dict[str, float]:
    """Seconds from the start of a process to each of STAGES, and those of CAPTURING.

    caches: the folder of all that is compiled
    """
    places = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "VLLM_CACHE_ROOT": "vllm"}
    environment = os.environ | {name: str(caches / folder) for name, folder in places.items()}
    command = [sys.executable, "-m", __name__, engine, json.dumps(asdict(model))]
    reached: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            stage, _, taken = line.strip().partition(": ")
            if stage in STAGES:
                reached[stage] = time.perf_counter() - start
            elif stage == CAPTURING:
                reached[stage] = float(taken)
    if process.returncode or STAGES[-1] not in reached:
        raise RuntimeError(f"{engine} did not start: exit code {process.returncode} after {list(reached)}")
    return reached


def bench(engines: Iterable[str], model: Model) -> list[dict[str, Any]]:
    """Each engine twice: with nothing compiled, and with what the first process left."""
    rows = []
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                times = seconds(engine, model, Path(folder))
                columns = {f"{name} s": times.get(name, "–") for name in (*STAGES, CAPTURING)}
                rows.append({"engine": engine, "compile cache": cache} | columns)
    return rows


def main(engine: str, model: str) -> None:
    print("imported", flush=True)
    loaded = ALONE[engine](Model(**json.loads(model)))
    print("built", flush=True)
    if hasattr(loaded, "capture_seconds"):
        print(f"{CAPTURING}: {loaded.capture_seconds}", flush=True)
    loaded.seconds([PROMPT], 1, {})
    print("first token", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
