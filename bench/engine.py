"""The engine beside a peer, in turns, on the same token ids:   python -m bench.engine --peer transformers"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from microvllm import InferenceEngine
from microvllm.engine.config import DTYPES
from microvllm.model.checkpoint import LOAD_FORMATS, resolve

from .record import save, table


class Engine(Protocol):
    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """The time to add exactly `tokens` tokens to each prompt, greedily."""


class Ours:
    def __init__(self, model: str, dtype: str, load_format: str):
        # Every turn must compute its prompts: a cached prefix would be a win of another kind.
        self.engine = InferenceEngine(
            model, max_batch_size=256, dtype=dtype, load_format=load_format, enable_prefix_caching=False
        )
        self.vocab_size = self.engine.model_config.vocab_size
        self.dtype = self.engine.runner.model.embedding.dtype
        self.kernels = str(self.engine.kernels)

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        self.engine.generate(prompts, max_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - start


class Transformers:
    def __init__(self, model: str, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        path = resolve(model)
        place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if place else path
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **place).to(device).eval()

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - start


PEERS = {"transformers": Transformers}


def measure(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Prefill is the time to the first token of all; a step is what each further token takes."""
    prefill = engine.seconds(prompts, 1)
    total = engine.seconds(prompts, tokens)
    step = (total - prefill) / (tokens - 1)
    return {"prefill s": prefill, "ms a step": step * 1e3, "tokens/s": len(prompts) * tokens / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, a known name or a hub name")
    parser.add_argument("--load-format", default="auto", choices=LOAD_FORMATS, help="dummy: random weights, no peer")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="default: what the engine takes")
    parser.add_argument("--peer", choices=PEERS, help="measured in the same run, in turns A B A B")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of each request")
    parser.add_argument("--tokens", type=int, default=64, help="tokens each request generates")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine; medians are shown")
    options = parser.parse_args()
    if options.peer and options.load_format == "dummy":
        parser.error("random weights would differ between the engines: --load-format dummy takes no --peer")

    ours = Ours(options.model, options.dtype, options.load_format)
    engines: dict[str, Engine] = {"micro-vllm": ours}
    if options.peer:
        engines[options.peer] = PEERS[options.peer](options.model, ours.dtype)
    rng = random.Random(0)
    rows = []
    for requests in options.requests:
        prompts = [[rng.randrange(ours.vocab_size) for _ in range(options.prompt)] for _ in range(requests)]
        for engine in engines.values():
            measure(engine, prompts, min(8, options.tokens))  # warm up
        turns = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, engine in engines.items():
                turns[name].append(measure(engine, prompts, options.tokens))
        for name in engines:
            row = {"requests": requests, "engine": name}
            row |= {key: median(turn[key] for turn in turns[name]) for key in turns[name][0]}
            rates = [turn["tokens/s"] for turn in turns[name]]
            row["spread"] = f"±{(max(rates) - min(rates)) / 2 / row['tokens/s']:.1%}"
            if options.peer:
                row[f"× {options.peer}"] = row["tokens/s"] / median(t["tokens/s"] for t in turns[options.peer])
            rows.append(row)
    print(table(rows))
    model = Path(options.model).name
    about = {"model": model, "dtype": str(ours.dtype), "prompt": options.prompt, "tokens": options.tokens}
    print(save(f"engine-{model}-{options.peer or 'alone'}", rows, **about, kernels=ours.kernels))


if __name__ == "__main__":
    main()
