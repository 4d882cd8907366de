"""What the tests of scheduling share: a scheduler driven without a model, and a record of what the cache would hold."""

import math
import os
from collections.abc import Callable

from hypothesis import settings
from microvllm.engine.cache_manager import KVCacheManager
from microvllm.engine.policy import make_policy
from microvllm.engine.scheduler import Batch, Scheduler
from microvllm.engine.sequence import Sequence, Status
from microvllm.model.sampling_params import SamplingParams

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
"""Many thousands of examples:   HYPOTHESIS_PROFILE=thorough pytest tests"""


def examples(quick: int, thorough: int, steps: int = 50) -> settings:
    return settings(deadline=None, max_examples=thorough if THOROUGH else quick, stateful_step_count=steps)


class CacheContents:
    """For each slot of the cache the text whose last token was computed into it: keys depend on all tokens before."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.texts: dict[tuple[int, int], tuple[int, ...]] = {}

    def slot(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size

    def write(self, table: list[int], token_ids: list[int], start: int, end: int) -> None:
        for i in range(start, end):
            self.texts[self.slot(table, i)] = tuple(token_ids[: i + 1])

    def hold(self, table: list[int], token_ids: list[int], num_computed: int) -> bool:
        """Whether attention over the first `num_computed` tokens would read this very text."""
        return all(self.texts.get(self.slot(table, i)) == tuple(token_ids[: i + 1]) for i in range(num_computed))


class Simulation:
    """Serves requests without a model and checks in every step what the scheduler promises.

    ahead: a step is launched before the tokens of the one before are entered
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        policy: str = "fcfs",
        window: int | None = None,
        max_batch_size: int = 8,
        max_prefill_tokens: int = 1 << 30,
        interleaved_prefill_tokens: int = 1 << 30,
        age_bound: float = math.inf,
        prefix_caching: bool = True,
        hash_function: Callable[[tuple], int] = hash,
        ahead: bool = False,
    ):
        self.ahead = ahead
        self.launched: tuple[Batch, list[int]] | None = None
        self.cache = KVCacheManager(num_blocks, block_size, prefix_caching=prefix_caching, hash_function=hash_function)
        self.scheduler = Scheduler(
            self.cache,
            make_policy(policy, window),
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
            interleaved_prefill_tokens=interleaved_prefill_tokens,
            age_bound=age_bound,
        )
        self.contents = CacheContents(block_size)
        self.requests: list[Sequence] = []
        self.now = 0.0

    def add(
        self, prompt: list[int], max_tokens: int = 4, *, stop: tuple[int, ...] = (), streamed: bool = True, **options
    ) -> Sequence:
        seq = Sequence(
            len(self.requests),
            prompt,
            SamplingParams(max_tokens=max_tokens, **options),
            max_length=len(prompt) + max_tokens,
            stop_token_ids=frozenset(stop),
            streamed=streamed,
            arrival_time=self.now,
        )
        self.scheduler.add(seq)
        self.requests.append(seq)
        return seq

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.requests if seq.status is not Status.FINISHED]

    def step(self, meanwhile: Callable[[], None] = lambda: None, fails: Callable[[], bool] = lambda: False) -> Batch:
        """meanwhile: what happens while the device computes; fails: whether a sequence's logits are not numbers."""
        before = {seq: seq.num_preemptions for seq in self.scheduler.running}
        batch = self.scheduler.schedule(self.now)
        self._check_victims(before)
        self._check_batch(batch)
        texts = {seq: self._text(seq) for seq, _, _ in _spans(batch)}
        for seq, start, end in _spans(batch):
            assert self.contents.hold(seq.block_table, texts[seq], start), f"{seq} would read another text"
            self.contents.write(seq.block_table, texts[seq], start, end)
        for seq, _, end in _spans(batch):
            assert self.contents.hold(seq.block_table, texts[seq], end), f"{seq} was overwritten in the same step"
        self.scheduler.advance(batch)
        step = batch, [-1 if fails() else next_token(texts[seq]) for seq in batch.sampled]
        if self.ahead:
            step, self.launched = self.launched, step
        meanwhile()
        if step is not None:
            self._check_taken(step[0], self.scheduler.update(*step))
        self.check_books()
        return batch

    def _text(self, seq: Sequence) -> list[int]:
        """The sequence's tokens as the device knows them."""
        if not seq.num_pending:
            return list(seq.token_ids)
        batch, tokens = self.launched
        return [*seq.token_ids, max(0, tokens[batch.sampled.index(seq)])]

    def run(self, max_steps: int, seconds_a_step: float = 0.0) -> int:
        """Serves all there is → steps."""
        steps = 0
        while self.scheduler.has_work:
            assert steps < max_steps, f"after {steps} steps these have not ended: {self.unfinished}"
            self.step()
            self.now += seconds_a_step
            steps += 1
        return steps

    def check_at_rest(self) -> None:
        assert not self.scheduler.running and not len(self.scheduler.waiting) and not self.unfinished
        assert self.cache.num_available == self.cache.num_blocks and self.cache.num_used == 0
        assert self.scheduler.fragmentation == 0

    def check_books(self) -> None:
        self.cache.check()
        running = self.scheduler.running
        assert [seq.id for seq in running] == sorted(seq.id for seq in running), "running is not in order of arrival"
        assert all(seq.status is Status.RUNNING for seq in running)
        waiting = [seq for seq in self.requests if seq.status is Status.WAITING]
        assert len(self.scheduler.waiting) == len(waiting)
        assert len(running) + len(waiting) == len(self.unfinished)
        assert all(len(seq.token_ids) < seq.max_length for seq in self.unfinished)

    def _check_batch(self, batch: Batch) -> None:
        scheduler, chunks, decodes = self.scheduler, batch.chunks, batch.decodes
        ending = all(seq.num_tokens == seq.max_length for seq in scheduler.running) and scheduler.running
        assert batch or ending or not scheduler.has_work, "there is work and nothing is served"
        served = [chunk.seq for chunk in chunks] + decodes
        assert len(set(served)) == len(served), "a sequence is served twice"
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert sum(chunk.length for chunk in chunks) <= scheduler.max_prefill_tokens
        for seq in served:
            assert seq.status is Status.RUNNING and seq in scheduler.running
            assert seq.block_table == self.cache.block_table(seq.id)
            assert len(seq.block_table) == self.cache.blocks_for(seq.num_tokens), "not a block for each token"
        for chunk in chunks:
            assert chunk.start == chunk.seq.num_computed and 0 < chunk.length <= chunk.seq.num_uncomputed
        assert all(seq.num_uncomputed == 1 for seq in decodes)
        assert all(seq.num_tokens < seq.max_length for seq in served), "a sequence is served beyond its end"
        assert batch.sampled == [chunk.seq for chunk in chunks if chunk.end == chunk.seq.num_tokens] + decodes
        self._check_owners(batch)
        self._check_alignment(decodes)
        self._check_ageing(served)

    @staticmethod
    def _check_taken(batch: Batch, taken: list[int]) -> None:
        """Every token was entered but those of sequences that had ended or been preempted."""
        left = [seq for i, seq in enumerate(batch.sampled) if i not in taken]
        assert all(seq.status is not Status.RUNNING or seq.num_preemptions for seq in left)

    def _check_owners(self, batch: Batch) -> None:
        """A block that is written is in one table only."""
        uses = [block for seq in self.scheduler.running for block in seq.block_table]
        for seq, start, end in _spans(batch):
            for block in {seq.block_table[i // self.cache.block_size] for i in range(start, end)}:
                assert uses.count(block) == 1, f"{seq} writes block {block}, which others use"

    def _check_alignment(self, decodes: list[Sequence]) -> None:
        window = self.scheduler.policy.window
        if window is not None and decodes:
            shortest = min(seq.num_tokens for seq in decodes)
            young = [seq for seq in decodes if self.now - seq.arrival_time < self.scheduler.age_bound]
            assert all(seq.num_tokens <= shortest + window for seq in young), "not aligned"

    def _check_ageing(self, served: list[Sequence]) -> None:
        newest = max((seq.id for seq in served), default=-1)
        for seq in self.unfinished:
            done = seq.num_tokens == seq.max_length  # it waits for nothing but its last token
            if self.now - seq.arrival_time > self.scheduler.age_bound and seq not in served and not done:
                assert newest < seq.id, f"{seq} is aged, and a later arrival goes before it"

    def _check_victims(self, before: dict[Sequence, int]) -> None:
        victims = [seq.id for seq, count in before.items() if seq.num_preemptions > count]
        spared = [seq.id for seq, count in before.items() if seq.num_preemptions == count]
        assert not victims or not spared or max(spared) < min(victims), "not the newest was preempted"


def next_token(token_ids: list[int]) -> int:
    """0, 1 or 2; as a model's, a function of the text."""
    return hash(tuple(token_ids)) % 3


def _spans(batch: Batch) -> list[tuple[Sequence, int, int]]:
    """Which tokens of which sequence a step computes."""
    spans = [(chunk.seq, chunk.start, chunk.end) for chunk in batch.chunks]
    return spans + [(seq, seq.num_computed, seq.num_tokens) for seq in batch.decodes]
