import math

import pytest
import torch
from microvllm.model.config import ModelConfig
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": [3, 5],
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_reads_every_field():
    config = ModelConfig.from_hf(BASE | {"rope_theta": 5e5, "tie_word_embeddings": True})
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("qwen2", 100, 64)
    assert (config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads) == (128, 3, 4, 2)
    assert (config.head_dim, config.rms_norm_eps, config.max_length) == (16, 1e-6, 4096)
    assert (config.tied_head, config.dtype, config.eos_token_ids) == (True, torch.bfloat16, {3, 5})
    assert (config.qkv_bias, config.qk_norm, config.rope.theta, config.rope.scaling) == (True, False, 5e5, "none")
    assert config.kv_bytes_per_token(torch.float16) == 2 * 3 * 2 * 16 * 2


def test_optional_fields():
    llama = {
        key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "torch_dtype", "eos_token_id")
    }
    config = ModelConfig.from_hf(llama | {"architectures": ["LlamaForCausalLM"], "head_dim": 32, "dtype": "float16"})
    assert (config.num_kv_heads, config.head_dim, config.dtype, config.eos_token_ids) == (
        4,
        32,
        torch.float16,
        frozenset(),
    )
    assert (config.qkv_bias, config.qk_norm, config.tied_head, config.rope.theta) == (False, False, False, 10000.0)
    assert ModelConfig.from_hf(BASE | {"architectures": ["Qwen3ForCausalLM"], "eos_token_id": 9}).eos_token_ids == {9}


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", **YARN}])
def test_both_spellings_of_rope(scaling):
    new = BASE | {"rope_parameters": {"rope_theta": 1e6, **scaling}}
    old = BASE | {"rope_theta": 1e6, "rope_scaling": scaling}
    oldest = BASE | {"rope_theta": 1e6, "rope_scaling": {"type": scaling["rope_type"], **scaling} | {"rope_type": None}}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old) == ModelConfig.from_hf(oldest)
    assert ModelConfig.from_hf(new).rope.theta == 1e6
    plain = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}  # the new one, and the old one added to it
    assert ModelConfig.from_hf(BASE | plain | {"rope_scaling": scaling}) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(new).rope.scaling == scaling["rope_type"]


def test_scaling_lengthens_the_context():
    assert ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "yarn", **YARN}}).max_length == 8192
    assert ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "yarn", "factor": 2.0}}).max_length == 8192
    assert ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}}).max_length == 4096


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architecture Qwen3MoeForCausalLM is not supported"),
        ({"architectures": None}, r"architecture \(none\)"),
        ({"use_sliding_window": True, "sliding_window": 1024}, "sliding-window attention .sliding_window=1024"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, "sliding_window=8"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number of at least 1, and it is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor must be a number of at least 1, and it is None"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no 'factor'"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor 4.0 must be under",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias is not supported in llama"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "a awq-quantized checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads evenly"),
        ({"num_attention_heads": 0}, "has no 0 attention heads"),
        ({"num_attention_heads": "4"}, "has no '4' attention heads"),
        ({"architectures": "Qwen2ForCausalLM"}, "architecture 'Qwen2ForCausalLM' is not supported"),
        ({"architectures": [["Qwen2ForCausalLM"]]}, "is not supported; supported are Qwen2ForCausalLM"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, and it is 'yarn'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": math.inf}}, "factor must be a number .* it is inf"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "x"}}, "beta_fast must be a number .* it is 'x'"),
        ({"rope_theta": math.nan}, "rope_theta must be a number of at least 0, and it is nan"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer, and it is None"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number of at least 0, and it is None"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number of at least 0, and it is -1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number of at least 0, and it is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, and it is 'false'"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or several, and it is 'x'"),
        ({"eos_token_id": [2, {}]}, r"eos_token_id must be a token id or several, and it is \[2, {}\]"),
        ({"torch_dtype": ["float32"]}, r"dtype \['float32'\] is not supported"),
        ({"head_dim": 15}, "head_dim is 15: odd"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, and it is -1"),
        ({"num_hidden_layers": 2.5}, "num_layers must be a positive integer"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(BASE | changes)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "max_position_embeddings", "rms_norm_eps"],
)  # fmt: skip
def test_names_the_missing_key(key):
    with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
        ModelConfig.from_hf({name: value for name, value in BASE.items() if name != key})


def test_an_unused_sliding_window_is_no_matter():
    ModelConfig.from_hf(BASE | {"use_sliding_window": False, "sliding_window": 1024})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "high_freq_factor": 8.0},
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", **YARN, "truncate": False},
        {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", **YARN, "attention_factor": 0.75},
        {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"rope_type": "yarn", **YARN, "mscale": 0.7},
        {"rope_type": "yarn", **YARN, "factor": 1.0},
    ],
    ids=lambda rope: ",".join(f"{key}={value}" for key, value in rope.items() if key not in YARN),
)
@pytest.mark.parametrize("theta, head_dim", [(1e4, 64), (1e6, 128)])
def test_rope_is_that_of_transformers(rope, theta, head_dim):
    theirs = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **rope},
    )
    expected = LlamaRotaryEmbedding(theirs)
    ours = ModelConfig.from_hf(theirs.to_dict())
    assert ours.max_length == 8192
    # Two roundings of float32: the formulas are arranged differently.
    torch.testing.assert_close(ours.rope.inverse_frequencies(head_dim), expected.inv_freq, rtol=3e-7, atol=0)
    assert ours.rope.attention_factor == pytest.approx(expected.attention_scaling, rel=1e-12)

    cos, sin = ours.rope.table(head_dim, 50, torch.device("cpu"))
    their_cos, their_sin = expected(torch.zeros(1), torch.arange(50)[None])
    torch.testing.assert_close(torch.cat((cos, cos), -1), their_cos[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat((sin, sin), -1), their_sin[0], rtol=0, atol=2e-5)
