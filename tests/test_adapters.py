"""Kernels from elsewhere behind the adapters of bench.peers, and one in the format of Hugging Face's hub.

Liger's runs in Triton's interpreter. flash-attn and FlashInfer run on GPUs alone: stand-ins with their signatures
compute what they document, so that what is shown here is which argument goes where.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from microvllm.bench import peers
from microvllm.kernels import paged_attention, prefill_attention, rms_norm
from microvllm.kernels.op import Case
from microvllm.kernels.paged_attention import paged_attention_reference
from microvllm.kernels.prefill_attention import prefill_attention_reference

NORM = Case(tokens=7, hidden=100)
DECODE = Case(batch=3, context=50, shortest=5, heads=4, kv_heads=2, head_dim=64, block_size=16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def adapted(op, name):
    """A peer as a kernel of the operator, to be checked like any other."""
    names = list(inspect.signature(op.reference).parameters)
    (bind, *_) = [peer.bind for peer in peers.PEERS[op.name] if peer.name == name]

    def kernel(*arguments):
        return bind(**dict(zip(names, arguments, strict=False)))()

    return kernel


def module(monkeypatch, name, **functions):
    stand_in = ModuleType(name)
    vars(stand_in).update(functions)
    monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU there is")
def test_ligers_norm(monkeypatch):
    """The interpreter leaves floats as they are, where a compiled kernel gets a tensor, and has no libdevice."""
    import triton.language as tl
    from liger_kernel.ops import rms_norm as liger
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def as_compiled(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", as_compiled)
    monkeypatch.setattr(liger, "rsqrt", lambda x: tl.rsqrt(x))  # looked up in the kernel, where it is interpreted
    kernel = adapted(rms_norm.OP, "Liger")
    report = rms_norm.OP.check(kernel, [NORM, Case(tokens=1, hidden=896)], device="cpu")
    assert report.ok, str(report)
    assert not rms_norm.OP.check(lambda x, weight, eps: kernel(x, weight, eps + 1), [NORM], device="cpu").ok


def test_flash_attn_decode(monkeypatch):
    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale):
        assert q.shape[1] == 1 and cache_seqlens.dtype == block_table.dtype == torch.int32 and block_table.min() >= 0
        out = paged_attention_reference(q.squeeze(1), k_cache, v_cache, block_table, cache_seqlens, softmax_scale)
        return out.unsqueeze(1)

    module(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    assert paged_attention.OP.check(adapted(paged_attention.OP, "flash-attn 2"), [DECODE], device="cpu").ok


def test_flash_attn_prefill(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, block_table
    ):
        assert causal and cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_k) == len(cu_seqlens_q)
        lengths = (max_seqlen_q, max_seqlen_k, softmax_scale)
        return prefill_attention_reference(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k.diff(), *lengths)

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    kernel = adapted(prefill_attention.OP, "flash-attn 2")
    assert prefill_attention.OP.check(kernel, prefill_attention.OP.cases[:1], device="cpu").ok


def test_flashinfer_decode(monkeypatch):
    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace, kv_layout, use_tensor_cores):
            assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            *, sm_scale, q_data_type, kv_data_type,
        ):  # fmt: skip
            assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
            assert q_data_type == kv_data_type and last_page_len.min() >= 1 and last_page_len.max() <= page_size
            self.heads = (num_qo_heads, num_kv_heads, head_dim, page_size)
            self.pages, self.scale = indptr.diff(), sm_scale
            self.context_lens = ((self.pages - 1) * page_size + last_page_len).int()
            self.table = torch.zeros(len(self.pages), int(self.pages.max()), dtype=torch.int32)
            for i, row in enumerate(self.table):
                row[: self.pages[i]] = indices[indptr[i] : indptr[i + 1]]

        def run(self, q, paged_kv_cache):
            k, v = paged_kv_cache
            assert self.heads == (q.shape[1], k.shape[2], q.shape[2], k.shape[1])
            return paged_attention_reference(q, k, v, self.table, self.context_lens, self.scale)

    module(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper)
    monkeypatch.setattr(peers, "_build_flashinfer", lambda dtype: None)
    assert paged_attention.OP.check(adapted(paged_attention.OP, "FlashInfer"), [DECODE], device="cpu").ok


def save_hub_kernel(folder):
    """A kernel repository as the hub has them, with one build that runs anywhere."""
    build = folder / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(
        "import torch\n\n\ndef rms_norm(out, x, weight, eps):\n"
        "    out.copy_(torch.nn.functional.rms_norm(x, weight.shape, weight, eps))\n"
    )
    about = {"id": "tiny_norm_1", "name": "tiny-norm", "version": 1, "license": "MIT", "python-depends": []}
    (build / "metadata.json").write_text(json.dumps({**about, "backend": {"type": "cpu"}}))


def test_a_kernel_of_the_hub_from_a_local_folder(tmp_path):
    from kernels import get_local_kernel

    save_hub_kernel(tmp_path / "tiny-norm")
    hub = get_local_kernel(tmp_path / "tiny-norm")

    def hub_rms_norm(x, weight, eps):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        hub.rms_norm(out, x, weight, eps)
        return out

    assert rms_norm.OP.check(hub_rms_norm, [NORM], device="cpu").ok
