"""The command `micro-vllm`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys

from ..model.checkpoint import open_checkpoint
from ..model.loader import num_parameters
from ..model.sampling_params import SamplingParams
from .cli_options import (
    MODEL_HELP,
    add_device_options,
    add_engine_options,
    add_model_option,
    add_sampling_options,
    add_server_options,
    load_engine,
    sampling_params,
)
from .config import EngineConfig
from .engine import InferenceEngine
from .lab.cli import add_kernels_command
from .outputs import RequestError, RequestOutput
from .prompt import Prompt


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(f"micro-vllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="micro-vllm",
        description="A small, fast LLM inference engine whose GPU kernels can be swapped one at a time.",
        epilog="\n  ".join(
            [
                "first steps:",
                'micro-vllm generate --chat "What is a GPU?"',
                "micro-vllm chat",
                "micro-vllm info smollm2",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="complete one or more prompts", description="Completes prompts.")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text to continue; several run as one batch")
    generate.add_argument("--chat", action="store_true", help="ask it as a chat message, in the model's chat template")
    add_model_option(generate)
    add_engine_options(generate)
    add_sampling_options(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talks with a model. Ctrl-C stops an answer, Ctrl-D or /exit ends.",
    )
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_model_option(chat)
    add_engine_options(chat)
    add_sampling_options(chat)
    chat.set_defaults(run=_chat)

    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP, with OpenAI's API",
        description="Serves a model over HTTP, with OpenAI's API. SIGTERM or Ctrl-C lets running answers finish.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_engine_options(serve)
    add_server_options(serve)
    serve.set_defaults(run=_serve)

    info = commands.add_parser(
        "info",
        help="what a model is and what memory it takes",
        description="Says what a model is and what memory it takes, without loading its weights.",
    )
    info.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    info.add_argument(
        "--length", type=int, metavar="TOKENS", help="text length to state cache memory for (default: the longest)"
    )
    add_device_options(info)
    info.set_defaults(run=_info)

    add_kernels_command(commands)
    return parser


def _generate(options: argparse.Namespace) -> int:
    params = sampling_params(options)
    engine = load_engine(options)
    prompts = [[{"role": "user", "content": text}] if options.chat else text for text in options.prompts]
    if len(prompts) == 1:
        try:
            _, output = _answer(engine, prompts[0], params)
        except RequestError as error:
            print(f"micro-vllm: {error}", file=sys.stderr)
            return 1
        outputs = [output] if output else []
    else:
        outputs = engine.generate(prompts, params)
        for text, output in zip(options.prompts, outputs, strict=True):
            print(f"--- {text}\n{output.text}")
            if output.error:
                print(f"micro-vllm: {text!r}: {output.error}", file=sys.stderr)
    if outputs:
        print(_summary(engine, outputs), file=sys.stderr)
    return 1 if any(output.error for output in outputs) else 0


def _summary(engine: InferenceEngine, outputs: list[RequestOutput]) -> str:
    tokens = sum(output.usage.completion_tokens for output in outputs)
    first = min(output.timings.to_first_token or output.timings.total for output in outputs)
    seconds = max(output.timings.total for output in outputs)
    return f"{tokens} tokens at {tokens / seconds:.1f} tokens/s, first token after {first:.2f} s, on {engine.device}"


class _ControlC:
    """Ctrl-C as a flag, `asked`, so that it strikes between tokens and not within a step; a second one raises."""

    def __enter__(self) -> _ControlC:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)


def _answer(engine: InferenceEngine, prompt: Prompt, params: SamplingParams) -> tuple[str, RequestOutput | None]:
    """Streams an answer → its text and its output; Ctrl-C ends it early, and then there is no output."""
    stream = engine.stream_generate(prompt, params)
    text = ""
    with _ControlC() as control_c:
        while not control_c.asked:
            try:
                _, piece = next(stream)
            except StopIteration as end:
                print()
                return text, end.value
            text += piece
            print(piece, end="", flush=True)
    stream.close()
    print(" [stopped]")
    return text, None


def _chat(options: argparse.Namespace) -> int:
    params = sampling_params(options)
    engine = load_engine(options)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(system)
    print("Ctrl-C stops an answer, Ctrl-D or /exit ends, /new starts over.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/new":
            messages = list(system)
        elif text:
            question = {"role": "user", "content": text}
            try:
                answer, _ = _answer(engine, [*messages, question], params)
            except (ValueError, RequestError) as error:  # the conversation goes on without the question
                print(f"micro-vllm: {error} (/new starts over)", file=sys.stderr)
                continue
            messages += [question, {"role": "assistant", "content": answer}]


def _serve(options: argparse.Namespace) -> int:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'serve needs {", ".join(missing)}: pip install "micro-vllm[server]"')
    from .server.serve import serve  # needs these packages

    return serve(options)


def _info(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model)
    model = checkpoint.config
    length = model.max_length if options.length is None else options.length
    if not 0 < length <= model.max_length:
        raise ValueError(f"--length {length} must be from 1 to {model.max_length}, the model's longest text")
    engine = EngineConfig(device=options.device, dtype=options.dtype)
    device = engine.resolve_device()
    dtype = engine.resolve_dtype(model.dtype, device)
    parameters = num_parameters(model)
    rows = {
        "model": f"{checkpoint.name} ({checkpoint.path})",
        "architecture": f"{model.architecture}, {model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_heads} query and {model.num_kv_heads} key-value heads of {model.head_dim}",
        "feed-forward": f"{model.intermediate_size}",
        "vocabulary": f"{model.vocab_size} tokens, {'tied' if model.tied_head else 'separate'} output head",
        "positions": f"{model.max_length} tokens, RoPE theta {model.rope.theta:g}, scaling {model.rope.scaling}",
        "parameters": f"{parameters / 1e6:.1f} million",
        "weights": f"{parameters * dtype.itemsize / 2**30:.2f} GiB in {str(dtype).removeprefix('torch.')} on {device}",
        "cache": f"{model.kv_bytes_per_token(dtype) / 2**10:.1f} KiB a token, "
        f"{length * model.kv_bytes_per_token(dtype) / 2**30:.2f} GiB for a text of {length} tokens",
    }
    for name, text in rows.items():
        print(f"{name:<14}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
