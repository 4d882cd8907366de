"""Whole answers: prompts of every kind, in order, and the draws that their seeds decide."""

from __future__ import annotations

from itertools import product

import pytest
from microvllm import SamplingParams

from ..small_engine import assert_at_rest, finish, ids
from .engines import make_engine


class TestGenerate:
    chat = ({"role": "user", "content": "hi"},)

    def test_a_single_string(self, engine):
        (output,) = engine.generate("hello", max_tokens=5)
        assert (output.prompt, len(output.token_ids), output.finish_reason) == ("hello", 5, "length")
        assert output.text == engine.tokenizer.decode(output.token_ids)

    def test_texts_ids_and_chats_give_what_their_tokens_give_in_order(self, engine):
        chat = [dict(message) for message in self.chat]
        rendered = "[user]hi[assistant]"
        prompts = ["hello", ids(20), chat, "hello", rendered]
        outputs = engine.generate(prompts, max_tokens=6)
        assert [output.prompt for output in outputs] == prompts
        assert outputs[2].token_ids == outputs[4].token_ids
        assert outputs[2].usage.prompt_tokens == len(rendered)
        for prompt, output in zip(["hello", ids(20), rendered], outputs, strict=False):
            as_ids = prompt if isinstance(prompt, list) else engine.tokenizer.encode(prompt)
            assert engine.generate(as_ids, max_tokens=6)[0].token_ids == output.token_ids
        assert len({tuple(output.token_ids) for output in outputs}) == 3

    def test_one_chat_or_one_list_of_ids_is_one_prompt(self, engine):
        assert len(engine.generate(ids(3), max_tokens=1)) == 1
        assert len(engine.generate([{"role": "user", "content": "hi"}], max_tokens=1)) == 1
        assert engine.generate([]) == []

    def test_items_keep_equal_prompts_apart(self, engine):
        params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=2), SamplingParams(max_tokens=4)]
        outputs = engine.generate(["same", "same", "other"], params)
        assert outputs.items() == [(o.prompt, o.text) for o in outputs]
        assert [prompt for prompt, _ in outputs.items()] == ["same", "same", "other"]
        assert [len(o.token_ids) for o in outputs] == [4, 2, 4]

    def test_many_more_prompts_than_run_at_once_come_back_in_order(self, folder):
        engine = make_engine(folder, max_batch_size=3)
        prompts = [ids(3 + i % 5, seed=i) for i in range(20)]
        lengths = [1 + i % 7 for i in range(20)]
        together = engine.generate(prompts, [SamplingParams(max_tokens=n) for n in lengths])
        assert [o.prompt for o in together] == prompts
        for prompt, length, output in zip(prompts, lengths, together, strict=True):
            assert output.token_ids == engine.generate(prompt, max_tokens=length)[0].token_ids
        assert_at_rest(engine)

    @pytest.mark.parametrize("streams", [False, True])
    def test_answers_wait_for_all_prompts_unless_somebody_reads_along(self, folder, monkeypatch, streams):
        engine, batches = make_engine(folder, max_prefill_tokens=16, interleaved_prefill_tokens=16), []
        schedule = engine.scheduler.schedule
        monkeypatch.setattr(engine.scheduler, "schedule", lambda now: batches.append(schedule(now)) or batches[-1])
        if streams:
            engine.add_request(ids(5), max_tokens=20)
            engine.step()
        engine.generate([ids(12), ids(13), ids(14)], max_tokens=4)
        assert any(batch.chunks and batch.decodes for batch in batches) == streams


class TestSeeds:
    mine = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, seed=5)
    others = tuple(
        SamplingParams(max_tokens=20, temperature=t, seed=s, top_k=k)
        for s, (t, k) in enumerate(product((0.0, 0.7, 2.0), (0, 5)))
    )

    def test_tokens_depend_on_the_seed_and_the_text_alone(self, folder):
        prompt = ids(20)
        alone = make_engine(folder).generate(prompt, self.mine)[0].token_ids
        assert len(set(alone)) > 8
        batch = [ids(4 + 3 * i, seed=i) for i in range(7)]
        for place in (0, 4, 7):
            engine = make_engine(folder)
            params = [*self.others, self.mine]
            outputs = engine.generate(
                [*batch[:place], prompt, *batch[place:]], [*params[:place], self.mine, *params[place:]]
            )
            assert outputs[place].token_ids == alone
        assert make_engine(folder, max_prefill_tokens=7).generate(prompt, self.mine)[0].token_ids == alone
        for step in (1, 2, 6, 15):
            engine = make_engine(folder)
            request = engine.add_request(prompt, self.mine)

            def preempt(now: int, engine=engine, step=step) -> None:
                if now == step:
                    engine.scheduler.preempt(engine.scheduler.running[0])

            assert finish(engine, preempt)[request].token_ids == alone
            assert engine.stats().preemptions == 1

    def test_without_a_seed_each_request_draws_its_own_and_the_engines_seed_repeats_them(self, folder):
        def texts(seed: int) -> list[list[int]]:
            outputs = make_engine(folder, seed=seed).generate([ids(5)] * 3, max_tokens=8, temperature=1.0)
            return [output.token_ids for output in outputs]

        first = texts(0)
        assert len(set(map(tuple, first))) == 3
        assert texts(0) == first != texts(1)
