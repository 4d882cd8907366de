"""The engine beside a peer, in turns, on the same token ids:   python -m bench.engine --peer vllm

On a GPU that is the list of bench.workloads in Qwen2-7B's shape. --cases chooses from the list; --requests measures
other workloads. --policies, --gap, --startup and --profile measure in other ways. Tables go to the terminal, figures
and pictures to bench/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from microvllm.engine.config import DTYPES
from microvllm.kernels.roof import Roof, measure_roof
from microvllm.model.checkpoint import LOAD_FORMATS, resolve
from microvllm.model.config import ModelConfig

from . import engine_picture, gap, picture, policies, profile, record, startup
from .engine_tables import brief_rows, decode_rows, point, prefill_rows
from .engines import OURS, PEERS, Engine, Model, Ours, our_engine, share_beside
from .floor import step_floor
from .profiler import Blocks, Profiler
from .turns import compare
from .workloads import WORKLOADS, Workload, named

SHAPES = Path(__file__).parent / "shapes"
QUICK_TOKENS = 16
QUICK_REQUESTS = policies.Requests(count=12, prompt=(8, 64), output=(4, 16), running=4)
QUICK_BLOCKS = Blocks(steps=4)
QUICK_ARRIVAL = gap.Arrival(streams=4, shortest=8, longest=32, prompt=64, settled=2, tokens=8)


def load(model: Model, peer: str | None, eager: bool, with_roof: bool) -> tuple[dict[str, Engine], float | None]:
    """→ the engines by name, ours first; the bytes/s that this GPU reads, None where it is not asked for or no GPU"""
    gpu = torch.cuda.is_available()
    # The peer goes first: vLLM measures the memory while it loads, and what changes meanwhile would mislead it.
    engines = {peer: PEERS[peer](model)} if peer else {}
    roof = gpu_roof() if with_roof else None
    share = {"gpu_memory_utilization": share_beside()} if peer and gpu else {}
    return {OURS: Ours(model, enforce_eager=eager, **share), **engines}, roof and roof.read


def gpu_roof() -> Roof | None:
    """This GPU's, measured before an engine takes the memory; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    roof = measure_roof(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.empty_cache()
    return roof


def bench_workloads(model: Model, config: ModelConfig, options: argparse.Namespace) -> None:
    listed = options.cases is not None
    decoding = [workload for workload in options.workloads if workload.tokens > 1]
    prefilling = [workload for workload in options.workloads if workload.tokens == 1]
    peer = options.peer
    engines, read = load(model, peer, options.eager, with_roof=listed and bool(decoding))
    about = {"max_model_len": model.max_model_len, "kernels": str(engines[OURS].engine.kernels)}
    about |= {"read bytes/s": read} if read else {}
    about |= {"kind": "cases"} if listed else {"prompt": options.prompt, "tokens": options.tokens}
    for what, workloads, rows_of in (
        ("cases" if listed else "engine", decoding, decode_rows if listed else brief_rows),
        ("prefill", prefilling, prefill_rows),
    ):
        rows, points = [], []
        for workload in workloads:
            floor = step_floor(config, DTYPES[model.dtype], workload, read) if read else None
            comparison = compare(engines, workload, config.vocab_size, options.rounds, floor)
            rows += rows_of(comparison, peer)
            points.append(point(comparison))
            print(f"{record.table(rows[-len(engines) :])}\n", flush=True)
            # Each time: a run that is cut off keeps what it has.
            path = save(f"{what}-{model.name}-{peer or 'alone'}", model, rows, options, points=points, **about)
        if rows:
            print(f"{record.table(rows)}\n{path}", flush=True)
        if rows and listed:
            picture.draw_beside(path, engine_picture.draw)


def bench_policies(model: Model, config: ModelConfig, requests: policies.Requests, options: argparse.Namespace) -> None:
    rows = policies.bench(model, config.vocab_size, requests, options.rounds)
    print(record.table(rows))
    path = save(f"policies-{model.name}", model, rows, options, kind="policies", requests=asdict(requests))
    print(path, flush=True)
    picture.draw_beside(path, engine_picture.draw)


def bench_gap(model: Model, config: ModelConfig, arrival: gap.Arrival, options: argparse.Namespace) -> None:
    engine = our_engine(model, enforce_eager=options.eager)
    rows = gap.bench(engine, arrival, config.vocab_size, options.rounds)
    print(record.table(rows))
    about = {"arrival": asdict(arrival), "interleaved_prefill_tokens": engine.config.interleaved_prefill_tokens}
    print(save(f"gap-{model.name}", model, rows, options, kernels=str(engine.kernels), **about))


def bench_startup(model: Model, options: argparse.Namespace) -> None:
    names = [OURS, options.peer] if options.peer else [OURS]
    rows = startup.bench(names, model)
    print(record.table(rows))
    print(save(f"startup-{model.name}-{options.peer or 'alone'}", model, rows, options))


def bench_profile(model: Model, config: ModelConfig, blocks: Blocks, options: argparse.Namespace) -> None:
    roof = gpu_roof()
    profiler = Profiler(model, roof, enforce_eager=options.eager)
    about = {"kind": "profile", "kernels": str(profiler.engine.kernels), "roof": roof and asdict(roof)}
    rows, points = [], []
    for workload in options.workloads:
        found = profiler.profile(workload, config.vocab_size, blocks)
        rows += profile.rows(found)
        points.append(profile.point(found))
        print(f"{record.table(profile.rows(found))}\n{profile.words(found)}\n", flush=True)
        path = save(f"profile-{model.name}", model, rows, options, points=points, blocks=asdict(blocks), **about)
    print(path, flush=True)
    picture.draw_beside(path, engine_picture.draw)


def save(name: str, model: Model, rows: list[dict[str, Any]], options: argparse.Namespace, **about: Any) -> Path:
    """record.save, with what every record says, and --eager, --quick and --name in its name."""
    words = ["eager" if options.eager else "", "quick" if options.quick else "", options.name]
    name = "-".join(filter(None, [name, *words]))
    return record.save(name, rows, model=model.name, dtype=model.dtype, load_format=model.load_format, **about)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_options(parser)
    add("--peer", choices=PEERS, help="measured in the same run, in turns A B A B")
    add("--cases", nargs="*", metavar="NAME", help=f"default on a GPU with --peer vllm: {' '.join(WORKLOADS)}")
    add("--requests", type=int, nargs="+", help="batch sizes, instead of --cases; default: 1 8, or 1 35 with "
        "--profile on a GPU")  # fmt: skip
    add("--prompt", type=int, help="prompt tokens of each of --requests; default: 32, or 512 with --profile on a GPU")
    add("--tokens", type=int, default=64, help="tokens that each of --requests generates")
    add("--rounds", type=int, default=3, help="turns of each engine; medians are shown")
    add("--quick", action="store_true", help="few tokens, to see that all runs; the record's name says so")
    add("--eager", action="store_true", help="our engine without CUDA graphs; the record's name says so")
    add("--name", default="", metavar="WORD", help="a word at the end of the record's name")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--policies", action="store_true", help="our scheduling policies on requests of mixed lengths")
    ways.add_argument("--gap", action="store_true", help="our streams' gaps when a long prompt arrives")
    ways.add_argument("--startup", action="store_true", help="from process start to the first token, compiled or not")
    ways.add_argument("--profile", action="store_true", help="where a decode step's time goes: operators, gaps, host")
    ways.add_argument("--draw", action="store_true", help="measure nothing; draw the pictures of bench/results again")
    add("--running", type=int, help="with --policies: requests that run at once; default: 64")
    options = parser.parse_args(arguments)
    for name in ("requests", "prompt", "tokens", "rounds", "running"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} {given} must be at least 1")
    if options.cases is not None and options.requests:
        parser.error("--cases are named workloads and --requests others: give one of the two")
    if options.peer and (options.policies or options.gap or options.profile):
        parser.error("--policies, --gap and --profile measure our engine by itself: they take no --peer")
    if options.peer == "transformers" and options.startup:
        parser.error("--startup knows no peer but vllm")
    if options.eager and (options.policies or options.startup):
        parser.error("--eager is for the cases, --requests, --gap and --profile")
    gpu = torch.cuda.is_available()
    if options.peer == "vllm" and options.cases is None and not options.requests and gpu:
        options.cases = []
    if options.model is None:
        ways_of_ours = options.policies or options.gap or options.startup or options.profile
        in_shape = gpu and (options.cases is not None or ways_of_ours)
        options.model = str(SHAPES / "qwen2-7b") if in_shape else "smollm2"
    if options.load_format is None:
        options.load_format = default_load_format(options.model)
    if options.peer == "transformers" and options.load_format == "dummy":
        parser.error("random weights would differ between the engines: dummy weights take no --peer transformers")
    if options.peer and importlib.util.find_spec(options.peer) is None:
        print(f"{options.peer} is not installed: {OURS} runs alone", flush=True)
        options.peer = None
    profile_on_gpu = options.profile and gpu
    options.requests = options.requests or ((1, 35) if profile_on_gpu else (1, 8))
    options.prompt = options.prompt or (512 if profile_on_gpu else 32)
    try:
        options.workloads = workloads(options)
        if not options.draw:
            resolve(options.model, options.load_format)
    except ValueError as error:
        parser.error(str(error))
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `Model.open` takes."""
    add = parser.add_argument
    add("--model", help="a folder, a .gguf file, a known name or a hub name; default: smollm2, or on a GPU Qwen2-7B's "
        "shape for all but --requests")  # fmt: skip
    add("--load-format", choices=LOAD_FORMATS, help="dummy: small random weights; default for bench/shapes")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="default: what our engine takes")


def default_load_format(model: str) -> str:
    """bench/shapes has no weights."""
    return "dummy" if Path(model).resolve().parent == SHAPES.resolve() else "auto"


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Those that the command line asks for; ValueError for a name that does not exist."""
    if options.cases is not None:
        chosen = named(options.cases)
    else:
        chosen = [
            Workload(str(requests), requests, (options.prompt, options.prompt), options.tokens)
            for requests in options.requests
        ]
    if options.quick:
        chosen = [replace(workload, tokens=min(QUICK_TOKENS, workload.tokens)) for workload in chosen]
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.draw:
        for path in sorted(record.RESULTS.glob("*/*.json")):
            if json.loads(path.read_text()).get("kind") in engine_picture.FIGURES:
                picture.draw_beside(path, engine_picture.draw)
        return
    requests = QUICK_REQUESTS if options.quick else policies.Requests()
    requests = replace(requests, running=options.running or requests.running)
    arrival = QUICK_ARRIVAL if options.quick else gap.Arrival()
    if options.policies:
        model, config = Model.open(options.model, options.load_format, options.dtype, requests.longest)
        bench_policies(model, config, requests, options)
    elif options.gap:
        model, config = Model.open(options.model, options.load_format, options.dtype, arrival.longest_text)
        bench_gap(model, config, arrival, options)
    elif options.profile:
        blocks = replace(QUICK_BLOCKS if options.quick else Blocks(), rounds=options.rounds)
        longest = max(map(blocks.longest_text, options.workloads))
        model, config = Model.open(options.model, options.load_format, options.dtype, longest)
        bench_profile(model, config, blocks, options)
    elif options.startup:
        model, _ = Model.open(options.model, options.load_format, options.dtype)
        bench_startup(model, options)
    else:
        longest = max(workload.longest for workload in options.workloads)
        model, config = Model.open(options.model, options.load_format, options.dtype, longest)
        bench_workloads(model, config, options)


if __name__ == "__main__":
    main()
