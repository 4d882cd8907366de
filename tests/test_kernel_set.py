"""The choice of kernels: what there is, what a swap does, and what is refused."""

from __future__ import annotations

import pytest
import torch
from microvllm import KernelSet
from microvllm.kernels.kernel_set import OPS, STANDALONE
from microvllm.kernels.linear import linear_reference, onednn_linear
from microvllm.kernels.op import Implementation, Op

CPU = torch.device("cpu")
NAMES = {
    "rms_norm",
    "add_rms_norm",
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
    assert dict(kernels.names) == {name: "reference" for name in NAMES} | {"linear": "onednn"}
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
    assert all(getattr(after, name) is getattr(before, name) for name in NAMES - {"linear"})


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
        ({"rmsnorm": "reference"}, "there is no operator 'rmsnorm'; there are: rms_norm, add_rms_norm, linear"),
        ({"linear": "oneDNN"}, "operator linear has no implementation 'oneDNN'; it has: onednn, "),
        ({"swiglu": "Triton"}, "operator swiglu has no implementation 'Triton'; it has: triton, reference$"),
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


def test_triton_says_why_it_cannot_run_on_a_cpu():
    for name in ("rms_norm", "add_rms_norm", "rotary_store_kv", "swiglu"):
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
    others = ", ".join(name for name in OPS if name != "swiglu")
    assert str(kernels) == f"reference: {others}; doubled: swiglu"
    assert repr(kernels) == f"KernelSet({kernels})"


def test_a_weight_is_prepared_by_the_implementation_that_reads_it():
    weight = torch.randn(8, 4)
    x = torch.randn(3, 4)
    for kernels in (KernelSet.default("cpu"), KernelSet.reference()):
        torch.testing.assert_close(kernels.linear(x, kernels.prepare("linear", weight)), x @ weight.t())
    assert KernelSet.default("cpu").prepare("linear", weight).is_mkldnn
    assert KernelSet.default("cpu").replace(linear=lambda x, weight, bias=None: x).prepare("linear", weight) is weight
