"""Is a kernel fast? Its time inside a CUDA graph, beside what this GPU can do at best and beside other kernels.

A graph holds one call on each of many argument sets, one behind the other. Each set has memory of its own, each call
keeps what it returned, and together they are several times larger than the L2, so no call finds warm what a model would
read from memory. Kernels that are compared take turns in one run, because a GPU's clock drifts.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .check import Expected, check, equal_bits
from .measurement import Measurement, Row
from .op import Case, Cost, Implementation, Op
from .origin import device_name
from .poison import once, poison
from .report import dtype_name, in_a_line
from .roof import Roof, measure_roof
from .timing import CapturedCalls, Clock, Timing, gpu, take_turns

TURNOVER = 5
"""The argument sets hold this many times the L2. Read in a cycle n times its size, a cache that evicts at random still
serves a share h = exp(−n·(1 − h)): 6 % at n = 3, 0.7 % at n = 5."""
LONG_ENOUGH = 1e-3
"""Seconds that a replay is to last at the roof's speed, so that the gap between replays is lost in it."""
MOST_SETS = 256
TOO_FAST = 0.97
"""A time below this share of the roof's is a fault of the measurement: the roof itself is known no better."""
PEER_ERROR = 0.02
"""Closer to the reference than this, a kernel from elsewhere computes the same function: root mean square of the
difference over that of the reference. Rounding to bfloat16 is 0.002. How exact a kernel is, `check` says."""


class MeasurementError(RuntimeError):
    """A time that is none: of a kernel that is wrong, or one that is faster than the GPU."""


def _takes_all(**inputs: Any) -> str | None:
    return None


def _is_there() -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """A kernel from elsewhere to time beside ours. Of peers with one name the fastest is shown, case by case.

    bind:         given the reference's arguments by name, prepares what need not be in the graph and returns a callable
                  without arguments that launches the kernel and returns what the reference returns
    unavailable:  says in words why the kernel is not there, or None where it is
    refuses:      given the arguments, says in words why the kernel does not take them, or None where it does
    in_place:     it computes into copies that `bind` made, so that a second launch computes something else
    """

    name: str
    bind: Callable[..., Callable[[], Any]]
    unavailable: Callable[[], str | None] = _is_there
    refuses: Callable[..., str | None] = _takes_all
    in_place: bool = False


def measure(
    op: Op,
    kernel: str | Callable,
    cases: Iterable[Case] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    peers: Iterable[str | Peer] = (),
    seed: int = 0,
) -> Measurement:
    """Times `kernel`: the name of an implementation of `op`, or any callable that takes what its reference takes.

    cases:   default op.large_cases
    dtype:   default bfloat16, or where the operator does not compute in it, the first it does
    peers:   what to time beside it in the same run: names of other implementations of `op`, and kernels from elsewhere
    seed:    of the random inputs

    Each case is checked before it is timed, and what the timed graph computes is checked after it.

    ValueError without a GPU, and for names and dtypes that `op` does not have. MeasurementError for a kernel that is
    wrong and for a time that cannot be.
    """
    options = {"dtype": dtype, "device": gpu(device), "peers": tuple(peers), "seed": seed}
    rows = [measure_case(op, kernel, case, **options) for case in (op.large_cases if cases is None else cases)]
    return Measurement(op.name, kernel_name(kernel), tuple(rows), device_name(options["device"]))


def measure_case(
    op: Op,
    kernel: str | Callable,
    case: Case,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    peers: Sequence[str | Peer] = (),
    seed: int = 0,
) -> Row:
    """One row of `measure`."""
    device = gpu(device)
    dtype = dtype or default_dtype(op)
    if dtype not in op.dtypes:
        raise ValueError(f"{op.name} computes in {', '.join(map(dtype_name, op.dtypes))}, not in {dtype_name(dtype)}")
    implementation = op.choose(kernel) if isinstance(kernel, str) else Implementation(kernel)
    with torch.cuda.device(device):
        cost = op.cost(**case.sizes, itemsize=dtype.itemsize)
        roof = measure_roof(device)
        report = check(op, kernel, [case], dtypes=[dtype], device=device, seed=seed)
        if report.results[0].refused is not None:
            return Row(case, dtype, cost, roof, f"refused: {report.results[0].refused}")
        if not report.ok:
            raise MeasurementError(f"wrong, so it was not timed\n{report}")
        inputs, *others = (
            _without_poison(op.inputs(**case.sizes, dtype=dtype, device=device, generator=generator))
            for generator in (torch.Generator(device).manual_seed(seed + i) for i in range(3))
        )
        entrants = [_own(op, peer, device) for peer in peers]
        count = count_sets(inputs, cost, roof, device)
        clock = Clock(device)
        times = _race(op, implementation, entrants, inputs, others, cost, roof, count, clock)
        (checked,) = report.results
        return Row(case, dtype, cost, roof, *times, clock.range, checked.error, checked.allowed)


def _race(
    op: Op,
    implementation: Implementation,
    peers: Sequence[Peer],
    inputs: dict[str, Any],
    others: Sequence[dict[str, Any]],
    cost: Cost,
    roof: Roof,
    count: int,
    clock: Clock,
) -> tuple[Timing, dict[str, Timing | str]]:
    """The time of the implementation, and of each peer or why it has none, over `count` argument sets.

    others: two more inputs of the case, which the graph is judged with when all is timed
    """
    sets = _ArgumentSets(op, inputs, count)
    prepared = [_prepared(implementation, arguments) for arguments in sets.sets]
    mine = CapturedCalls([partial(implementation.function, *_arguments(op, arguments)) for arguments in prepared])
    words: dict[str, list[str]] = {peer.name: [] for peer in peers}
    admitted: list[tuple[Peer, CapturedCalls]] = []
    for peer in peers:
        graph = _admit(peer, sets)
        if isinstance(graph, str):
            words[peer.name].append(graph)
        else:
            admitted.append((peer, graph))

    ours, *theirs = take_turns([mine, *(graph for _, graph in admitted)], after_round=clock.read)
    if fault := _too_fast(ours, cost, roof) or _judge(sets, mine):
        raise MeasurementError(fault)
    timings: dict[str, list[Timing]] = {}
    for (peer, graph), timing in zip(admitted, theirs, strict=True):
        fault = _too_fast(timing, cost, roof)
        if fault is None and not peer.in_place:
            sets.replay_on_poison(graph)
            fault = sets.other_function(sets.results(graph.outputs[-1], -1))
        if fault is None:
            timings.setdefault(peer.name, []).append(timing)
        else:
            words[peer.name].append(fault)
    if fault := _judge_renewed(sets, mine, implementation, prepared, others):
        raise MeasurementError(fault)
    return ours, {
        name: min(timings[name], key=lambda timing: timing.median)
        if name in timings
        else "; ".join(dict.fromkeys(reasons))
        for name, reasons in words.items()
    }


def _admit(peer: Peer, sets: _ArgumentSets) -> CapturedCalls | str:
    """A peer's graph, or why it does not take part."""
    try:
        if reason := peer.unavailable() or peer.refuses(**sets.inputs):
            return reason
        calls = [peer.bind(**arguments) for arguments in sets.sets]
        sets.restore()
        return sets.other_function(sets.results(calls[-1](), -1)) or CapturedCalls(calls)
    except Exception as error:  # code from elsewhere may fail in any way, and ours is timed all the same
        return f"failed: {in_a_line(error)}"


def _judge(sets: _ArgumentSets, graph: CapturedCalls) -> str | None:
    """What is wrong with the results of the graph's calls, in words."""
    if shared := sets.shared(graph):
        return shared
    sets.replay_on_poison(graph)
    got = [sets.results(returned, i) for i, returned in enumerate(graph.outputs)]
    for judgement in Expected(sets.op, sets.inputs).judge(got[0]):
        for problem in judgement.problems:
            return f"what was timed is wrong: {problem.name}: {problem.where}"
    for i, other in enumerate(got):
        for name, x in other.items():
            if not equal_bits(x, got[0][name]).all():
                return f"call {i} of the timed graph gave another {name} than call 0 for equal inputs"
    return None


def _judge_renewed(
    sets: _ArgumentSets,
    graph: CapturedCalls,
    implementation: Implementation,
    prepared: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
) -> str | None:
    """What is wrong with the results once every call's arguments hold other numbers, in words.

    Which of the two each call gets is drawn, so that none can do with the result of another or of an earlier one. The
    integers stay: a launch may depend on them.
    """
    which = [random.randrange(2) for _ in prepared]
    which[:2] = [0, 1][: len(which)]
    renewed = [sets.renew(i, others[k]) for i, k in enumerate(which)]
    if implementation.prepare is not None:
        for arguments, inputs in zip(prepared, renewed, strict=True):
            arguments["weight"].copy_(implementation.prepare(inputs["weight"]))
    sets.replay_on_poison(graph)
    got = [sets.results(returned, i) for i, returned in enumerate(graph.outputs)]
    for first in sorted(set(which)):
        for judgement in Expected(sets.op, renewed[first]).judge(got[first]):
            for problem in judgement.problems:
                return f"what was timed is wrong for other inputs: {problem.name}: {problem.where}"
    for i, k in enumerate(which):
        for name, x in got[i].items():
            if not equal_bits(x, got[k][name]).all():
                return f"call {i} of the timed graph gave another {name} than call {k} for equal inputs"
    return None


class _ArgumentSets:
    """Copies of the inputs of one case, each for one call of a graph.

    inputs:    the inputs, which no call gets
    expected:  what the reference makes of them
    first:     what each set held at first, or since it was renewed
    """

    def __init__(self, op: Op, inputs: dict[str, Any], count: int):
        self.op = op
        self.inputs = inputs
        # A deep copy keeps strides, offsets and what shares memory: q, k and v of one product stay parts of one tensor.
        self.sets = [copy.deepcopy(inputs) for _ in range(count)]
        self.first = [inputs] * count
        self.expected = self.results(op.reference(*_arguments(op, self.sets[-1])), -1)
        self.expected = {name: x.clone() for name, x in self.expected.items()}
        self.restore()

    def results(self, returned: Any, i: int) -> dict[str, torch.Tensor]:
        """What a call on set i gave: the tensors it returned and the arguments it mutates, named as in `check`."""
        several = isinstance(returned, (tuple, list))
        named = {f"output {j}": x for j, x in enumerate(returned)} if several else {"output": returned}
        named |= {name: self.sets[i][name] for name in self.op.mutates}
        return {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}

    def renew(self, i: int, others: dict[str, Any]) -> dict[str, Any]:
        """Writes the floating-point numbers of other inputs into set i, in place, where they are as many → its inputs
        from now on.
        """
        fits = {
            name: x
            for name, x in others.items()
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape == self.inputs[name].shape
        }
        for name, x in fits.items():
            once(self.sets[i][name]).copy_(once(x))
        self.first[i] = self.inputs | fits
        return self.first[i]

    def restore(self) -> None:
        """Gives the arguments that calls mutate their first values."""
        for arguments, first in zip(self.sets, self.first, strict=True):
            for name in self.op.mutates:
                arguments[name].copy_(first[name])

    def shared(self, graph: CapturedCalls) -> str | None:
        """Which calls returned one piece of memory, in words; a call may return an argument of its own."""
        owner: dict[int, int] = {}
        for i, returned in enumerate(graph.outputs):
            mine = {_storage(x) for x in _tensors(self.sets[i].values())}
            for x in _tensors([returned]):
                if x.numel() and _storage(x) not in mine and owner.setdefault(_storage(x), i) != i:
                    return (
                        f"call {i} of the timed graph returned what call {owner[_storage(x)]} did, and computed nothing"
                    )
        return None

    def replay_on_poison(self, graph: CapturedCalls) -> None:
        """Replays a graph as if for the first time: mutated arguments restored, what it returned overwritten."""
        arguments = {_storage(x) for arguments in self.sets for x in _tensors(arguments.values())}
        for x in _tensors(graph.outputs):
            if _storage(x) not in arguments:
                x.fill_(poison(x.dtype, repeated=False))
        self.restore()
        graph.replay(0)

    def other_function(self, got: dict[str, torch.Tensor]) -> str | None:
        """In words, how a peer's results differ from the reference's, None where it computes the same function.

        Of integers only the shapes are compared: a peer draws other tokens.
        """
        for name, truth in self.expected.items():
            if name not in got or got[name].shape != truth.shape:
                shape = list(got[name].shape) if name in got else "missing"
                return f"wrong: {name} is {shape}, and the reference's {list(truth.shape)}"
            if truth.is_floating_point():
                x, y = got[name].float(), truth.float()
                error = torch.where(x.isnan() & y.isnan(), 0, x - y).norm() / y.nan_to_num(0).norm()
                if not error <= PEER_ERROR:
                    return f"wrong: {name} is {float(error):.2g} of its root mean square from the reference's"
        return None


def count_sets(inputs: dict[str, Any], cost: Cost, roof: Roof, device: torch.device) -> int:
    """How many argument sets outlast the L2 and make a replay long enough, and fit a quarter of the memory."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    enough = max(TURNOVER * l2 / max(1, cost.read + cost.written), LONG_ENOUGH / max(roof.time(cost), roof.launch))
    sizes = {_storage(x): x.untyped_storage().nbytes() for x in _tensors(inputs.values())}
    return max(1, min(MOST_SETS, math.ceil(enough), free // 4 // max(1, sum(sizes.values()))))


def _own(op: Op, peer: str | Peer, device: torch.device) -> Peer:
    """An implementation of `op` as a peer; others as they are."""
    if isinstance(peer, Peer):
        return peer
    implementation = op.choose(peer)
    return Peer(
        peer,
        lambda **inputs: partial(implementation.function, *_arguments(op, _prepared(implementation, inputs))),
        lambda: implementation.unavailable(device),
        implementation.refuses or _takes_all,
    )


def _prepared(implementation: Implementation, inputs: dict[str, Any]) -> dict[str, Any]:
    if implementation.prepare is None:
        return inputs
    return inputs | {"weight": implementation.prepare(inputs["weight"])}


def _arguments(op: Op, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs in the order of the reference's parameters, as the model passes them."""
    bound = inspect.signature(op.reference).bind(**inputs)
    bound.apply_defaults()
    return bound.args


def _too_fast(timing: Timing, cost: Cost, roof: Roof) -> str | None:
    floor = roof.time(cost) * 1e6
    if timing.median >= TOO_FAST * floor:
        return None
    return f"impossible: {timing.median:.2f} µs, and this GPU needs {floor:.2f} µs for what the call must do"


def _without_poison(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with 0 for NaN: kernels from elsewhere may multiply by 0 what ours, as `check` saw, do not read."""
    for x in _tensors(inputs.values()):
        if x.dtype.itemsize > 1 and x.is_floating_point():  # those from elsewhere get no float8
            x.masked_fill_(x.isnan(), 0)
    return inputs


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among the values and in the tuples and lists among them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def default_dtype(op: Op) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def kernel_name(kernel: str | Callable) -> str:
    return kernel if isinstance(kernel, str) else getattr(kernel, "__name__", repr(kernel))
