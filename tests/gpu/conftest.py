"""Tests that need a CUDA GPU. Elsewhere they are not collected, and the report's header says so."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"tests/gpu: on {torch.cuda.get_device_name()}"
    return "tests/gpu: not collected, PyTorch sees no CUDA GPU here"


@pytest.fixture(autouse=True)
def memory_given_back():
    """The large cases take many GB, and the processes of a test run that is spread over several share the GPU."""
    yield
    torch.cuda.empty_cache()
