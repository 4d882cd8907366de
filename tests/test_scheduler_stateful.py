"""Random lives of the scheduler and of the cache manager; what must hold is checked after every event."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from microvllm.engine.cache_manager import KVCacheManager
from microvllm.engine.sequence import Sequence

from .scheduling import CacheContents, Simulation, examples, next_token

# Two texts that begin alike: most prompts are the beginning of one of them and a tail, so prefixes are often shared.
TEXTS = ([0] * 40, [0, 0, 0, 0] + [1, 0] * 18)
PROMPTS = st.tuples(st.sampled_from(TEXTS), st.integers(1, 30), st.lists(st.integers(0, 2), max_size=3)).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2]
)
HASHES = st.sampled_from([hash, lambda key: 0, lambda key: hash(key) % 3])
POLICIES = st.sampled_from(
    [("fcfs", None), ("sjf", None)] + [("sjf_aligned", window) for window in (None, 0, 1, 5)],
)


class CacheLife(RuleBasedStateMachine):
    """Sequences come, are computed, grow and go, in any order that the interface allows."""

    sequences = Bundle("sequences")

    @initialize(
        num_blocks=st.integers(1, 14), block_size=st.integers(1, 5), hash_function=HASHES, caching=st.booleans()
    )
    def build(self, num_blocks, block_size, hash_function, caching):
        self.cache = KVCacheManager(num_blocks, block_size, prefix_caching=caching, hash_function=hash_function)
        self.contents = CacheContents(block_size)
        self.texts: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.last_id = 0

    @rule(target=sequences, prompt=PROMPTS, reuse=st.booleans(), leave_free=st.integers(0, 3))
    def alloc(self, prompt, reuse, leave_free):
        self.last_id += 1
        available, needed = self.cache.num_available, self.cache.blocks_for(len(prompt))
        cached = self.cache.alloc(self.last_id, prompt, reuse=reuse, leave_free=leave_free)
        if cached is None:
            assert needed + leave_free > available == self.cache.num_available
        else:
            assert cached % self.cache.block_size == 0 and cached < len(prompt)
            assert cached == 0 or (reuse and self.cache.prefix_caching)
            assert available - needed <= self.cache.num_available >= leave_free
            self.texts[self.last_id], self.computed[self.last_id] = prompt, cached
        return self.last_id

    @rule(seq=sequences, length=st.integers(1, 20))
    def compute(self, seq, length):
        if seq in self.texts:
            text, table, start = self.texts[seq], self.cache.block_table(seq), self.computed[seq]
            end = min(start + length, len(text))
            others = {block for other in self.texts if other != seq for block in self.cache.block_table(other)}
            assert others.isdisjoint(table[start // self.cache.block_size :]), "a shared block would be written"
            self.contents.write(table, text, start, end)
            self.computed[seq] = end
            self.cache.commit(seq, text, end)

    @rule(seq=sequences)
    def grow(self, seq):
        if seq in self.texts and self.computed[seq] == len(self.texts[seq]):
            text, available = self.texts[seq], self.cache.num_available
            needs_block = len(text) % self.cache.block_size == 0
            if needs_block:
                assert self.cache.append(seq) == (available > 0)
                assert self.cache.num_available == max(0, available - 1)
            if not needs_block or available:
                text.append(next_token(text))

    @rule(seq=consumes(sequences))
    def free(self, seq):
        if seq in self.texts:
            self.cache.free(seq)
            del self.texts[seq], self.computed[seq]

    @invariant()
    def every_block_has_one_state_and_every_slot_its_text(self):
        self.cache.check()
        for seq, text in self.texts.items():
            assert self.contents.hold(self.cache.block_table(seq), text, self.computed[seq])
        tables = [self.cache.block_table(seq) for seq in self.texts]
        assert self.cache.num_used == len({block for table in tables for block in table})

    def teardown(self):
        for seq in list(getattr(self, "texts", ())):
            self.free(seq)
        if hasattr(self, "cache"):
            self.cache.check()
            assert self.cache.num_available == self.cache.num_blocks


class SchedulerLife(RuleBasedStateMachine):
    """Requests arrive, are aborted and preempted at any moment; at last all that is left is served to the end."""

    @initialize(
        num_blocks=st.integers(1, 16),
        block_size=st.integers(1, 5),
        policy=POLICIES,
        max_batch_size=st.integers(1, 6),
        max_prefill_tokens=st.sampled_from([1, 2, 3, 7, 16, 1000]),
        interleaved_prefill_tokens=st.sampled_from([1, 3, 1000]),
        age_bound=st.sampled_from([0, 1, 3, 10, math.inf]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        hash_function=HASHES,
        seconds_a_step=st.sampled_from([0, 1, 1, 2]),
        ahead=st.booleans(),
    )
    def build(self, policy, seconds_a_step, **settings):
        self.simulation = Simulation(policy=policy[0], window=policy[1], **settings)
        self.seconds_a_step = seconds_a_step

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 20),
        copies=st.sampled_from([1, 1, 1, 2, 4]),
        stop=st.sampled_from([(), (), (2,)]),
        streamed=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def arrive(self, prompt, max_tokens, copies, stop, streamed, prompt_logprobs):
        cache = self.simulation.cache
        fits = len(prompt) + max_tokens - 1 <= cache.num_blocks * cache.block_size
        for _ in range(copies):
            if fits:
                self.simulation.add(prompt, max_tokens, stop=stop, streamed=streamed, prompt_logprobs=prompt_logprobs)
            else:
                with pytest.raises(ValueError, match="blocks"):
                    self.simulation.add(prompt, max_tokens)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds):
        self.simulation.now += seconds

    @rule()
    def step(self):
        self._step()

    @rule(times=st.integers(2, 8))
    def several_steps(self, times):
        for _ in range(times):
            self._step()

    @rule(data=st.data())
    def step_with_failures(self, data):
        self._step(fails=lambda: data.draw(st.sampled_from([False, False, True])))

    @rule(data=st.data(), event=st.sampled_from(["abort", "preempt"]))
    def step_with_an_event_while_it_is_computed(self, data, event):
        self._step(meanwhile=lambda: getattr(self, event)(data))

    @precondition(lambda self: self.simulation.unfinished)
    @rule(data=st.data())
    def abort(self, data):
        if self.simulation.unfinished:
            self.simulation.scheduler.finish(self._any(data, self.simulation.unfinished), "abort")

    @precondition(lambda self: self.simulation.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        if self.simulation.scheduler.running:
            self.simulation.scheduler.preempt(self._any(data, self.simulation.scheduler.running))

    def _step(self, **events):
        self.simulation.step(**events)
        self.simulation.now += self.seconds_a_step

    @staticmethod
    def _any(data, sequences: list[Sequence]) -> Sequence:
        return sequences[data.draw(st.integers(0, len(sequences) - 1))]

    @invariant()
    def the_books_agree(self):
        self.simulation.check_books()

    def teardown(self):
        if hasattr(self, "simulation"):
            left = self.simulation.unfinished
            # Each step computes a token at least; what a preemption loses is bounded by what the older ones gain.
            bound = 10 + sum(seq.max_length for seq in left) * (1 + len(left))
            self.simulation.run(bound, self.seconds_a_step)
            self.simulation.check_at_rest()


TestCacheLife = CacheLife.TestCase
TestCacheLife.settings = examples(quick=150, thorough=10_000)
TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = examples(quick=500, thorough=20_000)


@examples(quick=60, thorough=3000)
@given(
    requests=st.lists(st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=12),
    num_blocks=st.integers(9, 24),
    policy=POLICIES,
    max_prefill_tokens=st.sampled_from([3, 16, 1000]),
)
def test_a_constant_hash_changes_no_decision(requests, num_blocks, policy, max_prefill_tokens):
    def decisions(hash_function):
        simulation = Simulation(
            num_blocks=num_blocks,
            block_size=5,
            policy=policy[0],
            window=policy[1],
            max_batch_size=4,
            max_prefill_tokens=max_prefill_tokens,
            age_bound=20,
            hash_function=hash_function,
        )
        steps = []

        def step():
            batch = simulation.step()
            simulation.now += 1
            tables = {s.id: list(s.block_table) for s in simulation.scheduler.running}
            chunks = [(chunk.seq.id, chunk.start, chunk.length) for chunk in batch.chunks]
            steps.append((chunks, [seq.id for seq in batch.decodes], tables))

        for prompt, max_tokens, steps_between in requests:
            simulation.add(prompt, max_tokens)
            for _ in range(steps_between):
                step()
        while simulation.scheduler.has_work:
            step()
        return steps, [(seq.num_cached, seq.token_ids, seq.num_preemptions) for seq in simulation.requests]

    assert decisions(hash) == decisions(lambda key: 0)
