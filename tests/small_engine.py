"""A tokenizer for a small random model, and what tests do with an engine that runs one."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import torch
from microvllm import InferenceEngine
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .small_models import VOCAB_SIZE

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def save_tokenizer(folder: Path, eos: str | None = None) -> None:
    """A token for each byte and, beyond what any text is cut into, tokens of two and three letters."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["".join(letters) for size in (2, 3) for letters in product(ascii_lowercase, repeat=size)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens[:VOCAB_SIZE])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=TEMPLATE).save_pretrained(folder)


def assert_at_rest(engine: InferenceEngine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.fragmentation) == (0, 0, 0, 0.0)
    assert engine.cache_manager.num_available == stats.blocks
    assert not engine.has_work
    engine.cache_manager.check()


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def finish(engine: InferenceEngine, before_step=lambda step: None) -> dict:
    """Steps until nothing is left → outputs by request id."""
    outputs, step = {}, 0
    while engine.has_work:
        before_step(step)
        outputs |= {event.request_id: event.output for event in engine.step() if event.output}
        step += 1
    return outputs


def poison(engine: InferenceEngine, token: int) -> None:
    """A text that holds the token has no numbers from there on."""
    engine.runner.model.embedding.data[token] = torch.nan
