"""lm-eval's local-completions against a real process on SmolLM2: what it reads are the engine's own log-probabilities.

The tasks are YAML files and a JSONL file beside this one. The tokenizer is the server's, by /tokenizer_info and
/tokenize, so a GGUF file needs no folder of Hugging Face's next to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from microvllm import InferenceEngine

from .served_process import ServedProcess

pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')

TASKS = Path(__file__).parent / "lm_eval_tasks"
QUESTIONS = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
OPTIONS = {"block_size": 16, "max_model_len": 512}


@pytest.fixture(scope="module")
def engine():
    return InferenceEngine("smollm2", num_blocks=64, progress=False, **OPTIONS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """By task, what lm-eval asked and was answered, in the order of the questions."""
    out = tmp_path_factory.mktemp("lm-eval")
    server = ServedProcess("smollm2", "--api-key", "sesame", "--block-size", "16", "--max-model-len", "512", "--quiet")
    try:
        arguments = (
            f"base_url={server.url}/v1/completions,model=smollm2,auth_token=sesame,num_concurrent=4,max_length=512"
        )
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "capitals,continuations", "--include_path", str(TASKS)]
        done = subprocess.run(
            [*command, "--output_path", str(out), "--log_samples"],
            cwd=TASKS,  # where the YAML files say that the questions are
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "OPENAI_API_KEY": "sesame"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        server.kill()
    found = {}
    for task in ("capitals", "continuations"):
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        found[task] = sorted(
            (json.loads(line) for line in path.read_text().splitlines()), key=lambda each: each["doc_id"]
        )
        assert [sample["doc"] for sample in found[task]] == QUESTIONS
    return found


def test_choices_are_scored_as_the_engine_scores_them(samples, engine):
    for sample, question in zip(samples["capitals"], QUESTIONS, strict=True):
        scores = []
        for choice, (answer,) in zip(question["choices"], sample["resps"], strict=True):
            context = len(engine.tokenizer.encode(question["question"]))
            ids = engine.tokenizer.encode(f"{question['question']} {choice}")
            (output,) = engine.generate([ids], max_tokens=1, prompt_logprobs=1)
            entries = output.prompt_logprobs[context:]
            score, greedy = float(answer[0]), answer[1] in (True, "True")
            assert score == pytest.approx(sum(entry.logprob for entry in entries), abs=1e-3) and score < -0.01
            assert greedy == all(entry.token_id == entry.top[0][0] for entry in entries)
            scores.append(score)
        best = max(range(len(scores)), key=scores.__getitem__)
        assert sample["acc"] == float(best == question["answer"])
    assert sum(sample["acc"] for sample in samples["capitals"]) >= 4  # the model knows its capitals


def test_texts_up_to_a_stop_string_are_the_engines(samples, engine):
    for sample, question in zip(samples["continuations"], QUESTIONS, strict=True):
        (output,) = engine.generate(question["question"], max_tokens=12, stop=[".", "\n"])
        assert sample["resps"] == [[output.text]] and output.text
