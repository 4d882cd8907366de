"""Is a kernel right? Its error against a float64 truth is judged by the rounding of the operator's own reference.

The rule is flash-attention's (Dao-AILab/flash-attention, tests/test_flash_attn.py): a kernel may err twice as much as
plain PyTorch in the same dtype. Here it holds for the largest error and for the root mean square, tensor by tensor.
"""

from __future__ import annotations

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .op import Case, Implementation, Op
from .origin import device_name
from .poison import PoisonedAllocations, bounds_kept, copy_amid_poison, is_poison, moved_to, poison
from .report import (
    CHANGED,
    NAN,
    NOT_DETERMINISTIC,
    OUT_OF_BOUNDS,
    RAISED,
    STALE,
    UNWRITTEN,
    WRONG_DTYPE,
    WRONG_SHAPE,
    WRONG_VALUES,
    Problem,
    Report,
    Result,
    dtype_name,
    in_a_line,
)


def check(
    op: Op,
    kernel: str | Callable,
    cases: Iterable[Case] | None = None,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Report:
    """Judges `kernel`: the name of an implementation of `op`, or any callable that takes what its reference takes.

    cases:   default op.cases, on a GPU op.large_cases too
    dtypes:  default op.dtypes, on a CPU without bfloat16, which Triton's interpreter multiplies wrongly
    device:  default the GPU if there is one
    seed:    of the random inputs

    The truth is the reference on the inputs widened to float64, the yardstick the reference on the inputs as they are.
    Each output, and each argument that the operator mutates, has the reference's shape and dtype, is finite where the
    truth is, and errs at most twice as much as the yardstick, or by one rounding of its dtype where that is more; in
    float32 by 6 eps · max|truth| on top, for there the order of a sum is all that errs. Integers equal the truth's or
    the yardstick's, element by element.

    Every call gets fresh copies of the inputs with their strides, and poison between and around the elements. A case is
    called twice with equal inputs, which must give equal bits whatever is in the memory that the kernel allocates, and
    once with others at the addresses of the first, which must not give the first's results. The reference runs after
    the kernel, and what it gave is overwritten before the next case. `prepare` is applied to the argument `weight`.

    ValueError for a name that `op` does not have, for an implementation that cannot run on `device`, and for a case
    that cannot be checked, such as one beyond the memory.
    """
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device or default)
    implementation = op.choose(kernel) if isinstance(kernel, str) else Implementation(kernel)
    if (reason := implementation.cannot_run(device)) is not None:
        raise ValueError(f"{op.name}: implementation {kernel!r} cannot run on {device}: {reason}")
    if cases is None:
        cases = op.cases + (op.large_cases if device.type == "cuda" else ())
    if dtypes is None:
        dtypes = [dtype for dtype in op.dtypes if device.type == "cuda" or dtype != torch.bfloat16]
    pairs = [(case, dtype, f"[{case!r}], dtypes=[{dtype}]") for case in cases for dtype in dtypes]

    name = kernel if isinstance(kernel, str) else getattr(kernel, "__name__", "")
    name = name if name.isidentifier() else "kernel"  # neither is <lambda>
    call = f"{_place(op)}.check({repr(kernel) if isinstance(kernel, str) else name}"
    elsewhere = "" if device.type == default.type else f", device='{device}'"
    results: list[Result] = []
    for case, dtype, arguments in pairs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # where Triton launches
            result = _check_case(op, implementation, case, dtype, device, seed)
        results.append(replace(result, reproduce=f"{call}, {arguments}{elsewhere}, seed={seed})"))
        if RAISED in result.verdict and not _works(device):
            break  # an illegal access ends all use of the GPU by this process
    made_on = device_name(device)
    where = made_on if device.type == "cuda" else device
    return Report(f"{op.name}, {name}, on {where}", tuple(results), made_on)


def _check_case(
    op: Op, implementation: Implementation, case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> Result:
    with _named(op, case, dtype):
        inputs = _inputs(op, case, dtype, device, seed)
    if implementation.refuses is not None and (words := implementation.refuses(**inputs)) is not None:
        return Result(case, dtype, refused=words)
    problems: list[Problem] = []
    # All calls come before the reference's: what it gives is nowhere in memory while the kernel runs.
    try:
        memory = _copies(inputs)
        got = _call(op, implementation, inputs, memory, problems)
        kept = {name: x.clone() for name, x in got.items()}
        again = _call(op, implementation, inputs, _copies(inputs, repeated=True), problems, repeated=True)
        again = {name: x.clone() for name, x in again.items()}
        with _named(op, case, dtype):
            others = _inputs(op, case, dtype, device, seed + 1)
        places = {x.untyped_storage().data_ptr() for x in memory.values()}
        of_third: list[Problem] = []
        other = _call(op, implementation, others, _into(memory, others), of_third)
    except _Raised as error:
        return Result(case, dtype, problems=(Problem(RAISED, str(error)),))
    own = [name for name, x in got.items() if x.untyped_storage().data_ptr() not in places]
    overwritten = [name for name in own if not equal_bits(got[name], kept[name]).all()]
    del memory, got
    with _named(op, case, dtype):
        expected, of_other = Expected(op, inputs), Expected(op, others)
    judgements = expected.judge(kept, again)
    if not problems and not any(judgement.problems for judgement in judgements):
        judged = of_other.judge(other)
        if any(j.problems for j in judged) and not any(j.problems for j in expected.judge(other)):
            problems.append(Problem(STALE, "a call with other inputs gave the results of the call before it"))
        else:
            judgements += judged
        problems += of_third
        problems += [Problem(STALE, f"{name} of a call was overwritten by the next") for name in overwritten]
    expected.forget()
    of_other.forget()
    worst = max(judgements, key=lambda judgement: judgement.ratio, default=_Judgement(0.0, 0.0))
    problems = [problem for judgement in judgements for problem in judgement.problems] + problems
    return Result(case, dtype, worst.error, worst.allowed, tuple(dict.fromkeys(problems)))


@contextmanager
def _named(op: Op, case: Case, dtype: torch.dtype) -> Iterator[None]:
    """Names the case whose inputs or truth PyTorch cannot make: they lack memory, or their sizes have over 64 bits."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        words = f"{op.name} cannot be checked with {case} in {dtype_name(dtype)}: {in_a_line(error)}"
        raise ValueError(words) from error


def _inputs(op: Op, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    return op.inputs(**case.sizes, dtype=dtype, device=device, generator=generator)


def _apply(op: Op, function: Callable, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a call returns and what it mutates, by name. Arguments go by position, as the model passes them."""
    arguments = inspect.signature(op.reference).bind(**inputs)
    returned = function(*arguments.args, **arguments.kwargs)
    several = isinstance(returned, (tuple, list))
    outputs = {f"output {i}": x for i, x in enumerate(returned)} if several else {"output": returned}
    outputs |= {name: inputs[name] for name in op.mutates}
    return {name: x for name, x in outputs.items() if isinstance(x, torch.Tensor)}


class _Raised(Exception):
    """What a kernel raised, and where."""


def _copies(inputs: dict[str, Any], repeated: bool = False) -> dict[str, torch.Tensor]:
    """Of the tensors among the inputs, amid poison."""
    return {name: copy_amid_poison(x, repeated) for name, x in inputs.items() if isinstance(x, torch.Tensor)}


def _into(memory: dict[str, torch.Tensor], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the tensors among other inputs where those of a call before lay, if they are as large: a kernel that
    knows its inputs by their address takes them for the same.
    """
    return {name: moved_to(memory.get(name), x) for name, x in _copies(inputs).items()}


def _call(
    op: Op,
    implementation: Implementation,
    inputs: dict[str, Any],
    copies: dict[str, torch.Tensor],
    problems: list[Problem],
    repeated: bool = False,
) -> dict[str, torch.Tensor]:
    """What a kernel gives for copies of the inputs; what it did to other memory is added to the problems."""
    tensors = {name: inputs[name] for name in copies}
    arguments = inputs | copies
    allocations = PoisonedAllocations(repeated)
    try:
        if implementation.prepare is not None:
            arguments["weight"] = implementation.prepare(arguments["weight"])
        with allocations:
            outputs = _apply(op, implementation.function, arguments)
        if any(x.is_cuda for x in copies.values()):
            torch.cuda.synchronize()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise _Raised(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})") from error
    for name, copy in copies.items():
        if name not in op.mutates and not (same := equal_bits(copy, tensors[name])).all():
            problems.append(Problem(CHANGED, _places(name, ~same)))
        if not bounds_kept(copy, repeated):
            problems.append(Problem(OUT_OF_BOUNDS, f"between or around the elements of {name}"))
    for x in allocations.allocated:
        if not bounds_kept(x, repeated):
            problems.append(Problem(OUT_OF_BOUNDS, f"around the {list(x.shape)} that the kernel allocated"))
    return outputs


class Expected:
    """What a call must give. It is computed when the kernel has run; `check`, and it alone, has it forgotten before
    the next kernel runs.
    """

    def __init__(self, op: Op, inputs: dict[str, Any]):
        self.truth = _apply(op, op.reference, {name: _copy(x, torch.float64) for name, x in inputs.items()})
        self.yardstick = _apply(op, op.reference, {name: _copy(x) for name, x in inputs.items()})

    def judge(self, got: dict[str, torch.Tensor], again: dict[str, torch.Tensor] | None = None) -> list[_Judgement]:
        """Tensor by tensor; `again` is what a second call with equal inputs gave."""
        if got.keys() != self.yardstick.keys() or (again is not None and again.keys() != got.keys()):
            where = f"returned {', '.join(got) or 'nothing'}, and the reference {', '.join(self.yardstick)}"
            return [_failure(WRONG_SHAPE, where)]
        return [
            _judge(name, x, None if again is None else again[name], self.truth[name], self.yardstick[name])
            for name, x in got.items()
        ]

    def forget(self) -> None:
        """Overwrites what must be given, which freed memory would still hold."""
        for x in (*self.truth.values(), *self.yardstick.values()):
            if x.numel():
                x.fill_(poison(x.dtype, repeated=False))


def _copy(x: Any, floating: torch.dtype | None = None) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(floating if x.is_floating_point() else x.dtype, copy=True)


@dataclass(frozen=True)
class _Judgement:
    """The largest error of a tensor, its bound, and how far its error is, as a share of the bound, or infinity."""

    error: float
    allowed: float
    ratio: float = 0.0
    problems: tuple[Problem, ...] = ()


def _failure(problem: str, where: str) -> _Judgement:
    return _Judgement(math.nan, math.nan, math.inf, (Problem(problem, where),))


def _judge(
    name: str, got: torch.Tensor, again: torch.Tensor | None, truth: torch.Tensor, yardstick: torch.Tensor
) -> _Judgement:
    for x in (got,) if again is None else (got, again):
        if x.shape != yardstick.shape:
            return _failure(WRONG_SHAPE, f"{name} is {list(x.shape)}, and the reference's {list(yardstick.shape)}")
        if x.dtype != yardstick.dtype:
            return _failure(
                WRONG_DTYPE, f"{name} is {dtype_name(x.dtype)}, and the reference's {dtype_name(yardstick.dtype)}"
            )
    if again is not None:
        unwritten = is_poison(got, repeated=False) & is_poison(again, repeated=True)
        if unwritten.any():
            return _failure(UNWRITTEN, _places(name, unwritten))
    judgement = (_judge_floats if got.is_floating_point() else _judge_integers)(name, got, truth, yardstick)
    if again is None or (other := ~equal_bits(got, again)).sum() == 0:
        return judgement
    i = _first(other)
    where = f"{_places(name, other)}: {got[i].item()}, and {again[i].item()} when called again"
    return replace(judgement, problems=(*judgement.problems, Problem(NOT_DETERMINISTIC, where)))


def _judge_integers(name: str, got: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor) -> _Judgement:
    wrong = (got != truth) & (got != yardstick)
    if not wrong.any():
        return _Judgement(0.0, 0.0)
    i = _first(wrong)
    where = f"{_places(name, wrong)}: expected {truth[i].item()}, got {got[i].item()}"
    return _Judgement(float(wrong.sum()), 0.0, math.inf, (Problem(WRONG_VALUES, where),))


def _judge_floats(name: str, got: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor) -> _Judgement:
    dtype = got.dtype
    rounded = truth.to(dtype).double()  # infinite where the truth is beyond the dtype
    got, yardstick = got.double(), yardstick.double()
    finite = rounded.isfinite()
    for problem, wrong in (
        (NAN, finite & ~got.isfinite()),
        (WRONG_VALUES, ~finite & (got != rounded) & ~(got.isnan() & rounded.isnan())),
    ):
        if wrong.any():
            i = _first(wrong)
            return _failure(problem, f"{_places(name, wrong)}: expected {truth[i]:.6g}, got {got[i]:.6g}")
    if got.numel() == 0:
        return _Judgement(0.0, 0.0)

    error = torch.where(finite, got - truth, 0).abs()
    of_yardstick = torch.where(finite & yardstick.isfinite(), yardstick - truth, 0).abs()
    size = torch.where(finite, truth, 0).abs()
    largest, rms = _largest(error), _rms(error)
    allowed = _allowed(_largest(of_yardstick), _largest(size), dtype)
    allowed_rms = _allowed(_rms(of_yardstick), _rms(size), dtype)
    ratio = max(_share(largest, allowed), _share(rms, allowed_rms))
    if ratio <= 1:
        return _Judgement(largest, allowed, ratio)
    i = _index(int(error.argmax()), error.shape)
    where = f"{name}[{_text(i)}]: expected {truth[i]:.6g}, got {got[i]:.6g}, error {largest:.2e}, allowed {allowed:.2e}"
    where += f"; {int((error > allowed).sum())} of {error.numel()} elements err more"
    where += f"; rms error {rms:.2e}, allowed {allowed_rms:.2e}"
    return _Judgement(largest, allowed, ratio, (Problem(WRONG_VALUES, where),))


def _largest(x: torch.Tensor) -> float:
    return float(x.max())


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _share(error: float, allowed: float) -> float:
    if allowed == 0:  # in float64 the rounding of 0 underflows
        return math.inf if error else 0.0
    return error / allowed


def _allowed(reference_error: float, size: float, dtype: torch.dtype) -> float:
    """The bound of an error, largest or rms, from the yardstick's and the truth's size, in the same norm."""
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * max(size, info.smallest_normal)
    # The yardstick's order of summing may be a lucky one. Beside MKL on an Intel CPU, oneDNN's products of 264 to 1000
    # terms need 3.2 of these 6, and 5.4 where both keep to AVX2: `OMP_NUM_THREADS=1 MKL_CBWR=AVX2
    # ONEDNN_MAX_CPU_ISA=AVX2 micro-vllm kernels check onednn --op linear` shows how near they come.
    return max(2 * reference_error, rounding) + (6 * info.eps * size if info.bits >= 32 else 0)


def equal_bits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Element by element, so that NaN equals itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(bits) == y.view(bits)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return _index(int(mask.to(torch.uint8).argmax()), mask.shape)


def _text(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))


def _places(name: str, mask: torch.Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} elements of {name}, the first at [{_text(_first(mask))}]"


def _place(op: Op) -> str:
    """Where an operator stands: rms_norm.ADD_OP"""
    module = getattr(op.reference, "__module__", None) or ""
    name = next((name for name, value in vars(sys.modules.get(module, op)).items() if value is op), "OP")
    return f"{module.rpartition('.')[2]}.{name}"


def _works(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True
