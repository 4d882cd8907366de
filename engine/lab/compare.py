"""Two sets of kernels in a whole engine: do they say the same, and which is faster?"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...kernels.kernel_set import KernelSet
from ...kernels.origin import device_name
from ...model.checkpoint import Checkpoint, open_checkpoint
from ...model.qwen2 import other_layouts
from ...model.tokenizer import Tokenizer
from ..config import EngineConfig
from ..engine import InferenceEngine
from ..prompt import Prompt, encode, one_or_several
from .comparison import Comparison, LogitError, TextComparison
from .forced import forced_steps
from .rounding import rounded_once_more

OWN_OPTIONS = ("max_batch_size", "num_blocks", "enable_prefix_caching", "policy", "alignment_window", "kernels")
WARM_UP_TOKENS = 8
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")


def compare(
    model: str | Path,
    a: KernelSet,
    b: KernelSet,
    prompts: Prompt | Many[Prompt] = PROMPTS,
    *,
    max_tokens: int = 32,
    turns: int = 5,
    **options: Any,
) -> Comparison:
    """Compares two sets of kernels in one model; a is taken for right.

    model:       a Hugging Face folder, a .gguf file, a hub name "owner/model", or "smollm2"
    prompts:     texts, lists of token ids, or chats; or one of these. They run as one batch
    max_tokens:  of each text. a writes them greedily, past any end of text; then both are fed a's tokens, so that the
                 logits of every place can be compared whatever was said before it
    turns:       of each set, a b a b …, for the time of a token; 0 for none
    options:     the other fields of EngineConfig by name: dtype, device, load_format, enforce_eager …

    Both engines read the same weights where they read them in the same layout. Where an operator wants another layout,
    one engine is dropped before the other is loaded, at every turn: there never are two models in memory. a's logits of
    all texts wait on the host meanwhile, 4 · vocabulary bytes a token.

    ValueError for a prompt, an option or a number that cannot be.
    """
    for name in OWN_OPTIONS:
        if name in options:
            raise ValueError(f"compare chooses {name} itself; {name}={options[name]!r} cannot be given")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens!r} must be an integer of at least 1")
    if not isinstance(turns, int) or turns < 0:
        raise ValueError(f"turns={turns!r} must be an integer of at least 0")
    if turns and max_tokens == 1:
        raise ValueError("the time of a token needs max_tokens of at least 2; turns=0 takes none")
    prompts = one_or_several(prompts)
    if not prompts:
        raise ValueError("there must be at least one prompt")
    options = {"progress": False, **options}
    checkpoint = open_checkpoint(model, options.get("load_format", "auto"))
    longest = options.get("max_model_len") or checkpoint.config.max_length
    tokenizer = checkpoint.tokenizer()
    encoded = [encode(prompt, tokenizer, longest) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + max_tokens > longest:
            raise ValueError(f"prompt {prompt!r} has {len(ids)} tokens: with {max_tokens} more it is over {longest}")
    block_size = options.get("block_size", EngineConfig.block_size)
    options["num_blocks"] = sum(-(-(len(ids) + max_tokens) // block_size) for ids in encoded)
    options |= {"max_batch_size": len(encoded), "enable_prefix_caching": False, "policy": "fcfs"}
    engines = _Engines(model, checkpoint, {"a": a, "b": b}, options)

    texts, said = _write(engines, encoded, max_tokens)
    noisy = _errors(engines["a"].with_kernels(rounded_once_more(a), enforce_eager=True), encoded, texts, said)
    errors = _errors(engines["b"], encoded, texts, said)
    compared = [_compared(tokenizer, *one) for one in zip(encoded, texts, said, errors, strict=True)]
    error = _overall(errors)
    times: dict[str, list[float]] = {"a": [], "b": []}
    if math.isfinite(error.largest):  # a text ends where logits are not numbers
        for name in ("a", "b") * turns:
            times[name].append(engines.ms_a_token(name, encoded, max_tokens))
    return Comparison(
        model=checkpoint.name,
        device=device_name(engines["b"].device),
        dtype=str(engines["b"].runner.model.embedding.dtype).removeprefix("torch."),
        changed=a.changes(b),
        texts=tuple(compared),
        error=error,
        rounding=_overall(noisy),
        ms_a=tuple(times["a"]),
        ms_b=tuple(times["b"]),
    )


class _Engines:
    """An engine for each set of kernels: on the same weights, or where their layouts differ, one at a time."""

    def __init__(
        self, model: str | Path, checkpoint: Checkpoint, kernels: Mapping[str, KernelSet], options: dict[str, Any]
    ):
        self._model, self._kernels, self._options = model, kernels, options
        self._share = not other_layouts(checkpoint.config, *kernels.values())
        self._built: dict[str, InferenceEngine] = {}
        self._warm: set[str] = set()

    def __getitem__(self, name: str) -> InferenceEngine:
        if name not in self._built:
            if self._built and self._share:
                (other,) = self._built.values()
                self._built[name] = other.with_kernels(self._kernels[name])
            else:
                self._drop()
                self._built[name] = InferenceEngine(self._model, kernels=self._kernels[name], **self._options)
        return self._built[name]

    def _drop(self) -> None:
        self._built.clear()
        self._warm.clear()
        gc.collect()  # a model and its runner hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ms_a_token(self, name: str, prompts: list[list[int]], max_tokens: int) -> float:
        """Milliseconds of a decode step of all the prompts together."""
        engine = self[name]
        if name not in self._warm:
            engine.generate(prompts, max_tokens=min(max_tokens, WARM_UP_TOKENS), ignore_eos=True)
            self._warm.add(name)
        timings = [o.timings for o in engine.generate(prompts, max_tokens=max_tokens, ignore_eos=True)]
        first, total = (max(getattr(t, moment) for t in timings) for moment in ("to_first_token", "total"))
        return (total - first) / (max_tokens - 1) * 1e3


Said = list[list[tuple[int, torch.Tensor]]]
"""For each text, for each place: the greedy token, and the logits [vocab]."""


def _write(engines: _Engines, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], Said]:
    """The texts that a writes greedily, and what it says at each place when it is fed them."""
    engine = engines["a"]
    outputs = engine.generate(prompts, max_tokens=max_tokens, ignore_eos=True)
    if failed := next((output.error for output in outputs if output.error), None):
        raise ValueError(f"there is nothing to compare with: a failed: {failed}")
    texts = [output.token_ids for output in outputs]
    said: Said = [[] for _ in texts]
    for step in forced_steps(engine, prompts, texts):
        for k, token, logits in step:
            said[k].append((token, logits))
    return texts, said


@dataclass
class _Errors:
    """Along a text: the greedy tokens, the largest error of the logits, and its mean square."""

    tokens: list[int] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    mean_square: list[float] = field(default_factory=list)


def _errors(engine: InferenceEngine, prompts: list[list[int]], texts: list[list[int]], said: Said) -> list[_Errors]:
    """Of what the engine says beside what was said."""
    errors = [_Errors() for _ in texts]
    for step in forced_steps(engine, prompts, texts):
        for k, token, logits in step:
            difference = logits - said[k][len(errors[k].tokens)][1]
            errors[k].tokens.append(token)
            errors[k].largest.append(float(difference.abs().max()))
            errors[k].mean_square.append(float(difference.double().square().mean()))
    return errors


def _overall(errors: list[_Errors]) -> LogitError:
    largest = torch.tensor([x for e in errors for x in e.largest])
    mean_square = torch.tensor([x for e in errors for x in e.mean_square])
    return LogitError(float(largest.max()), float(mean_square.mean().sqrt()))  # torch's maximum is NaN where one is


def _compared(
    tokenizer: Tokenizer | None,
    prompt: list[int],
    text: list[int],
    said: list[tuple[int, torch.Tensor]],
    errors: _Errors,
) -> TextComparison:
    def words(ids: list[int]) -> str:
        return str(ids) if tokenizer is None else tokenizer.decode(ids)

    tokens_a = [token for token, _ in said]
    first = next((i for i, pair in enumerate(zip(tokens_a, errors.tokens, strict=True)) if pair[0] != pair[1]), None)
    margin = differing = None
    if first is not None:
        mine, theirs = tokens_a[first], errors.tokens[first]
        logits = said[first][1]
        margin = float(logits[mine] - logits[theirs]) if theirs >= 0 else None
        differing = tuple(words([token]) if token >= 0 else "no number" for token in (mine, theirs))
    return TextComparison(
        prompt=words(prompt),
        text=words(text),
        tokens_a=tuple(tokens_a),
        tokens_b=tuple(errors.tokens),
        first_difference=first,
        margin=margin,
        differing_words=differing,
        error=_overall([errors]),
        error_by_token=tuple(errors.largest),
    )
