"""The fused operators: each launch gives the same function, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from microvllm import InferenceEngine, KernelSet
from microvllm.kernels import norm_gate_up_swiglu, norm_linear, norm_qkv_rotary_store_kv
from microvllm.kernels.kernel_set import OPS
from microvllm.kernels.linear_add import skinny_linear_add
from microvllm.kernels.linear_add_norm import skinny_linear_add_norm
from microvllm.kernels.linear_swiglu import fused_linear_swiglu
from microvllm.kernels.op import Case
from microvllm.kernels.rms_norm import rms_norm_reference
from microvllm.kernels.rotary_store_kv import rotary_store_kv_reference

from .checkpoints import save_folder

X, WEIGHT, NORM = torch.ones(1, 8), torch.ones(6, 8), torch.ones(8)
QKV = {
    "bias": None,
    "cos": torch.ones(4, 1),
    "sin": torch.zeros(4, 1),
    "positions": torch.tensor([3]),
    "k_cache": torch.zeros(2, 16, 1, 2),
    "v_cache": torch.zeros(2, 16, 1, 2),
    "slot_mapping": torch.tensor([17]),
    "heads": 1,
}
"""What `norm_qkv_rotary_store_kv` takes behind X, NORM, eps and WEIGHT."""


@pytest.mark.parametrize("outputs, inputs", [(4608, 3584), (1152, 896)])
@pytest.mark.parametrize(
    "module, gpu, sizes",
    [
        (norm_linear, {}, {"outputs": 11, "bias": True}),
        (norm_gate_up_swiglu, {"h200": False}, {"intermediate": 11}),
        (norm_gate_up_swiglu, {"h200": True}, {"intermediate": 11}),
        (norm_qkv_rotary_store_kv, {}, {"heads": 2, "kv_heads": 1, "head_dim": 6, "block_size": 4, "bias": True}),
    ],
    ids=["norm_linear", "norm_gate_up_swiglu", "norm_gate_up_swiglu-h200", "norm_qkv_rotary_store_kv"],
)
def test_every_launch_gives_the_same_function(monkeypatch, module, gpu, sizes, outputs, inputs):
    launch = module._launch(outputs, inputs, **gpu)
    monkeypatch.setattr(module, "_launch", lambda *sizes: launch)
    cases = [Case(tokens=1, inputs=inputs, **sizes) for inputs in (37, 1160, 2048)]
    report = module.OP.check("triton", cases, dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


def test_a_residual_of_any_strides_is_added():
    residual = torch.randn(6, 3).t()
    x = torch.randn(3, 8)
    torch.testing.assert_close(skinny_linear_add(x, WEIGHT, residual), residual + x @ WEIGHT.t())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_is_left_to_what_reads_it_where_it_has_no_weight(rows):
    x, residual = torch.randn(rows, 8), torch.randn(rows, 8)[:, :6]  # of strides that no split takes
    y, normed = skinny_linear_add_norm(x, WEIGHT, residual, None, 1e-6)
    torch.testing.assert_close(y, residual + x @ WEIGHT.t())
    assert normed is None
    y, normed = skinny_linear_add_norm(x, WEIGHT, residual, torch.ones(6), 1e-6)
    torch.testing.assert_close(normed, rms_norm_reference(residual + x @ WEIGHT.t(), torch.ones(6), 1e-6))


def test_a_norm_of_large_numbers_does_not_overflow():
    x = torch.full((1, 8), 6e4, dtype=torch.float16)  # neither its square nor the product is a float16
    y = norm_linear.norm_linear(x, NORM.half(), 1e-6, WEIGHT.half())
    assert y.tolist() == [[8.0] * 6]


@pytest.mark.parametrize(
    "function, rest",
    [
        (norm_linear.norm_linear, {}),
        (norm_gate_up_swiglu.norm_gate_up_swiglu, {}),
        (norm_qkv_rotary_store_kv.norm_qkv_rotary_store_kv, QKV),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize(
    "x, norm_weight, weight, words",
    [
        (torch.ones(2, 8), NORM, WEIGHT, "it is for one token, not 2"),
        (X, NORM, torch.ones(6, 9), r"x is \[1, 8\] and weight \[6, 9\]"),
        (X, torch.ones(9), WEIGHT, r"norm_weight is \[9\] in torch.float32, and x \[1, 8\] in torch.float32"),
        (X, NORM.half(), WEIGHT, "norm_weight is .* in torch.float16"),
        (X.double(), NORM.double(), WEIGHT.double(), "float16, bfloat16 or float32, not torch.float64"),
        (X, NORM, torch.ones(8, 6).t(), "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(function, rest, x, norm_weight, weight, words):
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*{words}"):
        function(x, norm_weight, 1e-6, weight, **rest)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"heads": 2}, r"weight is \[\(2 \+ 2·1\)·2, in\], head_dim even, not \[6, 8\]"),
        (
            {name: torch.zeros(2, 16, 1, 3) for name in ("k_cache", "v_cache")},
            r"weight is \[\(1 \+ 2·1\)·3, in\], head_dim even, not \[6, 8\]",
        ),
        ({"k_cache": torch.zeros(16, 1, 2)}, r"k_cache is \[blocks, block_size, 1, 2\] in torch.float32"),
        ({"v_cache": torch.zeros(2, 16, 1, 2).half()}, "v_cache is .* not .* in torch.float16"),
        ({"slot_mapping": torch.tensor([1, 2])}, r"slot_mapping is \[tokens\] in int64, not \[2\]"),
        ({"cos": torch.ones(4, 2)}, r"cos is \[positions, head_dim/2\] in float32, not \[4, 2\]"),
        ({"positions": torch.tensor([1.0])}, r"positions is \[tokens\] in int32 or int64, not \[1\] in torch.float32"),
    ],
)
def test_a_cache_a_table_and_heads_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        norm_qkv_rotary_store_kv.norm_qkv_rotary_store_kv(X, NORM, 1e-6, WEIGHT, **QKV | changes)


def test_positions_in_int32_are_taken():
    call = {name: value.clone() if "cache" in name else value for name, value in QKV.items()}
    call |= {"positions": QKV["positions"].int()}
    q = norm_qkv_rotary_store_kv.norm_qkv_rotary_store_kv(X, NORM, 1e-6, WEIGHT, **call)
    torch.testing.assert_close(q, torch.full((1, 1, 2), 8.0))
    torch.testing.assert_close(call["v_cache"][1, 1], torch.full((1, 2), 8.0))


def test_an_engine_with_the_fused_qkv_kernel_writes_the_same_text(tmp_path):
    """Prompts of several tokens, which are composed, and decodes of one and of two."""
    save_folder(tmp_path, eos_token_id=None)
    texts = []
    for swaps in ({}, {"norm_qkv_rotary_store_kv": "triton"}):
        kernels = KernelSet.reference().replace(**swaps)
        engine = InferenceEngine(str(tmp_path), kernels=kernels, device="cpu", num_blocks=8, progress=False)
        outputs = engine.generate([1, 2, 3], max_tokens=6) + engine.generate([[4, 5], [6, 7, 8]], max_tokens=4)
        texts.append([output.token_ids for output in outputs])
    assert texts[0] == texts[1] and [len(text) for text in texts[0]] == [6, 4, 4]


@pytest.mark.parametrize("kernels", [KernelSet.default("cpu"), KernelSet.reference()], ids=["composed", "fused"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_replaced_rotary_store_kv_is_what_the_model_runs(tmp_path, architecture, kernels):
    save_folder(tmp_path, architecture, eos_token_id=None)
    calls = []

    def counting(q, k, v, *rest):
        calls.append((q.shape[:2], k.shape, v.shape))
        return rotary_store_kv_reference(q, k, v, *rest)

    texts = []
    for swapped in (kernels, kernels.replace(rotary_store_kv=counting)):
        engine = InferenceEngine(str(tmp_path), kernels=swapped, device="cpu", num_blocks=8, progress=False)
        texts.append(engine.generate([1, 2, 3], max_tokens=3)[0].token_ids)
    assert texts[0] == texts[1]
    shapes = [((tokens, 4), (tokens, 2, 8), (tokens, 2, 8)) for tokens in (3, 1, 1)]
    assert calls == [shape for shape in shapes for _ in range(2)]  # two layers: a prompt and two tokens


@pytest.mark.parametrize(
    "op, whole, last",
    [
        ("rms_norm", 3, 2),  # two layers: four norms, and the last one
        ("linear", 5, 4),
        ("linear_add", 2, 2),
        ("linear_add_norm", 2, 2),
        ("swiglu", 1, 1),
        ("linear_swiglu", 1, 1),
        ("norm_gate_up_swiglu", 1, 1),
        ("norm_qkv_rotary_store_kv", 2, 0),
        ("norm_linear", 2, 0),
        ("rotary_store_kv", 2, 0),
    ],
)
@pytest.mark.parametrize("base", ["reference", "one row", "CPU"])
def test_whatever_is_replaced_is_what_every_step_runs(tmp_path, op, whole, last, base):
    """Also where fused kernels are there for one row alone, so that a prompt is computed otherwise than a decode.

    whole, last: its calls in a prompt with all tokens, and behind the last attention with the last token alone
    """
    save_folder(tmp_path, eos_token_id=None)
    kernels = KernelSet.default("cpu") if base == "CPU" else KernelSet.reference()
    if base == "one row":
        kernels = kernels.replace(norm_gate_up_swiglu="triton", norm_qkv_rotary_store_kv="triton")
    rows = []

    def counting(x, *rest):
        rows.append(len(x))
        return OPS[op].reference(x, *rest)

    texts = []
    for swapped in (KernelSet.reference(), kernels.replace(**{op: counting})):
        engine = InferenceEngine(str(tmp_path), kernels=swapped, device="cpu", num_blocks=8, progress=False)
        texts.append(engine.generate([1, 2, 3], max_tokens=3)[0].token_ids)
    assert texts[0] == texts[1]
    assert sorted(rows) == [1] * (last + 2 * (whole + last)) + [3] * whole


@pytest.mark.parametrize("op", ["append_attention", "paged_attention", "rotary_store_kv"])
def test_a_decode_of_several_rows_appends_and_attends_in_one_call(tmp_path, op):
    """Where a fused kernel is there for one row, whose attention is called by itself; a swap of a part is what runs."""
    save_folder(tmp_path, eos_token_id=None)
    rows = []

    def counting(q, *rest):
        rows.append(len(q))
        return OPS[op].reference(q, *rest)

    texts = []
    for swaps in ({}, {op: counting, "norm_qkv_rotary_store_kv": "triton", "norm_linear": "triton"}):
        kernels = KernelSet.reference().replace(**swaps)
        engine = InferenceEngine(str(tmp_path), kernels=kernels, device="cpu", num_blocks=8, progress=False)
        outputs = engine.generate([[4, 5], [6, 7, 8]], max_tokens=3) + engine.generate([1, 2, 3], max_tokens=2)
        texts.append([output.token_ids for output in outputs])
    assert texts[0] == texts[1]
    decodes = [2] * 4 + [1] * 2 * (op == "paged_attention")  # two layers
    prompts = {"rotary_store_kv": [5, 5, 3, 3], "paged_attention": [2, 1]}.get(op, [])  # all tokens, or the last ones
    assert sorted(rows) == sorted(decodes + prompts)


def test_gates_and_ups_are_as_many():
    with pytest.raises(ValueError, match=r"weight is \[2·intermediate, in\], not \[5, 8\]"):
        norm_gate_up_swiglu.norm_gate_up_swiglu(X, NORM, 1e-6, torch.ones(5, 8))


@pytest.mark.parametrize("residual", [torch.zeros(1, 5), torch.zeros(1, 6).half()])
def test_a_residual_that_does_not_fit_is_named(residual):
    words = rf"residual is \[1, {residual.shape[1]}\] in {residual.dtype}, and x Wᵀ \[1, 6\] in torch.float32"
    with pytest.raises(ValueError, match=words):
        skinny_linear_add(X, WEIGHT, residual)


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (X, torch.ones(6, 9), r"x is \[1, 8\] and weight \[6, 9\]"),
        (X, torch.ones(5, 8), r"weight is \[2·intermediate, in\], not \[5, 8\]"),
        (X.double(), WEIGHT.double(), "float16, bfloat16 or float32, not torch.float64"),
        (X, torch.ones(8, 6).t(), "contiguous"),
    ],
)
def test_gates_and_ups_that_do_not_fit_are_named(x, weight, words):
    with pytest.raises(ValueError, match=f"linear_swiglu: .*{words}"):
        fused_linear_swiglu(x, weight)
