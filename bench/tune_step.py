"""What a kernel's launch makes of a whole decode step:

    python -m bench.tune_step 35 linear._few_rows_launch STAGES=2,3 AHEAD=256,1024 --of outputs=3584 inputs=3584

`bench.tune` times a kernel behind itself. In a step it starts while the kernel before it ends, and shares a
multiprocessor's memory and registers with it, so the best launch by itself may not be the step's. Here each launch is
captured in the decode of a workload, and the steps of all of them are timed in turns.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from microvllm import InferenceEngine

from . import record
from .engine import SHAPES
from .engines import Model, our_engine
from .steady_decode import HostClock, SteadyDecode, tokens_needed
from .tune import Launch, grid, in_a_word
from .workloads import Workload, named

STEPS = 32
"""Of each launch in a turn, from the same contexts on."""
TURNS = 3
AS_IT_IS = "as it is"
THE_LIBRARYS = "the library's"


@dataclass(frozen=True)
class Place:
    """Where kernels get a launch: the function of kernels/`module`.py that chooses it, when it is given these sizes.

    sizes: by the name of an argument, the values that are meant; any others are left alone
    """

    module: str
    chooser: str
    sizes: Mapping[str, tuple[int, ...]]

    @contextmanager
    def choosing(self, change: Launch | None) -> Iterator[None]:
        """What is chosen, changed by `change`; None leaves the call to a library, where the chooser may say so."""
        module = importlib.import_module(f"microvllm.kernels.{self.module}")
        kept = getattr(module, self.chooser)
        signature = inspect.signature(kept)

        def choose(*args: Any, **kwargs: Any) -> Launch | None:
            launch, given = kept(*args, **kwargs), signature.bind(*args, **kwargs).arguments
            if any(given[name] not in sizes for name, sizes in self.sizes.items()):
                return launch
            return None if change is None else {**(launch or {}), **change}

        setattr(module, self.chooser, choose)
        try:
            yield
        finally:
            setattr(module, self.chooser, kept)


def step_seconds(
    engine: InferenceEngine, workload: Workload, vocab_size: int, place: Place, launches: Mapping[str, Launch | None]
) -> dict[str, list[float]]:
    """The seconds of every step with each launch, by its name; those of a launch that fails are left out, in words on
    standard error.
    """
    clock, taken = HostClock(engine), {name: [] for name in launches}
    for turn in range(TURNS):
        for name in list(taken)[:: 1 if turn % 2 == 0 else -1]:
            try:
                with place.choosing(launches[name]):
                    engine.runner.recapture(workload.requests)
            except Exception as error:  # of Triton's many, for a candidate that does not compile or fit
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                del taken[name]
                continue
            decode = SteadyDecode(engine, clock, workload, vocab_size, STEPS)
            taken[name] += [sum(parts.values()) for parts in decode.run(STEPS)]
            decode.close()
    return taken


def rows(taken: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """The fastest first."""
    before = median(taken[AS_IT_IS])
    turns = {name: [median(steps[i : i + STEPS]) for i in range(0, len(steps), STEPS)] for name, steps in taken.items()}
    return [
        {
            "launch": name,
            "ms a step": median(taken[name]) * 1e3,
            "turns": f"{min(turns[name]) * 1e3:.3f}–{max(turns[name]) * 1e3:.3f}",
            f"× {AS_IT_IS}": f"{median(taken[name]) / before:.4f}",
        }
        for name in sorted(taken, key=lambda name: median(taken[name]))
    ]


def assignments(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{"A": (1, 2)} of ["A=1,2"]; ValueError for a word of another form."""
    found = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            found[name] = tuple(int(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"{word!r} is not NAME=1 or NAME=1,2") from None
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].rstrip(":"))
    parser.add_argument("case", help="a workload of bench/workloads.py, such as 35")
    parser.add_argument("chooser", help="the function in kernels/ that chooses the launch: linear._few_rows_launch")
    parser.add_argument("values", nargs="*", metavar="NAME=1,2", help="what to try; every combination is a launch")
    parser.add_argument("--of", nargs="+", default=[], metavar="NAME=1,2", help="only where the chooser is given these")
    parser.add_argument("--library", action="store_true", help="try no launch too, where the chooser may return None")
    parser.add_argument("--model", default=str(SHAPES / "qwen2-7b"), help="a folder; its weights are random numbers")
    options = parser.parse_args(arguments)
    try:
        (options.workload,) = named([options.case])
        tried, sizes = assignments(options.values), assignments(options.of)
        module, _, chooser = options.chooser.partition(".")
        function = getattr(importlib.import_module(f"microvllm.kernels.{module}"), chooser)
        if unknown := sizes.keys() - inspect.signature(function).parameters.keys():
            raise ValueError(f"{options.chooser} is not given {min(unknown)!r}")
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(str(error))
    if not (tried or options.library):
        parser.error("there is nothing to try: give NAME=1,2 or --library")
    options.place = Place(module, chooser, sizes)
    options.launches = {AS_IT_IS: {}} | ({THE_LIBRARYS: None} if options.library else {})
    options.launches |= {in_a_word(launch): launch for launch in (grid(**tried) if tried else ())}
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.tune_step times CUDA graphs, and PyTorch sees no GPU")
    workload = options.workload
    length = workload.prompt[1] + tokens_needed(workload, STEPS)
    model, config = Model.open(options.model, "dummy", "auto", length)
    engine = our_engine(model, max_batch_size=workload.requests)
    taken = step_seconds(engine, workload, config.vocab_size, options.place, options.launches)
    found = rows(taken)
    print(record.table(found))
    name = f"tune-step-{model.name}-{workload.name}-{options.place.module}"
    print(record.save(name, found, of=dict(options.place.sizes)))


if __name__ == "__main__":
    main()
