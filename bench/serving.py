"""Servers under load, over HTTP:   python -m bench.serving --peer vllm

Starts our server, and the peer's, on free ports of this machine, or takes the one at --base-url. Streams completions of
the workloads of bench.workloads from each in turns, A B A B; figures have the names and the definitions of
`vllm bench serve`. On a GPU that is 1, 35 and 128 requests at once in Qwen2-7B's shape. Tables go to the terminal,
figures and a picture to bench/results. Where a request failed, the exit code is 1.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from microvllm.model.checkpoint import resolve

from . import engine_picture, picture, record, servers
from .client import Endpoint, Load, complete
from .engine import SHAPES, add_model_options, default_load_format, workloads
from .engines import OURS, Model, Ours, share_beside
from .serving_metrics import GOODPUT, metrics
from .serving_tables import Comparison, latency_rows, point, rows
from .turns import WARM_UP_TOKENS
from .workloads import Workload

STREAMS = ("1", "35", "128")
"""Of the named workloads, those that are served on a GPU unless others are asked for."""
ENGINES_SHARE = 0.92
"""Of the GPU's memory, for all engines on it together."""
DYING = 1.0
"""Seconds from the first sign of a server's end to the end of its process."""
BUSY = 0.8
"""A client that computes for more of the time than this may itself be what is measured."""


@dataclass(frozen=True)
class Target:
    """A server and the name of its model there.   server: its process; None where it is not ours to start"""

    endpoint: Endpoint
    model: str
    server: servers.Server | None = None

    def turn(self, workload: Workload, load: Load, vocab_size: int, goodput: Mapping[str, float]) -> dict[str, Any]:
        """The metrics of a load. RuntimeError where all of it failed, or the server has died."""
        prompts = workload.prompts(vocab_size)
        run = complete(self.endpoint, self.model, prompts, workload.tokens, workload.sampling, load)
        if self.server:
            # Its last words say more than the requests that failed with it, which may know of its end before we do.
            self.server.check(DYING if any(answer.error for answer in run.answers) else 0.0)
        return metrics(run, load, goodput)

    @classmethod
    def given(cls, endpoint: Endpoint) -> Target:
        """A server that runs already. RuntimeError where none answers, or it names no model."""
        try:
            status, body = endpoint.get("/v1/models", timeout=10.0)
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"there is no server at {endpoint.url}: {error}") from error
        try:
            return cls(endpoint, json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise RuntimeError(f"{endpoint.url}/v1/models names no model; its status is {status}") from error


def start(model: Model, options: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Target], Ours | None]:
    """→ the servers by name, ours first, until the stack ends; our engine by itself, where it is asked for"""
    names = [OURS, options.peer] if options.peer else [OURS]
    engines = len(names) + options.offline
    share = ENGINES_SHARE / engines if engines > 1 and torch.cuda.is_available() else None
    targets = {}
    # The peer goes first: vLLM measures the memory while it loads, and what changes meanwhile would mislead it.
    for name in reversed(names):
        counted = share_beside(share) if share and name == OURS else share
        server = stack.enter_context(servers.start(name, model, counted))
        server.wait(options.start_timeout)
        print(f"{name} serves", flush=True)
        targets[name] = Target(server.endpoint, model.name, server)
    alone = {"gpu_memory_utilization": share_beside(share)} if share and options.offline else {}
    return {name: targets[name] for name in names}, Ours(model, **alone) if options.offline else None


def compare(
    targets: Mapping[str, Target],
    offline: Ours | None,
    workload: Workload,
    vocab_size: int,
    options: argparse.Namespace,
) -> Comparison:
    """Each server warms up, and then takes its turns; so does the engine without one."""
    load, prompts = options.load, workload.prompts(vocab_size)
    warm_up = replace(workload, tokens=min(WARM_UP_TOKENS, workload.tokens))
    for target in targets.values():
        target.turn(warm_up, replace(load, request_rate=math.inf), vocab_size, {})
    if offline:
        offline.seconds(prompts, warm_up.tokens, workload.sampling)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
    rates = []
    for _ in range(options.rounds):
        for name, target in targets.items():
            turn = target.turn(workload, load, vocab_size, options.goodput)
            turns[name].append(turn)
            for reason, count in turn["errors"].items():
                print(f"{name}: {count} of {workload.requests} requests failed: {reason}", flush=True)
            if turn["cpu_share"] > BUSY:
                print(f"the client computed for {turn['cpu_share']:.0%} of {name}'s turn: it may be what was measured")
        if offline:
            seconds = offline.seconds(prompts, workload.tokens, workload.sampling)
            rates.append(workload.requests * workload.tokens / seconds)
    return Comparison(workload, turns, rates)


def bench(model: Model, vocab_size: int, options: argparse.Namespace) -> int:
    """→ how many requests failed"""
    with ExitStack() as stack:
        if options.endpoint:
            targets, offline = {options.base_url: Target.given(options.endpoint)}, None
        else:
            targets, offline = start(model, options, stack)
        shown, points = [], []
        for workload in options.workloads:
            comparison = compare(targets, offline, workload, vocab_size, options)
            shown += rows(comparison, options.peer)
            points.append(point(comparison))
            print(f"{record.table(latency_rows(comparison))}\n", flush=True)
            # Each time: a run that is cut off keeps what it has.
            path = save(model, shown, points, options)
    print(f"{record.table(shown)}\n{path}", flush=True)
    picture.draw_beside(path, engine_picture.draw)
    return sum(turn["failed"] for each in points for turns in each["turns"].values() for turn in turns)


def save(model: Model, shown: list[dict[str, Any]], points: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    beside = "given" if options.base_url else options.peer or "alone"
    words = [model.name, beside, "quick" if options.quick else "", options.name]
    name = "-".join(filter(None, ["serving", *words]))
    about = {"model": model.name, "dtype": "a dtype of the server's" if options.base_url else model.dtype}
    about |= {} if options.base_url else {"load_format": model.load_format, "max_model_len": model.max_model_len}
    about |= {"seed": options.load.seed, "goodput": options.goodput}
    return record.save(name, shown, kind="serving", **about, points=points)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_options(parser)
    add("--peer", choices=("vllm",), help="served in the same run, in turns A B A B")
    add("--offline", action="store_true", help="our engine without a server too, and the share of it that HTTP leaves")
    add("--base-url", metavar="URL", help="a server that runs already, as http://127.0.0.1:8000, instead of ours; its "
        "key is the environment variable OPENAI_API_KEY, prompts are of --model's vocabulary")  # fmt: skip
    add("--cases", nargs="+", metavar="NAME", help=f"of bench.workloads; default on a GPU: {' '.join(STREAMS)}")
    add("--requests", type=int, nargs="+", help="numbers of requests, instead of --cases; default on a CPU: 1 4")
    add("--prompt", type=int, default=32, help="prompt tokens of each of --requests")
    add("--tokens", type=int, default=64, help="tokens that each of --requests generates")
    add("--request-rate", type=float, default=math.inf, help="requests/s of a Poisson process; default: all at once")
    add("--max-concurrency", type=int, help="requests under way at once; default: all")
    add("--seed", type=int, default=0, help="of the arrivals")
    add("--goodput", nargs="+", default=(), metavar="NAME:MS", help=f"what a good request takes at most, by names of "
        f"{', '.join(GOODPUT)}: its requests/s are shown")  # fmt: skip
    add("--rounds", type=int, default=3, help="turns of each server; medians are shown")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take")
    add("--start-timeout", type=float, default=600.0, help="seconds that a server may take to start")
    add("--quick", action="store_true", help="few tokens, to see that all runs; the record's name says so")
    add("--name", default="", metavar="WORD", help="a word at the end of the record's name")
    options = parser.parse_args(arguments)
    if options.cases and options.requests:
        parser.error("--cases are named workloads and --requests others: give one of the two")
    if options.base_url and (options.peer or options.offline or not options.model):
        parser.error("--base-url is one server of a --model that it is given; it takes neither --peer nor --offline")
    if options.offline and (options.request_rate < math.inf or options.max_concurrency):
        parser.error("--offline has all requests at once: it takes neither --request-rate nor --max-concurrency")
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    gpu = torch.cuda.is_available()
    if gpu and not options.cases and not options.requests:
        options.cases = STREAMS
    options.requests = options.requests or (1, 4)
    options.model = options.model or (str(SHAPES / "qwen2-7b") if gpu and options.cases else "smollm2")
    options.load_format = options.load_format or default_load_format(options.model)
    if options.peer and importlib.util.find_spec(options.peer) is None:
        print(f"{options.peer} is not installed: {OURS} serves alone", flush=True)
        options.peer = None
    try:
        options.endpoint = Endpoint(options.base_url, os.environ.get("OPENAI_API_KEY")) if options.base_url else None
        options.load = Load(options.request_rate, options.max_concurrency, options.seed, options.timeout)
        options.goodput = goodput(options.goodput)
        options.workloads = workloads(options)
        resolve(options.model, options.load_format)
    except ValueError as error:
        parser.error(str(error))
    if prefill := [workload.name for workload in options.workloads if workload.tokens < 2]:
        parser.error(f"a time for each output token takes two of them at least, and {prefill[0]!r} has one")
    return options


def goodput(pairs: Sequence[str]) -> dict[str, float]:
    """ms by name, of NAME:MS; ValueError"""
    bounds = {}
    for pair in pairs:
        name, _, bound = pair.partition(":")
        try:
            bounds[name] = float(bound)
        except ValueError:
            raise ValueError(f"--goodput takes NAME:MS, as in ttft:200, and not {pair!r}") from None
        if name not in GOODPUT or not bounds[name] >= 0:
            raise ValueError(f"--goodput bounds {', '.join(GOODPUT)} by ms of at least 0, and not {pair!r}")
    return bounds


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    longest = max(workload.longest for workload in options.workloads)
    model, config = Model.open(options.model, options.load_format, options.dtype, longest)
    try:
        failed = bench(model, config.vocab_size, options)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {failed} requests failed")


if __name__ == "__main__":
    # As after Control-C, the servers end with what started them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
