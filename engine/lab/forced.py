"""A model's logits along given texts, whatever it would have said itself (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from itertools import count

import torch

from ...kernels.kernel_set import KernelSet
from ...model.sampler import Sampler
from ...model.sampling_params import SamplingParams
from ..engine import InferenceEngine
from ..scheduler import Batch, Chunk
from ..sequence import Sequence

_IDS = count(-1, -1)  # a runner knows by the id which rows it holds, and an engine's own requests count up from 0


class RecordingSampler(Sampler):
    """Keeps the logits [vocab] that each token of each sequence was chosen from, by (sequence id, token's number)."""

    def __init__(self, kernels: KernelSet):
        super().__init__(kernels)
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def settle(self, logits, tokens, rows, newest=None):
        for row, seq in zip(logits, rows, strict=True):
            self.logits[seq.id, seq.num_tokens - seq.num_prompt] = row.float().cpu()
        return super().settle(logits, tokens, rows, newest)


def forced_steps(
    engine: InferenceEngine, prompts: Many[list[int]], texts: Many[list[int]]
) -> Iterator[list[tuple[int, int, torch.Tensor]]]:
    """For each step, (text, token, logits) of each text that goes on: the token that the engine draws there greedily,
    −1 where the logits are not numbers, and the float32 logits [vocab] on the host that it draws from. Then the text's
    own token is put in the place of the one drawn.

    The texts, none of them empty, may be of different lengths. The engine must be idle and have blocks for all of them;
    they overwrite its cache.
    """
    runner, size = engine.runner, engine.config.block_size
    seqs: list[Sequence] = []
    free = 0
    for prompt, text in zip(prompts, texts, strict=True):
        length = len(prompt) + len(text)
        seqs.append(Sequence(next(_IDS), prompt, SamplingParams(), max_length=length))
        seqs[-1].block_table = list(range(free, free := free + -(-length // size)))
    assert free <= engine.cache_manager.num_blocks, "the texts need more blocks than the engine has"

    before, runner.sampler = runner.sampler, RecordingSampler(engine.kernels)
    try:
        drawn = [token for seq in seqs for token in _prefill(engine, seq)]
        going = list(range(len(seqs)))
        for i in range(max(map(len, texts))):
            if i:
                going = [k for k in going if i < len(texts[k])]
                for row, k in enumerate(going):
                    seqs[k].token_ids.append(texts[k][i - 1])
                    runner.rows.tokens[row] = texts[k][i - 1]
                batch = [seqs[k] for k in going]
                drawn = _drawn(engine, Batch([], batch, batch))
            logits, runner.sampler.logits = runner.sampler.logits, {}
            yield [(k, token, logits[seqs[k].id, i]) for k, token in zip(going, drawn, strict=True)]
    finally:
        runner.sampler = before


def _prefill(engine: InferenceEngine, seq: Sequence) -> list[int]:
    """The prompt in chunks → the token drawn after it."""
    for start in range(0, seq.num_prompt, engine.config.max_prefill_tokens):
        chunk = Chunk(seq, start, min(engine.config.max_prefill_tokens, seq.num_prompt - start))
        tokens = _drawn(engine, Batch([chunk], [], [seq] * (chunk.end == seq.num_prompt)))
    return tokens


def _drawn(engine: InferenceEngine, batch: Batch) -> list[int]:
    with engine.its_gpu():
        return engine.runner.launch(batch).result().tokens
