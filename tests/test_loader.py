import subprocess
import sys

import pytest
import torch
from microvllm.kernels.kernel_set import KernelSet
from microvllm.model import loader
from microvllm.model.checkpoint import open_checkpoint
from microvllm.model.loader import load_model
from safetensors.torch import load_file, save_file

from .checkpoints import edit_json, make_model, needs_smollm2, save_folder, write_gguf

MIB = 1 << 20


def load(checkpoint, **changes):
    settings = {"device": "cpu", "dtype": torch.float32, "max_length": 64, "progress": False}
    return load_model(checkpoint, KernelSet.reference(), **settings | changes)


def expected_parameters(state, config):
    """Each parameter of Qwen2, written out by hand."""
    yield "embedding", state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        theirs = {name: state.get(f"model.layers.{layer}.{name}") for name in (
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "mlp.gate_proj.weight",
            "self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
            "input_layernorm.weight", "post_attention_layernorm.weight")}  # fmt: skip
        yield f"layers.{layer}.attention.qkv_weight", [theirs[f"self_attn.{part}_proj.weight"] for part in "qkv"]
        if config.model_type == "qwen2":
            yield f"layers.{layer}.attention.qkv_bias", [theirs[f"self_attn.{part}_proj.bias"] for part in "qkv"]
        if config.model_type == "qwen3":
            yield f"layers.{layer}.attention.q_norm", theirs["self_attn.q_norm.weight"]
            yield f"layers.{layer}.attention.k_norm", theirs["self_attn.k_norm.weight"]
        yield f"layers.{layer}.attention.o_weight", theirs["self_attn.o_proj.weight"]
        yield f"layers.{layer}.attention.norm", theirs["input_layernorm.weight"]
        yield f"layers.{layer}.mlp.norm", theirs["post_attention_layernorm.weight"]
        yield f"layers.{layer}.mlp.gate_up_weight", [theirs["mlp.gate_proj.weight"], theirs["mlp.up_proj.weight"]]
        yield f"layers.{layer}.mlp.down_weight", theirs["mlp.down_proj.weight"]
    yield "norm", state["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "head", state["lm_head.weight"]


def assert_holds(model, theirs, dtype=torch.float32):
    actual = dict(model.named_parameters())
    expected = dict(expected_parameters(theirs.state_dict(), theirs.config))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = torch.cat(tensor) if isinstance(tensor, list) else tensor
        assert torch.equal(actual[name], tensor.to(dtype)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_loads_a_folder(tmp_path, architecture, tied):
    theirs = save_folder(tmp_path, architecture, tie_word_embeddings=tied, max_shard_size="20KB")
    model = load(open_checkpoint(tmp_path))
    assert_holds(model, theirs)
    assert (model.head is model.embedding) == tied
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.cos.shape == model.sin.shape == (64, 4)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_loads_a_gguf(tmp_path, architecture):
    theirs = make_model(architecture)
    write_gguf(tmp_path / "m.gguf", theirs)
    assert_holds(load(open_checkpoint(tmp_path / "m.gguf")), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_converts_to_the_dtype(tmp_path, dtype):
    theirs = save_folder(tmp_path)
    model = load(open_checkpoint(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_holds(model, theirs, dtype)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "the checkpoint lacks model.norm.weight$"),
        (lambda tensors: tensors.pop("lm_head.weight"), "the checkpoint lacks lm_head.weight$"),
        (
            lambda tensors: (
                [tensors.pop(f"model.layers.1.self_attn.{part}_proj.bias") for part in "qkv"]
                + [tensors.pop("model.norm.weight")]
            ),
            "the checkpoint lacks model.layers.1.self_attn.k_proj.bias, model.layers.1.self_attn.q_proj.bias, "
            "model.layers.1.self_attn.v_proj.bias and 1 more$",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
            "the model has no place for model.layers.2.input_layernorm.weight$",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.weight": torch.ones(48, 32)}),
            r"model.layers.1.mlp.down_proj.weight has the shape \[48, 32\], and the config asks for \[32, 48\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, 1)}),
            r"model.norm.weight has the shape \[32, 1\], and the config asks for \[32\]",
        ),
    ],
)
def test_refuses_tensors_before_anything_is_allocated(tmp_path, monkeypatch, change, message):
    save_folder(tmp_path)
    change_tensors(tmp_path, change)
    monkeypatch.setattr(loader, "_allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=message):
        load(open_checkpoint(tmp_path))


def test_refuses_a_vocabulary_that_is_not_the_configs(tmp_path):
    save_folder(tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=97)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has the shape \[96, 32\], and the config asks for \[97, 32"
    ):
        load(open_checkpoint(tmp_path))


@pytest.mark.parametrize("architecture, tied", [("qwen2", True), ("qwen3", False)])
def test_dummy_weights(tmp_path, architecture, tied):
    make_model(architecture, tie_word_embeddings=tied, hidden_size=64, head_dim=64).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    model, again = (load(checkpoint, load_format="dummy") for _ in range(2))
    assert (model.head is model.embedding) == tied
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert abs(parameter.mean() - float(name.endswith("norm"))) < 0.015, name
        assert 0.01 < parameter.std() < 0.03, name
    assert not torch.equal(model.layers[0].mlp.down_weight, model.layers[1].mlp.down_weight)


def test_refuses_another_load_format(tmp_path):
    save_folder(tmp_path)
    with pytest.raises(ValueError, match="load_format 'fast' does not exist; there are auto, dummy"):
        load(open_checkpoint(tmp_path), load_format="fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progress_is_in_bytes_of_the_model(tmp_path, monkeypatch, dtype):
    save_folder(tmp_path)
    bars = []

    class Bar(loader.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})
            bars.append(self)

    monkeypatch.setattr(loader, "tqdm", Bar)
    model = load(open_checkpoint(tmp_path), dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(size, size, "B")]


# The peak is that of a process of its own, and counted from when everything is imported and has run once.
MEASURE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from microvllm.kernels.kernel_set import KernelSet
from microvllm.model.checkpoint import open_checkpoint
from microvllm.model.loader import load_model

warm_up, model, how = sys.argv[1:]

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10

def load(path):
    checkpoint = open_checkpoint(path)
    loaded = load_model(checkpoint, KernelSet.reference(), device="cpu", dtype=torch.bfloat16, max_length=64)
    return sum(parameter.nbytes for parameter in loaded.parameters()), loaded

def load_twice_over(path):
    tensors = {}
    for file in Path(path).glob("*.safetensors"):
        tensors |= load_file(file)
    copies = [tensor.clone() for tensor in tensors.values()]
    return sum(copy.nbytes for copy in copies), copies

load(warm_up)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
before = status("VmRSS")
size, held = {"loader": load, "naive": load_twice_over}[how](model)
print(size, status("VmHWM") - before)
"""


def measure(warm_up, model, how="loader"):
    """(bytes of the model, bytes by which the process's peak grew)"""
    arguments = [sys.executable, "-c", MEASURE, str(warm_up), str(model), how]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    return size, peak


# What is not tensors: a piece of 16 MiB in the file's dtype and another converted, and the allocator's rounding.
SLACK = 40 * MIB


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_folder(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path, warm_up):
    # A head and an embedding of 31 MiB, and ten layers of 18 MiB: 240 MiB in ten shards.
    changes = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 10,
               "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    largest = 16000 * 1024 * 2
    make_model("llama", **changes).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="25MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 9
    size, peak = measure(warm_up, tmp_path)
    assert 200 * MIB < size < 300 * MIB
    assert size <= peak <= size + largest + SLACK
    assert measure(warm_up, tmp_path, "naive")[1] > size + largest + SLACK  # the measure can fail


@needs_smollm2
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_gguf(warm_up):
    size, peak = measure(warm_up, "smollm2")
    largest = 49152 * 576 * 2
    assert size == 134515008 * 2
    assert size <= peak <= size + largest + SLACK
