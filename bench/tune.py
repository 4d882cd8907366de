"""The sweep behind a kernel's launch parameters:   python -m bench.tune [operator ...]

Every candidate is timed on every large case, inside a CUDA graph over inputs that outlast the L2, and so is what the
table in kernels/ chooses, which is read off the best. The record has the fastest of each case beside it. `python -m
bench.kernels` checks what the tables choose, and times it beside other kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from statistics import geometric_mean
from types import ModuleType
from typing import Any

import torch
from microvllm.kernels import (
    linear,
    linear_swiglu,
    norm_gate_up_swiglu,
    norm_linear,
    norm_qkv_rotary_store_kv,
    paged_attention,
    prefill_attention,
    rms_norm,
    rotary,
    rotary_store_kv,
    sampling,
    swiglu,
)
from microvllm.kernels.measure import count_sets, default_dtype
from microvllm.kernels.op import Case, Op
from microvllm.kernels.roof import measure_roof
from microvllm.kernels.timing import graph_time

from . import record

Launch = Mapping[str, Any]
Time = tuple[float, Launch | None]
"""µs, or a ratio of them, of a candidate; of what the table chooses with None."""
THE_TABLES = "the table's"
SHOWN = 5
"""Of the candidates of a case, the fastest, on the terminal and in the record."""
COMPILERS = 12
"""Processes that compile: Triton takes seconds for some candidates, and one of its processes uses one core."""


@dataclass(frozen=True)
class Sweep:
    """What is varied: the launch that the module's function `chooser` returns, for the cases that the sweep serves.

    kernel: an implementation's name, or a function
    """

    op: Op
    kernel: str | Callable
    module: ModuleType
    chooser: str
    launches: tuple[Launch, ...]
    serves: Callable[[Case], bool] = lambda case: True

    @property
    def cases(self) -> list[Case]:
        return [case for case in self.op.large_cases if self.serves(case)]

    @contextmanager
    def choosing(self, launch: Launch | None) -> Iterator[Callable]:
        """The kernel, launched so whatever the case; None: as the table has it."""
        kept = getattr(self.module, self.chooser)
        if launch is not None:
            setattr(self.module, self.chooser, lambda *sizes, **limits: dict(launch))
        try:
            yield self.op.choose(self.kernel).function if isinstance(self.kernel, str) else self.kernel
        finally:
            setattr(self.module, self.chooser, kept)


def grid(**values: tuple[int, ...]) -> tuple[Launch, ...]:
    """Every combination."""
    return tuple(dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


def _attention(sizes: range, *cuts: tuple[int, int]) -> Sweep:
    """cuts: chunks of all contexts together, tokens of a chunk at least.  sizes: of the batches they are tried on."""
    names = ("TILE", "STAGES", "WARPS", "maxnreg")
    # 16 tokens a warp at least. With 128 registers four programs of four warps fit a multiprocessor.
    tiles = ((32, 2, 2, None), (32, 3, 2, None), (64, 2, 4, None), (64, 2, 4, 128), (64, 3, 4, None), (64, 4, 4, None))
    tiles += ((128, 2, 4, None), (128, 2, 8, 128))
    launches = [
        dict(zip(names, tile, strict=True), chunks=chunks, MIN_CHUNK=min_chunk)
        for tile, (chunks, min_chunk) in product(tiles, cuts)
        if min_chunk >= tile[0]
    ]

    def serves(case: Case) -> bool:
        qwen2_7b = paged_attention.OP.large_cases[0].sizes
        alike = all(case.sizes.get(key) == qwen2_7b.get(key) for key in ("heads", "head_dim", "block_size", "float8"))
        return alike and case.sizes["batch"] in sizes and case.sizes["context"] <= 32768

    return Sweep(paged_attention.OP, "triton", paged_attention, "_launch", tuple(launches), serves)


def _few_rows() -> tuple[Launch, ...]:
    tiles = ((64, 64, 3, 4), (64, 64, 4, 4), (64, 64, 5, 4), (64, 128, 3, 4), (64, 128, 5, 4))
    tiles += ((128, 64, 3, 8), (128, 64, 4, 8), (128, 128, 3, 8))
    names = ("BLOCK_OUT", "BLOCK_IN", "STAGES", "num_warps")
    return tuple(
        dict(zip(names, tile, strict=True), AHEAD=2 * tile[1], SPLITS=splits)
        for tile in tiles
        for splits in (1, 2, 3, 4, 5, 7)
    )


def _gates_and_ups() -> tuple[Launch, ...]:
    tiles = ((64, 64, 3, 4), (64, 64, 4, 4), (64, 64, 5, 4), (64, 128, 2, 4), (64, 128, 3, 4), (128, 64, 3, 8))
    tiles += ((64, 64, 3, 8), (64, 64, 4, 8), (64, 128, 2, 8))
    names = ("BLOCK_OUT", "BLOCK_IN", "STAGES", "num_warps")
    return tuple(dict(zip(names, tile, strict=True), AHEAD=ahead * tile[1]) for tile in tiles for ahead in (0, 2))


def _one_row() -> tuple[Launch, ...]:
    tiles = grid(BLOCK_OUT=(1, 2, 4), BLOCK_IN=(256, 512), UNROLL=(2, 4, 8), num_warps=(1,))
    tiles += grid(BLOCK_OUT=(1, 2, 4), BLOCK_IN=(512, 1024), UNROLL=(2, 4), num_warps=(2,))
    tiles += grid(BLOCK_OUT=(1, 2), BLOCK_IN=(1024, 2048), UNROLL=(2, 4), num_warps=(4,))
    return tiles + grid(BLOCK_OUT=(4,), BLOCK_IN=(512,), UNROLL=(2, 4), num_warps=(4,))


def _one_row_short() -> tuple[Launch, ...]:
    """For a row of 896: as one tile, or in several."""
    tiles = grid(BLOCK_OUT=(1, 2, 4), BLOCK_IN=(1024,), UNROLL=(1,), num_warps=(2, 4))
    return tiles + grid(BLOCK_OUT=(1, 2, 4), BLOCK_IN=(256,), UNROLL=(2, 4), num_warps=(1,))


def _ahead(launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
    return tuple({**launch, "AHEAD": ahead} for launch in launches for ahead in (0, 1024, 2048))


def _fused_one_row(module: ModuleType) -> tuple[Sweep, ...]:
    return tuple(
        Sweep(
            module.OP, "triton", module, "_launch", launches, lambda case, s=short: (case.sizes["inputs"] <= 1024) == s
        )
        for short, launches in ((False, _one_row()), (True, _one_row_short()))
    )


def _prefill() -> tuple[Launch, ...]:
    names = ("BLOCK_M", "BLOCK_N", "STAGES", "num_warps")
    tiles = ((128, 128, 3, 8), (128, 128, 2, 8), (128, 64, 3, 8), (128, 64, 4, 8), (64, 64, 3, 4))
    return tuple(dict(zip(names, tile, strict=True)) for tile in tiles)


def _narrow_rows(op: Op) -> Sweep:
    launches = grid(BLOCK_ROWS=(1, 2, 4, 8), BLOCK_HIDDEN=(1024,), num_warps=(1, 2, 4, 8))
    return Sweep(op, "triton", rms_norm, "_launch", launches, lambda case: case.sizes["hidden"] == 896)


def _short_heads(module: ModuleType) -> Sweep:
    launches = grid(BLOCK_TOKENS=(2, 4, 8), BLOCK_HEADS=(4, 8, 16), BLOCK_HALF=(32,), num_warps=(2, 4, 8))

    def serves(case: Case) -> bool:
        return case.sizes["tokens"] == 4096 and case.sizes["head_dim"] == 64

    return Sweep(module.OP, "triton", module, "launch_shape", launches, serves)


def _draws() -> Sweep:
    """Around what the table has for Qwen2's vocabulary, where its rows are filtered."""
    (vocab,) = {case.sizes["vocab"] for case in sampling.OP.large_cases}
    table = sampling._launch(vocab)
    launches = tuple(
        {
            "both": {"GROUP": group},
            "summarize": {**table["summarize"], "CHUNK": chunk, "STEP": 256 * warps, "num_warps": warps},
            "draw": {**table["draw"], "WANTED": wanted, "num_warps": draw_warps},
        }
        for group, (chunk, warps), wanted, draw_warps in product(
            (16, 32), ((2048, 2), (4096, 4), (8192, 8)), (32, 64, 128), (8, 16)
        )
    )

    def serves(case: Case) -> bool:
        return case.sizes["kind"] in ("top_k_top_p", "top_p") and case.sizes["shape"] == "peaked"

    return Sweep(sampling.OP, "triton", sampling, "_launch", launches, serves)


SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "paged_attention": (
        _attention(range(2), (256, 32), (256, 64), (384, 32)),
        _attention(range(2, 17), (256, 32), (256, 64), (384, 64), (512, 64)),
        _attention(range(17, 65), (0, 128), (280, 256), (384, 128), (420, 128)),
        _attention(range(65, 1024), (0, 128)),
    ),
    "prefill_attention": (
        Sweep(
            prefill_attention.OP,
            prefill_attention.prefill_on_any_gpu,
            prefill_attention,
            "_launch",
            _prefill(),
        ),
    ),
    "linear": (
        Sweep(
            linear.OP,
            "skinny",
            linear,
            "_one_row_launch",
            _ahead(_one_row()),
            lambda case: case.sizes["rows"] == 1 and case.sizes["inputs"] > 1024,
        ),
        Sweep(
            linear.OP,
            "skinny",
            linear,
            "_one_row_launch",
            tuple({**launch, "AHEAD": 0} for launch in _one_row_short()),
            lambda case: case.sizes["rows"] == 1 and case.sizes["inputs"] <= 1024,
        ),
        Sweep(
            linear.OP,
            "skinny",
            linear,
            "_few_rows_launch",
            _few_rows(),
            lambda case: 1 < case.sizes["rows"] <= linear.SKINNY_ROWS,
        ),
    ),
    "linear_swiglu": (
        Sweep(
            linear_swiglu.OP,
            linear_swiglu.few_rows_linear_swiglu,
            linear_swiglu,
            "_launch",
            _gates_and_ups(),
            lambda case: case.sizes["tokens"] <= linear_swiglu.FEW_ROWS,
        ),
    ),
    "norm_linear": _fused_one_row(norm_linear),
    "norm_qkv_rotary_store_kv": _fused_one_row(norm_qkv_rotary_store_kv),
    "norm_gate_up_swiglu": _fused_one_row(norm_gate_up_swiglu),
    "rms_norm": (
        Sweep(
            rms_norm.OP,
            "triton",
            rms_norm,
            "_launch",
            grid(BLOCK_ROWS=(1, 2), BLOCK_HIDDEN=(4096,), num_warps=(4, 8, 16)),
            lambda case: case.sizes["hidden"] == 3584,
        ),
        _narrow_rows(rms_norm.OP),
    ),
    "add_rms_norm": (_narrow_rows(rms_norm.ADD_OP),),
    "rotary": (_short_heads(rotary),),
    "rotary_store_kv": (_short_heads(rotary_store_kv),),
    "sample": (_draws(),),
    "swiglu": (Sweep(swiglu.OP, "triton", swiglu, "_launch", grid(BLOCK=(1024, 2048), num_warps=(2, 4, 8))),),
}


def _inputs(op: Op, case: Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return op.inputs(**case.sizes, dtype=default_dtype(op), device=torch.device("cuda"), generator=generator)


def _compile(name: str, i: int, launch: Launch) -> None:
    """Runs a candidate once on each case, for Triton's cache on disk; what does not compile fails when it is timed."""
    sweep = SWEEPS[name][i]
    with sweep.choosing(launch) as kernel:
        for case in sweep.cases:
            try:
                kernel(**_inputs(sweep.op, case, 0))
            except Exception:
                return


def _time(sweep: Sweep, case: Case) -> list[Time]:
    """The candidates and the table's choice, the fastest first."""
    device = torch.device("cuda", torch.cuda.current_device())
    cost = sweep.op.cost(**case.sizes, itemsize=2)
    # As many as `bench.kernels` takes: over the fewest that outlast the L2, long products are faster.
    first = _inputs(sweep.op, case, 0)
    count = count_sets(first, cost, measure_roof(device), device)
    sets = [first, *(_inputs(sweep.op, case, seed) for seed in range(1, count))]
    times = []
    for launch in (None, *sweep.launches):
        with sweep.choosing(launch) as kernel:
            try:
                calls = [lambda inputs=inputs, kernel=kernel: kernel(**inputs) for inputs in sets]
                times.append((graph_time(calls, replays=10).median, launch))
            except Exception as error:
                print(f"  {in_a_word(launch)}: {type(error).__name__}", file=sys.stderr)
    return sorted(times, key=lambda entry: entry[0])


def shown(times: list[Time]) -> list[Time]:
    """The fastest, and the table's wherever it stands."""
    return [entry for i, entry in enumerate(times) if i < SHOWN or entry[1] is None]


def overall(timed: list[list[Time]]) -> list[Time]:
    """Each launch that served every case, with its time over the best one's in the geometric mean; the best first."""
    ratios: dict[str, list[float]] = {}
    launches = {}
    for times in timed:
        for us, launch in times:
            ratios.setdefault(in_a_word(launch), []).append(us / times[0][0])
            launches[in_a_word(launch)] = launch
    means = [(geometric_mean(r), launches[word]) for word, r in ratios.items() if len(r) == len(timed)]
    return sorted(means, key=lambda entry: entry[0])


def in_a_word(launch: Launch | None) -> str:
    """Constants of several launches stand behind their names: draw: WANTED=64 num_warps=16."""
    if launch is None:
        return THE_TABLES
    parts = launch.items()
    return " ".join(f"{k}: {in_a_word(v)}" if isinstance(v, Mapping) else f"{k}={v}" for k, v in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operator", nargs="*", help=f"default: all of {', '.join(SWEEPS)}")
    names = parser.parse_args().operator or list(SWEEPS)
    if unknown := [name for name in names if name not in SWEEPS]:
        parser.error(f"there is no {unknown[0]!r}; there are: {', '.join(SWEEPS)}")
    if not torch.cuda.is_available():
        parser.error("timing needs a GPU")
    start = time.perf_counter()
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        jobs = [
            (name, i, launch) for name in names for i, sweep in enumerate(SWEEPS[name]) for launch in sweep.launches
        ]
        list(pool.map(_compile, *zip(*jobs, strict=True)))
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for name in names:
        rows = []
        for sweep in SWEEPS[name]:
            timed = []
            for case in sweep.cases:
                times = _time(sweep, case)
                timed.append(times)
                print(
                    f"{name} {case}", *(f"  {us:.2f} µs {in_a_word(launch)}" for us, launch in shown(times)), sep="\n"
                )
                rows += [{"case": str(case), "launch": in_a_word(launch), "µs": us} for us, launch in shown(times)]
            best = (f"  × {ratio:.3f} {in_a_word(launch)}" for ratio, launch in shown(overall(timed)))
            print(f"{name}, {len(timed)} cases together", *best, sep="\n", flush=True)
            path = record.save(f"tune-{name}", rows)  # each time: a run that is cut off keeps what it has
        print(path, flush=True)


if __name__ == "__main__":
    main()
