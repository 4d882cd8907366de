"""What cannot be served is refused by its value and the limit, and harms nobody."""

from __future__ import annotations

import math
import shutil

import pytest
from microvllm import KernelSet, SamplingParams

from ..small_engine import assert_at_rest, finish, ids
from ..small_models import MAX_LENGTH, VOCAB_SIZE
from .engines import make_engine


class TestBadInput:
    @pytest.mark.parametrize(
        "prompt, options, message",
        [
            ("", {}, "prompt '' is empty: it has no tokens"),
            ([], {}, r"prompt \[\] is empty"),
            (
                [1] * MAX_LENGTH,
                {},
                f"a prompt of {MAX_LENGTH} tokens is too long: .* at most max_model_len={MAX_LENGTH}",
            ),
            ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} of the prompt must be an integer from 0 to {VOCAB_SIZE - 1}"),
            ([1, -1], {}, "token id -1 of the prompt"),
            ([1, "a"], {}, "token id 'a' of the prompt"),
            (3.5, {}, "a prompt is a text, a list of token ids or a chat, not 3.5"),
            (None, {}, "a prompt is a text, a list of token ids or a chat, not None"),
            ("a", {"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
            ("a", {"temperature": -1}, "temperature=-1 must be a number at least 0"),
            ("a", {"temprature": 1}, "unknown option temprature=1; the options are max_tokens, "),
            ("a", {"stop_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} of stop_token_ids"),
            ("a", {"logit_bias": {VOCAB_SIZE: 1.0}}, f"token id {VOCAB_SIZE} of logit_bias"),
            ("a", {"params": SamplingParams(), "max_tokens": 3}, "params or options, not both: max_tokens"),
            ("a", {"params": {"max_tokens": 3}}, r"params must be SamplingParams, not \{'max_tokens': 3\}"),
            ([{"role": "user"}], {}, "a message must have a role and a content"),
        ],
    )
    def test_it_is_refused_by_value_and_limit_and_a_running_request_goes_on(self, folder, prompt, options, message):
        engine = make_engine(folder)
        (undisturbed,) = engine.generate(ids(20), max_tokens=10)
        request = engine.add_request(ids(20), max_tokens=10)
        engine.step(), engine.step()
        before = engine.stats()
        for call in (engine.add_request, engine.stream_generate, lambda p, **o: engine.generate(["fine", p], **o)):
            with pytest.raises(ValueError, match=message):
                call(prompt, **options)
        assert engine.stats() == before
        assert finish(engine)[request].token_ids == undisturbed.token_ids
        assert_at_rest(engine)

    def test_more_than_the_cache_can_ever_hold_is_refused_and_what_just_fits_is_served(self, folder):
        engine = make_engine(folder, num_blocks=3)
        with pytest.raises(
            ValueError, match=r"a prompt of 30 tokens and 20 more need 4 blocks of 16 .* the cache has 3"
        ):
            engine.generate([ids(3), ids(30)], max_tokens=20)
        assert_at_rest(engine)
        # The last token is returned and needs no place.
        assert len(engine.generate(ids(30), max_tokens=19)[0].token_ids) == 19

    def test_the_number_of_params(self, engine):
        with pytest.raises(ValueError, match="2 prompts need as many params, or one for all; there are 3"):
            engine.generate(["a", "b"], [SamplingParams()] * 3)

    @pytest.mark.parametrize("prompts", [None, 5, {"a": 1}])
    def test_prompts_that_are_none(self, engine, prompts):
        with pytest.raises(ValueError, match="prompts must be"):
            engine.generate(prompts)

    @pytest.mark.parametrize(
        "prompt, options, message",
        [
            ("a text", {}, "this checkpoint has no tokenizer: give the prompt as token ids"),
            ([{"role": "user", "content": "a"}], {}, "this checkpoint has no tokenizer"),
            ([1], {"stop": "x"}, r"stop=\('x',\) needs a tokenizer, and this checkpoint has none"),
        ],
    )
    def test_text_without_a_tokenizer(self, reference, prompt, options, message):
        engine = make_engine(reference[1])
        with pytest.raises(ValueError, match=message):
            engine.add_request(prompt, **options)
        (output,) = engine.generate(ids(3), max_tokens=2)
        assert (len(output.token_ids), output.text) == (2, "")

    def test_a_chat_without_a_template(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "model")
        (copy / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="the model has no chat template"):
            make_engine(copy).generate([{"role": "user", "content": "a"}])

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"max_batchsize": 3}, "unknown option max_batchsize=3; the options are max_batch_size, max_model_len"),
            ({"max_batch_size": 0}, "max_batch_size=0 must be an integer of at least 1"),
            ({"block_size": 8}, "block_size=8 must be an integer from 16 to 256"),
            ({"block_size": 257}, "block_size=257 must be an integer from 16 to 256"),
            ({"num_blocks": 0}, "num_blocks=0 must be an integer of at least 1"),
            (
                {"max_model_len": MAX_LENGTH + 1},
                f"max_model_len={MAX_LENGTH + 1} must be at most the model's {MAX_LENGTH}",
            ),
            ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 must be a number over 0 and at most 1"),
            ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' must be a number over 0 and at most 1"),
            ({"max_model_len": 1}, "max_model_len=1 must be an integer of at least 2"),
            ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no' must be one of True, False"),
            ({"async_scheduling": "x"}, "async_scheduling='x' must be one of True, False, None"),
            ({"device": None}, "device=None must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
            ({"kernels": "triton"}, "kernels='triton' must be a KernelSet"),
            (
                {"kernels": KernelSet.default("cpu").replace(prefill_attention="flash_attn")},
                "prefill_attention='flash_attn' cannot run on cpu: flash-attn needs a CUDA GPU; choose another, such "
                "as prefill_attention='reference'",
            ),
            ({"age_bound": None}, "age_bound=None must be a number of at least 0"),
            ({"age_bound": -1}, "age_bound=-1 must be a number of at least 0"),
            ({"age_bound": math.nan}, "age_bound=nan must be a number of at least 0"),
            ({"policy": "lifo"}, "policy='lifo' is not known; the policies are fcfs, sjf, sjf_aligned"),
            ({"dtype": "int8"}, "dtype='int8' must be one of auto, float32, float16, bfloat16"),
            ({"load_format": "pickle"}, "load_format='pickle' must be one of auto, dummy"),
            ({"device": "tpu"}, "device='tpu' must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ],
    )
    def test_the_engines_own_options(self, folder, options, message):
        with pytest.raises(ValueError, match=message):
            make_engine(folder, **options)

    def test_kernels_of_another_engine(self, engine):
        with pytest.raises(ValueError, match="kernels='triton' must be a KernelSet"):
            engine.with_kernels("triton")
        elsewhere = engine.kernels.replace(prefill_attention="flash_attn")
        with pytest.raises(ValueError, match="prefill_attention='flash_attn' cannot run on cpu"):
            engine.with_kernels(elsewhere)
