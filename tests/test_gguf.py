import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from microvllm.model import gguf as gguf_file
from microvllm.model.checkpoint import open_checkpoint
from microvllm.model.gguf import TENSOR_TYPES, read_header
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .checkpoints import make_model, needs_smollm2, write_gguf

# Where the float16 scales lie in a block that gguf cannot quantize; random bytes elsewhere are valid numbers.
SCALES = {
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
}


def read_all(opened):
    return {name: torch.cat([piece.clone() for piece in opened.read(name)]) for name in opened.shapes}


def encode(values, kind):
    """A matrix in a tensor type's bytes, or random ones of its shape."""
    if kind not in SCALES:
        return gguf.quants.quantize(values, kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (values.size // block, block_bytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = rng.uniform(0.001, 0.1, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(len(values), -1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_is_the_model_it_was_made_from(tmp_path, architecture, tied):
    model = make_model(architecture, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "model-q.gguf", model)
    opened, folder = open_checkpoint(tmp_path / "model-q.gguf"), open_checkpoint(tmp_path / "folder")
    assert opened.name == "model-q"
    assert opened.config == folder.config
    assert opened.shapes == folder.shapes
    expected = read_all(folder)
    for name, tensor in read_all(opened).items():
        assert torch.equal(tensor, expected[name]), name
    assert opened.tokenizer() is None


@pytest.mark.parametrize("kind", sorted(TENSOR_TYPES), ids=lambda kind: kind.name)
@pytest.mark.parametrize("piece_elements", [1, 1000, 1 << 20])
def test_every_tensor_type(tmp_path, monkeypatch, kind, piece_elements):
    monkeypatch.setattr(gguf_file, "PIECE_ELEMENTS", piece_elements)
    model = make_model("llama", hidden_size=256, head_dim=64, num_hidden_layers=1)
    values = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32)
    rows = np.random.default_rng(2).standard_normal((256, 256)).astype(np.float32)
    tensors = {
        "blk.0.ffn_up.weight": (encode(values, kind), kind),
        "blk.0.attn_q.weight": (encode(rows, kind), kind),
    }
    write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    opened = open_checkpoint(tmp_path / "m.gguf")
    actual = torch.cat(list(opened.read("model.layers.0.mlp.up_proj.weight")))
    expected = torch.from_numpy(gguf.quants.dequantize(*tensors["blk.0.ffn_up.weight"]))
    assert actual.shape == (48, 256) and expected.isfinite().all() and expected.std() > 0.01
    assert torch.equal(actual.float(), expected)

    # Row 2i + j of a head in the file is row j · 32 + i of it in transformers.
    actual = torch.cat(list(opened.read("model.layers.0.self_attn.q_proj.weight"))).float()
    in_file = torch.from_numpy(gguf.quants.dequantize(*tensors["blk.0.attn_q.weight"]))
    for row in range(256):
        head, pair, half = row // 64 * 64, row % 64 // 2, row % 2
        assert torch.equal(actual[head + half * 32 + pair], in_file[row]), row


@pytest.mark.parametrize(
    "kind, dtype",
    [(GGMLQuantizationType.F16, torch.float16), (GGMLQuantizationType.BF16, torch.bfloat16),
     (GGMLQuantizationType.Q8_0, torch.bfloat16)],
)  # fmt: skip
def test_dtype_is_that_of_most_weights(tmp_path, kind, dtype):
    model = make_model("llama", vocab_size=1024)
    embedding = model.state_dict()["model.embed_tokens.weight"].numpy()
    tensors = {name: (encode(embedding, kind), kind) for name in ("token_embd.weight", "output.weight")}
    write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    assert open_checkpoint(tmp_path / "m.gguf").config.dtype == dtype


def test_types_and_defaults_of_the_metadata(tmp_path):
    omit = (
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.rope.freq_base",
        "tokenizer.ggml.eos_token_id",
    )
    model = make_model("llama", num_key_value_heads=4)
    write_gguf(
        tmp_path / "m.gguf", model, metadata={"tokenizer.ggml.eot_token_id": 9, "llama.vocab_size": 96}, omit=omit
    )
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.eos_token_ids) == (4, 8, 10000.0, {9})
    assert config.rms_norm_eps == 1e-6  # float32 in the file, and not 9.99999997e-07


@pytest.mark.parametrize(
    "metadata, rope",
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0,
             "rope.scaling.yarn_beta_slow": 2.0},
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)  # fmt: skip
def test_rope_scaling(tmp_path, metadata, rope):
    model = make_model("qwen2")
    model.config.architectures = ["Qwen2ForCausalLM"]
    write_gguf(tmp_path / "m.gguf", model, metadata={f"qwen2.{key}": value for key, value in metadata.items()})
    expected = model.config.to_dict() | {"rope_parameters": {"rope_theta": 10000.0, **(rope or {})}}
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config == gguf_file.ModelConfig.from_hf(expected)
    assert config.rope.scaling == (rope or {"rope_type": "none"})["rope_type"]


def test_yarn_temperature_is_multiplied(tmp_path):
    metadata = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "a.gguf", make_model(), metadata=metadata)
    write_gguf(tmp_path / "b.gguf", make_model(), metadata=metadata | {"qwen2.rope.scaling.attn_factor": 0.5})
    plain, halved = (open_checkpoint(tmp_path / name).config.rope.attention_factor for name in ("a.gguf", "b.gguf"))
    assert plain == pytest.approx(1.1386294361, rel=1e-10)  # 0.1 · ln 4 + 1
    assert halved == pytest.approx(plain / 2, rel=1e-12)


def test_rope_freqs_are_llama3(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
    model = make_model("llama", head_dim=16, rope_parameters=rope)
    scaled = LlamaRotaryEmbedding(model.config).inv_freq
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / scaled).numpy()
    assert divisors.min() == 1 and divisors.max() == 8
    stored = {"rope_freqs.weight": (divisors, GGMLQuantizationType.F32)}
    write_gguf(tmp_path / "m.gguf", model, tensors=stored)
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.config.rope.scaling == "llama3" and len(opened.shapes) == 21
    torch.testing.assert_close(opened.config.rope.inverse_frequencies(16), scaled, rtol=3e-7, atol=0)
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "n.gguf", model, tensors=stored, metadata=scaling)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight together with RoPE scaling 'yarn'"):
        open_checkpoint(tmp_path / "n.gguf")
    write_gguf(tmp_path / "o.gguf", model, tensors={"rope_freqs.weight": (divisors[:3], GGMLQuantizationType.F32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has 3 divisors, and a head has 8 pairs"):
        open_checkpoint(tmp_path / "o.gguf")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"qwen2.expert_count": 8}, "GGUF metadata qwen2.expert_count = 8 is not supported"),
        ({"qwen2.attention.sliding_window": 4096}, "qwen2.attention.sliding_window = 4096 is not supported"),
        ({"qwen2.attention.causal": False}, "qwen2.attention.causal = False is not supported"),
        ({"qwen2.something_new": 1}, "qwen2.something_new = 1 is not supported"),
        ({"qwen2.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1 is not supported"),
        ({"qwen2.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope' is not supported in GGUF"),
        ({"qwen2.rope.dimension_count": 4}, "qwen2.rope.dimension_count = 4 must equal the head's 8 elements"),
        ({"qwen2.attention.value_length": 16}, "qwen2.attention.value_length = 16 must equal the head's 8 elements"),
        ({"qwen2.attention.head_count_kv": [2, 1]}, r"num_kv_heads must be a positive integer, and it is \[2, 1\]"),
        ({"general.architecture": "gemma3"}, "GGUF architecture 'gemma3' is not supported; supported are llama"),
        ({"split.count": 3}, "one of 3 parts: merge them with llama-gguf-split"),
    ],
)
def test_refuses_metadata(tmp_path, metadata, message):
    model = make_model()
    if "general.architecture" in metadata:
        model.config.model_type = metadata.pop("general.architecture")
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_features_that_are_switched_off_are_no_matter(tmp_path):
    metadata = {"qwen2.expert_count": 0, "qwen2.attention.sliding_window": 0, "qwen2.attention.causal": True}
    write_gguf(tmp_path / "m.gguf", make_model(), metadata=metadata)
    assert open_checkpoint(tmp_path / "m.gguf").config.architecture == "qwen2"


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
            "attention.layer_norm_rms_epsilon"],
)  # fmt: skip
def test_names_the_missing_key(tmp_path, key):
    write_gguf(tmp_path / "m.gguf", make_model(), omit=(f"qwen2.{key}",))
    with pytest.raises(ValueError, match=f"the GGUF metadata has no qwen2.{key}"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q2_K, GGMLQuantizationType.I8])
def test_refuses_other_tensor_types(tmp_path, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((96, 256 // block * block_bytes), np.int8 if kind == GGMLQuantizationType.I8 else np.uint8)
    write_gguf(tmp_path / "m.gguf", make_model(), tensors={"token_embd.weight": (data, kind)})
    with pytest.raises(
        ValueError, match=f"token_embd.weight has the type {kind.name}, not supported; supported are F32, "
    ):
        open_checkpoint(tmp_path / "m.gguf")


def test_refuses_a_tensor_it_does_not_know(tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": (np.zeros((8, 32), np.float32), GGMLQuantizationType.F32)}
    write_gguf(tmp_path / "m.gguf", make_model(), tensors=extra)
    with pytest.raises(ValueError, match=r"the GGUF tensor blk\.0\.ffn_gate_inp\.weight is not supported"):
        open_checkpoint(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", make_model(num_hidden_layers=1), metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    whole = (tmp_path / "m.gguf").read_bytes()
    data_start = min(tensor.offset for tensor in read_header(tmp_path / "m.gguf")[1].values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, data_start, 37), *range(data_start, len(whole), 4001), len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is truncated: "):
            open_checkpoint(cut)


def test_a_damaged_header_opens_or_is_a_value_error(tmp_path):
    freqs = {"rope_freqs.weight": (np.ones(4, np.float32), GGMLQuantizationType.F32)}
    write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), tensors=freqs)
    whole = (tmp_path / "m.gguf").read_bytes()
    data_start = min(tensor.offset for tensor in read_header(tmp_path / "m.gguf")[1].values())
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[rng.integers(data_start)] = rng.choice([0, 1, 255, rng.integers(256)])
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            open_checkpoint(tmp_path / "m.gguf")
        except ValueError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"<!DOCTYPE html>"])
def test_refuses_what_is_not_gguf(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf is not a GGUF file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_refuses_another_version(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(16))
    with pytest.raises(ValueError, match="GGUF of version 50331648; supported are 2 and 3, little-endian"):
        open_checkpoint(tmp_path / "m.gguf")


@needs_smollm2
def test_header_is_what_gguf_reads():
    path = open_checkpoint("smollm2").path
    metadata, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    assert metadata.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in metadata.items():
        theirs = reader.fields[key].contents()
        assert np.float32(value) == np.float32(theirs) if isinstance(value, float) else value == theirs, key
    assert len(tensors) == len(reader.tensors) == 272
    for theirs in reader.tensors:
        ours = tensors[theirs.name]
        assert (ours.type, ours.offset) == (theirs.tensor_type, theirs.data_offset)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))


@needs_smollm2
def test_smollm2():
    config = open_checkpoint("smollm2").config
    assert (config.architecture, config.num_layers, config.hidden_size, config.num_heads) == ("llama", 30, 576, 9)
    assert (config.num_kv_heads, config.head_dim, config.max_length, config.tied_head) == (3, 64, 8192, True)
    assert (config.rope.theta, config.rms_norm_eps, config.eos_token_ids) == (100000.0, 1e-5, {0, 2})
