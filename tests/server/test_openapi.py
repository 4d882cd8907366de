"""schemathesis against the description at /openapi.json: every route does what it says, with good data and bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from microvllm import InferenceEngine

from ..small_engine import save_tokenizer
from ..small_models import Shape, make_model
from .small_server import serving

HERE = Path(__file__).parent
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
FLAGS = ["--generation-deterministic", "--max-examples", "20", "--no-shrink", "--phases", "coverage,fuzzing"]
# A schema cannot say all that makes a body valid; schema_checks.py has what it cannot.
FLAGS += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "20", "--no-color"]


def run(server, folder: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """→ what schemathesis did, and its report"""
    report = folder / "report.json"
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    done = subprocess.run(
        [SCHEMATHESIS, "run", url, *FLAGS, "--report", "json", "--report-json-path", str(report)],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "schema_checks", "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    return done, json.loads(report.read_text())


@pytest.fixture
def engine_with_an_end(tmp_path):
    """Whose texts can follow a schema; they are short and many run at once, so that n=128 does not take long."""
    make_model(Shape(), tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos="zz")
    options = {"max_model_len": 48, "max_batch_size": 64, "num_blocks": 256, "block_size": 16}
    return InferenceEngine(tmp_path / "model", device="cpu", progress=False, **options)


def test_every_route_is_as_described(engine_with_an_end, tmp_path):
    """Some 2,800 requests."""
    with serving(engine_with_an_end) as server:
        done, report = run(server, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert report["operations"]["tested"] == report["operations"]["total"] >= 11
        assert report["test_cases"]["generated"] > 2000
        for route, phases in report["valid_rates"].items():  # nor is it by refusing everything
            answered = sum(phase["accepted"] for phase in phases.values())
            assert answered >= (40 if route.startswith("POST") else 2), (route, phases)
        assert engine_with_an_end.grammars._compiled.cache_info().currsize > 1  # schemas that were followed
        server.assert_serves()
        server.assert_comes_to_rest()


@pytest.fixture(scope="module")
def description(server):
    return server.client.get("/openapi.json").json()


def test_what_is_never_answered_is_not_described(description):
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"] and {"200", "401", "500"} <= operation["responses"].keys()
            assert (method == "post") == ("400" in operation["responses"]), path


def test_bounds_and_names_are_described(description):
    bodies = description["components"]["schemas"]
    fields = bodies["CompletionRequest"]["properties"]
    assert fields["seed"]["anyOf"][0]["maximum"] == 2**63 - 1
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert fields["model"]["anyOf"][0]["enum"] == ["small", "other/name"]
    assert fields["best_of"]["enum"] == [1, None]
    assert all(fields[name]["description"] for name in fields if name != "stream_options")
    assert not bodies["CompletionRequest"]["additionalProperties"]


def test_a_response_format_is_described_where_it_is_followed(description):
    bodies = description["components"]["schemas"]
    formats = bodies["ChatRequest"]["properties"]["response_format"]["anyOf"][0]["discriminator"]["mapping"]
    assert formats.keys() == {"text", "json_object", "json_schema"}
    for body in ("CompletionRequest", "GenerateRequest"):
        assert bodies[body]["properties"]["response_format"]["enum"] == [{"type": "text"}, None]


def test_keys_are_described(make_engine):
    with serving(make_engine(), api_keys=["key"]) as server:
        description = server.client.get("/openapi.json", headers={"Authorization": "Bearer key"}).json()
    assert description["security"] == [{"key": []}] and description["paths"]["/health"]["get"]["security"] == []
    assert description["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_a_description_that_is_not_true_is_seen(make_engine, tmp_path):
    with serving(make_engine(max_model_len=48)) as server:
        paths = server.app.openapi()["paths"]
        for path in paths.keys() - {"/version", "/v1/models", "/tokenize"}:
            del paths[path]
        described = server.app.openapi()["components"]["schemas"]
        described["Version"]["properties"]["version"]["type"] = "integer"
        described["TokenizeRequest"]["properties"]["add_special_tokens"] = {"type": "string"}
        done, report = run(server, tmp_path)
    assert done.returncode == 1
    assert {tuple(failure["operations"]) for failure in report["failures"]} == {("GET /version",), ("POST /tokenize",)}
