"""Every kernel beside its peers and the GPU's roof:   python -m bench.kernels [operator ...]

Each case is checked, timed, and checked again. Tables go to the terminal, figures and a picture for each operator to
bench/results. A case that fails is shown as failed, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import asdict
from math import exp, log
from statistics import mean
from typing import Any

import torch
from microvllm.kernels.kernel_set import OPS, STANDALONE
from microvllm.kernels.measure import Peer, default_dtype, measure_case
from microvllm.kernels.measurement import Measurement, Row
from microvllm.kernels.op import Case, Op
from microvllm.kernels.origin import device_name
from microvllm.kernels.report import in_a_line
from microvllm.kernels.roof import measure_roof
from microvllm.kernels.timing import Timing

from . import picture, record
from .peers import PEERS

OPERATORS = {**OPS, **STANDALONE}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def preferred(op: Op, device: torch.device) -> str:
    """Our own kernel, where an operator would by default run somebody else's."""
    return "triton" if "triton" in op.implementations else op.default(device)


def measured(op: Op, kernel: str, case: Case, dtype: torch.dtype, peers: tuple[Peer, ...]) -> Row:
    """The case's row; one of words if anything fails, whose traceback is printed."""
    try:
        return measure_case(op, kernel, case, dtype=dtype, peers=peers)
    except Exception as error:
        traceback.print_exc()
        words = f"failed: {in_a_line(error)}"
        cost = op.cost(**case.sizes, itemsize=dtype.itemsize)
        return Row(case, dtype, cost, measure_roof(torch.device("cuda", torch.cuda.current_device())), words)


def in_short(row: Row) -> str:
    """A row in a few words, for the terminal while the others are measured."""
    if isinstance(row.timing, str):
        return row.timing
    words = f"{row.timing.median:.2f} µs, {row.share:.0%} of the roof"
    if row.fastest is None:
        return words
    name, peer = row.fastest
    return f"{words}, ×{row.ratio(peer):.2f} {name}"


def flat(row: Row, peers: list[str]) -> dict[str, Any]:
    """A row for a Markdown table; every row of an operator has the same columns."""
    cells: dict[str, Any] = {"case": str(row.case)}
    times = dict.fromkeys(("µs", "10–90 %", "over empty", "rate", "% of roof", *peers, *(f"× {p}" for p in peers)), "–")
    if isinstance(row.timing, Timing):
        rate, unit = row.rate
        times |= {"µs": row.timing.median, "10–90 %": f"{row.timing.low:.2f}–{row.timing.high:.2f}"}
        times |= {"over empty": row.over_launch, "rate": f"{rate:.3g} {unit}", "% of roof": f"{row.share:.1%}"}
        for name, peer in row.peers.items():
            if isinstance(peer, Timing):
                times |= {name: peer.median, f"× {name}": row.ratio(peer)}
    return cells | times


def group_of(op: str, case: Case) -> str:
    """Which cases of an operator are summed up together."""
    sizes = case.sizes
    if op in ("linear", "linear_add", "linear_add_norm"):
        return f"rows={sizes['rows']}, " + ("the head" if sizes["outputs"] > 1 << 16 else "in a layer")
    if op == "paged_attention":
        shape = (key for key in ("heads", "kv_heads", "head_dim", "block_size", "float8") if key in sizes)
        longer = ["longer than 32768"] if sizes["context"] > 32768 else []
        return " ".join([f"{key}={sizes[key]}" for key in shape] + longer)
    return ""


def summary(op: str, rows: list[Row]) -> list[dict[str, Any]]:
    """Our time over that of the fastest peer of each case, for each group of cases.

    slower: the cases where we are slower by more than the run's own spread: our 10th percentile over its 90th.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.timing, Timing) and row.fastest is not None:
            groups.setdefault(group_of(op, row.case), []).append(row)
    lines = []
    for name, group in groups.items():
        fastest = [row.fastest[1] for row in group]
        ratios = [row.ratio(peer) for row, peer in zip(group, fastest, strict=True)]
        worst = max(zip(ratios, group, strict=True), key=lambda entry: entry[0])[1]
        lines.append(
            {
                "operator": op,
                "cases": f"{len(group)}: {name}" if name else str(len(group)),
                "geometric mean": exp(mean(map(log, ratios))),
                "worst": max(ratios),
                "worst at": f"{worst.case} (× {worst.fastest[0]})",
                "together": sum(row.timing.median for row in group) / sum(peer.median for peer in fastest),
                "slower": sum(row.timing.low > peer.high for row, peer in zip(group, fastest, strict=True)),
            }
        )
    return lines


def bench(op: Op, kernel: str, dtype: torch.dtype, peers: tuple[Peer, ...]) -> list[Row]:
    """Measures all large cases of an operator, prints and saves them."""
    start = time.perf_counter()
    rows = []
    for i, case in enumerate(op.large_cases, 1):
        rows.append(measured(op, kernel, case, dtype, peers))
        print(f"[{i}/{len(op.large_cases)}] {op.name} {case}: {in_short(rows[-1])}", flush=True)
    measurement = Measurement(op.name, kernel, tuple(rows), device_name())
    print(f"\n{time.perf_counter() - start:.0f} s\n{measurement}\n", flush=True)
    names = list(dict.fromkeys(peer.name for peer in peers))
    short = str(dtype).removeprefix("torch.")
    path = record.save(
        f"kernels-{op.name}" + (f"-{short}" if dtype != default_dtype(op) else ""),
        [flat(row, names) for row in rows],
        not_measured={
            name: sorted({row.peers[name] for row in rows if isinstance(row.peers.get(name), str)}) for name in names
        },
        **measurement.record(),
    )
    print(path, flush=True)
    picture.draw_beside(path, picture.draw)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operator", nargs="*", help=f"default: all of {', '.join(OPERATORS)}")
    parser.add_argument("--only", nargs="+", metavar="PEER", help="time these peers alone; 'none' for none")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="where an operator computes in it")
    parser.add_argument("--kernel", action="append", default=[], metavar="OP=NAME", help="time this implementation")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw the pictures of bench/results again")
    options = parser.parse_args()
    if options.draw:
        for path in sorted(record.RESULTS.glob("*/kernels-*.json")):
            picture.draw_beside(path, picture.draw)
        return
    chosen = dict(choice.partition("=")[::2] for choice in options.kernel)
    known = {peer.name for peers in PEERS.values() for peer in peers} | {"none"}
    for given, names in ((options.operator, OPERATORS), (chosen, OPERATORS), (options.only or (), known)):
        if unknown := [name for name in given if name not in names]:
            parser.error(f"there is no {unknown[0]!r}; there are: {', '.join(names)}")
    if not torch.cuda.is_available():
        parser.error("timing needs a GPU")

    device = torch.device("cuda", torch.cuda.current_device())
    roof = measure_roof(device)
    print(
        f"{torch.cuda.get_device_name()}: reads {roof.read / 1e12:.2f} TB/s, copies {roof.copy / 1e12:.2f} TB/s, "
        f"{roof.flops / 1e12:.0f} TFLOP/s in bfloat16, an empty kernel takes {roof.launch * 1e6:.2f} µs\n",
        flush=True,
    )
    failed, lines = 0, []
    for name in options.operator or OPERATORS:
        op = OPERATORS[name]
        if not op.large_cases:
            print(f"{name}: it has no large cases\n")
            continue
        peers = tuple(peer for peer in PEERS.get(name, ()) if options.only is None or peer.name in options.only)
        dtype = DTYPES[options.dtype] if DTYPES[options.dtype] in op.dtypes else default_dtype(op)
        rows = bench(op, chosen.get(name) or preferred(op, device), dtype, peers)
        failed += sum(isinstance(row.timing, str) and row.timing.startswith("failed") for row in rows)
        lines += summary(name, rows)
    if lines:
        print(f"\nour time over the fastest peer's\n{record.table(lines)}")
    if lines and not options.operator and options.only is None and not chosen:
        print(record.save("kernels", lines, dtype=options.dtype, roof=asdict(roof)))
    if failed:
        sys.exit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
