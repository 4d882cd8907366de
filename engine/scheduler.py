"""Which tokens are computed in the next step: continuous batching over a paged cache, as decisions without a device."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from .cache_manager import KVCacheManager
from .policy import Policy
from .sequence import Sequence, Status
from .waiting_queue import WaitingQueue


@dataclass(frozen=True)
class Chunk:
    """Tokens start … start + length − 1 of a prompt (or of a preempted sequence), to be computed in one step."""

    seq: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Batch:
    """One step: prompt chunks to prefill and sequences to decode by one token.

    sampled:      the sequences that get a token from this step, those whose last chunk this is and then the decodes
    preemptions:  of each of them, before this step: one that is preempted meanwhile draws this token anew
    """

    chunks: list[Chunk]
    decodes: list[Sequence]
    sampled: list[Sequence]
    preemptions: list[int] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "preemptions", [seq.num_preemptions for seq in self.sampled])

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)


class Scheduler:
    """Chooses batches and keeps the books. It has no clock: `now`, in seconds, is an argument and never runs backwards.

    A step is `schedule`, then `advance`, and at last `update`, when its tokens are known. Before that the next step may
    be scheduled and advanced to. What it computes for a sequence that turns out to have ended is not used.

    cache:               the block allocator
    policy:              the order of admission and the alignment of decode batches
    max_batch_size:      sequences that run at once
    max_prefill_tokens:  prompt tokens computed in one step; a longer prompt takes several, with decodes in each
    interleaved_prefill_tokens:  of these, how many beside streams, while no more requests wait for their first token
                         than decode: the fewer, the less a long prompt slows the others' pace; the more, the sooner all
                         are served
    age_bound:           seconds; a request older than this is aged, and in no step is anything that arrived later
                         admitted or computed unless the aged request is computed too
    """

    def __init__(
        self,
        cache: KVCacheManager,
        policy: Policy,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        interleaved_prefill_tokens: int,
        age_bound: float,
    ):
        self.cache = cache
        self.policy = policy
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.interleaved_prefill_tokens = min(interleaved_prefill_tokens, max_prefill_tokens)
        self.age_bound = age_bound
        self.waiting = WaitingQueue(policy)
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.num_steps = 0

    # --- the requests ---

    def check(self, seq: Sequence) -> None:
        """ValueError where the cache can never hold the request."""
        # The last token is returned and never computed, so it needs no place.
        needed = self.cache.blocks_for(seq.max_length - 1)
        if needed > self.cache.num_blocks:
            raise ValueError(
                f"a prompt of {seq.num_prompt} tokens and {seq.max_length - seq.num_prompt} more need {needed} blocks "
                f"of {self.cache.block_size} tokens, and the cache has {self.cache.num_blocks}"
            )

    def add(self, seq: Sequence) -> None:
        """Takes a request in that `check` passes. Ids rise in the order of arrival."""
        self.check(seq)
        self.waiting.push(seq)

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends a request in whatever state it is; its blocks are free at once."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self.cache.free(seq.id)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status, seq.finish_reason = Status.FINISHED, reason

    def preempt(self, seq: Sequence) -> None:
        """Takes a running sequence's blocks; it waits again, and what it had computed is computed anew."""
        self.running.remove(seq)
        self.cache.free(seq.id)
        seq.status, seq.num_computed, seq.num_pending = Status.WAITING, 0, 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting))

    @property
    def fragmentation(self) -> float:
        """The share of the cache blocks in use that holds no token: the empty ends of the sequences' last blocks."""
        block_size = self.cache.block_size
        # A token that was just drawn may have no place yet.
        empty = sum(max(0, len(s.block_table) * block_size - s.num_tokens) for s in self.running)
        return empty / (self.cache.num_used * block_size) if self.cache.num_used else 0.0

    # --- a step ---

    def schedule(self, now: float) -> Batch:
        """The next step. Every sequence in it has blocks for all its tokens."""
        horizon = now - self.age_bound
        preemptions = self.num_preemptions
        decodes = self._aligned_decodes(horizon)
        while not self._make_room(decodes):
            decodes = self._aligned_decodes(horizon)
        begun = [seq for seq in self.running if seq.num_uncomputed > 1]
        budget = self._prefill_budget(begun)
        chunks, held_back = self._prefill_aged(begun, horizon, budget)
        if held_back is not None:
            decodes = [seq for seq in decodes if seq.id < held_back]
        else:
            # What has just been preempted must not take back the blocks that it was preempted for.
            budget -= sum(chunk.length for chunk in chunks)
            self._prefill_by_policy(chunks, begun, horizon, budget, admit=self.num_preemptions == preemptions)
        if self.num_preemptions > preemptions:
            # A preempted sequence may be back already, with a chunk: what it shares with others costs it no block.
            prefilled = {chunk.seq for chunk in chunks}
            decodes = [seq for seq in decodes if seq.status is Status.RUNNING and seq not in prefilled]
        if chunks and not any(seq.streamed or seq.arrival_time <= horizon for seq in decodes):
            # A decode of more sequences takes little longer: where none is waited for, it comes when all have begun.
            decodes = []
        last = [chunk.seq for chunk in chunks if chunk.end == chunk.seq.num_tokens]
        return Batch(chunks, decodes, last + decodes)

    def advance(self, batch: Batch) -> None:
        """Enters that the batch just scheduled is being computed."""
        self.num_steps += 1
        for chunk in batch.chunks:
            chunk.seq.num_computed = chunk.end
        for seq in batch.decodes:
            seq.num_computed += 1
        for seq in batch.sampled:
            seq.num_pending += 1

    def update(self, batch: Batch, tokens: list[int]) -> list[int]:
        """Enters a step's tokens, one for each of `batch.sampled`; −1 says that its logits were not numbers.

        Those that end by a token or by their length end here. → the places in `batch.sampled` whose tokens count; those
        of sequences that ended or were preempted meanwhile do not.
        """
        running, block_size = Status.RUNNING, self.cache.block_size
        num_prefilled = len(batch.sampled) - len(batch.decodes)
        taken, num_errors = [], 0
        for i, (seq, token, preemptions) in enumerate(zip(batch.sampled, tokens, batch.preemptions, strict=True)):
            if seq.status is not running or seq.num_preemptions != preemptions:
                continue
            taken.append(i)
            seq.num_pending -= 1
            if token < 0:
                self.finish(seq, "error")
                num_errors += 1
                continue
            computed = len(seq.token_ids)
            # Others may share these blocks only now: had they held NaN, so would the logits.
            if i < num_prefilled or computed % block_size == 0 or computed == seq.num_prompt:
                self.cache.commit(seq.id, seq.token_ids, computed)
            seq.token_ids.append(token)
            if token in seq.stop_token_ids:
                self.finish(seq, "stop")
            elif len(seq.token_ids) >= seq.max_length:
                self.finish(seq, "length")
        self.num_generated_tokens += len(taken) - num_errors
        return taken

    # --- its own steps ---

    def _aligned_decodes(self, horizon: float) -> list[Sequence]:
        """The sequences with one token to compute: all, or those aligned with the shortest and those that are aged."""
        # One whose last token is pending has nothing left to compute.
        decodes = [seq for seq in self.running if seq.num_uncomputed == 1 and seq.num_tokens < seq.max_length]
        if self.policy.window is None or not decodes:
            return decodes
        longest = min(seq.num_tokens for seq in decodes) + self.policy.window
        return [seq for seq in decodes if seq.num_tokens <= longest or seq.arrival_time <= horizon]

    def _make_room(self, decodes: list[Sequence]) -> bool:
        """A place in the cache for each sequence's token, oldest first; False where the newest had to be preempted."""
        block_size = self.cache.block_size
        for seq in decodes:
            if seq.num_tokens > len(seq.block_table) * block_size and not self.cache.append(seq.id):
                self.preempt(self.running[-1])
                return False
        return True

    def _prefill_budget(self, begun: list[Sequence]) -> int:
        """Prompt tokens of the step. Where most requests wait for their first token, a larger step serves them sooner
        than it keeps the others waiting; where no token is read before the last, nobody is kept waiting."""
        most_wait = len(begun) + len(self.waiting) > len(self.running) - len(begun)
        if most_wait or not any(seq.streamed for seq in self.running):
            return self.max_prefill_tokens
        return self.interleaved_prefill_tokens

    def _prefill_aged(self, begun: list[Sequence], horizon: float, budget: int) -> tuple[list[Chunk], int | None]:
        """Chunks of aged requests in order of arrival, later arrivals preempted where they are in the way.

        → the chunks, and the id of the first aged request that gets nothing: none that came after it may be served
        """
        chunks: list[Chunk] = []
        for seq in self._aged_unprefilled(begun, horizon):
            if budget == 0 or (seq.status is Status.WAITING and not self._admit_over_later(seq)):
                return chunks, seq.id
            budget -= self._add_chunk(chunks, seq, budget)
        return chunks, None

    def _aged_unprefilled(self, begun: list[Sequence], horizon: float) -> Iterator[Sequence]:
        """Aged requests with more than a token to compute, by arrival; the caller may admit and preempt meanwhile."""
        aged = deque(seq for seq in begun if seq.arrival_time <= horizon)
        while True:
            while aged and aged[0].status is not Status.RUNNING:
                aged.popleft()
            oldest = self.waiting.oldest()
            if oldest is not None and oldest.arrival_time > horizon:
                oldest = None
            if aged and (oldest is None or aged[0].id < oldest.id):
                yield aged.popleft()
            elif oldest is not None:
                yield oldest
            else:
                return

    def _admit_over_later(self, seq: Sequence) -> bool:
        while len(self.running) >= self.max_batch_size or not self._admit(seq, leave_free=0):
            if not self.running or self.running[-1].id < seq.id:
                return False
            self.preempt(self.running[-1])
        return True

    def _prefill_by_policy(
        self, chunks: list[Chunk], begun: list[Sequence], horizon: float, budget: int, *, admit: bool
    ) -> None:
        """Chunks of what is begun, then, if asked to, of what the policy admits, as far as the budget goes."""
        younger = [seq for seq in begun if seq.arrival_time > horizon and seq.status is Status.RUNNING]
        for seq in sorted(younger, key=self.policy.order):
            if budget:
                budget -= self._add_chunk(chunks, seq, budget)
        while admit and budget and len(self.running) < self.max_batch_size:
            seq = self.waiting.best()
            # A free block for each that may need one: without it an admission is soon undone by a preemption.
            if seq is None or not self._admit(seq, leave_free=sum(map(self._may_grow, self.running))):
                break
            budget -= self._add_chunk(chunks, seq, budget)

    def _may_grow(self, seq: Sequence) -> bool:
        """Whether the sequence may need another block; its last token is never computed."""
        return len(seq.block_table) * self.cache.block_size < seq.max_length - 1

    def _admit(self, seq: Sequence, *, leave_free: int) -> bool:
        # A prompt's log-probabilities need its logits, so all of it is computed.
        reuse = seq.params.prompt_logprobs is None
        cached = self.cache.alloc(seq.id, seq.token_ids, reuse=reuse, leave_free=leave_free)
        if cached is None:
            return False
        self.waiting.remove(seq)
        seq.status, seq.num_computed = Status.RUNNING, cached
        seq.block_table = self.cache.block_table(seq.id)
        insort(self.running, seq, key=attrgetter("id"))
        if seq.num_cached is None:
            seq.num_cached = cached
            self.num_prompt_tokens += seq.num_prompt
            self.num_cached_tokens += cached
        return True

    @staticmethod
    def _add_chunk(chunks: list[Chunk], seq: Sequence, budget: int) -> int:
        length = min(seq.num_uncomputed, budget)
        chunks.append(Chunk(seq, seq.num_computed, length))
        return length
