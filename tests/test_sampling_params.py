import math
import re

import pytest
from microvllm.model.sampling_params import MAX_LOGPROBS, MAX_TOP_K, SamplingParams


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
        ({"max_tokens": 1.0}, "max_tokens=1.0 must be an integer of at least 1"),
        ({"max_tokens": True}, "max_tokens=True must be an integer of at least 1"),
        ({"max_tokens": None}, "max_tokens=None must be an integer of at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number at least 0 and at most 100000"),
        ({"temperature": math.nan}, "temperature=nan must be a number at least 0 and at most 100000"),
        ({"temperature": math.inf}, "temperature=inf must be a number at least 0 and at most 100000"),
        ({"temperature": 1e39}, "temperature=1e+39 must be a number at least 0 and at most 100000"),
        ({"temperature": "hot"}, "temperature='hot' must be a number at least 0 and at most 100000"),
        ({"temperature": True}, "temperature=True must be a number at least 0 and at most 100000"),
        ({"temperature": 10**400}, f"temperature={10**400} must be a number at least 0 and at most 100000"),
        ({"top_k": -1}, f"top_k=-1 must be an integer from 0 to {MAX_TOP_K}"),
        ({"top_k": 1.5}, f"top_k=1.5 must be an integer from 0 to {MAX_TOP_K}"),
        ({"top_k": 10**30}, f"top_k={10**30} must be an integer from 0 to {MAX_TOP_K}"),
        ({"top_p": 0}, "top_p=0 must be a number over 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01 must be a number over 0 and at most 1"),
        ({"min_p": -0.01}, "min_p=-0.01 must be a number at least 0 and at most 1"),
        ({"min_p": 2}, "min_p=2 must be a number at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a number at least 0.01 and at most 100"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty=1e-38 must be a number at least 0.01 and at most 100"),
        ({"presence_penalty": -2.1}, "presence_penalty=-2.1 must be a number at least -2 and at most 2"),
        ({"frequency_penalty": 3}, "frequency_penalty=3 must be a number at least -2 and at most 2"),
        ({"logit_bias": [1]}, "logit_bias=[1] must map token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "a token id of logit_bias='a' must be an integer of at least 0"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias=-1 must be an integer of at least 0"),
        ({"logit_bias": {5: 101}}, "logit_bias[5]=101 must be a number at least -100 and at most 100"),
        ({"logit_bias": {5: None}}, "logit_bias[5]=None must be a number at least -100 and at most 100"),
        ({"seed": 1 << 63}, f"seed={1 << 63} must be an integer from {-(1 << 63)} to {(1 << 63) - 1}"),
        ({"seed": "x"}, f"seed='x' must be an integer from {-(1 << 63)} to {(1 << 63) - 1}"),
        ({"min_tokens": -1}, "min_tokens=-1 must be an integer from 0 to 256"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4 must be an integer from 0 to 3"),
        ({"stop": ""}, "stop='' must be a string or several, none of them empty"),
        ({"stop": ["a", ""]}, "stop=['a', ''] must be a string or several, none of them empty"),
        ({"stop": ["a", 1]}, "stop=['a', 1] must be a string or several, none of them empty"),
        ({"stop": None}, "stop=None must be a string or several, none of them empty"),
        ({"stop_token_ids": 7}, "stop_token_ids=7 must be a list of token ids"),
        ({"stop_token_ids": [-1]}, "a token of stop_token_ids=-1 must be an integer of at least 0"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"logprobs": -1}, f"logprobs=-1 must be an integer from 0 to {MAX_LOGPROBS}"),
        ({"logprobs": True}, f"logprobs=True must be an integer from 0 to {MAX_LOGPROBS}"),
        ({"prompt_logprobs": 101}, f"prompt_logprobs=101 must be an integer from 0 to {MAX_LOGPROBS}"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 5.0},
        {"top_k": 0},
        {"top_k": MAX_TOP_K},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.5},
        {"presence_penalty": -2},
        {"frequency_penalty": 2},
        {"logit_bias": {0: -100, 7: 100.0}},
        {"seed": -(1 << 63)},
        {"seed": (1 << 63) - 1},
        {"max_tokens": 3, "min_tokens": 3},
        {"ignore_eos": True},
        {"logprobs": 0},
        {"prompt_logprobs": MAX_LOGPROBS},
    ],
)
def test_the_bounds_themselves_are_allowed(options):
    params = SamplingParams.of(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


def test_the_defaults_are_greedy_and_report_nothing():
    params = SamplingParams()
    assert (params.temperature, params.logprobs, params.prompt_logprobs, params.stop) == (0.0, None, None, ())


def test_one_stop_string_or_several_become_a_tuple():
    assert SamplingParams(stop="a b").stop == ("a b",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown option temprature=1; the options are max_tokens, temperature, .*"):
        SamplingParams.of(temprature=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"logit_bias": {100: 1.0}}, "token id 100 of logit_bias must be under the vocabulary's size, 100"),
        ({"stop_token_ids": [3, 120]}, "token id 120 of stop_token_ids must be under the vocabulary's size, 100"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options).check_tokens(100)


def test_tokens_of_the_vocabulary_pass():
    SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[0, 99]).check_tokens(100)
