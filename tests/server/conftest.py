from __future__ import annotations

import pytest
from microvllm import InferenceEngine

from ..small_engine import save_tokenizer
from ..small_models import Shape, make_model
from .small_server import serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small random model with a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("served")
    make_model(Shape(), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_engine(folder):
    def make(**options):
        options = {"max_batch_size": 8, "num_blocks": 128, "block_size": 16} | options
        return InferenceEngine(folder, device="cpu", progress=False, **options)

    return make


@pytest.fixture(scope="module")
def server(make_engine):
    """For tests that leave it as they found it."""
    with serving(make_engine()) as server:
        yield server
        server.assert_serves()
        server.assert_comes_to_rest()
