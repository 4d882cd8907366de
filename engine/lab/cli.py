"""The command `micro-vllm kernels`: which there are, whether one is right, how fast it is, what it does to a model."""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from ...kernels.finding import Finding
from ...kernels.kernel_set import OPS, STANDALONE, KernelSet
from ...kernels.measure import MeasurementError
from ...kernels.op import REFERENCE, Case, Op
from ..cli_options import add_device_options, add_kernel_option, add_model_option
from ..config import DTYPES, EngineConfig
from ..kernel_file import kernel, swaps
from .compare import PROMPTS, compare
from .page import page

OPERATORS = {**OPS, **STANDALONE}
KERNEL_HELP = "FILE.py:FUNCTION, or the name of an implementation"


def add_kernels_command(commands: argparse._SubParsersAction) -> None:
    kernels = commands.add_parser("kernels", help="check, time and compare kernels", description=__doc__)
    kinds = kernels.add_subparsers(required=True, metavar="COMMAND")

    listing = kinds.add_parser("list", help="operators, their implementations, what runs here and why not the others")
    listing.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto: a GPU if there is one (default)")
    listing.set_defaults(run=_list)

    check = kinds.add_parser("check", help="is it right? exit code 1 if not")
    _add_kernel(check)
    check.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated (default: the operator's)")
    check.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto: a GPU if there is one (default)")
    check.set_defaults(run=_check)

    bench = kinds.add_parser("bench", help="is it fast? needs a GPU; exit code 1 for a kernel that is wrong")
    _add_kernel(bench)
    bench.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the operator computes in it")
    bench.set_defaults(run=_bench)

    both = kinds.add_parser("compare", help="what does it do to a model's tokens and speed? exit code 1 if it is wrong")
    add_model_option(both)
    add_device_options(both)
    add_kernel_option(both)
    both.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; all run as one batch")
    both.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of each text (default: %(default)s)")
    both.add_argument(
        "--turns", type=int, default=5, metavar="N", help="of each set, for the time (default: %(default)s)"
    )
    both.add_argument("--enforce-eager", action="store_true", help="on a GPU, launch kernel by kernel")
    both.add_argument(
        "--with", dest="more", nargs="+", default=[], choices=("check", "bench"), help="of each kernel, in one report"
    )
    _add_html(both)
    both.set_defaults(run=_compare)


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", metavar="KERNEL", help=KERNEL_HELP)
    parser.add_argument("--op", required=True, metavar="NAME", help=f"the operator: {', '.join(OPERATORS)}")
    parser.add_argument(
        "--case", action="append", nargs="+", metavar="SIZE=VALUE", help="instead of the operator's; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    _add_html(parser)


def _add_html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=_page_path, metavar="FILE", help="write a report with pictures, all in one file")


def _page_path(text: str) -> Path:
    if find_spec("matplotlib") is None:  # said before all the work, not behind it
        raise argparse.ArgumentTypeError('its pictures need matplotlib: pip install "micro-vllm[bench]"')
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is no file that can be written")
    return path


def _list(options: argparse.Namespace) -> int:
    device = EngineConfig(device=options.device).resolve_device()
    width = max(map(len, OPERATORS)) + 2
    print(f"on {device}; each operator's first implementation is what runs")
    for op in OPERATORS.values():
        chosen = op.default(device)
        others = [name for name in (*op.implementations, REFERENCE) if name != chosen]
        reasons = [f"{name}: {_state(op, name, device)}" for name in others]
        note = " (no engine runs it)" if op.name in STANDALONE else ""
        print(f"  {op.name:<{width}}{chosen:<14}{'; '.join(reasons)}{note}")
    return 0


def _state(op: Op, name: str, device: torch.device) -> str:
    unfit = None if name == REFERENCE else op.implementations[name].unfit
    return op.unavailable(name, device) or (f"for no engine: {unfit}" if unfit else "available")


def _check(options: argparse.Namespace) -> int:
    if (status := interpreted(options)) is not None:
        return status
    op, cases = _operator(options.op), _cases(options)
    dtypes = options.dtype and [DTYPES[name] for name in options.dtype]
    device = EngineConfig(device=options.device).resolve_device()
    report = op.check(kernel(options.kernel), cases, dtypes=dtypes, device=device, seed=options.seed)
    return _finish(f"{op.name}: {options.kernel}", [report], options.html)


def _bench(options: argparse.Namespace) -> int:
    op = _operator(options.op)
    cases, function = _cases(options), kernel(options.kernel)
    dtype = options.dtype and DTYPES[options.dtype]
    device = torch.device("cuda")
    return _finish(
        f"{op.name}: {options.kernel}",
        lambda: [_measured(op, function, cases, dtype, options.seed, device)],
        options.html,
    )


def _measured(
    op: Op,
    function: str | Callable,
    cases: list[Case] | None,
    dtype: torch.dtype | None,
    seed: int,
    device: torch.device,
) -> Finding:
    """Beside the operator's other implementations."""
    if not torch.cuda.is_available():
        raise ValueError("timing needs a GPU, and PyTorch sees none here")
    peers = [name for name in op.implementations if name != function and op.unavailable(name, device) is None]
    return op.measure(function, cases, dtype=dtype, device=device, peers=peers, seed=seed)


def _compare(options: argparse.Namespace) -> int:
    if (status := interpreted(options)) is not None:
        return status
    if not options.kernel:
        raise ValueError("compare needs at least one --kernel OP=NAME or OP=FILE.py:FUNCTION")
    changed = swaps(options.kernel)
    device = EngineConfig(device=options.device).resolve_device()
    a = KernelSet.default(device)
    b = a.replace(**changed)

    def findings() -> list[Finding]:
        found = [
            compare(
                options.model,
                a,
                b,
                options.prompt or PROMPTS,
                max_tokens=options.max_tokens,
                turns=options.turns,
                device=options.device,
                dtype=options.dtype,
                enforce_eager=options.enforce_eager,
            )
        ]
        for op, function in changed.items():
            if "check" in options.more:
                found.append(OPS[op].check(function, device=device))
            if "bench" in options.more:
                found.append(_measured(OPS[op], function, None, None, 0, device))
        return found

    return _finish(f"{options.model}: {', '.join(options.kernel)}", findings, options.html)


def _finish(title: str, findings: list[Finding] | Callable[[], list[Finding]], html: Path | None) -> int:
    """Prints the findings, writes the report → the exit code."""
    try:
        findings = findings() if callable(findings) else findings
    except MeasurementError as error:
        print(f"micro-vllm: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(map(str, findings)))
    if html is not None:
        html.write_text(page(title, findings))
        print(html)
    return 1 if any(finding.table().ok is False for finding in findings) else 0


def interpreted(options: argparse.Namespace) -> int | None:
    """Without a GPU, the exit code of the same command under Triton's interpreter; None where this process will do.

    Triton looks for TRITON_INTERPRET when it is imported, which in this process has been done.
    """
    if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return None
    print("no GPU here: Triton's interpreter runs what is written in Triton (TRITON_INTERPRET=1)", file=sys.stderr)
    # Python would look for modules in the current folder first, and a kernel's file may be called triton.py.
    elsewhere = "import sys; sys.path[:] = filter(None, sys.path)"
    start = f"{elsewhere}; from microvllm.engine.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *options.arguments]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def _operator(name: str) -> Op:
    if name not in OPERATORS:
        raise ValueError(f"there is no operator {name!r}; there are: {', '.join(OPERATORS)}")
    return OPERATORS[name]


def _cases(options: argparse.Namespace) -> list[Case] | None:
    """Those of --case; None for the operator's own."""
    if options.case is None:
        return None
    parameters = inspect.signature(_operator(options.op).inputs).parameters
    known = [name for name in parameters if name not in ("dtype", "device", "generator")]
    needed = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    cases = []
    for words in options.case:
        sizes = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise ValueError(f"--case {word} must read SIZE=VALUE; the sizes of {options.op}: {', '.join(known)}")
            size = sizes[name] = _value(value)
            is_integer = str(parameters[name].annotation).startswith("int")
            if is_integer and (not isinstance(size, int) or size < 0):
                raise ValueError(f"--case {word}: {name} must be an integer of at least 0")
        if missing := [name for name in needed if name not in sizes]:
            raise ValueError(f"--case {' '.join(words)} lacks {', '.join(missing)}")
        cases.append(Case(**sizes))
    return cases


def _value(text: str) -> int | float | bool | str:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
