"""A small random model with a tokenizer of its own, and an engine that runs it."""

from __future__ import annotations

import shutil

import pytest

from ..small_engine import assert_at_rest, save_tokenizer
from ..small_models import Shape, make_model
from .engines import OPTIONS, make_engine


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """transformers' model and its folder, without a tokenizer"""
    folder = tmp_path_factory.mktemp("ids")
    return make_model(Shape(), folder), folder


@pytest.fixture(scope="session")
def folder(reference, tmp_path_factory):
    """The model with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(reference[1], folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["in step", "a step behind"])
def async_scheduling(request):
    """Every test here runs with tokens read before the next step is launched, and after."""
    OPTIONS["async_scheduling"] = request.param


@pytest.fixture(scope="module")
def shared_engine(folder, async_scheduling):
    return make_engine(folder)


@pytest.fixture
def engine(shared_engine):
    """One for all tests that leave it as they found it."""
    yield shared_engine
    assert_at_rest(shared_engine)
