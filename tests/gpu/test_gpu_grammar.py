"""Texts that follow a schema, drawn again behind a CUDA graph."""

from __future__ import annotations

import json

import jsonschema
from microvllm import InferenceEngine, KernelSet, SamplingParams

from ..small_engine import assert_at_rest

CHAT = [{"role": "user", "content": "Describe the city of Paris as JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "Rome", "Oslo"]},
        "capital": {"type": "boolean"},
        "districts": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 20}, "maxItems": 4},
    },
    "required": ["name", "capital", "districts"],
    "additionalProperties": False,
}


def test_they_are_those_of_an_eager_engine_in_step():
    """In float32, where batches of other sizes hardly ever draw other tokens."""
    params = [
        SamplingParams(
            max_tokens=100,
            temperature=(0.0, 1.0)[i % 2],
            seed=i,
            top_p=(1.0, 0.9)[i % 3 == 0],
            repetition_penalty=(1.0, 1.1)[i % 4 == 3],
            json_schema=None if i % 5 == 4 else SCHEMA,
        )
        for i in range(20)
    ]
    texts = []
    kernels = KernelSet.default("cuda").replace(prefill_attention="triton")  # flash-attn does not take float32
    options = {"kernels": kernels, "device": "cuda", "dtype": "float32", "num_blocks": 200, "max_model_len": 512}
    for mode in ({}, {"enforce_eager": True, "async_scheduling": False}):
        engine = InferenceEngine("smollm2", progress=False, **options, **mode)
        outputs = engine.generate([CHAT] * len(params), params)
        assert_at_rest(engine)
        for output, p in zip(outputs, params, strict=True):
            if p.json_schema is not None:
                assert output.finish_reason == "stop", output
                jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(output.text))
        texts.append([output.token_ids for output in outputs])
    assert texts[0] == texts[1]
