"""The choice of kernels: what there is, what a swap does, and what is refused."""

from __future__ import annotations

import pytest
import torch
from microvllm import KernelSet
from microvllm.kernels.kernel_set import OPS, STANDALONE
from microvllm.kernels.linear import linear_reference, onednn_linear
from microvllm.kernels.op import Implementation, Op
from microvllm.kernels.rms_norm import rms_norm_reference

CPU = torch.device("cpu")
FUSED = {"norm_linear", "norm_qkv_rotary_store_kv", "linear_swiglu", "norm_gate_up_swiglu"}
FUSED |= {"append_attention", "linear_add", "linear_add_norm"}
NAMES = FUSED | {
    "rms_norm",
    "linear",
    "rotary_store_kv",
    "paged_attention",
    "prefill_attention",
    "swiglu",
    "sample",
    "advance_decode",
}


def doubled(gate_up):
    return 2 * gate_up


def test_there_is_an_operator_for_each_name():
    assert set(OPS) == NAMES
    assert set(STANDALONE).isdisjoint(OPS)
    assert all(op.name == name for ops in (OPS, STANDALONE) for name, op in ops.items())


def test_the_reference_set_runs_every_reference():
    kernels = KernelSet.reference()
    assert all(getattr(kernels, name) is OPS[name].reference for name in NAMES)
    assert set(kernels.names.values()) == {"reference"}


def test_the_default_on_a_cpu_runs_what_can_run_there():
    kernels = KernelSet.default("cpu")
    expected = dict.fromkeys(NAMES, "reference") | {"linear": "onednn"} | dict.fromkeys(FUSED, "composed")
    assert dict(kernels.names) == expected
    assert kernels.linear is onednn_linear
    assert kernels.swiglu is OPS["swiglu"].reference


def test_an_operator_prefers_its_first_implementation_that_can_run():
    op = Op(
        "f",
        reference=abs,
        implementations={
            "elsewhere": Implementation(min, lambda device: "it is for another machine"),
            "good": Implementation(max),
            "slower": Implementation(sum),
        },
    )
    assert op.default(CPU) == "good"
    assert op.unavailable("elsewhere", CPU) == "it is for another machine"
    assert op.unavailable("good", CPU) is None and op.unavailable("reference", CPU) is None
    chosen = [op.choose(name).function for name in ("good", "elsewhere", "reference")]
    assert chosen == [max, min, abs]
    assert Op("g", reference=abs).default(CPU) == "reference"


def test_flash_attn_says_why_it_cannot_run_on_a_cpu():
    assert OPS["prefill_attention"].unavailable("flash_attn", CPU) == "flash-attn needs a CUDA GPU"


def test_replace_by_name_changes_one_operator_of_a_new_set():
    before = KernelSet.default("cpu")
    after = before.replace(linear="reference")
    assert (after.linear, after.names["linear"]) == (linear_reference, "reference")
    assert (before.linear, before.names["linear"]) == (onednn_linear, "onednn")
    assert all(getattr(after, name) is getattr(before, name) for name in NAMES - FUSED - {"linear"})


def test_replace_takes_any_callable_and_names_it():
    kernels = KernelSet.reference().replace(swiglu=doubled, linear="onednn")
    assert kernels.swiglu is doubled
    assert (kernels.names["swiglu"], kernels.names["linear"]) == ("doubled", "onednn")
    assert kernels.swiglu(torch.ones(1, 2)).tolist() == [[2, 2]]


def test_a_second_swap_keeps_the_first():
    kernels = KernelSet.reference().replace(swiglu=doubled).replace(linear="onednn")
    assert (kernels.swiglu, kernels.linear) == (doubled, onednn_linear)
    assert (kernels.names["swiglu"], kernels.names["linear"]) == ("doubled", "onednn")


@pytest.mark.parametrize(
    "swap, message",
    [
        ({"rmsnorm": "reference"}, "there is no operator 'rmsnorm'; there are: rms_norm, linear"),
        ({"linear": "oneDNN"}, "operator linear has no implementation 'oneDNN'; it has: onednn, "),
        ({"swiglu": "Triton"}, "operator swiglu has no implementation 'Triton'; it has: triton, reference$"),
        (
            {"linear_add": "triton"},
            "linear_add has no implementation 'triton'; it has: skinny, reference, and in a KernelSet composed$",
        ),
        ({"swiglu": "composed"}, "operator swiglu has no implementation 'composed'; it has: triton, reference$"),
        ({"swiglu": 3}, "swiglu=3 is neither an implementation's name nor a callable"),
    ],
)
def test_a_misspelt_swap_is_refused_with_the_known_names(swap, message):
    with pytest.raises(ValueError, match=message):
        KernelSet.reference().replace(**swap)


def test_the_swap_of_an_operator_that_no_engine_runs_names_the_one_that_it_runs():
    with pytest.raises(ValueError, match="no engine runs the operator 'rotary'; it runs rotary_store_kv, which"):
        KernelSet.reference().replace(rotary="triton")
    for name in STANDALONE:
        with pytest.raises(ValueError, match=f"no engine runs the operator '{name}'; it runs "):
            KernelSet.reference().replace(**{name: "reference"})


def test_an_implementation_that_no_engine_can_run_is_refused():
    with pytest.raises(ValueError, match=r"no engine can run append_attention='flash_attn': .* pads its batches"):
        KernelSet.reference().replace(append_attention="flash_attn")


def test_triton_says_why_it_cannot_run_on_a_cpu():
    for name in ("rms_norm", "norm_linear", "rotary_store_kv", "swiglu"):
        assert OPS[name].unavailable("triton", CPU) == "Triton compiles for a GPU"


def test_a_set_cannot_change():
    kernels = KernelSet.reference()
    with pytest.raises(AttributeError, match=r"use kernels.replace\(swiglu=\.\.\.\)"):
        kernels.swiglu = doubled
    with pytest.raises(TypeError):
        kernels.names["swiglu"] = "doubled"
    with pytest.raises(TypeError):
        OPS["swiglu"] = None
    assert kernels.swiglu is OPS["swiglu"].reference


def test_its_text_says_what_runs_where():
    kernels = KernelSet.reference().replace(swiglu=doubled)
    others = ", ".join(name for name in OPS if name not in ("swiglu", "linear_swiglu", "norm_gate_up_swiglu"))
    assert str(kernels) == f"reference: {others}; doubled: swiglu; composed: linear_swiglu, norm_gate_up_swiglu"
    assert repr(kernels) == f"KernelSet({kernels})"
    assert "; triton (most_rows=1, else composed): norm_linear" in str(kernels.replace(norm_linear="triton"))


def test_a_weight_is_prepared_by_the_implementation_that_reads_it():
    weight = torch.randn(8, 4)
    x = torch.randn(3, 4)
    for kernels in (KernelSet.default("cpu"), KernelSet.reference()):
        torch.testing.assert_close(kernels.linear(x, kernels.prepare("linear", weight)), x @ weight.t())
    assert KernelSet.default("cpu").prepare("linear", weight).is_mkldnn
    assert KernelSet.default("cpu").replace(linear=lambda x, weight, bias=None: x).prepare("linear", weight) is weight


class Recorder:
    """Parts of a fused operator that note how they are called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def part(*call):
            self.calls.append(name)
            return OPS[name].reference(*call)

        return part


def inputs(name, case):
    return OPS[name].inputs(**case, dtype=torch.float32, device=CPU, generator=torch.Generator().manual_seed(0))


CALLS = {
    "norm_linear": {"tokens": 3, "outputs": 4, "inputs": 8, "bias": True},
    "norm_qkv_rotary_store_kv": {
        "tokens": 3,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 4,
        "inputs": 8,
        "block_size": 2,
        "bias": True,
        "padded": 1,
    },
    "append_attention": {
        "batch": 2,
        "context": 5,
        "shortest": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 4,
        "block_size": 2,
        "padded": 1,
    },
    "linear_swiglu": {"tokens": 3, "intermediate": 4, "inputs": 8},
    "norm_gate_up_swiglu": {"tokens": 3, "intermediate": 4, "inputs": 8},
    "linear_add": {"rows": 3, "outputs": 4, "inputs": 8},
    "linear_add_norm": {"rows": 3, "outputs": 4, "inputs": 8},
}


@pytest.mark.parametrize("name", sorted(FUSED))
def test_a_fused_operator_is_composed_of_the_parts_of_its_set(name):
    op, recorder = OPS[name], Recorder()
    kernels = KernelSet.reference().replace(**{part: getattr(recorder, part) for part in op.parts})
    assert kernels.names[name] == "composed"
    call = inputs(name, CALLS[name])
    torch.testing.assert_close(getattr(kernels, name)(*call.values()), op.reference(**call))
    assert recorder.calls == list(op.parts)
    left = {fused for fused in FUSED - set(op.parts) if simple_parts(fused).isdisjoint(op.parts)}
    assert {fused for fused in FUSED if kernels.names[fused] == "reference"} == left


def simple_parts(name: str) -> set[str]:
    """An operator's parts, and theirs."""
    return set(OPS[name].parts).union(*map(simple_parts, OPS[name].parts))


def test_what_is_composed_of_a_composed_operator_is_composed():
    recorder = Recorder()
    kernels = KernelSet.reference().replace(linear=recorder.linear)
    assert kernels.names["norm_qkv_rotary_store_kv"] == "composed"
    kernels.norm_qkv_rotary_store_kv(*inputs("norm_qkv_rotary_store_kv", CALLS["norm_qkv_rotary_store_kv"]).values())
    assert recorder.calls == ["linear"]
    kernels = KernelSet.reference().replace(linear=recorder.linear, norm_linear="reference")
    assert kernels.names["norm_qkv_rotary_store_kv"] == "composed", "its part is another than it was"


def test_a_replaced_part_leaves_the_fused_operators_without_it():
    names = KernelSet.reference().replace(rms_norm=rms_norm_reference).names
    assert (names["norm_linear"], names["norm_gate_up_swiglu"], names["linear_add"]) == (
        "composed",
        "composed",
        "reference",
    )


def test_a_fused_operator_that_is_chosen_with_its_part_is_what_runs():
    def mine(x, norm_weight, eps, weight, bias=None):
        return x

    kernels = KernelSet.reference().replace(rms_norm=Recorder().rms_norm, norm_linear=mine)
    assert kernels.norm_linear is mine and kernels.names["norm_gate_up_swiglu"] == "composed"
    assert kernels.replace(swiglu=doubled).norm_linear is mine
    assert kernels.replace(rms_norm="reference").names["norm_linear"] == "composed"
    assert KernelSet.reference().replace(norm_linear="composed").names["norm_linear"] == "composed"


def test_more_rows_than_a_fused_kernel_is_made_for_are_composed(monkeypatch):
    op = OPS["norm_linear"]
    calls = []
    one_row = Implementation(lambda x, *rest: calls.append(len(x)) or op.reference(x, *rest), most_rows=1)
    monkeypatch.setitem(op.implementations, "triton", one_row)
    recorder = Recorder()
    kernels = KernelSet.reference().replace(rms_norm=recorder.rms_norm, norm_linear="triton")
    for tokens, composed in ((0, []), (1, []), (2, ["rms_norm"]), (9, ["rms_norm"])):
        call = inputs("norm_linear", CALLS["norm_linear"] | {"tokens": tokens})
        torch.testing.assert_close(kernels.norm_linear(*call.values()), op.reference(**call))
        assert recorder.calls == composed, tokens
        recorder.calls.clear()
    assert calls == [0, 1]


def test_a_set_says_for_how_many_rows_a_part_is_called_by_itself(monkeypatch):
    few = Implementation(OPS["norm_linear"].reference, most_rows=2)
    monkeypatch.setitem(OPS["norm_linear"].implementations, "triton", few)
    kernels = KernelSet.reference().replace(norm_linear="triton")
    assert [kernels.runs("rms_norm", "norm_linear", rows) for rows in (1, 2, 3)] == [False, False, True]
    assert not kernels.replace(norm_linear=OPS["norm_linear"].reference).runs("rms_norm", "norm_linear", 1000)
    assert kernels.replace(rms_norm=rms_norm_reference).runs("rms_norm", "norm_linear", 1)
    # Composed, of a part that is fused up to two rows.
    kernels = kernels.replace(rotary_store_kv=OPS["rotary_store_kv"].reference)
    assert [kernels.runs("rms_norm", "norm_qkv_rotary_store_kv", rows) for rows in (2, 3)] == [False, True]
    assert not kernels.runs("swiglu", "norm_qkv_rotary_store_kv", 3)


def test_weights_of_a_fused_operator_are_prepared_as_what_runs_reads_them():
    weight = torch.randn(8, 8)
    kernels = KernelSet.default("cpu")
    for name in FUSED - {"append_attention"}:  # which reads no weight
        assert kernels.prepare(name, weight).is_mkldnn
        assert kernels.replace(linear="reference").prepare(name, weight) is weight
        assert kernels.replace(**{name: "reference"}).prepare(name, weight) is weight
        call = inputs(name, CALLS[name])
        prepared = call | {"weight": kernels.prepare(name, call["weight"])}
        torch.testing.assert_close(getattr(kernels, name)(*prepared.values()), OPS[name].reference(**call))


def test_a_fused_kernel_and_a_part_that_want_one_weight_in_two_layouts_are_refused():
    with pytest.raises(ValueError, match="norm_linear='triton' does not go with linear='onednn', which computes"):
        KernelSet.default("cpu").replace(norm_linear="triton")
    assert KernelSet.default("cpu").replace(norm_linear="triton", linear="skinny").names["norm_linear"] == "triton"
