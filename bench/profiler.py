"""An engine of ours whose decode steps are timed part by part.

Steps run with and without the profiler in turns, blocks of them on a GPU and each by itself on a CPU: what the profiler
saw adds up to the step that it saw, and that step has to be the one without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from microvllm.kernels.kernel_set import KernelSet
from microvllm.kernels.op import Cost
from microvllm.kernels.roof import Roof

from .device_trace import OUTSIDE, Attribution, Marks, labelled, sections, step_parts, trace
from .engines import Model, our_engine
from .operator_calls import CallCosts, Observer, WatchedKernels
from .profile import Parts, Profile, lines, middle_half
from .steady_decode import LAUNCH, HostClock, SteadyDecode, tokens_needed
from .workloads import Workload


@dataclass(frozen=True)
class Blocks:
    """rounds: each of `steps` with the profiler and as many without"""

    steps: int = 32
    rounds: int = 3

    @property
    def all_steps(self) -> int:
        return self.rounds * (2 * self.steps + 1)

    def longest_text(self, workload: Workload) -> int:
        return workload.prompt[1] + tokens_needed(workload, self.all_steps)


class _OperatorClock:
    """Observes the seconds of each operator, on a device that computes before a call returns."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def begins(self, op: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._start = time.perf_counter()

    def ends(self, op: str) -> None:
        self.seconds[op] = self.seconds.get(op, 0.0) + time.perf_counter() - self._start


class Profiler:
    """An engine of ours, watched.

    roof:     what its GPU does at best; None on a CPU
    kernels:  what computes each operator; None takes the preferred kernels of the device
    options:  fields of EngineConfig
    """

    def __init__(self, model: Model, roof: Roof | None = None, *, kernels: KernelSet | None = None, **options: Any):
        self._watched = WatchedKernels(kernels or KernelSet.default())
        self.engine, self.roof = our_engine(model, kernels=self._watched.kernels, **options), roof
        self._clock = HostClock(self.engine)
        self._attribution: Attribution | None = None

    def profile(self, workload: Workload, vocab_size: int, blocks: Blocks) -> Profile:
        """RuntimeError where there is no steady decode, see SteadyDecode, or where the GPU gives no trace."""
        decode = SteadyDecode(self.engine, self._clock, workload, vocab_size, blocks.all_steps)
        if self.engine.device.type == "cuda":
            self._attribution = self._learn(decode)
            # To start the profiler of a GPU takes longer than a block.
            profiled_steps, turns, steps = self._device_steps, 1, blocks.steps
        else:
            profiled_steps, turns, steps = self._cpu_steps, blocks.steps, 1
        costs, plain, profiled = [], [], []
        for i in range(blocks.rounds):
            costs.append(self._costs(decode))  # contexts grow from round to round
            for turn in range(turns):
                for with_profiler in (False, True) if (i + turn) % 2 == 0 else (True, False):
                    if with_profiler:
                        profiled += profiled_steps(decode, steps)
                    else:
                        plain += decode.run(steps)
        decode.close()
        return Profile(workload, lines(middle_half(profiled), costs, self.roof), middle_half(plain))

    def _learn(self, decode: SteadyDecode) -> Attribution:
        """The operators' kernels, from an eager step."""
        decode.decode_eagerly()  # compiles what a graph may have had compiled for other sizes
        marks = Marks(self.engine.device)

        def run() -> None:
            marks.put(OUTSIDE)
            self._observed(marks, decode.decode_eagerly)

        return Attribution(labelled(trace(run), marks.labels))

    def _costs(self, decode: SteadyDecode) -> dict[str, list[Cost | None]]:
        costs = CallCosts()
        self._observed(costs, decode.decode_eagerly)
        return costs.of

    def _device_steps(self, decode: SteadyDecode, steps: int) -> list[Parts]:
        """Of a GPU: between the marks that go before each launch."""
        marks = Marks(self.engine.device)
        self._clock.before_launch = partial(marks.put, "step")
        events = trace(partial(decode.run, steps + 1))  # the last has no mark behind it
        self._clock.before_launch = lambda: None
        return [step_parts(section, self._attribution) for section in sections(events, steps + 1)[:-1]]

    def _cpu_steps(self, decode: SteadyDecode, steps: int) -> list[Parts]:
        """Of a CPU: the operators are part of the launch, and it is over when they are."""
        taken = []
        for _ in range(steps):
            clock = _OperatorClock()
            (host,) = self._observed(clock, partial(decode.run, 1))
            outside = host.pop(LAUNCH) - sum(clock.seconds.values())
            taken.append({(name, ""): t for name, t in (clock.seconds | {OUTSIDE: outside} | host).items()})
        return taken

    def _observed(self, observer: Observer, run: Callable[[], Any]) -> Any:
        self._watched.observer = observer
        try:
            return run()
        finally:
            self._watched.observer = None
